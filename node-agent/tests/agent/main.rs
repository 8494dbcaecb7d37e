//! The agent against a controller and VMMs that do as a test says; the VMMs are processes of their own.
//!
//! This program has its own main because it is both: started as a VMM it lives as one, else it runs the tests in the manner of
//! the standard harness.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a test's helpers fail as the test does"
)]

mod fake_fleet;
mod fake_vmm;
mod fleet_tests;
mod memory_tests;
mod migration_tests;
mod nic_tests;
mod snapshot_tests;
mod vm_tests;
mod volume_tests;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Duration;

use futures_of::{Boxed, Test};

/// How long a test waits for something before it calls it missing.
pub const PATIENCE: Duration = Duration::from_secs(60);

mod futures_of {
    use std::pin::Pin;

    pub type Boxed = Pin<Box<dyn Future<Output = ()>>>;
    pub type Test = (&'static str, fn() -> Boxed);
}

macro_rules! tests {
    ($($module:ident::$name:ident,)*) => {
        const TESTS: &[Test] = &[$((
            concat!(stringify!($module), "::", stringify!($name)),
            || -> Boxed { Box::pin($module::$name()) },
        ),)*];
    };
}

tests! {
    fleet_tests::a_host_registers_what_it_has_and_again_when_an_image_is_added,
    fleet_tests::a_host_unknown_to_the_controllers_registers_again,
    fleet_tests::calls_go_to_the_leader_that_a_heartbeat_names_unless_it_does_not_answer,
    fleet_tests::dead_silent_and_leaderless_controllers_are_passed_over,
    fleet_tests::consoles_are_for_controllers_only,
    fleet_tests::an_agent_with_anothers_certificate_does_not_start,
    vm_tests::a_vm_is_started_granted_and_reported_running,
    vm_tests::a_vm_runs_on_while_its_agent_is_restarted,
    vm_tests::a_vmm_that_was_killed_is_reported_failed_and_its_epoch_is_never_started_again,
    vm_tests::a_vmm_that_was_killed_while_no_agent_watched_is_reported_failed,
    vm_tests::a_vm_that_is_stopped_is_destroyed_and_reported_stopped,
    vm_tests::a_vm_that_was_stopped_before_its_host_heard_of_it_is_reported_stopped,
    vm_tests::a_guest_that_fails_is_reported_with_its_reason_and_then_destroyed,
    vm_tests::a_guest_that_shuts_itself_down_is_reported_stopped,
    vm_tests::a_vmm_that_cannot_start_is_reported_with_the_error_in_its_log,
    vm_tests::a_missing_image_fails_the_vm_and_names_it,
    vm_tests::silence_destroys_nothing_and_neither_does_an_unconfirmed_absence,
    vm_tests::a_vmm_that_hangs_is_killed_when_it_is_to_end,
    vm_tests::a_vmm_that_ignores_its_end_is_killed_also_by_the_next_agent,
    volume_tests::a_vm_gets_its_volumes_as_disks_and_their_files_are_made_once,
    volume_tests::a_volume_that_cannot_be_had_fails_the_start_with_its_code_and_starts_nothing,
    memory_tests::what_the_guest_is_to_have_is_configured_and_told_and_what_it_has_is_reported,
    snapshot_tests::a_snapshot_is_taken_once_followed_and_its_end_reported,
    snapshot_tests::what_a_vmm_has_done_while_no_agent_watched_the_next_one_reports,
    snapshot_tests::a_snapshot_that_fails_or_is_refused_is_reported_with_its_reason,
    snapshot_tests::a_snapshot_that_nobody_waits_for_is_cancelled_and_then_removed,
    snapshot_tests::what_a_vmm_in_its_sandbox_has_sealed_is_named_before_it_is_reported,
    snapshot_tests::an_agent_that_dies_before_or_after_the_manifest_is_named_leaves_the_rest_to_the_next,
    snapshot_tests::what_cannot_be_named_is_no_snapshot,
    snapshot_tests::a_vmm_in_its_sandbox_of_an_older_build_takes_no_snapshot_and_the_reason_says_what_helps,
    snapshot_tests::a_restored_run_has_its_disks_content_and_does_not_run_before_it_may,
    snapshot_tests::an_agent_that_dies_before_the_beginning_leaves_it_to_the_next,
    snapshot_tests::a_restored_run_that_ends_before_its_beginning_is_reported_and_nothing_was_written_over,
    snapshot_tests::what_a_restore_has_replaced_is_removed_when_the_controllers_order_it,
    volume_tests::a_volume_is_filled_from_its_image_and_reported_and_what_does_not_work_too,
    volume_tests::a_vm_with_a_seed_gets_it_as_a_disk_beside_its_volumes_and_for_the_agents_eyes_only,
    nic_tests::a_tap_is_there_before_its_nic_and_goes_after_the_guest_has_given_it_up,
    nic_tests::an_agent_that_is_killed_between_any_two_steps_leaves_what_the_next_makes_good,
    nic_tests::a_network_that_is_not_there_gives_no_nic_and_is_reported,
    migration_tests::a_target_prepares_commits_and_runs_by_the_commits_lease,
    migration_tests::a_commit_is_asked_for_until_it_is_answered_also_by_the_next_agent,
    migration_tests::a_target_whose_commit_is_refused_ends_without_a_report,
    migration_tests::a_target_that_dies_aborts_its_migration,
    migration_tests::a_source_connects_pauses_and_resumes_by_the_abort_in_the_log,
    migration_tests::a_source_ends_when_the_hand_over_is_committed,
    migration_tests::a_source_that_ignores_the_commit_is_killed,
    migration_tests::a_vm_that_arrived_and_died_with_its_agent_is_never_booted,
    migration_tests::a_failure_of_either_side_is_proposed_as_an_abort_with_its_phase,
}

fn main() -> ExitCode {
    if std::env::var_os(fake_vmm::IS_VMM).is_some() {
        fake_vmm::live();
        return ExitCode::SUCCESS;
    }
    drover_pki::install_provider();
    let args: Vec<String> = std::env::args().skip(1).collect();
    let has = |option: &str| args.iter().any(|arg| arg == option);
    // What `--list --format terse` has is no filter.
    let mut words = args.iter().skip_while(|arg| arg.starts_with('-'));
    let filter = words.next().filter(|_| !has("--format"));
    let chosen = TESTS.iter().filter(|(name, _)| match filter {
        Some(filter) if has("--exact") => name == filter,
        Some(filter) => name.contains(filter.as_str()),
        None => true,
    });
    if has("--list") {
        if !has("--ignored") {
            chosen.for_each(|(name, _)| println!("{name}: test"));
        }
        return ExitCode::SUCCESS;
    }
    if drover_node_agent::inventory::kvm_caps().is_err() {
        // Each test's agent registers what KVM offers, and does not start without any.
        println!("SKIPPED: no usable /dev/kvm");
        return ExitCode::SUCCESS;
    }
    let chosen: Vec<&Test> = chosen.collect();
    println!("\nrunning {} tests", chosen.len());
    let failed = chosen.iter().filter(|(name, test)| !passes(name, *test)).count();
    let (verdict, passed, filtered) = (
        if failed == 0 { "ok" } else { "FAILED" },
        chosen.len() - failed,
        TESTS.len() - chosen.len(),
    );
    println!(
        "\ntest result: {verdict}. {passed} passed; {failed} failed; 0 ignored; 0 measured; {filtered} filtered out\n"
    );
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn passes(name: &str, test: fn() -> Boxed) -> bool {
    let run = move || {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(test());
        runtime.shutdown_background();
    };
    let passed = if name.starts_with("nic_tests::") {
        if !nix::unistd::geteuid().is_root() {
            println!("SKIPPED: network namespaces need root");
            return true;
        }
        std::thread::spawn(move || {
            nic_tests::enter_namespace();
            run();
        })
        .join()
        .is_ok()
    } else {
        catch_unwind(AssertUnwindSafe(run)).is_ok()
    };
    println!("test {name} ... {}", if passed { "ok" } else { "FAILED" });
    passed
}
