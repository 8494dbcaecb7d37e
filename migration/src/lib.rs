//! The live-migration engine.

pub mod control;
pub mod source;
pub mod target;
pub mod transport;
pub mod vm;

pub use control::Control;
