//! The parts of the tests, and how each is run.
//!
//! One runner for all of them: cargo-nextest where it is installed (a process a test, time limits, see
//! `.config/nextest.toml`), else the tests' own binaries (`binaries`). Both are built with the whole workspace's features, so
//! that no part builds a crate again. Every part runs although another failed; the last line counts them all.

use std::fs::File;
use std::path::PathBuf;
use std::process::Command;

use crate::artifacts::{build_chaos, chaos_features, target_dir};
use crate::binaries::{TestBinary, build};
use crate::follow::{View, follow};
use crate::setup::{Need, is_root, kvm_problem, prepare};
use crate::tally::{Fate, Reader, Runner, Tally};
use crate::tool::{cargo, show, succeeds, typed};
use crate::{Outcome, seeded};

/// The package of the cluster tests.
const CLUSTER: &str = "drover-chaos-cluster";

/// The package of the stock kernel's test, and the words in the name of every such test.
const LINUX_GUEST: (&str, &str) = ("drover-linux-guest", "linux_guest");

/// Packages whose tests use the machine for themselves (`.config/nextest.toml` says the same to nextest).
const ONE_AFTER_THE_OTHER: [&str; 5] = [
    CLUSTER,
    LINUX_GUEST.0,
    "drover-bench",
    "drover-vmm",
    "drover-probe",
];

/// A part of the tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Formatting, clippy, the documentation's links.
    Lint,
    /// Unit, property and storage tests, fuzz corpora.
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

/// Runs `parts`; prints the count as the last line. Whether nothing failed.
pub fn run(parts: &[Part]) -> bool {
    let mut total = Tally::default();
    match prepare(Need::Tests) {
        Ok(()) => run_parts(parts, &mut total),
        Err(why) => total.check("set-up", Err(why)),
    }
    for name in total.failed() {
        eprintln!("failed: {name}");
    }
    for (name, fate) in &total.tests {
        if let Fate::Skipped(why) = fate {
            eprintln!("SKIPPED: {name}: {why}");
        }
    }
    println!("{}", total.line());
    total.failed().is_empty()
}

fn run_parts(parts: &[Part], total: &mut Tally) {
    if let Some(problem) = kvm_problem() {
        eprintln!("WARNING: {problem} Everything else is tested; the tests with a VM are skipped.");
    }
    if !is_root() {
        eprintln!(
            "WARNING: you are not root: the cluster tests, which make network namespaces, are skipped."
        );
    }
    let mut built = None;
    for &part in parts {
        eprintln!("=== {} ===", part.name());
        if part == Part::Lint {
            lint(total);
            continue;
        }
        // Once, and before the first part that needs it: what cannot be built cannot be tested.
        let built: &Outcome<()> = built.get_or_insert_with(build_chaos);
        if let Err(why) = built {
            total.check(&format!("build for {}", part.name()), Err(why.clone()));
            continue;
        }
        match part {
            Part::Unit => total.add(run_tests("unit", &Selection::the_rest(), View::Shown, &[])),
            Part::Cluster => total.add(run_tests(
                "cluster",
                &Selection::package(CLUSTER),
                View::Shown,
                &[],
            )),
            Part::SeededBugs => seeded::run(total),
            Part::LinuxGuest => total.add(run_tests(
                "linux-guest",
                &Selection::linux_guest(),
                View::Shown,
                &[],
            )),
            Part::Lint => {}
        }
    }
}

fn lint(total: &mut Tally) {
    total.check(
        "formatting (cargo fmt --check)",
        show(cargo().args(["fmt", "--all", "--check"])),
    );
    let clippy = ["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"];
    total.check("lints (cargo clippy)", show(cargo().args(clippy)));
    let mut doc = cargo();
    doc.args(["doc", "--workspace", "--no-deps"])
        .env("RUSTDOCFLAGS", "-D warnings");
    total.check("the documentation's links (cargo doc)", show(&mut doc));
}

/// Which tests.
pub struct Selection {
    packages: Packages,
    names: Names,
}

enum Packages {
    Only(&'static str),
    AllBut(&'static str),
}

enum Names {
    All,
    /// With these words.
    With(&'static str),
    /// Without these words.
    Without(&'static str),
    /// This function, in whatever module.
    Of(&'static str),
}

impl Selection {
    /// Every test of a package.
    fn package(package: &'static str) -> Self {
        Self {
            packages: Packages::Only(package),
            names: Names::All,
        }
    }

    /// The stock kernel's test.
    fn linux_guest() -> Self {
        Self {
            packages: Packages::Only(LINUX_GUEST.0),
            names: Names::With(LINUX_GUEST.1),
        }
    }

    /// One test of a package.
    pub fn test(package: &'static str, test: &'static str) -> Self {
        Self {
            packages: Packages::Only(package),
            names: Names::Of(test),
        }
    }

    /// What no other part runs.
    fn the_rest() -> Self {
        Self {
            packages: Packages::AllBut(CLUSTER),
            names: Names::Without(LINUX_GUEST.1),
        }
    }

    /// In nextest's filter language.
    fn filter(&self) -> String {
        let packages = match self.packages {
            Packages::Only(package) => format!("package({package})"),
            Packages::AllBut(package) => format!("not package({package})"),
        };
        match self.names {
            Names::All => packages,
            Names::With(words) => format!("{packages} and test({words})"),
            Names::Without(words) => format!("{packages} and not test({words})"),
            Names::Of(test) => format!("{packages} and test(/(^|::){test}$/)"),
        }
    }

    fn holds(&self, binary: &TestBinary) -> bool {
        match self.packages {
            Packages::Only(package) => binary.package == package,
            Packages::AllBut(package) => binary.package != package,
        }
    }

    /// In libtest's arguments.
    fn arguments(&self) -> Vec<&'static str> {
        match self.names {
            Names::All => vec![],
            Names::With(words) | Names::Of(words) => vec![words],
            Names::Without(words) => vec!["--skip", words],
        }
    }
}

/// Runs the selected tests, keeps what they printed, and counts them.
pub fn run_tests(part: &str, selection: &Selection, view: View, environment: &[(&str, &str)]) -> Tally {
    let mut tally = Tally::default();
    match try_run(part, selection, view, environment) {
        Ok(counted) => tally = counted,
        Err(why) => tally.check(part, Err(why)),
    }
    tally
}

/// Where the output of a part is kept.
pub fn log_of(part: &str) -> Outcome<PathBuf> {
    Ok(target_dir()?.join("xtask").join(format!("{part}.log")))
}

fn try_run(part: &str, selection: &Selection, view: View, environment: &[(&str, &str)]) -> Outcome<Tally> {
    let path = log_of(part)?;
    let folder = path.parent().expect("it is in a folder");
    let mut log = std::fs::create_dir_all(folder)
        .and_then(|()| File::create(&path))
        .map_err(|error| format!("{}: {error}", path.display()))?;
    if succeeds(cargo().args(["nextest", "--version"])) {
        let mut command = nextest(selection);
        command.envs(environment.iter().copied());
        return Ok(count(
            part,
            &mut command,
            &mut log,
            view,
            Reader::new(Runner::Nextest),
        ));
    }
    let mut tally = Tally::default();
    for binary in build()?.iter().filter(|binary| selection.holds(binary)) {
        let mut command = binary.command();
        command.args(["--show-output", "--color", "never"]);
        if ONE_AFTER_THE_OTHER.contains(&binary.package.as_str()) {
            command.arg("--test-threads=1");
        }
        command
            .args(selection.arguments())
            .envs(environment.iter().copied());
        let reader = Reader::new(Runner::Libtest(binary.id.clone()));
        tally.add(count(&binary.id, &mut command, &mut log, view, reader));
    }
    if tally.tests.is_empty() {
        return Err("no such test was found".to_owned());
    }
    Ok(tally)
}

fn nextest(selection: &Selection) -> Command {
    let mut command = cargo();
    command.args(["nextest", "run", "--workspace", "--tests", "--no-fail-fast"]);
    command.args(["--color", "never", "--show-progress", "none"]);
    command.args(["--status-level", "pass", "--final-status-level", "none"]);
    command.args(["--success-output", "immediate", "--failure-output", "immediate"]);
    command.args(["--features", &chaos_features(), "-E", &selection.filter()]);
    command
}

/// Runs one runner and counts; a count that differs from the runner's own is a failure.
fn count(name: &str, command: &mut Command, log: &mut File, view: View, mut reader: Reader) -> Tally {
    eprintln!("+ {}", typed(command));
    let ended = follow(command, log, view, &mut reader);
    let (mut tally, proof) = reader.finish();
    match ended {
        Err(why) => tally.check(name, Err(why)),
        // A runner that fails although no test did could not build, or found no test.
        Ok(false) if tally.failed().is_empty() => {
            tally.check(name, Err("its runner failed: see above".to_owned()));
        }
        Ok(_) => {
            if let Err(why) = proof {
                tally.check(&format!("{name}: the count"), Err(why));
            }
        }
    }
    tally
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_runners_are_told_the_same() {
        let one = Selection::test("drover-state", "a_rule");
        assert_eq!(one.filter(), "package(drover-state) and test(/(^|::)a_rule$/)");
        assert_eq!(one.arguments(), ["a_rule"]);
        let rest = Selection::the_rest();
        assert_eq!(
            rest.filter(),
            "not package(drover-chaos-cluster) and not test(linux_guest)"
        );
        assert_eq!(rest.arguments(), ["--skip", "linux_guest"]);
    }
}
