//! How something that copies bytes is watched: a bar on a terminal, a line now and then elsewhere, nothing when nobody reads it. All of it
//! goes to standard error.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::output::Out;
use crate::units::bytes;
use crate::view::BytesView;

/// The bar's resolution.
const STEPS: u64 = 1000;
/// Without a terminal new figures are told after this.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// What shows how far something is.
pub struct Bar {
    bar: Option<ProgressBar>,
    lines: bool,
    told: Option<Instant>,
}

impl Bar {
    /// A bar, lines or silence, as fits `out` and standard error.
    pub fn new(out: Out, what: &str) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = (out.talkative() && terminal).then(|| {
            let bar = ProgressBar::with_draw_target(Some(STEPS), ProgressDrawTarget::stderr());
            // A template of literals; a wrong one would show as the default style.
            if let Ok(style) = ProgressStyle::with_template("{prefix} {bar:16} {wide_msg}") {
                bar.set_style(style.progress_chars("━╸─"));
            }
            bar.set_prefix(what.to_owned());
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        Self {
            bar,
            lines: out.talkative() && !terminal,
            told: None,
        }
    }

    /// Shows how far it is.
    pub fn show(&mut self, what: &str, progress: Option<BytesView>) {
        let text = progress.map_or_else(String::new, |progress| {
            let (done, total) = (bytes(progress.bytes_done), bytes(progress.bytes_total));
            format!("{done} of {total}")
        });
        if let Some(bar) = &self.bar {
            bar.set_prefix(what.to_owned());
            bar.set_position(progress.map_or(0, permille));
            bar.set_message(text);
        } else if self.lines && self.told.is_none_or(|told| told.elapsed() >= LINE_EVERY) {
            self.told = Some(Instant::now());
            eprintln!("{}", format!("{what} {text}").trim_end());
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

/// In thousandths.
fn permille(progress: BytesView) -> u64 {
    let done = u128::from(progress.bytes_done.min(progress.bytes_total)) * u128::from(STEPS);
    let part = done.checked_div(u128::from(progress.bytes_total)).unwrap_or(0);
    u64::try_from(part).unwrap_or(STEPS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_stands_at_what_is_done_and_never_beyond_its_end() {
        let at = |bytes_done, bytes_total| {
            permille(BytesView {
                bytes_done,
                bytes_total,
            })
        };
        assert_eq!((at(0, 0), at(1, 4), at(9, 4)), (0, 250, STEPS));
        assert_eq!(at(u64::MAX, u64::MAX), STEPS);
    }
}
