//! The controller's configuration file: read, checked, paths made whole. ARCHITECTURE.md §5 shows one.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use drover_pki::TlsFiles;
use drover_proto::v1;
use serde::Deserialize;

use crate::consensus::{Peer, Tuning};

/// A configuration file larger than this is none, bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Longest name or cluster id: a DNS label.
const NAME_BYTES_MAX: usize = 63;
/// An election must not begin because one or two heartbeats were late.
const HEARTBEATS_PER_ELECTION: u64 = 3;

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: {source}", .path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not of the form.
    #[error("{}: {source}", .path.display())]
    Form {
        /// Which file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A field has a value that cannot be.
    #[error("{}: {field} {problem}", .path.display())]
    Field {
        /// Which file.
        path: PathBuf,
        /// Which field.
        field: String,
        /// What it is and what would be right.
        problem: String,
    },
}

/// A controller's configuration.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The cluster's id, as in the certificates.
    pub cluster_id: String,
    /// This member's id in the Raft group; never given to another member, never changed.
    pub id: u64,
    /// Its name, as in its certificate.
    pub name: String,
    /// Its data.
    pub data_dir: PathBuf,
    /// Where it listens.
    pub listen: SocketAddr,
    /// Where others reach it, `ip:port`.
    pub advertise: SocketAddr,
    /// The first membership.
    pub members: Vec<MemberConfig>,
    /// Its certificate.
    pub tls: TlsFiles,
    /// Settings of a new cluster; those left out have their defaults.
    #[serde(default)]
    pub settings: Option<SettingsConfig>,
    /// Raft's timing; what is left out has its default.
    #[serde(default)]
    pub raft: RaftConfig,
}

/// One of the first members.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemberConfig {
    /// Its id.
    pub id: u64,
    /// Its name.
    pub name: String,
    /// Where it is reached.
    pub addr: SocketAddr,
}

/// See `Settings` in common.proto.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SettingsConfig {
    lease_ms: Option<u64>,
    drift_margin_ms: Option<u64>,
    heartbeat_ms: Option<u64>,
    max_downtime_ms: Option<u32>,
    prepare_timeout_ms: Option<u64>,
    stall_timeout_ms: Option<u64>,
    switchover_timeout_ms: Option<u64>,
    allow_plaintext: Option<bool>,
}

/// See [`Tuning`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RaftConfig {
    heartbeat_ms: Option<u64>,
    election_min_ms: Option<u64>,
    election_max_ms: Option<u64>,
    snapshot_every: Option<u64>,
    entries_kept: Option<u64>,
}

impl Config {
    /// Reads and checks the file. Relative paths in it are taken from its folder.
    ///
    /// # Errors
    /// Names the file, the field and what would be right.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let failed = |source| ConfigError::File {
            path: path.to_owned(),
            source,
        };
        let length = std::fs::metadata(path).map_err(failed)?.len();
        if length > FILE_BYTES_MAX {
            let too_large =
                format!("{length} bytes are too many for a configuration; at most {FILE_BYTES_MAX}");
            return Err(failed(std::io::Error::other(too_large)));
        }
        let text = std::fs::read_to_string(path).map_err(failed)?;
        let mut config: Self = serde_json::from_str(&text).map_err(|source| ConfigError::Form {
            path: path.to_owned(),
            source,
        })?;
        let folder = path.parent().unwrap_or(Path::new(""));
        config.data_dir = folder.join(&config.data_dir);
        config.tls = config.tls.resolve(folder);
        config.check().map_err(|(field, problem)| ConfigError::Field {
            path: path.to_owned(),
            field,
            problem,
        })?;
        Ok(config)
    }

    fn check(&self) -> Result<(), (String, String)> {
        let wrong = |field: &str, problem: String| Err((field.to_owned(), problem));
        check_name("cluster_id", &self.cluster_id)?;
        check_name("name", &self.name)?;
        let count = self.members.len();
        if ![1, 3, 5].contains(&count) {
            let problem = format!("names {count} controllers; a cluster has 1, 3 or 5");
            return wrong("members", problem);
        }
        let (mut ids, mut names, mut addrs) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        for (at, member) in self.members.iter().enumerate() {
            check_name(&format!("members[{at}].name"), &member.name)?;
            let unique = ids.insert(member.id) && names.insert(&member.name) && addrs.insert(member.addr);
            if member.id == 0 || !unique {
                let MemberConfig { id, name, addr } = member;
                let problem = format!(
                    "is {id}, {name}, {addr}; ids begin at 1, and ids, names and addresses are unique"
                );
                return wrong(&format!("members[{at}]"), problem);
            }
            if member.addr.ip().is_unspecified() || member.addr.port() == 0 {
                let problem = format!(
                    "is {}; want an address that the other members can reach",
                    member.addr
                );
                return wrong(&format!("members[{at}].addr"), problem);
            }
        }
        let Some(me) = self.members.iter().find(|member| member.id == self.id) else {
            return wrong(
                "id",
                format!("is {}; want one of the ids in members: {ids:?}", self.id),
            );
        };
        if me.name != self.name {
            return wrong(
                "name",
                format!(
                    "is {:?}; members calls the id {} {:?}",
                    self.name, self.id, me.name
                ),
            );
        }
        if me.addr != self.advertise {
            let problem = format!("is {}; members has {} for {}", self.advertise, me.addr, self.name);
            return wrong("advertise", problem);
        }
        self.check_raft()
    }

    fn check_raft(&self) -> Result<(), (String, String)> {
        let wrong = |field: &str, problem: String| Err((field.to_owned(), problem));
        let Tuning {
            heartbeat_ms,
            election_min_ms,
            election_max_ms,
            snapshot_every,
            ..
        } = self.tuning();
        let election_least = heartbeat_ms.saturating_mul(HEARTBEATS_PER_ELECTION);
        if heartbeat_ms == 0 || election_min_ms < election_least {
            let problem = format!(
                "is {election_min_ms}; want at least {HEARTBEATS_PER_ELECTION} times heartbeat_ms, which is \
                 {heartbeat_ms} and must not be 0"
            );
            return wrong("raft.election_min_ms", problem);
        }
        if election_max_ms <= election_min_ms {
            let problem =
                format!("is {election_max_ms}; want more than election_min_ms, which is {election_min_ms}");
            return wrong("raft.election_max_ms", problem);
        }
        if snapshot_every == 0 {
            return wrong(
                "raft.snapshot_every",
                "is 0; want at least 1 entry between two snapshots".to_owned(),
            );
        }
        Ok(())
    }

    /// This member.
    pub fn me(&self) -> Peer {
        Peer {
            id: self.id,
            name: self.name.clone(),
            addr: self.advertise.to_string(),
        }
    }

    /// The first membership.
    pub fn peers(&self) -> Vec<Peer> {
        let peer = |member: &MemberConfig| Peer {
            id: member.id,
            name: member.name.clone(),
            addr: member.addr.to_string(),
        };
        self.members.iter().map(peer).collect()
    }

    /// The settings that a new cluster starts with.
    pub fn settings(&self) -> Option<v1::Settings> {
        let settings = self.settings.as_ref()?;
        let default = drover_state::default_settings();
        Some(v1::Settings {
            lease_ms: settings.lease_ms.unwrap_or(default.lease_ms),
            drift_margin_ms: settings.drift_margin_ms.unwrap_or(default.drift_margin_ms),
            heartbeat_ms: settings.heartbeat_ms.unwrap_or(default.heartbeat_ms),
            max_downtime_ms: settings.max_downtime_ms.unwrap_or(default.max_downtime_ms),
            prepare_timeout_ms: settings.prepare_timeout_ms.unwrap_or(default.prepare_timeout_ms),
            stall_timeout_ms: settings.stall_timeout_ms.unwrap_or(default.stall_timeout_ms),
            switchover_timeout_ms: settings
                .switchover_timeout_ms
                .unwrap_or(default.switchover_timeout_ms),
            allow_plaintext: settings.allow_plaintext.unwrap_or(default.allow_plaintext),
        })
    }

    /// Raft's timing.
    pub fn tuning(&self) -> Tuning {
        let default = Tuning::default();
        Tuning {
            heartbeat_ms: self.raft.heartbeat_ms.unwrap_or(default.heartbeat_ms),
            election_min_ms: self.raft.election_min_ms.unwrap_or(default.election_min_ms),
            election_max_ms: self.raft.election_max_ms.unwrap_or(default.election_max_ms),
            snapshot_every: self.raft.snapshot_every.unwrap_or(default.snapshot_every),
            entries_kept: self.raft.entries_kept.unwrap_or(default.entries_kept),
        }
    }
}

fn check_name(field: &str, name: &str) -> Result<(), (String, String)> {
    let letter = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let inside = |byte: u8| letter(byte) || byte == b'-';
    let ends = [name.bytes().next(), name.bytes().next_back()];
    let fits = name.len() <= NAME_BYTES_MAX
        && name.bytes().all(inside)
        && ends.into_iter().all(|end| end.is_some_and(letter));
    if fits {
        return Ok(());
    }
    let problem = format!("is {name:?}; want 1 to {NAME_BYTES_MAX} of a-z, 0-9 and, inside, -");
    Err((field.to_owned(), problem))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn valid() -> Value {
        let member =
            |id: u64| json!({"id": id, "name": format!("c{id}"), "addr": format!("127.0.0.1:700{id}")});
        json!({
            "cluster_id": "dev-3f9a", "id": 1, "name": "c1", "data_dir": "data",
            "listen": "127.0.0.1:7001", "advertise": "127.0.0.1:7001",
            "members": [member(1), member(2), member(3)],
            "tls": {"ca": "ca.pem", "cert": "c1.pem", "key": "/keys/c1.key"},
        })
    }

    fn load(config: &Value) -> Result<Config, ConfigError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("controller.json");
        std::fs::write(&path, config.to_string()).unwrap();
        let loaded = Config::load(&path)?;
        assert_eq!(
            loaded.data_dir,
            folder.path().join("data"),
            "relative to the file"
        );
        assert_eq!(loaded.tls.key, Path::new("/keys/c1.key"), "absolute paths stay");
        Ok(loaded)
    }

    fn refusal(pointer: &str, value: &Value) -> String {
        let mut config = valid();
        let (parent, field) = pointer.rsplit_once('/').unwrap();
        match config.pointer_mut(parent).unwrap() {
            Value::Object(fields) if value.is_null() => drop(fields.remove(field)),
            Value::Array(items) => items[field.parse::<usize>().unwrap()] = value.clone(),
            parent => parent[field] = value.clone(),
        }
        load(&config).unwrap_err().to_string()
    }

    #[test]
    fn a_wrong_field_is_named_with_its_value_and_what_would_be_right() {
        let member = json!({"id": 1, "name": "c1", "addr": "127.0.0.1:7001"});
        for (pointer, value, expected) in [
            ("/leader", json!(true), "unknown field `leader`"),
            ("/cluster_id", Value::Null, "missing field `cluster_id`"),
            (
                "/cluster_id",
                json!("Dev"),
                "cluster_id is \"Dev\"; want 1 to 63 of",
            ),
            (
                "/members",
                json!([member, member]),
                "members names 2 controllers; a cluster has 1, 3 or 5",
            ),
            ("/members/2/id", json!(2), "members[2] is 2, c3"),
            ("/members/0/id", json!(0), "members[0] is 0, c1"),
            (
                "/members/1/addr",
                json!("0.0.0.0:7002"),
                "members[1].addr is 0.0.0.0:7002; want",
            ),
            (
                "/id",
                json!(9),
                "id is 9; want one of the ids in members: {1, 2, 3}",
            ),
            (
                "/name",
                json!("c2"),
                "name is \"c2\"; members calls the id 1 \"c1\"",
            ),
            (
                "/advertise",
                json!("127.0.0.1:9"),
                "advertise is 127.0.0.1:9; members has 127.0.0.1:7001",
            ),
            (
                "/raft",
                json!({"election_min_ms": 100}),
                "raft.election_min_ms is 100; want at least 3 times",
            ),
            (
                "/raft",
                json!({"election_max_ms": 900}),
                "raft.election_max_ms is 900; want more than",
            ),
            (
                "/raft",
                json!({"snapshot_every": 0}),
                "raft.snapshot_every is 0; want at least 1",
            ),
        ] {
            let refused = refusal(pointer, &value);
            assert!(
                refused.contains(expected),
                "{refused:?} does not contain {expected:?}"
            );
        }
    }
}
