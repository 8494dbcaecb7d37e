//! What is on disk after a crash. A crash is played by copying the folder of an open store: what was not synced is in the
//! process's memory and not in the copy.
#![allow(clippy::unwrap_used, reason = "in a test, unwrap is the check")]

use std::fs;
use std::path::{Path, PathBuf};

use drover_storage::{Done, Entry, LogStore, RocksStore, Snapshot, StorageError};
use tempfile::TempDir;

/// Runs a write and waits until it is durable.
fn durable(write: impl FnOnce(Done)) -> Result<(), StorageError> {
    let (done, wait) = std::sync::mpsc::channel();
    write(Box::new(move |result| done.send(result).unwrap()));
    wait.recv().expect("every write is reported")
}

fn entry(index: u64) -> Entry {
    let len = 20 + usize::try_from(index * 37 % 200).unwrap();
    Entry {
        index,
        bytes: vec![u8::try_from(index % 251).unwrap(); len],
    }
}

fn copy(from: &Path) -> TempDir {
    let to = TempDir::new().unwrap();
    for file in fs::read_dir(from).unwrap() {
        let file = file.unwrap();
        if file.file_name() != "LOCK" {
            fs::copy(file.path(), to.path().join(file.file_name())).unwrap();
        }
    }
    to
}

/// The write-ahead log that is being written: the highest number.
fn wal(folder: &Path) -> PathBuf {
    let files = fs::read_dir(folder).unwrap().map(|file| file.unwrap().path());
    let logs = files.filter(|path| path.extension().is_some_and(|extension| extension == "log"));
    logs.max().expect("an open database has a write-ahead log")
}

fn indexes(store: &RocksStore) -> Vec<u64> {
    store
        .read(0..u64::MAX, usize::MAX)
        .unwrap()
        .into_iter()
        .map(|entry| entry.index)
        .collect()
}

#[test]
fn a_saved_vote_survives_a_crash() {
    let folder = TempDir::new().unwrap();
    let store = RocksStore::open(folder.path()).unwrap();
    durable(|done| store.save_vote(b"term 1", done)).unwrap();
    let first = copy(folder.path());
    durable(|done| store.save_vote(b"term 2", done)).unwrap();
    let second = copy(folder.path());

    assert_eq!(
        RocksStore::open(first.path()).unwrap().vote().unwrap().as_deref(),
        Some(&b"term 1"[..])
    );
    assert_eq!(
        RocksStore::open(second.path())
            .unwrap()
            .vote()
            .unwrap()
            .as_deref(),
        Some(&b"term 2"[..])
    );
}

#[test]
fn what_was_not_synced_does_not_survive_by_luck() {
    let folder = TempDir::new().unwrap();
    let store = RocksStore::open(folder.path()).unwrap();
    store.save_committed(Some(b"5")).unwrap();
    let crashed = copy(folder.path());
    assert_eq!(
        RocksStore::open(crashed.path()).unwrap().committed().unwrap(),
        None
    );

    durable(|done| store.save_vote(b"any", done)).unwrap();
    let crashed = copy(folder.path());
    assert_eq!(
        RocksStore::open(crashed.path())
            .unwrap()
            .committed()
            .unwrap()
            .as_deref(),
        Some(&b"5"[..])
    );
}

#[test]
fn reopening_gives_back_everything() {
    let folder = TempDir::new().unwrap();
    let snapshot = Snapshot {
        meta: b"through 10".to_vec(),
        data: (0..=255).cycle().take(2_500_000).collect(),
    };
    {
        let store = RocksStore::open(folder.path()).unwrap();
        durable(|done| store.save_vote(b"vote", done)).unwrap();
        durable(|done| store.append(&(0..50).map(entry).collect::<Vec<_>>(), done)).unwrap();
        durable(|done| store.truncate(40, done)).unwrap();
        durable(|done| store.append(&[entry(40), entry(41)], done)).unwrap();
        store.save_committed(Some(b"41")).unwrap();
        durable(|done| store.save_snapshot(&snapshot, done)).unwrap();
        durable(|done| store.purge(10, b"mark 10", done)).unwrap();
    }
    let store = RocksStore::open(folder.path()).unwrap();
    assert_eq!(store.vote().unwrap().as_deref(), Some(&b"vote"[..]));
    assert_eq!(store.committed().unwrap().as_deref(), Some(&b"41"[..]));
    assert_eq!(store.purged().unwrap().as_deref(), Some(&b"mark 10"[..]));
    assert_eq!(store.snapshot().unwrap(), Some(snapshot));
    assert_eq!(store.last().unwrap(), Some(entry(41)));
    assert_eq!(
        store.read(0..100, usize::MAX).unwrap(),
        (11..42).map(entry).collect::<Vec<_>>()
    );
}

#[test]
fn a_smaller_snapshot_replaces_a_larger_one_whole() {
    let folder = TempDir::new().unwrap();
    let store = RocksStore::open(folder.path()).unwrap();
    let large = Snapshot {
        meta: b"large".to_vec(),
        data: vec![1; 3 << 20],
    };
    let small = Snapshot {
        meta: b"small".to_vec(),
        data: vec![2; 5],
    };
    durable(|done| store.save_snapshot(&large, done)).unwrap();
    assert_eq!(store.snapshot().unwrap(), Some(large));
    durable(|done| store.save_snapshot(&small, done)).unwrap();
    assert_eq!(store.snapshot().unwrap(), Some(small));
}

#[test]
fn acknowledgements_come_in_the_order_of_the_writes() {
    let folder = TempDir::new().unwrap();
    let store = RocksStore::open(folder.path()).unwrap();
    let (sender, receiver) = std::sync::mpsc::channel();
    for index in 0..200 {
        let sender = sender.clone();
        store.append(
            &[entry(index)],
            Box::new(move |result| sender.send((index, result)).unwrap()),
        );
        assert_eq!(store.last().unwrap(), Some(entry(index)), "readable at once");
    }
    drop(store);
    drop(sender);
    let acknowledged: Vec<_> = receiver.into_iter().collect();
    assert_eq!(
        acknowledged,
        (0..200).map(|index| (index, Ok(()))).collect::<Vec<_>>()
    );
}

/// A store after each of its acknowledged appends: how long the WAL was, and what the mark said.
struct History {
    folder: TempDir,
    wal: PathBuf,
    bytes: Vec<u8>,
    synced: Vec<(usize, Vec<u8>)>,
}

fn history(entries: u64) -> History {
    let folder = TempDir::new().unwrap();
    let store = RocksStore::open(folder.path()).unwrap();
    let wal_path = wal(folder.path());
    let mut synced = Vec::new();
    for index in 0..entries {
        durable(|done| store.append(&[entry(index)], done)).unwrap();
        let len = usize::try_from(fs::metadata(&wal_path).unwrap().len()).unwrap();
        synced.push((len, fs::read(folder.path().join("synced")).unwrap()));
    }
    let crashed = copy(folder.path());
    let wal = crashed.path().join(wal_path.file_name().unwrap());
    let bytes = fs::read(&wal).unwrap();
    History {
        folder: crashed,
        wal,
        bytes,
        synced,
    }
}

impl History {
    /// Opens a copy with this WAL and the mark that stood when `acknowledged` entries were.
    fn open_with(&self, wal_bytes: &[u8], acknowledged: usize) -> Result<Vec<u64>, StorageError> {
        let copy = copy(self.folder.path());
        fs::write(copy.path().join(self.wal.file_name().unwrap()), wal_bytes).unwrap();
        fs::write(copy.path().join("synced"), &self.synced[acknowledged - 1].1).unwrap();
        RocksStore::open(copy.path()).map(|store| indexes(&store))
    }
}

fn is_prefix(found: &[u64]) -> bool {
    found.iter().copied().eq(0..u64::try_from(found.len()).unwrap())
}

#[test]
fn a_write_torn_anywhere_keeps_all_that_was_acknowledged_before_it() {
    let history = history(12);
    for acknowledged in [1, 11] {
        let (start, end) = (history.synced[acknowledged - 1].0, history.synced[acknowledged].0);
        assert!(start < end);
        for cut in (start..end).step_by(5).chain(end - 3..=end) {
            let found = history
                .open_with(&history.bytes[..cut], acknowledged)
                .expect("a torn tail is no damage");
            assert!(
                is_prefix(&found) && found.len() >= acknowledged,
                "cut at {cut}: {found:?}"
            );
        }
        // Pages of the tail may reach the disk in any order: zeros or garbage, with later bytes whole.
        for flawed in (start..end).step_by(13) {
            let mut bytes = history.bytes.clone();
            for byte in bytes.iter_mut().skip(flawed).take(4) {
                *byte = !*byte;
            }
            let found = history
                .open_with(&bytes, acknowledged)
                .expect("damage after the last sync is a torn tail");
            assert!(
                is_prefix(&found) && found.len() >= acknowledged,
                "flawed at {flawed}: {found:?}"
            );
        }
    }
}

#[test]
fn acknowledged_records_that_the_disk_lost_are_noticed() {
    let history = history(12);
    let all = history.synced.len();
    for cut in (0..history.synced[all - 1].0).step_by(23) {
        let opened = history.open_with(&history.bytes[..cut], all);
        assert!(
            matches!(opened, Err(StorageError::LostRecords { .. })),
            "cut at {cut}: {opened:?}"
        );
    }
    for flawed in (0..history.bytes.len()).step_by(11) {
        let mut bytes = history.bytes.clone();
        bytes[flawed] ^= 0x55;
        match history.open_with(&bytes, all) {
            Ok(found) => assert!(
                found.len() == all && is_prefix(&found),
                "flawed at {flawed}: {found:?}"
            ),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
}

#[test]
fn a_second_opener_is_told_that_the_folder_is_in_use() {
    let folder = TempDir::new().unwrap();
    let _store = RocksStore::open(folder.path()).unwrap();
    let refused = RocksStore::open(folder.path()).err();
    assert_eq!(refused, Some(StorageError::InUse(folder.path().to_owned())));
}

#[test]
fn a_log_with_a_hole_is_refused_at_the_start() {
    let folder = TempDir::new().unwrap();
    {
        let store = RocksStore::open(folder.path()).unwrap();
        durable(|done| store.append(&[entry(0), entry(1)], done)).unwrap();
        durable(|done| store.append(&[entry(3)], done)).unwrap();
    }
    assert_eq!(
        RocksStore::open(folder.path()).err(),
        Some(StorageError::Hole {
            expected: 2,
            found: 3
        })
    );
}

#[test]
fn entries_out_of_place_or_too_large_are_refused() {
    let folder = TempDir::new().unwrap();
    let store = RocksStore::open(folder.path()).unwrap();
    durable(|done| store.append(&[entry(0), entry(1)], done)).unwrap();
    for wrong in [vec![entry(1)], vec![entry(2), entry(4)]] {
        assert!(matches!(
            durable(|done| store.append(&wrong, done)),
            Err(StorageError::Refused(_))
        ));
    }
    let large = Entry {
        index: 2,
        bytes: vec![0; drover_storage::ENTRY_BYTES_MAX + 1],
    };
    assert!(matches!(
        durable(|done| store.append(&[large], done)),
        Err(StorageError::Refused(_))
    ));
    durable(|done| store.append(&[entry(2)], done)).unwrap();
    assert_eq!(indexes(&store), [0, 1, 2]);
}
