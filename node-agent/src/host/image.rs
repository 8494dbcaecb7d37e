//! An image as the content of a disk: raw, or qcow2, as cloud images come.
//!
//! Formats are read here and never by a VMM: a volume's file is raw, always. An image that refers to another file (a backing file, a data file) is
//! refused: whoever made it would choose which of this host's files a guest gets to read.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use imago::qcow2::Qcow2;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, Mapping};

use super::copy;

/// What a qcow2 file begins with (QEMU, docs/interop/qcow2.txt).
pub const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";
/// Of its header, up to where its first table is told; numbers are big-endian.
const HEAD_BYTES: usize = 48;
const CLUSTER_BITS_AT: usize = 20;
const TABLE_ENTRIES_AT: usize = 36;
const TABLE_AT: usize = 40;
/// Most entries of the first table: of 32 MiB, as QEMU bounds it.
const TABLE_ENTRIES_MAX: u32 = 4 << 20;
/// Of its entries: where a second table is; 0: nowhere.
const PLACE: u64 = 0x00ff_ffff_ffff_fe00;
/// Read at once.
const BLOCK_BYTES: usize = 1 << 20;
/// What is zero in pieces of this size stays a hole.
const PIECE_BYTES: usize = 64 << 10;

/// An open image.
pub enum Disk {
    /// The file is the content.
    Raw(File),
    /// The file describes it.
    Qcow2 {
        /// The open image.
        image: Box<FormatAccess<imago::file::File>>,
        /// Where its file, and the last cluster, which may be short, end.
        beyond: u64,
    },
}

impl Disk {
    /// Of a file; nothing but its head is read.
    ///
    /// # Errors
    /// It is damaged, refers to other files, or cannot be read.
    pub fn open(mut file: File) -> io::Result<Self> {
        let mut head = Vec::new();
        file.seek(SeekFrom::Start(0))?;
        (&file).take(HEAD_BYTES as u64).read_to_end(&mut head)?;
        if !head.starts_with(&QCOW2_MAGIC) {
            return Ok(Self::Raw(file));
        }
        let head = <[u8; HEAD_BYTES]>::try_from(head).map_err(|_| cut_short())?;
        let bytes = file.metadata()?.len();
        let cluster = check_tables(&file, &head, bytes)?;
        let storage = imago::file::File::try_from(file)?;
        let image = Qcow2::<imago::file::File>::builder(storage).open(DenyImplicitOpenGate::default())?;
        Ok(Self::Qcow2 {
            image: Box::new(FormatAccess::new(image)),
            beyond: bytes + cluster,
        })
    }

    /// The disk's size.
    ///
    /// # Errors
    /// It cannot be asked.
    pub fn bytes(&self) -> io::Result<u64> {
        match self {
            Self::Raw(file) => Ok(file.metadata()?.len()),
            Self::Qcow2 { image, .. } => Ok(image.size()),
        }
    }

    /// Makes `to`, which is empty and at least as large, begin with the content. `goes_on` is told how many bytes are dealt with, and says whether to go
    /// on; if not, this fails.
    ///
    /// # Errors
    /// What cannot be read or written.
    pub fn copy_to(&self, to: &File, goes_on: &dyn Fn(u64) -> bool) -> io::Result<()> {
        match self {
            Self::Raw(file) => copy::copy(file, to, goes_on),
            Self::Qcow2 { image, beyond } => copy_mapped(image, *beyond, to, goes_on),
        }
    }
}

fn cut_short() -> io::Error {
    io::Error::other("the file is cut short, or damaged")
}

/// Whether its tables are in the file, which has so many `bytes`; the size of its clusters. The library reads zeroes beyond a file's end, of which it
/// would make an empty disk.
fn check_tables(file: &File, head: &[u8; HEAD_BYTES], bytes: u64) -> io::Result<u64> {
    let u32_at = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().expect("four bytes"));
    let cluster = 1u64
        .checked_shl(u32_at(CLUSTER_BITS_AT))
        .filter(|cluster| (512..=2 << 20).contains(cluster))
        .ok_or_else(cut_short)?;
    let entries = u32_at(TABLE_ENTRIES_AT);
    let place = u64::from_be_bytes(head[TABLE_AT..].try_into().expect("eight bytes"));
    let end = place.checked_add(u64::from(entries) * 8);
    if entries > TABLE_ENTRIES_MAX || end.is_none_or(|end| end > bytes) {
        return Err(cut_short());
    }
    let mut table = vec![0; entries as usize * 8];
    file.read_exact_at(&mut table, place)?;
    for entry in table.chunks_exact(8) {
        let second = u64::from_be_bytes(entry.try_into().expect("eight bytes")) & PLACE;
        if second
            .checked_add(cluster)
            .is_none_or(|end| second > 0 && end > bytes)
        {
            return Err(cut_short());
        }
    }
    Ok(cluster)
}

/// `beyond`: see [`Disk::Qcow2`].
fn copy_mapped(
    image: &FormatAccess<imago::file::File>,
    beyond: u64,
    to: &File,
    goes_on: &dyn Fn(u64) -> bool,
) -> io::Result<()> {
    let (mut at, end) = (0, image.size());
    let mut block = vec![0; BLOCK_BYTES];
    while at < end {
        if !goes_on(at) {
            return Err(copy::stopped());
        }
        let unreadable = |error| io::Error::other(format!("the image from byte {at} on: {error}"));
        let (mapping, length) = image.get_mapping(at, end - at).map_err(unreadable)?;
        let length = length.min(end - at);
        if length == 0 {
            return Err(unreadable(io::ErrorKind::UnexpectedEof.into()));
        }
        if let Mapping::Zero { .. } = mapping {
            at += length;
            continue;
        }
        // The library reads zeroes beyond the file's end.
        if let Mapping::Raw { offset, .. } = mapping
            && offset.checked_add(length).is_none_or(|end| end >= beyond)
        {
            return Err(unreadable(cut_short()));
        }
        let now = usize::try_from(length).map_or(BLOCK_BYTES, |length| length.min(BLOCK_BYTES));
        let part = &mut block[..now];
        image.read(&mut *part, at).map_err(unreadable)?;
        for piece in part.chunks(PIECE_BYTES) {
            if piece.iter().any(|byte| *byte != 0) {
                to.write_all_at(piece, at)?;
            }
            at += piece.len() as u64;
        }
    }
    goes_on(end);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::{Path, PathBuf};
    use std::process::Command;

    use super::*;

    const MIB: usize = 1 << 20;

    /// A raw file with pieces in it, and what `qemu-img` makes of it; `None` where that is not installed.
    fn converted(dir: &Path, words: &[&str]) -> Option<(Vec<u8>, PathBuf)> {
        let (raw, image) = (dir.join("raw"), dir.join("image"));
        let mut content = vec![0; 9 * MIB + 512];
        for (at, length) in [(0, 512), (MIB - 5, 9), (3 * MIB, 2 * MIB + 7), (9 * MIB, 512)] {
            for (place, byte) in content[at..at + length].iter_mut().enumerate() {
                *byte = (place % 251) as u8 + 1;
            }
        }
        fs::write(&raw, &content).unwrap();
        let made = Command::new("qemu-img")
            .arg("convert")
            .args(words)
            .arg(&raw)
            .arg(&image)
            .output();
        let Ok(made) = made else {
            println!("SKIPPED: qemu-img is not installed");
            return None;
        };
        assert!(made.status.success(), "{made:?}");
        Some((content, image))
    }

    fn copied(image: &Path, dir: &Path) -> Vec<u8> {
        let disk = Disk::open(File::open(image).unwrap()).unwrap();
        let (path, bytes) = (dir.join("copy"), disk.bytes().unwrap());
        let to = File::create(&path).unwrap();
        to.set_len(bytes + MIB as u64).unwrap();
        let told = std::cell::Cell::new(0);
        let rises = |done| {
            assert!(done >= told.replace(done));
            true
        };
        disk.copy_to(&to, &rises).unwrap();
        assert_eq!(told.get(), bytes);
        let mut copy = fs::read(&path).unwrap();
        assert!(
            copy.split_off(usize::try_from(bytes).unwrap())
                .iter()
                .all(|byte| *byte == 0)
        );
        copy
    }

    #[test]
    fn what_qemu_img_writes_is_read_as_it_was_in_every_form() {
        for words in [
            &["-f", "raw", "-O", "raw"][..],
            &["-f", "raw", "-O", "qcow2"],
            &["-f", "raw", "-O", "qcow2", "-c"],
            &["-f", "raw", "-O", "qcow2", "-o", "compat=0.10,cluster_size=4096"],
            &[
                "-f",
                "raw",
                "-O",
                "qcow2",
                "-o",
                "cluster_size=2M,lazy_refcounts=on",
            ],
        ] {
            let dir = tempfile::tempdir().unwrap();
            let Some((content, image)) = converted(dir.path(), words) else {
                return;
            };
            assert!(copied(&image, dir.path()) == content, "{words:?}");
        }
    }

    #[test]
    fn an_image_that_refers_to_another_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let Some((_, base)) = converted(dir.path(), &["-f", "raw", "-O", "qcow2"]) else {
            return;
        };
        let overlay = dir.path().join("overlay");
        let made = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"])
            .args([&base, &overlay])
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
        assert!(Disk::open(File::open(&overlay).unwrap()).is_err());
        let data = dir.path().join("data");
        let option = format!("data_file={}", data.display());
        let made = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-o", &option])
            .arg(&overlay)
            .arg("16M")
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
        assert!(Disk::open(File::open(&overlay).unwrap()).is_err());
    }

    #[test]
    fn a_damaged_image_is_an_error_and_one_that_is_cut_short_too() {
        let dir = tempfile::tempdir().unwrap();
        let Some((_, image)) = converted(dir.path(), &["-f", "raw", "-O", "qcow2", "-c"]) else {
            return;
        };
        let whole = fs::read(&image).unwrap();
        let harmed = dir.path().join("harmed");
        // The header's version, then the place of its first table.
        for at in [7, 41] {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x55;
            fs::write(&harmed, &bytes).unwrap();
            let to = File::create(dir.path().join("copy")).unwrap();
            let opened = Disk::open(File::open(&harmed).unwrap());
            let copied = opened.and_then(|disk| disk.copy_to(&to, &|_| true));
            assert!(copied.is_err(), "byte {at}");
        }
        let is_refused = |bytes: &[u8]| {
            fs::write(&harmed, bytes).unwrap();
            let to = File::create(dir.path().join("copy")).unwrap();
            let opened = Disk::open(File::open(&harmed).unwrap());
            opened.and_then(|disk| disk.copy_to(&to, &|_| true)).is_err()
        };
        assert!(is_refused(&whole[..whole.len() / 2]));
        let Some((_, image)) = converted(dir.path(), &["-f", "raw", "-O", "qcow2"]) else {
            return;
        };
        let whole = fs::read(&image).unwrap();
        assert!(!is_refused(&whole));
        assert!(is_refused(&whole[..whole.len() - MIB]));
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]
        #[test]
        fn whatever_bytes_are_harmed_it_ends_and_nobody_panics(
            harm in proptest::collection::vec((0usize..0x5_0000, proptest::num::u8::ANY), 1..6),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let Some((_, image)) = converted(dir.path(), &["-f", "raw", "-O", "qcow2"]) else { return Ok(()) };
            let mut bytes = fs::read(&image).unwrap();
            for (at, byte) in harm {
                // The header, and the tables' beginnings: what else there is, is content.
                let at = if at % 2 == 0 { at % 0x70 } else { at };
                if let Some(there) = bytes.get_mut(at) {
                    *there = byte;
                }
            }
            fs::write(&image, &bytes).unwrap();
            let to = File::create(dir.path().join("copy")).unwrap();
            if let Ok(disk) = Disk::open(File::open(&image).unwrap()) {
                let steps = std::cell::Cell::new(0);
                let _ = disk.copy_to(&to, &|_| { steps.set(steps.get() + 1); steps.get() < 64 });
            }
        }
    }
}
