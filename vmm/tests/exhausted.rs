//! A target's host that has no memory left, or no room for a log: the migration ends with the reason or goes on, and the guest runs.

#![allow(clippy::unwrap_used, reason = "a test may, its helpers too")]

mod common;
#[path = "common/process.rs"]
mod running;

use std::fs::File;
use std::process::Command;
use std::sync::Arc;

use common::{World, assert_intact, await_console, grant, has_seconds, seconds};
use drover_proto::v1::{GrantRequest, ReadConsoleRequest, StartOutgoingRequest, VmmState};
use drover_vmm::machine::Machine;
use drover_vmm::time::{NS_PER_S, boottime_ns};
use running::{Process, watch};
use tokio::runtime::Runtime;

/// A process on host2 that waits for `migration`, started with `change`, and its address.
fn target(
    world: &World,
    migration: &str,
    change: impl FnOnce(&mut Command) -> &mut Command,
) -> (Process, String) {
    let config = world.write("host2", 2, |config| {
        config["incoming"] =
            serde_json::json!({"migration": migration, "from_host": "host1", "listen_ip": "127.0.0.1"});
    });
    let process = Process::start_with(&config, change);
    let listening = async {
        let mut vmm = process.client().await;
        watch(&mut vmm, "address", |info| !info.listen_addr.is_empty()).await
    };
    let addr = Runtime::new().unwrap().block_on(listening).listen_addr;
    (process, addr)
}

fn send(source: &Arc<Machine>, migration: &str, target_addr: String) {
    let request = StartOutgoingRequest {
        migration: migration.into(),
        target_addr,
        target_host: "host2".into(),
        target_epoch: 2,
        options: None,
    };
    source.start_outgoing(request).unwrap();
}

/// A guest that runs and has written all that it will.
fn running_guest(world: &World) -> Arc<Machine> {
    let source = world.machine("host1", 1, |_| {});
    grant(&source);
    await_console(source.console(), "line of a second", has_seconds(1));
    source
}

/// With memory that a build with pause points makes scarce.
#[cfg(feature = "chaos")]
mod scarce {
    use common::{await_info, text};
    use drover_proto::Code;
    use drover_proto::v1::OutcomeRequest;

    use super::*;

    #[test]
    fn a_target_whose_host_has_no_memory_left_says_so_and_the_guest_runs_on_and_moves_elsewhere() {
        needs_kvm!();
        let world = World::new();
        let source = running_guest(&world);
        // The guest owns 16 MiB, and has written to them.
        let (process, addr) = target(&world, "m1", |command| {
            command.env("DROVER_LIMIT_GUEST_MEMORY_BYTES", (8 << 20).to_string())
        });
        send(&source, "m1", addr);
        let failed = |info: &drover_proto::v1::VmmInfo| info.migration.clone()?.failure;
        let info = await_info(&source, "failure", |info| failed(info).is_some());
        let reason = failed(&info).unwrap();
        assert_eq!(reason.code, Code::MemoryExhausted.as_str(), "{}", reason.message);
        assert!(reason.message.contains("the target says"), "{}", reason.message);
        assert_eq!(source.info().state(), VmmState::Running);
        let theirs = Runtime::new().unwrap().block_on(async {
            let mut vmm = process.client().await;
            watch(&mut vmm, "failure", |info| failed(info).is_some()).await
        });
        assert_eq!(failed(&theirs).unwrap().code, Code::MemoryExhausted.as_str());
        assert_eq!(theirs.state(), VmmState::Failed);
        drop(process);
        let told = OutcomeRequest {
            migration: "m1".into(),
            committed: false,
        };
        source.outcome(&told).unwrap();
        let so_far = seconds(&text(source.console()), "t").len();
        assert_intact(&await_console(
            source.console(),
            "line after the failure",
            has_seconds(so_far + 1),
        ));

        let (_process, addr) = target(&world, "m2", |command| command);
        send(&source, "m2", addr);
        await_info(&source, "Ready of the second target", |info| {
            info.migration.as_ref().is_some_and(|migration| {
                let phase = migration.progress.as_ref().map(|progress| progress.phase());
                phase == Some(drover_proto::v1::MigrationPhase::Ready)
            })
        });
    }

    #[test]
    fn a_vmm_that_touches_memory_that_cannot_be_had_says_why_it_ends() {
        use std::os::unix::process::ExitStatusExt;
        needs_kvm!();
        let world = World::new();
        let config = world.write("host1", 1, |_| {});
        let log = config.with_file_name("log");
        let mut process = Process::start_with(&config, |command| {
            command
                .env("DROVER_LIMIT_GUEST_MEMORY_BYTES", "4096")
                .stderr(File::create(&log).unwrap())
        });
        let ended = process.child.wait().unwrap();
        assert_eq!(ended.signal(), Some(nix::libc::SIGBUS), "{ended}");
        let said = std::fs::read_to_string(&log).unwrap();
        assert!(
            said.contains("ERROR") && said.contains(Code::MemoryExhausted.as_str()),
            "{said}"
        );
    }
}

#[test]
fn a_target_whose_log_has_no_room_takes_the_guest_and_runs_it() {
    needs_kvm!();
    let world = World::new();
    let source = running_guest(&world);
    let full = || File::options().write(true).open("/dev/full").unwrap();
    let (process, addr) = target(&world, "m1", |command| {
        command.env("DROVER_LOG", "debug").stdout(full()).stderr(full())
    });
    send(&source, "m1", addr);
    Runtime::new().unwrap().block_on(async {
        let mut vmm = process.client().await;
        watch(&mut vmm, "Ready", |info| info.state() == VmmState::Ready).await;
        let request = GrantRequest {
            epoch: 2,
            deadline_boottime_ns: boottime_ns() + 600 * NS_PER_S,
        };
        vmm.grant(request).await.unwrap();
        watch(&mut vmm, "running guest", |info| {
            info.state() == VmmState::Running
        })
        .await;
        let mut console = String::new();
        while seconds(&console, "t").len() < 2 {
            let read = ReadConsoleRequest {
                offset: console.len() as u64,
                wait_ms: 30_000,
                ..Default::default()
            };
            let piece = vmm.read_console(read).await.unwrap().into_inner();
            console.push_str(&String::from_utf8_lossy(&piece.data));
        }
        let whole = &console[..console.rfind('\n').unwrap()];
        assert_intact(whole);
    });
    drop(process);
    assert_eq!(source.info().state(), VmmState::HandedOver);
}
