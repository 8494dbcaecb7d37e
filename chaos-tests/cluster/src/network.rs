//! One network namespace a party, all on one bridge, with links that tests cut and heal.
//!
//! A namespace is made by a thread that leaves its own and is kept by a file descriptor only: no name, no mount, so
//! nothing can be left behind. `ip` is told of it as `/proc/<this process>/fd/<n>`.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsFd, AsRawFd};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, recv, sendto, setsockopt, socket,
    sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::process::enter_namespace;

/// The address of the bridge, where tests run.
pub const HUB_IP: Ipv4Addr = Ipv4Addr::new(10, 213, 0, 1);

/// A network namespace, gone with the last process in it once this is dropped.
pub struct Namespace {
    file: File,
}

impl Namespace {
    fn new() -> Result<Self> {
        // A thread of its own: only the calling thread changes its namespace.
        let made = std::thread::spawn(|| -> Result<File> {
            unshare(CloneFlags::CLONE_NEWNET).context("making a network namespace (needs root)")?;
            File::open("/proc/thread-self/ns/net").context("opening the new network namespace")
        });
        let file = made.join().expect("the thread only makes two system calls")?;
        let namespace = Self { file };
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// Moves the calling thread, and the threads it starts from now on, into the namespace.
    pub fn enter(&self) -> Result<()> {
        setns(self.file.as_fd(), CloneFlags::CLONE_NEWNET).context("entering a network namespace")
    }

    /// Lets `command` start inside the namespace.
    pub fn adopt(&self, command: &mut Command) -> Result<()> {
        enter_namespace(
            command,
            self.file
                .try_clone()
                .context("copying a namespace's descriptor")?,
        );
        Ok(())
    }

    /// Whether `to` answers an ICMP echo request (RFC 792) from inside within `patience`.
    pub fn ping(&self, to: Ipv4Addr, patience: Duration) -> Result<bool> {
        let file = self
            .file
            .try_clone()
            .context("copying a namespace's descriptor")?;
        let pinger = std::thread::spawn(move || -> Result<bool> {
            setns(file.as_fd(), CloneFlags::CLONE_NEWNET).context("entering a network namespace")?;
            let socket = socket(
                AddressFamily::Inet,
                SockType::Raw,
                SockFlag::empty(),
                SockProtocol::Icmp,
            )?;
            let wait = TimeVal::milliseconds(i64::try_from(patience.as_millis())?);
            setsockopt(&socket, sockopt::ReceiveTimeout, &wait)?;
            // Type 8, code 0, the checksum of it, identifier and number 1.
            let request = [8, 0, 0xf7, 0xfd, 0, 1, 0, 1];
            let there = SockaddrIn::from(SocketAddrV4::new(to, 0));
            sendto(socket.as_raw_fd(), &request, &there, MsgFlags::empty())?;
            let deadline = Instant::now() + patience;
            while Instant::now() < deadline {
                let mut packet = [0; 128];
                match recv(socket.as_raw_fd(), &mut packet, MsgFlags::empty()) {
                    // An IP header of 20 bytes; then type 0: the answer.
                    Ok(28..) if packet[12..16] == to.octets() && packet[20] == 0 => return Ok(true),
                    Ok(_) | Err(Errno::EAGAIN) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            Ok(false)
        });
        pinger.join().expect("the thread makes system calls only")
    }

    /// The name by which `ip` finds the namespace.
    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd())
    }

    /// Runs `ip` with these words inside.
    fn ip(&self, words: &str) -> Result<()> {
        self.tool("ip", &words.split(' ').collect::<Vec<_>>())
    }

    /// What a program inside prints, whatever becomes of it.
    pub fn output(&self, program: &str, arguments: &[&str]) -> Result<String> {
        Ok(String::from_utf8_lossy(&self.run(program, arguments)?.stdout).into_owned())
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Result<Output> {
        let mut command = Command::new(program);
        command.args(arguments);
        self.adopt(&mut command)?;
        command.output().with_context(|| format!("starting {program}"))
    }

    fn tool(&self, program: &str, arguments: &[&str]) -> Result<()> {
        let output = self.run(program, arguments)?;
        if !output.status.success() {
            bail!(
                "{program} {arguments:?}: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(())
    }
}

/// One party's place in the network.
pub struct Place {
    /// Where its processes run.
    pub namespace: Namespace,
    /// Its address.
    pub ip: Ipv4Addr,
    /// The bridge's end of its cable.
    port: String,
}

/// The bridge and all that hangs on it.
pub struct Network {
    hub: Namespace,
    places: Vec<Place>,
}

impl Network {
    /// A bridge with one namespace for each of `ips`, and moves the calling thread to the bridge, so that it and the threads
    /// it starts reach everybody.
    pub fn new(ips: &[Ipv4Addr]) -> Result<Self> {
        let hub = Namespace::new()?;
        hub.ip("link add br0 type bridge")?;
        hub.ip(&format!("addr add {HUB_IP}/24 dev br0"))?;
        hub.ip("link set br0 up")?;
        let mut network = Self {
            hub,
            places: Vec::new(),
        };
        for (number, ip) in ips.iter().enumerate() {
            let namespace = Namespace::new()?;
            let port = format!("port{number}");
            let inside = namespace.path();
            network.hub.ip(&format!(
                "link add {port} type veth peer name eth0 netns {inside}"
            ))?;
            network.hub.ip(&format!("link set {port} master br0"))?;
            network.hub.ip(&format!("link set {port} up"))?;
            namespace.ip(&format!("addr add {ip}/24 dev eth0"))?;
            namespace.ip("link set eth0 up")?;
            network.places.push(Place {
                namespace,
                ip: *ip,
                port,
            });
        }
        network.hub.enter()?;
        Ok(network)
    }

    /// The place of number `index`, in the order given to [`Network::new`].
    pub fn place(&self, index: usize) -> &Place {
        &self.places[index]
    }

    /// Pulls the party's cable: nobody reaches it, and it reaches nobody.
    pub fn unplug(&self, index: usize) {
        let port = &self.places[index].port;
        self.hub
            .ip(&format!("link set {port} down"))
            .expect("a port that exists can be set down");
    }

    /// Puts the cable back.
    pub fn plug(&self, index: usize) {
        let port = &self.places[index].port;
        self.hub
            .ip(&format!("link set {port} up"))
            .expect("a port that exists can be set up");
    }

    /// From now on whatever the party sends passes a token bucket of `mbit_s` (tc-tbf(8)). A bucket of 256 KiB lets whole
    /// segments through that the party's kernel has not cut yet.
    pub fn shape(&self, index: usize, mbit_s: u32) {
        let rate = format!("{mbit_s}mbit");
        let words = "qdisc replace dev eth0 root tbf burst 256kb latency 50ms rate";
        let mut words: Vec<&str> = words.split(' ').collect();
        words.push(&rate);
        self.places[index]
            .namespace
            .tool("tc", &words)
            .expect("tc takes a token bucket");
    }

    /// Undoes [`Network::shape`].
    pub fn unshape(&self, index: usize) {
        self.places[index]
            .namespace
            .tool("tc", &["qdisc", "del", "dev", "eth0", "root"])
            .expect("tc removes the token bucket");
    }

    /// Bytes that the party has sent, counted where they arrive. To be asked on a thread that is at the bridge.
    pub fn bytes_sent(&self, index: usize) -> Result<u64> {
        let port = &self.places[index].port;
        let table =
            std::fs::read_to_string("/proc/thread-self/net/dev").context("reading the links' counters")?;
        received_by(&table, port).with_context(|| format!("no counter of {port} in {table:?}"))
    }

    /// From now on every packet between the two is lost without a word, old connections' packets too.
    pub fn cut_between(&self, one: usize, other: usize) {
        let peer = self.places[other].ip;
        let rules = format!(
            "add table ip cut; add chain ip cut in {{ type filter hook input priority 0; }}; \
             add chain ip cut out {{ type filter hook output priority 0; }}; \
             add rule ip cut in ip saddr {peer} drop; add rule ip cut out ip daddr {peer} drop"
        );
        self.places[one]
            .namespace
            .tool("nft", &[&rules])
            .expect("nft takes the rules");
    }

    /// Undoes every [`Network::cut_between`] of `one`.
    pub fn heal(&self, one: usize) {
        self.places[one]
            .namespace
            .tool("nft", &["flush ruleset"])
            .expect("nft flushes its rules");
    }
}

/// The bytes that `port` has received, from the table of `/proc/<pid>/net/dev` (proc(5)).
fn received_by(table: &str, port: &str) -> Option<u64> {
    table
        .lines()
        .find_map(|line| line.trim_start().strip_prefix(port)?.strip_prefix(':'))?
        .split_whitespace()
        .next()?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ports_counter_is_found_by_its_whole_name() {
        let table = "Inter-|   Receive\n face |bytes packets\n  br0: 5 1\nport10: 70 1 0\n port1:12345 9 0\n";
        assert_eq!(received_by(table, "port1"), Some(12345));
        assert_eq!(received_by(table, "port10"), Some(70));
        assert_eq!(received_by(table, "port2"), None);
    }
}
