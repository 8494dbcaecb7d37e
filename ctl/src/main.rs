//! `ctl`: Drover's command line. It owns nothing: everything it shows and changes is the cluster's, except for
//! `ctl dev`, which runs a whole cluster on this machine.
//!
//! ```text
//! args ──→ commands / dev ──→ client ──→ any controller
//!              │
//!              └─→ view ──→ output (standard output)      failure ──→ standard error, exit code
//! ```

mod args;
mod client;
mod commands;
mod context;
mod dev;
mod failure;
mod output;
mod units;
mod view;

use std::io;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};

use crate::args::{Cli, ClusterCommand, Command, Format, HostCommand, ImageCommand, Shell};
use crate::commands::{Session, ca, events, migrate, network, objects, vm, volume};
use crate::failure::{Exit, Failure, Result};
use crate::output::Out;

fn main() -> ExitCode {
    drover_pki::install_provider();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return wrong_usage(&error),
    };
    let json = cli.global.output == Format::Json;
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return end(&Failure::io("cannot start", &error), json),
    };
    let outcome = runtime.block_on(run(&cli));
    // A thread may still wait in a read of standard input.
    runtime.shutdown_background();
    match outcome {
        Ok(()) => ExitCode::from(Exit::Ok as u8),
        Err(failure) => end(&failure, json),
    }
}

fn end(failure: &Failure, json: bool) -> ExitCode {
    failure.print(json);
    ExitCode::from(failure.exit as u8)
}

/// Help and version go to standard output; a wrong command line is an error as any other, in JSON too.
fn wrong_usage(error: &clap::Error) -> ExitCode {
    let asked = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
    let words: Vec<_> = std::env::args_os().collect();
    let json = words
        .iter()
        .any(|word| word == "-ojson" || word == "--output=json")
        || words
            .windows(2)
            .any(|pair| (pair[0] == "-o" || pair[0] == "--output") && pair[1] == "json");
    if json && !asked {
        let text = error.render().to_string();
        let message = text.trim().trim_start_matches("error: ");
        return end(&Failure::usage(message), true);
    }
    // A closed pipe leaves nobody to tell.
    let _ = error.print();
    ExitCode::from(if asked { Exit::Ok } else { Exit::Usage } as u8)
}

async fn run(cli: &Cli) -> Result<()> {
    let out = Out {
        format: cli.global.output,
        quiet: cli.global.quiet,
    };
    match &cli.command {
        Command::Dev(command) => return dev::run(command, out).await,
        Command::Ca(command) => return ca::run(command, out),
        Command::Completion { shell } => return completion(*shell),
        _ => {}
    }
    let session = Session::open(&cli.global)?;
    match &cli.command {
        Command::Cluster(ClusterCommand::Status) => objects::cluster_status(&session).await,
        Command::Host(HostCommand::List) => objects::host_list(&session).await,
        Command::Host(HostCommand::Show { host }) => objects::host_show(&session, host).await,
        Command::Image(ImageCommand::List) => objects::image_list(&session).await,
        Command::Vm(command) => vm::run(&session, command).await,
        Command::Volume(command) => volume::run(&session, command).await,
        Command::Network(command) => network::run(&session, command).await,
        Command::Migrate(args) => migrate::migrate(&session, args).await,
        Command::Migration(command) => migrate::run(&session, command).await,
        Command::Events(args) => events::run(&session, args).await,
        Command::Dev(_) | Command::Ca(_) | Command::Completion { .. } => Ok(()),
    }
}

fn completion(shell: Shell) -> Result<()> {
    let shell = match shell {
        Shell::Bash => clap_complete::Shell::Bash,
        Shell::Zsh => clap_complete::Shell::Zsh,
        Shell::Fish => clap_complete::Shell::Fish,
    };
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "ctl", &mut script);
    io::Write::write_all(&mut io::stdout(), &script).map_err(|error| Failure::output(&error))
}
