//! The host's devices, by route netlink (rtnetlink(7)).

use std::collections::BTreeSet;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures_util::{StreamExt, TryStreamExt};
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::{Error, Handle, LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVxlan};
use tokio::task::JoinSet;

use super::plan::{Link, Step, Tap, Vxlan};
use super::tap;

/// Whom a frame goes to that a tunnel does not know the way for: an entry of its forwarding table for this address.
const ANYBODY: [u8; 6] = [0; 6];

/// A connection to the kernel, in the network namespace of the thread that made it.
pub struct Kernel {
    handle: Handle,
    /// What reads the kernel's answers; it ends with this.
    _reader: JoinSet<()>,
    tap_owner: u32,
}

impl Kernel {
    /// Connects; TAPs that are made belong to `tap_owner`.
    pub fn connect(tap_owner: u32) -> io::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        let mut reader = JoinSet::new();
        reader.spawn(connection);
        Ok(Self {
            handle,
            _reader: reader,
            tap_owner,
        })
    }

    /// All devices.
    pub async fn links(&self) -> io::Result<Vec<Link>> {
        let dump: Vec<LinkMessage> = self
            .handle
            .link()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(io_error)?;
        Ok(dump.iter().map(link).collect())
    }

    /// The host's addresses, each with its device's number. Those that belong to a link by itself are left out.
    pub async fn addresses(&self) -> io::Result<Vec<(u32, IpAddr)>> {
        let dump = self.handle.address().get().execute().try_collect::<Vec<_>>();
        let mut found = Vec::new();
        for message in dump.await.map_err(io_error)? {
            for attribute in &message.attributes {
                if let AddressAttribute::Address(ip) = attribute {
                    let of_link = matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
                    found.extend((!of_link).then_some((message.header.index, *ip)));
                }
            }
        }
        Ok(found)
    }

    /// Does one thing. What is there already, or gone already, is well.
    pub async fn take(&self, step: &Step) -> io::Result<()> {
        match step {
            Step::MakeBridge(name, mtu) => {
                // Multicast goes to all: there is nobody who would keep a bridge's knowledge of listeners alive.
                let bridge = LinkMessageBuilder::<LinkBridge>::new(name)
                    .forward_delay(0)
                    .mcast_snooping(false)
                    .mtu(*mtu);
                self.make(bridge.build()).await?;
                self.silence(name).await?;
                let up = LinkUnspec::new_with_name(name).up().build();
                self.change(up).await
            }
            Step::MakeVxlan(name, vxlan) => self.make_vxlan(name, vxlan).await,
            Step::MakeTap(name, tap) => self.make_tap(name, tap).await,
            Step::Attach { port, bridge } => {
                let message = LinkUnspec::new_with_index(port.index).controller(*bridge).up();
                self.change(message.build()).await
            }
            Step::Up(link) => {
                self.change(LinkUnspec::new_with_index(link.index).up().build())
                    .await
            }
            Step::Remove(link) => {
                let removed = self
                    .handle
                    .link()
                    .del(link.index)
                    .execute()
                    .await
                    .map_err(io_error);
                unless(removed, libc::ENODEV)
            }
        }
    }

    async fn make(&self, message: LinkMessage) -> io::Result<()> {
        let made = self.handle.link().add(message).execute().await.map_err(io_error);
        unless(made, libc::EEXIST)
    }

    async fn change(&self, message: LinkMessage) -> io::Result<()> {
        self.handle
            .link()
            .change(message)
            .execute()
            .await
            .map_err(io_error)
    }

    async fn make_vxlan(&self, name: &str, vxlan: &Vxlan) -> io::Result<()> {
        let mut message = LinkVxlan::new(name, vxlan.vni)
            .port(vxlan.port)
            .learning(true)
            .mtu(vxlan.mtu);
        message = match vxlan.local {
            IpAddr::V4(local) => message.local(local),
            IpAddr::V6(local) => message.local6(local),
        };
        if let Some(dev) = &vxlan.dev {
            let links = self.links().await?;
            let found = links.iter().find(|link| link.name == *dev);
            let missing = || io::Error::new(ErrorKind::NotFound, format!("no interface is named {dev}"));
            message = message.dev(found.ok_or_else(missing)?.index);
        }
        self.make(message.build()).await?;
        self.silence(name).await
    }

    async fn make_tap(&self, name: &str, wanted: &Tap) -> io::Result<()> {
        let tap = name.to_owned();
        let owner = self.tap_owner;
        spawn_blocking(move || tap::make(&tap, owner)).await?;
        self.silence(name).await?;
        let message = LinkUnspec::new_with_name(name)
            .address(wanted.mac.to_vec())
            .mtu(wanted.mtu)
            .alias(wanted.alias.as_str());
        self.change(message.build()).await
    }

    /// The host itself takes no part in guests' networks: no IPv6 address comes up on the device, and no router that a guest makes
    /// up is listened to.
    async fn silence(&self, name: &str) -> io::Result<()> {
        let path = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
        let written = spawn_blocking(move || std::fs::write(path, "1")).await;
        match written {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => Ok(()), // A kernel without IPv6.
        }
    }

    /// To whom a tunnel sends what is for everybody.
    pub async fn peers(&self, tunnel: u32) -> io::Result<BTreeSet<IpAddr>> {
        let request = self
            .handle
            .neighbours()
            .get()
            .set_address_family(AddressFamily::Bridge);
        let dump: Vec<NeighbourMessage> = request.execute().try_collect().await.map_err(io_error)?;
        let of_tunnel = dump.iter().filter(|entry| entry.header.ifindex == tunnel);
        Ok(of_tunnel.filter_map(peer).collect())
    }

    /// Lets a tunnel send what is for everybody to one more.
    pub async fn add_peer(&self, tunnel: u32, address: IpAddr) -> io::Result<()> {
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewNeighbour(entry(tunnel, address)));
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_APPEND;
        let mut answers = self.handle.clone().request(request).map_err(io_error)?;
        while let Some(answer) = answers.next().await {
            if let NetlinkPayload::Error(error) = answer.payload {
                unless(Err(error.to_io()), libc::EEXIST)?;
            }
        }
        Ok(())
    }

    /// No longer.
    pub async fn remove_peer(&self, tunnel: u32, address: IpAddr) -> io::Result<()> {
        let removed = self
            .handle
            .neighbours()
            .del(entry(tunnel, address))
            .execute()
            .await;
        unless(removed.map_err(io_error), libc::ENOENT)
    }
}

fn link(message: &LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        up: message.header.flags.contains(LinkFlags::Up),
        ..Link::default()
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Controller(master) => link.master = Some(*master).filter(|master| *master != 0),
            LinkAttribute::LinkInfo(infos) => {
                link.is_bridge |= infos.contains(&LinkInfo::Kind(InfoKind::Bridge));
            }
            _ => {}
        }
    }
    link
}

fn entry(tunnel: u32, address: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = tunnel;
    message.header.state = NeighbourState::Permanent;
    message.header.flags = NeighbourFlags::Own;
    let destination = match address {
        IpAddr::V4(ip) => NeighbourAddress::Inet(ip),
        IpAddr::V6(ip) => NeighbourAddress::Inet6(ip),
    };
    message.attributes = vec![
        NeighbourAttribute::LinkLayerAddress(ANYBODY.to_vec()),
        NeighbourAttribute::Destination(destination),
    ];
    message
}

/// The address of an entry for [`ANYBODY`].
fn peer(entry: &NeighbourMessage) -> Option<IpAddr> {
    let for_anybody = NeighbourAttribute::LinkLayerAddress(ANYBODY.to_vec());
    if !entry.attributes.contains(&for_anybody) {
        return None;
    }
    entry.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => Some(IpAddr::V4(*ip)),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => Some(IpAddr::V6(*ip)),
        // Of a bridge's table the crate does not know which it is.
        NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => {
            let v4 = <[u8; 4]>::try_from(bytes.as_slice()).map(|ip| IpAddr::V4(Ipv4Addr::from(ip)));
            let v6 = <[u8; 16]>::try_from(bytes.as_slice()).map(|ip| IpAddr::V6(Ipv6Addr::from(ip)));
            v4.or(v6).ok()
        }
        _ => None,
    })
}

/// The kernel's own words where it answered.
fn io_error(error: Error) -> io::Error {
    match error {
        Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other),
    }
}

/// `outcome`, unless it is the error `code`, which means that it was so already.
fn unless(outcome: io::Result<()>, code: i32) -> io::Result<()> {
    match outcome {
        Err(error) if error.raw_os_error() == Some(code) => Ok(()),
        other => other,
    }
}

/// On a thread that may wait.
pub(super) async fn spawn_blocking<T: Send + 'static>(
    what: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(what)
        .await
        .map_err(io::Error::other)?
}
