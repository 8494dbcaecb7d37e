//! One virtual machine: KVM, vCPUs, memory, devices, and the right to run them.
//!
//! ```text
//!   agent ── Unix socket ──► control ──► machine ──► right     may the vCPUs execute?  (pure)
//!                                          │
//!                            outgoing ─────┼───────► vm        the parts below, as one thing that
//!                            incoming ─────┘          │        can be paused, saved and restored
//!                                                     ├── memory · dirty · reclaim
//!                                                     ├── cpu (profile, state, clock) · vcpu (threads)
//!                                                     ├── boot (kernel images)
//!                                                     └── devices (serial console, power ports, PCI with virtio)
//! ```
//!
//! All of it in a [`sandbox`]: what it needs is opened before ([`opened`]), or handed in by the agent.
//!
//! Threads, not async: one a vCPU, one that watches the lease, one for a migration; the control socket alone is served by
//! a small async runtime on its own thread. Whatever a guest can do is hostile input: it becomes a state with a reason,
//! never the end of the process.

pub mod abi;
pub mod backing;
pub mod boot;
pub mod caps;
pub mod config;
pub mod control;
pub mod cpu;
pub mod devices;
pub mod dirty;
mod fd;
pub mod forecast;
pub mod incoming;
pub mod irqchip;
pub mod machine;
pub mod memory;
pub mod opened;
pub mod outgoing;
pub mod reclaim;
pub mod right;
pub mod sandbox;
pub mod save;
pub mod sigbus;
pub mod snapshot;
pub mod throttle;
pub mod time;
pub mod uffd;
pub mod vcpu;
pub mod version;
pub mod vm;

/// Version of the save-state this build writes; it reads every version up to it.
pub const DEVICE_MODEL: u32 = 6;
