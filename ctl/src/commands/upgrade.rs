//! `ctl vm upgrade`: VMs go on in the VMM that is installed on their host, one after another.
//!
//! Each is a migration from a host to itself, watched and cancelled like any other. The first that does not succeed ends the
//! command: what is wrong with the installed VMM is wrong for the next VM too, and those that are left run on as they are.

use drover_proto::v1;

use super::migrate::{aborted, length_ms, watch};
use super::{Session, dry_run};
use crate::args::UpgradeArgs;
use crate::client::Patience;
use crate::failure::{Failure, Result};
use crate::view::{DryRunView, MigrationView, ReasonView, UpgradeView, VmmView};

/// `ctl vm upgrade …`
pub async fn run(session: &Session, args: &UpgradeArgs) -> Result<()> {
    let options = options(args)?;
    let hosts = session.client.hosts(Patience::default()).await?;
    let mut rows = Vec::new();
    let mut ended = Ok(());
    for vm in chosen(session, args).await? {
        let installed = installed_on(&hosts, &vm);
        let mut row = UpgradeView::new(&vm, installed.as_ref());
        if ended.is_err() {
            row.outcome = "not-tried";
        } else if row.is_up_to_date() && !args.force {
            row.outcome = "up-to-date";
        } else if args.dry_run {
            ended = check(session, &mut row, options).await;
        } else {
            ended = upgrade(session, &mut row, options).await;
        }
        if session.out.talkative() {
            session.out.remark(&row.sentence());
        }
        rows.push(row);
    }
    session.out.list(&rows)?;
    ended
}

fn options(args: &UpgradeArgs) -> Result<v1::MigrationOptions> {
    Ok(v1::MigrationOptions {
        max_downtime_ms: length_ms("max-downtime", args.max_downtime)?,
        deadline_ms: length_ms("deadline", args.deadline)?,
        ..Default::default()
    })
}

/// The VMs that were named, each once and whatever their state; or those that run, of a host or of all.
async fn chosen(session: &Session, args: &UpgradeArgs) -> Result<Vec<v1::Vm>> {
    if args.vms.is_empty() {
        if let Some(host) = &args.host {
            session.client.host(host).await?;
        }
        let vms = session.client.vms(Patience::default()).await?;
        let runs_there = |vm: &v1::Vm| {
            vm.state() == v1::VmState::Running && (args.host.is_none() || host_of(vm) == args.host.as_deref())
        };
        return Ok(vms.into_iter().filter(runs_there).collect());
    }
    let mut vms = Vec::new();
    for (at, name) in args.vms.iter().enumerate() {
        if !args.vms[..at].contains(name) {
            vms.push(session.client.vm(name).await?);
        }
    }
    Ok(vms)
}

fn host_of(vm: &v1::Vm) -> Option<&str> {
    vm.placement.as_ref().map(|placement| placement.host.as_str())
}

fn installed_on(hosts: &[v1::Host], vm: &v1::Vm) -> Option<v1::VmmBuild> {
    let mut specs = hosts.iter().filter_map(|host| host.spec.as_ref());
    specs
        .find(|spec| Some(spec.name.as_str()) == host_of(vm))?
        .vmm
        .clone()
}

async fn check(session: &Session, row: &mut UpgradeView, options: v1::MigrationOptions) -> Result<()> {
    let view = DryRunView::from(session.client.check_upgrade(&row.vm, options).await?);
    row.outcome = if view.works { "would-upgrade" } else { "refused" };
    row.reason.clone_from(&view.refusal);
    let verdict = dry_run::verdict(&view);
    row.findings = view.findings;
    verdict
}

async fn upgrade(session: &Session, row: &mut UpgradeView, options: v1::MigrationOptions) -> Result<()> {
    let planned = match session.client.upgrade(&row.vm, options).await {
        Ok(planned) => planned,
        Err(failure) => {
            row.outcome = "refused";
            row.reason = Some(reason_of(&failure));
            return Err(failure);
        }
    };
    row.migration = Some(planned.id.clone());
    let (ended, cancelled) = watch(session, MigrationView::from(planned)).await?;
    row.blackout_us = ended.receipt.as_ref().map(|receipt| receipt.blackout_us.total);
    row.reason.clone_from(&ended.reason);
    if ended.phase != "done" {
        row.outcome = "aborted";
        return Err(aborted(&ended, cancelled));
    }
    row.outcome = "upgraded";
    // What it runs in now is a matter of record; that it runs is known already.
    if let Ok(vm) = session.client.vm(&row.vm).await {
        row.now = vm.vmm.map(VmmView::from);
    }
    Ok(())
}

fn reason_of(failure: &Failure) -> ReasonView {
    ReasonView {
        code: failure.code.clone(),
        message: failure.message.clone(),
    }
}
