//! The live-migration engine: moves a running VM's memory and state from one VMM to another.
//!
//! ```text
//!  source                                             target
//!  ------                                             ------
//!  Hello ────────────────────────────────────────────▶ is this what I was started for?
//!        ◀──────────────────────────────────────────── HelloAck | Refusal
//!  opens the streams that pages travel on ───────────▶ takes those that show its token
//!  dirty log on
//!  ┌ Pages*, Zeros*, RoundEnd ───────────────────────▶ writes them, compares the counts
//!  │     ◀──────────────────────────────────────────── RoundAck
//!  └ take the dirty log; stop rule? else again
//!  pause the vCPUs
//!  Pages*, Zeros*, RoundEnd{last} ───────────────────▶
//!        ◀──────────────────────────────────────────── RoundAck
//!  save the state
//!  State{state, digest, counts} ─────────────────────▶ verifies, restores
//!        ◀──────────────────────────────────────────── Ready | Refusal
//!  waits for the outcome in the log                    waits for its grant
//! ```
//!
//! The parts: [`codec`] is the form on the wire; [`handshake`], [`convergence`], [`bandwidth`], [`meter`] and [`digest`] are
//! pure rules, which [`forecast`] plays through beforehand; [`source::Machine`] and [`target::Machine`] are the protocol as
//! state machines without IO; [`source::run`] and [`target::run`] drive them over a byte stream ([`transport`]) and a VM
//! ([`vm`]).
//!
//! It does not decide who may run. After the pause nothing here resumes the guest on either side, and Ready is only the
//! target's word that it could: the log decides (ARCHITECTURE.md, section 3).

pub mod bandwidth;
pub mod codec;
pub mod control;
pub mod convergence;
pub mod digest;
pub mod encode;
pub mod forecast;
pub mod handshake;
pub mod meter;
pub mod post_copy;
pub mod source;
pub mod target;
pub mod transport;
pub mod vm;
pub mod zero;

pub use control::Control;
