//! What the probe guest says of itself. It outranks every counter of ours: it owns pages that carry a number, a sequence
//! and a checksum, counts timer ticks, and measures the gaps between them.

use drover_probe::report::Second;

use crate::{Client, await_some};

/// How long one read waits for the guest's next bytes.
const WAIT_MS: u32 = 1500;

/// A reader of one VM's console from its start, through every migration.
pub struct Console {
    vm: String,
    offset: u64,
    partial: String,
    /// Every whole line so far.
    pub lines: Vec<String>,
    /// Every report so far.
    pub reports: Vec<Second>,
}

impl Console {
    /// A reader of `vm`, from the first byte.
    pub fn new(vm: &str) -> Self {
        Self {
            vm: vm.to_owned(),
            offset: 0,
            partial: String::new(),
            lines: Vec::new(),
            reports: Vec::new(),
        }
    }

    /// Reads what there is, waiting a moment for something new; checks every report against the one before.
    pub fn pull(&mut self, client: &Client) -> Result<(), String> {
        let answer = client
            .read_console(&self.vm, self.offset, WAIT_MS)
            .map_err(|fault| fault.to_string())?;
        assert_eq!(
            answer.offset, self.offset,
            "the console of {} has lost or repeated bytes",
            self.vm
        );
        self.offset = answer.next_offset;
        self.partial.push_str(&String::from_utf8_lossy(&answer.data));
        while let Some(end) = self.partial.find('\n') {
            let line = self.partial[..end].trim_end().to_owned();
            self.partial.drain(..=end);
            self.take(line);
        }
        Ok(())
    }

    fn take(&mut self, line: String) {
        for word in ["LOST", "BACK", "PANIC", "EXCEPTION", "bad parameter"] {
            assert!(
                !line.contains(&format!("probe {word}")),
                "the guest complains: {line}"
            );
        }
        if let Some(report) = Second::parse(&line) {
            assert_eq!(report.lost, 0, "the guest lost pages: {line}");
            assert_eq!(report.back, 0, "the guest's time went back: {line}");
            if let Some(before) = self.reports.last() {
                assert!(
                    report.ticks > before.ticks,
                    "ticks went from {} to {}: {line}",
                    before.ticks,
                    report.ticks
                );
                assert!(
                    report.t_s >= before.t_s,
                    "the guest's clock went from {} to {}: {line}",
                    before.t_s,
                    report.t_s
                );
                assert!(
                    report.written >= before.written,
                    "pages written went back: {line}"
                );
            }
            self.reports.push(report);
        } else if line.starts_with("probe t=") {
            panic!("a report that is not whole: {line}");
        }
        self.lines.push(line);
    }

    /// Waits for `more` whole reports after what the console held when this was called. So the guest is proven to run.
    pub fn await_more(&mut self, client: &Client, more: usize) -> Second {
        // What was written before the call proves nothing: read it away first.
        let mut behind = self.offset;
        await_some("the console to answer", || {
            loop {
                let answer = client
                    .read_console(&self.vm, behind, 0)
                    .map_err(|fault| fault.to_string())?;
                if answer.data.is_empty() {
                    return Ok(());
                }
                behind = answer.next_offset;
            }
        });
        while self.offset < behind {
            await_some("the console to answer", || self.pull(client));
        }
        let wanted = self.reports.len() + more;
        await_some(&format!("{more} more reports of {}", self.vm), || {
            self.pull(client)?;
            match self.reports.last() {
                Some(report) if self.reports.len() >= wanted => Ok(*report),
                last => Err(format!("{} reports, last {last:?}", self.reports.len())),
            }
        })
    }

    /// Types a word and waits for the guest's echo: input and output both still reach it.
    pub fn ping(&mut self, client: &Client, word: &str) {
        client.type_text(&self.vm, &format!("ping {word}\n"));
        let echo = format!("probe pong {word}");
        await_some(&format!("the echo of {word}"), || {
            self.pull(client)?;
            match self.lines.iter().any(|line| line.contains(&echo)) {
                true => Ok(()),
                false => Err(format!("last line {:?}", self.lines.last())),
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_line_is_read_in_any_order_and_nothing_else_is() {
        let line =
            "probe t=7 ticks=700 gap_us=10012 max_gap_us=20000 written=5 verified=6 lost=0 back=0 later=9\r";
        let report = Second::parse(line).expect("a whole report");
        assert_eq!(
            (report.t_s, report.ticks, report.max_gap_us, report.verified),
            (7, 700, 20000, 6)
        );
        for other in [
            "probe t=7 ticks=700",
            "probe up cpus=1",
            "probe t=x ticks=1 gap_us=1",
            "",
        ] {
            assert_eq!(Second::parse(other), None, "{other}");
        }
    }
}
