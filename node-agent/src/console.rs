//! The Agent service: consoles, and the dry runs of migrations, for controllers only.

use std::sync::Arc;
use std::time::Duration;

use drover_pki::{Role, peer_identity};
use drover_proto::v1::agent_server::Agent;
use drover_proto::v1::{
    Forecast, ForecastRequest, ReadConsoleRequest, ReadConsoleResponse, WriteConsoleRequest,
    WriteConsoleResponse,
};
use drover_proto::{Code, Fault};
use tokio::time::timeout;
use tonic::{Request, Response, Status};

use crate::agent::Context;
use crate::vmm::{Link, VMM_CALL_MAX};

/// Longest that a reader may wait for a byte, ms.
const WAIT_MS_MAX: u32 = 30_000;
/// How long a VMM watches its guest for a dry run, and a little more.
const WATCHING: Duration = Duration::from_millis(1_500);

/// See the module.
pub struct Console {
    context: Arc<Context>,
}

impl Console {
    /// The consoles of the agent behind `context`.
    pub fn new(context: Arc<Context>) -> Self {
        Self { context }
    }

    fn only_controllers<T>(&self, request: &Request<T>) -> Result<(), Status> {
        let caller = peer_identity(request, &self.context.config.cluster_id)?;
        if caller.role == Role::Controller {
            return Ok(());
        }
        Err(Fault::new(
            Code::Denied,
            format!("the caller is {caller}; want a controller of this cluster"),
        )
        .into())
    }

    /// The VMM of `vm` for `epoch`, or the newest of the VM when `epoch` is 0.
    fn find(&self, vm: &str, epoch: u64) -> Result<Arc<Link>, Fault> {
        let links = self.context.links.lock().expect("nobody panics with the links");
        let host = &self.context.config.name;
        let of_vm = || links.values().filter(|link| link.key.vm == vm);
        // Of one epoch there can be an aborted target besides the VMM that runs, and in an upgrade the next one waits beside it.
        let newest = |link: &&Arc<Link>| (*link.had_right.borrow(), link.key.epoch);
        let wanted = of_vm()
            .filter(|link| epoch == 0 || link.key.epoch == epoch)
            .max_by_key(newest);
        match wanted {
            Some(link) => Ok(link.clone()),
            None if of_vm().next().is_some() => Err(Fault::new(
                Code::StaleEpoch,
                format!("{host} has no VMM of {vm} for epoch {epoch}"),
            )
            .field("epoch")),
            // Whether there is such a VM is for the controllers to say, who asked.
            None => Err(Fault::new(
                Code::VmState,
                format!(
                    "vm is {vm:?}, which has no VMM on {host}: it has not started there yet, or has ended"
                ),
            )
            .field("vm")),
        }
    }
}

async fn answered<T>(
    link: &Link,
    bound: Duration,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<Response<T>, Status> {
    let unreachable = |why: &str| {
        Status::from(Fault::new(
            Code::HostUnreachable,
            format!("the VMM {} does not answer: {why}", link.key),
        ))
    };
    match timeout(bound, call).await {
        Ok(Err(status)) if status.code() == tonic::Code::Unavailable => Err(unreachable(status.message())),
        Ok(answer) => answer,
        Err(_) => Err(unreachable(&format!("nothing for {} ms", bound.as_millis()))),
    }
}

#[tonic::async_trait]
impl Agent for Console {
    async fn read_console(
        &self,
        request: Request<ReadConsoleRequest>,
    ) -> Result<Response<ReadConsoleResponse>, Status> {
        self.only_controllers(&request)?;
        let mut request = request.into_inner();
        request.wait_ms = request.wait_ms.min(WAIT_MS_MAX);
        let link = self.find(&request.vm, request.epoch)?;
        let bound = Duration::from_millis(request.wait_ms.into()) + VMM_CALL_MAX;
        answered(&link, bound, link.client.clone().read_console(request)).await
    }

    async fn write_console(
        &self,
        request: Request<WriteConsoleRequest>,
    ) -> Result<Response<WriteConsoleResponse>, Status> {
        self.only_controllers(&request)?;
        let request = request.into_inner();
        let link = self.find(&request.vm, request.epoch)?;
        answered(&link, VMM_CALL_MAX, link.client.clone().write_console(request)).await
    }

    async fn forecast(&self, request: Request<ForecastRequest>) -> Result<Response<Forecast>, Status> {
        self.only_controllers(&request)?;
        let request = request.into_inner();
        let link = self.find(&request.vm, request.epoch)?;
        let bound = WATCHING + VMM_CALL_MAX;
        answered(&link, bound, link.client.clone().forecast(request)).await
    }
}
