//! Connections to other controllers and to agents: one a peer, made on first use, checked against the peer's DNS name.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use drover_pki::Credentials;
use drover_proto::{Code, Fault};
use drover_state::limits::HOSTS_MAX;
use tonic::transport::{Channel, Endpoint};

/// A peer on the same site answers a connect in milliseconds; one that does not in this time is gone.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// A silent connection is asked for a sign of life this often, so that a cut cable is found within seconds.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(2);
/// How long the sign of life may take.
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(3);

/// Connections by the peer's DNS name.
pub(crate) struct Channels {
    credentials: Arc<Credentials>,
    open: Mutex<BTreeMap<String, (String, Channel)>>,
}

impl Channels {
    pub(crate) fn new(credentials: Arc<Credentials>) -> Self {
        Self {
            credentials,
            open: Mutex::new(BTreeMap::new()),
        }
    }

    /// The connection to the peer of this DNS name at `addr` (ip:port). Connects when first used, and again when lost.
    pub(crate) fn to(&self, dns_name: &str, addr: &str) -> Result<Channel, Fault> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, channel)) = open.get(dns_name)
            && known == addr
        {
            return Ok(channel.clone());
        }
        let broken = |error: tonic::transport::Error| {
            Fault::new(
                Code::Internal,
                format!("{dns_name} at {addr:?} cannot be called: {error}"),
            )
        };
        let channel = Endpoint::from_shared(format!("https://{addr}"))
            .map_err(broken)?
            .tls_config(self.credentials.tonic_client(dns_name))
            .map_err(broken)?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
            .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
            .keep_alive_while_idle(true)
            .connect_lazy();
        if open.len() >= 2 * HOSTS_MAX {
            open.clear();
        }
        open.insert(dns_name.to_owned(), (addr.to_owned(), channel.clone()));
        Ok(channel)
    }

    /// Drops the connection, so that the next call dials anew instead of waiting on one that may be dead.
    pub(crate) fn forget(&self, dns_name: &str) {
        self.open
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(dns_name);
    }
}
