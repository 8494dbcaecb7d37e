//! A whole cluster on this machine, one VM that writes as fast as it can, one live migration, and what the guest saw of it.

use std::fs;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use drover_probe::report::Second;
use serde_json::Value;

use crate::Outcome;
use crate::artifacts::{Plain, build_plain};
use crate::setup::{Need, kvm_problem, prepare};
use crate::tool::{ask, show};

/// The guest's reports are waited for so long.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the guest does: owns 64 MiB and writes all of it flat out.
const CMDLINE: &str = "own=64M hot=64M rate=max";

/// The guard: takes the cluster down when its input ends. That is when the demo says that it is over, and also when it was
/// interrupted or killed, whatever it was doing. It has a process group of its own, for Ctrl-C is for the demo.
const GUARD: &str = r#"
trap '' HUP INT TERM
read -r over || echo "The demo was interrupted: its cluster is taken down." >&2
rmdir "$2" 2>/dev/null && exit 0
for attempt in 1 2 3 4 5; do
    "$1" dev down --purge --state-dir "$2" && exit 0
    sleep 1
done
echo "The demo's cluster is left behind. To take it down: $1 dev down --purge --state-dir $2" >&2
exit 1
"#;

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

/// A development cluster in a folder of its own; down and gone when dropped, and also when this process ends in any other way.
struct Demo {
    plain: Plain,
    dir: PathBuf,
    guard: Child,
}

impl Demo {
    fn new(plain: Plain) -> Outcome<Self> {
        let dir = std::env::temp_dir().join(format!("drover-demo-{}", std::process::id()));
        fs::create_dir(&dir).map_err(|error| format!("{}: {error}", dir.display()))?;
        let guard = guard(&plain.ctl, &dir).map_err(|error| format!("the demo's guard: {error}"))?;
        Ok(Self { plain, dir, guard })
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
            println!("{report}");
        }
        show(&mut self.ctl(&["migrate", "vm1", "host2"]))?;
        // What the guest saw of the move stands in the first report after it; one more proves that it goes on.
        let after = self.await_reports(self.reports()?.len() + 2)?;
        for report in &after[before.len()..] {
            println!("{report}");
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

    fn reports(&self) -> Outcome<Vec<Second>> {
        let console = self.console()?;
        Ok(console
            .lines()
            .filter_map(|line| Second::parse(line.trim()))
            .collect())
    }

    /// Waits until the console holds `count` reports.
    fn await_reports(&self, count: usize) -> Outcome<Vec<Second>> {
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
        // Its input ends when this handle is dropped; the word says that this is the regular end.
        if let Some(mut over) = self.guard.stdin.take() {
            let _ = over.write_all(b"over\n");
        }
        if let Err(error) = self.guard.wait() {
            eprintln!("the demo's guard: {error}");
        }
    }
}

fn guard(ctl: &Path, dir: &Path) -> std::io::Result<Child> {
    Command::new("sh")
        .args(["-c", GUARD, "guard"])
        .args([ctl, dir])
        .stdin(Stdio::piped())
        .process_group(0)
        .spawn()
}

/// A number that JSON may carry as a string, as protobuf's mapping does with 64 bits.
fn number(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| value.as_str()?.parse().ok())
}

fn text(value: &Value, key: &str) -> String {
    value[key].as_str().unwrap_or_default().to_owned()
}

/// Microseconds as milliseconds to the nearest tenth, as the receipt shows them.
fn millis(us: u64) -> String {
    let tenths = us.saturating_add(50) / 100;
    format!("{}.{}", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guard_ends_with_the_demo_and_leaves_no_empty_folder() {
        let dir = std::env::temp_dir().join(format!("drover-guard-{}", std::process::id()));
        fs::create_dir(&dir).expect("a folder");
        let mut guard = guard(Path::new("/bin/false"), &dir).expect("sh starts");
        drop(guard.stdin.take());
        assert!(guard.wait().expect("its end").success());
        assert!(!dir.exists());
    }

    #[test]
    fn microseconds_are_shown_as_milliseconds_rounded() {
        assert_eq!(
            [0, 949, 950, 12_149, 12_150].map(millis),
            ["0.0", "0.9", "1.0", "12.1", "12.2"]
        );
    }
}
