//! The host daemon: registers its host, keeps its lease, starts VMMs and finds them again, and carries word between them and
//! the controllers.
//!
//! ```text
//!   controllers ◄── register ─── inventory (size, CPU, KVM, images)
//!        ▲  ◄────── heartbeat ── grants ──────────────► one task a VMM ── Vmm socket ──► VMM
//!        │  ◄────── watch ────── desired ─► supervisor ─► converge ─► actions ──┘
//!        └── reports, commit, abort ◄────────────────────────┘
//! ```
//!
//! The heartbeat, the desired state and each VMM have a task of their own, so that none waits for another: a VMM that hangs holds
//! up no lease, a controller that hangs holds up no hand-over that another can commit. One task, the supervisor, owns what is
//! known and decides by a pure function what to do next. An agent that dies loses nothing: what must be remembered is in
//! its folder before it is acted on, the rest it asks of its VMMs.
//!
//! It never decides who may run: it hands on what a leader that had its quorum said, with the time it asked.

pub mod agent;
pub mod clock;
pub mod config;
pub mod console;
pub mod controllers;
pub mod converge;
pub mod host;
pub mod inventory;
pub mod key;
pub mod loops;
pub mod network;
pub mod reports;
pub mod sandbox;
pub mod snapshots;
pub mod supervisor;
pub mod vmm;

pub use agent::{Agent, AgentError};
pub use config::Config;

/// Version of the save-state that the VMMs started here write; they read every lower one.
pub const DEVICE_MODEL: u32 = 6;

/// Waits while a test holds the pause point `name`. Nothing in a build without the feature `chaos`.
async fn pause_point(name: &'static str) {
    if cfg!(feature = "chaos") {
        // A point that could not be waited at is one that nobody holds.
        let _ = tokio::task::spawn_blocking(move || drover_points::reach(name)).await;
    }
}
