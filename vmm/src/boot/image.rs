//! What kind of kernel a file is.

use drover_proto::Fault;

use super::bzimage::{self, BzImage};
use super::elf::{self, Elf};
use super::{HIGH_START, invalid};

/// A kernel image, parsed and checked against its own size.
#[derive(Debug)]
pub enum Kernel<'a> {
    /// An ELF executable, with or without a PVH note.
    Elf(Elf<'a>),
    /// A Linux bzImage with a 64-bit entry.
    BzImage(BzImage<'a>),
}

/// Bytes of an image and where they go; memory from there to `end` belongs to the kernel.
#[derive(Debug, PartialEq, Eq)]
pub struct Part<'a> {
    /// Guest address of the first byte.
    pub gpa: u64,
    /// The bytes.
    pub bytes: &'a [u8],
    /// First guest address after what the kernel uses.
    pub end: u64,
}

/// Parses a kernel image. Anything else is refused with what is wrong.
pub fn parse(file: &[u8]) -> Result<Kernel<'_>, Fault> {
    if file.starts_with(&elf::MAGIC) {
        return elf::parse(file).map(Kernel::Elf);
    }
    if bzimage::looks_like_one(file) {
        return bzimage::parse(file).map(Kernel::BzImage);
    }
    Err(invalid(format!(
        "the image's {} bytes are neither an ELF file nor a Linux bzImage; want one of those for x86-64",
        file.len()
    )))
}

impl<'a> Kernel<'a> {
    /// The kind's name, as image lists show it.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Elf(Elf {
                pvh_entry: Some(_), ..
            }) => "elf-pvh",
            Self::Elf(_) => "elf-linux",
            Self::BzImage(_) => "bzimage",
        }
    }

    /// What goes where, all of it between 1 MiB and `low_end`.
    pub fn parts(&self, low_end: u64) -> Result<Vec<Part<'a>>, Fault> {
        let parts = match self {
            Self::Elf(elf) => elf.parts(),
            Self::BzImage(bz) => vec![bz.part()],
        };
        for part in &parts {
            if part.gpa < HIGH_START || part.end > low_end {
                return Err(invalid(format!(
                    "the kernel wants {:#x}..{:#x}, the guest offers it {HIGH_START:#x}..{low_end:#x}",
                    part.gpa, part.end
                )));
            }
        }
        Ok(parts)
    }

    /// First address that an initial RAM disk may not use.
    pub fn initrd_end_max(&self) -> u64 {
        match self {
            Self::Elf(_) => u64::MAX,
            Self::BzImage(bz) => bz.initrd_end_max,
        }
    }
}

#[cfg(test)]
mod tests {
    use drover_proto::Code;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_not_a_kernel_is_refused() {
        for file in [
            &b""[..],
            b"\x7fEL",
            b"#!/bin/sh\n",
            &[0; 4096],
            b"\x7fELF",
            &[0xff; 70_000],
        ] {
            let fault = parse(file).unwrap_err();
            assert_eq!(
                (fault.code, fault.field.as_str()),
                (Code::KernelInvalid, "kernel")
            );
        }
    }

    proptest! {
        #[test]
        fn no_file_makes_the_parser_panic_or_place_bytes_outside_the_guest(
            mut file in proptest::collection::vec(any::<u8>(), 0..2048),
            elf_like in any::<bool>(),
            counts in any::<(u8, u8)>(),
        ) {
            if elf_like && file.len() >= 64 {
                file[..8].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1, 0]);
                file[16..20].copy_from_slice(&[2, 0, 62, 0]);
                file[32..40].copy_from_slice(&u64::from(counts.1).to_le_bytes());
                file[54..58].copy_from_slice(&[56, 0, counts.0 % 16, 0]);
            } else if file.len() > 0x260 {
                file[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
                file[0x202..0x208].copy_from_slice(b"HdrS\x0f\x02");
                file[0x1f1] = counts.0 % 4;
            }
            if let Ok(parts) = parse(&file).and_then(|kernel| kernel.parts(64 << 20)) {
                for part in parts {
                    prop_assert!(part.gpa >= HIGH_START && part.end <= 64 << 20);
                    prop_assert!(part.gpa + part.bytes.len() as u64 <= part.end);
                }
            }
        }
    }
}
