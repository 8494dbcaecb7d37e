//! A control group for each VMM, with limits on its memory and its threads, where this agent may make one.
//!
//! ```text
//!   version 1   memory:<agent's group>/drover/<agent>.<vm>.<folder>    pids:<agent's group>/drover/<agent>.<vm>.<folder>
//!   version 2   <the group above the agent's>/drover/<agent>.<vm>.<folder>
//! ```
//!
//! A guest, or a VMM that a guest has taken over, then takes from its host no more than its VM's memory and a bounded rest, and starts no
//! more than a bounded number of threads. The VMM joins before it is executed. A group goes with its VMM, and what an agent that died
//! left empty goes when the next one of the same folder starts: a group that is in use cannot be removed.
//!
//! Version 2 allows no processes in a group that passes controllers on. So the agent has to be alone in a group of its own below one that is
//! delegated to it (systemd: `Delegate=yes`, `DelegateSubgroup=agent`), or in the root group.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

use crate::key::Key;

/// Where control groups are mounted.
const MOUNT: &str = "/sys/fs/cgroup";
/// The group of all VMMs.
const GROUP: &str = "drover";
/// The agent's own group below a delegated one.
const OWN: &str = "agent";
/// What a VMM may take beside its guest's memory, MiB: itself, a migration (96 at most, docs/migration.md), page cache of its disks.
const REST_MIB: u64 = 256;
/// And for each so many MiB of the guest's one more: page tables, the process's and KVM's.
const MIB_A_MIB: u64 = 16;
/// Enough to tell the agents of one machine apart.
const AGENT_CHARS: usize = 8;
/// A VMM with 32 vCPUs, 31 devices, a migration of 16 streams and all threads that its socket may start has some 650.
const THREADS_MAX: u64 = 1024;

/// One controller's, or of version 2 all controllers', groups.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Hierarchy {
    /// The group that has VMMs' groups in it.
    parent: PathBuf,
    /// The files that limit memory and threads, where this hierarchy does.
    memory: Option<&'static str>,
    threads: Option<&'static str>,
    /// To be told first that it passes its controllers on: version 2.
    passes_on: bool,
}

/// Where VMMs' groups are made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cgroups {
    /// Which agent's: a short digest of its folder.
    agent: String,
    hierarchies: Vec<Hierarchy>,
}

/// The agent's group in the hierarchy of `controller`, by the text of `/proc/self/cgroup` (cgroups(7)); of version 2: "".
fn own_group<'a>(text: &'a str, controller: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':');
        let (controllers, path) = (parts.nth(1)?, parts.next()?);
        controllers
            .split(',')
            .any(|name| name == controller)
            .then_some(path)
    })
}

fn below(mount: &Path, group: &str) -> PathBuf {
    mount.join(group.trim_start_matches('/'))
}

/// What there is, by the text of `/proc/self/cgroup` and by whether the mount is of version 2.
fn plan(mount: &Path, unified: bool, own: &str) -> Result<Vec<Hierarchy>, String> {
    if unified {
        let group = own_group(own, "").ok_or("the agent is in no control group")?;
        let base = match group.trim_start_matches('/') {
            "" => mount.to_owned(),
            nested if nested.ends_with(&format!("/{OWN}")) => below(mount, nested.trim_end_matches(OWN)),
            other => {
                return Err(format!(
                    "the agent is in the control group /{other}, where none can be made beside it; want Delegate=yes and DelegateSubgroup={OWN} in its unit"
                ));
            }
        };
        return Ok(vec![Hierarchy {
            parent: base.join(GROUP),
            memory: Some("memory.max"),
            threads: Some("pids.max"),
            passes_on: true,
        }]);
    }
    let one = |controller: &str, memory, threads| {
        let group = own_group(own, controller);
        let group = group.ok_or_else(|| format!("there are no control groups for {controller}"))?;
        Ok::<_, String>(Hierarchy {
            parent: below(&mount.join(controller), group).join(GROUP),
            memory,
            threads,
            passes_on: false,
        })
    };
    Ok(vec![
        one("memory", Some("memory.limit_in_bytes"), None)?,
        one("pids", None, Some("pids.max"))?,
    ])
}

/// Most memory of a VMM whose guest has `guest_mib`, bytes.
fn memory_max(guest_mib: u64) -> u64 {
    let rest = REST_MIB.saturating_add(guest_mib / MIB_A_MIB);
    guest_mib.saturating_add(rest).saturating_mul(1 << 20)
}

fn make(folder: &Path) -> io::Result<()> {
    match fs::create_dir(folder) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

impl Hierarchy {
    /// Makes the group of all VMMs, which passes its controllers on, and removes what an agent before left.
    fn prepare(&self, agent: &str) -> io::Result<()> {
        let pass_on = |folder: &Path| {
            if !self.passes_on {
                return Ok(());
            }
            fs::write(folder.join("cgroup.subtree_control"), "+memory +pids")
        };
        pass_on(self.parent.parent().unwrap_or(&self.parent))?;
        make(&self.parent)?;
        // It may be there and another user's.
        let probe = self.parent.join(format!("{agent}.probe"));
        make(&probe)?;
        fs::remove_dir(&probe)?;
        pass_on(&self.parent)?;
        for entry in fs::read_dir(&self.parent)?.flatten() {
            let name = entry.file_name();
            let rest = name.to_str().and_then(|name| name.strip_prefix(agent));
            if rest.is_some_and(|rest| rest.starts_with('.')) {
                // One that is in use stays.
                let _ = fs::remove_dir(entry.path());
            }
        }
        Ok(())
    }

    fn group(&self, name: &str, guest_mib: u64) -> io::Result<File> {
        let folder = self.parent.join(name);
        make(&folder)?;
        let limits = [(self.memory, memory_max(guest_mib)), (self.threads, THREADS_MAX)];
        for (file, value) in limits {
            if let Some(file) = file {
                fs::write(folder.join(file), value.to_string())?;
            }
        }
        OpenOptions::new().write(true).open(folder.join("cgroup.procs"))
    }
}

/// A VMM's groups, open for a process to join.
#[derive(Debug, Default)]
pub struct Entrances(Vec<File>);

impl Entrances {
    /// The calling process joins; between fork and exec, so one write each and nothing else.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn join(&mut self) -> io::Result<()> {
        // "0" is whoever writes it (cgroups(7)).
        self.0.iter_mut().try_for_each(|procs| procs.write_all(b"0"))
    }
}

impl Cgroups {
    /// Finds out where groups can be made for the VMMs of the agent with this folder.
    ///
    /// # Errors
    /// Why they cannot.
    pub fn find(data_dir: &Path) -> Result<Self, String> {
        let digest = blake3::hash(data_dir.as_os_str().as_encoded_bytes()).to_hex();
        let mount = Path::new(MOUNT);
        let own = fs::read_to_string("/proc/self/cgroup").map_err(|error| error.to_string())?;
        let unified = mount.join("cgroup.controllers").exists();
        let found = Self {
            agent: digest[..AGENT_CHARS].to_owned(),
            hierarchies: plan(mount, unified, &own)?,
        };
        for hierarchy in &found.hierarchies {
            let prepared = hierarchy.prepare(&found.agent);
            prepared.map_err(|error| format!("{}: {error}", hierarchy.parent.display()))?;
        }
        Ok(found)
    }

    /// Groups that cannot be made.
    #[cfg(test)]
    pub(crate) fn broken() -> Self {
        Self {
            agent: "0".repeat(AGENT_CHARS),
            hierarchies: vec![Hierarchy {
                parent: "/proc/no-group".into(),
                memory: None,
                threads: None,
                passes_on: false,
            }],
        }
    }

    fn name_of(&self, key: &Key) -> String {
        format!("{}.{}.{}", self.agent, key.vm, key.folder_name())
    }

    /// Makes the groups of a VMM that is about to be started, whose guest has `guest_mib`.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn make(&self, key: &Key, guest_mib: u64) -> io::Result<Entrances> {
        let name = self.name_of(key);
        let groups = self
            .hierarchies
            .iter()
            .map(|hierarchy| hierarchy.group(&name, guest_mib));
        Ok(Entrances(groups.collect::<Result<_, _>>()?))
    }

    /// Removes them; the VMM is gone.
    pub fn remove(&self, key: &Key) {
        for hierarchy in &self.hierarchies {
            let folder = hierarchy.parent.join(self.name_of(key));
            match fs::remove_dir(&folder) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    tracing::warn!("{}: {error}", folder.display());
                }
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_below_the_agents_own_and_of_version_2_beside_it() {
        let mount = Path::new("/m");
        let parents = |unified, own| {
            let planned = plan(mount, unified, own)?;
            Ok::<_, String>(planned.into_iter().map(|one| one.parent).collect::<Vec<_>>())
        };
        let old = "8:pids:/\n4:cpu,memory:/system.slice/a.service\n0::/\n";
        assert_eq!(
            parents(false, old).unwrap(),
            [
                Path::new("/m/memory/system.slice/a.service/drover"),
                Path::new("/m/pids/drover")
            ]
        );
        assert!(parents(false, "8:pids:/\n").unwrap_err().contains("memory"));
        assert_eq!(parents(true, "0::/\n").unwrap(), [Path::new("/m/drover")]);
        let delegated = "0::/system.slice/drover-agent.service/agent\n";
        assert_eq!(
            parents(true, delegated).unwrap(),
            [Path::new("/m/system.slice/drover-agent.service/drover")]
        );
        let plain = "0::/system.slice/drover-agent.service\n";
        assert!(parents(true, plain).unwrap_err().contains("Delegate=yes"));
    }

    #[test]
    fn a_limit_is_the_guests_memory_and_a_bounded_rest() {
        assert_eq!(memory_max(64), (64 + 4 + 256) << 20);
        assert_eq!(memory_max(1 << 20), ((1 << 20) + (1 << 16) + 256) << 20);
        assert_eq!(memory_max(u64::MAX), u64::MAX);
    }
}
