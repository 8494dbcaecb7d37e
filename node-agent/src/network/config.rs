//! The part of the agent's configuration that is about networks.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde::Deserialize;

use crate::key::is_name;

/// Most networks of a host.
const NETWORKS_MAX: usize = 64;
/// Longest name of a network device: IFNAMSIZ less the closing zero.
const DEVICE_NAME_MAX: usize = 15;

/// Which networks the host offers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworksConfig {
    /// Networks of kind bridge, by name.
    #[serde(default)]
    pub bridges: BTreeMap<String, BridgeConfig>,
    /// Where networks of kind VXLAN have their tunnels; none without.
    #[serde(default)]
    pub vxlan: Option<VxlanConfig>,
}

/// A network of kind bridge on this host. Neither field: a bridge between this host's VMs only.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BridgeConfig {
    /// A bridge that is there, and stays.
    #[serde(default)]
    pub bridge: Option<String>,
    /// An interface that the agent's bridge gets as a port; one without addresses of the host.
    #[serde(default)]
    pub uplink: Option<String>,
}

/// Where tunnels begin.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VxlanConfig {
    /// This host's address, which the other hosts' tunnels lead to.
    pub address: IpAddr,
    /// The device that packets leave by; else as the routes say.
    #[serde(default)]
    pub dev: Option<String>,
}

impl NetworksConfig {
    /// Whether anything is offered.
    pub fn is_empty(&self) -> bool {
        self.bridges.is_empty() && self.vxlan.is_none()
    }

    /// Checks what serde cannot; says what is wrong.
    pub(crate) fn check(&self) -> Result<(), String> {
        if self.bridges.len() > NETWORKS_MAX {
            return Err(format!(
                "{} bridges; want at most {NETWORKS_MAX}",
                self.bridges.len()
            ));
        }
        let mut uplinks = BTreeSet::new();
        for (name, bridge) in &self.bridges {
            if !is_name(name) {
                return Err(format!(
                    "{name:?} is no name; want 1 to 63 characters of a-z, 0-9 and -"
                ));
            }
            if bridge.bridge.is_some() && bridge.uplink.is_some() {
                return Err(format!(
                    "{name}: want bridge (one that is there) or uplink (a port of one to be made), not both"
                ));
            }
            for device in [&bridge.bridge, &bridge.uplink].into_iter().flatten() {
                is_device(device)?;
            }
            if let Some(uplink) = bridge.uplink.as_ref().filter(|uplink| !uplinks.insert(*uplink)) {
                return Err(format!(
                    "uplink {uplink} stands twice; it can be a port of one bridge"
                ));
            }
        }
        let Some(vxlan) = &self.vxlan else {
            return Ok(());
        };
        if vxlan.address.is_unspecified() || vxlan.address.is_multicast() {
            return Err(format!(
                "vxlan.address: {} reaches nobody; want this host's address for tunnels",
                vxlan.address
            ));
        }
        vxlan.dev.as_deref().map_or(Ok(()), is_device)
    }
}

fn is_device(name: &str) -> Result<(), String> {
    let fits = (1..=DEVICE_NAME_MAX).contains(&name.len())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_graphic() && byte != b'/' && byte != b':')
        && !matches!(name, "." | "..");
    if fits {
        return Ok(());
    }
    Err(format!(
        "{name:?} is no interface; want 1 to {DEVICE_NAME_MAX} characters without / : and blanks"
    ))
}
