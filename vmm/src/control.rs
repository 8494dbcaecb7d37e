//! The control socket: the service `Vmm` for this VMM's agent.
//!
//! gRPC over a Unix socket; the kernel says who connects, and only the user who started this process and root are served. Calls that change
//! something run off the socket's one thread, since stopping vCPUs, or a test's pause point, may take a while; long polls wait
//! there without one.

use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use drover_proto::v1::vmm_server::{Vmm, VmmServer};
use drover_proto::v1::{
    AttachDiskRequest, AttachNicRequest, CancelSnapshotRequest, DestroyRequest, DetachDiskRequest,
    DetachNicRequest, Forecast, ForecastRequest, GrantRequest, OutcomeRequest, PowerButtonRequest,
    ReadConsoleRequest, ReadConsoleResponse, ResizeDiskRequest, SetMemoryRequest, StartOutgoingRequest,
    SwitchToPostCopyRequest, TakeSnapshotRequest, VmmInfo, WatchInfoRequest, WriteConsoleRequest,
    WriteConsoleResponse,
};
use drover_proto::{Code, Fault};
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::Runtime;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status};
use tracing::{info, warn};

use crate::forecast;
use crate::machine::Machine;

/// Longest long poll.
const WAIT_MAX: Duration = Duration::from_secs(30);
/// Most console bytes in an answer, and what is given where none are asked for.
const CONSOLE_READ_MAX: u32 = 65536;
/// How long answers under way may take once the VM is destroyed.
const LINGER: Duration = Duration::from_secs(2);
/// How long a thread for calls that may block is kept for the next one.
const BLOCKING_THREAD_KEPT: Duration = Duration::from_secs(3600);
/// Longest path that a socket address holds (sockaddr_un's 108 bytes with the closing zero).
const SOCKET_PATH_MAX: usize = 107;

struct Service(Arc<Machine>);

fn wait_of(ms: u32) -> Duration {
    Duration::from_millis(u64::from(ms)).min(WAIT_MAX)
}

impl Service {
    /// Runs `call` where blocking is allowed.
    async fn blocking<T: Send + 'static>(
        &self,
        call: impl FnOnce(&Arc<Machine>) -> Result<T, Fault> + Send + 'static,
    ) -> Result<Response<T>, Status> {
        let machine = self.0.clone();
        match tokio::task::spawn_blocking(move || call(&machine)).await {
            Ok(result) => result.map(Response::new).map_err(Status::from),
            Err(error) => Err(Fault::new(Code::Internal, format!("the call broke off: {error}")).into()),
        }
    }

    /// Calls that name a VM and an epoch must mean this one; both may be left out.
    fn check_names(&self, vm: &str, epoch: u64) -> Result<(), Fault> {
        let config = self.0.config();
        if !vm.is_empty() && vm != config.vm {
            let message = format!("this VMM is {:?}'s, the call means {vm:?}", config.vm);
            return Err(Fault::new(Code::VmNotFound, message).field("vm"));
        }
        if epoch != 0 && epoch != config.epoch {
            let message = format!("this VMM is of epoch {}, the call means {epoch}", config.epoch);
            return Err(Fault::new(Code::StaleEpoch, message).field("epoch"));
        }
        Ok(())
    }
}

#[tonic::async_trait]
impl Vmm for Service {
    async fn watch_info(&self, request: Request<WatchInfoRequest>) -> Result<Response<VmmInfo>, Status> {
        let WatchInfoRequest { seen_seq, wait_ms } = request.into_inner();
        let mut changes = self.0.subscribe();
        let mut over = self.0.over();
        let wait = async {
            tokio::select! {
                _ = changes.wait_for(|info| info.seq != seen_seq) => {}
                _ = over.wait_for(|over| *over) => {}
            }
        };
        // Both ends of the wait are answered alike: with what is so now.
        let _ = tokio::time::timeout(wait_of(wait_ms), wait).await.is_ok();
        Ok(Response::new(self.0.info()))
    }

    async fn grant(&self, request: Request<GrantRequest>) -> Result<Response<VmmInfo>, Status> {
        let request = request.into_inner();
        self.blocking(move |machine| machine.grant(&request)).await
    }

    async fn start_outgoing(
        &self,
        request: Request<StartOutgoingRequest>,
    ) -> Result<Response<VmmInfo>, Status> {
        let request = request.into_inner();
        self.blocking(move |machine| machine.start_outgoing(request))
            .await
    }

    async fn outcome(&self, request: Request<OutcomeRequest>) -> Result<Response<VmmInfo>, Status> {
        let request = request.into_inner();
        self.blocking(move |machine| machine.outcome(&request)).await
    }

    async fn switch_to_post_copy(
        &self,
        request: Request<SwitchToPostCopyRequest>,
    ) -> Result<Response<VmmInfo>, Status> {
        let request = request.into_inner();
        self.blocking(move |machine| machine.switch_to_post_copy(&request.migration))
            .await
    }

    async fn destroy(&self, request: Request<DestroyRequest>) -> Result<Response<VmmInfo>, Status> {
        let request = request.into_inner();
        self.blocking(move |machine| Ok(machine.destroy(request.reason.as_ref())))
            .await
    }

    async fn read_console(
        &self,
        request: Request<ReadConsoleRequest>,
    ) -> Result<Response<ReadConsoleResponse>, Status> {
        let request = request.into_inner();
        self.check_names(&request.vm, request.epoch)?;
        let console = self.0.console();
        let (mut written, mut over) = (console.subscribe(), self.0.over());
        let wait = async {
            tokio::select! {
                _ = written.wait_for(|next| *next > request.offset) => {}
                _ = over.wait_for(|over| *over) => {}
            }
        };
        let _ = tokio::time::timeout(wait_of(request.wait_ms), wait).await.is_ok();
        let max = if request.max_bytes == 0 {
            CONSOLE_READ_MAX
        } else {
            request.max_bytes
        };
        let piece = console.read(request.offset, max.min(CONSOLE_READ_MAX) as usize);
        Ok(Response::new(ReadConsoleResponse {
            data: piece.data,
            offset: piece.offset,
            next_offset: piece.next,
            epoch: self.0.config().epoch,
        }))
    }

    async fn write_console(
        &self,
        request: Request<WriteConsoleRequest>,
    ) -> Result<Response<WriteConsoleResponse>, Status> {
        let request = request.into_inner();
        self.check_names(&request.vm, request.epoch)?;
        self.blocking(move |machine| {
            let accepted = machine.type_in(&request.data);
            let accepted = u32::try_from(accepted).expect("no more than the input queue holds");
            Ok(WriteConsoleResponse { accepted })
        })
        .await
    }

    async fn attach_disk(&self, request: Request<AttachDiskRequest>) -> Result<Response<VmmInfo>, Status> {
        let request = request.into_inner();
        self.blocking(move |machine| machine.attach_disk(&request)).await
    }

    async fn detach_disk(&self, request: Request<DetachDiskRequest>) -> Result<Response<VmmInfo>, Status> {
        let request = request.into_inner();
        self.blocking(move |machine| machine.detach_disk(&request)).await
    }

    async fn resize_disk(&self, request: Request<ResizeDiskRequest>) -> Result<Response<VmmInfo>, Status> {
        let request = request.into_inner();
        self.blocking(move |machine| machine.resize_disk(&request)).await
    }

    async fn attach_nic(&self, request: Request<AttachNicRequest>) -> Result<Response<VmmInfo>, Status> {
        let request = request.into_inner();
        self.blocking(move |machine| machine.attach_nic(&request)).await
    }

    async fn detach_nic(&self, request: Request<DetachNicRequest>) -> Result<Response<VmmInfo>, Status> {
        let request = request.into_inner();
        self.blocking(move |machine| machine.detach_nic(&request)).await
    }

    async fn power_button(&self, request: Request<PowerButtonRequest>) -> Result<Response<VmmInfo>, Status> {
        let request = request.into_inner();
        self.blocking(move |machine| machine.power_button(&request)).await
    }

    async fn take_snapshot(
        &self,
        request: Request<TakeSnapshotRequest>,
    ) -> Result<Response<VmmInfo>, Status> {
        let request = request.into_inner();
        self.blocking(move |machine| machine.take_snapshot(&request))
            .await
    }

    async fn cancel_snapshot(
        &self,
        request: Request<CancelSnapshotRequest>,
    ) -> Result<Response<VmmInfo>, Status> {
        let request = request.into_inner();
        self.blocking(move |machine| Ok(machine.cancel_snapshot(&request.id)))
            .await
    }

    async fn set_memory(&self, request: Request<SetMemoryRequest>) -> Result<Response<VmmInfo>, Status> {
        let request = request.into_inner();
        self.blocking(move |machine| machine.set_memory(&request)).await
    }

    async fn forecast(&self, request: Request<ForecastRequest>) -> Result<Response<Forecast>, Status> {
        let request = request.into_inner();
        self.check_names(&request.vm, request.epoch)?;
        self.blocking(move |machine| forecast::make(machine, &request))
            .await
    }
}

fn socket_fault(path: &Path, error: impl std::fmt::Display) -> Fault {
    Fault::new(
        Code::VmmStartFailed,
        format!("control socket {}: {error}", path.display()),
    )
    .field("socket")
}

/// Binds the socket, in place of one that an earlier process left.
///
/// A path too long for a socket address is reached through its folder's descriptor.
///
/// # Errors
/// `vmm_start_failed`
pub fn bind(path: &Path) -> Result<net::UnixListener, Fault> {
    let name = path
        .file_name()
        .ok_or_else(|| socket_fault(path, "has no file name"))?;
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let dir = std::fs::File::open(folder).map_err(|error| socket_fault(path, error))?;
    let mode = dir
        .metadata()
        .map_err(|error| socket_fault(path, error))?
        .permissions()
        .mode();
    if mode & 0o077 != 0 {
        warn!(folder = %folder.display(), mode = format!("{:o}", mode & 0o777), "the control socket's folder should be of mode 700");
    }
    let _ = std::fs::remove_file(path);
    if path.as_os_str().len() <= SOCKET_PATH_MAX {
        return net::UnixListener::bind(path).map_err(|error| socket_fault(path, error));
    }
    let through = Path::new("/proc/self/fd")
        .join(dir.as_raw_fd().to_string())
        .join(name);
    net::UnixListener::bind(through).map_err(|error| socket_fault(path, error))
}

/// Whether the peer is of the user `own` or root.
fn served(stream: &UnixStream, own: u32) -> bool {
    match stream.peer_cred() {
        Ok(peer) if peer.uid() == own || peer.uid() == 0 => true,
        Ok(peer) => {
            warn!(
                uid = peer.uid(),
                "another user was turned away from the control socket"
            );
            false
        }
        Err(error) => {
            warn!(%error, "a peer without credentials was turned away from the control socket");
            false
        }
    }
}

/// The control socket, bound and not served yet, with what serves it: both are made before the process steps into its sandbox.
pub struct Server {
    path: PathBuf,
    socket: net::UnixListener,
    runtime: Runtime,
    /// Who is served, beside root: the user who started this process, which may be another's by now.
    own: u32,
}

impl Server {
    /// Binds `path`. Callers wait until it is served.
    ///
    /// # Errors
    /// `vmm_start_failed`
    pub fn bind(path: &Path) -> Result<Self, Fault> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .thread_keep_alive(BLOCKING_THREAD_KEPT)
            .build()
            .map_err(|error| socket_fault(path, error))?;
        Ok(Self {
            path: path.to_owned(),
            socket: bind(path)?,
            runtime,
            own: nix::unistd::geteuid().as_raw(),
        })
    }

    /// Serves it on the calling thread until the VM is destroyed.
    ///
    /// # Errors
    /// `vmm_start_failed`
    pub fn serve(self, machine: &Arc<Machine>) -> Result<(), Fault> {
        let Self {
            path,
            socket,
            runtime,
            own,
        } = self;
        // The first grant of a VM that was received comes in its blackout: no thread is to be made then.
        drop(runtime.spawn_blocking(|| {}));
        runtime.block_on(async {
            let listener = socket
                .set_nonblocking(true)
                .and_then(|()| UnixListener::from_std(socket))
                .map_err(|error| socket_fault(&path, error))?;
            info!(socket = %path.display(), "serving");
            let incoming = UnixListenerStream::new(listener)
                .filter(move |accepted| accepted.as_ref().map_or(true, |peer| served(peer, own)));
            let service = VmmServer::new(Service(machine.clone()));
            let (mut over, mut over_too) = (machine.over(), machine.over());
            let ended = async move {
                let _ = over.wait_for(|over| *over).await;
            };
            let lingered = async move {
                let _ = over_too.wait_for(|over| *over).await;
                tokio::time::sleep(LINGER).await;
            };
            let server = tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming_shutdown(incoming, ended);
            tokio::select! {
                served = server => served.map_err(|error| socket_fault(&path, error)),
                () = lingered => Ok(()),
            }
        })
    }
}
