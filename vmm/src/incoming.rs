//! The target's glue: this VM as the engine's [`TargetVm`], and the one connection it waits for.
//!
//! What was received runs by a grant for this VMM's epoch and by nothing else. A VMM whose receiving failed stays, with
//! the reason, until it is destroyed; it never receives again, and nothing ever runs in it.

use drover_migration::Control;
use drover_migration::target::{self, Admission, Params};
use drover_migration::transport::{LINK_TIMEOUT, Listener};
use drover_migration::vm::{Layout, TargetVm};
use drover_pki::{CertificateDer, Credentials, Role, identity_of};
use drover_proto::{Code, Fault};
use tracing::info;

use crate::DEVICE_MODEL;
use crate::config::Incoming;
use crate::machine::Machine;

struct Target<'a>(&'a Machine);

impl TargetVm for Target<'_> {
    fn layout(&self) -> Layout {
        self.0.built().memory().layout().clone()
    }

    fn write_pages(&self, first: u64, data: &[u8]) -> Result<(), Fault> {
        self.0.built().memory().write_pages(first, data)
    }

    fn read_back(&self, first: u64, out: &mut [u8]) -> Result<(), Fault> {
        self.0.built().memory().read_pages(first, out)
    }

    fn zero_pages(&self, first: u64, count: u64) -> Result<(), Fault> {
        self.0.built().memory().zero_pages(first, count)
    }

    fn restore(&self, state: &[u8]) -> Result<(), Fault> {
        self.0.built().restore_encoded(state)
    }
}

/// Receives the VM; the body of the engine's thread.
pub fn run(machine: &Machine, incoming: &Incoming, control: &Control) {
    if let Err(fault) = receive(machine, incoming, control) {
        machine.migration_failed(&incoming.migration, fault);
    }
    machine.engine_ended();
}

fn receive(machine: &Machine, incoming: &Incoming, control: &Control) -> Result<(), Fault> {
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
    let params = Params {
        migration: incoming.migration.clone(),
        vm: config.vm.clone(),
        from_host: incoming.from_host.clone(),
        epoch: config.epoch,
        device_model: DEVICE_MODEL,
        cpu_profile: config.cpu_profile.name().to_owned(),
        plaintext: incoming.plaintext,
        link_timeout: LINK_TIMEOUT,
    };
    let received = target::run(&Target(machine), stream, admit, &params, control)?;
    machine.received(received)?;
    info!(
        migration = incoming.migration,
        "everything is verified and restored"
    );
    Ok(())
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
