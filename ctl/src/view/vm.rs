//! A VM as users see it.

use drover_proto::v1;
use serde::Serialize;

use super::{ReasonView, VmmView, dash, some};
use crate::output::{Detailed, Tabular};
use crate::units;

/// A VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VmView {
    /// Its name.
    pub name: String,
    /// A word, see [`vm_state_word`].
    pub state: &'static str,
    /// Where it runs or ran last.
    pub placement: PlacementView,
    /// Whether it ought to run.
    pub wanted_running: bool,
    /// Why it is pending or failed.
    pub reason: Option<ReasonView>,
    /// The VMM that runs it; null: it does not run, or has not said which it is.
    pub vmm: Option<VmmView>,
    /// Whether another VMM is installed on its host, for `ctl vm upgrade`; null: not known, or not looked at.
    pub upgrade_due: Option<bool>,
    /// Its memory; null: it does not run, or not with a balloon.
    pub memory: Option<MemoryView>,
    /// The migration under way.
    pub migration: Option<String>,
    /// The id of the snapshot that is being taken of it.
    pub snapshot: Option<String>,
    /// The id of the snapshot as which its next run is to begin.
    pub restoring: Option<String>,
    /// The newest migration, under way or ended.
    pub last_migration: Option<String>,
    /// What was asked for.
    pub spec: SpecView,
    /// Automatic restarts since the last start.
    pub restarts: u32,
    /// Whether it is being deleted.
    pub deleting: bool,
    /// Unix milliseconds.
    pub created_ms: u64,
    /// Unix milliseconds.
    pub changed_ms: u64,
}

/// Where a VM runs or ran last.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PlacementView {
    /// The host.
    pub host: Option<String>,
    /// The run epoch: rises by one with each start and hand-over; 0 before the first.
    pub epoch: u64,
}

/// What was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SpecView {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// An image's name.
    pub kernel: String,
    /// An image's name.
    pub initrd: Option<String>,
    /// The kernel's command line.
    pub cmdline: String,
    /// The CPU features that the guest sees.
    pub cpu_profile: String,
    /// `never` or `on-failure`.
    pub restart: &'static str,
    /// The only host it starts on.
    pub host: Option<String>,
    /// Its disks, in the order of their slots.
    pub disks: Vec<DiskView>,
    /// Its NICs, in the order of their slots.
    pub nics: Vec<NicView>,
    /// Whether its guest can be asked to give memory up.
    pub balloon: bool,
    /// Of `memory_mib`, what its guest is to have, MiB.
    pub memory_target_mib: u64,
    /// Whether its console has a virtio device beside the serial port.
    pub virtio_console: bool,
    /// What its cloud-init is told; null: it has no seed disk.
    pub cloud_init: Option<CloudView>,
}

/// Memory of a VM that runs with a balloon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryView {
    /// What its guest was asked to have, MiB.
    pub target_mib: u64,
    /// What it has, it says.
    pub actual_mib: u64,
    /// Whether it has a driver that does as it is asked.
    pub driver: bool,
}

impl From<v1::VmMemory> for MemoryView {
    fn from(memory: v1::VmMemory) -> Self {
        Self {
            target_mib: memory.target_mib,
            actual_mib: memory.actual_mib,
            driver: memory.driver,
        }
    }
}

/// What a guest's cloud-init is told, but what may be secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CloudView {
    /// The size of its user data, which `--user-data` prints.
    pub user_data_bytes: u32,
    /// The guest's name; null: the VM's.
    pub hostname: Option<String>,
    /// Public keys that may log in.
    pub ssh_keys: Vec<String>,
    /// Whether it has a network-config of its own.
    pub own_network_config: bool,
}

impl From<v1::CloudInit> for CloudView {
    fn from(cloud: v1::CloudInit) -> Self {
        Self {
            user_data_bytes: cloud.user_data_bytes,
            hostname: some(cloud.hostname),
            ssh_keys: cloud.ssh_keys,
            own_network_config: !cloud.network_config.is_empty(),
        }
    }
}

/// A NIC of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NicView {
    /// The network's name.
    pub network: String,
    /// Its MAC.
    pub mac: Option<String>,
    /// The address that the VM has in the network; null: the network has no subnet.
    pub ip: Option<String>,
    /// Whether it leads nowhere: a clone's guest remembers it, and is asked to give it up.
    pub unplugged: bool,
}

impl From<v1::VmNic> for NicView {
    fn from(nic: v1::VmNic) -> Self {
        Self {
            network: nic.network,
            mac: some(nic.mac),
            ip: some(nic.ip),
            unplugged: nic.unplugged,
        }
    }
}

/// A disk of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DiskView {
    /// The volume's name.
    pub volume: String,
    /// Whether the guest cannot write to it.
    pub read_only: bool,
    /// What the guest is told as its serial number; null: the beginning of the volume's name.
    pub serial: Option<String>,
}

impl From<v1::VmDisk> for DiskView {
    fn from(disk: v1::VmDisk) -> Self {
        Self {
            volume: disk.volume,
            read_only: disk.read_only,
            serial: some(disk.serial),
        }
    }
}

/// The word for a VM's state.
pub fn vm_state_word(state: v1::VmState) -> &'static str {
    match state {
        v1::VmState::Unspecified => "unspecified",
        v1::VmState::Stopped => "stopped",
        v1::VmState::Pending => "pending",
        v1::VmState::Starting => "starting",
        v1::VmState::Running => "running",
        v1::VmState::Paused => "paused",
        v1::VmState::Stopping => "stopping",
        v1::VmState::Failed => "failed",
        v1::VmState::Unknown => "unknown",
    }
}

impl From<v1::Vm> for VmView {
    fn from(vm: v1::Vm) -> Self {
        let state = vm_state_word(vm.state());
        let runs = matches!(vm.state(), v1::VmState::Running | v1::VmState::Paused);
        let memory = vm.devices.as_ref().and_then(|devices| devices.memory);
        let spec = vm.spec.unwrap_or_default();
        let (balloon, all) = (spec.balloon() == v1::Balloon::On, spec.memory_mib);
        let placement = vm.placement.unwrap_or_default();
        let restart = match spec.restart() {
            v1::RestartPolicy::OnFailure => "on-failure",
            v1::RestartPolicy::Never | v1::RestartPolicy::Unspecified => "never",
        };
        Self {
            name: spec.name,
            state,
            placement: PlacementView {
                host: some(placement.host),
                epoch: placement.epoch,
            },
            wanted_running: vm.wanted_running,
            reason: ReasonView::of(vm.reason),
            vmm: vm.vmm.filter(|_| runs).map(VmmView::from),
            upgrade_due: None,
            memory: memory.filter(|_| runs).map(MemoryView::from),
            migration: some(vm.migration),
            snapshot: some(vm.snapshot),
            restoring: vm.restore.and_then(|restore| some(restore.snapshot)),
            last_migration: some(vm.last_migration),
            spec: SpecView {
                vcpus: spec.vcpus,
                memory_mib: spec.memory_mib,
                kernel: spec.kernel,
                initrd: some(spec.initrd),
                cmdline: spec.cmdline,
                cpu_profile: some(spec.cpu_profile).unwrap_or_else(|| "baseline".to_owned()),
                restart,
                host: some(spec.host),
                disks: spec.disks.into_iter().map(DiskView::from).collect(),
                nics: spec.nics.into_iter().map(NicView::from).collect(),
                balloon,
                memory_target_mib: match spec.memory_target_mib {
                    0 => all,
                    target => target,
                },
                virtio_console: spec.virtio_console,
                cloud_init: spec.cloud_init.map(CloudView::from),
            },
            restarts: vm.restarts,
            deleting: vm.deleting,
            created_ms: vm.created_ms,
            changed_ms: vm.changed_ms,
        }
    }
}

impl VmView {
    /// Holds the VMM that runs it against the one that is installed on its host.
    pub fn compare(&mut self, installed: Option<v1::VmmBuild>) {
        let installed = installed.map(VmmView::from);
        self.upgrade_due = self
            .vmm
            .as_ref()
            .zip(installed)
            .map(|(runs, installed)| *runs != installed);
    }

    /// Its memory in a line: `256 MiB, of which the guest is to have 128 MiB and has 200 MiB`.
    pub fn memory_line(&self) -> String {
        let SpecView {
            memory_mib,
            memory_target_mib,
            ..
        } = self.spec;
        let mut line = format!("{memory_mib} MiB");
        if self.spec.balloon && (memory_target_mib != memory_mib || self.memory.is_some()) {
            line += &format!(", of which the guest is to have {memory_target_mib} MiB");
        }
        match self.memory {
            Some(memory) if memory.driver => line += &format!(" and has {} MiB", memory.actual_mib),
            Some(_) => line += "; it has no driver that gives any up",
            None => {}
        }
        line
    }

    /// Its disks in a line: `data, base (read-only)`.
    fn disks(&self) -> String {
        let one = |disk: &DiskView| {
            let how = if disk.read_only { " (read-only)" } else { "" };
            format!("{}{how}", disk.volume)
        };
        let disks: Vec<String> = self.spec.disks.iter().map(one).collect();
        dash(some(disks.join(", ")).as_deref())
    }

    /// Its NICs in a line: `lan 52:54:00:00:00:01 10.1.0.7, wide …`.
    fn nics(&self) -> String {
        let one = |nic: &NicView| {
            let unplugged = nic.unplugged.then_some("(unplugged)");
            let parts = [
                Some(nic.network.as_str()),
                nic.mac.as_deref(),
                nic.ip.as_deref(),
                unplugged,
            ];
            parts.into_iter().flatten().collect::<Vec<_>>().join(" ")
        };
        let nics: Vec<String> = self.spec.nics.iter().map(one).collect();
        dash(some(nics.join(", ")).as_deref())
    }

    /// What cloud-init is told in a line.
    fn cloud_init(&self) -> String {
        let line = self.spec.cloud_init.as_ref().map(|cloud| {
            let network = if cloud.own_network_config {
                ", a network-config of its own"
            } else {
                ""
            };
            format!(
                "{} bytes of user data, hostname {}, {} SSH keys{network}",
                cloud.user_data_bytes,
                cloud.hostname.as_deref().unwrap_or(&self.name),
                cloud.ssh_keys.len()
            )
        });
        dash(line.as_deref())
    }

    /// State and placement in a sentence: `vm1 is running on host1 (epoch 3)`.
    pub fn sentence(&self) -> String {
        let place = match (&self.placement.host, self.state) {
            (Some(host), "starting" | "running" | "paused" | "stopping" | "unknown") => {
                format!(" on {host} (epoch {})", self.placement.epoch)
            }
            _ => String::new(),
        };
        let reason = self
            .reason
            .as_ref()
            .map(|reason| format!(": {}", reason.line()))
            .unwrap_or_default();
        format!("{} is {}{place}{reason}", self.name, self.state)
    }
}

impl Tabular for VmView {
    const HEAD: &'static [&'static str] = &[
        "NAME",
        "STATE",
        "HOST",
        "EPOCH",
        "VCPUS",
        "MEMORY",
        "KERNEL",
        "MIGRATION",
    ];

    fn id(&self) -> &str {
        &self.name
    }

    fn row(&self) -> Vec<String> {
        vec![
            self.name.clone(),
            if self.deleting {
                format!("{}, deleting", self.state)
            } else {
                self.state.to_owned()
            },
            dash(self.placement.host.as_deref()),
            self.placement.epoch.to_string(),
            self.spec.vcpus.to_string(),
            format!("{} MiB", self.spec.memory_mib),
            self.spec.kernel.clone(),
            dash(self.migration.as_deref()),
        ]
    }
}

impl Detailed for VmView {
    fn fields(&self) -> Vec<(&'static str, String)> {
        let mut fields = vec![
            ("name", self.name.clone()),
            ("state", self.state.to_owned()),
            ("host", dash(self.placement.host.as_deref())),
            ("epoch", self.placement.epoch.to_string()),
        ];
        if let Some(reason) = &self.reason {
            fields.push(("reason", reason.line()));
        }
        if let Some(vmm) = &self.vmm {
            let due = match self.upgrade_due {
                Some(true) => ", another is installed: `ctl vm upgrade`",
                Some(false) => ", the installed one",
                None => "",
            };
            fields.push(("vmm", format!("{}{due}", vmm.line())));
        }
        let of_snapshots = [("snapshot", &self.snapshot), ("restoring", &self.restoring)];
        for (label, id) in of_snapshots {
            fields.extend(id.clone().map(|id| (label, id)));
        }
        fields.extend([
            (
                "wanted",
                if self.wanted_running { "running" } else { "stopped" }.to_owned(),
            ),
            ("vcpus", self.spec.vcpus.to_string()),
            ("memory", self.memory_line()),
            ("kernel", self.spec.kernel.clone()),
            ("initrd", dash(self.spec.initrd.as_deref())),
            ("cmdline", self.spec.cmdline.clone()),
            ("cpu profile", self.spec.cpu_profile.clone()),
            (
                "restart",
                format!("{} ({} so far)", self.spec.restart, self.restarts),
            ),
            ("disks", self.disks()),
            ("nics", self.nics()),
            ("cloud-init", self.cloud_init()),
            (
                "console",
                if self.spec.virtio_console {
                    "serial port, virtio"
                } else {
                    "serial port"
                }
                .to_owned(),
            ),
            ("pinned to", dash(self.spec.host.as_deref())),
            ("migration", dash(self.migration.as_deref())),
            ("last migration", dash(self.last_migration.as_deref())),
            ("created", units::instant(self.created_ms)),
            ("changed", units::instant(self.changed_ms)),
        ]);
        fields
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn running() -> v1::Vm {
        v1::Vm {
            spec: Some(v1::VmSpec {
                name: "vm1".to_owned(),
                vcpus: 2,
                memory_mib: 256,
                kernel: "probe".to_owned(),
                ..Default::default()
            }),
            state: v1::VmState::Running.into(),
            placement: Some(v1::Placement {
                host: "host1".to_owned(),
                epoch: 3,
                ..Default::default()
            }),
            wanted_running: true,
            ..Default::default()
        }
    }

    #[test]
    fn a_vms_json_has_the_promised_fields() {
        let json = serde_json::to_value(VmView::from(running())).unwrap();
        assert_eq!(json["name"], "vm1");
        assert_eq!(json["state"], "running");
        assert_eq!(json["placement"], json!({"host": "host1", "epoch": 3}));
        assert_eq!(json["reason"], json!(null));
        assert_eq!(json["migration"], json!(null));
        assert_eq!(json["spec"]["cpu_profile"], "baseline");
        assert_eq!(json["spec"]["restart"], "never");
    }

    #[test]
    fn what_the_guest_is_to_have_of_its_memory_and_has_is_told() {
        let shown = |balloon: v1::Balloon, target_mib: u64, memory: Option<v1::VmMemory>| {
            let mut vm = running();
            let spec = vm.spec.as_mut().unwrap();
            spec.set_balloon(balloon);
            spec.memory_target_mib = target_mib;
            vm.devices = Some(v1::VmDevices {
                memory,
                ..Default::default()
            });
            VmView::from(vm)
        };
        let memory = v1::VmMemory {
            target_mib: 128,
            actual_mib: 200,
            driver: true,
            ..Default::default()
        };
        let deaf = v1::VmMemory {
            driver: false,
            ..memory
        };
        use v1::Balloon::{Off, On};
        for (view, line) in [
            (shown(Off, 0, None), "256 MiB"),
            (shown(On, 0, None), "256 MiB"),
            (
                shown(On, 128, None),
                "256 MiB, of which the guest is to have 128 MiB",
            ),
            (
                shown(On, 128, Some(memory)),
                "256 MiB, of which the guest is to have 128 MiB and has 200 MiB",
            ),
            (
                shown(On, 128, Some(deaf)),
                "256 MiB, of which the guest is to have 128 MiB; it has no driver that gives any up",
            ),
        ] {
            assert_eq!(view.memory_line(), line);
        }
        let json = serde_json::to_value(shown(On, 128, Some(memory))).unwrap();
        assert_eq!(
            json["memory"],
            json!({"target_mib": 128, "actual_mib": 200, "driver": true})
        );
        assert_eq!(json["spec"]["memory_target_mib"], 128);
    }

    #[test]
    fn a_vm_never_placed_has_no_host() {
        let vm = v1::Vm {
            state: v1::VmState::Stopped.into(),
            placement: None,
            ..running()
        };
        let json = serde_json::to_value(VmView::from(vm)).unwrap();
        assert_eq!(json["placement"], json!({"host": null, "epoch": 0}));
    }

    #[test]
    fn a_sentence_tells_where_and_why() {
        assert_eq!(
            VmView::from(running()).sentence(),
            "vm1 is running on host1 (epoch 3)"
        );
        let failed = v1::Vm {
            state: v1::VmState::Failed.into(),
            reason: Some(v1::Reason {
                code: "vmm_died".to_owned(),
                message: "the VMM ended".to_owned(),
            }),
            ..running()
        };
        assert_eq!(
            VmView::from(failed).sentence(),
            "vm1 is failed: the VMM ended [vmm_died]"
        );
    }

    #[test]
    fn a_row_has_a_cell_for_each_heading() {
        let view = VmView::from(running());
        assert_eq!(view.row().len(), VmView::HEAD.len());
        assert_eq!(view.row()[1], "running");
    }
}
