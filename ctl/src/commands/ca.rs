//! `ctl ca`: the cluster's certificate authority and the identities it issues. Works on files only.

use std::path::Path;

use drover_pki::{ClusterCa, Role};
use drover_proto::Fault;

use crate::args::{CaCommand, CaRole};
use crate::failure::{Exit, Failure, Result};
use crate::output::Out;

/// `ctl ca …`
pub fn run(command: &CaCommand, out: Out) -> Result<()> {
    match command {
        CaCommand::Create { dir, cluster } => create(dir, cluster, out),
        CaCommand::Issue {
            dir,
            role,
            name,
            out: folder,
        } => {
            let role = match role {
                CaRole::Controller => Role::Controller,
                CaRole::Host => Role::Host,
                CaRole::User => Role::User,
                CaRole::Monitor => Role::Monitor,
            };
            let ca = ClusterCa::load(dir).map_err(Fault::from)?;
            let files = ca.issue_to(folder, role, name).map_err(Fault::from)?;
            out.done(
                &files,
                &format!("{} and {}", files.cert.display(), files.key.display()),
            )
        }
    }
}

fn create(dir: &Path, cluster: &str, out: Out) -> Result<()> {
    // A new key under an old certificate would cut every member off.
    if dir.join("ca.key").exists() {
        let message = format!("{} has a ca.key already: name another folder", dir.display());
        return Err(Failure::new(Exit::Refused, "ca_exists", message));
    }
    let ca = ClusterCa::create(cluster).map_err(Fault::from)?;
    ca.save(dir).map_err(Fault::from)?;
    let made =
        serde_json::json!({ "cluster_id": cluster, "ca": dir.join("ca.pem"), "key": dir.join("ca.key") });
    out.done(
        &made,
        &format!(
            "cluster {cluster}: {} and ca.key, which is to be kept secret",
            dir.join("ca.pem").display()
        ),
    )
}
