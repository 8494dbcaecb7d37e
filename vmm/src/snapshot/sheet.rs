//! A file of a snapshot while it is written: by blocks, in any order, each once; zero blocks stay holes.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use drover_proto::{Code, Fault};

use super::format::{BLOCK, BLOCK_BYTES, Digest, Listed, digest, is_zero};

/// A file could not be written.
pub fn unwritten(path: &Path, error: &io::Error) -> Fault {
    Fault::new(Code::SnapshotFailed, format!("{}: {error}", path.display()))
}

/// Makes a file that is not there.
pub fn create(path: &Path) -> Result<File, Fault> {
    let made = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path);
    made.map_err(|error| unwritten(path, &error))
}

/// The file, and the digests of the blocks that it has so far.
#[derive(Debug)]
pub struct Sheet {
    name: String,
    path: PathBuf,
    file: File,
    bytes: u64,
    digests: Vec<Digest>,
}

impl Sheet {
    /// Makes the file, all of it a hole. One of that name must not be there.
    pub fn create(folder: &Path, name: &str, bytes: u64) -> Result<Self, Fault> {
        let path = folder.join(name);
        Self::of(create(&path)?, path, name, bytes)
    }

    /// Of an empty file, all of it a hole from now on.
    pub fn of(file: File, path: PathBuf, name: &str, bytes: u64) -> Result<Self, Fault> {
        file.set_len(bytes).map_err(|error| unwritten(&path, &error))?;
        let blocks = usize::try_from(bytes.div_ceil(BLOCK_BYTES)).expect("a disk's blocks can be counted");
        Ok(Self {
            name: name.to_owned(),
            path,
            file,
            bytes,
            digests: vec![Digest::default(); blocks],
        })
    }

    /// Writes block `index`; gives how many bytes that took.
    pub fn put(&mut self, index: u64, data: &[u8]) -> Result<u64, Fault> {
        let at = index * BLOCK_BYTES;
        let expected = self.bytes.saturating_sub(at).min(BLOCK_BYTES);
        assert_eq!(data.len() as u64, expected, "a whole block, or the last one");
        if is_zero(data) {
            return Ok(0);
        }
        let place = usize::try_from(index).expect("within the file");
        self.digests[place] = digest(data);
        self.file
            .write_all_at(data, at)
            .map_err(|error| unwritten(&self.path, &error))?;
        Ok(data.len() as u64)
    }

    /// Writes all of a small file.
    pub fn put_all(&mut self, data: &[u8]) -> Result<(), Fault> {
        for (index, block) in (0..).zip(data.chunks(BLOCK)) {
            self.put(index, block)?;
        }
        Ok(())
    }

    /// Puts it on the medium; what is to be listed of it.
    pub fn finish(self) -> Result<Listed, Fault> {
        self.file
            .sync_all()
            .map_err(|error| unwritten(&self.path, &error))?;
        Ok(Listed::new(&self.name, self.bytes, &self.digests))
    }
}
