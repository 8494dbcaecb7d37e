//! What the guest says of itself on its console, under us and under QEMU alike.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use drover_probe::report::{Second, Up};

use crate::interrupt;

/// A line longer than this is not the probe's.
const LINE_MAX: usize = 4096;

/// Words that the probe says only when something went wrong, see docs/probe.md.
const COMPLAINTS: [&str; 8] = [
    "LOST",
    "BACK",
    "PANIC",
    "EXCEPTION",
    "bad parameter",
    "DISK LOST",
    "no disk",
    "no nic",
];

/// A console from its first byte, through every move.
#[derive(Debug, Default)]
pub struct GuestLog {
    partial: String,
    /// Whether every owned page has its first content.
    pub up: bool,
    /// Every report so far.
    pub reports: Vec<Second>,
    complaint: Option<String>,
}

/// Where a console's bytes come from.
pub trait Feed {
    /// The bytes that came since the last call; waits a moment for one.
    fn pull(&mut self) -> Result<Vec<u8>>;
}

impl GuestLog {
    /// Takes the next bytes.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.partial.push_str(&String::from_utf8_lossy(bytes));
        while let Some(end) = self.partial.find('\n') {
            let line: String = self.partial.drain(..=end).collect();
            self.line(line.trim_end());
        }
        if self.partial.len() > LINE_MAX {
            self.partial.clear();
        }
    }

    fn line(&mut self, line: &str) {
        let complains = COMPLAINTS
            .iter()
            .any(|word| line.starts_with(&format!("probe {word}")));
        if complains && self.complaint.is_none() {
            self.complaint = Some(line.to_owned());
        }
        self.up |= Up::parse(line).is_some();
        self.reports.extend(Second::parse(line));
    }

    /// An error if the guest lost a page, saw its time go back or failed.
    pub fn check(&self) -> Result<()> {
        if let Some(line) = &self.complaint {
            bail!("the guest complains: {line}");
        }
        match self.reports.iter().find(|report| report.lost > 0) {
            Some(report) => bail!("the guest lost pages: {report}"),
            None => Ok(()),
        }
    }

    /// Reads until `enough` holds.
    pub fn await_some(
        &mut self,
        feed: &mut (impl Feed + ?Sized),
        what: &str,
        limit: Duration,
        enough: impl Fn(&Self) -> bool,
    ) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            let bytes = feed.pull()?;
            self.feed(&bytes);
            self.check()?;
            if enough(self) {
                return Ok(());
            }
            interrupt::check()?;
            if Instant::now() > deadline {
                let last = self.reports.last();
                bail!("waited {limit:?} for {what}; the guest's last report: {last:?}");
            }
        }
    }

    /// What the guest noticed of what happened since it had given `before` reports.
    pub fn noticed(&self, before: usize) -> Noticed {
        let rate = |pair: &[Second]| {
            let seconds = pair[1].t_s.saturating_sub(pair[0].t_s).max(1);
            pair[1].written.saturating_sub(pair[0].written) / seconds
        };
        let since = &self.reports[before.min(self.reports.len())..];
        let around = &self.reports[before.saturating_sub(1)..];
        let gap_us = since.iter().map(|report| report.gap_us).max();
        Noticed {
            gap_ms: gap_us.map_or(0.0, |gap_us| gap_us as f64 / 1000.0),
            writes_before_per_s: match before {
                0 | 1 => 0,
                _ => rate(&self.reports[before - 2..before]),
            },
            writes_lowest_per_s: around.windows(2).map(rate).min().unwrap_or_default(),
        }
    }
}

/// What the guest noticed of a move.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Noticed {
    /// The longest time between two of its timer's ticks.
    pub gap_ms: f64,
    /// Pages a second that it wrote in the last second before.
    pub writes_before_per_s: u64,
    /// Pages a second that it wrote in the worst second around the move.
    pub writes_lowest_per_s: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn second(t_s: u64, gap_us: u64, written: u64, lost: u64) -> String {
        let report = Second {
            t_s,
            ticks: t_s * 1000,
            gap_us,
            max_gap_us: gap_us,
            written,
            verified: 1,
            lost,
            ..Second::default()
        };
        format!("{report}\r\n")
    }

    #[test]
    fn lines_are_put_together_across_reads_and_the_largest_gap_since_is_told() {
        let mut log = GuestLog::default();
        let text = [
            second(1, 5000, 100, 0),
            second(2, 4000, 300, 0),
            second(3, 30_000, 350, 0),
            second(4, 6000, 600, 0),
        ]
        .concat();
        let (first, rest) = text.as_bytes().split_at(130);
        log.feed(first);
        assert_eq!(log.reports.len(), 1);
        log.feed(rest);
        assert_eq!(log.reports.len(), 4);
        log.check().unwrap();
        assert_eq!(
            log.noticed(2),
            Noticed {
                gap_ms: 30.0,
                writes_before_per_s: 200,
                writes_lowest_per_s: 50
            }
        );
        assert_eq!(log.noticed(4).gap_ms, 0.0);
    }

    #[test]
    fn a_lost_page_is_an_error_in_either_form() {
        let mut log = GuestLog::default();
        log.feed(second(1, 1, 1, 2).as_bytes());
        assert!(log.check().unwrap_err().to_string().contains("lost=2"));
        let mut log = GuestLog::default();
        log.feed(b"probe up cpus=1 own=5 hot=5 tsc_khz=1 clock=pit\n");
        assert!(log.up);
        log.check().unwrap();
        log.feed(b"probe LOST page=9 expected_seq=4 found_seq=3 why=sequence\n");
        assert!(log.check().unwrap_err().to_string().contains("page=9"));
    }
}
