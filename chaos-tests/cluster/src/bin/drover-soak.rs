//! Random kill points, as many as wanted: started by `cargo xtask chaos`, which builds what this runs.
//!
//! Its one argument is its configuration, JSON. A kill that breaks a rule is reported with what was seen, the command that
//! does it again and a folder of logs; the cluster is then given up and the next kill gets a fresh one.

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use drover_chaos_cluster::cluster::obstacle;
use drover_chaos_cluster::soak::plan::Kill;
use drover_chaos_cluster::soak::tally::Tally;
use drover_chaos_cluster::soak::{Outcome, Soak};
use drover_chaos_cluster::{Cluster, Settings, Setup};
use serde::Deserialize;

/// A soak that has broken so many rules is given up.
const FAILURES_MAX: u64 = 5;

/// What each host says that guests may use.
const HOST_MEMORY_MIB: u64 = 2048;

/// What is to be done.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    /// The folder of the daemons' chaos binaries.
    binaries: PathBuf,
    /// The probe guest's kernel.
    probe: PathBuf,
    /// Where the logs of failures go.
    logs: PathBuf,
    seed: u64,
    /// The first kill's number.
    from: u64,
    /// How many.
    kills: u64,
    /// No further kill is begun after so long.
    minutes: Option<u64>,
}

/// A run.
struct Run {
    config: Config,
    soak: Option<Soak>,
    tally: Tally,
    failures: u64,
    started: Instant,
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let config = match words.as_slice() {
        [text] => serde_json::from_str::<Config>(text).map_err(|error| error.to_string()),
        _ => Err("one argument is wanted, the configuration as JSON".to_owned()),
    };
    let config = match config {
        Ok(config) => config,
        Err(why) => {
            eprintln!("drover-soak is started by `cargo xtask chaos`: {why}");
            return ExitCode::from(2);
        }
    };
    if let Some(why) = obstacle(&config.binaries, &config.probe, "cargo xtask chaos") {
        eprintln!("the soak cannot run here: {why}");
        return ExitCode::from(2);
    }
    let mut run = Run {
        config,
        soak: None,
        tally: Tally::default(),
        failures: 0,
        started: Instant::now(),
    };
    run.all();
    run.close();
    match run.failures {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

impl Run {
    fn all(&mut self) {
        let limit = self
            .config
            .minutes
            .map(|minutes| Duration::from_secs(minutes.saturating_mul(60)));
        let (first, kills) = (self.config.from, self.config.kills);
        for number in first..first.saturating_add(kills) {
            if limit.is_some_and(|limit| self.started.elapsed() >= limit) {
                println!("the time is over");
                return;
            }
            if self.failures == FAILURES_MAX {
                println!("{FAILURES_MAX} kills broke a rule: that is enough");
                return;
            }
            self.one(number);
        }
    }

    fn one(&mut self, number: u64) {
        let kill = Kill::of(self.config.seed, number);
        let last = self.config.from.saturating_add(self.config.kills) - 1;
        print!("kill {number} of {last}, seed {}: {kill} ", kill.seed);
        // What is said later, or not at all, stands on the same line.
        let _ = std::io::stdout().flush();
        let config = &self.config;
        let soak = &mut self.soak;
        // What a broken cluster leaves in `soak` is only looked at for its logs.
        let done = catch_unwind(AssertUnwindSafe(|| {
            let soak = soak.get_or_insert_with(|| start(config));
            let began = Instant::now();
            (soak.kill(&kill), began.elapsed())
        }));
        match done {
            Ok((outcome, took)) => self.note(&kill, outcome, took),
            Err(panic) => self.fail(&kill, &words_of(panic.as_ref())),
        }
    }

    fn note(&mut self, kill: &Kill, outcome: Outcome, took: Duration) {
        self.tally.add(kill, outcome, took);
        let hit = if outcome.hit { "" } else { " (not hit)" };
        println!(
            "-> {:?}{hit}, epoch {}, {:.1} s; {} failed, {} left",
            outcome.ending,
            outcome.epoch,
            took.as_secs_f64(),
            self.failures,
            self.left(kill.number)
        );
    }

    /// How long the kills after this one will take, at the pace so far.
    fn left(&self, number: u64) -> String {
        let done = number - self.config.from + 1;
        let to_do = self.config.kills.saturating_sub(done);
        let seconds = self.started.elapsed().as_secs().saturating_mul(to_do) / done;
        format!("{} min", seconds.div_ceil(60))
    }

    fn fail(&mut self, kill: &Kill, why: &str) {
        self.failures += 1;
        let folder = self
            .config
            .logs
            .join(format!("seed-{}-kill-{}", kill.seed, kill.number));
        let kept = match self.soak.take() {
            Some(soak) => keep_logs(soak.cluster().scratch(), &folder),
            None => Err(std::io::Error::other("the cluster did not start")),
        };
        println!(
            "\nFAILED: kill {} of seed {}: {kill}\n  {why}",
            kill.number, kill.seed
        );
        println!(
            "  again: cargo xtask chaos --seed {} --from {} --kills 1",
            kill.seed, kill.number
        );
        match kept {
            Ok(()) => println!("  logs: {}", folder.display()),
            Err(error) => println!("  no logs: {}: {error}", folder.display()),
        }
    }

    fn close(&mut self) {
        if let Some(soak) = &mut self.soak {
            match catch_unwind(AssertUnwindSafe(|| soak.finish())) {
                Ok(last) => println!("the guest at the end: {last}"),
                Err(panic) => {
                    self.failures += 1;
                    println!("FAILED: at the end: {}", words_of(panic.as_ref()));
                }
            }
        }
        print!("{}", self.tally);
        println!(
            "{} kills of seed {} from {} on in {} s, half of them within {:.1} s; {} failed",
            self.tally.kills(),
            self.config.seed,
            self.config.from,
            self.started.elapsed().as_secs(),
            self.tally.median().as_secs_f64(),
            self.failures
        );
    }
}

fn start(config: &Config) -> Soak {
    let setup = Setup {
        settings: Settings {
            // A stalled migration ends, and with it what was to be struck: on a busy machine that is nobody's fault.
            stall_timeout_ms: 10_000,
            ..Settings::default()
        },
        binaries: config.binaries.clone(),
        probe: config.probe.clone(),
        host_memory_mib: HOST_MEMORY_MIB,
        watched: true,
        sandbox: None,
    };
    Soak::new(Cluster::start(&setup).expect("the cluster starts"))
}

/// What a panic said.
fn words_of(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| panic.downcast_ref::<&str>().map(|words| (*words).to_owned()))
        .unwrap_or_else(|| "a panic without words".to_owned())
}

/// Copies every log below `from` into `to`, each under its path's name.
fn keep_logs(from: &Path, to: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(to)?;
    let mut folders = vec![from.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            let kind = std::fs::symlink_metadata(&path)?.file_type();
            if kind.is_dir() {
                folders.push(path);
            } else if path
                .file_name()
                .is_some_and(|name| name == "log" || name == "vmm.log")
            {
                let below = path.strip_prefix(from).unwrap_or(&path);
                std::fs::copy(&path, to.join(below.to_string_lossy().replace('/', "-")))?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logs_are_kept_under_the_names_of_their_places() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let run = from.path().join("host1/data/vms/vm1/e1-start");
        std::fs::create_dir_all(&run).unwrap();
        std::fs::write(run.join("vmm.log"), "a").unwrap();
        std::fs::write(run.join("started"), "b").unwrap();
        std::fs::write(from.path().join("host1/log"), "c").unwrap();
        keep_logs(from.path(), to.path()).unwrap();
        let mut names: Vec<_> = std::fs::read_dir(to.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        assert_eq!(names, ["host1-data-vms-vm1-e1-start-vmm.log", "host1-log"]);
    }

    #[test]
    fn a_configuration_with_an_unknown_word_is_refused() {
        let text = r#"{"binaries": "b", "probe": "p", "logs": "l", "seed": 1, "from": 1, "kills": 1, "minutes": null}"#;
        assert!(serde_json::from_str::<Config>(text).is_ok());
        assert!(serde_json::from_str::<Config>(&text.replace("seed", "sead")).is_err());
    }
}
