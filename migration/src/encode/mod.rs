//! Less to send: pages that the target knows in an older form travel as what changed in them ([`delta`] against what the [`cache`] kept),
//! and batches are compressed where that is quicker than sending them as they are ([`compress`], decided by [`choice`]).
//!
//! ```text
//!  pages of a job ─▶ zero? ─▶ in the cache, little changed? ─▶ Deltas
//!                     │            │ no
//!                     ▼            ▼
//!                   Zeros     worth compressing? ─▶ Packed, else Pages
//! ```
//!
//! What the target can read was agreed on by features ([`crate::handshake::feature`]); to one that can read none of it pages go as ever.

pub mod cache;
pub mod choice;
pub mod compress;
pub mod delta;
