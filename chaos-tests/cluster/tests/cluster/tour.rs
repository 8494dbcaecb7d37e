//! Moving a VM that writes, all the way round.

use drover_chaos_cluster::cluster::host_name;
use drover_proto::v1::VmSpec;

use super::*;

fn tour(cluster: &Cluster, console: &mut Console, stops: &[usize]) {
    let (mut at, mut epoch) = cluster.await_runs_exactly_once(VM);
    for &stop in stops {
        let planned = cluster
            .client
            .migrate(VM, &host_name(stop))
            .expect("the migration is planned");
        assert_eq!(
            (planned.from.as_str(), planned.to.as_str()),
            (&*host_name(at), &*host_name(stop))
        );
        let ended = cluster.client.await_end(&planned.id);
        assert_done(&ended);
        assert_receipt(&ended);
        let (now, now_epoch) = cluster.await_runs_exactly_once(VM);
        assert_eq!(
            (now, now_epoch),
            (stop, epoch + 1),
            "where the VM runs, and its epoch"
        );
        console.ping(&cluster.client, &format!("leg-{epoch}"));
        console.await_more(&cluster.client, 2);
        (at, epoch) = (now, now_epoch);
    }
    assert_eq!(Some(&at), stops.last());
}

fn assert_receipt(migration: &Migration) {
    let receipt = migration
        .receipt
        .as_ref()
        .expect("a migration that is done leaves a receipt");
    let blackout = receipt
        .blackout_us
        .as_ref()
        .expect("a receipt splits the blackout");
    let parts = blackout.pause + blackout.last_pages + blackout.state + blackout.commit + blackout.resume;
    let encoded = receipt
        .encoding
        .as_ref()
        .expect("a receipt says what was made of the pages");
    assert!(
        receipt.rounds >= 1
            && receipt.pages > 0
            && encoded.sent_bytes > 0
            && receipt.bytes > encoded.sent_bytes,
        "{receipt:?}"
    );
    assert!(
        blackout.total > 0 && parts <= blackout.total + 1000,
        "the parts exceed the whole: {blackout:?}"
    );
    assert!(blackout.total / 1000 <= receipt.total_ms, "{receipt:?}");
}

#[test]
fn a_vm_tours_three_hosts_while_it_writes() {
    let Some(cluster) = cluster() else { return };
    let mut console = boot(&cluster, 1, FLAT_OUT);
    let (first, _) = cluster.await_runs_exactly_once(VM);
    tour(&cluster, &mut console, &[next(first), next(next(first)), first]);
    assert_sound_at_the_end(&cluster, &mut console);
}

#[test]
fn a_guest_is_spoken_with_by_its_virtio_console_wherever_it_is() {
    let Some(cluster) = cluster() else { return };
    let spec = VmSpec {
        virtio_console: true,
        ..probe_spec(VM, "", 64, 1, &format!("{STEADY} console=virtio"))
    };
    cluster.client.create_vm(&spec, true).expect("the VM is created");
    cluster.client.await_running(VM);
    let mut console = Console::new(VM);
    let (first, _) = cluster.await_runs_exactly_once(VM);
    let heard = |console: &mut Console| console.await_more(&cluster.client, 1).console;
    assert!(heard(&mut console).is_some(), "the guest has no virtio console");
    tour(&cluster, &mut console, &[next(first), first]);
    let upgraded = cluster.client.upgrade(VM).expect("the VM runs");
    assert_done(&cluster.client.await_end(&upgraded.id));
    console.ping(&cluster.client, "upgraded");
    // Three words, each on a line with "ping ".
    let typed = heard(&mut console).map(|console| (console.typed, console.unsaid));
    assert_eq!(typed, Some((2 * 11 + 14, 0)), "{:?}", console.lines);
    assert_sound_at_the_end(&cluster, &mut console);
}

#[test]
fn a_guest_with_two_vcpus_moves_under_load() {
    let Some(cluster) = cluster() else { return };
    let mut console = boot(&cluster, 2, FLAT_OUT);
    let up = console
        .lines
        .iter()
        .find(|line| line.contains("probe up"))
        .expect("the guest says that it is up");
    assert!(up.contains("cpus=2"), "{up}");
    let (first, _) = cluster.await_runs_exactly_once(VM);
    tour(&cluster, &mut console, &[next(first), first]);
    assert_sound_at_the_end(&cluster, &mut console);
}
