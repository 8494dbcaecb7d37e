//! The cluster's forming, and hosts: registered, declared down, up again.
//!
//! A host that is down has, by the lease, no VMM that executes: its VMs become UNKNOWN, and one that was being stopped
//! is stopped by that. What a host's reboot means is known here too: none of its VMMs can have outlived it. A boot that
//! was left is never come back to: what still names it was sent before the reboot, and is refused.

use drover_proto::v1::{CommandResponse, Host, HostDown, HostSpec, HostState, HostUp, InitCluster, VmState};
use drover_proto::{Code, Fault};

use super::{Applied, Tx, reason};
use crate::limits::{EARLIER_BOOTS_MAX, HOSTS_MAX, TEXT_BYTES_MAX};
use crate::state::{epoch_of, host_of};
use crate::validate;

impl Tx<'_> {
    pub(super) fn init_cluster(&mut self, init: &InitCluster) -> Applied {
        if self.state.cluster_id == init.cluster_id && !init.cluster_id.is_empty() {
            return Ok(CommandResponse {
                current: true,
                ..CommandResponse::default()
            });
        }
        if !self.state.cluster_id.is_empty() {
            let message = format!(
                "cluster_id is {}; this cluster was formed as {}",
                validate::quoted(&init.cluster_id),
                validate::quoted(&self.state.cluster_id)
            );
            return Err(Fault::new(Code::InvalidArgument, message).field("cluster_id"));
        }
        validate::name("cluster_id", &init.cluster_id)?;
        self.state.settings = validate::settings(init.settings.as_ref())?;
        self.state.cluster_id.clone_from(&init.cluster_id);
        self.event(
            "cluster.formed",
            format!("cluster/{}", init.cluster_id),
            "the cluster was formed".to_owned(),
        );
        Ok(CommandResponse {
            current: true,
            ..CommandResponse::default()
        })
    }

    pub(super) fn register_host(&mut self, spec: &HostSpec) -> Applied {
        let spec = validate::host_spec(spec)?;
        let name = spec.name.clone();
        let Some(host) = self.state.hosts.get_mut(&name) else {
            if self.state.hosts.len() >= HOSTS_MAX {
                let message =
                    format!("spec.name is {name}; the cluster has {HOSTS_MAX} hosts, which is all it takes");
                return Err(Fault::new(Code::InvalidArgument, message).field("spec.name"));
            }
            let mut host = Host {
                spec: Some(spec),
                registered_ms: self.now_ms,
                changed_ms: self.now_ms,
                ..Host::default()
            };
            host.set_state(HostState::Up);
            self.state.hosts.insert(name.clone(), host);
            self.event(
                "host.registered",
                format!("host/{name}"),
                format!("{name} joined"),
            );
            return Ok(self.host_response(&name));
        };
        if host.spec.as_ref() == Some(&spec) {
            return Ok(self.host_response(&name));
        }
        let rebooted = reboots(host, &name, "spec.boot_id", &spec.boot_id)?;
        host.spec = Some(spec);
        host.changed_ms = self.now_ms;
        self.event(
            "host.changed",
            format!("host/{name}"),
            format!("{name} reports other properties"),
        );
        if rebooted {
            self.host_rebooted(&name);
        }
        Ok(self.host_response(&name))
    }

    pub(super) fn host_down(&mut self, down: &HostDown) -> Applied {
        let now_ms = self.now_ms;
        let host = self.known_host(&down.host)?;
        if host.state() == HostState::Down {
            return Ok(self.host_response(&down.host));
        }
        host.set_state(HostState::Down);
        host.changed_ms = now_ms;
        let message = format!("{} is declared down: its lease ran out", down.host);
        self.event("host.down", format!("host/{}", down.host), message);
        for name in self.vms_on(&down.host) {
            match self.vm_mut(&name).state() {
                VmState::Starting | VmState::Running | VmState::Paused => {
                    let why = reason(Code::HostDown, format!("{} is declared down", down.host));
                    self.fail_snapshot_of(&name, why.clone());
                    self.set_vm_state(&name, VmState::Unknown, Some(why));
                    self.vm_event(
                        "vm.unknown",
                        &name,
                        format!("{name}: its host {} is declared down", down.host),
                    );
                }
                VmState::Stopping => self.run_is_over(&name, "its host is declared down"),
                _ => {}
            }
        }
        Ok(self.host_response(&down.host))
    }

    pub(super) fn host_up(&mut self, up: &HostUp) -> Applied {
        let now_ms = self.now_ms;
        let host = self.known_host(&up.host)?;
        let rebooted = reboots(host, &up.host, "boot_id", &up.boot_id)?;
        if let Some(spec) = host.spec.as_mut()
            && !up.boot_id.is_empty()
        {
            spec.boot_id.clone_from(&up.boot_id);
        }
        let was_down = host.state() == HostState::Down;
        if was_down {
            host.set_state(HostState::Up);
            host.changed_ms = now_ms;
            self.event(
                "host.up",
                format!("host/{}", up.host),
                format!("{} is up again", up.host),
            );
        }
        if rebooted {
            self.host_rebooted(&up.host);
        }
        if was_down {
            for name in self.vms_on(&up.host) {
                let vm = self.vm_mut(&name);
                if vm.state() == VmState::Unknown {
                    // Seen running at this epoch, it goes on with the host's first lease; its agent says if not.
                    let seen = vm.seen_epoch == epoch_of(vm);
                    self.set_vm_state(
                        &name,
                        if seen { VmState::Running } else { VmState::Starting },
                        None,
                    );
                    self.vm_event(
                        "vm.resumed",
                        &name,
                        format!("{name}: its host {} is up again", up.host),
                    );
                }
            }
        }
        Ok(self.host_response(&up.host))
    }

    /// No process outlives its host's kernel: every run that was committed for the host is over.
    fn host_rebooted(&mut self, host: &str) {
        self.event(
            "host.rebooted",
            format!("host/{host}"),
            format!("{host} runs a new kernel: its VMs are gone"),
        );
        for name in self.vms_on(host) {
            match self.vm_mut(&name).state() {
                VmState::Starting | VmState::Running | VmState::Paused | VmState::Unknown => {
                    self.run_failed(&name, reason(Code::VmmDied, format!("{host} was restarted")));
                }
                VmState::Stopping => self.run_is_over(&name, "its host was restarted"),
                _ => {}
            }
        }
    }

    fn known_host(&mut self, name: &str) -> Result<&mut Host, Fault> {
        self.state.hosts.get_mut(name).ok_or_else(|| {
            let message = format!(
                "host is {}; no host of this name is registered",
                validate::quoted(name)
            );
            Fault::new(Code::HostNotFound, message).field("host")
        })
    }

    fn vms_on(&self, host: &str) -> Vec<String> {
        self.state
            .vms
            .iter()
            .filter(|(_, vm)| host_of(vm) == host)
            .map(|(name, _)| name.clone())
            .collect()
    }

    fn host_response(&self, name: &str) -> CommandResponse {
        CommandResponse {
            host: self.state.host(name).cloned(),
            current: true,
            ..CommandResponse::default()
        }
    }
}

/// Whether the host, known as it was, runs another boot `now`; then its last one is remembered as left. Refuses a boot that
/// it left before.
fn reboots(host: &mut Host, name: &str, field: &str, now: &str) -> Result<bool, Fault> {
    let refused = |why: String| {
        let message = format!("{field} is {}; {why}", validate::quoted(now));
        Err(Fault::new(Code::InvalidArgument, message).field(field))
    };
    if now.len() > TEXT_BYTES_MAX {
        return refused(format!("at most {TEXT_BYTES_MAX} bytes are possible"));
    }
    if host.earlier_boot_ids.iter().any(|earlier| earlier == now) {
        return refused(format!(
            "{name} was restarted since: this was sent before, and counts no more"
        ));
    }
    let known = host.spec.as_ref().map_or("", |spec| spec.boot_id.as_str());
    if known.is_empty() || now.is_empty() || known == now {
        return Ok(false);
    }
    let known = known.to_owned();
    host.earlier_boot_ids.push(known);
    let excess = host.earlier_boot_ids.len().saturating_sub(EARLIER_BOOTS_MAX);
    host.earlier_boot_ids.drain(..excess);
    Ok(true)
}
