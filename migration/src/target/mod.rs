//! The target's side.

use std::time::{Duration, Instant};

use drover_proto::v1::Receipt;
use drover_proto::{Code, Fault};

use crate::control::Control;
use crate::transport::Stream;
use crate::vm::TargetVm;

/// What the target was started for; a source that says otherwise is refused.
#[derive(Clone, Debug)]
pub struct Params {
    /// The migration's id.
    pub migration: String,
    /// The VM's name.
    pub vm: String,
    /// The source's host.
    pub from_host: String,
    /// The epoch that this VMM was started for.
    pub epoch: u64,
    /// The highest version of the save-state that `TargetVm::restore` reads.
    pub device_model: u32,
    /// The VM's CPU profile by name.
    pub cpu_profile: String,
    /// A link that moves no byte for so long counts as lost. Normally [`crate::transport::LINK_TIMEOUT`].
    pub link_timeout: Duration,
}

/// Everything was received, verified and restored, and Ready was said.
#[derive(Clone, Debug)]
pub struct Received {
    /// The receipt so far: the blackout's `commit`, `resume`, `total` and `total_ms` are still to come.
    pub receipt: Receipt,
    /// When Ready was said: `commit` counts from here.
    pub ready_at: Instant,
    /// From the source's connect until it began to pause.
    pub before_blackout: Duration,
}

impl Received {
    /// The whole receipt. `granted_at`: when the grant for the new epoch came in; `running_at`: when the vCPUs ran.
    pub fn finish(self, granted_at: Instant, running_at: Instant) -> Receipt {
        let _ = (granted_at, running_at);
        self.receipt
    }
}

/// Receives a VM from the source at the other end of `stream`. Blocks until Ready was said or the attempt has failed.
/// The guest must not run before its grant, whatever this returns.
pub fn run<S: Stream>(
    vm: &mut dyn TargetVm,
    stream: S,
    params: &Params,
    control: &Control,
) -> Result<Received, Fault> {
    let _ = (vm, stream, params, control);
    Err(Fault::new(Code::Internal, "not there yet"))
}
