//! The VMM's configuration: a JSON file that the agent writes into the VMM's own folder.
//!
//! Unknown fields are refused, relative paths are taken from the file's folder, and every value is checked before
//! anything is built from it.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use drover_pki::TlsFiles;
use drover_proto::{Code, Fault};
use serde::Deserialize;

use crate::cpu::profile::Profile;
use crate::devices::attached::{Equipment, Gear, Nic};
use crate::devices::pci::SLOTS;
use crate::devices::virtio::balloon::Target;
use crate::devices::virtio::blk::SERIAL_BYTES;
use crate::devices::virtio::blk::disk::Disk;
use crate::devices::virtio::blk::fence::{Fence, Turn};
use crate::devices::virtio::net::tap::{Early, NAME_BYTES_MAX, Tap};
use crate::devices::virtio::net::{self, Mac};
use crate::memory::PAGE;
use crate::sandbox::SandboxConfig;

/// Most vCPUs of a VM.
pub const VCPUS_MAX: u32 = 32;
/// Least memory of a VM, MiB.
pub const MEMORY_MIB_MIN: u64 = 16;
/// Most memory of a VM, MiB.
pub const MEMORY_MIB_MAX: u64 = 1 << 20;
/// Most disks of a VM, a seed disk among them; the bus has 31 slots.
pub const DISKS_MAX: usize = 25;
/// Most NICs of a VM: with random numbers and all disks the bus is full, and has no slot for a balloon.
pub const NICS_MAX: usize = 8;
/// Pages of 4 KiB in a MiB.
pub const PAGES_A_MIB: u64 = (1 << 20) / PAGE;
/// Least MTU of a NIC (RFC 791, 3.2).
pub const MTU_MIN: u16 = 68;
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
    /// Set where the VM is not to boot its kernel but to go on from a snapshot.
    #[serde(default)]
    pub restore: Option<Restore>,
    /// Whether it has a source of random numbers.
    #[serde(default)]
    pub rng: bool,
    /// Its disks. Those without a slot are in the order of their slots.
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
    /// Its NICs. Those without a slot are in the order of their slots, which are counted after the disks'.
    #[serde(default)]
    pub nics: Vec<NicConfig>,
    /// Its balloon, if it has one. Without a slot it is in the one after all others.
    #[serde(default)]
    pub balloon: Option<BalloonConfig>,
    /// Whether its console has a virtio device beside the serial port. Without a slot it is in the one after all others.
    #[serde(default)]
    pub console: ConsoleConfig,
    /// How it cages itself; without it not at all, as the agents of before want it.
    #[serde(default)]
    pub sandbox: Option<SandboxConfig>,
}

/// The virtio device of the VM's console.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(untagged)]
pub enum ConsoleConfig {
    /// Whether there is one.
    Is(bool),
    /// There is one, in this slot.
    At(ConsoleSlot),
}

/// Where the virtio device of the VM's console is.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleSlot {
    /// The slot that it is in, as of a disk.
    pub slot: usize,
}

impl Default for ConsoleConfig {
    fn default() -> Self {
        Self::Is(false)
    }
}

impl ConsoleConfig {
    /// The slot that it is told to be in, if there is one.
    fn slot(self) -> Option<usize> {
        match self {
            Self::Is(_) => None,
            Self::At(at) => Some(at.slot),
        }
    }
}

/// The balloon of the VM: its guest gives memory up as it is asked, and says which is free.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonConfig {
    /// How much of its memory the guest is to have, MiB, 16..=memory_mib; none: all.
    #[serde(default)]
    pub target_mib: Option<u64>,
    /// The wish that this is of.
    #[serde(default)]
    pub revision: u64,
    /// The slot that it is in, as of a disk.
    #[serde(default)]
    pub slot: Option<usize>,
}

/// Pages of a balloon in a VM of `memory_mib` that is to have `target_mib` of them.
pub fn balloon_pages(memory_mib: u64, target_mib: u64) -> Result<u32, Fault> {
    let given_up = memory_mib
        .checked_sub(target_mib)
        .filter(|_| target_mib >= MEMORY_MIB_MIN);
    let pages = given_up.and_then(|mib| u32::try_from(mib * PAGES_A_MIB).ok());
    pages.ok_or_else(|| {
        let message = format!("target_mib is {target_mib}, must be {MEMORY_MIB_MIN}..={memory_mib}");
        invalid("target_mib", message)
    })
}

/// A NIC of the VM.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NicConfig {
    /// The name of a tap of the host's.
    pub tap: String,
    /// Its address, six bytes in hexadecimal between colons.
    pub mac: String,
    /// Most bytes of a packet, 68..=65535.
    #[serde(default = "ethernet_mtu")]
    pub mtu: u16,
    /// The slot that it is in, as of a disk.
    #[serde(default)]
    pub slot: Option<usize>,
}

fn ethernet_mtu() -> u16 {
    1500
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
    /// The slot that it is in, 1..=31; without one the lowest that nothing is told to be in, counted in order.
    #[serde(default)]
    pub slot: Option<usize>,
    /// The record of who had it last; of one that can be written.
    #[serde(default)]
    pub fence: Option<FenceConfig>,
}

/// What keeps a run off a disk that a later one has taken: see [`crate::devices::virtio::blk::fence`].
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FenceConfig {
    /// The record, a file beside the disk's.
    pub path: PathBuf,
    /// How often a VM that may write to the volume had been placed, or given it, with this run.
    pub writers: u64,
}

impl DiskConfig {
    /// Opens its file, and its record, for a run of this epoch.
    pub fn open(&self, epoch: u64) -> Result<Disk, Fault> {
        let disk = Disk::open(&self.path, self.read_only, &self.serial)?;
        let fence = self.fence.as_ref().map(|FenceConfig { path, writers }| {
            let turn = Turn {
                writers: *writers,
                epoch,
            };
            Fence::open(path, turn)
        });
        Ok(disk.fenced(fence.transpose()?))
    }

    /// Whether its values are within their bounds.
    pub fn check(&self) -> Result<(), Fault> {
        let printable = self.serial.bytes().all(|byte| byte.is_ascii_graphic());
        if self.serial.len() > SERIAL_BYTES || !printable {
            let message = format!(
                "the serial number {:?} of a disk, must be at most {SERIAL_BYTES} printable ASCII characters without blanks",
                self.serial
            );
            return Err(invalid("disks", message));
        }
        if self.fence.is_some() && self.read_only {
            let message = format!(
                "disk {} is read-only and has a fence, must have none: nobody is kept off by who only reads",
                self.path.display()
            );
            return Err(invalid("disks", message));
        }
        Ok(())
    }
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

/// From what a VM goes on. Its disks have their content of that instant already.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Restore {
    /// The snapshot's folder, an absolute path.
    pub folder: PathBuf,
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

    /// What the VM is given on its bus; the disks' files are opened, and the taps are there.
    pub fn equipment(&self) -> Result<Equipment, Fault> {
        let early = match &self.incoming {
            None => Early::No,
            Some(incoming) if incoming.local => Early::IfFree,
            Some(_) => Early::Yes,
        };
        let rng = self.rng.then_some(Ok((None, Gear::Rng)));
        let disk = |disk: &DiskConfig| Ok((disk.slot, Gear::Disk(disk.open(self.epoch)?)));
        let nic = |nic: &NicConfig| {
            let (tap, mac, mtu) = (Tap::find(&nic.tap, early)?, nic.address()?, nic.mtu);
            Ok((nic.slot, Gear::Nic(Nic { tap, mac, mtu })))
        };
        let (disks, nics) = (self.disks.iter().map(disk), self.nics.iter().map(nic));
        let balloon = self
            .balloon
            .iter()
            .map(|balloon| Ok((balloon.slot, self.balloon_of(balloon)?)));
        let console = match self.console {
            ConsoleConfig::Is(false) => None,
            console => Some(Ok((console.slot(), Gear::Console))),
        };
        let counted = rng.into_iter().chain(disks).chain(nics);
        counted.chain(balloon).chain(console).collect()
    }

    fn balloon_of(&self, balloon: &BalloonConfig) -> Result<Gear, Fault> {
        let target = Target {
            pages: balloon_pages(self.memory_mib, balloon.target_mib.unwrap_or(self.memory_mib))?,
            revision: balloon.revision,
        };
        Ok(Gear::Balloon(target, self.memory_mib * PAGES_A_MIB))
    }

    fn check_nics(&self) -> Result<(), Fault> {
        if self.nics.len() > NICS_MAX {
            let message = format!("{} NICs are too many, at most {NICS_MAX} are", self.nics.len());
            return Err(invalid("nics", message));
        }
        for (index, nic) in self.nics.iter().enumerate() {
            let mac = nic.check()?;
            let before = &self.nics[..index];
            if before.iter().any(|other| other.tap == nic.tap)
                || before.iter().any(|other| other.address() == Ok(mac))
            {
                let message = format!("tap {} or address {} is of two NICs", nic.tap, nic.mac);
                return Err(invalid("nics", message));
            }
        }
        Ok(())
    }

    fn check_disks(&self) -> Result<(), Fault> {
        if self.disks.len() > DISKS_MAX {
            let message = format!("{} disks are too many, at most {DISKS_MAX} are", self.disks.len());
            return Err(invalid("disks", message));
        }
        self.disks.iter().try_for_each(DiskConfig::check)
    }

    fn check_slots(&self) -> Result<(), Fault> {
        let disks = self.disks.iter().map(|disk| ("disks", disk.slot));
        let nics = self.nics.iter().map(|nic| ("nics", nic.slot));
        let balloon = self.balloon.iter().map(|balloon| ("balloon", balloon.slot));
        let mut told = BTreeSet::new();
        let console = std::iter::once(("console", self.console.slot()));
        for (field, slot) in disks.chain(nics).chain(balloon).chain(console) {
            let Some(slot) = slot else { continue };
            if !(1..SLOTS).contains(&slot) {
                let message = format!("slot {slot}, must be 1..={}", SLOTS - 1);
                return Err(invalid(field, message));
            }
            if !told.insert(slot) {
                return Err(invalid(field, format!("slot {slot} is told to two devices")));
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
        if let Some(restore) = &self.restore {
            if self.incoming.is_some() {
                let message = "a VM is either received or restored: incoming and restore are both set";
                return Err(invalid("restore", message.to_owned()));
            }
            if !restore.folder.is_absolute() {
                let message = format!("folder is {}, must be an absolute path", restore.folder.display());
                return Err(invalid("restore", message));
            }
        }
        self.check_disks()?;
        self.check_nics()?;
        self.check_slots()?;
        self.balloon
            .iter()
            .try_for_each(|balloon| self.balloon_of(balloon).map(drop))
    }
}

impl NicConfig {
    /// Its address, if its values are within their bounds.
    pub fn check(&self) -> Result<Mac, Fault> {
        let mac = self.address()?;
        let named = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'/' | b':' | b'%' | b'"');
        if !(1..=NAME_BYTES_MAX).contains(&self.tap.len()) || !self.tap.bytes().all(named) {
            let message = format!(
                "the tap {:?} of a NIC, must be the name of an interface: 1..={NAME_BYTES_MAX} printable ASCII characters",
                self.tap
            );
            return Err(invalid("nics", message));
        }
        if self.mtu < MTU_MIN {
            let message = format!("the MTU {} of a NIC, must be {MTU_MIN}..=65535", self.mtu);
            return Err(invalid("nics", message));
        }
        Ok(mac)
    }

    /// Its address, which is one that a single NIC can have (IEEE 802: the lowest bit of the first byte is of groups).
    fn address(&self) -> Result<Mac, Fault> {
        net::parse(&self.mac)
            .filter(|mac| mac[0] & 1 == 0 && *mac != Mac::default())
            .ok_or_else(|| {
                let message = format!(
                    "the address {:?} of a NIC, must be six bytes in hexadecimal between colons, not of a group: 52:54:00:12:34:56",
                    self.mac
                );
                invalid("nics", message)
            })
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
    fn what_is_restored_is_not_received_and_its_folder_is_told_in_full() {
        let folder = |folder: &str| serde_json::json!({ "folder": folder });
        assert!(Config::parse(&text(|v| v["restore"] = folder("/snapshots/s1"))).is_ok());
        let received = serde_json::json!({"migration": "m1", "from_host": "host2", "listen_ip": "127.0.0.1"});
        for wrong in [
            text(|v| v["restore"] = folder("s1")),
            text(|v| {
                v["restore"] = folder("/snapshots/s1");
                v["incoming"] = received;
            }),
        ] {
            let fault = Config::parse(&wrong).unwrap_err();
            assert_eq!(
                (fault.code, fault.field.as_str()),
                (Code::InvalidArgument, "restore")
            );
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
        assert!(!config.disks[0].read_only && config.disks[1].read_only);
        assert_eq!(config.disks[0].path, dir.path().join("a.raw"));
        assert_eq!(config.equipment().unwrap_err().code, Code::DiskUnusable);
        for serial in ["x".repeat(21), "with blank".to_owned()] {
            let bad = serde_json::json!([{"path": "a", "serial": serial}]);
            assert_eq!(
                Config::parse(&text(|v| v["disks"] = bad)).unwrap_err().field,
                "disks"
            );
        }
        for slots in [[0, 1], [1, 32], [2, 2]] {
            let bad = slots.map(|slot| serde_json::json!({"path": "a", "slot": slot}));
            assert!(
                Config::parse(&text(|v| v["disks"] = bad.to_vec().into())).is_err(),
                "{slots:?}"
            );
        }
        let many = serde_json::json!(vec![serde_json::json!({"path": "a"}); DISKS_MAX + 1]);
        assert_eq!(
            Config::parse(&text(|v| v["disks"] = many)).unwrap_err().field,
            "disks"
        );
    }

    #[test]
    fn nics_are_checked_by_name_address_and_mtu() {
        let nic = |tap: &str, mac: &str, mtu: u32| serde_json::json!({"tap": tap, "mac": mac, "mtu": mtu});
        let good = "52:54:00:12:34:56";
        let config = Config::parse(&text(|v| {
            v["nics"] = serde_json::json!([{"tap": "vm1-0", "mac": "52:54:00:AB:cd:01"}]);
        }))
        .unwrap();
        assert_eq!(
            (config.nics[0].address().unwrap(), config.nics[0].mtu),
            ([0x52, 0x54, 0, 0xab, 0xcd, 1], 1500)
        );
        assert_eq!(config.equipment().unwrap_err().code, Code::NicUnusable);
        let many: Vec<_> = (0..=NICS_MAX)
            .map(|n| nic(&format!("tap{n}"), &format!("52:54:00:00:00:0{n}"), 1500))
            .collect();
        for bad in [
            serde_json::json!(many),
            serde_json::json!([nic("", good, 1500)]),
            serde_json::json!([nic("a/b", good, 1500)]),
            serde_json::json!([nic("sixteen-letters-", good, 1500)]),
            serde_json::json!([nic("tap0", "52:54:00:12:34", 1500)]),
            serde_json::json!([nic("tap0", "52:54:00:12:34:56:78", 1500)]),
            serde_json::json!([nic("tap0", "52:54:00:12:34:+6", 1500)]),
            serde_json::json!([nic("tap0", "53:54:00:12:34:56", 1500)]),
            serde_json::json!([nic("tap0", "00:00:00:00:00:00", 1500)]),
            serde_json::json!([nic("tap0", good, 67)]),
            serde_json::json!([{"tap": "tap0", "mac": good, "slot": 32}]),
            serde_json::json!([{"tap": "tap0", "mac": good, "slot": 1}, {"tap": "tap1", "mac": "52:54:00:12:34:57", "slot": 1}]),
            serde_json::json!([nic("tap0", good, 1500), nic("tap0", "52:54:00:12:34:57", 1500)]),
            serde_json::json!([nic("tap0", good, 1500), nic("tap1", good, 1500)]),
        ] {
            let fault = Config::parse(&text(|v| v["nics"] = bad.clone())).unwrap_err();
            assert_eq!(
                (fault.code, fault.field.as_str()),
                (Code::InvalidArgument, "nics"),
                "{bad}"
            );
        }
    }

    #[test]
    fn a_balloon_is_checked_and_takes_the_slot_after_all_others() {
        let config = Config::parse(&text(|v| v["balloon"] = serde_json::json!({"target_mib": 16}))).unwrap();
        let equipment = config.equipment().unwrap();
        let [(None, Gear::Balloon(target, pages))] = equipment.as_slice() else {
            panic!("{equipment:?}");
        };
        assert_eq!((target.pages, *pages), (48 * 256, 64 * 256));
        let whole = Config::parse(&text(|v| v["balloon"] = serde_json::json!({"slot": 31}))).unwrap();
        let equipment = whole.equipment().unwrap();
        assert!(
            matches!(&equipment[0], (Some(31), Gear::Balloon(target, _)) if *target == Target::default())
        );
        for bad in [
            serde_json::json!({"target_mib": 15}),
            serde_json::json!({"target_mib": 65}),
            serde_json::json!({"slot": 32}),
            serde_json::json!({"pages": 1}),
        ] {
            let fault = Config::parse(&text(|v| v["balloon"] = bad.clone())).unwrap_err();
            assert_eq!(fault.code, Code::InvalidArgument, "{bad}");
        }
    }

    #[test]
    fn a_console_takes_the_slot_that_it_is_told_or_the_one_after_all_others() {
        let equipment = |console: serde_json::Value| {
            let config = text(|v| {
                v["console"] = console;
                v["rng"] = true.into();
                v["balloon"] = serde_json::json!({});
            });
            Config::parse(&config).map(|config| config.equipment().unwrap())
        };
        let counted = equipment(true.into()).unwrap();
        assert!(matches!(
            counted.as_slice(),
            [
                (None, Gear::Rng),
                (None, Gear::Balloon(..)),
                (None, Gear::Console)
            ]
        ));
        let told = equipment(serde_json::json!({"slot": 29})).unwrap();
        assert!(matches!(told[2], (Some(29), Gear::Console)));
        assert_eq!(equipment(false.into()).unwrap().len(), 2);
        for bad in [
            serde_json::json!({"slot": 32}),
            serde_json::json!({"slot": 0}),
            serde_json::json!({"slot": 29, "port": 1}),
            "yes".into(),
        ] {
            let fault = equipment(bad.clone()).unwrap_err();
            assert_eq!(fault.code, Code::InvalidArgument, "{bad}");
        }
    }

    #[test]
    fn an_unknown_field_and_an_unknown_profile_are_refused() {
        assert!(Config::parse(&text(|v| v["colour"] = 1.into())).is_err());
        assert!(Config::parse(&text(|v| v["cpu_profile"] = "x86-64-v9".into())).is_err());
    }
}
