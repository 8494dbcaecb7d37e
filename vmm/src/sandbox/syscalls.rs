//! Which system calls there are: one list for the process, from which each kind of thread keeps its own.
//!
//! | thread | keeps, beside what any thread needs |
//! | --- | --- |
//! | control | all of the process's list: its threads start the others |
//! | vCPU | KVM; ending a disk that its guest gave up |
//! | device | its disk's or tap's file, its interrupts |
//! | watch | pausing and resuming: KVM, locks of disks, taps |
//! | migration | the process's list, with `connect`: it may have to build the whole VM |
//! | offers | taking descriptors from the agent |
//! | snapshot | what a watch does, since it stops and resumes the VM; reading disks, writing and syncing its files; userfaultfd |
//! | snapshot's memory | userfaultfd, reading memory |
//! | snapshot's writer | writing at a place of a file that is open |
//!
//! Anything else ends the process at once (`SECCOMP_RET_KILL_PROCESS`), and with it the guest: it is either an attack or a mistake here.
//! On no list are: executing, a new process (only threads), tracing, another process's memory or signals, mounts, namespaces, users,
//! keys, BPF, and making a socket. Memory is never made executable. `ioctl` is let through by the device that it is for.
//!
//! A few calls are answered by an error instead, since libraries make them and do without: opening and looking up files by name (`EACCES`;
//! glibc looks at `/proc/sys/vm/overcommit_memory` when it trims a heap), and `clone3` (`ENOSYS`: glibc then uses `clone`, whose
//! flags can be looked at). The lists follow what the code calls; the tests, which run inside, hold them to it.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter,
};

use super::filesystem;

/// What kind of thread it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thread {
    /// Runs a vCPU.
    Vcpu,
    /// Serves a device, announces or ends one.
    Device,
    /// Watches the lease.
    Watch,
    /// Sends or receives the VM.
    Migration,
    /// Takes what the agent hands in.
    Offers,
    /// Takes a snapshot.
    Snapshot,
    /// Copies memory ahead of its writers.
    SnapshotMemory,
    /// Writes a snapshot's files.
    SnapshotWriter,
}

impl Thread {
    /// All kinds.
    pub const ALL: [Self; 8] = [
        Self::Vcpu,
        Self::Device,
        Self::Watch,
        Self::Migration,
        Self::Offers,
        Self::Snapshot,
        Self::SnapshotMemory,
        Self::SnapshotWriter,
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vcpu => "vcpu",
            Self::Device => "device",
            Self::Watch => "watch",
            Self::Migration => "migration",
            Self::Offers => "offers",
            Self::Snapshot => "snapshot",
            Self::SnapshotMemory => "snapshot-memory",
            Self::SnapshotWriter => "snapshot-writer",
        }
    }
}

/// Devices' ioctls by their letter (linux/ioctl.h); what is matched is the second byte of the request.
const IOCTL_KVM: u64 = 0xae;
const IOCTL_USERFAULTFD: u64 = 0xaa;
/// A request's letter.
const IOCTL_LETTER: u64 = 0xff00;
/// Of taps: TUNSETIFF, TUNSETVNETHDRSZ, TUNSETOFFLOAD.
const IOCTLS_TUN: [u64; 3] = [0x4004_54ca, 0x4004_54d8, 0x4004_54d0];
/// Of sockets: FIONBIO, SIOCOUTQ.
const IOCTLS_SOCKET: [u64; 2] = [0x5421, 0x5411];

/// What any thread needs: to run, wait, wake others, have memory, write to what is open, say what is wrong, start and end.
const ANY: [libc::c_long; 43] = [
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_geteuid,
    libc::SYS_lseek,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_newfstatat,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    // A thread that starts another of a kind: a list can only become shorter.
    libc::SYS_seccomp,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_statx,
    libc::SYS_timer_delete,
    libc::SYS_timer_settime,
    libc::SYS_timerfd_settime,
    libc::SYS_uname,
    libc::SYS_write,
    libc::SYS_writev,
];
/// Ends of disks: what was written is synced, their locks are taken and given back.
const LOCKS: [libc::c_long; 4] = [
    libc::SYS_fdatasync,
    libc::SYS_flock,
    libc::SYS_fsync,
    libc::SYS_nanosleep,
];
/// Reads and writes of files that are open.
const FILES: [libc::c_long; 6] = [
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
];
/// Sockets that are open.
const SOCKETS: [libc::c_long; 10] = [
    libc::SYS_accept4,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
];
/// Building a VM, which an upgrade's target does once it has the memory.
const STARTS: [libc::c_long; 3] = [
    libc::SYS_epoll_create1,
    libc::SYS_timer_create,
    libc::SYS_timerfd_create,
];
/// Answered with `EACCES`.
const BY_NAME: [libc::c_long; 9] = [
    libc::SYS_access,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_stat,
    libc::SYS_unlink,
];
/// What pause points need, in a build that has them: Landlock lets it be done in their folder alone.
const POINTS: [libc::c_long; 3] = [libc::SYS_openat, libc::SYS_rename, libc::SYS_stat];

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// The programs, made once.
pub struct Filters {
    process: Vec<BpfProgram>,
    threads: Vec<(Thread, BpfProgram)>,
}

fn condition(argument: u8, op: SeccompCmpOp, value: u64) -> Result<SeccompCondition, String> {
    let length = match op {
        // Protections, flags and requests are words of which the upper half is nobody's.
        SeccompCmpOp::MaskedEq(_) | SeccompCmpOp::Eq => SeccompCmpArgLen::Dword,
        _ => SeccompCmpArgLen::Qword,
    };
    SeccompCondition::new(argument, length, op, value).map_err(|error| error.to_string())
}

fn rule(argument: u8, op: SeccompCmpOp, value: u64) -> Result<SeccompRule, String> {
    SeccompRule::new(vec![condition(argument, op, value)?]).map_err(|error| error.to_string())
}

fn bits(value: libc::c_int) -> u64 {
    u64::from(value.unsigned_abs())
}

/// Whether there are pause points: in a build for tests, where a test says so.
fn has_points() -> bool {
    filesystem::points().is_some()
}

/// What any thread may, with the calls whose arguments matter.
fn any(ioctls: &[SeccompRule]) -> Result<Rules, String> {
    let free = |call: &libc::c_long| (*call, Vec::new());
    let mut rules: Rules = ANY.iter().chain(&BY_NAME).map(free).collect();
    if has_points() {
        rules.extend(POINTS.iter().map(free));
    }
    rules.insert(libc::SYS_clone3, Vec::new());
    let exec = bits(libc::PROT_EXEC);
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![rule(2, SeccompCmpOp::MaskedEq(exec), 0)?]);
    }
    let thread = bits(libc::CLONE_THREAD);
    rules.insert(
        libc::SYS_clone,
        vec![rule(0, SeccompCmpOp::MaskedEq(thread), thread)?],
    );
    let own = u64::from(std::process::id());
    rules.insert(libc::SYS_tgkill, vec![rule(0, SeccompCmpOp::Eq, own)?]);
    // Names of threads and of memory, and what a filter of its own takes.
    let options = [libc::PR_SET_NAME, 0x5356_4d41, libc::PR_SET_NO_NEW_PRIVS];
    let options = options.map(|option| rule(0, SeccompCmpOp::Eq, bits(option)));
    rules.insert(libc::SYS_prctl, options.into_iter().collect::<Result<_, _>>()?);
    if !ioctls.is_empty() {
        rules.insert(libc::SYS_ioctl, ioctls.to_vec());
    }
    Ok(rules)
}

fn letter(letter: u64) -> Result<SeccompRule, String> {
    rule(1, SeccompCmpOp::MaskedEq(IOCTL_LETTER), letter << 8)
}

fn requests(requests: &[u64]) -> Result<Vec<SeccompRule>, String> {
    let one = |request: &u64| rule(1, SeccompCmpOp::Eq, *request);
    requests.iter().map(one).collect()
}

/// The list of a kind of thread; `None`: the process's.
fn rules(thread: Option<Thread>) -> Result<Rules, String> {
    let (kvm, tun, socket) = (
        letter(IOCTL_KVM)?,
        requests(&IOCTLS_TUN)?,
        requests(&IOCTLS_SOCKET)?,
    );
    let uffd = letter(IOCTL_USERFAULTFD)?;
    let with_taps = || [vec![kvm.clone()], tun.clone()].concat();
    let all = || [with_taps(), socket.clone(), vec![uffd.clone()]].concat();
    const CONNECT: &[libc::c_long] = &[libc::SYS_connect];
    const REST: &[libc::c_long] = &[libc::SYS_nanosleep];
    const READ_AT: &[libc::c_long] = &[libc::SYS_pread64];
    const WRITE_AT: &[libc::c_long] = &[libc::SYS_pwrite64];
    const RESIZE: &[libc::c_long] = &[libc::SYS_ftruncate];
    let (ioctls, calls): (_, &[&[libc::c_long]]) = match thread {
        // The process's list is its migrations', since an upgrade's target is built by one, and begins all other threads.
        None | Some(Thread::Migration) => (all(), &[&LOCKS, &FILES, &SOCKETS, &STARTS, CONNECT]),
        Some(Thread::Vcpu | Thread::Watch) => (with_taps(), &[&LOCKS]),
        Some(Thread::Device) => (with_taps(), &[&LOCKS, &FILES]),
        Some(Thread::Offers) => (Vec::new(), &[&SOCKETS, REST]),
        Some(Thread::Snapshot) => (
            [with_taps(), vec![uffd.clone()]].concat(),
            &[&LOCKS, READ_AT, WRITE_AT, RESIZE],
        ),
        Some(Thread::SnapshotMemory) => (vec![uffd.clone()], &[READ_AT]),
        Some(Thread::SnapshotWriter) => (Vec::new(), &[WRITE_AT]),
    };
    let mut rules = any(&ioctls)?;
    rules.extend(calls.iter().copied().flatten().map(|call| (*call, Vec::new())));
    Ok(rules)
}

fn compile(rules: Rules, matched: SeccompAction, else_: SeccompAction) -> Result<BpfProgram, String> {
    let filter = SeccompFilter::new(rules, else_, matched, TargetArch::x86_64);
    let filter = filter.map_err(|error| error.to_string())?;
    BpfProgram::try_from(filter).map_err(|error| error.to_string())
}

/// Those of `calls` are answered with `errno`, whatever another filter says of them but to kill.
fn answered(calls: &[libc::c_long], errno: libc::c_int) -> Result<BpfProgram, String> {
    let errno = errno.unsigned_abs();
    let in_points = |call: &libc::c_long| has_points() && POINTS.contains(call);
    let rules = calls.iter().filter(|call| !in_points(call));
    let rules = rules.map(|call| (*call, Vec::new())).collect();
    compile(rules, SeccompAction::Errno(errno), SeccompAction::Allow)
}

fn allowed(thread: Option<Thread>) -> Result<BpfProgram, String> {
    compile(rules(thread)?, SeccompAction::Allow, SeccompAction::KillProcess)
}

impl Filters {
    /// Makes them.
    ///
    /// # Errors
    /// Why they cannot be made.
    pub fn new() -> Result<Self, String> {
        let threads = Thread::ALL.map(|thread| Ok::<_, String>((thread, allowed(Some(thread))?)));
        Ok(Self {
            process: vec![
                answered(&BY_NAME, libc::EACCES)?,
                answered(&[libc::SYS_clone3], libc::ENOSYS)?,
                allowed(None)?,
            ],
            threads: threads.into_iter().collect::<Result<_, _>>()?,
        })
    }

    /// From now on this thread, and those that it starts, have the process's list.
    ///
    /// # Errors
    /// The kernel takes no filter.
    pub fn enter(&self) -> Result<(), String> {
        let mut programs = self.process.iter();
        programs.try_for_each(|program| apply_filter(program).map_err(|error| error.to_string()))
    }

    /// From now on this thread, and those that it starts, have the list of `thread`.
    ///
    /// # Errors
    /// The kernel takes no filter.
    pub fn narrow(&self, thread: Thread) -> Result<(), String> {
        let program = self.threads.iter().find(|(kind, _)| *kind == thread);
        let (_, program) = program.ok_or("a kind of thread without a list")?;
        apply_filter(program).map_err(|error| error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What would let a process out.
    const NEVER: [libc::c_long; 36] = [
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_fork,
        libc::SYS_vfork,
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_process_madvise,
        libc::SYS_pidfd_open,
        libc::SYS_pidfd_getfd,
        libc::SYS_pidfd_send_signal,
        libc::SYS_kill,
        libc::SYS_tkill,
        libc::SYS_kexec_load,
        libc::SYS_kexec_file_load,
        libc::SYS_mount,
        libc::SYS_umount2,
        libc::SYS_fsopen,
        libc::SYS_fsmount,
        libc::SYS_move_mount,
        libc::SYS_open_tree,
        libc::SYS_pivot_root,
        libc::SYS_chroot,
        libc::SYS_setns,
        libc::SYS_unshare,
        libc::SYS_bpf,
        libc::SYS_keyctl,
        libc::SYS_add_key,
        libc::SYS_request_key,
        libc::SYS_socket,
        libc::SYS_bind,
        libc::SYS_setuid,
        libc::SYS_setresuid,
        libc::SYS_capset,
        libc::SYS_io_uring_setup,
        libc::SYS_open_by_handle_at,
    ];

    #[test]
    fn nothing_that_leads_out_is_on_any_list() {
        for thread in [None].into_iter().chain(Thread::ALL.map(Some)) {
            let rules = rules(thread).unwrap();
            for call in NEVER {
                assert!(!rules.contains_key(&call), "{thread:?} has system call {call}");
            }
        }
    }

    #[test]
    fn a_threads_list_is_part_of_the_processs() {
        let process = rules(None).unwrap();
        for thread in Thread::ALL {
            for (call, conditions) in rules(Some(thread)).unwrap() {
                let whole = process.get(&call).unwrap_or_else(|| panic!("{thread:?}: {call}"));
                assert!(
                    whole.is_empty() || conditions.iter().all(|one| whole.contains(one)),
                    "{thread:?}: {call}"
                );
            }
        }
    }

    #[test]
    fn only_migrations_connect_and_who_takes_what_is_handed_in_or_writes_files_has_no_device() {
        for thread in Thread::ALL {
            let rules = rules(Some(thread)).unwrap();
            assert_eq!(
                rules.contains_key(&libc::SYS_connect),
                thread == Thread::Migration
            );
            let has_none = matches!(thread, Thread::Offers | Thread::SnapshotWriter);
            assert_ne!(rules.contains_key(&libc::SYS_ioctl), has_none, "{thread:?}");
        }
    }

    #[test]
    fn the_programs_are_made() {
        let filters = Filters::new().unwrap();
        assert_eq!(
            (filters.process.len(), filters.threads.len()),
            (3, Thread::ALL.len())
        );
    }
}
