//! A vCPU's visible features, its state, and the guest's clocks.

pub mod clock;
pub mod profile;
pub mod state;
