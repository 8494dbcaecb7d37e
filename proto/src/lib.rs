//! Everything that crosses a process boundary: gRPC messages and services, save-state, the replicated log's
//! entries, and the stable error codes. The `.proto` files are append-only.

pub mod codes;
pub mod descriptors;

/// The generated messages, clients and servers of package `drover.v1`.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod v1 {
    tonic::include_proto!("drover.v1");
}

pub use codes::{Code, Fault};

/// Where the target of an upgrade listens, as far as its cluster knows: on a socket that the two VMMs' agent names to the source.
pub const LOCAL_ADDR: &str = "local";
/// What `StartOutgoingRequest.target_addr` begins with in an upgrade; the socket's absolute path follows.
pub const LOCAL_PREFIX: &str = "local:";

impl v1::Migration {
    /// Whether the VMM is replaced on its own host, by another one that takes over the same memory.
    pub fn is_upgrade(&self) -> bool {
        self.from == self.to
    }
}

impl std::fmt::Display for v1::VmmBuild {
    /// The version and, if there is one, the beginning of the build id, as long as it takes to tell two apart.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        const BUILD_CHARS: usize = 12;
        let build: String = self.build.chars().take(BUILD_CHARS).collect();
        if build.is_empty() {
            return f.write_str(&self.version);
        }
        write!(f, "{} ({build})", self.version)
    }
}

/// May hold secrets, which no log is to have.
impl std::fmt::Debug for v1::CloudInit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CloudInit")
            .field("user_data_bytes", &self.user_data.len())
            .field("hostname", &self.hostname)
            .field("ssh_keys", &self.ssh_keys.len())
            .field("network_config_bytes", &self.network_config.len())
            .finish()
    }
}

/// As of [`v1::CloudInit`].
impl std::fmt::Debug for v1::CloudSeed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CloudSeed")
            .field("user_data_bytes", &self.user_data.len())
            .field("meta_data_bytes", &self.meta_data.len())
            .field("network_config_bytes", &self.network_config.len())
            .finish()
    }
}

impl From<Fault> for v1::Reason {
    fn from(fault: Fault) -> Self {
        Self {
            code: fault.code.as_str().to_owned(),
            message: fault.message,
        }
    }
}
