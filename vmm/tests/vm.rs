//! A VM on real KVM with the probe guest: boot, pause, dirty log, save and restore.

#![allow(clippy::unwrap_used, reason = "a test may, its helpers too")]

mod common;

use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use common::{PATIENCE, assert_intact, await_console, empty_vm, has_seconds, probe_vm, probe_vm_of, seconds};
use drover_migration::vm::PageSet;
use drover_proto::Code;
use drover_vmm::boot;
use drover_vmm::boot::start::Entry;
use drover_vmm::cpu::profile::Profile;
use drover_vmm::save;
use drover_vmm::time::{NS_PER_S, boottime_ns};
use drover_vmm::vm::Vm;

const FOREVER: u64 = u64::MAX;

fn copy_memory(from: &Vm, to: &Vm) {
    let mut page = vec![0; 1 << 20];
    for chunk in 0..from.memory().bytes() >> 20 {
        from.memory().read_pages(chunk * 256, &mut page).unwrap();
        to.memory().write_pages(chunk * 256, &page).unwrap();
    }
}

#[test]
fn the_probe_boots_and_finds_its_memory_intact() {
    needs_kvm!();
    let vm = probe_vm(1, "own=16M");
    vm.resume(FOREVER);
    let text = await_console(vm.console(), "second line", has_seconds(2));
    assert!(text.contains("probe up cpus=1"), "{text}");
    assert!(text.contains("clock=kvmclock"), "{text}");
    assert!(*seconds(&text, "written").last().unwrap() > 0);
    assert_intact(&text);
}

/// `inc dword ptr [COUNTER]; jmp` back to it, in 32-bit code: a guest that never leaves by itself.
const COUNT_FOR_EVER: [u8; 8] = [0xff, 0x05, 0, 0, 0x20, 0, 0xeb, 0xf8];
const CODE_PAGE: u64 = 0x100;
const COUNTER_PAGE: u64 = 0x200;

/// A VM that counts.
fn counting_vm() -> Vm {
    let vm = empty_vm(1);
    let mut code = vec![0; 4096];
    code[..COUNT_FOR_EVER.len()].copy_from_slice(&COUNT_FOR_EVER);
    vm.memory().write_pages(CODE_PAGE, &code).unwrap();
    let entry = CODE_PAGE * 4096;
    vm.boot(Profile::Baseline, Entry::Pvh { entry }).unwrap();
    vm
}

fn counter(vm: &Vm) -> u32 {
    let mut page = vec![0; 4096];
    vm.memory().read_pages(COUNTER_PAGE, &mut page).unwrap();
    u32::from_le_bytes(page[..4].try_into().unwrap())
}

fn await_counting(vm: &Vm, from: u32) {
    let began = Instant::now();
    while counter(vm) == from {
        assert!(began.elapsed() < PATIENCE, "the guest does not count");
        std::thread::yield_now();
    }
}

#[test]
fn a_vcpu_leaves_a_guest_that_never_exits_at_the_deadline_with_nobody_to_stop_it() {
    needs_kvm!();
    let vm = Arc::new(counting_vm());
    vm.resume(boottime_ns() + NS_PER_S);
    // Held back it is mostly at rest when the deadline comes.
    for throttle in [0, 0, 99] {
        vm.throttle(throttle);
        await_counting(&vm, counter(&vm));
        // The lease is prolonged while it executes.
        let deadline = boottime_ns() + 2 * NS_PER_S;
        vm.resume(deadline);
        // Saving waits until the vCPU is out.
        let (out, seen) = mpsc::channel();
        let saver = vm.clone();
        std::thread::spawn(move || out.send((saver.save().map(drop), boottime_ns())));
        let (saved, at) = seen.recv_timeout(PATIENCE).expect("the vCPU leaves");
        saved.unwrap();
        assert!(at >= deadline, "out before the prolonged lease was over");
        vm.resume(boottime_ns() + 2 * NS_PER_S);
    }
}

/// How far the guest counts in a tenth of a second of the host's.
fn counted(vm: &Vm) -> u32 {
    let before = counter(vm);
    let until = boottime_ns() + NS_PER_S / 10;
    while boottime_ns() < until {
        std::thread::sleep(Duration::from_millis(1));
    }
    counter(vm).wrapping_sub(before)
}

#[test]
fn a_throttled_guest_gets_its_share_and_all_of_the_time_when_it_is_let_go() {
    needs_kvm!();
    let vm = counting_vm();
    vm.resume(FOREVER);
    await_counting(&vm, counter(&vm));
    // By turns, so that whatever else the host does slows both.
    let (mut free, mut throttled) = (0, 0);
    for _ in 0..20 {
        vm.throttle(97);
        assert_eq!(vm.throttled(), 97);
        throttled += counted(&vm);
        vm.throttle(0);
        free += counted(&vm);
    }
    assert!(
        throttled > 0 && throttled < free / 2,
        "{throttled} of {free} in 3 % of the time"
    );
}

#[test]
fn a_throttled_guest_makes_progress_and_stands_still_when_it_is_paused() {
    needs_kvm!();
    let vm = counting_vm();
    for percent in [1, 50, 99] {
        vm.throttle(percent);
        for _ in 0..30 {
            vm.resume(FOREVER);
            await_counting(&vm, counter(&vm));
            vm.pause();
            let at = counter(&vm);
            vm.save().unwrap();
            assert_eq!(counter(&vm), at, "a paused guest counted");
        }
    }
}

#[test]
fn two_vcpus_both_work() {
    needs_kvm!();
    let vm = probe_vm(2, "own=16M cpus=2");
    vm.resume(FOREVER);
    let text = await_console(vm.console(), "second line", has_seconds(2));
    assert!(text.contains("probe up cpus=2"), "{text}");
    assert_intact(&text);
}

#[test]
fn an_elf_without_a_pvh_note_is_entered_by_the_linux_protocol() {
    needs_kvm!();
    let mut kernel = std::fs::read(common::probe()).unwrap();
    let headers = u64::from_le_bytes(kernel[32..40].try_into().unwrap()) as usize;
    let count = usize::from(u16::from_le_bytes([kernel[56], kernel[57]]));
    for header in (0..count).map(|index| headers + index * 56) {
        // PT_NOTE becomes PT_NULL.
        if kernel[header..header + 4] == [4, 0, 0, 0] {
            kernel[header] = 0;
        }
    }
    let vm = empty_vm(1);
    let entry = boot::load_bytes(vm.memory(), &kernel, None, "own=1M", 1).unwrap();
    assert!(matches!(entry, boot::start::Entry::Linux64 { .. }));
    vm.boot(Profile::Baseline, entry).unwrap();
    vm.resume(FOREVER);
    assert_intact(&await_console(vm.console(), "first line", has_seconds(1)));
}

#[test]
fn a_paused_guest_writes_nothing_and_resumes_where_it_was() {
    needs_kvm!();
    let vm = probe_vm(2, "own=16M");
    vm.resume(FOREVER);
    await_console(vm.console(), "first line", has_seconds(1));
    for _ in 0..20 {
        vm.start_dirty_log().unwrap();
        vm.pause();
        let mut dirty = PageSet::empty(vm.memory().pages());
        vm.take_dirty(&mut dirty).unwrap();
        let mut later = PageSet::empty(vm.memory().pages());
        vm.take_dirty(&mut later).unwrap();
        assert_eq!(later.count(), 0, "a paused guest wrote");
        vm.stop_dirty_log().unwrap();
        vm.announce_pause();
        vm.resume(FOREVER);
    }
    let before = seconds(&common::text(vm.console()), "t").len();
    let text = await_console(vm.console(), "next line", has_seconds(before + 2));
    assert_intact(&text);
}

#[test]
fn the_dirty_log_finds_what_the_guest_and_the_vmm_write() {
    needs_kvm!();
    let vm = probe_vm(1, "own=16M hot=4M");
    vm.resume(FOREVER);
    await_console(vm.console(), "first line", has_seconds(1));
    vm.start_dirty_log().unwrap();
    let mut pages = vec![0; vm.memory().bytes() as usize];
    vm.memory().read_pages(0, &mut pages).unwrap();
    let seen = seconds(&common::text(vm.console()), "t").len();
    await_console(vm.console(), "next line", has_seconds(seen + 1));
    let mut dirty = PageSet::empty(vm.memory().pages());
    vm.look_dirty(&mut dirty).unwrap();
    let looked_at = dirty.clone();
    assert!(dirty.count() > 0, "the guest writes, and a look saw nothing");
    vm.pause();
    let own = vm.memory().pages() - 1;
    vm.memory().write_pages(own, &[0xa5; 4096]).unwrap();
    // What was only looked at must be in one of the two.
    vm.take_dirty(&mut dirty).unwrap();
    vm.stop_dirty_log().unwrap();
    assert!(dirty.count() >= looked_at.count());
    let is_dirty = |page: usize| dirty.words[page / 64] >> (page % 64) & 1 == 1;
    assert!(is_dirty(own as usize), "the VMM's own write was missed");
    let mut now = vec![0; pages.len()];
    vm.memory().read_pages(0, &mut now).unwrap();
    for (page, (old, new)) in pages.chunks(4096).zip(now.chunks(4096)).enumerate() {
        assert!(
            old == new || is_dirty(page),
            "page {page} changed and is not in the log"
        );
    }
    let hot = 4 << 20 >> 12;
    assert!(
        (hot..4 * hot).contains(&dirty.count()),
        "{} pages for {hot} hot ones",
        dirty.count()
    );
}

/// More than is protected again in one call.
#[test]
fn the_log_of_a_larger_memory_begins_anew_everywhere() {
    needs_kvm!();
    let vm = probe_vm_of(1, 700, "own=600M hot=600M rate=40000 pattern=uniform");
    vm.resume(FOREVER);
    // By the guest's own word: lines of its seconds may be due at once after a pause.
    let many_writes = || {
        let written = |text: &str| seconds(text, "written").last().copied().unwrap_or(0);
        let before = written(&common::text(vm.console()));
        await_console(vm.console(), "20,000 more pages", |text| {
            written(text) > before + 20_000
        });
    };
    many_writes();
    vm.start_dirty_log().unwrap();
    many_writes();
    vm.pause();
    let mut first = PageSet::empty(vm.memory().pages());
    vm.take_dirty(&mut first).unwrap();
    let mut before = vec![0; vm.memory().bytes() as usize];
    vm.memory().read_pages(0, &mut before).unwrap();
    vm.resume(FOREVER);
    many_writes();
    vm.pause();
    let mut second = PageSet::empty(vm.memory().pages());
    vm.take_dirty(&mut second).unwrap();
    let (mut now, mut unchanged) = (vec![0; 4096], 0);
    for (page, old) in before.chunks(4096).enumerate() {
        vm.memory().read_pages(page as u64, &mut now).unwrap();
        let is_in = |set: &PageSet| set.words[page / 64] >> (page % 64) & 1 == 1;
        assert!(
            old == now || is_in(&second),
            "page {page} changed and is not in the log"
        );
        unchanged += u64::from(old == now && is_in(&first) && is_in(&second));
    }
    let counts = (first.count(), second.count());
    assert!(counts.0 > 1_000 && counts.1 > 1_000, "{counts:?}");
    // The guest's own tables may be written with what they held.
    assert!(
        unchanged < 100,
        "{unchanged} pages of the first look are still in the log"
    );
}

#[test]
fn a_saved_guest_goes_on_in_another_vm_with_its_clock_and_its_console() {
    needs_kvm!();
    for vcpus in [1, 2] {
        let source = probe_vm(vcpus, &format!("own=16M cpus={vcpus}"));
        source.resume(FOREVER);
        await_console(source.console(), "second line", has_seconds(2));
        source.pause();
        let bytes = save::encode(&source.save().unwrap());
        let target = empty_vm(vcpus);
        copy_memory(&source, &target);
        target.restore_encoded(&bytes).unwrap();
        assert_eq!(target.console().next(), source.console().next());
        let before = seconds(&common::text(target.console()), "t").len();
        target.resume(FOREVER);
        let text = await_console(
            target.console(),
            "line after the restore",
            has_seconds(before + 2),
        );
        assert_intact(&text);
        let t = seconds(&text, "t");
        assert!(t.windows(2).all(|pair| pair[0] < pair[1]), "{text}");
    }
}

#[test]
fn a_guest_that_moved_on_can_be_saved_again_from_there() {
    needs_kvm!();
    let mut vm = probe_vm(1, "own=16M");
    for round in 1..=3 {
        vm.resume(FOREVER);
        await_console(vm.console(), "next line", has_seconds(round));
        vm.pause();
        let next = empty_vm(1);
        copy_memory(&vm, &next);
        next.restore(&vm.save().unwrap()).unwrap();
        vm = next;
    }
    vm.resume(FOREVER);
    assert_intact(&await_console(vm.console(), "last line", has_seconds(4)));
}

#[test]
fn what_is_typed_reaches_the_guest_before_and_after_a_move() {
    needs_kvm!();
    let source = probe_vm(1, "own=16M");
    source.resume(FOREVER);
    await_console(source.console(), "first line", has_seconds(1));
    assert_eq!(source.type_in(b"ping one\n"), 9);
    await_console(source.console(), "pong", |text| text.contains("probe pong one"));
    source.pause();
    assert_eq!(source.type_in(b"ping two\n"), 9);
    let target = empty_vm(1);
    copy_memory(&source, &target);
    target.restore(&source.save().unwrap()).unwrap();
    target.resume(FOREVER);
    await_console(target.console(), "pong", |text| text.contains("probe pong two"));
}

#[test]
fn a_state_of_another_shape_is_refused() {
    needs_kvm!();
    let source = probe_vm(1, "own=16M");
    let mut saved = source.save().unwrap();
    let fault = empty_vm(2).restore(&saved).unwrap_err();
    assert_eq!(fault.code, Code::BadState);
    saved.vcpus[0].msrs.push(save::msr_entry(0xdead_beef, 1));
    let fault = empty_vm(1).restore(&saved).unwrap_err();
    assert_eq!(fault.code, Code::BadState);
    assert!(fault.message.contains("0xdeadbeef"), "{}", fault.message);
}
