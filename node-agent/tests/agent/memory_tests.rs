//! How much of its memory a guest is to have, on its way from the desired state to its VMM, and what it has on its way back.

use drover_proto::v1::*;

use crate::fake_fleet::Call;
use crate::world::{World, run};

/// vm1 with a balloon, of whose 64 MiB the guest is to have so many.
fn with_balloon(target_mib: u64, revision: u64) -> HostDesired {
    let mut desired = run(1, None);
    let spec = desired.vms[0].spec.as_mut().unwrap();
    spec.set_balloon(Balloon::On);
    (spec.memory_target_mib, spec.memory_revision) = (target_mib, revision);
    desired
}

/// Waits for the report that the guest of revision `revision` has so much.
async fn until_reported(world: &World, revision: u64, actual_mib: u64) {
    let has = |call: &Call| match call {
        Call::Vm(report) => report
            .devices
            .as_ref()?
            .memory
            .filter(|memory| (memory.revision, memory.actual_mib) == (revision, actual_mib)),
        _ => None,
    };
    world
        .fleet
        .until(&format!("{actual_mib} MiB of revision {revision}"), has)
        .await;
}

pub async fn what_the_guest_is_to_have_is_configured_and_told_and_what_it_has_is_reported() {
    let world = World::new().await;
    let agent = world.agent().await;
    world.fleet.say(|script| {
        script.desired = with_balloon(48, 1);
        script.grants = vec![("vm1".into(), 1)];
    });
    // By its configuration, so nothing is told.
    until_reported(&world, 1, 64).await;
    world.fleet.say(|script| script.desired = with_balloon(32, 2));
    until_reported(&world, 2, 32).await;
    drop(agent);
    let _next = world.agent().await;
    world.fleet.say(|script| script.desired = with_balloon(0, 3));
    until_reported(&world, 3, 64).await;
    let asked = world.requests("e1-start").await;
    let mut asked: Vec<&str> = asked.lines().filter(|line| line.starts_with("memory")).collect();
    // Until the VMM's info has come it may be told again, which changes nothing.
    asked.dedup();
    assert_eq!(asked, ["memory 32 2", "memory 64 3"]);
}
