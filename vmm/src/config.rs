//! The VMM's configuration: a JSON file that the agent writes into the VMM's own folder.
//!
//! Unknown fields are refused, relative paths are taken from the file's folder, and every value is checked before
//! anything is built from it.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use drover_pki::TlsFiles;
use drover_proto::{Code, Fault};
use serde::Deserialize;

use crate::cpu::profile::Profile;
use crate::devices::attached::Equipment;
use crate::devices::virtio::blk::SERIAL_BYTES;
use crate::devices::virtio::blk::disk::Disk;

/// Most vCPUs of a VM.
pub const VCPUS_MAX: u32 = 32;
/// Least memory of a VM, MiB.
pub const MEMORY_MIB_MIN: u64 = 16;
/// Most memory of a VM, MiB.
pub const MEMORY_MIB_MAX: u64 = 1 << 20;
/// Most disks of a VM; the bus has 31 slots.
pub const DISKS_MAX: usize = 24;
/// Longest kernel command line, bytes.
pub const CMDLINE_BYTES_MAX: usize = 2048;
/// The socket of an upgrade, in the VMM's folder.
const HANDOVER_SOCKET: &str = "handover.sock";
/// Largest configuration file, bytes.
const CONFIG_BYTES_MAX: u64 = 64 << 10;

/// What one VMM process is to do.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The cluster that host and peers belong to.
    pub cluster_id: String,
    /// This host's name.
    pub host: String,
    /// The VM's name.
    pub vm: String,
    /// The run epoch this VMM is started for.
    pub epoch: u64,
    /// Number of vCPUs, 1..=32.
    pub vcpus: u32,
    /// Guest memory, MiB, 16..=1048576.
    pub memory_mib: u64,
    /// Whether it is to be of huge pages, if the host allows it.
    #[serde(default = "yes")]
    pub huge_pages: bool,
    /// The kernel image; not read by an incoming VMM.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line, at most 2048 bytes.
    pub cmdline: String,
    /// What the guest sees of the CPU: see [`Profile`].
    pub cpu_profile: Profile,
    /// The control socket.
    pub socket: PathBuf,
    /// The host's identity, for migrations.
    pub tls: TlsFiles,
    /// Set where the VM is to be received from another host.
    pub incoming: Option<Incoming>,
    /// Whether it has a source of random numbers.
    #[serde(default)]
    pub rng: bool,
    /// Its disks, in the order of their slots.
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
}

/// A disk of the VM.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// A raw file or a block device, of whole sectors of 512 bytes.
    pub path: PathBuf,
    /// Whether the guest cannot write to it.
    #[serde(default)]
    pub read_only: bool,
    /// What the guest is told as its serial number: at most 20 printable ASCII characters.
    #[serde(default)]
    pub serial: String,
}

/// From whom an incoming VMM receives.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Incoming {
    /// The migration's id.
    pub migration: String,
    /// The host whose VMM may connect.
    pub from_host: String,
    /// The address to listen on; the port is the kernel's choice.
    pub listen_ip: IpAddr,
    /// Whether pages may come unencrypted, which the cluster's policy decides.
    #[serde(default)]
    pub plaintext: bool,
    /// Whether it is received from the VMM before it on the same host, which hands over the memory itself. The socket for that lies
    /// beside the control socket.
    #[serde(default)]
    pub local: bool,
    /// Whether it may be received by post-copy, if the source wants that and this host's kernel lets us.
    #[serde(default = "yes")]
    pub post_copy: bool,
}

/// What a setting is by default that is to be switched off.
fn yes() -> bool {
    true
}

fn invalid(field: &str, message: String) -> Fault {
    Fault::new(Code::InvalidArgument, message).field(field)
}

impl Config {
    /// Reads and checks the file at `path`.
    pub fn read(path: &Path) -> Result<Self, Fault> {
        let fault = |what: String| invalid("config", format!("{}: {what}", path.display()));
        let bytes = std::fs::metadata(path)
            .map_err(|error| fault(error.to_string()))?
            .len();
        if bytes > CONFIG_BYTES_MAX {
            return Err(fault(format!(
                "{bytes} bytes are too many, at most {CONFIG_BYTES_MAX} are read"
            )));
        }
        let text = std::fs::read_to_string(path).map_err(|error| fault(error.to_string()))?;
        let mut config = Self::parse(&text)?;
        let base = path.parent().unwrap_or(Path::new("."));
        config.kernel = base.join(&config.kernel);
        config.initrd = config.initrd.map(|initrd| base.join(initrd));
        config.socket = base.join(&config.socket);
        config.tls = config.tls.resolve(base);
        for disk in &mut config.disks {
            disk.path = base.join(&disk.path);
        }
        Ok(config)
    }

    /// Parses and checks the file's text; paths stay as they are written.
    pub fn parse(text: &str) -> Result<Self, Fault> {
        let config: Self =
            serde_json::from_str(text).map_err(|error| invalid("config", error.to_string()))?;
        config.check()?;
        Ok(config)
    }

    /// Where the VMM before it on the same host connects to.
    pub fn handover_socket(&self) -> PathBuf {
        self.socket.with_file_name(HANDOVER_SOCKET)
    }

    /// Guest memory, bytes.
    pub fn memory_bytes(&self) -> u64 {
        self.memory_mib << 20
    }

    /// What the VM is given on its bus; the disks' files are opened.
    pub fn equipment(&self) -> Result<Equipment, Fault> {
        let open = |disk: &DiskConfig| Disk::open(&disk.path, disk.read_only, &disk.serial);
        Ok(Equipment {
            rng: self.rng,
            disks: self.disks.iter().map(open).collect::<Result<_, _>>()?,
        })
    }

    /// Whether the VM has a bus.
    pub fn has_bus(&self) -> bool {
        self.rng || !self.disks.is_empty()
    }

    fn check_disks(&self) -> Result<(), Fault> {
        if self.disks.len() > DISKS_MAX {
            let message = format!("{} disks are too many, at most {DISKS_MAX} are", self.disks.len());
            return Err(invalid("disks", message));
        }
        let printable = |serial: &str| serial.bytes().all(|byte| byte.is_ascii_graphic());
        for disk in &self.disks {
            if disk.serial.len() > SERIAL_BYTES || !printable(&disk.serial) {
                let message = format!(
                    "the serial number {:?} of a disk, must be at most {SERIAL_BYTES} printable ASCII characters without blanks",
                    disk.serial
                );
                return Err(invalid("disks", message));
            }
        }
        Ok(())
    }

    fn check(&self) -> Result<(), Fault> {
        for (field, value) in [
            ("cluster_id", &self.cluster_id),
            ("host", &self.host),
            ("vm", &self.vm),
        ] {
            if value.is_empty() {
                return Err(invalid(field, format!("{field} is empty")));
            }
        }
        if self.epoch == 0 {
            return Err(invalid("epoch", "epoch is 0; epochs count from 1".to_owned()));
        }
        if !(1..=VCPUS_MAX).contains(&self.vcpus) {
            return Err(invalid(
                "vcpus",
                format!("vcpus is {}, must be 1..={VCPUS_MAX}", self.vcpus),
            ));
        }
        if !(MEMORY_MIB_MIN..=MEMORY_MIB_MAX).contains(&self.memory_mib) {
            let range = format!("{MEMORY_MIB_MIN}..={MEMORY_MIB_MAX}");
            return Err(invalid(
                "memory_mib",
                format!("memory_mib is {}, must be {range}", self.memory_mib),
            ));
        }
        if self.cmdline.len() > CMDLINE_BYTES_MAX || self.cmdline.contains('\0') {
            let message = format!("cmdline must be at most {CMDLINE_BYTES_MAX} bytes without a zero byte");
            return Err(invalid("cmdline", message));
        }
        self.check_disks()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(change: impl FnOnce(&mut serde_json::Value)) -> String {
        let mut value = serde_json::json!({
            "cluster_id": "dev-1", "host": "host1", "vm": "vm1", "epoch": 1, "vcpus": 2, "memory_mib": 64,
            "kernel": "k", "initrd": null, "cmdline": "", "cpu_profile": "baseline", "socket": "vmm.sock",
            "tls": {"ca": "ca.pem", "cert": "h.pem", "key": "h.key"}, "incoming": null,
        });
        change(&mut value);
        value.to_string()
    }

    #[test]
    fn a_written_configuration_is_read_and_its_paths_are_taken_from_its_folder() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        let incoming = serde_json::json!({"migration": "m1", "from_host": "host2", "listen_ip": "127.0.0.1"});
        std::fs::write(&path, text(|v| v["incoming"] = incoming)).unwrap();
        let config = Config::read(&path).unwrap();
        assert_eq!(config.socket, dir.path().join("vmm.sock"));
        assert_eq!(config.tls.key, dir.path().join("h.key"));
        assert_eq!(config.incoming.unwrap().from_host, "host2");
        assert!(config.huge_pages, "unless it is said otherwise");
    }

    #[test]
    fn a_value_out_of_its_bounds_is_refused_with_its_field() {
        let cases: [(&str, serde_json::Value); 6] = [
            ("vcpus", 0.into()),
            ("vcpus", 33.into()),
            ("memory_mib", 8.into()),
            ("epoch", 0.into()),
            ("cmdline", "x".repeat(2049).into()),
            ("vm", "".into()),
        ];
        for (field, value) in cases {
            let fault = Config::parse(&text(|v| v[field] = value)).unwrap_err();
            assert_eq!((fault.code, fault.field.as_str()), (Code::InvalidArgument, field));
        }
    }

    #[test]
    fn disks_are_taken_from_the_files_folder_and_checked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        let disks =
            serde_json::json!([{"path": "a.raw", "serial": "vol-1"}, {"path": "/b", "read_only": true}]);
        std::fs::write(&path, text(|v| v["disks"] = disks)).unwrap();
        let config = Config::read(&path).unwrap();
        assert!(config.has_bus() && !config.disks[0].read_only && config.disks[1].read_only);
        assert_eq!(config.disks[0].path, dir.path().join("a.raw"));
        assert_eq!(config.equipment().unwrap_err().code, Code::DiskUnusable);
        for serial in ["x".repeat(21), "with blank".to_owned()] {
            let bad = serde_json::json!([{"path": "a", "serial": serial}]);
            assert_eq!(
                Config::parse(&text(|v| v["disks"] = bad)).unwrap_err().field,
                "disks"
            );
        }
        let many = serde_json::json!(vec![serde_json::json!({"path": "a"}); DISKS_MAX + 1]);
        assert_eq!(
            Config::parse(&text(|v| v["disks"] = many)).unwrap_err().field,
            "disks"
        );
    }

    #[test]
    fn an_unknown_field_and_an_unknown_profile_are_refused() {
        assert!(Config::parse(&text(|v| v["colour"] = 1.into())).is_err());
        assert!(Config::parse(&text(|v| v["cpu_profile"] = "x86-64-v9".into())).is_err());
    }
}
