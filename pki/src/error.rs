//! What can be wrong with keys, certificates and identities.

use std::path::PathBuf;

use drover_proto::{Code, Fault};

/// A key, a certificate or an identity that cannot be used; the message says what would be right.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A file could not be read or written.
    #[error("{path}: cannot {action}")]
    File {
        /// The file.
        path: PathBuf,
        /// "read" or "write".
        action: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A private key that others than its owner can read.
    #[error("{path}: mode {mode:04o} lets others than the owner at the private key; make it 0600")]
    KeyMode {
        /// The key file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A file holds no certificate or key in PEM form.
    #[error("{path}: {problem}")]
    Pem {
        /// The file.
        path: PathBuf,
        /// What is missing or broken.
        problem: String,
    },
    /// A name that is none.
    #[error(
        "{field} {value:?} is not a name: want 1 to 63 of a-z, 0-9 and \"-\", neither first nor last a \"-\""
    )]
    Name {
        /// "cluster" or "name".
        field: &'static str,
        /// What was given.
        value: String,
    },
    /// A text that is no identity.
    #[error("{0:?} is no identity: want drover://<cluster>/<controller|host|user>/<name>")]
    NoIdentity(String),
    /// A certificate of another cluster, or one that says nothing about a cluster.
    #[error("{0}")]
    Denied(String),
    /// Making or reading a certificate failed.
    #[error("certificate: {0}")]
    Certificate(String),
}

impl PkiError {
    /// The stable code of this error.
    pub fn code(&self) -> Code {
        match self {
            Self::Denied(_) => Code::Denied,
            Self::Name { .. } | Self::NoIdentity(_) => Code::InvalidArgument,
            Self::File { .. } | Self::KeyMode { .. } | Self::Pem { .. } | Self::Certificate(_) => {
                Code::Internal
            }
        }
    }
}

impl From<PkiError> for Fault {
    fn from(error: PkiError) -> Self {
        let because = std::error::Error::source(&error)
            .map(|source| format!(": {source}"))
            .unwrap_or_default();
        Fault::new(error.code(), format!("{error}{because}"))
    }
}

impl From<rcgen::Error> for PkiError {
    fn from(error: rcgen::Error) -> Self {
        Self::Certificate(error.to_string())
    }
}
