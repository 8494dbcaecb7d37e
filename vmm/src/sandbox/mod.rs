//! The cage that a VMM steps into before its guest's first instruction.
//!
//! ```text
//!   open all that it will need ─► limits ─► own namespaces, empty root ─► own user, no capability ─► Landlock ─► system calls
//!        (`opened.rs`)                                                                                              │
//!   one thread until here                                            threads, the VM, the socket, grants ◄──────────┘
//! ```
//!
//! All of it is done by the process's only thread, so that every later one is born inside; each then gives up what its kind does not
//! need ([`narrow`]). What comes to be needed later, a disk that is attached, the sockets of a migration, a snapshot's files, the agent
//! opens and hands in ([`mod@offers`]): from here on this process opens, connects by name and executes nothing.
//!
//! The layers overlap on purpose. A host, or an agent without privileges, that cannot give one of them is told so by name
//! ([`Missing`]); what is [essential](Report::lacks_essential) must be there where the agent says `required`.
//!
//! No PID namespace: it takes a fork, so a second process that has to live and be known as long as the VM, and SO_PEERCRED, by which
//! an agent finds the process to kill, would name it from another namespace. What it would keep out, Landlock keeps out (signals to
//! others), and the list of system calls: `kill`, `ptrace`, `pidfd_open` are not on it, and `tgkill` only with this process's own id.

pub mod attempt;
pub mod filesystem;
pub mod identity;
pub mod offers;
pub mod syscalls;

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use drover_proto::descriptors::Kind;
use drover_proto::{Code, Fault};
use serde::Deserialize;
use tracing::{info, warn};

use self::offers::Offers;
use self::syscalls::Filters;
pub use self::syscalls::Thread;

/// Opened once for each NIC before nothing can be opened any more: a VM that freezes gives its tap back, and needs another descriptor
/// to have it again. The agent hands in one for each that was used.
const TUNS_A_NIC: usize = 8;
const TUN: &str = "/dev/net/tun";

/// How a VMM is to cage itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SandboxConfig {
    /// The user to become; only root can. Without it the process stays its agent's user.
    #[serde(default)]
    pub uid: Option<u32>,
    /// The group to become.
    #[serde(default)]
    pub gid: Option<u32>,
    /// Whether it is better not to run than to run without an essential layer.
    #[serde(default)]
    pub required: bool,
}

/// A part of the cage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    /// Bounds on what the process uses.
    Limits,
    /// Mounts, IPC, host name and networks of its own.
    Namespaces,
    /// An empty root folder.
    Root,
    /// A user of its own.
    User,
    /// No capability, none to be had again.
    Capabilities,
    /// No file by name.
    Landlock,
    /// No port, foreign process or abstract socket: what Landlock guards since Linux 6.12.
    Scope,
    /// System calls.
    Syscalls,
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Limits => "limits",
            Self::Namespaces => "namespaces",
            Self::Root => "empty root",
            Self::User => "own user",
            Self::Capabilities => "no capabilities",
            Self::Landlock => "Landlock",
            Self::Scope => "Landlock's scope",
            Self::Syscalls => "system calls",
        })
    }
}

/// A layer that could not be had, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// Which.
    pub layer: Layer,
    /// Why.
    pub why: String,
}

/// What became of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// What could not be had.
    pub missing: Vec<Missing>,
}

impl Report {
    /// Puts the layer on, or notes why it is missing.
    fn put(&mut self, layer: Layer, on: impl FnOnce() -> io::Result<()>) {
        if !attempt::has(layer) {
            return;
        }
        if let Err(error) = on() {
            let why = error.to_string();
            self.missing.push(Missing { layer, why });
        }
    }

    fn lacks(&self, layer: Layer) -> bool {
        self.missing.iter().any(|missing| missing.layer == layer)
    }

    /// Whether what is left is no cage: privileges, any system call, or the host's files.
    pub fn lacks_essential(&self) -> bool {
        let files = self.lacks(Layer::Landlock) && self.lacks(Layer::Root);
        files
            || [Layer::User, Layer::Capabilities, Layer::Syscalls]
                .iter()
                .any(|layer| self.lacks(*layer))
    }
}

impl fmt::Display for Report {
    /// `ok`, or what is missing.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.missing.is_empty() {
            return f.write_str("ok");
        }
        f.write_str(if self.lacks_essential() {
            "no sandbox: "
        } else {
            "without "
        })?;
        for (index, Missing { layer, why }) in self.missing.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(f, "{comma}{layer} ({why})")?;
        }
        Ok(())
    }
}

struct Inside {
    filters: Option<Filters>,
    offers: Offers,
}

static INSIDE: OnceLock<Inside> = OnceLock::new();

/// Whether this process is in its sandbox.
pub fn entered() -> bool {
    INSIDE.get().is_some()
}

/// Puts on what can be had, in this order: each takes what the next ones need no more.
fn layers(config: &SandboxConfig, folder: &Path, root: bool) -> (Report, Option<Filters>) {
    let mut report = Report::default();
    let points = filesystem::points();
    report.put(Layer::Limits, identity::limit);
    report.put(Layer::Namespaces, || {
        if !root {
            return Err(io::Error::other("the agent is not root"));
        }
        filesystem::own_namespaces()
    });
    // Mounted where everybody sees it the empty root would be everybody's.
    let apart = root && !report.lacks(Layer::Namespaces) && attempt::has(Layer::Namespaces);
    report.put(Layer::Root, || {
        if !apart {
            return Err(io::Error::other("no mounts of its own"));
        }
        filesystem::empty_root(folder, points.as_deref())
    });
    if root {
        report.put(Layer::User, || match (config.uid, config.gid) {
            (Some(uid), Some(gid)) => identity::become_user(uid, gid),
            _ => Err(io::Error::other("the agent names none")),
        });
    }
    report.put(Layer::Capabilities, identity::drop_capabilities);
    let mut older = Ok(());
    report.put(Layer::Landlock, || {
        older = filesystem::restrict(points.as_deref())?;
        Ok(())
    });
    report.put(Layer::Scope, || older.map_err(io::Error::other));
    let mut filters = None;
    report.put(Layer::Syscalls, || {
        let made = Filters::new().and_then(|filters| filters.enter().map(|()| filters));
        filters = Some(made.map_err(io::Error::other)?);
        Ok(())
    });
    (report, filters)
}

/// Steps in. To be called by the only thread of the process, with everything open that it needs; `folder` is any folder of this mount
/// namespace, over which the empty root is mounted, unseen by others. `nics`: for how many the host's network stays within reach.
///
/// # Errors
/// `vmm_start_failed`: an essential layer is missing, and `config` requires it. Then the process must end.
pub fn enter(config: &SandboxConfig, folder: &Path, nics: usize) -> Result<Report, Fault> {
    let owner = nix::unistd::geteuid().as_raw();
    let offers = Offers::new(owner);
    for _ in 0..nics * TUNS_A_NIC {
        match open_tun() {
            Ok(tun) => offers.put(Kind::Tun, "", vec![tun.into()]),
            // The VM's NICs say why when they need one.
            Err(error) => warn!(%error, "{TUN}"),
        }
    }
    let (report, filters) = layers(config, folder, owner == 0);
    if config.required && report.lacks_essential() {
        return Err(Fault::new(
            Code::VmmStartFailed,
            format!("the agent requires a sandbox, and this host gives none: {report}"),
        ));
    }
    if report.missing.is_empty() {
        info!("in its sandbox");
    } else {
        warn!("in its sandbox {report}");
    }
    if INSIDE.set(Inside { filters, offers }).is_err() {
        return Err(Fault::new(Code::Internal, "a sandbox is entered once"));
    }
    Ok(report)
}

/// The calling thread, born inside, keeps only the system calls of its kind. Nothing outside of a sandbox.
pub fn narrow(thread: Thread) {
    let Some(inside) = INSIDE.get() else { return };
    if let Some(filters) = &inside.filters
        && let Err(error) = filters.narrow(thread)
    {
        // It stays in the process's own list.
        tracing::error!(%error, ?thread, "a thread keeps system calls that it does not need");
    }
    attempt::reach(thread);
}

/// What was handed in; `None` outside of a sandbox.
pub fn offers() -> Option<&'static Offers> {
    INSIDE.get().map(|inside| &inside.offers)
}

/// Opens a disk's file: one that was handed in, where nothing can be opened.
///
/// # Errors
/// What the kernel says; inside, `PermissionDenied`: it was not handed in.
pub fn open_file(path: &Path, read_only: bool) -> io::Result<File> {
    let Some(offers) = offers() else {
        return File::options().read(true).write(!read_only).open(path);
    };
    let name = path.to_string_lossy();
    offers.take(Kind::File, &name).map(File::from).ok_or_else(|| {
        let what = "this VMM is in its sandbox, and its agent has not handed the file in";
        io::Error::new(io::ErrorKind::PermissionDenied, what)
    })
}

/// A descriptor of `/dev/net/tun` that is no tap yet.
///
/// # Errors
/// What the kernel says; inside, `PermissionDenied`: those that were handed in are used up.
pub fn tun() -> io::Result<File> {
    let Some(offers) = offers() else {
        return open_tun();
    };
    let handed = offers.take(Kind::Tun, "").map(File::from).ok_or_else(|| {
        let what = "this VMM is in its sandbox, and its agent has handed in no further tun descriptor";
        io::Error::new(io::ErrorKind::PermissionDenied, what)
    })?;
    // However it was opened: who waits for a frame would hold its NIC's state until one comes.
    rustix::fs::fcntl_setfl(&handed, rustix::fs::OFlags::NONBLOCK)?;
    Ok(handed)
}

/// Takes back a descriptor that did not become a tap.
pub fn return_tun(tun: File) {
    if let Some(offers) = offers() {
        offers.put(Kind::Tun, "", vec![tun.into()]);
    }
}

fn open_tun() -> io::Result<File> {
    File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(TUN)
}

fn not_handed_in(what: &str, migration: &str) -> Fault {
    Fault::new(
        Code::Denied,
        format!(
            "this VMM is in its sandbox, and its agent has not handed in {what} for migration {migration}"
        ),
    )
}

/// A socket to connect by in `migration`; outside of a sandbox none, and none is needed.
///
/// # Errors
/// `denied`: none was handed in, or all are used.
pub fn socket(migration: &str) -> Result<Option<OwnedFd>, Fault> {
    let Some(offers) = offers() else { return Ok(None) };
    let socket = offers.take(Kind::Tcp, migration);
    socket
        .map(Some)
        .ok_or_else(|| not_handed_in("a socket", migration))
}

/// CA, certificate and key for `migration`; as [`socket`].
///
/// # Errors
/// `denied`: they were not handed in.
pub fn tls(migration: &str) -> Result<Option<[File; 3]>, Fault> {
    let Some(offers) = offers() else { return Ok(None) };
    let files = offers.all(Kind::Tls, migration);
    let files: Option<[OwnedFd; 3]> = files.and_then(|files| files.try_into().ok());
    let files = files.ok_or_else(|| not_handed_in("its host's certificate", migration))?;
    Ok(Some(files.map(File::from)))
}

/// A connection to the VMM that waits at `path`, and the user who made that VMM's socket; as [`socket`].
///
/// # Errors
/// `denied`: it was not handed in.
pub fn peer(path: &Path) -> Result<Option<(UnixStream, u32)>, Fault> {
    let Some(offers) = offers() else { return Ok(None) };
    let name = path.to_string_lossy();
    let peer = offers.take(Kind::Peer, &name).ok_or_else(|| {
        let what = "this VMM is in its sandbox, and its agent has handed in no connection to";
        Fault::new(Code::Denied, format!("{what} {name}"))
    })?;
    Ok(Some((UnixStream::from(peer), offers.owner())))
}

/// What was handed in for a snapshot.
#[derive(Debug, Default)]
pub struct ForSnapshot {
    /// Its files, by their paths.
    pub files: BTreeMap<PathBuf, File>,
    /// `/dev/userfaultfd`.
    pub uffd: Option<File>,
}

/// All that was handed in for the snapshot in `folder`, of which nothing stays with the offers; `None` outside of a sandbox.
pub fn for_snapshot(folder: &Path) -> Option<ForSnapshot> {
    let offers = offers()?;
    let files = offers.take_snapshot(folder).into_iter();
    Some(ForSnapshot {
        files: files
            .map(|(path, file)| (PathBuf::from(path), File::from(file)))
            .collect(),
        uffd: offers.take(Kind::Uffd, "").map(File::from),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn without(layers: &[Layer]) -> Report {
        let mut report = Report::default();
        for layer in layers {
            report.put(*layer, || Err(io::Error::other("why")));
        }
        report
    }

    #[test]
    fn what_an_agent_without_privileges_cannot_give_is_said_and_not_essential() {
        let report = without(&[Layer::Namespaces, Layer::Root]);
        assert!(!report.lacks_essential());
        assert_eq!(report.to_string(), "without namespaces (why), empty root (why)");
        assert_eq!(without(&[]).to_string(), "ok");
    }

    #[test]
    fn files_need_one_of_two_layers_and_privileges_and_system_calls_their_own() {
        assert!(!without(&[Layer::Landlock]).lacks_essential());
        assert!(without(&[Layer::Landlock, Layer::Root]).lacks_essential());
        for essential in [Layer::User, Layer::Capabilities, Layer::Syscalls] {
            let report = without(&[essential]);
            assert!(report.lacks_essential());
            assert!(report.to_string().starts_with("no sandbox: "));
        }
    }
}
