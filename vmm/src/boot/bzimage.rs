//! Linux bzImages: the setup header and the protected-mode kernel, entered at its 64-bit entry.
//!
//! Source: Linux, Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header" and "64-bit Boot Protocol". Offsets are
//! from the file's start.

use drover_proto::Fault;

use super::image::Part;
use super::{HIGH_START, invalid};

/// Distance of the 64-bit entry from where the kernel is loaded.
pub const ENTRY_64: u64 = 0x200;
/// Where the setup header stands in the file and in the zero page.
pub const HEADER_AT: usize = 0x1f1;

const BOOT_FLAG_AT: usize = 0x1fe;
const BOOT_FLAG: [u8; 2] = [0x55, 0xaa];
const MAGIC_AT: usize = 0x202;
const MAGIC: &[u8] = b"HdrS";
/// Version 2.12 brought `xloadflags`, and with it the promise of a 64-bit entry.
const VERSION_MIN: u16 = 0x020c;
const FIXED_HEADER_END: usize = 0x264;
const LOADED_HIGH: u8 = 1;
const KERNEL_64: u16 = 1;
const SECTOR: usize = 512;

/// A parsed bzImage.
#[derive(Debug)]
pub struct BzImage<'a> {
    /// The setup header, from offset 0x1f1 on: it is copied into the zero page.
    pub setup_header: &'a [u8],
    /// Where the kernel is to be loaded.
    pub load_gpa: u64,
    /// First address that an initial RAM disk may not use.
    pub initrd_end_max: u64,
    kernel: &'a [u8],
    init_bytes: u64,
}

/// Whether the file has the marks of a Linux boot image.
pub fn looks_like_one(file: &[u8]) -> bool {
    file.get(BOOT_FLAG_AT..BOOT_FLAG_AT + 2) == Some(&BOOT_FLAG)
        && file.get(MAGIC_AT..MAGIC_AT + 4) == Some(MAGIC)
}

/// Parses a file of which [`looks_like_one`] holds.
pub fn parse(file: &[u8]) -> Result<BzImage<'_>, Fault> {
    if file.len() < FIXED_HEADER_END {
        return Err(invalid(format!(
            "the bzImage ends within its header, after {} bytes",
            file.len()
        )));
    }
    let u16_at = |at: usize| u16::from_le_bytes([file[at], file[at + 1]]);
    let u32_at = |at: usize| u32::from_le_bytes([file[at], file[at + 1], file[at + 2], file[at + 3]]);
    let version = u16_at(0x206);
    if version < VERSION_MIN {
        let message = format!(
            "boot protocol {}.{}; want 2.12 or newer",
            version >> 8,
            version & 0xff
        );
        return Err(invalid(format!("the bzImage speaks {message}")));
    }
    if file[0x211] & LOADED_HIGH == 0 || u16_at(0x236) & KERNEL_64 == 0 {
        return Err(invalid("the bzImage has no 64-bit entry; want a 64-bit kernel"));
    }
    let setup_sectors = if file[HEADER_AT] == 0 {
        4
    } else {
        usize::from(file[HEADER_AT])
    };
    let kernel = file
        .get((setup_sectors + 1) * SECTOR..)
        .filter(|kernel| kernel.len() as u64 > ENTRY_64);
    let kernel = kernel.ok_or_else(|| {
        invalid(format!(
            "the bzImage's {} bytes end before its kernel: truncated?",
            file.len()
        ))
    })?;
    // `syssize` counts the protected-mode kernel in units of 16 bytes; a file may be padded, never shorter.
    let promised = u64::from(u32_at(0x1f4)) * 16;
    if (kernel.len() as u64) + 16 < promised {
        let message = format!(
            "promises a kernel of {promised} bytes but has {}: truncated?",
            kernel.len()
        );
        return Err(invalid(format!("the bzImage {message}")));
    }
    let preferred = u64::from_le_bytes(file[0x258..0x260].try_into().expect("eight bytes were taken"));
    let relocatable = file[0x234] != 0;
    let load_gpa = if relocatable && preferred < HIGH_START {
        HIGH_START
    } else {
        preferred
    };
    let header_end = (0x202 + usize::from(file[0x201]))
        .clamp(FIXED_HEADER_END, 0x290)
        .min(file.len());
    Ok(BzImage {
        setup_header: &file[HEADER_AT..header_end],
        load_gpa,
        initrd_end_max: u64::from(u32_at(0x22c)) + 1,
        kernel,
        init_bytes: u64::from(u32_at(0x260)),
    })
}

impl<'a> BzImage<'a> {
    /// The kernel and where it goes; it uses `init_size` bytes from there before it looks at the memory map.
    pub fn part(&self) -> Part<'a> {
        let used = self.init_bytes.max(self.kernel.len() as u64);
        Part {
            gpa: self.load_gpa,
            bytes: self.kernel,
            end: self.load_gpa.saturating_add(used),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn build() -> Vec<u8> {
        let mut file = vec![0u8; 2 * SECTOR + 0x1000];
        file[HEADER_AT] = 1;
        file[0x1f4..0x1f8].copy_from_slice(&0x100u32.to_le_bytes());
        file[BOOT_FLAG_AT..BOOT_FLAG_AT + 2].copy_from_slice(&BOOT_FLAG);
        file[0x201] = 0x66;
        file[MAGIC_AT..MAGIC_AT + 4].copy_from_slice(MAGIC);
        file[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
        file[0x211] = LOADED_HIGH;
        file[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
        file[0x236] = 1;
        file[0x258..0x260].copy_from_slice(&0x100_0000u64.to_le_bytes());
        file[0x260..0x264].copy_from_slice(&0x20_0000u32.to_le_bytes());
        file
    }

    #[test]
    fn a_bzimage_is_placed_where_it_prefers_with_room_to_unpack() {
        let file = build();
        let image = parse(&file).unwrap();
        let part = image.part();
        assert_eq!(
            (part.gpa, part.bytes.len(), part.end),
            (0x100_0000, 0x1000, 0x120_0000)
        );
        assert_eq!(image.initrd_end_max, 0x8000_0000);
        assert_eq!(image.setup_header.len(), 0x268 - HEADER_AT);
    }

    #[test]
    fn truncated_old_and_32_bit_images_are_refused() {
        let good = build();
        for len in [0x210, 0x263, 2 * SECTOR, 2 * SECTOR + 0x200, 2 * SECTOR + 0x800] {
            assert!(
                parse(&good[..len]).is_err(),
                "{len} bytes were taken for a kernel"
            );
        }
        for (at, value, want) in [
            (0x206, 0x0b, "2.11"),
            (0x236, 0, "64-bit"),
            (0x1f6, 1, "truncated"),
        ] {
            let mut file = good.clone();
            file[at] = value;
            let fault = parse(&file).unwrap_err();
            assert!(fault.message.contains(want), "{}", fault.message);
        }
    }
}
