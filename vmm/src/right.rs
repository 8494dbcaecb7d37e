//! The right to run, as a state machine without IO: whether this VMM may execute its vCPUs at an instant.
//!
//! A VMM executes only while it holds a lease that names its own epoch, and never between the pause for a hand-over and
//! the hand-over's outcome. An incoming VMM must besides have verified everything it received. Time comes in as a number:
//! nanoseconds of `CLOCK_BOOTTIME`, which also counts while the host sleeps.
//!
//! ```text
//!  start ──► Waiting ───────────────grant──────────────┐           ┌──────── aborted ────────┐
//!                                                      ▼           ▼                         │
//!  start ──► Incoming ──received──► Ready ──grant──► Live ──────────────hand over──► HandedOver
//!               │                     │               │  runs while now < deadline,         │
//!                                                           committed, by post-copy ─▶ Serving ─ all pages given ─▶ Destroyed
//!               └────── failed ───────┴───────────────┤  else it is frozen                  │ committed
//!                                                     ▼                                     ▼
//!                                                   Ended ────────── destroy ──────────► Destroyed
//! ```
//!
//! `destroy` leads from everywhere to Destroyed. Nothing leads out of Ended or Destroyed to running.
//! What this module does not do: stop anything. Its owner asks [`Right::may_run`] after every input and when the deadline
//! comes, and acts.

use drover_proto::v1::VmmState;
use drover_proto::{Code, Fault};

/// Where a VMM stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Waiting,
    Incoming,
    Ready,
    Live,
    HandedOver,
    Serving,
    Failed,
    Exited,
    Destroyed,
}

/// The right of one VMM to execute its vCPUs.
#[derive(Clone, Debug)]
pub struct Right {
    epoch: u64,
    phase: Phase,
    deadline_ns: u64,
}

impl Right {
    /// A VMM that starts its guest from a kernel.
    pub fn cold(epoch: u64) -> Self {
        Self {
            epoch,
            phase: Phase::Waiting,
            deadline_ns: 0,
        }
    }

    /// A VMM that receives its guest.
    pub fn incoming(epoch: u64) -> Self {
        Self {
            epoch,
            phase: Phase::Incoming,
            deadline_ns: 0,
        }
    }

    /// The epoch this VMM was started for.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Until when the newest lease lasts; 0 before the first.
    pub fn deadline_ns(&self) -> u64 {
        self.deadline_ns
    }

    /// Whether the vCPUs may execute at `now_ns`.
    pub fn may_run(&self, now_ns: u64) -> bool {
        self.phase == Phase::Live && now_ns < self.deadline_ns
    }

    /// Whether the process has nothing left to do.
    pub fn destroyed(&self) -> bool {
        self.phase == Phase::Destroyed
    }

    /// Whether an incoming VMM waits for its first grant.
    pub fn ready(&self) -> bool {
        self.phase == Phase::Ready
    }

    /// Whether the VM runs or would with a lease: such a VM can be moved.
    pub fn live(&self) -> bool {
        self.phase == Phase::Live
    }

    /// Whether the VM is paused for a hand-over whose outcome is not known.
    pub fn handed_over(&self) -> bool {
        self.phase == Phase::HandedOver
    }

    /// The state as it is reported.
    pub fn state(&self, now_ns: u64) -> VmmState {
        match self.phase {
            Phase::Waiting => VmmState::Waiting,
            Phase::Incoming => VmmState::Incoming,
            Phase::Ready => VmmState::Ready,
            Phase::Live if self.may_run(now_ns) => VmmState::Running,
            Phase::Live => VmmState::Frozen,
            Phase::HandedOver => VmmState::HandedOver,
            Phase::Serving => VmmState::Serving,
            Phase::Failed => VmmState::Failed,
            Phase::Exited | Phase::Destroyed => VmmState::Exited,
        }
    }

    /// A lease for `epoch` until `deadline_ns`. Deadlines only rise. Refused: another epoch than this VMM's, and any
    /// grant before an incoming VMM is ready, since none can exist before the hand-over is committed.
    pub fn grant(&mut self, epoch: u64, deadline_ns: u64) -> Result<(), Fault> {
        if epoch != self.epoch {
            return Err(Fault::new(
                Code::StaleEpoch,
                format!(
                    "this VMM was started for epoch {}, the grant is for epoch {epoch}",
                    self.epoch
                ),
            )
            .field("epoch"));
        }
        match self.phase {
            Phase::Incoming => {
                return Err(Fault::new(
                    Code::VmState,
                    "the VM has not been received whole yet: there can be no grant for it before it is ready",
                ));
            }
            Phase::Waiting | Phase::Ready => self.phase = Phase::Live,
            Phase::Live
            | Phase::HandedOver
            | Phase::Serving
            | Phase::Failed
            | Phase::Exited
            | Phase::Destroyed => {}
        }
        self.deadline_ns = self.deadline_ns.max(deadline_ns);
        Ok(())
    }

    /// Everything was received and verified: an incoming VMM now waits for its grant.
    pub fn received(&mut self) -> Result<(), Fault> {
        self.step(
            Phase::Incoming,
            Phase::Ready,
            "only an incoming VM can become ready",
        )
    }

    /// The VM stops for a hand-over. A frozen VM may be handed over too: it moves frozen.
    pub fn hand_over(&mut self) -> Result<(), Fault> {
        self.step(
            Phase::Live,
            Phase::HandedOver,
            "only a VM that runs or is frozen can be handed over",
        )
    }

    /// The log says that the hand-over was aborted: the lease decides again. Nothing to do where there was no pause.
    pub fn aborted(&mut self) {
        if self.phase == Phase::HandedOver {
            self.phase = Phase::Live;
        }
    }

    /// The log says that the hand-over is committed: the VM runs elsewhere, this one is over.
    pub fn committed(&mut self) -> Result<(), Fault> {
        self.step(
            Phase::HandedOver,
            Phase::Destroyed,
            "only a VM that is paused for a hand-over can be committed away",
        )
    }

    /// The log says that the hand-over is committed, and the target still needs this one's pages. It never runs again.
    pub fn serve(&mut self) -> Result<(), Fault> {
        self.step(
            Phase::HandedOver,
            Phase::Serving,
            "only a VM that is paused for a hand-over can be committed away",
        )
    }

    /// Whether the VM runs elsewhere and only its pages are needed.
    pub fn serving(&self) -> bool {
        self.phase == Phase::Serving
    }

    /// The guest or its VMM cannot go on. The first end counts; nothing ever runs after it.
    pub fn failed(&mut self) {
        if !matches!(self.phase, Phase::Exited | Phase::Destroyed) {
            self.phase = Phase::Failed;
        }
    }

    /// The guest shut itself down.
    pub fn exited(&mut self) {
        if !matches!(self.phase, Phase::Failed | Phase::Destroyed) {
            self.phase = Phase::Exited;
        }
    }

    /// The VM is to end, whatever it does.
    pub fn destroy(&mut self) {
        self.phase = Phase::Destroyed;
    }

    fn step(&mut self, from: Phase, to: Phase, rule: &str) -> Result<(), Fault> {
        if self.phase != from {
            return Err(Fault::new(
                Code::VmState,
                format!("{rule}; this one is {:?}", self.phase),
            ));
        }
        self.phase = to;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const EPOCH: u64 = 7;

    #[derive(Clone, Debug)]
    enum Input {
        Grant { epoch: u64, deadline: u64 },
        Advance(u64),
        Received,
        HandOver,
        Aborted,
        Committed,
        Serve,
        Failed,
        Exited,
        Destroy,
    }

    fn input() -> impl Strategy<Value = Input> {
        prop_oneof![
            6 => (EPOCH - 1..EPOCH + 2, 0u64..400).prop_map(|(epoch, deadline)| Input::Grant { epoch, deadline }),
            4 => (0u64..60).prop_map(Input::Advance),
            2 => Just(Input::Received),
            3 => Just(Input::HandOver),
            2 => Just(Input::Aborted),
            1 => Just(Input::Committed),
            1 => Just(Input::Serve),
            1 => Just(Input::Failed),
            1 => Just(Input::Exited),
            1 => Just(Input::Destroy),
        ]
    }

    /// What an outside observer must know to say whether running is allowed, kept without looking at the machine.
    #[derive(Default)]
    struct Observer {
        received: bool,
        granted: bool,
        deadline: u64,
        paused_for_hand_over: bool,
        over: bool,
    }

    fn drive(right: &mut Right, seen: &mut Observer, now: &mut u64, input: &Input) {
        match *input {
            Input::Grant { epoch, deadline } => {
                let accepted = right.grant(epoch, deadline).is_ok();
                assert!(
                    !accepted || epoch == EPOCH,
                    "a grant for another epoch was accepted"
                );
                assert!(
                    !accepted || seen.received || seen.over,
                    "a grant was accepted before the VM was received"
                );
                if accepted {
                    seen.granted = true;
                    seen.deadline = seen.deadline.max(deadline);
                }
            }
            Input::Advance(by) => *now += by,
            Input::Received => seen.received |= right.received().is_ok(),
            Input::HandOver => seen.paused_for_hand_over |= right.hand_over().is_ok(),
            Input::Aborted => {
                right.aborted();
                seen.paused_for_hand_over = false;
            }
            Input::Committed => {
                if right.committed().is_ok() {
                    assert!(seen.paused_for_hand_over, "committed away without a pause");
                    seen.over = true;
                }
            }
            Input::Serve => {
                if right.serve().is_ok() {
                    assert!(seen.paused_for_hand_over, "serves without a pause");
                    seen.over = true;
                }
            }
            Input::Failed => {
                right.failed();
                seen.over = true;
            }
            Input::Exited => {
                right.exited();
                seen.over = true;
            }
            Input::Destroy => {
                right.destroy();
                seen.over = true;
            }
        }
    }

    proptest! {
        #[test]
        fn it_runs_exactly_with_a_live_grant_and_never_while_handed_over(
            incoming in any::<bool>(),
            inputs in proptest::collection::vec(input(), 0..60),
        ) {
            let mut right = if incoming { Right::incoming(EPOCH) } else { Right::cold(EPOCH) };
            let mut seen = Observer { received: !incoming, ..Observer::default() };
            let mut now = 0;
            for input in &inputs {
                let deadline = right.deadline_ns();
                drive(&mut right, &mut seen, &mut now, input);
                prop_assert!(right.deadline_ns() >= deadline, "a deadline fell");
                let allowed = seen.received && seen.granted && now < seen.deadline
                    && !seen.paused_for_hand_over && !seen.over;
                prop_assert_eq!(right.may_run(now), allowed);
                prop_assert_eq!(right.state(now) == VmmState::Running, allowed);
            }
        }

        #[test]
        fn what_has_ended_never_runs_again(
            end in 0usize..3,
            inputs in proptest::collection::vec(input(), 0..40),
        ) {
            let mut right = Right::cold(EPOCH);
            right.grant(EPOCH, 1_000).unwrap();
            [Right::failed, Right::exited, Right::destroy][end](&mut right);
            let (mut seen, mut now) = (Observer { received: true, over: true, ..Observer::default() }, 0);
            for input in &inputs {
                drive(&mut right, &mut seen, &mut now, input);
                prop_assert!(!right.may_run(now));
            }
        }
    }

    #[test]
    fn an_expired_lease_freezes_and_the_next_grant_resumes() {
        let mut right = Right::cold(EPOCH);
        right.grant(EPOCH, 100).unwrap();
        assert_eq!(right.state(99), VmmState::Running);
        assert_eq!(right.state(100), VmmState::Frozen);
        right.grant(EPOCH, 200).unwrap();
        assert_eq!(right.state(150), VmmState::Running);
    }

    #[test]
    fn a_grant_while_handed_over_counts_only_after_the_abort() {
        let mut right = Right::cold(EPOCH);
        right.grant(EPOCH, 100).unwrap();
        right.hand_over().unwrap();
        right.grant(EPOCH, 500).unwrap();
        assert!(!right.may_run(50));
        right.aborted();
        assert!(right.may_run(450));
    }

    #[test]
    fn a_lower_and_a_higher_epoch_are_refused_alike() {
        let mut right = Right::cold(EPOCH);
        for epoch in [EPOCH - 1, EPOCH + 1] {
            assert_eq!(right.grant(epoch, 100).unwrap_err().code, Code::StaleEpoch);
        }
        assert_eq!(right.state(0), VmmState::Waiting);
    }
}
