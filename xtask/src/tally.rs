//! Counting tests by what their runner prints.
//!
//! A test that cannot run prints a line `SKIPPED: why` and returns. The runner takes that for a pass; here it becomes a skip.
//! Both runners' forms are read, and what was read is compared with the runner's own count: a line that was misread is a failure, never
//! a test less.
//!
//! ```text
//! cargo nextest:          PASS [   0.005s] (1/3) crate::binary module::test        libtest:     test module::test ... ok
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

/// Whose output is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Runner {
    /// cargo-nextest.
    Nextest,
    /// libtest, in the test binary of that name.
    Libtest(String),
}

/// What a runner says at its end that it did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Said {
    passed: usize,
    failed: usize,
    ignored: usize,
}

/// Reads a runner's output line by line.
#[derive(Debug)]
pub struct Reader {
    runner: Runner,
    tally: Tally,
    /// What the runner counted itself.
    said: Option<Said>,
    /// The test whose output is being read.
    current: Option<String>,
    /// Whether that output is of a test that passed.
    quiet: bool,
    /// libtest: a test whose line came with noise, so that its end may still follow.
    open: Option<String>,
    /// libtest: the tests have run, their output follows.
    reported: bool,
}

impl Reader {
    /// Nothing read yet.
    pub fn new(runner: Runner) -> Self {
        Self {
            runner,
            tally: Tally::default(),
            said: None,
            current: None,
            quiet: false,
            open: None,
            reported: false,
        }
    }

    /// Takes one line; whether a person wants to see it.
    pub fn line(&mut self, line: &str) -> bool {
        let text = line.trim();
        if let Some(why) = text.strip_prefix("SKIPPED:") {
            self.skipped(why.trim());
            return true;
        }
        match self.runner.clone() {
            Runner::Nextest => self.nextest(text),
            Runner::Libtest(binary) => self.libtest(&binary, text),
        }
    }

    fn nextest(&mut self, text: &str) -> bool {
        if let Some((fate, name)) = nextest_status(text) {
            self.quiet = fate == Fate::Passed;
            self.record(name, fate);
            return true;
        }
        if let Some(said) = nextest_summary(text) {
            self.said = Some(said);
            self.quiet = false;
        }
        // A rule ends a test's output.
        if text.starts_with("────") {
            self.quiet = false;
        }
        !self.quiet
    }

    fn libtest(&mut self, binary: &str, text: &str) -> bool {
        if let Some(said) = libtest_summary(text) {
            self.said = Some(said);
            self.quiet = false;
            return true;
        }
        if let Some(name) = text
            .strip_prefix("---- ")
            .and_then(|rest| rest.strip_suffix(" stdout ----"))
        {
            let name = format!("{binary} {name}");
            self.quiet = self
                .tally
                .tests
                .get(&name)
                .is_some_and(|fate| *fate != Fate::Failed);
            self.current = Some(name);
            return !self.quiet;
        }
        if text == "successes:" || text == "failures:" {
            (self.reported, self.quiet, self.open) = (true, false, None);
            return true;
        }
        if self.reported {
            return !self.quiet;
        }
        if let Some((name, end)) = libtest_line(text) {
            let name = format!("{binary} {name}");
            let (fate, sure) = libtest_end(end);
            self.open = (!sure).then(|| name.clone());
            if let Some(fate) = fate {
                self.record(&name, fate);
            }
        } else if let Some(name) = self.open.clone()
            && let (Some(fate), _) = libtest_end(text)
        {
            self.record(&name, fate);
        }
        true
    }

    /// The test that is being read says that it cannot run.
    fn skipped(&mut self, why: &str) {
        if let Some(fate) = self
            .current
            .as_ref()
            .and_then(|name| self.tally.tests.get_mut(name))
            && *fate == Fate::Passed
        {
            *fate = Fate::Skipped(why.to_owned());
        }
    }

    fn record(&mut self, name: &str, fate: Fate) {
        self.tally.tests.insert(name.to_owned(), fate);
        self.current = Some(name.to_owned());
    }

    /// What was counted, and whether the runner counted the same.
    pub fn finish(self) -> (Tally, Result<(), String>) {
        let failed = self.tally.failed().len();
        let all = self.tally.tests.len();
        let proof = match self.said {
            None => Err("the runner ended without its own count".to_owned()),
            Some(said) if said.failed != failed || said.passed + said.failed + said.ignored != all => Err(
                format!("{all} tests were read, {failed} failed; the runner says {said:?}"),
            ),
            Some(_) => Ok(()),
        };
        (self.tally, proof)
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

/// `Summary [   5.010s] 4 tests run: 2 passed (1 slow), 1 failed, 1 timed out, 7 skipped`: what nextest skips it did not run.
fn nextest_summary(text: &str) -> Option<Said> {
    let (_, counts) = text
        .strip_prefix("Summary [")?
        .split_once("run: ")
        .filter(|(run, _)| run.ends_with("tests ") || run.ends_with("test "))?;
    let mut said = Said::default();
    let mut depth = 0_u32;
    let plain: String = counts
        .chars()
        .filter(|&c| {
            depth += u32::from(c == '(');
            let inside = depth > 0;
            depth -= u32::from(c == ')' && inside);
            !inside
        })
        .collect();
    for item in plain.split(',') {
        let (number, word) = item.trim().split_once(' ')?;
        let number: usize = number.parse().ok()?;
        match word.trim() {
            "passed" => said.passed += number,
            "skipped" => {}
            _ => said.failed += number,
        }
    }
    Some(said)
}

/// `test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.01s`.
fn libtest_summary(text: &str) -> Option<Said> {
    let (_, counts) = text.strip_prefix("test result: ")?.split_once(". ")?;
    let number = |word: &str| -> Option<usize> {
        counts
            .split(';')
            .find_map(|item| item.trim().strip_suffix(word)?.trim_end().parse().ok())
    };
    Some(Said {
        passed: number("passed")?,
        failed: number("failed")?,
        ignored: number("ignored")?,
    })
}

/// The name and the rest of `test name ... rest`, whatever was written to the same line before.
fn libtest_line(text: &str) -> Option<(&str, &str)> {
    let is_name = |name: &str| {
        !name.is_empty()
            && name
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"_:".contains(&byte))
    };
    text.match_indices(" ... ")
        .chain(text.match_indices(" ..."))
        .find_map(|(at, dots)| {
            let before = &text[..at];
            let before = before.strip_suffix(" - should panic").unwrap_or(before);
            let name = &before[before.rfind("test ")? + "test ".len()..];
            is_name(name).then_some((name, &text[at + dots.len()..]))
        })
}

/// How a test ended, and whether nothing else stood there: noise may end with the same letters.
fn libtest_end(end: &str) -> (Option<Fate>, bool) {
    let (fate, word) = if end.starts_with("ignored") {
        return (Some(Fate::Skipped(end.to_owned())), true);
    } else if end.ends_with("ok") {
        (Fate::Passed, "ok")
    } else if end.ends_with("FAILED") {
        (Fate::Failed, "FAILED")
    } else {
        return (None, false);
    };
    (Some(fate), end == word)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(runner: Runner, text: &str) -> (Tally, Result<(), String>, Vec<String>) {
        let mut reader = Reader::new(runner);
        let shown = text
            .lines()
            .filter(|line| reader.line(line))
            .map(str::to_owned)
            .collect();
        let (tally, proof) = reader.finish();
        (tally, proof, shown)
    }

    fn libtest(text: &str) -> (Tally, Result<(), String>, Vec<String>) {
        read(Runner::Libtest("a".to_owned()), text)
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
     Summary [  60.100s] 4 tests run: 2 passed (1 slow, 1 leaky), 1 failed, 1 timed out, 9 skipped
";

    #[test]
    fn a_nextest_run_is_counted_and_its_skips_are_no_passes() {
        let (tally, proof, shown) = read(Runner::Nextest, NEXTEST);
        assert_eq!(proof, Ok(()));
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
    fn a_run_of_a_test_binary_is_counted_too() {
        let (tally, proof, shown) = libtest(
            "\
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
test five ... ok

failures:

---- two stdout ----
it broke

test result: FAILED. 2 passed; 1 failed; 1 ignored; 0 measured; 7 filtered out; finished in 0.00s
",
        );
        assert_eq!(proof, Ok(()));
        assert_eq!(tally.line(), "1 passed, 1 failed, 2 skipped");
        assert_eq!(tally.failed(), ["a two"]);
        let shown = shown.join("\n");
        assert!(shown.contains("it broke") && !shown.contains("noise"), "{shown}");
    }

    #[test]
    fn noise_on_a_tests_line_does_not_hide_its_end() {
        let (tally, proof, _) = libtest(
            "\
test one ... a child says ok
but goes on
FAILED
a child saystest two::three ... ok
test four - should panic ... more
and more noiseok
test five ...
ok
test result: FAILED. 3 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
",
        );
        assert_eq!(proof, Ok(()));
        assert_eq!(tally.failed(), ["a one"]);
        let names: Vec<_> = tally.tests.keys().collect();
        assert_eq!(names, ["a five", "a four", "a one", "a two::three"]);
    }

    #[test]
    fn a_count_that_differs_from_the_runners_is_an_error() {
        for end in [
            "test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out",
            "test result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out",
            "",
        ] {
            let (_, proof, _) = libtest(&format!("test one ... ok\n{end}\n"));
            assert!(proof.is_err(), "{end}");
        }
        let summary =
            "PASS [   0.005s] (1/1) a one\n     Summary [   0.1s] 2 tests run: 2 passed, 0 skipped\n";
        assert!(read(Runner::Nextest, summary).1.is_err());
    }

    #[test]
    fn a_failed_test_stays_failed_whatever_it_says_of_skipping() {
        let text = "        FAIL [   0.005s] (1/1) drover-a one\n    SKIPPED: a lie\n";
        assert_eq!(
            read(Runner::Nextest, text).0.line(),
            "0 passed, 1 failed, 0 skipped"
        );
    }
}
