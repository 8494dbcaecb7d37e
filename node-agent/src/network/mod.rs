//! The host's part in networks: what it offers, and what its VMs' NICs hang on.
//!
//! ```text
//!   a VMM is to start ── attach ──┐            ┌─ rules ── nft
//!   a VMM is gone ────── detach ──┼─ settle ───┼─ devices ── netlink, TAPs by ioctl
//!   desired state ────── told ────┤            └─ tunnels' peers ── netlink
//!   a few seconds passed ─────────┘
//! ```
//!
//! Level-triggered: each pass compares what shall be (the NICs of all VMMs that are known to live or are about to) with what is
//! there, so it repairs what others changed and clears what an agent left that was killed. Rules come first, then devices, then a
//! TAP's place in its bridge: no frame of a guest passes unseen. Only devices with this agent's own names are made or removed.
//!
//! The NICs of a VMM stand in its folder (`nics.json`) from before its start, so a later agent keeps them whatever is desired by then. One
//! that comes while it runs ([`Networks::add`]) stands there before the VMM is told, and until the VMM has it no more
//! ([`Networks::remove`]): whatever moment an agent is killed in, the file names every TAP that a VMM may have open.

pub mod config;
pub mod links;
pub mod plan;
pub mod rules;
pub mod tap;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use drover_proto::v1::{Network, NetworkPeers, VmDesired, VmNic};
use drover_proto::{Code, Fault};
use tokio::sync::{Notify, watch};

use crate::config::Config;
use crate::host::store::replace_private;
use crate::key::Key;
use crate::sandbox;
use config::NetworksConfig;
use links::Kernel;
use plan::{Link, Names, Nic};

/// Between two looks at what is there.
const PERIOD: Duration = Duration::from_secs(5);
/// Rules that nobody changed are written anew after this: a firewall that was reloaded may have flushed them.
const RULES_PERIOD: Duration = Duration::from_secs(10);
/// Rounds until all is there: devices, then ports, then what a removal has made possible.
const ROUNDS_MAX: usize = 4;
/// The NICs of a VMM, in its folder.
pub const NICS_FILE: &str = "nics.json";
/// CAP_NET_ADMIN, in a set of capabilities (capabilities(7)).
const NET_ADMIN: u64 = 1 << 12;

/// What the host offers, as it reports it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Offer {
    /// Networks of kind bridge.
    pub networks: Vec<String>,
    /// Its address in tunnels.
    pub vxlan: Option<IpAddr>,
    /// "ok", or why it is less than was configured; empty: nothing was.
    pub networking: String,
}

/// The NICs that the VMM starts with, in the specification's order: one that is to begin as a snapshot is given those that came since when it runs.
pub fn at_its_start(desired: &VmDesired) -> Vec<VmNic> {
    let nics = desired.spec.as_ref().map_or(&[][..], |spec| &spec.nics);
    let restored = desired.restore.is_some();
    let had = |nic: &&VmNic| !restored || nic.attach_revision == 0;
    nics.iter().filter(had).cloned().collect()
}

/// See the module.
pub struct Networks {
    config: NetworksConfig,
    /// How its devices are called.
    pub names: Names,
    runs: Mutex<Runs>,
    peers: Mutex<Option<BTreeMap<String, BTreeSet<IpAddr>>>>,
    offer: watch::Sender<Offer>,
    again: Notify,
    /// Held while something is changed.
    kernel: tokio::sync::Mutex<Hands>,
}

/// The VMMs that live or are about to.
#[derive(Clone, Default)]
struct Runs {
    /// Each with its NICs, also one without.
    nics: BTreeMap<Key, Vec<Nic>>,
    /// Whose file cannot be read: which TAPs they have nobody knows.
    unreadable: BTreeSet<Key>,
}

/// What things are changed with.
struct Hands {
    /// Whose TAPs are.
    tap_owner: u32,
    kernel: Option<Kernel>,
    /// The rules that stand, and since when.
    rules: Option<(String, Instant)>,
}

impl Networks {
    /// For this configuration; call [`Networks::know`] for every VMM that lives before the first [`Networks::keep`].
    pub async fn new(config: &Config) -> Self {
        let networks = Self {
            names: Names::new(&config.cluster_id, &config.name),
            config: config.networks.clone(),
            runs: Mutex::default(),
            peers: Mutex::default(),
            offer: watch::Sender::default(),
            again: Notify::new(),
            kernel: tokio::sync::Mutex::new(Hands {
                tap_owner: sandbox::tap_owner(config),
                kernel: None,
                rules: None,
            }),
        };
        networks.look().await;
        networks
    }

    /// What the host offers now.
    pub fn offer(&self) -> Offer {
        self.offer.borrow().clone()
    }

    /// Takes over a VMM that lives, with the NICs that stand in its folder.
    pub fn know(&self, key: &Key, folder: &Path) {
        let nics = match std::fs::read(folder.join(NICS_FILE)) {
            Ok(text) => serde_json::from_slice(&text).map_err(io::Error::other),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
        };
        let mut runs = self.runs();
        let nics = nics.unwrap_or_else(|error| {
            tracing::error!(vmm = %key, "{NICS_FILE}: {error}; its TAPs are left alone");
            runs.unreadable.insert(key.clone());
            Vec::new()
        });
        runs.nics.insert(key.clone(), nics);
    }

    /// The NICs that the VMM has, or may have.
    pub fn held(&self, key: &Key) -> Vec<Nic> {
        self.runs().nics.get(key).cloned().unwrap_or_default()
    }

    /// Makes what the VMM's NICs hang on; all of it is there when this returns. Returns the NICs.
    ///
    /// # Errors
    /// `network_unavailable`, with what could not be made.
    pub async fn attach(&self, key: &Key, desired: &VmDesired) -> Result<Vec<Nic>, Fault> {
        let asked = at_its_start(desired);
        let nics = plan::nics(&self.names, key, &asked, &desired.networks)?;
        self.runs().nics.insert(key.clone(), nics.clone());
        if nics.is_empty() {
            return Ok(nics);
        }
        if let Err(fault) = self.made(key, &nics).await {
            self.detach(key);
            return Err(fault);
        }
        Ok(nics)
    }

    /// Makes what these NICs of the VMM, which are known by now, hang on.
    async fn made(&self, key: &Key, nics: &[Nic]) -> Result<(), Fault> {
        let problems = self.settle().await;
        let of_run = BTreeMap::from([(key.clone(), nics.to_vec())]);
        let of_run = plan::wanted(&self.names, &self.config, &of_run);
        let mut needed = of_run
            .taps
            .keys()
            .chain(of_run.ports.values())
            .chain(of_run.vxlans.keys());
        let problem = needed.find_map(|device| {
            let problem = problems.get(device).or(problems.get(""))?;
            Some(format!("a NIC of {} cannot be made: {device}: {problem}", key.vm))
        });
        match problem {
            None => Ok(()),
            Some(message) => Err(Fault::new(Code::NetworkUnavailable, message).field("nics")),
        }
    }

    /// Makes what one more NIC of a VMM that runs hangs on, unless it is there. It stands in the VMM's folder before anything is made.
    ///
    /// # Errors
    /// `network_unavailable`, with what could not be made; nothing is left of it then. `host_unreachable`: the VMM is gone.
    pub async fn add(
        &self,
        key: &Key,
        folder: &Path,
        asked: &VmNic,
        network: &Network,
    ) -> Result<Nic, Fault> {
        let mut new = plan::nics(
            &self.names,
            key,
            std::slice::from_ref(asked),
            std::slice::from_ref(network),
        )?;
        let new = new.remove(0);
        let is_it = |held: &&Nic| held.mac == new.mac && held.revision == new.revision;
        let held = self.held(key);
        let known = held.iter().find(is_it).cloned();
        let nic = known.clone().unwrap_or(new.clone());
        if known.is_none() {
            self.keep_nics(key, folder, |nics| nics.push(nic.clone()))?;
        }
        if let Err(fault) = self.made(key, std::slice::from_ref(&nic)).await {
            if known.is_none() {
                self.remove(key, folder, &nic.tap)?;
            }
            return Err(fault);
        }
        Ok(nic)
    }

    /// The VMM has the NIC on this TAP no more, and nothing that is under way gives it back: the TAP goes.
    ///
    /// # Errors
    /// `internal`: that cannot be written down, and the TAP stays.
    pub fn remove(&self, key: &Key, folder: &Path, tap: &str) -> Result<(), Fault> {
        self.keep_nics(key, folder, |nics| nics.retain(|nic| nic.tap != tap))?;
        self.again.notify_one();
        Ok(())
    }

    /// Changes the NICs of a VMM that lives, in its folder first.
    fn keep_nics(&self, key: &Key, folder: &Path, change: impl FnOnce(&mut Vec<Nic>)) -> Result<(), Fault> {
        let mut runs = self.runs();
        if runs.unreadable.contains(key) {
            let message = format!("{NICS_FILE} of {key} cannot be read: its NICs stay as they are");
            return Err(Fault::new(Code::NetworkUnavailable, message).field("nics"));
        }
        let Some(nics) = runs.nics.get_mut(key) else {
            return Err(Fault::new(
                Code::HostUnreachable,
                format!("the VMM of {key} is gone"),
            ));
        };
        let mut changed = nics.clone();
        change(&mut changed);
        let written = serde_json::to_vec(&changed)
            .map_err(io::Error::other)
            .and_then(|text| replace_private(&folder.join(NICS_FILE), &text));
        written.map_err(|error| Fault::new(Code::Internal, format!("{NICS_FILE} of {key}: {error}")))?;
        *nics = changed;
        Ok(())
    }

    /// The VMM is gone, and so shall be what only it needed.
    pub fn detach(&self, key: &Key) {
        let mut runs = self.runs();
        runs.unreadable.remove(key);
        if runs.nics.remove(key).is_some() {
            self.again.notify_one();
        }
    }

    /// What the controllers say of tunnels' other ends.
    pub fn told(&self, peers: &[NetworkPeers]) {
        let parsed = |peers: &NetworkPeers| {
            let addresses = peers.addresses.iter().filter_map(|ip| ip.parse().ok());
            (peers.network.clone(), addresses.collect())
        };
        let told = Some(peers.iter().map(parsed).collect());
        let mut known = self.peers.lock().expect("nobody panics with the peers");
        if *known != told {
            *known = told;
            self.again.notify_one();
        }
    }

    /// Keeps all as it shall be, for ever.
    pub async fn keep(&self) {
        let mut before = BTreeMap::new();
        loop {
            self.look().await;
            let problems = self.settle().await;
            if problems != before {
                for (device, problem) in &problems {
                    tracing::warn!(device, "not as it shall be: {problem}; trying on");
                }
                before = problems;
            }
            tokio::select! {
                () = self.again.notified() => {}
                () = tokio::time::sleep(PERIOD) => {}
            }
        }
    }

    fn runs(&self) -> std::sync::MutexGuard<'_, Runs> {
        self.runs.lock().expect("nobody panics with the runs")
    }

    /// Finds out what the host can offer of what it is configured to.
    async fn look(&self) {
        if self.config.is_empty() {
            return;
        }
        let mut hands = self.kernel.lock().await;
        let offer = match self.able(&mut hands).await {
            Ok((links, addresses)) => offer(&self.config, &self.names, &links, &addresses),
            Err(error) => Offer {
                networking: error.to_string(),
                ..Offer::default()
            },
        };
        drop(hands);
        if *self.offer.borrow() != offer {
            tracing::info!(networks = ?offer.networks, vxlan = ?offer.vxlan, "networking: {}", offer.networking);
            self.offer.send_replace(offer);
        }
    }

    /// Whether the agent can make anything at all; then what is there.
    async fn able(&self, hands: &mut Hands) -> io::Result<(Vec<Link>, Vec<(u32, IpAddr)>)> {
        if !net_admin()? {
            return Err(io::Error::other("the agent has no CAP_NET_ADMIN"));
        }
        tap::usable().map_err(|error| io::Error::new(error.kind(), format!("/dev/net/tun: {error}")))?;
        if self.offer.borrow().networking != "ok" {
            let sample = Nic {
                tap: format!("{}0", self.names.tap_prefix()),
                mac: [0x52, 0x54, 0, 0, 0, 1],
                ip: Some([10, 0, 0, 1].into()),
                network: String::new(),
                vxlan: None,
                mtu: 1500,
                allow_spoofing: false,
                revision: 0,
                slot: 0,
                unplugged: false,
            };
            rules::apply(&rules::script(&self.names, [&sample].into_iter()), true).await?;
        }
        let kernel = hands.kernel()?;
        Ok((kernel.links().await?, kernel.addresses().await?))
    }

    /// Brings rules, devices and peers to what they shall be; by device what stands in the way, by "" what stands in the way of all.
    async fn settle(&self) -> BTreeMap<String, String> {
        let mut hands = self.kernel.lock().await;
        let runs = self.runs().clone();
        match self.try_settle(&mut hands, &runs).await {
            Ok(problems) => problems,
            Err(error) => {
                hands.kernel = None; // Whatever it was, it may be the connection.
                BTreeMap::from([(String::new(), error.to_string())])
            }
        }
    }

    async fn try_settle(&self, hands: &mut Hands, runs: &Runs) -> io::Result<BTreeMap<String, String>> {
        let mut wanted = plan::wanted(&self.names, &self.config, &runs.nics);
        wanted.spares_taps = !runs.unreadable.is_empty();
        let kernel = hands.kernel()?;
        let mut links = kernel.links().await?;
        let no_nics = runs.nics.values().all(Vec::is_empty);
        let nothing_to_do = no_nics && !links.iter().any(|link| self.names.owns(&link.name));
        if nothing_to_do && (self.config.is_empty() || hands.rules_are_gone()) {
            return Ok(BTreeMap::new());
        }
        hands
            .write_rules(rules::script(&self.names, runs.nics.values().flatten()))
            .await?;
        let kernel = hands.kernel()?;
        let mut problems = BTreeMap::new();
        for _ in 0..ROUNDS_MAX {
            let (steps, in_the_way) = plan::steps(&self.names, &wanted, &links);
            problems = in_the_way;
            if steps.is_empty() {
                break;
            }
            for step in &steps {
                if let Err(error) = kernel.take(step).await {
                    problems.insert(device_of(step).to_owned(), error.to_string());
                }
            }
            links = kernel.links().await?;
        }
        let told = self.peers.lock().expect("nobody panics with the peers").clone();
        if let Some(told) = told {
            for (name, tunnel) in &wanted.vxlans {
                let Some(link) = links.iter().find(|link| link.name == *name) else {
                    continue;
                };
                let shall = told.get(&tunnel.network).cloned().unwrap_or_default();
                if let Err(error) = set_peers(kernel, link.index, &shall).await {
                    problems.insert(name.clone(), format!("its peers: {error}"));
                }
            }
        }
        Ok(problems)
    }
}

impl Hands {
    fn kernel(&mut self) -> io::Result<&Kernel> {
        if self.kernel.is_none() {
            self.kernel = Some(Kernel::connect(self.tap_owner)?);
        }
        self.kernel
            .as_ref()
            .ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    /// Whether the last rules that were written are those for no NIC.
    fn rules_are_gone(&self) -> bool {
        self.rules
            .as_ref()
            .is_some_and(|(script, _)| !script.contains("chain"))
    }

    async fn write_rules(&mut self, script: String) -> io::Result<()> {
        let stand = self.rules.as_ref();
        if stand.is_some_and(|(stands, since)| *stands == script && since.elapsed() < RULES_PERIOD) {
            return Ok(());
        }
        rules::apply(&script, false).await?;
        self.rules = Some((script, Instant::now()));
        Ok(())
    }
}

async fn set_peers(kernel: &Kernel, tunnel: u32, shall: &BTreeSet<IpAddr>) -> io::Result<()> {
    let are = kernel.peers(tunnel).await?;
    for address in shall.difference(&are) {
        kernel.add_peer(tunnel, *address).await?;
    }
    for address in are.difference(shall) {
        kernel.remove_peer(tunnel, *address).await?;
    }
    Ok(())
}

fn device_of(step: &plan::Step) -> &str {
    use plan::Step;
    match step {
        Step::MakeBridge(name, _) | Step::MakeVxlan(name, _) | Step::MakeTap(name, _) => name,
        Step::Attach { port: link, .. } | Step::Up(link) | Step::Remove(link) => &link.name,
    }
}

/// What of the configuration is there.
fn offer(config: &NetworksConfig, names: &Names, links: &[Link], addresses: &[(u32, IpAddr)]) -> Offer {
    let mut offer = Offer::default();
    let mut lacks = Vec::new();
    let find = |name: &str| {
        let found = links.iter().find(|link| link.name == name);
        found.ok_or_else(|| format!("no interface is named {name}"))
    };
    for (name, bridge) in &config.bridges {
        let outcome = match (&bridge.bridge, &bridge.uplink) {
            (Some(bridge), _) => find(bridge).and_then(|link| match link.is_bridge {
                true => Ok(()),
                false => Err(format!("{bridge} is no bridge")),
            }),
            (None, Some(uplink)) => find(uplink).and_then(|link| {
                let master = link
                    .master
                    .and_then(|master| links.iter().find(|link| link.index == master));
                if let Some(master) = master.filter(|master| !names.owns(&master.name)) {
                    return Err(format!("{uplink} is a port of {}", master.name));
                }
                match addresses.iter().find(|(index, _)| *index == link.index) {
                    Some((_, ip)) => Err(format!(
                        "{uplink} has the host's address {ip}, which it would lose as a bridge's port"
                    )),
                    None => Ok(()),
                }
            }),
            (None, None) => Ok(()),
        };
        match outcome {
            Ok(()) => offer.networks.push(name.clone()),
            Err(why) => lacks.push(format!("{name}: {why}")),
        }
    }
    if let Some(vxlan) = &config.vxlan {
        let is_ours = addresses.iter().any(|(_, ip)| *ip == vxlan.address);
        match vxlan.dev.as_deref().map_or(Ok(()), |dev| find(dev).map(drop)) {
            Err(why) => lacks.push(format!("vxlan: {why}")),
            Ok(()) if !is_ours => lacks.push(format!("vxlan: the host has no address {}", vxlan.address)),
            Ok(()) => offer.vxlan = Some(vxlan.address),
        }
    }
    offer.networking = if lacks.is_empty() {
        "ok".to_owned()
    } else {
        lacks.join("; ")
    };
    offer
}

/// Whether this process may change networks.
fn net_admin() -> io::Result<bool> {
    let status = std::fs::read_to_string("/proc/thread-self/status")?;
    let effective = status
        .lines()
        .find_map(|line| u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok());
    Ok(effective.is_some_and(|set| set & NET_ADMIN != 0))
}
