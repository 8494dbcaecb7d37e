//! The form of a snapshot's files: manifest and state, encoded, decoded and checked. Pure.
//!
//! | file | what |
//! | --- | --- |
//! | `memory` | guest memory by page number; a hole where it is zero |
//! | `state` | magic, version, length, the encoded `VmSave`, blake3 over all before |
//! | `manifest` | JSON: what the snapshot is of, and of every file its size and its digests. Written last: without it there is no snapshot |
//! | others | a disk each, as named by whoever asked |
//!
//! A file is digested by blocks of 64 KiB and listed by chunks, at most 4096 a file, so that a manifest is small whatever it is of: a chunk's digest is
//! blake3 over the digests of its blocks, and that of a block is blake3 over its bytes, or 32 zero bytes where the block is zero. A chunk that is all zero is
//! listed as an empty string. The manifest carries a digest of itself, over its JSON with that digest empty.
//!
//! Everything read here is hostile: sizes are bounded before anything is allocated, and whatever can be derived (a chunk's size, their number) must
//! be what it is derived to be.

use std::collections::BTreeSet;

use drover_proto::{Code, Fault, descriptors};
use serde::{Deserialize, Serialize};

use crate::config::{DISKS_MAX, MEMORY_MIB_MAX, VCPUS_MAX};
use crate::devices::pci::SLOTS;
use crate::save::SAVE_BYTES_MAX;

/// Bytes of a block: what is copied, and digested, at once.
pub const BLOCK: usize = 64 << 10;
/// [`BLOCK`] as a difference of places.
pub const BLOCK_BYTES: u64 = BLOCK as u64;
/// The format that this build writes, and the newest that it reads.
pub const FORMAT: u32 = 1;
/// The names of a snapshot's own files.
pub const MEMORY: &str = descriptors::SNAPSHOT_MEMORY;
/// See [`MEMORY`].
pub const STATE: &str = descriptors::SNAPSHOT_STATE;
/// See [`MEMORY`].
pub const MANIFEST: &str = descriptors::SNAPSHOT_MANIFEST;
/// What the manifest is called until it is whole.
pub const MANIFEST_UNFINISHED: &str = descriptors::SNAPSHOT_MANIFEST_UNNAMED;
/// Largest manifest: every file of the most disks with all its chunks.
pub const MANIFEST_BYTES_MAX: u64 = 16 << 20;

const CHUNK_BYTES_MIN: u64 = 1 << 20;
const CHUNKS_MAX: u64 = 4096;
/// Largest disk that is believed, bytes: a file's size is signed.
const DISK_BYTES_MAX: u64 = i64::MAX as u64;
const NAME_BYTES_MAX: usize = 255;

const MAGIC: [u8; 8] = *b"DROVERST";
const STATE_VERSION: u32 = 1;
const HEAD_BYTES: usize = 8 + 4 + 8;
const DIGEST_BYTES: usize = 32;
/// Largest state file.
pub const STATE_BYTES_MAX: usize = HEAD_BYTES + SAVE_BYTES_MAX + DIGEST_BYTES;

/// A block's digest; all zero of one that is zero.
pub type Digest = [u8; DIGEST_BYTES];

/// What is wrong with a snapshot, and where.
pub fn damaged(what: impl Into<String>) -> Fault {
    Fault::new(Code::SnapshotDamaged, what).field("restore")
}

/// Bytes of a chunk of a file of `bytes`.
pub fn chunk_bytes(bytes: u64) -> u64 {
    let mut chunk = CHUNK_BYTES_MIN;
    while bytes.div_ceil(chunk) > CHUNKS_MAX {
        chunk *= 2;
    }
    chunk
}

/// A block's digest.
pub fn digest(block: &[u8]) -> Digest {
    if is_zero(block) {
        return Digest::default();
    }
    *blake3::hash(block).as_bytes()
}

/// Whether a block is all zero.
pub fn is_zero(block: &[u8]) -> bool {
    static ZEROES: [u8; BLOCK] = [0; BLOCK];
    block.chunks(BLOCK).all(|part| part == &ZEROES[..part.len()])
}

/// A chunk's digest as it is listed.
pub fn fold(blocks: &[Digest]) -> String {
    if blocks.iter().all(|block| *block == Digest::default()) {
        return String::new();
    }
    blake3::hash(blocks.as_flattened()).to_hex().to_string()
}

/// A file of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Listed {
    /// Its name in the folder.
    pub file: String,
    /// Its size.
    pub bytes: u64,
    /// Bytes of a chunk; the last one may be shorter.
    pub chunk_bytes: u64,
    /// Of each chunk.
    pub digests: Vec<String>,
}

impl Listed {
    /// A file of `bytes` whose chunks have these digests ([`fold`]).
    pub fn new(file: &str, bytes: u64, digests: Vec<String>) -> Self {
        Self {
            file: file.to_owned(),
            bytes,
            chunk_bytes: chunk_bytes(bytes),
            digests,
        }
    }

    fn check(&self, bytes_max: u64) -> Result<(), Fault> {
        let Self { file, bytes, .. } = self;
        if !is_name(file) {
            return Err(damaged(format!("manifest: {file:?} is no name of a file")));
        }
        if !(1..=bytes_max).contains(bytes) {
            return Err(damaged(format!(
                "manifest: {file} has {bytes} bytes, must have 1..={bytes_max}"
            )));
        }
        let (chunk, count) = (chunk_bytes(*bytes), bytes.div_ceil(chunk_bytes(*bytes)));
        if self.chunk_bytes != chunk || self.digests.len() as u64 != count {
            return Err(damaged(format!(
                "manifest: {file} has {} chunks of {}, {bytes} bytes are {count} of {chunk}",
                self.digests.len(),
                self.chunk_bytes
            )));
        }
        let is_digest = |text: &String| text.is_empty() || blake3::Hash::from_hex(text).is_ok();
        if !self.digests.iter().all(is_digest) {
            return Err(damaged(format!("manifest: {file} has a digest that is none")));
        }
        Ok(())
    }
}

/// Whether `name` can be a file's within a folder.
pub fn is_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_graphic() && byte != b'/';
    (1..=NAME_BYTES_MAX).contains(&name.len()) && name.bytes().all(plain) && name != "." && name != ".."
}

/// Whether `name` can be that of a disk's file: not one of a snapshot's own.
pub fn is_disk_name(name: &str) -> bool {
    is_name(name) && ![MEMORY, STATE, MANIFEST, MANIFEST_UNFINISHED].contains(&name)
}

/// A disk in a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListedDisk {
    /// The slot that it is in.
    pub slot: u32,
    /// Its content.
    pub content: Listed,
}

/// What a snapshot is of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The form of all files.
    pub format: u32,
    /// The snapshot's id, the VM's name and epoch: for people.
    pub id: String,
    /// See `id`.
    pub vm: String,
    /// See `id`.
    pub epoch: u64,
    /// The instant, `CLOCK_REALTIME`.
    pub realtime_ns: u64,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// What the guest sees of the CPU.
    pub cpu_profile: String,
    /// The least device model that can take it over.
    pub device_model: u32,
    /// The guest's memory.
    pub memory: Listed,
    /// The state of all else.
    pub state: Listed,
    /// The disks that are in it, by slot.
    pub disks: Vec<ListedDisk>,
    /// blake3 over this JSON with an empty digest.
    pub digest: String,
}

impl Manifest {
    fn own_digest(&self) -> String {
        let empty = Self {
            digest: String::new(),
            ..self.clone()
        };
        let text = serde_json::to_vec(&empty).expect("a manifest is plain data");
        blake3::hash(&text).to_hex().to_string()
    }

    /// As it is written.
    pub fn encode(mut self) -> Vec<u8> {
        self.digest = self.own_digest();
        serde_json::to_vec_pretty(&self).expect("a manifest is plain data")
    }

    /// Reads and checks what was written.
    pub fn decode(bytes: &[u8]) -> Result<Self, Fault> {
        #[derive(Deserialize)]
        struct Form {
            format: u32,
        }
        if bytes.len() as u64 > MANIFEST_BYTES_MAX {
            return Err(damaged(format!("manifest: {} bytes are too many", bytes.len())));
        }
        let none = |error: serde_json::Error| damaged(format!("manifest: {error}"));
        let form: Form = serde_json::from_slice(bytes).map_err(none)?;
        if form.format > FORMAT {
            let message = format!(
                "the snapshot is of format {}, this VMM reads up to {FORMAT}",
                form.format
            );
            return Err(Fault::new(Code::BadState, message).field("restore"));
        }
        let manifest: Self = serde_json::from_slice(bytes).map_err(none)?;
        if manifest.digest != manifest.own_digest() {
            return Err(damaged(
                "manifest: it is not what was written: its digest is of other content",
            ));
        }
        manifest.check()?;
        Ok(manifest)
    }

    fn check(&self) -> Result<(), Fault> {
        self.memory.check(MEMORY_MIB_MAX << 20)?;
        self.state.check(STATE_BYTES_MAX as u64)?;
        if self.memory.file != MEMORY || self.state.file != STATE || !(1..=VCPUS_MAX).contains(&self.vcpus) {
            let (memory, state) = (&self.memory.file, &self.state.file);
            return Err(damaged(format!(
                "manifest: {} vCPUs, memory in {memory:?}, state in {state:?}",
                self.vcpus
            )));
        }
        if self.disks.len() > DISKS_MAX {
            return Err(damaged(format!(
                "manifest: {} disks, at most {DISKS_MAX} are",
                self.disks.len()
            )));
        }
        let (mut slots, mut names) = (BTreeSet::new(), BTreeSet::new());
        for disk in &self.disks {
            disk.content.check(DISK_BYTES_MAX)?;
            let is_slot = usize::try_from(disk.slot).is_ok_and(|slot| (1..SLOTS).contains(&slot));
            let once = slots.insert(disk.slot) && names.insert(&disk.content.file);
            if !is_slot || !once || !is_disk_name(&disk.content.file) {
                let message = format!("manifest: the disk {:?} in slot {}", disk.content.file, disk.slot);
                return Err(damaged(message));
            }
        }
        Ok(())
    }
}

/// The state file of an encoded state.
pub fn encode_state(saved: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEAD_BYTES + saved.len() + DIGEST_BYTES);
    bytes.extend(MAGIC);
    bytes.extend(STATE_VERSION.to_le_bytes());
    bytes.extend((saved.len() as u64).to_le_bytes());
    bytes.extend(saved);
    let digest = blake3::hash(&bytes);
    bytes.extend(digest.as_bytes());
    bytes
}

/// The encoded state in a state file.
pub fn decode_state(bytes: &[u8]) -> Result<&[u8], Fault> {
    let short = || damaged(format!("state: {} bytes are too few", bytes.len()));
    let (head, rest) = bytes.split_first_chunk::<HEAD_BYTES>().ok_or_else(short)?;
    if head[..8] != MAGIC {
        return Err(damaged("state: it does not begin as a state does"));
    }
    let version = u32::from_le_bytes([head[8], head[9], head[10], head[11]]);
    if version != STATE_VERSION {
        let message = format!("the snapshot's state is of version {version}, this VMM reads {STATE_VERSION}");
        return Err(Fault::new(Code::BadState, message).field("restore"));
    }
    let (saved, digest) = rest.split_last_chunk::<DIGEST_BYTES>().ok_or_else(short)?;
    let length = head[12..]
        .iter()
        .rev()
        .fold(0, |value, &byte| value << 8 | u64::from(byte));
    if length != saved.len() as u64 || saved.len() > SAVE_BYTES_MAX {
        let has = saved.len();
        return Err(damaged(format!(
            "state: it says that it has {length} bytes, and has {has}"
        )));
    }
    if blake3::hash(&bytes[..HEAD_BYTES + saved.len()]) != blake3::Hash::from_bytes(*digest) {
        return Err(damaged(
            "state: it is not what was written: its digest is of other content",
        ));
    }
    Ok(saved)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn manifest() -> Manifest {
        let of = |byte: u8| fold(&[[byte; 32]]);
        let disk = ListedDisk {
            slot: 4,
            content: Listed::new("vol-1.raw", 2 * BLOCK_BYTES + 512, vec![of(7)]),
        };
        Manifest {
            format: FORMAT,
            id: "s1".into(),
            vm: "vm1".into(),
            epoch: 3,
            realtime_ns: 1 << 60,
            vcpus: 2,
            cpu_profile: "baseline".into(),
            device_model: 2,
            memory: Listed::new(MEMORY, 64 << 20, vec![of(1); 64]),
            state: Listed::new(STATE, 20_000, vec![of(5)]),
            disks: vec![disk],
            digest: String::new(),
        }
    }

    fn refused(change: impl FnOnce(&mut Manifest)) -> Fault {
        let mut changed = manifest();
        change(&mut changed);
        Manifest::decode(&changed.encode()).unwrap_err()
    }

    #[test]
    fn a_manifest_is_read_as_it_was_written_and_a_newer_one_is_not_taken_for_damage() {
        let read = Manifest::decode(&manifest().encode()).unwrap();
        assert_eq!((read.memory, read.disks), (manifest().memory, manifest().disks));
        assert_eq!(refused(|manifest| manifest.format = 2).code, Code::BadState);
    }

    #[test]
    fn a_manifest_that_lies_is_refused_although_its_digest_is_right() {
        let lies: [fn(&mut Manifest); 10] = [
            |m| m.memory.bytes = u64::MAX,
            |m| m.memory.bytes += 1 << 20,
            |m| m.memory.chunk_bytes = 0,
            |m| m.memory.digests.clear(),
            |m| m.memory.digests[3] = "0".into(),
            |m| m.memory.file = "other".into(),
            |m| m.state.bytes = u64::MAX / 2,
            |m| m.disks[0].content.file = "../memory".into(),
            |m| m.disks[0].slot = 32,
            |m| m.disks.push(m.disks[0].clone()),
        ];
        for (index, lie) in lies.into_iter().enumerate() {
            let fault = refused(lie);
            assert_eq!(fault.code, Code::SnapshotDamaged, "lie {index}");
            assert!(fault.message.starts_with("manifest: "), "{fault}");
        }
    }

    #[test]
    fn a_manifest_is_small_whatever_it_is_of() {
        for bytes in [1, 1 << 20, 1 << 32, MEMORY_MIB_MAX << 20, DISK_BYTES_MAX] {
            assert!(bytes.div_ceil(chunk_bytes(bytes)) <= CHUNKS_MAX, "{bytes}");
        }
        let largest = Listed {
            file: "x".repeat(NAME_BYTES_MAX),
            bytes: u64::MAX,
            chunk_bytes: u64::MAX,
            digests: vec!["f".repeat(64); 4096],
        };
        let text = serde_json::to_vec_pretty(&largest).unwrap().len() as u64;
        assert!(text * (DISKS_MAX as u64 + 2) < MANIFEST_BYTES_MAX);
    }

    proptest! {
        #[test]
        fn a_state_that_was_cut_or_changed_is_refused(
            saved in proptest::collection::vec(any::<u8>(), 0..400),
            at in any::<prop::sample::Index>(),
            bit in 0u8..8,
        ) {
            let whole = encode_state(&saved);
            prop_assert_eq!(decode_state(&whole), Ok(&saved[..]));
            let cut = &whole[..at.index(whole.len())];
            prop_assert!(decode_state(cut).is_err());
            let mut flipped = whole.clone();
            flipped[at.index(whole.len())] ^= 1 << bit;
            prop_assert!(decode_state(&flipped).is_err());
        }

        #[test]
        fn a_manifest_that_was_cut_or_changed_is_refused_or_says_the_same(
            at in any::<prop::sample::Index>(),
            bit in 0u8..8,
        ) {
            let whole = manifest().encode();
            let read = Manifest::decode(&whole).unwrap();
            prop_assert!(Manifest::decode(&whole[..at.index(whole.len() - 1)]).is_err());
            let mut flipped = whole.clone();
            flipped[at.index(whole.len())] ^= 1 << bit;
            // Blanks may change and say the same.
            if let Ok(other) = Manifest::decode(&flipped) {
                prop_assert_eq!(other, read);
            }
        }

        #[test]
        fn arbitrary_bytes_are_no_snapshot(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(Manifest::decode(&bytes).is_err());
            prop_assert!(decode_state(&bytes).is_err());
        }
    }
}
