//! What the tests against real KVM share: the probe guest, machines made of a configuration, and waiting for the console.

#![allow(dead_code, reason = "each test binary uses its part")]
#![allow(clippy::unwrap_used, reason = "a test may, its helpers too")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use drover_pki::{ClusterCa, Role};
use drover_proto::Fault;
use drover_proto::v1::{GrantRequest, MigrationOptions, StartOutgoingRequest, VmmInfo, VmmState};
use drover_vmm::boot;
use drover_vmm::config::Config;
use drover_vmm::cpu::profile::Profile;
use drover_vmm::devices::console::Console;
use drover_vmm::machine::Machine;
use drover_vmm::time::{NS_PER_S, boottime_ns};
use drover_vmm::vm::{Shape, Vm};
use tempfile::TempDir;

/// On a host that emulates ring 0 and is busy, a boot takes seconds.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// The cluster of every test.
pub const CLUSTER: &str = "test-1";
/// Memory of a test's VM, MiB.
pub const MEMORY_MIB: u64 = 64;

/// Whether KVM is there; says loudly when it is not.
pub fn kvm() -> bool {
    let usable = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    if let Err(error) = &usable {
        println!("SKIPPED: /dev/kvm: {error}");
    }
    usable.is_ok()
}

/// Ends the test, loudly, where there is no KVM.
#[macro_export]
macro_rules! needs_kvm {
    () => {
        if !common::kvm() {
            return;
        }
    };
}

/// The probe guest's image, built by the cargo that runs the test.
pub fn probe() -> &'static Path {
    static PROBE: OnceLock<PathBuf> = OnceLock::new();
    PROBE.get_or_init(|| {
        let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
        let built = Command::new(cargo)
            .args(["build", "--quiet", "-p", "drover-probe", "--profile", "guest"])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .status()
            .unwrap();
        assert!(built.success(), "the guest does not build");
        Path::new(env!("CARGO_TARGET_TMPDIR"))
            .parent()
            .unwrap()
            .join("guest/probe")
    })
}

/// A VM without a machine around it, of the usual memory.
pub fn empty_vm(vcpus: u32) -> Vm {
    empty_vm_of(vcpus, MEMORY_MIB)
}

fn empty_vm_of(vcpus: u32, memory_mib: u64) -> Vm {
    Vm::build(Shape {
        vcpus,
        memory_bytes: memory_mib << 20,
        huge_pages: true,
        profile: Profile::Baseline,
    })
    .unwrap()
}

/// A paused VM with the probe loaded.
pub fn probe_vm(vcpus: u32, cmdline: &str) -> Vm {
    probe_vm_of(vcpus, MEMORY_MIB, cmdline)
}

/// The same with more memory.
pub fn probe_vm_of(vcpus: u32, memory_mib: u64, cmdline: &str) -> Vm {
    let vm = empty_vm_of(vcpus, memory_mib);
    let kernel = std::fs::read(probe()).unwrap();
    let entry = boot::load_bytes(vm.memory(), &kernel, None, cmdline, vcpus).unwrap();
    vm.boot(Profile::Baseline, entry).unwrap();
    vm
}

/// The console's text.
pub fn text(console: &Console) -> String {
    String::from_utf8_lossy(&console.read(0, usize::MAX).data).into_owned()
}

/// Waits until the console's whole lines satisfy `done`.
pub fn await_console(console: &Console, what: &str, done: impl Fn(&str) -> bool) -> String {
    let began = Instant::now();
    loop {
        let seen = text(console);
        let whole = &seen[..seen.rfind('\n').map_or(0, |end| end + 1)];
        if done(whole) {
            return whole.to_owned();
        }
        assert!(began.elapsed() < PATIENCE, "no {what} on the console:\n{seen}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The values of `field` in the probe's lines of each second.
pub fn seconds(text: &str, field: &str) -> Vec<u64> {
    text.lines()
        .filter(|line| line.starts_with("probe t="))
        .filter_map(|line| {
            let value = line
                .split(' ')
                .find_map(|word| word.strip_prefix(field)?.strip_prefix('='))?;
            value.parse().ok()
        })
        .collect()
}

/// Whether so many lines of a second stand there.
pub fn has_seconds(count: usize) -> impl Fn(&str) -> bool {
    move |text| seconds(text, "t").len() >= count
}

/// The probe found nothing wrong.
pub fn assert_intact(text: &str) {
    assert!(
        !text.contains("LOST") && !text.contains("BACK"),
        "the guest found damage:\n{text}"
    );
    assert!(
        seconds(text, "lost")
            .iter()
            .chain(&seconds(text, "back"))
            .all(|&count| count == 0),
        "the guest counts damage:\n{text}"
    );
    assert!(seconds(text, "ticks").is_sorted(), "ticks went back:\n{text}");
}

/// A folder with a CA and the hosts `host1` and `host2`.
pub struct World {
    dir: TempDir,
}

impl World {
    pub fn new() -> Self {
        drover_pki::install_provider();
        let dir = tempfile::tempdir().unwrap();
        let ca = ClusterCa::create(CLUSTER).unwrap();
        for host in ["host1", "host2"] {
            ca.issue_to(dir.path(), Role::Host, host).unwrap();
        }
        Self { dir }
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The configuration file of a VMM on `host` for `epoch`, changed by `change`, in a folder of its own.
    pub fn write(&self, host: &str, epoch: u64, change: impl FnOnce(&mut serde_json::Value)) -> PathBuf {
        let folder = self.dir.path().join(format!("{host}-e{epoch}"));
        std::fs::create_dir_all(&folder).unwrap();
        let tls = |kind: &str| self.dir.path().join(kind);
        let mut config = serde_json::json!({
            "cluster_id": CLUSTER, "host": host, "vm": "vm1", "epoch": epoch, "vcpus": 1, "memory_mib": MEMORY_MIB,
            "kernel": probe(), "initrd": null, "cmdline": "own=16M hot=4M rate=20000", "cpu_profile": "baseline",
            "socket": "vmm.sock", "incoming": null,
            "tls": {"ca": tls("ca.pem"), "cert": tls(&format!("{host}.pem")), "key": tls(&format!("{host}.key"))},
        });
        change(&mut config);
        let path = folder.join("config.json");
        std::fs::write(&path, config.to_string()).unwrap();
        path
    }

    /// A machine made of [`World::write`]'s configuration.
    pub fn machine(
        &self,
        host: &str,
        epoch: u64,
        change: impl FnOnce(&mut serde_json::Value),
    ) -> Arc<Machine> {
        Machine::start(Config::read(&self.write(host, epoch, change)).unwrap()).unwrap()
    }
}

/// A grant for the machine's own epoch, `ns` from now on.
pub fn grant_for(machine: &Machine, ns: u64) -> VmmInfo {
    let epoch = machine.config().epoch;
    machine
        .grant(&GrantRequest {
            epoch,
            deadline_boottime_ns: boottime_ns() + ns,
        })
        .unwrap()
}

/// A grant that no test outlives.
pub fn grant(machine: &Machine) -> VmmInfo {
    grant_for(machine, 3600 * NS_PER_S)
}

/// Waits until the machine's info satisfies `done`.
pub fn await_info(machine: &Machine, what: &str, done: impl Fn(&VmmInfo) -> bool) -> VmmInfo {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let mut changes = machine.subscribe();
        match tokio::time::timeout(PATIENCE, changes.wait_for(|info| done(info))).await {
            Ok(info) => info.unwrap().clone(),
            Err(_) => panic!("no {what}: {:?}\n{}", machine.info(), text(machine.console())),
        }
    })
}

/// Waits for a state.
pub fn await_state(machine: &Machine, state: VmmState) -> VmmInfo {
    await_info(machine, state.as_str_name(), |info| info.state() == state)
}

/// The machine is the target of migration m1.
pub fn incoming(config: &mut serde_json::Value, from: &str) {
    incoming_by(config, "m1", from);
}

/// The machine is the target of a migration.
pub fn incoming_by(config: &mut serde_json::Value, migration: &str, from: &str) {
    config["incoming"] =
        serde_json::json!({"migration": migration, "from_host": from, "listen_ip": "127.0.0.1"});
}

/// Where a target waits, once it does.
pub fn listen_addr(machine: &Machine) -> String {
    await_info(machine, "listen_addr", |info| !info.listen_addr.is_empty()).listen_addr
}

/// Starts migration m1 at the source.
pub fn send(source: &Arc<Machine>, addr: String, target_host: &str) -> Result<(), Fault> {
    send_by(source, "m1", addr, target_host)
}

/// Starts a migration at the source.
pub fn send_by(source: &Arc<Machine>, migration: &str, addr: String, target_host: &str) -> Result<(), Fault> {
    send_with(source, migration, addr, target_host, None)
}

/// Starts a migration with options at the source.
pub fn send_with(
    source: &Arc<Machine>,
    migration: &str,
    addr: String,
    target_host: &str,
    options: Option<MigrationOptions>,
) -> Result<(), Fault> {
    let request = StartOutgoingRequest {
        migration: migration.into(),
        target_addr: addr,
        target_host: target_host.into(),
        target_epoch: source.config().epoch + 1,
        options,
    };
    source.start_outgoing(request).map(drop)
}

/// Waits for the failure of the machine's migration; gives its code.
pub fn failure(machine: &Machine) -> String {
    let failed = |info: &drover_proto::v1::VmmInfo| info.migration.clone()?.failure;
    let info = await_info(machine, "failure", |info| failed(info).is_some());
    failed(&info).unwrap().code
}

/// A guest that rewrites 24 of its 64 MiB as fast as it can.
pub fn flat_out(config: &mut serde_json::Value) {
    config["memory_mib"] = 160.into();
    config["cmdline"] = "own=64M hot=24M".into();
}

/// A link slower than [`flat_out`] writes, even on a busy host.
pub fn slow_link(max_throttle_percent: u32) -> Option<MigrationOptions> {
    Some(MigrationOptions {
        bandwidth_mib_s: 16,
        max_throttle_percent,
        ..MigrationOptions::default()
    })
}
