//! What a guest is to have of its memory it is asked for wherever it runs next, and gives up no page that it still uses.

use drover_chaos_cluster::points::BEFORE_PAUSE;
use drover_proto::Code;
use drover_proto::v1::{Balloon, MigrationPhase, RestartPolicy, VmMemory, VmSpec, VmState};

use super::*;

const MEMORY_MIB: u64 = 128;
const PAGES_A_MIB: u64 = 256;
/// All pages that it does not own it has written to, and compares each that goes into its balloon.
const BALLOON: &str = "own=16M hot=4M rate=2000 spare=written balloon=quiet";

fn boot_with_balloon(cluster: &Cluster) -> Console {
    let spec = VmSpec {
        restart: RestartPolicy::OnFailure.into(),
        balloon: Balloon::On.into(),
        ..probe_spec(VM, &host_name(0), MEMORY_MIB, 1, BALLOON)
    };
    cluster.client.create_vm(&spec, true).expect("the VM is created");
    cluster.client.await_running(VM);
    let mut console = Console::new(VM);
    console.await_more(&cluster.client, 1);
    console
}

fn set(cluster: &Cluster, mib: u64) {
    let vm = cluster.client.set_memory(VM, mib).expect("it has a balloon");
    assert_eq!(vm.spec.expect("every VM has one").memory_mib, MEMORY_MIB);
}

/// Waits until cluster and guest say that the guest has so much.
fn await_memory(cluster: &Cluster, console: &mut Console, mib: u64) -> VmMemory {
    let of = |vm: &Vm| vm.devices.as_ref().and_then(|devices| devices.memory);
    let has = |memory: VmMemory| (memory.target_mib, memory.actual_mib) == (mib, mib);
    let vm = cluster
        .client
        .await_vm(VM, &format!("seen with {mib} MiB"), |vm| of(vm).is_some_and(has));
    drover_chaos_cluster::await_some(&format!("a guest with {mib} MiB"), || {
        let balloon = console.await_more(&cluster.client, 1).balloon;
        let balloon = balloon.ok_or("the guest has no balloon")?;
        assert_eq!(
            balloon.lost, 0,
            "a page was not as the guest had left it: {balloon:?}"
        );
        (balloon.pages == (MEMORY_MIB - mib) * PAGES_A_MIB)
            .then_some(())
            .ok_or(format!("{balloon:?}"))
    });
    of(&vm).expect("it was there just now")
}

#[test]
fn what_a_guest_is_to_have_of_its_memory_goes_with_it_through_moves_upgrades_and_restarts() {
    // Held up for longer than a guest takes to give memory up.
    let patient = Settings {
        stall_timeout_ms: 30_000,
        switchover_timeout_ms: 30_000,
        ..Settings::default()
    };
    let Some(mut cluster) = Cluster::or_skip(&patient) else {
        return;
    };
    let mut console = boot_with_balloon(&cluster);
    set(&cluster, 96);
    let memory = await_memory(&cluster, &mut console, 96);
    assert!(memory.driver && memory.revision == 1, "{memory:?}");
    let fault = cluster
        .client
        .set_memory(VM, MEMORY_MIB + 1)
        .expect_err("it has no more");
    assert_eq!(fault.code, Code::InvalidArgument, "{fault}");

    // It gives up pages that were sent already, and some when the source can be told nothing any more.
    cluster.hold(BEFORE_PAUSE);
    cluster.hold("target.before_ready");
    let (source, _) = cluster.await_runs_exactly_once(VM);
    let moved = migrate_on(&cluster, source);
    cluster.await_reached(BEFORE_PAUSE);
    set(&cluster, 80);
    await_memory(&cluster, &mut console, 80);
    cluster.release(BEFORE_PAUSE);
    cluster.await_reached("target.before_ready");
    set(&cluster, 72);
    cluster.release("target.before_ready");
    let ended = cluster.client.await_end(&moved.id);
    assert_done(&ended);
    let receipt = ended.receipt.expect("a migration that is done has one");
    println!(
        "{} pages of content sent of a guest of {MEMORY_MIB} MiB",
        receipt.pages
    );
    await_memory(&cluster, &mut console, 72);

    // What comes back is written to; the next VMM of the same host goes on with it.
    set(&cluster, 112);
    await_memory(&cluster, &mut console, 112);
    let upgraded = cluster.client.upgrade(VM).expect("the VM runs");
    let ended = cluster.client.await_end(&upgraded.id);
    assert_eq!(ended.phase(), MigrationPhase::Done, "{ended:?}");
    set(&cluster, 64);
    await_memory(&cluster, &mut console, 64);

    // Slots are counted from the first on: a disk finds no balloon in its.
    cluster
        .client
        .create_volume("data", 16 << 20)
        .expect("a volume is created");
    cluster.client.attach_disk(VM, "data").expect("the VM runs");
    cluster.client.await_vm(VM, "seen with its disk", |vm| {
        let devices = vm.devices.iter().flat_map(|devices| &devices.devices);
        devices.map(|device| device.slot).eq([1])
    });

    let (host, epoch) = cluster.await_runs_exactly_once(VM);
    assert_eq!(cluster.kill_vmms_for(host, VM, epoch), 1);
    cluster.client.await_vm(VM, "running again", |vm| {
        vm.state() == VmState::Running && vm.placement.as_ref().is_some_and(|at| at.epoch == epoch + 1)
    });
    let mut console = Console::new(VM);
    await_memory(&cluster, &mut console, 64);
    set(&cluster, MEMORY_MIB);
    await_memory(&cluster, &mut console, MEMORY_MIB);
    assert_sound_at_the_end(&cluster, &mut console);
}
