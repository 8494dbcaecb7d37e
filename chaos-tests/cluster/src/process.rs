//! Processes that cannot outlive the test: all are started in one PID namespace whose first process dies with the
//! thread that made it; the kernel then kills everything inside, detached VMMs too (pid_namespaces(7)).
//!
//! ```text
//! test process ── thread "spawner" ── guard (pid 1 inside) : dies with the thread
//!                        └── drover-controller, drover-agent ── drover-vmm (reparented to the guard when its agent dies)
//! ```
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::mpsc;
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

/// Lets `command` start in the network namespace that `namespace` is open on.
pub fn enter_namespace(command: &mut Command, namespace: File) {
    // SAFETY: between fork and exec the closure makes one system call and touches no memory but its own descriptor.
    unsafe {
        command.pre_exec(move || setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET).map_err(io::Error::from));
    }
}

struct Order {
    command: Command,
    answer: mpsc::SyncSender<io::Result<Child>>,
}

/// Starts processes inside the PID namespace. Dropping it kills all of them.
pub struct Spawner {
    orders: Option<mpsc::SyncSender<Order>>,
    thread: Option<JoinHandle<()>>,
}

impl Spawner {
    /// A namespace with its guard.
    pub fn new() -> Result<Self> {
        let (orders, inbox) = mpsc::sync_channel::<Order>(1);
        let (ready, made) = mpsc::sync_channel(1);
        let thread = std::thread::spawn(move || {
            let guard = match start_guard() {
                Ok(guard) => guard,
                Err(error) => {
                    let _ = ready.send(Err(error));
                    return;
                }
            };
            let _ = ready.send(Ok(()));
            for Order { mut command, answer } in inbox {
                let _ = answer.send(command.spawn());
            }
            let _ = kill(guard, Signal::SIGKILL);
            let _ = waitpid(guard, None);
        });
        made.recv().map_err(|_| anyhow!("the spawner's thread ended"))??;
        Ok(Self {
            orders: Some(orders),
            thread: Some(thread),
        })
    }

    /// Starts `command` inside.
    pub fn spawn(&self, command: Command) -> Result<Child> {
        let (answer, child) = mpsc::sync_channel(1);
        let orders = self.orders.as_ref().expect("the sender is there until the drop");
        let what = format!("{command:?}");
        orders
            .send(Order { command, answer })
            .map_err(|_| anyhow!("the spawner's thread ended"))?;
        child
            .recv()
            .map_err(|_| anyhow!("the spawner's thread ended"))?
            .with_context(|| format!("starting {what}"))
    }
}

impl Drop for Spawner {
    fn drop(&mut self) {
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Makes the calling thread's children live in a new PID namespace and starts its first process, which does nothing but
/// reap orphans and die with this thread.
fn start_guard() -> Result<Pid> {
    unshare(CloneFlags::CLONE_NEWPID).context("making a PID namespace (needs root)")?;
    // SAFETY: the child calls only functions that are safe after a fork of a threaded process: four system calls.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()).context("starting the guard"),
        0 => {
            // SAFETY: system calls on the child itself; ignoring SIGCHLD makes the kernel reap every orphan
            // (sigaction(2)), and closing all descriptors lets go of the test's pipes and namespaces.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                libc::signal(libc::SIGCHLD, libc::SIG_IGN);
                libc::close_range(0, libc::c_uint::MAX, 0);
                loop {
                    libc::pause();
                }
            }
        }
        child => Ok(Pid::from_raw(child)),
    }
}

/// A daemon that the harness started.
pub struct Daemon {
    child: Child,
}

impl Daemon {
    /// Starts `command` inside `spawner`'s namespace.
    pub fn start(spawner: &Spawner, command: Command) -> Result<Self> {
        Ok(Self {
            child: spawner.spawn(command)?,
        })
    }

    /// Its number on this machine, outside the PID namespace.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).expect("the kernel's numbers fit"))
    }

    /// `kill -9`, and waits until it is gone.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Whether it has ended by itself; then how.
    pub fn ended(&mut self) -> Option<String> {
        self.child
            .try_wait()
            .ok()
            .flatten()
            .map(|status| status.to_string())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The processes, by this machine's numbers, that run `program` with `argument` standing in their command line.
pub fn find(program: &str, argument: &Path) -> Vec<Pid> {
    let wanted = argument.to_string_lossy();
    let mut found = Vec::new();
    let Ok(processes) = std::fs::read_dir("/proc") else {
        return found;
    };
    for entry in processes.flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<i32>().ok())
        else {
            continue;
        };
        let Ok(line) = std::fs::read(entry.path().join("cmdline")) else {
            continue;
        };
        let line = String::from_utf8_lossy(&line).into_owned();
        let mut words = line.split('\0');
        let runs = words.next().is_some_and(|first| first.ends_with(program));
        if runs && words.any(|word| word.starts_with(wanted.as_ref())) {
            found.push(Pid::from_raw(pid));
        }
    }
    found
}

/// `kill -9` of processes that are not the harness' children, and waits until they are gone.
pub fn kill_all(processes: &[Pid]) {
    for &pid in processes {
        let _ = kill(pid, Signal::SIGKILL);
    }
    for &pid in processes {
        crate::await_some(&format!("the end of process {pid}"), || match alive(pid) {
            true => Err("it lives".to_owned()),
            false => Ok(()),
        });
    }
}

/// Whether the process exists and is no zombie.
fn alive(pid: Pid) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return false;
    };
    // The state follows the command's name, which stands in brackets and may hold anything (proc(5)).
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| !rest.starts_with('Z') && !rest.starts_with('X'))
}
