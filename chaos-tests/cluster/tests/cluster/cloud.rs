//! A VM's seed disk is the same wherever the VM moves, its own at each start, and its secrets are in no log and no answer.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use drover_proto::v1::{CloudInit, Network, NetworkKind, RestartPolicy, VmNic, VmSpec, VmState};

use super::*;

const SECRET: &str = "hunter2-and-then-some";
const SEED: &str = "seed.img";

/// The only VMM's seed disk: its file as it is, which the VMM has read-only in the last slot.
fn seed(cluster: &Cluster) -> Vec<u8> {
    cluster.await_runs_exactly_once(VM);
    let vmm = cluster.vmms(VM).remove(0);
    let path = vmm.dir.join(SEED);
    let mode = path.metadata().expect("it is there").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let devices = vmm.info.devices.expect("this version says so").devices;
    let disks: Vec<(u32, bool)> = devices
        .iter()
        .filter(|device| device.kind == "disk")
        .map(|device| (device.slot, device.read_only))
        .collect();
    assert_eq!(disks, [(30, true)], "{devices:?}");
    std::fs::read(path).expect("it can be read")
}

fn has(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|at| at == text.as_bytes())
}

/// The logs of all daemons and VMMs.
fn logs(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("the cluster's folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            logs(&path, found);
        } else if path
            .file_name()
            .is_some_and(|name| name == "log" || name == "vmm.log")
        {
            found.push(path);
        }
    }
}

#[test]
fn a_seed_disk_moves_with_its_vm_byte_for_byte_and_no_log_has_its_secrets() {
    let Some(mut cluster) = cluster() else { return };
    let network = Network {
        name: "wide".to_owned(),
        kind: NetworkKind::Vxlan.into(),
        vni: 78,
        subnet: "10.78.0.0/24".to_owned(),
        ..Network::default()
    };
    cluster
        .client
        .create_network(&network)
        .expect("a network is created");
    let nic = VmNic {
        network: "wide".to_owned(),
        ..VmNic::default()
    };
    let spec = VmSpec {
        nics: vec![nic],
        restart: RestartPolicy::OnFailure.into(),
        cloud_init: Some(CloudInit {
            user_data: format!("#cloud-config\npassword: {SECRET}\n").into_bytes(),
            ..CloudInit::default()
        }),
        ..probe_spec(VM, "", 64, 1, STEADY)
    };
    let made = cluster.client.create_vm(&spec, true).expect("the VM is created");
    let shown = made.spec.and_then(|spec| spec.cloud_init).expect("it has it");
    assert!(
        shown.user_data.is_empty() && shown.user_data_bytes > 0,
        "{shown:?}"
    );
    cluster.client.await_running(VM);
    let first = seed(&cluster);
    for text in [SECRET, "local-hostname: \"vm1\"", "10.78.0.2/24"] {
        assert!(has(&first, text), "{text}");
    }
    // What comes while it runs is in the next run's.
    cluster.client.attach_nic(VM, "wide").expect("the VM runs");
    cluster.client.await_vm(VM, "seen with both", |vm| {
        vm.devices
            .as_ref()
            .is_some_and(|devices| devices.devices.len() == 2)
    });
    let (source, epoch) = cluster.await_runs_exactly_once(VM);
    let moved = cluster
        .client
        .migrate(VM, &host_name(1 - source))
        .expect("both hosts offer the network");
    assert_done(&cluster.client.await_end(&moved.id));
    assert_eq!(cluster.await_runs_exactly_once(VM), (1 - source, epoch + 1));
    assert!(seed(&cluster) == first, "the target's agent wrote other bytes");
    let upgraded = cluster.client.upgrade(VM).expect("an upgrade is planned");
    assert_done(&cluster.client.await_end(&upgraded.id));
    assert!(seed(&cluster) == first, "the same host's agent wrote other bytes");

    let (host, epoch) = cluster.await_runs_exactly_once(VM);
    assert_eq!(cluster.kill_vmms_for(host, VM, epoch), 1);
    cluster.client.await_vm(VM, "running again", |vm| {
        vm.state() == VmState::Running && vm.placement.as_ref().is_some_and(|at| at.epoch == epoch + 1)
    });
    assert!(has(&seed(&cluster), "10.78.0.3/24"));

    let vm = cluster.client.vm(VM).expect("the VM is known");
    assert!(!has(format!("{vm:?}").as_bytes(), SECRET));
    let root = cluster.vm_dir(0, VM);
    let (root, mut all) = (root.ancestors().nth(4).expect("the cluster's folder"), Vec::new());
    logs(root, &mut all);
    assert!(all.len() >= 2 * PARTIES, "{all:?}");
    for log in all {
        assert!(
            !has(&std::fs::read(&log).expect("a log"), SECRET),
            "{}",
            log.display()
        );
    }
    assert_sound_at_the_end(&cluster, &mut Console::new(VM));
}
