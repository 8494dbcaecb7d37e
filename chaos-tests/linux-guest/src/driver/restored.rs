//! A snapshot of the guest, and the VM that goes on from it once the guest has become another.

use std::os::unix::fs::PermissionsExt;

use anyhow::{Context, Result, ensure};
use drover_linux_guest::report::Report;
use drover_proto::v1::{SnapshotDisk, SnapshotStage, TakeSnapshotRequest, VmmInfo, VmmState};
use serde_json::json;

use crate::shell::Shell;
use crate::vmm::Vmm;
use crate::{BOOT_MAX, DISK, DISK_SLOT, HEED_MAX, folder, path_of};

const SNAPSHOT: &str = "s1";
/// The disk's content in the snapshot's folder.
const CONTENT: &str = "disk.raw";

/// Takes a snapshot of the running guest, has the guest become another, kills its VMM, and starts the VM of `config` as it was.
pub async fn go_back(
    mut vmm: Vmm,
    shell: &mut Shell,
    mut config: serde_json::Value,
    epoch: u64,
) -> Result<(Vmm, Report)> {
    let before = shell.contents().await?;
    let paused_us = take(&mut vmm).await?;
    shell.write_random_file().await?;
    shell.write_disk().await?;
    let between = shell.contents().await?;
    vmm.kill().await?;

    let kept = folder("snapshot")?;
    std::fs::copy(kept.join(CONTENT), path_of(DISK)).context("putting the disk's content in place")?;
    config["restore"] = json!({ "folder": kept });
    let mut restored = Vmm::start(&folder("restored")?, &config).await?;
    restored.renew(epoch);
    let runs = |info: &VmmInfo| info.state() == VmmState::Running;
    restored
        .until("the restored guest to run", BOOT_MAX, runs)
        .await?;
    shell.go_back_to(&restored);
    let after = shell.contents().await?;
    let echoes = shell.echoes().await?;
    let report = Report::Restored {
        paused_us,
        contents: [before, between, after],
        echoes,
    };
    Ok((restored, report))
}

/// How long the guest stood for it, microseconds.
async fn take(vmm: &mut Vmm) -> Result<u64> {
    let kept = folder("snapshot")?;
    std::fs::set_permissions(&kept, PermissionsExt::from_mode(0o700))?;
    let request = TakeSnapshotRequest {
        id: SNAPSHOT.to_owned(),
        folder: kept.display().to_string(),
        disks: vec![SnapshotDisk {
            slot: DISK_SLOT,
            path: kept.join(CONTENT).display().to_string(),
        }],
    };
    let taken = vmm.client().take_snapshot(request).await;
    taken.context("taking a snapshot")?;
    let ended = |info: &VmmInfo| {
        let snapshot = info.snapshot.as_ref();
        snapshot.is_some_and(|snapshot| snapshot.stage() != SnapshotStage::Running)
    };
    let info = vmm.until("the snapshot to end", HEED_MAX, ended).await?;
    let snapshot = info.snapshot.unwrap_or_default();
    ensure!(snapshot.stage() == SnapshotStage::Done, "{snapshot:?}");
    Ok(snapshot.paused_us)
}
