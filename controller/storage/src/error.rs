//! What can go wrong with a store.

use std::path::PathBuf;

/// A failure of the store. Cloneable, since one failed sync fails every write that waited for it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StorageError {
    /// Another process has the folder open.
    #[error("the data folder {} is in use by another process; one controller at a time may open it", .0.display())]
    InUse(PathBuf),
    /// A record's content is not what was written.
    #[error("the record {what} is damaged: {problem}")]
    Damaged {
        /// Which record.
        what: String,
        /// How it is damaged.
        problem: String,
    },
    /// The log does not hold together.
    #[error("the log has a hole: entry {expected} is missing, the next one is {found}")]
    Hole {
        /// The entry that should be there.
        expected: u64,
        /// The one that follows instead.
        found: u64,
    },
    /// Records whose sync was acknowledged are gone.
    #[error(
        "the store in {} lost acknowledged records (it reaches sequence {found}, {synced} was synced): the disk dropped or \
         damaged them; restore this member from its peers with an empty data folder and a new id", .path.display()
    )]
    LostRecords {
        /// The data folder.
        path: PathBuf,
        /// What was synced.
        synced: u64,
        /// What is there.
        found: u64,
    },
    /// The folder was written by a version that this one does not know.
    #[error("the data folder {} has format {found}; this version reads format {known}", .path.display())]
    Format {
        /// The data folder.
        path: PathBuf,
        /// Its format.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// The caller broke the trait's rules.
    #[error("refused write: {0}")]
    Refused(String),
    /// The disk or RocksDB failed.
    #[error("{doing}: {problem}")]
    Io {
        /// What was attempted.
        doing: &'static str,
        /// What came back.
        problem: String,
    },
}

impl StorageError {
    /// An [`StorageError::Io`] from anything that prints.
    pub(crate) fn io(doing: &'static str, problem: impl std::fmt::Display) -> Self {
        Self::Io {
            doing,
            problem: problem.to_string(),
        }
    }
}
