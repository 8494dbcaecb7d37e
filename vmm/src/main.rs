//! `drover-vmm`: one virtual machine in one process.
//!
//! Reads its configuration, takes the lock of its folder, opens what it needs, steps into its sandbox, builds the VM and serves its agent until the VM is destroyed. A VM that cannot
//! be built is served too, as FAILED with the reason; only what keeps the process from being heard ends it.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use drover_proto::descriptors;
use drover_vmm::config::Config;
use drover_vmm::control;
use drover_vmm::machine::Machine;
use drover_vmm::opened::Opened;
use drover_vmm::sandbox::{self, SandboxConfig};
use drover_vmm::sigbus;
use drover_vmm::uffd::Uffd;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::stat::{Mode, umask};
use tracing::{error, info};

#[derive(Parser)]
#[command(version = drover_vmm::version::text(), about = "Runs one Drover virtual machine; started by drover-agent")]
struct Args {
    /// The VM's configuration, JSON
    #[arg(long, value_name = "FILE", required_unless_present_any = ["post_copy", "sandbox"])]
    config: Option<PathBuf>,
    /// Say whether a VM can come here by post-copy, "ok" or why not, and end
    #[arg(long, conflicts_with = "config")]
    post_copy: bool,
    /// Say whether a VMM started by this user has a whole sandbox, "ok" or what it lacks, and end; as this user and group, where root asks
    #[arg(long, value_name = "UID:GID", conflicts_with_all = ["config", "post_copy"], num_args = 0..=1, default_missing_value = "")]
    sandbox: Option<String>,
}

/// Locks the folder for the process's life: by it an agent knows that its VMM lives. A lock that another holds at this
/// moment means that the agent has given this VMM up.
fn lock(folder: &Path) -> anyhow::Result<Flock<File>> {
    let path = folder.join("lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("{} cannot be opened", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|(_, error)| error)
        .with_context(|| format!("{} is held by another: this VMM was given up", path.display()))
}

/// A panic anywhere ends the process, so the guest too: what a lock guarded may be half changed, and nobody would be left to
/// heed what the agent says. Its agent learns of it by the lock of the folder.
fn abort_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        error!("a bug in this VMM, which ends with its guest: {panic}");
        std::process::abort();
    }));
}

fn run(path: &Path) -> anyhow::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    let _lock = lock(folder)?;
    let config = Config::read(path)?;
    info!(
        vm = config.vm,
        epoch = config.epoch,
        incoming = config.incoming.is_some(),
        "starting"
    );
    // Read while this program's file is within reach.
    let _ = drover_vmm::version::own();
    let server = control::Server::bind(&config.socket)?;
    let opened = Opened::of(&config);
    if let Some(cage) = config.sandbox {
        step_inside(&cage, &config, folder)?;
    }
    let machine = Machine::start_of(config, opened)?;
    server.serve(&machine)?;
    info!("over");
    Ok(())
}

/// From here on this process opens nothing, and its agent can hand things in.
fn step_inside(cage: &SandboxConfig, config: &Config, folder: &Path) -> anyhow::Result<()> {
    let listener = control::bind(&config.socket.with_file_name(descriptors::SOCKET))?;
    sandbox::enter(cage, folder, config.nics.len())?;
    let offers = sandbox::offers().context("a sandbox takes what is handed in")?;
    std::thread::Builder::new()
        .name("offers".to_owned())
        .spawn(move || offers.serve(&listener))
        .context("no thread for what is handed in")?;
    Ok(())
}

/// Steps inside, on trial, and says what became of it.
fn try_sandbox(user: &str) -> String {
    let id = |part: Option<&str>| part.and_then(|id| id.parse().ok());
    let mut parts = user.split(':');
    let cage = SandboxConfig {
        uid: id(parts.next()),
        gid: id(parts.next()),
        required: false,
    };
    match sandbox::enter(&cage, Path::new("/tmp"), 0) {
        Ok(report) => report.to_string(),
        Err(fault) => fault.message,
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let Some(user) = args.sandbox {
        println!("{}", try_sandbox(&user));
        return ExitCode::SUCCESS;
    }
    let Some(config) = args.config else {
        match Uffd::open() {
            Ok(_) => println!("ok"),
            Err(fault) => println!("{}", fault.message),
        }
        return ExitCode::SUCCESS;
    };
    if let Err(error) = drover_telemetry::init("info") {
        eprintln!("drover-vmm: {error}");
        return ExitCode::FAILURE;
    }
    abort_on_panic();
    if let Err(error) = sigbus::say_why() {
        error!("a lack of memory would not be explained: {error}");
    }
    drover_pki::install_provider();
    // The socket and whatever else this process creates is its user's alone.
    umask(Mode::from_bits_truncate(0o077));
    match run(&config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}
