//! What a VMM opens before it gives up the right to open anything ([`crate::sandbox`]).
//!
//! Nothing of it is looked into here: images are parsed, certificates read and the VM built afterwards, by a process that can do little.
//! The exception is a target's host certificate, which is read at once.

use std::fs::File;

use drover_migration::transport::{Listener, LocalListener};
use drover_pki::Credentials;
use drover_proto::{Code, Fault};
use kvm_ioctls::Kvm;

use crate::backing;
use crate::boot::Images;
use crate::config::{Config, Incoming};
use crate::devices::attached::Equipment;
use crate::snapshot;
use crate::uffd::Uffd;

/// `/dev/kvm`.
pub fn kvm() -> Result<Kvm, Fault> {
    Kvm::new().map_err(|error| Fault::new(Code::KvmUnusable, format!("/dev/kvm cannot be opened: {error}")))
}

/// Where a target waits, and what it needs for that.
#[derive(Debug)]
pub enum Waiting {
    /// For another host.
    Host {
        /// This host's identity.
        credentials: Credentials,
        /// What lets it run before its pages are there, or why it cannot.
        uffd: Result<Uffd, Fault>,
        /// The port.
        listener: Listener,
    },
    /// For the VMM before this one, on the same host.
    Local(LocalListener),
}

impl Waiting {
    fn open(config: &Config, incoming: &Incoming) -> Result<Self, Fault> {
        if incoming.local {
            return LocalListener::bind(&config.handover_socket()).map(Self::Local);
        }
        let credentials = Credentials::load(&config.tls, &config.cluster_id)
            .map_err(|error| Fault::new(error.code(), error.to_string()))?;
        let uffd = if incoming.post_copy {
            Uffd::open()
        } else {
            Err(switched_off())
        };
        Ok(Self::Host {
            credentials,
            uffd,
            listener: Listener::bind(incoming.listen_ip)?,
        })
    }
}

fn switched_off() -> Fault {
    Fault::new(
        Code::PostCopyUnavailable,
        "it is switched off on this host (post_copy in its agent's configuration)",
    )
}

/// What the VM is made of.
#[derive(Debug)]
pub struct Parts {
    /// KVM.
    pub kvm: Kvm,
    /// Its memory, unless the VMM before it hands that over.
    pub memory: Option<File>,
    /// What it boots, unless it is received or restored.
    pub images: Option<Images>,
    /// What it is restored from.
    pub snapshot: Option<snapshot::load::Files>,
    /// Its devices.
    pub equipment: Equipment,
}

impl Parts {
    fn open(config: &Config) -> Result<Self, Fault> {
        let local = config.incoming.as_ref().is_some_and(|incoming| incoming.local);
        let kvm = kvm()?;
        let memory = (!local).then(|| backing::create(config.memory_bytes(), config.huge_pages));
        let memory = memory.transpose()?;
        let equipment = config.equipment()?;
        let restore = config.restore.as_ref();
        let snapshot = restore.map(|restore| snapshot::load::Files::open(&restore.folder));
        let boots = config.incoming.is_none() && restore.is_none();
        let images = boots.then(|| Images::open(config));
        Ok(Self {
            kvm,
            memory,
            images: images.transpose()?,
            snapshot: snapshot.transpose()?,
            equipment,
        })
    }
}

/// All that was opened, or why it could not be: that is told to the agent over the control socket.
#[derive(Debug)]
pub struct Opened {
    /// What the VM is made of.
    pub parts: Result<Parts, Fault>,
    /// A target's.
    pub waiting: Option<Result<Waiting, Fault>>,
}

impl Opened {
    /// Opens what `config` names.
    pub fn of(config: &Config) -> Self {
        let parts = Parts::open(config);
        // One that cannot be built waits for nobody.
        let incoming = config.incoming.as_ref().filter(|_| parts.is_ok());
        Self {
            waiting: incoming.map(|incoming| Waiting::open(config, incoming)),
            parts,
        }
    }
}
