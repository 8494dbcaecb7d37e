//! A dry run of a migration as users see it: what was looked at, and how it would go.

use drover_proto::v1;
use serde::Serialize;

use super::migration::OptionsView;
use super::{ReasonView, dash, some};
use crate::output::Detailed;
use crate::units::{bytes, micros, millis};

/// A dry run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DryRunView {
    /// The VM that would move.
    pub vm: String,
    /// The host it would leave.
    pub from: Option<String>,
    /// The host it would go to; null: none fits.
    pub to: Option<String>,
    /// Whether nothing speaks against it and it would converge.
    pub works: bool,
    /// All that was looked at.
    pub findings: Vec<FindingView>,
    /// What the migration would be refused with.
    pub refusal: Option<ReasonView>,
    /// The request's field at fault, for a refusal.
    pub refusal_field: Option<String>,
    /// How it would go; null when it would be refused, and when that is not known.
    pub forecast: Option<ForecastView>,
    /// Why it is not known how it would go.
    pub unknown: Option<ReasonView>,
    /// What was asked, the cluster's defaults filled in.
    pub options: OptionsView,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FindingView {
    /// Its name: `options`, `migration`, `state`, `target`, ….
    pub check: String,
    /// Whether it speaks for the migration.
    pub passed: bool,
    /// What was found.
    pub message: String,
    /// The stable code of what speaks against it.
    pub code: Option<String>,
}

/// How a migration would go, or was thought to go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ForecastView {
    /// Whether it would end within what is allowed.
    pub converges: bool,
    /// What it would be given up with.
    pub reason: Option<ReasonView>,
    /// Until the guest runs at the target, or until it is given up.
    pub total_ms: u64,
    /// On the wire.
    pub bytes: u64,
    /// Rounds over the dirty pages.
    pub rounds: u32,
    /// How long the guest would stand still; of one that is given up, if it were paused then.
    pub blackout_us: u64,
    /// The blackout that is allowed.
    pub max_downtime_ms: u32,
    /// The most that each vCPU would be held back, percent of its time.
    pub throttle_percent: u32,
    /// The guest's memory.
    pub memory_bytes: u64,
    /// What of it was ever written.
    pub populated_bytes: u64,
    /// Distinct pages that the guest writes a second.
    pub dirty_bytes_per_s: u64,
    /// Distinct pages that it wrote while it was watched.
    pub working_set_bytes: u64,
    /// What it wrote within each length of time.
    pub windows: Vec<WindowView>,
    /// What the link is thought to carry.
    pub bandwidth_bytes_per_s: u64,
    /// Why: `receipts` of the last migrations between the two hosts, or `default`.
    pub bandwidth_source: String,
    /// What would do where it does not converge, each by itself; null: nothing.
    pub needed: NeededView,
    /// It converges only by post-copy: so long the guest would run at the target before all its pages are there.
    pub post_copy_ms: Option<u64>,
    /// Unix milliseconds.
    pub made_ms: u64,
}

/// Distinct pages written within a length of time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct WindowView {
    /// The length.
    pub us: u64,
    /// The pages.
    pub bytes: u64,
}

/// What would make a migration converge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct NeededView {
    /// So long a blackout.
    pub max_downtime_ms: Option<u32>,
    /// So fast a link.
    pub bandwidth_bytes_per_s: Option<u64>,
    /// Such a throttle.
    pub throttle_percent: Option<u32>,
}

impl From<v1::MigrationForecast> for DryRunView {
    fn from(told: v1::MigrationForecast) -> Self {
        let forecast = told.forecast.map(ForecastView::from);
        let is_upgrade = told.from == told.to;
        let finding = |finding: v1::Finding| FindingView {
            check: finding.check,
            passed: finding.passed,
            message: finding.message,
            code: some(finding.code),
        };
        Self {
            vm: told.vm,
            from: some(told.from),
            to: some(told.to),
            // An upgrade has no forecast: it sends no page.
            works: told.refusal.is_none()
                && forecast
                    .as_ref()
                    .map_or(is_upgrade, |forecast| forecast.converges),
            findings: told.findings.into_iter().map(finding).collect(),
            refusal: ReasonView::of(told.refusal),
            refusal_field: some(told.refusal_field),
            forecast,
            unknown: ReasonView::of(told.unknown),
            options: OptionsView::from(told.options.unwrap_or_default()),
        }
    }
}

impl From<v1::Forecast> for ForecastView {
    fn from(told: v1::Forecast) -> Self {
        Self {
            converges: told.converges,
            reason: ReasonView::of(told.reason),
            total_ms: told.total_ms,
            bytes: told.bytes,
            rounds: told.rounds,
            blackout_us: told.blackout_us,
            max_downtime_ms: told.max_downtime_ms,
            throttle_percent: told.throttle_percent,
            memory_bytes: told.memory_bytes,
            populated_bytes: told.populated_bytes,
            dirty_bytes_per_s: told.dirty_bytes_per_s,
            working_set_bytes: told.working_set_bytes,
            windows: told
                .windows
                .iter()
                .map(|window| WindowView {
                    us: window.us,
                    bytes: window.bytes,
                })
                .collect(),
            bandwidth_bytes_per_s: told.bandwidth_bytes_per_s,
            bandwidth_source: told.bandwidth_source,
            needed: NeededView {
                max_downtime_ms: Some(told.max_downtime_ms_needed).filter(|&ms| ms > 0),
                bandwidth_bytes_per_s: Some(told.bandwidth_bytes_per_s_needed).filter(|&rate| rate > 0),
                throttle_percent: Some(told.throttle_percent_needed).filter(|&percent| percent > 0),
            },
            post_copy_ms: told.post_copy.then_some(told.post_copy_ms),
            made_ms: told.made_ms,
        }
    }
}

impl ForecastView {
    /// The expected course in a few words.
    pub fn line(&self) -> String {
        format!(
            "{}, {} in {} rounds, blackout {}",
            millis(self.total_ms),
            bytes(self.bytes),
            self.rounds,
            micros(self.blackout_us)
        )
    }

    fn outlook(&self) -> String {
        let allowed = self.max_downtime_ms;
        if let Some(ms) = self.post_copy_ms {
            return format!("converges by post-copy, which takes {}", millis(ms));
        }
        match (
            self.converges,
            self.throttle_percent,
            self.needed.throttle_percent,
        ) {
            (true, 0, _) => format!("converges below {allowed} ms"),
            (true, percent, _) => format!("converges below {allowed} ms by throttling to {percent} %"),
            (false, _, Some(percent)) => {
                format!("will not converge below {allowed} ms without throttling to {percent} %")
            }
            (false, ..) => format!("will not converge below {allowed} ms"),
        }
    }

    /// What would do, as options where it is one.
    fn remedies(&self) -> Option<String> {
        let needed = &self.needed;
        let remedies: Vec<String> = [
            needed
                .throttle_percent
                .map(|percent| format!("--throttle {percent}")),
            needed.max_downtime_ms.map(|ms| format!("--max-downtime {ms}ms")),
            needed
                .bandwidth_bytes_per_s
                .map(|rate| format!("a link of {}/s, without a cap below it", bytes(rate))),
        ]
        .into_iter()
        .flatten()
        .collect();
        (!remedies.is_empty()).then(|| remedies.join("; or "))
    }

    fn fields(&self) -> Vec<(&'static str, String)> {
        let watched = self.windows.last().map_or(0, |window| window.us);
        let source = match self.bandwidth_source.as_str() {
            "receipts" => "as in the last migrations between the two hosts",
            _ => "assumed: no migration between the two hosts has measured it",
        };
        let mut fields = vec![
            (
                "guest memory",
                format!(
                    "{}, {} populated",
                    bytes(self.memory_bytes),
                    bytes(self.populated_bytes)
                ),
            ),
            (
                "guest writes",
                format!(
                    "{}/s, {} of its memory within {}",
                    bytes(self.dirty_bytes_per_s),
                    bytes(self.working_set_bytes),
                    micros(watched)
                ),
            ),
            (
                "link carries",
                format!("{}/s, {source}", bytes(self.bandwidth_bytes_per_s)),
            ),
            ("outlook", self.outlook()),
            (
                if self.converges { "total" } else { "given up after" },
                millis(self.total_ms),
            ),
            ("sent", format!("{} in {} rounds", bytes(self.bytes), self.rounds)),
            ("blackout", micros(self.blackout_us)),
        ];
        if let Some(reason) = &self.reason {
            fields.push(("reason", reason.line()));
        }
        if let Some(remedies) = self.remedies() {
            fields.push(("what would do", remedies));
        }
        fields
    }
}

impl Detailed for DryRunView {
    fn fields(&self) -> Vec<(&'static str, String)> {
        let mut fields = vec![
            ("vm", self.vm.clone()),
            ("from", dash(self.from.as_deref())),
            ("to", dash(self.to.as_deref())),
        ];
        for finding in &self.findings {
            let label = if finding.passed { "ok" } else { "refused" };
            let code = finding
                .code
                .as_ref()
                .map(|code| format!(" [{code}]"))
                .unwrap_or_default();
            fields.push((label, format!("{}: {}{code}", finding.check, finding.message)));
        }
        if let Some(unknown) = &self.unknown {
            fields.push(("unknown", unknown.line()));
        }
        if let Some(forecast) = &self.forecast {
            fields.extend(forecast.fields());
        }
        fields
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(converges: bool) -> v1::MigrationForecast {
        v1::MigrationForecast {
            vm: "vm1".into(),
            from: "host1".into(),
            to: "host2".into(),
            findings: vec![v1::Finding {
                check: "memory".into(),
                passed: true,
                message: "host2 has 768 MiB free of 1024 MiB, 256 MiB are needed".into(),
                code: String::new(),
            }],
            forecast: Some(v1::Forecast {
                converges,
                max_downtime_ms: 100,
                max_downtime_ms_needed: if converges { 0 } else { 240 },
                throttle_percent_needed: if converges { 0 } else { 60 },
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn a_dry_run_says_what_would_do_where_it_does_not_converge() {
        let view = DryRunView::from(told(false));
        assert!(!view.works);
        let fields = view.fields();
        let value = |label: &str| {
            fields
                .iter()
                .find(|(name, _)| *name == label)
                .map(|(_, value)| value.as_str())
        };
        assert_eq!(
            value("outlook"),
            Some("will not converge below 100 ms without throttling to 60 %")
        );
        assert_eq!(
            value("what would do"),
            Some("--throttle 60; or --max-downtime 240ms")
        );
        assert_eq!(
            value("ok"),
            Some("memory: host2 has 768 MiB free of 1024 MiB, 256 MiB are needed")
        );
    }

    #[test]
    fn the_names_of_a_dry_run_in_json_stay_as_they_are() {
        let json = serde_json::to_value(DryRunView::from(told(true))).unwrap();
        assert_eq!(json["works"], true);
        assert_eq!(json["findings"][0]["check"], "memory");
        assert_eq!(json["findings"][0]["code"], serde_json::Value::Null);
        assert_eq!(
            json["forecast"]["needed"]["throttle_percent"],
            serde_json::Value::Null
        );
        for name in [
            "vm",
            "from",
            "to",
            "refusal",
            "refusal_field",
            "unknown",
            "options",
        ] {
            assert!(json.get(name).is_some(), "{name}");
        }
        for name in [
            "converges",
            "reason",
            "total_ms",
            "bytes",
            "rounds",
            "blackout_us",
            "max_downtime_ms",
            "throttle_percent",
            "memory_bytes",
            "populated_bytes",
            "dirty_bytes_per_s",
            "working_set_bytes",
            "windows",
            "bandwidth_bytes_per_s",
            "bandwidth_source",
            "made_ms",
        ] {
            assert!(json["forecast"].get(name).is_some(), "{name}");
        }
    }
}
