//! `ctl volume create|resize|list|delete`.

use drover_proto::v1;

use super::Session;
use crate::args::VolumeCommand;
use crate::failure::Result;
use crate::view::VolumeView;

/// `ctl volume …`
pub async fn run(session: &Session, command: &VolumeCommand) -> Result<()> {
    match command {
        VolumeCommand::Create { name, size, pool } => {
            let volume = v1::Volume {
                name: name.clone(),
                pool: pool.clone(),
                size_bytes: size.saturating_mul(1 << 20),
                ..v1::Volume::default()
            };
            let view = VolumeView::from(session.client.create_volume(volume).await?);
            let sentence = format!("{} is created: {} in pool {}", view.name, view.size(), view.pool);
            session.out.done(&view, &sentence)
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
        VolumeCommand::Delete { volume } => {
            let view = VolumeView::from(session.client.delete_volume(volume).await?);
            let sentence = format!(
                "{} is deleted; its file {}, if it was ever used, stays in pool {}",
                view.name,
                view.file(),
                view.pool
            );
            session.out.done(&view, &sentence)
        }
    }
}
