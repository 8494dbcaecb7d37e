//! What a kernel is told at its start: memory map, command line, initial RAM disk.
//!
//! Sources: Xen, include/public/arch-x86/hvm/start_info.h (version 1, with memory map); Linux,
//! Documentation/arch/x86/zero-page.rst and boot.rst.

use drover_migration::vm::Layout;

use super::{ACPI, CMDLINE, PVH_MEMMAP, bzimage, usable};

/// What the kernel is told.
#[derive(Debug)]
pub struct BootInfo<'a> {
    /// The guest's memory.
    pub layout: &'a Layout,
    /// The command line.
    pub cmdline: &'a str,
    /// The initial RAM disk, if any.
    pub initrd: Option<Initrd>,
}

/// Where the initial RAM disk lies.
#[derive(Clone, Copy, Debug)]
pub struct Initrd {
    /// Guest address of its first byte.
    pub gpa: u64,
    /// Its length.
    pub bytes: u64,
}

const PVH_MAGIC: u32 = 0x336e_c578;
const PVH_VERSION: u32 = 1;
const PVH_START_BYTES: u64 = 56;
const MEMORY_RAM: u32 = 1;

/// The PVH start info with its module list right behind it, and the memory map.
pub fn pvh(info: &BootInfo) -> (Vec<u8>, Vec<u8>) {
    let mut memmap = Vec::new();
    for (start, len) in usable(info.layout) {
        memmap.extend(start.to_le_bytes());
        memmap.extend(len.to_le_bytes());
        memmap.extend(MEMORY_RAM.to_le_bytes());
        memmap.extend(0u32.to_le_bytes());
    }
    let entries = u32::try_from(memmap.len() / 24).expect("a guest has at most three ranges");
    let modules = super::START_INFO + PVH_START_BYTES;
    let mut start = Vec::new();
    for word in [PVH_MAGIC, PVH_VERSION, 0, u32::from(info.initrd.is_some())] {
        start.extend(word.to_le_bytes());
    }
    for address in [
        if info.initrd.is_some() { modules } else { 0 },
        CMDLINE,
        ACPI,
        PVH_MEMMAP,
    ] {
        start.extend(address.to_le_bytes());
    }
    start.extend(entries.to_le_bytes());
    start.extend(0u32.to_le_bytes());
    debug_assert_eq!(start.len() as u64, PVH_START_BYTES);
    if let Some(initrd) = info.initrd {
        for field in [initrd.gpa, initrd.bytes, 0, 0] {
            start.extend(field.to_le_bytes());
        }
    }
    (start, memmap)
}

/// `type_of_loader`: one without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;
/// The command line's length limit that is told to kernels without an own header.
const E820_AT: usize = 0x2d0;
const ACPI_AT: usize = 0x70;

/// The Linux zero page; `setup_header` is the bzImage's, an ELF kernel gets the fields that matter to it.
pub fn zero_page(info: &BootInfo, setup_header: Option<&[u8]>) -> Vec<u8> {
    let mut page = vec![0u8; 4096];
    if let Some(header) = setup_header {
        page[bzimage::HEADER_AT..bzimage::HEADER_AT + header.len()].copy_from_slice(header);
    } else {
        page[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        page[0x202..0x206].copy_from_slice(b"HdrS");
        page[0x206..0x208].copy_from_slice(&0x020cu16.to_le_bytes());
        page[0x230..0x234].copy_from_slice(&0x100_0000u32.to_le_bytes());
    }
    let put32 = |page: &mut [u8], at: usize, value: u64| {
        let low = u32::try_from(value & 0xffff_ffff).expect("masked to 32 bits");
        page[at..at + 4].copy_from_slice(&low.to_le_bytes());
    };
    page[0x210] = LOADER_UNDEFINED;
    page[ACPI_AT..ACPI_AT + 8].copy_from_slice(&ACPI.to_le_bytes());
    put32(&mut page, 0x228, CMDLINE);
    put32(&mut page, 0x238, info.cmdline.len() as u64);
    if let Some(initrd) = info.initrd {
        put32(&mut page, 0x218, initrd.gpa);
        put32(&mut page, 0x21c, initrd.bytes);
    }
    let ranges = usable(info.layout);
    page[0x1e8] = u8::try_from(ranges.len()).expect("a guest has at most three ranges");
    for (index, (start, len)) in ranges.into_iter().enumerate() {
        let entry = &mut page[E820_AT + index * 20..][..20];
        entry[..8].copy_from_slice(&start.to_le_bytes());
        entry[8..16].copy_from_slice(&len.to_le_bytes());
        entry[16..20].copy_from_slice(&MEMORY_RAM.to_le_bytes());
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    #[test]
    fn the_memory_map_leaves_out_the_tables_and_both_holes() {
        let layout = memory::layout(5 << 30);
        let info = BootInfo {
            layout: &layout,
            cmdline: "a=1",
            initrd: None,
        };
        let (start, memmap) = pvh(&info);
        assert_eq!(start.len(), 56);
        let words: Vec<u64> = memmap
            .chunks_exact(8)
            .map(|b| u64::from_le_bytes(b.try_into().unwrap()))
            .collect();
        assert_eq!(
            words,
            [
                0,
                0x9_fc00,
                1,
                0x10_0000,
                (3 << 30) - 0x10_0000,
                1,
                4 << 30,
                2 << 30,
                1
            ]
        );
        let page = zero_page(&info, None);
        assert_eq!(page[0x1e8], 3);
        assert_eq!(page[0x238], 3);
    }

    #[test]
    fn an_initial_ram_disk_is_told_in_both_protocols() {
        let layout = memory::layout(64 << 20);
        let initrd = Some(Initrd {
            gpa: 0x3f0_0000,
            bytes: 0x1234,
        });
        let info = BootInfo {
            layout: &layout,
            cmdline: "",
            initrd,
        };
        let (start, _) = pvh(&info);
        assert_eq!(start[56..64], 0x3f0_0000u64.to_le_bytes());
        let page = zero_page(&info, None);
        assert_eq!(page[0x218..0x220], [0, 0, 0xf0, 0x03, 0x34, 0x12, 0, 0]);
    }
}
