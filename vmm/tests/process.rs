//! The program itself: its configuration, its lock, its socket, its end.

#![allow(clippy::unwrap_used, reason = "a test may, its helpers too")]

mod common;
#[path = "common/process.rs"]
mod running;

use std::process::Command;

use common::World;
use drover_proto::v1::{
    DestroyRequest, GrantRequest, ReadConsoleRequest, VmmState, WatchInfoRequest, WriteConsoleRequest,
};
use drover_proto::{Code, Fault};
use drover_vmm::time::{NS_PER_S, boottime_ns};
use running::Process;

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_starts_watches_types_reads_and_destroys() {
    needs_kvm!();
    let world = World::new();
    let mut process = Process::start(&world.write("host1", 1, |_| {}));
    let mut vmm = process.client().await;
    let info = vmm
        .watch_info(WatchInfoRequest::default())
        .await
        .unwrap()
        .into_inner();
    assert_eq!((info.state(), info.pid), (VmmState::Waiting, process.child.id()));

    let mut watcher = vmm.clone();
    let watch = WatchInfoRequest {
        seen_seq: info.seq,
        wait_ms: 30_000,
    };
    let watching = tokio::spawn(async move { watcher.watch_info(watch).await.unwrap().into_inner() });
    let deadline_boottime_ns = boottime_ns() + 600 * NS_PER_S;
    vmm.grant(GrantRequest {
        epoch: 1,
        deadline_boottime_ns,
    })
    .await
    .unwrap();
    assert_eq!(watching.await.unwrap().state(), VmmState::Running);
    let refused = vmm
        .grant(GrantRequest {
            epoch: 2,
            deadline_boottime_ns,
        })
        .await
        .unwrap_err();
    assert_eq!(Fault::from(&refused).code, Code::StaleEpoch);

    let typed = WriteConsoleRequest {
        vm: "vm1".into(),
        data: b"ping agent\n".to_vec(),
        epoch: 1,
    };
    let (mut console, mut offset, mut asked) = (Vec::new(), 0, false);
    while !String::from_utf8_lossy(&console).contains("probe pong agent") {
        let read = ReadConsoleRequest {
            offset,
            wait_ms: 30_000,
            ..Default::default()
        };
        let piece = vmm.read_console(read).await.unwrap().into_inner();
        assert_eq!((piece.offset, piece.epoch), (offset, 1));
        offset = piece.next_offset;
        console.extend(piece.data);
        if !asked && String::from_utf8_lossy(&console).contains("probe up") {
            asked = true;
            let accepted = vmm
                .write_console(typed.clone())
                .await
                .unwrap()
                .into_inner()
                .accepted;
            assert_eq!(accepted, 11);
        }
    }

    let end = vmm.destroy(DestroyRequest::default()).await.unwrap().into_inner();
    assert_eq!(end.state(), VmmState::Exited);
    assert!(process.child.wait().unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_cannot_be_built_is_served_until_it_is_destroyed() {
    needs_kvm!();
    let world = World::new();
    let mut process =
        Process::start(&world.write("host1", 1, |config| config["kernel"] = "/dev/null".into()));
    let mut vmm = process.client().await;
    let info = vmm
        .watch_info(WatchInfoRequest::default())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(info.state(), VmmState::Failed);
    assert_eq!(info.reason.unwrap().code, Code::KernelInvalid.as_str());
    vmm.destroy(DestroyRequest::default()).await.unwrap();
    assert!(process.child.wait().unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_has_one_vmm_and_a_second_one_ends_at_once() {
    needs_kvm!();
    let world = World::new();
    let config = world.write("host1", 1, |_| {});
    let first = Process::start(&config);
    first.client().await;
    let mut second = Process::start(&config);
    assert!(!second.child.wait().unwrap().success());
    first
        .client()
        .await
        .watch_info(WatchInfoRequest::default())
        .await
        .unwrap();
}

#[test]
fn a_configuration_that_is_none_ends_the_process_with_an_error() {
    let world = World::new();
    let config = world.write("host1", 1, |config| config["vcpus"] = 0.into());
    let output = Command::new(env!("CARGO_BIN_EXE_drover-vmm"))
        .arg("--config")
        .arg(config)
        .output()
        .unwrap();
    assert!(!output.status.success());
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(log.contains("vcpus is 0"), "{log}");
}
