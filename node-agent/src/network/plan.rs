//! What of the host's devices has to change: pure, from what is wanted and what is there.
//!
//! ```text
//!   a VM's run ── tap ──┐
//!   another's ─── tap ──┤ bridge ── uplink                 a network of kind bridge: the host's own bridge, or one made here
//!   another's ─── tap ──┴ bridge ── vxlan ))) other hosts  a network of kind vxlan: both made here
//! ```
//!
//! All that is made here is named by [`Names`]; nothing else is ever removed. A device's name holds what it is made of, so a device
//! of a name is the wanted one, or is not wanted.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use drover_proto::v1::{Network, NetworkKind, VmNic};
use drover_proto::{Code, Fault};
use serde::{Deserialize, Serialize};

use super::config::NetworksConfig;
use crate::key::{Key, is_name};

/// NICs of a VM at most: as many as the controllers give one, and those that a clone's guest has yet to give up.
pub const NICS_MAX: usize = 8;
/// Bytes of a MAC.
const MAC_BYTES: usize = 6;

/// One NIC of one VMM: enough to make it again, also for an agent that knows no desired state yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// Its TAP's name.
    pub tap: String,
    /// The guest's MAC.
    pub mac: [u8; MAC_BYTES],
    /// The guest's address, where the network has a subnet.
    pub ip: Option<Ipv4Addr>,
    /// The network's name.
    pub network: String,
    /// VXLAN: number and port of its tunnels.
    pub vxlan: Option<(u32, u16)>,
    /// The network's MTU, bytes.
    pub mtu: u32,
    /// Whether the guest may send with any source address.
    pub allow_spoofing: bool,
    /// By which revision of the specification it came; 0: with the VM.
    #[serde(default)]
    pub revision: u64,
    /// Its slot; 0: counted.
    #[serde(default)]
    pub slot: u32,
    /// It leads nowhere: the guest remembers it, and its addresses are another's.
    #[serde(default)]
    pub unplugged: bool,
}

impl Nic {
    /// The MAC as text.
    pub fn mac_text(&self) -> String {
        self.mac.map(|byte| format!("{byte:02x}")).join(":")
    }
}

/// How this agent's devices are called. Names end at 15 characters (IFNAMSIZ), so the rest is a digest.
#[derive(Clone, Debug)]
pub struct Names {
    prefix: String,
    seed: String,
}

impl Names {
    /// Of the agent of `host`.
    pub fn new(cluster: &str, host: &str) -> Self {
        let seed = format!("{cluster}/{host}");
        Self {
            prefix: format!("dv{}", digest(&seed, 4)),
            seed,
        }
    }

    /// What all of them begin with.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Whether a device of this name was made by this agent, or one before it.
    pub fn owns(&self, name: &str) -> bool {
        name.starts_with(&self.prefix)
    }

    /// What TAPs' names begin with.
    pub fn tap_prefix(&self) -> String {
        format!("{}t", self.prefix)
    }

    /// The TAP of a VMM's NIC: no other that the VMM ever has is called so, also one with the same MAC that comes when this has gone.
    pub fn tap(&self, key: &Key, mac: [u8; MAC_BYTES], revision: u64) -> String {
        self.name('t', &format!("{key}/{mac:02x?}/{revision}"))
    }

    fn bridge(&self, nic: &Nic) -> String {
        self.name('b', &format!("{}/{:?}/{}", nic.network, nic.vxlan, nic.mtu))
    }

    fn vxlan(&self, nic: &Nic, local: IpAddr) -> String {
        self.name(
            'x',
            &format!("{}/{:?}/{}/{local}", nic.network, nic.vxlan, nic.mtu),
        )
    }

    fn name(&self, kind: char, what: &str) -> String {
        format!(
            "{}{kind}{}",
            self.prefix,
            digest(&format!("{}/{what}", self.seed), 8)
        )
    }
}

/// `chars` of a digest, five bits each.
fn digest(text: &str, chars: usize) -> String {
    const DIGITS: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
    let hash = blake3::hash(text.as_bytes());
    let digits = hash.as_bytes().iter().take(chars);
    digits
        .map(|byte| char::from(DIGITS[usize::from(byte % 32)]))
        .collect()
}

/// The NICs of a VMM, by what the controllers say of its VM.
///
/// # Errors
/// `network_unavailable`, with what no NIC can be made of.
pub fn nics(names: &Names, key: &Key, nics: &[VmNic], networks: &[Network]) -> Result<Vec<Nic>, Fault> {
    let bad = |what: String| Fault::new(Code::NetworkUnavailable, format!("{key}: {what}")).field("nics");
    if nics.len() > NICS_MAX {
        return Err(bad(format!("{} NICs; at most {NICS_MAX}", nics.len())));
    }
    let one = |nic: &VmNic| {
        let mac = mac(&nic.mac).ok_or_else(|| bad(format!("{:?} is no MAC", nic.mac)))?;
        let network = networks.iter().find(|network| network.name == nic.network);
        let network = network
            .filter(|network| is_name(&network.name))
            .ok_or_else(|| bad(format!("desired without its network {:?}", nic.network)))?;
        let ip = match nic.ip.as_str() {
            "" => None,
            ip => Some(
                ip.parse()
                    .map_err(|_| bad(format!("{ip:?} is no IPv4 address")))?,
            ),
        };
        let vxlan = (network.kind() == NetworkKind::Vxlan).then_some((network.vni, network.port));
        let port = |(vni, port)| {
            let port = u16::try_from(port).map_err(|_| bad(format!("{port} is no UDP port")));
            port.map(|port| (vni, port))
        };
        Ok(Nic {
            tap: names.tap(key, mac, nic.attach_revision),
            mac,
            ip,
            network: network.name.clone(),
            vxlan: vxlan.map(port).transpose()?,
            mtu: network.mtu,
            allow_spoofing: network.allow_spoofing,
            revision: nic.attach_revision,
            slot: nic.slot,
            unplugged: nic.unplugged,
        })
    };
    nics.iter().map(one).collect()
}

fn mac(text: &str) -> Option<[u8; MAC_BYTES]> {
    let bytes: Result<Vec<u8>, _> = text.split(':').map(|part| u8::from_str_radix(part, 16)).collect();
    let mac: [u8; MAC_BYTES] = bytes.ok()?.try_into().ok()?;
    (mac[0] & 1 == 0).then_some(mac)
}

/// A device as the kernel tells of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Its number.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Whether it is a bridge.
    pub is_bridge: bool,
    /// The bridge that it is a port of.
    pub master: Option<u32>,
    /// Whether it is set up.
    pub up: bool,
}

/// What shall be, by the devices' names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Bridges to be made, with their MTU.
    pub bridges: BTreeMap<String, u32>,
    /// Tunnels to be made.
    pub vxlans: BTreeMap<String, Vxlan>,
    /// TAPs to be made.
    pub taps: BTreeMap<String, Tap>,
    /// What is to be a port of which bridge: TAPs, tunnels, uplinks.
    pub ports: BTreeMap<String, String>,
    /// TAPs that lead nowhere.
    pub nowhere: BTreeSet<String>,
    /// No TAP is to be removed: of some it is not known whether they are wanted.
    pub spares_taps: bool,
}

/// A tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vxlan {
    /// The network.
    pub network: String,
    /// Its number.
    pub vni: u32,
    /// Its UDP port.
    pub port: u16,
    /// This host's address.
    pub local: IpAddr,
    /// The device that its packets leave by; else as the routes say.
    pub dev: Option<String>,
    /// Bytes.
    pub mtu: u32,
}

/// A TAP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tap {
    /// Its own MAC, which is not the guest's: a bridge takes frames for its ports' own MACs as for itself.
    pub mac: [u8; MAC_BYTES],
    /// Bytes.
    pub mtu: u32,
    /// Whose it is, for people.
    pub alias: String,
}

/// What shall be, for these VMMs. Where this host does not offer a NIC's network, its TAP has no bridge, and [`Wanted::ports`] lacks it.
pub fn wanted(names: &Names, config: &NetworksConfig, runs: &BTreeMap<Key, Vec<Nic>>) -> Wanted {
    let mut wanted = Wanted::default();
    for (key, nics) in runs {
        for nic in nics {
            let tap = Tap {
                mac: port_mac(nic.mac),
                mtu: nic.mtu,
                alias: format!("{key} in {}", nic.network),
            };
            wanted.taps.insert(nic.tap.clone(), tap);
            if nic.unplugged {
                wanted.nowhere.insert(nic.tap.clone());
                continue;
            }
            if let Some(bridge) = bridge_of(names, config, nic, &mut wanted) {
                wanted.ports.insert(nic.tap.clone(), bridge);
            }
        }
    }
    wanted
}

/// The bridge of the NIC's network, wanted from now on with all that belongs to it.
fn bridge_of(names: &Names, config: &NetworksConfig, nic: &Nic, wanted: &mut Wanted) -> Option<String> {
    let own = names.bridge(nic);
    if let Some((vni, port)) = nic.vxlan {
        let underlay = config.vxlan.as_ref()?;
        let tunnel = names.vxlan(nic, underlay.address);
        let vxlan = Vxlan {
            network: nic.network.clone(),
            vni,
            port,
            local: underlay.address,
            dev: underlay.dev.clone(),
            mtu: nic.mtu,
        };
        wanted.vxlans.insert(tunnel.clone(), vxlan);
        wanted.ports.insert(tunnel, own.clone());
    } else {
        let bridge = config.bridges.get(&nic.network)?;
        if let Some(existing) = &bridge.bridge {
            return Some(existing.clone());
        }
        if let Some(uplink) = &bridge.uplink {
            wanted.ports.insert(uplink.clone(), own.clone());
        }
    }
    wanted.bridges.insert(own.clone(), nic.mtu);
    Some(own)
}

/// The MAC of a TAP whose guest has `mac`: high, since a bridge without a MAC of its own takes its ports' lowest, and an existing one
/// must keep its uplink's.
fn port_mac(mac: [u8; MAC_BYTES]) -> [u8; MAC_BYTES] {
    let first = if mac[0] == 0xfe { 0xfa } else { 0xfe };
    [first, mac[1], mac[2], mac[3], mac[4], mac[5]]
}

/// One thing to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Make a bridge and set it up.
    MakeBridge(String, u32),
    /// Make a tunnel, down.
    MakeVxlan(String, Vxlan),
    /// Make a TAP, down.
    MakeTap(String, Tap),
    /// Make a device a port of a bridge and set it up.
    Attach {
        /// The device.
        port: Link,
        /// The bridge's number.
        bridge: u32,
    },
    /// Set a device up.
    Up(Link),
    /// Remove a device that was made here.
    Remove(Link),
}

/// What has to be done next, and by device what stands in the way. What a step makes possible comes with the next call, when it is
/// there: first devices, then what they are ports of.
pub fn steps(names: &Names, wanted: &Wanted, links: &[Link]) -> (Vec<Step>, BTreeMap<String, String>) {
    let by_name: BTreeMap<&str, &Link> = links.iter().map(|link| (link.name.as_str(), link)).collect();
    let (mut steps, mut problems) = (Vec::new(), BTreeMap::new());
    for (name, mtu) in &wanted.bridges {
        match by_name.get(name.as_str()) {
            None => steps.push(Step::MakeBridge(name.clone(), *mtu)),
            Some(bridge) if !bridge.up => steps.push(Step::Up((*bridge).clone())),
            Some(_) => {}
        }
    }
    for (name, vxlan) in &wanted.vxlans {
        if !by_name.contains_key(name.as_str()) {
            steps.push(Step::MakeVxlan(name.clone(), vxlan.clone()));
        }
    }
    for (name, tap) in &wanted.taps {
        if !by_name.contains_key(name.as_str()) {
            steps.push(Step::MakeTap(name.clone(), tap.clone()));
        }
        // It stays down: a TAP that is up and on no bridge leads to the host itself.
        if wanted.nowhere.contains(name) {
            continue;
        }
        if !wanted.ports.contains_key(name) {
            problems.insert(
                name.clone(),
                "its network is not in this host's configuration".to_owned(),
            );
        }
    }
    for (name, bridge_name) in &wanted.ports {
        let made = names.owns(name);
        let Some(port) = by_name.get(name.as_str()) else {
            if !made {
                problems.insert(bridge_name.clone(), format!("no interface is named {name}"));
            }
            continue;
        };
        let Some(bridge) = by_name.get(bridge_name.as_str()) else {
            if !names.owns(bridge_name) {
                problems.insert(name.clone(), format!("no interface is named {bridge_name}"));
            }
            continue;
        };
        match port.master {
            Some(master) if master == bridge.index && port.up => {}
            // What is not ours is not taken away from anybody.
            Some(master) if master != bridge.index && !made => {
                problems.insert(bridge_name.clone(), format!("{name} is a port of something else"));
            }
            _ if !bridge.is_bridge => {
                problems.insert(name.clone(), format!("{bridge_name} is no bridge"));
            }
            _ => steps.push(Step::Attach {
                port: (*port).clone(),
                bridge: bridge.index,
            }),
        }
    }
    let tap_prefix = names.tap_prefix();
    let is_wanted = |name: &String| {
        wanted.bridges.contains_key(name)
            || wanted.vxlans.contains_key(name)
            || wanted.taps.contains_key(name)
            || (wanted.spares_taps && name.starts_with(&tap_prefix))
    };
    let unwanted = links
        .iter()
        .filter(|link| names.owns(&link.name) && !is_wanted(&link.name));
    steps.extend(unwanted.cloned().map(Step::Remove));
    (steps, problems)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::super::config::{BridgeConfig, VxlanConfig};
    use super::*;

    fn config() -> NetworksConfig {
        let bridge = |bridge: Option<&str>, uplink: Option<&str>| BridgeConfig {
            bridge: bridge.map(str::to_owned),
            uplink: uplink.map(str::to_owned),
        };
        NetworksConfig {
            bridges: [
                ("lan".to_owned(), bridge(Some("br0"), None)),
                ("dmz".to_owned(), bridge(None, Some("eth1"))),
                ("own".to_owned(), bridge(None, None)),
            ]
            .into(),
            vxlan: Some(VxlanConfig {
                address: [10, 0, 0, 1].into(),
                dev: None,
            }),
        }
    }

    fn nic(names: &Names, key: &Key, at: usize, network: &str) -> Nic {
        let mac = [0x52, 0x54, 0, 0, 0, u8::try_from(at).unwrap()];
        Nic {
            tap: names.tap(key, mac, 0),
            mac,
            ip: None,
            network: network.into(),
            vxlan: (network == "wide").then_some((7, 4789)),
            mtu: 1400,
            allow_spoofing: false,
            revision: 0,
            slot: 0,
            unplugged: false,
        }
    }

    fn tap(names: &Names, key: &Key, at: usize) -> String {
        nic(names, key, at, "").tap
    }

    fn link(index: u32, name: &str) -> Link {
        Link {
            index,
            name: name.into(),
            is_bridge: name.starts_with("br"),
            ..Link::default()
        }
    }

    /// What a kernel would make of the step.
    fn take(links: &mut Vec<Link>, step: &Step) {
        let next = links.iter().map(|link| link.index).max().unwrap_or(0) + 1;
        match step {
            Step::MakeBridge(name, _) => links.push(Link {
                is_bridge: true,
                up: true,
                ..link(next, name)
            }),
            Step::MakeVxlan(name, _) | Step::MakeTap(name, _) => links.push(link(next, name)),
            Step::Attach { port, bridge } => {
                let link = links.iter_mut().find(|link| link.index == port.index).unwrap();
                (link.master, link.up) = (Some(*bridge), true);
            }
            Step::Up(which) => links.iter_mut().find(|l| l.index == which.index).unwrap().up = true,
            Step::Remove(which) => {
                links.retain(|link| link.index != which.index);
                for link in links.iter_mut().filter(|link| link.master == Some(which.index)) {
                    link.master = None;
                }
            }
        }
    }

    fn settle(names: &Names, wanted: &Wanted, links: &mut Vec<Link>) -> BTreeMap<String, String> {
        for _ in 0..4 {
            let (steps, problems) = steps(names, wanted, links);
            if steps.is_empty() {
                return problems;
            }
            steps.iter().for_each(|step| take(links, step));
        }
        panic!("never settled: {wanted:?} {links:?}");
    }

    #[test]
    fn a_nic_that_is_unplugged_has_a_tap_that_is_down_and_on_no_bridge_also_where_its_network_is_not() {
        let names = Names::new("c", "host1");
        let key = Key::start("vm1", 1);
        let unplugged = |network| Nic {
            unplugged: true,
            ..nic(&names, &key, 1, network)
        };
        for network in ["lan", "wide", "unknown"] {
            let runs = BTreeMap::from([(key.clone(), vec![unplugged(network)])]);
            let wanted = wanted(&names, &config(), &runs);
            let mut links = vec![link(1, "br0")];
            for _ in 0..4 {
                let (steps, problems) = steps(&names, &wanted, &links);
                assert!(problems.is_empty(), "{problems:?}");
                steps.iter().for_each(|step| take(&mut links, step));
            }
            assert_eq!(steps(&names, &wanted, &links).0, []);
            assert_eq!(links.len(), 2, "{links:?}");
            assert!(!links[1].up && links[1].master.is_none());
        }
    }

    #[test]
    fn names_fit_and_differ_by_agent_run_mac_and_time() {
        let (one, other) = (Names::new("c", "host1"), Names::new("c", "host2"));
        let key = Key::start(&"v".repeat(63), u64::MAX);
        let of = |key: &Key, at: u8, revision| one.tap(key, [0x52, 0x54, 0, 0, 0, at], revision);
        let name = of(&key, 0, 0);
        assert_eq!(name.len(), 15);
        assert!(one.owns(&name) && !other.owns(&name));
        let target = Key::incoming(&key.vm, u64::MAX, "m1");
        let all = [name, of(&key, 1, 0), of(&key, 0, 1), of(&target, 0, 0)];
        assert_eq!(BTreeSet::from(all).len(), 4);
    }

    #[test]
    fn what_a_network_is_made_of_comes_with_its_first_nic_and_goes_with_its_last() {
        let names = Names::new("c", "host1");
        let (one, other) = (Key::start("vm1", 1), Key::start("vm2", 1));
        let mut links = vec![
            link(1, "lo"),
            link(2, "br0"),
            link(3, "eth1"),
            link(4, "dvother0"),
        ];
        let before = links.clone();
        let mut runs = BTreeMap::from([
            (
                one.clone(),
                vec![nic(&names, &one, 0, "lan"), nic(&names, &one, 1, "wide")],
            ),
            (
                other.clone(),
                vec![nic(&names, &other, 0, "wide"), nic(&names, &other, 1, "dmz")],
            ),
        ]);
        let problems = settle(&names, &wanted(&names, &config(), &runs), &mut links);
        assert_eq!(problems, BTreeMap::new());
        let master = |links: &[Link], name: &str| {
            let master = links.iter().find(|link| link.name == name).unwrap().master;
            let bridge = links.iter().find(|link| Some(link.index) == master);
            bridge.map(|link| link.name.clone())
        };
        assert_eq!(master(&links, &tap(&names, &one, 0)).as_deref(), Some("br0"));
        assert_eq!(
            master(&links, &tap(&names, &one, 1)),
            master(&links, &tap(&names, &other, 0))
        );
        assert_eq!(master(&links, "eth1"), master(&links, &tap(&names, &other, 1)));
        assert_eq!(
            links.len(),
            before.len() + 4 + 2 + 1,
            "four TAPs, two bridges, a tunnel"
        );
        runs.remove(&other);
        settle(&names, &wanted(&names, &config(), &runs), &mut links);
        assert_eq!(
            (links.len(), master(&links, "eth1")),
            (before.len() + 2 + 1 + 1, None)
        );
        runs.clear();
        settle(&names, &wanted(&names, &config(), &runs), &mut links);
        for link in &mut links {
            link.up = false; // The uplink stays up.
        }
        assert_eq!(links, before);
    }

    #[test]
    fn what_stands_in_the_way_is_told_by_device_and_nothing_of_others_is_taken() {
        let names = Names::new("c", "host1");
        let key = Key::start("vm1", 1);
        let all = ["lan", "dmz", "none"];
        let nics: Vec<Nic> = all
            .iter()
            .enumerate()
            .map(|(at, n)| nic(&names, &key, at, n))
            .collect();
        let wanted = wanted(&names, &config(), &BTreeMap::from([(key.clone(), nics.clone())]));
        let mut links = vec![
            link(7, "bond0"),
            Link {
                master: Some(7),
                ..link(3, "eth1")
            },
        ];
        let problems = settle(&names, &wanted, &mut links);
        assert!(
            problems[&nics[0].tap].contains("no interface is named br0"),
            "{problems:?}"
        );
        assert!(problems[&names.bridge(&nics[1])].contains("eth1"), "{problems:?}");
        assert!(problems[&nics[2].tap].contains("configuration"), "{problems:?}");
        assert_eq!(links[1].master, Some(7));
    }

    proptest! {
        /// From whatever an agent that was killed left behind.
        #[test]
        fn any_devices_settle_and_those_of_others_stay(
            runs in proptest::collection::btree_map((1_u64..4, any::<bool>()), proptest::collection::vec(0_usize..4, 0..4), 0..4),
            there in proptest::collection::vec((0_usize..4, 0_usize..4, any::<bool>()), 0..6),
            strange in proptest::collection::btree_set("dv[a-z]{1,4}|tap[0-9]", 0..3),
        ) {
            let names = Names::new("c", "host1");
            let networks = ["lan", "dmz", "own", "wide"];
            let runs: BTreeMap<Key, Vec<Nic>> = runs.into_iter().map(|((epoch, arrived), on)| {
                let key = if arrived { Key::incoming("vm1", epoch, "m1") } else { Key::start("vm1", epoch) };
                let nics = on.iter().enumerate().map(|(at, on)| nic(&names, &key, at, networks[*on])).collect();
                (key, nics)
            }).collect();
            let mut links = vec![link(1, "lo"), link(2, "br0"), link(3, "eth1")];
            links.extend((10..).zip(&strange).map(|(index, name)| link(index, name)));
            let others = links.len();
            for (index, (epoch, on, up)) in (20..).zip(there) {
                let left = Key::start("vm1", u64::try_from(epoch).unwrap() + 1);
                let nic = nic(&names, &left, on, networks[on]);
                let name = if up { nic.tap.clone() } else { names.bridge(&nic) };
                if !links.iter().any(|link| link.name == name) {
                    links.push(Link { up, is_bridge: !up, ..link(index, &name) });
                }
            }
            let wanted = wanted(&names, &config(), &runs);
            let problems = settle(&names, &wanted, &mut links);
            prop_assert_eq!(problems, BTreeMap::new());
            for nics in runs.values() {
                for nic in nics {
                    let tap = links.iter().find(|link| link.name == nic.tap).unwrap();
                    prop_assert!(tap.up && tap.master.is_some());
                }
            }
            prop_assert!(links.iter().filter(|link| !names.owns(&link.name)).count() == others);
            if runs.is_empty() {
                prop_assert_eq!(links.len(), others);
            }
        }
    }
}
