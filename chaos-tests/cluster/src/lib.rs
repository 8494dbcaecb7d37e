//! A whole cluster of real processes on one machine: three controllers, three hosts, KVM guests, one network namespace a
//! party. Tests break it at exact steps and ask the guest itself what it noticed.
//!
//! ```text
//!   test's thread (namespace "hub": a bridge, 10.213.0.1)
//!     ├─ veth ── c1, c2, c3            10.213.0.11 … 13    drover-controller
//!     └─ veth ── host1, host2, host3   10.213.0.21 … 23    drover-agent → drover-vmm …
//! ```
//!
//! Nothing survives a test run, however it ends. The network namespaces have no name and no mount: they live as long as a
//! file descriptor or a process holds them. All processes are in one PID namespace whose first process dies with the
//! test, and the kernel kills the rest with it, the VMMs that outlive their agents among them.
//!
//! The binaries are those of a chaos build (pause points, seeded bugs), which `cargo xtask test cluster` puts into
//! `<target>/chaos-bin`. Where the machine cannot run the tests (no root, no KVM, no binaries) they say
//! `SKIPPED: why` and xtask counts them as skipped.
//!
//! Links can be cut and given a rate; they have no delay and no loss. It does not simulate: for that the parts have their
//! own tests. The migration benchmark runs on it too, with the plain binaries.

pub mod client;
pub mod cluster;
pub mod console;
pub mod network;
pub mod points;
pub mod process;
pub mod soak;
pub mod verdicts;
pub mod vmms;
pub mod witness;

pub use client::{Client, probe_spec};
pub use cluster::{Cluster, Settings, Setup};
pub use console::Console;
pub use points::Points;
pub use vmms::SeenVmm;

use std::time::{Duration, Instant};

/// How long a test waits for a state that must come. Generous: it bounds a failed run, a good one never waits so long.
pub const PATIENCE: Duration = Duration::from_secs(40);

/// How often a state that cannot be awaited is looked at.
pub const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// Calls `look` until it gives something; after [`PATIENCE`] it panics with `what` and what `seen` says then.
pub fn await_some<T>(what: &str, mut look: impl FnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match look() {
            Ok(found) => return found,
            Err(seen) => assert!(
                Instant::now() < deadline,
                "waited {PATIENCE:?} for {what}; last seen: {seen}"
            ),
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}
