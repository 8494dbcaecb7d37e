//! Both stores do the same, whatever is asked of them, and the one on disk also when it is closed in between.
#![allow(clippy::unwrap_used, reason = "in a test, unwrap is the check")]

use drover_storage::{Done, Entry, LogStore, MemoryStore, RocksStore, Snapshot, StorageError};
use proptest::prelude::*;
use tempfile::TempDir;

#[derive(Clone, Debug)]
enum Step {
    Vote(u8),
    Committed(u8),
    Append(u8),
    Truncate(u8),
    Purge(u8),
    Snapshot(u16),
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => any::<u8>().prop_map(Step::Vote),
        2 => any::<u8>().prop_map(Step::Committed),
        6 => (1u8..20).prop_map(Step::Append),
        2 => any::<u8>().prop_map(Step::Truncate),
        2 => any::<u8>().prop_map(Step::Purge),
        1 => any::<u16>().prop_map(Step::Snapshot),
        1 => Just(Step::Reopen),
    ]
}

fn durable(write: impl FnOnce(Done)) -> Result<(), StorageError> {
    let (done, wait) = std::sync::mpsc::channel();
    write(Box::new(move |result| done.send(result).unwrap()));
    wait.recv().expect("every write is reported")
}

/// The index at `fraction` (of 255) between the first and the next-to-come entry; the same in both stores.
fn at(store: &dyn LogStore, fraction: u8) -> u64 {
    let entries = store.read(0..u64::MAX, usize::MAX).unwrap();
    let first = entries.first().map_or(0, |entry| entry.index);
    first + u64::from(fraction) * u64::try_from(entries.len()).unwrap() / 256
}

/// The index that an append continues at.
fn next(store: &dyn LogStore) -> u64 {
    let purged = store
        .purged()
        .unwrap()
        .map(|mark| u64::from_be_bytes(mark.try_into().unwrap()));
    store
        .last()
        .unwrap()
        .map(|entry| entry.index)
        .max(purged)
        .map_or(0, |last| last + 1)
}

fn run(store: &dyn LogStore, step: &Step) -> Result<(), StorageError> {
    match *step {
        Step::Vote(vote) => durable(|done| store.save_vote(&[vote], done)),
        Step::Committed(0) => store.save_committed(None),
        Step::Committed(at) => store.save_committed(Some(&[at])),
        Step::Append(count) => {
            let first = next(store);
            let entry = |index: u64| Entry {
                index,
                bytes: format!("{index} of {count}").into_bytes(),
            };
            let entries: Vec<_> = (first..first + u64::from(count)).map(entry).collect();
            durable(|done| store.append(&entries, done))
        }
        Step::Truncate(fraction) => {
            let from = at(store, fraction);
            durable(|done| store.truncate(from, done))
        }
        Step::Purge(fraction) => {
            let through = at(store, fraction);
            durable(|done| store.purge(through, &through.to_be_bytes(), done))
        }
        Step::Snapshot(bytes) => {
            let snapshot = Snapshot {
                meta: bytes.to_be_bytes().to_vec(),
                data: vec![7; usize::from(bytes) * 40],
            };
            durable(|done| store.save_snapshot(&snapshot, done))
        }
        Step::Reopen => Ok(()),
    }
}

fn same(disk: &dyn LogStore, memory: &dyn LogStore) -> Result<(), TestCaseError> {
    prop_assert_eq!(disk.vote(), memory.vote());
    prop_assert_eq!(disk.committed(), memory.committed());
    prop_assert_eq!(disk.purged(), memory.purged());
    prop_assert_eq!(disk.last(), memory.last());
    prop_assert_eq!(disk.snapshot(), memory.snapshot());
    for bytes_max in [1, 40, usize::MAX] {
        prop_assert_eq!(
            disk.read(0..u64::MAX, bytes_max),
            memory.read(0..u64::MAX, bytes_max)
        );
        prop_assert_eq!(disk.read(3..9, bytes_max), memory.read(3..9, bytes_max));
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn both_stores_do_the_same(steps in prop::collection::vec(step(), 1..40)) {
        let folder = TempDir::new().unwrap();
        let memory = MemoryStore::new();
        let mut disk = Some(RocksStore::open(folder.path()).unwrap());
        for step in steps {
            if matches!(step, Step::Reopen) {
                drop(disk.take());
                disk = Some(RocksStore::open(folder.path()).unwrap());
            }
            let disk = disk.as_ref().expect("opened again above");
            prop_assert_eq!(run(disk, &step), run(&memory, &step));
            same(disk, &memory)?;
        }
    }
}
