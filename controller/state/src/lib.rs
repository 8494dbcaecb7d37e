//! The replicated state: what every controller knows, and the one function that changes it.
//!
//! ```text
//!   log entry (Command) ──> apply ──> CommandResponse          read by api/ and reconcile/:
//!                             │        + effects                  State's getters, `desired`, `grants`,
//!                             v                                   `placement::choose`
//!                           State <──> StateSnapshot (bytes)
//! ```
//!
//! [`apply`] is pure: time comes in the command, stamped by the leader; there is no clock, no randomness, no IO, no
//! float and no unordered map in this crate, so every replica that applies the same log holds the same bytes, with or
//! without a snapshot between. It trusts nobody: a proposal is checked again when it is applied, since between the
//! proposal and its place in the log anything may have been committed.
//!
//! What it does not do: it decides nothing by itself. Timeouts, placement of waiting VMs and retries are the
//! reconcilers'; they propose commands like everybody else.

mod apply;
mod cloud;
mod desired;
pub mod limits;
mod networks;
pub mod placement;
pub mod preflight;
mod snapshot;
mod snapshots;
mod state;
mod validate;
mod volumes;

pub use apply::{Effect, apply, into_result, may_restart, refusal};
pub use cloud::{snapshot_without_secrets, without_secrets};
pub use desired::{desired, grants};
pub use snapshot::DecodeError;
pub use snapshots::{purpose_of_start, snapshot_number};
pub use state::{
    State, Usage, commit_us, default_settings, epoch_of, host_of, is_committed, is_ended, migration_number,
    occupies, pause_us, state_us,
};
pub use volumes::is_being_filled;
