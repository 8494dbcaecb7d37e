//! What users see of the cluster's objects: the field names of the JSON output, which are as stable as the error codes,
//! and the words for states. The wire's own types stay free to change.
//!
//! A missing thing is `null`, never an empty string: `migration`, `reason`, `receipt`, `initrd`, `host`.

mod cluster;
mod forecast;
mod migration;
mod network;
mod snapshot;
mod upgrade;
mod vm;
mod volume;

pub use cluster::{ClusterView, EventView, HostView, ImageView};
pub use forecast::DryRunView;
pub use migration::{MigrationView, StreamView};
pub use network::NetworkView;
pub use snapshot::{BytesView, SnapshotView};
pub use upgrade::{UpgradeView, VmmView};
pub use vm::{VmView, vm_state_word};
pub use volume::VolumeView;

use drover_proto::v1;
use serde::Serialize;

/// Why something is as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ReasonView {
    /// A stable code.
    pub code: String,
    /// For people.
    pub message: String,
}

impl ReasonView {
    fn of(reason: Option<v1::Reason>) -> Option<Self> {
        reason
            .filter(|reason| !reason.code.is_empty() || !reason.message.is_empty())
            .map(|reason| Self {
                code: reason.code,
                message: reason.message,
            })
    }

    /// One line for people.
    pub fn line(&self) -> String {
        format!("{} [{}]", self.message, self.code)
    }
}

/// `None` for the wire's empty string.
fn some(text: String) -> Option<String> {
    Some(text).filter(|text| !text.is_empty())
}

/// A value for a table's cell: `-` for nothing.
fn dash(text: Option<&str>) -> String {
    text.unwrap_or("-").to_owned()
}
