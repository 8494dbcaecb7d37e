//! The harness itself: links that can be cut, and processes that cannot outlive their test.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use drover_chaos_cluster::network::Network;
use drover_chaos_cluster::process::{Daemon, Spawner, find};

const ONE: Ipv4Addr = Ipv4Addr::new(10, 213, 0, 11);
const OTHER: Ipv4Addr = Ipv4Addr::new(10, 213, 0, 12);

/// Says why and returns `false` where namespaces cannot be made.
fn can_run() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        println!("SKIPPED: network and PID namespaces need root");
    }
    root
}

fn send_and_hear(stream: &mut TcpStream, server: &mut TcpStream) -> std::io::Result<u8> {
    let mut byte = [0];
    server.set_read_timeout(Some(Duration::from_millis(300)))?;
    stream.write_all(b"x")?;
    server.read_exact(&mut byte)?;
    Ok(byte[0])
}

#[test]
fn a_cut_link_carries_nothing_until_it_is_healed() {
    if !can_run() {
        return;
    }
    let network = Network::new(&[ONE, OTHER]).expect("a network");
    network
        .place(0)
        .namespace
        .enter()
        .expect("the namespace can be entered");
    let listener = TcpListener::bind((ONE, 0)).expect("an address of our own");
    let addr = listener.local_addr().expect("it is bound");
    network
        .place(1)
        .namespace
        .enter()
        .expect("the namespace can be entered");
    let mut client = TcpStream::connect(addr).expect("the two reach each other over the bridge");
    let (mut server, _) = listener.accept().expect("it was called");
    assert_eq!(
        send_and_hear(&mut client, &mut server).expect("the link carries"),
        b'x'
    );

    network.cut_between(0, 1);
    assert!(
        send_and_hear(&mut client, &mut server).is_err(),
        "the cut link carried something"
    );
    network.heal(0);
    server
        .set_read_timeout(Some(Duration::from_secs(20)))
        .expect("a socket has a time limit");
    let mut byte = [0];
    server
        .read_exact(&mut byte)
        .expect("TCP sends again what was lost");

    network.unplug(1);
    assert!(
        send_and_hear(&mut client, &mut server).is_err(),
        "the unplugged link carried something"
    );
    network.plug(1);
    server
        .set_read_timeout(Some(Duration::from_secs(20)))
        .expect("a socket has a time limit");
    server
        .read_exact(&mut byte)
        .expect("TCP sends again what was lost");
}

#[test]
fn a_detached_grandchild_dies_with_the_spawner() {
    if !can_run() {
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let script = "setsid sleep 1000 & exec sleep 1001";
    // The folder in the arguments is how the two are found.
    let mut command = Command::new("sh");
    command
        .arg("-c")
        .arg(script.replace("sleep", &format!("{}/sleep", dir.path().display())));
    std::os::unix::fs::symlink("/bin/sleep", dir.path().join("sleep")).expect("a link");
    command.stdin(Stdio::null());
    let spawner = Spawner::new().expect("a PID namespace");
    let mut daemon = Daemon::start(&spawner, command).expect("it starts");
    let program = format!("{}/sleep", dir.path().display());
    let count = || find(&program, Path::new("100")).len();
    drover_chaos_cluster::await_some("both to run", || match count() {
        2 => Ok(()),
        other => Err(format!("{other} of them")),
    });
    daemon.kill();
    assert_eq!(count(), 1, "the detached one lives on");
    drop(spawner);
    assert_eq!(count(), 0, "nothing outlives the spawner");
}
