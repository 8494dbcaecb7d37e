//! `ctl volume create|resize|list|delete`.

use drover_proto::{Code, v1};

use super::bar::Bar;
use super::{POLL, Session};
use crate::args::VolumeCommand;
use crate::failure::{Exit, Failure, Result};
use crate::view::VolumeView;

/// `ctl volume …`
pub async fn run(session: &Session, command: &VolumeCommand) -> Result<()> {
    match command {
        VolumeCommand::Create {
            name,
            size,
            image,
            pool,
            no_wait,
        } => {
            let volume = v1::Volume {
                name: name.clone(),
                pool: pool.clone(),
                size_bytes: size.unwrap_or(0).saturating_mul(1 << 20),
                image: image.clone().unwrap_or_default(),
                ..v1::Volume::default()
            };
            let created = VolumeView::from(session.client.create_volume(volume).await?);
            if created.image != *image {
                // It is empty, and nobody has it.
                session.client.delete_volume(name, false).await?;
                let message =
                    "the controllers are of a version that makes no volumes of images: upgrade them";
                return Err(Failure::new(
                    Exit::Refused,
                    Code::ProtocolVersion.as_str(),
                    message,
                ));
            }
            let view = match no_wait {
                true => created,
                false => filled(session, created).await?,
            };
            session.out.done(&view, &view.sentence())
        }
        VolumeCommand::Resize { volume, size } => {
            let bytes = size.saturating_mul(1 << 20);
            let view = VolumeView::from(session.client.resize_volume(volume, bytes).await?);
            let sentence = format!("{} has {} now", view.name, view.size());
            session.out.done(&view, &sentence)
        }
        VolumeCommand::List => {
            let volumes = session.client.volumes().await?;
            let views: Vec<_> = volumes.into_iter().map(VolumeView::from).collect();
            session.out.list(&views)
        }
        VolumeCommand::Delete { volume, keep_content } => {
            let view = VolumeView::from(session.client.delete_volume(volume, !keep_content).await?);
            let VolumeView { name, pool, .. } = &view;
            let sentence = match keep_content {
                true => format!(
                    "{name} is deleted; its file {}, if it was ever used, stays in pool {pool}",
                    view.file()
                ),
                false => format!("{name} is deleted; a host that has pool {pool} removes what it held"),
            };
            session.out.done(&view, &sentence)
        }
    }
}

/// Waits until the volume holds what its image does. Ctrl-C ends that, and deletes it.
async fn filled(session: &Session, created: VolumeView) -> Result<VolumeView> {
    let (name, content) = (created.name.clone(), created.content);
    let is_it = |volume: &VolumeView| volume.name == name && volume.content == content;
    let mut bar = Bar::new(session.out, &name);
    let poll = async {
        let mut view = created;
        while view.state == "filling" {
            let what = match &view.waits {
                None => format!("{name} filling"),
                Some(why) => format!("{name} waits: {why}"),
            };
            bar.show(&what, view.progress);
            tokio::time::sleep(POLL).await;
            let volumes = session.client.volumes().await?;
            let found = volumes.into_iter().map(VolumeView::from).find(is_it);
            view = found.ok_or_else(|| {
                let message = format!("{name} was deleted meanwhile");
                Failure::new(Exit::Refused, Code::VolumeNotFound.as_str(), message)
            })?;
        }
        Ok(view)
    };
    let ended = tokio::select! {
        ended = poll => ended,
        _ = tokio::signal::ctrl_c() => {
            session.client.delete_volume(&name, true).await?;
            Err(Failure::interrupted(format!("{name} is deleted, with what there is of it")))
        }
    };
    bar.finish();
    let view = ended?;
    match &view.reason {
        Some(reason) => Err(Failure::new(Exit::Failed, &reason.code, view.sentence())),
        None => Ok(view),
    }
}
