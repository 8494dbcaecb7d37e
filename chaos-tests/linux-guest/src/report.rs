//! What the driver tells the test, a line each on the emulated host's serial console.

use serde::{Deserialize, Serialize};

/// Marks a report among the other lines of a console.
const MARK: &str = "@drover-report ";

/// What the guest's seed disk says of its network.
pub const NETWORK_CONFIG: &str = "version: 2
ethernets:
  nic0:
    match: {macaddress: \"52:54:00:0a:00:02\"}
    addresses: [\"10.0.0.2/24\"]
";

/// How far the driver has come, or why it came no further.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "snake_case")]
pub enum Report {
    /// The emulated host runs the driver, and `/dev/kvm` answers.
    HostUp,
    /// The guest's shell asked for a command.
    Shell {
        /// From the start of its VMM.
        boot_ms: u64,
    },
    /// The guest answered what was typed, before or after the migration.
    Answered {
        /// After it.
        migrated: bool,
        /// What it said of itself.
        guest: GuestFacts,
        /// When it was asked for its uptime and the time of day.
        asked: Asked,
    },
    /// The second VMM runs the guest.
    Migrated {
        /// Rounds of pre-copy.
        rounds: u32,
        /// On the wire.
        bytes: u64,
        /// Whole blackout.
        blackout_us: u64,
        /// How the first VMM ended: `true` when its process exited by itself with success.
        source_ended: bool,
    },
    /// Disks came, grew and went while the guest ran.
    HotPlugged {
        /// What the guest wrote to the disk that came, read back past its cache before it moved and after it.
        digests: [String; 2],
        /// The slot's state in the guest once the disk was given up, by `/sys/bus/pci/slots`; 0 is empty.
        given_up: String,
        /// Whether the guest still has a block device of it.
        remains: bool,
        /// Of the first disk, which grew, sectors of 512 bytes as the guest has it.
        grown_sectors: u64,
    },
    /// The guest's kernel read its seed disk.
    Seeded {
        /// What it was told, as `grep .` prints files, before the migration and after it.
        files: [String; 2],
        /// The volume's label and type.
        volume: String,
    },
    /// A NIC came and went while the guest ran.
    NicHotPlugged {
        /// Echoes that came back over it before the guest moved and after it, of three.
        echoes: [u64; 2],
        /// As of a disk.
        given_up: String,
        /// Whether the guest still has an interface of it.
        remains: bool,
        /// Whether its tap can be opened by others again.
        tap_is_free: bool,
    },
    /// The guest gave memory up before it moved and took it back after it.
    Ballooned {
        /// What it was asked to give up, KiB.
        asked_kib: u64,
        /// Memory that is available by `/proc/meminfo`: before, once it was given up, after the move, once it was taken back, KiB.
        available_kib: [u64; 4],
        /// The features that its driver has accepted, bit 0 first, as digits.
        features: String,
    },
    /// A snapshot was taken, the guest became another, and the VM went on from the snapshot.
    Restored {
        /// How long the guest stood for it, microseconds.
        paused_us: u64,
        /// Digests of a file in memory and of the disk: at the snapshot, of the other guest, and of the restored one.
        contents: [[String; 2]; 3],
        /// Echoes of the host that come back to the restored guest, of three.
        echoes: u64,
    },
    /// The guest wrote to its disk all through its migration.
    Wrote {
        /// Blocks that were on the disk by its word: before the migration began, when it had ended, and at the end.
        blocks: [u64; 3],
        /// Of the newest in each place, those that are not there.
        lost: u64,
    },
    /// A guest booted whose root is on its disk.
    Installed {
        /// Its root's device and file system.
        root: String,
        /// The digest of the file that was put there.
        digest: String,
        /// What its service at the address of its seed disk sent back.
        echoed: String,
    },
    /// The guest shut itself down when its power button was pressed.
    PoweredOff {
        /// Its driver heeded the button before.
        heeded: bool,
    },
    /// The stream between guest and host that was open while the guest moved has ended.
    Streamed {
        /// What the host saw.
        host: Streamed,
        /// What the guest saw: `block` and `sent` of the same bytes.
        guest: [String; 2],
    },
    /// The driver gave up.
    Failed {
        /// What it was about to do, and what went wrong.
        why: String,
    },
    /// Everything was done.
    Done,
}

/// What went over a stream both ways, and its digests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Streamed {
    /// From the guest: whole blocks, each the same.
    pub received_bytes: u64,
    /// Of one block.
    pub block: String,
    /// To the guest.
    pub sent_bytes: u64,
    /// Of all of it.
    pub sent: String,
}

/// When a question was under way, by `CLOCK_BOOTTIME` of the emulated host, nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    /// Before it was typed.
    pub typed_ns: u64,
    /// After the answer was read.
    pub answered_ns: u64,
}

/// What the guest's shell says of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GuestFacts {
    /// `uname -r`.
    pub release: String,
    /// The shell's process id: the same shell must answer after the migration.
    pub shell_pid: u64,
    /// Hundredths of a second by `/proc/uptime`.
    pub uptime_cs: u64,
    /// `date +%s`.
    pub wall_s: u64,
    /// The clock source in use.
    pub clock_source: String,
    /// Digest of a file of random bytes in the guest's memory.
    pub digest: String,
    /// Lines of the kernel's log that speak of an oops, a panic, a bug or a lock-up.
    pub complaints: u64,
    /// Processors online.
    pub cpus: u64,
    /// Where its shell is: `tty`.
    pub terminal: String,
    /// What Linux's own drivers found on the bus.
    pub devices: DeviceFacts,
}

/// What the guest's drivers say of the devices on its bus.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceFacts {
    /// The disk's size, sectors of 512 bytes.
    pub sectors: u64,
    /// Its serial number.
    pub serial: String,
    /// Digest of what was written to it, read back past the page cache.
    pub digest: String,
    /// Interrupts of its queue that are messages of the bus, as `/proc/interrupts` names them: at least one line.
    pub message_lines: u64,
    /// The source of random numbers in use.
    pub random: String,
    /// The NIC's address, MTU and driver.
    pub nic: String,
    /// The features that the NIC's driver has accepted, bit 0 first, as digits.
    pub nic_features: String,
    /// Echoes of the host that came back, of three.
    pub echoes: u64,
}

impl Report {
    /// The line for it.
    #[must_use]
    pub fn line(&self) -> String {
        format!(
            "{MARK}{}",
            serde_json::to_string(self).expect("a report is plain data")
        )
    }

    /// Reads a console's line; `None` for one that is no report.
    #[must_use]
    pub fn parse(line: &str) -> Option<Self> {
        let (_, json) = line.split_once(MARK)?;
        serde_json::from_str(json.trim()).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_found_amid_what_else_the_console_shows() {
        let report = Report::Migrated {
            rounds: 3,
            bytes: 70_000,
            blackout_us: 12,
            source_ended: true,
        };
        assert_eq!(
            Report::parse(&format!("[    1.2] x: {}\r", report.line())),
            Some(report)
        );
        assert_eq!(Report::parse("[    1.2] x"), None);
        let failed = Report::Failed {
            why: "two\nlines \"quoted\"".to_owned(),
        };
        assert!(!failed.line().contains('\n'));
        assert_eq!(Report::parse(&failed.line()), Some(failed));
    }
}
