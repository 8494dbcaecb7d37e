//! `ctl dev`: a whole cluster on this machine, three controllers and three hosts, in one folder.
//!
//! The processes are the real ones with real certificates; only the machine is shared. `up` starts whatever is missing
//! and waits until there is a leader and every host is up. `down` ends it all, VMMs too: they outlive their agents, so
//! they are found on their own. Neither ever signals a process that is not surely ours.

mod folder;
mod process;
mod spawn;
mod status;
mod vmms;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use drover_proto::v1;

use self::folder::{Folder, Node, dev, write_json};
use self::process::ProcessId;
use self::spawn::Log;
use crate::args::{DevCommand, NamedImage, StateDir};
use crate::client::{Client, Patience};
use crate::context::{self, Context};
use crate::failure::{Exit, Failure, Result};
use crate::output::Out;

/// Between two looks at a cluster that comes up.
const POLL: Duration = Duration::from_millis(200);
/// A daemon that has not ended so long after SIGTERM is killed.
const GRACE: Duration = Duration::from_secs(5);
/// How long VMs may take to stop through the API, before their VMMs are ended.
const VMS_STOP_WITHIN: Duration = Duration::from_secs(15);
/// How long `down` waits for a leader that could stop the VMs.
const DOWN_PATIENCE: Patience = Patience {
    no_leader: Duration::from_secs(5),
    gone: Duration::ZERO,
};

/// `ctl dev …`
pub async fn run(command: &DevCommand, out: Out) -> Result<()> {
    match command {
        DevCommand::Up { dir, images, timeout } => up(&root(dir)?, images, *timeout, out).await,
        DevCommand::Down { dir, purge } => down(&root(dir)?, *purge, out).await,
        DevCommand::Status { dir } => {
            let folder = existing(&root(dir)?)?;
            status::show(&folder, &daemons(&folder), out).await
        }
    }
}

fn root(dir: &StateDir) -> Result<PathBuf> {
    match &dir.state_dir {
        Some(dir) => Ok(dir.clone()),
        None => context::default_dev_dir(context::env_path),
    }
}

fn existing(root: &Path) -> Result<Folder> {
    Folder::open(root)?.ok_or_else(|| {
        let message = format!(
            "no development cluster in {}: `ctl dev up` makes one",
            root.display()
        );
        Failure::new(Exit::NotFound, "dev", message)
    })
}

/// What a daemon is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Controller,
    Agent,
}

impl Kind {
    fn program(self) -> &'static str {
        match self {
            Self::Controller => "drover-controller",
            Self::Agent => "drover-agent",
        }
    }
}

/// A daemon of the cluster, running or not.
struct Daemon {
    kind: Kind,
    node: Node,
    dir: PathBuf,
}

fn daemons(folder: &Folder) -> Vec<Daemon> {
    let daemon = |kind| {
        move |node: &Node| Daemon {
            kind,
            node: node.clone(),
            dir: folder.of(&node.name),
        }
    };
    let controllers = folder.plan.controllers.iter().map(daemon(Kind::Controller));
    controllers
        .chain(folder.plan.hosts.iter().map(daemon(Kind::Agent)))
        .collect()
}

impl Daemon {
    fn config(&self) -> PathBuf {
        self.dir.join("config.json")
    }

    fn log(&self) -> PathBuf {
        self.dir.join("daemon.log")
    }

    /// The process, if it lives: the one that was recorded, else one with our configuration.
    fn process(&self) -> Option<ProcessId> {
        let recorded = fs::read(self.dir.join("daemon.json")).ok();
        recorded
            .and_then(|json| serde_json::from_slice::<ProcessId>(&json).ok())
            .filter(ProcessId::alive)
            .or_else(|| {
                let config = self.config();
                process::find(self.kind.program(), |path| path == config)
                    .pop()
                    .map(|found| found.process)
            })
    }

    fn start(&self, program: &Path) -> Result<Started> {
        let failed = |error| {
            Failure::io(
                format!("cannot start {} ({})", self.node.name, program.display()),
                &error,
            )
        };
        let (child, log) = spawn::detached(program, &self.config(), &self.log()).map_err(failed)?;
        let pid = i32::try_from(child.id()).unwrap_or(0);
        if let Some(process) = ProcessId::of(pid) {
            write_json(&self.dir.join("daemon.json"), &serde_json::json!(process))?;
        }
        Ok(Started {
            name: self.node.name.clone(),
            child,
            log,
        })
    }
}

/// A daemon that this `up` started.
struct Started {
    name: String,
    child: Child,
    log: Log,
}

impl Started {
    /// An error when it has ended.
    fn check(&mut self) -> Result<()> {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => Err(dev(format!(
                "{} ended ({status}); its log, {}, says:\n{}",
                self.name,
                self.log.path.display(),
                self.log.tail()
            ))),
            Err(error) => Err(Failure::io(&self.name, &error)),
        }
    }
}

async fn up(root: &Path, images: &[NamedImage], timeout: Duration, out: Out) -> Result<()> {
    let programs = Programs::locate()?;
    if let Err(error) = fs::File::options().read(true).write(true).open("/dev/kvm") {
        out.remark(&format!(
            "warning: cannot open /dev/kvm ({error}): VMs will not start"
        ));
    }
    let lock = Folder::lock(root)?;
    let folder = Folder::open_or_create(root)?;
    folder.prepare(&programs.vmm)?;
    let built = probe_image().filter(|probe| images.iter().all(|image| image.name != probe.name));
    let images: Vec<_> = images.iter().cloned().chain(built).collect();
    for image in &images {
        if folder.install_image(image)? {
            out.remark(&format!("image {} from {}", image.name, image.path.display()));
        }
    }
    let daemons = daemons(&folder);
    let mut started = Vec::new();
    for daemon in daemons.iter().filter(|daemon| daemon.process().is_none()) {
        started.push(daemon.start(programs.of(daemon.kind))?);
    }
    if !started.is_empty() {
        let names: Vec<_> = started.iter().map(|started| started.name.as_str()).collect();
        out.remark(&format!("started {}", names.join(" ")));
    }
    ready(&folder, &images, &mut started, timeout, out).await?;
    drop(lock);
    status::show(&folder, &daemons, out).await?;
    if context::default_dev_dir(context::env_path).ok().as_deref() != Some(&folder.root) {
        let hint = format!(
            "\nuse it by: export {}={}",
            context::DEV_DIR_VAR,
            folder.root.display()
        );
        out.remark(&hint);
    }
    Ok(())
}

/// Waits until the cluster has a leader and every host is up and has the images; fails at once when a daemon ends.
async fn ready(
    folder: &Folder,
    images: &[NamedImage],
    started: &mut [Started],
    timeout: Duration,
    out: Out,
) -> Result<()> {
    tokio::select! {
        outcome = watch(folder, images, timeout, out) => outcome?,
        failure = death(started) => return Err(failure),
        _ = tokio::signal::ctrl_c() => {
            return Err(Failure::interrupted("stopped waiting; the daemons run on, `ctl dev down` ends them"));
        }
    }
    started.iter_mut().try_for_each(Started::check)
}

/// Resolves when a daemon has ended.
async fn death(started: &mut [Started]) -> Failure {
    loop {
        if let Err(failure) = started.iter_mut().try_for_each(Started::check) {
            return failure;
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Tells how far the cluster is until it is ready.
async fn watch(folder: &Folder, images: &[NamedImage], timeout: Duration, out: Out) -> Result<()> {
    let client = Client::new(&Context::load(&folder.context_file())?)?;
    let until = Instant::now() + timeout;
    let mut told = String::new();
    loop {
        let (ready, state) = look(&client, folder, images).await;
        if ready {
            return Ok(());
        }
        if state != told {
            out.remark(&state);
            told = state;
        }
        if Instant::now() >= until {
            let message = format!("the cluster is not ready after {} s: {told}", timeout.as_secs());
            return Err(Failure::timed_out(message));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Whether the cluster is ready, and where it stands.
async fn look(client: &Client, folder: &Folder, images: &[NamedImage]) -> (bool, String) {
    let leader = match client.cluster(false, Patience::ONE_ROUND).await {
        Ok(cluster) if !cluster.leader.is_empty() => cluster.leader,
        _ => return (false, "waiting for a leader".to_owned()),
    };
    let hosts = client.hosts(Patience::ONE_ROUND).await.unwrap_or_default();
    let up = hosts.iter().filter(|host| host.state() == v1::HostState::Up);
    let equipped = |host: &&v1::Host| images.iter().all(|image| folder.has_image(host, &image.name));
    let (up, equipped, want) = (
        up.clone().count(),
        up.filter(equipped).count(),
        folder.plan.hosts.len(),
    );
    (
        equipped >= want,
        format!("{leader} leads, {up} of {want} hosts up, {equipped} with all images"),
    )
}

async fn down(root: &Path, purge: bool, out: Out) -> Result<()> {
    let folder = existing(root)?;
    let lock = Folder::lock(root)?;
    let daemons = daemons(&folder);
    let alive = |kind| {
        daemons
            .iter()
            .filter(move |d| d.kind == kind)
            .filter_map(Daemon::process)
            .collect::<Vec<_>>()
    };
    let (controllers, agents) = (alive(Kind::Controller), alive(Kind::Agent));
    if !controllers.is_empty()
        && !agents.is_empty()
        && let Err(failure) = stop_vms(&folder, out).await
    {
        out.remark(&format!(
            "VMs were not stopped through the cluster ({failure}); ending their VMMs"
        ));
    }
    // Agents first, so that none starts what is about to be ended.
    let mut left = process::end(&agents, GRACE);
    let vmms: Vec<_> = vmms::running(&folder.root)
        .into_iter()
        .map(|vmm| vmm.process)
        .collect();
    left.extend(process::end(&vmms, GRACE));
    left.extend(process::end(&controllers, GRACE));
    if let Some(process) = left.first() {
        return Err(dev(format!(
            "process {} does not end, even when killed: see its state in /proc",
            process.pid
        )));
    }
    let ended = serde_json::json!({
        "controllers": controllers.len(), "hosts": agents.len(), "vmms_ended": vmms.len(), "purged": purge,
    });
    let counts = format!(
        "ended {} controllers, {} hosts, {} VMMs",
        controllers.len(),
        agents.len(),
        vmms.len()
    );
    if purge {
        fs::remove_dir_all(&folder.root).map_err(|error| Failure::io(folder.root.display(), &error))?;
    }
    drop(lock);
    let kept = if purge { "removed" } else { "kept" };
    out.done(&ended, &format!("{counts}; {} is {kept}", folder.root.display()))
}

/// Stops every VM through the cluster, so that it knows; bounded.
async fn stop_vms(folder: &Folder, out: Out) -> Result<()> {
    let client = Client::new(&Context::load(&folder.context_file())?)?;
    let until = Instant::now() + VMS_STOP_WITHIN;
    let wanted: Vec<_> = client
        .vms(DOWN_PATIENCE)
        .await?
        .into_iter()
        .filter(|vm| vm.wanted_running)
        .filter_map(|vm| vm.spec)
        .collect();
    if wanted.is_empty() {
        return Ok(());
    }
    let names: Vec<_> = wanted.iter().map(|spec| spec.name.as_str()).collect();
    out.remark(&format!("stopping {}", names.join(" ")));
    for spec in &wanted {
        client.stop_vm(&spec.name).await?;
    }
    while Instant::now() < until {
        let vms = client.vms(DOWN_PATIENCE).await?;
        let stopped = |vm: &v1::Vm| matches!(vm.state(), v1::VmState::Stopped | v1::VmState::Failed);
        if vms.iter().all(stopped) {
            return Ok(());
        }
        tokio::time::sleep(POLL).await;
    }
    Err(Failure::timed_out(format!(
        "not stopped within {} s",
        VMS_STOP_WITHIN.as_secs()
    )))
}

/// The daemons' programs.
struct Programs {
    controller: PathBuf,
    agent: PathBuf,
    vmm: PathBuf,
}

impl Programs {
    /// Finds them beside `ctl`, else on PATH.
    fn locate() -> Result<Self> {
        let mut folders: Vec<_> = own_folder().into_iter().collect();
        folders.extend(std::env::var_os("PATH").iter().flat_map(std::env::split_paths));
        let program = |name: &str| {
            locate(name, &folders).ok_or_else(|| {
                dev(format!("{name} is neither beside ctl nor on PATH: build it, by `cargo build` in the source folder"))
            })
        };
        Ok(Self {
            controller: program(Kind::Controller.program())?,
            agent: program(Kind::Agent.program())?,
            vmm: program("drover-vmm")?,
        })
    }

    fn of(&self, kind: Kind) -> &Path {
        match kind {
            Kind::Controller => &self.controller,
            Kind::Agent => &self.agent,
        }
    }
}

fn own_folder() -> Option<PathBuf> {
    std::env::current_exe().ok()?.parent().map(Path::to_owned)
}

fn locate(name: &str, folders: &[PathBuf]) -> Option<PathBuf> {
    use std::os::unix::fs::PermissionsExt;
    let runnable = |path: &PathBuf| {
        fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    };
    folders
        .iter()
        .filter(|folder| folder.is_absolute())
        .map(|folder| folder.join(name))
        .find(runnable)
}

/// The probe guest, where the build puts it: `target/guest/probe`, seen from `target/<profile>/ctl`.
fn probe_image() -> Option<NamedImage> {
    let path = own_folder()?.parent()?.join("guest/probe");
    path.is_file().then(|| NamedImage {
        name: "probe".to_owned(),
        path,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_the_first_that_can_be_run() {
        use std::os::unix::fs::PermissionsExt;
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let folders = [one.path().to_owned(), two.path().to_owned()];
        fs::write(one.path().join("drover-vmm"), "").unwrap();
        fs::write(two.path().join("drover-vmm"), "").unwrap();
        assert_eq!(locate("drover-vmm", &folders), None);
        fs::set_permissions(two.path().join("drover-vmm"), fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(
            locate("drover-vmm", &folders),
            Some(two.path().join("drover-vmm"))
        );
    }

    #[test]
    fn a_cluster_has_three_controllers_and_three_hosts_and_none_runs_before_up() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::open_or_create(&dir.path().join("dev")).unwrap();
        let daemons = daemons(&folder);
        let names: Vec<_> = daemons.iter().map(|daemon| daemon.node.name.as_str()).collect();
        assert_eq!(names, ["c1", "c2", "c3", "host1", "host2", "host3"]);
        assert!(daemons.iter().all(|daemon| daemon.process().is_none()));
    }

    #[test]
    fn a_daemon_that_dies_is_reported_with_its_last_words() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("daemon");
        fs::write(&program, "#!/bin/sh\necho port is taken >&2\nexit 3\n").unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let node = Node {
            name: "c1".to_owned(),
            port: 1,
        };
        let daemon = Daemon {
            kind: Kind::Controller,
            node,
            dir: dir.path().to_owned(),
        };
        let mut started = daemon.start(&program).unwrap();
        started.child.wait().unwrap();
        let failure = started.check().unwrap_err();
        assert!(
            failure.message.contains("port is taken") && failure.message.contains("c1"),
            "{}",
            failure.message
        );
    }
}
