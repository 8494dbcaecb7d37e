//! A VM's console: the leader knows on which host the VM is and asks that host's agent.
//!
//! A reader who waits while the VM moves is not left waiting at the old host: the wait goes on at the new one. Offsets
//! survive the move, so the reader notices nothing.

use std::time::Duration;

use drover_pki::host_dns;
use drover_proto::v1::agent_client::AgentClient;
use drover_proto::v1::{
    HostState, ReadConsoleRequest, ReadConsoleResponse, WriteConsoleRequest, WriteConsoleResponse,
};
use drover_proto::{Code, Fault};
use tokio::time::{Instant, timeout};
use tonic::Status;
use tonic::transport::Channel;

use super::on_leader::{Call, is_of_the_transport};
use super::wait_of;

/// How long an agent may take beside the time it was asked to wait.
pub(super) const AGENT_TIMEOUT: Duration = Duration::from_secs(4);
/// Bytes that one answer holds at most.
const READ_BYTES_MAX: u32 = 1 << 20;
/// Bytes that one write takes.
const WRITE_BYTES_MAX: usize = 64 << 10;

/// Where a VM's VMM is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    host: String,
    agent_addr: String,
    pub(super) epoch: u64,
}

pub(super) async fn read(call: &Call, request: ReadConsoleRequest) -> Result<ReadConsoleResponse, Fault> {
    let until = Instant::now() + wait_of(request.wait_ms);
    loop {
        let place = place_of(call, &request.vm)?;
        let wait = until.saturating_duration_since(Instant::now());
        let asked = ReadConsoleRequest {
            epoch: place.epoch,
            wait_ms: u32::try_from(wait.as_millis()).unwrap_or(u32::MAX),
            max_bytes: request.max_bytes.min(READ_BYTES_MAX),
            ..request.clone()
        };
        let mut agent = agent(call, &place)?;
        let answer = async {
            let answer = timeout(wait + AGENT_TIMEOUT, agent.read_console(asked)).await;
            answered(
                &place,
                answer.map(|answer| answer.map(tonic::Response::into_inner)),
            )
        };
        let fault = tokio::select! {
            answer = answer => match answer {
                Ok(answer) => return Ok(answer),
                Err(fault) => fault,
            },
            () = moved(call, &request.vm, &place) => continue,
        };
        call.still_leads()?;
        // An epoch comes with an entry of the log, so this ends.
        if place_of(call, &request.vm)? == place {
            return Err(fault);
        }
    }
}

pub(super) async fn write(call: &Call, request: WriteConsoleRequest) -> Result<WriteConsoleResponse, Fault> {
    if request.data.len() > WRITE_BYTES_MAX {
        let message = format!(
            "data has {} bytes; at most {WRITE_BYTES_MAX} at once",
            request.data.len()
        );
        return Err(Fault::new(Code::InvalidArgument, message).field("data"));
    }
    let place = place_of(call, &request.vm)?;
    let mut agent = agent(call, &place)?;
    let asked = WriteConsoleRequest {
        epoch: place.epoch,
        ..request
    };
    let answer = timeout(AGENT_TIMEOUT, agent.write_console(asked)).await;
    answered(
        &place,
        answer.map(|answer| answer.map(tonic::Response::into_inner)),
    )
}

pub(super) fn answered<T>(
    place: &Place,
    answer: Result<Result<T, Status>, tokio::time::error::Elapsed>,
) -> Result<T, Fault> {
    let unreachable = |why: &str| {
        let message = format!(
            "the agent of {} at {} did not answer: {why}",
            place.host, place.agent_addr
        );
        Fault::new(Code::HostUnreachable, message)
    };
    match answer {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(status)) if is_of_the_transport(&status) => Err(unreachable(status.message())),
        Ok(Err(status)) => Err(Fault::from(&status)),
        Err(_) => Err(unreachable("no answer in time")),
    }
}

pub(super) fn agent(call: &Call, place: &Place) -> Result<AgentClient<Channel>, Fault> {
    Ok(AgentClient::new(
        call.api.channels.to(&host_dns(&place.host), &place.agent_addr)?,
    ))
}

pub(super) fn place_of(call: &Call, vm: &str) -> Result<Place, Fault> {
    call.api.consensus.read(|state| {
        let shown: String = vm.chars().take(80).collect();
        let Some(known) = state.vm(vm) else {
            return Err(
                Fault::new(Code::VmNotFound, format!("vm is {shown:?}; no VM has this name")).field("vm"),
            );
        };
        let (name, epoch) = (drover_state::host_of(known), drover_state::epoch_of(known));
        let Some(host) = state.host(name) else {
            return Err(Fault::new(
                Code::VmState,
                format!("{vm} was never started; it has no console"),
            )
            .field("vm"));
        };
        if host.state() == HostState::Down {
            let message = format!("{vm} is on {name}, which is declared down");
            return Err(Fault::new(Code::HostUnreachable, message));
        }
        let agent_addr = host
            .spec
            .as_ref()
            .map(|spec| spec.agent_addr.clone())
            .unwrap_or_default();
        Ok(Place {
            host: name.to_owned(),
            agent_addr,
            epoch,
        })
    })
}

/// Returns when the VM is no longer where it was.
async fn moved(call: &Call, vm: &str, place: &Place) {
    let mut changed = call.api.consensus.changed();
    loop {
        changed.borrow_and_update();
        if place_of(call, vm).as_ref() != Ok(place) {
            return;
        }
        if changed.changed().await.is_err() {
            // The controller is ending; the agent's answer or its timeout decides.
            std::future::pending::<()>().await;
        }
    }
}
