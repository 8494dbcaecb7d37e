//! Figures of both sides: of every single run, their medians and ratios, as JSON and as a table.

use std::collections::BTreeMap;

use anyhow::Result;
use comfy_table::presets::ASCII_MARKDOWN;
use comfy_table::{CellAlignment, Table};
use serde::Serialize;

use crate::host::Host;
use crate::result::{Side, median};

/// Figures by their names.
pub type Values = BTreeMap<&'static str, f64>;

/// A figure as the table shows it.
pub struct Figure {
    /// Its name in the JSON.
    pub name: &'static str,
    /// Its column's head.
    pub title: &'static str,
    /// Digits after the point.
    pub digits: usize,
}

/// One run of one side.
#[derive(Debug, Serialize)]
pub struct Run {
    /// Its number, from 1.
    pub run: u32,
    /// Whose.
    pub side: Side,
    /// Empty if it failed.
    #[serde(flatten)]
    pub values: Values,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl Run {
    /// What came of a run.
    pub fn new(run: u32, side: Side, measured: Result<Values>) -> Self {
        let (values, error) = match measured {
            Ok(values) => (values, None),
            Err(error) => (Values::new(), Some(format!("{error:#}"))),
        };
        Self {
            run,
            side,
            values,
            error,
        }
    }
}

/// One kind of guest or peer.
#[derive(Debug, Serialize)]
pub struct Row {
    /// What it is called.
    pub name: &'static str,
    /// Medians of our runs that ended well.
    pub ours: Values,
    /// QEMU's.
    pub qemu: Values,
    /// Ours by QEMU's.
    pub ratio: Values,
    /// Every single one.
    pub runs: Vec<Run>,
}

impl Row {
    /// Sums up a row's runs.
    pub fn new(name: &'static str, runs: Vec<Run>) -> Self {
        let medians = |side: Side| -> Values {
            let of = || runs.iter().filter(|run| run.side == side);
            let names = of().flat_map(|run| run.values.keys().copied());
            names
                .filter_map(|name| {
                    let values = of().filter_map(|run| run.values.get(name).copied());
                    Some((name, median(values)?))
                })
                .collect()
        };
        let (ours, qemu) = (medians(Side::Ours), medians(Side::Qemu));
        let ratio = ours
            .iter()
            .filter_map(|(name, &one)| {
                let other = qemu.get(name).copied().filter(|&other| other > 0.0)?;
                Some((*name, one / other))
            })
            .collect();
        Self {
            name,
            ours,
            qemu,
            ratio,
            runs,
        }
    }
}

/// All that one call of a benchmark found.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Which benchmark.
    pub benchmark: &'static str,
    /// The machine.
    pub host: Host,
    /// In the order in which they were run.
    pub rows: Vec<Row>,
}

impl Report {
    /// Nothing yet.
    pub fn new(benchmark: &'static str) -> Self {
        Self {
            benchmark,
            host: Host::here(),
            rows: Vec::new(),
        }
    }

    /// Runs of one side that failed.
    pub fn failures(&self, side: Side) -> usize {
        let runs = self.rows.iter().flat_map(|row| &row.runs);
        runs.filter(|run| run.side == side && run.error.is_some()).count()
    }
}

fn shown(value: Option<&f64>, digits: usize) -> String {
    value.map_or("–".to_owned(), |value| format!("{value:.digits$}"))
}

/// A row a row, each cell ours / QEMU's = ratio.
pub fn table(report: &Report, figures: &[Figure]) -> String {
    let mut table = Table::new();
    let heads = std::iter::once(report.benchmark).chain(figures.iter().map(|figure| figure.title));
    table.load_style(ASCII_MARKDOWN).set_header(heads);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    for row in &report.rows {
        let cells = figures.iter().map(|figure| {
            let of = |values: &Values, digits| shown(values.get(figure.name), digits);
            let (ours, qemu) = (of(&row.ours, figure.digits), of(&row.qemu, figure.digits));
            format!("{ours} / {qemu} = {}", of(&row.ratio, 2))
        });
        table.add_row(std::iter::once(row.name.to_owned()).chain(cells));
    }
    format!(
        "{table}\n\nEach cell: ours / QEMU = ratio, medians. Load of the machine before: {:.2}.\n",
        report.host.load_1m
    )
}

/// One run in one line, for those who wait.
pub fn line(run: &Run, figures: &[Figure]) -> String {
    let side = match run.side {
        Side::Ours => "ours",
        Side::Qemu => "QEMU",
        Side::Copy => "copy",
    };
    let said = match &run.error {
        Some(error) => format!("FAILED: {error}"),
        None => figures
            .iter()
            .filter_map(|figure| {
                let value = run.values.get(figure.name)?;
                Some(format!("{} {value:.*}", figure.title, figure.digits))
            })
            .collect::<Vec<_>>()
            .join("  "),
    };
    format!("run {} {side}  {said}", run.run)
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    const FIGURES: [Figure; 2] = [
        Figure {
            name: "start_ms",
            title: "start ms",
            digits: 1,
        },
        Figure {
            name: "more",
            title: "more",
            digits: 0,
        },
    ];

    fn run(number: u32, side: Side, start_ms: f64) -> Run {
        Run::new(number, side, Ok(Values::from([("start_ms", start_ms)])))
    }

    #[test]
    fn a_row_has_medians_their_ratio_and_a_dash_for_what_is_missing() {
        let failed = Run::new(2, Side::Ours, Err(anyhow!("gone")));
        assert_eq!(line(&failed, &FIGURES), "run 2 ours  FAILED: gone");
        let runs = vec![
            run(1, Side::Ours, 10.0),
            run(1, Side::Qemu, 40.0),
            failed,
            run(2, Side::Qemu, 60.0),
            run(3, Side::Ours, 15.0),
        ];
        assert_eq!(line(&runs[0], &FIGURES), "run 1 ours  start ms 10.0");
        let row = Row::new("q35", runs);
        assert_eq!(
            (row.ours["start_ms"], row.qemu["start_ms"], row.ratio["start_ms"]),
            (12.5, 50.0, 0.25)
        );
        let report = Report {
            rows: vec![row],
            ..Report::new("vmm")
        };
        assert_eq!(report.failures(Side::Ours), 1);
        let table = table(&report, &FIGURES);
        assert!(table.contains("| 12.5 / 50.0 = 0.25 | – / – = – |"), "{table}");
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["rows"][0]["runs"][0]["start_ms"], 10.0);
        assert_eq!(json["rows"][0]["runs"][2]["error"], "gone");
    }
}
