//! The target's glue: this VM as the engine's [`TargetVm`], and the one connection it waits for.
//!
//! What was received runs by a grant for this VMM's epoch and by nothing else. A VMM whose receiving failed stays, with
//! the reason, until it is destroyed; it never receives again, and nothing ever runs in it.

use std::fs::File;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use drover_migration::Control;
use drover_migration::post_copy::{self, PostCopyVm};
use drover_migration::target::{self, Admission, Params, Received};
use drover_migration::transport::{LINK_TIMEOUT, LocalListener};
use drover_migration::vm::{Layout, PageSet, TargetVm};
use drover_pki::{CertificateDer, Role, identity_of};
use drover_proto::{Code, Fault, LOCAL_ADDR};
use tracing::{error, info, warn};

use crate::DEVICE_MODEL;
use crate::config::{Config, Incoming};
use crate::machine::Machine;
use crate::memory::{self, Memory, PAGE};
use crate::opened::Waiting;
use crate::sandbox::{self, Thread};
use crate::uffd::Uffd;

/// How long vCPUs that are kicked out for good are waited for. One that waits for a lost page, as a device may too, may need that page to be poisoned first.
const HALT_WAIT: Duration = Duration::from_millis(500);

/// This VM as a target.
struct Target<'a> {
    machine: &'a Arc<Machine>,
    /// Its memory, where that is handed over, until it is taken.
    memory: Mutex<Option<File>>,
    /// What lets it run before its pages are there, or why it cannot.
    uffd: Result<Uffd, Fault>,
}

impl Target<'_> {
    fn memory(&self) -> &Memory {
        self.machine.built().memory()
    }

    fn uffd(&self) -> Result<&Uffd, Fault> {
        self.uffd.as_ref().map_err(Fault::clone)
    }
}

impl TargetVm for Target<'_> {
    fn layout(&self) -> Layout {
        memory::layout(self.machine.config().memory_bytes())
    }

    fn adopt_memory(&self) -> Result<(), Fault> {
        let memory = self.memory.lock().map(|mut memory| memory.take());
        let memory = memory
            .ok()
            .flatten()
            .ok_or_else(|| Fault::new(Code::Internal, "no memory came with the link"))?;
        self.machine.adopt(&memory)
    }

    fn write_pages(&self, first: u64, data: &[u8]) -> Result<(), Fault> {
        self.memory().write_pages(first, data)
    }

    fn read_back(&self, first: u64, out: &mut [u8]) -> Result<(), Fault> {
        self.memory().read_received(first, out)
    }

    fn zero_pages(&self, first: u64, count: u64) -> Result<(), Fault> {
        self.memory().zero_pages(first, count)
    }

    fn restore(&self, state: &[u8]) -> Result<(), Fault> {
        self.machine.built().restore_encoded(state)
    }

    fn post_copy(&self) -> Result<&dyn PostCopyVm, Fault> {
        self.uffd().map(|_| self as &dyn PostCopyVm)
    }
}

impl PostCopyVm for Target<'_> {
    fn arm(&self, missing: &PageSet) -> Result<(), Fault> {
        self.memory().discard(missing)?;
        self.memory().watch(self.uffd()?)
    }

    fn faults(&self, wait: Duration, pages: &mut Vec<u64>) -> Result<(), Fault> {
        let mut addresses = Vec::new();
        self.uffd()?.faults(wait, &mut addresses)?;
        pages.extend(
            addresses
                .into_iter()
                .filter_map(|address| self.memory().page_at(address)),
        );
        Ok(())
    }

    fn place_pages(&self, first: u64, data: &[u8]) -> Result<(), Fault> {
        self.memory()
            .place(self.uffd()?, first, Some(data), data.len() as u64 / PAGE)
    }

    fn place_zeros(&self, first: u64, count: u64) -> Result<(), Fault> {
        self.memory().place(self.uffd()?, first, None, count)
    }

    fn stand(&self, received: Received) -> Result<(), Fault> {
        self.machine.received_by_post_copy(received)
    }

    fn disarm(&self) -> Result<(), Fault> {
        self.memory().unwatch(self.uffd()?)?;
        // A balloon's requests waited for this.
        self.machine.built().wake_devices();
        Ok(())
    }

    /// Takes no lock of the machine: its holder may be waiting for a vCPU that waits for a page.
    fn lose(&self, missing: &PageSet, why: &Fault) {
        let vm = self.machine.built();
        let halts = vm.fail(why.clone(), HALT_WAIT);
        let poisoned = self.uffd().and_then(|uffd| self.memory().poison(uffd, missing));
        if halts || (matches!(poisoned, Ok(true)) && vm.fail(why.clone(), HALT_WAIT)) {
            return;
        }
        // A vCPU or a device waits in the kernel for a page that will never come. When this process ends it does not wake in the guest.
        error!(?poisoned, "{why}");
        std::process::abort();
    }
}

/// Receives the VM; the body of the engine's thread.
pub fn run(machine: &Arc<Machine>, incoming: &Incoming, waiting: Result<Waiting, Fault>, control: &Control) {
    sandbox::narrow(Thread::Migration);
    match waiting.and_then(|waiting| receive(machine, incoming, waiting, control)) {
        Ok(()) => info!(
            migration = incoming.migration,
            "everything is verified and restored"
        ),
        Err(fault) => machine.migration_failed(&incoming.migration, fault),
    }
    machine.engine_ended();
}

fn receive(
    machine: &Arc<Machine>,
    incoming: &Incoming,
    waiting: Waiting,
    control: &Control,
) -> Result<(), Fault> {
    let (credentials, uffd, listener) = match waiting {
        Waiting::Local(listener) => return take_over(machine, incoming, listener, control),
        Waiting::Host {
            credentials,
            uffd,
            listener,
        } => (credentials, uffd, listener),
    };
    let config = machine.config();
    let vm = Target {
        machine,
        memory: Mutex::default(),
        uffd,
    };
    if let Err(fault) = &vm.uffd {
        warn!(%fault, "this VM can be received by pre-copy only");
    }
    let addr = listener.addr()?.to_string();
    info!(
        migration = incoming.migration,
        addr,
        from = incoming.from_host,
        "waiting for the source"
    );
    machine.listening(addr);
    drover_points::reach("target.listening");
    let verify = |chain: &[CertificateDer<'_>]| check_peer(chain, &config.cluster_id, &incoming.from_host);
    let stream = listener.accept(&credentials.rustls_server(), verify, control)?;
    let admit = |admission: &Admission| {
        listener.accept_streams(&credentials.rustls_server(), verify, admission, control)
    };
    let received = target::run(&vm, stream, admit, &params(config, incoming), control)?;
    if received.receipt.post_copy.is_some() {
        machine.post_copy_complete(received);
        return Ok(());
    }
    machine.received(received)
}

fn params(config: &Config, incoming: &Incoming) -> Params {
    Params {
        migration: incoming.migration.clone(),
        vm: config.vm.clone(),
        from_host: incoming.from_host.clone(),
        epoch: config.epoch,
        device_model: DEVICE_MODEL,
        cpu_profile: config.cpu_profile.name().to_owned(),
        plaintext: incoming.plaintext,
        local: incoming.local,
        link_timeout: LINK_TIMEOUT,
    }
}

/// An upgrade: the VMM before this one, on this host, hands over the memory itself.
fn take_over(
    machine: &Arc<Machine>,
    incoming: &Incoming,
    listener: LocalListener,
    control: &Control,
) -> Result<(), Fault> {
    let config = machine.config();
    info!(
        migration = incoming.migration,
        "waiting for the VMM before this one"
    );
    machine.listening(LOCAL_ADDR.to_owned());
    drover_points::reach("target.listening");
    let (stream, memory) = listener.accept(control)?;
    drop(listener);
    let vm = Target {
        machine,
        memory: Mutex::new(Some(memory.into())),
        uffd: Err(post_copy::unavailable()),
    };
    let none = |_: &Admission| Err(Fault::new(Code::Internal, "an upgrade has no streams"));
    let received = target::run(&vm, stream, none, &params(config, incoming), control)?;
    machine.received(received)
}

/// Only the source's host may send.
fn check_peer(chain: &[CertificateDer<'_>], cluster: &str, from_host: &str) -> Result<(), Fault> {
    let peer = identity_of(chain, cluster).map_err(|error| Fault::new(Code::Denied, error.to_string()))?;
    if peer.role != Role::Host || peer.name != from_host {
        let message = format!("{peer} connected, only host {from_host} may send this VM");
        return Err(Fault::new(Code::Denied, message));
    }
    Ok(())
}
