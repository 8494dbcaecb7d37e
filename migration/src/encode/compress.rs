//! Batches of pages through LZ4 or Zstandard. Both sides know how long the content is, so what comes out is bounded before anything is
//! unpacked, and must be exactly that long.
//!
//! LZ4 in its block form (lz4.org, "LZ4 Block Format"), Zstandard (RFC 8878) at level 1: the quickest that each has.

use drover_proto::{Code, Fault};
use zstd_safe::{CCtx, DCtx};

use crate::codec::bad;

/// The level that is quickest without giving up entropy coding.
const ZSTD_LEVEL: i32 = 1;

/// How a batch is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// LZ4.
    Lz4 = 1,
    /// Zstandard.
    Zstd = 2,
}

impl Method {
    /// Both, quickest first.
    pub const ALL: [Self; 2] = [Self::Lz4, Self::Zstd];

    /// By its number on the wire.
    pub fn from_wire(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|method| *method as u32 == number)
    }

    /// How receipts call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }
}

fn no_memory(what: &str) -> Fault {
    Fault::new(Code::Internal, format!("zstd has no memory to {what}"))
}

/// Compresses. What zstd works in, about 1 MiB, is taken when it is first used.
#[derive(Default)]
pub struct Packer {
    zstd: Option<CCtx<'static>>,
}

impl Packer {
    /// Room that compressing so many bytes may need, by either method.
    pub fn room(bytes: usize) -> usize {
        lz4_flex::block::get_maximum_output_size(bytes).max(zstd_safe::compress_bound(bytes))
    }

    /// Compresses `content` into `out`, which has [`Packer::room`] for it; gives the length, or nothing if it got no smaller.
    pub fn pack(&mut self, method: Method, content: &[u8], out: &mut [u8]) -> Result<Option<usize>, Fault> {
        let length = match method {
            Method::Lz4 => lz4_flex::block::compress_into(content, out).ok(),
            Method::Zstd => {
                if self.zstd.is_none() {
                    self.zstd = Some(CCtx::try_create().ok_or_else(|| no_memory("compress"))?);
                }
                let zstd = self.zstd.as_mut().ok_or_else(|| no_memory("compress"))?;
                zstd.compress(out, content, ZSTD_LEVEL).ok()
            }
        };
        Ok(length.filter(|length| *length < content.len()))
    }
}

/// Takes apart what [`Packer`] made.
#[derive(Default)]
pub struct Unpacker {
    zstd: Option<DCtx<'static>>,
}

impl Unpacker {
    /// Fills `out` from `packed`. It is refused (`bad_frame`) unless it has exactly that many bytes in it.
    pub fn unpack(&mut self, method: Method, packed: &[u8], out: &mut [u8]) -> Result<(), Fault> {
        let length = match method {
            Method::Lz4 => lz4_flex::block::decompress_into(packed, out).map_err(|error| error.to_string()),
            Method::Zstd => {
                if self.zstd.is_none() {
                    self.zstd = Some(DCtx::try_create().ok_or_else(|| no_memory("decompress"))?);
                }
                let zstd = self.zstd.as_mut().ok_or_else(|| no_memory("decompress"))?;
                zstd.decompress(out, packed)
                    .map_err(|code| zstd_safe::get_error_name(code).to_owned())
            }
        };
        match length {
            Ok(length) if length == out.len() => Ok(()),
            Ok(length) => Err(bad(format!(
                "{} pages' {} bytes came as {length}",
                method.name(),
                out.len()
            ))),
            Err(error) => Err(bad(format!(
                "{} bytes that should be {} of {} cannot be unpacked: {error}",
                packed.len(),
                out.len(),
                method.name()
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LENGTH: usize = 16 * 4096;

    fn packed(method: Method, content: &[u8]) -> Option<Vec<u8>> {
        let mut out = vec![0; Packer::room(content.len())];
        let length = Packer::default().pack(method, content, &mut out).unwrap()?;
        out.truncate(length);
        Some(out)
    }

    fn text() -> Vec<u8> {
        (0..LENGTH).map(|at| (at / 7 % 41) as u8).collect()
    }

    #[test]
    fn what_was_packed_comes_out_again_and_into_no_other_length() {
        for method in Method::ALL {
            let mut unpacker = Unpacker::default();
            let small = packed(method, &text()).unwrap();
            assert!(small.len() < LENGTH / 10, "{method:?}: {}", small.len());
            let mut back = vec![9; LENGTH];
            unpacker.unpack(method, &small, &mut back).unwrap();
            assert!(back == text());
            for length in [0, 1, LENGTH - 1, LENGTH + 1] {
                let fault = unpacker.unpack(method, &small, &mut vec![0; length]).unwrap_err();
                assert_eq!(fault.code, Code::BadFrame, "{fault}");
            }
        }
    }

    #[test]
    fn noise_does_not_get_smaller() {
        let mut state = 1_u64;
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            (state >> 56) as u8
        })
        .take(LENGTH)
        .collect();
        for method in Method::ALL {
            assert_eq!(packed(method, &noise), None, "{method:?}");
        }
    }

    proptest! {
        #[test]
        fn nothing_that_is_unpacked_panics_or_outgrows_its_room(bytes in prop::collection::vec(any::<u8>(), 0..200), cut in 0_usize..200, flip in any::<usize>()) {
            for method in Method::ALL {
                let mut unpacker = Unpacker::default();
                let mut out = vec![0; 4096];
                let _ = unpacker.unpack(method, &bytes, &mut out);
                let mut small = packed(method, &text()).unwrap();
                small.truncate(small.len().saturating_sub(cut));
                if !small.is_empty() {
                    let at = flip % small.len();
                    small[at] ^= 1 << (flip % 8);
                }
                let _ = unpacker.unpack(method, &small, &mut out);
                prop_assert_eq!(out.len(), 4096);
            }
        }
    }
}
