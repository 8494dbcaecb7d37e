//! `ctl` as its users meet it: a process, its output and its exit code.

// Clippy's exception for tests covers test functions, not what they share.
#![allow(clippy::unwrap_used)]

mod cluster;
mod console;
mod dev;
mod dry_run;
mod fake;
mod follow;
mod network;
mod snapshot;
mod volume;
