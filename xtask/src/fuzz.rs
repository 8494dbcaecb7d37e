//! Fuzzing: every folder `fuzz` with a manifest is a cargo-fuzz project. Its corpora are replayed by the ordinary tests; this
//! looks for new inputs.

use std::path::{Path, PathBuf};

use crate::Outcome;
use crate::setup::{Need, prepare};
use crate::tool::{ask, cargo, show, succeeds};

/// Fuzzes every target for `seconds`.
pub fn run(seconds: u64) -> Outcome<()> {
    prepare(Need::Build)?;
    if !succeeds(cargo().args(["fuzz", "--version"])) {
        println!("SKIPPED: cargo-fuzz is not installed: cargo install cargo-fuzz");
        return Err("Nothing was fuzzed.".to_owned());
    }
    let projects = projects(Path::new("."));
    if projects.is_empty() {
        return Err("no folder `fuzz` holds a Cargo.toml".to_owned());
    }
    for project in projects {
        // The sanitizer coverage that cargo-fuzz asks for is a nightly option; the compiler is the pinned stable one.
        let cargo_fuzz = |words: &[&str]| {
            let mut command = cargo();
            command
                .env("RUSTC_BOOTSTRAP", "1")
                .arg("fuzz")
                .args(words)
                .arg("--fuzz-dir")
                .arg(&project);
            command
        };
        for target in ask(&mut cargo_fuzz(&["list"]))?.split_whitespace() {
            let mut command = cargo_fuzz(&["run"]);
            command
                .args(["--sanitizer", "none", target, "--"])
                .arg(format!("-max_total_time={seconds}"));
            show(&mut command)?;
        }
    }
    Ok(())
}

/// The cargo-fuzz projects at most two folders down.
fn projects(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let folders = |dir: &Path| -> Vec<PathBuf> {
        let Ok(entries) = std::fs::read_dir(dir) else {
            return Vec::new();
        };
        entries
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.is_dir())
            .collect()
    };
    for part in std::iter::once(root.to_owned()).chain(folders(root)) {
        let fuzz = part.join("fuzz");
        if fuzz.join("Cargo.toml").exists() {
            found.push(fuzz);
        }
    }
    found.sort();
    found
}
