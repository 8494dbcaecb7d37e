//! What is looked at before a VM is moved: the plan of a migration and its dry run ask the same, so that a dry run that
//! finds nothing is a plan that is not refused, as long as nothing changes in between.
//!
//! The plan is refused by the first finding that is against it; the dry run shows them all. What is found later, when
//! the two VMMs talk to each other, is not known here.

use drover_proto::v1::{Host, MigrationOptions, PlanMigration, Vm, VmState};
use drover_proto::{Code, Fault};

use crate::apply::{not_taken, unfit};
use crate::placement::{self, Purpose};
use crate::state::{State, commit_us, host_of, pause_us, spec_of, state_us};
use crate::validate::{self, quoted};

/// The finding that refuses nothing: where post-copy cannot be, a migration that allows it is one of pre-copy only.
const POST_COPY: &str = "post_copy";

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Its stable name: `options`, `migration`, `state`, `target`, `other_host`, `host_up`, `memory`, `vcpus`, `images`,
    /// `cpu`, `device_model`, `post_copy`, `pools` of a VM with disks, `networks` of one with NICs, `snapshot` of one of which one is being taken; of an upgrade besides: `installed`, `running`.
    pub check: &'static str,
    /// What was found, for people, or what refuses the migration.
    pub outcome: Result<String, Fault>,
}

/// All that was looked at, in the order in which a plan is refused.
#[derive(Clone, Debug, PartialEq)]
pub struct Preflight {
    /// The host that the VM is on; empty when it was never placed.
    pub from: String,
    /// The host that it would go to: the one that was named, or placement's choice; empty when there is none.
    pub to: String,
    /// What was asked for, with the cluster's defaults filled in; as it was asked for where that is out of bounds.
    pub options: MigrationOptions,
    /// See the type.
    pub findings: Vec<Finding>,
}

impl Preflight {
    /// What refuses the migration first, if anything does.
    pub fn refusal(&self) -> Option<&Fault> {
        self.findings
            .iter()
            .filter(|finding| finding.check != POST_COPY)
            .find_map(|finding| finding.outcome.as_ref().err())
    }

    /// Why a post-copy that is allowed is not possible.
    pub fn no_post_copy(&self) -> Option<&Fault> {
        self.findings.iter().find_map(|finding| {
            finding
                .outcome
                .as_ref()
                .err()
                .filter(|_| finding.check == POST_COPY)
        })
    }

    fn note(&mut self, check: &'static str, outcome: Result<String, Fault>) {
        self.findings.push(Finding { check, outcome });
    }
}

/// Looks at everything that `plan` needs.
///
/// # Errors
/// `vm_not_found`: there is nothing to look at.
pub fn preflight(state: &State, plan: &PlanMigration) -> Result<Preflight, Fault> {
    let vm = state.vm(&plan.vm).ok_or_else(|| {
        Fault::new(
            Code::VmNotFound,
            format!("vm is {}; no VM has this name", quoted(&plan.vm)),
        )
        .field("vm")
    })?;
    let validated = if plan.upgrade {
        validate::upgrade_options
    } else {
        validate::options
    };
    let mut options = validated(plan.options.as_ref(), &state.settings);
    if let Ok(options) = &mut options {
        options.commit_us = commit_us(state);
        options.pause_us = pause_us(state);
        options.state_us = state_us(state);
    }
    let mut found = Preflight {
        from: host_of(vm).to_owned(),
        to: plan.to.clone(),
        options: match &options {
            Ok(options) => *options,
            Err(_) => plan.options.unwrap_or_default(),
        },
        findings: Vec::new(),
    };
    let within = "are within their bounds".to_owned();
    found.note("options", options.map(|_| within));
    found.note("migration", not_moving(vm, &plan.vm));
    if let Err(taken) = not_taken("vm", vm) {
        found.note("snapshot", Err(taken));
    }
    found.note("state", running(vm, &plan.vm));
    if plan.upgrade {
        upgrade(state, vm, &plan.vm, &mut found);
    } else if plan.to.is_empty() {
        choose(state, vm, &mut found);
    } else {
        named(state, vm, &plan.vm, &mut found);
    }
    post_copy(state, &mut found);
    Ok(found)
}

/// Whether the target can do what is allowed.
fn post_copy(state: &State, found: &mut Preflight) {
    let Some(host) = state.host(&found.to).filter(|_| found.options.allow_postcopy) else {
        return;
    };
    let to = &found.to;
    let outcome = match post_copy_obstacle(host) {
        None => Ok(format!("{to} can take a VM by post-copy")),
        Some(why) => Err(Fault::new(
            Code::PostCopyUnavailable,
            format!("{to} cannot take a VM by post-copy, so it is pre-copy only: {why}"),
        )
        .field("to")),
    };
    found.note(POST_COPY, outcome);
}

/// Why the host cannot take a VM by post-copy, as far as it is known; one that does not say may find out when it is asked to.
pub fn post_copy_obstacle(host: &Host) -> Option<&str> {
    let told = host.spec.as_ref().map_or("", |spec| spec.post_copy.as_str());
    Some(told).filter(|told| !matches!(*told, "" | "ok"))
}

fn not_moving(vm: &Vm, name: &str) -> Result<String, Fault> {
    if vm.migration.is_empty() {
        return Ok(format!("{name} is not being moved"));
    }
    let message = format!("{name} is being moved by migration {} already", vm.migration);
    Err(Fault::new(Code::MigrationActive, message).field("vm"))
}

fn running(vm: &Vm, name: &str) -> Result<String, Fault> {
    if vm.state() == VmState::Running && vm.wanted_running && !vm.deleting {
        return Ok(format!("{name} is running on {}", host_of(vm)));
    }
    Err(unfit(name, vm, "only one that runs can be moved live"))
}

/// No target was named: the best, and what speaks for it.
fn choose(state: &State, vm: &Vm, found: &mut Preflight) {
    let from = found.from.clone();
    match placement::choose(state, spec_of(vm), Purpose::Migrate { from: &from }) {
        Ok(to) => {
            found.note("target", Ok(format!("{to} is the best of the hosts that fit")));
            if let Some(host) = state.host(&to) {
                for (check, outcome) in placement::target_checks(state, spec_of(vm), &from, host) {
                    found.note(check, outcome.map(|good| format!("{to} {good}")));
                }
            }
            found.to = to;
        }
        Err(fault) => found.note("target", Err(fault.field("to"))),
    }
}

/// The target is the VM's own host, and a VMM of the version that is installed there. Memory and vCPUs are not asked for: the two
/// VMMs have one memory, and never run at the same time.
fn upgrade(state: &State, vm: &Vm, name: &str, found: &mut Preflight) {
    let (from, to) = (found.from.clone(), found.to.clone());
    let refused = |code, field, message: String| Err(Fault::new(code, message).field(field));
    if to != from {
        let message = format!(
            "to is {}; an upgrade stays on {name}'s host, {from:?}",
            quoted(&to)
        );
        return found.note("target", refused(Code::InvalidArgument, "to", message));
    }
    let Some(host) = state.host(&from) else {
        let message = format!("{name} is on no host: only a VM that runs has a VMM to be replaced");
        return found.note("target", refused(Code::VmState, "vm", message));
    };
    found.note("target", Ok(format!("{name} stays on {from}")));
    found.note(
        "host_up",
        if state.host_is_up(&from) {
            Ok(format!("{from} is up"))
        } else {
            let message = format!("{name} is on {from}, which is declared down");
            refused(Code::HostDown, "vm", message)
        },
    );
    let installed = host.spec.as_ref().and_then(|spec| spec.vmm.as_ref());
    found.note(
        "installed",
        match installed {
            Some(build) => Ok(format!("{from} has VMM {build} installed")),
            None => {
                let message = format!(
                    "{from}'s agent names no installed VMM: its program does not answer --version, or the agent is too old for upgrades"
                );
                refused(Code::VmmStartFailed, "vm", message)
            }
        },
    );
    found.note(
        "running",
        match &vm.vmm {
            Some(build) if Some(build) == installed => Ok(format!("{name} runs in VMM {build}, the installed one")),
            Some(build) => Ok(format!("{name} runs in VMM {build}, which hands over to another")),
            None => {
                let message = format!(
                    "{name} runs in a VMM that has not said which it is: one that old hands over to another host only"
                );
                refused(Code::ProtocolVersion, "vm", message)
            }
        },
    );
}

/// The target was named: everything about it.
fn named(state: &State, vm: &Vm, name: &str, found: &mut Preflight) {
    let (from, to) = (found.from.clone(), found.to.clone());
    let refused = |code, message: String| Err(Fault::new(code, message).field("to"));
    let Some(host) = state.host(&to) else {
        let message = format!("to is {}; no host of this name is registered", quoted(&to));
        return found.note("target", refused(Code::HostNotFound, message));
    };
    found.note("target", Ok(format!("{to} is registered")));
    if to == from {
        let message = format!(
            "to is {to}; {name} is there already: `ctl vm upgrade {name}` replaces its VMM there by the installed one"
        );
        return found.note("other_host", refused(Code::SameHost, message));
    }
    found.note("other_host", Ok(format!("{to} is another host than {from}")));
    found.note(
        "host_up",
        if state.host_is_up(&to) {
            Ok(format!("{to} is up"))
        } else {
            refused(Code::HostDown, format!("to is {to}, which is declared down"))
        },
    );
    for (check, outcome) in placement::target_checks(state, spec_of(vm), &from, host) {
        let outcome = match outcome {
            Ok(good) => Ok(format!("{to} {good}")),
            Err(fault) => refused(
                Code::NoHostFits,
                format!("{to} cannot take {name}: {to} {}", fault.message),
            ),
        };
        found.note(check, outcome);
    }
}
