//! The benchmark itself works: one pair of a small guest, with the daemons that the cluster tests use.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

#[test]
fn one_pair_of_a_small_guest_gives_figures_a_table_and_a_picture() {
    let program = Path::new(env!("CARGO_BIN_EXE_drover-bench"));
    let target = program
        .ancestors()
        .nth(2)
        .expect("it is in a profile's folder of the target folder");
    let dir = tempfile::tempdir().unwrap();
    let (json, pictures) = (dir.path().join("bench.json"), dir.path().join("pictures"));
    let output = Command::new(program)
        .args(["migration", "--only", "smoke", "--pairs", "1"])
        .arg("--binaries")
        .arg(target.join("chaos-bin"))
        .arg("--probe")
        .arg(target.join("guest/probe"))
        .arg("--json")
        .arg(&json)
        .arg("--pictures")
        .arg(&pictures)
        .output()
        .unwrap();
    let (said, table) = (
        String::from_utf8_lossy(&output.stderr),
        String::from_utf8_lossy(&output.stdout),
    );
    if let Some(why) = said.strip_prefix("no benchmark on this machine: ") {
        println!("SKIPPED: {}", why.trim());
        return;
    }
    assert!(output.status.success(), "{said}");
    assert!(table.contains("| smoke"), "{table}");
    let json: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    let smoke = &json["workloads"][0];
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
    let picture = std::fs::read_to_string(pictures.join("smoke.svg")).unwrap();
    assert_eq!(picture.matches("<polyline").count(), 4, "{picture}");
}
