//! The benchmarks themselves work: one pair of runs each, with the daemons that the cluster tests use.

#![allow(clippy::unwrap_used, reason = "a test may, its helpers too")]

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;

/// What a benchmark said and wrote.
struct Done {
    table: String,
    json: Value,
    dir: TempDir,
}

/// Runs the benchmark `words`; none, and it says so, where this machine cannot.
fn bench(words: &[&str]) -> Option<Done> {
    let program = Path::new(env!("CARGO_BIN_EXE_drover-bench"));
    let target: PathBuf = program
        .ancestors()
        .nth(2)
        .expect("it is in a profile's folder of the target folder")
        .into();
    let dir = tempfile::tempdir().unwrap();
    let json = dir.path().join("bench.json");
    let output = Command::new(program)
        .args(words)
        .arg("--binaries")
        .arg(target.join("chaos-bin"))
        .arg("--probe")
        .arg(target.join("guest/probe"))
        .arg("--json")
        .arg(&json)
        .current_dir(&dir)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    if let Some(why) = said.strip_prefix("no benchmark on this machine: ") {
        println!("SKIPPED: {}", why.trim());
        return None;
    }
    assert!(output.status.success(), "{said}");
    Some(Done {
        table: String::from_utf8_lossy(&output.stdout).into_owned(),
        json: serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap(),
        dir,
    })
}

/// Both sides have each figure of the row, which is the first, in their medians, and the ratio of it.
fn assert_has(done: &Done, row: &str, figures: &[&str]) {
    assert!(done.table.contains(&format!("| {row}")), "{}", done.table);
    let found = &done.json["rows"][0];
    assert_eq!(found["name"], row);
    for side in ["ours", "qemu", "ratio"] {
        for figure in figures {
            let value = found[side][figure].as_f64().unwrap_or(0.0);
            assert!(value > 0.0, "{side} {figure}: {found:#}");
        }
    }
    assert_eq!(found["runs"].as_array().map(Vec::len), Some(2), "{found:#}");
}

#[test]
fn one_pair_of_a_small_guest_gives_figures_a_table_and_a_picture() {
    let words = [
        "migration",
        "--only",
        "smoke",
        "--pairs",
        "1",
        "--pictures",
        "pictures",
    ];
    let Some(done) = bench(&words) else {
        return;
    };
    assert!(done.table.contains("| smoke"), "{}", done.table);
    let smoke = &done.json["workloads"][0];
    for side in ["ours", "qemu"] {
        for figure in ["total_ms", "blackout_ms", "guest_gap_ms", "bytes", "cpu_s"] {
            let value = smoke[side][figure].as_f64().unwrap_or(-1.0);
            assert!(value >= 0.0, "{side} {figure}: {smoke:#}");
        }
        // What the guest owns does not compress and was all sent.
        assert!(smoke[side]["bytes"].as_f64() > Some(16e6), "{smoke:#}");
    }
    assert!(smoke["copy"]["mib_per_s"].as_f64() > Some(0.0), "{smoke:#}");
    assert_eq!(smoke["runs"].as_array().map(Vec::len), Some(3), "{smoke:#}");
    let picture = std::fs::read_to_string(done.dir.path().join("pictures/smoke.svg")).unwrap();
    assert_eq!(picture.matches("<polyline").count(), 4, "{picture}");
}

#[test]
fn a_start_of_each_side_gives_times_and_memory() {
    if let Some(done) = bench(&["vmm", "--only", "microvm", "--runs", "1"]) {
        assert_has(
            &done,
            "microvm",
            &["start_ms", "kernel_ms", "anon_mib", "pss_mib"],
        );
    }
}

#[test]
fn a_disk_of_each_side_gives_requests_and_loses_none() {
    if let Some(done) = bench(&["disk", "--only", "mixed-32-uring", "--runs", "1"]) {
        assert_has(&done, "mixed-32-uring", &["iops"]);
    }
}

#[test]
fn a_nic_of_each_side_gives_frames_both_ways() {
    for row in ["send-1514", "receive-1514"] {
        if let Some(done) = bench(&["net", "--only", row, "--runs", "1"]) {
            assert_has(&done, row, &["frames_per_s", "mbit_per_s"]);
        }
    }
}
