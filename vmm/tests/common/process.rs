//! The program as a process of its own, and a client of its socket.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use drover_proto::v1::vmm_client::VmmClient;
use drover_proto::v1::{VmmInfo, WatchInfoRequest};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

/// A `drover-vmm` process, killed when dropped.
pub struct Process {
    pub child: Child,
    socket: PathBuf,
}

impl Process {
    pub fn start(config: &Path) -> Self {
        Self::start_with(config, |command| command.stderr(Stdio::inherit()))
    }

    /// With another log or environment.
    pub fn start_with(config: &Path, change: impl FnOnce(&mut Command) -> &mut Command) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_drover-vmm"));
        let child = change(command.arg("--config").arg(config)).spawn().unwrap();
        Self {
            child,
            socket: config.with_file_name("vmm.sock"),
        }
    }

    pub async fn client(&self) -> VmmClient<Channel> {
        let began = Instant::now();
        loop {
            let socket = self.socket.clone();
            let connect = tower::service_fn(move |_| {
                let socket = socket.clone();
                async move { UnixStream::connect(socket).await.map(TokioIo::new) }
            });
            match Endpoint::from_static("http://vmm")
                .connect_with_connector(connect)
                .await
            {
                Ok(channel) => return VmmClient::new(channel),
                Err(error) => assert!(began.elapsed() < super::common::PATIENCE, "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until what the VMM tells of itself satisfies `done`.
pub async fn watch(vmm: &mut VmmClient<Channel>, what: &str, done: impl Fn(&VmmInfo) -> bool) -> VmmInfo {
    let (began, mut seen_seq) = (Instant::now(), 0);
    loop {
        let request = WatchInfoRequest {
            seen_seq,
            wait_ms: 10_000,
        };
        let info = vmm.watch_info(request).await.unwrap().into_inner();
        if done(&info) {
            return info;
        }
        assert!(began.elapsed() < super::common::PATIENCE, "no {what}: {info:?}");
        seen_seq = info.seq;
    }
}
