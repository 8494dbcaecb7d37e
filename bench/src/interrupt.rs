//! Ctrl-C: every wait of the benchmark ends with an error, so that the cluster is taken down on the ordinary way out.
//!
//! A second one ends the process at once; the kernel then kills what it started, see `drover_chaos_cluster::process`.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use tokio::signal::unix::{SignalKind, signal};

/// What a shell expects of a process that Ctrl-C ended.
const INTERRUPTED: i32 = 130;

static ASKED: AtomicBool = AtomicBool::new(false);

/// From now on Ctrl-C and a polite kill are heard.
pub fn listen() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the runtime that waits for signals")?;
    let (mut keys, mut polite) = {
        let _inside = runtime.enter();
        (
            signal(SignalKind::interrupt()).context("listening for Ctrl-C")?,
            signal(SignalKind::terminate()).context("listening for SIGTERM")?,
        )
    };
    std::thread::spawn(move || {
        runtime.block_on(async move {
            loop {
                tokio::select! { _ = keys.recv() => {}, _ = polite.recv() => {} }
                if ASKED.swap(true, Ordering::Relaxed) {
                    std::process::exit(INTERRUPTED);
                }
                eprintln!("interrupted: what runs is taken down");
            }
        });
    });
    Ok(())
}

/// An error once an interrupt was heard.
pub fn check() -> Result<()> {
    if ASKED.load(Ordering::Relaxed) {
        bail!("interrupted");
    }
    Ok(())
}
