//! Building the binaries, and where they lie.
//!
//! A chaos build and a plain one go to the same file names, so the chaos binaries are copied to `<target>/chaos-bin` right
//! after they were built. All tests are compiled with the chaos features: one graph of crates serves them and the binaries.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::Outcome;
use crate::tool::{ask, cargo, show};

/// The packages that have the feature `chaos`: pause points and seeded bugs.
const CHAOS_PACKAGES: [&str; 5] = [
    "drover-controller",
    "drover-node-agent",
    "drover-vmm",
    "drover-state",
    "drover-storage",
];

/// What the cluster tests and the benchmark start.
const DAEMONS: [&str; 3] = ["drover-controller", "drover-agent", "drover-vmm"];

/// Cargo's words for the chaos features of the whole workspace.
pub fn chaos_features() -> String {
    CHAOS_PACKAGES.map(|package| format!("{package}/chaos")).join(",")
}

/// The folder that cargo builds into, wherever it was moved to.
pub fn target_dir() -> Outcome<PathBuf> {
    let text = ask(cargo().args(["metadata", "--no-deps", "--offline", "--format-version", "1"]))?;
    let metadata: Value = serde_json::from_str(&text).map_err(|error| format!("cargo metadata: {error}"))?;
    metadata["target_directory"]
        .as_str()
        .map(PathBuf::from)
        .ok_or_else(|| "cargo metadata names no target folder".into())
}

/// The plain binaries and the probe, as a user runs them.
pub struct Plain {
    /// The command line.
    pub ctl: PathBuf,
    /// The probe guest's kernel.
    pub probe: PathBuf,
}

/// Builds what the demo runs.
pub fn build_plain() -> Outcome<Plain> {
    // The whole workspace, as the tests are built: so that both share every dependency's build.
    show(cargo().args(["build", "--workspace", "--bins"]))?;
    let target = target_dir()?;
    Ok(Plain {
        ctl: target.join("debug/ctl"),
        probe: build_probe(&target)?,
    })
}

/// Builds the probe guest.
pub fn build_probe(target: &Path) -> Outcome<PathBuf> {
    show(cargo().args(["build", "-p", "drover-probe", "--profile", "guest"]))?;
    Ok(target.join("guest/probe"))
}

/// Builds the chaos binaries, puts them aside, and builds the probe.
pub fn build_chaos() -> Outcome<()> {
    let target = target_dir()?;
    // With the tests: what they need of dependencies is then built in once, not a second time without it.
    let what = [
        "build",
        "--workspace",
        "--bins",
        "--tests",
        "--features",
        &chaos_features(),
    ];
    show(cargo().args(what))?;
    put_aside(&target, "chaos-bin")?;
    build_probe(&target).map(|_| ())
}

/// Copies the daemons that were just built to a folder of their own under the target folder, where no later build touches
/// them; that folder.
pub fn put_aside(target: &Path, folder: &str) -> Outcome<PathBuf> {
    let aside = target.join(folder);
    fs::create_dir_all(&aside).map_err(|error| format!("{}: {error}", aside.display()))?;
    for name in DAEMONS {
        let (from, to) = (target.join("debug").join(name), aside.join(name));
        // A running old copy keeps its file: the new one takes the name only.
        let staged = aside.join(format!("{name}.new"));
        fs::copy(&from, &staged)
            .and_then(|_| fs::rename(&staged, &to))
            .map_err(|error| format!("copying {} to {}: {error}", from.display(), to.display()))?;
    }
    Ok(aside)
}
