//! The seed disk of a VM: what cloud-init's NoCloud reads at the guest's first boot, as a FAT12 volume named `cidata`.
//!
//! ```text
//!   sector 0   1      3      5            9                                    512
//!   ┌─────────┬──────┬──────┬────────────┬─────────────────────────────────────┐
//!   │ boot    │ FAT  │ FAT  │ root       │ meta-data user-data network-config  │
//!   └─────────┴──────┴──────┴────────────┴─────────────────────────────────────┘
//! ```
//!
//! Every VMM of a run has a copy of its own, and a guest may hold any sector of it in its page cache when it moves: so the same files give
//! the same bytes, on every host and by every version. A test holds the bytes; another layout would need another slot, or another run.
//! FAT, since every stock kernel reads it and a writer is small; there are no folders, no times, and each file lies in one piece.
//!
//! Source: Microsoft's FAT32 File System Specification 1.03 (long names: "FAT Long Directory Entries").

use std::io;
use std::path::{Path, PathBuf};

use drover_proto::v1::CloudSeed;

use super::store::write_private;

/// The disk's file, in the VMM's folder.
pub const SEED_FILE: &str = "seed.img";
/// The slot that it is in: the last but the balloon's, which the cluster gives to nothing else.
pub const SEED_SLOT: u32 = 30;
/// What the guest is told as its serial number.
pub const SEED_SERIAL: &str = "cidata";

const SECTOR: usize = 512;
/// Of the volume, whatever is in it: a target's disk has the source's size.
const SECTORS: usize = 512;
const FATS: usize = 2;
const FAT_SECTORS: usize = 2;
const ROOT_ENTRIES: usize = 64;
const ENTRY: usize = 32;
const ROOT_SECTORS: usize = ROOT_ENTRIES * ENTRY / SECTOR;
const ROOT_AT: usize = 1 + FATS * FAT_SECTORS;
const DATA_AT: usize = ROOT_AT + ROOT_SECTORS;
/// A cluster is a sector; their numbers begin here.
const FIRST_CLUSTER: usize = 2;

/// As libblkid and cloud-init look for it.
const LABEL: &[u8; 11] = b"cidata     ";
const READ_ONLY: u8 = 0x01;
const VOLUME_LABEL: u8 = 0x08;
const LONG_NAME: u8 = 0x0f;
/// Of a long name: this is its last part, which stands first.
const LAST_PART: u8 = 0x40;
const CHARS_A_PART: usize = 13;
/// The first of January 1980, the earliest that there is.
const DATE: u16 = 0x21;
const END_OF_CHAIN: u16 = 0xfff;
const FIXED_DISK: u8 = 0xf8;

/// Writes the disk of `seed` into a VMM's folder.
///
/// # Errors
/// The files do not fit, or the system refuses.
pub fn write(folder: &Path, seed: &CloudSeed) -> io::Result<PathBuf> {
    let path = folder.join(SEED_FILE);
    write_private(&path, &image(seed)?)?;
    Ok(path)
}

/// The volume, byte for byte.
fn image(seed: &CloudSeed) -> io::Result<Vec<u8>> {
    let mut volume = Volume {
        bytes: vec![0; SECTOR * SECTORS],
        entries: 0,
        next: FIRST_CLUSTER,
    };
    volume.boot_sector();
    volume.link(0, 0xf00 | u16::from(FIXED_DISK));
    volume.link(1, END_OF_CHAIN);
    volume.entry(LABEL, VOLUME_LABEL, 0, 0)?;
    volume.file("meta-data", b"META-D~1   ", seed.meta_data.as_bytes())?;
    volume.file("user-data", b"USER-D~1   ", &seed.user_data)?;
    // One that is empty would be an error to cloud-init, where none is none.
    if !seed.network_config.is_empty() {
        volume.file("network-config", b"NETWOR~1   ", seed.network_config.as_bytes())?;
    }
    Ok(volume.bytes)
}

struct Volume {
    bytes: Vec<u8>,
    /// Entries of the root that are taken.
    entries: usize,
    /// The first cluster that is free.
    next: usize,
}

impl Volume {
    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn boot_sector(&mut self) {
        let word = |value: usize| u16::try_from(value).expect("a small volume").to_le_bytes();
        self.put(0, &[0xeb, 0x3c, 0x90]);
        self.put(3, b"DROVER  ");
        self.put(11, &word(SECTOR));
        self.put(13, &[1]);
        self.put(14, &word(1));
        self.put(16, &[u8::try_from(FATS).expect("two")]);
        self.put(17, &word(ROOT_ENTRIES));
        self.put(19, &word(SECTORS));
        self.put(21, &[FIXED_DISK]);
        self.put(22, &word(FAT_SECTORS));
        // Tracks and heads, which nobody asks for.
        self.put(24, &word(32));
        self.put(26, &word(16));
        self.put(36, &[0x80]);
        self.put(38, &[0x29]);
        self.put(39, b"DRVR");
        self.put(43, LABEL);
        self.put(54, b"FAT12   ");
        self.put(510, &[0x55, 0xaa]);
    }

    /// Sets a cluster's entry in both tables: twelve bits, two in three bytes.
    fn link(&mut self, cluster: usize, next: u16) {
        for fat in 0..FATS {
            let at = (1 + fat * FAT_SECTORS) * SECTOR + cluster * 3 / 2;
            let old = u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]]);
            let new = if cluster.is_multiple_of(2) {
                old & 0xf000 | next
            } else {
                old & 0x000f | next << 4
            };
            self.put(at, &new.to_le_bytes());
        }
    }

    fn raw_entry(&mut self, entry: &[u8; ENTRY]) -> io::Result<()> {
        if self.entries == ROOT_ENTRIES {
            return Err(io::Error::other("a seed disk has room for fewer files"));
        }
        self.put(ROOT_AT * SECTOR + self.entries * ENTRY, entry);
        self.entries += 1;
        Ok(())
    }

    fn entry(&mut self, name: &[u8; 11], attributes: u8, cluster: usize, bytes: usize) -> io::Result<()> {
        let mut entry = [0; ENTRY];
        entry[..11].copy_from_slice(name);
        entry[11] = attributes;
        for date in [16, 18, 24] {
            entry[date..date + 2].copy_from_slice(&DATE.to_le_bytes());
        }
        let cluster = u16::try_from(cluster).map_err(io::Error::other)?;
        entry[26..28].copy_from_slice(&cluster.to_le_bytes());
        let bytes = u32::try_from(bytes).map_err(io::Error::other)?;
        entry[28..].copy_from_slice(&bytes.to_le_bytes());
        self.raw_entry(&entry)
    }

    /// The long name of the file whose entry comes next, from its end to its beginning.
    fn long_name(&mut self, name: &str, short: &[u8; 11]) -> io::Result<()> {
        // The places of a part's characters in its entry.
        const PLACES: [std::ops::Range<usize>; 3] = [1..11, 14..26, 28..32];
        let checksum = short
            .iter()
            .fold(0_u8, |sum, byte| sum.rotate_right(1).wrapping_add(*byte));
        let chars: Vec<u16> = name.encode_utf16().collect();
        let parts: Vec<&[u16]> = chars.chunks(CHARS_A_PART).collect();
        for (at, part) in parts.iter().enumerate().rev() {
            let mut entry = [0; ENTRY];
            let number = u8::try_from(at + 1).map_err(io::Error::other)?;
            entry[0] = if at + 1 == parts.len() {
                number | LAST_PART
            } else {
                number
            };
            (entry[11], entry[13]) = (LONG_NAME, checksum);
            // Ended by a zero where there is room for one, and filled up with ones.
            let padded = part.iter().copied().chain([0]).chain(std::iter::repeat(u16::MAX));
            let places = PLACES.into_iter().flatten().step_by(2);
            for (place, char) in places.zip(padded) {
                entry[place..place + 2].copy_from_slice(&char.to_le_bytes());
            }
            self.raw_entry(&entry)?;
        }
        Ok(())
    }

    fn file(&mut self, name: &str, short: &[u8; 11], content: &[u8]) -> io::Result<()> {
        let (first, clusters) = (self.next, content.len().div_ceil(SECTOR));
        if DATA_AT + first - FIRST_CLUSTER + clusters > SECTORS {
            let room = (SECTORS - DATA_AT) * SECTOR;
            return Err(io::Error::other(format!(
                "{name} of {} bytes does not fit: a seed disk has room for {room}",
                content.len()
            )));
        }
        for cluster in first..first + clusters {
            let is_last = cluster + 1 == first + clusters;
            let next = u16::try_from(cluster + 1).map_err(io::Error::other)?;
            self.link(cluster, if is_last { END_OF_CHAIN } else { next });
        }
        self.put((DATA_AT + first - FIRST_CLUSTER) * SECTOR, content);
        self.next += clusters;
        self.long_name(name, short)?;
        let cluster = if clusters == 0 { 0 } else { first };
        self.entry(short, READ_ONLY, cluster, content.len())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Cursor, Read};
    use std::os::unix::fs::PermissionsExt;
    use std::process::Command;

    use proptest::prelude::*;

    use super::*;

    fn seed() -> CloudSeed {
        CloudSeed {
            user_data: b"#cloud-config\nhostname: x\n".to_vec(),
            meta_data: "instance-id: \"vm1-7\"\nlocal-hostname: \"vm1\"\n".to_owned(),
            network_config: "version: 2\n".to_owned(),
        }
    }

    /// The volume's label and files, as a reader made by others has them.
    fn read(image: &[u8]) -> (String, Vec<(String, Vec<u8>)>) {
        let volume = fatfs::FileSystem::new(Cursor::new(image.to_vec()), fatfs::FsOptions::new()).unwrap();
        let label = volume.read_volume_label_from_root_dir().unwrap().unwrap();
        let content = |entry: std::io::Result<fatfs::DirEntry<'_, _>>| {
            let entry = entry.unwrap();
            let mut content = Vec::new();
            entry.to_file().read_to_end(&mut content).unwrap();
            (entry.file_name(), content)
        };
        let files = volume.root_dir().iter().map(content).collect();
        (label, files)
    }

    #[test]
    fn another_reader_finds_the_label_and_the_files() {
        let seed = seed();
        let (label, files) = read(&image(&seed).unwrap());
        assert_eq!(label, "cidata");
        let expected = [
            ("meta-data", seed.meta_data.into_bytes()),
            ("user-data", seed.user_data),
            ("network-config", seed.network_config.into_bytes()),
        ];
        assert_eq!(files, expected.map(|(name, content)| (name.to_owned(), content)));
        let (_, files) = read(&image(&CloudSeed::default()).unwrap());
        assert_eq!(files.len(), 2, "no network-config rather than an empty one");
    }

    #[test]
    fn the_bytes_stay_what_they_are() {
        let digest = blake3::hash(&image(&seed()).unwrap()).to_hex();
        assert_eq!(
            &digest.as_str()[..16],
            "e59d45bb7d304d5a",
            "see the module's head"
        );
    }

    #[test]
    fn its_file_is_the_agents_alone_and_libblkid_knows_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = write(dir.path(), &seed()).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        match Command::new("blkid")
            .args(["-p", "-o", "export"])
            .arg(&path)
            .output()
        {
            Err(error) => println!("SKIPPED: blkid: {error}"),
            Ok(told) => {
                let told = String::from_utf8(told.stdout).unwrap();
                for line in ["LABEL=cidata", "TYPE=vfat", "VERSION=FAT12"] {
                    assert!(told.lines().any(|told| told == line), "{told}");
                }
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_with_its_size() {
        let large = CloudSeed {
            user_data: vec![0; 300 << 10],
            ..seed()
        };
        let error = image(&large).unwrap_err().to_string();
        assert!(error.contains("user-data of 307200 bytes"), "{error}");
    }

    proptest! {
        #[test]
        fn any_files_are_read_back_whole(
            user_data in prop::collection::vec(any::<u8>(), 0..20_000),
            meta_data in "[ -~\n]{0,3000}",
            network_config in "[ -~\n]{1,3000}",
        ) {
            let seed = CloudSeed { user_data, meta_data, network_config };
            let made = image(&seed).unwrap();
            prop_assert_eq!(&made, &image(&seed).unwrap());
            let (_, files) = read(&made);
            prop_assert_eq!(&files[0].1, seed.meta_data.as_bytes());
            prop_assert_eq!(&files[1].1, &seed.user_data);
            prop_assert_eq!(&files[2].1, seed.network_config.as_bytes());
        }
    }
}
