//! Virtio devices against a driver without a guest: requests of every kind, and every way to break the rules.

#![allow(clippy::unwrap_used, reason = "a test may, its helpers too")]

#[path = "common/driver.rs"]
mod driver;

use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use driver::{AVAILABLE, DATA, DESCRIPTORS, INDIRECT, MEMORY_BYTES, NEXT, Part, Rig, SIZE, USED, WRITE};
use drover_migration::vm::PageSet;
use drover_vmm::devices::gate::Begun;
use drover_vmm::devices::pci::PciDevice;
use drover_vmm::devices::saved::{self, SavedDevice, SavedPci};
use drover_vmm::devices::virtio::queue::{Broken, Chain};
use drover_vmm::devices::virtio::rng::Rng;
use drover_vmm::devices::virtio::transport::status;
use drover_vmm::devices::virtio::{Device, NO_VECTOR};
use drover_vmm::memory::Mapped;
use proptest::prelude::*;
use tempfile::TempDir;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const F_FLUSH: u64 = 1 << 9;
const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

const DISK_BYTES: u64 = 1 << 20;
const DISK_SECTORS: u64 = DISK_BYTES / 512;

fn file() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    std::fs::File::create(&path).unwrap().set_len(DISK_BYTES).unwrap();
    (dir, path)
}

fn disk() -> (TempDir, PathBuf, Rig) {
    let (dir, path) = file();
    let mut rig = Rig::disk(&path, false);
    rig.start();
    (dir, path, rig)
}

fn rng() -> Rig {
    let mut rig = Rig::new(Arc::new(Rng::new().unwrap()));
    rig.start();
    rig
}

fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len)
        .map(|i| u8::try_from((i * 7 + seed) % 251).unwrap())
        .collect()
}

#[test]
fn random_numbers_fill_what_they_are_given_and_an_interrupt_says_so() {
    let mut rig = rng();
    rig.submit(&[(DATA, 100, true), (DATA + 0x1000, 28, true)]);
    assert_eq!(rig.run(), 1);
    assert_eq!(rig.used(), [(0, 128)]);
    assert_ne!(rig.read(DATA, 100), [0; 100]);
    assert_eq!(rig.sent.0.lock().unwrap()[0].1.data, 0x41);
    assert_eq!(rig.interrupts(), [1]);
    rig.write(AVAILABLE, &1u16.to_le_bytes());
    rig.submit(&[(DATA, 8, true)]);
    assert_eq!(
        (rig.run(), rig.interrupts().len()),
        (1, 0),
        "an interrupt that nobody wanted"
    );
}

#[test]
fn what_was_written_is_on_the_file_and_read_back_however_it_is_cut() {
    let (_dir, path, mut rig) = disk();
    let data = pattern(200 << 10, 1);
    assert_eq!(rig.request(OUT, 3, &data, 0).0, OK);
    let file = std::fs::File::open(&path).unwrap();
    let mut stored = vec![0; data.len()];
    file.read_exact_at(&mut stored, 3 * 512).unwrap();
    assert_eq!(stored, data);
    let (answer, back) = rig.request(IN, 3, &[], 200 << 10);
    assert_eq!((answer, back == data), (OK, true));
    // The header in two pieces, the data in odd ones, the answer beside the last of them.
    let mut header = [0; 16];
    header[8] = 3;
    rig.write(DATA, &header);
    let odd: [Part; 4] = [
        (DATA, 5, false),
        (DATA + 5, 11, false),
        (DATA + 0x1001, 511, true),
        (DATA + 0x3003, 514, true),
    ];
    rig.submit(&odd);
    assert_eq!(rig.run(), 1);
    assert_eq!(rig.used(), [(0, 1025)]);
    assert_eq!(rig.read(DATA + 0x1001, 511), data[..511]);
    assert_eq!(rig.read(DATA + 0x3003, 513), data[511..1024]);
    assert_eq!(rig.read(DATA + 0x3003 + 513, 1), [OK]);
}

#[test]
fn flushes_names_and_unknown_requests_are_answered() {
    let (_dir, _path, mut rig) = disk();
    assert_eq!(rig.request(FLUSH, 0, &[], 0).0, OK);
    let (answer, name) = rig.request(GET_ID, 0, &[], 20);
    assert_eq!((answer, &name[..6]), (OK, b"vol-1\0".as_slice()));
    assert_eq!(rig.request(99, 0, &[], 0).0, UNSUPPORTED);
    let mut config = [0; 8];
    rig.device.bar_read(0, 0x2000, &mut config);
    assert_eq!(u64::from_le_bytes(config), DISK_SECTORS);
}

#[test]
fn nothing_beyond_the_disk_is_reached() {
    let (_dir, path, mut rig) = disk();
    for sector in [DISK_SECTORS, DISK_SECTORS - 1, u64::MAX, u64::MAX / 512] {
        assert_eq!(rig.request(OUT, sector, &[1; 1024], 0).0, IO_ERROR, "{sector}");
        assert_eq!(rig.request(IN, sector, &[], 1024).0, IO_ERROR, "{sector}");
    }
    assert_eq!(rig.request(OUT, 0, &[1; 100], 0).0, IO_ERROR, "no whole sector");
    assert_eq!(std::fs::metadata(&path).unwrap().len(), DISK_BYTES);
    assert!(std::fs::read(&path).unwrap().iter().all(|&byte| byte == 0));
}

fn range(sector: u64, count: u32, flags: u32) -> Vec<u8> {
    [
        sector.to_le_bytes().as_slice(),
        &count.to_le_bytes(),
        &flags.to_le_bytes(),
    ]
    .concat()
}

#[test]
fn zeroes_and_discards_stay_within_their_range() {
    let (_dir, path, mut rig) = disk();
    let data = pattern(64 << 10, 3);
    assert_eq!(rig.request(OUT, 0, &data, 0).0, OK);
    for (first, flags) in [(8u64, 0), (24, 1)] {
        assert_eq!(rig.request(WRITE_ZEROES, 0, &range(first, 8, flags), 0).0, OK);
    }
    assert_eq!(rig.request(DISCARD, 0, &range(41, 30, 0), 0).0, OK);
    let stored = std::fs::read(&path).unwrap();
    let mut want = data;
    for zeroed in [8..16, 24..32, 48..64usize] {
        want[zeroed.start * 512..zeroed.end * 512].fill(0);
    }
    assert!(
        stored[..want.len()] == want,
        "more or less than asked for is zero"
    );
    for (kind, range, answer) in [
        (DISCARD, range(0, 8, 1), UNSUPPORTED),
        (WRITE_ZEROES, range(0, 8, 2), UNSUPPORTED),
        (WRITE_ZEROES, range(DISK_SECTORS, 1, 0), IO_ERROR),
        (DISCARD, range(u64::MAX, u32::MAX, 0), IO_ERROR),
        (WRITE_ZEROES, vec![0; 15], IO_ERROR),
        (WRITE_ZEROES, vec![0; 32], IO_ERROR),
    ] {
        assert_eq!(rig.request(kind, 0, &range, 0).0, answer);
    }
}

#[test]
fn a_disk_that_is_read_only_offers_no_writes_and_takes_none() {
    let (_dir, path) = file();
    let mut rig = Rig::disk(&path, true);
    rig.start();
    assert_eq!(rig.offered() & (1 << 5 | 1 << 13 | 1 << 14), 1 << 5);
    assert_eq!(rig.request(OUT, 0, &[1; 512], 0).0, IO_ERROR);
    assert_eq!(rig.request(WRITE_ZEROES, 0, &range(0, 1, 0), 0).0, IO_ERROR);
    assert_eq!(rig.request(IN, 0, &[], 512).0, OK);
    assert_eq!(rig.request(FLUSH, 0, &[], 0).0, OK);
}

#[test]
fn a_driver_without_flushes_is_served_too() {
    let (_dir, _path) = file();
    let mut rig = Rig::disk(&_path, false);
    rig.start_without(F_FLUSH);
    assert_eq!(rig.request(OUT, 0, &[1; 512], 0).0, OK);
    assert_eq!(rig.request(WRITE_ZEROES, 0, &range(0, 1, 1), 0).0, OK);
}

/// After what the driver did the device stands and asks for a reset, and works again after it.
fn assert_broken(rig: &mut Rig, what: &str) {
    rig.run();
    assert_eq!(rig.status() & status::NEEDS_RESET, status::NEEDS_RESET, "{what}");
    assert_eq!(
        rig.interrupts(),
        [0],
        "{what}: told by the configuration's vector, once"
    );
    assert_eq!(rig.used(), [], "{what}");
    rig.submit(&[(DATA, 8, true)]);
    assert_eq!(rig.run(), 0, "{what}: a broken device works on");
    rig.start();
    rig.submit(&[(DATA, 8, true)]);
    assert_eq!(
        (rig.run(), rig.used()),
        (1, vec![(0, 8)]),
        "{what}: after the reset"
    );
    rig.interrupts();
}

#[test]
fn every_rule_that_a_chain_breaks_makes_the_device_ask_for_a_reset() {
    let rig = &mut rng();
    let table = DATA + 0x8000;
    type Break = fn(&mut Rig, u64);
    let cases: [(&str, Break); 14] = [
        ("a loop", |rig, _| {
            rig.descriptor(0, DATA, 8, WRITE | NEXT, 1);
            rig.descriptor(1, DATA, 8, WRITE | NEXT, 0);
            rig.offer(0);
        }),
        ("a descriptor that is its own next", |rig, _| {
            rig.descriptor(0, DATA, 8, WRITE | NEXT, 0);
            rig.offer(0);
        }),
        ("a head out of range", |rig, _| rig.offer(SIZE)),
        ("a next out of range", |rig, _| {
            rig.descriptor(0, DATA, 8, WRITE | NEXT, u16::MAX);
            rig.offer(0);
        }),
        ("more chains than the queue has", |rig, _| {
            rig.write(AVAILABLE + 2, &(rig.next + SIZE + 1).to_le_bytes());
        }),
        ("a buffer beyond memory", |rig, _| {
            rig.submit(&[(MEMORY_BYTES - 4, 8, true)])
        }),
        ("a buffer at the end of addresses", |rig, _| {
            rig.submit(&[(u64::MAX - 3, 8, true)])
        }),
        ("an empty buffer", |rig, _| rig.submit(&[(DATA, 0, true)])),
        ("read after write", |rig, _| {
            rig.submit(&[(DATA, 8, true), (DATA, 8, false)])
        }),
        ("a table within a table", |rig, table| {
            rig.descriptor_at(table, table, 16, INDIRECT, 0);
            rig.descriptor(0, table, 16, INDIRECT, 0);
            rig.offer(0);
        }),
        ("a table of half a descriptor", |rig, table| {
            rig.descriptor(0, table, 24, INDIRECT, 0);
            rig.offer(0);
        }),
        ("a table larger than the queue", |rig, table| {
            rig.descriptor(0, table, 16 * (u32::from(SIZE) + 1), INDIRECT, 0);
            rig.offer(0);
        }),
        ("a table beyond memory", |rig, _| {
            rig.descriptor(0, MEMORY_BYTES, 16, INDIRECT, 0);
            rig.offer(0);
        }),
        ("a table with a next", |rig, table| {
            rig.descriptor(0, table, 16, INDIRECT | NEXT, 1);
            rig.offer(0);
        }),
    ];
    for (what, break_rule) in cases {
        break_rule(rig, table);
        assert_broken(rig, what);
    }
    rig.submit(&[(DATA, 8, false)]);
    assert_broken(rig, "random numbers into a buffer to be read");
}

#[test]
fn a_disk_request_that_is_none_breaks_the_device() {
    let (_dir, _path, mut rig) = disk();
    for parts in [
        vec![(DATA, 16, false)],
        vec![(DATA, 15, false), (DATA + 0x1000, 1, true)],
        vec![(DATA, 1, true)],
    ] {
        rig.submit(&parts);
        rig.run();
        assert_eq!(
            rig.status() & status::NEEDS_RESET,
            status::NEEDS_RESET,
            "{parts:?}"
        );
        rig.start();
    }
    assert_eq!(rig.request(FLUSH, 0, &[], 0).0, OK);
}

#[test]
fn a_chain_in_a_table_of_its_own_is_served() {
    let mut rig = rng();
    let table = DATA + 0x8000;
    rig.descriptor_at(table, DATA, 8, WRITE | NEXT, 1);
    rig.descriptor_at(table + 16, DATA + 8, 8, WRITE, 0);
    rig.descriptor(5, table, 32, INDIRECT, 0);
    rig.offer(5);
    assert_eq!((rig.run(), rig.used()), (1, vec![(5, 16)]));
}

#[test]
fn a_device_that_may_not_reach_memory_or_run_does_nothing() {
    let mut rig = rng();
    rig.device.config_write(4, &[2, 4]);
    rig.submit(&[(DATA, 8, true)]);
    assert_eq!(rig.run(), 0, "not the bus's master");
    rig.device.config_write(4, &[6, 4]);
    rig.gate.close(false);
    assert_eq!(rig.run(), 0, "the VM does not run");
    rig.gate.open(1).unwrap();
    assert_eq!(rig.run(), 0, "past the lease's deadline");
    rig.gate.open(u64::MAX).unwrap();
    assert_eq!(rig.run(), 1);
}

#[test]
fn pages_that_a_device_writes_are_marked_as_written() {
    let (_dir, _path, mut rig) = disk();
    let header = [0; 16];
    rig.write(DATA, &header);
    rig.submit(&[
        (DATA, 16, false),
        (DATA + 0x40_0000, 8192, true),
        (DATA + 0x2000, 1, true),
    ]);
    rig.memory.forget_written();
    assert_eq!(rig.run(), 1);
    let mut written = PageSet::empty(rig.memory.pages());
    rig.memory.take_written(&mut written);
    let want: Vec<u64> = [USED, DATA + 0x2000, DATA + 0x40_0000, DATA + 0x40_1000]
        .map(|gpa| gpa / 4096)
        .into();
    let found: Vec<u64> = (0..rig.memory.pages())
        .filter(|page| written.words[usize::try_from(page / 64).unwrap()] >> (page % 64) & 1 == 1)
        .collect();
    assert_eq!(found, want);
}

/// A device that serves a chain only when it is told to.
struct Slow {
    began: Mutex<Sender<()>>,
    go: Mutex<Receiver<()>>,
}

impl Device for Slow {
    fn id(&self) -> u16 {
        4
    }
    fn class(&self) -> [u8; 3] {
        [0xff, 0, 0]
    }
    fn features(&self) -> u64 {
        0
    }
    fn queues(&self) -> &'static [u16] {
        &[64]
    }
    fn read_config(&self, _offset: usize, _data: &mut [u8]) {}
    fn serve(
        &self,
        _queue: usize,
        _chain: &Chain,
        _memory: &Mapped,
        _features: u64,
        _begun: &Begun<'_>,
    ) -> Result<u32, Broken> {
        self.began.lock().unwrap().send(()).unwrap();
        self.go.lock().unwrap().recv().unwrap();
        Ok(1)
    }
    fn save(&self) -> SavedDevice {
        SavedDevice::Rng
    }
    fn restore(&self, _saved: &SavedDevice) -> Result<(), String> {
        Ok(())
    }
}

fn slow() -> (Rig, Receiver<()>, Sender<()>) {
    let ((began, begun), (go, gone)) = (channel(), channel());
    let mut rig = Rig::new(Arc::new(Slow {
        began: Mutex::new(began),
        go: Mutex::new(gone),
    }));
    rig.start();
    (rig, begun, go)
}

const LONG: Duration = Duration::from_secs(60);

#[test]
fn a_hand_over_waits_for_the_request_under_way_and_no_other_begins() {
    let (mut rig, begun, go) = slow();
    rig.submit(&[(DATA, 8, true)]);
    rig.offer(0);
    let device = rig.device.clone();
    let worker = std::thread::spawn(move || (device.step(), device.step()));
    begun.recv().unwrap();
    rig.gate.close(true);
    assert!(!rig.gate.is_drained());
    assert!(rig.gate.drain(Duration::from_millis(1), true).is_err());
    assert_eq!(rig.used(), []);
    go.send(()).unwrap();
    rig.gate.drain(LONG, true).unwrap();
    assert_eq!(rig.used(), [(0, 1)], "drained before the request was given back");
    assert_eq!(worker.join().unwrap(), (true, false));
    assert!(begun.try_recv().is_err(), "a request began after the pause");
}

#[test]
fn a_reset_under_a_request_is_done_when_that_has_ended_and_nothing_is_given_back() {
    let (mut rig, begun, go) = slow();
    rig.submit(&[(DATA, 8, true)]);
    let device = rig.device.clone();
    let worker = std::thread::spawn(move || device.step());
    begun.recv().unwrap();
    rig.set(20, &[0]);
    assert_ne!(rig.status(), 0, "reset under a request");
    go.send(()).unwrap();
    assert!(worker.join().unwrap());
    assert_eq!((rig.status(), rig.used()), (0, vec![]));
    assert_eq!(rig.interrupts(), [] as [usize; 0]);
}

#[test]
fn a_saved_device_goes_on_where_it_was_and_tells_its_driver() {
    let (_dir, path, mut source) = disk();
    let data = pattern(512, 9);
    assert_eq!(source.request(OUT, 7, &data, 0).0, OK);
    source.gate.close(false);
    let save = SavedPci {
        bus: drover_vmm::devices::pci::bus::Bus::new().save(),
        devices: [(1, source.device.save())].into(),
    };
    let decoded = saved::decode(saved::encode(&save)).unwrap();
    assert_eq!(decoded, save);
    let mut target = Rig::disk(&path, false);
    let all = source.read(0, usize::try_from(MEMORY_BYTES).unwrap());
    target.write(0, &all);
    target.device.restore(&decoded.devices[&1]).unwrap();
    assert_eq!(target.device.save().registers, {
        let mut again = Rig::disk(&path, false);
        again.write(0, &all);
        again.device.restore(&decoded.devices[&1]).unwrap();
        again.next = 0;
        again.device.save().registers
    });
    assert_eq!(target.interrupts(), [1], "an interrupt may have been under way");
    (target.next, target.seen) = (source.next, source.seen);
    let (answer, back) = target.request(IN, 7, &[], 512);
    assert_eq!((answer, back == data), (OK, true));

    let other = Rig::disk(&path, true);
    assert!(
        other
            .device
            .restore(&decoded.devices[&1])
            .unwrap_err()
            .contains("read_only")
    );
    let other = Rig::new(Arc::new(Rng::new().unwrap()));
    assert!(other.device.restore(&decoded.devices[&1]).is_err());
}

#[test]
fn the_window_in_the_configuration_space_reaches_the_registers() {
    let rig = rng();
    let at = (0x40..256).step_by(4).find(|&at| {
        let mut cap = [0; 4];
        rig.device.config_read(at, &mut cap);
        cap[0] == 9 && cap[3] == 5
    });
    let at = at.unwrap();
    rig.device.config_write(at + 8, &20u32.to_le_bytes());
    rig.device.config_write(at + 12, &1u32.to_le_bytes());
    let mut byte = [0];
    rig.device.config_read(at + 16, &mut byte);
    assert_eq!(byte, [15], "the status");
    rig.device.config_write(at + 16, &[0]);
    assert_eq!(rig.status(), 0, "reset through the window");
    rig.device.config_write(at + 8, &u32::MAX.to_le_bytes());
    rig.device.config_read(at + 16, &mut byte);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn whatever_stands_in_the_rings_the_device_ends_and_stays_within_memory(
        descriptors in proptest::collection::vec((0u64..8, any::<u16>(), 0u16..8, 0u16..10), usize::from(SIZE)),
        heads in proptest::collection::vec(0u16..10, usize::from(SIZE)),
        index in any::<u16>(),
        header in proptest::collection::vec(any::<u8>(), 16),
        noise in proptest::collection::vec((0u64..0x5000, any::<u8>()), 0..40),
    ) {
        let (_dir, path, mut rig) = disk();
        rig.write(DATA, &header);
        for (slot, (place, len, flags, next)) in (0u16..).zip(descriptors) {
            let gpa = [DATA, DATA + 0x1000, DESCRIPTORS, AVAILABLE, USED, MEMORY_BYTES - 64, u64::MAX - 7, 0][usize::try_from(place).unwrap()];
            rig.descriptor(slot, gpa, u32::from(len), flags, next);
        }
        for (slot, head) in (0u64..).zip(heads) {
            rig.write(AVAILABLE + 4 + 2 * slot, &head.to_le_bytes());
        }
        rig.write(AVAILABLE + 2, &(index % (2 * SIZE)).to_le_bytes());
        for (at, byte) in noise {
            rig.write(DESCRIPTORS + at, &[byte]);
        }
        // The ring can be written by the device itself, and then ends by chance: what counts is that each step does.
        for _ in 0..2 * SIZE {
            rig.device.step();
        }
        prop_assert_eq!(std::fs::metadata(&path).unwrap().len(), DISK_BYTES);
        rig.start();
        prop_assert_eq!(rig.request(FLUSH, 0, &[], 0).0, OK);
    }

    #[test]
    fn any_access_to_registers_and_configuration_is_answered_and_leaves_a_state_that_restores(
        accesses in proptest::collection::vec((0usize..4, 0u64..0x6000, proptest::collection::vec(any::<u8>(), 1..9)), 1..120),
    ) {
        let (_dir, path, mut rig) = disk();
        for (kind, offset, mut bytes) in accesses {
            let register = usize::try_from(offset % 256).unwrap();
            match kind {
                0 => rig.device.bar_write(0, offset, &bytes),
                1 => rig.device.bar_read(0, offset, &mut bytes),
                2 => rig.device.config_write(register, &bytes),
                _ => rig.device.config_read(register, &mut bytes),
            }
            rig.device.step();
        }
        let target = Rig::disk(&path, false);
        prop_assert!(target.device.restore(&rig.device.save()).is_ok());
        rig.device.config_write(4, &[6, 4]);
        rig.start();
        prop_assert_eq!(rig.request(FLUSH, 0, &[], 0).0, OK);
        prop_assert_ne!(NO_VECTOR, 0);
    }
}
