//! The multiprocessor table: how a guest without ACPI learns of its CPUs and its I/O APIC.
//!
//! Source: Intel, MultiProcessor Specification 1.4, chapter 4. The floating pointer stands first, in the last
//! kilobyte of base memory, where the specification lets a guest look.

use super::MP_TABLE;

const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;
/// Version of the local and I/O APIC that KVM emulates.
const APIC_VERSION: u8 = 0x14;
const ISA_IRQS: u8 = 16;
const FLOATING_BYTES: usize = 16;
const HEADER_BYTES: usize = 44;

fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0u8, |sum, byte| sum.wrapping_add(*byte))
        .wrapping_neg()
}

/// The table for `vcpus` CPUs with APIC ids 0.. and one I/O APIC behind them, to stand at [`MP_TABLE`].
pub fn build(vcpus: u32) -> Vec<u8> {
    let vcpus = u8::try_from(vcpus).expect("a VM has at most 32 vCPUs");
    let io_apic = vcpus;
    let mut entries = Vec::new();
    for id in 0..vcpus {
        let flags = if id == 0 { 3 } else { 1 };
        entries.extend([0, id, APIC_VERSION, flags, 0, 6, 0, 0]);
        entries.extend([0x01, 0x02, 0, 0]);
        entries.extend([0; 8]);
    }
    entries.extend(b"\x01\x00ISA   ");
    entries.extend([2, io_apic, APIC_VERSION, 1]);
    entries.extend(IO_APIC.to_le_bytes());
    for irq in 0..ISA_IRQS {
        // KVM routes every line to the pin of its number, the timer's too; line 2 joins the two legacy controllers.
        if irq != 2 {
            entries.extend([3, 0, 0, 0, 0, irq, io_apic, irq]);
        }
    }
    entries.extend([4, 3, 0, 0, 0, 0, 0, 0]);
    entries.extend([4, 1, 0, 0, 0, 0, 0xff, 1]);
    let count = u16::from(vcpus) + 1 + 1 + u16::from(ISA_IRQS) - 1 + 2;

    let mut header = Vec::from(*b"PCMP");
    let length = u16::try_from(HEADER_BYTES + entries.len()).expect("the table of 32 CPUs is under 1 KiB");
    header.extend(length.to_le_bytes());
    header.extend([4, 0]);
    header.extend(b"DROVER  DROVER VM   ");
    header.extend([0; 6]);
    header.extend(count.to_le_bytes());
    header.extend(LOCAL_APIC.to_le_bytes());
    header.extend([0; 4]);
    header[7] = checksum(&[header.as_slice(), &entries].concat());

    let at = u32::try_from(MP_TABLE).expect("the table stands in low memory") + 16;
    let mut table = Vec::from(*b"_MP_");
    table.extend(at.to_le_bytes());
    table.extend([1, 4, 0, 0, 0, 0, 0, 0]);
    table[10] = checksum(&table);
    debug_assert_eq!((table.len(), header.len()), (FLOATING_BYTES, HEADER_BYTES));
    table.extend(header);
    table.extend(entries);
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_the_largest_vm_fits_and_its_sums_are_zero() {
        for vcpus in [1, 2, 32] {
            let table = build(vcpus);
            assert!(table.len() <= 1024);
            let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
            assert_eq!((sum(&table[..16]), sum(&table[16..])), (0, 0));
            assert_eq!(
                usize::from(u16::from_le_bytes([table[20], table[21]])),
                table.len() - 16
            );
        }
    }
}
