//! Placeholder.

pub mod vm;
