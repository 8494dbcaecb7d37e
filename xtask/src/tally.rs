//! Counting tests by what their runner prints.
//!
//! A test that cannot run prints a line `SKIPPED: why` and returns. The runner takes that for a pass; here it becomes a skip.
//! Both runners' forms are read:
//!
//! ```text
//! cargo nextest:          PASS [   0.005s] (1/3) crate::binary module::test        cargo test:  test module::test ... ok
//!                       stdout ───                                                              ---- module::test stdout ----
//!                         SKIPPED: /dev/kvm cannot be opened                                    SKIPPED: /dev/kvm cannot …
//! ```

use std::collections::BTreeMap;

/// What became of one test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It ran and found nothing wrong.
    Passed,
    /// It failed, crashed or was ended because it hung.
    Failed,
    /// It could not run; why.
    Skipped(String),
}

/// The fate of every test of a run, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Binary and test.
    pub tests: BTreeMap<String, Fate>,
}

impl Tally {
    /// Adds the tests of another run.
    pub fn add(&mut self, other: Tally) {
        self.tests.extend(other.tests);
    }

    /// Adds one check that is no runner's test.
    pub fn check(&mut self, name: &str, outcome: Result<(), String>) {
        let fate = match outcome {
            Ok(()) => Fate::Passed,
            Err(why) => {
                eprintln!("FAILED: {name}: {why}");
                Fate::Failed
            }
        };
        self.tests.insert(name.to_owned(), fate);
    }

    /// Adds one test that could not run.
    pub fn skip(&mut self, name: &str, why: &str) {
        eprintln!("SKIPPED: {name}: {why}");
        self.tests.insert(name.to_owned(), Fate::Skipped(why.to_owned()));
    }

    /// The names of the tests with a fate.
    pub fn names(&self, wanted: impl Fn(&Fate) -> bool) -> Vec<&str> {
        self.tests
            .iter()
            .filter(|(_, fate)| wanted(fate))
            .map(|(name, _)| name.as_str())
            .collect()
    }

    /// The names of those that failed.
    pub fn failed(&self) -> Vec<&str> {
        self.names(|fate| *fate == Fate::Failed)
    }

    /// The closing line.
    pub fn line(&self) -> String {
        let passed = self.names(|fate| *fate == Fate::Passed).len();
        let skipped = self.names(|fate| matches!(fate, Fate::Skipped(_))).len();
        format!(
            "{passed} passed, {} failed, {skipped} skipped",
            self.failed().len()
        )
    }
}

/// Reads a runner's output line by line.
#[derive(Debug, Default)]
pub struct Reader {
    tally: Tally,
    /// The binary whose tests run (cargo test).
    binary: String,
    /// The test whose output is being read.
    current: Option<String>,
    /// Whether that output is of a test that passed.
    quiet: bool,
}

impl Reader {
    /// Takes one line; whether a person wants to see it.
    pub fn line(&mut self, line: &str) -> bool {
        let text = line.trim();
        if let Some((fate, name)) = nextest_status(text) {
            self.quiet = fate == Fate::Passed;
            self.record(name, fate);
            return true;
        }
        if let Some(binary) = text
            .strip_prefix("Running ")
            .or_else(|| text.strip_prefix("Doc-tests "))
        {
            binary.clone_into(&mut self.binary);
            self.quiet = false;
            return true;
        }
        if let Some((name, fate)) = libtest_status(text).filter(|_| !self.binary.is_empty()) {
            self.record(&format!("{} {name}", self.binary), fate);
            return true;
        }
        if let Some(name) = text
            .strip_prefix("---- ")
            .and_then(|rest| rest.strip_suffix(" stdout ----"))
        {
            let name = format!("{} {name}", self.binary);
            self.quiet = self
                .tally
                .tests
                .get(&name)
                .is_some_and(|fate| *fate != Fate::Failed);
            self.current = Some(name);
            return !self.quiet;
        }
        if let Some(why) = text.strip_prefix("SKIPPED:") {
            if let Some(fate) = self
                .current
                .as_ref()
                .and_then(|name| self.tally.tests.get_mut(name))
                && *fate == Fate::Passed
            {
                *fate = Fate::Skipped(why.trim().to_owned());
            }
            return true;
        }
        // nextest's rule ends a section, and so do cargo test's summaries.
        if text.starts_with("────") || text == "failures:" {
            self.quiet = false;
        }
        !self.quiet
    }

    fn record(&mut self, name: &str, fate: Fate) {
        self.tally.tests.insert(name.to_owned(), fate);
        self.current = Some(name.to_owned());
    }

    /// What was counted.
    pub fn finish(self) -> Tally {
        self.tally
    }
}

/// `PASS [   0.005s] (1/3) crate::binary test`, and the words for every other end.
fn nextest_status(text: &str) -> Option<(Fate, &str)> {
    let (word, rest) = text.split_once(" [")?;
    let fate = match word {
        "PASS" | "LEAK" => Fate::Passed,
        "FAIL" | "TIMEOUT" | "LEAK-FAIL" | "XFAIL" | "FAIL + LEAK" => Fate::Failed,
        _ if word.starts_with("SIG") || word.starts_with("ABORT") => Fate::Failed,
        _ => return None,
    };
    let (time, name) = rest.split_once("] ")?;
    time.trim().strip_suffix('s')?.parse::<f64>().ok()?;
    let name = name.trim_start();
    let name = match name.strip_prefix('(').and_then(|counted| counted.split_once(')')) {
        Some((_, name)) => name.trim_start(),
        None => name,
    };
    Some((fate, name))
}

/// `test name ... ok`.
fn libtest_status(text: &str) -> Option<(&str, Fate)> {
    let (name, end) = text.strip_prefix("test ")?.rsplit_once(" ... ")?;
    let fate = match end {
        "ok" => Fate::Passed,
        "FAILED" => Fate::Failed,
        _ if end.starts_with("ignored") => Fate::Skipped(end.to_owned()),
        _ => return None,
    };
    Some((name, fate))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> (Tally, Vec<String>) {
        let mut reader = Reader::default();
        let shown = text
            .lines()
            .filter(|line| reader.line(line))
            .map(str::to_owned)
            .collect();
        (reader.finish(), shown)
    }

    const NEXTEST: &str = "\
   Compiling drover-points v0.1.0
────────────
 Nextest run ID 6e20424b with nextest profile: default
    Starting 4 tests across 2 binaries
        PASS [   0.005s] (1/4) drover-a one
  stdout ───

    running 1 test
    noise

        PASS [   0.011s] (2/4) drover-a::cluster two::three
  stdout ───
    SKIPPED: /dev/kvm cannot be opened: no such file

        SLOW [> 60.000s] (───) drover-a four
     TIMEOUT [  60.004s] (3/4) drover-a four
  stdout ───
    it hung
     SIGABRT [   0.004s] (4/4) drover-b five
────────────
     Summary [  60.100s] 4 tests run: 2 passed, 2 failed, 0 skipped
";

    #[test]
    fn a_nextest_run_is_counted_and_its_skips_are_no_passes() {
        let (tally, shown) = read(NEXTEST);
        assert_eq!(tally.line(), "1 passed, 2 failed, 1 skipped");
        assert_eq!(tally.failed(), ["drover-a four", "drover-b five"]);
        assert_eq!(
            tally.tests["drover-a::cluster two::three"],
            Fate::Skipped("/dev/kvm cannot be opened: no such file".to_owned())
        );
        let shown = shown.join("\n");
        assert!(!shown.contains("noise"), "{shown}");
        assert!(
            shown.contains("SKIPPED: /dev/kvm") && shown.contains("it hung"),
            "{shown}"
        );
    }

    #[test]
    fn a_plain_cargo_test_run_is_counted_too() {
        let (tally, shown) = read(
            "\
     Running unittests src/lib.rs (target/debug/deps/a-1)

running 4 tests
test one ... ok
test two ... FAILED
test three ... ok
test four ... ignored, takes an hour

successes:

---- three stdout ----
SKIPPED: no root
---- one stdout ----
noise

failures:

---- two stdout ----
it broke
   Doc-tests a
test src/lib.rs - (line 3) ... ok
test result: FAILED. 2 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out
",
        );
        assert_eq!(tally.line(), "2 passed, 1 failed, 2 skipped");
        assert_eq!(
            tally.failed(),
            ["unittests src/lib.rs (target/debug/deps/a-1) two"]
        );
        let shown = shown.join("\n");
        assert!(shown.contains("it broke") && !shown.contains("noise"), "{shown}");
    }

    #[test]
    fn a_failed_test_stays_failed_whatever_it_says_of_skipping() {
        let (tally, _) = read("        FAIL [   0.005s] (1/1) drover-a one\n    SKIPPED: a lie\n");
        assert_eq!(tally.line(), "0 passed, 1 failed, 0 skipped");
    }
}
