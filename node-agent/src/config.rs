//! The agent's configuration: one JSON file, unknown fields refused, relative paths taken from its folder.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use drover_pki::TlsFiles;
use serde::Deserialize;

use crate::key::is_name;
use crate::network::config::NetworksConfig;
use crate::sandbox::{self, Policy};

/// Most controllers that are tried in turn.
const CONTROLLERS_MAX: usize = 16;
/// Most pools of a host.
const POOLS_MAX: usize = 64;
/// Largest configuration file, bytes.
const FILE_BYTES_MAX: u64 = 1024 * 1024;

/// What an agent is told when it starts.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The cluster that this host belongs to.
    pub cluster_id: String,
    /// The host's name: the one in its certificate.
    pub name: String,
    /// Where markers, VMMs' folders and logs stand.
    pub data_dir: PathBuf,
    /// Where the Agent service listens; port 0 lets the kernel choose.
    pub listen: SocketAddr,
    /// Where controllers reach it; port 0 stands for the one it listens on.
    pub advertise: SocketAddr,
    /// Where incoming VMMs listen for migrations.
    pub migration_ip: IpAddr,
    /// The controllers, tried in turn.
    pub controllers: Vec<SocketAddr>,
    /// Kernels and initial RAM disks.
    pub images_dir: PathBuf,
    /// The VMM's program.
    pub vmm: PathBuf,
    /// The host's identity.
    pub tls: TlsFiles,
    /// Memory that guests may use, MiB; measured when absent.
    #[serde(default)]
    pub memory_mib: Option<u64>,
    /// CPUs; counted when absent.
    #[serde(default)]
    pub cpus: Option<u32>,
    /// Whether guests' memory is to be of huge pages where this host's kernel allows it.
    #[serde(default = "yes")]
    pub huge_pages: bool,
    /// Whether VMs may come to this host by post-copy, where its kernel allows it.
    #[serde(default = "yes")]
    pub post_copy: bool,
    /// Where volumes are: by pool, a folder on storage that all hosts with this pool share.
    #[serde(default)]
    pub pools: BTreeMap<String, PathBuf>,
    /// Which networks are offered to VMs' NICs.
    #[serde(default)]
    pub networks: NetworksConfig,
    /// Whether VMMs cage themselves.
    #[serde(default)]
    pub sandbox: Policy,
    /// The user that they become where the agent is root; `drover-vmm` when absent, or one without a name.
    #[serde(default)]
    pub vmm_user: Option<String>,
}

/// What a setting is by default that is to be switched off.
fn yes() -> bool {
    true
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("{path}: cannot read the configuration")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// No JSON, a field missing, unknown, or of the wrong type.
    #[error("{path}: {source}")]
    Form {
        /// The file.
        path: PathBuf,
        /// What and where.
        source: serde_json::Error,
    },
    /// A field's value cannot be right.
    #[error("{path}: {field}: {problem}")]
    Value {
        /// The file.
        path: PathBuf,
        /// The field.
        field: &'static str,
        /// The value and what would be right.
        problem: String,
    },
}

impl Config {
    /// Reads and checks the file at `path`.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let unreadable = |source| ConfigError::Read {
            path: path.to_owned(),
            source,
        };
        let bytes = std::fs::metadata(path).map_err(unreadable)?.len();
        if bytes > FILE_BYTES_MAX {
            let problem = format!("{bytes} bytes; a configuration has at most {FILE_BYTES_MAX}");
            return Err(ConfigError::Value {
                path: path.to_owned(),
                field: "file",
                problem,
            });
        }
        let text = std::fs::read_to_string(path).map_err(unreadable)?;
        // A VMM is started in a folder of its own: every path it is given is absolute.
        let path_full = std::path::absolute(path).map_err(unreadable)?;
        let base = path_full.parent().unwrap_or(Path::new("/"));
        let mut config: Config = serde_json::from_str(&text).map_err(|source| ConfigError::Form {
            path: path.to_owned(),
            source,
        })?;
        for field in [&mut config.data_dir, &mut config.images_dir, &mut config.vmm] {
            *field = base.join(&field);
        }
        for folder in config.pools.values_mut() {
            *folder = base.join(&folder);
        }
        config.tls = config.tls.resolve(base);
        config.check().map_err(|(field, problem)| ConfigError::Value {
            path: path.to_owned(),
            field,
            problem,
        })?;
        Ok(config)
    }

    fn check(&self) -> Result<(), (&'static str, String)> {
        if self.controllers.is_empty() || self.controllers.len() > CONTROLLERS_MAX {
            let problem = format!(
                "{} addresses; want 1 to {CONTROLLERS_MAX}",
                self.controllers.len()
            );
            return Err(("controllers", problem));
        }
        if self.controllers.iter().collect::<BTreeSet<_>>().len() != self.controllers.len() {
            return Err(("controllers", "an address stands twice".to_owned()));
        }
        if self.advertise.ip().is_unspecified() {
            let problem = format!(
                "{} reaches nobody; want the address controllers call",
                self.advertise
            );
            return Err(("advertise", problem));
        }
        if self.migration_ip.is_unspecified() {
            let problem = format!(
                "{} reaches nobody; want the address other hosts' VMMs call",
                self.migration_ip
            );
            return Err(("migration_ip", problem));
        }
        if self.memory_mib == Some(0) {
            return Err((
                "memory_mib",
                "0; want at least 1, or leave it out to have it measured".to_owned(),
            ));
        }
        if self.cpus == Some(0) {
            return Err((
                "cpus",
                "0; want at least 1, or leave it out to have them counted".to_owned(),
            ));
        }
        if self.pools.len() > POOLS_MAX {
            let problem = format!("{} pools; want at most {POOLS_MAX}", self.pools.len());
            return Err(("pools", problem));
        }
        if let Some(name) = self.pools.keys().find(|name| !is_name(name)) {
            let problem = format!("{name:?} is no name; want 1 to 63 characters of a-z, 0-9 and -");
            return Err(("pools", problem));
        }
        let user = sandbox::user(self.vmm_user.as_deref());
        user.map_err(|problem| {
            (
                "vmm_user",
                format!("{problem}; want a user who is nobody else, as useradd --system makes one"),
            )
        })?;
        self.networks.check().map_err(|problem| ("networks", problem))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> serde_json::Value {
        serde_json::json!({
            "cluster_id": "dev-1", "name": "host1", "data_dir": "data", "listen": "127.0.0.1:0",
            "advertise": "127.0.0.1:0", "migration_ip": "127.0.0.1", "controllers": ["127.0.0.1:7001"],
            "images_dir": "/images", "vmm": "bin/drover-vmm",
            "tls": {"ca": "ca.pem", "cert": "host1.pem", "key": "host1.key"}
        })
    }

    fn read(value: &serde_json::Value) -> Result<Config, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.json");
        std::fs::write(&path, value.to_string()).unwrap();
        Config::read(&path).map_err(|error| error.to_string())
    }

    #[test]
    fn relative_paths_are_taken_from_the_files_folder() {
        let mut sample = sample();
        sample["pools"] = serde_json::json!({"default": "pool", "san": "/san"});
        let config = read(&sample).unwrap();
        assert_eq!(config.pools["default"].parent(), config.data_dir.parent());
        assert_eq!(config.pools["san"], Path::new("/san"));
        assert!(config.data_dir.is_absolute() && config.data_dir.ends_with("data"));
        assert!(config.vmm.ends_with("bin/drover-vmm"));
        assert_eq!(config.images_dir, Path::new("/images"));
        assert_eq!(config.tls.key.parent(), config.data_dir.parent());
        assert_eq!(config.memory_mib, None);
        assert_eq!(config.sandbox, Policy::BestEffort, "whoever says nothing has it");
    }

    #[test]
    fn a_wrong_field_is_named_with_its_value() {
        let cases = [
            ("controllers", serde_json::json!([]), "controllers: 0 addresses"),
            (
                "controllers",
                serde_json::json!(["127.0.0.1:1", "127.0.0.1:1"]),
                "stands twice",
            ),
            (
                "advertise",
                serde_json::json!("0.0.0.0:1"),
                "advertise: 0.0.0.0:1",
            ),
            ("migration_ip", serde_json::json!("::"), "migration_ip: ::"),
            ("memory_mib", serde_json::json!(0), "memory_mib: 0"),
            ("cpus", serde_json::json!(0), "cpus: 0"),
            ("pools", serde_json::json!({"../x": "/x"}), "pools: \"../x\""),
            (
                "networks",
                serde_json::json!({"bridges": {"Lan": {}}}),
                "networks: \"Lan\"",
            ),
            (
                "networks",
                serde_json::json!({"bridges": {"lan": {"bridge": "br0", "uplink": "eth1"}}}),
                "not both",
            ),
            (
                "networks",
                serde_json::json!({"bridges": {"a": {"uplink": "eth1"}, "b": {"uplink": "eth1"}}}),
                "uplink eth1 stands twice",
            ),
            (
                "networks",
                serde_json::json!({"bridges": {"lan": {"bridge": "a/b"}}}),
                "no interface",
            ),
            (
                "networks",
                serde_json::json!({"vxlan": {"address": "0.0.0.0"}}),
                "vxlan.address: 0.0.0.0",
            ),
            ("listen", serde_json::json!("nowhere"), "invalid socket address"),
            ("sandbox", serde_json::json!("strict"), "unknown variant `strict`"),
            ("colour", serde_json::json!("red"), "unknown field `colour`"),
        ];
        for (field, value, expected) in cases {
            let mut config = sample();
            config[field] = value;
            let error = read(&config).unwrap_err();
            assert!(error.contains(expected), "{field}: {error}");
        }
        let mut config = sample();
        config.as_object_mut().unwrap().remove("vmm");
        assert!(read(&config).unwrap_err().contains("missing field `vmm`"));
        assert!(
            Config::read(Path::new("/nowhere/agent.json"))
                .unwrap_err()
                .to_string()
                .contains("/nowhere/agent.json")
        );
    }
}
