//! Which pages were written: KVM's dirty log, together with what the VMM wrote itself.
//!
//! Behind a trait, so that the ring can stand beside the bitmap. With manual protection a round costs
//! two steps, "which pages?" and "protect exactly those again", and the second does not stop the guest for long
//! (Linux, Documentation/virt/kvm/api.rst, 4.117 KVM_CLEAR_DIRTY_LOG and 7.18). Without it the first step does both.
//!
//! A page is protected again *before* it is read for sending, so a write during the read is found in the next round.

use drover_migration::vm::{PageSet, Region};
use drover_proto::{Code, Fault};
use kvm_ioctls::VmFd;

use crate::caps::Caps;
use crate::memory::{Memory, PAGE};
use crate::vm::set_slots;

/// Finds the pages written since it was last asked.
pub trait DirtyTracker: Send {
    /// The name that receipts show.
    fn name(&self) -> &'static str;
    /// Whether it is tracking.
    fn is_on(&self) -> bool;
    /// Starts tracking: from the return on every write is found.
    fn start(&mut self, vm: &VmFd, memory: &Memory) -> Result<(), Fault>;
    /// Ends tracking, if it was on.
    fn stop(&mut self, vm: &VmFd, memory: &Memory) -> Result<(), Fault>;
    /// Adds to `into` the pages written since the last call, and protects them again.
    fn take(&mut self, vm: &VmFd, memory: &Memory, into: &mut PageSet) -> Result<(), Fault>;
    /// The last `take`, of a VM whose vCPUs stand for a hand-over: nothing need be protected again.
    fn take_last(&mut self, vm: &VmFd, memory: &Memory, into: &mut PageSet) -> Result<(), Fault> {
        self.take(vm, memory, into)
    }
    /// Adds to `into` pages written since the last `take`. Unless a tracker can do better, that takes them, which is allowed: whoever
    /// looks keeps them in mind.
    fn look(&mut self, vm: &VmFd, memory: &Memory, into: &mut PageSet) -> Result<(), Fault> {
        self.take(vm, memory, into)
    }
}

/// Pages that are protected again in one call, a multiple of 64: 256 MiB.
const STEP_PAGES: usize = 1 << 16;

/// The dirty bitmap of every memory slot.
#[derive(Debug)]
pub struct Bitmap {
    manual_protect: bool,
    on: bool,
}

impl Bitmap {
    /// A tracker that uses what `caps` offers; manual protection must have been enabled on the VM.
    pub fn new(caps: &Caps) -> Self {
        Self {
            manual_protect: caps.manual_dirty_protect,
            on: false,
        }
    }
}

fn log_fault(what: &str, error: impl std::fmt::Display) -> Fault {
    Fault::new(Code::GuestKvmFailure, format!("dirty log: {what}: {error}"))
}

fn log_of(vm: &VmFd, slot: u32, region: &Region) -> Result<Vec<u64>, Fault> {
    let len = usize::try_from(region.len).expect("a mapped region fits the address space");
    vm.get_dirty_log(slot, len)
        .map_err(|error| log_fault("read", error))
}

/// Protects the pages set in `words` again, by [`STEP_PAGES`] and only where there are any: KVM holds its lock on the guest's page tables for
/// one call, and a vCPU that takes a fault meanwhile waits for it.
fn protect(vm: &VmFd, slot: u32, pages: u64, words: &[u64]) -> Result<(), Fault> {
    let steps = (0..pages).step_by(STEP_PAGES).zip(words.chunks(STEP_PAGES / 64));
    steps
        .filter(|(_, words)| words.iter().any(|&word| word != 0))
        .try_for_each(|(first, words)| {
            let pages = (pages - first).min(STEP_PAGES as u64);
            clear::clear_dirty_log(vm, slot, first, pages, words)
        })
        .map_err(|error| log_fault("protect", error))
}

impl DirtyTracker for Bitmap {
    fn name(&self) -> &'static str {
        "bitmap"
    }

    fn is_on(&self) -> bool {
        self.on
    }

    fn start(&mut self, vm: &VmFd, memory: &Memory) -> Result<(), Fault> {
        memory.forget_written();
        set_slots(vm, memory, true)?;
        self.on = true;
        Ok(())
    }

    fn stop(&mut self, vm: &VmFd, memory: &Memory) -> Result<(), Fault> {
        if self.on {
            set_slots(vm, memory, false)?;
            self.on = false;
        }
        Ok(())
    }

    fn take(&mut self, vm: &VmFd, memory: &Memory, into: &mut PageSet) -> Result<(), Fault> {
        let mut first = 0;
        for (slot, region) in (0u32..).zip(memory.pieces()) {
            let pages = region.len / PAGE;
            let words = log_of(vm, slot, region)?;
            if self.manual_protect {
                protect(vm, slot, pages, &words)?;
            }
            merge_at(&mut into.words, first, &words, pages);
            first += pages;
        }
        memory.take_written(into);
        Ok(())
    }

    /// With manual protection that is a step less.
    fn take_last(&mut self, vm: &VmFd, memory: &Memory, into: &mut PageSet) -> Result<(), Fault> {
        self.look(vm, memory, into)?;
        memory.take_written(into);
        Ok(())
    }

    /// With manual protection the log is only read: the pages stay in it, and the guest writes on without a fault.
    fn look(&mut self, vm: &VmFd, memory: &Memory, into: &mut PageSet) -> Result<(), Fault> {
        let mut first = 0;
        for (slot, region) in (0u32..).zip(memory.pieces()) {
            let pages = region.len / PAGE;
            merge_at(&mut into.words, first, &log_of(vm, slot, region)?, pages);
            first += pages;
        }
        Ok(())
    }
}

/// Adds the set `words` of `pages` pages to `into`, its first page becoming page `first`.
///
/// Bits of `words` beyond `pages` are ignored. Panics if `into` has no room for them all.
pub fn merge_at(into: &mut [u64], first: u64, words: &[u64], pages: u64) {
    let shift = first % 64;
    let start = usize::try_from(first / 64).expect("page sets fit the address space");
    let whole = usize::try_from(pages.div_ceil(64)).expect("page sets fit the address space");
    for (index, &word) in words.iter().enumerate().take(whole) {
        let left = pages - index as u64 * 64;
        let word = if left < 64 { word & ((1 << left) - 1) } else { word };
        if word == 0 {
            continue;
        }
        into[start + index] |= word << shift;
        if shift != 0 && word >> (64 - shift) != 0 {
            into[start + index + 1] |= word >> (64 - shift);
        }
    }
}

/// The one ioctl that `kvm-ioctls` does not wrap.
#[allow(unsafe_code, reason = "an ioctl that no crate wraps")]
mod clear {
    use std::io;

    use kvm_bindings::{KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1};
    use kvm_ioctls::VmFd;
    use vmm_sys_util::ioctl::ioctl_with_ref;
    use vmm_sys_util::ioctl_iowr_nr;

    ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);

    /// Protects the pages set in `words`, a bitmap of the slot's `pages` pages from `first` on, a multiple of 64, against unseen writes
    /// again.
    pub fn clear_dirty_log(vm: &VmFd, slot: u32, first: u64, pages: u64, words: &[u64]) -> io::Result<()> {
        assert!(
            words.len() as u64 >= pages.div_ceil(64),
            "the bitmap covers the pages"
        );
        let num_pages = u32::try_from(pages).map_err(io::Error::other)?;
        let log = kvm_clear_dirty_log {
            slot,
            num_pages,
            first_page: first,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
                dirty_bitmap: words.as_ptr().cast_mut().cast(),
            },
        };
        // SAFETY: the descriptor is a VM's; the kernel reads `num_pages` bits of the bitmap, which the assertion shows to be
        // there, and writes nothing.
        match unsafe { ioctl_with_ref(vm, KVM_CLEAR_DIRTY_LOG(), &log) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn members(words: &[u64]) -> BTreeSet<u64> {
        (0..words.len() as u64 * 64)
            .filter(|page| words[(page / 64) as usize] >> (page % 64) & 1 == 1)
            .collect()
    }

    proptest! {
        #[test]
        fn merging_moves_every_page_by_the_offset_and_keeps_what_was_there(
            before in proptest::collection::vec(any::<u64>(), 8),
            words in proptest::collection::vec(any::<u64>(), 4),
            first in 0u64..256,
            pages in 0u64..=256,
        ) {
            let mut into = before.clone();
            merge_at(&mut into, first, &words, pages);
            let mut want = members(&before);
            want.extend(members(&words).into_iter().filter(|&page| page < pages).map(|page| page + first));
            prop_assert_eq!(members(&into), want);
        }
    }
}
