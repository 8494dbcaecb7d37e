//! The one function that changes the state.
//!
//! Every command is checked in full before it changes anything: a refusal leaves the state as it was, but for the
//! record of the answer when the request carried an id. Handlers stand by subject: `hosts`, `vms`, `devices`, `memory`, `volumes`,
//! `networks`, `snapshots`, `migrations`.

mod devices;
mod hosts;
mod memory;
mod migrations;
mod networks;
mod snapshots;
mod vms;
mod volumes;

pub(crate) use snapshots::not_taken;
pub use vms::may_restart;
pub(crate) use vms::unfit;

use drover_proto::v1::command::Kind;
use drover_proto::v1::{Command, CommandResponse, Event, Reason, RequestRecord};
use drover_proto::{Code, Fault};
use prost::Message;

use crate::cloud::without_secrets;
use crate::desired::digest;
use crate::limits::{EVENTS_MAX, REASON_BYTES_MAX, REQUEST_ID_BYTES_MAX, REQUESTS_MAX};
use crate::state::State;
use crate::validate;

/// What an applied command means outside the state. A replica may ignore all of it.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// An event was appended: for the log, or for whoever counts.
    Event(Event),
    /// A migration ended: what was kept about it in memory can go.
    MigrationEnded(String),
}

/// Applies one entry of the log. Never fails: a refusal is an answer (see [`into_result`]).
pub fn apply(state: &mut State, command: &Command) -> (CommandResponse, Vec<Effect>) {
    let mut tx = Tx {
        state,
        now_ms: command.now_ms,
        caller: &command.caller,
        effects: Vec::new(),
    };
    let response = match known_answer(tx.state, command) {
        Some(answer) => answer,
        None => {
            let response = tx
                .kind(command.kind.as_ref())
                .unwrap_or_else(|fault| refusal(&fault));
            remember(tx.state, command, &response);
            response
        }
    };
    (response, tx.effects)
}

/// The refusal as it stands in a response.
pub fn refusal(fault: &Fault) -> CommandResponse {
    CommandResponse {
        error: Some(fault.clone().into()),
        field: fault.field.clone(),
        ..CommandResponse::default()
    }
}

/// A response that is a refusal as its fault.
///
/// # Errors
/// The refusal.
pub fn into_result(response: CommandResponse) -> Result<CommandResponse, Fault> {
    match &response.error {
        None => Ok(response),
        Some(Reason { code, message }) => {
            let code = Code::parse(code).unwrap_or(Code::Internal);
            Err(Fault::new(code, message.clone()).field(response.field))
        }
    }
}

/// The answer to a request whose id is known, or that is refused because of its id.
fn known_answer(state: &State, command: &Command) -> Option<CommandResponse> {
    let id = command.request_id.as_str();
    if id.len() > REQUEST_ID_BYTES_MAX {
        let message = format!(
            "request_id has {} bytes; at most {REQUEST_ID_BYTES_MAX} are possible",
            id.len()
        );
        return Some(refusal(
            &Fault::new(Code::InvalidArgument, message).field("request_id"),
        ));
    }
    let record = state.requests.by_id.get(id)?;
    if record.digest == digest_of(command) {
        return record.response.clone();
    }
    let message = format!(
        "request_id {} was used for another request; use a new id for a new request",
        validate::quoted(id)
    );
    Some(refusal(
        &Fault::new(Code::RequestIdReused, message).field("request_id"),
    ))
}

/// Who asked for what, without when and under which id, and without what the leader adds: how far a migration that is
/// cancelled has come, what a dry run expected of one, and where the VM is that is upgraded.
fn digest_of(command: &Command) -> u64 {
    let mut body = Command {
        caller: command.caller.clone(),
        kind: command.kind.clone(),
        ..Command::default()
    };
    if let Some(Kind::AbortMigration(abort)) = body.kind.as_mut() {
        abort.phase = 0;
    }
    if let Some(Kind::PlanMigration(plan)) = body.kind.as_mut() {
        plan.forecast = None;
        if plan.upgrade {
            plan.to.clear();
        }
    }
    digest(&body.encode_to_vec())
}

fn remember(state: &mut State, command: &Command, response: &CommandResponse) {
    if command.request_id.is_empty() {
        return;
    }
    let record = RequestRecord {
        request_id: command.request_id.clone(),
        response: Some(response.clone()),
        digest: digest_of(command),
    };
    state.requests.order.push_back(record.request_id.clone());
    state.requests.by_id.insert(record.request_id.clone(), record);
    while state.requests.order.len() > REQUESTS_MAX {
        if let Some(oldest) = state.requests.order.pop_front() {
            state.requests.by_id.remove(&oldest);
        }
    }
}

/// One command being applied.
struct Tx<'a> {
    state: &'a mut State,
    now_ms: u64,
    caller: &'a str,
    effects: Vec<Effect>,
}

type Applied = Result<CommandResponse, Fault>;

impl Tx<'_> {
    fn kind(&mut self, kind: Option<&Kind>) -> Applied {
        match kind {
            Some(Kind::InitCluster(init)) => self.init_cluster(init),
            Some(Kind::RegisterHost(spec)) => self.register_host(spec),
            Some(Kind::HostDown(down)) => self.host_down(down),
            Some(Kind::HostUp(up)) => self.host_up(up),
            Some(Kind::CreateVm(create)) => self.create_vm(create),
            Some(Kind::StartVm(start)) => self.start_vm(&start.name),
            Some(Kind::StopVm(stop)) => self.stop_vm(&stop.name),
            Some(Kind::DeleteVm(delete)) => self.delete_vm(&delete.name),
            Some(Kind::PlaceVm(place)) => self.place_vm(place),
            Some(Kind::VmPending(pending)) => self.vm_pending(pending),
            Some(Kind::ReportVm(report)) => self.report_vm(report),
            Some(Kind::PlanMigration(plan)) => self.plan_migration(plan),
            Some(Kind::AdvanceMigration(advance)) => self.advance_migration(advance),
            Some(Kind::CommitHandover(commit)) => self.commit_handover(commit),
            Some(Kind::AbortMigration(abort)) => self.abort_migration(abort),
            Some(Kind::FinishMigration(finish)) => self.finish_migration(finish),
            Some(Kind::WantPostCopy(want)) => self.want_post_copy(want),
            Some(Kind::CreateVolume(create)) => self.create_volume(create),
            Some(Kind::DeleteVolume(delete)) => self.delete_volume(delete),
            Some(Kind::CreateNetwork(create)) => self.create_network(create),
            Some(Kind::DeleteNetwork(delete)) => self.delete_network(&delete.name),
            Some(Kind::ResizeVolume(resize)) => self.resize_volume(resize),
            Some(Kind::AttachDisk(attach)) => self.attach_disk(attach),
            Some(Kind::DetachDisk(detach)) => self.detach_disk(detach),
            Some(Kind::AttachNic(attach)) => self.attach_nic(attach),
            Some(Kind::DetachNic(detach)) => self.detach_nic(detach),
            Some(Kind::ShutdownVm(shutdown)) => self.shutdown_vm(&shutdown.name),
            Some(Kind::SetVmMemory(set)) => self.set_vm_memory(set),
            Some(Kind::CreateSnapshot(create)) => self.create_snapshot(create),
            Some(Kind::DeleteSnapshot(delete)) => self.delete_snapshot(delete),
            Some(Kind::RestoreVm(restore)) => self.restore_vm(restore),
            Some(Kind::ReportSnapshot(report)) => self.report_snapshot(report),
            Some(Kind::BeginRestore(begin)) => self.begin_restore(begin),
            Some(Kind::ReportVolume(report)) => self.report_volume(report),
            // An entry of a newer build: every build of this version refuses it alike.
            None => Err(Fault::new(
                Code::Internal,
                "the entry holds no command that this build knows",
            )),
        }
    }

    fn event(&mut self, kind: &str, subject: String, message: String) {
        let event = Event {
            seq: self.state.next_event,
            time_ms: self.now_ms,
            kind: kind.to_owned(),
            subject,
            message,
        };
        self.state.next_event += 1;
        self.state.events.push_back(event.clone());
        while self.state.events.len() > EVENTS_MAX {
            self.state.events.pop_front();
        }
        self.effects.push(Effect::Event(event));
    }

    fn vm_event(&mut self, kind: &str, vm: &str, message: String) {
        self.event(kind, format!("vm/{vm}"), message);
    }

    /// The answer that shows the VM as it now stands.
    fn vm_response(&self, name: &str, current: bool) -> CommandResponse {
        CommandResponse {
            vm: self.state.vm(name).map(without_secrets),
            current,
            ..CommandResponse::default()
        }
    }
}

/// A reason from outside, brought below its bound.
fn bounded(reason: &Reason) -> Reason {
    let mut reason = reason.clone();
    let mut end = reason.message.len().min(REASON_BYTES_MAX);
    while !reason.message.is_char_boundary(end) {
        end -= 1;
    }
    reason.message.truncate(end);
    if Code::parse(&reason.code).is_none() {
        Code::Internal.as_str().clone_into(&mut reason.code);
    }
    reason
}

/// A reason made here.
fn reason(code: Code, message: impl Into<String>) -> Reason {
    Fault::new(code, message).into()
}
