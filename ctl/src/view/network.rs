//! A network as users see it.

use drover_proto::v1;
use serde::Serialize;

use super::{dash, some};
use crate::output::{Detailed, Tabular};
use crate::units;

/// A network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NetworkView {
    /// Its name.
    pub name: String,
    /// `bridge` or `vxlan`.
    pub kind: &'static str,
    /// VXLAN: its number.
    pub vni: Option<u32>,
    /// VXLAN: the UDP port of its tunnels.
    pub port: Option<u32>,
    /// What VMs' addresses are taken from.
    pub subnet: Option<String>,
    /// The address in it that no VM gets.
    pub gateway: Option<String>,
    /// Bytes of a packet.
    pub mtu: u32,
    /// Whether VMs may send with any source address.
    pub allow_spoofing: bool,
    /// The VMs that have a NIC in it.
    pub vms: Vec<String>,
    /// The hosts that offer it.
    pub hosts: Vec<String>,
    /// Unix milliseconds.
    pub created_ms: u64,
}

impl From<v1::Network> for NetworkView {
    fn from(network: v1::Network) -> Self {
        let is_vxlan = network.kind() == v1::NetworkKind::Vxlan;
        Self {
            name: network.name,
            kind: if is_vxlan { "vxlan" } else { "bridge" },
            vni: is_vxlan.then_some(network.vni),
            port: is_vxlan.then_some(network.port),
            subnet: some(network.subnet),
            gateway: some(network.gateway),
            mtu: network.mtu,
            allow_spoofing: network.allow_spoofing,
            vms: network.vms,
            hosts: network.hosts,
            created_ms: network.created_ms,
        }
    }
}

impl NetworkView {
    /// What it is, in a line: `vxlan 7, 10.1.0.0/24, MTU 1450`.
    pub fn what(&self) -> String {
        let subnet = self.subnet.as_deref().unwrap_or("no subnet");
        format!("{}, {subnet}, MTU {}", self.kind_and_number(), self.mtu)
    }

    fn kind_and_number(&self) -> String {
        match self.vni {
            Some(vni) => format!("{} {vni}", self.kind),
            None => self.kind.to_owned(),
        }
    }
}

impl Tabular for NetworkView {
    const HEAD: &'static [&'static str] = &["NAME", "KIND", "SUBNET", "MTU", "VMS", "HOSTS", "CREATED"];

    fn id(&self) -> &str {
        &self.name
    }

    fn row(&self) -> Vec<String> {
        vec![
            self.name.clone(),
            self.kind_and_number(),
            dash(self.subnet.as_deref()),
            self.mtu.to_string(),
            self.vms.len().to_string(),
            self.hosts.len().to_string(),
            units::instant(self.created_ms),
        ]
    }
}

impl Detailed for NetworkView {
    fn fields(&self) -> Vec<(&'static str, String)> {
        let mut fields = vec![("name", self.name.clone()), ("kind", self.kind_and_number())];
        fields.extend(self.port.map(|port| ("port", port.to_string())));
        let anything = if self.allow_spoofing {
            "any"
        } else {
            "their own only"
        };
        fields.extend([
            ("subnet", dash(self.subnet.as_deref())),
            ("gateway", dash(self.gateway.as_deref())),
            ("mtu", self.mtu.to_string()),
            ("VMs send from", anything.to_owned()),
            ("VMs", dash(some(self.vms.join(", ")).as_deref())),
            ("offered by", dash(some(self.hosts.join(", ")).as_deref())),
            ("created", units::instant(self.created_ms)),
        ]);
        fields
    }
}
