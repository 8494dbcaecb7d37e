//! A cluster whose VMMs are in their sandbox: guests boot, move and have their VMMs replaced there, and get disks.

use std::fs;

use drover_chaos_cluster::process::find;

use super::*;

fn sandbox(cluster: &Cluster, host: usize) -> String {
    let hosts = cluster.client.hosts().expect("hosts are listed");
    let spec = hosts.into_iter().filter_map(|host| host.spec);
    spec.into_iter()
        .find(|spec| spec.name == host_name(host))
        .map_or_else(String::new, |spec| spec.sandbox)
}

#[test]
fn vmms_run_as_nobody_within_limits_wherever_they_come_to() {
    let Some(cluster) = Cluster::with_sandbox_or_skip(&Settings::default(), "required") else {
        return;
    };
    assert_eq!(sandbox(&cluster, 0), "ok");
    let mut console = boot(&cluster, 1, STEADY);
    let (host, _) = cluster.await_runs_exactly_once(VM);
    let look = |host: usize| {
        let vmms = find("drover-vmm", &cluster.vm_dir(host, VM));
        let [vmm] = vmms[..] else { panic!("{vmms:?}") };
        let read = |name: &str| fs::read_to_string(format!("/proc/{vmm}/{name}")).expect("it lives");
        let status = read("status");
        let has = |line: &str| {
            status
                .lines()
                .any(|own| own.split_whitespace().eq(line.split_whitespace()))
        };
        let uid = "1900000000";
        for line in [
            &format!("Uid: {uid} {uid} {uid} {uid}"),
            "CapPrm: 0000000000000000",
            "CapBnd: 0000000000000000",
            "Seccomp: 2",
        ] {
            assert!(has(line), "no {line:?} in {status}");
        }
        let groups = read("cgroup");
        assert!(
            groups.lines().filter(|line| line.contains("/drover/")).count() >= 1,
            "no control group of its own: {groups}"
        );
        groups
    };
    let before = look(host);
    let moving = migrate_on(&cluster, host);
    assert_done(&cluster.client.await_end(&moving.id));
    cluster.await_runs_exactly_once(VM);
    assert_ne!(look(next(host)), before);
    assert_sound_at_the_end(&cluster, &mut console);
}
