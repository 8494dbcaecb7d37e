//! The registers with which the first vCPU enters a kernel.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use super::{GDT, PAGE_TABLES, START_INFO, ZERO_PAGE};

/// How the first vCPU starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// 32-bit protected mode without paging, `%ebx` = start info.
    Pvh {
        /// Physical address of the first instruction.
        entry: u64,
    },
    /// 64-bit mode, the first 4 GiB mapped one to one, `%rsi` = zero page.
    Linux64 {
        /// Physical address of the first instruction.
        entry: u64,
    },
}

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_RESERVED: u64 = 2;

const PRESENT_WRITABLE: u64 = 3;
const LARGE_PAGE: u64 = 1 << 7;
const ENTRIES: u64 = 512;
const MAPPED_GIB: u64 = 4;

/// Descriptor type: code, execute and read, accessed.
const CODE: u8 = 0xb;
/// Descriptor type: data, read and write, accessed.
const DATA: u8 = 0x3;
/// Descriptor type: busy task-state segment.
const TSS: u8 = 0xb;

fn segment(selector: u16, type_: u8, entry: Entry) -> kvm_segment {
    let long = matches!(entry, Entry::Linux64 { .. }) && type_ == CODE;
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

/// The descriptor of a flat segment (Intel SDM, volume 3, 3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    let flags = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7
        | u64::from(segment.l) << 13
        | u64::from(segment.db) << 14
        | u64::from(segment.g) << 15;
    let limit = if segment.g == 1 {
        segment.limit >> 12
    } else {
        segment.limit
    };
    u64::from(limit & 0xffff) | flags << 40 | u64::from(limit >> 16 & 0xf) << 48
}

struct Segments {
    code: kvm_segment,
    data: kvm_segment,
    task: kvm_segment,
}

fn segments(entry: Entry) -> Segments {
    let code = segment(0x10, CODE, entry);
    let data = segment(0x18, DATA, entry);
    let task = kvm_segment {
        limit: 0x67,
        s: 0,
        g: 0,
        db: 0,
        ..segment(0x20, TSS, Entry::Pvh { entry: 0 })
    };
    Segments { code, data, task }
}

/// The GDT: two empty descriptors, code 0x10, data 0x18 (the selectors of the Linux boot protocol), task state 0x20.
pub fn gdt(entry: Entry) -> Vec<u8> {
    let Segments { code, data, task } = segments(entry);
    let table = [0, 0, descriptor(&code), descriptor(&data), descriptor(&task), 0];
    table
        .iter()
        .flat_map(|descriptor| descriptor.to_le_bytes())
        .collect()
}

/// Six pages: one PML4, one PDPT and four page directories of 2 MiB pages, which map the first 4 GiB one to one.
pub fn page_tables() -> Vec<u8> {
    let page = 4096;
    let mut entries = vec![0u64; 6 * 512];
    entries[0] = (PAGE_TABLES + page) | PRESENT_WRITABLE;
    for gib in 0..MAPPED_GIB {
        let index = usize::try_from(ENTRIES + gib).expect("six pages of entries");
        entries[index] = (PAGE_TABLES + (2 + gib) * page) | PRESENT_WRITABLE;
    }
    for (frame, entry) in (0u64..).zip(&mut entries[1024..]) {
        *entry = frame << 21 | PRESENT_WRITABLE | LARGE_PAGE;
    }
    entries.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}

/// The general registers at `entry`.
pub fn regs(entry: Entry) -> kvm_regs {
    let base = kvm_regs {
        rflags: RFLAGS_RESERVED,
        ..Default::default()
    };
    match entry {
        Entry::Pvh { entry } => kvm_regs {
            rip: entry,
            rbx: START_INFO,
            ..base
        },
        Entry::Linux64 { entry } => kvm_regs {
            rip: entry,
            rsi: ZERO_PAGE,
            ..base
        },
    }
}

/// The system registers at `entry`; what is not named keeps its reset value.
pub fn sregs(entry: Entry, reset: kvm_sregs) -> kvm_sregs {
    let Segments { code, data, task } = segments(entry);
    let mut sregs = reset;
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = task;
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 6 * 8 - 1;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    match entry {
        Entry::Pvh { .. } => {
            sregs.cr0 = CR0_PE | CR0_ET;
            (sregs.cr3, sregs.cr4, sregs.efer) = (0, 0, 0);
        }
        Entry::Linux64 { .. } => {
            sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
            (sregs.cr3, sregs.cr4, sregs.efer) = (PAGE_TABLES, CR4_PAE, EFER_LME | EFER_LMA);
        }
    }
    sregs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_those_of_the_manual() {
        let pvh = gdt(Entry::Pvh { entry: 0 });
        let long = gdt(Entry::Linux64 { entry: 0 });
        let at = |gdt: &[u8], index: usize| u64::from_le_bytes(gdt[index * 8..][..8].try_into().unwrap());
        assert_eq!(at(&pvh, 2), 0x00cf_9b00_0000_ffff);
        assert_eq!(at(&long, 2), 0x00af_9b00_0000_ffff);
        assert_eq!(at(&long, 3), 0x00cf_9300_0000_ffff);
        assert_eq!(at(&pvh, 4), 0x0000_8b00_0000_0067);
    }

    #[test]
    fn the_page_tables_map_every_2_mib_of_the_first_4_gib_to_itself() {
        let bytes = page_tables();
        let at = |index: usize| u64::from_le_bytes(bytes[index * 8..][..8].try_into().unwrap());
        assert_eq!(bytes.len(), 6 * 4096);
        assert_eq!(at(0), 0xa003);
        assert_eq!(at(512 + 3), 0xe003);
        for (index, frame) in [(1024, 0), (1025, 0x20_0000), (1024 + 2047, 0xffe0_0000)] {
            assert_eq!(at(index), frame | 0x83);
        }
    }
}
