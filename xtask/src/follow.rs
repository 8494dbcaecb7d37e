//! Running a test runner in view, with all it printed kept in a file, and with an end to its time.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use crate::Outcome;
use crate::tally::Reader;

/// A runner, the build of its tests included, is ended after so long. cargo-nextest also ends each test, long before.
const LIMIT: Duration = Duration::from_secs(30 * 60);

/// Who sees what a runner prints while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum View {
    /// Everybody, and the log.
    Shown,
    /// The log: the failures of a run that has to fail are not for readers, or programs, that look for failures.
    LogOnly,
}

/// Runs `command`, counts what it prints, keeps it in `log` and shows it by `view`; whether it succeeded.
pub fn follow(command: &mut Command, log: &mut File, view: View, reader: &mut Reader) -> Outcome<bool> {
    let broken = |error: std::io::Error| format!("running the tests: {error}");
    let (output, input) = std::io::pipe().map_err(broken)?;
    command
        .stdin(Stdio::null())
        .stdout(input.try_clone().map_err(broken)?)
        .stderr(input);
    let mut child = command.spawn().map_err(broken)?;
    // The command holds the pipe's other ends: the output only ends when they are closed.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let root = child.id();
    let (ended, end) = channel::<()>();
    let watch = std::thread::spawn(move || {
        let late = end.recv_timeout(LIMIT) == Err(RecvTimeoutError::Timeout);
        if late {
            kill_with_descendants(root);
        }
        late
    });
    let mut output = BufReader::new(output);
    let mut line = Vec::new();
    while output.read_until(b'\n', &mut line).map_err(broken)? > 0 {
        let text = String::from_utf8_lossy(&line);
        let text = text.trim_end_matches(['\n', '\r']);
        log.write_all(&line).map_err(broken)?;
        if reader.line(text) && view == View::Shown {
            eprintln!("{text}");
        }
        line.clear();
    }
    let status = child.wait().map_err(broken)?;
    drop(ended);
    if watch.join().is_ok_and(|late| late) {
        return Err(format!("it did not end within {} minutes", LIMIT.as_secs() / 60));
    }
    Ok(status.success())
}

/// Kills a process that we started, and whatever it started.
fn kill_with_descendants(root: u32) {
    let mut found = vec![root];
    let parents = parents();
    let mut next = 0;
    while let Some(&parent) = found.get(next) {
        found.extend(
            parents
                .iter()
                .filter(|(_, of)| *of == parent)
                .map(|(pid, _)| *pid),
        );
        next += 1;
    }
    let mut kill = Command::new("sh");
    kill.args(["-c", r#"kill -KILL "$@""#, "kill"]);
    kill.args(found.iter().map(u32::to_string));
    // Those that ended meanwhile make it fail, and that is no harm.
    let _ = kill.stderr(Stdio::null()).status();
}

/// Every process and its parent.
fn parents() -> Vec<(u32, u32)> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
            Some((pid, parent_in(&stat)?))
        })
        .collect()
}

/// Field 4 of proc(5)'s `stat`. The name in field 2 may hold anything, so counting begins after its last bracket.
fn parent_in(stat: &str) -> Option<u32> {
    stat[stat.rfind(')')? + 1..]
        .split_whitespace()
        .nth(1)?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn the_parent_is_found_behind_any_name() {
        assert_eq!(parent_in("7 (a) b) S 5 7 7 0"), Some(5));
        assert_eq!(parent_in("7 a"), None);
    }

    #[test]
    fn a_killed_runner_takes_its_children_with_it() {
        // The child of the shell holds the pipe as well: the output ends only when both are gone.
        let mut shell = Command::new("sh")
            .args(["-c", "sleep 1000 & echo up; wait"])
            .stdout(Stdio::piped())
            .spawn()
            .expect("sh starts");
        let mut output = shell.stdout.take().expect("a pipe");
        let mut up = [0; 3];
        output.read_exact(&mut up).expect("its first line");
        kill_with_descendants(shell.id());
        let mut rest = Vec::new();
        output.read_to_end(&mut rest).expect("the pipe's end");
        assert!(!shell.wait().expect("its end").success());
        assert!(rest.is_empty());
    }
}
