//! What the log says of the guest's doings. A guest can repeat whatever it does wrong as fast as it likes, and would fill its host's disk with
//! it: so only the first complaints are written, then one every few seconds with the number of those that were not.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::warn;

/// Complaints that are written at once.
const BURST: u32 = 20;
/// After them, one in so long.
const EVERY: Duration = Duration::from_secs(10);

/// Which complaints are written.
struct Ration {
    left: u32,
    /// When `left` was last added to.
    filled: Option<Instant>,
    kept_back: u64,
}

impl Ration {
    const fn new() -> Self {
        Self {
            left: BURST,
            filled: None,
            kept_back: 0,
        }
    }

    /// Whether a complaint is to be written: with how many that were not since the last.
    fn take(&mut self, now: Instant) -> Option<u64> {
        let filled = *self.filled.get_or_insert(now);
        let due = now.saturating_duration_since(filled).as_secs() / EVERY.as_secs();
        if due > 0 {
            self.left = self
                .left
                .saturating_add(u32::try_from(due).unwrap_or(BURST))
                .min(BURST);
            self.filled = Some(now);
        }
        let Some(left) = self.left.checked_sub(1) else {
            self.kept_back += 1;
            return None;
        };
        self.left = left;
        Some(std::mem::take(&mut self.kept_back))
    }
}

/// Of this process's one guest.
static RATION: Mutex<Ration> = Mutex::new(Ration::new());

/// Says in the log what the guest did, unless too much was said already.
pub fn complain(what: impl FnOnce() -> String) {
    let said = RATION
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take(Instant::now());
    if let Some(kept_back) = said {
        warn!(kept_back, "{}", what());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_and_counted_and_what_comes_later_is_heard() {
        let begin = Instant::now();
        let mut ration = Ration::new();
        let said = (0..1_000).filter(|_| ration.take(begin).is_some()).count();
        assert_eq!(said, BURST as usize);
        assert_eq!(ration.take(begin + EVERY / 2), None);
        assert_eq!(ration.take(begin + EVERY), Some(981));
        assert_eq!(ration.take(begin + EVERY), None);
        let later = begin + 1_000 * EVERY;
        assert_eq!(ration.take(later), Some(1));
        let said = (0..1_000).filter(|_| ration.take(later).is_some()).count();
        assert_eq!(said, BURST as usize - 1, "no more than a burst is ever saved up");
    }
}
