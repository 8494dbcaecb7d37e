//! A file of a snapshot while it is written: by blocks, in any order, each once; zero blocks stay holes.
//!
//! Digests are kept of blocks only until all before them are written too, so that they take as much memory as the guest writes ahead of the copy, not as
//! its disk is large.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use drover_proto::{Code, Fault};

use super::format::{BLOCK, BLOCK_BYTES, Digest, Listed, chunk_bytes, digest, fold, is_zero};

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

/// The file, and the digests of what it has so far.
#[derive(Debug)]
pub struct Sheet {
    name: String,
    path: PathBuf,
    file: File,
    bytes: u64,
    /// Of each chunk that is whole, from the first on.
    listed: Vec<String>,
    /// Of the blocks of other chunks that are not zero.
    ahead: BTreeMap<u64, Digest>,
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
        Ok(Self {
            name: name.to_owned(),
            path,
            file,
            bytes,
            listed: Vec::new(),
            ahead: BTreeMap::new(),
        })
    }

    /// Writes block `index`; gives how many bytes that took.
    pub fn put(&mut self, index: u64, data: &[u8]) -> Result<u64, Fault> {
        let at = index * BLOCK_BYTES;
        let expected = self.bytes.saturating_sub(at).min(BLOCK_BYTES);
        assert_eq!(data.len() as u64, expected, "a whole block, or the last one");
        assert!(
            index >= self.listed.len() as u64 * self.chunk(),
            "its chunk is listed"
        );
        if is_zero(data) {
            return Ok(0);
        }
        self.ahead.insert(index, digest(data));
        self.file
            .write_all_at(data, at)
            .map_err(|error| unwritten(&self.path, &error))?;
        Ok(data.len() as u64)
    }

    /// No block below `index` will be written any more.
    pub fn passed(&mut self, index: u64) {
        while (self.listed.len() as u64 + 1) * self.chunk() <= index {
            self.list_next();
        }
    }

    /// Blocks whose digests are kept.
    pub fn ahead(&self) -> usize {
        self.ahead.len()
    }

    /// Blocks of a chunk.
    fn chunk(&self) -> u64 {
        chunk_bytes(self.bytes) / BLOCK_BYTES
    }

    fn list_next(&mut self) {
        let first = self.listed.len() as u64 * self.chunk();
        let count = self.chunk().min(self.bytes.div_ceil(BLOCK_BYTES) - first);
        let digests = (first..first + count).map(|block| self.ahead.remove(&block).unwrap_or_default());
        let folded = fold(&digests.collect::<Vec<_>>());
        self.listed.push(folded);
    }

    /// Writes all of a small file.
    pub fn put_all(&mut self, data: &[u8]) -> Result<(), Fault> {
        for (index, block) in (0..).zip(data.chunks(BLOCK)) {
            self.put(index, block)?;
        }
        Ok(())
    }

    /// Puts it on the medium; what is to be listed of it.
    pub fn finish(mut self) -> Result<Listed, Fault> {
        self.file
            .sync_all()
            .map_err(|error| unwritten(&self.path, &error))?;
        while (self.listed.len() as u64) < self.bytes.div_ceil(chunk_bytes(self.bytes)) {
            self.list_next();
        }
        Ok(Listed::new(&self.name, self.bytes, self.listed))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Three chunks and a bit.
    const BLOCKS: u64 = 3 * 16 + 5;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn in_whatever_order_blocks_come_the_same_is_listed_and_digests_of_whole_chunks_are_not_kept(
            order in Just((0..BLOCKS).collect::<Vec<_>>()).prop_shuffle(),
            holes in proptest::collection::btree_set(0..BLOCKS, 0..40),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let bytes = BLOCKS * BLOCK_BYTES - 512;
            let data = |index: u64| {
                let fill = if holes.contains(&index) { 0 } else { index as u8 + 1 };
                vec![fill; BLOCK_BYTES.min(bytes - index * BLOCK_BYTES) as usize]
            };
            let blocks: Vec<Digest> = (0..BLOCKS).map(|index| digest(&data(index))).collect();
            let expected: Vec<String> = blocks.chunks(16).map(fold).collect();

            let mut sheet = Sheet::create(dir.path(), "disk", bytes).unwrap();
            let mut put = vec![false; BLOCKS as usize];
            for index in order {
                sheet.put(index, &data(index)).unwrap();
                put[index as usize] = true;
                let passed = put.iter().take_while(|there| **there).count();
                sheet.passed(passed as u64);
                let kept = put.iter().skip(passed / 16 * 16).filter(|there| **there).count();
                prop_assert!(sheet.ahead.len() <= kept);
            }
            prop_assert_eq!(sheet.finish().unwrap().digests, expected);
        }
    }
}
