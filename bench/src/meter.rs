//! Processor time and memory of the processes that take part in a move, read from `/proc` every few milliseconds, so that
//! what a process used is known although it ends in between (proc(5)).

use std::collections::HashMap;
use std::fs;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Result, anyhow};
use nix::unistd::{Pid, SysconfVar, sysconf};

/// Between two looks: what a process used in the last of them before it ended is missed.
const PERIOD: Duration = Duration::from_millis(10);

/// What the processes used since the meter was started.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    /// Processor seconds, user and system, the guest's own included.
    pub cpu_s: f64,
    /// Those that no vCPU thread used.
    pub cpu_less_vcpus_s: f64,
    /// The most private memory of one process beyond what the first had at the start.
    pub extra_mib: f64,
}

/// A running measurement.
pub struct Meter {
    end: Sender<()>,
    thread: JoinHandle<Usage>,
}

/// One process in one look.
#[derive(Clone, Copy, Debug, Default)]
struct Look {
    ticks: u64,
    vcpu_ticks: u64,
    anon_kib: u64,
}

impl Meter {
    /// Measures `known` from now on, and whatever `find` finds later from its first moment. `find` is asked until it has an answer.
    pub fn start(known: &[Pid], find: impl Fn() -> Vec<Pid> + Send + 'static) -> Self {
        let before: HashMap<Pid, Look> = known.iter().map(|&pid| (pid, look(pid))).collect();
        let (end, ended) = channel();
        let thread = std::thread::spawn(move || {
            let rest_kib = before
                .values()
                .map(|look| look.anon_kib)
                .max()
                .unwrap_or_default();
            let (mut now, mut peak_kib, mut found) = (before.clone(), rest_kib, false);
            loop {
                let over = ended.recv_timeout(PERIOD) != Err(RecvTimeoutError::Timeout);
                if !found {
                    let new = find();
                    found = !new.is_empty();
                    now.extend(new.into_iter().map(|pid| (pid, Look::default())));
                }
                for (&pid, last) in &mut now {
                    let seen = look(pid);
                    last.ticks = last.ticks.max(seen.ticks);
                    last.vcpu_ticks = last.vcpu_ticks.max(seen.vcpu_ticks);
                    peak_kib = peak_kib.max(seen.anon_kib);
                }
                if over {
                    return usage(&before, &now, peak_kib - rest_kib);
                }
            }
        });
        Self { end, thread }
    }

    /// Looks once more and ends.
    pub fn stop(self) -> Result<Usage> {
        drop(self.end);
        self.thread
            .join()
            .map_err(|_| anyhow!("the thread that reads /proc panicked"))
    }
}

fn usage(before: &HashMap<Pid, Look>, now: &HashMap<Pid, Look>, extra_kib: u64) -> Usage {
    let ticks_per_s = sysconf(SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100) as f64;
    let used = |part: fn(&Look) -> u64| -> f64 {
        let ticks: u64 = now
            .iter()
            .map(|(pid, look)| part(look) - before.get(pid).map_or(0, part).min(part(look)))
            .sum();
        ticks as f64 / ticks_per_s
    };
    let cpu_s = used(|look| look.ticks);
    Usage {
        cpu_s,
        cpu_less_vcpus_s: (cpu_s - used(|look| look.vcpu_ticks)).max(0.0),
        extra_mib: extra_kib as f64 / 1024.0,
    }
}

/// Nothing for a process that is gone.
fn look(pid: Pid) -> Look {
    let read = |file: String| fs::read_to_string(file).unwrap_or_default();
    let mut vcpu_ticks = 0;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten()
    {
        let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        if is_vcpu(&stat) {
            vcpu_ticks += ticks_in(&stat);
        }
    }
    Look {
        ticks: ticks_in(&read(format!("/proc/{pid}/stat"))),
        vcpu_ticks,
        anon_kib: anon_kib_in(&read(format!("/proc/{pid}/status"))),
    }
}

/// Fields 14 and 15: user and system time. The name in field 2 may hold anything, so counting begins after its last bracket.
fn ticks_in(stat: &str) -> u64 {
    let fields = stat.rsplit_once(") ").map_or("", |(_, fields)| fields);
    let times = fields.split_whitespace().skip(11).take(2);
    times.filter_map(|field| field.parse::<u64>().ok()).sum()
}

/// Ours are called `vcpu0`, QEMU's `CPU 0/KVM`.
fn is_vcpu(stat: &str) -> bool {
    stat.split_once('(')
        .is_some_and(|(_, name)| name.starts_with("vcpu") || name.starts_with("CPU "))
}

/// Private memory; the guest's, where it is shared, is counted elsewhere by the kernel.
fn anon_kib_in(status: &str) -> u64 {
    status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))
        .and_then(|value| value.split_whitespace().next()?.parse().ok())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_behind_any_name() {
        let stat = "7 (a) b (c) S 5 7 7 0 -1 4194304 1 2 3 4 250 50 0 0 20 0 1";
        assert_eq!(ticks_in(stat), 300);
        assert_eq!(ticks_in("7 (a"), 0);
        assert!(is_vcpu("8 (CPU 0/KVM) S 1") && is_vcpu("9 (vcpu1) R 1") && !is_vcpu("9 (outgoing) R"));
        assert_eq!(anon_kib_in("Name: x\nRssAnon:\t    1234 kB\nRssFile: 1 kB"), 1234);
    }

    #[test]
    fn a_process_that_works_is_seen_to_work() {
        let meter = Meter::start(&[Pid::this()], Vec::new);
        let before = look(Pid::this()).ticks;
        let mut sum = 0u64;
        while look(Pid::this()).ticks < before + 3 {
            sum = (0..10_000u64).fold(sum, |sum, more| std::hint::black_box(sum ^ more));
        }
        let usage = meter.stop().unwrap();
        assert!(usage.cpu_s >= 0.03, "{usage:?}");
    }
}
