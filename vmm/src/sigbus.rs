//! What is said when a page of guest memory cannot be had: a write to it through its mapping is then no error but a signal, SIGBUS,
//! which ends the process.
//!
//! What a target receives never comes to that: it goes through the file ([`crate::memory`]), and a vCPU's own access is KVM's affair. What is left
//! are the VMM's own few accesses on behalf of a running guest. There is nothing to go on with; but the log says why, and so does the
//! agent, which reads it.

#![allow(
    unsafe_code,
    reason = "a signal's handler is set, and writes a line without a lock"
)]

use nix::libc;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

const NO_MEMORY: &[u8] =
    b"ERROR guest memory: the host has no memory left for a page that this VMM touched (memory_exhausted)\n";
const BROKEN_MEMORY: &[u8] =
    b"ERROR guest memory: the host's memory is broken where this VMM touched it (SIGBUS)\n";

/// From now on a SIGBUS says in the log why this process ends.
pub fn say_why() -> nix::Result<()> {
    let flags = SaFlags::SA_SIGINFO | SaFlags::SA_RESETHAND;
    let action = SigAction::new(SigHandler::SigAction(told), flags, SigSet::empty());
    // SAFETY: the handler calls nothing but write(2), which is safe in one (signal-safety(7)), and touches no memory but its own.
    unsafe { sigaction(Signal::SIGBUS, &action) }.map(drop)
}

/// When it returns the access is tried again, and the process ends by the signal as it would have without a handler.
extern "C" fn told(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid pointer.
    let code = unsafe { (*info).si_code };
    let line = if code == libc::BUS_ADRERR {
        NO_MEMORY
    } else {
        BROKEN_MEMORY
    };
    // SAFETY: the line is valid for its length. What cannot be written is lost.
    let _ = unsafe { libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), line.len()) };
}
