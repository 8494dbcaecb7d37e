//! The controllers as an agent sees them: any of them takes any call.
//!
//! A call goes to the one that answered last. When that one does not answer in time, or knows no leader, the next is tried, once
//! round; the first that answers is stuck to. Each heartbeat's answer names the leader: from then on calls go there, which saves the
//! way over another controller, most of all for the commit, during which a guest stands still. One that did not answer lately is not
//! gone to for that: it may lead and be out of this host's reach. Calls are idempotent, so an attempt whose answer was lost may be repeated elsewhere.
//! Whether to try again after a whole round is the caller's affair.

use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use drover_pki::{Credentials, controller_dns, tls_fault};
use drover_proto::v1::fleet_client::FleetClient;
use drover_proto::{Code, Fault};
use tokio::sync::watch;
use tokio::time::timeout;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

/// A controller on the same continent answers a connect by then.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// A connection over which nothing comes for these two together is dead: a cut link gives no sign of itself.
/// Of an answer: a host's desired state has all that its VMs' cloud-init is told, of which a cluster takes 64 MiB.
const DESIRED_BYTES_MAX: usize = 128 << 20;
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(2);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(2);

/// A controller that did not answer is not preferred for so long.
const SHUNNED: Duration = Duration::from_secs(10);

/// Connections to all controllers.
pub struct Controllers {
    all: Vec<Controller>,
    current: watch::Sender<usize>,
}

struct Controller {
    addr: SocketAddr,
    client: FleetClient<Channel>,
    /// When it did not answer, the last time.
    failed: Mutex<Option<Instant>>,
}

impl Controllers {
    /// Connections are made when they are first used. Call it inside a tokio runtime.
    pub fn new(addrs: &[SocketAddr], credentials: &Credentials) -> Result<Self, tonic::transport::Error> {
        let connect = |addr: &SocketAddr| {
            let endpoint = Endpoint::from_shared(format!("https://{addr}"))?
                .tls_config(credentials.tonic_client(&controller_dns(None)))?
                .connect_timeout(CONNECT_TIMEOUT)
                .tcp_nodelay(true)
                .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
                .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
                .keep_alive_while_idle(true);
            Ok(Controller {
                addr: *addr,
                client: FleetClient::new(endpoint.connect_lazy())
                    .max_decoding_message_size(DESIRED_BYTES_MAX),
                failed: Mutex::default(),
            })
        };
        let all = addrs
            .iter()
            .map(connect)
            .collect::<Result<Vec<_>, tonic::transport::Error>>()?;
        Ok(Self {
            all,
            current: watch::Sender::new(0),
        })
    }

    /// Changes when another controller than before answers.
    pub fn current(&self) -> watch::Receiver<usize> {
        self.current.subscribe()
    }

    /// Makes one call, each attempt bounded by `attempt_max`. The fault is the controllers' answer, or why none answered.
    pub async fn call<T, F, A>(&self, what: &str, attempt_max: Duration, call: F) -> Result<T, Fault>
    where
        F: Fn(FleetClient<Channel>) -> A,
        A: Future<Output = Result<T, Status>>,
    {
        let first = *self.current.borrow();
        let mut last = None;
        for step in 0..self.all.len() {
            let index = (first + step) % self.all.len();
            let Controller { addr, client, failed } = &self.all[index];
            let fault = match timeout(attempt_max, call(client.clone())).await {
                Ok(Ok(answer)) => {
                    self.stick_to(index);
                    return Ok(answer);
                }
                Ok(Err(status)) => tls_fault(&status).unwrap_or_else(|| Fault::from(&status)),
                Err(_) => Fault::new(
                    Code::NoLeader,
                    format!("no answer within {} ms", attempt_max.as_millis()),
                ),
            };
            let elsewhere = matches!(
                fault.code,
                Code::NoLeader | Code::HostUnreachable | Code::Internal | Code::Denied
            );
            if !elsewhere {
                self.stick_to(index);
                return Err(fault);
            }
            tracing::debug!(%addr, what, %fault, "a controller did not answer");
            *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
            last = Some(Fault {
                message: format!("{addr}: {}", fault.message),
                ..fault
            });
        }
        Err(last.unwrap_or_else(|| Fault::new(Code::NoLeader, "no controller is configured")))
    }

    /// The controller at `leader` (`ip:port`) leads: calls go to it first, unless it did not answer lately. An address that is none of
    /// the configured ones changes nothing.
    pub fn prefer(&self, leader: &str) {
        let Ok(leader) = leader.parse::<SocketAddr>() else {
            return;
        };
        let answers = |controller: &Controller| {
            let failed = *controller.failed.lock().unwrap_or_else(PoisonError::into_inner);
            failed.is_none_or(|at| at.elapsed() >= SHUNNED)
        };
        let found = self.all.iter().position(|controller| controller.addr == leader);
        if let Some(index) = found.filter(|&index| answers(&self.all[index])) {
            self.stick_to(index);
        }
    }

    fn stick_to(&self, index: usize) {
        self.current
            .send_if_modified(|current| std::mem::replace(current, index) != index);
    }
}
