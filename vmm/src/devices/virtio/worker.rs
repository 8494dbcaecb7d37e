//! A device's worker: sleeps until its bell rings or something comes from outside, then serves until nothing is left or nothing may be served.

use std::sync::Arc;
use std::thread::JoinHandle;

use drover_proto::{Code, Fault};
use tracing::error;

use super::pci::{VirtioPci, Work};
use crate::sandbox::{self, Thread};

/// Starts the worker of `device`, which ends when the gate says so, or when the device leaves.
pub fn start(device: Arc<VirtioPci>, slot: usize) -> Result<JoinHandle<()>, Fault> {
    std::thread::Builder::new()
        .name(format!("device{slot}"))
        .spawn(move || run(&device))
        .map_err(|error| Fault::new(Code::VmmStartFailed, format!("a device's thread: {error}")))
}

fn run(device: &VirtioPci) {
    sandbox::narrow(Thread::Device);
    while !device.gate().quits() && !device.leaves() {
        let left = loop {
            match device.work() {
                Work::Done => {}
                left => break left,
            }
        };
        if let Err(error) = device.wait(left) {
            error!(%error, "a device's worker cannot wait; the device stands");
            return;
        }
    }
}
