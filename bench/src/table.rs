//! The medians as a table that can be read on a terminal and pasted into a page.

use comfy_table::presets::ASCII_MARKDOWN;
use comfy_table::{CellAlignment, Table};

use crate::result::{Measures, Report, Run, Side, Summary};

const COLUMNS: [&str; 9] = [
    "workload",
    "total ms",
    "blackout ms",
    "guest saw ms",
    "MiB sent",
    "CPU s",
    "MiB/s: of copy",
    "extra MiB",
    "cancel ms",
];

/// A row a workload: ours / QEMU's, and the ratio where one is asked for.
pub fn render(report: &Report) -> String {
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN).set_header(COLUMNS);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    for summary in &report.workloads {
        table.add_row(row(summary));
    }
    format!(
        "{table}\n\nEach cell: ours / QEMU = ratio. Medians; `of copy`: our throughput by a plain copy's; \
         `cancel`: until the source was done / the target gone.\n"
    )
}

fn row(summary: &Summary) -> Vec<String> {
    let pair = |part: fn(&Measures) -> f64, digits: usize| {
        let show = |measures: Option<Measures>| figure(measures.as_ref().map(part), digits);
        format!("{} / {}", show(summary.ours), show(summary.qemu))
    };
    let with = |pair: String, ratio: Option<f64>| format!("{pair} = {}", figure(ratio, 2));
    let ours = || summary.runs.iter().filter(|run| run.side == Side::Ours);
    let extra = ours().filter_map(|run: &Run| run.extra_mib).reduce(f64::max);
    let copy = match (summary.ratio.throughput_of_copy, summary.copy.mib_per_s) {
        (Some(ratio), Some(copy)) => {
            format!("{:.0}: {:.0} % of {copy:.0}", ratio * copy, ratio * 100.0)
        }
        _ => "–".to_owned(),
    };
    vec![
        summary.name.to_owned(),
        with(pair(|measures| measures.total_ms, 0), summary.ratio.total),
        with(pair(|measures| measures.blackout_ms, 1), summary.ratio.blackout),
        pair(|measures| measures.guest_gap_ms, 1),
        pair(|measures| measures.bytes / 1_048_576.0, 0),
        pair(|measures| measures.cpu_s, 2),
        copy,
        figure(extra, 1),
        summary.cancel.map_or("–".to_owned(), |cancel| {
            format!("{:.0} / {:.0}", cancel.source_ms, cancel.target_ms)
        }),
    ]
}

fn figure(value: Option<f64>, digits: usize) -> String {
    value.map_or("–".to_owned(), |value| format!("{value:.digits$}"))
}

/// One run in one line, for those who wait.
pub fn line(workload: &str, run: &Run) -> String {
    let side = match run.side {
        Side::Ours => "ours",
        Side::Qemu => "QEMU",
        Side::Copy => "copy",
    };
    let begin = format!("{workload:<9} pair {} {side}", run.pair);
    match (&run.measures, &run.error, run.mib_per_s) {
        (Some(measures), _, _) => format!(
            "{begin}  total {:.0} ms  blackout {:.1} ms  guest saw {:.1} ms  {:.0} MiB  {:.2} CPU s",
            measures.total_ms,
            measures.blackout_ms,
            measures.guest_gap_ms,
            measures.bytes / 1_048_576.0,
            measures.cpu_s
        ),
        (None, Some(error), _) => format!("{begin}  FAILED: {error}"),
        (None, None, Some(rate)) => format!("{begin}  {rate:.0} MiB/s"),
        (None, None, None) => begin,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Host;
    use crate::workload::ALL;

    fn run(side: Side, total_ms: f64) -> Run {
        Run {
            measures: Some(Measures {
                total_ms,
                blackout_ms: 5.25,
                guest_gap_ms: 6.0,
                bytes: 10_485_760.0,
                cpu_s: 0.5,
            }),
            ..Run::new(1, side)
        }
    }

    #[test]
    fn a_row_shows_both_sides_their_ratio_and_a_dash_for_what_is_missing() {
        let both = Summary::new(&ALL[0], 1, vec![run(Side::Ours, 100.0), run(Side::Qemu, 200.0)]);
        let cells = row(&both);
        assert_eq!(cells[..3], ["idle", "100 / 200 = 0.50", "5.2 / 5.2 = 1.00"]);
        assert_eq!(cells[6], "–");
        let one = Summary::new(&ALL[1], 1, vec![run(Side::Ours, 100.0)]);
        assert_eq!(row(&one)[1], "100 / – = –");
        let report = Report {
            host: Host::default(),
            workloads: vec![both, one],
        };
        let text = render(&report);
        assert!(
            text.lines()
                .all(|line| line.starts_with('|') || !line.contains('|')),
            "{text}"
        );
        assert!(text.contains("| idle-plaintext"), "{text}");
    }

    #[test]
    fn a_run_that_failed_says_why() {
        let failed = Run::failed(3, Side::Qemu, &anyhow::anyhow!("no route"));
        assert_eq!(line("idle", &failed), "idle      pair 3 QEMU  FAILED: no route");
    }
}
