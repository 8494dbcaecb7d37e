//! A guest whose root is on its disk: it was put there by the guest before it, and finds its address on its seed disk.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use drover_linux_guest::report::Report;
use drover_proto::v1::{VmmInfo, VmmState};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

use crate::shell::Shell;
use crate::vmm::Vmm;
use crate::{BOOT_MAX, folder, net};

/// The port of the guest's echo service (RFC 862).
const ECHO_PORT: u16 = 7;
const ECHO_MAX: Duration = Duration::from_secs(60);
const AGAIN: Duration = Duration::from_millis(200);
const TOLD: &[u8] = b"over the network, and back";

/// Boots the VM of `config` from its first disk. It has its shell on the serial port, and no other console.
pub async fn boot(mut config: serde_json::Value, epoch: u64) -> Result<(Vmm, Shell, Report)> {
    let cmdline = config["cmdline"].as_str().context("a command line")?;
    config["cmdline"] = format!("{cmdline} root=/dev/vda").into();
    config["console"] = false.into();
    let mut vmm = Vmm::start(&folder("installed")?, &config).await?;
    vmm.renew(epoch);
    let runs = |info: &VmmInfo| info.state() == VmmState::Running;
    vmm.until("the installed guest to run", BOOT_MAX, runs).await?;
    let mut shell = Shell::of(&vmm);
    shell
        .wait_for_prompt(BOOT_MAX)
        .await
        .context("waiting for the installed guest's shell")?;
    let report = Report::Installed {
        root: shell.root().await?,
        digest: shell.installed_digest().await?,
        echoed: echo().await.context("the installed guest's echo service")?,
    };
    Ok((vmm, shell, report))
}

/// What comes back from the guest's service at the address that its seed disk told it.
async fn echo() -> Result<String> {
    let until = Instant::now() + ECHO_MAX;
    let mut stream = loop {
        match timeout(ECHO_MAX, TcpStream::connect((net::GUEST, ECHO_PORT))).await? {
            Ok(stream) => break stream,
            // It may begin to listen after its shell asks for a command.
            Err(error) => ensure!(Instant::now() < until, "it does not answer: {error}"),
        }
        sleep(AGAIN).await;
    };
    stream.write_all(TOLD).await?;
    let mut came = vec![0; TOLD.len()];
    timeout(ECHO_MAX, stream.read_exact(&mut came)).await??;
    Ok(String::from_utf8_lossy(&came).into_owned())
}
