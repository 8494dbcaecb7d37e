//! What a developer types: `cargo xtask demo | test [part] | chaos | bench | fuzz`.
//!
//! Every command begins with the set-up (`setup`): packages that are missing, whether `/dev/kvm` can be used. Then it builds
//! (`artifacts`) and does its work. It depends on almost nothing, so that it starts within seconds on a fresh machine.

mod artifacts;
mod bench;
mod binaries;
mod chaos;
mod demo;
mod follow;
mod fuzz;
mod seeded;
mod setup;
mod suites;
mod tally;
mod tool;

use std::process::ExitCode;

const USAGE: &str = "\
usage: cargo xtask <command>

  demo                 a cluster on this machine, one VM, one live migration, and what the guest saw of it
  test                 everything: formatting, lints, unit and property tests, cluster tests, seeded bugs, a Linux guest
  test unit            unit and property tests of every crate
  test cluster         real processes and KVM guests in network namespaces, broken at every step
  test seeded-bugs     puts each deliberate mistake in and expects its test to fail
  test linux-guest     a stock Debian kernel, migrated inside an emulated host
  test lint            formatting, clippy, the documentation's links
  test fuzz            as `fuzz`, ten seconds a target
  chaos                random kill points during migrations, a thousand of them; `chaos --help` has the options
  bench migration      one guest moved by us and by QEMU in turns, measured side by side; docs/bench.md has the options
  bench vmm|disk|net   a VMM's start and memory, its disk's requests, its NIC's frames, beside QEMU's
  fuzz [seconds]       fuzzes every decoder, 60 seconds a target by default (needs cargo-fuzz)";

/// What ends a command early: one sentence for a person.
type Outcome<T> = Result<T, String>;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["demo"] => demo::run(),
        // What says how the tests went is its last line, the count.
        ["test"] => return verdict(suites::run(&suites::Part::ALL)),
        ["test", "fuzz"] => fuzz::run(10),
        ["test", part] => match suites::Part::parse(part) {
            Some(part) => return verdict(suites::run(&[part])),
            None => Err(format!("there is no part {part:?} of the tests\n\n{USAGE}")),
        },
        ["chaos", rest @ ..] => chaos::run(rest),
        ["bench", rest @ ..] => bench::run(rest),
        ["fuzz"] => fuzz::run(60),
        ["fuzz", seconds] => match seconds.parse() {
            Ok(seconds) => fuzz::run(seconds),
            Err(_) => Err(format!("{seconds:?} is not a number of seconds\n\n{USAGE}")),
        },
        _ => Err(USAGE.to_owned()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("{why}");
            ExitCode::FAILURE
        }
    }
}

fn verdict(good: bool) -> ExitCode {
    if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
