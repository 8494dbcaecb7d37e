//! Gives every VM that is wanted and waits a host, or a reason why it has none.
//!
//! One VM is placed a look, since each changes the room that the next one sees; the change it makes wakes the next look
//! at once. Reasons are written only when nothing can be placed, and only when they changed.

use std::time::Duration;

use drover_proto::v1::command::Kind;
use drover_proto::v1::{PlaceVm, Vm, VmPending, VmState};
use drover_state::State;
use drover_state::placement::choose;

use super::{Now, Reconciler};

pub(super) struct Placement;

impl Reconciler for Placement {
    const NAME: &'static str = "placement";
    const PERIOD: Duration = Duration::from_secs(1);

    fn decide(&mut self, state: &State, _now: Now) -> Vec<Kind> {
        let waits = |vm: &&Vm| {
            vm.wanted_running && !vm.deleting && matches!(vm.state(), VmState::Pending | VmState::Stopped)
        };
        let mut pending = Vec::new();
        for vm in state.vms().filter(waits) {
            let Some(spec) = vm.spec.as_ref() else { continue };
            match choose(state, spec, drover_state::purpose_of_start(state, vm)) {
                Ok(host) => {
                    let expected_epoch = drover_state::epoch_of(vm);
                    return vec![Kind::PlaceVm(PlaceVm {
                        vm: spec.name.clone(),
                        host,
                        expected_epoch,
                    })];
                }
                Err(fault) => {
                    let reason = Some(fault.into());
                    if vm.state() != VmState::Pending || vm.reason != reason {
                        pending.push(Kind::VmPending(VmPending {
                            vm: spec.name.clone(),
                            reason,
                        }));
                    }
                }
            }
        }
        pending
    }
}

#[cfg(test)]
mod tests {
    use drover_proto::v1::{CreateVm, HostDown};

    use super::*;
    use crate::reconcile::tests_support::{apply, cluster, now, vm_spec};

    #[test]
    fn waiting_vms_are_placed_one_a_look_and_spread_over_the_hosts() {
        let mut state = cluster();
        for name in ["a", "b", "c"] {
            apply(
                &mut state,
                Kind::CreateVm(CreateVm {
                    spec: Some(vm_spec(name, 400)),
                    start: true,
                }),
            );
        }
        let mut hosts = Vec::new();
        for _ in 0..3 {
            let commands = Placement.decide(&state, now());
            let [Kind::PlaceVm(place)] = commands.as_slice() else {
                panic!("not one placement: {commands:?}")
            };
            hosts.push(place.host.clone());
            apply(&mut state, commands[0].clone());
        }
        assert_eq!(hosts, ["host1", "host2", "host3"]);
        assert!(Placement.decide(&state, now()).is_empty());
    }

    #[test]
    fn a_vm_that_fits_nowhere_gets_its_reasons_once() {
        let mut state = cluster();
        apply(
            &mut state,
            Kind::CreateVm(CreateVm {
                spec: Some(vm_spec("a", 400)),
                start: true,
            }),
        );
        for host in ["host1", "host2", "host3"] {
            apply(&mut state, Kind::HostDown(HostDown { host: host.into() }));
        }
        let commands = Placement.decide(&state, now());
        let [Kind::VmPending(pending)] = commands.as_slice() else {
            panic!("not one reason: {commands:?}")
        };
        let reason = pending.reason.clone().unwrap();
        assert_eq!(reason.code, "no_host_fits");
        assert!(
            reason.message.contains("host3 is declared down"),
            "{}",
            reason.message
        );
        apply(&mut state, commands[0].clone());
        assert!(
            Placement.decide(&state, now()).is_empty(),
            "the same reason is not written twice"
        );
    }
}
