//! What `ctl vm create` tells a guest's cloud-init: files read, and nothing of them shown.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use drover_proto::{Code, v1};

use super::Session;
use crate::args::CloudArgs;
use crate::failure::{Exit, Failure, Result};

/// More of a file than any cluster takes is not read.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// What is asked for, if anything is.
pub fn read(args: &CloudArgs) -> Result<Option<v1::CloudInit>> {
    let CloudArgs {
        user_data,
        hostname,
        ssh_keys,
        network_config,
    } = args;
    if user_data.is_none() && hostname.is_none() && ssh_keys.is_empty() && network_config.is_none() {
        return Ok(None);
    }
    let mut cloud = v1::CloudInit {
        hostname: hostname.clone().unwrap_or_default(),
        ..v1::CloudInit::default()
    };
    if let Some(path) = user_data {
        cloud.user_data = bytes(path)?;
    }
    if let Some(path) = network_config {
        cloud.network_config = text(path)?;
    }
    for path in ssh_keys {
        let text = text(path)?;
        if text.contains("PRIVATE KEY") {
            let path = path.display();
            return Err(Failure::usage(format!(
                "{path} holds a private key, which belongs to nobody but you; want its public half, {path}.pub"
            )));
        }
        let lines = text.lines().map(str::trim);
        let keys = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
        cloud.ssh_keys.extend(keys.map(str::to_owned));
    }
    Ok(Some(cloud))
}

fn bytes(path: &Path) -> Result<Vec<u8>> {
    let mut content = Vec::new();
    let read = File::open(path).and_then(|file| file.take(FILE_BYTES_MAX + 1).read_to_end(&mut content));
    read.map_err(|error| Failure::io(path.display(), &error))?;
    if u64::try_from(content.len()).is_ok_and(|bytes| bytes > FILE_BYTES_MAX) {
        let message = format!("{} has more than {FILE_BYTES_MAX} bytes", path.display());
        return Err(Failure::usage(message));
    }
    Ok(content)
}

fn text(path: &Path) -> Result<String> {
    String::from_utf8(bytes(path)?).map_err(|_| Failure::usage(format!("{} is no text", path.display())))
}

/// `ctl vm show --user-data`.
pub async fn show(session: &Session, name: &str) -> Result<()> {
    let vm = session.client.vm_shown(name, true).await?;
    let Some(cloud) = vm.spec.and_then(|spec| spec.cloud_init) else {
        let message = format!("{name} has no seed disk: it was created without --user-data and its like");
        return Err(Failure::new(Exit::Refused, Code::VmState.as_str(), message));
    };
    let mut out = std::io::stdout().lock();
    let written = out.write_all(&cloud.user_data).and_then(|()| out.flush());
    written.map_err(|error| Failure::output(&error))
}
