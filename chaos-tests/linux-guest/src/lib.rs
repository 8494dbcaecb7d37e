//! A stock Debian kernel under `drover-vmm`, on a machine that may have no hardware virtualization of its own.
//!
//! ```text
//!  this machine                 emulated host (QEMU, SVM in software)              guest
//!  tests/linux_guest.rs         busybox /init, kvm-amd, driver (src/driver)        Debian kernel, busybox shell
//!    kernel::Kernel  ---------> initramfs: driver, drover-vmm, libraries,  ------> vmlinuz + initrd
//!    archive::Archive           the guest's kernel and initrd                          |
//!    host::run  <-- report::Report, a line each on the outer serial console -- its serial console
//! ```
//!
//! The driver plays agent and controller for two `drover-vmm` processes: it gives the grants and tells the outcome. What a whole
//! cluster does about a migration is not tested here (see `chaos-tests/cluster`), nor is speed: every number of an emulated host is its own.

pub mod archive;
pub mod host;
pub mod kernel;
pub mod report;
