//! The 64-bit entry of an ELF image by the Linux boot protocol. Everything else boots the probe through its PVH note.

#![allow(clippy::unwrap_used, reason = "a test may, its helpers too")]

mod common;

use common::{assert_intact, await_console, empty_vm, has_seconds, probe};
use drover_vmm::boot;
use drover_vmm::boot::start::Entry;
use drover_vmm::cpu::profile::Profile;

/// The note's name and data sizes, its type 18, and its name.
const PVH_NOTE: &[u8; 16] = b"\x04\0\0\0\x08\0\0\0\x12\0\0\0Xen\0";
const TYPE_AT: usize = 8;
const TYPE_UNKNOWN: u8 = 0x7f;

#[test]
fn an_elf_without_a_pvh_note_is_entered_in_64_bit_mode_with_memory_map_and_command_line() {
    needs_kvm!();
    let mut kernel = std::fs::read(probe()).unwrap();
    let at = kernel
        .windows(PVH_NOTE.len())
        .position(|window| window == PVH_NOTE)
        .unwrap();
    kernel[at + TYPE_AT] = TYPE_UNKNOWN;
    let vm = empty_vm(2);
    let entry = boot::load_bytes(vm.memory(), &kernel, None, "own=12M hot=4M cpus=2", 2).unwrap();
    assert!(matches!(entry, Entry::Linux64 { .. }));
    vm.boot(Profile::Baseline, entry).unwrap();
    vm.resume(u64::MAX);
    let text = await_console(vm.console(), "second line", has_seconds(2));
    assert!(text.contains("probe up cpus=2 own=3072 hot=1024"), "{text}");
    assert_intact(&text);
}
