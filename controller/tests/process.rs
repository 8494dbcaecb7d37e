//! The program itself: three processes that are killed, started again, and told to stop.
#![allow(clippy::unwrap_used, reason = "in a test, unwrap is the check")]

mod support;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::{Files, PATIENCE, usual};

/// One controller's process, and what it says.
struct Process {
    child: Child,
    says: Receiver<String>,
}

impl Process {
    fn start(config: &Path) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_drover-controller"))
            .arg("--config")
            .arg(config)
            .env("DROVER_LOG", "info,openraft=error")
            .env("DROVER_LOG_FORMAT", "json")
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, says) = channel();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        thread::spawn(move || lines.map_while(Result::ok).all(|line| sender.send(line).is_ok()));
        Self { child, says }
    }

    /// Whether it has said, since the last time, that it leads.
    fn leads(&self) -> bool {
        self.says.try_iter().any(|line| says_leading(&line))
    }

    fn end(mut self) -> (ExitStatus, String) {
        let status = self.child.wait().unwrap();
        let mut said = String::new();
        while let Ok(line) = self.says.recv_timeout(PATIENCE) {
            said += &line;
            said.push('\n');
        }
        (status, said)
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.child.id()).unwrap()), signal).unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn says_leading(line: &str) -> bool {
    serde_json::from_str::<serde_json::Value>(line).is_ok_and(|said| said["fields"]["message"] == "leading")
}

/// Which of them is the next to say that it leads.
fn next_leader(processes: &[Option<Process>]) -> usize {
    let started = std::time::Instant::now();
    while started.elapsed() < PATIENCE {
        for (at, process) in processes.iter().enumerate() {
            if process.as_ref().is_some_and(Process::leads) {
                return at;
            }
        }
        thread::sleep(Duration::from_millis(5));
    }
    panic!("no leader within {PATIENCE:?}");
}

#[tokio::test]
async fn three_processes_survive_kill_9_of_their_leader_and_end_on_sigterm() {
    let (files, listeners) = Files::new(3, &usual()).await;
    drop(listeners);
    let start = |at: usize| Some(Process::start(&files.config_file(at)));
    let mut processes: Vec<_> = (0..3).map(start).collect();
    let mut leaders = BTreeSet::new();
    for _ in 0..2 {
        let leader = next_leader(&processes);
        leaders.insert(leader);
        let killed = processes[leader].take().unwrap();
        killed.signal(Signal::SIGKILL);
        killed.end();
        let next = next_leader(&processes);
        assert_ne!(next, leader);
        processes[leader] = start(leader);
        // Whoever comes back follows: to make it say who leads, the present leader must go, too.
        processes[next].take().unwrap().signal(Signal::SIGKILL);
        processes[next] = start(next);
    }
    next_leader(&processes);
    assert!(!leaders.is_empty());
    for process in processes.into_iter().flatten() {
        process.signal(Signal::SIGTERM);
        let (status, said) = process.end();
        assert!(status.success(), "{status}: {said}");
        assert!(said.contains("controller stopped"), "{said}");
    }
}

#[tokio::test]
async fn a_process_says_why_it_does_not_start() {
    let (files, listeners) = Files::new(1, &usual()).await;
    let fails = |config: &Path| {
        let (status, said) = Process::start(config).end();
        assert_eq!(status.code(), Some(1), "{said}");
        said
    };
    let said = fails(&files.config_file(0));
    assert!(
        said.contains(&format!("listen is {}", files.addrs[0])),
        "the port is taken: {said}"
    );
    drop(listeners);
    let said = fails(&files.folder.path().join("nothing.json"));
    assert!(said.contains("nothing.json: No such file"), "{said}");
    let text = std::fs::read_to_string(files.config_file(0)).unwrap();
    std::fs::write(files.config_file(0), text.replace("\"listen\"", "\"lisen\"")).unwrap();
    let said = fails(&files.config_file(0));
    assert!(said.contains("unknown field `lisen`"), "{said}");
}

#[test]
fn what_a_leader_says_is_recognised() {
    let (sender, says) = channel();
    sender
        .send(r#"{"fields":{"message":"leading","term":"Some(1)"}}"#.to_owned())
        .unwrap();
    assert!(says_leading(&says.recv().unwrap()));
    assert!(!says_leading(r#"{"fields":{"message":"leading no more"}}"#));
    drop(sender);
    assert_eq!(says.recv_timeout(PATIENCE), Err(RecvTimeoutError::Disconnected));
}
