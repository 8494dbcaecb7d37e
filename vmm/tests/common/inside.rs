//! A VMM process in its sandbox, and what a test does with it by its socket.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use drover_proto::v1::vmm_client::VmmClient;
use drover_proto::v1::{
    GrantRequest, MigrationOptions, OutcomeRequest, ReadConsoleRequest, StartOutgoingRequest, VmmState,
    WatchInfoRequest,
};
use drover_vmm::time::boottime_ns;
use tonic::transport::Channel;

use super::cage::caged;
use super::common::{PATIENCE, World, assert_intact, has_seconds, seconds};
use super::running::{Process, watch};

/// A VMM in its sandbox.
pub struct Caged {
    pub process: Process,
    pub folder: PathBuf,
    pub vmm: VmmClient<Channel>,
    epoch: u64,
}

impl Caged {
    pub async fn start(
        world: &World,
        host: &str,
        epoch: u64,
        change: impl FnOnce(&mut serde_json::Value),
    ) -> Self {
        Self::start_with(world, host, epoch, change, |command| {
            command.stderr(Stdio::inherit())
        })
        .await
    }

    /// With another log or environment.
    pub async fn start_with(
        world: &World,
        host: &str,
        epoch: u64,
        change: impl FnOnce(&mut serde_json::Value),
        command: impl FnOnce(&mut Command) -> &mut Command,
    ) -> Self {
        let config = world.write(host, epoch, |config| {
            caged(config);
            change(config);
        });
        let process = Process::start_with(&config, command);
        let mut vmm = process.client().await;
        // Its socket is there before it is inside; it answers when it hears what is handed in.
        vmm.watch_info(WatchInfoRequest::default()).await.unwrap();
        Self {
            folder: config.parent().unwrap().to_owned(),
            process,
            vmm,
            epoch,
        }
    }

    /// A grant that no test outlives.
    pub async fn grant(&mut self) {
        self.grant_for(Duration::from_secs(3600)).await;
    }

    pub async fn grant_for(&mut self, lease: Duration) {
        let request = GrantRequest {
            epoch: self.epoch,
            deadline_boottime_ns: boottime_ns() + u64::try_from(lease.as_nanos()).unwrap(),
        };
        self.vmm.grant(request).await.unwrap();
    }

    pub async fn text(&mut self) -> String {
        let request = ReadConsoleRequest::default();
        let piece = self.vmm.read_console(request).await.unwrap().into_inner();
        String::from_utf8_lossy(&piece.data).into_owned()
    }

    /// Waits until the console's whole lines satisfy `done`.
    pub async fn console(&mut self, what: &str, done: impl Fn(&str) -> bool) -> String {
        let began = Instant::now();
        loop {
            let seen = self.text().await;
            let whole = &seen[..seen.rfind('\n').map_or(0, |end| end + 1)];
            if done(whole) {
                assert_intact(whole);
                return whole.to_owned();
            }
            assert!(began.elapsed() < PATIENCE, "no {what}:\n{seen}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub async fn more_seconds(&mut self) {
        let seen = seconds(&self.text().await, "t").len();
        self.console("further lines", has_seconds(seen + 2)).await;
    }

    pub async fn state(&mut self, state: VmmState) {
        watch(&mut self.vmm, state.as_str_name(), |info| info.state() == state).await;
    }

    pub async fn send(&mut self, migration: &str, target_addr: String, options: Option<MigrationOptions>) {
        let request = StartOutgoingRequest {
            migration: migration.into(),
            target_addr,
            target_host: "host2".into(),
            target_epoch: self.epoch + 1,
            options,
        };
        self.vmm.start_outgoing(request).await.unwrap();
    }

    pub async fn committed(&mut self, migration: &str) {
        let migration = migration.into();
        let committed = true;
        let told = self.vmm.outcome(OutcomeRequest { migration, committed });
        told.await.unwrap();
    }

    pub fn status(&self) -> Vec<String> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.process.child.id())).unwrap();
        let read =
            |task: std::io::Result<fs::DirEntry>| fs::read_to_string(task.unwrap().path().join("status"));
        tasks.map(|task| read(task).unwrap()).collect()
    }
}
