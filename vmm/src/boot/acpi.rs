//! The ACPI tables: how a guest learns of its CPUs, its interrupt controllers, and how to power off.
//!
//! Stock distribution kernels are built without support for the multiprocessor table, so this is what they boot by; the other
//! table remains for small kernels without an ACPI interpreter. Source: ACPI Specification 6.4, chapter 5.
//!
//! ```text
//!   RSDP ─► XSDT ─► FADT ─► DSDT: \_S5, the PCI root and its slots, the event that says that slots changed
//!              │        └──► FACS
//!              └──► MADT: local APICs, the I/O APIC, what differs from ISA's interrupts
//! ```
//!
//! The PCI root says where its registers may lie and how it is configured; what is on it the guest finds by itself. It has no table of
//! interrupt pins (`_PRT`), since no device has a pin, and no MCFG, since there is no extended configuration space.
//!
//! Each slot can be filled and given up while the guest runs (6.3): general-purpose event 1 has its interpreter read which slots changed
//! ([`crate::devices::acpi`]) and notify their drivers; `_EJ0` gives a slot up. Whether anything is in a slot, its configuration space
//! says, so there is no `_STA`. The power button is the fixed one (4.8.2.2.1.1), which needs no device here.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Device, EISAName, Field, FieldAccessType, FieldEntry,
    FieldLockRule, FieldUpdateRule, IO, If, Local, Method, MethodCall, Name, Notify, OpRegion, OpRegionSpace,
    Path, ResourceTemplate, Scope, Store,
};
use acpi_tables::{Aml, AmlSink};

use super::ACPI;
use crate::devices::acpi::{
    GPE_SLOTS, GPE0, GPE0_BYTES, PM1A_EVENT, PM1A_EVENT_BYTES, SCI_IRQ, SLOT_REGISTER_BYTES, SLOT_REGISTERS,
};
use crate::devices::pci;

const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;
const HEADER_BYTES: usize = 36;
const RSDP_BYTES: usize = 36;
const FADT_BYTES: usize = 276;
const FACS_BYTES: usize = 64;

/// PM1a control register.
pub const PM1A_CONTROL: u16 = 0x604;
/// The keyboard controller's command port and its command to reset.
const RESET_PORT: u16 = 0x64;
const RESET_VALUE: u8 = 0xfe;

/// `Name (\_S5, Package () { 0, 0, 0, 0 })`: sleep type 0 powers off.
const SOFT_OFF: [u8; 12] = [0x08, b'_', b'S', b'5', b'_', 0x12, 0x06, 0x04, 0, 0, 0, 0];

/// Ports that devices of the PCI bus could have; none has any.
const PCI_PORTS: (u16, u16) = (0x1000, 0xffff);

/// The PCI root bus (PCI Firmware Specification 3.3, 4.1), as the bytes of a definition block.
fn pci_root() -> Vec<u8> {
    let address = |gpa: u64| u32::try_from(gpa).expect("the window lies below 4 GiB");
    let mmio = (address(pci::MMIO.start), address(pci::MMIO.end - 1));
    let resources = bytes_of(&ResourceTemplate::new(vec![
        &AddressSpace::new_bus_number(0u16, 0u16),
        &IO::new(pci::ADDRESS_PORT, pci::ADDRESS_PORT, 1, 8),
        &AddressSpace::new_io(PCI_PORTS.0, PCI_PORTS.1, None),
        &AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, mmio.0, mmio.1, None),
    ]));
    // A conventional bus: PNP0A08 would promise the extended configuration space.
    let (hid, zero) = (EISAName::new("PNP0A03"), 0u8);
    let root = bytes_of(&Device::new(
        "PCI0".into(),
        vec![
            &Name::new("_HID".into(), &hid),
            &Name::new("_UID".into(), &zero),
            &Name::new("_SEG".into(), &zero),
            &Name::new("_BBN".into(), &zero),
            &Name::new("_CRS".into(), &Raw(resources)),
            &Raw(slots()),
        ],
    ));
    Scope::raw("\\_SB_".into(), [root, slot_registers()].concat())
}

/// What Notify tells a slot's driver (5.6.6): look what is there; give it up.
const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;

fn slot_name(slot: usize) -> Path {
    Path::new(&format!("S{slot:03}"))
}

/// The root bus's slots, and the method `SLTS` that reads and acknowledges which of them changed.
fn slots() -> Vec<u8> {
    let region = OpRegion::new(
        "SREG".into(),
        OpRegionSpace::SystemIO,
        &SLOT_REGISTERS,
        &SLOT_REGISTER_BYTES,
    );
    let named = |name: &[u8; 4]| FieldEntry::Named(*name, 32);
    let fields = Field::new(
        "SREG".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![named(b"FILL"), named(b"ASKD"), named(b"GIVE")],
    );
    let mut bytes = [bytes_of(&region), bytes_of(&fields)].concat();
    for slot in 1..pci::SLOTS {
        let number = u32::try_from(slot).expect("few slots");
        let (address, mask) = (number << 16, 1u32 << number);
        let give: Path = "GIVE".into();
        bytes.extend(bytes_of(&Device::new(
            slot_name(slot),
            vec![
                &Name::new("_ADR".into(), &address),
                &Name::new("_SUN".into(), &number),
                &Method::new("_EJ0".into(), 1, true, vec![&Store::new(&give, &mask)]),
            ],
        )));
    }
    let mut looks = Vec::new();
    for (register, what) in [("FILL", DEVICE_CHECK), ("ASKD", EJECT_REQUEST)] {
        let register: Path = register.into();
        looks.extend(bytes_of(&Store::new(&Local(0), &register)));
        looks.extend(bytes_of(&Store::new(&register, &Local(0))));
        for slot in 1..pci::SLOTS {
            let (name, mask) = (slot_name(slot), 1u32 << slot);
            looks.extend(bytes_of(&If::new(
                &And::new(&Local(1), &Local(0), &mask),
                vec![&Notify::new(&name, &what)],
            )));
        }
    }
    bytes.extend(bytes_of(&Method::new("SLTS".into(), 0, true, vec![&Raw(looks)])));
    bytes
}

/// The ports of the slots' registers, so that a guest places nothing else there.
fn slot_registers() -> Vec<u8> {
    let ports = IO::new(SLOT_REGISTERS, SLOT_REGISTERS, 1, SLOT_REGISTER_BYTES);
    let (hid, resources) = (EISAName::new("PNP0C02"), ResourceTemplate::new(vec![&ports]));
    bytes_of(&Device::new(
        "SRES".into(),
        vec![
            &Name::new("_HID".into(), &hid),
            &Name::new("_CRS".into(), &resources),
        ],
    ))
}

/// The event's method. Of the level kind: the interpreter clears the event after it, when there is nothing left to acknowledge.
fn events() -> Vec<u8> {
    let look = MethodCall::new("\\_SB_.PCI0.SLTS".into(), vec![]);
    let method = bytes_of(&Method::new(
        Path::new(&format!("_L{GPE_SLOTS:02X}")),
        0,
        false,
        vec![&look],
    ));
    Scope::raw("\\_GPE".into(), method)
}

/// Bytes that are AML already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

fn bytes_of(aml: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    bytes
}

fn dsdt() -> Vec<u8> {
    table(b"DSDT", 2, &[SOFT_OFF.to_vec(), pci_root(), events()].concat())
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte))
}

fn put(table: &mut [u8], at: usize, bytes: &[u8]) {
    table[at..at + bytes.len()].copy_from_slice(bytes);
}

/// A table: the common header, filled in, before `body`.
fn table(signature: &[u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(HEADER_BYTES + body.len()).expect("tables are small");
    let mut table = Vec::from(*signature);
    table.extend(length.to_le_bytes());
    table.extend([revision, 0]);
    table.extend(b"DROVERDROVERVM");
    table.extend(1u32.to_le_bytes());
    table.extend(b"DRVR");
    table.extend(1u32.to_le_bytes());
    table.extend(body);
    table[9] = sum(&table).wrapping_neg();
    table
}

/// The multiple APIC description table, for CPUs with APIC ids 0...
fn madt(vcpus: u8) -> Vec<u8> {
    const LEGACY_PICS: u32 = 1;
    let mut body = Vec::from(LOCAL_APIC.to_le_bytes());
    body.extend(LEGACY_PICS.to_le_bytes());
    for id in 0..vcpus {
        body.extend([0, 8, id, id, 1, 0, 0, 0]);
    }
    body.extend([1, 12, 0, 0]);
    body.extend(IO_APIC.to_le_bytes());
    body.extend(0u32.to_le_bytes());
    // Interrupt 9 is active high and level-triggered. No entry moves the timer to pin 2: KVM routes every line to the pin of its number.
    body.extend([2, 10, 0, SCI_IRQ, SCI_IRQ, 0, 0, 0, 0x0d, 0]);
    // The non-maskable interrupt of all CPUs is at LINT1.
    body.extend([4, 6, 0xff, 0, 0, 1]);
    table(b"APIC", 5, &body)
}

/// The fixed table (ACPI 6.4, table 5.9).
fn fadt(facs: u32, dsdt: u32) -> Vec<u8> {
    // Serial port behind ISA; neither a keyboard controller to probe, nor VGA (bit 2), nor a CMOS clock (bit 5).
    const BOOT_ARCH: u16 = 1 | 1 << 2 | 1 << 5;
    // WBINVD works, C1 exists, a fixed power button (bit 4 is its absence) and no sleep button, no fixed RTC event, the reset register exists.
    const FLAGS: u32 = 1 | 1 << 2 | 1 << 5 | 1 << 6 | 1 << 10;
    const NO_C2_US: u16 = 101;
    const NO_C3_US: u16 = 1001;
    let mut body = vec![0u8; FADT_BYTES - HEADER_BYTES];
    let mut field = |at: usize, bytes: &[u8]| put(&mut body, at - HEADER_BYTES, bytes);
    field(36, &facs.to_le_bytes());
    field(40, &dsdt.to_le_bytes());
    field(46, &u16::from(SCI_IRQ).to_le_bytes());
    field(56, &u32::from(PM1A_EVENT).to_le_bytes());
    field(64, &u32::from(PM1A_CONTROL).to_le_bytes());
    field(80, &u32::from(GPE0).to_le_bytes());
    field(88, &[PM1A_EVENT_BYTES, 2]);
    field(92, &[GPE0_BYTES]);
    field(96, &NO_C2_US.to_le_bytes());
    field(98, &NO_C3_US.to_le_bytes());
    field(109, &BOOT_ARCH.to_le_bytes());
    field(112, &FLAGS.to_le_bytes());
    // A generic address: I/O space, 8 bits, offset 0, byte access.
    field(116, &[1, 8, 0, 1]);
    field(120, &u64::from(RESET_PORT).to_le_bytes());
    field(128, &[RESET_VALUE]);
    field(140, &u64::from(dsdt).to_le_bytes());
    table(b"FACP", 6, &body)
}

fn facs() -> Vec<u8> {
    let mut facs = vec![0u8; FACS_BYTES];
    put(&mut facs, 0, b"FACS");
    put(&mut facs, 4, &[64, 0, 0, 0]);
    facs[32] = 2; // version
    facs
}

fn rsdp(xsdt: u32) -> Vec<u8> {
    let mut rsdp = vec![0u8; RSDP_BYTES];
    put(&mut rsdp, 0, b"RSD PTR ");
    put(&mut rsdp, 9, b"DROVER");
    rsdp[15] = 2;
    put(&mut rsdp, 20, &[36, 0, 0, 0]);
    put(&mut rsdp, 24, &u64::from(xsdt).to_le_bytes());
    rsdp[8] = sum(&rsdp[..20]).wrapping_neg();
    rsdp[32] = sum(&rsdp).wrapping_neg();
    rsdp
}

/// All tables of a guest with `vcpus` CPUs in one piece, to stand at [`ACPI`]; the RSDP comes first.
pub fn build(vcpus: u32) -> Vec<u8> {
    let vcpus = u8::try_from(vcpus).expect("a VM has at most 32 vCPUs");
    let base = u32::try_from(ACPI).expect("the tables stand in low memory");
    let at = |offset: usize| base + u32::try_from(offset).expect("the tables are a few KiB");
    // The FACS alone must be aligned, to 64 bytes; everything has its place before anything names it.
    let facs_at = RSDP_BYTES.next_multiple_of(64);
    let dsdt = dsdt();
    let dsdt_at = facs_at + FACS_BYTES;
    let fadt_at = (dsdt_at + dsdt.len()).next_multiple_of(8);
    let madt = madt(vcpus);
    let madt_at = (fadt_at + FADT_BYTES).next_multiple_of(8);
    let xsdt_at = (madt_at + madt.len()).next_multiple_of(8);
    let entries = [at(fadt_at), at(madt_at)]
        .map(|address| u64::from(address).to_le_bytes())
        .concat();
    let xsdt = table(b"XSDT", 1, &entries);
    let mut bytes = vec![0u8; xsdt_at + xsdt.len()];
    for (offset, part) in [
        (0, rsdp(at(xsdt_at))),
        (facs_at, facs()),
        (dsdt_at, dsdt),
        (fadt_at, fadt(at(facs_at), at(dsdt_at))),
        (madt_at, madt),
        (xsdt_at, xsdt),
    ] {
        put(&mut bytes, offset, &part);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(bytes: &[u8], at: usize) -> usize {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
            .try_into()
            .unwrap()
    }

    /// The table that stands at guest address `gpa`.
    fn table_at(bytes: &[u8], gpa: usize) -> &[u8] {
        let table = &bytes[gpa - usize::try_from(ACPI).unwrap()..];
        &table[..word(table, 4)]
    }

    #[test]
    fn every_table_is_reached_from_the_first_and_its_sum_is_zero() {
        for vcpus in [1, 2, 32] {
            let bytes = build(vcpus);
            assert!(ACPI + (bytes.len() as u64) < super::super::HIGH_START);
            assert_eq!((sum(&bytes[..20]), sum(&bytes[..36])), (0, 0));
            let xsdt = table_at(&bytes, word(&bytes, 24));
            let (fadt, madt) = (table_at(&bytes, word(xsdt, 36)), table_at(&bytes, word(xsdt, 44)));
            let dsdt = table_at(&bytes, word(fadt, 40));
            for (table, signature) in [(xsdt, b"XSDT"), (fadt, b"FACP"), (madt, b"APIC"), (dsdt, b"DSDT")] {
                assert_eq!((&table[..4], sum(table)), (signature.as_slice(), 0));
            }
            assert_eq!((fadt.len(), word(fadt, 36) % 64), (FADT_BYTES, 0));
            for name in [b"PCI0", b"S001", b"S031", b"SLTS", b"_L01"] {
                assert!(dsdt.windows(4).any(|at| at == name), "{name:?}");
            }
            assert_eq!(&table_at(&bytes, word(fadt, 36))[..4], b"FACS");
            assert_eq!(word(fadt, 140), word(fadt, 40));
        }
    }

    #[test]
    fn the_apic_table_lists_every_cpu_once() {
        let madt = madt(3);
        let mut ids = Vec::new();
        let mut at = HEADER_BYTES + 8;
        while at < madt.len() {
            if madt[at] == 0 {
                ids.push(madt[at + 3]);
            }
            at += usize::from(madt[at + 1]);
        }
        assert_eq!((ids, at), (vec![0, 1, 2], madt.len()));
    }
}
