//! How a migration is watched: a bar on a terminal, a line a change elsewhere, nothing when nobody reads it.
//!
//! Everything goes to standard error, so that the receipt on standard output can be piped.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::output::Out;
use crate::units::{bytes, millis};
use crate::view::{MigrationView, StreamView};

/// The bar's resolution.
const STEPS: u64 = 1000;
/// Without a terminal a new phase is told at once, a new round after this,
const ROUND_EVERY: Duration = Duration::from_secs(1);
/// and new figures after this.
const FIGURES_EVERY: Duration = Duration::from_secs(5);

/// What shows a migration's progress.
pub struct Progress {
    live: Option<Live>,
    lines: Option<Pace>,
}

/// On a terminal: the bar, and a line below it for each stream.
struct Live {
    all: MultiProgress,
    bar: ProgressBar,
    streams: Vec<ProgressBar>,
}

/// When a line is due.
#[derive(Default)]
struct Pace {
    last: Option<(Instant, &'static str, u32)>,
}

impl Progress {
    /// A bar, lines or silence, as fits `out` and standard error.
    pub fn new(out: Out) -> Self {
        let terminal = std::io::stderr().is_terminal();
        Self {
            live: (out.talkative() && terminal).then(Live::new),
            lines: (out.talkative() && !terminal).then(Pace::default),
        }
    }

    /// Shows where `migration` stands.
    pub fn show(&mut self, migration: &MigrationView) {
        if let Some(live) = &mut self.live {
            live.show(migration);
        }
        if let Some(pace) = &mut self.lines
            && pace.is_due(Instant::now(), migration)
        {
            eprintln!("{} {} {}", migration.id, migration.phase, line(migration));
        }
    }

    /// Says something in between.
    pub fn remark(&self, text: &str) {
        match &self.live {
            Some(live) => live.all.suspend(|| eprintln!("{text}")),
            None if self.lines.is_some() => eprintln!("{text}"),
            None => {}
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        if let Some(live) = &self.live {
            live.streams.iter().for_each(ProgressBar::finish_and_clear);
            live.bar.finish_and_clear();
        }
    }
}

impl Live {
    fn new() -> Self {
        let all = MultiProgress::with_draw_target(ProgressDrawTarget::stderr());
        let bar = all.add(ProgressBar::new(STEPS));
        // Templates of literals; a wrong one would show as the default style.
        if let Ok(style) = ProgressStyle::with_template("{prefix} {bar:16} {wide_msg}") {
            bar.set_style(style.progress_chars("━╸─"));
        }
        bar.enable_steady_tick(Duration::from_millis(100));
        Self {
            all,
            bar,
            streams: Vec::new(),
        }
    }

    fn show(&mut self, migration: &MigrationView) {
        self.bar
            .set_prefix(format!("{} {}", migration.id, migration.phase));
        self.bar.set_position(permille(migration));
        self.bar.set_message(details(migration));
        let streams = by_stream(migration);
        while self.streams.len() < streams.len() {
            let line = self.all.add(ProgressBar::new_spinner());
            if let Ok(style) = ProgressStyle::with_template("  {wide_msg}") {
                line.set_style(style);
            }
            self.streams.push(line);
        }
        // After pre-copy nothing is told of the streams any more: their lines stay as they were.
        for (line, stream) in self.streams.iter().zip(streams) {
            line.set_message(format!("stream {:2}  {}", stream.number, stream.line()));
        }
    }
}

impl Pace {
    fn is_due(&mut self, now: Instant, migration: &MigrationView) -> bool {
        let round = migration.progress.as_ref().map_or(0, |progress| progress.round);
        let due = match self.last {
            None => true,
            Some((_, phase, _)) if phase != migration.phase => true,
            Some((at, _, known)) => {
                let wait = if known == round {
                    FIGURES_EVERY
                } else {
                    ROUND_EVERY
                };
                now.saturating_duration_since(at) >= wait
            }
        };
        if due {
            self.last = Some((now, migration.phase, round));
        }
        due
    }
}

fn by_stream(migration: &MigrationView) -> &[StreamView] {
    migration
        .progress
        .as_ref()
        .map_or(&[], |progress| &progress.by_stream)
}

/// Everything in one line: the details, and how much of it each stream does.
fn line(migration: &MigrationView) -> String {
    let streams = by_stream(migration);
    let details = details(migration);
    if streams.is_empty() {
        return details;
    }
    let each: Vec<_> = streams
        .iter()
        .map(|stream| match stream.stalled_ms {
            Some(ms) => format!("stalled for {}", millis(ms)),
            None => format!("{}/s", bytes(stream.bytes_per_s)),
        })
        .collect();
    format!("{details}, by stream {}", each.join(" + "))
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
            by_stream: vec![
                v1::StreamProgress {
                    bytes_per_s: 5 << 20,
                    pages_queued: 256,
                    ..Default::default()
                },
                v1::StreamProgress {
                    number: 1,
                    stalled_ms: 3_500,
                    ..Default::default()
                },
            ],
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

    #[test]
    fn a_line_tells_what_each_stream_does_and_which_one_is_stalled() {
        let view = in_pre_copy(1 << 10, 1 << 30);
        let text = line(&view);
        assert!(
            text.ends_with("by stream 5.0 MiB/s + stalled for 3.5 s"),
            "{text}"
        );
        let lines: Vec<_> = by_stream(&view).iter().map(StreamView::line).collect();
        assert_eq!(
            lines,
            [
                "5.0 MiB/s, 0 B sent, 256 pages queued",
                "stalled for 3.5 s, 0 pages queued, 0 B sent"
            ]
        );
    }

    #[test]
    fn a_new_phase_is_told_at_once_a_new_round_soon_and_new_figures_now_and_then() {
        let (mut pace, start) = (Pace::default(), Instant::now());
        let mut due = |ms, view: &MigrationView| pace.is_due(start + Duration::from_millis(ms), view);
        let mut view = in_pre_copy(1, 1);
        assert!(due(0, &view));
        assert!(!due(4_000, &view), "only the figures changed");
        assert!(due(5_000, &view));
        if let Some(progress) = &mut view.progress {
            progress.round = 4;
        }
        assert!(!due(5_900, &view), "rounds may be very short");
        assert!(due(6_000, &view));
        view.phase = "switchover";
        assert!(due(6_001, &view));
    }
}
