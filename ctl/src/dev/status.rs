//! `ctl dev status`: the processes of the development cluster, and whether it works.

use serde::Serialize;

use super::folder::Folder;
use super::{Daemon, Kind, vmms};
use crate::client::{Client, Patience};
use crate::context::Context;
use crate::failure::Result;
use crate::output::{Out, Tabular, print};

/// All of it, for JSON.
#[derive(Serialize)]
struct StatusView {
    dir: String,
    context: String,
    cluster_id: String,
    leader: Option<String>,
    processes: Vec<ProcessView>,
}

/// One process.
#[derive(Serialize)]
struct ProcessView {
    name: String,
    kind: &'static str,
    state: &'static str,
    pid: Option<i32>,
    addr: Option<String>,
    log: String,
    /// Where the log is in the folder, for the table.
    #[serde(skip)]
    log_inside: String,
}

impl Tabular for ProcessView {
    const HEAD: &'static [&'static str] = &["NAME", "KIND", "STATE", "PID", "ADDRESS", "LOG"];

    fn id(&self) -> &str {
        &self.name
    }

    fn row(&self) -> Vec<String> {
        vec![
            self.name.clone(),
            self.kind.to_owned(),
            self.state.to_owned(),
            self.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string()),
            self.addr.clone().unwrap_or_else(|| "-".to_owned()),
            self.log_inside.clone(),
        ]
    }
}

/// Prints the status of the cluster in `folder`.
pub async fn show(folder: &Folder, daemons: &[Daemon], out: Out) -> Result<()> {
    let mut processes: Vec<_> = daemons.iter().map(process).collect();
    for vmm in vmms::running(&folder.root) {
        let log = format!("{}/data/vms/{}/{}/vmm.log", vmm.host, vmm.vm, vmm.instance);
        processes.push(ProcessView {
            name: format!("{} on {} ({})", vmm.vm, vmm.host, vmm.instance),
            kind: "vmm",
            state: "up",
            pid: Some(vmm.process.pid),
            addr: None,
            log: folder.root.join(&log).display().to_string(),
            log_inside: log,
        });
    }
    let view = StatusView {
        dir: folder.root.display().to_string(),
        context: folder.context_file().display().to_string(),
        cluster_id: folder.plan.cluster_id.clone(),
        leader: leader(folder, &processes).await,
        processes,
    };
    if out.json() {
        return out.stream(&view, "");
    }
    if out.quiet {
        return Ok(());
    }
    let leader = view
        .leader
        .as_deref()
        .map_or("no leader".to_owned(), |leader| format!("{leader} leads"));
    print(&format!(
        "cluster {}, {leader}, in {}\n",
        view.cluster_id, view.dir
    ))?;
    out.list(&view.processes)
}

fn process(daemon: &Daemon) -> ProcessView {
    let process = daemon.process();
    ProcessView {
        name: daemon.node.name.clone(),
        kind: match daemon.kind {
            Kind::Controller => "controller",
            Kind::Agent => "agent",
        },
        state: if process.is_some() { "up" } else { "down" },
        pid: process.map(|process| process.pid),
        addr: Some(daemon.node.addr()),
        log: daemon.log().display().to_string(),
        log_inside: format!("{}/daemon.log", daemon.node.name),
    }
}

/// Who leads, if anybody answers at once.
async fn leader(folder: &Folder, processes: &[ProcessView]) -> Option<String> {
    let controllers_up = processes
        .iter()
        .any(|process| process.kind == "controller" && process.pid.is_some());
    if !controllers_up {
        return None;
    }
    let client = Client::new(&Context::load(&folder.context_file()).ok()?).ok()?;
    let cluster = client.cluster(false, Patience::ONE_ROUND).await.ok()?;
    Some(cluster.leader).filter(|leader| !leader.is_empty())
}
