//! The folder of a development cluster: what is chosen once (cluster id, ports), and the files made from it.
//!
//! ```text
//! dev.json               cluster id and ports, chosen once
//! lock                   held while `ctl dev up` or `down` works
//! pki/                   the cluster's CA
//! client.json, client/   the context of ctl and its identity
//! images/                for all hosts
//! c1/ c2/ c3/            config.json, certificates, data/, daemon.log, daemon.json (who runs)
//! host1/ host2/ host3/   the same; VMMs live in data/vms/
//! ```
//!
//! Every step can be repeated and mends what is missing, so an interrupted `up` is finished by the next.

use std::fs;
use std::io;
use std::net::TcpListener;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use drover_pki::{ClusterCa, Role, TlsFiles};
use drover_proto::{Fault, v1};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::args::NamedImage;
use crate::client::request_id;
use crate::context::{Context, DEV_CONTEXT_FILE};
use crate::failure::{Exit, Failure, Result};

/// Controllers of a development cluster.
const CONTROLLERS: usize = 3;
/// Hosts of a development cluster.
const HOSTS: usize = 3;
/// Ports are taken from here: below the range that Linux takes for outgoing connections (from 32768), so that nothing
/// takes one away while the cluster is down.
const PORTS: std::ops::Range<u16> = 20_000..32_000;
/// A host of a development cluster offers this share of the machine's memory to guests.
const MEMORY_SHARE: u64 = 4;
/// … and at least this much, MiB.
const MEMORY_MIB_MIN: u64 = 512;

/// What is chosen once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// The cluster's id.
    pub cluster_id: String,
    /// The controllers, in order of their number, from 1.
    pub controllers: Vec<Node>,
    /// The hosts.
    pub hosts: Vec<Node>,
}

/// A daemon's name and place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// `c1`, `host1`, …
    pub name: String,
    /// Its port on 127.0.0.1.
    pub port: u16,
}

impl Node {
    /// `ip:port`.
    pub fn addr(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }
}

/// The folder.
#[derive(Debug)]
pub struct Folder {
    /// Where it is, absolute.
    pub root: PathBuf,
    /// What was chosen.
    pub plan: Plan,
}

/// Held while the folder is changed.
pub type Lock = Flock<fs::File>;

impl Folder {
    /// The folder at `root`; `None` when no cluster was ever made there.
    pub fn open(root: &Path) -> Result<Option<Self>> {
        let root = std::path::absolute(root).map_err(|error| Failure::io(root.display(), &error))?;
        let path = root.join("dev.json");
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Failure::io(path.display(), &error)),
        };
        let plan = serde_json::from_str(&text).map_err(|error| {
            dev(format!(
                "{}: {error}. `ctl dev down --purge` removes the folder",
                path.display()
            ))
        })?;
        Ok(Some(Self { root, plan }))
    }

    /// The folder at `root`, made when it is not there.
    pub fn open_or_create(root: &Path) -> Result<Self> {
        if let Some(folder) = Self::open(root)? {
            return Ok(folder);
        }
        let root = std::path::absolute(root).map_err(|error| Failure::io(root.display(), &error))?;
        make_dir(&root)?;
        let strange = fs::read_dir(&root)
            .map_err(|error| Failure::io(root.display(), &error))?
            .flatten()
            .find(|entry| entry.file_name() != "lock");
        if let Some(entry) = strange {
            let name = entry.file_name();
            return Err(dev(format!(
                "{} is no development cluster's folder and holds {}: name an empty or a new one",
                root.display(),
                name.to_string_lossy()
            )));
        }
        let plan = Plan::choose()?;
        write_json(&root.join("dev.json"), &json!(plan))?;
        Ok(Self { root, plan })
    }

    /// Takes the folder's lock; refused while another `ctl dev` works on it.
    pub fn lock(root: &Path) -> Result<Lock> {
        make_dir(root)?;
        let path = root.join("lock");
        let file = fs::File::options().create(true).append(true).open(&path);
        let file = file.map_err(|error| Failure::io(path.display(), &error))?;
        Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|_| {
            dev(format!(
                "another `ctl dev` works on {}: wait for its end",
                root.display()
            ))
        })
    }

    /// A daemon's own folder.
    pub fn of(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// The context file for ctl.
    pub fn context_file(&self) -> PathBuf {
        self.root.join(DEV_CONTEXT_FILE)
    }

    /// The folder of images that all hosts share.
    pub fn images(&self) -> PathBuf {
        self.root.join("images")
    }

    /// The folder of the pool `default`, which all hosts share.
    pub fn pool(&self) -> PathBuf {
        self.root.join("pool")
    }

    /// Makes what is missing: CA, identities, configurations, the context.
    pub fn prepare(&self, vmm: &Path) -> Result<()> {
        make_dir(&self.images())?;
        make_dir(&self.pool())?;
        let ca = self.ca()?;
        for (node, id) in self.plan.controllers.iter().zip(1_u64..) {
            let tls = self.identity(&ca, &node.name, Role::Controller, &node.name)?;
            write_json(
                &self.of(&node.name).join("config.json"),
                &self.controller_config(node, id, &tls),
            )?;
        }
        let memory_mib = memory_share_mib()?;
        for node in &self.plan.hosts {
            let tls = self.identity(&ca, &node.name, Role::Host, &node.name)?;
            let config = self.agent_config(node, vmm, &tls, memory_mib);
            write_json(&self.of(&node.name).join("config.json"), &config)?;
        }
        let tls = self.identity(&ca, "client", Role::User, "admin")?;
        let inside = |path: &Path| Path::new("client").join(path.file_name().unwrap_or_default());
        let context = Context {
            cluster_id: self.plan.cluster_id.clone(),
            controllers: self.plan.controllers.iter().map(Node::addr).collect(),
            tls: TlsFiles {
                ca: inside(&tls.ca),
                cert: inside(&tls.cert),
                key: inside(&tls.key),
            },
        };
        write_json(&self.context_file(), &json!(context))
    }

    fn ca(&self) -> Result<ClusterCa> {
        let dir = self.root.join("pki");
        if dir.join("ca.pem").exists() && dir.join("ca.key").exists() {
            return Ok(ClusterCa::load(&dir).map_err(Fault::from)?);
        }
        make_dir(&dir)?;
        let ca = ClusterCa::create(&self.plan.cluster_id).map_err(Fault::from)?;
        ca.save(&dir).map_err(Fault::from)?;
        Ok(ca)
    }

    /// The identity `name` in the subfolder `sub`, issued when any of its files is missing.
    fn identity(&self, ca: &ClusterCa, sub: &str, role: Role, name: &str) -> Result<TlsFiles> {
        let dir = self.root.join(sub);
        make_dir(&dir)?;
        let files = TlsFiles {
            ca: dir.join("ca.pem"),
            cert: dir.join(format!("{name}.pem")),
            key: dir.join(format!("{name}.key")),
        };
        if files.ca.exists() && files.cert.exists() && files.key.exists() {
            return Ok(files);
        }
        Ok(ca.issue_to(&dir, role, name).map_err(Fault::from)?)
    }

    fn controller_config(&self, node: &Node, id: u64, tls: &TlsFiles) -> Value {
        let members: Vec<_> = self
            .plan
            .controllers
            .iter()
            .zip(1_u64..)
            .map(|(member, id)| json!({ "id": id, "name": member.name, "addr": member.addr() }))
            .collect();
        json!({
            "cluster_id": self.plan.cluster_id,
            "id": id,
            "name": node.name,
            "data_dir": "data",
            "listen": node.addr(),
            "advertise": node.addr(),
            "members": members,
            "tls": beside(tls),
        })
    }

    fn agent_config(&self, node: &Node, vmm: &Path, tls: &TlsFiles, memory_mib: u64) -> Value {
        json!({
            "cluster_id": self.plan.cluster_id,
            "name": node.name,
            "data_dir": "data",
            "listen": node.addr(),
            "advertise": node.addr(),
            "migration_ip": "127.0.0.1",
            "controllers": self.plan.controllers.iter().map(Node::addr).collect::<Vec<_>>(),
            "images_dir": "../images",
            "vmm": vmm,
            "tls": beside(tls),
            "memory_mib": memory_mib,
            "pools": { "default": "../pool" },
        })
    }

    /// Copies an image in, unless it is there already.
    pub fn install_image(&self, image: &NamedImage) -> Result<bool> {
        let failed = |error: io::Error| {
            Failure::io(format!("image {} ({})", image.name, image.path.display()), &error)
        };
        let content = fs::read(&image.path).map_err(failed)?;
        let target = self.images().join(&image.name);
        if fs::read(&target).is_ok_and(|present| present == content) {
            return Ok(false);
        }
        // Not beside the target: the hosts would report the half of it.
        let staged = self.root.join(format!(".{}.new", image.name));
        fs::write(&staged, &content)
            .and_then(|()| fs::rename(&staged, &target))
            .map_err(failed)?;
        Ok(true)
    }

    /// Whether `host` reports the image as it is here, by its length.
    pub fn has_image(&self, host: &v1::Host, name: &str) -> bool {
        let bytes = fs::metadata(self.images().join(name)).map(|meta| meta.len()).ok();
        let images = host.spec.iter().flat_map(|spec| &spec.images);
        images
            .filter(|image| image.name == name)
            .any(|image| Some(image.bytes) == bytes)
    }
}

impl Plan {
    fn choose() -> Result<Self> {
        let mut ports = free_ports(CONTROLLERS + HOSTS)?.into_iter();
        let mut nodes = |prefix: &str, count: usize| {
            (1..=count)
                .zip(&mut ports)
                .map(|(n, port)| Node {
                    name: format!("{prefix}{n}"),
                    port,
                })
                .collect::<Vec<_>>()
        };
        let (controllers, hosts) = (nodes("c", CONTROLLERS), nodes("host", HOSTS));
        Ok(Self {
            cluster_id: format!("dev-{}", &request_id()?[..8]),
            controllers,
            hosts,
        })
    }
}

/// `count` different ports of 127.0.0.1 on which nobody listens.
fn free_ports(count: usize) -> Result<Vec<u16>> {
    let random = u32::from_str_radix(&request_id()?[..8], 16).unwrap_or(0);
    let span = u32::from(PORTS.end - PORTS.start);
    let first = PORTS.start + u16::try_from(random % span).unwrap_or(0);
    // Held until all are chosen, so that they differ.
    let held: Vec<_> = (first..PORTS.end)
        .chain(PORTS.start..first)
        .filter_map(|port| {
            TcpListener::bind(("127.0.0.1", port))
                .ok()
                .map(|listener| (port, listener))
        })
        .take(count)
        .collect();
    if held.len() < count {
        return Err(dev(format!(
            "fewer than {count} ports of 127.0.0.1 between {} and {} are free",
            PORTS.start, PORTS.end
        )));
    }
    Ok(held.into_iter().map(|(port, _)| port).collect())
}

/// An error about the development cluster.
pub fn dev(message: impl Into<String>) -> Failure {
    Failure::new(Exit::Failed, "dev", message)
}

/// The files' names alone: configurations name what lies beside them.
fn beside(tls: &TlsFiles) -> Value {
    let name = |path: &Path| {
        path.file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    };
    json!({ "ca": name(&tls.ca), "cert": name(&tls.cert), "key": name(&tls.key) })
}

/// A host's share of the machine's memory, MiB, from `/proc/meminfo`.
fn memory_share_mib() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo").map_err(|error| Failure::io("/proc/meminfo", &error))?;
    Ok((mem_total_kib(&text).unwrap_or(0) / 1024 / MEMORY_SHARE).max(MEMORY_MIB_MIN))
}

fn mem_total_kib(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Makes a folder that is the user's alone.
fn make_dir(path: &Path) -> Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|error| Failure::io(format!("cannot make the folder {}", path.display()), &error))
}

/// Writes a file whole or not at all.
fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let staged = path.with_file_name(format!(
        ".{}.new",
        path.file_name().unwrap_or_default().to_string_lossy()
    ));
    fs::write(&staged, content)?;
    fs::rename(&staged, path)
}

/// Writes JSON whole or not at all.
pub fn write_json(path: &Path, value: &Value) -> Result<()> {
    let text = format!("{value:#}\n");
    replace(path, text.as_bytes()).map_err(|error| Failure::io(path.display(), &error))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn read(path: &Path) -> Value {
        serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
    }

    #[test]
    fn a_folder_is_chosen_once_and_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("new/dev");
        assert!(Folder::open(&root).unwrap().is_none());
        let made = Folder::open_or_create(&root).unwrap();
        let again = Folder::open_or_create(&root).unwrap();
        assert_eq!(made.plan, again.plan);
        let ports: std::collections::BTreeSet<_> = made
            .plan
            .controllers
            .iter()
            .chain(&made.plan.hosts)
            .map(|node| node.port)
            .collect();
        assert_eq!(ports.len(), CONTROLLERS + HOSTS);
        assert!(ports.iter().all(|port| PORTS.contains(port)));
        assert_eq!(fs::metadata(&root).unwrap().permissions().mode() & 0o777, 0o700);
    }

    #[test]
    fn a_host_has_an_image_when_it_reports_its_present_length() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::open_or_create(&dir.path().join("dev")).unwrap();
        folder.prepare(Path::new("/vmm")).unwrap();
        fs::write(folder.images().join("linux"), "12345").unwrap();
        let host = |bytes| {
            let image = v1::Image {
                name: "linux".to_owned(),
                bytes,
                ..Default::default()
            };
            let spec = v1::HostSpec {
                images: vec![image],
                ..Default::default()
            };
            v1::Host {
                spec: Some(spec),
                ..Default::default()
            }
        };
        assert!(folder.has_image(&host(5), "linux"));
        assert!(!folder.has_image(&host(4), "linux"));
        assert!(!folder.has_image(&host(5), "other"));
    }

    #[test]
    fn a_folder_with_other_things_in_it_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("thesis.tex"), "…").unwrap();
        let failure = Folder::open_or_create(dir.path()).unwrap_err();
        assert!(failure.message.contains("thesis.tex"), "{}", failure.message);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn the_files_are_made_once_and_name_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::open_or_create(dir.path()).unwrap();
        folder.prepare(Path::new("/usr/bin/drover-vmm")).unwrap();
        let key = fs::read(folder.of("c1").join("c1.key")).unwrap();
        folder.prepare(Path::new("/opt/drover-vmm")).unwrap();
        assert_eq!(fs::read(folder.of("c1").join("c1.key")).unwrap(), key);

        let controller = read(&folder.of("c2").join("config.json"));
        assert_eq!(
            (&controller["id"], &controller["name"]),
            (&json!(2), &json!("c2"))
        );
        assert_eq!(controller["listen"], folder.plan.controllers[1].addr());
        assert_eq!(controller["members"].as_array().map(Vec::len), Some(3));
        assert_eq!(controller["tls"]["key"], "c2.key");

        let agent = read(&folder.of("host3").join("config.json"));
        assert_eq!(agent["vmm"], "/opt/drover-vmm");
        assert_eq!(agent["images_dir"], "../images");
        assert_eq!(agent["pools"]["default"], "../pool");
        assert!(folder.pool().is_dir());
        assert_eq!(agent["controllers"].as_array().map(Vec::len), Some(3));
        assert!(agent["memory_mib"].as_u64().unwrap() >= MEMORY_MIB_MIN);

        let context = Context::load(&folder.context_file()).unwrap();
        assert_eq!(context.cluster_id, folder.plan.cluster_id);
        assert!(context.tls.key.exists());
        drover_pki::Credentials::load(&context.tls, &context.cluster_id).unwrap();
    }

    #[test]
    fn two_commands_do_not_work_on_one_folder_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let held = Folder::lock(dir.path()).unwrap();
        assert!(Folder::lock(dir.path()).unwrap_err().message.contains("another"));
        drop(held);
        Folder::lock(dir.path()).unwrap();
        Folder::open_or_create(dir.path()).unwrap();
    }

    #[test]
    fn an_image_is_copied_when_it_differs() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::open_or_create(&dir.path().join("dev")).unwrap();
        folder.prepare(Path::new("/vmm")).unwrap();
        let source = dir.path().join("kernel");
        fs::write(&source, "one").unwrap();
        let image = NamedImage {
            name: "linux".to_owned(),
            path: source.clone(),
        };
        assert!(folder.install_image(&image).unwrap());
        assert!(!folder.install_image(&image).unwrap());
        fs::write(&source, "two").unwrap();
        assert!(folder.install_image(&image).unwrap());
        assert_eq!(fs::read(folder.images().join("linux")).unwrap(), b"two");
        let missing = NamedImage {
            path: dir.path().join("none"),
            ..image
        };
        assert!(
            folder
                .install_image(&missing)
                .unwrap_err()
                .message
                .contains("none")
        );
    }

    #[test]
    fn memory_is_read_from_meminfo() {
        assert_eq!(
            mem_total_kib("MemTotal:       24069264 kB\nMemFree: 1 kB\n"),
            Some(24_069_264)
        );
        assert_eq!(mem_total_kib("nothing"), None);
    }
}
