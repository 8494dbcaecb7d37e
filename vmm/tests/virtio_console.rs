//! A virtio console against a driver without a guest: what is typed and written, over moves too, and every way to break the rules.

#![allow(clippy::unwrap_used, reason = "a test may, its helpers too")]

#[path = "common/driver.rs"]
mod driver;
#[path = "common/port.rs"]
mod port;

use driver::{AVAILABLE, DATA, DESCRIPTORS, INDIRECT, MEMORY_BYTES, NEXT, Part, Rig, SIZE, USED, WRITE};
use drover_migration::vm::PageSet;
use drover_vmm::devices::console::SCROLLBACK_BYTES;
use drover_vmm::devices::pci::PciDevice;
use drover_vmm::devices::pci::bus::Bus;
use drover_vmm::devices::saved::{self, SavedConsole, SavedDevice, SavedPci};
use drover_vmm::devices::virtio::console::input::INPUT_BYTES_MAX;
use drover_vmm::devices::virtio::transport::status;
use drover_vmm::devices::virtio::{Device, Inlet};
use drover_vmm::time::{NS_PER_S, boottime_ns};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use port::{INPUT, OUTPUT, Ported};
use proptest::prelude::*;

/// Where the second queue's rings are.
const SECOND: u64 = 0x8000;

fn needs_reset(made: &Ported) -> bool {
    made.rig.status() & status::NEEDS_RESET != 0
}

fn input_waits(made: &Ported) -> bool {
    let mut fds = [PollFd::new(made.port.source(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).unwrap() == 1
}

/// What of it stands in a saved state.
fn saved_of(made: &Ported) -> SavedConsole {
    match made.rig.device.save().device {
        SavedDevice::Console(saved) => saved,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_written_stands_on_the_console_however_it_is_cut() {
    let mut made = Ported::driven();
    made.rig.write(OUTPUT, b"hello, world\n");
    let parts: [Part; 3] = [
        (OUTPUT, 1, false),
        (OUTPUT + 1, 11, false),
        (OUTPUT + 12, 1, false),
    ];
    made.transmit.submit(&made.rig, 0, &parts);
    assert_eq!((made.rig.run(), made.transmit.used(&made.rig)), (1, vec![(0, 0)]));
    assert_eq!(made.text(), b"hello, world\n");
    assert_eq!(made.rig.interrupts(), [2]);
    // In a table of its own.
    let table = DATA + 0x8000;
    made.rig.descriptor_at(table, OUTPUT, 5, NEXT, 1);
    made.rig.descriptor_at(table + 16, OUTPUT + 12, 1, 0, 0);
    made.transmit.submit(&made.rig, 3, &[(table, 32, false)]);
    made.rig
        .descriptor_at(DESCRIPTORS + SECOND + 48, table, 32, INDIRECT, 0);
    assert_eq!((made.rig.run(), made.transmit.used(&made.rig)), (1, vec![(3, 0)]));
    assert_eq!(made.text(), b"hello, world\nhello\n");
    assert_eq!(made.console.next(), 19);
}

#[test]
fn it_offers_nothing_but_two_queues_and_has_no_configuration() {
    let made = Ported::driven();
    assert_eq!(made.rig.offered(), 1 << 32 | 1 << 28);
    let mut id = [0; 12];
    made.rig.device.config_read(0, &mut id);
    assert_eq!(id[..4], [0xf4, 0x1a, 0x43, 0x10]);
    assert_eq!(id[8..], [1, 0, 0x80, 7]);
    let mut queues = [0; 2];
    made.rig.device.bar_read(0, 18, &mut queues);
    assert_eq!(u16::from_le_bytes(queues), 2);
    let mut config = [0xee; 16];
    made.rig.device.bar_read(0, 0x2000, &mut config);
    assert_eq!(config, [0; 16]);
}

#[test]
fn what_is_typed_goes_to_a_driver_that_has_given_buffers_and_to_nobody_before_or_after() {
    let mut made = Ported::new();
    assert_eq!(made.port.type_in(b"x"), None, "nobody drives it");
    made.start();
    made.rig.run();
    assert_eq!(made.port.type_in(b"x"), None, "it has given no buffer");
    made.give(4);
    assert_eq!(made.rig.run(), 0);
    assert_eq!(made.port.type_in(b"hello"), Some(5));
    assert!(input_waits(&made));
    assert_eq!((made.rig.run(), made.take().unwrap()), (1, b"hell".to_vec()));
    assert_eq!(made.rig.interrupts(), [1]);
    // Without a buffer it waits, and more behind it.
    assert_eq!((made.rig.run(), made.port.type_in(b" there")), (0, Some(6)));
    made.give(100);
    assert_eq!((made.rig.run(), made.take().unwrap()), (1, b"o there".to_vec()));
    assert!(!input_waits(&made));
    made.rig.set(20, &[0]);
    assert_eq!(made.port.type_in(b"x"), None, "its driver is gone");
}

#[test]
fn input_is_cut_to_buffers_and_only_what_came_is_written() {
    let mut made = Ported::driven();
    made.rig.write(INPUT, &[0xee; 64]);
    let parts: [Part; 3] = [(INPUT, 1, true), (INPUT + 8, 2, true), (INPUT + 16, 9, true)];
    made.receive.submit(&made.rig, 0, &parts);
    made.rig.run();
    made.port.type_in(b"abcde").unwrap();
    assert_eq!((made.rig.run(), made.receive.used(&made.rig)), (1, vec![(0, 5)]));
    for (at, want) in [(0, &b"a\xee"[..]), (8, b"bc\xee"), (16, b"de\xee\xee")] {
        assert_eq!(made.rig.read(INPUT + at, want.len()), want);
    }
    let mut seen = PageSet::empty(MEMORY_BYTES / 4096);
    made.rig.memory.take_written(&mut seen);
    assert!(
        seen.contains(INPUT / 4096),
        "a page that was written is not marked"
    );
}

#[test]
fn input_is_bounded_and_what_does_not_fit_is_not_accepted() {
    let mut made = Ported::driven();
    made.give(1);
    made.rig.run();
    assert_eq!(
        made.port.type_in(&[b'x'; INPUT_BYTES_MAX + 1]),
        Some(INPUT_BYTES_MAX)
    );
    assert_eq!(made.port.type_in(b"y"), Some(0));
    made.rig.run();
    assert_eq!(made.port.type_in(b"yz"), Some(1));
}

#[test]
fn input_that_a_driver_has_not_taken_waits_for_the_next_one() {
    let mut made = Ported::driven();
    made.give(2);
    made.rig.run();
    made.port.type_in(b"abc").unwrap();
    made.rig.run();
    assert_eq!(made.take().unwrap(), b"ab");
    made.start();
    made.give(9);
    assert_eq!((made.rig.run(), made.take().unwrap()), (1, b"c".to_vec()));
}

#[test]
fn every_broken_rule_makes_the_device_ask_for_a_reset_and_neither_writes_nor_takes_a_byte() {
    let far = MEMORY_BYTES - 4;
    let large = u32::try_from(SCROLLBACK_BYTES).unwrap() + 1;
    let cases: [(&str, bool, &[Part]); 9] = [
        ("to be written", false, &[(OUTPUT, 8, true)]),
        (
            "to be read and written",
            false,
            &[(OUTPUT, 8, false), (OUTPUT, 8, true)],
        ),
        ("too long", false, &[(OUTPUT, large, false)]),
        (
            "too long in all",
            false,
            &[(OUTPUT, large - 1, false), (OUTPUT, 1, false)],
        ),
        ("beyond memory", false, &[(OUTPUT, 8, false), (far, 8, false)]),
        ("empty", false, &[(OUTPUT, 0, false)]),
        ("input to be read", true, &[(INPUT, 8, false)]),
        (
            "input to be read and written",
            true,
            &[(INPUT, 8, false), (INPUT, 8, true)],
        ),
        ("input beyond memory", true, &[(INPUT, 1, true), (far, 8, true)]),
    ];
    for (what, input, parts) in cases {
        let mut made = Ported::driven();
        made.give(1);
        made.rig.run();
        made.port.type_in(b"abc").unwrap();
        made.rig.run();
        assert_eq!(made.take().unwrap(), b"a");
        made.rig.interrupts();
        let ring = if input {
            &mut made.receive
        } else {
            &mut made.transmit
        };
        ring.submit(&made.rig, 0, parts);
        made.rig.run();
        assert!(needs_reset(&made), "{what}");
        assert_eq!(made.rig.interrupts(), [0], "{what}");
        assert!(made.text().is_empty(), "{what}");
        assert!(
            !made.rig.device.has_driver(),
            "{what}: typing goes to the serial port"
        );
        made.start();
        made.give(9);
        made.offer(b"again");
        assert_eq!(made.rig.run(), 2, "{what}");
        assert_eq!(made.take().unwrap(), b"bc", "{what}");
        assert_eq!(made.text(), b"again", "{what}");
    }
}

#[test]
fn loops_and_indexes_out_of_range_break_it_in_either_queue() {
    type Break = fn(&Rig, u64, u16);
    let offer = |rig: &Rig, rings: u64, head: u16| {
        rig.write(AVAILABLE + rings + 4, &head.to_le_bytes());
        rig.write(AVAILABLE + rings + 2, &1u16.to_le_bytes());
    };
    let cases: [(&str, Break, u16); 5] = [
        (
            "a loop",
            |rig, rings, flags| {
                rig.descriptor_at(DESCRIPTORS + rings, DATA, 8, flags | NEXT, 1);
                rig.descriptor_at(DESCRIPTORS + rings + 16, DATA, 8, flags | NEXT, 0);
            },
            0,
        ),
        (
            "its own next",
            |rig, rings, flags| rig.descriptor_at(DESCRIPTORS + rings, DATA, 8, flags | NEXT, 0),
            0,
        ),
        (
            "a next out of range",
            |rig, rings, flags| rig.descriptor_at(DESCRIPTORS + rings, DATA, 8, flags | NEXT, u16::MAX),
            0,
        ),
        ("a head out of range", |_, _, _| {}, SIZE),
        (
            "a table within a table",
            |rig, rings, _| {
                rig.descriptor_at(DATA, DATA, 16, INDIRECT, 0);
                rig.descriptor_at(DESCRIPTORS + rings, DATA, 16, INDIRECT, 0);
            },
            0,
        ),
    ];
    for (what, break_rule, head) in cases {
        for (rings, flags) in [(0, WRITE), (SECOND, 0)] {
            let mut made = Ported::driven();
            made.give(1);
            made.rig.run();
            made.port.type_in(b"abc").unwrap();
            made.rig.run();
            made.start();
            break_rule(&made.rig, rings, flags);
            offer(&made.rig, rings, head);
            assert_eq!(made.rig.run(), 0, "{what}");
            assert!(needs_reset(&made), "{what}");
            assert_eq!(saved_of(&made).input, b"bc", "{what}");
        }
    }
    let mut made = Ported::driven();
    made.rig.write(AVAILABLE + SECOND + 2, &(SIZE + 1).to_le_bytes());
    made.rig.run();
    assert!(needs_reset(&made), "more chains than the queue has");
    made.start();
}

#[test]
fn past_the_deadline_and_while_the_vm_stands_nothing_is_written_or_given() {
    let mut made = Ported::driven();
    made.give(9);
    made.rig.run();
    made.port.type_in(b"in").unwrap();
    made.offer(b"out");
    made.rig.gate.open(boottime_ns() - NS_PER_S).unwrap();
    assert_eq!(made.rig.run(), 0, "past the deadline");
    made.rig.gate.close(true);
    assert_eq!(made.rig.run(), 0, "the VM stands");
    assert!(made.text().is_empty() && made.take().is_none());
    made.rig.gate.open(u64::MAX).unwrap();
    assert_eq!(made.rig.run(), 2);
    assert_eq!(
        (made.text(), made.take().unwrap()),
        (b"out".to_vec(), b"in".to_vec())
    );
}

#[test]
fn it_goes_on_in_another_vmm_with_what_was_typed_and_chains_that_nobody_had_begun() {
    let mut source = Ported::driven();
    source.give(1);
    source.offer(b"one ");
    source.rig.run();
    source.port.type_in(b"abc").unwrap();
    source.rig.run();
    assert_eq!(source.take().unwrap(), b"a");
    source.rig.gate.close(true);
    source.give(1);
    source.offer(b"two");
    assert_eq!(source.rig.run(), 0);
    let pci = SavedPci {
        bus: Bus::new().save(),
        devices: [(29, source.rig.device.save())].into(),
    };
    let decoded = saved::decode(saved::encode(&pci)).unwrap();
    assert_eq!(decoded, pci);
    let device = &decoded.devices[&29].device;
    assert_eq!(device.device_model(), 6);
    let SavedDevice::Console(saved) = device else {
        panic!("{device:?}");
    };
    assert_eq!((saved.input.as_slice(), saved.hears), (&b"bc"[..], true));

    let mut target = source.moved();
    assert!(input_waits(&target));
    assert_eq!(target.port.type_in(b"d"), Some(1), "before its worker has looked");
    // Of each queue: one may have been on its way.
    assert_eq!(target.rig.interrupts(), [1, 2]);
    assert_eq!(target.rig.run(), 2);
    assert_eq!(
        (target.text(), target.take().unwrap()),
        (b"one two".to_vec(), b"b".to_vec())
    );
    target.give(9);
    assert_eq!((target.rig.run(), target.take().unwrap()), (1, b"cd".to_vec()));

    // The migration is aborted: the source goes on from the same.
    source.rig.gate.open(u64::MAX).unwrap();
    assert_eq!(source.rig.run(), 2);
    assert_eq!(
        (source.text(), source.take().unwrap()),
        (b"one two".to_vec(), b"b".to_vec())
    );
    assert_eq!(saved_of(&source).input, b"c");
}

#[test]
fn another_devices_state_and_too_much_input_are_refused() {
    let made = Ported::driven();
    let mut saved = made.rig.device.save();
    saved.device = SavedDevice::Rng;
    assert!(
        made.rig
            .device
            .restore(&saved)
            .unwrap_err()
            .contains("no console")
    );
    let too_much = SavedConsole {
        input: vec![b'x'; INPUT_BYTES_MAX + 1],
        hears: true,
    };
    saved.device = SavedDevice::Console(too_much);
    assert!(
        made.rig
            .device
            .restore(&saved)
            .unwrap_err()
            .contains("4097 bytes")
    );
    let pci = SavedPci {
        bus: Bus::new().save(),
        devices: [(1, saved)].into(),
    };
    let refused = saved::decode(saved::encode(&pci)).unwrap_err();
    assert!(refused.contains("4097 bytes"), "{refused}");
    let SavedDevice::Console(kept) = made.port.save() else {
        panic!("no console");
    };
    assert!(kept.input.is_empty(), "a refused state was taken over");
}

/// What may happen to a console.
#[derive(Clone, Debug)]
enum Step {
    Type(Vec<u8>),
    Write(Vec<u8>),
    Give(u32),
    Work(usize),
    Move,
}

fn step() -> impl Strategy<Value = Step> {
    let bytes = || proptest::collection::vec(any::<u8>(), 1..40);
    prop_oneof![
        bytes().prop_map(Step::Type),
        bytes().prop_map(Step::Write),
        (1u32..30).prop_map(Step::Give),
        (0usize..4).prop_map(Step::Work),
        Just(Step::Move),
    ]
}

/// What the driver has of what was typed.
fn collect(made: &mut Ported, given: &mut bool, came: &mut Vec<u8>) {
    if let Some(bytes) = made.take() {
        came.extend(bytes);
        *given = false;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// In whatever order bytes are typed, written and given room, and the VM moves: all come, once, in their order.
    #[test]
    fn nothing_is_lost_or_doubled_over_moves(steps in proptest::collection::vec(step(), 1..40)) {
        let mut made = Ported::driven();
        let (mut typed, mut came, mut said) = (Vec::<u8>::new(), Vec::<u8>::new(), Vec::<u8>::new());
        let (mut given, mut writing) = (false, false);
        for step in steps {
            match step {
                Step::Type(bytes) => if let Some(taken) = made.port.type_in(&bytes) {
                    typed.extend(&bytes[..taken]);
                },
                Step::Write(bytes) if !writing => {
                    said.extend(&bytes);
                    made.offer(&bytes);
                    writing = true;
                }
                Step::Write(_) => {}
                Step::Give(room) if !given => {
                    made.give(room);
                    given = true;
                }
                Step::Give(_) => {}
                Step::Work(steps) => {
                    for _ in 0..steps {
                        made.rig.device.step();
                    }
                }
                Step::Move => {
                    made.rig.gate.close(true);
                    made = made.moved();
                }
            }
            writing &= made.transmit.used(&made.rig).is_empty();
            collect(&mut made, &mut given, &mut came);
        }
        made.rig.run();
        collect(&mut made, &mut given, &mut came);
        for _ in 0..=typed.len() {
            if !given {
                made.give(64);
                given = true;
            }
            made.rig.run();
            collect(&mut made, &mut given, &mut came);
        }
        prop_assert_eq!(came, typed);
        prop_assert_eq!(made.console.next(), said.len() as u64);
        prop_assert_eq!(made.text(), said);
    }

    #[test]
    fn whatever_stands_in_the_rings_the_device_ends_and_works_after_a_reset(
        descriptors in proptest::collection::vec((0u64..8, any::<u16>(), 0u16..8, 0u16..10), 2 * usize::from(SIZE)),
        heads in proptest::collection::vec(0u16..10, 2 * usize::from(SIZE)),
        indexes in any::<[u16; 2]>(),
        noise in proptest::collection::vec((0u64..0xd000, any::<u8>()), 0..40),
        typed in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        let mut made = Ported::driven();
        made.give(1);
        made.rig.run();
        made.port.type_in(&typed);
        let size = usize::from(SIZE);
        for (queue, index) in (0usize..2).zip(indexes) {
            let rings = SECOND * queue as u64;
            for (slot, &(place, len, flags, next)) in (0u64..).zip(&descriptors[queue * size..][..size]) {
                let gpa = [DATA, DATA + 0x1000, DESCRIPTORS, AVAILABLE, USED, MEMORY_BYTES - 64, u64::MAX - 7, 0][usize::try_from(place).unwrap()];
                made.rig.descriptor_at(DESCRIPTORS + rings + 16 * slot, gpa, len.into(), flags, next);
            }
            for (slot, head) in (0u64..).zip(&heads[queue * size..][..size]) {
                made.rig.write(AVAILABLE + rings + 4 + 2 * slot, &head.to_le_bytes());
            }
            made.rig.write(AVAILABLE + rings + 2, &(index % (2 * SIZE)).to_le_bytes());
        }
        for (at, byte) in noise {
            made.rig.write(DESCRIPTORS + at, &[byte]);
        }
        for _ in 0..4 * SIZE {
            made.rig.device.step();
        }
        let saved = made.rig.device.save();
        prop_assert!(Ported::new().rig.device.restore(&saved).is_ok());
        let before = made.console.next();
        made.start();
        made.offer(b"again");
        made.rig.run();
        prop_assert_eq!(made.console.next(), before + 5);
    }
}
