//! A VM's saved state: typed and checked, and the protobuf it travels as. Pure; what KVM makes of it is in `cpu::state`.
//!
//! What arrives is hostile until proven otherwise: its size is bounded before it is decoded, every count, id and length is
//! checked here, so that restoring can rely on the shape. Values inside KVM's structures are checked by KVM when they are set.

use drover_proto::v1::{ClockSave, CpuidEntry, IrqchipSave, Msr, SerialSave, VcpuSave, VmSave};
use drover_proto::{Code, Fault};
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES,
    kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use prost::Message;

use crate::DEVICE_MODEL;
use crate::abi::{self, Abi};
use crate::config::VCPUS_MAX;
use crate::devices::acpi::Registers;
use crate::devices::saved::{self, SavedPci, SavedVirtio};
use crate::devices::serial::{REGISTERS, SavedSerial};

/// Largest encoded state: 32 vCPUs of some 20 KiB each and the console's 256 KiB, with room to grow.
pub const SAVE_BYTES_MAX: usize = 8 << 20;
/// The device models of VMs with nothing on their bus, and with something elsewhere than in the slots that are counted.
const MODEL_NO_DEVICES: u32 = 1;
const MODEL_SLOTS: u32 = 4;
/// Most MSRs of a vCPU; KVM lists under 200.
pub const MSRS_MAX: usize = 1024;

/// The state of a whole VM but its memory.
pub struct Saved {
    /// In order of their id, from 0.
    pub vcpus: Vec<SavedVcpu>,
    /// Interrupt controllers and timer.
    pub irqchip: SavedIrqchip,
    /// The guest's clock at the save.
    pub clock: SavedClock,
    /// The serial port and its console.
    pub serial: SavedSerial,
    /// Guest memory, bytes.
    pub memory_bytes: u64,
    /// The PCI bus and its devices; absent where a VMM without buses wrote.
    pub pci: Option<SavedPci>,
    /// ACPI's events.
    pub acpi: Registers,
}

impl Saved {
    /// The least device model that has all that would be missed: see [`device_model`].
    pub fn device_model(&self) -> u32 {
        let devices = self.pci.iter().flat_map(|pci| &pci.devices);
        let model = |device: &SavedVirtio| device.device.device_model();
        device_model(devices.map(|(slot, device)| (*slot, model(device))), &self.acpi)
    }
}

/// The least device model of a VM with these devices, by slot and with the model that brought their kind, and these registers: one that was
/// never hot-plugged can still go to a VMM that knows no hot-plug, one without NICs to a VMM that knows none, one without devices to one
/// that knows no bus.
pub fn device_model(devices: impl IntoIterator<Item = (usize, u32)>, acpi: &Registers) -> u32 {
    let (slots, models): (Vec<usize>, Vec<u32>) = devices.into_iter().unzip();
    // Kinds of later models are counted last.
    let counted = slots.iter().copied().eq(1..=slots.len()) && models.is_sorted();
    let placed = if acpi.is_in_use() || !counted {
        MODEL_SLOTS
    } else {
        MODEL_NO_DEVICES
    };
    models.into_iter().fold(placed, u32::max)
}

/// The state of one vCPU.
pub struct SavedVcpu {
    /// Running, halted, waiting for INIT or SIPI.
    pub mp_state: kvm_mp_state,
    /// General registers.
    pub regs: kvm_regs,
    /// System registers.
    pub sregs: kvm_sregs,
    /// The floating-point and vector state.
    pub xsave: Box<kvm_xsave>,
    /// Extended control registers, where the source's KVM has them.
    pub xcrs: Option<kvm_xcrs>,
    /// Debug registers.
    pub debug_regs: kvm_debugregs,
    /// The local APIC.
    pub lapic: Box<kvm_lapic_state>,
    /// Pending exceptions, interrupts and their like.
    pub events: kvm_vcpu_events,
    /// Model-specific registers.
    pub msrs: Vec<kvm_msr_entry>,
    /// What the guest sees of the CPU.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// TSC rate, kHz; 0 where KVM does not tell.
    pub tsc_khz: u32,
    /// Guest TSC minus host TSC, where KVM tells.
    pub tsc_offset: Option<i64>,
}

/// The interrupt controllers and the timer.
pub struct SavedIrqchip {
    /// The two 8259s and the I/O APIC, in this order.
    pub chips: [kvm_irqchip; 3],
    /// The 8254.
    pub pit: kvm_pit_state2,
}

/// The guest's clock at the save.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SavedClock {
    /// The guest's kvmclock, nanoseconds.
    pub kvmclock_ns: u64,
    /// Real time at the same instant, nanoseconds since 1970.
    pub realtime_ns: u64,
    /// The host's TSC at the same instant, where KVM tells.
    pub host_tsc: Option<u64>,
}

/// The chips' ids in the order of [`SavedIrqchip::chips`].
pub const CHIP_IDS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// The fault of a state that cannot be taken over.
pub fn bad(message: impl Into<String>) -> Fault {
    Fault::new(Code::BadState, message)
}

/// Decodes and checks an encoded state.
pub fn decode(bytes: &[u8]) -> Result<Saved, Fault> {
    if bytes.len() > SAVE_BYTES_MAX {
        return Err(bad(format!(
            "the saved state has {} bytes, at most {SAVE_BYTES_MAX} are read",
            bytes.len()
        )));
    }
    let save =
        VmSave::decode(bytes).map_err(|error| bad(format!("the saved state is no VmSave: {error}")))?;
    if save.device_model == 0 || save.device_model > DEVICE_MODEL {
        let model = save.device_model;
        return Err(bad(format!(
            "the saved state is of device model {model}, this VMM reads 1..={DEVICE_MODEL}"
        )));
    }
    let count = u32::try_from(save.vcpus.len()).unwrap_or(u32::MAX);
    if !(1..=VCPUS_MAX).contains(&count) {
        return Err(bad(format!(
            "the saved state has {count} vCPUs, must be 1..={VCPUS_MAX}"
        )));
    }
    let mut vcpus = Vec::with_capacity(save.vcpus.len());
    for (want, vcpu) in (0u32..).zip(save.vcpus) {
        if vcpu.id != want {
            return Err(bad(format!(
                "vCPU {} stands where vCPU {want} must stand",
                vcpu.id
            )));
        }
        vcpus.push(decode_vcpu(vcpu).map_err(|fault| bad(format!("vCPU {want}: {}", fault.message)))?);
    }
    let (pci, acpi) = saved::decode_board(save.pci, save.acpi).map_err(bad)?;
    let absent = |what: &str| bad(format!("the saved state lacks its {what}"));
    Ok(Saved {
        vcpus,
        irqchip: decode_irqchip(&save.irqchip.ok_or_else(|| absent("irqchip"))?)?,
        clock: decode_clock(save.clock.ok_or_else(|| absent("clock"))?)?,
        serial: decode_serial(save.serial.ok_or_else(|| absent("serial"))?)?,
        memory_bytes: save.memory_bytes,
        pci,
        acpi,
    })
}

fn structure<T: Abi>(what: &str, bytes: &[u8]) -> Result<T, Fault> {
    abi::from_bytes(bytes).map_err(|want| bad(format!("{what} has {} bytes, must have {want}", bytes.len())))
}

fn decode_vcpu(vcpu: VcpuSave) -> Result<SavedVcpu, Fault> {
    if vcpu.msrs.len() > MSRS_MAX || vcpu.cpuid.len() > KVM_MAX_CPUID_ENTRIES {
        let (msrs, leaves) = (vcpu.msrs.len(), vcpu.cpuid.len());
        return Err(bad(format!(
            "{msrs} MSRs and {leaves} CPUID leaves, at most {MSRS_MAX} and {KVM_MAX_CPUID_ENTRIES} are read"
        )));
    }
    let xcrs = if vcpu.xcrs.is_empty() {
        None
    } else {
        Some(structure::<kvm_xcrs>("xcrs", &vcpu.xcrs)?)
    };
    if let Some(xcrs) = &xcrs
        && xcrs.nr_xcrs as usize > xcrs.xcrs.len()
    {
        return Err(bad(format!("xcrs claims {} registers", xcrs.nr_xcrs)));
    }
    Ok(SavedVcpu {
        mp_state: structure("mp_state", &vcpu.mp_state)?,
        regs: structure("regs", &vcpu.regs)?,
        sregs: structure("sregs", &vcpu.sregs)?,
        xsave: Box::new(structure("xsave", &vcpu.xsave)?),
        xcrs,
        debug_regs: structure("debug_regs", &vcpu.debug_regs)?,
        lapic: Box::new(structure("lapic", &vcpu.lapic)?),
        events: structure("events", &vcpu.events)?,
        msrs: vcpu
            .msrs
            .iter()
            .map(|msr| msr_entry(msr.index, msr.value))
            .collect(),
        cpuid: vcpu.cpuid.iter().map(cpuid_entry).collect(),
        tsc_khz: u32::try_from(vcpu.tsc_khz)
            .map_err(|_| bad(format!("a TSC rate of {} kHz is not one", vcpu.tsc_khz)))?,
        tsc_offset: vcpu.tsc_offset,
    })
}

/// An MSR with a value, as KVM takes it.
pub fn msr_entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }
}

fn cpuid_entry(entry: &CpuidEntry) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function: entry.function,
        index: entry.index,
        flags: entry.flags,
        eax: entry.eax,
        ebx: entry.ebx,
        ecx: entry.ecx,
        edx: entry.edx,
        ..Default::default()
    }
}

fn decode_irqchip(save: &IrqchipSave) -> Result<SavedIrqchip, Fault> {
    let chip = |what: &str, bytes: &[u8], id: u32| {
        let chip: kvm_irqchip = structure(what, bytes)?;
        if chip.chip_id != id {
            return Err(bad(format!(
                "{what} is of chip {}, must be of chip {id}",
                chip.chip_id
            )));
        }
        Ok(chip)
    };
    Ok(SavedIrqchip {
        chips: [
            chip("pic_master", &save.pic_master, CHIP_IDS[0])?,
            chip("pic_slave", &save.pic_slave, CHIP_IDS[1])?,
            chip("ioapic", &save.ioapic, CHIP_IDS[2])?,
        ],
        pit: structure("pit", &save.pit)?,
    })
}

fn decode_clock(save: ClockSave) -> Result<SavedClock, Fault> {
    if save.kvmclock_ns > i64::MAX.unsigned_abs() {
        return Err(bad(format!(
            "a kvmclock of {} ns lies beyond any guest's life",
            save.kvmclock_ns
        )));
    }
    Ok(SavedClock {
        kvmclock_ns: save.kvmclock_ns,
        realtime_ns: save.realtime_ns,
        host_tsc: (save.host_tsc != 0).then_some(save.host_tsc),
    })
}

fn decode_serial(save: SerialSave) -> Result<SavedSerial, Fault> {
    let registers: [u8; REGISTERS] = save.registers.as_slice().try_into().map_err(|_| {
        bad(format!(
            "serial.registers has {} bytes, must have {REGISTERS}",
            save.registers.len()
        ))
    })?;
    let serial = SavedSerial {
        registers,
        scrollback: save.scrollback,
        console_next: save.console_next,
        input: save.input,
    };
    serial.check().map_err(bad)?;
    Ok(serial)
}

/// Encodes a state.
pub fn encode(saved: &Saved) -> Vec<u8> {
    let [master, slave, ioapic] = &saved.irqchip.chips;
    let has_devices = |pci: &&SavedPci| !pci.devices.is_empty();
    let used = saved.pci.as_ref().filter(has_devices);
    let idle = saved.pci.as_ref().filter(|pci| !has_devices(pci));
    let save = VmSave {
        device_model: saved.device_model(),
        vcpus: (0u32..)
            .zip(&saved.vcpus)
            .map(|(id, vcpu)| encode_vcpu(id, vcpu))
            .collect(),
        irqchip: Some(IrqchipSave {
            pic_master: abi::to_bytes(master),
            pic_slave: abi::to_bytes(slave),
            ioapic: abi::to_bytes(ioapic),
            pit: abi::to_bytes(&saved.irqchip.pit),
        }),
        clock: Some(ClockSave {
            kvmclock_ns: saved.clock.kvmclock_ns,
            realtime_ns: saved.clock.realtime_ns,
            host_tsc: saved.clock.host_tsc.unwrap_or(0),
        }),
        serial: Some(SerialSave {
            registers: saved.serial.registers.to_vec(),
            scrollback: saved.serial.scrollback.clone(),
            console_next: saved.serial.console_next,
            input: saved.serial.input.clone(),
        }),
        memory_bytes: saved.memory_bytes,
        pci: used.map(saved::encode),
        acpi: Some(saved::encode_acpi(&saved.acpi, idle)),
    };
    save.encode_to_vec()
}

fn encode_vcpu(id: u32, vcpu: &SavedVcpu) -> VcpuSave {
    VcpuSave {
        id,
        mp_state: abi::to_bytes(&vcpu.mp_state),
        regs: abi::to_bytes(&vcpu.regs),
        sregs: abi::to_bytes(&vcpu.sregs),
        xsave: abi::to_bytes(&*vcpu.xsave),
        xcrs: vcpu.xcrs.as_ref().map(abi::to_bytes).unwrap_or_default(),
        debug_regs: abi::to_bytes(&vcpu.debug_regs),
        lapic: abi::to_bytes(&*vcpu.lapic),
        events: abi::to_bytes(&vcpu.events),
        msrs: vcpu
            .msrs
            .iter()
            .map(|msr| Msr {
                index: msr.index,
                value: msr.data,
            })
            .collect(),
        cpuid: vcpu
            .cpuid
            .iter()
            .map(|entry| CpuidEntry {
                function: entry.function,
                index: entry.index,
                flags: entry.flags,
                eax: entry.eax,
                ebx: entry.ebx,
                ecx: entry.ecx,
                edx: entry.edx,
            })
            .collect(),
        tsc_khz: u64::from(vcpu.tsc_khz),
        tsc_offset: vcpu.tsc_offset,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A state with `vcpus` vCPUs that decodes.
    pub(crate) fn sample(vcpus: u64) -> Saved {
        let chip = |id| kvm_irqchip {
            chip_id: id,
            ..abi::zeroed()
        };
        let vcpu = |id: u64| SavedVcpu {
            mp_state: kvm_mp_state { mp_state: 0 },
            regs: kvm_regs {
                rip: 0x10_0000 + id,
                ..Default::default()
            },
            sregs: kvm_sregs::default(),
            xsave: Box::new(abi::zeroed()),
            xcrs: Some(kvm_xcrs {
                nr_xcrs: 1,
                ..Default::default()
            }),
            debug_regs: kvm_debugregs::default(),
            lapic: Box::new(abi::zeroed()),
            events: kvm_vcpu_events::default(),
            msrs: vec![msr_entry(0x10, 1_000 + id), msr_entry(0x6e0, 5)],
            cpuid: vec![kvm_cpuid_entry2 {
                function: 1,
                ebx: 7,
                ..Default::default()
            }],
            tsc_khz: 2_400_000,
            tsc_offset: Some(-5),
        };
        Saved {
            vcpus: (0..vcpus).map(vcpu).collect(),
            irqchip: SavedIrqchip {
                chips: CHIP_IDS.map(chip),
                pit: kvm_pit_state2::default(),
            },
            clock: SavedClock {
                kvmclock_ns: 1,
                realtime_ns: 2,
                host_tsc: Some(3),
            },
            serial: SavedSerial {
                registers: [0; REGISTERS],
                scrollback: b"hello".to_vec(),
                console_next: 5,
                input: b"x".to_vec(),
            },
            memory_bytes: 64 << 20,
            pci: None,
            acpi: Registers::default(),
        }
    }

    #[test]
    fn a_state_survives_its_encoding() {
        let bytes = encode(&sample(2));
        let back = decode(&bytes).unwrap();
        assert_eq!(back.vcpus[1].regs.rip, 0x10_0001);
        assert_eq!(
            back.clock,
            SavedClock {
                kvmclock_ns: 1,
                realtime_ns: 2,
                host_tsc: Some(3)
            }
        );
        assert_eq!(encode(&back), bytes);
    }

    #[test]
    fn a_state_of_the_wrong_shape_is_refused_with_what_is_wrong() {
        type Change = fn(&mut VmSave);
        let cases: [(Change, &str); 11] = [
            (|save| save.device_model = DEVICE_MODEL + 1, "device model 7"),
            (|save| save.device_model = 0, "device model 0"),
            (|save| save.vcpus.clear(), "0 vCPUs"),
            (|save| save.vcpus[1].id = 0, "vCPU 0 stands where vCPU 1"),
            (|save| save.vcpus[0].xsave.truncate(4095), "xsave has 4095"),
            (|save| save.vcpus[0].regs.push(0), "regs has"),
            (
                |save| save.vcpus[0].msrs = vec![Msr::default(); MSRS_MAX + 1],
                "MSRs",
            ),
            (|save| save.irqchip = None, "irqchip"),
            (
                |save| save.irqchip.as_mut().unwrap().pic_slave[0] = 0,
                "must be of chip 1",
            ),
            (
                |save| save.serial.as_mut().unwrap().registers.clear(),
                "serial.registers",
            ),
            (|save| save.serial.as_mut().unwrap().console_next = 4, "console"),
        ];
        let good = VmSave::decode(encode(&sample(2)).as_slice()).unwrap();
        for (change, want) in cases {
            let mut save = good.clone();
            change(&mut save);
            let fault = decode(&save.encode_to_vec()).map(|_| ()).unwrap_err();
            assert_eq!(fault.code, Code::BadState);
            assert!(
                fault.message.contains(want),
                "{:?} does not say {want:?}",
                fault.message
            );
        }
    }

    #[test]
    fn a_state_too_large_to_be_one_is_not_even_decoded() {
        let fault = decode(&vec![0; SAVE_BYTES_MAX + 1]).map(|_| ()).unwrap_err();
        assert!(fault.message.contains("at most"), "{}", fault.message);
    }

    proptest! {
        #[test]
        fn damaged_bytes_are_refused_or_decode_to_a_state_that_encodes(
            flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
            cut in any::<prop::sample::Index>(),
            truncate in any::<bool>(),
        ) {
            let mut bytes = encode(&sample(1));
            for (at, value) in flips {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            if truncate {
                bytes.truncate(cut.index(bytes.len()));
            }
            if let Ok(saved) = decode(&bytes) {
                prop_assert!(decode(&encode(&saved)).is_ok());
            }
        }
    }
}
