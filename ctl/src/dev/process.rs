//! Processes of the development cluster: who they are, whether they live, how they end.
//!
//! A process id alone names whoever has it now. So a process is remembered with the time it started (proc(5), field 22
//! of `/proc/<pid>/stat`) and the boot it started in, and is never signalled unless both still hold. What was lost
//! (a `ctl` killed at the wrong moment) is found by its command line: a `drover-…` program with our configuration.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

/// How often a process that is to end is looked at.
const POLL: Duration = Duration::from_millis(20);
/// A killed process is gone by then, or hangs in the kernel.
const KILLED_WITHIN: Duration = Duration::from_secs(5);

/// One process, not merely a number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProcessId {
    /// The number.
    pub pid: i32,
    /// Clock ticks from boot to its start.
    pub start_ticks: u64,
    /// The boot.
    pub boot_id: String,
}

impl ProcessId {
    /// The process that has `pid` now; `None` when it is none or a zombie.
    pub fn of(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        Some(Self {
            pid,
            start_ticks: start_ticks(&stat)?,
            boot_id: boot_id(),
        })
    }

    /// Whether it lives.
    pub fn alive(&self) -> bool {
        Self::of(self.pid).as_ref() == Some(self)
    }

    /// Sends a signal, if it lives.
    fn signal(&self, signal: Signal) {
        if self.alive() {
            // It may end in between; then there is nothing left to do.
            let _ = kill(Pid::from_raw(self.pid), signal);
        }
    }
}

fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .unwrap_or_default()
        .trim()
        .to_owned()
}

/// Field 22 of `/proc/<pid>/stat`; `None` for a zombie. The name in field 2 may hold anything, so counting begins after
/// its last bracket.
fn start_ticks(stat: &str) -> Option<u64> {
    let mut fields = stat[stat.rfind(')')? + 1..].split_whitespace();
    let state = fields.next()?;
    if state == "Z" || state == "X" {
        return None;
    }
    // Field 3 is taken: field 22 is the 19th of the rest.
    fields.nth(18)?.parse().ok()
}

/// A running program of ours, found by its command line.
#[derive(Clone, Debug)]
pub struct Found {
    /// The process.
    pub process: ProcessId,
    /// The configuration it was started with.
    pub config: PathBuf,
}

/// Running `program`s whose configuration `wanted` accepts.
pub fn find(program: &str, wanted: impl Fn(&Path) -> bool) -> Vec<Found> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter_map(|pid| {
            let process = ProcessId::of(pid)?;
            let config = config_of(&fs::read(format!("/proc/{pid}/cmdline")).ok()?)?;
            (wanted(&config) && runs(pid, program) && process.alive()).then_some(Found { process, config })
        })
        .collect()
}

/// Whether `pid` executes a file named `program`, be it replaced by a newer build meanwhile.
pub fn runs(pid: i32, program: &str) -> bool {
    let exe = fs::read_link(format!("/proc/{pid}/exe"));
    let cmdline = || fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    is_named(exe, cmdline, program)
}

/// Of a VMM in its sandbox, which nobody may trace, the kernel tells an ordinary user, also its own, no more than the command line.
fn is_named(exe: io::Result<PathBuf>, cmdline: impl FnOnce() -> Vec<u8>, program: &str) -> bool {
    let file = match exe {
        Ok(exe) => exe,
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let words = cmdline();
            let first = words.split(|&byte| byte == 0).next().unwrap_or_default();
            PathBuf::from(OsStr::from_bytes(first))
        }
        Err(_) => return false,
    };
    let name = file.file_name().unwrap_or_default().as_bytes();
    name.strip_suffix(b" (deleted)").unwrap_or(name) == program.as_bytes()
}

/// The value of `--config` in a command line as `/proc/<pid>/cmdline` has it.
fn config_of(cmdline: &[u8]) -> Option<PathBuf> {
    let mut words = cmdline.split(|&byte| byte == 0);
    words.find(|&word| word == b"--config")?;
    words
        .next()
        .filter(|path| !path.is_empty())
        .map(|path| PathBuf::from(OsStr::from_bytes(path)))
}

/// Ends processes: SIGTERM, and SIGKILL for those that live on after `grace`. Returns those that nothing ends.
pub fn end(processes: &[ProcessId], grace: Duration) -> Vec<ProcessId> {
    for process in processes {
        process.signal(Signal::SIGTERM);
    }
    let left = wait_gone(processes, grace);
    for process in &left {
        process.signal(Signal::SIGKILL);
    }
    wait_gone(&left, KILLED_WITHIN)
}

fn wait_gone(processes: &[ProcessId], within: Duration) -> Vec<ProcessId> {
    let until = Instant::now() + within;
    loop {
        let left: Vec<_> = processes
            .iter()
            .filter(|process| process.alive())
            .cloned()
            .collect();
        if left.is_empty() || Instant::now() >= until {
            return left;
        }
        std::thread::sleep(POLL);
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn the_start_time_is_found_behind_any_name() {
        let rest = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20 21";
        assert_eq!(start_ticks(&format!("42 (drover-vmm) {rest}")), Some(4711));
        assert_eq!(start_ticks(&format!("42 (a) b (c) {rest}")), Some(4711));
        assert_eq!(
            start_ticks(&format!("42 (x) {}", rest.replacen('S', "Z", 1))),
            None
        );
        assert_eq!(start_ticks("garbage"), None);
    }

    #[test]
    fn a_process_is_itself_and_not_another_with_its_number() {
        let me = ProcessId::of(i32::try_from(std::process::id()).unwrap()).unwrap();
        assert!(me.alive());
        assert!(
            !ProcessId {
                start_ticks: me.start_ticks + 1,
                ..me.clone()
            }
            .alive()
        );
        assert!(
            !ProcessId {
                boot_id: "another".to_owned(),
                ..me
            }
            .alive()
        );
    }

    #[test]
    fn a_process_that_does_not_listen_to_sigterm_is_killed() {
        let mut child = Command::new("sh")
            .args(["-c", "trap '' TERM; echo ready; while :; do sleep 1; done"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = String::new();
        std::io::BufRead::read_line(
            &mut std::io::BufReader::new(child.stdout.take().unwrap()),
            &mut ready,
        )
        .unwrap();
        assert_eq!(ready, "ready\n");
        let process = ProcessId::of(i32::try_from(child.id()).unwrap()).unwrap();
        assert_eq!(end(std::slice::from_ref(&process), Duration::from_millis(50)), []);
        assert!(!process.alive());
        let status = child.wait().unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9));
    }

    #[test]
    fn a_signal_meant_for_an_earlier_process_hits_nobody() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = ProcessId::of(i32::try_from(child.id()).unwrap()).unwrap();
        let earlier = ProcessId {
            start_ticks: process.start_ticks - 1,
            ..process.clone()
        };
        assert_eq!(end(&[earlier], Duration::ZERO), []);
        assert!(process.alive());
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn the_configuration_is_read_from_a_command_line() {
        assert_eq!(
            config_of(b"/x/drover-vmm\0--config\0/d/config.json\0"),
            Some(PathBuf::from("/d/config.json"))
        );
        assert_eq!(config_of(b"drover-vmm\0--config\0"), None);
        assert_eq!(config_of(b""), None);
    }

    #[test]
    fn a_program_that_may_not_be_looked_into_is_known_by_its_command_line() {
        let denied = || Err(io::ErrorKind::PermissionDenied.into());
        let words = || b"/x/drover-vmm\0--config\0/d/config.json\0".to_vec();
        assert!(is_named(denied(), words, "drover-vmm"));
        assert!(!is_named(denied(), words, "drover-agent"));
        assert!(!is_named(denied(), Vec::new, "drover-vmm"));
        assert!(!is_named(
            Err(io::ErrorKind::NotFound.into()),
            words,
            "drover-vmm"
        ));
        assert!(is_named(
            Ok("/x/drover-vmm (deleted)".into()),
            Vec::new,
            "drover-vmm"
        ));
        assert!(
            !is_named(Ok("/bin/sh".into()), words, "drover-vmm"),
            "what is seen counts"
        );
    }

    #[test]
    fn a_running_program_is_found_by_its_configuration() {
        // `sh` with the words of a daemon: `--config` is its $0 after -c, the path its $1.
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("config.json");
        let mut child = Command::new("sh")
            .args(["-c", "read x", "--config"])
            .arg(&config)
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let exe = fs::read_link(format!("/proc/{}/exe", child.id())).unwrap();
        let program = exe.file_name().unwrap().to_str().unwrap();
        let found = find(program, |path| path == config);
        assert_eq!(
            found.iter().map(|found| found.process.pid).collect::<Vec<_>>(),
            [i32::try_from(child.id()).unwrap()]
        );
        assert!(find("drover-vmm", |path| path == config).is_empty());
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
