//! Snapshots on this host, carried out: the VMM told to take one, folders and contents removed, volumes' content put in place before a VM starts
//! as a snapshot has it. What is due, [`crate::converge`] says; what lies where, [`crate::host::snapshots`].

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use drover_proto::v1::{
    BeginRestoreRequest, CancelSnapshotRequest, Reason, Removal, ReportSnapshotRequest, ReportVolumeRequest,
    Restore, Snapshot, SnapshotDisk, SnapshotNews, SnapshotProgress, SnapshotStage, TakeSnapshotRequest,
    VmDesired, VmmInfo, VmmSnapshot, Volume, VolumeNews,
};
use drover_proto::{Code, Fault};
use tokio::time::{Instant, sleep_until};

use crate::agent::Context;
use crate::converge::{progress_of, with_slots};
use crate::host::{snapshots, volumes};
use crate::pause_point;
use crate::sandbox;
use crate::vmm::{self, Link, REPORT_ATTEMPT};

/// Between two reports of how far something is.
const PROGRESS_PERIOD: Duration = Duration::from_millis(250);
/// A report of it that is not taken by then is out of date.
const PROGRESS_ATTEMPT: Duration = Duration::from_secs(1);

fn pool(context: &Context, name: &str) -> Result<PathBuf, Fault> {
    context.config.pools.get(name).cloned().ok_or_else(|| {
        let host = &context.config.name;
        Fault::new(
            Code::PoolNotFound,
            format!("{host} has no pool {name:?}, in which a snapshot is"),
        )
    })
}

/// Something that waits for storage.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Fault> + Send + 'static,
) -> Result<T, Fault> {
    let ended = tokio::task::spawn_blocking(work).await;
    ended.map_err(|error| Fault::new(Code::Internal, error.to_string()))?
}

/// The folder of a snapshot that is to be restored.
pub fn folder(context: &Context, restore: &Restore) -> Result<PathBuf, Fault> {
    let snapshot = source(restore)?;
    let pool = pool(context, &snapshot.pool)?;
    snapshots::folder(&pool, &context.config.cluster_id, &snapshot.id)
        .map_err(|error| Fault::new(Code::Internal, error.to_string()))
}

fn source(restore: &Restore) -> Result<&Snapshot, Fault> {
    restore.source.as_ref().ok_or_else(|| {
        let message = format!("restore {} is desired without its snapshot", restore.number);
        Fault::new(Code::Internal, message)
    })
}

/// Lets the VMM begin a snapshot, in a folder that is there then, with its files where the VMM can make none. What is refused for good is
/// reported: true then.
pub async fn take(context: &Context, link: &Link, snapshot: &Snapshot, slots: &[u32]) -> Result<bool, Fault> {
    let refused = match try_to_take(context, link, snapshot, slots).await {
        Ok(()) => return Ok(false),
        Err(fault) => fault,
    };
    let for_now = matches!(
        refused.code,
        Code::VmState | Code::MigrationActive | Code::SnapshotActive | Code::HostUnreachable | Code::NoLeader
    );
    if for_now {
        return Err(refused);
    }
    tracing::warn!(vmm = %link.key, snapshot = snapshot.id, "not taken: {refused}");
    let report = ReportSnapshotRequest {
        snapshot: snapshot.id.clone(),
        epoch: snapshot.epoch,
        news: SnapshotNews::Failed.into(),
        reason: Some(refused.into()),
        ..ReportSnapshotRequest::default()
    };
    self::report(context, report, REPORT_ATTEMPT).await.map(|()| true)
}

async fn try_to_take(
    context: &Context,
    link: &Link,
    snapshot: &Snapshot,
    slots: &[u32],
) -> Result<(), Fault> {
    let inside = sandbox::is_inside(&link.folder);
    let takes_files = link.newest_info().is_some_and(|info| info.snapshot_files_handed);
    if inside && !takes_files {
        let message = "this VM's VMM is in its sandbox and of a build that takes no snapshot there: ctl vm upgrade gives it the installed one";
        return Err(Fault::new(Code::SnapshotUnavailable, message));
    }
    let pool = pool(context, &snapshot.pool)?;
    let (cluster, id) = (context.config.cluster_id.clone(), snapshot.id.clone());
    let asked = if inside { slots.to_vec() } else { Vec::new() };
    let (folder, files) = blocking(move || {
        let failed = |error| Fault::new(Code::SnapshotFailed, format!("{}: {error}", pool.display()));
        let folder = snapshots::make(&pool, &cluster, &id).map_err(failed)?;
        let files = inside.then(|| snapshots::open_files(&folder, &asked));
        let files = files.transpose().map_err(failed)?;
        Ok((folder, files))
    })
    .await?;
    let told = |path: PathBuf| {
        let text = path.to_str().map(str::to_owned);
        let untold = || {
            Fault::new(
                Code::SnapshotFailed,
                format!("{} cannot be told to a VMM", path.display()),
            )
        };
        text.ok_or_else(untold)
    };
    let disk = |&slot: &u32| {
        let path = told(folder.join(snapshots::disk_name(slot)))?;
        Ok(SnapshotDisk { slot, path })
    };
    let request = TakeSnapshotRequest {
        id: snapshot.id.clone(),
        disks: slots.iter().map(disk).collect::<Result<_, Fault>>()?,
        folder: told(folder.clone())?,
    };
    tracing::info!(vmm = %link.key, snapshot = snapshot.id, "is taken");
    pause_point("agent.before_snapshot").await;
    if let Some(files) = files {
        // What it did not take it is handed again.
        let again = |fault: Fault| match fault.code {
            Code::Internal => Fault::new(Code::HostUnreachable, fault.message),
            _ => fault,
        };
        sandbox::hand_snapshot(&link.folder, files).await.map_err(again)?;
    }
    vmm::patiently(link.client.clone().take_snapshot(request)).await?;
    pause_point("agent.after_snapshot").await;
    Ok(())
}

/// Gives the manifest its name, and only then reports the snapshot, whose VMM can do no more. Where that fails there is none.
pub async fn complete(
    context: &Context,
    link: &Link,
    snapshot: &Snapshot,
    mut report: ReportSnapshotRequest,
) -> Result<(), Fault> {
    pause_point("agent.before_naming").await;
    if let Err(fault) = name(context, snapshot).await {
        tracing::warn!(vmm = %link.key, snapshot = snapshot.id, "there is no snapshot: {fault}");
        report.set_news(SnapshotNews::Failed);
        report.reason = Some(fault.into());
    }
    pause_point("agent.after_naming").await;
    self::report(context, report, REPORT_ATTEMPT).await
}

async fn name(context: &Context, snapshot: &Snapshot) -> Result<(), Fault> {
    let pool = pool(context, &snapshot.pool)?;
    let (cluster, id) = (context.config.cluster_id.clone(), snapshot.id.clone());
    blocking(move || {
        let named = snapshots::name_manifest(&pool, &cluster, &id);
        named.map_err(|error| {
            let message = format!("the manifest of {id} in {}: {error}", pool.display());
            Fault::new(Code::SnapshotFailed, message)
        })
    })
    .await
}

/// Tells the VMM that nobody waits for the snapshot any more.
pub async fn cancel(link: &Link, id: String) -> Result<(), Fault> {
    tracing::info!(vmm = %link.key, snapshot = id, "is taken no more");
    let request = CancelSnapshotRequest { id };
    vmm::patiently(link.client.clone().cancel_snapshot(request)).await
}

/// Reports; this host's name is filled in.
pub async fn report(
    context: &Context,
    mut request: ReportSnapshotRequest,
    attempt: Duration,
) -> Result<(), Fault> {
    request.host = context.config.name.clone();
    let call = context.controllers.call("report", attempt, |mut client| {
        let request = request.clone();
        async move { client.report_snapshot(request).await }
    });
    call.await.map(drop)
}

/// Asks whether a restored run may begin; answered no, its end is desired before long.
pub async fn begin(context: &Context, link: &Link, restore: u64) -> Result<bool, Fault> {
    pause_point("agent.before_begin_restore").await;
    let request = BeginRestoreRequest {
        host: context.config.name.clone(),
        vm: link.key.vm.clone(),
        epoch: link.key.epoch,
        restore,
    };
    let call = context.controllers.call("begin", REPORT_ATTEMPT, |mut client| {
        let request = request.clone();
        async move { client.begin_restore(request).await }
    });
    let begun = call.await?.into_inner().begun;
    tracing::info!(vmm = %link.key, restore, begun, "asked whether it may begin");
    pause_point("agent.after_begin_restore").await;
    Ok(begun)
}

/// Removes what the controllers order, and reports it.
pub async fn remove(context: &Context, removal: &Removal) -> Result<(), Fault> {
    let pool = pool(context, &removal.pool)?;
    let (cluster, order) = (context.config.cluster_id.clone(), removal.clone());
    blocking(move || {
        let removed = if order.snapshot.is_empty() {
            volumes::remove_content(&pool, &order.volume, order.content)
        } else {
            snapshots::remove(&pool, &cluster, &order.snapshot)
        };
        removed.map_err(|error| Fault::new(Code::Internal, format!("{}: {error}", pool.display())))
    })
    .await?;
    tracing::info!(?removal, "removed");
    let report = ReportSnapshotRequest {
        news: SnapshotNews::Removed.into(),
        removal: Some(removal.clone()),
        ..ReportSnapshotRequest::default()
    };
    self::report(context, report, REPORT_ATTEMPT).await
}

/// Fills a volume from its image, and reports it filled, or why it never will be. What is no longer wanted meanwhile is given up.
pub async fn fill(context: &Context, volume: &Volume) -> Result<(), Fault> {
    pause_point("agent.before_fill").await;
    let filled = fill_and_tell(context, volume).await;
    let (news, reason) = match filled {
        Ok(()) => (VolumeNews::Filled, None),
        Err(fault) if fault.code == Code::VmStopped => return Ok(()),
        Err(fault) => {
            tracing::warn!(volume = volume.name, image = volume.image, "not filled: {fault}");
            (VolumeNews::Failed, Some(fault.into()))
        }
    };
    pause_point("agent.after_fill").await;
    report_volume(context, volume, news, None, reason, REPORT_ATTEMPT).await
}

async fn fill_and_tell(context: &Context, volume: &Volume) -> Result<(), Fault> {
    let pool = pool(context, &volume.pool)?;
    let image = context.config.images_dir.join(&volume.image);
    let turn = context.filling.acquire().await;
    let _turn = turn.map_err(|error| Fault::new(Code::Internal, error.to_string()))?;
    let (wanted, host) = (context.fills.clone(), context.config.name.clone());
    if !wanted
        .lock()
        .expect("nobody panics with it")
        .contains(&volume.content)
    {
        return Err(Fault::new(
            Code::VmStopped,
            "it is no longer desired on this host",
        ));
    }
    tracing::info!(volume = volume.name, image = volume.image, "is filled");
    let done = Arc::new(AtomicU64::new(0));
    let (order, done_there) = (volume.clone(), done.clone());
    let filled = blocking(move || {
        let goes_on = |bytes| {
            done_there.store(bytes, Ordering::Relaxed);
            let wanted = wanted.lock().expect("nobody panics with it");
            wanted.contains(&order.content)
        };
        volumes::fill(&pool, &order, &image, &host, &goes_on)
    });
    let telling = async {
        loop {
            let progress = SnapshotProgress {
                bytes_done: done.load(Ordering::Relaxed),
                bytes_total: volume.size_bytes,
            };
            let next = Instant::now() + PROGRESS_PERIOD;
            // Lost progress is followed by newer progress.
            let (news, progress) = (VolumeNews::Progress, Some(progress));
            let _ = report_volume(context, volume, news, progress, None, PROGRESS_ATTEMPT).await;
            sleep_until(next).await;
        }
    };
    tokio::select! {
        filled = filled => filled,
        () = telling => Ok(()),
    }
}

async fn report_volume(
    context: &Context,
    volume: &Volume,
    news: VolumeNews,
    progress: Option<SnapshotProgress>,
    reason: Option<Reason>,
    attempt: Duration,
) -> Result<(), Fault> {
    let request = ReportVolumeRequest {
        host: context.config.name.clone(),
        volume: volume.name.clone(),
        content: volume.content,
        news: news.into(),
        progress,
        reason,
    };
    let call = context.controllers.call("report", attempt, |mut client| {
        let request = request.clone();
        async move { client.report_volume(request).await }
    });
    call.await.map(drop)
}

/// Puts the content of every disk that the VM may write to in place, as the snapshot has it. What is there already stays; nothing is written
/// over, and until the run has begun nobody uses it.
pub async fn install(
    context: &Arc<Context>,
    link: &Arc<Link>,
    desired: &VmDesired,
    restore: &Restore,
) -> Result<(), Fault> {
    let folder = folder(context, restore)?;
    let mut work = Vec::new();
    for disk in desired
        .spec
        .iter()
        .flat_map(|spec| with_slots(spec).disks)
        .filter(|disk| !disk.read_only)
    {
        let told = desired.volumes.iter().find(|volume| volume.name == disk.volume);
        let volume = told.cloned().ok_or_else(|| {
            let message = format!("{} is desired without its volume {}", link.key, disk.volume);
            Fault::new(Code::VolumeNotFound, message).field("disks")
        })?;
        let source = folder.join(snapshots::disk_name(disk.slot));
        work.push((pool(context, &volume.pool)?, volume, source));
    }
    let bytes_total: u64 = work.iter().map(|(_, volume, _)| volume.size_bytes).sum();
    let done = Arc::new(AtomicU64::new(0));
    let (host, link_there, done_there) = (context.config.name.clone(), link.clone(), done.clone());
    let copied = blocking(move || {
        let mut before = 0;
        for (pool, volume, source) in work {
            let goes_on = |bytes: u64| {
                done_there.store(before + bytes, Ordering::Relaxed);
                !link_there.cancelled.load(Ordering::SeqCst)
            };
            volumes::install(&pool, &volume, &source, (&host, &link_there.key), &goes_on)?;
            before += volume.size_bytes;
            done_there.store(before, Ordering::Relaxed);
        }
        Ok(())
    });
    let telling = async {
        loop {
            let progress = SnapshotProgress {
                bytes_done: done.load(Ordering::Relaxed),
                bytes_total,
            };
            let next = Instant::now() + PROGRESS_PERIOD;
            tell_progress(
                context,
                ReportSnapshotRequest {
                    restore: restore.number,
                    progress: Some(progress),
                    ..ReportSnapshotRequest::default()
                },
            )
            .await;
            sleep_until(next).await;
        }
    };
    tokio::select! {
        copied = copied => copied?,
        () = telling => {}
    }
    tracing::info!(vmm = %link.key, restore = restore.number, bytes = bytes_total, "its disks' content is there");
    pause_point("agent.after_restore_copy").await;
    Ok(())
}

async fn tell_progress(context: &Context, mut request: ReportSnapshotRequest) {
    request.set_news(SnapshotNews::Progress);
    // Lost progress is followed by newer progress.
    let _ = report(context, request, PROGRESS_ATTEMPT).await;
}

/// Reports how far the VMM's snapshot is, as long as it is being taken.
pub async fn report_progress(context: &Context, link: &Link) {
    let taken = |info: &VmmInfo| {
        let known = info.snapshot.clone();
        known.filter(|known| known.stage() == SnapshotStage::Running)
    };
    let mut last: Option<VmmSnapshot> = None;
    loop {
        let info = vmm::until(link, |info| {
            let now = taken(info);
            now.is_some() && now != last
        })
        .await;
        let next = Instant::now() + PROGRESS_PERIOD;
        if let Some(known) = taken(&info) {
            tell_progress(
                context,
                ReportSnapshotRequest {
                    snapshot: known.id.clone(),
                    epoch: link.key.epoch,
                    progress: Some(progress_of(&known)),
                    ..ReportSnapshotRequest::default()
                },
            )
            .await;
            last = Some(known);
        }
        sleep_until(next).await;
    }
}
