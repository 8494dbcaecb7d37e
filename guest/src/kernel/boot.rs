//! What the loader handed over: a command line and a memory map.
//!
//! Two forms: Xen's `hvm_start_info` (PVH boot ABI, `xen/include/public/arch-x86/hvm/start_info.h`) and Linux's `boot_params` (kernel
//! documentation, `Documentation/arch/x86/zero-page.rst`). Both are read once, before any owned page is touched.
#![allow(unsafe_code, reason = "the loader hands over addresses")]

use drover_probe::layout::Layout;
use drover_probe::params::{BadParam, Why};

use super::machine;

const KIND_PVH: u64 = 1;
const PVH_MAGIC: u32 = 0x336e_c578;
const COMMAND_LINE_MAX: usize = 2048;
const ENTRIES_MAX: u64 = 128;
const TYPE_RAM: u32 = 1;

/// A copy of what matters of the boot information.
pub struct BootInfo {
    line: [u8; COMMAND_LINE_MAX],
    length: usize,
    layout: Layout,
}

impl BootInfo {
    /// Reads the information at `address`, in the form that the entry point `kind` promises.
    pub fn read(kind: u64, address: u64) -> BootInfo {
        let mut info = BootInfo {
            line: [0; COMMAND_LINE_MAX],
            length: 0,
            layout: Layout::new(),
        };
        if kind == KIND_PVH {
            info.read_pvh(address);
        } else {
            info.read_linux(address);
        }
        info
    }

    /// The command line.
    pub fn command_line(&self) -> Result<&str, BadParam<'_>> {
        core::str::from_utf8(&self.line[..self.length]).map_err(|_| BadParam {
            word: "(not UTF-8)",
            why: Why::Unknown,
        })
    }

    /// Memory that the guest may use.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    fn read_pvh(&mut self, at: u64) {
        if get::<u32>(at) != PVH_MAGIC {
            return;
        }
        self.copy_line(get::<u64>(at + 24));
        let version = get::<u32>(at + 4);
        let entries = if version >= 1 {
            u64::from(get::<u32>(at + 48)).min(ENTRIES_MAX)
        } else {
            0
        };
        let map = get::<u64>(at + 40);
        for entry in (0..entries).map(|index| map + 24 * index) {
            self.add(get(entry), get(entry + 8), get(entry + 16));
        }
    }

    fn read_linux(&mut self, at: u64) {
        self.copy_line(u64::from(get::<u32>(at + 0x228)) | u64::from(get::<u32>(at + 0xc8)) << 32);
        for entry in
            (0..u64::from(get::<u8>(at + 0x1e8)).min(ENTRIES_MAX)).map(|index| at + 0x2d0 + 20 * index)
        {
            self.add(get(entry), get(entry + 8), get(entry + 16));
        }
    }

    fn add(&mut self, base: u64, size: u64, kind: u32) {
        if kind == TYPE_RAM {
            self.layout
                .add(base, size, machine::end_of_image(), machine::MAPPED_GIB_MAX << 30);
        }
    }

    fn copy_line(&mut self, at: u64) {
        if at == 0 {
            return;
        }
        while self.length < COMMAND_LINE_MAX {
            let byte = get::<u8>(at + self.length as u64);
            if byte == 0 {
                break;
            }
            self.line[self.length] = byte;
            self.length += 1;
        }
    }
}

/// Reads plain data at a physical address.
fn get<T: Copy>(address: u64) -> T {
    // SAFETY: `T` is an integer, for which every bit pattern is a value; the loader promises readable memory there, and memory that is not
    // mapped ends in a reported exception.
    unsafe { core::ptr::with_exposed_provenance::<T>(address as usize).read_unaligned() }
}
