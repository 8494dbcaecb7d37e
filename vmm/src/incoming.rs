//! The target's glue: this VM as the engine's [`TargetVm`], and the one connection it waits for.
//!
//! What was received runs by a grant for this VMM's epoch and by nothing else. A VMM whose receiving failed stays, with
//! the reason, until it is destroyed; it never receives again, and nothing ever runs in it.

use std::fs::File;
use std::sync::{Arc, Mutex};

use drover_migration::Control;
use drover_migration::target::{self, Admission, Params};
use drover_migration::transport::{LINK_TIMEOUT, Listener, LocalListener};
use drover_migration::vm::{Layout, TargetVm};
use drover_pki::{CertificateDer, Credentials, Role, identity_of};
use drover_proto::{Code, Fault, LOCAL_ADDR};
use tracing::info;

use crate::config::{Config, Incoming};
use crate::machine::Machine;
use crate::{DEVICE_MODEL, memory};

/// This VM as a target. Its memory, where that is handed over, until it is taken.
struct Target<'a> {
    machine: &'a Arc<Machine>,
    memory: Mutex<Option<File>>,
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
        self.machine.built().memory().write_pages(first, data)
    }

    fn read_back(&self, first: u64, out: &mut [u8]) -> Result<(), Fault> {
        self.machine.built().memory().read_received(first, out)
    }

    fn zero_pages(&self, first: u64, count: u64) -> Result<(), Fault> {
        self.machine.built().memory().zero_pages(first, count)
    }

    fn restore(&self, state: &[u8]) -> Result<(), Fault> {
        self.machine.built().restore_encoded(state)
    }
}

/// Receives the VM; the body of the engine's thread.
pub fn run(machine: &Arc<Machine>, incoming: &Incoming, control: &Control) {
    match receive(machine, incoming, control) {
        Ok(()) => info!(
            migration = incoming.migration,
            "everything is verified and restored"
        ),
        Err(fault) => machine.migration_failed(&incoming.migration, fault),
    }
    machine.engine_ended();
}

fn receive(machine: &Arc<Machine>, incoming: &Incoming, control: &Control) -> Result<(), Fault> {
    if incoming.local {
        return take_over(machine, incoming, control);
    }
    let config = machine.config();
    let credentials = Credentials::load(&config.tls, &config.cluster_id)
        .map_err(|error| Fault::new(error.code(), error.to_string()))?;
    let listener = Listener::bind(incoming.listen_ip)?;
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
    let vm = Target {
        machine,
        memory: Mutex::default(),
    };
    let received = target::run(&vm, stream, admit, &params(config, incoming), control)?;
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
fn take_over(machine: &Arc<Machine>, incoming: &Incoming, control: &Control) -> Result<(), Fault> {
    let config = machine.config();
    let listener = LocalListener::bind(&config.handover_socket())?;
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
