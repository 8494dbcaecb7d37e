//! Where a snapshot's files come from, and who gives its manifest the name that makes it a snapshot.
//!
//! | VMM | its files | the manifest |
//! | --- | --- | --- |
//! | outside of a sandbox | made here, in an empty folder | named here |
//! | inside | made by its agent, empty, and handed in | written and synced here as `manifest.new`, named by the agent |
//!
//! Inside nothing can be made, named or removed by path: what fails is emptied, so that the room is given back, and the agent removes the files.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use drover_proto::descriptors::SNAPSHOT_FILES;
use drover_proto::{Code, Fault};

use super::format::{MANIFEST, MANIFEST_UNFINISHED};
use super::sheet::{Sheet, create, unwritten};
use super::stage::Whole;

/// See the module.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    /// By path; `None`: this process makes its files.
    handed: Option<BTreeMap<PathBuf, File>>,
}

/// The refusal of a VMM in its sandbox that lacks something.
pub fn not_handed_in(what: &str) -> Fault {
    let message =
        format!("this VMM is in its sandbox, and its agent has not handed in {what} for the snapshot");
    Fault::new(Code::Denied, message)
}

impl Folder {
    /// The folder at `path`, with the files in it that were handed in, if they had to be.
    ///
    /// # Errors
    /// `invalid_argument`: it is none, or not empty; a file that was handed in is not.
    pub fn new(path: &Path, handed: Option<BTreeMap<PathBuf, File>>) -> Result<Self, Fault> {
        let refused = |what: String| {
            let message = format!("folder {} {what}", path.display());
            Fault::new(Code::InvalidArgument, message).field("folder")
        };
        if !path.is_absolute() {
            return Err(refused("must be an absolute path".to_owned()));
        }
        match &handed {
            None => {
                let entries = fs::read_dir(path);
                let mut entries = entries.map_err(|error| refused(format!("cannot be read: {error}")))?;
                if entries.next().is_some() {
                    return Err(refused("is not empty".to_owned()));
                }
            }
            Some(files) => {
                let is_empty = |file: &File| {
                    file.metadata()
                        .is_ok_and(|about| about.is_file() && about.len() == 0)
                };
                if let Some((file, _)) = files.iter().find(|(_, file)| !is_empty(file)) {
                    let what = format!(
                        "is not empty: {} was handed in, and is no empty file",
                        file.display()
                    );
                    return Err(refused(what));
                }
            }
        }
        Ok(Self {
            path: path.to_owned(),
            handed,
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether all files can be had that a snapshot with these disks has.
    ///
    /// # Errors
    /// `denied`: one was not handed in.
    pub fn check<'a>(&self, disks: impl Iterator<Item = &'a str>) -> Result<(), Fault> {
        let Some(handed) = &self.handed else { return Ok(()) };
        let paths = SNAPSHOT_FILES
            .into_iter()
            .chain(disks)
            .map(|name| self.path.join(name));
        let mut missing = paths.filter(|path| !handed.contains_key(path));
        missing
            .next()
            .map_or(Ok(()), |path| Err(not_handed_in(&path.display().to_string())))
    }

    fn file(&self, name: &str) -> Result<File, Fault> {
        let path = self.path.join(name);
        let Some(handed) = &self.handed else {
            return create(&path);
        };
        let file = handed
            .get(&path)
            .ok_or_else(|| not_handed_in(&path.display().to_string()))?;
        file.try_clone().map_err(|error| unwritten(&path, &error))
    }

    /// The file `name` of `bytes`, which is to be written.
    pub fn sheet(&self, name: &str, bytes: u64) -> Result<Sheet, Fault> {
        Sheet::of(self.file(name)?, self.path.join(name), name, bytes)
    }

    /// Gives back the room of a snapshot that failed, so that a full disk is not full for nothing. What cannot be removed is its agent's to remove.
    pub fn clear<'a>(&self, disks: impl Iterator<Item = &'a str>) {
        if let Some(handed) = &self.handed {
            for file in handed.values() {
                let _ = file.set_len(0);
            }
            return;
        }
        for name in SNAPSHOT_FILES.into_iter().chain([MANIFEST]).chain(disks) {
            let _ = fs::remove_file(self.path.join(name));
        }
    }

    /// Makes the snapshot one, or all of one but the name: the manifest is whole, or not there, whenever its host dies.
    pub fn publish(&self, manifest: &[u8]) -> Result<Whole, Fault> {
        let (path, unfinished) = (self.path.join(MANIFEST), self.path.join(MANIFEST_UNFINISHED));
        let mut file = self.file(MANIFEST_UNFINISHED)?;
        let mut named = || {
            file.write_all(manifest)?;
            file.sync_all()?;
            if self.handed.is_some() {
                return Ok(Whole::Unnamed);
            }
            fs::rename(&unfinished, &path)?;
            File::open(&self.path)?.sync_all()?;
            Ok(Whole::Named)
        };
        named().map_err(|error| unwritten(&path, &error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::format::{MEMORY, STATE};

    fn handed(folder: &Path, names: &[&str]) -> BTreeMap<PathBuf, File> {
        let made = |name: &&str| {
            let path = folder.join(name);
            (path.clone(), create(&path).unwrap())
        };
        names.iter().map(made).collect()
    }

    #[test]
    fn what_was_handed_in_is_written_and_left_unnamed_and_a_failure_gives_its_room_back() {
        let dir = tempfile::tempdir().unwrap();
        let files = handed(dir.path(), &[MEMORY, STATE, MANIFEST_UNFINISHED, "disk-1.raw"]);
        let folder = Folder::new(dir.path(), Some(files)).unwrap();
        folder.check(["disk-1.raw"].into_iter()).unwrap();
        let mut memory = folder.sheet(MEMORY, 3).unwrap();
        memory.put_all(b"abc").unwrap();
        memory.finish().unwrap();
        assert_eq!(fs::read(dir.path().join(MEMORY)).unwrap(), b"abc");
        assert_eq!(folder.publish(b"{}").unwrap(), Whole::Unnamed);
        assert_eq!(fs::read(dir.path().join(MANIFEST_UNFINISHED)).unwrap(), b"{}");
        assert!(!dir.path().join(MANIFEST).exists());
        folder.clear(["disk-1.raw"].into_iter());
        for name in [MEMORY, MANIFEST_UNFINISHED] {
            assert_eq!(fs::metadata(dir.path().join(name)).unwrap().len(), 0);
        }
    }

    #[test]
    fn what_was_not_handed_in_is_named_and_what_is_not_empty_is_not_written_over() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::new(dir.path(), Some(handed(dir.path(), &SNAPSHOT_FILES))).unwrap();
        let fault = folder.check(["disk-1.raw"].into_iter()).unwrap_err();
        assert_eq!(fault.code, Code::Denied);
        assert!(fault.message.contains("disk-1.raw"), "{fault}");
        let (path, other) = (dir.path().join("other"), handed(dir.path(), &["other"]));
        fs::write(&path, "of another snapshot").unwrap();
        let fault = Folder::new(dir.path(), Some(other)).unwrap_err();
        assert_eq!(fault.code, Code::InvalidArgument);
        assert_eq!(fs::read(&path).unwrap(), b"of another snapshot");
    }

    #[test]
    fn outside_of_a_sandbox_the_manifest_is_named_here_and_the_folder_must_be_empty() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::new(dir.path(), None).unwrap();
        assert_eq!(folder.publish(b"{}").unwrap(), Whole::Named);
        assert!(Folder::new(dir.path(), None).is_err());
        folder.clear([].into_iter());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
