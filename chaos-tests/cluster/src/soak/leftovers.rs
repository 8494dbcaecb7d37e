//! What a migration must not leave behind, by the kernel's word: processes, sockets, guest memory; and records that have not
//! ended, by the cluster's.
//!
//! It knows the cluster's processes by the cluster's folder, which stands in the command line of each. It does not look at
//! what has no process: a socket that the kernel still closes has no owner any more.

use std::collections::BTreeSet;
use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use drover_proto::v1::MigrationPhase;

use crate::Cluster;
use crate::cluster::{PARTIES, host_ip, host_name};
use crate::process::find;
use crate::vmms::folders;

/// How the VMM names guest memory, in a tmpfs of its own or as a memfd.
const GUEST_MEMORY: [&str; 2] = ["/drover-guest", "/memfd:drover-guest"];

/// Descriptors that any daemon or VMM may have open. They use a few dozen; one that keeps some of each migration goes beyond.
const DESCRIPTORS_MAX: usize = 200;

/// States of a TCP socket as in `/proc/net/tcp` (the kernel's tcp_states.h).
const LISTENING: &str = "0A";

/// Everything that is there and should not be, when `vm` has `vmms` VMMs (none or one) and no migration is under way.
pub fn find_leftovers(cluster: &Cluster, vm: &str, vmms: usize) -> Vec<String> {
    let mut left = Vec::new();
    let root = cluster.scratch();
    let running = find("drover-vmm", root);
    if running.len() != vmms {
        left.push(format!(
            "{} VMM processes, {vmms} wanted: {running:?}",
            running.len()
        ));
    }
    control_sockets(root, vmms, &mut left);
    let daemons = find("drover-agent", root)
        .into_iter()
        .chain(find("drover-controller", root))
        .chain(running);
    let mut memories = BTreeSet::new();
    for pid in daemons {
        let open = descriptors(pid.as_raw());
        if open.len() > DESCRIPTORS_MAX {
            left.push(format!("process {pid} has {} descriptors open", open.len()));
        }
        memories.extend(open.into_iter().filter_map(|(file, target)| {
            let target = target.to_string_lossy();
            let guest = GUEST_MEMORY.iter().any(|name| target.starts_with(name));
            guest.then(|| fs::metadata(file).ok().map(|file| (file.dev(), file.ino())))?
        }));
    }
    if memories.len() != vmms {
        left.push(format!(
            "{} guest memories, {vmms} wanted: devices and inodes {memories:?}",
            memories.len()
        ));
    }
    for host in 0..PARTIES {
        tcp_sockets(root, host, &mut left);
    }
    records(cluster, vm, &mut left);
    left
}

/// VMMs' control sockets that lie in the hosts' folders.
fn control_sockets(root: &Path, vmms: usize, left: &mut Vec<String>) {
    let sockets: Vec<_> = (0..PARTIES)
        .flat_map(|host| folders(&root.join(host_name(host)).join("data"), None))
        .map(|folder| folder.join("vmm.sock"))
        .filter(|socket| socket.exists())
        .collect();
    if sockets.len() != vmms {
        left.push(format!(
            "{} control sockets, {vmms} wanted: {sockets:?}",
            sockets.len()
        ));
    }
}

/// A process' descriptors: their names in procfs, and what they are open on.
fn descriptors(pid: i32) -> Vec<(PathBuf, PathBuf)> {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| Some((entry.path(), fs::read_link(entry.path()).ok()?)))
        .collect()
}

/// Sockets of a host that belong to no agent: a migration's port, or its connection to another host.
fn tcp_sockets(root: &Path, host: usize, left: &mut Vec<String>) {
    let config = root.join(host_name(host)).join("config.json");
    let Some(agent) = find("drover-agent", &config).first().copied() else {
        left.push(format!("{} has no agent", host_name(host)));
        return;
    };
    let Ok(table) = fs::read_to_string(format!("/proc/{agent}/net/tcp")) else {
        left.push(format!("the sockets of {} cannot be read", host_name(host)));
        return;
    };
    let hosts: Vec<_> = (0..PARTIES).map(host_ip).collect();
    let sockets: Vec<_> = table.lines().skip(1).filter_map(Socket::parse).collect();
    let listening = sockets.iter().filter(|socket| socket.state == LISTENING);
    if listening.clone().count() != 1 {
        left.push(format!(
            "{} listens at {:?}, the agent's port alone is wanted",
            host_name(host),
            listening.map(|socket| socket.port).collect::<Vec<_>>()
        ));
    }
    let between = sockets.iter().filter(|socket| {
        socket.state != LISTENING
            && socket.owned
            && hosts.contains(&socket.local)
            && hosts.contains(&socket.remote)
    });
    left.extend(
        between.map(|socket| format!("a connection of {} to another host: {socket:?}", host_name(host))),
    );
}

/// A line of `/proc/<pid>/net/tcp` (proc_pid_net(5)).
#[derive(Debug, PartialEq, Eq)]
struct Socket {
    local: Ipv4Addr,
    port: u16,
    remote: Ipv4Addr,
    state: String,
    /// A process has it open.
    owned: bool,
}

impl Socket {
    fn parse(line: &str) -> Option<Self> {
        let fields: Vec<_> = line.split_whitespace().collect();
        let (local, port) = end(fields.get(1)?)?;
        let (remote, _) = end(fields.get(2)?)?;
        Some(Self {
            local,
            port,
            remote,
            state: (*fields.get(3)?).to_owned(),
            owned: *fields.get(9)? != "0",
        })
    }
}

/// "0100007F:1BBD": the address as the machine's integer, the port.
fn end(text: &str) -> Option<(Ipv4Addr, u16)> {
    let (addr, port) = text.split_once(':')?;
    let addr = u32::from_str_radix(addr, 16).ok()?;
    Some((
        Ipv4Addr::from(addr.to_ne_bytes()),
        u16::from_str_radix(port, 16).ok()?,
    ))
}

/// Migrations that have not ended.
fn records(cluster: &Cluster, vm: &str, left: &mut Vec<String>) {
    let migrations = match cluster.client.migrations() {
        Ok(migrations) => migrations,
        Err(fault) => return left.push(format!("the migrations cannot be listed: {fault}")),
    };
    left.extend(
        migrations
            .iter()
            .filter(|migration| !matches!(migration.phase(), MigrationPhase::Done | MigrationPhase::Aborted))
            .map(|migration| format!("a migration that has not ended: {migration:?}")),
    );
    match cluster.client.vm(vm) {
        Ok(record) if record.migration.is_empty() => {}
        Ok(record) => left.push(format!("{vm} is said to be in migration {}", record.migration)),
        Err(fault) => left.push(format!("{vm}: {fault}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_kernels_table_of_sockets_is_read() {
        let line = "   0: 0100007F:1BBD 1600D50A:0050 01 00000000:00000000 00:00000000 00000000     0        0 4242 1 0";
        let socket = Socket::parse(line).expect("it is a whole line");
        assert_eq!(socket.local, Ipv4Addr::LOCALHOST);
        assert_eq!(socket.port, 7101);
        assert_eq!(socket.remote, host_ip(1));
        assert!(socket.owned && socket.state != LISTENING);
        assert_eq!(
            Socket::parse("  sl  local_address rem_address   st tx_queue rx_queue"),
            None
        );
    }
}
