//! Post-copy between two machines on real KVM: a guest that writes faster than the link carries runs at the target before its pages are
//! there, and finds each as it had left it, or the VM ends.

#![allow(clippy::unwrap_used, reason = "a test may, its helpers too")]

mod common;

use std::sync::Arc;

use common::{
    World, assert_intact, await_console, await_info, await_state, failure, flat_out, grant, grant_for,
    has_seconds, incoming, listen_addr, seconds, send_with, slow_link, text,
};
use drover_proto::Code;
use drover_proto::v1::{MigrationOptions, OutcomeRequest, VmmState};
use drover_vmm::machine::Machine;
use drover_vmm::uffd::Uffd;

/// Whether pages can be missing here; says loudly when not.
fn can() -> bool {
    let opened = Uffd::open();
    if let Err(fault) = &opened {
        println!("SKIPPED: {fault}");
    }
    common::kvm() && opened.is_ok()
}

/// A guest that has moved by post-copy and waits for its grant, and the source that has its pages.
fn moved(world: &World) -> (Arc<Machine>, Arc<Machine>) {
    let source = world.machine("host1", 1, flat_out);
    grant(&source);
    await_console(source.console(), "lines", has_seconds(2));
    let target = world.machine("host2", 2, |config| {
        flat_out(config);
        incoming(config, "host1");
    });
    let options = MigrationOptions {
        allow_postcopy: true,
        ..slow_link(0).unwrap()
    };
    send_with(&source, "m1", listen_addr(&target), "host2", Some(options)).unwrap();
    let info = await_state(&target, VmmState::Ready);
    assert!(info.migration.unwrap().post_copy, "all pages were there");
    (source, target)
}

fn committed(source: &Machine) {
    let migration = "m1".into();
    let request = OutcomeRequest {
        migration,
        committed: true,
    };
    source.outcome(&request).unwrap();
}

#[test]
fn a_guest_that_writes_faster_than_the_link_runs_while_its_pages_come_and_finds_them_all() {
    if !can() {
        return;
    }
    let world = World::new();
    let (source, target) = moved(&world);
    let before = seconds(&text(target.console()), "t").len();
    let info = grant(&target);
    assert_eq!(info.state(), VmmState::Running);
    assert_eq!(
        info.migration.unwrap().receipt,
        None,
        "pages are missing, the receipt is not due"
    );
    committed(&source);
    grant(&source);
    // By now the target may have all pages.
    let state = source.info().state();
    assert!(
        matches!(state, VmmState::Serving | VmmState::Exited),
        "a lease resumed what had moved away: {state:?}"
    );
    let receipt = |info: &drover_proto::v1::VmmInfo| info.migration.clone()?.receipt;
    let info = await_info(&target, "receipt", |info| receipt(info).is_some());
    let receipt = receipt(&info).unwrap();
    println!("{receipt:?}");
    let post_copy = receipt.post_copy.unwrap();
    assert!(post_copy.pages > 1000 && post_copy.faults > 0, "{post_copy:?}");
    assert!(post_copy.fault_longest_us >= post_copy.fault_mean_us && post_copy.fault_mean_us > 0);
    await_state(&source, VmmState::Exited);
    assert!(*source.over().borrow());
    let text = await_console(target.console(), "lines after the move", has_seconds(before + 4));
    assert_intact(&text);
}

#[test]
fn a_source_that_ends_while_pages_are_missing_takes_the_vm_with_it_and_nothing_runs_with_holes() {
    if !can() {
        return;
    }
    let world = World::new();
    let (source, target) = moved(&world);
    assert_eq!(grant(&target).state(), VmmState::Running);
    committed(&source);
    source.destroy(None);
    let info = await_state(&target, VmmState::Failed);
    let reason = info.reason.unwrap();
    assert_eq!(reason.code, Code::PostCopyLost.as_str(), "{}", reason.message);
    assert_eq!(grant(&target).state(), VmmState::Failed, "a lease revived it");
    assert_intact(&text(target.console()));
    assert_eq!(info.migration.unwrap().receipt, None);
}

#[test]
fn a_lease_that_runs_out_while_pages_are_missing_freezes_the_guest_and_the_next_one_resumes_it() {
    if !can() {
        return;
    }
    let world = World::new();
    let (source, target) = moved(&world);
    assert_eq!(grant_for(&target, 100_000_000).state(), VmmState::Running);
    committed(&source);
    await_state(&target, VmmState::Frozen);
    let before = seconds(&text(target.console()), "t").len();
    assert_eq!(grant(&target).state(), VmmState::Running);
    await_info(&target, "receipt", |info| {
        info.migration
            .as_ref()
            .is_some_and(|migration| migration.receipt.is_some())
    });
    assert_intact(&await_console(
        target.console(),
        "lines after",
        has_seconds(before + 3),
    ));
}

#[test]
fn an_abort_after_the_state_resumes_the_source_and_the_target_never_ran() {
    if !can() {
        return;
    }
    let world = World::new();
    let (source, target) = moved(&world);
    let request = OutcomeRequest {
        migration: "m1".into(),
        committed: false,
    };
    source.outcome(&request).unwrap();
    assert_eq!(source.info().state(), VmmState::Running);
    let info = await_state(&target, VmmState::Failed);
    assert_eq!(info.reason.unwrap().code, Code::PostCopyLost.as_str());
    let before = seconds(&text(source.console()), "t").len();
    assert_intact(&await_console(
        source.console(),
        "lines after",
        has_seconds(before + 2),
    ));
}

#[test]
fn a_host_that_may_not_is_told_of_before_a_page_is_sent_and_only_post_copy_would_have_done() {
    if !can() {
        return;
    }
    let world = World::new();
    let source = world.machine("host1", 1, flat_out);
    grant(&source);
    await_console(source.console(), "lines", has_seconds(2));
    let target = world.machine("host2", 2, |config| {
        flat_out(config);
        incoming(config, "host1");
        config["incoming"]["post_copy"] = false.into();
    });
    let options = MigrationOptions {
        allow_postcopy: true,
        deadline_ms: 1500,
        ..slow_link(0).unwrap()
    };
    send_with(&source, "m1", listen_addr(&target), "host2", Some(options)).unwrap();
    assert_eq!(failure(&source), Code::PostCopyUnavailable.as_str());
    assert_eq!(source.info().state(), VmmState::Running);
    assert_intact(&text(source.console()));
}

/// A user who may open neither the device nor a userfaultfd of the system call that sees the kernel's faults.
#[test]
fn a_vmm_that_the_kernel_denies_userfaultfd_says_so_and_what_to_do() {
    use std::os::unix::process::CommandExt;
    const NOBODY: u32 = 65534;
    let open_to_all = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    if nix::unistd::geteuid().as_raw() != 0 || open_to_all.is_ok_and(|setting| setting.trim() == "1") {
        return println!("SKIPPED: this takes root, and vm.unprivileged_userfaultfd=0");
    }
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("drover-vmm");
    std::fs::copy(env!("CARGO_BIN_EXE_drover-vmm"), &program).unwrap();
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let asked = |user: u32| {
        let mut command = std::process::Command::new(&program);
        let output = command.arg("--post-copy").uid(user).gid(user).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    if can() {
        assert_eq!(asked(0), "ok");
    }
    let denied = asked(NOBODY);
    assert!(
        denied.starts_with("userfaultfd cannot be used") && denied.contains("/dev/userfaultfd"),
        "{denied}"
    );
}
