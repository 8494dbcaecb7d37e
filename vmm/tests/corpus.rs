//! The fuzz targets' corpus: every test run replays it and mutates it a little. `DROVER_WRITE_CORPUS=1` writes it anew.

#![allow(clippy::unwrap_used, reason = "a test may, its helpers too")]

#[path = "../fuzz/exercise.rs"]
mod exercise;
#[path = "../fuzz/exercise_virtio.rs"]
mod exercise_virtio;

use std::mem::size_of;
use std::path::{Path, PathBuf};

use drover_proto::v1::{
    AcpiSave, ClockSave, CpuidEntry, IrqchipSave, Msr, PciSave, SerialSave, VcpuSave, VirtioBalloonSave,
    VirtioBlkSave, VirtioConsoleSave, VirtioNetSave, VirtioQueueSave, VirtioSave, VmSave, virtio_save,
};
use kvm_bindings::{
    kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_pit_state2, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use proptest::prelude::*;
use prost::Message;

fn vcpu(id: u32) -> VcpuSave {
    VcpuSave {
        id,
        mp_state: vec![0; size_of::<kvm_mp_state>()],
        regs: vec![1; size_of::<kvm_regs>()],
        sregs: vec![2; size_of::<kvm_sregs>()],
        xsave: vec![0; size_of::<kvm_xsave>()],
        xcrs: vec![0; size_of::<kvm_xcrs>()],
        debug_regs: vec![0; size_of::<kvm_debugregs>()],
        lapic: vec![0; size_of::<kvm_lapic_state>()],
        events: vec![0; size_of::<kvm_vcpu_events>()],
        msrs: vec![Msr {
            index: 0x10,
            value: 7,
        }],
        cpuid: vec![CpuidEntry {
            function: 1,
            edx: 0xff,
            ..Default::default()
        }],
        tsc_khz: 2_000_000,
        tsc_offset: Some(-1),
    }
}

fn vm(vcpus: u32) -> VmSave {
    let chip = |id: u8| {
        let mut bytes = vec![0; size_of::<kvm_irqchip>()];
        bytes[0] = id;
        bytes
    };
    VmSave {
        device_model: 1,
        vcpus: (0..vcpus).map(vcpu).collect(),
        irqchip: Some(IrqchipSave {
            pic_master: chip(0),
            pic_slave: chip(1),
            ioapic: chip(2),
            pit: vec![0; size_of::<kvm_pit_state2>()],
        }),
        clock: Some(ClockSave {
            kvmclock_ns: 1,
            realtime_ns: 2,
            host_tsc: 3,
        }),
        serial: Some(SerialSave {
            registers: vec![0; 9],
            scrollback: b"hello\n".to_vec(),
            console_next: 6,
            input: b"x".to_vec(),
        }),
        memory_bytes: 64 << 20,
        pci: None,
        acpi: None,
    }
}

/// The same with its disk in a later slot, which it is asked to give up, and a button that was pressed.
fn hot_plugged() -> VmSave {
    let mut save = with_disk();
    save.device_model = 4;
    save.pci.as_mut().unwrap().slots = vec![7];
    save.acpi = Some(AcpiSave {
        pm1_status: 0x100,
        pm1_enable: 0x100,
        gpe_enable: 2,
        filled: 0,
        asked: 1 << 7,
        leaving: 1 << 7,
        idle_bus: None,
    });
    save
}

/// A VM with a bus and a disk whose driver is at work.
fn with_disk() -> VmSave {
    let queue = VirtioQueueSave {
        size: 64,
        enabled: true,
        descriptors: 0x1000,
        available: 0x2000,
        used: 0x3000,
        vector: 1,
        next_available: 9,
        next_used: 9,
    };
    let device = VirtioSave {
        config: vec![0; 256],
        msix_table: vec![0; 32],
        msix_pending: vec![0],
        offered: 1 << 32,
        accepted: 1 << 32,
        status: 15,
        queues: vec![queue],
        device: Some(virtio_save::Device::Blk(VirtioBlkSave {
            sectors: 2048,
            read_only: false,
            serial: "vol-1".to_owned(),
        })),
        ..Default::default()
    };
    VmSave {
        device_model: 2,
        pci: Some(PciSave {
            address: 0x8000_0800,
            bridge: vec![0; 256],
            devices: vec![device],
            slots: vec![],
        }),
        ..vm(1)
    }
}

/// The same with a NIC that holds a frame.
fn with_nic() -> VmSave {
    let mut save = with_disk();
    save.device_model = 3;
    let device = &mut save.pci.as_mut().unwrap().devices[0];
    device.device = Some(virtio_save::Device::Net(VirtioNetSave {
        mac: vec![0x52, 0x54, 0, 1, 2, 3],
        mtu: 1500,
        held: vec![0; 72],
    }));
    save
}

/// The same with a balloon, in the last slot.
fn with_balloon() -> VmSave {
    let mut save = with_disk();
    save.device_model = 5;
    let pci = save.pci.as_mut().unwrap();
    pci.slots = vec![31];
    pci.devices[0].device = Some(virtio_save::Device::Balloon(VirtioBalloonSave {
        target_pages: 1024,
        revision: 3,
        actual_pages: 1000,
    }));
    save
}

/// The same with a console, on which more was typed than its driver has taken.
fn with_console() -> VmSave {
    let mut save = with_balloon();
    save.device_model = 6;
    let pci = save.pci.as_mut().unwrap();
    pci.slots = vec![29];
    pci.devices[0].device = Some(virtio_save::Device::Console(VirtioConsoleSave {
        input: b"root\n".to_vec(),
        hears: true,
    }));
    save
}

fn saves() -> Vec<(&'static str, Vec<u8>)> {
    let encoded = |change: fn(&mut VmSave)| {
        let mut save = vm(1);
        change(&mut save);
        save.encode_to_vec()
    };
    let whole = encoded(|_| {});
    vec![
        ("empty", vec![]),
        ("one-vcpu", whole.clone()),
        ("two-vcpus", vm(2).encode_to_vec()),
        ("truncated", whole[..whole.len() / 2].to_vec()),
        ("newer-model", encoded(|save| save.device_model = 7)),
        ("hot-plugged", hot_plugged().encode_to_vec()),
        ("slot-of-the-bridge", {
            let mut save = hot_plugged();
            save.pci.as_mut().unwrap().slots = vec![0];
            save.encode_to_vec()
        }),
        ("idle-bus", {
            let idle_bus = Some(PciSave {
                bridge: vec![0; 256],
                ..Default::default()
            });
            let acpi = AcpiSave {
                idle_bus,
                ..Default::default()
            };
            let with_bus = VmSave {
                acpi: Some(acpi),
                ..vm(1)
            };
            with_bus.encode_to_vec()
        }),
        ("no-vcpus", encoded(|save| save.vcpus.clear())),
        ("wrong-order", encoded(|save| save.vcpus[0].id = 1)),
        ("short-xsave", encoded(|save| save.vcpus[0].xsave.truncate(100))),
        (
            "wrong-chip",
            encoded(|save| save.irqchip.as_mut().unwrap().ioapic[0] = 9),
        ),
        (
            "console-lies",
            encoded(|save| save.serial.as_mut().unwrap().console_next = 1),
        ),
        ("many-xcrs", encoded(|save| save.vcpus[0].xcrs[0] = 200)),
        ("one-disk", with_disk().encode_to_vec()),
        ("one-nic", with_nic().encode_to_vec()),
        ("one-balloon", with_balloon().encode_to_vec()),
        ("one-console", with_console().encode_to_vec()),
        ("typed-too-much", {
            let mut save = with_console();
            save.pci.as_mut().unwrap().devices[0].device =
                Some(virtio_save::Device::Console(VirtioConsoleSave {
                    input: vec![b'x'; 4097],
                    hears: true,
                }));
            save.encode_to_vec()
        }),
        ("no-such-device", {
            let mut save = with_disk();
            save.pci.as_mut().unwrap().devices[0].device = None;
            save.encode_to_vec()
        }),
        ("wide-status", {
            let mut save = with_disk();
            save.pci.as_mut().unwrap().devices[0].status = 256;
            save.encode_to_vec()
        }),
        ("not-ours", b"hello, who is there?".to_vec()),
    ]
}

fn elf() -> Vec<u8> {
    let mut file = vec![0u8; 64 + 2 * 56];
    file[..7].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1]);
    file[16..20].copy_from_slice(&[2, 0, 62, 0]);
    file[24..32].copy_from_slice(&0x20_0000u64.to_le_bytes());
    file[32..40].copy_from_slice(&64u64.to_le_bytes());
    file[54..58].copy_from_slice(&[56, 0, 2, 0]);
    for (at, kind, offset, len) in [(64, 1u32, 176u64, 16u64), (120, 4, 192, 20)] {
        file[at..at + 4].copy_from_slice(&kind.to_le_bytes());
        file[at + 8..at + 16].copy_from_slice(&offset.to_le_bytes());
        file[at + 24..at + 32].copy_from_slice(&0x20_0000u64.to_le_bytes());
        file[at + 32..at + 40].copy_from_slice(&len.to_le_bytes());
        file[at + 40..at + 48].copy_from_slice(&len.to_le_bytes());
    }
    file.extend([0xf4; 16]);
    file.extend([4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
    file.extend(b"Xen\0");
    file.extend(0x20_0000u32.to_le_bytes());
    file
}

fn bzimage() -> Vec<u8> {
    let mut file = vec![0u8; 2 * 512 + 0x400];
    file[0x1f1] = 1;
    file[0x1f4] = 0x40;
    file[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    file[0x201..0x208].copy_from_slice(b"\x66HdrS\x0f\x02");
    file[0x211] = 1;
    file[0x236] = 1;
    file[0x258..0x260].copy_from_slice(&0x100_0000u64.to_le_bytes());
    file[0x260..0x264].copy_from_slice(&0x20_0000u32.to_le_bytes());
    file
}

fn kernels() -> Vec<(&'static str, Vec<u8>)> {
    let mut huge = elf();
    huge[64 + 40..64 + 48].copy_from_slice(&u64::MAX.to_le_bytes());
    let mut notes = elf();
    notes[192..196].copy_from_slice(&u32::MAX.to_le_bytes());
    vec![
        ("empty", vec![]),
        ("elf-pvh", elf()),
        ("elf-truncated", elf()[..100].to_vec()),
        ("elf-endless-segment", huge),
        ("elf-endless-note", notes),
        ("bzimage", bzimage()),
        ("bzimage-truncated", bzimage()[..0x500].to_vec()),
        ("script", b"#!/bin/sh\nexit 0\n".to_vec()),
    ]
}

/// Accesses, then the memory of a queue: see `exercise_virtio.rs`.
fn drivers() -> Vec<(&'static str, Vec<u8>)> {
    let descriptor = |gpa: u64, len: u32, flags: u16, next: u16| {
        [
            gpa.to_le_bytes().as_slice(),
            &len.to_le_bytes(),
            &flags.to_le_bytes(),
            &next.to_le_bytes(),
        ]
        .concat()
    };
    let queue = |descriptors: Vec<Vec<u8>>, heads: &[u16]| {
        let mut memory = vec![0; 0x2100];
        let descriptors = descriptors.concat();
        memory[..descriptors.len()].copy_from_slice(&descriptors);
        memory[0x2002] = u8::try_from(heads.len()).unwrap();
        for (at, head) in heads.iter().enumerate() {
            memory[0x2004 + 2 * at..][..2].copy_from_slice(&head.to_le_bytes());
        }
        memory
    };
    let bytes = |accesses: &[[u8; 12]], memory: Vec<u8>| {
        let count = u8::try_from(accesses.len()).unwrap();
        [vec![count], accesses.concat(), memory].concat()
    };
    let reset = [0, 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let move_region = [2, 0x10, 0, 3, 0, 0, 0, 0xd0, 0, 0, 0, 0];
    let request = vec![
        descriptor(0x11_0000, 16, 1, 1),
        descriptor(0x12_0000, 1024, 3, 2),
        descriptor(0x13_0000, 1, 2, 0),
    ];
    vec![
        ("empty", vec![]),
        ("a-read", bytes(&[], queue(request.clone(), &[0, 0, 0]))),
        (
            "a-loop",
            bytes(&[], queue(vec![descriptor(0x11_0000, 16, 3, 0)], &[0])),
        ),
        (
            "a-table",
            bytes(
                &[],
                queue(
                    vec![descriptor(0x10_0010, 16, 4, 0), descriptor(0x11_0000, 16, 2, 0)],
                    &[0],
                ),
            ),
        ),
        ("far-head", bytes(&[], queue(request.clone(), &[9]))),
        ("reset", bytes(&[reset, move_region, reset], queue(request, &[0]))),
    ]
}

/// Frames from outside before what a driver does.
fn networks() -> Vec<(&'static str, Vec<u8>)> {
    let frame = |words: u8, flags: u8| {
        let mut frame = vec![0; 8 * usize::from(words) + 1];
        (frame[0], frame[1]) = (words, flags);
        frame
    };
    let frames = |of: &[(u8, u8)]| {
        let count = u8::try_from(of.len()).unwrap();
        let frames = of.iter().flat_map(|&(words, flags)| frame(words, flags));
        [count].into_iter().chain(frames).collect::<Vec<u8>>()
    };
    let mut made = vec![("empty", vec![])];
    for ((name, driver), come) in drivers().into_iter().skip(1).zip([
        frames(&[(9, 0), (9, 0)]),
        frames(&[(200, 0)]),
        frames(&[(1, 0), (9, 3)]),
        frames(&[(9, 1)]),
        frames(&[]),
    ]) {
        made.push((name, [come, driver].concat()));
    }
    made
}

/// Requests in every queue of a balloon: numbers of pages, and pages themselves.
fn balloons() -> Vec<(&'static str, Vec<u8>)> {
    let request = |gpa: u64, len: u32, flags: u16, numbers: &[u32]| {
        let mut memory = vec![0; 0x2100];
        memory[..8].copy_from_slice(&gpa.to_le_bytes());
        memory[8..12].copy_from_slice(&len.to_le_bytes());
        memory[12..14].copy_from_slice(&flags.to_le_bytes());
        // One chain is available, its head the first descriptor; the numbers lie behind it, where the data is too.
        memory[0x2002] = 1;
        for (at, number) in numbers.iter().enumerate() {
            memory[0x100 + 4 * at..][..4].copy_from_slice(&number.to_le_bytes());
        }
        memory
    };
    let with = |accesses: &[[u8; 12]], memory: Vec<u8>| {
        let count = u8::try_from(accesses.len()).unwrap();
        [vec![count], accesses.concat(), memory].concat()
    };
    let numbers_at = 0x10_0100;
    let set_actual = [0, 4, 0x20, 3, 44, 1, 0, 0, 0, 0, 0, 0];
    let reset = [0, 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    vec![
        ("empty", vec![]),
        (
            "pages",
            with(&[], request(numbers_at, 16, 0, &[1025, 1024, 1026, 1024])),
        ),
        // The rings themselves, and the page of the numbers.
        (
            "own-pages",
            with(&[], request(numbers_at, 20, 0, &[1, 3, 5, 256, 9])),
        ),
        (
            "far-page",
            with(&[], request(numbers_at, 8, 0, &[1024, 0xffff_ffff])),
        ),
        ("cut-number", with(&[], request(numbers_at, 7, 0, &[1024, 1025]))),
        ("report", with(&[set_actual], request(0x50_0800, 0x3000, 2, &[]))),
        ("report-of-all", with(&[], request(0, 16 << 20, 2, &[]))),
        (
            "reset",
            with(&[reset, set_actual], request(numbers_at, 4, 0, &[1024])),
        ),
    ]
}

/// Input and output of a console, and how they are cut.
fn consoles() -> Vec<(&'static str, Vec<u8>)> {
    // One chain is available in either queue: they begin with the same memory.
    let chain = |parts: &[(u64, u32, u16, u16)]| {
        let mut memory = vec![0; 0x2100];
        for (at, (gpa, len, flags, next)) in parts.iter().enumerate() {
            let descriptor = &mut memory[16 * at..][..16];
            descriptor[..8].copy_from_slice(&gpa.to_le_bytes());
            descriptor[8..12].copy_from_slice(&len.to_le_bytes());
            descriptor[12..14].copy_from_slice(&flags.to_le_bytes());
            descriptor[14..].copy_from_slice(&next.to_le_bytes());
        }
        memory[0x2002] = 1;
        memory
    };
    let with = |typed: u8, accesses: &[[u8; 12]], memory: Vec<u8>| {
        let count = u8::try_from(accesses.len()).unwrap();
        [vec![typed, count], accesses.concat(), memory].concat()
    };
    let reset = [0, 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let data = 0x10_0000;
    vec![
        ("empty", vec![]),
        ("output", with(0, &[], chain(&[(data, 16, 0, 0)]))),
        ("input", with(9, &[], chain(&[(data, 16, 2, 0)]))),
        (
            "cut",
            with(255, &[], chain(&[(data, 1, 3, 1), (data + 9, 300, 2, 0)])),
        ),
        ("loop", with(1, &[], chain(&[(data, 1, 1, 1), (data, 1, 1, 0)]))),
        ("large", with(1, &[], chain(&[(0, 16 << 20, 0, 0)]))),
        ("reset", with(3, &[reset], chain(&[(data, 2, 2, 0)]))),
    ]
}

fn folder(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(target)
}

fn check(target: &str, made: &[(&str, Vec<u8>)], exercise: fn(&[u8])) {
    let folder = folder(target);
    if std::env::var_os("DROVER_WRITE_CORPUS").is_some() {
        std::fs::create_dir_all(&folder).unwrap();
        for (name, bytes) in made {
            std::fs::write(folder.join(name), bytes).unwrap();
        }
    }
    for (name, bytes) in made {
        let stored = std::fs::read(folder.join(name)).unwrap();
        assert_eq!(
            &stored, bytes,
            "{target}/{name} is not what this test makes; see its head"
        );
    }
    let mut replayed = 0;
    for entry in std::fs::read_dir(&folder).unwrap() {
        exercise(&std::fs::read(entry.unwrap().path()).unwrap());
        replayed += 1;
    }
    assert!(replayed >= made.len());
}

#[test]
fn the_corpus_of_saved_states_is_replayed() {
    check("save", &saves(), exercise::save);
    for whole in [
        "one-vcpu",
        "two-vcpus",
        "one-disk",
        "one-nic",
        "one-balloon",
        "one-console",
    ] {
        let bytes = std::fs::read(folder("save").join(whole)).unwrap();
        assert!(
            drover_vmm::save::decode(&bytes).is_ok(),
            "{whole} no longer decodes"
        );
    }
}

#[test]
fn the_corpus_of_kernels_is_replayed() {
    check("kernel", &kernels(), exercise::kernel);
    for whole in ["elf-pvh", "bzimage"] {
        let bytes = std::fs::read(folder("kernel").join(whole)).unwrap();
        assert!(
            drover_vmm::boot::image::parse(&bytes).is_ok(),
            "{whole} is no longer a kernel"
        );
    }
}

#[test]
fn the_corpus_of_drivers_is_replayed() {
    check("virtio", &drivers(), exercise_virtio::virtio);
}

#[test]
fn the_corpus_of_balloons_is_replayed() {
    check("balloon", &balloons(), exercise_virtio::balloon);
}

#[test]
fn the_corpus_of_consoles_is_replayed() {
    check("console", &consoles(), exercise_virtio::console);
}

#[test]
fn the_corpus_of_networks_is_replayed() {
    check("nic", &networks(), exercise_virtio::nic);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_mutated_driver_breaks_nothing(
        kind in 0..4,
        pick in any::<prop::sample::Index>(),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12),
    ) {
        let (made, exercise): (_, fn(&[u8])) = match kind {
            0 => (drivers(), exercise_virtio::virtio),
            1 => (networks(), exercise_virtio::nic),
            2 => (balloons(), exercise_virtio::balloon),
            _ => (consoles(), exercise_virtio::console),
        };
        let mut bytes = made[pick.index(made.len())].1.clone();
        for (at, value) in changes {
            if !bytes.is_empty() {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
        }
        exercise(&bytes);
    }
}

proptest! {
    #[test]
    fn a_mutated_corpus_breaks_nothing(
        pick in any::<prop::sample::Index>(),
        kernel in any::<bool>(),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let made = if kernel { kernels() } else { saves() };
        let mut bytes = made[pick.index(made.len())].1.clone();
        for (at, value) in changes {
            if !bytes.is_empty() {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
        }
        if kernel { exercise::kernel(&bytes) } else { exercise::save(&bytes) }
    }
}
