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
            back: 0,
            disk: None,
            net: None,
            balloon: None,
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
