//! Looking at both VMMs of a migration while it goes on, by the long poll that their agents use: it answers when something
//! changed, so the instant at which the target runs is known to a millisecond or two without asking all the time.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use drover_proto::v1::vmm_client::VmmClient;
use drover_proto::v1::{VmmInfo, VmmState, WatchInfoRequest};
use tonic::transport::{Channel, Endpoint};

use crate::result::{Sample, millis};

/// How long one poll waits.
const WAIT_MS: u32 = 500;

/// After an answer: a source that says something with every frame is not asked with every frame.
const BREATH: Duration = Duration::from_millis(5);

/// Between two looks for a socket that is not there yet.
const SOCKET_PERIOD: Duration = Duration::from_millis(2);

/// Samples kept of one migration; at one in [`BREATH`] this is some minutes.
const SAMPLES_MAX: usize = 50_000;

#[derive(Default)]
struct Shared {
    end: AtomicBool,
    ran: Mutex<Option<Duration>>,
    samples: Mutex<Vec<Sample>>,
}

/// What was seen.
pub struct Watched {
    /// From the beginning until the target's vCPUs ran.
    pub ran: Option<Duration>,
    /// The source's progress.
    pub samples: Vec<Sample>,
}

/// The thread that looks.
pub struct Watch {
    shared: Arc<Shared>,
    thread: JoinHandle<()>,
}

impl Watch {
    /// Looks at the VMMs in these two folders; times are counted from `begun`.
    pub fn start(begun: Instant, source: PathBuf, target: PathBuf) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("starting the watch's runtime")?;
        let shared = Arc::new(Shared::default());
        let seen = Arc::clone(&shared);
        let thread = std::thread::spawn(move || {
            runtime.block_on(async {
                tokio::join!(progress(begun, &source, &seen), run(begun, &target, &seen));
            });
        });
        Ok(Self { shared, thread })
    }

    /// Whether the target runs.
    pub fn ran(&self) -> bool {
        self.shared.ran.lock().is_ok_and(|ran| ran.is_some())
    }

    /// Ends it; what was seen.
    pub fn stop(self) -> Result<Watched> {
        self.shared.end.store(true, Ordering::Relaxed);
        self.thread
            .join()
            .map_err(|_| anyhow!("the thread that watches the VMMs panicked"))?;
        let lock = "no one panics with the lock";
        let ran = *self.shared.ran.lock().expect(lock);
        let samples = std::mem::take(&mut *self.shared.samples.lock().expect(lock));
        Ok(Watched { ran, samples })
    }
}

/// Watches, from now on, for the moment in which the VMM in `dir` runs and is the source of no migration.
pub fn until_unmoved(dir: PathBuf) -> Result<JoinHandle<Result<Instant>>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the watch's runtime")?;
    Ok(std::thread::spawn(move || {
        let mut at = None;
        runtime.block_on(follow(&dir, &Shared::default(), |info| {
            if info.migration.is_none() && info.state() == VmmState::Running {
                at = Some(Instant::now());
            }
            at.is_none()
        }));
        at.context("the source ended before it was done with the migration")
    }))
}

/// Waits for the socket and connects; `None` when the watch ends first.
async fn connect(dir: &Path, shared: &Shared) -> Option<VmmClient<Channel>> {
    let address = format!("unix://{}", dir.join("vmm.sock").display());
    let endpoint = Endpoint::from_shared(address)
        .ok()?
        .timeout(Duration::from_secs(2));
    while !shared.end.load(Ordering::Relaxed) {
        if let Ok(channel) = endpoint.connect().await {
            return Some(VmmClient::new(channel));
        }
        tokio::time::sleep(SOCKET_PERIOD).await;
    }
    None
}

/// Calls `take` with every new state of the VMM until it says `false`, or the VMM or the watch ends.
async fn follow(dir: &Path, shared: &Shared, mut take: impl FnMut(&VmmInfo) -> bool) {
    let Some(mut client) = connect(dir, shared).await else {
        return;
    };
    let mut seen_seq = 0;
    while !shared.end.load(Ordering::Relaxed) {
        let request = WatchInfoRequest {
            seen_seq,
            wait_ms: WAIT_MS,
        };
        let Ok(answer) = client.watch_info(request).await else {
            return;
        };
        let info = answer.into_inner();
        if info.seq != seen_seq && !take(&info) {
            return;
        }
        seen_seq = info.seq;
        tokio::time::sleep(BREATH).await;
    }
}

async fn progress(begun: Instant, source: &Path, shared: &Shared) {
    follow(source, shared, |info| {
        let migration = info.migration.as_ref().filter(|migration| migration.outgoing);
        if let Some(progress) = migration.and_then(|migration| migration.progress.clone()) {
            let mut samples = shared.samples.lock().expect("no one panics with the lock");
            if samples.len() < SAMPLES_MAX {
                samples.push(Sample {
                    at_ms: millis(begun.elapsed()),
                    sent: progress.bytes_sent,
                    remaining: progress.bytes_remaining,
                });
            }
        }
        true
    })
    .await;
}

async fn run(begun: Instant, target: &Path, shared: &Shared) {
    follow(target, shared, |info| {
        if info.state() != VmmState::Running {
            return true;
        }
        *shared.ran.lock().expect("no one panics with the lock") = Some(begun.elapsed());
        false
    })
    .await;
}
