//! What the fuzz targets `virtio`, `nic`, `balloon` and `console` do with their bytes; the corpus test of the main workspace does the same.
//!
//! The first byte is a number of accesses, 12 bytes each: what kind, where (16 bits), how many bytes, and the bytes. What follows is the memory
//! that the queues stand in, beginning with descriptors. A NIC gets before its driver's bytes those of a number of frames from outside: a byte that
//! says how many, then each with a byte for its length in words of 8 bytes. A console gets a byte for how much is typed first.

#[path = "../tests/common/balloon.rs"]
mod ballooned;
#[path = "../tests/common/driver.rs"]
mod driver;
#[path = "../tests/common/nic.rs"]
mod nic;
#[path = "../tests/common/port.rs"]
mod port;

use std::path::PathBuf;
use std::sync::Arc;

use ballooned::{Ballooned, INFLATE};
use driver::{DATA, DESCRIPTORS, Rig};
use drover_vmm::devices::pci::PciDevice;
use drover_vmm::devices::virtio::blk::Blk;
use drover_vmm::devices::virtio::blk::disk::Disk;
use nic::Nic;
use port::Ported;

const DISK_BYTES: u64 = 64 << 10;
const ACCESS_BYTES: usize = 12;
const ACCESSES_MAX: usize = 64;
/// Frames from outside.
const FRAMES_MAX: u8 = 16;
/// Steps of the device after each access.
const STEPS: usize = 16;

/// A disk whose file is gone when it is closed.
fn disk() -> Disk {
    let name = format!(
        "drover-fuzz-{}-{:?}",
        std::process::id(),
        std::thread::current().id()
    );
    let path: PathBuf = std::env::temp_dir().join(name);
    std::fs::File::create(&path)
        .and_then(|file| file.set_len(DISK_BYTES))
        .expect("a temporary file");
    let disk = Disk::open(&path, false, "fuzz").expect("a disk");
    std::fs::remove_file(&path).expect("the file was there");
    disk
}

/// Lets the device work, and again after each of the accesses.
fn drive(rig: &Rig, accesses: &[u8]) {
    let step = || (0..STEPS).take_while(|_| rig.device.step()).count();
    step();
    for access in accesses.chunks_exact(ACCESS_BYTES) {
        let offset = u16::from_le_bytes([access[1], access[2]]);
        let mut data = access[4..5 + usize::from(access[3] % 8)].to_vec();
        let register = usize::from(offset % 256);
        match access[0] % 4 {
            0 => rig.device.bar_write(0, u64::from(offset), &data),
            1 => rig.device.bar_read(0, u64::from(offset), &mut data),
            2 => rig.device.config_write(register, &data),
            _ => rig.device.config_read(register, &mut data),
        }
        step();
    }
}

/// Whatever a driver does, its device ends each step, leaves a state that restores, and works again after a reset.
pub fn virtio(bytes: &[u8]) {
    let Some((&count, bytes)) = bytes.split_first() else {
        return;
    };
    let accesses = ACCESSES_MAX.min(usize::from(count)) * ACCESS_BYTES;
    let (accesses, memory) = bytes.split_at(accesses.min(bytes.len()));
    let model = Arc::new(Blk::new(Arc::new(disk())));
    let mut rig = Rig::new(model.clone());
    rig.start();
    // From the descriptors on, and again where requests' data is: a driver that is not all wrong places its headers there.
    rig.write(DESCRIPTORS, &memory[..memory.len().min(0x8000)]);
    rig.write(DATA, &memory[..memory.len().min(0x8000)]);
    drive(&rig, accesses);
    let target = Rig::new(model);
    if let Err(what) = target.device.restore(&rig.device.save()) {
        panic!("a saved device is refused: {what}");
    }
    rig.start();
    assert_eq!(
        rig.request(4, 0, &[], 0).0,
        0,
        "the device does not work after a reset"
    );
}

/// The same of a NIC, whatever comes from outside.
pub fn nic(bytes: &[u8]) {
    let Some((&count, mut bytes)) = bytes.split_first() else {
        return;
    };
    let mut nic = Nic::without(0);
    for _ in 0..count % FRAMES_MAX {
        let Some((&words, rest)) = bytes.split_first() else {
            return;
        };
        let (frame, rest) = rest.split_at(rest.len().min(8 * usize::from(words)));
        bytes = rest;
        if !frame.is_empty() {
            nic.far.send(frame).expect("the cable takes it");
        }
    }
    let Some((&count, bytes)) = bytes.split_first() else {
        return;
    };
    let accesses = ACCESSES_MAX.min(usize::from(count)) * ACCESS_BYTES;
    let (accesses, memory) = bytes.split_at(accesses.min(bytes.len()));
    for at in [DESCRIPTORS, DESCRIPTORS + 0x8000, DATA] {
        nic.rig.write(at, &memory[..memory.len().min(0x8000)]);
    }
    drive(&nic.rig, accesses);
    if let Err(what) = Nic::new().rig.device.restore(&nic.rig.device.save()) {
        panic!("a saved NIC is refused: {what}");
    }
    nic.sent();
    nic.start_without(0);
    nic.rig.write(DATA, &[0; 72]);
    nic.transmit.submit(&nic.rig, 0, &[(DATA, 72, false)]);
    while nic.rig.device.step() {}
    assert_eq!(nic.sent().len(), 1, "the NIC does not work after a reset");
}

/// The same of a balloon. Pages that the driver runs on are among those that it gives up.
pub fn balloon(bytes: &[u8]) {
    let Some((&count, bytes)) = bytes.split_first() else {
        return;
    };
    let accesses = ACCESSES_MAX.min(usize::from(count)) * ACCESS_BYTES;
    let (accesses, memory) = bytes.split_at(accesses.min(bytes.len()));
    let mut made = Ballooned::driven();
    for queue in 0..5 {
        made.rig
            .write(DESCRIPTORS + 0x8000 * queue, &memory[..memory.len().min(0x8000)]);
    }
    made.rig.write(DATA, &memory[..memory.len().min(0x8000)]);
    drive(&made.rig, accesses);
    let target = Ballooned::new();
    if let Err(what) = target.rig.device.restore(&made.rig.device.save()) {
        panic!("a saved balloon is refused: {what}");
    }
    made.start_without(0);
    made.rig.write(0x40_0000, &[7; 4096]);
    made.request(INFLATE, &[0x400]);
    assert!(made.is_hole(0x400), "the balloon does not work after a reset");
}

/// The same of a console, on which something was typed.
pub fn console(bytes: &[u8]) {
    let [typed, count, bytes @ ..] = bytes else {
        return;
    };
    let accesses = ACCESSES_MAX.min(usize::from(*count)) * ACCESS_BYTES;
    let (accesses, memory) = bytes.split_at(accesses.min(bytes.len()));
    let mut made = Ported::driven();
    made.give(1);
    made.rig.run();
    made.port.type_in(&vec![b'x'; usize::from(*typed)]);
    for at in [DESCRIPTORS, DESCRIPTORS + 0x8000, DATA] {
        made.rig.write(at, &memory[..memory.len().min(0x8000)]);
    }
    drive(&made.rig, accesses);
    if let Err(what) = Ported::new().rig.device.restore(&made.rig.device.save()) {
        panic!("a saved console is refused: {what}");
    }
    let before = made.console.next();
    made.start();
    made.offer(b"again");
    while made.rig.device.step() {}
    assert_eq!(
        made.console.next(),
        before + 5,
        "the console does not work after a reset"
    );
}
