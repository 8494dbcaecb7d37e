//! The benchmark's set-up; what it measures and how is in `bench/` and docs/bench.md.
//!
//! The daemons are those of the ordinary debug profile without the chaos features, as the demo runs them, put aside so that
//! a build meanwhile does not change what is measured.

use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::Outcome;
use crate::artifacts::{build_plain, put_aside, target_dir};
use crate::setup::{Need, is_root, kvm_problem, prepare};
use crate::tool::typed;

/// The benchmarks and their options, each with a value. Their values are judged by `drover-bench`.
const BENCHMARKS: [(&str, &[&str]); 4] = [
    ("migration", &["--json", "--pairs", "--only", "--pictures"]),
    ("vmm", &["--json", "--runs", "--only"]),
    ("disk", &["--json", "--runs", "--only"]),
    ("net", &["--json", "--runs", "--only"]),
];

const USAGE: &str = "\
usage: cargo xtask bench migration|vmm|disk|net [options]

  migration        one guest moved by us and by QEMU in turns
  vmm              a VMM's start, and what it holds of memory beside its guest's
  disk             requests a second of a virtio disk
  net              frames through a virtio NIC on a tap

  --json FILE      writes every figure to this file
  --only NAME,…    only these workloads or rows
  --pairs N        migration: moves of each side a workload, 5 by default
  --pictures DIR   migration: draws a picture a workload into this folder
  --runs N         the others: runs of each side a row, 5 by default";

/// Runs the benchmark with `words` behind `bench`; returns only if it cannot be started.
pub fn run(words: &[&str]) -> Outcome<()> {
    check(words)?;
    if !is_root() {
        return Err("The benchmark makes network namespaces: run it as root.".to_owned());
    }
    if let Some(problem) = kvm_problem() {
        return Err(problem);
    }
    prepare(Need::Tests)?;
    let plain = build_plain()?;
    let target = target_dir()?;
    let aside = put_aside(&target, "bench-bin")?;
    let mut bench = Command::new(target.join("debug/drover-bench"));
    bench
        .args(words)
        .arg("--binaries")
        .arg(aside)
        .arg("--probe")
        .arg(plain.probe);
    eprintln!("+ {}", typed(&bench));
    // In this process' place: Ctrl-C then reaches the one that takes the cluster down.
    let error = bench.exec();
    Err(format!("{} cannot be started: {error}", typed(&bench)))
}

/// Finds a mistyped word before minutes of building.
fn check(words: &[&str]) -> Outcome<()> {
    let known = words.split_first().and_then(|(name, rest)| {
        let (_, options) = BENCHMARKS.iter().find(|(known, _)| known == name)?;
        Some((*name, *options, rest))
    });
    let Some((benchmark, options, mut rest)) = known else {
        return Err(USAGE.to_owned());
    };
    while let Some((option, after)) = rest.split_first() {
        let (name, value) = match option.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (*option, None),
        };
        if !options.contains(&name) {
            return Err(format!("bench {benchmark} has no option {option:?}\n\n{USAGE}"));
        }
        rest = match (value, after.split_first()) {
            (Some(value), _) if !value.is_empty() => after,
            (None, Some((value, after))) if !value.starts_with("--") => after,
            _ => return Err(format!("{name} needs a value\n\n{USAGE}")),
        };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_in_both_forms_pass_and_whatever_is_mistyped_is_named() {
        assert_eq!(check(&["migration"]), Ok(()));
        assert_eq!(check(&["disk", "--runs", "1", "--json=x"]), Ok(()));
        assert_eq!(check(&["migration", "--pairs", "3", "--only=idle,zipf"]), Ok(()));
        for (words, named) in [
            (vec![], "usage"),
            (vec!["migrate"], "usage"),
            (vec!["migration", "--pair", "3"], "\"--pair\""),
            (vec!["vmm", "--pairs", "3"], "\"--pairs\""),
            (vec!["migration", "idle"], "\"idle\""),
            (vec!["migration", "--json"], "--json needs a value"),
            (vec!["migration", "--json="], "--json needs a value"),
            (
                vec!["migration", "--json", "--pairs", "3"],
                "--json needs a value",
            ),
        ] {
            let why = check(&words).unwrap_err();
            assert!(why.contains(named), "{words:?}: {why}");
        }
    }
}
