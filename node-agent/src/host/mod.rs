//! What stands on this host for its VMMs: their folders with the durable markers ([`store`]), their processes
//! ([`process`]) and what these may take ([`cgroup`]), their seed disks ([`seed`]), and their volumes' files, which other hosts share ([`volumes`]).

pub mod cgroup;
pub mod copy;
pub mod image;
pub mod process;
pub mod seed;
pub mod snapshots;
pub mod store;
pub mod volumes;
