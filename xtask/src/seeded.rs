//! Deliberate mistakes: each is put in, and the test that must see it must fail; without it, the same test must pass.

use crate::follow::View;
use crate::suites::{Selection, log_of, run_tests};
use crate::tally::{Fate, Tally};

/// A deliberate mistake and the test that catches it.
struct Seeded {
    bug: &'static str,
    package: &'static str,
    test: &'static str,
}

const CAUGHT_BY: [Seeded; 5] = [
    Seeded {
        bug: "no-final-dirty-pass",
        package: "drover-chaos-cluster",
        test: "what_is_written_between_the_last_round_and_the_pause_is_not_lost",
    },
    Seeded {
        bug: "resume-before-commit",
        package: "drover-chaos-cluster",
        test: "a_target_that_is_ready_does_not_run_before_the_commit",
    },
    Seeded {
        bug: "resume-on-lost-reply",
        package: "drover-chaos-cluster",
        test: "a_source_that_lost_its_peer_stays_paused_until_the_outcome",
    },
    Seeded {
        bug: "no-epoch-check",
        package: "drover-state",
        test: "a_commit_for_a_stale_epoch_is_refused",
    },
    Seeded {
        bug: "vote-not-synced",
        package: "drover-storage",
        test: "a_saved_vote_survives_a_crash",
    },
];

/// Tries every mistake; each counts as one test.
pub fn run(total: &mut Tally) {
    for bug in drover_points::SEEDED_BUGS {
        let name = format!("seeded bug {bug}");
        match CAUGHT_BY.iter().find(|seeded| seeded.bug == bug) {
            None => total.check(&name, Err("no test is named that catches it".to_owned())),
            Some(seeded) => try_one(total, &name, seeded),
        }
    }
}

fn try_one(total: &mut Tally, name: &str, seeded: &Seeded) {
    let selection = Selection::test(seeded.package, seeded.test);
    let sound = run_tests(
        &format!("seeded-{}-off", seeded.bug),
        &selection,
        View::Shown,
        &[],
    );
    match only(&sound, seeded.test) {
        Ok(Fate::Passed) => {}
        Ok(Fate::Skipped(why)) => return total.skip(name, &why),
        Ok(Fate::Failed) => return total.check(name, Err(format!("{} fails without the bug", seeded.test))),
        Err(why) => return total.check(name, Err(why)),
    }
    let part = format!("seeded-{}-on", seeded.bug);
    eprintln!(
        "--- now with DROVER_SEEDED_BUG={}: the test must not pass ---",
        seeded.bug
    );
    let broken = run_tests(
        &part,
        &selection,
        View::LogOnly,
        &[("DROVER_SEEDED_BUG", seeded.bug)],
    );
    let verdict = match only(&broken, seeded.test) {
        Ok(Fate::Failed) => {
            eprintln!("--- caught: {} ---", seeded.bug);
            Ok(())
        }
        Ok(fate) => Err(format!("{} did not see it: {fate:?}", seeded.test)),
        Err(why) => {
            // No verdict of the test's: what its runner said was kept from view.
            let said = log_of(&part).map(std::fs::read_to_string);
            eprintln!("{}", said.map_or_else(|why| why, Result::unwrap_or_default));
            Err(why)
        }
    };
    total.check(name, verdict);
}

/// The fate of `test`, which must be the one test that ran.
fn only(tally: &Tally, test: &str) -> Result<Fate, String> {
    let mut fates = tally.tests.iter();
    match (fates.next(), fates.next()) {
        (Some((name, fate)), None) if name.ends_with(test) => Ok(fate.clone()),
        (None, _) => Err(format!("the test {test} does not exist")),
        _ => Err(format!("not {test} alone ran: {:?}", tally.names(|_| true))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_seeded_bug_has_the_test_that_catches_it() {
        let named: std::collections::BTreeSet<_> = CAUGHT_BY.iter().map(|seeded| seeded.bug).collect();
        assert_eq!(named, drover_points::SEEDED_BUGS.into_iter().collect());
    }
}
