//! VMM processes: started so that they outlive the agent, and watched by the lock they hold, not by process ids.
//!
//! Who gets a VMM's `lock` decides what it is: the VMM holds it for its life, and an agent that gets it has given the VMM up,
//! keeps the lock, and so makes sure that a VMM which was slow to start ends at once. Only a VMM that this agent did not start
//! is asked by its lock; of its own child an agent knows by waiting for it. One that is to end and does not is killed: our child by
//! its id, which is its own until we have waited for it; another by the id that the kernel gives for its socket, while its lock is
//! held. What a VMM says of itself is not asked for that: one that hangs says nothing.
#![allow(unsafe_code, reason = "pre_exec, for setsid and prctl in the child")]

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::net::UnixStream;
use tokio::process::Child;
use tokio::sync::oneshot;

use super::cgroup::Entrances;

/// Longest path of a Unix socket: `sun_path` holds 108 bytes with the closing zero (unix(7)).
const SOCKET_PATH_MAX: usize = 107;
/// A VMM's socket, in its folder.
const SOCKET: &str = "vmm.sock";
/// The end of a log that is searched for an error, bytes.
const LOG_TAIL_BYTES: u64 = 16 * 1024;
/// Longest error taken from a log, characters.
const LOG_ERROR_MAX: usize = 400;

/// The lock of a VMM that is gone; held so that it cannot come back.
pub struct Abandoned(#[allow(dead_code, reason = "held, not read")] Flock<File>);

/// Starts `program --config <folder>/config.json` in a session of its own, its output in `<folder>/vmm.log`, in control groups of its own.
pub fn spawn(program: &Path, folder: &Path, mut groups: Entrances) -> io::Result<Child> {
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(folder.join("vmm.log"))?;
    let mut command = Command::new(program);
    command
        .arg("--config")
        .arg(folder.join("config.json"))
        .current_dir(folder)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    // SAFETY: between fork and exec the closure makes a few system calls, which are async-signal-safe (signal-safety(7)).
    unsafe {
        command.pre_exec(move || {
            groups.join()?;
            // What the agent may do to the host's networks is not for its VMMs (PR_CAP_AMBIENT(2const)).
            if libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) < 0 {
                return Err(io::Error::last_os_error());
            }
            nix::unistd::setsid().map(drop).map_err(io::Error::from)
        });
    }
    tokio::process::Command::from(command).spawn()
}

/// Connects to the VMM of `folder`; a path too long for a socket's address is reached through its folder's descriptor.
pub async fn connect(folder: &Path) -> io::Result<UnixStream> {
    let (path, _through) = fitting(folder, SOCKET)?;
    UnixStream::connect(path).await
}

/// A path of the socket `name` in `folder` that fits its address, for as long as what comes with it is open.
pub fn fitting(folder: &Path, name: &str) -> io::Result<(PathBuf, Option<File>)> {
    let path = folder.join(name);
    if path.as_os_str().len() <= SOCKET_PATH_MAX {
        return Ok((path, None));
    }
    let folder = File::open(folder)?;
    let path = format!("/proc/self/fd/{}/{name}", folder.as_raw_fd());
    Ok((path.into(), Some(folder)))
}

/// Whether the VMM of `folder`, which this agent did not start, is gone: then its lock is ours.
pub fn take_lock(folder: &Path) -> io::Result<Option<Abandoned>> {
    match Flock::lock(open_lock(folder)?, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(Abandoned(lock))),
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, errno)) => Err(errno.into()),
    }
}

/// Resolves when the VMM of `folder` is gone, with its lock. Waits in a thread of its own, since only a blocked thread is told
/// by the kernel; it ends with the VMM or with the agent.
pub async fn gone(folder: &Path) -> io::Result<Abandoned> {
    let file = open_lock(folder)?;
    let (answer, got) = oneshot::channel();
    std::thread::Builder::new()
        .name("vmm-lock".into())
        .spawn(move || {
            let mut file = file;
            let taken = loop {
                match Flock::lock(file, FlockArg::LockExclusive) {
                    Ok(lock) => break Ok(Abandoned(lock)),
                    Err((back, Errno::EINTR)) => file = back,
                    Err((_, errno)) => break Err(io::Error::from(errno)),
                }
            };
            let _ = answer.send(taken);
        })?;
    got.await.map_err(io::Error::other)?
}

fn open_lock(folder: &Path) -> io::Result<File> {
    OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(folder.join("lock"))
}

/// The process that listens on the socket of `folder`, whose VMM this agent did not start: the peer that `SO_PEERCRED` names is
/// the caller of listen(2) (unix(7)), and the VMM's lock, held, says that it lives.
pub async fn listener(folder: &Path) -> io::Result<u32> {
    let peer = connect(folder).await?.peer_cred()?;
    if take_lock(folder)?.is_some() {
        return Err(io::Error::other("its lock is free: it is gone"));
    }
    peer.pid()
        .and_then(|pid| u32::try_from(pid).ok())
        .ok_or_else(|| io::Error::other("the kernel names no process for its socket"))
}

/// Ends a VMM that does not end itself. `pid` must be known to be its own.
pub fn kill_hard(pid: u32) -> io::Result<()> {
    match i32::try_from(pid) {
        Ok(pid) if pid > 1 => Ok(kill(Pid::from_raw(pid), Signal::SIGKILL)?),
        _ => Err(io::Error::other(format!("{pid} is no VMM's process"))),
    }
}

/// The last error in the VMM's log; `None` when it tells of none.
pub fn last_error(folder: &Path) -> Option<String> {
    let mut log = File::open(folder.join("vmm.log")).ok()?;
    let length = log.metadata().ok()?.len();
    log.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES)))
        .ok()?;
    let mut tail = Vec::new();
    log.take(LOG_TAIL_BYTES).read_to_end(&mut tail).ok()?;
    let tail = String::from_utf8_lossy(&tail);
    // Not only the VMM writes there: so do the loader that does not find a library and a panic.
    let tells = |line: &&str| {
        let line = line.to_ascii_lowercase();
        line.contains("error") || line.contains("panicked")
    };
    let plain = without_escapes(tail.lines().rev().find(tells)?.trim());
    Some(plain.chars().take(LOG_ERROR_MAX).collect())
}

/// Drops terminal colours: ESC, "[", up to the letter that ends the sequence (ECMA-48 §5.4).
fn without_escapes(line: &str) -> String {
    let mut plain = String::with_capacity(line.len());
    let mut chars = line.chars();
    while let Some(char) = chars.next() {
        if char == '\u{1b}' {
            let _ = chars
                .by_ref()
                .skip_while(|next| *next == '[')
                .find(char::is_ascii_alphabetic);
        } else if !char.is_control() {
            plain.push(char);
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_end_of_a_lock_holder_is_noticed_and_the_lock_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let held = take_lock(dir.path()).unwrap().expect("nobody holds it");
        assert!(take_lock(dir.path()).unwrap().is_none());
        let folder = dir.path().to_owned();
        let waiting = tokio::spawn(async move { gone(&folder).await });
        drop(held);
        let taken = waiting.await.unwrap().unwrap();
        assert!(
            take_lock(dir.path()).unwrap().is_none(),
            "an abandoned VMM could come back"
        );
        drop(taken);
    }

    #[tokio::test]
    async fn a_socket_whose_path_is_too_long_for_its_address_is_reached() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("a".repeat(120));
        std::fs::create_dir(&folder).unwrap();
        assert!(connect(&folder).await.is_err());
        let through = File::open(&folder).unwrap();
        let _listener =
            tokio::net::UnixListener::bind(format!("/proc/self/fd/{}/vmm.sock", through.as_raw_fd()))
                .unwrap();
        assert!(connect(&folder).await.is_ok());
    }

    #[tokio::test]
    async fn a_listener_is_known_by_the_kernels_word_while_the_lock_is_held() {
        let dir = tempfile::tempdir().unwrap();
        assert!(listener(dir.path()).await.is_err(), "nobody listens");
        let _socket = tokio::net::UnixListener::bind(dir.path().join(SOCKET)).unwrap();
        assert!(listener(dir.path()).await.is_err(), "nobody holds the lock");
        let _held = take_lock(dir.path()).unwrap();
        assert_eq!(listener(dir.path()).await.unwrap(), std::process::id());
    }

    #[test]
    fn the_last_error_of_a_log_is_found_without_colours() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(last_error(dir.path()), None);
        let log =
            "INFO starts\n\u{1b}[2m12:00\u{1b}[0m \u{1b}[31mERROR\u{1b}[0m vmm: no kernel\nINFO ends\n\n";
        std::fs::write(dir.path().join("vmm.log"), log).unwrap();
        assert_eq!(last_error(dir.path()).unwrap(), "12:00 ERROR vmm: no kernel");
        std::fs::write(dir.path().join("vmm.log"), "INFO nothing of note\n").unwrap();
        assert_eq!(last_error(dir.path()), None);
        std::fs::write(dir.path().join("vmm.log"), "vmm: error while loading libx.so\n").unwrap();
        assert_eq!(
            last_error(dir.path()).unwrap(),
            "vmm: error while loading libx.so"
        );
    }
}
