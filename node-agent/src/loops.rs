//! The three loops between host and controllers that go on whatever the VMMs do: register, heartbeat, watch.
//! None ever gives up; each waits a little after a round in which no controller answered.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use drover_proto::v1::{
    HeartbeatRequest, HostSpec, RegisterHostRequest, RegisterHostResponse, Settings, WatchDesiredRequest,
};
use drover_proto::{Code, Fault};
use tokio::sync::mpsc;
use tokio::time::sleep;

use crate::agent::Context;
use crate::clock::boottime_ns;
use crate::inventory::images::Images;
use crate::inventory::installed::Installed;
use crate::supervisor::Event;

/// After a round without an answer.
const RETRY: Duration = Duration::from_millis(100);
/// Heartbeats that were asked for out of turn come no closer than this.
const HEARTBEAT_GAP_MIN: Duration = Duration::from_millis(10);
/// Until the cluster's settings are known.
const HEARTBEAT_DEFAULT: Duration = Duration::from_millis(500);
/// One attempt of a heartbeat: a fifth of the lease, so that every controller can be tried within it, but within these bounds.
const HEARTBEAT_ATTEMPT_MIN: Duration = Duration::from_millis(300);
const HEARTBEAT_ATTEMPT_MAX: Duration = Duration::from_secs(2);
/// How long a controller may hold a watch when nothing changes, ms.
const WATCH_WAIT_MS: u32 = 5_000;
/// How much later its answer may come.
const ANSWER_MARGIN: Duration = Duration::from_secs(3);
/// One attempt of registering, which ends in the log.
const REGISTER_ATTEMPT: Duration = Duration::from_secs(5);
/// How often the images folder is looked at.
const IMAGES_PERIOD: Duration = Duration::from_secs(1);

/// What the newest answered heartbeat said.
#[derive(Clone, Debug, Default)]
pub struct Grants {
    /// When it was sent, `CLOCK_BOOTTIME`; 0 before the first.
    pub sent_ns: u64,
    /// Until when what is granted may run.
    pub deadline_ns: u64,
    /// The desired state's revision.
    pub revision: u64,
    /// Exactly these may run here.
    pub granted: BTreeSet<(String, u64)>,
}

/// Says a thing that goes wrong again and again once, and once when it is over.
struct Trouble {
    what: &'static str,
    last: Option<String>,
}

impl Trouble {
    fn new(what: &'static str) -> Self {
        Self { what, last: None }
    }

    fn note(&mut self, outcome: Result<(), &Fault>) {
        match outcome {
            Ok(()) => {
                if self.last.take().is_some() {
                    tracing::info!("{}: answered again", self.what);
                }
            }
            Err(fault) => {
                let text = fault.to_string();
                if self.last.as_ref() != Some(&text) {
                    tracing::warn!("{}: {text}; trying on", self.what);
                    self.last = Some(text);
                }
            }
        }
    }
}

/// A host that the controllers do not know registers again; before it has registered once, that is no trouble.
fn note_once_registered(context: &Context, trouble: &mut Trouble, outcome: Result<(), &Fault>) {
    if outcome.is_err_and(|fault| fault.code == Code::HostNotFound) {
        if context.settings.borrow().is_none() {
            return;
        }
        context.register_again.notify_one();
    }
    trouble.note(outcome);
}

/// Renews the lease for ever.
pub async fn heartbeat(context: Arc<Context>) {
    let mut trouble = Trouble::new("heartbeat");
    loop {
        let outcome = beat(&context).await;
        note_once_registered(&context, &mut trouble, outcome.as_ref().map(|_| ()));
        let wait = match outcome {
            Ok(grants) => {
                context.grants.send_replace(grants);
                let period = context
                    .settings
                    .borrow()
                    .as_ref()
                    .map_or(0, |settings| settings.heartbeat_ms);
                if period > 0 {
                    Duration::from_millis(period)
                } else {
                    HEARTBEAT_DEFAULT
                }
            }
            Err(_) => RETRY,
        };
        sleep(HEARTBEAT_GAP_MIN.min(wait)).await;
        tokio::select! {
            () = sleep(wait) => {}
            () = context.heartbeat_now.notified() => {}
        }
    }
}

async fn beat(context: &Context) -> Result<Grants, Fault> {
    let lease = context
        .settings
        .borrow()
        .as_ref()
        .map_or(0, |settings| settings.lease_ms);
    let attempt = Duration::from_millis(lease / 5).clamp(HEARTBEAT_ATTEMPT_MIN, HEARTBEAT_ATTEMPT_MAX);
    let request = HeartbeatRequest {
        host: context.config.name.clone(),
        boot_id: context.boot_id.clone(),
    };
    let (sent_ns, answer) = context
        .controllers
        .call("heartbeat", attempt, |mut client| {
            let request = request.clone();
            // The lease counts from here; a second attempt is sent later and counts from then.
            let sent_ns = boottime_ns();
            async move { Ok((sent_ns, client.heartbeat(request).await?.into_inner())) }
        })
        .await?;
    context.controllers.prefer(&answer.leader);
    Ok(Grants {
        sent_ns,
        deadline_ns: deadline_ns(sent_ns, answer.lease_ms),
        revision: answer.revision,
        granted: answer.grants.into_iter().map(|vm| (vm.vm, vm.epoch)).collect(),
    })
}

/// Until when a lease lasts whose request was sent at `sent_ns`.
pub fn deadline_ns(sent_ns: u64, lease_ms: u64) -> u64 {
    sent_ns.saturating_add(lease_ms.saturating_mul(1_000_000))
}

/// Follows the desired state for ever.
pub async fn watch_desired(context: Arc<Context>, events: mpsc::Sender<Event>) {
    let mut trouble = Trouble::new("watching the desired state");
    let mut grants = context.grants.subscribe();
    let mut current = context.controllers.current();
    let mut seen_revision = 0;
    loop {
        let request = WatchDesiredRequest {
            host: context.config.name.clone(),
            seen_revision,
            wait_ms: WATCH_WAIT_MS,
        };
        let attempt = Duration::from_millis(WATCH_WAIT_MS.into()) + ANSWER_MARGIN;
        let answer = context.controllers.call("watch", attempt, |mut client| {
            let request = request.clone();
            async move { Ok(client.watch_desired(request).await?.into_inner()) }
        });
        current.mark_unchanged();
        let answer = tokio::select! {
            answer = answer => answer,
            // What the watch is held by may be the wrong one to ask: ask again.
            () = nudged(&mut grants, seen_revision) => continue,
            Ok(()) = current.changed() => continue,
        };
        note_once_registered(&context, &mut trouble, answer.as_ref().map(|_| ()));
        match answer {
            Ok(desired) if desired.revision == seen_revision => {}
            Ok(desired) => {
                seen_revision = desired.revision;
                if events
                    .send(Event::Desired {
                        desired,
                        received_ns: boottime_ns(),
                    })
                    .await
                    .is_err()
                {
                    return;
                }
            }
            Err(_) => sleep(RETRY).await,
        }
    }
}

/// Resolves when a heartbeat shows another revision than the one seen.
async fn nudged(grants: &mut tokio::sync::watch::Receiver<Grants>, seen_revision: u64) {
    loop {
        if grants.changed().await.is_err() {
            return std::future::pending().await;
        }
        let revision = grants.borrow_and_update().revision;
        if revision != 0 && revision != seen_revision {
            return;
        }
    }
}

/// Registers, and registers again when the images, the installed VMM or the offered networks change or the controllers do not know the host.
pub async fn register(context: Arc<Context>, mut spec: HostSpec) {
    let mut images = Images::new(&context.config.images_dir);
    let mut installed = Installed::new(&context.config.vmm, context.sandbox.question());
    let mut trouble = Trouble::new("register");
    let mut unreadable = Trouble::new("images folder");
    loop {
        let scanned;
        (images, scanned) = scan(images).await;
        let readable = scanned.map(|_| ()).map_err(|error| {
            Fault::new(
                Code::Internal,
                format!("{}: {error}", context.config.images_dir.display()),
            )
        });
        unreadable.note(readable.as_ref().copied());
        spec.images = images.list();
        installed.look().await;
        context.sandbox.answered(installed.sandbox());
        spec.vmm = installed.build();
        spec.sandbox = context.sandbox.reported();
        let offer = context.networks.offer();
        spec.networks.clone_from(&offer.networks);
        spec.vxlan = offer.vxlan.map_or_else(String::new, |ip| ip.to_string());
        spec.networking.clone_from(&offer.networking);
        spec.post_copy = if context.config.post_copy {
            installed.post_copy().to_owned()
        } else {
            "it is switched off on this host (post_copy in its agent's configuration)".to_owned()
        };
        let outcome = register_once(&context, &spec).await;
        trouble.note(outcome.as_ref().map(|_| ()));
        match outcome {
            Ok(settings) => {
                tracing::info!(images = spec.images.len(), "registered");
                context.settings.send_replace(Some(settings));
                context.heartbeat_now.notify_one();
            }
            Err(_) => {
                sleep(RETRY).await;
                continue;
            }
        }
        loop {
            tokio::select! {
                () = context.register_again.notified() => break,
                () = sleep(IMAGES_PERIOD) => {
                    let changed;
                    (images, changed) = scan(images).await;
                    if installed.look().await || changed.unwrap_or(false) || context.networks.offer() != offer {
                        break;
                    }
                }
            }
        }
        // Not known to the controllers, or changed: either way not more often than this.
        sleep(RETRY).await;
    }
}

async fn scan(mut images: Images) -> (Images, std::io::Result<bool>) {
    tokio::task::spawn_blocking(move || {
        let changed = images.scan();
        (images, changed)
    })
    .await
    .expect("scanning does not panic and the runtime lives")
}

async fn register_once(context: &Context, spec: &HostSpec) -> Result<Settings, Fault> {
    let RegisterHostResponse { settings, cluster_id } = context
        .controllers
        .call("register", REGISTER_ATTEMPT, |mut client| {
            let request = RegisterHostRequest {
                spec: Some(spec.clone()),
            };
            async move { Ok(client.register_host(request).await?.into_inner()) }
        })
        .await?;
    if cluster_id != context.config.cluster_id {
        let ours = &context.config.cluster_id;
        let message = format!("the controllers are of cluster {cluster_id:?}, this host is of {ours:?}");
        return Err(Fault::new(Code::Denied, message).field("cluster_id"));
    }
    Ok(settings.unwrap_or_default())
}
