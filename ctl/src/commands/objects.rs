//! `ctl cluster`, `ctl host`, `ctl image`: what there is.

use drover_proto::Code;

use super::Session;
use crate::client::Patience;
use crate::failure::{Failure, Result};
use crate::output::print;
use crate::view::{ClusterView, HostView, ImageView};

/// `ctl cluster status`. Without a leader it shows what the controller that answers knows, and fails with `no_leader`.
pub async fn cluster_status(session: &Session) -> Result<()> {
    let (cluster, trouble) = match session.client.cluster(false, Patience::default()).await {
        Ok(cluster) => (cluster, None),
        Err(failure) if failure.code == Code::NoLeader.as_str() => {
            match session.client.cluster(true, Patience::ONE_ROUND).await {
                Ok(cluster) => (cluster, Some(failure)),
                Err(_) => return Err(failure),
            }
        }
        Err(failure) => return Err(failure),
    };
    show_cluster(session, &ClusterView::from(cluster))?;
    trouble.map_or(Ok(()), |failure: Failure| Err(failure))
}

fn show_cluster(session: &Session, cluster: &ClusterView) -> Result<()> {
    if session.out.json() {
        return session.out.show(cluster);
    }
    if session.out.quiet {
        return print(cluster.leader.as_deref().unwrap_or(""));
    }
    session.out.show(cluster)?;
    print("")?;
    session.out.list(&cluster.members)
}

/// `ctl host list`
pub async fn host_list(session: &Session) -> Result<()> {
    session.out.list(&hosts(session).await?)
}

/// `ctl host show`
pub async fn host_show(session: &Session, name: &str) -> Result<()> {
    session
        .out
        .show(&HostView::from(session.client.host(name).await?))
}

/// `ctl image list`
pub async fn image_list(session: &Session) -> Result<()> {
    session.out.list(&ImageView::of_hosts(&hosts(session).await?))
}

async fn hosts(session: &Session) -> Result<Vec<HostView>> {
    Ok(session
        .client
        .hosts(Patience::default())
        .await?
        .into_iter()
        .map(HostView::from)
        .collect())
}
