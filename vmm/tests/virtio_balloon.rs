//! A balloon against a driver without a guest: pages given up, taken back and reported, and every way to break the rules.

#![allow(clippy::unwrap_used, reason = "a test may, its helpers too")]

#[path = "common/balloon.rs"]
mod balloon;
#[path = "common/driver.rs"]
mod driver;

use balloon::{Ballooned, DEFLATE, F_REPORTING, INFLATE, PAGE, REPORT};
use driver::{DATA, MEMORY_BYTES, Part};
use drover_migration::vm::PageSet;
use drover_vmm::devices::pci::PciDevice;
use drover_vmm::devices::pci::bus::Bus;
use drover_vmm::devices::saved::{self, SavedDevice, SavedPci};
use drover_vmm::devices::virtio::balloon::Target;
use drover_vmm::devices::virtio::transport::status;
use drover_vmm::time::{NS_PER_S, boottime_ns};
use drover_vmm::uffd::Uffd;
use proptest::prelude::*;

/// The first of the pages that tests give up, beyond rings and data.
const FIRST: u32 = 1024;

fn page_of(gpa: u64) -> u32 {
    u32::try_from(gpa / PAGE).unwrap()
}

/// Fills pages with something.
fn fill(made: &Ballooned, pages: impl IntoIterator<Item = u32>) {
    for page in pages {
        made.rig.write(u64::from(page) * PAGE, &[7; 4096]);
    }
}

fn written(made: &Ballooned) -> PageSet {
    let mut set = PageSet::empty(MEMORY_BYTES / PAGE);
    made.rig.memory.take_written(&mut set);
    set
}

fn config(made: &Ballooned) -> [u32; 4] {
    let mut bytes = [0xee; 16];
    made.rig.device.bar_read(0, 0x2000, &mut bytes);
    let word = |at: usize| u32::from_le_bytes(bytes[4 * at..][..4].try_into().unwrap());
    [0, 1, 2, 3].map(word)
}

fn set_actual(made: &Ballooned, pages: u32) {
    made.rig.device.bar_write(0, 0x2004, &pages.to_le_bytes());
}

#[test]
fn pages_that_are_given_up_become_holes_that_count_as_written_and_read_as_zero_when_they_are_taken_back() {
    let mut made = Ballooned::driven();
    fill(&made, FIRST..FIRST + 20);
    written(&made);
    // In any order, one of them twice, and once more in another request.
    made.request(INFLATE, &[FIRST + 9, FIRST + 1, FIRST, FIRST + 9, FIRST + 2]);
    made.request(INFLATE, &[FIRST + 9]);
    let gone = [0, 1, 2, 9].map(|page| FIRST + page);
    let seen = written(&made);
    for page in FIRST..FIRST + 20 {
        assert_eq!(made.is_hole(page), gone.contains(&page), "{page}");
        assert_eq!(seen.contains(page.into()), gone.contains(&page), "{page}");
    }
    made.request(DEFLATE, &[FIRST + 9, FIRST + 15]);
    assert!(made.is_hole(FIRST + 9) && !made.is_hole(FIRST + 15));
    assert_eq!(made.rig.read(u64::from(FIRST + 9) * PAGE, 4096), [0; 4096]);
    assert_eq!(made.rig.read(u64::from(FIRST + 15) * PAGE, 4096), [7; 4096]);
    assert_eq!(made.rig.status(), 15);
}

#[test]
fn of_what_is_reported_free_whole_pages_become_holes_by_whichever_queue_it_comes() {
    for queue in [2, 3, REPORT] {
        let mut made = Ballooned::driven();
        fill(&made, FIRST..FIRST + 20);
        written(&made);
        let at = u64::from(FIRST) * PAGE;
        let len = u32::try_from(PAGE).unwrap();
        let parts: [Part; 3] = [
            (at, 2 * len, true),
            (at + 4 * PAGE + 1, 2 * len, true),
            (at + 9 * PAGE, len - 1, true),
        ];
        made.rings[queue].submit(&made.rig, 0, &parts);
        assert_eq!(
            (made.rig.run(), made.rings[queue].used(&made.rig)),
            (1, vec![(0, 0)])
        );
        let gone = [0, 1, 5].map(|page| FIRST + page);
        let seen = written(&made);
        for page in FIRST..FIRST + 20 {
            assert_eq!(made.is_hole(page), gone.contains(&page), "queue {queue}, {page}");
            assert_eq!(seen.contains(page.into()), gone.contains(&page));
        }
    }
}

#[test]
fn every_broken_rule_makes_the_device_ask_for_a_reset_and_costs_no_page() {
    let numbers = |pages: &[u32]| -> Vec<u8> { pages.iter().flat_map(|page| page.to_le_bytes()).collect() };
    let outside = page_of(MEMORY_BYTES);
    let good = numbers(&[FIRST]);
    let mut many = vec![0; 65_540];
    many[..4].copy_from_slice(&good);
    let cases: [(&str, usize, Vec<u8>, &[Part]); 8] = [
        (
            "beyond memory",
            INFLATE,
            numbers(&[FIRST, outside]),
            &[(DATA, 8, false)],
        ),
        (
            "far beyond",
            INFLATE,
            numbers(&[FIRST, u32::MAX]),
            &[(DATA, 8, false)],
        ),
        (
            "no whole number",
            INFLATE,
            good.clone(),
            &[(DATA, 4, false), (DATA, 3, false)],
        ),
        ("too many", INFLATE, many, &[(DATA, 65_540, false)]),
        (
            "to be written",
            INFLATE,
            good.clone(),
            &[(DATA, 4, false), (DATA, 4, true)],
        ),
        (
            "beyond memory, taken back",
            DEFLATE,
            numbers(&[outside]),
            &[(DATA, 4, false)],
        ),
        (
            "taken back, to be written",
            DEFLATE,
            good.clone(),
            &[(DATA, 4, true)],
        ),
        (
            "a report to be read",
            REPORT,
            good,
            &[(DATA, 4, false), (4096 * FIRST as u64, 4096, true)],
        ),
    ];
    for (what, queue, bytes, parts) in cases {
        let mut made = Ballooned::driven();
        fill(&made, [FIRST]);
        made.rig.write(DATA, &bytes);
        made.rings[queue].submit(&made.rig, 0, parts);
        made.rig.run();
        assert_eq!(
            made.rig.status() & status::NEEDS_RESET,
            status::NEEDS_RESET,
            "{what}"
        );
        assert!(!made.is_hole(FIRST), "{what}");
        made.start_without(0);
        made.request(INFLATE, &[FIRST]);
        assert!(made.is_hole(FIRST), "{what}: it works again after a reset");
    }
}

#[test]
fn a_report_that_was_not_agreed_breaks_the_device() {
    let mut made = Ballooned::new();
    made.start_without(F_REPORTING);
    fill(&made, [FIRST]);
    made.rings[REPORT].submit(&made.rig, 0, &[(u64::from(FIRST) * PAGE, 4096, true)]);
    made.rig.run();
    assert!(made.rig.status() & status::NEEDS_RESET != 0 && !made.is_hole(FIRST));
}

#[test]
fn the_driver_reads_its_target_and_says_what_it_has_and_an_older_wish_comes_too_late() {
    let made = Ballooned::driven();
    let target = |pages, revision| Target { pages, revision };
    assert_eq!(config(&made), [0; 4]);
    assert!(made.balloon.set_target(target(300, 4)));
    assert!(!made.balloon.set_target(target(5, 3)));
    made.rig.device.config_changed();
    assert_eq!(made.rig.interrupts(), [0]);
    set_actual(&made, 0x0102_0304);
    assert_eq!(config(&made), [300, 0x0102_0304, 0, 0]);
    // The target is the host's, and nothing else is there.
    made.rig.device.bar_write(0, 0x2000, &[9; 4]);
    made.rig.device.bar_write(0, 0x2008, &[9; 8]);
    made.rig.device.bar_write(0, 0x2005, &[0xaa]);
    made.rig.device.bar_write(0, 0x2fff, &[9; 4]);
    assert_eq!(config(&made), [300, 0x0102_aa04, 0, 0]);
    made.rig.set(20, &[0]);
    assert_eq!(
        config(&made),
        [300, 0, 0, 0],
        "a driver that is gone holds nothing"
    );
}

#[test]
fn past_the_deadline_no_page_is_given_up() {
    let mut made = Ballooned::driven();
    fill(&made, [FIRST]);
    made.rig.gate.open(boottime_ns() - NS_PER_S).unwrap();
    made.offer(INFLATE, &[FIRST]);
    assert_eq!((made.rig.run(), made.is_hole(FIRST)), (0, false));
    made.rig.gate.open(u64::MAX).unwrap();
    assert_eq!((made.rig.run(), made.is_hole(FIRST)), (1, true));
}

#[test]
fn while_memory_is_kept_whole_no_page_is_given_up() {
    let mut made = Ballooned::driven();
    fill(&made, [FIRST]);
    made.rig.memory.keep_whole(true);
    made.offer(INFLATE, &[FIRST]);
    assert_eq!((made.rig.run(), made.is_hole(FIRST)), (0, false));
    made.rig.memory.keep_whole(false);
    assert_eq!((made.rig.run(), made.is_hole(FIRST)), (1, true));
    // Whoever keeps it whole waits for the request that is under way.
    let memory = made.rig.memory.clone();
    let giving_up = memory.giving_up().unwrap();
    let kept = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            memory.keep_whole(true);
            kept.store(true, std::sync::atomic::Ordering::SeqCst);
        });
        while memory.giving_up().is_some() {
            std::thread::yield_now();
        }
        assert!(!kept.load(std::sync::atomic::Ordering::SeqCst));
        drop(giving_up);
    });
    assert!(memory.giving_up().is_none());
}

#[test]
fn while_missing_pages_are_waited_for_none_is_made_missing_and_the_balloon_can_still_be_emptied() {
    let uffd = match Uffd::open() {
        Ok(uffd) => uffd,
        Err(fault) => return println!("SKIPPED: {fault}"),
    };
    let mut made = Ballooned::driven();
    fill(&made, FIRST..FIRST + 2);
    made.offer(INFLATE, &[FIRST]);
    made.rings[REPORT].submit(&made.rig, 0, &[(u64::from(FIRST + 1) * PAGE, 4096, true)]);
    made.rings[DEFLATE].submit(&made.rig, 0, &[(DATA, 4, false)]);
    made.rig.memory.watch(&uffd).unwrap();
    assert_eq!(made.rig.run(), 1);
    assert_eq!(made.rings[DEFLATE].used(&made.rig).len(), 1);
    assert!(!made.is_hole(FIRST) && !made.is_hole(FIRST + 1));
    made.rig.memory.unwatch(&uffd).unwrap();
    assert_eq!(made.rig.run(), 2);
    assert!(made.is_hole(FIRST) && made.is_hole(FIRST + 1));
}

#[test]
fn a_balloon_goes_on_in_another_vmm_with_what_was_asked_of_it_and_requests_that_nobody_had_begun() {
    let mut source = Ballooned::driven();
    source.balloon.set_target(Target {
        pages: 300,
        revision: 4,
    });
    source.rig.device.config_changed();
    set_actual(&source, 17);
    fill(&source, FIRST..FIRST + 3);
    source.request(INFLATE, &[FIRST]);
    source.rig.gate.close(true);
    source.offer(INFLATE, &[FIRST + 1]);
    assert_eq!(source.rig.run(), 0);
    let pci = SavedPci {
        bus: Bus::new().save(),
        devices: [(31, source.rig.device.save())].into(),
    };
    let pci = saved::decode(saved::encode(&pci)).unwrap();
    assert!(!pci.is_counted());
    assert_eq!(pci.devices[&31].device.device_model(), 5);

    let mut target = Ballooned::new();
    let memory = source.rig.read(0, usize::try_from(MEMORY_BYTES).unwrap());
    target.rig.write(0, &memory);
    target.rings = source.rings.clone();
    target.rig.device.restore(&pci.devices[&31]).unwrap();
    assert_eq!(config(&target), [300, 17, 0, 0]);
    assert_eq!(target.balloon.level().target.revision, 4);
    // Of the change that may have been missed, and of each queue.
    assert_eq!(target.rig.interrupts(), [0, 1, 2, 3, 4, 5]);
    assert_eq!((target.rig.run(), target.is_hole(FIRST + 1)), (1, true));
    assert!(!target.is_hole(FIRST + 2));

    let mut other = pci.devices[&31].clone();
    let SavedDevice::Balloon(saved) = &mut other.device else {
        panic!("{other:?}");
    };
    saved.target_pages = page_of(MEMORY_BYTES) + 1;
    assert!(
        target
            .rig
            .device
            .restore(&other)
            .unwrap_err()
            .contains("4097 pages")
    );
    other.device = SavedDevice::Rng;
    assert!(target.rig.device.restore(&other).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever a driver gives up, exactly that is a hole and counts as written, and everything else is as it was.
    #[test]
    fn exactly_what_is_given_up_is_gone(
        requests in proptest::collection::vec(proptest::collection::vec(0u32..64, 1..20), 1..6),
        reports in proptest::collection::vec((0u64..0x4_0000, 1u32..0x8000), 0..6),
    ) {
        let mut made = Ballooned::driven();
        let all = FIRST..FIRST + 128;
        fill(&made, all.clone());
        written(&made);
        let mut gone = std::collections::BTreeSet::new();
        for request in &requests {
            let pages: Vec<u32> = request.iter().map(|page| FIRST + page).collect();
            made.request(INFLATE, &pages);
            gone.extend(pages);
        }
        for (offset, len) in reports {
            let at = u64::from(FIRST + 64) * PAGE + offset;
            let len = u64::from(len).min(0x4_0000 - offset);
            made.rings[REPORT].submit(&made.rig, 0, &[(at, u32::try_from(len).unwrap(), true)]);
            prop_assert_eq!(made.rig.run(), 1);
            gone.extend(page_of(at.next_multiple_of(PAGE))..page_of(at + len).max(page_of(at.next_multiple_of(PAGE))));
        }
        let seen = written(&made);
        for page in all {
            prop_assert_eq!(made.is_hole(page), gone.contains(&page), "{}", page);
            prop_assert_eq!(seen.contains(page.into()), gone.contains(&page), "{}", page);
        }
    }
}
