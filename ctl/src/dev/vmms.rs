//! The VMMs of a development cluster, which outlive their agents and so must be found on their own.
//!
//! A VMM holds the lock file in its folder (`host1/data/vms/vm1/e3-m1/lock`) for its life. `/proc/locks` (proc(5)) names
//! a lock's holder by process id, device and inode. Where a file system shows other device numbers there than stat(2)
//! does, the command line still tells: a `drover-vmm` whose configuration lies in the folder.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};

use super::process::{ProcessId, find, runs};

/// The VMM's program.
const PROGRAM: &str = "drover-vmm";

/// A running VMM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vmm {
    /// The process.
    pub process: ProcessId,
    /// The VM.
    pub vm: String,
    /// The host.
    pub host: String,
    /// Its folder's name: epoch and what it was started for.
    pub instance: String,
}

/// The VMMs that run under `root`, by process id.
pub fn running(root: &Path) -> Vec<Vmm> {
    let mut vmms = BTreeMap::new();
    for found in find(PROGRAM, |config| place(root, config).is_some()) {
        if let Some((host, vm, instance)) = place(root, &found.config) {
            vmms.insert(
                found.process.pid,
                Vmm {
                    process: found.process,
                    vm,
                    host,
                    instance,
                },
            );
        }
    }
    let holders = parse_locks(&fs::read_to_string("/proc/locks").unwrap_or_default());
    for lock in lock_files(root) {
        let Some((host, vm, instance)) = place(root, &lock) else {
            continue;
        };
        let Ok(meta) = fs::metadata(&lock) else { continue };
        let id = (major(meta.dev()), minor(meta.dev()), meta.ino());
        for holder in holders
            .iter()
            .filter(|holder| holder.file == id && runs(holder.pid, PROGRAM))
        {
            if let Some(process) = ProcessId::of(holder.pid) {
                let (host, vm, instance) = (host.clone(), vm.clone(), instance.clone());
                vmms.entry(holder.pid).or_insert(Vmm {
                    process,
                    vm,
                    host,
                    instance,
                });
            }
        }
    }
    vmms.into_values().collect()
}

/// Host, VM and instance of a file in a VMM's folder: `<root>/<host>/data/vms/<vm>/<instance>/<file>`.
fn place(root: &Path, file: &Path) -> Option<(String, String, String)> {
    let inside = file.strip_prefix(root).ok()?;
    let parts: Vec<_> = inside
        .components()
        .map(|part| part.as_os_str().to_str())
        .collect::<Option<_>>()?;
    match parts[..] {
        [host, "data", "vms", vm, instance, _] => Some((host.to_owned(), vm.to_owned(), instance.to_owned())),
        _ => None,
    }
}

/// The lock files of all VMMs that ever ran and have not been cleaned up.
fn lock_files(root: &Path) -> Vec<PathBuf> {
    let children = |dir: PathBuf| {
        fs::read_dir(dir)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
    };
    children(root.to_owned())
        .flat_map(|host| children(host.join("data/vms")))
        .flat_map(children)
        .map(|instance| instance.join("lock"))
        .filter(|lock| lock.is_file())
        .collect()
}

/// A lock that is held.
#[derive(Debug, PartialEq, Eq)]
struct Held {
    pid: i32,
    /// Device major and minor, inode.
    file: (u64, u64, u64),
}

/// The holders of whole-file locks in the text of `/proc/locks`, without those that wait.
fn parse_locks(text: &str) -> Vec<Held> {
    let parse = |line: &str| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let [_, "FLOCK", _, _, pid, file, ..] = fields[..] else {
            return None;
        };
        let mut id = file.split(':');
        let (major, minor, inode) = (id.next()?, id.next()?, id.next()?);
        let file = (
            u64::from_str_radix(major, 16).ok()?,
            u64::from_str_radix(minor, 16).ok()?,
            inode.parse().ok()?,
        );
        Some(Held {
            pid: pid.parse().ok()?,
            file,
        })
    };
    text.lines().filter_map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holders_are_read_and_waiters_are_not() {
        let text = "1: FLOCK  ADVISORY  WRITE 4242 00:1f:5678 0 EOF\n\
                    1: -> FLOCK  ADVISORY  WRITE 4243 00:1f:5678 0 EOF\n\
                    2: POSIX  ADVISORY  WRITE 99 fd:0a:12 128 128\n\
                    nonsense\n";
        assert_eq!(
            parse_locks(text),
            [Held {
                pid: 4242,
                file: (0, 0x1f, 5678)
            }]
        );
    }

    #[test]
    fn our_own_lock_is_seen_in_the_kernels_list() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let file = fs::File::create(&path).unwrap();
        let _held = nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusive).unwrap();
        let inode = fs::metadata(&path).unwrap().ino();
        let me = i32::try_from(std::process::id()).unwrap();
        let holders = parse_locks(&fs::read_to_string("/proc/locks").unwrap());
        assert!(
            holders.iter().any(|held| held.pid == me && held.file.2 == inode),
            "{holders:?}"
        );
    }

    #[test]
    fn a_vmms_folder_tells_host_vm_and_instance() {
        let root = Path::new("/s/dev");
        let file = Path::new("/s/dev/host1/data/vms/vm1/e3-m1/config.json");
        assert_eq!(
            place(root, file),
            Some(("host1".to_owned(), "vm1".to_owned(), "e3-m1".to_owned()))
        );
        assert_eq!(place(root, Path::new("/s/dev/host1/config.json")), None);
        assert_eq!(
            place(root, Path::new("/elsewhere/host1/data/vms/vm1/e3/config.json")),
            None
        );
    }

    #[test]
    fn a_held_lock_of_another_program_is_nobodys_vmm() {
        let dir = tempfile::tempdir().unwrap();
        let instance = dir.path().join("host1/data/vms/vm1/e1-start");
        fs::create_dir_all(&instance).unwrap();
        let file = fs::File::create(instance.join("lock")).unwrap();
        let _held = nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusive).unwrap();
        assert_eq!(lock_files(dir.path()), [instance.join("lock")]);
        assert_eq!(running(dir.path()), []);
    }
}
