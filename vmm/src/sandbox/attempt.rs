//! What must not work, tried on purpose from inside: only in a build for tests.
//!
//! `DROVER_ATTEMPT=<thread>:<what>` makes the first thread of that kind try it once, as code would that a guest has taken over, and say
//! what came of it in the log: `attempt: <what>: <outcome>`. An attempt that is answered by the process's end says nothing.
//!
//! `DROVER_SANDBOX_ONLY=<layers>` leaves all other layers away, so that each is seen to hold by itself what others hold too.

use super::{Layer, Thread};

/// Whether a layer is to be put on. Always without the feature `chaos`.
#[cfg(not(feature = "chaos"))]
#[inline(always)]
pub const fn has(_layer: Layer) -> bool {
    true
}

/// Tries what the environment says, if it is for this thread. Nothing without the feature `chaos`.
#[cfg(not(feature = "chaos"))]
#[inline(always)]
pub fn reach(_thread: Thread) {}

#[cfg(feature = "chaos")]
pub use tried::{has, reach};

#[cfg(feature = "chaos")]
#[allow(unsafe_code, reason = "system calls are made as a stranger would make them")]
mod tried {
    use std::ffi::CString;
    use std::io;
    use std::sync::atomic::{AtomicBool, Ordering};

    use std::net::TcpStream;
    use std::os::unix::net::UnixStream;

    use super::{Layer, Thread};

    /// Whether a layer is to be put on.
    pub fn has(layer: Layer) -> bool {
        let only = std::env::var("DROVER_SANDBOX_ONLY");
        only.map_or(true, |only| only.split(',').any(|name| name == layer.to_string()))
    }

    /// Tries what the environment says, if it is for this thread.
    pub fn reach(thread: Thread) {
        static DONE: AtomicBool = AtomicBool::new(false);
        let Ok(asked) = std::env::var("DROVER_ATTEMPT") else {
            return;
        };
        let Some((kind, what)) = asked.split_once(':') else {
            return;
        };
        if kind != thread.name() || DONE.swap(true, Ordering::SeqCst) {
            return;
        }
        let (what, argument) = what.split_once('=').unwrap_or((what, ""));
        tracing::info!("attempt begins: {what}");
        match attempt(what, argument) {
            Ok(value) => tracing::error!("attempt: {what}: done, {value}"),
            Err(error) => tracing::info!("attempt: {what}: refused, {error}"),
        }
    }

    fn call(number: libc::c_long, arguments: [libc::c_long; 6]) -> io::Result<libc::c_long> {
        let [a, b, c, d, e, f] = arguments;
        // SAFETY: every pointer among the arguments is of memory that lives until the call's end; what the call does to this process is
        // what the test is about.
        match unsafe { libc::syscall(number, a, b, c, d, e, f) } {
            -1 => Err(io::Error::last_os_error()),
            value => Ok(value),
        }
    }

    fn socket(family: libc::c_int) -> io::Result<libc::c_long> {
        let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC;
        call(libc::SYS_socket, [family.into(), kind.into(), 0, 0, 0, 0])
    }

    fn attempt(what: &str, argument: &str) -> io::Result<libc::c_long> {
        let path = CString::new(argument).map_err(io::Error::other)?;
        let at = path.as_ptr() as libc::c_long;
        let number: libc::c_long = argument.parse().unwrap_or(0);
        let here = libc::c_long::from(libc::AT_FDCWD);
        let kill = libc::c_long::from(libc::SIGKILL);
        match what {
            "open" => call(libc::SYS_openat, [here, at, libc::O_RDONLY.into(), 0, 0, 0]),
            "create" => {
                let flags = libc::O_WRONLY | libc::O_CREAT;
                call(libc::SYS_openat, [here, at, flags.into(), 0o600, 0, 0])
            }
            "socket" => socket(libc::AF_UNIX),
            "tcp" => {
                let port = u16::try_from(number).map_err(io::Error::other)?;
                TcpStream::connect(("127.0.0.1", port)).map(|_| 1)
            }
            "unix" => UnixStream::connect(argument).map(|_| 1),
            "list" => {
                let entries = std::fs::read_dir(argument)?.count();
                libc::c_long::try_from(entries).map_err(io::Error::other)
            }
            "exec" => call(libc::SYS_execve, [at, 0, 0, 0, 0, 0]),
            "fork" => call(libc::SYS_clone, [libc::SIGCHLD.into(), 0, 0, 0, 0, 0]),
            "fork3" => {
                let arguments = [0_u64, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0];
                let size = libc::c_long::try_from(size_of_val(&arguments)).map_err(io::Error::other)?;
                call(
                    libc::SYS_clone3,
                    [arguments.as_ptr() as libc::c_long, size, 0, 0, 0, 0],
                )
            }
            "ptrace" => call(libc::SYS_ptrace, [libc::PTRACE_ATTACH.into(), number, 0, 0, 0, 0]),
            "peek" => call(libc::SYS_process_vm_readv, [number, 0, 0, 0, 0, 0]),
            "kill" => call(libc::SYS_kill, [number, kill, 0, 0, 0, 0]),
            "tgkill" => call(libc::SYS_tgkill, [number, number, kill, 0, 0, 0]),
            "pidfd" => call(libc::SYS_pidfd_open, [number, 0, 0, 0, 0, 0]),
            "mount" => {
                let kind = c"tmpfs".as_ptr() as libc::c_long;
                call(libc::SYS_mount, [kind, at, kind, 0, 0, 0])
            }
            "root" => call(libc::SYS_setresuid, [0, 0, 0, 0, 0, 0]),
            "unshare" => call(libc::SYS_unshare, [libc::CLONE_NEWUSER.into(), 0, 0, 0, 0, 0]),
            "bpf" => call(libc::SYS_bpf, [0; 6]),
            "keyctl" => call(libc::SYS_keyctl, [0; 6]),
            "executable" => {
                let protection = libc::PROT_READ | libc::PROT_EXEC;
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                call(libc::SYS_mmap, [0, 4096, protection.into(), flags.into(), -1, 0])
            }
            "terminal" => call(libc::SYS_ioctl, [2, 0x5412, at, 0, 0, 0]), // TIOCSTI
            _ => Err(io::Error::other("no such attempt")),
        }
    }
}
