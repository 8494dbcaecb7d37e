//! How a migration is watched: a bar on a terminal, a line a change elsewhere, nothing when nobody reads it.
//!
//! Everything goes to standard error, so that the receipt on standard output can be piped.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::output::Out;
use crate::units::{bytes, millis};
use crate::view::MigrationView;

/// The bar's resolution.
const STEPS: u64 = 1000;
/// Lines printed at most without a terminal, whatever the number of rounds.
const LINES_MAX: u32 = 200;

/// What shows a migration's progress.
pub struct Progress {
    bar: Option<ProgressBar>,
    lines: bool,
    printed: u32,
    last: String,
}

impl Progress {
    /// A bar, lines or silence, as fits `out` and standard error.
    pub fn new(out: Out) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = (out.talkative() && terminal).then(|| {
            let bar = ProgressBar::with_draw_target(Some(STEPS), ProgressDrawTarget::stderr());
            // A template of literals; a wrong one would show as the default style.
            if let Ok(style) = ProgressStyle::with_template("{prefix} {bar:16} {wide_msg}") {
                bar.set_style(style.progress_chars("━╸─"));
            }
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        Self {
            bar,
            lines: out.talkative() && !terminal,
            printed: 0,
            last: String::new(),
        }
    }

    /// Shows where `migration` stands.
    pub fn show(&mut self, migration: &MigrationView) {
        if let Some(bar) = &self.bar {
            bar.set_prefix(format!("{} {}", migration.id, migration.phase));
            bar.set_position(permille(migration));
            bar.set_message(details(migration));
        }
        if self.lines && self.printed < LINES_MAX {
            let round = migration.progress.as_ref().map_or(0, |progress| progress.round);
            let change = format!("{} {}", migration.phase, round);
            if change != self.last {
                self.last = change;
                self.printed += 1;
                eprintln!("{} {} {}", migration.id, migration.phase, details(migration));
            }
        }
    }

    /// Says something in between.
    pub fn remark(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{text}")),
            None if self.lines => eprintln!("{text}"),
            None => {}
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// How much of the guest's memory the target has, in thousandths.
fn permille(migration: &MigrationView) -> u64 {
    match (&migration.progress, migration.phase) {
        (_, "switchover" | "ready" | "committed" | "done") => STEPS,
        (Some(progress), _) if progress.bytes_total > 0 => {
            let remaining = progress.bytes_remaining.min(progress.bytes_total);
            let there = u128::from(progress.bytes_total - remaining) * u128::from(STEPS);
            u64::try_from(there / u128::from(progress.bytes_total)).unwrap_or(STEPS)
        }
        _ => 0,
    }
}

fn details(migration: &MigrationView) -> String {
    let Some(progress) = &migration.progress else {
        return format!("{} {} -> {}", migration.vm, migration.from, migration.to);
    };
    let mut parts = vec![
        format!("round {}", progress.round),
        format!("{} sent", bytes(progress.bytes_sent)),
        format!("{} left", bytes(progress.bytes_remaining)),
    ];
    // Before the first round has ended nobody knows.
    if progress.dirty_bytes_per_s > 0 {
        parts.push(format!("dirty {}/s", bytes(progress.dirty_bytes_per_s)));
    }
    if progress.throttle_percent > 0 {
        parts.push(format!("held back {} %", progress.throttle_percent));
    }
    if let Some(ms) = progress.eta_ms {
        parts.push(format!("ETA {}", millis(ms)));
    }
    // Last, since a narrow terminal cuts the end off.
    if progress.bandwidth_bytes_per_s > 0 {
        parts.push(format!("link {}/s", bytes(progress.bandwidth_bytes_per_s)));
    }
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use drover_proto::v1;

    use super::*;

    fn in_pre_copy(remaining: u64, total: u64) -> MigrationView {
        let progress = v1::Progress {
            round: 3,
            bytes_sent: 1 << 20,
            bytes_total: total,
            bytes_remaining: remaining,
            eta_ms: 2_500,
            dirty_bytes_per_s: 3 << 20,
            throttle_percent: 80,
            ..Default::default()
        };
        let phase = v1::MigrationPhase::PreCopy.into();
        MigrationView::from(v1::Migration {
            phase,
            progress: Some(progress),
            ..Default::default()
        })
    }

    #[test]
    fn the_bar_stands_at_what_the_target_has() {
        assert_eq!(permille(&in_pre_copy(256, 1024)), 750);
        assert_eq!(permille(&in_pre_copy(4096, 1024)), 0);
        assert_eq!(permille(&in_pre_copy(0, 0)), 0);
        assert_eq!(permille(&in_pre_copy(0, u64::MAX)), STEPS);
    }

    #[test]
    fn the_details_name_round_bytes_rates_and_eta() {
        let text = details(&in_pre_copy(1 << 10, 1 << 30));
        for part in [
            "round 3",
            "1.0 MiB sent",
            "1.0 KiB left",
            "dirty 3.0 MiB/s",
            "held back 80 %",
            "ETA 2.5 s",
        ] {
            assert!(text.contains(part), "{text}");
        }
        assert!(
            !text.contains("link"),
            "an unknown rate is not shown as 0: {text}"
        );
    }
}
