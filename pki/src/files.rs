//! The three files of a party, and how secrets are written and read.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::PkiError;

/// Permission bits that nobody but the owner of a private key may have.
const OTHERS: u32 = 0o077;
/// A PEM file larger than this is none of ours, bytes.
const PEM_BYTES_MAX: u64 = 256 * 1024;

/// Where a party's certificates and key stand, as written in its configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    /// The cluster's CA certificate, PEM.
    pub ca: PathBuf,
    /// The party's certificate, PEM.
    pub cert: PathBuf,
    /// Its private key, PEM (PKCS #8), mode 0600.
    pub key: PathBuf,
}

impl TlsFiles {
    /// The same files, relative paths taken from `base`.
    pub fn resolve(&self, base: &Path) -> TlsFiles {
        TlsFiles {
            ca: base.join(&self.ca),
            cert: base.join(&self.cert),
            key: base.join(&self.key),
        }
    }
}

/// Opens one of a party's files.
pub(crate) fn open(path: &Path) -> Result<File, PkiError> {
    File::open(path).map_err(|source| unread(path, source))
}

fn unread(path: &Path, source: io::Error) -> PkiError {
    PkiError::File {
        path: path.to_owned(),
        action: "read",
        source,
    }
}

/// Reads a certificate file, which was opened at `path`.
pub(crate) fn read(path: &Path, file: &File) -> Result<Vec<u8>, PkiError> {
    let length = file.metadata().map_err(|source| unread(path, source))?.len();
    let mut bytes = vec![0; usize::try_from(length.min(PEM_BYTES_MAX)).unwrap_or(0)];
    // By its place: others may read the same descriptor.
    file.read_exact_at(&mut bytes, 0)
        .map_err(|source| unread(path, source))?;
    if length > PEM_BYTES_MAX {
        return Err(PkiError::Pem {
            path: path.to_owned(),
            problem: format!("{length} bytes are too many for a PEM file; at most {PEM_BYTES_MAX}"),
        });
    }
    Ok(bytes)
}

/// Reads a private key, refusing one that others than its owner could read.
pub(crate) fn read_private(path: &Path, file: &File) -> Result<Vec<u8>, PkiError> {
    let about = file.metadata().map_err(|source| unread(path, source))?;
    let mode = about.mode() & 0o7777;
    if mode & OTHERS != 0 {
        return Err(PkiError::KeyMode {
            path: path.to_owned(),
            mode,
        });
    }
    read(path, file)
}

/// Writes a file whole or not at all, with exactly `mode` whatever stood there before.
pub(crate) fn write(path: &Path, mode: u32, content: &str) -> Result<(), PkiError> {
    let mut staged = path.as_os_str().to_owned();
    staged.push(".new");
    let staged = PathBuf::from(staged);
    let attempt = || -> io::Result<()> {
        match fs::remove_file(&staged) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&staged)?;
        file.write_all(content.as_bytes())?;
        file.sync_all()?;
        fs::rename(&staged, path)
    };
    attempt().map_err(|source| PkiError::File {
        path: path.to_owned(),
        action: "write",
        source,
    })
}
