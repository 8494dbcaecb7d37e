//! The parts of the tests, and how each is run.
//!
//! One runner for all of them: cargo-nextest where it is installed (a process a test, time limits, see
//! `.config/nextest.toml`), else `cargo test`. Every part runs although another failed; the last line counts them all.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use crate::artifacts::{build_chaos, chaos_features, target_dir};
use crate::setup::{Need, kvm_problem, prepare};
use crate::tally::{Reader, Tally};
use crate::tool::{cargo, show, succeeds, typed};
use crate::{Outcome, seeded};

/// A part of the tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Formatting and clippy.
    Lint,
    /// Unit, property and storage tests, fuzz corpora, documentation's examples.
    Unit,
    /// Real processes.
    Cluster,
    /// Deliberate mistakes.
    SeededBugs,
    /// A stock kernel inside an emulated host.
    LinuxGuest,
}

impl Part {
    /// All, the quickest to fail first.
    pub const ALL: [Part; 5] = [
        Part::Lint,
        Part::Unit,
        Part::Cluster,
        Part::SeededBugs,
        Part::LinuxGuest,
    ];

    /// The part of that name.
    pub fn parse(name: &str) -> Option<Part> {
        Part::ALL.into_iter().find(|part| part.name() == name)
    }

    fn name(self) -> &'static str {
        match self {
            Part::Lint => "lint",
            Part::Unit => "unit",
            Part::Cluster => "cluster",
            Part::SeededBugs => "seeded-bugs",
            Part::LinuxGuest => "linux-guest",
        }
    }
}

/// Runs `parts`; prints the count as the last line.
pub fn run(parts: &[Part]) -> Outcome<()> {
    prepare(Need::Tests)?;
    if let Some(problem) = kvm_problem() {
        eprintln!("WARNING: {problem} Everything else is tested; the tests with a VM are skipped.");
    }
    let mut total = Tally::default();
    let mut built = None;
    for &part in parts {
        eprintln!("=== {} ===", part.name());
        if part == Part::Lint {
            lint(&mut total);
            continue;
        }
        // Once, and before the first part that needs it: what cannot be built cannot be tested.
        let built: &Outcome<()> = built.get_or_insert_with(build_chaos);
        if let Err(why) = built {
            total.check(&format!("build for {}", part.name()), Err(why.clone()));
            continue;
        }
        match part {
            Part::Unit => unit(&mut total),
            Part::Cluster => total.add(run_tests(
                "cluster",
                &Selection::package("drover-chaos-cluster"),
                &[],
            )),
            Part::SeededBugs => seeded::run(&mut total),
            Part::LinuxGuest => total.add(run_tests("linux-guest", &Selection::named("linux_guest"), &[])),
            Part::Lint => {}
        }
    }
    for name in total.failed() {
        eprintln!("failed: {name}");
    }
    for (name, why) in total.tests.iter().filter_map(|(name, fate)| match fate {
        crate::tally::Fate::Skipped(why) => Some((name, why)),
        _ => None,
    }) {
        eprintln!("SKIPPED: {name}: {why}");
    }
    println!("{}", total.line());
    if total.failed().is_empty() {
        Ok(())
    } else {
        Err("Some tests failed.".to_owned())
    }
}

fn lint(total: &mut Tally) {
    total.check(
        "formatting (cargo fmt --check)",
        show(cargo().args(["fmt", "--all", "--check"])),
    );
    let clippy = ["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"];
    total.check("lints (cargo clippy)", show(cargo().args(clippy)));
}

fn unit(total: &mut Tally) {
    total.add(run_tests("unit", &Selection::the_rest(), &[]));
    // nextest runs no examples of the documentation.
    if has_nextest() {
        let mut command = cargo();
        command.args([
            "test",
            "--doc",
            "--workspace",
            "--no-fail-fast",
            "--features",
            &chaos_features(),
        ]);
        total.add(count("doc", &mut command));
    }
}

/// Which tests, in either runner's words.
pub struct Selection {
    nextest: String,
    cargo_test: Vec<String>,
    libtest: Vec<String>,
}

impl Selection {
    fn words(nextest: &str, cargo_test: &[&str], libtest: &[&str]) -> Self {
        let own = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
        Self {
            nextest: nextest.to_owned(),
            cargo_test: own(cargo_test),
            libtest: own(libtest),
        }
    }

    /// Every test of a package, one after the other.
    pub fn package(package: &str) -> Self {
        Self::words(
            &format!("package({package})"),
            &["-p", package],
            &["--test-threads=1"],
        )
    }

    /// Every test with these words in its name, one after the other.
    fn named(words: &str) -> Self {
        Self::words(
            &format!("test({words})"),
            &["--workspace", "--tests"],
            &["--test-threads=1", words],
        )
    }

    /// One test of a package.
    pub fn test(package: &str, test: &str) -> Self {
        let filter = format!("package({package}) and test(/(^|::){test}$/)");
        Self::words(&filter, &["-p", package], &["--test-threads=1", test])
    }

    /// What no other part runs.
    fn the_rest() -> Self {
        let others = [
            "--workspace",
            "--exclude",
            "drover-chaos-cluster",
            "--lib",
            "--bins",
            "--tests",
        ];
        Self::words(
            "not package(drover-chaos-cluster) and not test(linux_guest)",
            &others,
            &["--skip", "linux_guest"],
        )
    }
}

/// Runs the selected tests and counts them.
pub fn run_tests(part: &str, selection: &Selection, environment: &[(&str, &str)]) -> Tally {
    let mut command = cargo();
    if has_nextest() {
        let quiet = [
            "--color",
            "never",
            "--show-progress",
            "none",
            "--final-status-level",
            "none",
        ];
        let output = ["--success-output", "immediate", "--failure-output", "immediate"];
        command
            .args(["nextest", "run", "--workspace", "--no-fail-fast"])
            .args(quiet)
            .args(output);
        command.args(["--features", &chaos_features(), "-E", &selection.nextest]);
    } else {
        command.args(["test", "--no-fail-fast", "--color", "never"]);
        command
            .args(&selection.cargo_test)
            .arg("--features")
            .arg(chaos_features());
        command.args(["--", "--show-output"]).args(&selection.libtest);
    }
    command.envs(environment.iter().copied());
    count(part, &mut command)
}

/// Whether cargo-nextest is installed.
fn has_nextest() -> bool {
    succeeds(cargo().args(["nextest", "--version"]))
}

/// Runs a test runner in view, keeps all it printed in a file, and counts.
fn count(part: &str, command: &mut Command) -> Tally {
    eprintln!("+ {}", typed(command));
    let mut reader = Reader::default();
    let ended = follow(part, command, &mut reader);
    let mut tally = reader.finish();
    // A runner that fails although no test did could not build, or found no test.
    if tally.failed().is_empty() {
        match ended {
            Ok(true) => {}
            Ok(false) => tally.check(part, Err("its runner failed: see above".to_owned())),
            Err(why) => tally.check(part, Err(why)),
        }
    }
    tally
}

/// Whether the runner succeeded.
fn follow(part: &str, command: &mut Command, reader: &mut Reader) -> Outcome<bool> {
    let broken = |error: std::io::Error| format!("running the tests: {error}");
    let logs = target_dir()?.join("xtask");
    std::fs::create_dir_all(&logs).map_err(broken)?;
    let mut log = File::create(logs.join(format!("{part}.log"))).map_err(broken)?;
    let (output, input) = std::io::pipe().map_err(broken)?;
    command
        .stdin(Stdio::null())
        .stdout(input.try_clone().map_err(broken)?)
        .stderr(input);
    let mut child = command.spawn().map_err(broken)?;
    // The command holds the pipe's other ends: the output only ends when they are closed.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut output = BufReader::new(output);
    let mut line = Vec::new();
    while output.read_until(b'\n', &mut line).map_err(broken)? > 0 {
        let text = String::from_utf8_lossy(&line);
        let text = text.trim_end_matches(['\n', '\r']);
        log.write_all(&line).map_err(broken)?;
        if reader.line(text) {
            eprintln!("{text}");
        }
        line.clear();
    }
    child.wait().map(|status| status.success()).map_err(broken)
}
