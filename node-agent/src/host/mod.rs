//! What stands on this host for its VMMs: their folders with the durable markers ([`store`]) and their processes
//! ([`process`]).

pub mod process;
pub mod store;
