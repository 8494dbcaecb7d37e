//! What is done to the n-th migration of a soak: drawn from the seed and the number alone, so that any of them can be done
//! again without those before it. Pure.

use std::fmt;
use std::time::Duration;

use crate::points::{self, Stage, stage};
use crate::verdicts::{self, Ending, Victim, is_there};

/// The longest delay after a migration was asked for, ms. A migration of the soak's guest takes 200 to 600, so a share of
/// the blows comes too late, when nothing may come of them.
const DELAY_MS_MAX: u64 = 600;

/// The cap of those migrations that are slowed down, MiB/s: their rounds take long enough to be hit.
const SLOW_MIB_S: u64 = 64;

/// Hosts beside the source.
const OTHERS: u64 = crate::cluster::PARTIES as u64 - 1;

/// What happens to a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blow {
    /// `kill -9`; daemons are started again.
    Kill(Victim),
    /// The user changes their mind.
    Cancel,
    /// Every packet between the two hosts is lost until the migration has ended.
    Cut,
}

/// When.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// While somebody waits at this pause point.
    At(&'static str),
    /// So long after the migration was accepted.
    After(Duration),
}

/// One migration and what happens to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kill {
    /// The soak's seed.
    pub seed: u64,
    /// Which of the soak's kills, from 1.
    pub number: u64,
    /// What happens.
    pub blow: Blow,
    /// When.
    pub moment: Moment,
    /// The target is so many hosts after the source, in their ring.
    pub hops: usize,
    /// The migration's bandwidth cap, MiB/s; 0 is none.
    pub bandwidth_mib_s: u64,
    /// The abort, if there is one, is held back for a while before it is proposed: a source that resumes by itself is seen.
    pub abort_held: bool,
    /// The source waits a while before it pauses, and the guest writes on: a last pass that takes too little is seen.
    pub late_writes: bool,
}

/// Steele, Lea and Flood's SplitMix64 (OOPSLA 2014): a few lines, and every seed is a good one.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`. The bias of the remainder is far below what a soak could show.
    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

impl Kill {
    /// The kill of that number.
    pub fn of(seed: u64, number: u64) -> Self {
        // Two rounds apart, so that neighbouring numbers and neighbouring seeds have nothing in common.
        let mut dice = Dice(Dice(seed).next() ^ number.wrapping_mul(0xd6e8_feb8_6659_fd93));
        let blow = match dice.below(100) {
            0..=16 => Blow::Kill(Victim::SourceVmm),
            17..=33 => Blow::Kill(Victim::TargetVmm),
            34..=49 => Blow::Kill(Victim::SourceAgent),
            50..=65 => Blow::Kill(Victim::TargetAgent),
            66..=80 => Blow::Kill(Victim::Leader),
            81..=93 => Blow::Cancel,
            _ => Blow::Cut,
        };
        let moment = match dice.below(10) {
            0..=5 => Moment::At(draw_point(&mut dice, blow)),
            _ => Moment::After(Duration::from_millis(dice.below(DELAY_MS_MAX + 1))),
        };
        let hops = 1 + usize::try_from(dice.below(OTHERS)).expect("a handful of hosts");
        let bandwidth_mib_s = match dice.below(3) {
            0 => SLOW_MIB_S,
            _ => 0,
        };
        let paused = matches!(moment, Moment::At(point) if stage(point) == Stage::Paused);
        // Who cancels waits for the abort's answer, so it is not held back then.
        let abort_held = (dice.below(2) == 0 || paused) && blow != Blow::Cancel;
        // Where the blow falls at that very point the source waits anyway.
        let late_writes = dice.below(2) == 0 && moment != Moment::At(points::BEFORE_PAUSE);
        Self {
            seed,
            number,
            blow,
            moment,
            hops,
            bandwidth_mib_s,
            abort_held,
            late_writes,
        }
    }

    /// What may come of it, if it hit anything.
    pub fn allowed(&self) -> &'static [Ending] {
        const EITHER: &[Ending] = &[Ending::Moved, Ending::Stayed];
        match (self.blow, self.moment) {
            (Blow::Kill(victim), Moment::At(point)) => verdicts::of_kill(victim, point),
            (Blow::Kill(victim), Moment::After(_)) => verdicts::of_kill_anywhere(victim),
            (Blow::Cut, Moment::At(point)) => verdicts::of_cut(point),
            (Blow::Cancel, Moment::At(point)) => match stage(point) {
                Stage::Committed => &[Ending::Moved],
                _ if verdicts::UNDECIDED.contains(&point) => EITHER,
                _ => &[Ending::Stayed],
            },
            (Blow::Cut | Blow::Cancel, Moment::After(_)) => EITHER,
        }
    }

    /// Whether guest memory may be gone after it.
    pub fn may_lose_the_vm(&self) -> bool {
        matches!(self.blow, Blow::Kill(Victim::SourceVmm | Victim::TargetVmm))
    }
}

fn draw_point(dice: &mut Dice, blow: Blow) -> &'static str {
    let points: Vec<_> = points::all()
        .filter(|point| match blow {
            Blow::Kill(victim) => is_there(victim, point),
            Blow::Cancel | Blow::Cut => true,
        })
        .collect();
    let many = u64::try_from(points.len()).expect("a few dozen points");
    points[usize::try_from(dice.below(many)).expect("an index of the list")]
}

impl fmt::Display for Blow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Blow::Kill(Victim::Leader) => "kill the leader",
            Blow::Kill(Victim::SourceVmm) => "kill the source VMM",
            Blow::Kill(Victim::TargetVmm) => "kill the target VMM",
            Blow::Kill(Victim::SourceAgent) => "kill the source agent",
            Blow::Kill(Victim::TargetAgent) => "kill the target agent",
            Blow::Cancel => "cancel",
            Blow::Cut => "cut the link",
        })
    }
}

impl fmt::Display for Kill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.blow)?;
        match self.moment {
            Moment::At(point) => write!(f, "at {point}")?,
            Moment::After(delay) => write!(f, "after {} ms", delay.as_millis())?,
        }
        if self.bandwidth_mib_s > 0 {
            write!(f, ", {} MiB/s", self.bandwidth_mib_s)?;
        }
        if self.abort_held {
            write!(f, ", abort held")?;
        }
        if self.late_writes {
            write!(f, ", late writes")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_kill_is_the_same_whenever_it_is_drawn_and_differs_from_its_neighbours() {
        let drawn: Vec<_> = (1..=50).map(|number| Kill::of(7, number)).collect();
        assert_eq!(drawn[41], Kill::of(7, 42));
        let texts: BTreeSet<_> = drawn.iter().map(ToString::to_string).collect();
        assert!(texts.len() > 40, "{texts:#?}");
        assert_ne!(
            Kill::of(8, 42).to_string() + &Kill::of(8, 43).to_string(),
            Kill::of(7, 42).to_string() + &Kill::of(7, 43).to_string()
        );
    }

    #[test]
    fn a_thousand_kills_hit_every_party_at_every_point_it_has_and_in_between() {
        let kills: Vec<_> = (1..=1000).map(|number| Kill::of(1, number)).collect();
        let points: BTreeSet<_> = kills
            .iter()
            .filter_map(|kill| match kill.moment {
                Moment::At(point) => Some(point),
                Moment::After(_) => None,
            })
            .collect();
        assert_eq!(points, points::all().collect());
        for victim in [
            Victim::Leader,
            Victim::SourceVmm,
            Victim::TargetVmm,
            Victim::SourceAgent,
            Victim::TargetAgent,
        ] {
            let of_it: Vec<_> = kills
                .iter()
                .filter(|kill| kill.blow == Blow::Kill(victim))
                .collect();
            let delayed = of_it
                .iter()
                .filter(|kill| matches!(kill.moment, Moment::After(_)));
            assert!(
                of_it.len() > 100 && delayed.count() > 30,
                "{victim:?}: {}",
                of_it.len()
            );
        }
        let others = kills
            .iter()
            .filter(|kill| matches!(kill.blow, Blow::Cancel | Blow::Cut));
        assert!((120..300).contains(&others.count()));
    }

    #[test]
    fn nobody_is_killed_where_it_is_not() {
        for number in 1..=2000 {
            let kill = Kill::of(3, number);
            if let (Blow::Kill(victim), Moment::At(point)) = (kill.blow, kill.moment) {
                assert!(is_there(victim, point), "{kill}");
            }
            assert!(!kill.allowed().is_empty(), "{kill}");
        }
    }
}
