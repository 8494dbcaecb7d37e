//! What of the probe guest is not tied to a machine: its parameters, its pages, its paces and its console's lines.
//!
//! The guest itself (`main.rs`, built under the profile `guest`) and the programs that read its console share this library, so the line
//! that a test parses is the line that the guest formats. Nothing here allocates, does I/O or asks for an operating system. See
//! `docs/probe.md` for the parameters and the lines.
#![no_std]

#[cfg(test)]
extern crate std;

pub mod clock;
pub mod echo;
pub mod frames;
pub mod journal;
pub mod layout;
pub mod ledger;
pub mod load;
pub mod pace;
pub mod page;
pub mod params;
pub mod pattern;
pub mod report;
pub mod spare;

/// Bytes of a page.
pub const PAGE_SIZE: u64 = 4096;

/// Processors that the guest can bring up.
pub const CPUS_MAX: u32 = 16;
