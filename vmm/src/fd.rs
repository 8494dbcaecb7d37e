//! Descriptors of types that give only raw ones.
#![allow(unsafe_code, reason = "a raw descriptor is lent")]

use std::os::fd::{AsRawFd, BorrowedFd};

/// The descriptor of `of`, which owns it.
pub fn lend<T: AsRawFd>(of: &T) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as its owner is borrowed.
    unsafe { BorrowedFd::borrow_raw(of.as_raw_fd()) }
}
