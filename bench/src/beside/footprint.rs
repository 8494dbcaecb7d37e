//! What a process holds of the machine's memory beside its guest's (proc(5), `smaps`).

use std::fs;

use anyhow::{Context, Result};
use nix::unistd::Pid;

/// Parts of the names of the files that guest memory lies in: ours, and QEMU's `memory-backend-memfd`.
const GUESTS: [&str; 2] = ["drover-guest", "memory-backend"];

/// Kibibytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Footprint {
    /// No other process has these pages: what one more VM costs.
    pub private_kib: u64,
    /// Of them, those that are no file's: heap, stacks, what was changed of the program.
    pub anon_kib: u64,
    /// Those and the process's part of shared ones, the program's text among them: of a VM that is alone on its host.
    pub pss_kib: u64,
}

impl Footprint {
    /// A process's now.
    pub fn of(pid: Pid) -> Result<Self> {
        let file = format!("/proc/{pid}/smaps");
        let text = fs::read_to_string(&file).with_context(|| format!("reading {file}"))?;
        Ok(Self::read(&text))
    }

    fn read(smaps: &str) -> Self {
        let (mut sum, mut guests) = (Self::default(), false);
        for line in smaps.lines() {
            let mut words = line.split_whitespace();
            let Some(first) = words.next() else { continue };
            let Some(key) = first.strip_suffix(':') else {
                // A mapping's head: its range, rights, place, device, file's number and name.
                guests = GUESTS.iter().any(|name| line.contains(name));
                continue;
            };
            let kib = words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
            match key {
                _ if guests => {}
                "Private_Clean" | "Private_Dirty" => sum.private_kib += kib,
                "Anonymous" => sum.anon_kib += kib,
                "Pss" => sum.pss_kib += kib,
                _ => {}
            }
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_memory_is_left_out_and_the_rest_is_summed_up() {
        let mapping = |head: &str, pss: u64, dirty: u64| {
            format!(
                "{head}\nSize: 999 kB\nPss: {pss} kB\nPss_Dirty: 3 kB\nPrivate_Clean: 1 kB\nPrivate_Dirty: {dirty} kB\nAnonymous: {dirty} kB\nVmFlags: rd wr\n"
            )
        };
        let text = [
            mapping("55d0-55d1 r-xp 00000000 fe:00 123    /usr/bin/drover-vmm", 40, 2),
            mapping(
                "7f00-7f01 rw-s 00000000 00:2a 7    /drover-guest (deleted)",
                5000,
                5000,
            ),
            mapping(
                "7f02-7f03 rw-s 00000000 00:01 9    /memfd:memory-backend-memfd (deleted)",
                6000,
                6000,
            ),
            mapping("7f04-7f05 rw-p 00000000 00:00 0", 10, 9),
        ]
        .concat();
        let expected = Footprint {
            private_kib: 13,
            anon_kib: 11,
            pss_kib: 50,
        };
        assert_eq!(Footprint::read(&text), expected);
    }
}
