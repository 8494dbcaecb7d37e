//! The lines that the guest writes to its console, and how to read them back.
//!
//! Every line starts with `probe `. Fields are `name=value`; later versions may append fields, so read them by name.

use core::fmt;

use crate::ledger::Loss;
use crate::page::Damage;

/// Where the guest got the counter's frequency from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClockSource {
    /// The hypervisor's page.
    KvmClock,
    /// Measured against the 8254.
    Pit,
}

/// Said once, when every owned page has its first content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Up {
    /// Processors that work.
    pub cpus: u32,
    /// Owned pages.
    pub own_pages: u64,
    /// Pages that are rewritten.
    pub hot_pages: u64,
    /// The counter's frequency.
    pub tsc_khz: u64,
    /// How it was learnt.
    pub clock: ClockSource,
}

/// Said once a second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Second {
    /// Seconds since boot by the counter.
    pub t_s: u64,
    /// Timer ticks on processor 0 since boot.
    pub ticks: u64,
    /// Longest time between two ticks since the last such line.
    pub gap_us: u64,
    /// Longest ever.
    pub max_gap_us: u64,
    /// Pages written since boot.
    pub written: u64,
    /// Pages read back and compared since boot.
    pub verified: u64,
    /// Pages among them that did not hold what was last written.
    pub lost: u64,
    /// Times that the tick count, the counter or kvmclock went back.
    pub back: u64,
    /// The journal's, where there is one.
    pub disk: Option<DiskSecond>,
    /// The station's on the network, where there is one.
    pub net: Option<NetSecond>,
    /// The balloon's, where there is one.
    pub balloon: Option<BalloonSecond>,
    /// The load's on a disk, where there is one.
    pub disk_load: Option<DiskLoad>,
    /// The load's on a NIC, where there is one.
    pub net_load: Option<NetLoad>,
    /// The virtio console's, where there is one.
    pub console: Option<ConsoleSecond>,
}

/// Of the virtio console, with each line of a second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConsoleSecond {
    /// Lines said on it before this one.
    pub lines: u64,
    /// Lines that it did not take.
    pub unsaid: u64,
    /// Bytes typed on it.
    pub typed: u64,
}

/// Of the balloon, with each line of a second; all are pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BalloonSecond {
    /// In it.
    pub pages: u64,
    /// That it is to hold.
    pub target: u64,
    /// Reported free since boot.
    pub reported: u64,
    /// Taken back, written to, and not as they were when they went in again.
    pub lost: u64,
}

/// Of a benchmark's load on a disk: what was done since every block had its first content.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskLoad {
    /// Blocks read, all of them compared.
    pub reads: u64,
    /// Blocks written.
    pub writes: u64,
    /// Blocks that did not hold what they must, requests that failed, and requests that were never answered.
    pub lost: u64,
    /// When this was counted: microseconds since boot.
    pub at_us: u64,
}

/// Of a benchmark's load on a NIC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetLoad {
    /// Frames that the device has sent, or that came.
    pub frames: u64,
    /// Their bytes, without what the device adds.
    pub bytes: u64,
    /// Frames that came damaged.
    pub damaged: u64,
    /// When this was counted: microseconds since boot.
    pub at_us: u64,
}

/// Of the station on the network, with each line of a second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetSecond {
    /// Frames that came since boot.
    pub received: u64,
    /// Those among them that were answered.
    pub answered: u64,
    /// Interrupts for frames since boot.
    pub interrupts: u64,
}

/// Of the journal on the disk, with each line of a second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskSecond {
    /// The last sequence that a flush has covered, ever.
    pub sequence: u64,
    /// Blocks since boot that did not hold what they must, requests that failed, and requests that were never answered.
    pub lost: u64,
    /// Interrupts of the disk since boot.
    pub interrupts: u64,
}

/// Said once, when the journal that was on the disk has been read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskFound {
    /// The disk's size in sectors of 512 bytes.
    pub sectors: u64,
    /// The journal's blocks.
    pub blocks: u64,
    /// The last sequence that must have been acknowledged.
    pub sequence: u64,
    /// Blocks that do not hold what they must.
    pub lost: u64,
}

impl fmt::Display for Up {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let clock = match self.clock {
            ClockSource::KvmClock => "kvmclock",
            ClockSource::Pit => "pit",
        };
        let Up {
            cpus,
            own_pages,
            hot_pages,
            tsc_khz,
            ..
        } = self;
        write!(
            f,
            "probe up cpus={cpus} own={own_pages} hot={hot_pages} tsc_khz={tsc_khz} clock={clock}"
        )
    }
}

impl fmt::Display for DiskFound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let DiskFound {
            sectors,
            blocks,
            sequence,
            lost,
        } = self;
        write!(
            f,
            "probe disk sectors={sectors} blocks={blocks} found_seq={sequence} lost={lost}"
        )
    }
}

impl DiskFound {
    /// Reads the line back; `None` for any other line.
    #[must_use]
    pub fn parse(line: &str) -> Option<DiskFound> {
        let fields = line.trim_end().strip_prefix("probe disk ")?;
        Some(DiskFound {
            sectors: number(fields, "sectors")?,
            blocks: number(fields, "blocks")?,
            sequence: number(fields, "found_seq")?,
            lost: number(fields, "lost")?,
        })
    }
}

impl fmt::Display for Second {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Second {
            t_s,
            ticks,
            gap_us,
            max_gap_us,
            written,
            verified,
            lost,
            back,
            disk,
            net,
            balloon,
            disk_load,
            net_load,
            console,
        } = self;
        write!(
            f,
            "probe t={t_s} ticks={ticks} gap_us={gap_us} max_gap_us={max_gap_us} written={written} verified={verified} \
             lost={lost} back={back}"
        )?;
        if let Some(DiskSecond {
            sequence,
            lost,
            interrupts,
        }) = disk
        {
            write!(f, " disk_seq={sequence} disk_lost={lost} disk_irqs={interrupts}")?;
        }
        if let Some(NetSecond {
            received,
            answered,
            interrupts,
        }) = net
        {
            write!(
                f,
                " net_rx={received} net_answered={answered} net_irqs={interrupts}"
            )?;
        }
        if let Some(BalloonSecond {
            pages,
            target,
            reported,
            lost,
        }) = balloon
        {
            write!(
                f,
                " balloon={pages} balloon_target={target} balloon_reported={reported} balloon_lost={lost}"
            )?;
        }
        if let Some(DiskLoad {
            reads,
            writes,
            lost,
            at_us,
        }) = disk_load
        {
            write!(
                f,
                " disk_reads={reads} disk_writes={writes} disk_lost={lost} disk_us={at_us}"
            )?;
        }
        if let Some(NetLoad {
            frames,
            bytes,
            damaged,
            at_us,
        }) = net_load
        {
            write!(
                f,
                " net_frames={frames} net_bytes={bytes} net_damaged={damaged} net_us={at_us}"
            )?;
        }
        if let Some(ConsoleSecond { lines, unsaid, typed }) = console {
            write!(
                f,
                " console_lines={lines} console_unsaid={unsaid} console_typed={typed}"
            )?;
        }
        Ok(())
    }
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Loss {
            page,
            expected_sequence,
            found_sequence,
            damage,
        } = self;
        let why = match damage {
            Damage::Number => "number",
            Damage::Sequence => "sequence",
            Damage::Checksum => "checksum",
            Damage::NotZero => "not-zero",
        };
        write!(
            f,
            "probe LOST page={page} expected_seq={expected_sequence} found_seq={found_sequence} why={why}"
        )
    }
}

impl Up {
    /// Reads the line back; `None` for any other line.
    #[must_use]
    pub fn parse(line: &str) -> Option<Up> {
        let fields = line.trim_end().strip_prefix("probe up ")?;
        Some(Up {
            cpus: u32::try_from(number(fields, "cpus")?).ok()?,
            own_pages: number(fields, "own")?,
            hot_pages: number(fields, "hot")?,
            tsc_khz: number(fields, "tsc_khz")?,
            clock: match value(fields, "clock")? {
                "kvmclock" => ClockSource::KvmClock,
                "pit" => ClockSource::Pit,
                _ => return None,
            },
        })
    }
}

impl Second {
    /// Reads the line back; `None` for any other line, one that was cut short among them.
    #[must_use]
    pub fn parse(line: &str) -> Option<Second> {
        let fields = line
            .trim_end()
            .strip_prefix("probe ")
            .filter(|fields| fields.starts_with("t="))?;
        Some(Second {
            t_s: number(fields, "t")?,
            ticks: number(fields, "ticks")?,
            gap_us: number(fields, "gap_us")?,
            max_gap_us: number(fields, "max_gap_us")?,
            written: number(fields, "written")?,
            verified: number(fields, "verified")?,
            lost: number(fields, "lost")?,
            back: number(fields, "back")?,
            disk: number(fields, "disk_irqs").and_then(|interrupts| {
                Some(DiskSecond {
                    sequence: number(fields, "disk_seq")?,
                    lost: number(fields, "disk_lost")?,
                    interrupts,
                })
            }),
            net: number(fields, "net_irqs").and_then(|interrupts| {
                Some(NetSecond {
                    received: number(fields, "net_rx")?,
                    answered: number(fields, "net_answered")?,
                    interrupts,
                })
            }),
            balloon: number(fields, "balloon_lost").and_then(|lost| {
                Some(BalloonSecond {
                    pages: number(fields, "balloon")?,
                    target: number(fields, "balloon_target")?,
                    reported: number(fields, "balloon_reported")?,
                    lost,
                })
            }),
            disk_load: number(fields, "disk_us").and_then(|at_us| {
                Some(DiskLoad {
                    reads: number(fields, "disk_reads")?,
                    writes: number(fields, "disk_writes")?,
                    lost: number(fields, "disk_lost")?,
                    at_us,
                })
            }),
            console: number(fields, "console_typed").and_then(|typed| {
                Some(ConsoleSecond {
                    lines: number(fields, "console_lines")?,
                    unsaid: number(fields, "console_unsaid")?,
                    typed,
                })
            }),
            net_load: number(fields, "net_us").and_then(|at_us| {
                Some(NetLoad {
                    frames: number(fields, "net_frames")?,
                    bytes: number(fields, "net_bytes")?,
                    damaged: number(fields, "net_damaged")?,
                    at_us,
                })
            }),
        })
    }
}

fn value<'a>(fields: &'a str, name: &str) -> Option<&'a str> {
    fields
        .split(' ')
        .find_map(|field| field.split_once('=').filter(|(key, _)| *key == name))
        .map(|(_, value)| value)
}

fn number(fields: &str, name: &str) -> Option<u64> {
    value(fields, name)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::string::ToString;

    use super::*;

    #[test]
    fn the_up_line_is_as_documented_and_reads_back() {
        let up = Up {
            cpus: 2,
            own_pages: 16384,
            hot_pages: 64,
            tsc_khz: 2_500_000,
            clock: ClockSource::KvmClock,
        };
        assert_eq!(
            up.to_string(),
            "probe up cpus=2 own=16384 hot=64 tsc_khz=2500000 clock=kvmclock"
        );
        assert_eq!(Up::parse(&up.to_string()), Some(up));
        let pit = Up {
            clock: ClockSource::Pit,
            ..up
        };
        assert_eq!(Up::parse(&pit.to_string()), Some(pit));
    }

    #[test]
    fn the_line_of_each_second_is_as_documented_and_reads_back() {
        let second = Second {
            t_s: 3,
            ticks: 3001,
            gap_us: 1002,
            max_gap_us: 9000,
            written: 5,
            verified: 6,
            lost: 1,
            ..Second::default()
        };
        let line = "probe t=3 ticks=3001 gap_us=1002 max_gap_us=9000 written=5 verified=6 lost=1 back=0";
        assert_eq!(second.to_string(), line);
        assert_eq!(
            Second::parse(
                "probe t=3 ticks=3001 gap_us=1002 max_gap_us=9000 written=5 verified=6 lost=1 back=0\r"
            ),
            Some(second)
        );
    }

    #[test]
    fn what_is_said_of_a_disk_is_as_documented_and_reads_back() {
        let second = Second {
            disk: Some(DiskSecond {
                sequence: 80,
                lost: 0,
                interrupts: 33,
            }),
            ..Second::default()
        };
        let line = second.to_string();
        assert!(
            line.ends_with(" back=0 disk_seq=80 disk_lost=0 disk_irqs=33"),
            "{line}"
        );
        assert_eq!(Second::parse(&line), Some(second));
        let found = DiskFound {
            sectors: 8192,
            blocks: 256,
            sequence: 72,
            lost: 0,
        };
        assert_eq!(
            found.to_string(),
            "probe disk sectors=8192 blocks=256 found_seq=72 lost=0"
        );
        assert_eq!(DiskFound::parse(&found.to_string()), Some(found));
    }

    #[test]
    fn what_is_said_of_the_network_is_as_documented_and_reads_back() {
        let second = Second {
            net: Some(NetSecond {
                received: 12,
                answered: 10,
                interrupts: 9,
            }),
            ..Second::default()
        };
        let line = second.to_string();
        assert!(
            line.ends_with(" back=0 net_rx=12 net_answered=10 net_irqs=9"),
            "{line}"
        );
        assert_eq!(Second::parse(&line), Some(second));
    }

    #[test]
    fn what_is_said_of_the_balloon_is_as_documented_and_reads_back() {
        let second = Second {
            balloon: Some(BalloonSecond {
                pages: 256,
                target: 512,
                reported: 1024,
                lost: 0,
            }),
            ..Second::default()
        };
        let line = second.to_string();
        assert!(
            line.ends_with(" back=0 balloon=256 balloon_target=512 balloon_reported=1024 balloon_lost=0"),
            "{line}"
        );
        assert_eq!(Second::parse(&line), Some(second));
    }

    #[test]
    fn what_is_said_of_the_virtio_console_is_as_documented_and_reads_back() {
        let second = Second {
            console: Some(ConsoleSecond {
                lines: 12,
                unsaid: 0,
                typed: 340,
            }),
            ..Second::default()
        };
        let line = second.to_string();
        assert!(
            line.ends_with(" back=0 console_lines=12 console_unsaid=0 console_typed=340"),
            "{line}"
        );
        assert_eq!(Second::parse(&line), Some(second));
    }

    #[test]
    fn what_is_said_of_loads_is_as_documented_and_reads_back() {
        let second = Second {
            disk_load: Some(DiskLoad {
                reads: 70,
                writes: 30,
                lost: 1,
                at_us: 5,
            }),
            net_load: Some(NetLoad {
                frames: 2,
                bytes: 3028,
                damaged: 0,
                at_us: 6,
            }),
            ..Second::default()
        };
        let line = second.to_string();
        let expected = " back=0 disk_reads=70 disk_writes=30 disk_lost=1 disk_us=5 net_frames=2 net_bytes=3028 net_damaged=0 net_us=6";
        assert!(line.ends_with(expected), "{line}");
        assert_eq!(Second::parse(&line), Some(second));
    }

    #[test]
    fn other_lines_and_half_lines_are_not_taken_for_seconds() {
        for line in [
            "",
            "probe up cpus=1",
            "probe t=3 ticks=30",
            "noise t=3",
            "probe t=x ticks=1 gap_us=1 max_gap_us=1",
        ] {
            assert_eq!(Second::parse(line), None, "{line}");
        }
    }

    #[test]
    fn a_loss_names_the_page_and_both_sequences() {
        let loss = Loss {
            page: 9,
            expected_sequence: 4,
            found_sequence: 3,
            damage: Damage::Sequence,
        };
        assert_eq!(
            loss.to_string(),
            "probe LOST page=9 expected_seq=4 found_seq=3 why=sequence"
        );
    }
}
