//! A NIC against a driver without a guest: frames in and out, commands, announcements, and every way to break the rules.

#![allow(clippy::unwrap_used, reason = "a test may, its helpers too")]

#[path = "common/driver.rs"]
mod driver;
#[path = "common/nic.rs"]
mod nic;

use std::sync::Arc;

use driver::{DATA, MEMORY_BYTES, Part, SIZE};
use drover_migration::vm::PageSet;
use drover_vmm::devices::pci::PciDevice;
use drover_vmm::devices::saved::{self, SavedDevice, SavedPci};
use drover_vmm::devices::virtio::Device;
use drover_vmm::devices::virtio::net::{
    F_CSUM, F_GUEST_ANNOUNCE, F_GUEST_CSUM, F_GUEST_TSO4, F_GUEST_TSO6, F_HOST_TSO4, F_MRG_RXBUF,
    FRAME_BYTES_MAX, announce,
};
use drover_vmm::devices::virtio::pci::Work;
use drover_vmm::devices::virtio::transport::status;
use nic::{MAC, Nic};
use proptest::prelude::*;

const HEADER: usize = 12;

/// A frame with a header of zeroes.
fn frame(len: usize, seed: usize) -> Vec<u8> {
    let body = (0..len).map(|at| u8::try_from((at * 7 + seed) % 251).unwrap());
    [0; HEADER].into_iter().chain(body).collect()
}

/// The same with the number of chains it lies in.
fn in_chains(mut frame: Vec<u8>, chains: u16) -> Vec<u8> {
    frame[10..HEADER].copy_from_slice(&chains.to_le_bytes());
    frame
}

fn buffer(index: u64) -> u64 {
    DATA + 0x2_0000 * index
}

fn len32(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).unwrap()
}

fn config(nic: &Nic) -> Vec<u8> {
    let mut config = vec![0; 16];
    nic.rig.device.bar_read(0, 0x2000, &mut config);
    config
}

#[test]
fn a_frame_goes_out_as_it_is_however_it_is_cut() {
    let mut nic = Nic::without(0);
    let out = frame(1514, 1);
    nic.rig.write(DATA, &out);
    nic.transmit.submit(
        &nic.rig,
        0,
        &[(DATA, 5, false), (DATA + 5, 9, false), (DATA + 14, 1512, false)],
    );
    assert_eq!(nic.rig.run(), 1);
    assert_eq!(nic.transmit.used(&nic.rig), [(0, 0)]);
    assert_eq!(nic.sent(), [out]);
    assert_eq!(nic.rig.interrupts(), [2]);
    assert_eq!(config(&nic)[..12], [0x52, 0x54, 0, 1, 2, 3, 1, 0, 1, 0, 0xdc, 5]);
}

#[test]
fn a_frame_that_asks_for_what_was_not_agreed_and_one_too_large_go_nowhere() {
    let mut nic = Nic::without(F_CSUM | F_HOST_TSO4);
    for (flags, gso) in [(1, 0), (1, 1), (0, 1), (0, 3), (1, 4)] {
        let mut out = frame(60, 1);
        (out[0], out[1]) = (flags, gso);
        nic.rig.write(DATA, &out);
        nic.transmit.submit(&nic.rig, 0, &[(DATA, len32(&out), false)]);
        assert_eq!(nic.rig.run(), 1);
        assert_eq!(nic.sent(), [] as [Vec<u8>; 0], "{flags} {gso}");
    }
    let most = u32::try_from(FRAME_BYTES_MAX).unwrap();
    for (len, sent) in [(most, 1), (most + 1, 0), (15 << 20, 0)] {
        nic.rig.write(0x10_0000, &[0; HEADER]);
        nic.transmit.submit(&nic.rig, 0, &[(0x10_0000, len, false)]);
        assert_eq!(nic.rig.run(), 1);
        assert_eq!(nic.sent().len(), sent, "{len}");
    }
    assert_eq!(nic.rig.status() & status::NEEDS_RESET, 0);
}

#[test]
fn a_frame_that_comes_lies_in_one_buffer_and_waits_for_one() {
    let mut nic = Nic::without(F_MRG_RXBUF);
    let (first, second) = (frame(60, 1), frame(1514, 2));
    nic.far.send(&first).unwrap();
    nic.far.send(&second).unwrap();
    assert_eq!(
        nic.rig.device.work(),
        Work::Nothing,
        "no buffers: nothing is read"
    );
    nic.receive.submit(&nic.rig, 0, &[(buffer(0), 2048, true)]);
    nic.receive.submit(
        &nic.rig,
        1,
        &[(buffer(1), 12, true), (buffer(1) + 12, 2036, true)],
    );
    assert_eq!(nic.rig.run(), 2);
    assert_eq!(
        nic.receive.used(&nic.rig),
        [(0, len32(&first)), (1, len32(&second))]
    );
    assert_eq!(nic.rig.read(buffer(0), first.len()), in_chains(first, 1));
    assert_eq!(nic.rig.read(buffer(1), second.len()), in_chains(second, 1));
    assert_eq!(nic.rig.interrupts(), [1, 1]);
    nic.receive.submit(&nic.rig, 0, &[(buffer(0), 2048, true)]);
    assert_eq!(
        nic.rig.device.work(),
        Work::Dry,
        "a buffer waits for what comes from outside"
    );
}

#[test]
fn a_large_frame_lies_in_several_buffers_that_are_seen_at_once() {
    let mut nic = Nic::without(0);
    let large = frame(5000, 3);
    nic.far.send(&large).unwrap();
    nic.receive.submit(&nic.rig, 0, &[(buffer(0), 2000, true)]);
    nic.receive.submit(&nic.rig, 1, &[(buffer(1), 2000, true)]);
    assert_eq!(nic.rig.device.work(), Work::Nothing, "it has no room yet");
    assert_eq!(nic.receive.used(&nic.rig), []);
    nic.receive
        .submit(&nic.rig, 2, &[(buffer(2), 1, true), (buffer(2) + 1, 3000, true)]);
    nic.receive.submit(&nic.rig, 4, &[(buffer(4), 2000, true)]);
    assert_eq!(nic.rig.run(), 1);
    assert_eq!(nic.receive.used(&nic.rig), [(0, 2000), (1, 2000), (2, 1012)]);
    let parts = [(0, 2000), (1, 2000), (2, 1012)].map(|(index, len)| nic.rig.read(buffer(index), len));
    assert_eq!(parts.concat(), in_chains(large, 3));
    assert_eq!(nic.rig.interrupts(), [1]);
}

#[test]
fn a_frame_without_room_in_any_ring_of_the_drivers_is_dropped_and_the_next_one_comes() {
    let mut nic = Nic::without(0);
    nic.far.send(&frame(1514, 1)).unwrap();
    for index in 0..SIZE {
        nic.receive
            .submit(&nic.rig, index, &[(buffer(0) + 64 * u64::from(index), 64, true)]);
    }
    assert_eq!((nic.rig.run(), nic.receive.used(&nic.rig)), (0, vec![]));
    nic.far.send(&frame(48, 2)).unwrap();
    assert_eq!((nic.rig.run(), nic.receive.used(&nic.rig)), (1, vec![(0, 60)]));
    let mut nic = Nic::without(F_MRG_RXBUF);
    nic.far.send(&frame(1514, 1)).unwrap();
    nic.receive.submit(&nic.rig, 0, &[(buffer(0), 1000, true)]);
    nic.receive.submit(&nic.rig, 1, &[(buffer(1), 2000, true)]);
    assert_eq!((nic.rig.run(), nic.receive.used(&nic.rig)), (0, vec![]));
    nic.far.send(&frame(60, 2)).unwrap();
    assert_eq!((nic.rig.run(), nic.receive.used(&nic.rig)), (1, vec![(0, 72)]));
}

#[test]
fn the_host_is_told_what_the_driver_takes_and_what_it_does_not_take_is_passed_over() {
    let all = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
    for (without, told, taken) in [
        (0, all, [true, true, true]),
        (F_GUEST_CSUM, 0, [true, false, false]),
        (
            F_GUEST_TSO4,
            libc::TUN_F_CSUM | libc::TUN_F_TSO6,
            [true, true, false],
        ),
        (F_GUEST_TSO4 | F_GUEST_TSO6, libc::TUN_F_CSUM, [true, true, false]),
    ] {
        let mut nic = Nic::without(without);
        for (index, (flags, gso)) in (0u16..).zip([(2, 0), (1, 0), (1, 1)]) {
            let mut come = frame(60, 1);
            (come[0], come[1]) = (flags, gso);
            nic.far.send(&come).unwrap();
            nic.receive
                .submit(&nic.rig, index, &[(buffer(index.into()), 2048, true)]);
        }
        let due = taken.iter().filter(|&&taken| taken).count();
        assert_eq!(nic.rig.run(), due, "{without:#x}");
        assert_eq!(*nic.cable.offloads.lock().unwrap(), [told]);
        let verified = nic.rig.read(buffer(0), 1)[0];
        assert_eq!(
            verified == 2,
            without & F_GUEST_CSUM == 0,
            "flags without the feature"
        );
    }
}

#[test]
fn a_driver_that_is_asked_announces_itself_and_says_so() {
    let mut nic = Nic::without(0);
    let ask = |nic: &Nic| {
        nic.net.ask_to_announce();
        nic.rig.device.config_changed();
    };
    ask(&nic);
    assert_eq!((config(&nic)[6], nic.rig.interrupts()), (3, vec![0]));
    let commands: [([u8; 2], u8); 4] = [([3, 1], 1), ([0, 0], 1), ([4, 0], 1), ([3, 0], 0)];
    for (command, answer) in commands {
        assert_eq!(config(&nic)[6], 3);
        nic.rig.write(DATA, &command);
        let parts: [Part; 2] = [(DATA, 2, false), (DATA + 0x1000, 1, true)];
        nic.control.submit(&nic.rig, 0, &parts);
        assert_eq!((nic.rig.run(), nic.control.used(&nic.rig)), (1, vec![(0, 1)]));
        assert_eq!(nic.rig.read(DATA + 0x1000, 1), [answer], "{command:?}");
    }
    assert_eq!(config(&nic)[6], 1);
    ask(&nic);
    nic.rig.set(20, &[0]);
    assert_eq!(config(&nic)[6], 1, "a reset forgets it");
}

#[test]
fn a_vm_that_begins_to_run_is_announced_a_few_times_while_it_may_run() {
    let nic = Nic::without(0);
    let place = |nic: &Nic| (nic.net.clone(), nic.rig.device.clone());
    announce::start(vec![place(&nic)], nic.rig.gate.clone())
        .unwrap()
        .join()
        .unwrap();
    let sent = nic.sent();
    assert!(sent.len() > 3 && sent.iter().all(|frame| frame == &sent[0]));
    assert_eq!(sent[0], [&[0; HEADER], announce::frame(MAC).as_slice()].concat());
    assert_eq!(
        (config(&nic)[6], nic.rig.interrupts()),
        (3, vec![0]),
        "asked once"
    );
    let mute = Nic::without(F_GUEST_ANNOUNCE);
    mute.rig.gate.open(1).unwrap();
    announce::start(vec![place(&mute)], mute.rig.gate.clone())
        .unwrap()
        .join()
        .unwrap();
    assert_eq!(mute.sent(), [] as [Vec<u8>; 0], "past the lease's deadline");
    assert_eq!(
        mute.rig.interrupts(),
        [] as [usize; 0],
        "the driver does not know it"
    );
    mute.rig.gate.quit();
    announce::start(vec![place(&mute)], mute.rig.gate.clone())
        .unwrap()
        .join()
        .unwrap();
}

#[test]
fn nothing_is_read_nor_sent_while_the_vm_may_not_run() {
    let mut nic = Nic::without(0);
    nic.far.send(&frame(60, 1)).unwrap();
    nic.receive.submit(&nic.rig, 0, &[(buffer(0), 2048, true)]);
    nic.rig.write(DATA, &frame(60, 2));
    nic.transmit.submit(&nic.rig, 0, &[(DATA, 72, false)]);
    nic.rig.gate.close(false);
    assert_eq!(nic.rig.device.work(), Work::Nothing);
    nic.rig.gate.open(1).unwrap();
    assert_eq!(nic.rig.device.work(), Work::Nothing, "past the lease's deadline");
    assert_eq!(nic.sent(), [] as [Vec<u8>; 0]);
    // What was not read is still there for whoever reads it.
    nic.rig.gate.open(u64::MAX).unwrap();
    assert_eq!((nic.rig.run(), nic.sent().len()), (2, 1));
}

#[test]
fn a_frame_whose_reading_takes_until_after_the_deadline_is_not_sent() {
    let mut nic = Nic::without(0);
    nic.rig.write(DATA, &frame(60, 2));
    nic.transmit.submit(&nic.rig, 0, &[(DATA, 72, false)]);
    let begun = nic.rig.gate.begin().unwrap();
    nic.rig.gate.open(1).unwrap();
    let chain = drover_vmm::devices::virtio::queue::Chain {
        heads: vec![(0, 0)],
        readable: vec![drover_vmm::devices::virtio::queue::Buffer { gpa: DATA, len: 72 }],
        writable: vec![],
    };
    let served = nic.net.serve(1, &chain, nic.rig.memory.mapped(), 0, &begun);
    assert_eq!((served, nic.sent().len()), (Ok(0), 0));
    nic.rig.gate.open(u64::MAX).unwrap();
    let served = nic.net.serve(1, &chain, nic.rig.memory.mapped(), 0, &begun);
    assert_eq!((served, nic.sent().len()), (Ok(0), 1));
}

#[test]
fn every_rule_that_a_nics_driver_breaks_makes_it_ask_for_a_reset() {
    type Break = fn(&mut Nic);
    let cases: [(&str, Break); 8] = [
        ("a frame without its header", |nic| {
            nic.transmit.submit(&nic.rig, 0, &[(DATA, 11, false)]);
        }),
        ("a frame to be sent that is to be written", |nic| {
            nic.transmit
                .submit(&nic.rig, 0, &[(DATA, 60, false), (DATA + 60, 60, true)]);
        }),
        ("a buffer beyond memory", |nic| {
            nic.transmit.submit(&nic.rig, 0, &[(MEMORY_BYTES - 8, 16, false)]);
        }),
        ("a buffer to be filled that is to be read", |nic| {
            nic.far.send(&frame(60, 1)).unwrap();
            nic.receive.submit(&nic.rig, 0, &[(DATA, 2048, false)]);
        }),
        ("one of several buffers that is to be read", |nic| {
            nic.far.send(&frame(1000, 1)).unwrap();
            nic.receive.submit(&nic.rig, 0, &[(DATA, 64, true)]);
            nic.receive
                .submit(&nic.rig, 1, &[(DATA, 64, false), (DATA, 2048, true)]);
        }),
        ("a loop of buffers to be filled", |nic| {
            nic.far.send(&frame(60, 1)).unwrap();
            nic.rig.descriptor(0, DATA, 8, driver::WRITE | driver::NEXT, 0);
            nic.rig.offer(0);
        }),
        ("a command of one byte", |nic| {
            nic.control
                .submit(&nic.rig, 0, &[(DATA, 1, false), (DATA, 1, true)]);
        }),
        ("a command without room for its answer", |nic| {
            nic.control.submit(&nic.rig, 0, &[(DATA, 2, false)]);
        }),
    ];
    let mut nic = Nic::without(0);
    for (what, break_rule) in cases {
        break_rule(&mut nic);
        nic.rig.run();
        assert_eq!(
            nic.rig.status() & status::NEEDS_RESET,
            status::NEEDS_RESET,
            "{what}"
        );
        assert_eq!(nic.rig.interrupts(), [0], "{what}");
        assert_eq!(
            nic.rig.device.work(),
            Work::Nothing,
            "{what}: a broken device works on"
        );
        nic.start_without(0);
        nic.rig.write(DATA, &frame(60, 2));
        nic.transmit.submit(&nic.rig, 0, &[(DATA, 72, false)]);
        assert_eq!(
            (nic.rig.run(), nic.sent().len()),
            (1, 1),
            "{what}: after the reset"
        );
        nic.rig.interrupts();
    }
}

#[test]
fn pages_that_frames_are_put_into_are_marked_as_written() {
    let mut nic = Nic::without(0);
    nic.far.send(&frame(6000, 1)).unwrap();
    for (index, at) in (0u16..).zip([buffer(0), buffer(1)]) {
        nic.receive.submit(&nic.rig, index, &[(at, 4096, true)]);
    }
    nic.rig.memory.forget_written();
    assert_eq!(nic.rig.run(), 1);
    let mut written = PageSet::empty(nic.rig.memory.pages());
    nic.rig.memory.take_written(&mut written);
    let found: Vec<u64> = (0..nic.rig.memory.pages())
        .filter(|page| written.words[usize::try_from(page / 64).unwrap()] >> (page % 64) & 1 == 1)
        .collect();
    assert_eq!(found, [driver::USED, buffer(0), buffer(1)].map(|gpa| gpa / 4096));
}

fn saved(nic: &Nic) -> SavedPci {
    SavedPci {
        bus: drover_vmm::devices::pci::bus::Bus::new().save(),
        devices: [(1, nic.rig.device.save())].into(),
    }
}

#[test]
fn a_frame_that_had_no_room_yet_moves_with_the_vm_and_what_was_not_taken_stays() {
    let mut source = Nic::without(0);
    let (held, left) = (frame(3000, 1), frame(60, 2));
    source.far.send(&held).unwrap();
    source.far.send(&left).unwrap();
    source.receive.submit(&source.rig, 0, &[(buffer(0), 2000, true)]);
    assert_eq!(source.rig.run(), 0);
    source.rig.gate.close(false);
    let save = saved(&source);
    let decoded = saved::decode(saved::encode(&save)).unwrap();
    assert_eq!(decoded, save);
    let mut target = Nic::new();
    let all = source.rig.read(0, usize::try_from(MEMORY_BYTES).unwrap());
    target.rig.write(0, &all);
    target.rig.device.restore(&decoded.devices[&1]).unwrap();
    target.go_on(&source);
    target.rig.interrupts();
    target.receive.submit(&target.rig, 1, &[(buffer(1), 2000, true)]);
    assert_eq!(target.rig.run(), 1);
    assert_eq!(target.receive.used(&target.rig), [(0, 2000), (1, 1012)]);
    let parts = [(0, 2000), (1, 1012)].map(|(index, len)| target.rig.read(buffer(index), len));
    assert_eq!(parts.concat(), in_chains(held, 2));
    let all = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
    assert_eq!(
        *target.cable.offloads.lock().unwrap(),
        [all],
        "the target's tap is told"
    );
}

#[test]
fn a_saved_nic_that_is_another_one_is_refused_by_name() {
    let source = Nic::without(0);
    let mut save = source.rig.device.save();
    let SavedDevice::Net(net) = &mut save.device else {
        panic!("no NIC was saved")
    };
    net.mac[5] = 9;
    let what = Nic::new().rig.device.restore(&save).unwrap_err();
    assert!(
        what.contains("52:54:00:01:02:09") && what.contains("52:54:00:01:02:03"),
        "{what}"
    );
    save.device = SavedDevice::Rng;
    assert!(Nic::new().rig.device.restore(&save).is_err());
    let rng = Arc::new(drover_vmm::devices::virtio::rng::Rng::new().unwrap());
    assert!(
        driver::Rig::new(rng)
            .device
            .restore(&source.rig.device.save())
            .is_err()
    );
    type Change = fn(&mut drover_proto::v1::VirtioNetSave);
    let lies: [Change; 4] = [
        |net| net.mac.truncate(5),
        |net| net.mac.push(0),
        |net| net.mtu = 65_536,
        |net| net.held = vec![0; FRAME_BYTES_MAX + 1],
    ];
    for lie in lies {
        let mut save = saved::encode(&saved(&source));
        let Some(drover_proto::v1::virtio_save::Device::Net(net)) = &mut save.devices[0].device else {
            panic!("no NIC was saved")
        };
        lie(net);
        assert!(saved::decode(save).is_err());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn frames_come_whole_and_in_order_into_whatever_buffers_there_are(
        frames in proptest::collection::vec(14usize..5000, 1..12),
        rooms in proptest::collection::vec(proptest::collection::vec(1u32..3000, 1..3), 1..40),
    ) {
        let mut nic = Nic::without(0);
        let mut due = frames.iter().enumerate().map(|(seed, &len)| frame(len, seed)).collect::<std::collections::VecDeque<_>>();
        due.iter().for_each(|frame| { nic.far.send(frame).unwrap(); });
        // Pairs of descriptors, each pair a chain of its own: four are under way at most.
        let mut under_way = std::collections::VecDeque::new();
        for (turn, room) in (0u16..).zip(&rooms) {
            let first = turn % 4 * 2;
            let parts: Vec<Part> = (0..).zip(room).map(|(part, &len)| (buffer(u64::from(first) + part), len, true)).collect();
            nic.receive.submit(&nic.rig, first, &parts);
            under_way.push_back(parts);
            nic.rig.run();
            let mut used = nic.receive.used(&nic.rig).into_iter();
            while let Some((_, len)) = used.next() {
                let take = |parts: Vec<Part>, mut len: u32| parts.into_iter().flat_map(|(at, room, _)| {
                    let here = room.min(len);
                    len -= here;
                    nic.rig.read(at, here as usize)
                }).collect::<Vec<u8>>();
                let mut got = take(under_way.pop_front().unwrap(), len);
                // The header may lie in several chains itself.
                let mut chains = 1;
                let want = due.pop_front().unwrap();
                while got.len() < want.len() {
                    let (_, len) = used.next().expect("all chains of a frame are seen at once");
                    got.extend(take(under_way.pop_front().unwrap(), len));
                    chains += 1;
                }
                prop_assert!(got == in_chains(want, chains));
            }
            if under_way.len() == 4 {
                break;
            }
        }
    }

    #[test]
    fn whatever_stands_in_the_rings_the_nic_ends_and_works_after_a_reset(
        descriptors in proptest::collection::vec((0u64..6, any::<u16>(), 0u16..8, 0u16..10), usize::from(SIZE)),
        indices in proptest::collection::vec((0u64..3, any::<u16>()), 1..6),
        frames in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..200), 0..6),
        noise in proptest::collection::vec((0u64..0x1_8000, any::<u8>()), 0..40),
    ) {
        let mut nic = Nic::without(0);
        for queue in 0..3u64 {
            for (slot, &(place, len, flags, next)) in (0u64..).zip(&descriptors) {
                let gpa = [DATA, 0x1000, 0x9000, MEMORY_BYTES - 64, u64::MAX - 7, 0][usize::try_from(place).unwrap()];
                nic.rig.descriptor_at(0x1000 + 0x8000 * queue + 16 * slot, gpa, u32::from(len), flags, next);
            }
        }
        frames.iter().for_each(|frame| { nic.far.send(frame).unwrap(); });
        for (queue, index) in indices {
            nic.rig.write(0x3002 + 0x8000 * queue, &(index % (2 * SIZE)).to_le_bytes());
            for _ in 0..2 * SIZE {
                nic.rig.device.step();
            }
        }
        for (at, byte) in noise {
            nic.rig.write(0x1000 + at, &[byte]);
            nic.rig.device.step();
        }
        let target = Nic::new();
        prop_assert!(target.rig.device.restore(&nic.rig.device.save()).is_ok());
        nic.sent();
        nic.start_without(0);
        nic.rig.write(DATA, &frame(60, 2));
        nic.transmit.submit(&nic.rig, 0, &[(DATA, 72, false)]);
        for _ in 0..4 * SIZE {
            nic.rig.device.step();
        }
        prop_assert_eq!(nic.sent().len(), 1);
    }
}
