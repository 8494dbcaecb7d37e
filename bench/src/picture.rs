//! One picture a workload: a typical run of ours above, a typical run of QEMU's below, on one axis of time, so that what is
//! longer looks longer. Two curves each, bytes sent and bytes remaining; the blackout is the red band at the end.
//!
//! SVG is text, so it is written as text.

use std::fmt::Write as _;

use crate::result::{Run, Sample, Side, Summary};
use crate::workload::Workload;

const WIDTH: f64 = 900.0;
const PANEL_HEIGHT: f64 = 190.0;
const TOP: f64 = 64.0;
const LEFT: f64 = 84.0;
const RIGHT: f64 = 24.0;
/// Between the panels: room for a title.
const BETWEEN: f64 = 44.0;
const BOTTOM: f64 = 56.0;

/// A blackout of a few milliseconds in a run of seconds would be thinner than a line.
const BAND_WIDTH_MIN: f64 = 2.0;

/// Points of one curve: more than the picture has pixels would say nothing more.
const POINTS_MAX: usize = 900;

const SENT: &str = "#1f77b4";
const REMAINING: &str = "#ff7f0e";
const BLACKOUT: &str = "#d62728";

/// Values from 0 to `max`, drawn over `length` pixels.
struct Axis {
    max: f64,
    length: f64,
}

impl Axis {
    fn at(&self, value: f64) -> f64 {
        (value / self.max * self.length).clamp(0.0, self.length)
    }

    /// Four or more round values from 0 on.
    fn ticks(&self) -> Vec<f64> {
        let rough = self.max / 5.0;
        let power = 10f64.powf(rough.log10().floor());
        let steps = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power);
        let step = steps.into_iter().find(|step| *step >= rough).unwrap_or(steps[3]);
        (0..=20)
            .map(|number| f64::from(number) * step)
            .take_while(|value| *value <= self.max)
            .collect()
    }
}

/// The picture of a workload.
pub fn draw(workload: &Workload, summary: &Summary) -> String {
    let panels =
        [("Drover", Side::Ours), ("QEMU", Side::Qemu)].map(|(name, side)| (name, summary.typical(side)));
    let runs = || panels.iter().filter_map(|(_, run)| *run);
    let largest = |values: &mut dyn Iterator<Item = f64>| values.fold(1.0, f64::max);
    let time = Axis {
        max: largest(&mut runs().map(|run| end_ms(run) * 1.02)),
        length: WIDTH - LEFT - RIGHT,
    };
    let bytes = Axis {
        max: largest(
            &mut runs()
                .flat_map(|run| &run.samples)
                .map(|sample| sample.sent.max(sample.remaining) as f64),
        ) / 1_048_576.0
            * 1.05,
        length: PANEL_HEIGHT,
    };
    let height = TOP + 2.0 * PANEL_HEIGHT + BETWEEN + BOTTOM;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"{WIDTH}\" height=\"{height}\" fill=\"white\"/>\n"
    );
    let title = format!("{}: {}", workload.name, workload.about);
    text(&mut svg, (LEFT, 20.0), "start", "15", &title);
    legend(&mut svg);
    for (number, (name, run)) in [0.0, 1.0].into_iter().zip(&panels) {
        let top = TOP + number * (PANEL_HEIGHT + BETWEEN);
        panel(&mut svg, top, name, *run, &time, &bytes);
    }
    text(
        &mut svg,
        (LEFT + time.length / 2.0, height - 14.0),
        "middle",
        "12",
        "milliseconds since the request",
    );
    svg.push_str("</svg>\n");
    svg
}

fn end_ms(run: &Run) -> f64 {
    let total = run.measures.map_or(0.0, |measures| measures.total_ms);
    total.max(run.samples.last().map_or(0.0, |sample| sample.at_ms))
}

fn legend(svg: &mut String) {
    let entries = [("sent", SENT), ("remaining", REMAINING), ("blackout", BLACKOUT)];
    for (number, (name, colour)) in [0.0, 1.0, 2.0].into_iter().zip(entries) {
        let x = LEFT + number * 120.0;
        let _ = writeln!(
            svg,
            "<rect x=\"{x}\" y=\"30\" width=\"14\" height=\"8\" fill=\"{colour}\"/>"
        );
        text(svg, (x + 20.0, 38.0), "start", "12", name);
    }
}

fn panel(svg: &mut String, top: f64, name: &str, run: Option<&Run>, time: &Axis, bytes: &Axis) {
    let bottom = top + PANEL_HEIGHT;
    for value in time.ticks() {
        let x = LEFT + time.at(value);
        line(svg, (x, top), (x, bottom));
        text(svg, (x, bottom + 15.0), "middle", "11", &format!("{value}"));
    }
    for value in bytes.ticks() {
        let y = bottom - bytes.at(value);
        line(svg, (LEFT, y), (LEFT + time.length, y));
        text(svg, (LEFT - 6.0, y + 4.0), "end", "11", &format!("{value} MiB"));
    }
    let Some((run, measures)) = run.and_then(|run| Some((run, run.measures?))) else {
        text(
            svg,
            (LEFT + 8.0, top - 5.0),
            "start",
            "12",
            &format!("{name}: no run ended well"),
        );
        return;
    };
    let said = format!(
        "{name}: {:.0} ms in all, blackout {:.1} ms, guest saw {:.1} ms, {:.0} MiB sent",
        measures.total_ms,
        measures.blackout_ms,
        measures.guest_gap_ms,
        measures.bytes / 1_048_576.0
    );
    text(svg, (LEFT + 8.0, top - 5.0), "start", "12", &said);
    let width = time.at(measures.blackout_ms).max(BAND_WIDTH_MIN);
    let x = LEFT + time.at(measures.total_ms) - width;
    let _ = writeln!(
        svg,
        "<rect x=\"{x:.1}\" y=\"{top:.1}\" width=\"{width:.1}\" height=\"{PANEL_HEIGHT}\" fill=\"{BLACKOUT}\" \
         fill-opacity=\"0.35\"/>"
    );
    for (colour, part) in [
        (SENT, (|sample| sample.sent) as fn(&Sample) -> u64),
        (REMAINING, |sample| sample.remaining),
    ] {
        let step = run.samples.len().div_ceil(POINTS_MAX).max(1);
        let points: Vec<String> = run
            .samples
            .iter()
            .step_by(step)
            .chain(run.samples.last())
            .map(|sample| {
                let (x, y) = (time.at(sample.at_ms), bytes.at(part(sample) as f64 / 1_048_576.0));
                format!("{:.1},{:.1}", LEFT + x, bottom - y)
            })
            .collect();
        let _ = writeln!(
            svg,
            "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.6\" points=\"{}\"/>",
            points.join(" ")
        );
    }
}

fn line(svg: &mut String, (x1, y1): (f64, f64), (x2, y2): (f64, f64)) {
    let _ = writeln!(
        svg,
        "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"#dddddd\"/>"
    );
}

fn text(svg: &mut String, (x, y): (f64, f64), anchor: &str, size: &str, words: &str) {
    let words = words
        .replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;");
    let _ = writeln!(
        svg,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" font-size=\"{size}\">{words}</text>"
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::result::Measures;
    use crate::workload::ALL;

    /// Every element is closed in its order, every attribute is quoted, and no number is left out.
    fn assert_well_formed(svg: &str) {
        let mut open = Vec::new();
        let mut rest = svg;
        while let Some(start) = rest.find('<') {
            assert!(
                !rest[..start].contains('>'),
                "a loose > before {}",
                &rest[start..]
            );
            let end = rest[start..].find('>').expect("every element ends") + start;
            let inside = &rest[start + 1..end];
            rest = &rest[end + 1..];
            if let Some(name) = inside.strip_prefix('/') {
                assert_eq!(open.pop(), Some(name), "closed in the wrong order");
                continue;
            }
            let name = inside.split([' ', '/']).next().expect("a first word");
            assert!(
                !name.is_empty() && inside.matches('"').count().is_multiple_of(2),
                "{inside}"
            );
            if !inside.ends_with('/') {
                open.push(name);
            }
        }
        assert!(open.is_empty() && rest.trim().is_empty(), "left open: {open:?}");
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }

    fn run(side: Side, total_ms: f64) -> Run {
        let sample = |at_ms, sent, remaining| Sample {
            at_ms,
            sent,
            remaining,
        };
        Run {
            measures: Some(Measures {
                total_ms,
                blackout_ms: 8.0,
                guest_gap_ms: 9.0,
                bytes: 5e8,
                cpu_s: 1.0,
            }),
            samples: vec![sample(0.0, 0, 1 << 29), sample(total_ms, 1 << 29, 0)],
            ..Run::new(1, side)
        }
    }

    #[test]
    fn both_sides_are_drawn_on_one_axis() {
        let runs = vec![run(Side::Ours, 500.0), run(Side::Qemu, 1000.0)];
        let summary = Summary::new(&ALL[0], 1, runs);
        let svg = draw(&ALL[0], &summary);
        assert_well_formed(&svg);
        assert_eq!(svg.matches("<polyline").count(), 4);
        assert!(svg.contains("Drover: 500 ms in all, blackout 8.0 ms"), "{svg}");
        // The end of ours is half way to the end of QEMU's.
        let x = |total: f64| LEFT + total / 1020.0 * (WIDTH - LEFT - RIGHT);
        for total in [500.0, 1000.0] {
            let point = format!("{:.1},", x(total));
            assert!(svg.contains(&point), "{point} in {svg}");
        }
    }

    #[test]
    fn a_side_without_a_good_run_is_named_and_the_picture_stays_whole() {
        let summary = Summary::new(&ALL[0], 1, vec![run(Side::Ours, 500.0)]);
        let svg = draw(&ALL[0], &summary);
        assert_well_formed(&svg);
        assert!(svg.contains("QEMU: no run ended well"));
        assert_well_formed(&draw(&ALL[0], &Summary::new(&ALL[0], 0, vec![])));
    }

    #[test]
    fn words_cannot_break_the_markup() {
        let mut svg = String::new();
        text(&mut svg, (1.0, 2.0), "start", "12", "a < b & c > d");
        assert_well_formed(&svg);
        assert!(svg.contains("a &lt; b &amp; c &gt; d"));
    }

    #[test]
    fn ticks_are_round_and_lie_inside() {
        for max in [1.0, 7.3, 950.0, 123_456.0] {
            let ticks = Axis { max, length: 100.0 }.ticks();
            assert!(
                ticks.len() >= 3 && ticks.iter().all(|tick| *tick <= max),
                "{max}: {ticks:?}"
            );
        }
        let axis = Axis {
            max: 950.0,
            length: 100.0,
        };
        assert_eq!(axis.ticks(), [0.0, 200.0, 400.0, 600.0, 800.0]);
    }
}
