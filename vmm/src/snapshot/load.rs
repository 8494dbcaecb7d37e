//! A VM made from a snapshot: everything is verified, then restored, and it waits for its first lease as after a boot.
//!
//! Nothing runs before all digests were compared: those of memory and state, and those of the disks' content, which is read where it will be used.
//! So a disk that was put in place wrongly, or has been written to since, is found, and no guest goes on with memory and disks of
//! two instants. What does not fit this VM (`bad_state`) is told apart from what is not what was written (`snapshot_damaged`).

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use drover_proto::{Code, Fault};
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use tracing::info;

use super::format::{
    self, BLOCK, BLOCK_BYTES, Digest, Listed, MANIFEST, MANIFEST_BYTES_MAX, MEMORY, Manifest, STATE, damaged,
    digest, fold,
};
use crate::DEVICE_MODEL;
use crate::config::Config;
use crate::cpu::clock::SNAPSHOT_AGE_NS_MAX;
use crate::devices::virtio::blk::SECTOR;
use crate::devices::virtio::blk::disk::Disk;
use crate::memory::{Memory, PAGE};
use crate::save;
use crate::vm::Vm;

/// What content is read from.
trait Content {
    fn read_at(&self, out: &mut [u8], at: u64) -> io::Result<()>;
    /// How many bytes from `at` on are a hole.
    fn hole_ahead(&self, at: u64) -> u64;
}

impl Content for File {
    fn read_at(&self, out: &mut [u8], at: u64) -> io::Result<()> {
        self.read_exact_at(out, at)
    }

    fn hole_ahead(&self, at: u64) -> u64 {
        let Ok(from) = i64::try_from(at) else { return 0 };
        match lseek(self, from, Whence::SeekData) {
            Ok(data) => u64::try_from(data - from).unwrap_or(0),
            Err(Errno::ENXIO) => u64::MAX - at,
            Err(_) => 0,
        }
    }
}

impl Content for Disk {
    fn read_at(&self, out: &mut [u8], at: u64) -> io::Result<()> {
        Disk::read_at(self, out, at)
    }

    fn hole_ahead(&self, at: u64) -> u64 {
        Disk::hole_ahead(self, at)
    }
}

/// Compares content with what is listed of it, and gives each block that is not zero to `take`, before its chunk is verified. `what`: whose it is, for
/// a fault.
fn verify(
    what: &str,
    content: &dyn Content,
    listed: &Listed,
    mut take: impl FnMut(u64, &[u8]) -> Result<(), Fault>,
) -> Result<(), Fault> {
    let mut buffer = vec![0; BLOCK];
    for (start, expected) in (0..)
        .step_by(usize::try_from(listed.chunk_bytes).expect("a chunk's size was checked"))
        .zip(&listed.digests)
    {
        let end = listed.bytes.min(start + listed.chunk_bytes);
        let mut blocks: Vec<Digest> = Vec::new();
        let mut at = start;
        while at < end {
            let length = usize::try_from((end - at).min(BLOCK_BYTES)).expect("a block fits");
            let block = &mut buffer[..length];
            if content.hole_ahead(at) >= length as u64 {
                blocks.push(Digest::default());
            } else {
                content
                    .read_at(block, at)
                    .map_err(|error| damaged(format!("{what}: bytes {at}..{end} cannot be read: {error}")))?;
                let found = digest(block);
                if found != Digest::default() {
                    take(at, block)?;
                }
                blocks.push(found);
            }
            at += length as u64;
        }
        if fold(&blocks) != *expected {
            return Err(damaged(format!(
                "{what}: bytes {start}..{end} are not what they were at the snapshot's instant"
            )));
        }
    }
    Ok(())
}

/// The files of a snapshot that a VM is made of, opened and not looked into.
#[derive(Debug)]
pub struct Files {
    folder: PathBuf,
    manifest: File,
    memory: File,
    state: File,
}

impl Files {
    /// Opens them.
    ///
    /// # Errors
    /// `snapshot_damaged`: one is not there.
    pub fn open(folder: &Path) -> Result<Self, Fault> {
        let open = |name: &str| {
            let path = folder.join(name);
            File::open(&path).map_err(|error| damaged(format!("{}: {error}", path.display())))
        };
        let manifest = open(MANIFEST).map_err(|fault| Fault {
            message: format!("{}: without it there is no snapshot", fault.message),
            ..fault
        })?;
        Ok(Self {
            folder: folder.to_owned(),
            manifest,
            memory: open(MEMORY)?,
            state: open(STATE)?,
        })
    }

    fn name(&self, listed: &Listed) -> String {
        self.folder.join(&listed.file).display().to_string()
    }

    fn manifest(&self) -> Result<Manifest, Fault> {
        let mut bytes = Vec::new();
        (&self.manifest)
            .take(MANIFEST_BYTES_MAX + 1)
            .read_to_end(&mut bytes)
            .map_err(|error| damaged(format!("{}/{MANIFEST}: {error}", self.folder.display())))?;
        Manifest::decode(&bytes).map_err(|fault| Fault {
            message: format!("{}: {}", self.folder.display(), fault.message),
            ..fault
        })
    }

    fn load_memory(&self, memory: &Memory, listed: &Listed) -> Result<(), Fault> {
        let what = self.name(listed);
        check_size(&what, &self.memory, listed)?;
        verify(&what, &self.memory, listed, |at, block| {
            memory.write_pages(at / PAGE, block)
        })
    }

    fn load_state(&self, listed: &Listed) -> Result<Vec<u8>, Fault> {
        let what = self.name(listed);
        check_size(&what, &self.state, listed)?;
        let mut bytes = vec![0; usize::try_from(listed.bytes).expect("a state's size was checked")];
        verify(&what, &self.state, listed, |at, block| {
            let at = usize::try_from(at).expect("within the state");
            bytes[at..at + block.len()].copy_from_slice(block);
            Ok(())
        })?;
        Ok(bytes)
    }
}

/// The file must have the size that is listed.
fn check_size(what: &str, file: &File, listed: &Listed) -> Result<(), Fault> {
    let about = file
        .metadata()
        .map_err(|error| damaged(format!("{what}: {error}")))?;
    if about.is_file() && about.len() == listed.bytes {
        return Ok(());
    }
    let (has, due) = (about.len(), listed.bytes);
    Err(damaged(format!("{what} has {has} bytes, {due} were written")))
}

/// What a migration's target checks of the one who wants to come.
fn check(manifest: &Manifest, config: &Config) -> Result<(), Fault> {
    let differs = |what: &str, snapshot: &dyn std::fmt::Display, here: &dyn std::fmt::Display| {
        let message = format!("the snapshot is of a VM with {what} {snapshot}, this one has {here}");
        Err(Fault::new(Code::BadState, message).field("restore"))
    };
    if manifest.memory.bytes != config.memory_bytes() {
        return differs("memory_mib", &(manifest.memory.bytes >> 20), &config.memory_mib);
    }
    if manifest.vcpus != config.vcpus {
        return differs("vcpus", &manifest.vcpus, &config.vcpus);
    }
    if manifest.cpu_profile != config.cpu_profile.name() {
        return differs("cpu_profile", &manifest.cpu_profile, &config.cpu_profile.name());
    }
    if manifest.device_model > DEVICE_MODEL {
        return differs("device model", &manifest.device_model, &DEVICE_MODEL);
    }
    Ok(())
}

fn verify_disks(vm: &Vm, manifest: &Manifest) -> Result<(), Fault> {
    for listed in &manifest.disks {
        let slot = usize::try_from(listed.slot).expect("a slot was checked");
        let content = &listed.content;
        let disk = vm.devices().attached.disk(slot);
        let Some(disk) = disk.filter(|disk| disk.sectors() * SECTOR >= content.bytes) else {
            let message = format!(
                "the snapshot is of a VM with a disk of {} bytes in slot {slot}, this one has none or a smaller one",
                content.bytes
            );
            return Err(Fault::new(Code::BadState, message).field("restore"));
        };
        let what = format!("disk {} in slot {slot}", disk.path().display());
        verify(&what, &*disk, content, |_, _| Ok(()))?;
    }
    Ok(())
}

/// Verifies the snapshot wholly, and makes `vm`, which was built and equipped and has not run, go on from it.
pub fn restore(vm: &Vm, config: &Config, files: &Files) -> Result<(), Fault> {
    let manifest = files.manifest()?;
    check(&manifest, config)?;
    let state = files.load_state(&manifest.state)?;
    let saved = save::decode(format::decode_state(&state)?)?;
    verify_disks(vm, &manifest)?;
    files.load_memory(vm.memory(), &manifest.memory)?;
    vm.restore_after(&saved, SNAPSHOT_AGE_NS_MAX)?;
    vm.memory().forget_written();
    info!(
        snapshot = manifest.id,
        of = manifest.vm,
        "restored, and waiting for a lease"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::snapshot::sheet::Sheet;

    #[derive(Clone, Debug)]
    enum Harm {
        Flip { at: prop::sample::Index, bit: u8 },
        Cut(prop::sample::Index),
        Grow(u64),
        Hole(prop::sample::Index),
    }

    fn harm() -> impl Strategy<Value = Harm> {
        prop_oneof![
            (any::<prop::sample::Index>(), 0u8..8).prop_map(|(at, bit)| Harm::Flip { at, bit }),
            any::<prop::sample::Index>().prop_map(Harm::Cut),
            (1u64..1 << 20).prop_map(Harm::Grow),
            any::<prop::sample::Index>().prop_map(Harm::Hole),
        ]
    }

    /// Blocks 0 and 20 (in the second chunk) are written, the rest is a hole; the last block is short.
    const BYTES: u64 = 21 * BLOCK_BYTES + 1024;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        #[test]
        fn a_file_that_was_harmed_is_refused_with_its_name_and_the_place(harm in harm(), fill in 1u8..) {
            let dir = tempfile::tempdir().unwrap();
            let mut sheet = Sheet::create(dir.path(), "memory", BYTES).unwrap();
            sheet.put(0, &vec![fill; BLOCK]).unwrap();
            sheet.put(20, &vec![fill; BLOCK]).unwrap();
            let listed = sheet.finish().unwrap();
            let read = |listed: &Listed| {
                let file = File::open(dir.path().join("memory")).unwrap();
                check_size("memory", &file, listed)?;
                let mut taken = 0;
                verify("memory", &file, listed, |_, block| {
                    taken += block.len();
                    Ok(())
                })?;
                Ok(taken)
            };
            prop_assert_eq!(read(&listed), Ok::<_, Fault>(2 * BLOCK));
            let path = dir.path().join("memory");
            let file = File::options().read(true).write(true).open(&path).unwrap();
            let size = usize::try_from(BYTES).unwrap();
            match harm {
                Harm::Flip { at, bit } => {
                    let (at, mut byte) = (at.index(size) as u64, [0]);
                    file.read_exact_at(&mut byte, at).unwrap();
                    file.write_all_at(&[byte[0] ^ 1 << bit], at).unwrap();
                }
                Harm::Cut(at) => file.set_len(at.index(size) as u64).unwrap(),
                Harm::Grow(by) => file.set_len(BYTES + by).unwrap(),
                Harm::Hole(at) => file.write_all_at(&[0; 512], (at.index(2) * 20 * BLOCK) as u64).unwrap(),
            }
            let fault = read(&listed).unwrap_err();
            prop_assert_eq!(fault.code, Code::SnapshotDamaged);
            prop_assert!(fault.message.contains("memory") && fault.message.contains("bytes"), "{}", fault);
        }
    }

    #[test]
    fn a_folder_without_a_manifest_is_no_snapshot() {
        let dir = tempfile::tempdir().unwrap();
        Sheet::create(dir.path(), "memory", BYTES).unwrap();
        let fault = Files::open(dir.path()).unwrap_err();
        assert_eq!(fault.code, Code::SnapshotDamaged);
        assert!(fault.message.contains("no snapshot"), "{fault}");
    }
}
