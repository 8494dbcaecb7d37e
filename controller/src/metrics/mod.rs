//! What Prometheus reads: `GET /metrics` on the controller's own port, so behind the same mutual TLS as everything else. A caller
//! without a certificate of the cluster does not get as far as a request; of those with one, monitors, users and controllers may read.
//!
//! | file | what | told by |
//! | --- | --- | --- |
//! | `live` | gauges, made of the state at each scrape: a series ends with what it is about | the leader; of itself, every controller |
//! | `finished` | counters and histograms over migrations that ended while this controller led | every controller: add them up |
//!
//! The text is OpenMetrics 1.0. The port speaks HTTP/2 only, which Prometheus and curl choose by themselves (ALPN).

mod finished;
mod live;

use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use drover_pki::{Identity, Role, peer_identity};
use drover_proto::{Code, Fault};
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use tonic::metadata::MetadataMap;

pub use finished::Finished;

use self::live::Live;
use crate::api::LeaderMemory;
use crate::consensus::Consensus;

/// Where the metrics are read.
const PATH: &str = "/metrics";
/// OpenMetrics' text form.
const TEXT: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What a scrape needs.
struct Metrics {
    cluster: String,
    registry: Registry,
}

/// The route to the metrics of this controller, of the cluster named `cluster`.
pub(crate) fn route(cluster: &str, consensus: &Consensus, memory: &Arc<LeaderMemory>) -> Router {
    let mut registry = Registry::with_prefix("drover");
    memory.finished.register(&mut registry);
    registry.register_collector(Box::new(Live::new(consensus.clone(), memory.clone())));
    let metrics = Metrics {
        cluster: cluster.to_owned(),
        registry,
    };
    Router::new()
        .route(PATH, get(scrape))
        .with_state(Arc::new(metrics))
}

async fn scrape(State(metrics): State<Arc<Metrics>>, request: Request) -> Response {
    match admit(request, &metrics.cluster).and_then(|()| metrics.text()) {
        Ok(text) => ([(CONTENT_TYPE, TEXT)], text).into_response(),
        Err(fault) => {
            let status = match fault.code {
                Code::Denied => StatusCode::FORBIDDEN,
                _ => StatusCode::INTERNAL_SERVER_ERROR,
            };
            (status, format!("{fault}\n")).into_response()
        }
    }
}

impl Metrics {
    fn text(&self) -> Result<String, Fault> {
        let mut text = String::new();
        encode(&mut text, &self.registry)
            .map_err(|error| Fault::new(Code::Internal, format!("the metrics cannot be written: {error}")))?;
        Ok(text)
    }
}

fn admit(request: Request, cluster: &str) -> Result<(), Fault> {
    let (parts, _) = request.into_parts();
    let request = tonic::Request::from_parts(MetadataMap::new(), parts.extensions, ());
    let caller = peer_identity(&request, cluster).map_err(|status| Fault::from(&status))?;
    may_read(&caller)
}

fn may_read(caller: &Identity) -> Result<(), Fault> {
    match caller.role {
        Role::Monitor | Role::User | Role::Controller => Ok(()),
        Role::Host => {
            let message = format!("{caller} may not read the metrics; monitors, users and controllers may");
            Err(Fault::new(Code::Denied, message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_watches_may_read_and_a_host_may_not() {
        let read = |role| {
            may_read(&Identity {
                cluster: "dev".into(),
                role,
                name: "x".into(),
            })
            .map_err(|fault| fault.code)
        };
        for role in [Role::Monitor, Role::User, Role::Controller] {
            assert_eq!(read(role), Ok(()));
        }
        assert_eq!(read(Role::Host), Err(Code::Denied));
    }
}
