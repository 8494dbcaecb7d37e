//! `drover-agent --config FILE`: the host daemon. See the library for what it does.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Parser;
use drover_node_agent::{Agent, Config};
use tokio::signal::unix::{SignalKind, signal};

/// Keeps this host in its Drover cluster: renews its lease, starts its VMMs and finds them again.
#[derive(Parser)]
#[command(name = "drover-agent", version)]
struct Args {
    /// The configuration, a JSON file.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

fn main() -> ExitCode {
    drover_pki::install_provider();
    let args = Args::parse();
    if let Err(error) = drover_telemetry::init("info") {
        eprintln!("drover-agent: {error}");
        return ExitCode::FAILURE;
    }
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> anyhow::Result<()> {
    let config = Config::read(&args.config)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("starting the runtime")?;
    let outcome = runtime.block_on(async {
        let mut stop = signal(SignalKind::terminate()).context("SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT")?;
        let mut agent = Agent::start(config).await?;
        tokio::select! {
            _ = stop.recv() => tracing::info!("asked to end; the VMMs run on"),
            _ = interrupt.recv() => tracing::info!("interrupted; the VMMs run on"),
            why = agent.broken() => bail!(why),
        }
        Ok(())
    });
    // A pause point that is held must not hold up the end.
    runtime.shutdown_background();
    outcome
}
