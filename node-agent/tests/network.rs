//! Networks against the kernel: each test in network namespaces of its own, which are gone with its threads. Frames are sent and
//! received through TAPs opened as a VMM opens them. That a frame is dropped is known by the next one that passes.
#![allow(clippy::unwrap_used, reason = "a panic is the test's failure")]

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use drover_node_agent::Config;
use drover_node_agent::key::Key;
use drover_node_agent::network::plan::Nic;
use drover_node_agent::network::{NICS_FILE, Networks, tap};
use drover_proto::Code;
use drover_proto::v1::{Network, NetworkKind, NetworkPeers, VmDesired, VmNic, VmSpec};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use serde_json::json;

/// How long a test waits for what is to come.
const PATIENCE: Duration = Duration::from_secs(30);
/// The header of a virtio-net device, before each frame.
const VNET_HEADER: usize = 10;
const EVERYBODY: [u8; 6] = [0xff; 6];
const ARP: u16 = 0x0806;
const IPV4: u16 = 0x0800;
/// For local experiments (IEEE 802): nothing in the kernel sends it.
const LOCAL: u16 = 0x88b5;

/// Runs `test` on a thread in a network namespace of its own.
fn in_namespace<T: Send + 'static>(test: impl AsyncFnOnce() -> T + Send + 'static) -> Option<T> {
    if !nix::unistd::geteuid().is_root() {
        println!("SKIPPED: network namespaces need root");
        return None;
    }
    let thread = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        ip("link set lo up");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(test())
    });
    match thread.join() {
        Ok(result) => Some(result),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

fn ip(words: &str) -> String {
    tool("ip", words)
}

fn tool(program: &str, words: &str) -> String {
    let output = Command::new(program).args(words.split(' ')).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {words}: {said}");
    String::from_utf8(output.stdout).unwrap()
}

/// The devices' names.
fn devices() -> BTreeSet<String> {
    let shown = ip("-o link show");
    let name = |line: &str| {
        line.split(": ")
            .nth(1)
            .unwrap()
            .split('@')
            .next()
            .unwrap()
            .to_owned()
    };
    shown.lines().map(name).collect()
}

fn config(host: &str, networks: &serde_json::Value) -> Config {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("agent.json");
    let config = json!({
        "cluster_id": "test", "name": host, "data_dir": "data", "listen": "127.0.0.1:0", "advertise": "127.0.0.1:0",
        "migration_ip": "127.0.0.1", "controllers": ["127.0.0.1:7001"], "images_dir": "images", "vmm": "vmm",
        "tls": {"ca": "ca.pem", "cert": "h.pem", "key": "h.key"}, "networks": networks,
    });
    std::fs::write(&path, config.to_string()).unwrap();
    Config::read(&path).unwrap()
}

fn network(name: &str) -> Network {
    let mut network = Network {
        name: name.into(),
        mtu: 1400,
        ..Network::default()
    };
    if name.starts_with("wide") {
        network.set_kind(NetworkKind::Vxlan);
        (network.vni, network.port) = (7, 4789);
    }
    network.allow_spoofing = name == "free";
    network
}

fn mac(number: u8) -> [u8; 6] {
    [0x52, 0x54, 0, 0, 0, number]
}

/// A VM with a NIC in each of `networks`; the first has MAC and address of `number`.
fn desired(number: u8, networks: &[&str], with_ip: bool) -> VmDesired {
    let nic = |(at, name): (usize, &&str)| VmNic {
        network: (*name).to_owned(),
        mac: format!("52:54:00:00:{at:02x}:{number:02x}"),
        ip: if with_ip {
            format!("10.1.0.{number}")
        } else {
            String::new()
        },
        ..VmNic::default()
    };
    VmDesired {
        spec: Some(VmSpec {
            nics: networks.iter().enumerate().map(nic).collect(),
            ..VmSpec::default()
        }),
        networks: networks.iter().map(|name| network(name)).collect(),
        ..VmDesired::default()
    }
}

fn key(number: u8) -> Key {
    Key::start(&format!("vm{number}"), 1)
}

/// A guest's end of its TAP.
struct Guest {
    tap: File,
    mac: [u8; 6],
}

impl Guest {
    fn open(nic: &Nic) -> Self {
        Self {
            tap: tap::open(&nic.tap).unwrap(),
            mac: nic.mac,
        }
    }

    /// Says hello until it is heard: a bridge forwards some time after its port was opened.
    fn meet(&mut self, other: &mut Self, ip: [u8; 4]) {
        let deadline = Instant::now() + PATIENCE;
        let mut hello = arp(1, self.mac, ip);
        while !other.has_frame(Duration::from_millis(50)) {
            assert!(Instant::now() < deadline, "nothing is heard");
            self.send(EVERYBODY, ARP, &hello);
        }
        hello.extend(b"ready");
        self.send(EVERYBODY, ARP, &hello);
        other.until(b"ready");
    }

    fn has_frame(&self, within: Duration) -> bool {
        let mut fds = [PollFd::new(self.tap.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::try_from(within).unwrap()).unwrap() == 1
    }

    /// Sends a frame from `source`.
    fn send_from(&mut self, source: [u8; 6], to: [u8; 6], kind: u16, payload: &[u8]) {
        let mut frame = vec![0; VNET_HEADER];
        frame.extend(to);
        frame.extend(source);
        frame.extend(kind.to_be_bytes());
        frame.extend(payload);
        frame.resize(frame.len().max(VNET_HEADER + 60), 0);
        self.tap.write_all(&frame).unwrap();
    }

    fn send(&mut self, to: [u8; 6], kind: u16, payload: &[u8]) {
        self.send_from(self.mac, to, kind, payload);
    }

    /// The next frame of another guest: source, kind, payload.
    fn next(&mut self) -> ([u8; 6], u16, Vec<u8>) {
        loop {
            assert!(self.has_frame(PATIENCE), "no frame came");
            let mut buffer = [0; 2048];
            let bytes = self.tap.read(&mut buffer).unwrap();
            let frame = &buffer[VNET_HEADER..bytes];
            let source: [u8; 6] = frame[6..12].try_into().unwrap();
            let kind = u16::from_be_bytes([frame[12], frame[13]]);
            // What the host's kernel says of a TAP by itself is not a guest's.
            if source[0] == mac(0)[0] {
                return (source, kind, frame[14..].to_vec());
            }
        }
    }

    /// All frames up to one of which the payload holds `mark`.
    fn until(&mut self, mark: &[u8]) -> Vec<([u8; 6], u16, Vec<u8>)> {
        let mut frames = Vec::new();
        loop {
            let frame = self.next();
            let last = frame.2.windows(mark.len()).any(|part| part == mark);
            frames.push(frame);
            if last {
                return frames;
            }
        }
    }
}

/// An ARP request of the hardware type, from `mac` and `ip`.
fn arp(hardware: u16, mac: [u8; 6], ip: [u8; 4]) -> Vec<u8> {
    let mut arp = Vec::from(hardware.to_be_bytes());
    arp.extend([8, 0, 6, 4, 0, 1]);
    arp.extend(mac);
    arp.extend(ip);
    arp.extend([0, 0, 0, 0, 0, 0, 10, 1, 0, 99]);
    arp
}

/// An IPv4 packet with a UDP datagram; whole, since a host's bridge may look into it (br_netfilter).
fn udp(source: [u8; 4], from: u16, to: u16) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0];
    packet.extend(source);
    packet.extend(Ipv4Addr::BROADCAST.octets());
    let words = packet
        .chunks(2)
        .map(|word| u32::from(word[0]) << 8 | u32::from(word[1]));
    let sum: u32 = words.sum();
    let checksum = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
    packet[10..12].copy_from_slice(&checksum.to_be_bytes());
    packet.extend(from.to_be_bytes());
    packet.extend(to.to_be_bytes());
    packet.extend([0, 8, 0, 0]);
    packet
}

fn bridges() -> serde_json::Value {
    json!({"bridges": {"lan": {}, "free": {}}})
}

#[test]
fn two_vms_of_a_host_reach_each_other_and_a_forged_frame_passes_nowhere() {
    in_namespace(async || {
        let networks = Networks::new(&config("host1", &bridges())).await;
        assert_eq!(networks.offer().networks, ["free", "lan"]);
        assert_eq!(networks.offer().networking, "ok");
        let one = networks
            .attach(&key(1), &desired(1, &["lan"], true))
            .await
            .unwrap();
        let two = networks
            .attach(&key(2), &desired(2, &["lan"], true))
            .await
            .unwrap();
        let (mut one, mut two) = (Guest::open(&one[0]), Guest::open(&two[0]));
        let own = [10, 1, 0, 1];
        one.meet(&mut two, own);
        let stolen = [10, 1, 0, 2];
        one.send(EVERYBODY, ARP, &arp(1, mac(1), own));
        one.send(EVERYBODY, ARP, &arp(1, mac(1), [0; 4]));
        one.send(EVERYBODY, IPV4, &udp([0; 4], 68, 67));
        one.send(mac(2), IPV4, &udp(own, 1, 2));
        let mut ipv6 = vec![0; 40];
        (ipv6[0], ipv6[6]) = (0x60, 59);
        one.send(mac(2), 0x86dd, &ipv6);
        one.send_from(mac(9), EVERYBODY, IPV4, &udp(own, 3, 3));
        one.send_from(mac(2), EVERYBODY, ARP, &arp(1, mac(1), own));
        one.send(EVERYBODY, ARP, &arp(1, mac(2), own));
        one.send(EVERYBODY, ARP, &arp(1, mac(1), stolen));
        one.send(EVERYBODY, ARP, &arp(6, mac(1), stolen)); // IEEE 802, which Linux takes for Ethernet.
        one.send(mac(2), IPV4, &udp(stolen, 4, 4));
        one.send(EVERYBODY, IPV4, &udp([0; 4], 68, 69));
        let mut tagged = vec![0, 5, 8, 0];
        tagged.extend(udp(stolen, 5, 5));
        one.send(mac(2), 0x8100, &tagged);
        one.send(mac(2), LOCAL, b"unknown");
        let mut end = arp(1, mac(1), own);
        end.extend(b"end");
        one.send(EVERYBODY, ARP, &end);
        let seen = two.until(b"end");
        let kinds: Vec<u16> = seen.iter().map(|(_, kind, _)| *kind).collect();
        assert_eq!(kinds, [ARP, ARP, IPV4, IPV4, 0x86dd, ARP], "{seen:02x?}");
        assert!(seen.iter().all(|(source, _, _)| *source == mac(1)));
    });
}

#[test]
fn without_an_address_the_mac_alone_is_kept_and_a_network_may_allow_any() {
    in_namespace(async || {
        let networks = Networks::new(&config("host1", &bridges())).await;
        let one = networks
            .attach(&key(1), &desired(1, &["lan", "free"], false))
            .await
            .unwrap();
        let two = networks
            .attach(&key(2), &desired(2, &["lan", "free"], false))
            .await
            .unwrap();
        let (mut from, mut to) = (Guest::open(&one[0]), Guest::open(&two[0]));
        from.meet(&mut to, [10, 9, 9, 9]);
        from.send_from(mac(9), EVERYBODY, LOCAL, b"forged");
        from.send(EVERYBODY, ARP, &arp(1, mac(9), [10, 9, 9, 9]));
        from.send(EVERYBODY, ARP, &arp(1, mac(1), [10, 9, 9, 9]));
        from.send(EVERYBODY, LOCAL, b"end");
        let kinds: Vec<_> = to.until(b"end").iter().map(|(_, kind, _)| *kind).collect();
        assert_eq!(kinds, [ARP, LOCAL]);
        let (mut from, mut to) = (Guest::open(&one[1]), Guest::open(&two[1]));
        from.meet(&mut to, [10, 9, 9, 9]);
        from.send_from(mac(9), EVERYBODY, LOCAL, b"forged");
        assert_eq!(to.until(b"forged")[0].0, mac(9));
    });
}

#[test]
fn what_is_made_is_gone_with_the_last_vm_and_what_is_others_stays() {
    in_namespace(async || {
        ip("link add br0 type bridge");
        ip("link add up0 type veth peer name up1");
        ip("link add dvforeign type bridge");
        tool("ip", "link set br0 up");
        ip("tuntap add tap7 mode tap");
        let before = devices();
        let wanted = json!({"bridges": {"lan": {"bridge": "br0"}, "dmz": {"uplink": "up0"}}});
        let networks = Networks::new(&config("host1", &wanted)).await;
        let lan = networks
            .attach(&key(1), &desired(1, &["lan", "dmz"], false))
            .await
            .unwrap();
        let more = networks
            .attach(&key(2), &desired(2, &["dmz"], false))
            .await
            .unwrap();
        assert_eq!(
            devices().difference(&before).count(),
            4,
            "three TAPs and a bridge"
        );
        let shown = ip(&format!("-d link show dev {}", lan[0].tap));
        for part in [
            "master br0",
            "mtu 1400",
            "persist on",
            "vnet_hdr on",
            "vm1/e1-start in lan",
        ] {
            assert!(shown.contains(part), "{part}: {shown}");
        }
        let inet6 = ip(&format!("-6 addr show dev {}", lan[0].tap));
        assert_eq!(inet6, "", "the host has no address among guests");
        let bridge = |device: &str| {
            let shown = ip(&format!("-o link show dev {device}"));
            shown
                .split("master ")
                .nth(1)
                .map(|rest| rest.split(' ').next().unwrap().to_owned())
        };
        assert_eq!(bridge("up0"), bridge(&more[0].tap));
        networks.detach(&key(2));
        networks.detach(&key(1));
        settled(&networks, || devices() == before).await;
        assert_eq!(bridge("up0"), None);
        assert_eq!(tool("nft", "list tables"), "");
    });
}

/// Lets the networks be kept until `done`.
async fn settled(networks: &Networks, done: impl Fn() -> bool) {
    let wait = async {
        while !done() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::select! {
        () = networks.keep() => unreachable!("kept for ever"),
        waited = tokio::time::timeout(PATIENCE, wait) => waited.unwrap_or_else(|_| panic!("there is {:?}", devices())),
    }
}

#[test]
fn what_an_agent_left_that_was_killed_is_cleared_and_what_lives_stays() {
    in_namespace(async || {
        let before = devices();
        let folder = tempfile::tempdir().unwrap();
        let wide = json!({"bridges": {"lan": {}}, "vxlan": {"address": "127.0.0.1"}});
        let lives;
        {
            let killed = Networks::new(&config("host1", &wide)).await;
            lives = killed.attach(&key(1), &desired(1, &["lan"], true)).await.unwrap();
            killed
                .attach(&key(2), &desired(2, &["lan", "wide"], true))
                .await
                .unwrap();
            assert_eq!(devices().difference(&before).count(), 6);
        }
        std::fs::write(folder.path().join(NICS_FILE), serde_json::to_vec(&lives).unwrap()).unwrap();
        let next = Networks::new(&config("host1", &wide)).await;
        next.know(&key(1), folder.path());
        settled(&next, || devices().difference(&before).count() == 2).await;
        assert!(devices().contains(&lives[0].tap));
        let rules = tool("nft", "list ruleset");
        assert!(
            rules.contains(&lives[0].tap) && rules.contains("52:54:00:00:00:01"),
            "{rules}"
        );
        drop(next);
        // One whose file cannot be read keeps its TAP; what it may send is not known, so it sends nothing.
        std::fs::write(folder.path().join(NICS_FILE), b"{").unwrap();
        let next = Networks::new(&config("host1", &wide)).await;
        next.know(&key(1), folder.path());
        next.attach(&key(3), &desired(3, &["lan"], true)).await.unwrap();
        assert!(devices().contains(&lives[0].tap));
        drop(next);
        // An agent that offers nothing any more clears up too; one of another name does not.
        let other = Networks::new(&config("host2", &json!({}))).await;
        other.attach(&key(9), &desired(9, &[], false)).await.unwrap();
        let next = Networks::new(&config("host1", &json!({}))).await;
        assert!(devices().contains(&lives[0].tap));
        settled(&next, || devices() == before).await;
    });
}

#[test]
fn rules_that_were_flushed_are_there_again_with_the_next_change() {
    in_namespace(async || {
        let networks = Networks::new(&config("host1", &bridges())).await;
        let one = networks
            .attach(&key(1), &desired(1, &["lan"], true))
            .await
            .unwrap();
        tool("nft", "flush ruleset");
        settled(&networks, || tool("nft", "list ruleset").contains(&one[0].tap)).await;
    });
}

#[test]
fn an_existing_bridge_keeps_its_mac_and_a_missing_one_fails_the_start_with_its_code() {
    in_namespace(async || {
        ip("link add br0 type bridge");
        ip("link add up0 type veth peer name up1");
        ip("link set up0 master br0");
        ip("addr add 10.9.9.9/24 dev up1");
        let of_bridge = || ip("-o link show dev br0").split("link/ether ").nth(1).unwrap()[..17].to_owned();
        let (mac_before, wanted) = (
            of_bridge(),
            json!({"bridges": {"lan": {"bridge": "br0"}, "none": {"bridge": "br7"}, "host": {"uplink": "up1"}, "taken": {"uplink": "up0"}},
                   "vxlan": {"address": "10.8.8.8"}}),
        );
        let networks = Networks::new(&config("host1", &wanted)).await;
        let offer = networks.offer();
        assert_eq!((offer.networks, offer.vxlan), (vec!["lan".to_owned()], None));
        for why in [
            "none: no interface is named br7",
            "host: up1 has the host's address 10.9.9.9",
            "taken: up0 is a port of br0",
            "vxlan: the host has no address 10.8.8.8",
        ] {
            assert!(offer.networking.contains(why), "{why}: {}", offer.networking);
        }
        networks
            .attach(&key(1), &desired(1, &["lan"], false))
            .await
            .unwrap();
        assert_eq!(of_bridge(), mac_before);
        let before = devices();
        for (network, why) in [("none", "br7"), ("other", "configuration"), ("taken", "up0")] {
            let fault = networks
                .attach(&key(2), &desired(2, &[network], false))
                .await
                .unwrap_err();
            assert_eq!(fault.code, Code::NetworkUnavailable, "{fault}");
            assert!(fault.message.contains(why), "{fault}");
        }
        settled(&networks, || devices() == before).await;
        ip("link add br7 type bridge");
        settled(&networks, || networks.offer().networks == ["lan", "none"]).await;
    });
}

#[test]
fn an_agent_without_the_privilege_offers_nothing_and_says_so() {
    in_namespace(async || {
        // SAFETY: a plain system call, for this thread only, which ends with the test; glibc's would change all threads.
        #[allow(unsafe_code)]
        let outcome = unsafe { libc::syscall(libc::SYS_setresuid, 65_534, 65_534, 65_534) };
        assert_eq!(outcome, 0);
        let networks = Networks::new(&config("host1", &bridges())).await;
        let offer = networks.offer();
        assert!(
            offer.networks.is_empty() && offer.networking.contains("CAP_NET_ADMIN"),
            "{offer:?}"
        );
        let fault = networks
            .attach(&key(1), &desired(1, &["lan"], true))
            .await
            .unwrap_err();
        assert_eq!(fault.code, Code::NetworkUnavailable);
    });
}

#[test]
fn a_tunnel_carries_frames_between_two_hosts_and_only_to_those_that_are_peers() {
    in_namespace(async || {
        // This namespace is host1; another, held by a sleeping process, is host2.
        let sleeper = Sleeper(
            Command::new("unshare")
                .args(["--net", "sleep", "600"])
                .spawn()
                .unwrap(),
        );
        let pid = sleeper.0.id();
        let own = std::fs::read_link("/proc/thread-self/ns/net").unwrap();
        let theirs = || std::fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
        let deadline = Instant::now() + PATIENCE;
        while theirs() == own {
            assert!(Instant::now() < deadline, "it makes no namespace");
            std::thread::yield_now();
        }
        ip(&format!("link add eth0 type veth peer name eth0 netns {pid}"));
        ip("addr add 10.0.0.1/24 dev eth0");
        ip("link set eth0 up");
        let hosts = other_host(pid);
        let peers = |address: &str| NetworkPeers {
            network: "wide".into(),
            addresses: vec![address.into()],
        };
        let networks = Networks::new(&config(
            "host1",
            &json!({"vxlan": {"address": "10.0.0.1", "dev": "eth0"}}),
        ))
        .await;
        assert_eq!(networks.offer().vxlan, Some([10, 0, 0, 1].into()));
        networks.told(&[peers("10.0.0.2")]);
        let one = networks
            .attach(&key(1), &desired(1, &["wide"], true))
            .await
            .unwrap();
        let mut one = Guest::open(&one[0]);
        let mut two = hosts.recv_timeout(PATIENCE).unwrap();
        one.meet(&mut two, [10, 1, 0, 1]);
        one.send(EVERYBODY, IPV4, &udp([10, 1, 0, 1], 1, 1));
        let (source, kind, _) = two.next();
        assert_eq!((source, kind), (mac(1), IPV4));
        two.send(mac(1), IPV4, &udp([10, 1, 0, 2], 2, 2));
        assert_eq!(one.next().0, mac(2));
        // No longer a peer: what is for everybody stays here; what the tunnel has learned the way of goes on.
        networks.told(&[peers("10.0.0.3")]);
        let tunnel = devices()
            .into_iter()
            .find(|name| name.chars().nth(6) == Some('x'))
            .unwrap();
        let flood = || tool("bridge", &format!("fdb show dev {tunnel}"));
        settled(&networks, || {
            flood().contains("dst 10.0.0.3") && !flood().contains("00:00:00:00:00:00 dst 10.0.0.2")
        })
        .await;
        one.send(EVERYBODY, IPV4, &udp([10, 1, 0, 1], 3, 3));
        one.send(mac(2), IPV4, &udp([10, 1, 0, 1], 4, 4));
        let (_, _, packet) = two.next();
        assert_eq!(
            packet[20..24],
            [0, 4, 0, 4],
            "what was for everybody is not there"
        );
    });
}

/// A process that holds a namespace; it ends with the test, passed or failed.
struct Sleeper(Child);

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// host2 in the namespace of a process: its guest's end, once it is there. It lives on until the test ends.
fn other_host(pid: u32) -> std::sync::mpsc::Receiver<Guest> {
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let namespace = File::open(Path::new(&format!("/proc/{pid}/ns/net"))).unwrap();
        nix::sched::setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
        ip("link set lo up");
        ip("addr add 10.0.0.2/24 dev eth0");
        ip("link set eth0 up");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let networks = Networks::new(&config("host2", &json!({"vxlan": {"address": "10.0.0.2"}}))).await;
            networks.told(&[NetworkPeers {
                network: "wide".into(),
                addresses: vec!["10.0.0.1".into()],
            }]);
            let nics = networks
                .attach(&key(2), &desired(2, &["wide"], true))
                .await
                .unwrap();
            tell.send(Guest::open(&nics[0])).unwrap();
            networks.keep().await;
        });
    });
    told
}
