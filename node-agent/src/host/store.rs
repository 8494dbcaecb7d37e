//! The agent's folder: which epochs were ever started here, and one folder for each VMM.
//!
//! ```text
//! data/agent.lock                     held by the one agent of this folder
//! data/vms/<vm>/highest_epoch         durable; rises before anything is started for an epoch
//! data/vms/<vm>/e<epoch>-<start|migration>/
//!      started                        durable before the VMM is executed: this one was used
//!      config.json  vmm.sock  vmm.log
//!      lock                           held by the VMM for its life
//!      restored                       it begins as a snapshot has it: no lease before the log says that it has begun
//!      granted                        an incoming or restored VMM was handed a lease, or is about to be: the epoch is its own
//!      over                           its end was reported; only marker and log are left
//! ```
//!
//! "Durable" is: the file is synced, and then every folder whose entry for it is new. What a crash leaves half-made was never
//! executed, because the marker comes last before the start.
//!
//! One epoch of a VM has one VMM with a right to run. Which one it is, the desired state says; this folder keeps the host from
//! believing a second one: once a VMM may have run for an epoch (one that boots: from its marker on, an incoming one: from
//! `granted` on), no other is started for it. A target whose migration was aborted has no `granted` and stands in nobody's way.
//! `granted` is not synced, since the guest stands still while it is written: it must survive agent and VMM, not the host,
//! whose next boot the controllers answer by ending all its epochs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::key::Key;

/// Ended VMMs of one VM whose marker and log are kept.
const ENDED_KEPT: usize = 4;
/// Files of an ended VMM that are kept.
const KEPT: [&str; 4] = ["started", GRANTED, "vmm.log", "over"];
/// The file that says that a VMM which did not boot may run.
const GRANTED: &str = "granted";
/// The file that says that a VMM begins as a snapshot has it, and may not run before that is in the log.
const RESTORED: &str = "restored";

/// Why the store cannot do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Reading or writing failed.
    #[error("{path}: {source}")]
    Io {
        /// What was read or written.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another agent uses the folder.
    #[error("{0}: another agent holds its lock; one agent a data_dir")]
    InUse(PathBuf),
    /// A VMM was started under this key before.
    #[error("a VMM was started for {0} before; an epoch is started once")]
    Used(Key),
    /// Another VMM may have run for this epoch.
    #[error("{other} may have run for the epoch of {key}; an epoch runs in one VMM")]
    Taken {
        /// What was to be started.
        key: Key,
        /// What may have run.
        other: Key,
    },
    /// The epoch lies below one that was started here.
    #[error("epoch {} of {} is below {highest}, which this host has seen", .key.epoch, .key.vm)]
    Stale {
        /// What was to be started.
        key: Key,
        /// The highest epoch seen.
        highest: u64,
    },
    /// A name that no folder may have.
    #[error("{0} is no VM and migration")]
    Name(Key),
}

trait At<T> {
    fn at(self, path: &Path) -> Result<T, StoreError>;
}

impl<T> At<T> for io::Result<T> {
    fn at(self, path: &Path) -> Result<T, StoreError> {
        self.map_err(|source| StoreError::Io {
            path: path.to_owned(),
            source,
        })
    }
}

/// The agent's folder, locked.
pub struct Store {
    vms: PathBuf,
    _lock: Flock<File>,
    highest: BTreeMap<String, u64>,
    markers: BTreeSet<Key>,
}

impl Store {
    /// Opens `data_dir`, made when missing, and reads what was started here. Returns besides every VMM whose end is not known
    /// to have been reported.
    pub fn open(data_dir: &Path) -> Result<(Self, Vec<Key>), StoreError> {
        let vms = data_dir.join("vms");
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&vms)
            .at(&vms)?;
        let lock_path = data_dir.join("agent.lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&lock_path)
            .at(&lock_path)?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
            Errno::EWOULDBLOCK => StoreError::InUse(data_dir.to_owned()),
            errno => StoreError::Io {
                path: lock_path,
                source: errno.into(),
            },
        })?;
        let mut store = Self {
            vms,
            _lock: lock,
            highest: BTreeMap::new(),
            markers: BTreeSet::new(),
        };
        let mut open = Vec::new();
        for vm in names_in(&store.vms)? {
            store.scan(&vm, &mut open)?;
        }
        Ok((store, open))
    }

    fn scan(&mut self, vm: &str, open: &mut Vec<Key>) -> Result<(), StoreError> {
        let folder = self.vms.join(vm);
        let path = folder.join("highest_epoch");
        let mut highest = match fs::read_to_string(&path) {
            Ok(text) => text.trim().parse().map_err(io::Error::other).at(&path)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            Err(error) => return Err(error).at(&path),
        };
        for key in names_in(&folder)?.iter().filter_map(|name| Key::parse(vm, name)) {
            let folder = self.folder(&key);
            if !folder.join("started").exists() {
                continue; // A crash came before its marker: nothing was executed.
            }
            highest = highest.max(key.epoch);
            if folder.join("over").exists() {
                clear(&folder)?; // A crash may have come between the end's note and this.
            } else {
                open.push(key.clone());
            }
            self.markers.insert(key);
        }
        if highest > 0 {
            self.highest.insert(vm.to_owned(), highest);
        }
        Ok(())
    }

    /// Every VMM that was started here and whose marker still stands.
    pub fn markers(&self) -> &BTreeSet<Key> {
        &self.markers
    }

    /// By VM, the highest epoch seen here.
    pub fn highest(&self) -> &BTreeMap<String, u64> {
        &self.highest
    }

    /// The VMM's folder.
    pub fn folder(&self, key: &Key) -> PathBuf {
        self.vms.join(&key.vm).join(key.folder_name())
    }

    /// Writes the marker for `key`, durably: from the return on it counts as started, whatever happens. Returns its folder.
    pub fn begin(&mut self, key: &Key) -> Result<PathBuf, StoreError> {
        if !key.is_well_formed() {
            return Err(StoreError::Name(key.clone()));
        }
        let folder = self.folder(key);
        if self.markers.contains(key) || folder.join("started").exists() {
            return Err(StoreError::Used(key.clone()));
        }
        let highest = self.highest.get(&key.vm).copied().unwrap_or(0);
        if key.epoch < highest {
            return Err(StoreError::Stale {
                key: key.clone(),
                highest,
            });
        }
        let of_epoch = |other: &&Key| (&other.vm, other.epoch) == (&key.vm, key.epoch);
        if let Some(other) = self
            .markers
            .iter()
            .filter(of_epoch)
            .find(|other| self.may_have_run(other))
        {
            return Err(StoreError::Taken {
                key: key.clone(),
                other: other.clone(),
            });
        }
        if folder.exists() {
            fs::remove_dir_all(&folder).at(&folder)?;
        }
        self.raise(&key.vm, key.epoch)?;
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)
            .at(&folder)?;
        write_synced(&folder.join("started"), b"")?;
        sync(&folder)?;
        sync(&self.vms.join(&key.vm))?;
        self.markers.insert(key.clone());
        Ok(folder)
    }

    /// Whether a VMM that was started may have had a right to run.
    fn may_have_run(&self, key: &Key) -> bool {
        // What cannot be asked may have been.
        key.migration().is_none() || self.folder(key).join(GRANTED).try_exists().unwrap_or(true)
    }

    /// Makes every epoch below `epoch` of `vm` one that is never started here, durably.
    pub fn raise(&mut self, vm: &str, epoch: u64) -> Result<(), StoreError> {
        if !Key::start(vm, epoch).is_well_formed() {
            return Err(StoreError::Name(Key::start(vm, epoch)));
        }
        if self.highest.get(vm).is_some_and(|&highest| highest >= epoch) {
            return Ok(());
        }
        let folder = self.vms.join(vm);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)
            .at(&folder)?;
        let (path, staged) = (folder.join("highest_epoch"), folder.join("highest_epoch.new"));
        write_synced(&staged, format!("{epoch}\n").as_bytes())?;
        fs::rename(&staged, &path).at(&path)?;
        sync(&folder)?;
        sync(&self.vms)?;
        self.highest.insert(vm.to_owned(), epoch);
        Ok(())
    }

    /// Its end is reported: only marker and log are kept, and of ended VMMs only the last few.
    pub fn end(&mut self, key: &Key) -> Result<(), StoreError> {
        let folder = self.folder(key);
        if !self.markers.contains(key) {
            return Ok(()); // It never got as far as its marker.
        }
        write_synced(&folder.join("over"), b"")?;
        clear(&folder)?;
        self.prune(&key.vm)
    }

    fn prune(&mut self, vm: &str) -> Result<(), StoreError> {
        // Ended ones, oldest first. What is dropped cannot be started again: later epochs stand above it, and of one epoch
        // only aborted migrations can pile up, whose ids rise.
        let mut ended: Vec<(u64, u64, Key)> = self
            .markers
            .iter()
            .filter(|key| key.vm == vm && self.folder(key).join("over").exists())
            .map(|key| {
                (
                    key.epoch,
                    key.migration()
                        .and_then(crate::key::migration_number)
                        .unwrap_or(0),
                    key.clone(),
                )
            })
            .collect();
        ended.sort();
        let excess = ended.len().saturating_sub(ENDED_KEPT);
        let highest = self.highest.get(vm).copied().unwrap_or(0);
        for (epoch, _, key) in ended.into_iter().take(excess) {
            if epoch == highest && self.may_have_run(&key) {
                continue;
            }
            let folder = self.folder(&key);
            fs::remove_dir_all(&folder).at(&folder)?;
            self.markers.remove(&key);
        }
        Ok(())
    }
}

/// Removes from an ended VMM's folder all but its marker and its log.
fn clear(folder: &Path) -> Result<(), StoreError> {
    for name in names_in(folder)?
        .iter()
        .filter(|name| !KEPT.contains(&name.as_str()))
    {
        let path = folder.join(name);
        fs::remove_file(&path).at(&path)?;
    }
    Ok(())
}

/// Notes, before it is started, that the VMM of `folder` waits for the word that it may begin.
pub fn note_restored(folder: &Path) -> io::Result<()> {
    write_private(&folder.join(RESTORED), b"")
}

/// Whether the VMM of `folder`, which does not boot or does as a snapshot has it, needs that word.
pub fn is_restored(folder: &Path) -> bool {
    folder.join(RESTORED).exists()
}

/// Notes, before its first lease is handed on, that the VMM of `folder`, which did not boot, may run.
pub fn note_granted(folder: &Path) -> io::Result<()> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(folder.join(GRANTED))
        .map(drop)
}

/// Whether a lease of the VMM of `folder` was noted.
pub fn was_granted(folder: &Path) -> bool {
    folder.join(GRANTED).exists()
}

/// Creates a file that only this user can read.
pub fn write_private(path: &Path, content: &[u8]) -> io::Result<()> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?
        .write_all(content)
}

/// Puts a file in place of the one that is there: whoever reads sees one or the other, also when this process is killed. What a reboot
/// would lose nobody needs by then.
pub fn replace_private(path: &Path, content: &[u8]) -> io::Result<()> {
    let staged = path.with_extension("new");
    match fs::remove_file(&staged) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => write_private(&staged, content)?,
    }
    fs::rename(&staged, path)
}

fn write_synced(path: &Path, content: &[u8]) -> Result<(), StoreError> {
    let write = || {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(path)?;
        file.write_all(content)?;
        file.sync_all()
    };
    write().at(path)
}

fn sync(folder: &Path) -> Result<(), StoreError> {
    File::open(folder).and_then(|folder| folder.sync_all()).at(folder)
}

fn names_in(folder: &Path) -> Result<Vec<String>, StoreError> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).at(folder)? {
        let entry = entry.at(folder)?;
        if let Ok(name) = entry.file_name().into_string() {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(dir: &Path) -> (Store, Vec<Key>) {
        Store::open(dir).unwrap()
    }

    #[test]
    fn an_epoch_is_begun_once_also_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let key = Key::start("vm1", 3);
        let (mut store, found) = open(dir.path());
        assert_eq!(found, []);
        store.begin(&key).unwrap();
        assert!(matches!(store.begin(&key), Err(StoreError::Used(_))));
        drop(store);
        let (mut store, found) = open(dir.path());
        assert_eq!(found, std::slice::from_ref(&key));
        assert!(matches!(store.begin(&key), Err(StoreError::Used(_))));
        store.end(&key).unwrap();
        assert!(matches!(store.begin(&key), Err(StoreError::Used(_))));
        drop(store);
        let (mut store, found) = open(dir.path());
        assert_eq!(found, []);
        assert!(matches!(store.begin(&key), Err(StoreError::Used(_))));
    }

    #[test]
    fn an_epoch_below_the_highest_is_refused_and_one_migration_more_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let (mut store, _) = open(dir.path());
        store.begin(&Key::incoming("vm1", 6, "m1")).unwrap();
        store.begin(&Key::incoming("vm1", 6, "m2")).unwrap();
        assert!(matches!(
            store.begin(&Key::start("vm1", 5)),
            Err(StoreError::Stale { highest: 6, .. })
        ));
        store.raise("vm1", 9).unwrap();
        drop(store);
        let (mut store, _) = open(dir.path());
        assert!(matches!(
            store.begin(&Key::start("vm1", 8)),
            Err(StoreError::Stale { highest: 9, .. })
        ));
        store.begin(&Key::start("vm1", 9)).unwrap();
        store.begin(&Key::start("vm2", 1)).unwrap();
    }

    #[test]
    fn an_epoch_that_a_vmm_may_have_run_for_has_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let (mut store, _) = open(dir.path());
        let (aborted, arrived) = (Key::incoming("vm1", 2, "m1"), Key::incoming("vm1", 2, "m2"));
        store.begin(&aborted).unwrap();
        store.end(&aborted).unwrap();
        let folder = store.begin(&arrived).unwrap();
        note_granted(&folder).unwrap();
        let refused = |store: &mut Store, key: &Key| match store.begin(key) {
            Err(StoreError::Taken { other, .. }) => other,
            answer => panic!("{answer:?}"),
        };
        let others = [Key::start("vm1", 2), Key::incoming("vm1", 2, "m9")];
        for other in &others {
            assert_eq!(refused(&mut store, other), arrived);
        }
        // Later ones of the same epoch, aborted, do not push it out; nor does a restart lose it.
        store.end(&arrived).unwrap();
        for folder in ["e2-m3", "e2-m4", "e2-m5", "e2-m6", "e2-m7"] {
            fs::create_dir(dir.path().join("vms/vm1").join(folder)).unwrap();
            for file in ["started", "over"] {
                fs::write(dir.path().join("vms/vm1").join(folder).join(file), "").unwrap();
            }
        }
        drop(store);
        let (mut store, _) = open(dir.path());
        store.end(&aborted).unwrap();
        for other in &others {
            assert_eq!(refused(&mut store, other), arrived);
        }
        store.begin(&Key::incoming("vm1", 3, "m8")).unwrap();
        store.begin(&Key::start("vm1", 3)).unwrap();
        assert_eq!(
            refused(&mut store, &Key::incoming("vm1", 3, "m9")),
            Key::start("vm1", 3)
        );
    }

    #[test]
    fn a_folder_without_its_marker_was_never_started() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("vms/vm1/e2-start")).unwrap();
        let (mut store, found) = open(dir.path());
        assert_eq!(found, []);
        store.begin(&Key::start("vm1", 2)).unwrap();
    }

    #[test]
    fn logs_of_ended_vmms_are_bounded_and_no_epoch_comes_free() {
        let dir = tempfile::tempdir().unwrap();
        let (mut store, _) = open(dir.path());
        for epoch in 1..20 {
            let key = Key::start("vm1", epoch);
            let folder = store.begin(&key).unwrap();
            fs::write(folder.join("vmm.log"), "log").unwrap();
            fs::write(folder.join("config.json"), "{}").unwrap();
            store.end(&key).unwrap();
            assert!(!folder.join("config.json").exists() && folder.join("vmm.log").exists());
        }
        assert_eq!(store.markers().len(), ENDED_KEPT);
        for epoch in 1..20 {
            assert!(
                store.begin(&Key::start("vm1", epoch)).is_err(),
                "epoch {epoch} could be started again"
            );
        }
    }

    #[test]
    fn what_a_crash_in_the_middle_of_an_end_left_is_removed_at_the_next_start() {
        let dir = tempfile::tempdir().unwrap();
        let key = Key::start("vm1", 1);
        let (mut store, _) = open(dir.path());
        let folder = store.begin(&key).unwrap();
        for name in ["config.json", "vmm.sock", "vmm.log"] {
            fs::write(folder.join(name), b"x").unwrap();
        }
        write_synced(&folder.join("over"), b"").unwrap();
        drop(store);
        let (_store, found) = open(dir.path());
        assert_eq!(found, []);
        assert_eq!(names_in(&folder).unwrap(), ["over", "started", "vmm.log"]);
    }

    #[test]
    fn a_second_agent_is_turned_away() {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = open(dir.path());
        assert!(matches!(Store::open(dir.path()), Err(StoreError::InUse(_))));
        drop(store);
        assert!(Store::open(dir.path()).is_ok());
    }
}
