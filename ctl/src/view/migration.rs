//! A migration as users see it, with its receipt.

use drover_proto::v1;
use serde::Serialize;

use super::forecast::ForecastView;
use super::{ReasonView, dash, some};
use crate::output::{Detailed, Tabular};
use crate::units::{bytes, instant, micros, millis};

/// A migration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MigrationView {
    /// `m1`, `m2`, …
    pub id: String,
    /// The VM that moves.
    pub vm: String,
    /// The host it leaves.
    pub from: String,
    /// The host it goes to.
    pub to: String,
    /// A lower-case word: `planned`, `preparing`, `pre-copy`, ….
    pub phase: &'static str,
    /// For an aborted one: the phase it was in.
    pub ended_in: Option<&'static str>,
    /// For an aborted one: why.
    pub reason: Option<ReasonView>,
    /// How it went, once it is done.
    pub receipt: Option<ReceiptView>,
    /// How far it is, while it is under way.
    pub progress: Option<ProgressView>,
    /// What was asked of it.
    pub options: OptionsView,
    /// What a dry run shortly before expected.
    pub forecast: Option<ForecastView>,
    /// The epoch that the target gets.
    pub epoch: u64,
    /// Who asked for it.
    pub requested_by: Option<String>,
    /// Unix milliseconds.
    pub created_ms: u64,
    /// Unix milliseconds.
    pub changed_ms: u64,
}

/// How a migration went.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ReceiptView {
    /// From the source's connect to the target's resume.
    pub total_ms: u64,
    /// On the wire, headers included.
    pub bytes: u64,
    /// Rounds over the dirty pages.
    pub rounds: u32,
    /// The time the guest stood still, in parts.
    pub blackout_us: BlackoutView,
    /// Pages sent with content.
    pub pages: u64,
    /// Pages sent as runs of zeros.
    pub zero_pages: u64,
    /// How dirty pages were found.
    pub tracker: String,
    /// TCP streams that carried pages.
    pub streams: u32,
    /// Whether they were unencrypted.
    pub plaintext: bool,
    /// The most that each vCPU was held back, percent of its time.
    pub throttle_percent: u32,
    /// How pages with content travelled; null: by a VMM that did not count.
    pub encoding: Option<EncodingView>,
    /// What happened after the hand-over; null: all pages were there before it.
    pub post_copy: Option<PostCopyView>,
    /// Why post-copy, which was allowed, could not have been done; null: it could, or was not allowed.
    pub post_copy_unavailable: Option<String>,
}

/// How pages with content travelled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EncodingView {
    /// Pages compressed with LZ4.
    pub lz4_pages: u64,
    /// Pages compressed with Zstandard.
    pub zstd_pages: u64,
    /// Pages as what had changed in them.
    pub delta_pages: u64,
    /// All of them as the guest has them.
    pub content_bytes: u64,
    /// The frames that carried them.
    pub sent_bytes: u64,
}

/// The phase in which the guest ran at the target while its pages came.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PostCopyView {
    /// That the target lacked when the guest began to run there.
    pub pages: u64,
    /// From then until it had them.
    pub duration_us: u64,
    /// Pages that the guest had to wait for.
    pub faults: u64,
    /// How long, on average.
    pub fault_mean_us: u64,
    /// And at most.
    pub fault_longest_us: u64,
}

/// The time the guest stood still, in parts, in microseconds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BlackoutView {
    /// Stopping the vCPUs.
    pub pause: u64,
    /// The last dirty pages.
    pub last_pages: u64,
    /// Saving, sending, restoring and checking the state.
    pub state: u64,
    /// From Ready until the grant arrived.
    pub commit: u64,
    /// From the grant until the vCPUs ran.
    pub resume: u64,
    /// All of it.
    pub total: u64,
}

/// How far a migration is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ProgressView {
    /// The round over the dirty pages.
    pub round: u32,
    /// On the wire so far.
    pub bytes_sent: u64,
    /// The guest's memory.
    pub bytes_total: u64,
    /// Known to be dirty or unsent.
    pub bytes_remaining: u64,
    /// How fast the guest writes.
    pub dirty_bytes_per_s: u64,
    /// How fast the link carries.
    pub bandwidth_bytes_per_s: u64,
    /// Expected until the end.
    pub eta_ms: Option<u64>,
    /// How much each vCPU is held back now, percent of its time.
    pub throttle_percent: u32,
    /// TCP streams in use.
    pub streams: u32,
    /// What each of them does, in pre-copy.
    pub by_stream: Vec<StreamView>,
}

/// One TCP stream of a migration under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StreamView {
    /// From 0 on.
    pub number: u32,
    /// On the wire so far.
    pub bytes: u64,
    /// Of late.
    pub bytes_per_s: u64,
    /// Pages taken on and not written yet.
    pub pages_queued: u64,
    /// So long nothing went out although there was something to write; null: it is not stalled.
    pub stalled_ms: Option<u64>,
}

/// What was asked of a migration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct OptionsView {
    /// The longest the guest may stand still; null: the cluster's default.
    pub max_downtime_ms: Option<u32>,
    /// Abort when it has not ended by then.
    pub deadline_ms: Option<u64>,
    /// Cap of the network used.
    pub bandwidth_mib_s: Option<u64>,
    /// TCP streams; null: as many as suit.
    pub streams: Option<u32>,
    /// Whether pages may go unencrypted.
    pub plaintext: bool,
    /// How pages are made smaller: "auto", "off", "lz4" or "zstd".
    pub compression: &'static str,
    /// The most that each vCPU may be held back; null: not at all.
    pub max_throttle_percent: Option<u32>,
    /// Whether the VM may run at the target before all its pages are there.
    pub allow_postcopy: bool,
}

/// The word for a migration's phase.
fn phase_word(phase: v1::MigrationPhase) -> &'static str {
    match phase {
        v1::MigrationPhase::Unspecified => "unspecified",
        v1::MigrationPhase::Planned => "planned",
        v1::MigrationPhase::Preparing => "preparing",
        v1::MigrationPhase::PreCopy => "pre-copy",
        v1::MigrationPhase::Switchover => "switchover",
        v1::MigrationPhase::Ready => "ready",
        v1::MigrationPhase::Committed => "committed",
        v1::MigrationPhase::PostCopy => "post-copy",
        v1::MigrationPhase::Done => "done",
        v1::MigrationPhase::Aborted => "aborted",
    }
}

impl From<v1::Migration> for MigrationView {
    fn from(migration: v1::Migration) -> Self {
        let phase = migration.phase();
        let ended_in = Some(migration.ended_in()).filter(|&phase| phase != v1::MigrationPhase::Unspecified);
        let ended = matches!(phase, v1::MigrationPhase::Done | v1::MigrationPhase::Aborted);
        let options = migration.options.unwrap_or_default();
        Self {
            id: migration.id,
            vm: migration.vm,
            from: migration.from,
            to: migration.to,
            phase: phase_word(phase),
            ended_in: ended_in.map(phase_word),
            reason: ReasonView::of(migration.reason),
            receipt: migration.receipt.map(ReceiptView::from),
            progress: migration.progress.filter(|_| !ended).map(ProgressView::from),
            options: OptionsView::from(options),
            forecast: migration.forecast.map(ForecastView::from),
            epoch: migration.epoch,
            requested_by: some(migration.requested_by),
            created_ms: migration.created_ms,
            changed_ms: migration.changed_ms,
        }
    }
}

impl From<v1::MigrationOptions> for OptionsView {
    fn from(options: v1::MigrationOptions) -> Self {
        Self {
            max_downtime_ms: Some(options.max_downtime_ms).filter(|&ms| ms > 0),
            deadline_ms: Some(options.deadline_ms).filter(|&ms| ms > 0),
            bandwidth_mib_s: Some(options.bandwidth_mib_s).filter(|&cap| cap > 0),
            streams: Some(options.streams).filter(|&streams| streams > 0),
            plaintext: options.plaintext,
            compression: match v1::Compression::try_from(options.compression) {
                Ok(v1::Compression::Auto) => "auto",
                Ok(v1::Compression::Off) => "off",
                Ok(v1::Compression::Lz4) => "lz4",
                Ok(v1::Compression::Zstd) => "zstd",
                Err(_) => "unknown",
            },
            max_throttle_percent: Some(options.max_throttle_percent).filter(|&percent| percent > 0),
            allow_postcopy: options.allow_postcopy,
        }
    }
}

impl From<v1::Receipt> for ReceiptView {
    fn from(receipt: v1::Receipt) -> Self {
        let blackout = receipt.blackout_us.unwrap_or_default();
        Self {
            total_ms: receipt.total_ms,
            bytes: receipt.bytes,
            rounds: receipt.rounds,
            blackout_us: BlackoutView {
                pause: blackout.pause,
                last_pages: blackout.last_pages,
                state: blackout.state,
                commit: blackout.commit,
                resume: blackout.resume,
                total: blackout.total,
            },
            pages: receipt.pages,
            zero_pages: receipt.zero_pages,
            tracker: receipt.tracker,
            streams: receipt.streams,
            plaintext: receipt.plaintext,
            throttle_percent: receipt.throttle_percent,
            encoding: receipt.encoding.map(|encoding| EncodingView {
                lz4_pages: encoding.lz4_pages,
                zstd_pages: encoding.zstd_pages,
                delta_pages: encoding.delta_pages,
                content_bytes: encoding.content_bytes,
                sent_bytes: encoding.sent_bytes,
            }),
            post_copy: receipt.post_copy.map(PostCopyView::from),
            post_copy_unavailable: some(receipt.post_copy_unavailable),
        }
    }
}

impl From<v1::PostCopyReceipt> for PostCopyView {
    fn from(receipt: v1::PostCopyReceipt) -> Self {
        Self {
            pages: receipt.pages,
            duration_us: receipt.duration_us,
            faults: receipt.faults,
            fault_mean_us: receipt.fault_mean_us,
            fault_longest_us: receipt.fault_longest_us,
        }
    }
}

impl PostCopyView {
    /// What it cost, for people.
    fn line(&self) -> String {
        format!(
            "{} pages in {}, {} of them waited for, {} on average, {} at most",
            self.pages,
            micros(self.duration_us),
            self.faults,
            micros(self.fault_mean_us),
            micros(self.fault_longest_us)
        )
    }
}

impl From<v1::Progress> for ProgressView {
    fn from(progress: v1::Progress) -> Self {
        Self {
            round: progress.round,
            bytes_sent: progress.bytes_sent,
            bytes_total: progress.bytes_total,
            bytes_remaining: progress.bytes_remaining,
            dirty_bytes_per_s: progress.dirty_bytes_per_s,
            bandwidth_bytes_per_s: progress.bandwidth_bytes_per_s,
            eta_ms: Some(progress.eta_ms).filter(|&ms| ms > 0),
            throttle_percent: progress.throttle_percent,
            streams: progress.streams,
            by_stream: progress.by_stream.into_iter().map(StreamView::from).collect(),
        }
    }
}

impl From<v1::StreamProgress> for StreamView {
    fn from(stream: v1::StreamProgress) -> Self {
        Self {
            number: stream.number,
            bytes: stream.bytes,
            bytes_per_s: stream.bytes_per_s,
            pages_queued: stream.pages_queued,
            stalled_ms: Some(stream.stalled_ms).filter(|&ms| ms > 0),
        }
    }
}

impl StreamView {
    /// What it does, for people.
    pub fn line(&self) -> String {
        let sent = format!("{} sent", bytes(self.bytes));
        match (self.stalled_ms, self.pages_queued) {
            (Some(ms), pages) => format!("stalled for {}, {pages} pages queued, {sent}", millis(ms)),
            (None, 0) => format!("{}/s, {sent}", bytes(self.bytes_per_s)),
            (None, pages) => format!("{}/s, {sent}, {pages} pages queued", bytes(self.bytes_per_s)),
        }
    }
}

/// How much vCPUs are held back, for people.
fn throttle(percent: u32) -> String {
    match percent {
        0 => "none".to_owned(),
        percent => format!("{percent} % of each vCPU's time"),
    }
}

/// What was done to make pages smaller, for people.
fn encoding(encoding: &EncodingView) -> String {
    let forms: Vec<_> = [
        ("by lz4", encoding.lz4_pages),
        ("by zstd", encoding.zstd_pages),
        ("as deltas", encoding.delta_pages),
    ]
    .into_iter()
    .filter(|(_, pages)| *pages > 0)
    .map(|(form, pages)| format!("{pages} pages {form}"))
    .collect();
    if forms.is_empty() {
        return "none".to_owned();
    }
    format!(
        "{}: {} instead of {}",
        forms.join(", "),
        bytes(encoding.sent_bytes),
        bytes(encoding.content_bytes)
    )
}

/// What carried the pages, for people. A receipt of an older VMM does not tell their number.
fn streams(receipt: &ReceiptView) -> String {
    let secrecy = if receipt.plaintext {
        "unencrypted"
    } else {
        "encrypted"
    };
    match receipt.streams {
        0 => secrecy.to_owned(),
        count => format!("{count}, {secrecy}"),
    }
}

impl MigrationView {
    /// Whether nothing more will happen.
    pub fn ended(&self) -> bool {
        matches!(self.phase, "done" | "aborted")
    }

    /// The outcome in a sentence.
    pub fn sentence(&self) -> String {
        let Self {
            id,
            vm,
            from,
            to,
            phase,
            ..
        } = self;
        match (*phase, &self.receipt, &self.reason) {
            ("done", Some(receipt), _) if from == to => {
                format!(
                    "{id}: {vm} goes on in another VMM on {to}, blackout {}",
                    micros(receipt.blackout_us.total)
                )
            }
            ("done", Some(receipt), _) => {
                format!(
                    "{id}: {vm} went {from} -> {to}, blackout {}",
                    micros(receipt.blackout_us.total)
                )
            }
            ("aborted", _, reason) => {
                let during = self
                    .ended_in
                    .map(|phase| format!(" during {phase}"))
                    .unwrap_or_default();
                let why = reason
                    .as_ref()
                    .map(|reason| format!(": {}", reason.line()))
                    .unwrap_or_default();
                format!("{id}: {vm} {from} -> {to} was aborted{during}{why}")
            }
            _ => format!("{id}: {vm} {from} -> {to} is {phase}"),
        }
    }
}

impl Tabular for MigrationView {
    const HEAD: &'static [&'static str] = &[
        "ID", "VM", "FROM", "TO", "PHASE", "BLACKOUT", "TOTAL", "SENT", "ROUNDS", "STARTED",
    ];

    fn id(&self) -> &str {
        &self.id
    }

    fn row(&self) -> Vec<String> {
        let receipt = self.receipt.as_ref();
        let sent = receipt
            .map(|r| r.bytes)
            .or(self.progress.as_ref().map(|p| p.bytes_sent));
        let rounds = receipt
            .map(|r| r.rounds)
            .or(self.progress.as_ref().map(|p| p.round));
        let phase = match &self.reason {
            Some(reason) => format!("{} [{}]", self.phase, reason.code),
            None => self.phase.to_owned(),
        };
        vec![
            self.id.clone(),
            self.vm.clone(),
            self.from.clone(),
            self.to.clone(),
            phase,
            dash(receipt.map(|r| micros(r.blackout_us.total)).as_deref()),
            dash(receipt.map(|r| millis(r.total_ms)).as_deref()),
            dash(sent.map(bytes).as_deref()),
            dash(rounds.map(|n| n.to_string()).as_deref()),
            instant(self.created_ms),
        ]
    }
}

impl Detailed for MigrationView {
    fn fields(&self) -> Vec<(&'static str, String)> {
        let mut fields = vec![
            ("migration", self.id.clone()),
            ("vm", self.vm.clone()),
            ("from", self.from.clone()),
            ("to", self.to.clone()),
            ("phase", self.phase.to_owned()),
        ];
        if let Some(ended_in) = self.ended_in {
            fields.push(("ended in", ended_in.to_owned()));
        }
        if let Some(reason) = &self.reason {
            fields.push(("reason", reason.line()));
        }
        if let Some(progress) = &self.progress {
            fields.extend([
                ("round", progress.round.to_string()),
                ("sent", bytes(progress.bytes_sent)),
                (
                    "remaining",
                    format!(
                        "{} of {}",
                        bytes(progress.bytes_remaining),
                        bytes(progress.bytes_total)
                    ),
                ),
                ("guest writes", format!("{}/s", bytes(progress.dirty_bytes_per_s))),
                (
                    "link carries",
                    format!("{}/s", bytes(progress.bandwidth_bytes_per_s)),
                ),
                ("throttle", throttle(progress.throttle_percent)),
                ("ETA", dash(progress.eta_ms.map(millis).as_deref())),
            ]);
            let streams = progress.by_stream.iter();
            fields
                .extend(streams.map(|stream| ("  stream", format!("{}: {}", stream.number, stream.line()))));
        }
        if let Some(receipt) = &self.receipt {
            let blackout = &receipt.blackout_us;
            fields.extend([
                ("total", millis(receipt.total_ms)),
                (
                    "sent",
                    format!("{} in {} rounds", bytes(receipt.bytes), receipt.rounds),
                ),
                (
                    "pages",
                    format!("{}, and {} of zeros", receipt.pages, receipt.zero_pages),
                ),
                (
                    "compression",
                    receipt
                        .encoding
                        .as_ref()
                        .map_or_else(|| "none".to_owned(), encoding),
                ),
                ("dirty tracking", receipt.tracker.clone()),
                ("streams", streams(receipt)),
                ("throttle", throttle(receipt.throttle_percent)),
                ("blackout", micros(blackout.total)),
                ("  pause", micros(blackout.pause)),
                ("  last pages", micros(blackout.last_pages)),
                ("  state", micros(blackout.state)),
                ("  commit", micros(blackout.commit)),
                ("  resume", micros(blackout.resume)),
            ]);
            if let Some(post_copy) = &receipt.post_copy {
                fields.push(("post-copy", post_copy.line()));
            }
            if let Some(why) = &receipt.post_copy_unavailable {
                fields.push(("post-copy", format!("not possible: {why}")));
            }
        }
        if let Some(forecast) = &self.forecast {
            fields.push(("expected", forecast.line()));
        }
        fields.push(("started", instant(self.created_ms)));
        fields.push(("changed", instant(self.changed_ms)));
        fields
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn done() -> v1::Migration {
        v1::Migration {
            id: "m1".to_owned(),
            vm: "vm1".to_owned(),
            from: "host1".to_owned(),
            to: "host2".to_owned(),
            phase: v1::MigrationPhase::Done.into(),
            receipt: Some(v1::Receipt {
                total_ms: 812,
                bytes: 70_000_000,
                rounds: 4,
                blackout_us: Some(v1::Blackout {
                    pause: 100,
                    last_pages: 2_000,
                    state: 3_000,
                    commit: 4_000,
                    resume: 500,
                    total: 9_600,
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn a_migrations_json_has_the_promised_fields() {
        let json = serde_json::to_value(MigrationView::from(done())).unwrap();
        assert_eq!(
            (
                &json["id"],
                &json["vm"],
                &json["from"],
                &json["to"],
                &json["phase"]
            ),
            (
                &json!("m1"),
                &json!("vm1"),
                &json!("host1"),
                &json!("host2"),
                &json!("done")
            )
        );
        assert_eq!(json["receipt"]["total_ms"], 812);
        assert_eq!(json["receipt"]["bytes"], 70_000_000);
        assert_eq!(json["receipt"]["rounds"], 4);
        assert_eq!(
            json["receipt"]["blackout_us"],
            json!({"pause": 100, "last_pages": 2000, "state": 3000, "commit": 4000, "resume": 500, "total": 9600})
        );
        assert_eq!(json["reason"], json!(null));
    }

    #[test]
    fn an_aborted_migration_says_when_and_why() {
        let migration = v1::Migration {
            phase: v1::MigrationPhase::Aborted.into(),
            ended_in: v1::MigrationPhase::PreCopy.into(),
            reason: Some(v1::Reason {
                code: "cancelled".to_owned(),
                message: "a person cancelled".to_owned(),
            }),
            receipt: None,
            ..done()
        };
        let view = MigrationView::from(migration);
        assert!(view.ended());
        assert_eq!(
            view.sentence(),
            "m1: vm1 host1 -> host2 was aborted during pre-copy: a person cancelled [cancelled]"
        );
        let json = serde_json::to_value(&view).unwrap();
        assert_eq!(json["reason"]["code"], "cancelled");
        assert_eq!(json["ended_in"], "pre-copy");
        assert_eq!(json["receipt"], json!(null));
    }

    #[test]
    fn the_receipt_shows_the_parts_of_the_blackout() {
        let fields = MigrationView::from(done()).fields();
        let value = |name: &str| {
            fields
                .iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| value.as_str())
        };
        assert_eq!(value("blackout"), Some("9.6 ms"));
        assert_eq!(value("  commit"), Some("4.0 ms"));
        assert_eq!(value("total"), Some("812 ms"));
        assert_eq!(value("streams"), Some("encrypted"));
        assert_eq!(value("throttle"), Some("none"));
        assert_eq!(value("reason"), None);
    }

    #[test]
    fn the_receipt_shows_what_carried_the_pages_and_how_much_the_guest_was_held_back() {
        let mut migration = done();
        let receipt = migration.receipt.as_mut().unwrap();
        (receipt.streams, receipt.plaintext, receipt.throttle_percent) = (4, true, 76);
        let view = MigrationView::from(migration);
        let fields = view.fields();
        assert!(
            fields.contains(&("streams", "4, unencrypted".to_owned())),
            "{fields:?}"
        );
        assert!(
            fields.contains(&("throttle", "76 % of each vCPU's time".to_owned())),
            "{fields:?}"
        );
        let json = serde_json::to_value(&view).unwrap();
        assert_eq!(json["receipt"]["throttle_percent"], 76);
        assert_eq!(json["receipt"]["streams"], 4);
        assert_eq!(json["receipt"]["plaintext"], true);
    }

    #[test]
    fn progress_is_shown_only_while_it_lasts() {
        let progress = Some(v1::Progress {
            round: 2,
            bytes_sent: 5,
            ..Default::default()
        });
        let running = v1::Migration {
            phase: v1::MigrationPhase::PreCopy.into(),
            receipt: None,
            progress,
            ..done()
        };
        let view = MigrationView::from(running.clone());
        assert_eq!(view.progress.as_ref().map(|p| p.round), Some(2));
        assert_eq!(view.row().len(), MigrationView::HEAD.len());
        let ended = v1::Migration {
            phase: v1::MigrationPhase::Done.into(),
            ..running
        };
        assert_eq!(MigrationView::from(ended).progress, None);
    }

    #[test]
    fn every_phase_has_its_own_lower_case_word() {
        let words: std::collections::BTreeSet<_> = (0..=8)
            .map(|n| phase_word(v1::MigrationPhase::try_from(n).unwrap()))
            .inspect(|word| {
                assert!(
                    word.bytes().all(|b| b.is_ascii_lowercase() || b == b'-'),
                    "{word}"
                )
            })
            .collect();
        assert_eq!(words.len(), 9);
    }
}
