//! The VMMs' sandbox, as far as it is the agent's: what it asks of them, and what it hands in that they cannot open.
//!
//! What a VMM can have here it says itself: the installed one is asked (`--sandbox`), steps into its sandbox on trial, and names what it
//! lacks. One of before sandboxes does not know the question, and is told nothing of it.
//!
//! Descriptors go to the VMM's second socket before the call that needs them ([`drover_proto::descriptors`]). A VMM without that socket is
//! in no sandbox and opens for itself. This process keeps no copy: a disk's lock, and a tap, are had as long as any copy is open.

use std::fs::File;
use std::io::{self, IoSlice, Read};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use drover_pki::TlsFiles;
use drover_proto::descriptors::{COUNT_MAX, Kind, SOCKET, TAKEN, encode};
use drover_proto::v1::StartOutgoingRequest;
use drover_proto::{Code, Fault, LOCAL_PREFIX};
use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socket};
use nix::unistd::{User, geteuid};
use serde::Deserialize;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::config::Config;
use crate::host::cgroup::{Cgroups, Entrances};
use crate::host::process;
use crate::key::Key;
use crate::network::tap;

/// The user that VMMs become where the agent is root and is told no other, if there is one of this name.
const USER: &str = "drover-vmm";
/// Else this one: no distribution gives it out (systemd, docs/UIDS-GIDS.md, has nothing between its containers' and foreign users).
const USER_UNNAMED: u32 = 1_900_000_000;
/// What memory is protected with while a snapshot is taken.
const USERFAULTFD: &str = "/dev/userfaultfd";
/// A VMM takes what it is handed at once.
const TAKEN_IN: Duration = Duration::from_secs(2);
/// The installed VMM says what it can when the agent starts.
const ANSWER_IN: Duration = Duration::from_secs(10);
/// Longest refusal that is read, bytes.
const REFUSAL_BYTES_MAX: u64 = 1024;

/// What the configuration asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// VMMs have all of it that this host can give.
    #[default]
    BestEffort,
    /// A VMM that would lack an essential part does not start.
    Required,
    /// VMMs run as their agent does.
    Off,
}

/// A user and a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ids {
    /// The user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
}

/// See the module.
pub struct Sandbox {
    policy: Policy,
    user: Option<Ids>,
    /// What the installed VMM said; the error: it knows no sandbox.
    told: watch::Sender<Option<Result<String, String>>>,
    /// Where VMMs have control groups, or why they have none.
    groups: Result<Cgroups, String>,
}

/// Whom VMMs are to be: nobody else than the agent, unless that is root. `name`: what the configuration says.
///
/// # Errors
/// There is no such user, or it is root.
pub fn user(name: Option<&str>) -> Result<Option<Ids>, String> {
    if !geteuid().is_root() {
        return Ok(None);
    }
    let found = User::from_name(name.unwrap_or(USER)).map_err(|error| error.to_string())?;
    match (found, name) {
        (Some(user), _) if user.uid.is_root() => Err(format!("{:?} is root", user.name)),
        (Some(user), _) => Ok(Some(Ids {
            uid: user.uid.as_raw(),
            gid: user.gid.as_raw(),
        })),
        (None, Some(name)) => Err(format!("{name:?} is no user of this host")),
        (None, None) => Ok(Some(Ids {
            uid: USER_UNNAMED,
            gid: USER_UNNAMED,
        })),
    }
}

/// Who opens taps: the VMMs' user.
pub fn tap_owner(config: &Config) -> u32 {
    let user = user(config.vmm_user.as_deref()).unwrap_or_default();
    let user = user.filter(|_| config.sandbox != Policy::Off);
    user.map_or_else(|| geteuid().as_raw(), |user| user.uid)
}

impl Sandbox {
    /// As the configuration asks, which was checked.
    pub fn of(config: &Config) -> Self {
        let user = user(config.vmm_user.as_deref());
        let groups = match config.sandbox {
            Policy::Off => Ok(Cgroups::default()),
            _ => Cgroups::find(&config.data_dir),
        };
        if let Err(why) = &groups {
            tracing::warn!("VMMs have no control groups, so no limits on memory and threads: {why}");
        }
        Self::new(config.sandbox, user.unwrap_or_default(), groups)
    }

    /// For VMMs that become `user`.
    pub fn new(policy: Policy, user: Option<Ids>, groups: Result<Cgroups, String>) -> Self {
        Self {
            groups,
            policy,
            user: user.filter(|_| policy != Policy::Off),
            told: watch::Sender::new(None),
        }
    }

    /// How the installed VMM is asked what it can have here.
    pub fn question(&self) -> String {
        match self.user {
            Some(Ids { uid, gid }) => format!("--sandbox={uid}:{gid}"),
            None => "--sandbox".to_owned(),
        }
    }

    /// The installed VMM's answer.
    pub fn answered(&self, answer: &Result<String, String>) {
        if self.policy == Policy::Off {
            return;
        }
        self.told.send_if_modified(|told| {
            let changed = told.as_ref() != Some(answer);
            if changed {
                match answer {
                    Ok(what) if what == "ok" => tracing::info!("VMMs have their whole sandbox"),
                    Ok(what) => tracing::warn!("VMMs' sandbox: {what}"),
                    Err(why) => tracing::warn!("VMMs have no sandbox: {why}"),
                }
                *told = Some(answer.clone());
            }
            changed
        });
    }

    /// What is told of this host: `ok`, or what its VMMs lack.
    pub fn reported(&self) -> String {
        if self.policy == Policy::Off {
            return "it is switched off on this host (sandbox in its agent's configuration)".to_owned();
        }
        match (&*self.told.borrow(), &self.groups) {
            (None, _) => String::new(),
            (Some(Ok(what)), Ok(_)) => what.clone(),
            (Some(Ok(what)), Err(why)) if what == "ok" => format!("without control groups ({why})"),
            (Some(Ok(what)), Err(why)) => format!("{what}, control groups ({why})"),
            (Some(Err(why)), _) => format!("no sandbox: {why}"),
        }
    }

    /// Control groups for a VMM that is about to be started; none where there can be none.
    ///
    /// # Errors
    /// `vmm_start_failed`: a sandbox is required, and they can be had and cannot be made.
    pub fn groups(&self, key: &Key, guest_mib: u64) -> Result<Entrances, Fault> {
        let Ok(groups) = &self.groups else {
            return Ok(Entrances::default());
        };
        match groups.make(key, guest_mib) {
            Err(error) if self.policy == Policy::Required => {
                let message = format!("its control group: {error}");
                Err(Fault::new(Code::VmmStartFailed, message))
            }
            Err(error) => {
                tracing::warn!(vmm = %key, "no limits on memory and threads, its control group cannot be made: {error}");
                Ok(Entrances::default())
            }
            Ok(entrances) => Ok(entrances),
        }
    }

    /// The VMM is gone.
    pub fn gone(&self, key: &Key) {
        if let Ok(groups) = &self.groups {
            groups.remove(key);
        }
    }

    /// What a VMM's configuration says of it; nothing where it is to have none, or knows none.
    ///
    /// # Errors
    /// `vmm_start_failed`: it is required, and the installed VMM knows none.
    pub async fn of_vmm(&self) -> Result<Option<serde_json::Value>, Fault> {
        if self.policy == Policy::Off {
            return Ok(None);
        }
        let mut told = self.told.subscribe();
        let told = timeout(ANSWER_IN, told.wait_for(Option::is_some)).await;
        let told = told.map(|told| told.map(|told| told.clone()));
        let known = matches!(told, Ok(Ok(Some(Ok(_)))));
        let required = self.policy == Policy::Required;
        if !known && required {
            let why = self.reported();
            let message =
                format!("this host's agent requires a sandbox of its VMMs; the installed one: {why}");
            return Err(Fault::new(Code::VmmStartFailed, message));
        }
        let cage = |user: Option<Ids>| match user {
            Some(Ids { uid, gid }) => serde_json::json!({"uid": uid, "gid": gid, "required": required}),
            None => serde_json::json!({"required": required}),
        };
        Ok(known.then(|| cage(self.user)))
    }
}

fn failed(what: &str, error: &io::Error) -> Fault {
    Fault::new(
        Code::Internal,
        format!("{what} cannot be handed to the VMM: {error}"),
    )
}

/// Whether the VMM of `folder` is in its sandbox.
pub fn is_inside(folder: &Path) -> bool {
    folder.join(SOCKET).exists()
}

/// Hands what `open` opens to the VMM of `folder`, if that is in its sandbox.
async fn hand(
    folder: &Path,
    kind: Kind,
    name: &str,
    open: impl FnOnce() -> io::Result<Vec<OwnedFd>> + Send + 'static,
) -> Result<(), Fault> {
    if !is_inside(folder) {
        return Ok(());
    }
    let (folder, message) = (folder.to_owned(), encode(kind, name));
    let handed = tokio::task::spawn_blocking(move || send(&folder, &message, open()?));
    let handed = handed.await.map_err(io::Error::other).and_then(|sent| sent);
    handed.map_err(|error| failed(name, &error))
}

fn send(folder: &Path, message: &[u8], descriptors: Vec<OwnedFd>) -> io::Result<()> {
    let (path, _through) = process::fitting(folder, SOCKET)?;
    let mut stream = UnixStream::connect(path)?;
    stream.set_write_timeout(Some(TAKEN_IN))?;
    stream.set_read_timeout(Some(TAKEN_IN))?;
    let raw: Vec<_> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let sent = sendmsg::<()>(
        stream.as_raw_fd(),
        &[IoSlice::new(message)],
        &[ControlMessage::ScmRights(&raw)],
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    if sent != message.len() {
        return Err(io::Error::other(format!(
            "{sent} of {} bytes went out",
            message.len()
        )));
    }
    drop(descriptors);
    let mut answer = Vec::new();
    (&mut stream).take(REFUSAL_BYTES_MAX).read_to_end(&mut answer)?;
    if answer == TAKEN {
        return Ok(());
    }
    Err(io::Error::other(String::from_utf8_lossy(&answer).into_owned()))
}

/// Hands in a disk's file, for the call that names `path`.
///
/// # Errors
/// `disk_unusable`: it cannot be opened. `internal`: the VMM does not take it.
pub async fn hand_file(folder: &Path, path: &str, read_only: bool) -> Result<(), Fault> {
    let file = path.to_owned();
    let open = move || {
        let opened = File::options().read(true).write(!read_only).open(file)?;
        Ok(vec![opened.into()])
    };
    hand(folder, Kind::File, path, open).await
}

/// Hands in what the VMM needs for a snapshot: its files, by their paths, and what memory is protected with.
///
/// # Errors
/// `snapshot_unavailable`: this host's kernel, or its agent's user, has no `/dev/userfaultfd`. `internal`: the VMM does not take it.
pub async fn hand_snapshot(folder: &Path, files: Vec<(PathBuf, File)>) -> Result<(), Fault> {
    let device = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_CLOEXEC)
        .open(USERFAULTFD)
        .map_err(|error| {
            let message = format!(
                "a VMM in its sandbox takes a snapshot by {USERFAULTFD} (Linux 6.1), which its agent cannot open: {error}"
            );
            Fault::new(Code::SnapshotUnavailable, message)
        })?;
    hand(folder, Kind::Uffd, "", move || Ok(vec![device.into()])).await?;
    for (path, file) in files {
        let name = path.to_str().ok_or_else(|| {
            let message = format!("{} cannot be told to a VMM", path.display());
            Fault::new(Code::SnapshotFailed, message)
        })?;
        hand(folder, Kind::Snapshot, name, move || Ok(vec![file.into()])).await?;
    }
    Ok(())
}

/// Hands in `count` descriptors that can become taps in this process's network.
///
/// # Errors
/// `internal`
pub async fn hand_tuns(folder: &Path, count: usize) -> Result<(), Fault> {
    for _ in 0..count {
        let open = || Ok(vec![tap::usable()?.into()]);
        hand(folder, Kind::Tun, "", open).await?;
    }
    Ok(())
}

/// Hands in what the VMM needs to send its VM away: sockets and this host's identity, or a connection to the VMM that waits.
///
/// # Errors
/// `internal`
pub async fn hand_way(folder: &Path, tls: &TlsFiles, request: &StartOutgoingRequest) -> Result<(), Fault> {
    if let Some(path) = request.target_addr.strip_prefix(LOCAL_PREFIX) {
        let at = Path::new(path).to_owned();
        let open = move || {
            let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
            let folder = at.parent().ok_or_else(invalid)?;
            let name = at
                .file_name()
                .and_then(|name| name.to_str())
                .ok_or_else(invalid)?;
            let (path, _through) = process::fitting(folder, name)?;
            Ok(vec![UnixStream::connect(path)?.into()])
        };
        return hand(folder, Kind::Peer, path, open).await;
    }
    let id = &request.migration;
    let files = [tls.ca.clone(), tls.cert.clone(), tls.key.clone()];
    let open = move || {
        let opened = files.iter().map(|path| File::open(path).map(OwnedFd::from));
        opened.collect()
    };
    hand(folder, Kind::Tls, id, open).await?;
    let Ok(addr) = request.target_addr.parse::<SocketAddr>() else {
        return Ok(()); // The VMM says so by the field's name.
    };
    let family = if addr.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    let open = move || {
        let one = |_| socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).map_err(io::Error::from);
        (0..COUNT_MAX).map(one).collect()
    };
    hand(folder, Kind::Tcp, id, open).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_vmm_that_knows_no_sandbox_is_told_nothing_of_it_unless_one_is_required() {
        let answers = [
            (
                Policy::BestEffort,
                Err("unexpected argument".to_owned()),
                Ok(false),
            ),
            (Policy::BestEffort, Ok("without empty root".to_owned()), Ok(true)),
            (Policy::Required, Ok("ok".to_owned()), Ok(true)),
            (Policy::Required, Err("unexpected argument".to_owned()), Err(())),
        ];
        for (policy, answer, wanted) in answers {
            let sandbox = Sandbox::new(policy, Some(Ids { uid: 7, gid: 8 }), Ok(Cgroups::default()));
            sandbox.answered(&answer);
            let said = sandbox.of_vmm().await;
            let said = said.map(|said| said.is_some()).map_err(drop);
            assert_eq!(said, wanted, "{policy:?} {answer:?}");
        }
        let off = Sandbox::new(Policy::Off, Some(Ids { uid: 7, gid: 8 }), Ok(Cgroups::default()));
        assert_eq!(off.of_vmm().await.unwrap(), None);
    }

    #[test]
    fn a_group_that_cannot_be_made_costs_a_vm_its_start_only_where_a_sandbox_is_required() {
        let key = Key::start("vm1", 1);
        for (policy, starts) in [(Policy::BestEffort, true), (Policy::Required, false)] {
            let sandbox = Sandbox::new(policy, None, Ok(Cgroups::broken()));
            assert_eq!(sandbox.groups(&key, 64).is_ok(), starts, "{policy:?}");
        }
    }

    #[tokio::test]
    async fn a_vmm_in_no_sandbox_is_handed_nothing() {
        let dir = tempfile::tempdir().unwrap();
        hand_file(dir.path(), "/nowhere", true).await.unwrap();
        hand_tuns(dir.path(), 3).await.unwrap();
    }
}
