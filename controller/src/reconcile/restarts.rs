//! Tries a failed VM again when its policy says so: it waits for a host like any other, and `placement` finds it one.
//!
//! Bounded by `RESTARTS_MAX` since the last `start`, so that a guest that dies at once does not burn the cluster. A kernel
//! that cannot be loaded, or a snapshot that is damaged, is not tried again: it will not get better.

use std::time::Duration;

use drover_proto::Code;
use drover_proto::v1::command::Kind;
use drover_proto::v1::{Reason, VmPending, VmState};
use drover_state::State;
use drover_state::limits::RESTARTS_MAX;

use super::{Now, Reconciler};

pub(super) struct Restarts;

impl Reconciler for Restarts {
    const NAME: &'static str = "restarts";
    const PERIOD: Duration = Duration::from_secs(1);

    fn decide(&mut self, state: &State, _now: Now) -> Vec<Kind> {
        let mut commands = Vec::new();
        for vm in state
            .vms()
            .filter(|vm| vm.state() == VmState::Failed && drover_state::may_restart(vm))
        {
            let Some(spec) = vm.spec.as_ref() else { continue };
            let why = vm.reason.clone().unwrap_or_default();
            if hopeless(&why) {
                continue;
            }
            let message = format!("restart {} of {RESTARTS_MAX}: {}", vm.restarts + 1, why.message);
            let reason = Some(Reason {
                code: why.code,
                message,
            });
            commands.push(Kind::VmPending(VmPending {
                vm: spec.name.clone(),
                reason,
            }));
        }
        commands
    }
}

/// What will not get better by itself.
fn hopeless(why: &Reason) -> bool {
    let codes = [Code::KernelInvalid, Code::SnapshotDamaged];
    codes.iter().any(|code| code.as_str() == why.code)
}

#[cfg(test)]
mod tests {
    use drover_proto::v1::{CreateVm, PlaceVm, ReportVmRequest, RestartPolicy};

    use super::*;
    use crate::reconcile::tests_support::{apply, cluster, now, vm_spec};

    fn failed(policy: RestartPolicy, code: Code) -> State {
        let mut state = cluster();
        let mut spec = vm_spec("vm1", 64);
        spec.set_restart(policy);
        apply(
            &mut state,
            Kind::CreateVm(CreateVm {
                spec: Some(spec),
                start: true,
            }),
        );
        apply(
            &mut state,
            Kind::PlaceVm(PlaceVm {
                vm: "vm1".into(),
                host: "host1".into(),
                expected_epoch: 0,
            }),
        );
        let mut report = ReportVmRequest {
            host: "host1".into(),
            vm: "vm1".into(),
            epoch: 1,
            ..Default::default()
        };
        report.set_state(VmState::Failed);
        report.reason = Some(Reason {
            code: code.as_str().into(),
            message: "it died".into(),
        });
        apply(&mut state, Kind::ReportVm(report));
        state
    }

    #[test]
    fn a_failed_vm_is_tried_again_when_its_policy_says_so() {
        let mut state = failed(RestartPolicy::OnFailure, Code::VmmDied);
        let commands = Restarts.decide(&state, now());
        let [Kind::VmPending(pending)] = commands.as_slice() else {
            panic!("not one restart: {commands:?}")
        };
        assert_eq!(
            pending.reason.as_ref().unwrap().message,
            "restart 1 of 3: it died"
        );
        apply(&mut state, commands[0].clone());
        assert_eq!(state.vm("vm1").unwrap().restarts, 1);
        assert!(Restarts.decide(&state, now()).is_empty());
    }

    #[test]
    fn it_stays_failed_without_the_policy_or_with_a_kernel_that_cannot_be_loaded() {
        assert!(
            Restarts
                .decide(&failed(RestartPolicy::Never, Code::VmmDied), now())
                .is_empty()
        );
        assert!(
            Restarts
                .decide(&failed(RestartPolicy::OnFailure, Code::KernelInvalid), now())
                .is_empty()
        );
    }
}
