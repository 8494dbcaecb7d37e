//! Networks: made known, forgotten. What they are made of is the agents' (docs/node-agent.md).

use drover_proto::v1::{CommandResponse, CreateNetwork, Network, NetworkKind};
use drover_proto::{Code, Fault};

use super::{Applied, Tx};
use crate::limits::NETWORKS_MAX;
use crate::networks;
use crate::validate::quoted;

impl Tx<'_> {
    pub(super) fn create_network(&mut self, create: &CreateNetwork) -> Applied {
        let network = networks::checked(create.network.as_ref())?;
        let name = network.name.clone();
        if self.state.networks.contains_key(&name) {
            let message = format!("network.name is {}; a network of this name exists", quoted(&name));
            return Err(Fault::new(Code::NetworkExists, message).field("network.name"));
        }
        if self.state.networks.len() >= NETWORKS_MAX {
            let message = format!(
                "network.name is {name}; the cluster has {NETWORKS_MAX} networks, which is all it takes"
            );
            return Err(Fault::new(Code::InvalidArgument, message).field("network.name"));
        }
        let is_vxlan = network.kind() == NetworkKind::Vxlan;
        let same_number = |other: &&Network| is_vxlan && other.vni == network.vni;
        if let Some(other) = self.state.networks().find(same_number) {
            let message = format!(
                "network.vni is {}, which network {} has; another number is possible",
                network.vni, other.name
            );
            return Err(Fault::new(Code::NetworkExists, message).field("network.vni"));
        }
        let network = Network {
            created_ms: self.now_ms,
            ..network
        };
        let message = format!("{name} was created by {}", self.caller);
        self.state.networks.insert(name.clone(), network.clone());
        self.event("network.created", format!("network/{name}"), message);
        Ok(answer(network))
    }

    pub(super) fn delete_network(&mut self, name: &str) -> Applied {
        if let Some((vm, _)) = self.state.nics().find(|(_, nic)| nic.network == name) {
            let message =
                format!("name is {name}, in which VM {vm} has a NIC; detach it or delete the VM first");
            return Err(Fault::new(Code::NetworkInUse, message).field("name"));
        }
        let Some(network) = self.state.networks.remove(name) else {
            let message = format!("name is {}; no network has this name", quoted(name));
            return Err(Fault::new(Code::NetworkNotFound, message).field("name"));
        };
        let message = format!("{name} was deleted by {}", self.caller);
        self.event("network.deleted", format!("network/{name}"), message);
        Ok(answer(network))
    }
}

fn answer(network: Network) -> CommandResponse {
    CommandResponse {
        network: Some(network),
        current: true,
        ..CommandResponse::default()
    }
}
