//! The source's glue: this VM as the engine's [`SourceVm`], and what becomes of the engine's verdict.
//!
//! The engine may pause the VM, once; it never resumes it. After the pause only the outcome in the log does, through
//! [`Machine::outcome`], whatever happened to the link.

use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use drover_migration::convergence::Costs;
use drover_migration::source::{self, Outcome, Params, Way};
use drover_migration::transport::{self, LINK_TIMEOUT, connect_local, offer};
use drover_migration::vm::{Layout, PageSet, SourceVm};
use drover_migration::{Control, vm};
use drover_pki::{Credentials, host_dns};
use drover_proto::v1::StartOutgoingRequest;
use drover_proto::{Code, Fault, LOCAL_PREFIX};
use tracing::{info, warn};

use crate::machine::Machine;
use crate::sandbox::{self, Thread};

struct Source<'a> {
    machine: &'a Machine,
    migration: &'a str,
    paused: AtomicBool,
}

impl SourceVm for Source<'_> {
    fn layout(&self) -> Layout {
        self.machine.built().memory().layout().clone()
    }

    fn start_dirty_log(&self) -> Result<(), Fault> {
        self.machine.built().start_dirty_log()
    }

    fn stop_dirty_log(&self) {
        if let Err(fault) = self.machine.built().stop_dirty_log() {
            warn!(%fault, "the dirty log stays on; the guest runs a little slower");
        }
    }

    fn take_dirty(&self, into: &mut PageSet) -> Result<(), Fault> {
        if self.paused.load(Ordering::Relaxed) {
            return self.machine.built().take_last_dirty(into);
        }
        self.machine.built().take_dirty(into)
    }

    fn look_dirty(&self, into: &mut PageSet) -> Result<(), Fault> {
        self.machine.built().look_dirty(into)
    }

    fn read_pages(&self, first: u64, out: &mut [u8]) {
        debug_assert!(
            out.len().is_multiple_of(vm::PAGE_SIZE),
            "the engine asks for whole pages"
        );
        let read = self.machine.built().memory().read_pages(first, out);
        read.expect("the engine asks for pages of the layout it was given");
    }

    fn zero_ahead(&self, first: u64, count: u64) -> u64 {
        self.machine.built().memory().hole_ahead(first, count)
    }

    fn costs(&self) -> Costs {
        self.machine.built().switchover_costs()
    }

    fn throttle(&self, percent: u32) {
        self.machine.throttle(self.migration, percent);
    }

    fn pause(&self) -> Result<(), Fault> {
        self.machine.hand_over(self.migration)?;
        self.paused.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn save(&self) -> Result<Vec<u8>, Fault> {
        self.machine.save_handed_over(self.migration)
    }

    fn serving(&self) {
        self.machine.serving(self.migration);
    }
}

/// Whether it goes to another VMM of this host, which takes over the memory itself.
fn is_local(request: &StartOutgoingRequest) -> bool {
    request.target_addr.starts_with(LOCAL_PREFIX)
}

fn params(machine: &Machine, request: &StartOutgoingRequest) -> Params {
    let config = machine.config();
    Params {
        migration: request.migration.clone(),
        vm: config.vm.clone(),
        from_host: config.host.clone(),
        source_epoch: config.epoch,
        target_epoch: request.target_epoch,
        options: request.options.unwrap_or_default(),
        device_model: machine.built().device_model(),
        cpu_profile: config.cpu_profile.name().to_owned(),
        tracker: if is_local(request) {
            "none"
        } else {
            machine.built().tracker_name()
        },
        local: is_local(request),
        link_timeout: LINK_TIMEOUT,
    }
}

/// Sends the VM away; the body of the engine's thread.
pub fn run(machine: &Machine, request: &StartOutgoingRequest, control: &Control) {
    sandbox::narrow(Thread::Migration);
    let id = &request.migration;
    info!(
        migration = id,
        to = request.target_host,
        addr = request.target_addr,
        "sending the VM"
    );
    let source = Source {
        machine,
        migration: id,
        paused: AtomicBool::new(false),
    };
    let params = params(machine, request);
    if let Some(path) = request.target_addr.strip_prefix(LOCAL_PREFIX) {
        let hand_over = |_| hand_over(Path::new(path), machine.built().memory().file().as_fd());
        return ended(machine, id, source::run(&source, hand_over, &params, control));
    }
    let dial = |way| {
        let addr: SocketAddr = request.target_addr.parse().map_err(|_| {
            let message = format!("target_addr {:?} is no ip:port", request.target_addr);
            Fault::new(Code::InvalidArgument, message).field("target_addr")
        })?;
        let plaintext = way == (Way::Pages { plaintext: true });
        let socket = sandbox::socket(id)?;
        if let (true, None) = (plaintext, &socket) {
            return transport::connect_plain(addr);
        }
        let dns = host_dns(&request.target_host);
        let client = || Ok::<_, Fault>(credentials(machine, id)?.rustls_client());
        match (socket, plaintext) {
            (None, _) => transport::connect(addr, &dns, client()?, control),
            (Some(socket), true) => transport::connect_on(socket, addr, None, control),
            (Some(socket), false) => transport::connect_on(socket, addr, Some((&dns, client()?)), control),
        }
    };
    ended(machine, id, source::run(&source, dial, &params, control));
}

/// This host's identity as it is now: certificates may have been renewed since this VMM began.
fn credentials(machine: &Machine, migration: &str) -> Result<Credentials, Fault> {
    let config = machine.config();
    let read = match sandbox::tls(migration)? {
        Some(files) => Credentials::read(&config.tls, &files, &config.cluster_id),
        None => Credentials::load(&config.tls, &config.cluster_id),
    };
    read.map_err(|error| Fault::new(error.code(), error.to_string()))
}

/// Hands the memory to the VMM that waits at `path`.
fn hand_over(path: &Path, memory: BorrowedFd<'_>) -> Result<UnixStream, Fault> {
    match sandbox::peer(path)? {
        Some((stream, owner)) => offer(stream, owner, path, memory),
        None => connect_local(path, memory),
    }
}

/// What becomes of the engine's verdict.
fn ended(machine: &Machine, id: &str, outcome: Outcome) {
    match outcome {
        // After the commit nothing that failed here is this VM's affair.
        _ if machine.served(id) => info!(migration = id, ?outcome, "over"),
        Outcome::AwaitOutcome => info!(migration = id, "the target is ready; waiting for the outcome"),
        Outcome::FailedRunning(fault) => machine.migration_failed(id, fault),
        Outcome::FailedPaused(fault) => {
            machine.migration_failed(id, fault);
            machine.resume_on_lost_reply();
        }
    }
    machine.engine_ended();
}
