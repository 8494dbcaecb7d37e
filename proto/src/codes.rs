//! Stable error codes: what scripts match on. A code is never renamed; its message may be.
//!
//! A [`Fault`] is the one shape of a refusal: code, message, and the field at fault. It travels in a
//! `tonic::Status` as the metadata `drover-code` and `drover-field`, and in messages as `Reason`.

use std::fmt;

use tonic::metadata::MetadataValue;
use tonic::{Code as Grpc, Status};

/// Metadata key that carries the stable code of a [`Fault`].
pub const CODE_KEY: &str = "drover-code";
/// Metadata key that carries the name of the field at fault.
pub const FIELD_KEY: &str = "drover-field";

macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident = $text:literal, $grpc:ident;)*) => {
        /// A stable error code.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Code { $($(#[$doc])* $variant,)* }

        impl Code {
            /// Every code, for documentation and tests.
            pub const ALL: &'static [Code] = &[$(Code::$variant,)*];

            /// The code as it stands on the wire.
            pub fn as_str(self) -> &'static str {
                match self { $(Code::$variant => $text,)* }
            }

            /// The gRPC status code that a refusal with this code travels as.
            pub fn grpc(self) -> Grpc {
                match self { $(Code::$variant => Grpc::$grpc,)* }
            }
        }
    };
}

codes! {
    /// A field is missing, too long, or not of its form.
    InvalidArgument = "invalid_argument", InvalidArgument;
    /// No such VM.
    VmNotFound = "vm_not_found", NotFound;
    /// No such host.
    HostNotFound = "host_not_found", NotFound;
    /// No such image on any host that could run the VM.
    ImageNotFound = "image_not_found", NotFound;
    /// No such volume.
    VolumeNotFound = "volume_not_found", NotFound;
    /// The host does not have the pool, or no host has it.
    PoolNotFound = "pool_not_found", NotFound;
    /// No such network.
    NetworkNotFound = "network_not_found", NotFound;
    /// The VM has no such NIC.
    NicNotFound = "nic_not_found", NotFound;
    /// No such migration.
    MigrationNotFound = "migration_not_found", NotFound;
    /// A VM of this name exists.
    VmExists = "vm_exists", AlreadyExists;
    /// A volume of this name exists.
    VolumeExists = "volume_exists", AlreadyExists;
    /// A VM has the volume: it can be neither deleted nor had by another, unless all only read it.
    VolumeInUse = "volume_in_use", FailedPrecondition;
    /// A network of this name, or with this VXLAN number, exists.
    NetworkExists = "network_exists", AlreadyExists;
    /// A VM has a NIC in the network: it cannot be deleted.
    NetworkInUse = "network_in_use", FailedPrecondition;
    /// Another NIC has the MAC or IP address, or none is left.
    AddressInUse = "address_in_use", FailedPrecondition;
    /// The image is not a kernel that can be booted.
    ImageInvalid = "image_invalid", FailedPrecondition;
    /// No host, or not the asked one, can take the VM; the message lists every host with its reason.
    NoHostFits = "no_host_fits", FailedPrecondition;
    /// The call does not fit the VM's state.
    VmState = "vm_state", FailedPrecondition;
    /// The migration's target is the host the VM is on.
    SameHost = "same_host", FailedPrecondition;
    /// The VM has a migration under way.
    MigrationActive = "migration_active", FailedPrecondition;
    /// The migration has ended, or is committed and cannot be undone.
    MigrationEnded = "migration_ended", FailedPrecondition;
    /// The epoch is not the one the replicated state holds.
    StaleEpoch = "stale_epoch", FailedPrecondition;
    /// The host is declared down.
    HostDown = "host_down", FailedPrecondition;
    /// The request id was used for another request.
    RequestIdReused = "request_id_reused", InvalidArgument;
    /// No leader is known, or it cannot be reached; try again.
    NoLeader = "no_leader", Unavailable;
    /// The agent or the VMM did not answer.
    HostUnreachable = "host_unreachable", Unavailable;
    /// The caller's certificate is of another cluster, or of a role that may not do this.
    Denied = "denied", PermissionDenied;
    /// Something broke that should not; the log has more.
    Internal = "internal", Internal;

    // Reasons of failed VMs and aborted migrations.
    /// A person cancelled.
    Cancelled = "cancelled", Cancelled;
    /// The VMM process ended without being asked.
    VmmDied = "vmm_died", Aborted;
    /// The VMM could not be started.
    VmmStartFailed = "vmm_start_failed", Aborted;
    /// The guest triple-faulted or shut down through the reset path.
    GuestTripleFault = "guest_triple_fault", Aborted;
    /// KVM could not emulate an instruction.
    GuestEmulationFailure = "guest_emulation_failure", Aborted;
    /// Another KVM failure on entry or exit.
    GuestKvmFailure = "guest_kvm_failure", Aborted;
    /// The kernel image could not be loaded.
    KernelInvalid = "kernel_invalid", Aborted;
    /// KVM lacks something without which the VM cannot run.
    KvmUnusable = "kvm_unusable", Aborted;
    /// The link between the two VMMs broke or stalled.
    LinkLost = "link_lost", Aborted;
    /// No progress within the bound.
    Stalled = "stalled", Aborted;
    /// The target did not get ready to receive in time.
    TargetNotReady = "target_not_ready", Aborted;
    /// The target refused or could not restore the state.
    TargetFailed = "target_failed", Aborted;
    /// The switchover was not committed in time.
    SwitchoverTimeout = "switchover_timeout", Aborted;
    /// The guest writes faster than the link carries, for the intent given.
    NoConvergence = "no_convergence", Aborted;
    /// The deadline passed.
    DeadlineExceeded = "deadline_exceeded", DeadlineExceeded;
    /// Peers do not share a protocol version.
    ProtocolVersion = "protocol_version", Aborted;
    /// A frame was truncated, corrupt, or lied about its length.
    BadFrame = "bad_frame", Aborted;
    /// The digest or the page counts differ between source and target.
    DigestMismatch = "digest_mismatch", Aborted;
    /// Saved state could not be decoded or restored.
    BadState = "bad_state", Aborted;
    /// The host has no memory left for a page of the guest's.
    MemoryExhausted = "memory_exhausted", Aborted;
    /// The VM was stopped or deleted meanwhile.
    VmStopped = "vm_stopped", Aborted;
    /// The target's host was declared down.
    TargetDown = "target_down", Aborted;
    /// The source VM failed while it was moved.
    SourceFailed = "source_failed", Aborted;
    /// A VM that ran at its target before all its pages were there has lost them: source or link is gone.
    PostCopyLost = "postcopy_lost", Aborted;
    /// Only post-copy would do, it is allowed, and a host cannot.
    PostCopyUnavailable = "postcopy_unavailable", Aborted;
    /// A disk of the VM cannot be opened, is not of its size, or is locked by another.
    DiskUnusable = "disk_unusable", Aborted;
    /// The host does not offer a network, or its agent cannot make what a NIC hangs on.
    NetworkUnavailable = "network_unavailable", Aborted;
    /// A tap of the VM is not there, cannot be opened, or is open in another process.
    NicUnusable = "nic_unusable", Aborted;
    /// The migration was begun without leave to go on by post-copy.
    PostCopyNotAllowed = "postcopy_not_allowed", FailedPrecondition;
    /// The slot, or the device in it, is taken or is being given up.
    DeviceBusy = "device_busy", FailedPrecondition;
    /// No such snapshot.
    SnapshotNotFound = "snapshot_not_found", NotFound;
    /// A snapshot of this name exists of the VM.
    SnapshotExists = "snapshot_exists", AlreadyExists;
    /// The snapshot is not complete: it is being taken, has failed, or is being deleted.
    SnapshotNotReady = "snapshot_not_ready", FailedPrecondition;
    /// A VM is to be restored from the snapshot: it cannot be deleted yet.
    SnapshotInUse = "snapshot_in_use", FailedPrecondition;
    /// The VM is to be restored from a snapshot, and has not begun to run as it.
    RestoreActive = "restore_active", FailedPrecondition;
    /// A volume that the VM only reads, which its snapshots do not hold, was written to since.
    VolumeChanged = "volume_changed", FailedPrecondition;
    /// The volume is still being filled from its image, or could not be.
    VolumeNotReady = "volume_not_ready", FailedPrecondition;
    /// An image is no content of a disk, or cannot be read.
    ImageUnusable = "image_unusable", FailedPrecondition;
    /// A snapshot of the VM is under way.
    SnapshotActive = "snapshot_active", FailedPrecondition;
    /// A snapshot cannot be taken on this host: its kernel lacks what it takes to write memory behind a running guest.
    SnapshotUnavailable = "snapshot_unavailable", FailedPrecondition;
    /// A snapshot could not be written: no room, an I/O error, or a file that is not as it must be.
    SnapshotFailed = "snapshot_failed", Aborted;
    /// What a VM is to be restored from is not what was written: cut short, changed, or never complete.
    SnapshotDamaged = "snapshot_damaged", Aborted;
}

impl Code {
    /// The code that `text` names, if any.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|code| code.as_str() == text)
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A refusal or failure that a person or a script reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The stable code.
    pub code: Code,
    /// One sentence: what is wrong, with the value, and what would be right.
    pub message: String,
    /// The request's field at fault, or empty.
    pub field: String,
}

impl Fault {
    /// A fault without a field.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            field: String::new(),
        }
    }

    /// The same fault, with the field at fault named.
    #[must_use]
    pub fn field(mut self, field: impl Into<String>) -> Self {
        self.field = field.into();
        self
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} [{}]", self.message, self.code)
    }
}

impl std::error::Error for Fault {}

impl From<Fault> for Status {
    fn from(fault: Fault) -> Self {
        let mut status = Status::new(fault.code.grpc(), fault.message);
        status
            .metadata_mut()
            .insert(CODE_KEY, MetadataValue::from_static(fault.code.as_str()));
        if let Ok(field) = MetadataValue::try_from(fault.field.as_str())
            && !fault.field.is_empty()
        {
            status.metadata_mut().insert(FIELD_KEY, field);
        }
        status
    }
}

/// Reads a fault back from a status. A status without a code (from the transport) becomes `no_leader` when it
/// says "unavailable", `internal` otherwise.
impl From<&Status> for Fault {
    fn from(status: &Status) -> Self {
        let text = |key| {
            status
                .metadata()
                .get(key)
                .and_then(|v| v.to_str().ok())
                .unwrap_or_default()
        };
        let code = Code::parse(text(CODE_KEY)).unwrap_or(match status.code() {
            Grpc::Unavailable | Grpc::DeadlineExceeded => Code::NoLeader,
            Grpc::PermissionDenied | Grpc::Unauthenticated => Code::Denied,
            Grpc::InvalidArgument => Code::InvalidArgument,
            _ => Code::Internal,
        });
        Self {
            code,
            message: status.message().to_owned(),
            field: text(FIELD_KEY).to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_survives_the_wire() {
        let fault = Fault::new(Code::VmNotFound, "no VM is named \"vm9\"").field("name");
        let status = Status::from(fault.clone());
        assert_eq!(status.code(), Grpc::NotFound);
        assert_eq!(Fault::from(&status), fault);
    }

    #[test]
    fn codes_are_distinct_and_parse_back() {
        let mut seen = std::collections::BTreeSet::new();
        for &code in Code::ALL {
            assert!(seen.insert(code.as_str()), "{code} stands twice");
            assert_eq!(Code::parse(code.as_str()), Some(code));
        }
    }
}
