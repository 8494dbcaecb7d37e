//! The soak of random kill points: its options and its set-up. What it does is in `chaos-tests/cluster` (`soak`).

use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::json;

use crate::Outcome;
use crate::artifacts::{build_chaos, target_dir};
use crate::setup::{Need, is_root, kvm_problem, prepare};

const USAGE: &str = "\
usage: cargo xtask chaos [options]

  --kills N     so many kill points, 1000 by default
  --seed S      draws them from this number; another one each time by default
  --from K      begins with the K-th: with `--kills 1` it does that one again
  --minutes M   begins no further one after M minutes";

/// Kill points when nothing is said.
const KILLS: u64 = 1000;

/// Seeds that are drawn here are short enough to be typed.
const SEEDS: u64 = 1_000_000;

/// What was asked for.
#[derive(Debug, PartialEq, Eq)]
struct Options {
    kills: u64,
    seed: Option<u64>,
    from: u64,
    minutes: Option<u64>,
}

/// Runs the soak with `words` behind `chaos`; returns only if it cannot be started.
pub fn run(words: &[&str]) -> Outcome<()> {
    let options = parse(words)?;
    if !is_root() {
        return Err("The soak makes network namespaces: run it as root.".to_owned());
    }
    if let Some(problem) = kvm_problem() {
        return Err(problem);
    }
    prepare(Need::Tests)?;
    build_chaos()?;
    let target = target_dir()?;
    let seed = options.seed.unwrap_or_else(any_seed);
    let config = json!({
        "binaries": target.join("chaos-bin"), "probe": target.join("guest/probe"), "logs": target.join("xtask/chaos"),
        "seed": seed, "from": options.from, "kills": options.kills, "minutes": options.minutes,
    });
    eprintln!("--- random kill points, seed {seed} ---");
    // In this process' place: Ctrl-C then reaches the one that takes the cluster down.
    let error = Command::new(target.join("debug/drover-soak"))
        .arg(config.to_string())
        .exec();
    Err(format!("drover-soak cannot be started: {error}"))
}

fn any_seed() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::from(now.subsec_nanos()) % SEEDS
}

fn parse(words: &[&str]) -> Outcome<Options> {
    let mut options = Options {
        kills: KILLS,
        seed: None,
        from: 1,
        minutes: None,
    };
    let mut rest = words.iter();
    while let Some(word) = rest.next() {
        let (name, value) = match word.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (*word, None),
        };
        if !["--kills", "--seed", "--from", "--minutes"].contains(&name) {
            return Err(format!("chaos has no option {word:?}\n\n{USAGE}"));
        }
        let value = value
            .or_else(|| rest.next().copied())
            .ok_or_else(|| format!("{name} needs a number\n\n{USAGE}"))?;
        let number: u64 = value
            .parse()
            .map_err(|_| format!("{name} {value:?} is not a whole number\n\n{USAGE}"))?;
        match (name, number) {
            ("--seed", seed) => options.seed = Some(seed),
            (_, 0) => return Err(format!("{name} must be at least 1\n\n{USAGE}")),
            ("--kills", kills) => options.kills = kills,
            ("--from", from) => options.from = from,
            (_, minutes) => options.minutes = Some(minutes),
        }
    }
    Ok(options)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_in_both_forms_are_read_and_a_thousand_kills_are_the_default() {
        let plain = parse(&[]).expect("no option is needed");
        assert_eq!((plain.kills, plain.seed, plain.from), (1000, None, 1));
        let all = parse(&["--kills", "3", "--seed=0", "--from=17", "--minutes", "5"]);
        let want = Options {
            kills: 3,
            seed: Some(0),
            from: 17,
            minutes: Some(5),
        };
        assert_eq!(all, Ok(want));
    }

    #[test]
    fn a_mistyped_option_is_named_before_anything_is_built() {
        for (words, named) in [
            (vec!["--kill", "3"], "\"--kill\""),
            (vec!["7"], "\"7\""),
            (vec!["--kills"], "--kills needs a number"),
            (vec!["--seed", "x"], "--seed \"x\""),
            (vec!["--from=-1"], "--from \"-1\""),
            (vec!["--kills", "0"], "--kills must be at least 1"),
        ] {
            let why = parse(&words).unwrap_err();
            assert!(why.contains(named) && why.contains("usage"), "{words:?}: {why}");
        }
    }
}
