//! Networks, and the addresses of the NICs in them. Read from the state alone; `apply` asks here before a VM gets a NIC or a
//! network goes.
//!
//! An address is nobody's record: it is taken as long as a VM whose specification names it is there, so it is free when the VM is
//! gone or has given the NIC up, and no entry can lose one. A MAC is derived from cluster, VM and slot, so that VMs of two clusters on one segment
//! differ and a VM that is created again keeps its own; the next free one is taken where it is in use. An IP address is the first
//! that is free in its subnet.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use drover_proto::v1::{Host, HostSpec, Network, NetworkKind, NetworkPeers, Vm, VmNic, VmSpec};
use drover_proto::{Code, Fault};

use crate::desired::{digest, incoming, serving};
use crate::limits::{
    HOST_NETWORKS_MAX, MTU_MAX, MTU_MIN, MTU_VXLAN_OVERHEAD, NICS_MAX, POST_COPY_CHARS_MAX, SUBNET_PREFIXES,
    VNI_MAX, VXLAN_PORT,
};
use crate::state::{State, host_of, occupies, spec_of};
use crate::validate::{invalid, name, quoted};

/// The MTU of a plain Ethernet, bytes.
const MTU_ETHERNET: u32 = 1_500;
/// How an allocated MAC begins: locally administered, unicast (IEEE 802, 8.2).
const MAC_PREFIX: [u8; 2] = [0x52, 0x54];

impl State {
    /// All networks, by name. Who has and who offers them is not filled in: see [`State::networks_with_users`].
    pub fn networks(&self) -> impl Iterator<Item = &Network> {
        self.networks.values()
    }

    /// One network.
    pub fn network(&self, name: &str) -> Option<&Network> {
        self.networks.get(name)
    }

    /// All networks, by name, each with the VMs that have a NIC in it and the hosts that offer it.
    pub fn networks_with_users(&self) -> Vec<Network> {
        let mut users: BTreeMap<&str, BTreeSet<&String>> = BTreeMap::new();
        for (vm, nic) in self.nics() {
            users.entry(nic.network.as_str()).or_default().insert(vm);
        }
        let with_users = |network: &Network| {
            let vms = users.remove(network.name.as_str()).unwrap_or_default();
            let offering = self
                .hosts
                .iter()
                .filter(|(_, host)| offers(host.spec.as_ref(), network));
            Network {
                vms: vms.into_iter().cloned().collect(),
                hosts: offering.map(|(name, _)| name.clone()).collect(),
                ..network.clone()
            }
        };
        self.networks.values().map(with_users).collect()
    }

    /// Every NIC of every VM, with the VM's name.
    pub(crate) fn nics(&self) -> impl Iterator<Item = (&String, &VmNic)> {
        let of_vm = |(name, vm)| spec_of(vm).nics.iter().map(move |nic| (name, nic));
        self.vms.iter().flat_map(of_vm)
    }

    /// For each VXLAN network in `names`: the other hosts on which a VMM with a NIC in it is, or is about to be.
    pub(crate) fn network_peers(&self, names: &BTreeSet<&str>, host: &str) -> Vec<NetworkPeers> {
        let of_host = |name: &str| self.host(name)?.spec.as_ref()?.vxlan.parse::<IpAddr>().ok();
        let own = of_host(host);
        let mut peers: BTreeMap<&str, BTreeSet<IpAddr>> = BTreeMap::new();
        for name in names {
            if self
                .network(name)
                .is_some_and(|network| network.kind() == NetworkKind::Vxlan)
            {
                peers.insert(name, BTreeSet::new());
            }
        }
        if !peers.is_empty() {
            for vm in self.vms.values().filter(|vm| !spec_of(vm).nics.is_empty()) {
                let there: Vec<IpAddr> = self
                    .hosts_of(vm)
                    .filter(|other| *other != host)
                    .filter_map(of_host)
                    .filter(|address| own.is_some_and(|own| own.is_ipv4() == address.is_ipv4()))
                    .collect();
                for nic in &spec_of(vm).nics {
                    if let Some(peers) = peers.get_mut(nic.network.as_str()) {
                        peers.extend(&there);
                    }
                }
            }
        }
        let told = |(network, addresses): (&str, BTreeSet<IpAddr>)| NetworkPeers {
            network: network.to_owned(),
            addresses: addresses.iter().map(IpAddr::to_string).collect(),
        };
        peers.into_iter().map(told).collect()
    }

    /// Where a VMM of the VM is, or is about to be.
    fn hosts_of<'a>(&'a self, vm: &'a Vm) -> impl Iterator<Item = &'a str> {
        let placed = occupies(vm).then(|| host_of(vm));
        let migration = self.migration(&vm.migration);
        let to = migration
            .map(|migration| migration.to.as_str())
            .filter(|to| incoming(self, vm, to).is_some());
        let from = migration
            .map(|migration| migration.from.as_str())
            .filter(|from| serving(self, vm, from).is_some());
        [placed, to, from].into_iter().flatten()
    }
}

/// An IPv4 network by its first address and the length of its prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Subnet {
    first: u32,
    prefix: u32,
}

impl Subnet {
    /// Reads "10.1.0.0/24". A prefix of 8 to 30 bits; no bit may be set behind it.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (first, prefix) = text.split_once('/')?;
        let first = u32::from(first.parse::<Ipv4Addr>().ok()?);
        let digits = !prefix.is_empty() && prefix.bytes().all(|byte| byte.is_ascii_digit());
        let prefix: u32 = prefix.parse().ok().filter(|_| digits)?;
        let subnet = Self { first, prefix };
        (SUBNET_PREFIXES.contains(&prefix) && first & subnet.mask() == 0).then_some(subnet)
    }

    /// The bits that tell its addresses apart.
    fn mask(self) -> u32 {
        u32::MAX >> self.prefix
    }

    /// Its addresses but the network's own and the broadcast's (RFC 1122, 3.2.1.3).
    fn hosts(self) -> std::ops::Range<u32> {
        self.first + 1..self.first + self.mask()
    }

    fn has(self, address: Ipv4Addr) -> bool {
        self.hosts().contains(&u32::from(address))
    }

    fn first_host(self) -> Ipv4Addr {
        self.hosts().start.into()
    }
}

/// The length of the prefix of a network's subnet, if it has one.
pub(crate) fn prefix(network: &Network) -> Option<u32> {
    Subnet::parse(&network.subnet).map(|subnet| subnet.prefix)
}

/// Checks what is asked for of a network and fills in its defaults.
///
/// # Errors
/// `invalid_argument`, by field.
pub(crate) fn checked(asked: Option<&Network>) -> Result<Network, Fault> {
    let mut network = asked.cloned().unwrap_or_default();
    (network.created_ms, network.vms, network.hosts) = (0, Vec::new(), Vec::new());
    name("network.name", &network.name)?;
    let bounded = |field: &str, value: u32, min: u32, max: u32| {
        if (min..=max).contains(&value) {
            return Ok(());
        }
        let message = format!("{field} is {value}; {min} to {max} are possible");
        Err(invalid(field, message))
    };
    match NetworkKind::try_from(network.kind) {
        Ok(NetworkKind::Unspecified | NetworkKind::Bridge) => {
            network.set_kind(NetworkKind::Bridge);
            for (field, value) in [("network.vni", network.vni), ("network.port", network.port)] {
                if value != 0 {
                    let message = format!("{field} is {value}; only a network of kind vxlan has one");
                    return Err(invalid(field, message));
                }
            }
        }
        Ok(NetworkKind::Vxlan) => {
            bounded("network.vni", network.vni, 1, VNI_MAX)?;
            if network.port == 0 {
                network.port = VXLAN_PORT;
            }
            bounded("network.port", network.port, 1, u32::from(u16::MAX))?;
        }
        Err(_) => {
            let message = format!(
                "network.kind is {}; 1 (bridge) and 2 (vxlan) are known here",
                network.kind
            );
            return Err(invalid("network.kind", message));
        }
    }
    if network.mtu == 0 {
        let overhead = if network.kind() == NetworkKind::Vxlan {
            MTU_VXLAN_OVERHEAD
        } else {
            0
        };
        network.mtu = MTU_ETHERNET - overhead;
    }
    bounded("network.mtu", network.mtu, MTU_MIN, MTU_MAX)?;
    if network.subnet.is_empty() {
        if !network.gateway.is_empty() {
            let message = format!(
                "network.gateway is {}; only a network with a subnet has one",
                quoted(&network.gateway)
            );
            return Err(invalid("network.gateway", message));
        }
        return Ok(network);
    }
    let Some(subnet) = Subnet::parse(&network.subnet) else {
        let message = format!(
            "network.subnet is {}; an IPv4 network as 10.1.0.0/24 is possible, /{} to /{}, with no bit set behind the prefix",
            quoted(&network.subnet),
            SUBNET_PREFIXES.start(),
            SUBNET_PREFIXES.end(),
        );
        return Err(invalid("network.subnet", message));
    };
    if network.gateway.is_empty() {
        network.gateway = subnet.first_host().to_string();
    }
    match network.gateway.parse::<Ipv4Addr>() {
        Ok(gateway) if subnet.has(gateway) => network.gateway = gateway.to_string(),
        _ => {
            let message = format!(
                "network.gateway is {}; an address within {}, neither its first nor its last, is possible",
                quoted(&network.gateway),
                network.subnet
            );
            return Err(invalid("network.gateway", message));
        }
    }
    Ok(network)
}

/// The form of a spec's NICs: MACs and addresses are brought into their one spelling. What they name is looked up elsewhere.
///
/// # Errors
/// `invalid_argument`, by field.
pub(crate) fn check_nics(spec: &mut VmSpec) -> Result<(), Fault> {
    let plugged = spec.nics.iter().filter(|nic| !nic.unplugged).count();
    if plugged > NICS_MAX {
        let message = format!("spec.nics has {plugged} NICs; at most {NICS_MAX} are possible");
        return Err(invalid("spec.nics", message));
    }
    for nic in &mut spec.nics {
        name("spec.nics.network", &nic.network)?;
        if !nic.mac.is_empty() {
            nic.mac = mac("spec.nics.mac", &nic.mac)?;
        }
        if !nic.ip.is_empty() {
            let ip = nic.ip.parse::<Ipv4Addr>().map_err(|_| {
                let message = format!("spec.nics.ip is {}; it is an IPv4 address", quoted(&nic.ip));
                invalid("spec.nics.ip", message)
            })?;
            nic.ip = ip.to_string();
        }
    }
    Ok(())
}

/// A MAC in its one spelling.
///
/// # Errors
/// `invalid_argument`.
pub(crate) fn mac(field: &str, text: &str) -> Result<String, Fault> {
    unicast(text).map(mac_text).ok_or_else(|| {
        let message = format!(
            "{field} is {}; six bytes as 52:54:00:12:34:56, of a unicast address (the first byte even), are possible",
            quoted(text)
        );
        invalid(field, message)
    })
}

/// Reads a MAC that one interface can have: unicast, and not all zeros.
fn unicast(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next()?;
        let is_byte = part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit());
        *byte = u8::from_str_radix(part, 16).ok().filter(|_| is_byte)?;
    }
    (parts.next().is_none() && mac[0] & 1 == 0 && mac != [0; 6]).then_some(mac)
}

fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// Gives the NICs of a VM that is to be created, or one that it is to get, the addresses that they lack.
///
/// # Errors
/// `network_not_found`; `invalid_argument` for an address that its network does not have; `address_in_use` for one that another NIC
/// has, and when none is left.
pub(crate) fn address(state: &State, spec: &mut VmSpec) -> Result<(), Fault> {
    if spec.nics.is_empty() {
        return Ok(());
    }
    let mut macs: BTreeMap<&str, &str> = BTreeMap::new();
    let mut ips: BTreeSet<(&str, Ipv4Addr)> = BTreeSet::new();
    let others = state
        .nics()
        .filter(|(vm, nic)| **vm != spec.name && !nic.unplugged);
    for (vm, nic) in others {
        macs.insert(&nic.mac, vm);
        ips.extend(nic.ip.parse().ok().map(|ip| (nic.network.as_str(), ip)));
    }
    // What is asked for by name is taken before anything is chosen.
    let remembered = spec.nics.iter().filter(|nic| nic.unplugged);
    let mut given: BTreeSet<String> = remembered.map(|nic| nic.mac.clone()).collect();
    for nic in spec
        .nics
        .iter()
        .filter(|nic| !nic.mac.is_empty() && !nic.unplugged)
    {
        let other = macs.get(nic.mac.as_str()).copied();
        if let Some(other) = other.or((!given.insert(nic.mac.clone())).then_some(spec.name.as_str())) {
            let message = format!(
                "spec.nics.mac is {}, which VM {other} has; leave it out to have one chosen",
                nic.mac
            );
            return Err(Fault::new(Code::AddressInUse, message).field("spec.nics.mac"));
        }
    }
    let mut subnets = Vec::new();
    for nic in &spec.nics {
        let Some(network) = state.network(&nic.network) else {
            let message = format!(
                "spec.nics.network is {}; no network has this name: create it first",
                quoted(&nic.network)
            );
            return Err(Fault::new(Code::NetworkNotFound, message).field("spec.nics.network"));
        };
        subnets.push(Subnet::parse(&network.subnet));
        let gateway = network.gateway.parse().ok();
        if let Ok(ip) = nic.ip.parse::<Ipv4Addr>() {
            let within = Subnet::parse(&network.subnet).is_some_and(|subnet| subnet.has(ip));
            if !within || Some(ip) == gateway {
                let message = if network.subnet.is_empty() {
                    format!(
                        "spec.nics.ip is {ip}; network {} has no subnet: leave it out",
                        network.name
                    )
                } else {
                    format!(
                        "spec.nics.ip is {ip}; an address within {}, neither its first, its last nor the gateway {}, is possible",
                        network.subnet, network.gateway
                    )
                };
                return Err(invalid("spec.nics.ip", message));
            }
            if !ips.insert((&network.name, ip)) {
                let message = format!(
                    "spec.nics.ip is {ip}, which another NIC in {} has; leave it out to have one chosen",
                    network.name
                );
                return Err(Fault::new(Code::AddressInUse, message).field("spec.nics.ip"));
            }
        }
        ips.extend(gateway.map(|gateway| (network.name.as_str(), gateway)));
    }
    let (cluster, vm) = (state.cluster_id.clone(), spec.name.clone());
    for (at, (nic, subnet)) in spec.nics.iter_mut().zip(subnets).enumerate() {
        if nic.unplugged {
            continue;
        }
        if nic.mac.is_empty() {
            nic.mac = free_mac(&cluster, &vm, at, |mac| {
                macs.contains_key(mac) || given.contains(mac)
            });
            given.insert(nic.mac.clone());
        }
        let Some(subnet) = subnet.filter(|_| nic.ip.is_empty()) else {
            continue;
        };
        // Looks at no more addresses than are taken, and one.
        let network = state.network(&nic.network).map_or("", |network| &network.name);
        let free = subnet
            .hosts()
            .map(Ipv4Addr::from)
            .find(|ip| !ips.contains(&(network, *ip)));
        let Some(ip) = free else {
            let message =
                format!("every address of network {network} is taken: delete a VM, or use another network");
            return Err(Fault::new(Code::AddressInUse, message).field("spec.nics.network"));
        };
        ips.insert((network, ip));
        nic.ip = ip.to_string();
    }
    Ok(())
}

/// The MAC of a VM's NIC: the first that is free from the one that its name gives on.
fn free_mac(cluster: &str, vm: &str, at: usize, is_taken: impl Fn(&str) -> bool) -> String {
    let seed = digest(format!("{cluster}/{vm}/{at}").as_bytes());
    let [_, _, _, _, seed @ ..] = (seed ^ (seed >> 32)).to_be_bytes();
    let mut number = u32::from_be_bytes(seed);
    loop {
        let [a, b, c, d] = number.to_be_bytes();
        let mac = mac_text([MAC_PREFIX[0], MAC_PREFIX[1], a, b, c, d]);
        // There are four billion, and a cluster has a few ten thousand NICs.
        if !is_taken(&mac) {
            return mac;
        }
        number = number.wrapping_add(1);
    }
}

/// Whether the host offers the networks of the spec's NICs. The message goes on after the host's name.
///
/// # Errors
/// `network_unavailable`.
pub(crate) fn reaches(state: &State, spec: &VmSpec, host: &Host) -> Result<(), Fault> {
    let unplugs = host.spec.as_ref().is_some_and(|spec| spec.unplugs);
    if !unplugs && spec.nics.iter().any(|nic| nic.unplugged) {
        let message = "has an agent that would plug in a NIC that its guest is to forget: upgrade it";
        return Err(Fault::new(Code::ProtocolVersion, message));
    }
    let of_spec = spec.nics.iter().filter_map(|nic| state.network(&nic.network));
    for network in of_spec {
        if offers(host.spec.as_ref(), network) {
            continue;
        }
        let told = host.spec.as_ref().map_or("", |spec| spec.networking.as_str());
        let why = if matches!(told, "" | "ok") {
            String::new()
        } else {
            format!(": {told}")
        };
        let what = match network.kind() {
            NetworkKind::Vxlan => format!("offers no VXLAN, which network {} is", network.name),
            _ => format!("does not offer network {}", network.name),
        };
        return Err(Fault::new(Code::NetworkUnavailable, format!("{what}{why}")));
    }
    Ok(())
}

fn offers(host: Option<&HostSpec>, network: &Network) -> bool {
    let Some(host) = host else { return false };
    match network.kind() {
        NetworkKind::Vxlan => !host.vxlan.is_empty(),
        _ => host.networks.contains(&network.name),
    }
}

/// Checks what a host says of its networks and brings it into order.
///
/// # Errors
/// `invalid_argument`, by field.
pub(crate) fn check_host(spec: &mut HostSpec) -> Result<(), Fault> {
    if spec.networks.len() > HOST_NETWORKS_MAX {
        let message = format!(
            "spec.networks has {} networks; at most {HOST_NETWORKS_MAX} are possible",
            spec.networks.len()
        );
        return Err(invalid("spec.networks", message));
    }
    spec.networks
        .iter()
        .try_for_each(|network| name("spec.networks", network))?;
    spec.networks.sort_unstable();
    spec.networks.dedup();
    let reachable = |ip: &IpAddr| !ip.is_unspecified() && !ip.is_multicast();
    if !spec.vxlan.is_empty() {
        let ip = spec
            .vxlan
            .parse::<IpAddr>()
            .ok()
            .filter(reachable)
            .ok_or_else(|| {
                let message = format!(
                    "spec.vxlan is {}; it is an IP address that other hosts reach",
                    quoted(&spec.vxlan)
                );
                invalid("spec.vxlan", message)
            })?;
        spec.vxlan = ip.to_string();
    }
    spec.networking = spec.networking.chars().take(POST_COPY_CHARS_MAX).collect();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subnet_is_read_in_one_spelling_only() {
        let subnet = Subnet::parse("10.1.2.0/24").unwrap();
        assert_eq!(subnet.first_host(), Ipv4Addr::new(10, 1, 2, 1));
        for (ip, within) in [
            ([10, 1, 2, 0], false),
            ([10, 1, 2, 1], true),
            ([10, 1, 2, 254], true),
            ([10, 1, 2, 255], false),
            ([10, 1, 3, 1], false),
        ] {
            assert_eq!(subnet.has(ip.into()), within, "{ip:?}");
        }
        assert_eq!(Subnet::parse("10.0.0.4/30").unwrap().hosts().len(), 2);
        assert_eq!(Subnet::parse("255.0.0.0/8").unwrap().hosts().len(), (1 << 24) - 2);
        for bad in [
            "",
            "10.1.2.0",
            "10.1.2.1/24",
            "10.1.2.0/31",
            "10.0.0.0/7",
            "10.1.2.0/+24",
            "10.1.2/24",
            "::/64",
            "10.1.2.0/",
        ] {
            assert_eq!(Subnet::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_mac_is_six_bytes_of_one_interface() {
        assert_eq!(
            unicast("52:54:00:AB:0c:01").map(mac_text).unwrap(),
            "52:54:00:ab:0c:01"
        );
        for bad in [
            "",
            "52:54:00:ab:0c",
            "52:54:00:ab:0c:01:02",
            "53:54:00:ab:0c:01",
            "00:00:00:00:00:00",
            "ff:ff:ff:ff:ff:ff",
            "52:54:0:ab:0c:01",
            "52-54-00-ab-0c-01",
            "52:54:00:ab:0c:+1",
        ] {
            assert_eq!(unicast(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_next_mac_is_taken_where_one_is_in_use_and_an_allocated_one_is_local_and_unicast() {
        let first = free_mac("c", "vm1", 0, |_| false);
        let second = free_mac("c", "vm1", 0, |mac| mac == first);
        assert_ne!(first, second);
        assert_eq!(first, free_mac("c", "vm1", 0, |_| false));
        assert_ne!(first, free_mac("d", "vm1", 0, |_| false), "clusters differ");
        assert_ne!(first, free_mac("c", "vm1", 1, |_| false), "slots differ");
        assert_eq!(unicast(&first).unwrap()[0] & 3, 2);
    }
}
