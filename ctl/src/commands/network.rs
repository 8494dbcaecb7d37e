//! `ctl network create|list|show|delete`.

use drover_proto::{Code, Fault, v1};

use super::Session;
use crate::args::{NetworkArgs, NetworkCommand};
use crate::failure::{Failure, Result};
use crate::view::NetworkView;

/// `ctl network …`
pub async fn run(session: &Session, command: &NetworkCommand) -> Result<()> {
    match command {
        NetworkCommand::Create(args) => {
            let view = NetworkView::from(session.client.create_network(asked(args)).await?);
            let sentence = format!("{} is created: {}", view.name, view.what());
            session.out.done(&view, &sentence)
        }
        NetworkCommand::List => session.out.list(&networks(session).await?),
        NetworkCommand::Show { network } => {
            let found = networks(session).await?;
            let found = found.iter().find(|view| view.name == *network);
            let view = found.ok_or_else(|| {
                let message = format!("name is {network:?}; no network has this name");
                Failure::from(Fault::new(Code::NetworkNotFound, message).field("name"))
            })?;
            session.out.show(view)
        }
        NetworkCommand::Delete { network } => {
            let view = NetworkView::from(session.client.delete_network(network).await?);
            session.out.done(&view, &format!("{} is deleted", view.name))
        }
    }
}

fn asked(args: &NetworkArgs) -> v1::Network {
    let kind = match args.vxlan {
        Some(_) => v1::NetworkKind::Vxlan,
        None => v1::NetworkKind::Bridge,
    };
    v1::Network {
        name: args.name.clone(),
        kind: kind.into(),
        vni: args.vxlan.unwrap_or_default(),
        port: args.port.unwrap_or_default(),
        subnet: args.subnet.clone().unwrap_or_default(),
        gateway: args.gateway.clone().unwrap_or_default(),
        mtu: args.mtu.unwrap_or_default(),
        allow_spoofing: args.allow_spoofing,
        ..v1::Network::default()
    }
}

async fn networks(session: &Session) -> Result<Vec<NetworkView>> {
    let networks = session.client.networks().await?;
    Ok(networks.into_iter().map(NetworkView::from).collect())
}
