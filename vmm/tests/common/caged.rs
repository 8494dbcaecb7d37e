//! What an agent does for a VMM in its sandbox: opens, and hands in.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::fs::File;
use std::io::{IoSlice, Read};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use drover_proto::descriptors::{COUNT_MAX, Kind, SOCKET, encode};
use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socket};

/// A user that no account has.
pub const UID: u32 = 1_900_000_000;

/// The configuration asks for a sandbox, with a user of its own where the test is root.
pub fn caged(config: &mut serde_json::Value) {
    config["sandbox"] = if nix::unistd::geteuid().is_root() {
        serde_json::json!({"uid": UID, "gid": UID, "required": true})
    } else {
        serde_json::json!({"required": true})
    };
}

/// Hands descriptors to the VMM of `folder`; gives its answer.
pub fn hand_in(folder: &Path, kind: Kind, name: &str, descriptors: &[OwnedFd]) -> String {
    let mut stream = UnixStream::connect(folder.join(SOCKET)).unwrap();
    let raw: Vec<_> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let message = encode(kind, name);
    sendmsg::<()>(
        stream.as_raw_fd(),
        &[IoSlice::new(&message)],
        &[ControlMessage::ScmRights(&raw)],
        MsgFlags::empty(),
        None,
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// Opens a disk's file and hands it in.
pub fn hand_disk(folder: &Path, path: &Path) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    assert_eq!(
        hand_in(folder, Kind::File, path.to_str().unwrap(), &[file.into()]),
        "ok"
    );
}

/// Makes the files of a snapshot in `folder` and hands them in, with what memory is protected with.
pub fn hand_snapshot(vmm: &Path, folder: &Path, slots: &[u32]) {
    let device = File::options()
        .read(true)
        .write(true)
        .open("/dev/userfaultfd")
        .unwrap();
    assert_eq!(hand_in(vmm, Kind::Uffd, "", &[device.into()]), "ok");
    hand_snapshot_files(vmm, folder, slots);
}

/// Its files alone.
pub fn hand_snapshot_files(vmm: &Path, folder: &Path, slots: &[u32]) {
    let own = ["memory", "state", "manifest.new"].map(str::to_owned).into_iter();
    for name in own.chain(slots.iter().map(|slot| format!("disk{slot}"))) {
        let path = folder.join(name);
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .unwrap();
        assert_eq!(
            hand_in(vmm, Kind::Snapshot, path.to_str().unwrap(), &[file.into()]),
            "ok"
        );
    }
}

/// Hands in what a migration to another host takes.
pub fn hand_way(folder: &Path, migration: &str, tls: [&Path; 3]) {
    let files = tls.map(|path| File::open(path).unwrap().into());
    assert_eq!(hand_in(folder, Kind::Tls, migration, &files), "ok");
    let one = |_| {
        socket(
            AddressFamily::Inet,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC,
            None,
        )
        .unwrap()
    };
    let sockets: Vec<OwnedFd> = (0..COUNT_MAX).map(one).collect();
    assert_eq!(hand_in(folder, Kind::Tcp, migration, &sockets), "ok");
}

/// Connects to the VMM that waits for an upgrade, and hands that in.
pub fn hand_peer(folder: &Path, waits_at: &Path) {
    let stream = UnixStream::connect(waits_at).unwrap();
    assert_eq!(
        hand_in(folder, Kind::Peer, waits_at.to_str().unwrap(), &[stream.into()]),
        "ok"
    );
}

/// Somebody whom nobody should reach.
pub fn stranger() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    (listener, addr)
}
