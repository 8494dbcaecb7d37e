//! A dry run of a real guest: it tells what the guest writes, and leaves nothing behind, whether or not a migration comes in between.

#![allow(clippy::unwrap_used, reason = "a test may, its helpers too")]

mod common;

use std::sync::Arc;

use common::{
    World, assert_intact, await_console, await_info, await_state, grant, has_seconds, seconds, text,
};
use drover_proto::Code;
use drover_proto::v1::{ForecastRequest, MigrationOptions, StartOutgoingRequest, VmmState};
use drover_vmm::forecast;
use drover_vmm::machine::Machine;

/// A guest that rewrites 64 MiB as fast as it can.
fn flat_out(config: &mut serde_json::Value) {
    config["memory_mib"] = 160.into();
    config["cmdline"] = "own=64M".into();
}

fn request(mib_s: u64) -> ForecastRequest {
    ForecastRequest {
        bandwidth_bytes_per_s: mib_s << 20,
        options: Some(MigrationOptions {
            max_downtime_ms: 100,
            ..MigrationOptions::default()
        }),
        ..ForecastRequest::default()
    }
}

fn target(world: &World, shape: fn(&mut serde_json::Value)) -> Arc<Machine> {
    world.machine("host2", 2, |config| {
        shape(config);
        config["incoming"] =
            serde_json::json!({"migration": "m1", "from_host": "host1", "listen_ip": "127.0.0.1"});
    })
}

fn send(source: &Arc<Machine>, target: &Machine) {
    let listening = await_info(target, "listen_addr", |info| !info.listen_addr.is_empty());
    let request = StartOutgoingRequest {
        migration: "m1".into(),
        target_addr: listening.listen_addr,
        target_host: "host2".into(),
        target_epoch: 2,
        // The test is about what is sent, not about how soon.
        options: Some(MigrationOptions {
            max_downtime_ms: 5_000,
            ..MigrationOptions::default()
        }),
    };
    source.start_outgoing(request).unwrap();
}

fn arrives_intact(target: &Machine) {
    await_state(target, VmmState::Ready);
    let before = seconds(&text(target.console()), "t").len();
    grant(target);
    assert_intact(&await_console(
        target.console(),
        "lines after the move",
        has_seconds(before + 3),
    ));
}

#[test]
fn a_dry_run_tells_what_the_guest_writes_and_a_move_right_after_it_loses_nothing() {
    needs_kvm!();
    let world = World::new();
    let source = world.machine("host1", 1, flat_out);
    assert_eq!(
        forecast::make(&source, &request(100)).unwrap_err().code,
        Code::VmState,
        "it does not run yet"
    );
    grant(&source);
    await_console(source.console(), "second line", has_seconds(2));
    let seq = source.info().seq;

    let slow = forecast::make(&source, &request(20)).unwrap();
    println!("{slow:?}");
    const MIB: u64 = 1 << 20;
    assert_eq!(slow.memory_bytes, 160 * MIB);
    assert!(
        slow.populated_bytes > 64 * MIB && slow.populated_bytes < 100 * MIB,
        "{} MiB",
        slow.populated_bytes / MIB
    );
    assert!(slow.dirty_bytes_per_s > 20 * MIB, "it writes as fast as it can");
    assert!(slow.working_set_bytes > 10 * MIB && slow.working_set_bytes < 68 * MIB);
    assert!(!slow.converges && slow.max_downtime_ms_needed > 100, "{slow:?}");
    assert!(slow.bandwidth_bytes_per_s_needed > 20 * MIB);
    assert!((1..=99).contains(&slow.throttle_percent_needed));
    let fast = forecast::make(&source, &request(100_000)).unwrap();
    assert!(fast.converges && fast.blackout_us <= 100_000, "{fast:?}");

    let info = source.info();
    assert_eq!((info.state(), info.migration), (VmmState::Running, None));
    assert_eq!(info.seq, seq, "nobody who watches the VM hears of a dry run");
    let target = target(&world, flat_out);
    send(&source, &target);
    arrives_intact(&target);
    let refused = forecast::make(&source, &request(100)).unwrap_err();
    assert_eq!(refused.code, Code::MigrationActive);
}

#[test]
fn a_migration_that_begins_while_the_guest_is_watched_takes_the_log_and_loses_nothing() {
    needs_kvm!();
    let world = World::new();
    let source = world.machine("host1", 1, |_| {});
    grant(&source);
    await_console(source.console(), "second line", has_seconds(2));
    let target = target(&world, |_| {});
    let dry_runs = std::thread::scope(|scope| {
        let watching = scope.spawn(|| {
            // Dry runs, one after another, until a migration is in their way.
            let mut done = 0;
            loop {
                match forecast::make(&source, &request(100)) {
                    Ok(_) => done += 1,
                    Err(fault) if fault.code == Code::MigrationActive => return done,
                    Err(fault) => panic!("{fault}"),
                }
            }
        });
        send(&source, &target);
        arrives_intact(&target);
        watching.join().unwrap()
    });
    println!("{dry_runs} dry runs before the migration");
}
