//! `ctl dev` with the real daemons, where they have been built: up, mended, down, and nothing left behind.

use std::path::{Path, PathBuf};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::fake::{Ended, ctl};

const PROGRAMS: [&str; 3] = ["drover-controller", "drover-agent", "drover-vmm"];

/// Why this cannot run here, if it cannot.
fn obstacle() -> Option<String> {
    if let Err(error) = std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        return Some(format!("/dev/kvm cannot be opened: {error}"));
    }
    let folder = Path::new(env!("CARGO_BIN_EXE_ctl")).parent().unwrap();
    let missing = PROGRAMS.into_iter().find(|name| !folder.join(name).is_file())?;
    Some(format!("{missing} is not built in {}", folder.display()))
}

/// A development cluster that is gone when this is dropped.
struct Dev {
    dir: PathBuf,
    _parent: tempfile::TempDir,
}

impl Dev {
    fn new() -> Self {
        // Long: the paths of sockets in it do not fit their addresses.
        let parent = tempfile::Builder::new()
            .prefix("drover-")
            .tempdir_in("/tmp")
            .unwrap();
        Self {
            dir: parent
                .path()
                .join("a-folder-with-a-long-name".repeat(4))
                .join("dev"),
            _parent: parent,
        }
    }

    fn run(&self, line: &str) -> Ended {
        let mut command = ctl(Path::new(""), line);
        Ended::of(
            command
                .env_remove("DROVER_CONTEXT")
                .env("DROVER_DEV_DIR", &self.dir)
                .output()
                .unwrap(),
        )
    }

    fn done(&self, line: &str) -> Value {
        let ended = self.run(&format!("{line} -o json"));
        assert_eq!(ended.code, Some(0), "{line}: {ended:?}");
        ended.json()
    }

    /// Process ids by name.
    fn pids(&self) -> Vec<(String, Option<i32>)> {
        let status = self.done("dev status");
        let pid = |process: &Value| process["pid"].as_i64().map(|pid| i32::try_from(pid).unwrap());
        let name = |process: &Value| process["name"].as_str().unwrap().to_owned();
        status["processes"]
            .as_array()
            .unwrap()
            .iter()
            .map(|process| (name(process), pid(process)))
            .collect()
    }

    /// Processes that name the folder on their command line.
    fn running(&self) -> Vec<String> {
        let entries = std::fs::read_dir("/proc").unwrap().flatten();
        let words = entries.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
        let words = words.map(|words| String::from_utf8_lossy(&words).replace('\0', " "));
        words
            .filter(|words| words.contains("drover-") && words.contains(self.dir.to_str().unwrap()))
            .collect()
    }
}

impl Drop for Dev {
    fn drop(&mut self) {
        if self.dir.exists() {
            self.run("dev down --purge");
        }
    }
}

#[test]
fn a_development_cluster_comes_up_is_mended_and_goes_without_a_trace() {
    if let Some(why) = obstacle() {
        println!("SKIPPED: {why}");
        return;
    }
    let dev = Dev::new();
    let up = dev.done("dev up");
    assert!(up["leader"].is_string(), "{up}");
    let before = dev.pids();
    assert_eq!(before.len(), 6, "{before:?}");
    let hosts = dev.done("host list");
    assert_eq!(hosts.as_array().map(Vec::len), Some(3));
    assert!(
        hosts.as_array().unwrap().iter().all(|host| host["state"] == "up"),
        "{hosts}"
    );

    // Up again changes nothing; what was killed is started again, and only that.
    dev.done("dev up");
    assert_eq!(dev.pids(), before);
    let victims = ["c2", "host3"];
    for (_, pid) in before.iter().filter(|(name, _)| victims.contains(&name.as_str())) {
        kill(Pid::from_raw(pid.unwrap()), Signal::SIGKILL).unwrap();
    }
    dev.done("dev up");
    let after = dev.pids();
    for ((name, old), (_, new)) in before.iter().zip(&after) {
        assert_eq!(
            victims.contains(&name.as_str()),
            old != new,
            "{name}: {old:?} {new:?}"
        );
        assert!(new.is_some(), "{name}");
    }

    let down = dev.done("dev down");
    assert_eq!((&down["controllers"], &down["hosts"]), (&json!(3), &json!(3)));
    assert_eq!(dev.running(), Vec::<String>::new());
    assert!(dev.pids().iter().all(|(_, pid)| pid.is_none()));
    assert_eq!(dev.run("vm list").code, Some(5));

    // The same cluster comes up again: ports, identities and state are kept.
    let again = dev.done("dev up");
    assert_eq!(again["cluster_id"], up["cluster_id"]);
    dev.done("dev down --purge");
    assert!(!dev.dir.exists());
    assert_eq!(dev.running(), Vec::<String>::new());
}

#[test]
fn a_cluster_whose_daemon_cannot_start_says_why() {
    if let Some(why) = obstacle() {
        println!("SKIPPED: {why}");
        return;
    }
    let dev = Dev::new();
    dev.done("dev up");
    dev.done("dev down");
    let config = std::fs::read_to_string(dev.dir.join("c1/config.json")).unwrap();
    let addr = serde_json::from_str::<Value>(&config).unwrap()["listen"]
        .as_str()
        .unwrap()
        .to_owned();
    let _taken = std::net::TcpListener::bind(&addr).unwrap();
    let ended = dev.run("dev up");
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(
        ended.stderr.contains("c1 ended") && ended.stderr.contains(&addr),
        "{ended:?}"
    );
}
