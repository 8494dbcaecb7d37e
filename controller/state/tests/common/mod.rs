//! A small cluster's state and short words for its commands.
#![allow(dead_code, reason = "each test binary uses its part of this")]
#![allow(clippy::unwrap_used, reason = "test support: a panic is the test's failure")]

use drover_proto::v1::command::Kind;
use drover_proto::v1::{
    AbortMigrationRequest, AdvanceMigration, BeginRestoreRequest, Command, CommandResponse,
    CommitHandoverRequest, CreateNetwork, CreateSnapshot, CreateVm, CreateVolume, DeleteNetwork,
    DeleteSnapshot, DeleteVm, DeleteVolume, FinishMigration, HostCapacity, HostDown, HostSpec, HostUp, Image,
    MigrationPhase, Network, NetworkKind, PlaceVm, PlanMigration, Reason, Receipt, Removal,
    ReportSnapshotRequest, ReportVmRequest, RestoreVm, SnapshotNews, SnapshotProgress, StartVm, StopVm, Vm,
    VmDisk, VmNic, VmPending, VmSpec, VmState, VmmBuild, Volume,
};
use drover_proto::{Code, Fault};
use drover_state::{State, apply, into_result};

pub const HOST_MEMORY_MIB: u64 = 1_024;

pub fn host_spec(name: &str) -> HostSpec {
    let image = |name: &str, kind: &str| Image {
        name: name.into(),
        kind: kind.into(),
        ..Image::default()
    };
    HostSpec {
        name: name.into(),
        agent_addr: "127.0.0.1:7101".into(),
        migration_ip: "127.0.0.1".into(),
        capacity: Some(HostCapacity {
            cpus: 2,
            memory_mib: HOST_MEMORY_MIB,
        }),
        device_model: 1,
        images: vec![
            image("broken", "invalid"),
            image("initramfs", "initrd"),
            image("probe", "elf-pvh"),
        ],
        boot_id: "boot-1".into(),
        vmm: Some(vmm_build()),
        pools: vec!["default".into()],
        networks: vec!["lan".into()],
        vxlan: format!(
            "10.0.0.{}",
            name.len() + usize::from(name.as_bytes()[name.len() - 1])
        ),
        networking: "ok".into(),
        sandbox: "ok".into(),
        seeds: true,
        unplugs: true,
        numbers: true,
        snapshots: true,
        ..HostSpec::default()
    }
}

/// What is installed on every host, and runs on it.
pub fn vmm_build() -> VmmBuild {
    VmmBuild {
        version: "0.1.0".into(),
        build: "b1".into(),
    }
}

pub fn vm_spec(name: &str) -> VmSpec {
    VmSpec {
        name: name.into(),
        vcpus: 1,
        memory_mib: 256,
        kernel: "probe".into(),
        ..VmSpec::default()
    }
}

/// One state and a clock that only rises.
#[derive(Clone)]
pub struct Cluster {
    pub state: State,
    pub now_ms: u64,
}

impl Cluster {
    /// host1, host2 and host3, all up.
    pub fn new() -> Self {
        let mut cluster = Self {
            state: State::default(),
            now_ms: 1_000,
        };
        for name in ["host1", "host2", "host3"] {
            cluster.ok(Kind::RegisterHost(host_spec(name)));
        }
        cluster
    }

    /// With vm1 running on host1 at epoch 1.
    pub fn running() -> Self {
        let mut cluster = Self::new();
        cluster.ok(create("vm1"));
        cluster.run("vm1", "host1");
        cluster
    }

    pub fn apply_as(&mut self, request_id: &str, kind: Kind) -> Result<CommandResponse, Fault> {
        self.now_ms += 1;
        let command = Command {
            now_ms: self.now_ms,
            request_id: request_id.into(),
            caller: "user/test".into(),
            kind: Some(kind),
        };
        into_result(apply(&mut self.state, &command).0)
    }

    pub fn apply(&mut self, kind: Kind) -> Result<CommandResponse, Fault> {
        self.apply_as("", kind)
    }

    pub fn ok(&mut self, kind: Kind) -> CommandResponse {
        self.apply(kind).unwrap()
    }

    /// The refusal's code; the state must not have changed.
    pub fn refused(&mut self, kind: Kind) -> Code {
        let before = self.state.encode();
        let fault = self.apply(kind).unwrap_err();
        assert_eq!(self.state.encode(), before, "a refusal changed the state");
        fault.code
    }

    /// Places the VM on the host and reports it running.
    pub fn run(&mut self, vm: &str, host: &str) {
        let epoch = self.epoch(vm);
        self.ok(place(vm, host, epoch));
        self.ok(report(host, vm, epoch + 1, VmState::Running));
    }

    /// Plans a migration and brings it to PRE_COPY; its id.
    pub fn copying(&mut self, vm: &str, to: &str) -> String {
        let id = self.ok(plan(vm, to)).migration.unwrap().id;
        self.ok(advance(&id, MigrationPhase::Preparing, ""));
        self.ok(advance(&id, MigrationPhase::PreCopy, "127.0.0.1:9000"));
        id
    }

    pub fn vm(&self, name: &str) -> &Vm {
        self.state.vm(name).unwrap()
    }

    pub fn epoch(&self, vm: &str) -> u64 {
        drover_state::epoch_of(self.vm(vm))
    }

    pub fn phase(&self, id: &str) -> MigrationPhase {
        self.state.migration(id).unwrap().phase()
    }

    /// "vm@epoch" of every grant on the host.
    pub fn granted(&self, host: &str) -> Vec<String> {
        drover_state::grants(&self.state, host)
            .iter()
            .map(|vm| format!("{}@{}", vm.vm, vm.epoch))
            .collect()
    }
}

pub fn create(name: &str) -> Kind {
    Kind::CreateVm(CreateVm {
        spec: Some(vm_spec(name)),
        start: true,
    })
}

pub fn start(name: &str) -> Kind {
    Kind::StartVm(StartVm { name: name.into() })
}

pub fn stop(name: &str) -> Kind {
    Kind::StopVm(StopVm { name: name.into() })
}

pub fn delete(name: &str) -> Kind {
    Kind::DeleteVm(DeleteVm { name: name.into() })
}

/// vm with these disks: names, `:ro` behind those that it only reads.
pub fn create_with_disks(vm: &str, disks: &[&str]) -> Kind {
    let disk = |text: &&str| VmDisk {
        volume: text.trim_end_matches(":ro").into(),
        read_only: text.ends_with(":ro"),
        ..VmDisk::default()
    };
    Kind::CreateVm(CreateVm {
        spec: Some(VmSpec {
            disks: disks.iter().map(disk).collect(),
            ..vm_spec(vm)
        }),
        start: true,
    })
}

pub fn create_volume(name: &str, pool: &str, size_bytes: u64) -> Kind {
    Kind::CreateVolume(CreateVolume {
        volume: Some(Volume {
            name: name.into(),
            pool: pool.into(),
            size_bytes,
            ..Volume::default()
        }),
    })
}

pub fn delete_volume(name: &str) -> Kind {
    Kind::DeleteVolume(DeleteVolume {
        name: name.into(),
        remove_content: true,
    })
}

/// A host has removed the content of this number.
pub fn content_removed(volume: &str, content: u64) -> Kind {
    Kind::ReportSnapshot(ReportSnapshotRequest {
        host: "host1".into(),
        news: SnapshotNews::Removed.into(),
        removal: Some(Removal {
            pool: "default".into(),
            volume: volume.into(),
            content,
            ..Removal::default()
        }),
        ..ReportSnapshotRequest::default()
    })
}

/// vm with these NICs: `network[,mac=…][,ip=…]`.
pub fn create_with_nics(vm: &str, nics: &[&str]) -> Kind {
    let nic = |text: &&str| {
        let mut parts = text.split(',');
        let mut nic = VmNic {
            network: parts.next().unwrap().into(),
            ..VmNic::default()
        };
        for part in parts {
            match part.split_once('=').unwrap() {
                ("mac", mac) => nic.mac = mac.into(),
                (_, ip) => nic.ip = ip.into(),
            }
        }
        nic
    };
    Kind::CreateVm(CreateVm {
        spec: Some(VmSpec {
            nics: nics.iter().map(nic).collect(),
            ..vm_spec(vm)
        }),
        start: true,
    })
}

/// A network with a subnet, or without one when that is empty; of kind vxlan unless `vni` is 0.
pub fn create_network(name: &str, vni: u32, subnet: &str) -> Kind {
    let mut network = Network {
        name: name.into(),
        vni,
        subnet: subnet.into(),
        ..Network::default()
    };
    if vni != 0 {
        network.set_kind(NetworkKind::Vxlan);
    }
    Kind::CreateNetwork(CreateNetwork {
        network: Some(network),
    })
}

pub fn delete_network(name: &str) -> Kind {
    Kind::DeleteNetwork(DeleteNetwork { name: name.into() })
}

pub fn take(vm: &str, name: &str) -> Kind {
    Kind::CreateSnapshot(CreateSnapshot {
        vm: vm.into(),
        name: name.into(),
    })
}

pub fn drop_snapshot(vm: &str, name: &str) -> Kind {
    Kind::DeleteSnapshot(DeleteSnapshot {
        vm: vm.into(),
        name: name.into(),
    })
}

/// In place, or as the new VM `clone`.
pub fn restore(vm: &str, snapshot: &str, clone: &str) -> Kind {
    Kind::RestoreVm(RestoreVm {
        vm: vm.into(),
        snapshot: snapshot.into(),
        clone: clone.into(),
        new_addresses: false,
    })
}

/// As the new VM `clone`, with addresses of its own.
pub fn clone_anew(vm: &str, snapshot: &str, clone: &str) -> Kind {
    Kind::RestoreVm(RestoreVm {
        vm: vm.into(),
        snapshot: snapshot.into(),
        clone: clone.into(),
        new_addresses: true,
    })
}

pub fn begin(host: &str, vm: &str, epoch: u64, restore: u64) -> Kind {
    Kind::BeginRestore(BeginRestoreRequest {
        host: host.into(),
        vm: vm.into(),
        epoch,
        restore,
    })
}

pub fn news(host: &str, snapshot: &str, epoch: u64, news: SnapshotNews) -> Kind {
    Kind::ReportSnapshot(ReportSnapshotRequest {
        host: host.into(),
        snapshot: snapshot.into(),
        epoch,
        news: news.into(),
        progress: Some(SnapshotProgress {
            bytes_done: 100,
            bytes_total: 100,
        }),
        bytes_stored: 60,
        paused_us: 700,
        ..ReportSnapshotRequest::default()
    })
}

pub fn place(vm: &str, host: &str, expected_epoch: u64) -> Kind {
    Kind::PlaceVm(PlaceVm {
        vm: vm.into(),
        host: host.into(),
        expected_epoch,
    })
}

pub fn pending(vm: &str, message: &str) -> Kind {
    let reason = Reason {
        code: Code::NoHostFits.as_str().into(),
        message: message.into(),
    };
    Kind::VmPending(VmPending {
        vm: vm.into(),
        reason: Some(reason),
    })
}

pub fn report(host: &str, vm: &str, epoch: u64, state: VmState) -> Kind {
    let reason = (state == VmState::Failed).then(|| Reason {
        code: Code::KernelInvalid.as_str().into(),
        message: "not a kernel".into(),
    });
    Kind::ReportVm(ReportVmRequest {
        host: host.into(),
        vm: vm.into(),
        epoch,
        state: state.into(),
        reason,
        vmm: Some(vmm_build()),
        devices: None,
    })
}

pub fn plan(vm: &str, to: &str) -> Kind {
    Kind::PlanMigration(PlanMigration {
        vm: vm.into(),
        to: to.into(),
        options: None,
        ..PlanMigration::default()
    })
}

pub fn upgrade(vm: &str, host: &str) -> Kind {
    Kind::PlanMigration(PlanMigration {
        vm: vm.into(),
        to: host.into(),
        upgrade: true,
        ..PlanMigration::default()
    })
}

pub fn advance(id: &str, phase: MigrationPhase, target_addr: &str) -> Kind {
    Kind::AdvanceMigration(AdvanceMigration {
        id: id.into(),
        phase: phase.into(),
        target_addr: target_addr.into(),
    })
}

pub fn commit(id: &str, host: &str, vm: &str, epoch: u64) -> Kind {
    Kind::CommitHandover(CommitHandoverRequest {
        host: host.into(),
        migration: id.into(),
        vm: vm.into(),
        epoch,
        post_copy: false,
        vmm: Some(vmm_build()),
    })
}

pub fn abort(id: &str, host: &str, code: Code) -> Kind {
    let reason = Reason {
        code: code.as_str().into(),
        message: "for the test".into(),
    };
    Kind::AbortMigration(AbortMigrationRequest {
        host: host.into(),
        migration: id.into(),
        reason: Some(reason),
        phase: MigrationPhase::Ready.into(),
    })
}

pub fn finish(id: &str, total_ms: u64) -> Kind {
    Kind::FinishMigration(FinishMigration {
        id: id.into(),
        receipt: Some(Receipt {
            total_ms,
            ..Receipt::default()
        }),
    })
}

pub fn host_down(host: &str) -> Kind {
    Kind::HostDown(HostDown { host: host.into() })
}

pub fn host_up(host: &str, boot_id: &str) -> Kind {
    Kind::HostUp(HostUp {
        host: host.into(),
        boot_id: boot_id.into(),
    })
}
