//! The forms that images, disks and NICs are named in.

use std::path::PathBuf;

use drover_proto::v1;

use super::NamedImage;

/// `NAME=PATH`.
pub fn parse_image(text: &str) -> Result<NamedImage, String> {
    let (name, path) = text
        .split_once('=')
        .ok_or("want NAME=PATH, as linux=/boot/vmlinuz")?;
    let name_fits = !name.is_empty()
        && name.len() <= 63
        && !name.starts_with('.')
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    if !name_fits {
        return Err(format!(
            "\"{name}\" is not an image name: letters, digits, '.', '_' and '-', at most 63"
        ));
    }
    if path.is_empty() {
        return Err("the path is missing: want NAME=PATH".to_owned());
    }
    Ok(NamedImage {
        name: name.to_owned(),
        path: PathBuf::from(path),
    })
}

/// `NETWORK[:mac=MAC,ip=IP]`.
pub fn parse_nic(text: &str) -> Result<v1::VmNic, String> {
    let wanted = "want NETWORK[:mac=MAC,ip=IP]";
    let (network, more) = text
        .split_once(':')
        .map_or((text, None), |(net, more)| (net, Some(more)));
    if network.is_empty() {
        return Err(format!("the network is missing: {wanted}"));
    }
    let mut nic = v1::VmNic {
        network: network.to_owned(),
        ..v1::VmNic::default()
    };
    for part in more.into_iter().flat_map(|more| more.split(',')) {
        let (slot, value) = match part.split_once('=') {
            Some(("mac", value)) => (&mut nic.mac, value),
            Some(("ip", value)) => (&mut nic.ip, value),
            _ => return Err(format!("\"{part}\" is nothing that a NIC has: {wanted}")),
        };
        if value.is_empty() || !slot.is_empty() {
            return Err(format!("\"{part}\" is empty or given twice: {wanted}"));
        }
        value.clone_into(slot);
    }
    Ok(nic)
}

/// `VOLUME[:ro]`.
pub fn parse_disk(text: &str) -> Result<v1::VmDisk, String> {
    let (volume, read_only) = match text.split_once(':') {
        None => (text, false),
        Some((volume, "ro")) => (volume, true),
        Some((_, mode)) => {
            return Err(format!(
                "\"{mode}\" is no mode of a disk: want VOLUME or VOLUME:ro"
            ));
        }
    };
    if volume.is_empty() {
        return Err("the volume is missing: want VOLUME or VOLUME:ro".to_owned());
    }
    Ok(v1::VmDisk {
        volume: volume.to_owned(),
        read_only,
        ..v1::VmDisk::default()
    })
}
