//! What a guest's cloud-init is told: checked when the VM is created, and made into the files of a seed disk when a run begins.
//!
//! The files are fixed with the run (`Vm.seed`): its VMMs, wherever it moves, have the same bytes, whatever NIC comes or goes meanwhile; the
//! next start has what is so then. Values are written as JSON strings, which YAML reads alike, so nothing that a name or a key holds
//! is anything but a value.

use std::fmt::Write;

use drover_proto::Fault;
use drover_proto::v1::{CloudInit, CloudSeed, Snapshot, Vm, VmSpec};

use crate::limits::{
    CLOUD_CLUSTER_BYTES_MAX, HOSTNAME_BYTES_MAX, NAME_BYTES_MAX, NETWORK_CONFIG_BYTES_MAX,
    SSH_KEYS_BYTES_MAX, USER_DATA_BYTES_MAX,
};
use crate::networks;
use crate::state::{State, spec_of};
use crate::validate::{invalid, quoted};

/// How user data begins that cloud-init knows (its documentation, "User-data formats"); it ignores any other in silence.
const KINDS: [&[u8]; 10] = [
    b"#cloud-config",
    b"#!",
    b"#include",
    b"#cloud-boothook",
    b"#part-handler",
    b"## template: jinja",
    b"## template:jinja",
    b"Content-Type:",
    b"MIME-Version:",
    &[0x1f, 0x8b],
];
/// How a public key's type begins (sshd(8), "AUTHORIZED_KEYS FILE FORMAT").
const KEY_TYPES: [&str; 4] = ["ssh-", "ecdsa-", "sk-ssh-", "sk-ecdsa-"];

/// The form of what is asked for.
///
/// # Errors
/// `invalid_argument`, by field. No message has anything of the user data but how it begins.
pub(crate) fn check(spec: &VmSpec) -> Result<(), Fault> {
    let Some(cloud) = &spec.cloud_init else {
        return Ok(());
    };
    let data = &cloud.user_data;
    let bounded = |field: &str, bytes: usize, most: usize| {
        if bytes <= most {
            return Ok(());
        }
        let message = format!("{field} has {bytes} bytes; at most {most} are possible");
        Err(invalid(field, message))
    };
    bounded("spec.cloud_init.user_data", data.len(), USER_DATA_BYTES_MAX)?;
    if !data.is_empty() && !KINDS.iter().any(|kind| data.starts_with(kind)) {
        let message = "spec.cloud_init.user_data begins with nothing that cloud-init knows; #cloud-config, #! and a program, #include, #cloud-boothook, #part-handler, ## template: jinja, a MIME message and gzip are possible";
        return Err(invalid("spec.cloud_init.user_data", message.to_owned()));
    }
    if !cloud.hostname.is_empty() {
        hostname(&cloud.hostname)?;
    }
    let keys = cloud.ssh_keys.iter().map(String::len).sum();
    bounded("spec.cloud_init.ssh_keys", keys, SSH_KEYS_BYTES_MAX)?;
    cloud.ssh_keys.iter().try_for_each(|key| ssh_key(key))?;
    const NETWORK: &str = "spec.cloud_init.network_config";
    bounded(NETWORK, cloud.network_config.len(), NETWORK_CONFIG_BYTES_MAX)?;
    if cloud.network_config.contains('\0') {
        return Err(invalid(NETWORK, format!("{NETWORK} has a NUL; it is text")));
    }
    Ok(())
}

fn hostname(name: &str) -> Result<(), Fault> {
    let label = |label: &str| {
        let inner = |byte: u8| byte.is_ascii_alphanumeric();
        let ends = label.bytes().next().is_some_and(inner) && label.bytes().last().is_some_and(inner);
        label.len() <= NAME_BYTES_MAX && ends && label.bytes().all(|byte| inner(byte) || byte == b'-')
    };
    if name.len() <= HOSTNAME_BYTES_MAX && name.split('.').all(label) {
        return Ok(());
    }
    let message = format!(
        "spec.cloud_init.hostname is {}; a name of a-z, 0-9 and -, or several with dots between, is possible",
        quoted(name)
    );
    Err(invalid("spec.cloud_init.hostname", message))
}

fn ssh_key(key: &str) -> Result<(), Fault> {
    let mut words = key.split(' ');
    let is_type = |word: &str| KEY_TYPES.iter().any(|kind| word.starts_with(kind));
    let base64 = |byte: u8| byte.is_ascii_alphanumeric() || b"+/=".contains(&byte);
    let is_key = words.next().is_some_and(is_type)
        && words
            .next()
            .is_some_and(|word| word.len() > 16 && word.bytes().all(base64));
    if is_key && !key.chars().any(char::is_control) {
        return Ok(());
    }
    let message = format!(
        "spec.cloud_init.ssh_keys has {}; a public key in one line, as \"ssh-ed25519 AAAA… name\", is possible",
        quoted(key)
    );
    Err(invalid("spec.cloud_init.ssh_keys", message))
}

fn bytes_of(cloud: &CloudInit) -> usize {
    let keys: usize = cloud.ssh_keys.iter().map(String::len).sum();
    cloud.user_data.len() + keys + cloud.network_config.len()
}

/// Whether the cluster has room for one more that has what the specification has.
///
/// # Errors
/// `invalid_argument` of `field`: all that VMs and their snapshots have of it is replicated.
pub(crate) fn room(state: &State, spec: &VmSpec, field: &str) -> Result<(), Fault> {
    let Some(cloud) = &spec.cloud_init else {
        return Ok(());
    };
    let vms = state.vms().map(spec_of);
    let specs = vms.chain(state.snapshots().filter_map(|snapshot| snapshot.spec.as_ref()));
    let taken: usize = specs
        .filter_map(|spec| spec.cloud_init.as_ref())
        .map(bytes_of)
        .sum();
    if taken + bytes_of(cloud) <= CLOUD_CLUSTER_BYTES_MAX {
        return Ok(());
    }
    let message = format!(
        "{field} has {} bytes for cloud-init; VMs and snapshots have {taken} of the {CLOUD_CLUSTER_BYTES_MAX} that the cluster takes of them all",
        bytes_of(cloud)
    );
    Err(invalid(field, message))
}

/// The files of a run that begins now, but the user data. One that begins as a snapshot has those that its guest has read.
pub(crate) fn seed(state: &State, vm: &Vm) -> Option<CloudSeed> {
    let spec = spec_of(vm);
    let cloud = spec.cloud_init.as_ref()?;
    if let Some((_, snapshot)) = state.source_of(vm) {
        return snapshot.seed.clone();
    }
    let network_config = if cloud.network_config.is_empty() {
        network_config(state, spec)
    } else {
        cloud.network_config.clone()
    };
    Some(CloudSeed {
        user_data: Vec::new(),
        meta_data: meta_data(cloud, &spec.name, vm.created_ms),
        network_config,
    })
}

/// Instance, name and keys. The instance is the VM and when it was created: cloud-init does what it does once for each.
fn meta_data(cloud: &CloudInit, vm: &str, created_ms: u64) -> String {
    let hostname = if cloud.hostname.is_empty() {
        vm
    } else {
        &cloud.hostname
    };
    let mut text = format!(
        "instance-id: {}\nlocal-hostname: {}\n",
        scalar(&format!("{vm}-{created_ms}")),
        scalar(hostname)
    );
    if !cloud.ssh_keys.is_empty() {
        text.push_str("public-keys:\n");
        for key in &cloud.ssh_keys {
            let _ = writeln!(text, "  - {}", scalar(key));
        }
    }
    text
}

/// The NICs by their MACs (network-config version 2). One in a network without a subnet asks by DHCP, and nothing waits for it.
fn network_config(state: &State, spec: &VmSpec) -> String {
    let mut text = String::new();
    let mut routed = false;
    for (at, nic) in spec.nics.iter().enumerate() {
        let Some(network) = state.network(&nic.network) else {
            continue;
        };
        let _ = write!(
            text,
            "  nic{at}:\n    match: {{macaddress: {}}}\n    mtu: {}\n",
            scalar(&nic.mac),
            network.mtu
        );
        match networks::prefix(network) {
            Some(prefix) => {
                let _ = writeln!(
                    text,
                    "    addresses: [{}]",
                    scalar(&format!("{}/{prefix}", nic.ip))
                );
                if !std::mem::replace(&mut routed, true) {
                    let via = scalar(&network.gateway);
                    let _ = writeln!(text, "    routes: [{{to: \"0.0.0.0/0\", via: {via}}}]");
                }
            }
            None => text.push_str("    dhcp4: true\n    optional: true\n"),
        }
    }
    if text.is_empty() {
        return text;
    }
    format!("version: 2\nethernets:\n{text}")
}

/// A string as JSON has it.
fn scalar(text: &str) -> String {
    let mut quoted = String::from('"');
    for char in text.chars() {
        match char {
            '"' | '\\' => quoted.extend(['\\', char]),
            char if char.is_control() => {
                let _ = write!(quoted, "\\u{:04x}", u32::from(char));
            }
            char => quoted.push(char),
        }
    }
    quoted.push('"');
    quoted
}

/// The VM as answers show it: without what may be secret, and how much there is of it.
pub fn without_secrets(vm: &Vm) -> Vm {
    let mut vm = vm.clone();
    hide(vm.spec.as_mut());
    vm.seed = None;
    vm
}

/// A snapshot, likewise.
pub fn snapshot_without_secrets(snapshot: &Snapshot) -> Snapshot {
    let mut snapshot = snapshot.clone();
    hide(snapshot.spec.as_mut());
    snapshot.seed = None;
    snapshot
}

fn hide(spec: Option<&mut VmSpec>) {
    if let Some(cloud) = spec.and_then(|spec| spec.cloud_init.as_mut()) {
        cloud.user_data_bytes = u32::try_from(cloud.user_data.len()).unwrap_or(u32::MAX);
        cloud.user_data.clear();
    }
}

/// A snapshot as its host is told of it, which has the files of the seed disk from the VM itself.
pub(crate) fn for_agents(snapshot: &Snapshot) -> Snapshot {
    let mut snapshot = snapshot.clone();
    if let Some(spec) = &mut snapshot.spec {
        spec.cloud_init = None;
    }
    snapshot.seed = None;
    snapshot
}

#[cfg(test)]
mod tests {
    use drover_proto::Code;

    use super::*;

    fn checked(change: impl FnOnce(&mut CloudInit)) -> Result<(), Fault> {
        let mut cloud = CloudInit::default();
        change(&mut cloud);
        check(&VmSpec {
            cloud_init: Some(cloud),
            ..VmSpec::default()
        })
    }

    #[test]
    fn what_cloud_init_would_ignore_or_not_take_is_refused_by_field_and_without_a_secret() {
        type Change = fn(&mut CloudInit);
        let cases: [(&str, Change, &str); 9] = [
            (
                "user_data",
                |c| c.user_data = vec![b'#'; 20_000],
                "20000 bytes; at most 16384",
            ),
            (
                "user_data",
                |c| c.user_data = b"password: hunter2".to_vec(),
                "#cloud-config",
            ),
            ("hostname", |c| c.hostname = "a_b".into(), "\"a_b\""),
            ("hostname", |c| c.hostname = "a..b".into(), "\"a..b\""),
            (
                "ssh_keys",
                |c| c.ssh_keys = vec!["-----BEGIN OPENSSH PRIVATE KEY-----".into()],
                "public key",
            ),
            (
                "ssh_keys",
                |c| c.ssh_keys = vec!["ssh-ed25519 AAAA\nssh-rsa AAAA".into()],
                "one line",
            ),
            (
                "ssh_keys",
                |c| c.ssh_keys = vec!["ssh-rsa ".to_owned() + &"A".repeat(9_000)],
                "at most 8192",
            ),
            (
                "network_config",
                |c| c.network_config = "x".repeat(9_000),
                "at most 8192",
            ),
            ("network_config", |c| c.network_config = "a\0".into(), "NUL"),
        ];
        for (field, change, shown) in cases {
            let fault = checked(change).unwrap_err();
            assert_eq!(fault.code, Code::InvalidArgument);
            assert_eq!(fault.field, format!("spec.cloud_init.{field}"));
            assert!(fault.message.contains(shown), "{}", fault.message);
            assert!(!fault.message.contains("hunter2"), "{}", fault.message);
        }
        for good in [
            "#cloud-config\n",
            "#!/bin/sh\n",
            "## template: jinja\n#cloud-config\n",
            "",
        ] {
            checked(|cloud| cloud.user_data = good.into()).unwrap();
        }
        checked(|cloud| {
            cloud.hostname = "Web-1.example.org".into();
            cloud.ssh_keys = vec!["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ me@home".into()];
        })
        .unwrap();
    }

    #[test]
    fn a_value_is_nothing_but_a_value() {
        assert_eq!(scalar("a: [\"b\\\"]\n"), r#""a: [\"b\\\"]\u000a""#);
    }
}
