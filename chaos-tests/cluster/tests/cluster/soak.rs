//! The soak in short: what `cargo xtask chaos` does a thousand times, with a seed that never changes.

use drover_chaos_cluster::soak::Soak;
use drover_chaos_cluster::soak::plan::Kill;

use super::*;

/// Of this seed the first twenty kills are of every kind, at points and after delays, and show each seeded bug that a
/// migration can show.
const SEED: u64 = 2549;

/// Enough for every kind of blow, few enough for less than a minute.
const KILLS: u64 = 20;

#[test]
fn kills_at_random_moments_lose_no_page_run_nothing_twice_and_leave_nothing_over() {
    let Some(cluster) = cluster() else { return };
    let mut soak = Soak::new(cluster);
    for number in 1..=KILLS {
        let kill = Kill::of(SEED, number);
        eprintln!("kill {number}: {kill}; again: cargo xtask chaos --seed {SEED} --from {number} --kills 1");
        soak.kill(&kill);
    }
    let last = soak.finish();
    assert!(last.written > 0 && last.verified > 0, "{last:?}");
}
