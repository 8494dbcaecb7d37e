//! `drover-controller --config FILE`: one member of the replicated control plane.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use drover_controller::config::Config;
use drover_controller::server::Controller;
use tokio::signal::unix::{SignalKind, signal};

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
    if let Err(error) = run(&arguments) {
        eprintln!("drover-controller: {error:#}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// openraft's own tale of every entry is of no use to whoever runs a cluster.
const LOG_DEFAULT: &str = "info,openraft=warn";

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    drover_telemetry::init(LOG_DEFAULT)?;
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
