//! The source's side.

use std::time::Duration;

use drover_proto::v1::MigrationOptions;
use drover_proto::{Code, Fault};

use crate::control::Control;
use crate::transport::Stream;
use crate::vm::SourceVm;

/// What the source knows before it connects.
#[derive(Clone, Debug)]
pub struct Params {
    /// The migration's id.
    pub migration: String,
    /// The VM's name.
    pub vm: String,
    /// This host's name.
    pub from_host: String,
    /// The epoch that the VM runs for here.
    pub source_epoch: u64,
    /// The epoch that the target was started for: `source_epoch + 1`.
    pub target_epoch: u64,
    /// The user's intent. `max_downtime_ms` of 0 is taken as 300.
    pub options: MigrationOptions,
    /// Version of the save-state that `SourceVm::save` writes.
    pub device_model: u32,
    /// The VM's CPU profile by name.
    pub cpu_profile: String,
    /// How dirty pages are found, for the receipt: `"bitmap"` or `"ring"`.
    pub tracker: &'static str,
    /// A link that moves no byte for so long counts as lost. Normally [`crate::transport::LINK_TIMEOUT`].
    pub link_timeout: Duration,
}

/// How an attempt ended, for the source.
#[derive(Debug)]
pub enum Outcome {
    /// The VM is paused and the target said Ready. Only the outcome in the log decides what comes next.
    AwaitOutcome,
    /// `SourceVm::pause` was never called: the VM goes on as if nothing had been. The caller reports the fault.
    FailedRunning(Fault),
    /// The VM is paused (`SourceVm::pause` was called). The caller reports the fault and stays paused until it learns the
    /// outcome from the log: the abort it asks for may come second there.
    FailedPaused(Fault),
}

/// Moves `vm` over the stream that `dial` makes. Blocks until the attempt has ended; the dirty log is off then.
pub fn run<S: Stream>(
    vm: &mut dyn SourceVm,
    dial: impl FnOnce() -> Result<S, Fault>,
    params: &Params,
    control: &Control,
) -> Outcome {
    let _ = (vm, dial, params, control);
    Outcome::FailedRunning(Fault::new(Code::Internal, "not there yet"))
}
