//! From a kernel image to a vCPU's first instruction.
//!
//! ```text
//!   file ──image──► ELF with a PVH note ─► 32-bit protected mode, %ebx = start info   (Xen, docs/misc/pvh.pandoc)
//!                   ELF without         ─► 64-bit mode, %rsi = zero page              (Linux, Documentation/arch/x86/boot.rst,
//!                   bzImage             ─► 64-bit mode, %rsi = zero page               "64-bit boot protocol")
//! ```
//!
//! Low memory that the VMM fills in; kernel and initial RAM disk lie above 1 MiB:
//!
//! ```text
//!   0x0500  GDT                     0x9000   page tables, 6 pages: the first 4 GiB, one to one
//!   0x6000  PVH start info          0x20000  command line
//!   0x6800  PVH memory map          0x9fc00  multiprocessor table, to 0xa0000
//!   0x7000  Linux zero page         0xe0000  ACPI tables
//!                                   0x100000 first byte a kernel may use
//! ```
//!
//! A file that is not a kernel, or lies about itself, is refused as `kernel_invalid` with what is wrong; nothing in a file can
//! make this code read or write outside the file and the guest.

pub mod acpi;
pub mod bzimage;
pub mod elf;
pub mod image;
pub mod mptable;
pub mod params;
pub mod start;

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use drover_migration::vm::Layout;
use drover_proto::{Code, Fault};
use vm_memory::{Bytes, GuestAddress};

use self::image::Kernel;
use self::params::{BootInfo, Initrd};
use self::start::Entry;
use crate::config::Config;
use crate::memory::{Memory, PAGE};

/// Where the GDT stands.
pub const GDT: u64 = 0x500;
/// Where the PVH start info stands.
pub const START_INFO: u64 = 0x6000;
/// Where the PVH memory map stands.
pub const PVH_MEMMAP: u64 = 0x6800;
/// Where the Linux zero page stands.
pub const ZERO_PAGE: u64 = 0x7000;
/// Where the page tables begin.
pub const PAGE_TABLES: u64 = 0x9000;
/// Where the command line stands.
pub const CMDLINE: u64 = 0x20000;
/// Where usable low memory ends and the multiprocessor table begins.
pub const MP_TABLE: u64 = 0x9_fc00;
/// Where the ACPI tables stand: in the range that a kernel searches by itself.
pub const ACPI: u64 = 0xe_0000;
/// Where the legacy hole ends: nothing of an image may lie below.
pub const HIGH_START: u64 = 0x10_0000;

/// Largest kernel image, bytes.
pub const KERNEL_BYTES_MAX: u64 = 256 << 20;
/// Largest initial RAM disk, bytes.
pub const INITRD_BYTES_MAX: u64 = 1 << 30;

/// The fault of a kernel image.
pub(crate) fn invalid(message: impl Into<String>) -> Fault {
    Fault::new(Code::KernelInvalid, message).field("kernel")
}

/// A file of an image, opened and not looked into.
#[derive(Debug)]
struct Image {
    file: File,
    path: PathBuf,
    field: &'static str,
}

impl Image {
    fn open(path: &Path, field: &'static str) -> Result<Self, Fault> {
        let fault = |error: io::Error| unreadable(path, field, &error.to_string());
        Ok(Self {
            file: File::open(path).map_err(fault)?,
            path: path.to_owned(),
            field,
        })
    }

    /// Reads it whole, at most `max` bytes.
    fn read_bounded(&self, max: u64) -> Result<Vec<u8>, Fault> {
        let fault = |what: &str| unreadable(&self.path, self.field, what);
        let mut bytes = Vec::new();
        (&self.file)
            .take(max + 1)
            .read_to_end(&mut bytes)
            .map_err(|error| fault(&error.to_string()))?;
        if bytes.len() as u64 > max {
            return Err(fault(&format!("larger than {max} bytes")));
        }
        Ok(bytes)
    }
}

fn unreadable(path: &Path, field: &str, what: &str) -> Fault {
    Fault::new(Code::KernelInvalid, format!("{field} {}: {what}", path.display())).field(field)
}

/// What a VM boots.
#[derive(Debug)]
pub struct Images {
    kernel: Image,
    initrd: Option<Image>,
}

impl Images {
    /// Opens what `config` names.
    pub fn open(config: &Config) -> Result<Self, Fault> {
        let initrd = config.initrd.as_deref().map(|path| Image::open(path, "initrd"));
        Ok(Self {
            kernel: Image::open(&config.kernel, "kernel")?,
            initrd: initrd.transpose()?,
        })
    }
}

/// A copy of `bytes` that is to stand at a guest address.
struct Placed<'a> {
    gpa: u64,
    bytes: &'a [u8],
}

/// Loads `images` into `memory`, with what else `config` says; returns how the first vCPU starts.
pub fn load(memory: &Memory, images: &Images, config: &Config) -> Result<Entry, Fault> {
    let kernel = images.kernel.read_bounded(KERNEL_BYTES_MAX)?;
    let initrd = images
        .initrd
        .as_ref()
        .map(|initrd| initrd.read_bounded(INITRD_BYTES_MAX))
        .transpose()?;
    load_bytes(memory, &kernel, initrd.as_deref(), &config.cmdline, config.vcpus)
}

/// Loads images that were read already: see [`load`].
pub fn load_bytes(
    memory: &Memory,
    kernel: &[u8],
    initrd: Option<&[u8]>,
    cmdline: &str,
    vcpus: u32,
) -> Result<Entry, Fault> {
    let layout = memory.layout();
    let low_end = layout[0].len;
    let kernel = image::parse(kernel)?;
    let mut kernel_end = HIGH_START;
    for part in kernel.parts(low_end)? {
        kernel_end = kernel_end.max(part.end);
        put(memory, part.gpa, part.bytes)?;
    }
    let initrd = initrd
        .filter(|bytes| !bytes.is_empty())
        .map(|bytes| place_initrd(bytes, kernel_end, low_end.min(kernel.initrd_end_max())))
        .transpose()?;
    if let Some(initrd) = &initrd {
        put(memory, initrd.gpa, initrd.bytes)?;
    }
    let info = BootInfo {
        layout,
        cmdline,
        initrd: initrd.as_ref().map(|placed| Initrd {
            gpa: placed.gpa,
            bytes: placed.bytes.len() as u64,
        }),
    };
    write_boot_info(memory, &kernel, &info, vcpus)
}

fn write_boot_info(memory: &Memory, kernel: &Kernel, info: &BootInfo, vcpus: u32) -> Result<Entry, Fault> {
    put(memory, CMDLINE, info.cmdline.as_bytes())?;
    put(memory, CMDLINE + info.cmdline.len() as u64, &[0])?;
    put(memory, MP_TABLE, &mptable::build(vcpus))?;
    put(memory, ACPI, &acpi::build(vcpus))?;
    let entry = match *kernel {
        Kernel::Elf(ref elf) => match elf.pvh_entry {
            Some(entry) => Entry::Pvh { entry },
            None => Entry::Linux64 { entry: elf.entry },
        },
        Kernel::BzImage(ref bz) => Entry::Linux64 {
            entry: bz.load_gpa + bzimage::ENTRY_64,
        },
    };
    match entry {
        Entry::Pvh { .. } => {
            let (start, memmap) = params::pvh(info);
            put(memory, START_INFO, &start)?;
            put(memory, PVH_MEMMAP, &memmap)?;
        }
        Entry::Linux64 { .. } => {
            let header = match kernel {
                Kernel::BzImage(bz) => Some(bz.setup_header),
                Kernel::Elf(_) => None,
            };
            put(memory, ZERO_PAGE, &params::zero_page(info, header))?;
            put(memory, PAGE_TABLES, &start::page_tables())?;
        }
    }
    put(memory, GDT, &start::gdt(entry))?;
    Ok(entry)
}

/// As high as it may lie, on a page of its own.
fn place_initrd(bytes: &[u8], kernel_end: u64, end_max: u64) -> Result<Placed<'_>, Fault> {
    let len = bytes.len() as u64;
    let gpa = end_max
        .checked_sub(len)
        .map(|gpa| gpa / PAGE * PAGE)
        .filter(|&gpa| gpa >= kernel_end);
    gpa.map(|gpa| Placed { gpa, bytes }).ok_or_else(|| {
        let room = end_max.saturating_sub(kernel_end);
        let message =
            format!("the initial RAM disk has {len} bytes, the guest has {room} left beside its kernel");
        Fault::new(Code::KernelInvalid, message).field("initrd")
    })
}

fn put(memory: &Memory, gpa: u64, bytes: &[u8]) -> Result<(), Fault> {
    memory
        .mapped()
        .write_slice(bytes, GuestAddress(gpa))
        .map_err(|error| {
            invalid(format!(
                "{} bytes at {gpa:#x} do not fit the guest's memory: {error}",
                bytes.len()
            ))
        })
}

/// Usable memory as (start, length): below the multiprocessor table, from 1 MiB to the hole, beyond the hole.
pub(crate) fn usable(layout: &Layout) -> Vec<(u64, u64)> {
    let mut ranges = vec![(0, MP_TABLE)];
    for region in layout {
        let start = region.gpa.max(HIGH_START);
        ranges.push((start, region.gpa + region.len - start));
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    const CODE: [u8; 100] = [0xf4; 100];

    #[test]
    fn an_initial_ram_disk_lies_at_the_top_on_a_page_of_its_own() {
        let memory = Memory::new(16 << 20, true).expect("memory is there");
        let kernel = elf::tests::build(0x20_0000, &CODE, true);
        let initrd: Vec<u8> = (0..10_000u32).map(|i| u8::try_from(i % 251).unwrap()).collect();
        let entry = load_bytes(&memory, &kernel, Some(&initrd), "quiet", 1).unwrap();
        assert_eq!(entry, Entry::Pvh { entry: 0x20_0000 });
        let mut found = vec![0; initrd.len()];
        let gpa = (16 << 20) - 3 * PAGE;
        memory.mapped().read_slice(&mut found, GuestAddress(gpa)).unwrap();
        assert_eq!(found, initrd);
        let module: u64 = memory.mapped().read_obj(GuestAddress(START_INFO + 56)).unwrap();
        assert_eq!(module, gpa);
    }

    #[test]
    fn what_does_not_fit_the_guest_is_refused_with_its_field() {
        let memory = Memory::new(16 << 20, true).expect("memory is there");
        let fault = |kernel: &[u8], initrd: Option<&[u8]>| {
            load_bytes(&memory, kernel, initrd, "", 1).unwrap_err().field
        };
        let good = elf::tests::build(0x20_0000, &CODE, true);
        assert_eq!(fault(&good, Some(&vec![0; 15 << 20])), "initrd");
        assert_eq!(fault(&elf::tests::build(0x9000, &CODE, true), None), "kernel");
        assert_eq!(fault(&elf::tests::build(16 << 20, &CODE, true), None), "kernel");
    }
}
