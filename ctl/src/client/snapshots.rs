//! The calls about snapshots.

use drover_proto::v1;

use super::{Client, request_id};
use crate::failure::Result;

impl Client {
    /// Begins a snapshot; `name` empty: the cluster numbers it.
    pub async fn create_snapshot(&self, vm: &str, name: &str) -> Result<v1::Snapshot> {
        let request = v1::CreateSnapshotRequest {
            request_id: request_id()?,
            vm: vm.to_owned(),
            name: name.to_owned(),
        };
        self.plain(async |mut grpc| grpc.create_snapshot(request.clone()).await)
            .await
    }

    /// Snapshots, oldest first; `vm` empty: all.
    pub async fn snapshots(&self, vm: &str) -> Result<Vec<v1::Snapshot>> {
        let request = v1::ListSnapshotsRequest {
            vm: vm.to_owned(),
            allow_stale: false,
        };
        Ok(self
            .plain(async |mut grpc| grpc.list_snapshots(request.clone()).await)
            .await?
            .snapshots)
    }

    /// One snapshot, by its name or id.
    pub async fn snapshot(&self, vm: &str, name: &str) -> Result<v1::Snapshot> {
        let request = v1::GetSnapshotRequest {
            vm: vm.to_owned(),
            name: name.to_owned(),
            allow_stale: false,
        };
        self.plain(async |mut grpc| grpc.get_snapshot(request.clone()).await)
            .await
    }

    /// Wants a snapshot gone; of one that is being taken, ends that.
    pub async fn delete_snapshot(&self, vm: &str, name: &str) -> Result<v1::Snapshot> {
        let request = v1::DeleteSnapshotRequest {
            request_id: request_id()?,
            vm: vm.to_owned(),
            name: name.to_owned(),
        };
        self.plain(async |mut grpc| grpc.delete_snapshot(request.clone()).await)
            .await
    }

    /// Wants a VM as its snapshot has it; `clone` empty: itself, else a new one of this name, with `new_addresses` with NICs of its own.
    pub async fn restore_vm(
        &self,
        vm: &str,
        snapshot: &str,
        clone: &str,
        new_addresses: bool,
    ) -> Result<v1::Vm> {
        let request = v1::RestoreVmRequest {
            request_id: request_id()?,
            vm: vm.to_owned(),
            snapshot: snapshot.to_owned(),
            clone: clone.to_owned(),
            new_addresses,
        };
        self.plain(async |mut grpc| grpc.restore_vm(request.clone()).await)
            .await
    }
}
