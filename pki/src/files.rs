//! The three files of a party, and how secrets are written and read.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
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

/// Reads a certificate file.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, PkiError> {
    let failed = |source| PkiError::File {
        path: path.to_owned(),
        action: "read",
        source,
    };
    let length = fs::metadata(path).map_err(failed)?.len();
    if length > PEM_BYTES_MAX {
        return Err(PkiError::Pem {
            path: path.to_owned(),
            problem: format!("{length} bytes are too many for a PEM file; at most {PEM_BYTES_MAX}"),
        });
    }
    fs::read(path).map_err(failed)
}

/// Reads a private key, refusing one that others than its owner could read.
pub(crate) fn read_private(path: &Path) -> Result<Vec<u8>, PkiError> {
    let failed = |source| PkiError::File {
        path: path.to_owned(),
        action: "read",
        source,
    };
    let mode = fs::metadata(path).map_err(failed)?.mode() & 0o7777;
    if mode & OTHERS != 0 {
        return Err(PkiError::KeyMode {
            path: path.to_owned(),
            mode,
        });
    }
    read(path)
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
