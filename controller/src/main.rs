//! `drover-controller --config FILE`: one member of the replicated control plane.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Parser;
use drover_controller::config::Config;
use drover_controller::server::Controller;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// The replicated control plane of a Drover cluster.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The configuration, a JSON file; ARCHITECTURE.md §5 shows one.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

fn main() -> ExitCode {
    drover_pki::install_provider();
    let arguments = Arguments::parse();
    if let Err(error) = log().and_then(|()| run(&arguments)) {
        eprintln!("drover-controller: {error:#}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// Logs to standard error: the filter from `DROVER_LOG`, the form from `DROVER_LOG_FORMAT`.
fn log() -> anyhow::Result<()> {
    let filter = std::env::var("DROVER_LOG").unwrap_or_else(|_| "info,openraft=warn".to_owned());
    let filter = EnvFilter::try_new(&filter).with_context(|| format!("DROVER_LOG is {filter:?}"))?;
    let log = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_writer(std::io::stderr)
        .with_env_filter(filter);
    match std::env::var("DROVER_LOG_FORMAT").as_deref() {
        Ok("json") => log.json().init(),
        Ok("" | "text") | Err(_) => log.init(),
        Ok(other) => bail!("DROVER_LOG_FORMAT is {other:?}; want json or text"),
    }
    Ok(())
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let config = Config::load(&arguments.config)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("starting")?;
    runtime.block_on(async {
        // Before anything is started: a signal that comes early is not lost.
        let mut terminate = signal(SignalKind::terminate()).context("signals")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("signals")?;
        let mut controller = Controller::start(&config).await?;
        let failure = tokio::select! {
            _ = terminate.recv() => None,
            _ = interrupt.recv() => None,
            failure = controller.failed() => Some(failure),
        };
        controller.stop().await;
        failure.map_or(Ok(()), |failure| Err(failure.into()))
    })
}
