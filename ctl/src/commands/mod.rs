//! One file a noun: what each command asks of the cluster and how it waits for the end.

mod bar;
pub mod ca;
mod cloud;
pub mod console;
mod devices;
mod dry_run;
pub mod events;
mod follow;
mod memory;
pub mod migrate;
pub mod network;
pub mod objects;
mod progress;
mod snapshot;
mod terminal;
pub mod upgrade;
pub mod vm;
pub mod volume;

use std::time::{Duration, Instant};

use crate::args::Global;
use crate::client::Client;
use crate::context::{self, Context};
use crate::failure::Result;
use crate::output::Out;

/// How often a state that is waited for is asked for.
const POLL: Duration = Duration::from_millis(100);

/// What every command that talks to a cluster needs.
pub struct Session {
    /// The cluster.
    pub client: Client,
    /// Where results go.
    pub out: Out,
}

impl Session {
    /// Finds the context and makes the client.
    pub fn open(global: &Global) -> Result<Self> {
        let path = match &global.context {
            Some(path) => path.clone(),
            None => context::default_dev_dir(context::env_path)?.join(context::DEV_CONTEXT_FILE),
        };
        let client = Client::new(&Context::load(&path)?)?;
        Ok(Self {
            client,
            out: Out {
                format: global.output,
                quiet: global.quiet,
            },
        })
    }
}

/// Keeps a long poll that came back empty-handed at once from becoming a busy loop.
async fn not_too_soon(asked: Instant) {
    tokio::time::sleep(POLL.saturating_sub(asked.elapsed())).await;
}
