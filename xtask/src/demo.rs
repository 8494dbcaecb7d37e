//! A whole cluster on this machine, one VM that writes as fast as it can, one live migration, and what the guest saw of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::Outcome;
use crate::artifacts::{Plain, build_plain};
use crate::setup::{Need, kvm_problem, prepare};
use crate::tool::{ask, show};

/// The guest's reports are waited for so long.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the guest does: owns 64 MiB and writes all of it flat out.
const CMDLINE: &str = "own=64M hot=64M rate=max";

/// Runs the demo; its last line says how it went.
pub fn run() -> Outcome<()> {
    prepare(Need::Build)?;
    if let Some(problem) = kvm_problem() {
        return Err(problem);
    }
    let plain = build_plain()?;
    let cluster = Demo::new(plain)?;
    let line = cluster.play()?;
    drop(cluster);
    println!("{line}");
    Ok(())
}

/// A development cluster in a folder of its own; down and gone when dropped.
struct Demo {
    plain: Plain,
    dir: PathBuf,
}

impl Demo {
    fn new(plain: Plain) -> Outcome<Self> {
        let dir = std::env::temp_dir().join(format!("drover-demo-{}", std::process::id()));
        fs::create_dir(&dir).map_err(|error| format!("{}: {error}", dir.display()))?;
        Ok(Self { plain, dir })
    }

    fn ctl(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.plain.ctl);
        command
            .args(words)
            .env("DROVER_DEV_DIR", &self.dir)
            .env_remove("DROVER_CONTEXT");
        command
    }

    fn play(&self) -> Outcome<String> {
        let image = format!("probe={}", self.plain.probe.display());
        show(&mut self.ctl(&["dev", "up", "--image", &image]))?;
        show(&mut self.ctl(&["host", "list"]))?;
        let create = [
            "vm",
            "create",
            "vm1",
            "--image",
            "probe",
            "--memory",
            "256MiB",
            "--cmdline",
            CMDLINE,
        ];
        show(self.ctl(&create).args(["--host", "host1", "--start", "--wait"]))?;
        let before = self.await_reports(2)?;
        for report in &before {
            println!("{}", report.line);
        }
        show(&mut self.ctl(&["migrate", "vm1", "host2"]))?;
        // What the guest saw of the move stands in the first report after it; one more proves that it goes on.
        let after = self.await_reports(self.reports()?.len() + 2)?;
        for report in &after[before.len()..] {
            println!("{}", report.line);
        }
        let gap_us = after[before.len()..]
            .iter()
            .map(|report| report.gap_us)
            .max()
            .unwrap_or_default();
        let lost = after.last().map_or(0, |report| report.lost);
        let console = self.console()?;
        if let Some(line) = console.lines().find(|line| line.contains("LOST")) {
            return Err(format!("failed: the guest lost a page: {line}"));
        }
        let migration = self.migration()?;
        let (from, to) = (text(&migration, "from"), text(&migration, "to"));
        let blackout_us = number(&migration["receipt"]["blackout_us"]["total"]);
        let phase = text(&migration, "phase");
        if !phase.eq_ignore_ascii_case("done") || (from.as_str(), to.as_str()) != ("host1", "host2") {
            return Err(format!("failed: the migration is {migration}"));
        }
        let Some(blackout_us) = blackout_us else {
            return Err(format!("failed: the migration left no receipt: {migration}"));
        };
        if lost != 0 {
            return Err(format!("failed: vm1 host1 -> host2, pages lost {lost}"));
        }
        Ok(format!(
            "ok: vm1 {from} -> {to}, blackout {} ms, guest saw {} ms, pages lost {lost}",
            millis(blackout_us),
            millis(gap_us)
        ))
    }

    /// The newest migration of vm1.
    fn migration(&self) -> Outcome<Value> {
        let list = ask(&mut self.ctl(&["migration", "list", "--vm", "vm1", "-o", "json"]))?;
        let list: Value =
            serde_json::from_str(&list).map_err(|error| format!("ctl migration list: {error}"))?;
        let list = if list.is_array() {
            &list
        } else {
            &list["migrations"]
        };
        let id = list[0]["id"].as_str().ok_or("failed: no migration is listed")?;
        let shown = ask(&mut self.ctl(&["migration", "show", id, "-o", "json"]))?;
        serde_json::from_str(&shown).map_err(|error| format!("ctl migration show: {error}"))
    }

    fn console(&self) -> Outcome<String> {
        ask(&mut self.ctl(&["vm", "console", "vm1", "--no-follow"]))
    }

    fn reports(&self) -> Outcome<Vec<Report>> {
        Ok(self.console()?.lines().filter_map(Report::parse).collect())
    }

    /// Waits until the console holds `count` reports.
    fn await_reports(&self, count: usize) -> Outcome<Vec<Report>> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let reports = self.reports()?;
            if reports.len() >= count {
                return Ok(reports);
            }
            if Instant::now() > deadline {
                return Err(format!(
                    "failed: the guest reports nothing; its console: {}",
                    self.console()?
                ));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        if let Err(why) = show(&mut self.ctl(&["dev", "down", "--purge"])) {
            eprintln!("{why}");
        }
        remove(&self.dir);
    }
}

fn remove(dir: &Path) {
    if let Err(error) = fs::remove_dir_all(dir)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        eprintln!("{} is left behind: {error}", dir.display());
    }
}

/// One line `probe t=…` of the guest.
struct Report {
    line: String,
    gap_us: u64,
    lost: u64,
}

impl Report {
    fn parse(line: &str) -> Option<Self> {
        let line = line.trim();
        let words = line.strip_prefix("probe t=")?;
        let value = |key: &str| -> Option<u64> {
            words
                .split(' ')
                .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))?
                .parse()
                .ok()
        };
        Some(Self {
            line: line.to_owned(),
            gap_us: value("gap_us")?,
            lost: value("lost")?,
        })
    }
}

/// A number that JSON may carry as a string, as protobuf's mapping does with 64 bits.
fn number(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| value.as_str()?.parse().ok())
}

fn text(value: &Value, key: &str) -> String {
    value[key].as_str().unwrap_or_default().to_owned()
}

/// Microseconds as milliseconds with one decimal.
fn millis(us: u64) -> String {
    format!("{}.{}", us / 1000, us % 1000 / 100)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_gives_the_gap_since_the_last_one_and_not_the_largest_ever() {
        let report = Report::parse(
            "probe t=3 ticks=300 gap_us=10012 max_gap_us=99999 written=1 verified=1 lost=0 back=0\r",
        );
        assert_eq!(
            report.map(|report| (report.gap_us, report.lost)),
            Some((10012, 0))
        );
        assert!(Report::parse("probe up cpus=1 own=64").is_none());
    }

    #[test]
    fn microseconds_are_shown_as_milliseconds() {
        assert_eq!([millis(0), millis(999), millis(12_345)], ["0.0", "0.9", "12.3"]);
    }
}
