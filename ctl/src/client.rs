//! The cluster as seen from here: any controller will do, and a call goes on to the next one when one does not answer.
//!
//! ```text
//!             ┌─ answer ──────────────→ done            the controller is asked first next time
//! attempt at ─┼─ refusal with a code ─→ the user
//! controller  ├─ no_leader ───────────→ next one, again and again, for NO_LEADER_FOR
//!             └─ no answer ───────────→ next one; nobody at all answers for GONE_FOR: unreachable
//! ```
//!
//! A mutating request keeps its `request_id` over all attempts, so that an attempt whose answer got lost counts once.
//! Console input has no such id: an attempt whose outcome is unknown is not repeated.

mod snapshots;

use std::error::Error;
use std::fs::File;
use std::io::Read;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use drover_pki::{Credentials, controller_dns, tls_fault};
use drover_proto::codes::CODE_KEY;
use drover_proto::v1::controller_client::ControllerClient;
use drover_proto::{Code, Fault, v1};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code as Grpc, Response, Status};

use crate::context::Context;
use crate::failure::{Exit, Failure, Result};

/// A controller that does not accept a connection by then counts as not answering.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// A controller that does not answer a call by then counts as not answering; long polls get this on top.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a guest is watched for a dry run, and a little more.
const FORECAST_FOR: Duration = Duration::from_secs(2);
/// How long a cluster that answers may be without a leader: several elections.
const NO_LEADER_FOR: Duration = Duration::from_secs(20);
/// How long nobody at all may answer.
const GONE_FOR: Duration = Duration::from_secs(3);
/// Between two rounds over the controllers.
const ROUND_PAUSE: Duration = Duration::from_millis(150);
/// The largest answer taken: lists of some ten thousand VMs.
const ANSWER_BYTES_MAX: usize = 32 << 20;
/// Deepest chain of error sources that is searched.
const SOURCES_MAX: usize = 16;

/// How long a call is tried.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// While controllers answer that nobody leads.
    pub no_leader: Duration,
    /// While nobody answers.
    pub gone: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            no_leader: NO_LEADER_FOR,
            gone: GONE_FOR,
        }
    }
}

impl Patience {
    /// Every controller is tried once.
    pub const ONE_ROUND: Self = Self {
        no_leader: Duration::ZERO,
        gone: Duration::ZERO,
    };
}

/// One controller.
struct Peer {
    addr: String,
    grpc: ControllerClient<Channel>,
}

/// How an attempt at one controller failed.
#[derive(Debug, PartialEq, Eq)]
enum Miss {
    /// It answered, and another controller would say the same.
    Refused(Fault),
    /// It answered that nobody leads.
    NoLeader(Fault),
    /// It was not reached: nothing was done.
    NotReached(String),
    /// No answer: what was asked may have been done.
    Unanswered(String),
}

/// A client of the cluster.
pub struct Client {
    peers: Vec<Peer>,
    preferred: AtomicUsize,
}

impl Client {
    /// A client for `context`. Connects when first used.
    pub fn new(context: &Context) -> Result<Self> {
        let credentials = Credentials::load(&context.tls, &context.cluster_id).map_err(Fault::from)?;
        let tls = credentials.tonic_client(&controller_dns(None));
        let peers = context
            .controllers
            .iter()
            .map(|addr| {
                let wrong = |error: tonic::transport::Error| {
                    let cause = root_cause(&error);
                    Failure::new(
                        Exit::Usage,
                        "context",
                        format!("controller address \"{addr}\": {cause}"),
                    )
                };
                let endpoint = Endpoint::from_shared(format!("https://{addr}"))
                    .and_then(|endpoint| endpoint.tls_config(tls.clone()))
                    .map_err(wrong)?
                    .connect_timeout(CONNECT_TIMEOUT)
                    .tcp_nodelay(true);
                let grpc = ControllerClient::new(endpoint.connect_lazy())
                    .max_decoding_message_size(ANSWER_BYTES_MAX);
                Ok(Peer {
                    addr: addr.clone(),
                    grpc,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            peers,
            preferred: AtomicUsize::new(0),
        })
    }

    /// Asks the controllers in turn until one has an answer.
    async fn call<T>(
        &self,
        patience: Patience,
        timeout: Duration,
        ask: impl AsyncFn(ControllerClient<Channel>) -> std::result::Result<Response<T>, Status>,
    ) -> Result<T> {
        let begun = Instant::now();
        loop {
            let mut no_leader = None;
            let mut misses = Vec::new();
            for turn in 0..self.peers.len() {
                match self.attempt(turn, timeout, &ask).await {
                    Ok(answer) => return Ok(answer),
                    Err((_, Miss::Refused(fault))) => return Err(fault.into()),
                    Err((_, Miss::NoLeader(fault))) => no_leader = Some(fault),
                    Err((addr, Miss::NotReached(why) | Miss::Unanswered(why))) => {
                        misses.push(format!("{addr}: {why}"));
                    }
                }
            }
            match no_leader {
                Some(fault) if begun.elapsed() >= patience.no_leader => return Err(fault.into()),
                None if begun.elapsed() >= patience.gone => return Err(unreachable(&misses)),
                _ => tokio::time::sleep(ROUND_PAUSE).await,
            }
        }
    }

    /// One attempt, at the controller `turn` places after the preferred one.
    async fn attempt<T>(
        &self,
        turn: usize,
        timeout: Duration,
        ask: &impl AsyncFn(ControllerClient<Channel>) -> std::result::Result<Response<T>, Status>,
    ) -> std::result::Result<T, (&str, Miss)> {
        let index = (self.preferred.load(Ordering::Relaxed) + turn) % self.peers.len();
        let peer = &self.peers[index];
        match tokio::time::timeout(timeout, ask(peer.grpc.clone())).await {
            Ok(Ok(answer)) => {
                self.preferred.store(index, Ordering::Relaxed);
                Ok(answer.into_inner())
            }
            Ok(Err(status)) => Err((&peer.addr, classify(&peer.addr, &status))),
            Err(_) => Err((
                &peer.addr,
                Miss::Unanswered(format!("no answer within {} s", timeout.as_secs())),
            )),
        }
    }

    /// The controllers and who leads.
    pub async fn cluster(&self, allow_stale: bool, patience: Patience) -> Result<v1::Cluster> {
        let request = v1::GetClusterRequest { allow_stale };
        self.call(patience, CALL_TIMEOUT, async |mut grpc| {
            grpc.get_cluster(request).await
        })
        .await
    }

    /// The hosts.
    pub async fn hosts(&self, patience: Patience) -> Result<Vec<v1::Host>> {
        let request = v1::ListHostsRequest { allow_stale: false };
        let answer = self
            .call(patience, CALL_TIMEOUT, async |mut grpc| {
                grpc.list_hosts(request).await
            })
            .await?;
        Ok(answer.hosts)
    }

    /// One host.
    pub async fn host(&self, name: &str) -> Result<v1::Host> {
        let request = v1::GetHostRequest {
            name: name.to_owned(),
            allow_stale: false,
        };
        self.plain(async |mut grpc| grpc.get_host(request.clone()).await)
            .await
    }

    /// The VMs.
    pub async fn vms(&self, patience: Patience) -> Result<Vec<v1::Vm>> {
        let request = v1::ListVmsRequest { allow_stale: false };
        let answer = self
            .call(patience, CALL_TIMEOUT, async |mut grpc| {
                grpc.list_vms(request).await
            })
            .await?;
        Ok(answer.vms)
    }

    /// One VM.
    pub async fn vm(&self, name: &str) -> Result<v1::Vm> {
        self.vm_shown(name, false).await
    }

    /// One VM, with its user data for cloud-init if that is asked for.
    pub async fn vm_shown(&self, name: &str, with_user_data: bool) -> Result<v1::Vm> {
        let request = v1::GetVmRequest {
            name: name.to_owned(),
            allow_stale: false,
            with_user_data,
        };
        self.plain(async |mut grpc| grpc.get_vm(request.clone()).await)
            .await
    }

    /// Creates a VM.
    pub async fn create_vm(&self, spec: v1::VmSpec, start: bool) -> Result<v1::Vm> {
        let request = v1::CreateVmRequest {
            request_id: request_id()?,
            spec: Some(spec),
            start,
        };
        self.plain(async |mut grpc| grpc.create_vm(request.clone()).await)
            .await
    }

    /// Wants a VM running.
    pub async fn start_vm(&self, name: &str) -> Result<v1::Vm> {
        let request = v1::StartVmRequest {
            request_id: request_id()?,
            name: name.to_owned(),
        };
        self.plain(async |mut grpc| grpc.start_vm(request.clone()).await)
            .await
    }

    /// Wants a VM stopped.
    pub async fn stop_vm(&self, name: &str) -> Result<v1::Vm> {
        let request = v1::StopVmRequest {
            request_id: request_id()?,
            name: name.to_owned(),
        };
        self.plain(async |mut grpc| grpc.stop_vm(request.clone()).await)
            .await
    }

    /// Wants a VM gone.
    pub async fn delete_vm(&self, name: &str) -> Result<v1::Vm> {
        let request = v1::DeleteVmRequest {
            request_id: request_id()?,
            name: name.to_owned(),
        };
        self.plain(async |mut grpc| grpc.delete_vm(request.clone()).await)
            .await
    }

    /// Asks a VM's guest to shut down.
    pub async fn shutdown_vm(&self, name: &str) -> Result<v1::Vm> {
        let request = v1::ShutdownVmRequest {
            request_id: request_id()?,
            name: name.to_owned(),
        };
        self.plain(async |mut grpc| grpc.shutdown_vm(request.clone()).await)
            .await
    }

    /// Changes how much of its memory a VM's guest is to have.
    pub async fn set_vm_memory(&self, vm: &str, memory_mib: u64) -> Result<v1::Vm> {
        let request = v1::SetVmMemoryRequest {
            request_id: request_id()?,
            vm: vm.to_owned(),
            memory_mib,
        };
        self.plain(async |mut grpc| grpc.set_vm_memory(request.clone()).await)
            .await
    }

    /// Gives a VM a disk.
    pub async fn attach_disk(&self, vm: &str, disk: v1::VmDisk) -> Result<v1::Vm> {
        let request = v1::AttachDiskToVmRequest {
            request_id: request_id()?,
            vm: vm.to_owned(),
            disk: Some(disk),
        };
        self.plain(async |mut grpc| grpc.attach_disk(request.clone()).await)
            .await
    }

    /// Wants a VM without a disk.
    pub async fn detach_disk(&self, vm: &str, volume: &str) -> Result<v1::Vm> {
        let request = v1::DetachDiskFromVmRequest {
            request_id: request_id()?,
            vm: vm.to_owned(),
            volume: volume.to_owned(),
        };
        self.plain(async |mut grpc| grpc.detach_disk(request.clone()).await)
            .await
    }

    /// Gives a VM a NIC.
    pub async fn attach_nic(&self, vm: &str, nic: v1::VmNic) -> Result<v1::Vm> {
        let request = v1::AttachNicToVmRequest {
            request_id: request_id()?,
            vm: vm.to_owned(),
            nic: Some(nic),
        };
        self.plain(async |mut grpc| grpc.attach_nic(request.clone()).await)
            .await
    }

    /// Wants a VM without a NIC.
    pub async fn detach_nic(&self, vm: &str, nic: &str) -> Result<v1::Vm> {
        let request = v1::DetachNicFromVmRequest {
            request_id: request_id()?,
            vm: vm.to_owned(),
            nic: nic.to_owned(),
        };
        self.plain(async |mut grpc| grpc.detach_nic(request.clone()).await)
            .await
    }

    /// Grows a volume.
    pub async fn resize_volume(&self, name: &str, size_bytes: u64) -> Result<v1::Volume> {
        let request = v1::ResizeVolumeRequest {
            request_id: request_id()?,
            name: name.to_owned(),
            size_bytes,
        };
        self.plain(async |mut grpc| grpc.resize_volume(request.clone()).await)
            .await
    }

    /// Creates a volume.
    pub async fn create_volume(&self, volume: v1::Volume) -> Result<v1::Volume> {
        let request = v1::CreateVolumeRequest {
            request_id: request_id()?,
            volume: Some(volume),
        };
        self.plain(async |mut grpc| grpc.create_volume(request.clone()).await)
            .await
    }

    /// All volumes, by name.
    pub async fn volumes(&self) -> Result<Vec<v1::Volume>> {
        let request = v1::ListVolumesRequest { allow_stale: false };
        Ok(self
            .plain(async |mut grpc| grpc.list_volumes(request).await)
            .await?
            .volumes)
    }

    /// Creates a network.
    pub async fn create_network(&self, network: v1::Network) -> Result<v1::Network> {
        let request = v1::CreateNetworkRequest {
            request_id: request_id()?,
            network: Some(network),
        };
        self.plain(async |mut grpc| grpc.create_network(request.clone()).await)
            .await
    }

    /// All networks, by name.
    pub async fn networks(&self) -> Result<Vec<v1::Network>> {
        let request = v1::ListNetworksRequest { allow_stale: false };
        Ok(self
            .plain(async |mut grpc| grpc.list_networks(request).await)
            .await?
            .networks)
    }

    /// Deletes a network.
    pub async fn delete_network(&self, name: &str) -> Result<v1::Network> {
        let request = v1::DeleteNetworkRequest {
            request_id: request_id()?,
            name: name.to_owned(),
        };
        self.plain(async |mut grpc| grpc.delete_network(request.clone()).await)
            .await
    }

    /// Forgets a volume, and has what it holds removed, or not.
    pub async fn delete_volume(&self, name: &str, remove_content: bool) -> Result<v1::Volume> {
        let request = v1::DeleteVolumeRequest {
            request_id: request_id()?,
            name: name.to_owned(),
            remove_content,
        };
        self.plain(async |mut grpc| grpc.delete_volume(request.clone()).await)
            .await
    }

    /// Moves a VM; `to` empty: placement picks.
    pub async fn migrate(&self, vm: &str, to: &str, options: v1::MigrationOptions) -> Result<v1::Migration> {
        self.plan_migration(vm, to, options, false).await
    }

    /// Replaces a VM's VMM by the one that is installed on its host.
    pub async fn upgrade(&self, vm: &str, options: v1::MigrationOptions) -> Result<v1::Migration> {
        self.plan_migration(vm, "", options, true).await
    }

    async fn plan_migration(
        &self,
        vm: &str,
        to: &str,
        options: v1::MigrationOptions,
        upgrade: bool,
    ) -> Result<v1::Migration> {
        let request = v1::MigrateVmRequest {
            request_id: request_id()?,
            vm: vm.to_owned(),
            to: to.to_owned(),
            options: Some(options),
            upgrade,
        };
        self.plain(async |mut grpc| grpc.migrate_vm(request.clone()).await)
            .await
    }

    /// What moving a VM would be like; nothing is moved.
    pub async fn forecast_migration(
        &self,
        vm: &str,
        to: &str,
        options: v1::MigrationOptions,
    ) -> Result<v1::MigrationForecast> {
        self.dry_run(v1::MigrateVmRequest {
            vm: vm.to_owned(),
            to: to.to_owned(),
            options: Some(options),
            ..Default::default()
        })
        .await
    }

    /// What speaks against an upgrade; nothing is replaced.
    pub async fn check_upgrade(
        &self,
        vm: &str,
        options: v1::MigrationOptions,
    ) -> Result<v1::MigrationForecast> {
        self.dry_run(v1::MigrateVmRequest {
            vm: vm.to_owned(),
            options: Some(options),
            upgrade: true,
            ..Default::default()
        })
        .await
    }

    async fn dry_run(&self, request: v1::MigrateVmRequest) -> Result<v1::MigrationForecast> {
        self.call(
            Patience::default(),
            CALL_TIMEOUT + FORECAST_FOR,
            async |mut grpc| grpc.forecast_migration(request.clone()).await,
        )
        .await
    }

    /// Migrations, the newest first; `vm` empty: all.
    pub async fn migrations(&self, vm: &str) -> Result<Vec<v1::Migration>> {
        let request = v1::ListMigrationsRequest {
            vm: vm.to_owned(),
            allow_stale: false,
        };
        Ok(self
            .plain(async |mut grpc| grpc.list_migrations(request.clone()).await)
            .await?
            .migrations)
    }

    /// One migration.
    pub async fn migration(&self, id: &str) -> Result<v1::Migration> {
        let request = v1::GetMigrationRequest {
            id: id.to_owned(),
            allow_stale: false,
        };
        self.plain(async |mut grpc| grpc.get_migration(request.clone()).await)
            .await
    }

    /// Waits up to `wait` for a migration to become other than what `seen` names, 0 for nothing. A controller that knows no such
    /// call answers at once, and names nothing.
    pub async fn watch_migration(
        &self,
        id: &str,
        seen: u64,
        wait: Duration,
    ) -> Result<v1::WatchMigrationResponse> {
        let request = v1::WatchMigrationRequest {
            id: id.to_owned(),
            seen,
            wait_ms: wait_ms(wait),
        };
        let plain = v1::GetMigrationRequest {
            id: id.to_owned(),
            allow_stale: false,
        };
        self.call(
            Patience::default(),
            CALL_TIMEOUT + wait,
            async |mut grpc| match grpc.watch_migration(request.clone()).await {
                Err(status) if status.code() == Grpc::Unimplemented => {
                    let answer = grpc.get_migration(plain.clone()).await?;
                    Ok(answer.map(|migration| v1::WatchMigrationResponse {
                        migration: Some(migration),
                        seen: 0,
                    }))
                }
                answer => answer,
            },
        )
        .await
    }

    /// Asks for a migration's abort.
    pub async fn cancel_migration(&self, id: &str) -> Result<v1::Migration> {
        let request = v1::CancelMigrationRequest {
            request_id: request_id()?,
            id: id.to_owned(),
        };
        self.plain(async |mut grpc| grpc.cancel_migration(request.clone()).await)
            .await
    }

    /// Asks a migration to go on by post-copy now.
    pub async fn postcopy_migration(&self, id: &str) -> Result<v1::Migration> {
        let request = v1::PostcopyMigrationRequest {
            request_id: request_id()?,
            id: id.to_owned(),
        };
        self.plain(async |mut grpc| grpc.postcopy_migration(request.clone()).await)
            .await
    }

    /// Events after `after_seq`, waiting up to `wait` for one.
    pub async fn events(&self, after_seq: u64, wait: Duration) -> Result<v1::ListEventsResponse> {
        let request = v1::ListEventsRequest {
            after_seq,
            wait_ms: wait_ms(wait),
            limit: 0,
        };
        self.call(Patience::default(), CALL_TIMEOUT + wait, async |mut grpc| {
            grpc.list_events(request).await
        })
        .await
    }

    /// Console bytes from `offset` on, waiting up to `wait` for one.
    pub async fn read_console(
        &self,
        vm: &str,
        offset: u64,
        wait: Duration,
    ) -> Result<v1::ReadConsoleResponse> {
        let request = v1::ReadConsoleRequest {
            vm: vm.to_owned(),
            offset,
            max_bytes: 0,
            wait_ms: wait_ms(wait),
            epoch: 0,
        };
        let ask = async |mut grpc: ControllerClient<Channel>| grpc.read_console(request.clone()).await;
        self.call(Patience::default(), CALL_TIMEOUT + wait, ask).await
    }

    /// Offers console input; `Ok(None)` when it is unknown whether it arrived. Tried once.
    pub async fn write_console(&self, vm: &str, data: &[u8]) -> Result<Option<u32>> {
        let request = v1::WriteConsoleRequest {
            vm: vm.to_owned(),
            data: data.to_vec(),
            epoch: 0,
        };
        let ask = async |mut grpc: ControllerClient<Channel>| grpc.write_console(request.clone()).await;
        let mut last = Fault::new(Code::NoLeader, "no controller answers");
        for turn in 0..self.peers.len() {
            match self.attempt(turn, CALL_TIMEOUT, &ask).await {
                Ok(answer) => return Ok(Some(answer.accepted)),
                Err((_, Miss::Refused(fault))) => return Err(fault.into()),
                Err((_, Miss::NoLeader(fault))) => last = fault,
                Err((_, Miss::NotReached(why))) => last.message = why,
                Err((_, Miss::Unanswered(_))) => return Ok(None),
            }
        }
        Err(last.into())
    }

    /// A call with the usual patience.
    async fn plain<T>(
        &self,
        ask: impl AsyncFn(ControllerClient<Channel>) -> std::result::Result<Response<T>, Status>,
    ) -> Result<T> {
        self.call(Patience::default(), CALL_TIMEOUT, ask).await
    }
}

fn wait_ms(wait: Duration) -> u32 {
    u32::try_from(wait.as_millis()).unwrap_or(u32::MAX)
}

/// What an attempt's status means for the next one.
fn classify(addr: &str, status: &Status) -> Miss {
    if let Some(mut fault) = tls_fault(status) {
        fault.message = format!("{addr}: {}", fault.message);
        return Miss::Refused(fault);
    }
    if status.metadata().contains_key(CODE_KEY) {
        let fault = Fault::from(status);
        return if fault.code == Code::NoLeader {
            Miss::NoLeader(fault)
        } else {
            Miss::Refused(fault)
        };
    }
    let transport = status.source().is_some();
    match status.code() {
        Grpc::Unavailable if is_refused(status) => Miss::NotReached(root_cause(status)),
        Grpc::Unavailable | Grpc::Unknown | Grpc::Cancelled | Grpc::DeadlineExceeded => {
            Miss::Unanswered(root_cause(status))
        }
        Grpc::Internal if transport => Miss::Unanswered(root_cause(status)),
        _ => Miss::Refused(Fault::from(status)),
    }
}

/// The errors that led to `error`, itself first.
fn chain<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |&error| error.source()).take(SOURCES_MAX)
}

/// Whether the connection was refused or did not come about: nothing was sent.
fn is_refused(error: &(dyn Error + 'static)) -> bool {
    use std::io::ErrorKind::{ConnectionRefused, HostUnreachable, NetworkUnreachable, TimedOut};
    chain(error)
        .filter_map(|error| error.downcast_ref::<std::io::Error>())
        .any(|error| {
            matches!(
                error.kind(),
                ConnectionRefused | HostUnreachable | NetworkUnreachable | TimedOut
            )
        })
}

/// The innermost message of `error`, which names the cause rather than the layer.
fn root_cause(error: &(dyn Error + 'static)) -> String {
    match chain(error)
        .last()
        .and_then(|error| error.downcast_ref::<Status>())
    {
        Some(status) => status.message().to_owned(),
        None => chain(error).last().map(ToString::to_string).unwrap_or_default(),
    }
}

fn unreachable(misses: &[String]) -> Failure {
    Failure::new(
        Exit::Unreachable,
        Code::NoLeader.as_str(),
        format!(
            "no controller answers ({}). Does the cluster run, and is this the right context?",
            misses.join("; ")
        ),
    )
}

/// A fresh request id: 128 random bits.
pub fn request_id() -> Result<String> {
    let mut bytes = [0_u8; 16];
    File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .map_err(|error| Failure::io("cannot read /dev/urandom", &error))?;
    Ok(format!("{:032x}", u128::from_be_bytes(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_goes_to_the_user_and_no_leader_to_the_next_controller() {
        let refusal = Fault::new(Code::VmNotFound, "no VM is named \"vm9\"").field("name");
        assert_eq!(classify("a:1", &refusal.clone().into()), Miss::Refused(refusal));
        let no_leader = Fault::new(Code::NoLeader, "no leader is known");
        assert_eq!(
            classify("a:1", &no_leader.clone().into()),
            Miss::NoLeader(no_leader)
        );
    }

    #[test]
    fn a_transport_that_breaks_leaves_the_outcome_open_unless_nothing_was_sent() {
        let broken = Status::from_error(Box::new(std::io::Error::from(
            std::io::ErrorKind::ConnectionReset,
        )));
        assert!(
            matches!(classify("a:1", &broken), Miss::Unanswered(_)),
            "{broken:?}"
        );
        let mut refused = Status::unavailable("error trying to connect");
        refused.set_source(std::sync::Arc::new(std::io::Error::from(
            std::io::ErrorKind::ConnectionRefused,
        )));
        assert!(
            matches!(classify("a:1", &refused), Miss::NotReached(_)),
            "{refused:?}"
        );
        assert!(matches!(
            classify("a:1", &Status::unimplemented("no such call")),
            Miss::Refused(_)
        ));
    }

    #[test]
    fn request_ids_are_128_bits_and_differ() {
        let (one, two) = (request_id().unwrap(), request_id().unwrap());
        assert_eq!(one.len(), 32);
        assert_ne!(one, two);
    }
}
