//! The controller: the replicated truth of a Drover cluster. See ARCHITECTURE.md.

pub mod api;
pub mod config;
pub mod consensus;
mod metrics;
pub mod reconcile;
pub mod server;
