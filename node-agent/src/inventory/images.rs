//! The images folder: what in it can be booted, and a digest of each file.
//!
//! A file is told by its first bytes, as a boot loader would: an ELF, a Linux bzImage, the content of a disk, or anything else, which may be an initial
//! RAM disk. A file that claims by its name to be a kernel and is none, or an ELF that nobody could boot, is `invalid` with the
//! problem, so that a person learns of it before a VM fails. Digests are kept by file size, time and inode: a scan reads what changed.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use drover_proto::v1::Image;

use crate::host::image::{Disk, QCOW2_MAGIC};

/// Most images that are reported; further ones, in order of their names, are left out.
const IMAGES_MAX: usize = 1024;
/// Longest name of an image, bytes.
const NAME_BYTES_MAX: usize = 128;
/// Most program headers that are read; a kernel has a handful.
const PROGRAM_HEADERS_MAX: u16 = 64;
/// Largest note segment that is read, bytes.
const NOTES_BYTES_MAX: u64 = 64 * 1024;

/// Where the bzImage's set-up header has its two magic numbers and its version (Linux, Documentation/arch/x86/boot.rst).
const BOOT_FLAG_AT: usize = 0x1fe;
const HEADER_MAGIC_AT: usize = 0x202;
const HEADER_VERSION_AT: usize = 0x206;
const LOAD_FLAGS_AT: usize = 0x211;
/// The kernel is loaded at 1 MiB: only a bzImage, not the zImage of old, has it.
const LOADED_HIGH: u8 = 1;
/// Bytes that decide what a file is.
const HEAD_BYTES: usize = 0x240;

/// A raw disk is told by a partition table's signature (of GPT: of its protective MBR), ext4's magic number, or ISO 9660's.
const PARTITIONED: (u64, [u8; 2]) = (0x1fe, [0x55, 0xaa]);
const EXT4: (u64, [u8; 2]) = (0x438, [0x53, 0xef]);
const ISO9660: (u64, [u8; 5]) = (0x8001, *b"CD001");
/// What initial RAM disks begin with: cpio, gzip, xz, Zstandard, LZ4, bzip2.
const RAM_DISKS: [&[u8]; 7] = [
    b"07070",
    &[0x1f, 0x8b],
    &[0xfd, b'7', b'z', b'X', b'Z', 0],
    &[0x28, 0xb5, 0x2f, 0xfd],
    &[0x02, 0x21, 0x4c, 0x18],
    &[0x04, 0x22, 0x4d, 0x18],
    b"BZh",
];

/// Xen's note with the 32-bit physical entry point, used by the PVH boot protocol (xen/include/public/elfnote.h).
const NOTE_PHYS32_ENTRY: u32 = 18;
const ELF_MAGIC: [u8; 4] = *b"\x7fELF";

/// An images folder with what was found in it.
pub struct Images {
    dir: PathBuf,
    known: BTreeMap<String, (Stamp, Image)>,
}

/// What changes when a file does.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    pub(super) fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

impl Images {
    /// The images of the folder `dir`; nothing is read yet.
    pub fn new(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            known: BTreeMap::new(),
        }
    }

    /// What was found by the last scan, in order of the names.
    pub fn list(&self) -> Vec<Image> {
        self.known.values().map(|(_, image)| image.clone()).collect()
    }

    /// Looks again; whether anything is other than before.
    pub fn scan(&mut self) -> io::Result<bool> {
        let mut found = BTreeMap::new();
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else {
                continue;
            };
            if !is_image_name(&name) {
                continue;
            }
            // Links are followed. What vanished meanwhile is not there.
            let Ok(metadata) = fs::metadata(entry.path()) else {
                continue;
            };
            if metadata.is_file() {
                found.insert(name, Stamp::of(&metadata));
            }
        }
        let mut known = BTreeMap::new();
        for (name, stamp) in found.into_iter().take(IMAGES_MAX) {
            let image = match self.known.get(&name) {
                Some((before, image)) if *before == stamp => image.clone(),
                _ => inspect(&self.dir.join(&name), &name),
            };
            known.insert(name, (stamp, image));
        }
        let list = |known: &BTreeMap<String, (Stamp, Image)>| {
            known.values().map(|(_, i)| i.clone()).collect::<Vec<_>>()
        };
        let changed = list(&known) != list(&self.known);
        self.known = known;
        Ok(changed)
    }
}

fn is_image_name(name: &str) -> bool {
    name.len() <= NAME_BYTES_MAX && !name.starts_with('.') && name.bytes().all(|byte| byte.is_ascii_graphic())
}

fn inspect(path: &Path, name: &str) -> Image {
    let mut image = Image {
        name: name.to_owned(),
        ..Image::default()
    };
    let outcome = File::open(path).and_then(|mut file| {
        let mut hasher = blake3::Hasher::new();
        image.bytes = io::copy(&mut file, &mut hasher)?;
        image.blake3 = hasher.finalize().to_hex().to_string();
        let told = kind_of(&mut file, name)?;
        if told == Ok(QCOW2) || told == Ok(RAW_DISK) {
            // A file that a library cannot cope with costs its own use, and not the host's registration.
            let asked = std::panic::catch_unwind(|| Disk::open(file).and_then(|disk| disk.bytes()));
            return Ok(
                match asked.unwrap_or_else(|_| Err(io::Error::other("it is damaged"))) {
                    Ok(bytes) => {
                        image.disk_bytes = bytes;
                        told
                    }
                    Err(error) => Err(format!("no disk can be made of it: {error}")),
                },
            );
        }
        Ok(told)
    });
    match outcome {
        Ok(Ok(kind)) => image.kind = kind.to_owned(),
        Ok(Err(problem)) => (image.kind, image.problem) = ("invalid".to_owned(), problem),
        Err(error) => {
            (image.kind, image.problem) = ("invalid".to_owned(), format!("it cannot be read: {error}"))
        }
    }
    image
}

const QCOW2: &str = "qcow2";
const RAW_DISK: &str = "disk";

type Told = Result<&'static str, String>;

fn kind_of(file: &mut File, name: &str) -> io::Result<Told> {
    let head = read_at(file, 0, HEAD_BYTES as u64)?;
    if head.starts_with(&ELF_MAGIC) {
        return elf(file, &head);
    }
    if u16_at(&head, BOOT_FLAG_AT) == Some(0xaa55) && bytes_at(&head, HEADER_MAGIC_AT) == Some(*b"HdrS") {
        return Ok(bzimage(&head));
    }
    if head.is_empty() {
        return Ok(Err("it is empty".to_owned()));
    }
    if head.starts_with(&QCOW2_MAGIC) {
        return Ok(Ok(QCOW2));
    }
    if is_raw_disk(file, &head)? {
        return Ok(Ok(RAW_DISK));
    }
    let lower = name.to_ascii_lowercase();
    let claims = |what: &str| {
        Ok(Err(format!(
            "it is named like {what} but does not begin like one"
        )))
    };
    if lower.ends_with(".elf") || lower.starts_with("vmlinux") {
        return claims("an ELF kernel");
    }
    if lower.contains(".bz") || lower.contains("bzimage") || lower.starts_with("vmlinuz") {
        return claims("a bzImage");
    }
    Ok(Ok("initrd"))
}

fn is_raw_disk(file: &mut File, head: &[u8]) -> io::Result<bool> {
    if RAM_DISKS.iter().any(|magic| head.starts_with(magic)) {
        return Ok(false);
    }
    let marks: [(u64, &[u8]); 3] = [
        (PARTITIONED.0, &PARTITIONED.1),
        (EXT4.0, &EXT4.1),
        (ISO9660.0, &ISO9660.1),
    ];
    for (at, magic) in marks {
        if read_at(file, at, magic.len() as u64)? == magic {
            return Ok(true);
        }
    }
    Ok(false)
}

fn bzimage(head: &[u8]) -> Told {
    let version = u16_at(head, HEADER_VERSION_AT).unwrap_or(0);
    if version < 0x200
        || head
            .get(LOAD_FLAGS_AT)
            .is_none_or(|flags| flags & LOADED_HIGH == 0)
    {
        return Err("it is a zImage, which loads low: want a bzImage".to_owned());
    }
    Ok("bzimage")
}

/// ELF-64 object files: header and program headers (System V ABI, chapters 4 and 5).
fn elf(file: &mut File, head: &[u8]) -> io::Result<Told> {
    let refuse = |problem: &str| Ok(Err(problem.to_owned()));
    let (Some(kind), Some(machine), Some(offset), Some(size), Some(count)) = (
        u16_at(head, 16),
        u16_at(head, 18),
        u64_at(head, 32),
        u16_at(head, 54),
        u16_at(head, 56),
    ) else {
        return refuse("its ELF header is cut short");
    };
    if head[4] != 2 || head[5] != 1 || machine != 62 {
        return refuse("it is an ELF, but not for 64-bit x86");
    }
    if !matches!(kind, 2 | 3) {
        return refuse("it is an ELF that is no program: want an executable kernel");
    }
    if usize::from(size) != 56 || count == 0 || count > PROGRAM_HEADERS_MAX {
        return Ok(Err(format!(
            "its ELF header names {count} program headers of {size} bytes: want 1 to {PROGRAM_HEADERS_MAX} of 56"
        )));
    }
    let headers = read_at(file, offset, u64::from(size) * u64::from(count))?;
    if headers.len() != usize::from(size) * usize::from(count) {
        return refuse("its program headers lie beyond the file's end");
    }
    let (mut loads, mut pvh) = (false, false);
    for header in headers.chunks_exact(usize::from(size)) {
        let field = |at| u64_at(header, at).unwrap_or(0);
        match u32_at(header, 0).unwrap_or(0) {
            1 => loads = true,
            3 => {
                return refuse(
                    "it is a program for an operating system (it asks for a dynamic loader), not a kernel",
                );
            }
            4 => {
                pvh |= has_pvh_note(
                    &read_at(file, field(8), field(32).min(NOTES_BYTES_MAX))?,
                    field(48),
                )
            }
            _ => {}
        }
    }
    match (loads, pvh) {
        (false, _) => refuse("it is an ELF without anything to load"),
        (true, true) => Ok(Ok("elf-pvh")),
        (true, false) => Ok(Ok("elf-linux")),
    }
}

/// Whether a note segment holds Xen's PHYS32_ENTRY: each note is name size, content size, type, name, content, the last two
/// padded to `align`.
fn has_pvh_note(mut notes: &[u8], align: u64) -> bool {
    let align = if align == 8 { 8 } else { 4 };
    loop {
        let (Some(name), Some(content), Some(kind)) = (u32_at(notes, 0), u32_at(notes, 4), u32_at(notes, 8))
        else {
            return false;
        };
        if kind == NOTE_PHYS32_ENTRY && notes.get(12..16) == Some(b"Xen\0") {
            return true;
        }
        let padded = |length: u32| (length as usize).next_multiple_of(align);
        match notes.get(12 + padded(name) + padded(content)..) {
            Some(rest) => notes = rest,
            None => return false,
        }
    }
}

/// Up to `length` bytes from `offset`, fewer at the file's end.
fn read_at(file: &mut File, offset: u64, length: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if i64::try_from(offset).is_ok() {
        file.seek(SeekFrom::Start(offset))?;
        file.take(length).read_to_end(&mut bytes)?;
    }
    Ok(bytes)
}

fn bytes_at<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes_at(bytes, at).map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes_at(bytes, at).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes_at(bytes, at).map(u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A 64-bit x86 ELF with one segment to load and, if asked for, another of the given type and content.
    fn elf(kind: u16, machine: u16, segment: Option<(u32, &[u8])>) -> Vec<u8> {
        let count: u16 = if segment.is_some() { 2 } else { 1 };
        let mut elf = vec![0; 64];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[16..18].copy_from_slice(&kind.to_le_bytes());
        elf[18..20].copy_from_slice(&machine.to_le_bytes());
        elf[32..40].copy_from_slice(&64u64.to_le_bytes());
        elf[54..56].copy_from_slice(&56u16.to_le_bytes());
        elf[56..58].copy_from_slice(&count.to_le_bytes());
        let content_at = 64 + 56 * u64::from(count);
        for (kind, content) in [(1, &[][..])].into_iter().chain(segment) {
            let mut header = [0; 56];
            header[..4].copy_from_slice(&u32::to_le_bytes(kind));
            header[8..16].copy_from_slice(&content_at.to_le_bytes());
            header[32..40].copy_from_slice(&(content.len() as u64).to_le_bytes());
            header[48..56].copy_from_slice(&4u64.to_le_bytes());
            elf.extend_from_slice(&header);
        }
        elf.extend_from_slice(segment.map(|(_, content)| content).unwrap_or_default());
        elf
    }

    fn note(name: &[u8], kind: u32) -> Vec<u8> {
        let mut note = Vec::new();
        for word in [name.len() as u32, 4, kind] {
            note.extend_from_slice(&word.to_le_bytes());
        }
        note.extend_from_slice(name);
        note.resize(note.len().next_multiple_of(4), 0);
        note.extend_from_slice(&[0; 4]);
        note
    }

    fn bzimage(version: u16, load_flags: u8) -> Vec<u8> {
        let mut image = vec![0; 0x400];
        image[BOOT_FLAG_AT..][..2].copy_from_slice(&[0x55, 0xaa]);
        image[HEADER_MAGIC_AT..][..4].copy_from_slice(b"HdrS");
        image[HEADER_VERSION_AT..][..2].copy_from_slice(&version.to_le_bytes());
        image[LOAD_FLAGS_AT] = load_flags;
        image
    }

    #[test]
    fn every_kind_of_file_is_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let xen = [note(b"GNU\0", 3), note(b"Xen\0", NOTE_PHYS32_ENTRY)].concat();
        let other = [note(b"GNU\0", NOTE_PHYS32_ENTRY), note(b"Xen\0", 1)].concat();
        let marked = |begin: &[u8], at: u64, magic: &[u8]| {
            let mut disk = vec![0; 64 << 10];
            disk[..begin.len()].copy_from_slice(begin);
            let at = usize::try_from(at).unwrap();
            disk[at..at + magic.len()].copy_from_slice(magic);
            disk
        };
        let cases: [(&str, Vec<u8>, &str, &str); 20] = [
            ("pvh", elf(2, 62, Some((4, &xen))), "elf-pvh", ""),
            ("linux", elf(2, 62, Some((4, &other))), "elf-linux", ""),
            ("plain", elf(2, 62, None), "elf-linux", ""),
            (
                "program",
                elf(3, 62, Some((3, b"/lib/ld.so\0"))),
                "invalid",
                "dynamic loader",
            ),
            ("arm", elf(2, 183, None), "invalid", "64-bit x86"),
            ("object.o", elf(1, 62, None), "invalid", "no program"),
            ("short", b"\x7fELF\x02\x01".to_vec(), "invalid", "cut short"),
            (
                "cut",
                elf(2, 62, None)[..80].to_vec(),
                "invalid",
                "beyond the file's end",
            ),
            ("vmlinuz-6.1", bzimage(0x20f, 1), "bzimage", ""),
            ("zimage", bzimage(0x20f, 0), "invalid", "zImage"),
            ("probe.elf", b"hello".to_vec(), "invalid", "an ELF kernel"),
            ("kernel.bzImage", b"hello".to_vec(), "invalid", "a bzImage"),
            ("vmlinuz", b"hello".to_vec(), "invalid", "a bzImage"),
            ("initrd.img", b"\x1f\x8bhello".to_vec(), "initrd", ""),
            ("empty", vec![], "invalid", "empty"),
            (
                "debian.raw",
                marked(b"\xeb\x63", PARTITIONED.0, &PARTITIONED.1),
                "disk",
                "",
            ),
            ("ext4", marked(b"", EXT4.0, &EXT4.1), "disk", ""),
            ("cd", marked(b"", ISO9660.0, &ISO9660.1), "disk", ""),
            (
                "by-chance",
                marked(b"\x1f\x8b", PARTITIONED.0, &PARTITIONED.1),
                "initrd",
                "",
            ),
            (
                "cut.qcow2",
                QCOW2_MAGIC.to_vec(),
                "invalid",
                "no disk can be made of it",
            ),
        ];
        for (name, content, _, _) in &cases {
            fs::write(dir.path().join(name), content).unwrap();
        }
        let mut images = Images::new(dir.path());
        assert!(images.scan().unwrap());
        for (name, content, kind, problem) in &cases {
            let image = images
                .list()
                .into_iter()
                .find(|image| image.name == *name)
                .unwrap();
            assert_eq!(image.kind, *kind, "{name}: {}", image.problem);
            assert!(image.problem.contains(problem), "{name}: {}", image.problem);
            assert_eq!(image.bytes, content.len() as u64);
            let disk_bytes = if *kind == RAW_DISK { image.bytes } else { 0 };
            assert_eq!(image.disk_bytes, disk_bytes, "{name}");
            assert_eq!(image.blake3, blake3::hash(content).to_hex().to_string());
        }
    }

    #[test]
    fn this_test_itself_is_no_kernel() {
        let path = std::env::current_exe().unwrap();
        let image = inspect(&path, "test");
        assert_eq!(image.kind, "invalid");
        assert!(image.problem.contains("dynamic loader"), "{}", image.problem);
    }

    #[test]
    fn a_scan_says_whether_the_folder_changed() {
        let dir = tempfile::tempdir().unwrap();
        let mut images = Images::new(dir.path());
        assert!(!images.scan().unwrap());
        fs::write(dir.path().join("a"), "one").unwrap();
        fs::write(dir.path().join(".hidden"), "x").unwrap();
        fs::create_dir(dir.path().join("folder")).unwrap();
        assert!(images.scan().unwrap());
        assert!(!images.scan().unwrap());
        assert_eq!(images.list().len(), 1);
        fs::write(dir.path().join("a"), "other").unwrap();
        assert!(images.scan().unwrap());
        fs::remove_file(dir.path().join("a")).unwrap();
        assert!(images.scan().unwrap());
        assert!(images.list().is_empty());
        assert!(Images::new(Path::new("/nowhere")).scan().is_err());
    }
}
