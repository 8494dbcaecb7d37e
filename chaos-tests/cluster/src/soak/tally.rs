//! What a soak has seen: counts by blow and ending, and how long kills take.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use crate::soak::Outcome;
use crate::soak::plan::Kill;

/// The counts.
#[derive(Debug, Default)]
pub struct Tally {
    counts: BTreeMap<String, BTreeMap<String, u64>>,
    lengths: Vec<Duration>,
}

impl Tally {
    /// Counts a kill that broke no rule.
    pub fn add(&mut self, kill: &Kill, outcome: Outcome, took: Duration) {
        let ending = match outcome.hit {
            true => format!("{:?}", outcome.ending),
            false => "too late or too early".to_owned(),
        };
        *self
            .counts
            .entry(kill.blow.to_string())
            .or_default()
            .entry(ending)
            .or_default() += 1;
        self.lengths.push(took);
    }

    /// How many were counted.
    pub fn kills(&self) -> usize {
        self.lengths.len()
    }

    /// The middle one of the kills' lengths.
    pub fn median(&self) -> Duration {
        let mut lengths = self.lengths.clone();
        lengths.sort();
        lengths.get(lengths.len() / 2).copied().unwrap_or_default()
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (blow, endings) in &self.counts {
            let all: u64 = endings.values().sum();
            let endings: Vec<_> = endings
                .iter()
                .map(|(ending, count)| format!("{ending} {count}"))
                .collect();
            writeln!(f, "  {blow:<22} {all:>5}   {}", endings.join(", "))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verdicts::Ending;

    #[test]
    fn kills_are_counted_by_what_was_done_and_what_came_of_it() {
        let mut tally = Tally::default();
        let kill = Kill::of(1, 1);
        for (hit, ms) in [(true, 1000), (true, 3000), (false, 2000)] {
            let outcome = Outcome {
                ending: Ending::Moved,
                hit,
                epoch: 2,
            };
            tally.add(&kill, outcome, Duration::from_millis(ms));
        }
        assert_eq!(tally.kills(), 3);
        assert_eq!(tally.median(), Duration::from_secs(2));
        let text = tally.to_string();
        assert!(
            text.contains("Moved 2") && text.contains("too late or too early 1"),
            "{text}"
        );
    }
}
