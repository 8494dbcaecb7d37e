//! Starting a cluster, breaking its parts, and taking it down.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use drover_pki::{ClusterCa, Credentials, Role, TlsFiles};
use drover_proto::v1::{HostState, VmState, VmmState};
use serde::Serialize;
use serde_json::json;
use tempfile::TempDir;
use tokio::runtime::Runtime;

use crate::network::Network;
use crate::process::{Daemon, Spawner, find, kill_all};
use crate::vmms::{Eyes, SeenVmm};
use crate::witness::Witness;
use crate::{Client, Points, await_some};

/// Controllers and hosts of every cluster here.
pub const PARTIES: usize = 3;

/// The cluster's id.
pub const CLUSTER_ID: &str = "chaos";

const CONTROLLER_PORT: u16 = 7001;
const AGENT_PORT: u16 = 7101;

/// The VMM's program; what is installed on a host lies in the host's folder.
const VMM: &str = "drover-vmm";

/// The folder of the pool `default`, which all hosts but the last have.
const POOL: &str = "pool";

/// A file that says that the folder is to be kept.
const KEPT: &str = "kept";

/// How a cluster's folder is named; the process that made it and something random follow.
const FOLDER: &str = "drover-chaos-";

/// Lines of each log that a failed test shows.
const LOG_TAIL: usize = 40;

/// The cluster's settings, in the form of the controllers' configuration. Shorter than a user's, so that what a test
/// waits for comes soon.
#[derive(Clone, Debug, Serialize)]
#[allow(
    missing_docs,
    reason = "named and explained in common.proto, message Settings"
)]
pub struct Settings {
    pub lease_ms: u64,
    pub drift_margin_ms: u64,
    pub heartbeat_ms: u64,
    pub max_downtime_ms: u32,
    pub prepare_timeout_ms: u64,
    pub stall_timeout_ms: u64,
    pub switchover_timeout_ms: u64,
    pub allow_plaintext: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            lease_ms: 4000,
            drift_margin_ms: 500,
            heartbeat_ms: 400,
            max_downtime_ms: 300,
            prepare_timeout_ms: 6000,
            stall_timeout_ms: 3000,
            switchover_timeout_ms: 4000,
            allow_plaintext: false,
        }
    }
}

/// What a cluster is started from.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The cluster's settings.
    pub settings: Settings,
    /// The folder of the daemons' programs.
    pub binaries: PathBuf,
    /// The probe guest's kernel.
    pub probe: PathBuf,
    /// What each host says that guests may use.
    pub host_memory_mib: u64,
    /// Whether the witness looks. It asks every VMM many times a second, and that costs the VMMs time.
    pub watched: bool,
    /// The agents' setting `sandbox`; `None`: its default.
    pub sandbox: Option<&'static str>,
}

struct Party {
    dir: PathBuf,
    points: Points,
    daemon: Option<Daemon>,
}

/// A running cluster. Dropping it ends all its processes and removes all its files.
pub struct Cluster {
    /// The user's client.
    pub client: Client,
    /// Who executes, from the start of the cluster on.
    pub witness: Witness,
    /// The links.
    pub network: Network,
    runtime: Runtime,
    controllers: Vec<Party>,
    hosts: Vec<Party>,
    spawner: Spawner,
    binaries: PathBuf,
    ca: ClusterCa,
    root: TempDir,
}

/// The name of host number `index`.
pub fn host_name(index: usize) -> String {
    format!("host{}", index + 1)
}

/// The name of controller number `index`.
pub fn controller_name(index: usize) -> String {
    format!("c{}", index + 1)
}

fn controller_ip(index: usize) -> Ipv4Addr {
    Ipv4Addr::new(
        10,
        213,
        0,
        11 + u8::try_from(index).expect("a handful of controllers"),
    )
}

/// The address of host number `index`.
pub fn host_ip(index: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 213, 0, 21 + u8::try_from(index).expect("a handful of hosts"))
}

/// The target folder this test was built into.
fn target_dir() -> Result<PathBuf> {
    let test = std::env::current_exe().context("finding the test's own program")?;
    // <target>/debug/deps/<test>
    test.ancestors()
        .nth(3)
        .map(Path::to_owned)
        .context("the test's program is not in a target folder")
}

/// Removes the empty control groups of VMMs that ended with their agents; one that is in use stays.
fn sweep_groups() {
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    for line in own.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(group)) = (parts.next(), parts.next()) else {
            continue;
        };
        let mount = Path::new("/sys/fs/cgroup").join(controllers);
        let all = mount.join(group.trim_start_matches('/')).join("drover");
        for entry in fs::read_dir(&all).into_iter().flatten().flatten() {
            let _ = fs::remove_dir(entry.path());
        }
        let _ = fs::remove_dir(all);
    }
}

/// Removes the folders and control groups of tests that were killed. Nothing else of them is left: see [`crate::process`].
fn sweep() {
    sweep_groups();
    let Ok(entries) = fs::read_dir(std::env::temp_dir()) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let maker = name
            .to_str()
            .and_then(|name| name.strip_prefix(FOLDER))
            .and_then(|rest| rest.split_once('-'));
        let Some(maker) = maker.and_then(|(pid, _)| pid.parse::<u32>().ok()) else {
            continue;
        };
        if !Path::new(&format!("/proc/{maker}")).exists() && !entry.path().join(KEPT).exists() {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Why this machine cannot run a cluster of these programs, if it cannot. `made_by` is what makes them.
pub fn obstacle(binaries: &Path, probe: &Path, made_by: &str) -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("network and PID namespaces need root".to_owned());
    }
    if let Err(error) = File::options().read(true).write(true).open("/dev/kvm") {
        return Some(format!("/dev/kvm cannot be opened: {error}"));
    }
    for tool in ["ip", "nft"] {
        let found = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"]
            .iter()
            .any(|dir| Path::new(dir).join(tool).exists());
        if !found {
            return Some(format!(
                "the program {tool} is missing (packages iproute2 and nftables)"
            ));
        }
    }
    ["drover-controller", "drover-agent", "drover-vmm"]
        .map(|name| binaries.join(name))
        .iter()
        .map(PathBuf::as_path)
        .chain([probe])
        .find(|file| !file.exists())
        .map(|file| format!("{} is missing: run `{made_by}`", file.display()))
}

impl Cluster {
    /// A cluster whose hosts are all up, or `None` after a line `SKIPPED: why` if this machine cannot run one.
    pub fn or_skip(settings: &Settings) -> Option<Self> {
        Self::of_or_skip(settings, None)
    }

    /// The same with another sandbox for VMMs than by default.
    pub fn with_sandbox_or_skip(settings: &Settings, sandbox: &'static str) -> Option<Self> {
        Self::of_or_skip(settings, Some(sandbox))
    }

    fn of_or_skip(settings: &Settings, sandbox: Option<&'static str>) -> Option<Self> {
        let target = target_dir().expect("tests run from a target folder");
        let (binaries, probe) = (target.join("chaos-bin"), target.join("guest/probe"));
        if let Some(why) = obstacle(&binaries, &probe, "cargo xtask test cluster") {
            println!("SKIPPED: {why}");
            return None;
        }
        let setup = Setup {
            settings: settings.clone(),
            binaries,
            probe,
            host_memory_mib: 2048,
            watched: true,
            sandbox,
        };
        Some(Self::start(&setup).expect("the cluster starts"))
    }

    /// A cluster whose hosts are all up. The calling thread moves to the network's hub.
    pub fn start(setup: &Setup) -> Result<Self> {
        let mut cluster = Self::launch_all(setup)?;
        cluster.await_ready();
        Ok(cluster)
    }

    fn launch_all(setup: &Setup) -> Result<Self> {
        let Setup {
            settings, binaries, ..
        } = setup;
        drover_pki::install_provider();
        sweep();
        let root = tempfile::Builder::new()
            .prefix(&format!("{FOLDER}{}-", std::process::id()))
            .tempdir()
            .context("making the cluster's folder")?;
        let ips: Vec<_> = (0..PARTIES)
            .map(controller_ip)
            .chain((0..PARTIES).map(host_ip))
            .collect();
        let network = Network::new(&ips)?;
        let spawner = Spawner::new()?;
        let ca = ClusterCa::create(CLUSTER_ID)?;
        let images = root.path().join("images");
        fs::create_dir(&images)?;
        fs::create_dir(root.path().join(POOL))?;
        fs::copy(&setup.probe, images.join("probe")).context("copying the probe")?;
        fs::write(
            images.join("novel"),
            "It was a dark and stormy night.\n".repeat(100),
        )?;

        let party = |name: &str| -> Result<Party> {
            let dir = root.path().join(name);
            fs::create_dir(&dir)?;
            fs::set_permissions(&dir, fs::Permissions::from_mode(0o700))?;
            let points = Points::new(&dir.join("points"))?;
            Ok(Party {
                dir,
                points,
                daemon: None,
            })
        };
        let controllers = (0..PARTIES)
            .map(|index| party(&controller_name(index)))
            .collect::<Result<Vec<_>>>()?;
        let hosts = (0..PARTIES)
            .map(|index| party(&host_name(index)))
            .collect::<Result<Vec<_>>>()?;
        for (index, controller) in controllers.iter().enumerate() {
            let tls = ca.issue_to(&controller.dir, Role::Controller, &controller_name(index))?;
            write_config(controller, &controller_config(index, &tls, settings))?;
        }
        for (index, host) in hosts.iter().enumerate() {
            let tls = ca.issue_to(&host.dir, Role::Host, &host_name(index))?;
            std::os::unix::fs::symlink(binaries.join(VMM), host.dir.join(VMM))?;
            write_config(host, &agent_config(index, &tls, &images, setup))?;
        }

        let user = ca.issue_to(&root.path().join("user"), Role::User, "tester")?;
        let client = Client::new(&Credentials::load(&user, CLUSTER_ID)?, &controller_addrs())?;
        let data = match setup.watched {
            true => hosts.iter().map(|host| host.dir.join("data")).collect(),
            false => Vec::new(),
        };
        let witness = Witness::start(data, Duration::from_millis(settings.drift_margin_ms))?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let mut cluster = Self {
            client,
            witness,
            network,
            runtime,
            controllers,
            hosts,
            spawner,
            binaries: binaries.clone(),
            ca,
            root,
        };
        for index in 0..PARTIES {
            cluster.start_controller(index);
        }
        for index in 0..PARTIES {
            cluster.start_agent(index);
        }
        Ok(cluster)
    }

    /// Waits until somebody leads and every host is up.
    pub fn await_ready(&mut self) {
        await_some("all hosts to be up", || {
            for party in self.controllers.iter_mut().chain(&mut self.hosts) {
                if let Some(how) = party.daemon.as_mut().and_then(Daemon::ended) {
                    panic!("{} ended by itself: {how}", party.dir.display());
                }
            }
            let hosts = self.client.hosts().map_err(|fault| fault.to_string())?;
            let up = hosts.iter().filter(|host| host.state() == HostState::Up).count();
            if up == PARTIES {
                Ok(())
            } else {
                Err(format!("{up} of {PARTIES} hosts up: {hosts:?}"))
            }
        });
    }

    // --- daemons ---

    /// Starts a controller that is not running.
    pub fn start_controller(&mut self, index: usize) {
        let command = daemon_command(&self.binaries.join("drover-controller"), &self.controllers[index]);
        self.controllers[index].daemon = Some(self.launch(command, index).expect("a controller starts"));
    }

    /// Starts an agent that is not running.
    pub fn start_agent(&mut self, index: usize) {
        let command = daemon_command(&self.binaries.join("drover-agent"), &self.hosts[index]);
        self.hosts[index].daemon = Some(self.launch(command, PARTIES + index).expect("an agent starts"));
    }

    fn launch(&self, mut command: Command, place: usize) -> Result<Daemon> {
        self.network.place(place).namespace.adopt(&mut command)?;
        Daemon::start(&self.spawner, command)
    }

    /// Starts a program at a host's place in the network; it cannot outlive the cluster.
    pub fn start_at_host(&self, index: usize, command: Command) -> Result<Daemon> {
        self.launch(command, PARTIES + index)
    }

    /// `kill -9` of a controller.
    pub fn kill_controller(&mut self, index: usize) {
        self.controllers[index].daemon = None;
    }

    /// `kill -9` of an agent; its VMMs live on.
    pub fn kill_agent(&mut self, index: usize) {
        self.hosts[index].daemon = None;
    }

    /// Starts an agent anew with a field of its configuration changed.
    pub fn configure_agent(&mut self, index: usize, field: &str, value: serde_json::Value) {
        let path = self.hosts[index].dir.join("config.json");
        let text = fs::read(&path).expect("every host is configured");
        let mut config: serde_json::Value = serde_json::from_slice(&text).expect("it was written as JSON");
        config[field] = value;
        fs::write(&path, config.to_string()).expect("a configuration can be written");
        self.kill_agent(index);
        self.start_agent(index);
    }

    /// `kill -9` of every VMM of `vm` on a host; how many there were.
    pub fn kill_vmms(&mut self, index: usize, vm: &str) -> usize {
        let vmms = find("drover-vmm", &self.vm_dir(index, vm));
        kill_all(&vmms);
        vmms.len()
    }

    /// `kill -9` of the VMMs of `vm` on a host that are for `epoch`; how many there were.
    pub fn kill_vmms_for(&mut self, index: usize, vm: &str, epoch: u64) -> usize {
        let vmms = find("drover-vmm", &self.vm_dir(index, vm).join(format!("e{epoch}-")));
        kill_all(&vmms);
        vmms.len()
    }

    /// The VMM's program, as it was built.
    pub fn vmm_program(&self) -> PathBuf {
        self.binaries.join("drover-vmm")
    }

    /// Installs `program` as a host's VMM, over the name of the one that is there, as a package manager does.
    pub fn install_vmm(&self, index: usize, program: &[u8]) {
        let installed = self.hosts[index].dir.join(VMM);
        let staged = installed.with_extension("new");
        fs::write(&staged, program).expect("a program can be written");
        fs::set_permissions(&staged, fs::Permissions::from_mode(0o755)).expect("it is ours");
        fs::rename(&staged, &installed).expect("both are in one folder");
    }

    /// How many processes run a VMM of `vm` on a host, by the kernel's word.
    pub fn vmm_processes(&self, index: usize, vm: &str) -> usize {
        find("drover-vmm", &self.vm_dir(index, vm)).len()
    }

    /// The folder of a VM's VMMs on a host, one folder a run inside.
    pub fn vm_dir(&self, index: usize, vm: &str) -> PathBuf {
        self.hosts[index].dir.join("data/vms").join(vm)
    }

    /// What `ip` or another tool says at a host's place in the network; empty where it fails.
    pub fn at_host(&self, index: usize, program: &str, words: &str) -> String {
        let place = self.network.place(PARTIES + index);
        let output = place
            .namespace
            .output(program, &words.split(' ').collect::<Vec<_>>());
        output.expect("the tool is there")
    }

    /// Whether `to` answers a ping from a host within a second.
    pub fn ping(&self, index: usize, to: Ipv4Addr) -> bool {
        let place = self.network.place(PARTIES + index);
        let answered = place.namespace.ping(to, Duration::from_secs(1));
        answered.expect("a ping can be sent")
    }

    /// Pulls the cable of a controller.
    pub fn unplug_controller(&self, index: usize) {
        self.network.unplug(index);
    }

    /// Puts it back.
    pub fn plug_controller(&self, index: usize) {
        self.network.plug(index);
    }

    /// Loses every packet between two hosts.
    pub fn cut_hosts(&self, one: usize, other: usize) {
        self.network.cut_between(PARTIES + one, PARTIES + other);
    }

    /// Undoes it.
    pub fn heal_host(&self, one: usize) {
        self.network.heal(PARTIES + one);
    }

    /// Whatever a host sends passes at this rate at most, until [`Cluster::unshape_host`].
    pub fn shape_host(&self, index: usize, mbit_s: u32) {
        self.network.shape(PARTIES + index, mbit_s);
    }

    /// Undoes it.
    pub fn unshape_host(&self, index: usize) {
        self.network.unshape(PARTIES + index);
    }

    /// Bytes that a host has sent so far, as the other end of its cable counts them.
    pub fn bytes_sent_by_host(&self, index: usize) -> Result<u64> {
        self.network.bytes_sent(PARTIES + index)
    }

    /// The leader's number.
    pub fn leader(&self) -> usize {
        await_some("a leader", || {
            let cluster = self.client.cluster().map_err(|fault| fault.to_string())?;
            (0..PARTIES)
                .find(|&index| controller_name(index) == cluster.leader)
                .ok_or_else(|| format!("leader {:?}", cluster.leader))
        })
    }

    // --- pause points ---

    /// Every party whose word `point` is: the hosts for a VMM's or agent's point, the controllers for a leader's.
    fn holders(&self, point: &str) -> &[Party] {
        if point.starts_with("controller.") {
            &self.controllers
        } else {
            &self.hosts
        }
    }

    /// From now on whoever comes to `point` waits there.
    pub fn hold(&self, point: &str) {
        self.holders(point)
            .iter()
            .for_each(|party| party.points.hold(point));
    }

    /// Waits until somebody waits at `point`.
    pub fn await_reached(&self, point: &str) {
        await_some(&format!("somebody to come to {point}"), || {
            match self.reached(point) {
                true => Ok(()),
                false => Err("nobody".to_owned()),
            }
        });
    }

    /// Whether somebody has come to `point` since it was held.
    pub fn reached(&self, point: &str) -> bool {
        self.holders(point)
            .iter()
            .any(|party| party.points.reached(point))
    }

    /// Lets everybody go on.
    pub fn release(&self, point: &str) {
        self.holders(point)
            .iter()
            .for_each(|party| party.points.release(point));
    }

    // --- what is true ---

    /// Every VMM that answers.
    pub fn vmms(&self, vm: &str) -> Vec<SeenVmm> {
        let hosts = self.hosts.iter().map(|host| host.dir.join("data")).collect();
        let mut seen = self.runtime.block_on(Eyes::new(hosts).look());
        seen.retain(|vmm| vmm.info.vm == vm);
        seen
    }

    /// Waits until `vm` runs: placed, reported running, executed by exactly one VMM, which is that of the placement, and no
    /// other process left of it on any host. Returns the host's number and the epoch.
    pub fn await_runs_exactly_once(&self, vm: &str) -> (usize, u64) {
        await_some(&format!("{vm} to run exactly once"), || {
            let record = self.client.vm(vm).map_err(|fault| fault.to_string())?;
            let placement = record.placement.clone().unwrap_or_default();
            let seen = self.vmms(vm);
            let processes: usize = (0..PARTIES).map(|host| self.vmm_processes(host, vm)).sum();
            let at_home = |vmm: &SeenVmm| {
                vmm.runs() && host_name(vmm.host) == placement.host && vmm.info.epoch == placement.epoch
            };
            match seen.as_slice() {
                [only] if record.state() == VmState::Running && processes == 1 && at_home(only) => {
                    Ok((only.host, placement.epoch))
                }
                _ => Err(format!("{record:?}; {processes} processes; VMMs {seen:?}")),
            }
        })
    }

    /// Waits until `vm` is reported running and a VMM executes it; where and as which epoch. Others of it may be waiting.
    pub fn await_vm_runs_as(&self, vm: &str) -> (usize, u64) {
        await_some(&format!("{vm} to run"), || {
            let record = self.client.vm(vm).map_err(|fault| fault.to_string())?;
            let seen = self.vmms(vm);
            match seen.iter().find(|vmm| vmm.runs()) {
                Some(runs) if record.state() == VmState::Running => Ok((runs.host, runs.info.epoch)),
                _ => Err(format!("{record:?}; VMMs {seen:?}")),
            }
        })
    }

    /// Waits until no process of `vm` is left on any host.
    pub fn await_no_vmm(&self, vm: &str) {
        await_some(&format!("the end of every VMM of {vm}"), || {
            match (0..PARTIES)
                .map(|host| self.vmm_processes(host, vm))
                .sum::<usize>()
            {
                0 => Ok(()),
                left => Err(format!("{left} processes; VMMs {:?}", self.vmms(vm))),
            }
        });
    }

    /// Fails if any VMM of `vm` executes now.
    pub fn assert_nobody_runs(&self, vm: &str) {
        let seen = self.vmms(vm);
        let running: Vec<_> = seen
            .iter()
            .filter(|vmm| vmm.info.state() == VmmState::Running)
            .collect();
        assert!(
            running.is_empty(),
            "{vm} executes although it may not: {running:?}"
        );
    }

    /// Certificates of the cluster's own CA for a test that plays a party.
    pub fn issue(&self, role: Role, name: &str) -> Result<TlsFiles> {
        Ok(self
            .ca
            .issue_to(&self.root.path().join(format!("as-{name}")), role, name)?)
    }

    /// A volume's folder in the pool `default`.
    pub fn volume_folder(&self, volume: &str) -> PathBuf {
        self.root.path().join(POOL).join(volume)
    }

    /// The file in it that holds what the volume was made with, or was given by its last restore; one that is not there where it has none.
    pub fn volume_file(&self, volume: &str) -> PathBuf {
        let folder = self.volume_folder(volume);
        let entries = fs::read_dir(&folder).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        let number =
            |name: &str| -> Option<u64> { name.strip_prefix("data-")?.strip_suffix(".raw")?.parse().ok() };
        let newest = names.filter_map(|name| number(&name)).max();
        folder.join(format!("data-{}.raw", newest.unwrap_or(0)))
    }

    /// The folder of all agents' images.
    pub fn images(&self) -> PathBuf {
        self.root.path().join("images")
    }

    /// A folder for a test's own files.
    pub fn scratch(&self) -> &Path {
        self.root.path()
    }

    fn show_logs(&self) {
        let mut logs: Vec<PathBuf> = self
            .controllers
            .iter()
            .chain(&self.hosts)
            .map(|party| party.dir.join("log"))
            .collect();
        for host in &self.hosts {
            let folders = crate::vmms::folders(&host.dir.join("data"), None);
            logs.extend(folders.iter().rev().take(2).map(|dir| dir.join("vmm.log")));
        }
        for log in logs {
            let Ok(text) = fs::read(&log) else { continue };
            let text = String::from_utf8_lossy(&text).into_owned();
            let lines: Vec<_> = text.lines().collect();
            eprintln!("--- {} ---", log.display());
            lines[lines.len().saturating_sub(LOG_TAIL)..]
                .iter()
                .for_each(|line| eprintln!("{line}"));
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.show_logs();
        }
        if std::env::var_os("DROVER_KEEP").is_some() {
            self.root.disable_cleanup(true);
            let _ = fs::write(self.root.path().join(KEPT), "");
            eprintln!("kept {}", self.root.path().display());
        }
    }
}

/// "ip:port" of every controller.
pub fn controller_addrs() -> Vec<String> {
    (0..PARTIES)
        .map(|index| format!("{}:{CONTROLLER_PORT}", controller_ip(index)))
        .collect()
}

fn controller_config(index: usize, tls: &TlsFiles, settings: &Settings) -> serde_json::Value {
    let members: Vec<_> = controller_addrs()
        .iter()
        .enumerate()
        .map(|(index, addr)| json!({"id": index + 1, "name": controller_name(index), "addr": addr}))
        .collect();
    let own = &controller_addrs()[index];
    json!({
        "cluster_id": CLUSTER_ID, "id": index + 1, "name": controller_name(index), "data_dir": "data",
        "listen": own, "advertise": own, "members": members, "tls": tls, "settings": settings,
        "raft": {"heartbeat_ms": 100, "election_min_ms": 600, "election_max_ms": 1200},
    })
}

fn agent_config(index: usize, tls: &TlsFiles, images: &Path, setup: &Setup) -> serde_json::Value {
    let own = format!("{}:{AGENT_PORT}", host_ip(index));
    let pools = if index + 1 < PARTIES {
        json!({"default": format!("../{POOL}")})
    } else {
        json!({})
    };
    let networks = if index + 1 < PARTIES {
        json!({"vxlan": {"address": host_ip(index), "dev": "eth0"}})
    } else {
        json!({})
    };
    let mut config = json!({
        "cluster_id": CLUSTER_ID, "name": host_name(index), "data_dir": "data", "listen": own, "advertise": own,
        "migration_ip": host_ip(index), "controllers": controller_addrs(), "images_dir": images,
        "vmm": VMM, "tls": tls, "memory_mib": setup.host_memory_mib, "cpus": 8, "pools": pools, "networks": networks,
    });
    if let Some(sandbox) = setup.sandbox {
        config["sandbox"] = sandbox.into();
    }
    config
}

fn write_config(party: &Party, config: &serde_json::Value) -> Result<()> {
    let text = serde_json::to_vec_pretty(config)?;
    ensure!(
        !party.dir.join("config.json").exists(),
        "every party is configured once"
    );
    fs::write(party.dir.join("config.json"), text)
        .with_context(|| format!("configuring {}", party.dir.display()))
}

fn daemon_command(program: &Path, party: &Party) -> Command {
    let log = File::options()
        .create(true)
        .append(true)
        .open(party.dir.join("log"))
        .expect("a log can be opened");
    let mut command = Command::new(program);
    command.arg("--config").arg(party.dir.join("config.json"));
    command.env("DROVER_POINTS_DIR", party.points.dir());
    command
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .stderr(log);
    command
}
