//! Random logs keep the invariants: at most one runner, epochs that only rise by one, room respected, phases forward,
//! refusals without trace, replicas equal with and without a snapshot between.

#![allow(clippy::unwrap_used, reason = "a panic is the test's failure")]

mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::*;
use drover_proto::Code;
use drover_proto::v1::command::Kind;
use drover_proto::v1::{
    AttachDisk, AttachNic, Command, DeleteVolume, DetachDisk, DetachNic, Image, MigrationPhase,
    ReportSnapshotRequest, ReportVmRequest, ReportVolumeRequest, RestartPolicy, Snapshot, SnapshotNews,
    SnapshotPhase, VmDevice, VmDeviceState, VmDevices, VmDisk, VmNic, VmState, VolumeNews,
};
use drover_state::{State, apply, desired, epoch_of, grants, host_of, into_result, is_committed};
use proptest::prelude::*;

const HOSTS: [&str; 3] = ["host1", "host2", "host3"];
const VOLUMES: [&str; 3] = ["vol1", "vol2", "vol3"];
/// "lan" has four addresses to give, "net" none.
const NETWORKS: [(&str, u32, &str); 3] = [
    ("lan", 0, "10.1.0.0/29"),
    ("net", 5, ""),
    ("wide", 6, "10.2.0.0/16"),
];
/// How far back a step's snapshot may lie.
const SNAPSHOTS: usize = 4;
const VMS: [&str; 4] = ["vm1", "vm2", "vm3", "vm4"];

/// One step, its numbers still relative: epochs to the VM's, migrations to the newest.
#[derive(Clone, Debug)]
enum Step {
    Create(usize, u64, Vec<(usize, bool)>, Vec<(usize, u8)>),
    CreateNetwork(usize),
    DeleteNetwork(usize),
    /// Of an image where that is said.
    CreateVolume(usize, u64, bool),
    DeleteVolume(usize, bool),
    /// By a host, of this content or another, filled or not.
    Filled(usize, usize, bool, bool),
    Start(usize),
    Stop(usize),
    Delete(usize),
    Place(usize, usize, i64),
    Pending(usize),
    Report(usize, Option<usize>, i64, VmState),
    Plan(usize, Option<usize>),
    Upgrade(usize, Option<usize>),
    Advance(u64, MigrationPhase),
    Commit(u64, i64),
    Abort(u64, bool),
    Finish(u64),
    AttachDisk(usize, usize),
    AttachNic(usize, usize),
    DetachDisk(usize, prop::sample::Index),
    DetachNic(usize, prop::sample::Index),
    /// What its VMM has: slots, by a bit each; how far behind it was told; whether it tells of NICs.
    Has(usize, u32, u64, bool),
    Down(usize),
    Up(usize, bool),
    Take(usize),
    Told(usize, i64, bool),
    Drop(usize),
    Restore(usize, Option<usize>, bool),
    Begin(usize, i64),
    Removed(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let vm = 0..VMS.len();
    let host = 0..HOSTS.len();
    let skew = prop_oneof![6 => Just(0_i64), 1 => Just(-1), 1 => Just(1), 1 => Just(2)];
    let reported = prop_oneof![
        4 => Just(VmState::Running),
        1 => Just(VmState::Paused),
        1 => Just(VmState::Failed),
        2 => Just(VmState::Stopped),
    ];
    let phase = prop_oneof![
        3 => Just(MigrationPhase::Preparing),
        3 => Just(MigrationPhase::PreCopy),
        1 => Just(MigrationPhase::Committed),
    ];
    let back = prop_oneof![5 => Just(0_u64), 1 => 1..4_u64];
    prop_oneof![
        3 => (
            vm.clone(),
            100..700_u64,
            prop::collection::vec((0..VOLUMES.len(), any::<bool>()), 0..3),
            prop::collection::vec((0..NETWORKS.len(), 0..20_u8), 0..4),
        )
            .prop_map(|(v, m, d, n)| Step::Create(v, m, d, n)),
        3 => (0..NETWORKS.len()).prop_map(Step::CreateNetwork),
        1 => (0..NETWORKS.len()).prop_map(Step::DeleteNetwork),
        3 => (0..VOLUMES.len(), 0..4_u64, prop::bool::weighted(0.4))
            .prop_map(|(v, size, image)| Step::CreateVolume(v, size, image)),
        1 => (0..VOLUMES.len(), any::<bool>()).prop_map(|(v, removes)| Step::DeleteVolume(v, removes)),
        3 => (host.clone(), 0..VOLUMES.len(), prop::bool::weighted(0.8), prop::bool::weighted(0.8))
            .prop_map(|(h, v, this, filled)| Step::Filled(h, v, this, filled)),
        1 => vm.clone().prop_map(Step::Start),
        1 => vm.clone().prop_map(Step::Stop),
        1 => vm.clone().prop_map(Step::Delete),
        5 => (vm.clone(), host.clone(), skew.clone()).prop_map(|(v, h, s)| Step::Place(v, h, s)),
        1 => vm.clone().prop_map(Step::Pending),
        6 => (vm.clone(), prop::option::weighted(0.2, host.clone()), skew.clone(), reported)
            .prop_map(|(v, h, s, r)| Step::Report(v, h, s, r)),
        4 => (vm.clone(), prop::option::of(host.clone())).prop_map(|(v, h)| Step::Plan(v, h)),
        4 => (vm.clone(), prop::option::weighted(0.1, host.clone())).prop_map(|(v, h)| Step::Upgrade(v, h)),
        3 => (vm.clone(), 0..VOLUMES.len()).prop_map(|(v, d)| Step::AttachDisk(v, d)),
        4 => (vm.clone(), 0..NETWORKS.len()).prop_map(|(v, n)| Step::AttachNic(v, n)),
        3 => (vm.clone(), any::<prop::sample::Index>()).prop_map(|(v, i)| Step::DetachDisk(v, i)),
        4 => (vm.clone(), any::<prop::sample::Index>()).prop_map(|(v, i)| Step::DetachNic(v, i)),
        6 => (vm, any::<u32>(), prop_oneof![3 => Just(0_u64), 1 => 1..3_u64], prop::bool::weighted(0.8))
            .prop_map(|(v, s, b, t)| Step::Has(v, s, b, t)),
        6 => (back.clone(), phase).prop_map(|(b, p)| Step::Advance(b, p)),
        4 => (back.clone(), skew).prop_map(|(b, s)| Step::Commit(b, s)),
        1 => (back.clone(), any::<bool>()).prop_map(|(b, c)| Step::Abort(b, c)),
        2 => back.prop_map(Step::Finish),
        4 => (0..VMS.len()).prop_map(Step::Take),
        3 => (0..SNAPSHOTS, prop_oneof![8 => Just(0_i64), 1 => Just(-1), 1 => Just(1)], prop::bool::weighted(0.8))
            .prop_map(|(s, e, done)| Step::Told(s, e, done)),
        1 => (0..SNAPSHOTS).prop_map(Step::Drop),
        4 => (0..SNAPSHOTS, prop::option::weighted(0.4, 0..VMS.len()), any::<bool>())
            .prop_map(|(s, v, anew)| Step::Restore(s, v, anew)),
        5 => (0..VMS.len(), prop_oneof![8 => Just(0_i64), 1 => Just(-1), 1 => Just(1)]).prop_map(|(v, e)| Step::Begin(v, e)),
        2 => host.clone().prop_map(Step::Removed),
        1 => host.clone().prop_map(Step::Down),
        2 => (host, prop::bool::weighted(0.1)).prop_map(|(h, r)| Step::Up(h, r)),
    ]
}

fn skewed(value: u64, skew: i64) -> u64 {
    value.saturating_add_signed(skew)
}

/// The newest snapshot but `back`.
fn recent(state: &State, back: usize) -> Snapshot {
    let all: Vec<&Snapshot> = state.snapshots().collect();
    all.iter()
        .rev()
        .nth(back)
        .map(|snapshot| (*snapshot).clone())
        .unwrap_or_default()
}

fn spec(state: &State, vm: usize) -> drover_proto::v1::VmSpec {
    state
        .vm(VMS[vm])
        .and_then(|vm| vm.spec.clone())
        .unwrap_or_default()
}

/// The command that a step means in this state.
fn resolve(state: &State, step: &Step) -> Kind {
    let epoch = |vm: usize| state.vm(VMS[vm]).map_or(0, epoch_of);
    let newest = |back: u64| {
        let migration = state.migrations().rev().nth(usize::try_from(back).unwrap());
        migration.cloned().unwrap_or_default()
    };
    match *step {
        Step::Create(vm, memory_mib, ref disks, ref nics) => {
            let named = |(volume, reads): &(usize, bool)| {
                format!("{}{}", VOLUMES[*volume], if *reads { ":ro" } else { "" })
            };
            let disks: Vec<String> = disks.iter().map(named).collect();
            let disks: Vec<&str> = disks.iter().map(String::as_str).collect();
            let Kind::CreateVm(mut request) = create_with_disks(VMS[vm], &disks) else {
                unreachable!()
            };
            let spec = request.spec.as_mut().unwrap();
            spec.memory_mib = memory_mib;
            // Some ask for addresses that another has, or that the allocation comes to.
            let asked = |&(network, with): &(usize, u8)| {
                let (name, _, subnet) = NETWORKS[network];
                let mut nic = VmNic {
                    network: name.into(),
                    ..VmNic::default()
                };
                match with {
                    0..3 => nic.mac = format!("52:54:00:00:00:0{with}"),
                    3..7 if !subnet.is_empty() => nic.ip = subnet.replace("0/", &format!("{with}/")),
                    _ => {}
                }
                nic.ip = nic.ip.split('/').next().unwrap_or_default().into();
                nic
            };
            spec.nics = nics.iter().map(asked).collect();
            spec.set_restart(RestartPolicy::OnFailure);
            Kind::CreateVm(request)
        }
        Step::CreateVolume(volume, mib, of_image) => {
            let Kind::CreateVolume(mut create) = create_volume(VOLUMES[volume], "", mib << 20) else {
                unreachable!()
            };
            if of_image {
                create.volume.as_mut().unwrap().image = "debian".into();
            }
            Kind::CreateVolume(create)
        }
        Step::DeleteVolume(volume, remove_content) => Kind::DeleteVolume(DeleteVolume {
            name: VOLUMES[volume].into(),
            remove_content,
        }),
        Step::Filled(host, volume, this, filled) => {
            let content = state.volume(VOLUMES[volume]).map_or(0, |volume| volume.content);
            let news = if filled {
                VolumeNews::Filled
            } else {
                VolumeNews::Failed
            };
            Kind::ReportVolume(ReportVolumeRequest {
                host: HOSTS[host].into(),
                volume: VOLUMES[volume].into(),
                content: if this { content } else { content + 1 },
                news: news.into(),
                ..ReportVolumeRequest::default()
            })
        }
        Step::CreateNetwork(network) => {
            let (name, vni, subnet) = NETWORKS[network];
            create_network(name, vni, subnet)
        }
        Step::DeleteNetwork(network) => delete_network(NETWORKS[network].0),
        Step::Start(vm) => start(VMS[vm]),
        Step::Stop(vm) => stop(VMS[vm]),
        Step::Delete(vm) => delete(VMS[vm]),
        Step::Place(vm, host, skew) => place(VMS[vm], HOSTS[host], skewed(epoch(vm), skew)),
        Step::Pending(vm) => pending(VMS[vm], "waits"),
        Step::Report(vm, host, skew, reported) => {
            let at = host.map_or_else(|| state.vm(VMS[vm]).map_or("", host_of), |host| HOSTS[host]);
            report(at, VMS[vm], skewed(epoch(vm), skew), reported)
        }
        Step::Plan(vm, host) => plan(VMS[vm], host.map_or("", |host| HOSTS[host])),
        Step::Upgrade(vm, host) => {
            let at = host.map_or_else(|| state.vm(VMS[vm]).map_or("", host_of), |host| HOSTS[host]);
            upgrade(VMS[vm], at)
        }
        Step::Advance(back, phase) => {
            let migration = newest(back);
            let addr = match (phase, migration.is_upgrade()) {
                (MigrationPhase::PreCopy, true) => "local",
                (MigrationPhase::PreCopy, false) => "127.0.0.1:1",
                _ => "",
            };
            advance(&migration.id, phase, addr)
        }
        Step::Commit(back, skew) => {
            let migration = newest(back);
            commit(
                &migration.id,
                &migration.to,
                &migration.vm,
                skewed(migration.epoch, skew),
            )
        }
        Step::Abort(back, cancel) => abort(
            &newest(back).id,
            "",
            if cancel { Code::Cancelled } else { Code::LinkLost },
        ),
        Step::Finish(back) => finish(&newest(back).id, 1),
        Step::Take(vm) => take(VMS[vm], ""),
        Step::Told(back, skew, done) => {
            let of = recent(state, back);
            let said = if done {
                SnapshotNews::Done
            } else {
                SnapshotNews::Failed
            };
            news(&of.host, &of.id, skewed(of.epoch, skew), said)
        }
        Step::Drop(back) => drop_snapshot(&recent(state, back).vm, &recent(state, back).id),
        Step::Restore(back, clone, anew) => {
            let of = recent(state, back);
            match clone {
                Some(vm) if anew => clone_anew(&of.vm, &of.id, VMS[vm]),
                _ => restore(&of.vm, &of.id, clone.map_or("", |vm| VMS[vm])),
            }
        }
        Step::Begin(vm, skew) => {
            let known = state.vm(VMS[vm]);
            let number = known
                .and_then(|vm| vm.restore.as_ref())
                .map_or(0, |restore| restore.number);
            begin(
                known.map_or("", host_of),
                VMS[vm],
                skewed(epoch(vm), skew),
                number,
            )
        }
        Step::Removed(host) => {
            let due = desired(state, HOSTS[host]).removals;
            Kind::ReportSnapshot(ReportSnapshotRequest {
                host: HOSTS[host].into(),
                news: SnapshotNews::Removed.into(),
                removal: due.into_iter().next(),
                ..ReportSnapshotRequest::default()
            })
        }
        Step::AttachDisk(vm, volume) => Kind::AttachDisk(AttachDisk {
            vm: VMS[vm].into(),
            disk: Some(VmDisk {
                volume: VOLUMES[volume].into(),
                ..VmDisk::default()
            }),
        }),
        Step::AttachNic(vm, network) => Kind::AttachNic(AttachNic {
            vm: VMS[vm].into(),
            nic: Some(VmNic {
                network: NETWORKS[network].0.into(),
                ..VmNic::default()
            }),
        }),
        Step::DetachDisk(vm, which) => {
            let disks = spec(state, vm).disks;
            let disk = (!disks.is_empty()).then(|| disks[which.index(disks.len())].volume.clone());
            Kind::DetachDisk(DetachDisk {
                vm: VMS[vm].into(),
                volume: disk.unwrap_or_default(),
            })
        }
        Step::DetachNic(vm, which) => {
            let nics = spec(state, vm).nics;
            let nic = (!nics.is_empty()).then(|| nics[which.index(nics.len())].mac.clone());
            Kind::DetachNic(DetachNic {
                vm: VMS[vm].into(),
                nic: nic.unwrap_or_default(),
            })
        }
        Step::Has(vm, slots, behind, tells_nics) => {
            let device = |slot| VmDevice {
                slot,
                state: VmDeviceState::Attached.into(),
                ..VmDevice::default()
            };
            let revision = spec(state, vm).devices_revision.saturating_sub(behind);
            Kind::ReportVm(ReportVmRequest {
                host: state.vm(VMS[vm]).map_or("", host_of).into(),
                vm: VMS[vm].into(),
                epoch: epoch(vm),
                state: VmState::Running.into(),
                devices: Some(VmDevices {
                    devices: (1..32)
                        .filter(|slot| slots >> slot & 1 == 1)
                        .map(device)
                        .collect(),
                    revision,
                    tells_nics,
                    ..VmDevices::default()
                }),
                ..ReportVmRequest::default()
            })
        }
        Step::Down(host) => host_down(HOSTS[host]),
        Step::Up(host, reboot) => host_up(HOSTS[host], if reboot { "boot-2" } else { "" }),
    }
}

/// What must hold between a state and the one before it, and what has been granted so far.
#[derive(Default)]
struct Watch {
    granted: BTreeMap<(String, u64), String>,
    highest: BTreeMap<String, u64>,
}

impl Watch {
    fn at_most_one_runner(&mut self, state: &State) {
        let mut now: BTreeMap<String, &str> = BTreeMap::new();
        for host in HOSTS {
            for vm in grants(state, host) {
                assert_eq!(
                    now.insert(vm.vm.clone(), host),
                    None,
                    "{} is granted on two hosts",
                    vm.vm
                );
                let first = self
                    .granted
                    .entry((vm.vm.clone(), vm.epoch))
                    .or_insert_with(|| host.to_owned());
                assert_eq!(
                    first, host,
                    "{} epoch {} is granted on a second host",
                    vm.vm, vm.epoch
                );
                let highest = self.highest.entry(vm.vm.clone()).or_default();
                assert!(
                    vm.epoch >= *highest,
                    "{} is granted at an epoch that was left",
                    vm.vm
                );
                *highest = vm.epoch;
            }
        }
    }
}

fn epoch_monotonic(before: &State, after: &State) {
    for vm in after.vms() {
        let name = &vm.spec.as_ref().unwrap().name;
        let Some(was) = before.vm(name) else { continue };
        let (old, new) = (epoch_of(was), epoch_of(vm));
        assert!(new == old || new == old + 1, "{name}: epoch {old} -> {new}");
        assert!(
            new == old + 1 || host_of(was) == host_of(vm),
            "{name} moved without a new epoch"
        );
    }
}

/// Of the two VMMs of an upgrade, one has the grant: the one whose epoch the placement has.
fn upgrades_stay_on_their_host(before: &State, after: &State) {
    for migration in after.migrations().filter(|migration| migration.is_upgrade()) {
        let Some((was, now)) = before.vm(&migration.vm).zip(after.vm(&migration.vm)) else {
            continue;
        };
        if now.placement.as_ref().unwrap().arrived_by == migration.id {
            assert_eq!(
                (host_of(now), epoch_of(now)),
                (migration.from.as_str(), migration.epoch)
            );
            assert!(
                epoch_of(was) == migration.epoch || host_of(was) == host_of(now),
                "{} moved by an upgrade",
                migration.vm
            );
        }
    }
}

fn capacity_respected(state: &State) {
    for (host, usage) in state.usages() {
        assert!(
            usage.memory_mib <= HOST_MEMORY_MIB,
            "{host} holds {} MiB",
            usage.memory_mib
        );
    }
}

/// Every disk has its volume, every host that may run it has the volume told, and a volume with a writer has no other user.
fn volumes_have_one_writer_or_only_readers(state: &State) {
    let mut users: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
    for disk in state.vms().flat_map(|vm| &vm.spec.as_ref().unwrap().disks) {
        assert!(state.volume(&disk.volume).is_some(), "{} is gone", disk.volume);
        let (writers, all) = users.entry(disk.volume.as_str()).or_default();
        *writers += usize::from(!disk.read_only);
        *all += 1;
    }
    for (volume, (writers, all)) in users {
        assert!(
            writers == 0 || all == 1,
            "{volume}: {writers} writers of {all} users"
        );
    }
    for vm in HOSTS.iter().flat_map(|host| desired(state, host).vms) {
        let told: Vec<&String> = vm.volumes.iter().map(|volume| &volume.name).collect();
        let disks = vm.spec.as_ref().unwrap().disks.iter();
        assert_eq!(told, disks.map(|disk| &disk.volume).collect::<Vec<_>>());
    }
}

/// Every NIC has its network and a MAC and an address of its own, the address neither the subnet's ends nor its gateway; every host
/// that may run it is told the networks, and of a VXLAN network exactly the other hosts that hold a VM in it.
fn nics_have_networks_and_addresses_of_their_own(state: &State) {
    let (mut macs, mut ips) = (BTreeSet::new(), BTreeSet::new());
    let nics: Vec<&VmNic> = state
        .vms()
        .flat_map(|vm| &vm.spec.as_ref().unwrap().nics)
        .collect();
    for nic in nics.iter().filter(|nic| nic.unplugged) {
        state.network(&nic.network).expect("a network in use stays");
        assert!(nic.ip.is_empty() && nic.detach_revision > 0, "{nic:?}");
    }
    for nic in nics.into_iter().filter(|nic| !nic.unplugged) {
        let network = state.network(&nic.network).expect("a network in use stays");
        assert!(macs.insert(&nic.mac), "{} stands twice", nic.mac);
        assert_eq!(nic.ip.is_empty(), network.subnet.is_empty(), "{nic:?}");
        if !nic.ip.is_empty() {
            assert!(ips.insert((&nic.network, &nic.ip)), "{nic:?} stands twice");
            let (first, last) = match nic.network.as_str() {
                "lan" => ("10.1.0.0", "10.1.0.7"),
                _ => ("10.2.0.0", "10.2.255.255"),
            };
            assert!(
                ![first, last, &network.gateway].contains(&nic.ip.as_str()),
                "{nic:?}"
            );
        }
    }
    let mut holds: BTreeMap<String, BTreeSet<&str>> = BTreeMap::new();
    let all: Vec<_> = HOSTS.iter().map(|host| (*host, desired(state, host))).collect();
    for (host, desired) in &all {
        for vm in &desired.vms {
            let nics = &vm.spec.as_ref().unwrap().nics;
            let told: Vec<&String> = vm.networks.iter().map(|network| &network.name).collect();
            assert_eq!(told, nics.iter().map(|nic| &nic.network).collect::<Vec<_>>());
            for nic in nics {
                holds.entry(nic.network.clone()).or_default().insert(host);
            }
        }
    }
    for (host, desired) in &all {
        for peers in &desired.peers {
            let mut wanted = holds[&peers.network].clone();
            assert!(wanted.remove(host), "told of a network that it has no VM of");
            for address in wanted.iter().map(|host| host_spec(host).vxlan) {
                assert!(peers.addresses.contains(&address), "{host} is not told {address}");
            }
            assert!(
                !peers.addresses.contains(&host_spec(host).vxlan),
                "{host} is its own peer"
            );
        }
    }
}

/// One snapshot at a time is taken of a run, of that run and no other, and nothing moves it meanwhile; what a VM waits to begin as stays, and
/// it begins nothing else.
fn snapshots_are_of_a_run_that_nothing_moves(state: &State) {
    for snapshot in state.snapshots() {
        let vm = state.vm(&snapshot.vm);
        let taken = vm.is_some_and(|vm| vm.snapshot == snapshot.id);
        let creating = snapshot.phase() == SnapshotPhase::Creating;
        assert_eq!(
            taken,
            creating,
            "{} is {:?}; its VM says otherwise",
            snapshot.id,
            snapshot.phase()
        );
        if let Some(vm) = vm.filter(|_| creating) {
            assert_eq!(
                (host_of(vm), epoch_of(vm)),
                (snapshot.host.as_str(), snapshot.epoch)
            );
            assert!(
                vm.migration.is_empty(),
                "{} is moved while {} is taken",
                snapshot.vm,
                snapshot.id
            );
        }
    }
    for vm in state.vms().filter(|vm| vm.restore.is_some()) {
        let restore = vm.restore.as_ref().unwrap();
        let source = state
            .snapshot(&restore.snapshot)
            .expect("what is to be restored stays");
        assert_eq!(source.phase(), SnapshotPhase::Ready);
        assert!(vm.migration.is_empty() && vm.snapshot.is_empty());
    }
}

/// Which content a volume has changes only when a restored run begins, to a number that no volume had before but the others of that run; what
/// a run is told to use, nobody is told to remove.
fn contents_change_only_when_a_restored_run_begins(before: &State, after: &State, step: &Step) {
    let mut changed = Vec::new();
    for vm in after.vms() {
        for disk in &vm.spec.as_ref().unwrap().disks {
            let was = before.volume(&disk.volume).map(|volume| volume.content);
            let now = after.volume(&disk.volume).map(|volume| volume.content);
            if was.is_some() && was != now {
                changed.push((was, now));
                assert!(!disk.read_only, "{} was read only", disk.volume);
                assert!(vm.restored == now.unwrap() && vm.restore.is_none());
            }
        }
    }
    assert!(
        changed.is_empty() || matches!(step, Step::Begin(..)),
        "{step:?}: {changed:?}"
    );
    let all: Vec<_> = HOSTS.iter().map(|host| desired(after, host)).collect();
    for used in all
        .iter()
        .flat_map(|desired| &desired.vms)
        .flat_map(|vm| &vm.volumes)
    {
        let mut removals = all.iter().flat_map(|desired| &desired.removals);
        let removed =
            removals.find(|removal| (&removal.volume, removal.content) == (&used.name, used.content));
        assert!(removed.is_none(), "{removed:?} is used");
    }
}

/// No VM has a volume that is filled, one host at most is asked for it, and nobody is told to remove what is put there. A clone that has not begun
/// has every NIC that its guest remembers.
fn nobody_has_what_is_not_whole_yet(state: &State) {
    let all: Vec<_> = HOSTS.iter().map(|host| desired(state, host)).collect();
    for vm in state.vms() {
        for disk in &vm.spec.as_ref().unwrap().disks {
            let volume = state.volume(&disk.volume).expect("a volume in use stays");
            assert!(!volume.filling, "{} is not filled", volume.name);
        }
        if let Some(restore) = vm.restore.as_ref().filter(|restore| restore.clone) {
            let then = state.snapshot(&restore.snapshot).unwrap().spec.as_ref().unwrap();
            let now = &vm.spec.as_ref().unwrap().nics;
            for nic in &then.nics {
                assert!(now.iter().any(|has| has.mac == nic.mac), "{} is gone", nic.mac);
            }
        }
    }
    let mut asked = BTreeSet::new();
    for volume in all.iter().flat_map(|desired| &desired.fills) {
        assert!(asked.insert(&volume.name), "{} is filled by two", volume.name);
        let known = state.volume(&volume.name).unwrap();
        assert!(known.filling && known.content == volume.content && known.reason.is_none());
    }
    for removal in all.iter().flat_map(|desired| &desired.removals) {
        let kept = state.volume(&removal.volume);
        assert!(
            kept.is_none_or(|volume| volume.content != removal.content),
            "{removal:?}"
        );
    }
}

/// With an image that volumes can be made of, on two hosts.
fn cluster() -> State {
    let mut cluster = Cluster::new();
    for host in ["host1", "host2"] {
        let mut spec = host_spec(host);
        spec.images.push(Image {
            name: "debian".into(),
            kind: "qcow2".into(),
            disk_bytes: 1 << 20,
            ..Image::default()
        });
        cluster.ok(Kind::RegisterHost(spec));
    }
    cluster.state
}

/// Slots are all counted or all written down, each once; and while a run goes on, nothing leaves its specification but what was to be
/// given up, by a report that was made after the VMM was told, and does not name it.
fn what_a_run_has_leaves_by_its_vmms_word_only(before: &State, after: &State, kind: &Kind) {
    let pieces = |spec: &drover_proto::v1::VmSpec| {
        let disks = spec
            .disks
            .iter()
            .map(|disk| (disk.volume.clone(), disk.slot, disk.detach_revision));
        let nics = spec
            .nics
            .iter()
            .map(|nic| (nic.mac.clone(), nic.slot, nic.detach_revision));
        disks.chain(nics).collect::<Vec<_>>()
    };
    for vm in after.vms() {
        let now = vm.spec.as_ref().unwrap();
        let slots: Vec<u32> = pieces(now).iter().map(|(_, slot, _)| *slot).collect();
        let distinct: BTreeSet<&u32> = slots.iter().collect();
        assert!(
            slots.iter().all(|slot| *slot == 0) || distinct.len() == slots.len() && !distinct.contains(&0),
            "{slots:?}"
        );
        let Some(was) = before.vm(&now.name) else { continue };
        let goes_on =
            drover_state::occupies(was) && drover_state::occupies(vm) && epoch_of(was) == epoch_of(vm);
        let stays: BTreeSet<String> = pieces(now).into_iter().map(|(name, ..)| name).collect();
        for (name, slot, wish) in pieces(was.spec.as_ref().unwrap()) {
            if !goes_on || stays.contains(&name) {
                continue;
            }
            let Kind::ReportVm(ReportVmRequest {
                devices: Some(told), ..
            }) = kind
            else {
                panic!("{name} was taken by {kind:?}");
            };
            let named = told.devices.iter().any(|device| device.slot == slot);
            assert!(
                wish > 0 && told.revision >= wish && !named,
                "{name} was taken by {told:?}"
            );
            assert!(
                told.tells_nics || !name.contains(':'),
                "{name} was taken by who does not know"
            );
        }
    }
}

fn migrations_go_forward(before: &State, after: &State) {
    for migration in after.migrations() {
        let under_way = after
            .vm(&migration.vm)
            .is_some_and(|vm| vm.migration == migration.id);
        let ended = drover_state::is_ended(migration);
        assert_eq!(
            under_way,
            !ended,
            "{} is {:?}; its VM says otherwise",
            migration.id,
            migration.phase()
        );
        let Some(was) = before.migration(&migration.id) else {
            continue;
        };
        assert!(migration.phase() >= was.phase(), "{} went back", migration.id);
        let reversed = is_committed(was) && migration.phase() == MigrationPhase::Aborted;
        assert!(!reversed, "{} was aborted after its commit", migration.id);
        assert!(
            was.phase() != MigrationPhase::Aborted || !is_committed(migration),
            "commit after abort"
        );
    }
}

/// `after_ms`: since these tests were written, so that contents are numbered as they are.
fn command(after_ms: u64, request_id: String, kind: Kind) -> Command {
    Command {
        now_ms: 1_796_000_000_000 + after_ms,
        request_id,
        caller: "user/test".into(),
        kind: Some(kind),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_log_keeps_the_invariants(steps in prop::collection::vec(step(), 1..120)) {
        let mut state = cluster();
        let mut watch = Watch::default();
        for (at, step) in (0..).zip(&steps) {
            let before = state.clone();
            let kind = resolve(&before, step);
            let (response, _) = apply(&mut state, &command(at, String::new(), kind.clone()));
            if into_result(response).is_err() {
                prop_assert_eq!(&state, &before, "a refusal changed the state");
            }
            watch.at_most_one_runner(&state);
            epoch_monotonic(&before, &state);
            capacity_respected(&state);
            upgrades_stay_on_their_host(&before, &state);
            migrations_go_forward(&before, &state);
            volumes_have_one_writer_or_only_readers(&state);
            nics_have_networks_and_addresses_of_their_own(&state);
            snapshots_are_of_a_run_that_nothing_moves(&state);
            contents_change_only_when_a_restored_run_begins(&before, &state, step);
            what_a_run_has_leaves_by_its_vmms_word_only(&before, &state, &kind);
            nobody_has_what_is_not_whole_yet(&state);
        }
    }

    #[test]
    fn replicas_are_equal_with_and_without_a_snapshot_between(
        steps in prop::collection::vec(step(), 1..80),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut state = cluster();
        let mut restored = state.clone();
        let cut = cut.index(steps.len());
        for (at, step) in steps.iter().enumerate() {
            if at == cut {
                restored = State::decode(&restored.encode()).unwrap();
            }
            let command = command(7, format!("r{at}"), resolve(&state, step));
            let answers = (apply(&mut state, &command), apply(&mut restored, &command));
            prop_assert_eq!(answers.0, answers.1);
        }
        prop_assert_eq!(state.encode(), restored.encode());
    }

    #[test]
    fn a_request_applied_twice_changes_nothing_the_second_time(steps in prop::collection::vec(step(), 1..60)) {
        let mut state = cluster();
        for (at, step) in steps.iter().enumerate() {
            let mut command = command(7, format!("r{at}"), resolve(&state, step));
            let first = apply(&mut state, &command).0;
            let before = state.encode();
            command.now_ms += 1;
            prop_assert_eq!(apply(&mut state, &command), (first, vec![]));
            prop_assert_eq!(state.encode(), before);
        }
    }

    #[test]
    fn no_bytes_panic_the_snapshots_decoder(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        if let Ok(state) = State::decode(&bytes) {
            prop_assert_eq!(State::decode(&state.encode()).unwrap(), state);
        }
    }
}
