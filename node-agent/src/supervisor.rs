//! The one owner of what is known about this host's VMMs: gathers, asks [`converge`] what to do, and has it done.
//!
//! ```text
//!   desired state ─┐
//!   VMMs' news ────┼─► know ──► converge ──► actions, each in a task of its own ──┐
//!   grants ────────┘    ▲                                                         │
//!                       └──────────────── what came of it ◄───────────────────────┘
//! ```
//!
//! An action is asked for as long as it is due; one at a time is under way for a VMM. An action that failed reports so only after a
//! pause, which paces the next attempt: there is no other retry.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use drover_proto::v1::{
    DestroyRequest, HostDesired, OutcomeRequest, PowerButtonRequest, Reason, ReportVmRequest,
    StartOutgoingRequest, SwitchToPostCopyRequest, VmDevices, VmState, VmmInfo, VmmState,
};
use drover_proto::{Code, Fault, LOCAL_ADDR, LOCAL_PREFIX};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tonic::{Response, Status};

use crate::agent::Context;
use crate::converge::{
    Action, Alive, Attaching, Detach, Life, Observed, Piece, Seen, content_of, converge, name_of_removal,
};
use crate::host::process::{self, Abandoned};
use crate::key::Key;
use crate::network::plan::Nic;
use crate::pause_point;
use crate::sandbox;
use crate::snapshots;
use crate::vmm::{self, Link, News, VMM_CALL_MAX};

/// Between two attempts of an action.
const RETRY: Duration = Duration::from_millis(200);
/// Between two attempts to attach or grow what cannot be; twice as long each time.
const REST_MIN: Duration = Duration::from_millis(200);
/// See [`REST_MIN`].
const REST_MAX: Duration = Duration::from_secs(5);
/// Where the target of an upgrade listens, in its folder.
const HANDOVER_SOCKET: &str = "handover.sock";
/// A VMM that was told to end and lives on is killed after this.
const DESTROY_GRACE: Duration = Duration::from_secs(3);

/// What the supervisor hears.
pub enum Event {
    /// Another desired state.
    Desired {
        /// What it is.
        desired: HostDesired,
        /// When it was received, `CLOCK_BOOTTIME`.
        received_ns: u64,
    },
    /// Something about a VMM.
    Vmm {
        /// Which one.
        key: Key,
        /// What.
        news: News,
    },
    /// What could not be attached to this VMM may be tried again.
    Rested(Key, String),
    /// An action came to its end.
    Done {
        /// Whose turn it was.
        slot: String,
        /// What it achieved, if it did.
        effect: Option<Effect>,
        /// When the desired state that it was for was received.
        received_ns: u64,
    },
}

/// What an action achieved.
pub enum Effect {
    /// Nothing that must be kept.
    Nothing,
    /// The VMM took `StartOutgoing` for this migration.
    OutgoingTaken(Key, String),
    /// The VMM took `SwitchToPostCopy` for this migration.
    SwitchTaken(Key, String),
    /// The VMM took the commit of its outgoing migration.
    CommitTaken(Key),
    /// The end of the VMM is reported.
    EndReported(Key),
    /// A volume or a NIC, by its MAC, could not be attached or grown, or could.
    Attached(Key, String, Option<Reason>),
    /// What the VMM has is reported.
    DevicesReported(Key, VmDevices),
    /// The VMM has begun a snapshot.
    SnapshotTaken(Key, String),
    /// The end of a snapshot is reported.
    SnapshotTold(Key, String),
    /// The end of a run without a VMM, or a removal (with 0), is reported.
    Told(String, u64),
}

/// What is known of one VMM.
struct Known {
    link: Arc<Link>,
    starting: bool,
    gone: Option<Reason>,
    commit_refused: bool,
    outgoing_taken: Option<String>,
    switch_taken: Option<String>,
    commit_taken: bool,
    end_reported: bool,
    attaching: Attaching,
    /// By volume or MAC: how long it rested the last time.
    rested: BTreeMap<String, Duration>,
    snapshot_taken: Option<String>,
    snapshot_told: Option<String>,
    destroying_since: Option<Instant>,
    _lock: Option<Abandoned>,
}

/// See the module.
pub struct Supervisor {
    context: Arc<Context>,
    events: mpsc::Sender<Event>,
    inbox: mpsc::Receiver<Event>,
    vmms: BTreeMap<Key, Known>,
    desired: Option<(HostDesired, u64)>,
    told: BTreeSet<(String, u64)>,
    under_way: BTreeSet<String>,
    /// Tending tasks and actions: they end with the supervisor.
    tasks: JoinSet<()>,
}

impl Supervisor {
    /// Takes over the VMMs that were found: `found` are those whose end is not known to have been reported.
    pub fn new(
        context: Arc<Context>,
        found: Vec<Key>,
        events: mpsc::Sender<Event>,
        inbox: mpsc::Receiver<Event>,
    ) -> Self {
        let mut supervisor = Self {
            context,
            events,
            inbox,
            vmms: BTreeMap::new(),
            desired: None,
            told: BTreeSet::new(),
            under_way: BTreeSet::new(),
            tasks: JoinSet::new(),
        };
        for key in found {
            supervisor.adopt(key);
        }
        supervisor
    }

    fn adopt(&mut self, key: Key) {
        let link = self.link_to(&key);
        match process::take_lock(&link.folder) {
            Ok(Some(lock)) => {
                let reason = vmm::died(&link.folder, "while no agent watched");
                tracing::warn!(vmm = %key, "found gone: {}", reason.message);
                self.know(link, false).gone = Some(reason);
                self.vmms.get_mut(&key).expect("it was put there just now")._lock = Some(lock);
            }
            taken => {
                if let Err(error) = taken {
                    tracing::error!(vmm = %key, "its lock cannot be asked: {error}; taken for alive");
                }
                tracing::info!(vmm = %key, "found alive");
                self.context.networks.know(&key, &link.folder);
                self.know(link.clone(), false);
                self.tend(link, None);
            }
        }
    }

    fn link_to(&self, key: &Key) -> Arc<Link> {
        let folder = self
            .context
            .store
            .lock()
            .expect("nobody panics with the store")
            .folder(key);
        let link = Link::new(key.clone(), folder);
        self.context
            .links
            .lock()
            .expect("nobody panics with the links")
            .insert(key.clone(), link.clone());
        link
    }

    fn know(&mut self, link: Arc<Link>, starting: bool) -> &mut Known {
        self.vmms.entry(link.key.clone()).or_insert(Known {
            link,
            starting,
            gone: None,
            commit_refused: false,
            outgoing_taken: None,
            switch_taken: None,
            commit_taken: false,
            end_reported: false,
            attaching: Attaching::default(),
            rested: BTreeMap::new(),
            snapshot_taken: None,
            snapshot_told: None,
            destroying_since: None,
            _lock: None,
        })
    }

    fn tend(&mut self, link: Arc<Link>, fresh: Option<drover_proto::v1::VmDesired>) {
        self.tasks
            .spawn(vmm::tend(self.context.clone(), link, fresh, self.events.clone()));
    }

    /// Runs for ever.
    pub async fn run(mut self) {
        let mut grants = self.context.grants.subscribe();
        loop {
            tokio::select! {
                event = self.inbox.recv() => match event {
                    Some(event) => self.take(event),
                    None => return,
                },
                Ok(()) = grants.changed() => {}
                Some(ended) = self.tasks.join_next() => {
                    if let Err(error) = ended {
                        tracing::error!("a task failed: {error}");
                    }
                    continue;
                }
            }
            self.pass();
        }
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Desired { desired, received_ns } => {
                tracing::debug!(
                    revision = desired.revision,
                    vms = desired.vms.len(),
                    "desired state"
                );
                self.context.networks.told(&desired.peers);
                let fills = desired.fills.iter().map(|volume| volume.content).collect();
                *self.context.fills.lock().expect("nobody panics with it") = fills;
                self.desired = Some((desired, received_ns));
                self.told.clear();
            }
            Event::Vmm { key, news } => {
                let Some(known) = self.vmms.get_mut(&key) else {
                    return;
                };
                match news {
                    News::Changed => known.starting = false,
                    News::CommitRefused(reason) => {
                        tracing::info!(vmm = %key, "its migration was aborted: {}", reason.message);
                        known.commit_refused = true;
                    }
                    News::Gone(reason, lock) => {
                        (known.gone, known._lock) = (Some(reason), lock);
                    }
                }
            }
            Event::Rested(key, name) => {
                if let Some(known) = self.vmms.get_mut(&key) {
                    known.attaching.resting.remove(&name);
                }
            }
            Event::Done {
                slot,
                effect,
                received_ns,
            } => {
                self.under_way.remove(&slot);
                self.keep(effect.unwrap_or(Effect::Nothing), received_ns);
            }
        }
    }

    fn keep(&mut self, effect: Effect, received_ns: u64) {
        let known = |vmms: &mut BTreeMap<Key, Known>, key: &Key, change: &dyn Fn(&mut Known)| {
            if let Some(known) = vmms.get_mut(key) {
                change(known);
            }
        };
        match effect {
            Effect::Nothing => {}
            Effect::OutgoingTaken(key, id) => {
                known(&mut self.vmms, &key, &|known| {
                    known.outgoing_taken = Some(id.clone())
                });
            }
            Effect::SwitchTaken(key, id) => {
                known(&mut self.vmms, &key, &|known| {
                    known.switch_taken = Some(id.clone())
                });
            }
            Effect::CommitTaken(key) => known(&mut self.vmms, &key, &|known| known.commit_taken = true),
            Effect::EndReported(key) => known(&mut self.vmms, &key, &|known| known.end_reported = true),
            Effect::Attached(key, name, None) => known(&mut self.vmms, &key, &|known| {
                known.attaching.failed.remove(&name);
                known.attaching.resting.remove(&name);
                known.rested.remove(&name);
            }),
            Effect::Attached(key, name, Some(reason)) => self.let_rest(key, name, reason),
            Effect::DevicesReported(key, devices) => known(&mut self.vmms, &key, &|known| {
                known.attaching.reported = Some(devices.clone());
            }),
            Effect::SnapshotTaken(key, id) => known(&mut self.vmms, &key, &|known| {
                known.snapshot_taken = Some(id.clone());
            }),
            Effect::SnapshotTold(key, id) => known(&mut self.vmms, &key, &|known| {
                known.snapshot_told = Some(id.clone());
            }),
            Effect::Told(vm, epoch) => {
                // Under another desired state it may have to be told again.
                if self
                    .desired
                    .as_ref()
                    .is_some_and(|(_, current_ns)| *current_ns == received_ns)
                {
                    self.told.insert((vm, epoch));
                }
            }
        }
    }

    /// What cannot be attached is tried more and more seldom: an attempt may make a NIC's TAP and rewrite its host's rules.
    fn let_rest(&mut self, key: Key, name: String, reason: Reason) {
        let Some(known) = self.vmms.get_mut(&key) else {
            return;
        };
        known.attaching.failed.insert(name.clone(), reason);
        known.attaching.resting.insert(name.clone());
        let last = known.rested.get(&name).copied();
        let rest = last.map_or(REST_MIN, |last| (last * 2).min(REST_MAX));
        known.rested.insert(name.clone(), rest);
        let events = self.events.clone();
        self.tasks.spawn(async move {
            sleep(rest).await;
            // Only a supervisor that has ended does not listen.
            let _ = events.send(Event::Rested(key, name)).await;
        });
    }

    fn observed(&self) -> Observed {
        let store = self.context.store.lock().expect("nobody panics with the store");
        let grants = self.context.grants.borrow();
        let confirmed = self.desired.as_ref().is_some_and(|(desired, received_ns)| {
            grants.sent_ns >= *received_ns && (grants.revision == desired.revision || grants.revision == 0)
        });
        let seen = |known: &Known| known.seen(self.context.networks.held(&known.link.key));
        Observed {
            host: self.context.config.name.clone(),
            vmms: self.vmms.values().map(seen).collect(),
            markers: store.markers().clone(),
            highest: store.highest().clone(),
            confirmed,
            told: self.told.clone(),
        }
    }

    fn pass(&mut self) {
        let Some((desired, received_ns)) = &self.desired else {
            return;
        };
        let received_ns = *received_ns;
        for action in converge(desired, &self.observed()) {
            match action {
                // One heartbeat sent after the desired state came is enough; a watch follows when it says otherwise.
                Action::Confirm if self.context.grants.borrow().sent_ns >= received_ns => {}
                Action::Confirm => self.context.heartbeat_now.notify_one(),
                Action::StartVmm { key, desired } => {
                    let link = self.link_to(&key);
                    self.know(link.clone(), true);
                    self.tend(link, Some(*desired));
                }
                Action::Committed { key } => {
                    if let Some(known) = self.vmms.get(&key) {
                        known.link.had_right.send_replace(true);
                    }
                }
                Action::Forget { key } => self.forget(&key),
                action => self.begin(action),
            }
        }
    }

    fn forget(&mut self, key: &Key) {
        let mut store = self.context.store.lock().expect("nobody panics with the store");
        match store.end(key) {
            Ok(()) => {
                tracing::debug!(vmm = %key, "forgotten");
                self.vmms.remove(key);
                self.context
                    .links
                    .lock()
                    .expect("nobody panics with the links")
                    .remove(key);
            }
            Err(error) => tracing::error!(vmm = %key, "its folder cannot be cleared: {error}; trying on"),
        }
    }

    /// Lets an action be carried out, unless the same VMM or migration has one under way.
    fn begin(&mut self, action: Action) {
        let slot = slot_of(&action);
        if !self.under_way.insert(slot.clone()) {
            return;
        }
        let mut known = key_of(&action).and_then(|key| self.vmms.get_mut(key));
        let mut kill = false;
        if let (Some(why), Some(known)) = (why_it_ends(&action), known.as_deref_mut()) {
            known.link.cancelled.store(true, Ordering::SeqCst);
            if known.destroying_since.is_none() {
                tracing::info!(vmm = %known.link.key, "to be destroyed: {why}");
            }
            kill = known.destroying_since.get_or_insert_with(Instant::now).elapsed() >= DESTROY_GRACE;
        }
        let link = known.map(|known| known.link.clone());
        let (context, events) = (self.context.clone(), self.events.clone());
        let received_ns = self.desired.as_ref().map_or(0, |(_, received_ns)| *received_ns);
        self.tasks.spawn(async move {
            let effect = match carry_out(&context, link.as_deref(), &action, kill).await {
                Ok(effect) => Some(effect),
                Err(fault) => {
                    // A VMM that is ending does not answer any more, and that is well.
                    if matches!(action, Action::Destroy { .. } | Action::Outcome { .. }) {
                        tracing::debug!("{action:?}: {fault}");
                    } else {
                        tracing::warn!("{action:?}: {fault}; trying on");
                    }
                    None
                }
            };
            let again = matches!(
                action,
                Action::Destroy { .. }
                    | Action::Abort { .. }
                    | Action::Outcome { .. }
                    | Action::CancelSnapshot { .. }
            );
            if effect.is_none() || again {
                sleep(RETRY).await;
            }
            // Only a supervisor that has ended does not listen.
            let _ = events
                .send(Event::Done {
                    slot,
                    effect,
                    received_ns,
                })
                .await;
        });
    }
}

impl Known {
    fn seen(&self, nics: Vec<Nic>) -> Seen {
        let life = match (&self.gone, self.link.newest_info()) {
            (Some(reason), _) => Life::Gone(reason.clone()),
            (None, Some(info)) => Life::Alive(alive(&info)),
            (None, None) if self.starting => Life::Starting,
            (None, None) => Life::Silent,
        };
        Seen {
            key: self.link.key.clone(),
            life,
            had_right: *self.link.had_right.borrow(),
            commit_refused: self.commit_refused,
            outgoing_taken: self.outgoing_taken.clone(),
            switch_taken: self.switch_taken.clone(),
            commit_taken: self.commit_taken,
            end_reported: self.end_reported,
            attaching: self.attaching.clone(),
            snapshot_taken: self.snapshot_taken.clone(),
            snapshot_told: self.snapshot_told.clone(),
            nics,
        }
    }
}

fn alive(info: &VmmInfo) -> Alive {
    let outgoing = info.migration.as_ref().filter(|migration| migration.outgoing);
    Alive {
        state: info.state(),
        reason: info.reason.clone(),
        outgoing: outgoing.map(|migration| migration.id.clone()),
        devices: info.devices.clone(),
        snapshot: info.snapshot.clone(),
    }
}

/// Why the VMM is to be gone after this action, which it answers or is killed; `None` for what leaves it alive.
fn why_it_ends(action: &Action) -> Option<&str> {
    match action {
        Action::Destroy { reason, .. } => Some(&reason.message),
        Action::Outcome { committed: true, .. } => Some("its hand-over is committed"),
        _ => None,
    }
}

fn key_of(action: &Action) -> Option<&Key> {
    match action {
        Action::StartVmm { key, .. }
        | Action::StartOutgoing { key, .. }
        | Action::Outcome { key, .. }
        | Action::Committed { key }
        | Action::Serve { key, .. }
        | Action::SwitchToPostCopy { key, .. }
        | Action::Destroy { key, .. }
        | Action::ReportEnd { key, .. }
        | Action::Attach { key, .. }
        | Action::Release { key, .. }
        | Action::Detach { key, .. }
        | Action::Resize { key, .. }
        | Action::Press { key, .. }
        | Action::SetMemory { key, .. }
        | Action::ReportDevices { key, .. }
        | Action::TakeSnapshot { key, .. }
        | Action::CancelSnapshot { key, .. }
        | Action::CompleteSnapshot { key, .. }
        | Action::ReportSnapshot { key, .. }
        | Action::BeginRestore { key, .. }
        | Action::Forget { key } => Some(key),
        Action::ReportGone { .. }
        | Action::Abort { .. }
        | Action::Fill { .. }
        | Action::Remove { .. }
        | Action::Confirm => None,
    }
}

/// Of the actions with the same slot one at a time is under way.
fn slot_of(action: &Action) -> String {
    match action {
        Action::ReportGone { vm, epoch, .. } => format!("gone {vm} {epoch}"),
        Action::Abort { migration, .. } => format!("abort {migration}"),
        Action::Remove { removal } => format!("content {}", name_of_removal(removal)),
        // One after the other: what is removed is not put there again by who was about to.
        Action::Fill { volume } => format!("content {}", name_of_removal(&content_of(volume))),
        // Paced by itself, so that the report of the end does not wait for its turn.
        Action::Destroy { key, .. } => format!("destroy {key}"),
        Action::Outcome { key, .. } => format!("outcome {key}"),
        other => key_of(other).map_or_else(String::new, |key| format!("vmm {key}")),
    }
}

/// Tells a source what the log says. `kill`: it was told to end before, and lives on.
async fn tell_outcome(link: &Link, migration: String, committed: bool, kill: bool) -> Result<(), Fault> {
    pause_point("agent.before_outcome").await;
    if kill {
        kill_it(link).await;
    }
    let request = OutcomeRequest { migration, committed };
    bounded(link.client.clone().outcome(request)).await.map(drop)
}

async fn carry_out(
    context: &Context,
    link: Option<&Link>,
    action: &Action,
    kill: bool,
) -> Result<Effect, Fault> {
    match (action.clone(), link) {
        (Action::StartOutgoing { key, request }, Some(link)) => {
            let migration = request.migration.clone();
            start_outgoing(context, link, request).await?;
            Ok(Effect::OutgoingTaken(key, migration))
        }
        (
            Action::Outcome {
                key,
                migration,
                committed,
            },
            Some(link),
        ) => {
            tracing::info!(vmm = %key, migration, committed, "the outcome is known");
            tell_outcome(link, migration, committed, kill).await?;
            Ok(if committed {
                Effect::CommitTaken(key)
            } else {
                Effect::Nothing
            })
        }
        (Action::SwitchToPostCopy { key, migration }, Some(link)) => {
            tracing::info!(vmm = %key, migration, "is to switch to post-copy");
            let request = SwitchToPostCopyRequest {
                migration: migration.clone(),
            };
            bounded(link.client.clone().switch_to_post_copy(request)).await?;
            Ok(Effect::SwitchTaken(key, migration))
        }
        (Action::Serve { key, migration }, Some(link)) => {
            tracing::info!(vmm = %key, migration, "committed: it gives the target its pages");
            // One that serves is never in the way of its own end.
            tell_outcome(link, migration, true, false).await?;
            Ok(Effect::CommitTaken(key))
        }
        (Action::Destroy { reason, .. }, Some(link)) => {
            destroy(link, reason, kill).await?;
            Ok(Effect::Nothing)
        }
        (Action::Attach { key, revision, piece }, Some(link)) => {
            let name = piece.name().to_owned();
            let attached = match piece {
                Piece::Disk(disk, volume) => vmm::attach_disk(context, link, revision, disk, volume).await,
                Piece::Nic(nic, network) => vmm::attach_nic(context, link, revision, &nic, &network).await,
            };
            tried(key, name, attached)
        }
        (Action::Release { key, tap }, Some(link)) => {
            tracing::info!(vmm = %key, tap, "its NIC is gone");
            context.networks.remove(&key, &link.folder, &tap)?;
            Ok(Effect::Nothing)
        }
        (
            Action::Resize {
                key,
                slot,
                volume,
                path,
            },
            Some(link),
        ) => {
            let name = volume.name.clone();
            let grown = vmm::resize(context, link, slot, volume, path).await;
            tried(key, name, grown)
        }
        (Action::Detach { key, name, request }, Some(link)) => {
            tracing::info!(vmm = %key, name, ?request, "the guest is to give it up");
            let mut client = link.client.clone();
            match request {
                Detach::Disk(request) => bounded(client.detach_disk(request)).await?,
                Detach::Nic(request) => bounded(client.detach_nic(request)).await?,
            };
            // Why it could not be attached once says nothing of the next time.
            Ok(Effect::Attached(key, name, None))
        }
        (Action::Press { key, request }, Some(link)) => {
            tracing::info!(vmm = %key, request, "the power button");
            bounded(link.client.clone().power_button(PowerButtonRequest { request })).await?;
            Ok(Effect::Nothing)
        }
        (Action::SetMemory { key, request }, Some(link)) => {
            let target_mib = request.target_mib;
            tracing::info!(vmm = %key, target_mib, "the guest is to have so much memory");
            bounded(link.client.clone().set_memory(request)).await?;
            Ok(Effect::Nothing)
        }
        (Action::ReportDevices { key, devices }, Some(link)) => {
            let _turn = link.reporting.lock().await;
            vmm::report_devices(context, link, devices.clone()).await?;
            Ok(Effect::DevicesReported(key, devices))
        }
        (Action::TakeSnapshot { key, snapshot, disks }, Some(link)) => {
            let told = snapshots::take(context, link, &snapshot, &disks).await?;
            Ok(match told {
                true => Effect::SnapshotTold(key, snapshot.id),
                false => Effect::SnapshotTaken(key, snapshot.id),
            })
        }
        (Action::CancelSnapshot { id, .. }, Some(link)) => {
            snapshots::cancel(link, id).await?;
            Ok(Effect::Nothing)
        }
        (
            Action::CompleteSnapshot {
                key,
                snapshot,
                report,
            },
            Some(link),
        ) => {
            snapshots::complete(context, link, &snapshot, *report).await?;
            Ok(Effect::SnapshotTold(key, snapshot.id))
        }
        (Action::ReportSnapshot { key, report }, Some(link)) => {
            tracing::info!(vmm = %link.key, snapshot = report.snapshot, news = report.news().as_str_name(), "reported");
            let id = report.snapshot.clone();
            snapshots::report(context, *report, vmm::REPORT_ATTEMPT).await?;
            Ok(Effect::SnapshotTold(key, id))
        }
        (Action::BeginRestore { restore, .. }, Some(link)) => {
            if !snapshots::begin(context, link, restore).await? {
                let message = format!("restore {restore} may not begin yet");
                return Err(Fault::new(Code::NoLeader, message));
            }
            link.had_right.send_replace(true);
            // It is granted from now on.
            context.heartbeat_now.notify_one();
            Ok(Effect::Nothing)
        }
        (Action::Remove { removal }, _) => {
            snapshots::remove(context, &removal).await?;
            Ok(Effect::Told(name_of_removal(&removal), 0))
        }
        (Action::Fill { volume }, _) => {
            snapshots::fill(context, &volume).await?;
            Ok(Effect::Told(name_of_removal(&content_of(&volume)), 0))
        }
        (Action::ReportEnd { key, state, reason }, Some(link)) => {
            let _turn = link.reporting.lock().await;
            report_end(context, &key.vm, key.epoch, state, reason).await?;
            Ok(Effect::EndReported(key))
        }
        (
            Action::ReportGone {
                vm,
                epoch,
                state,
                reason,
            },
            _,
        ) => {
            close(context, &vm, epoch)?;
            report_end(context, &vm, epoch, state, reason).await?;
            Ok(Effect::Told(vm, epoch))
        }
        (
            Action::Abort {
                migration,
                reason,
                phase,
            },
            _,
        ) => {
            tracing::warn!(migration, "to be aborted: {}", reason.message);
            vmm::abort(context, migration, reason, phase.into()).await?;
            Ok(Effect::Nothing)
        }
        _ => Ok(Effect::Nothing),
    }
}

/// What was refused for good is told to whoever asked for it, and tried again; what was not the time for is only tried again.
fn tried(key: Key, name: String, outcome: Result<(), Fault>) -> Result<Effect, Fault> {
    let failed = match outcome {
        Ok(()) => None,
        Err(fault) => match fault.code {
            Code::MigrationActive
            | Code::VmState
            | Code::DeviceBusy
            | Code::HostUnreachable
            | Code::NoLeader => {
                return Err(fault);
            }
            _ => {
                tracing::warn!(vmm = %key, name, "not attached: {fault}");
                Some(fault.into())
            }
        },
    };
    Ok(Effect::Attached(key, name, failed))
}

async fn start_outgoing(
    context: &Context,
    link: &Link,
    mut request: StartOutgoingRequest,
) -> Result<(), Fault> {
    let options = request.options.get_or_insert_default();
    if options.max_downtime_ms == 0 {
        // An agent that has just started may hear of the migration before it has registered; it is asked again.
        let settings = *context.settings.borrow();
        let unknown = || Fault::new(Code::NoLeader, "the cluster's settings are not known yet");
        options.max_downtime_ms = settings.ok_or_else(unknown)?.max_downtime_ms;
    }
    if request.target_addr == LOCAL_ADDR {
        let target = Key::incoming(&link.key.vm, request.target_epoch, &request.migration);
        request.target_addr = handover_socket(context, &target)?;
    }
    tracing::info!(vmm = %link.key, migration = request.migration, to = request.target_addr, "migrates");
    pause_point("agent.before_outgoing").await;
    sandbox::hand_way(&link.folder, &context.config.tls, &request).await?;
    bounded(link.client.clone().start_outgoing(request)).await?;
    Ok(())
}

/// Where the target of an upgrade waits. The path is this agent's own word: no controller names a socket of this host.
fn handover_socket(context: &Context, target: &Key) -> Result<String, Fault> {
    let folder = context
        .store
        .lock()
        .expect("nobody panics with the store")
        .folder(target);
    let path = folder.join(HANDOVER_SOCKET);
    match path.to_str() {
        Some(path) if target.is_well_formed() => Ok(format!("{LOCAL_PREFIX}{path}")),
        _ => Err(Fault::new(
            Code::Internal,
            format!("{} cannot be told to a VMM", path.display()),
        )),
    }
}

/// Asks the VMM to end; `kill`: it was asked for long enough.
async fn destroy(link: &Link, reason: Reason, kill: bool) -> Result<(), Fault> {
    let handed_over = |info: VmmInfo| info.state() == VmmState::HandedOver;
    if link.newest_info().is_some_and(handed_over) {
        pause_point("agent.before_outcome").await;
    }
    if kill {
        kill_it(link).await;
    }
    let request = DestroyRequest { reason: Some(reason) };
    bounded(link.client.clone().destroy(request)).await?;
    Ok(())
}

/// Ends the process of a VMM that was asked to end for long enough.
async fn kill_it(link: &Link) {
    let pid = match link.child.load(Ordering::SeqCst) {
        0 => process::listener(&link.folder).await,
        child => Ok(child),
    };
    match pid.and_then(|pid| process::kill_hard(pid).map(|()| pid)) {
        Ok(pid) => tracing::error!(vmm = %link.key, pid, "it did not end and was killed"),
        Err(error) => tracing::error!(vmm = %link.key, "it does not end and cannot be killed: {error}"),
    }
}

/// From here on nothing is started for `epoch`, not even when an older desired state turns up.
fn close(context: &Context, vm: &str, epoch: u64) -> Result<(), Fault> {
    let Some(next) = epoch
        .checked_add(1)
        .filter(|_| Key::start(vm, epoch).is_well_formed())
    else {
        return Ok(()); // Nothing can ever be started under such a name.
    };
    let mut store = context.store.lock().expect("nobody panics with the store");
    store
        .raise(vm, next)
        .map_err(|error| Fault::new(Code::Internal, error.to_string()))
}

async fn report_end(
    context: &Context,
    vm: &str,
    epoch: u64,
    state: VmState,
    reason: Reason,
) -> Result<(), Fault> {
    tracing::info!(
        vm,
        epoch,
        state = state.as_str_name(),
        "its end: {}",
        reason.message
    );
    let request = ReportVmRequest {
        vm: vm.to_owned(),
        epoch,
        state: state.into(),
        reason: Some(reason),
        ..Default::default()
    };
    vmm::report_vm(context, request).await
}

async fn bounded<T>(call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T, Fault> {
    match timeout(VMM_CALL_MAX, call).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => Err(Fault::from(&status)),
        Err(_) => Err(Fault::new(Code::HostUnreachable, "the VMM does not answer")),
    }
}
