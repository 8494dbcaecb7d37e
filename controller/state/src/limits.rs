//! Every bound of the replicated state, with its reason. A replica must not grow without end, and all replicas must
//! drop the same things at the same entry.

/// Events kept; older ones are dropped. A reader that falls further behind sees a gap in the sequence numbers.
pub const EVENTS_MAX: usize = 10_000;
/// Answers kept for repeated request ids. A client retries within seconds; this many requests last far longer.
pub const REQUESTS_MAX: usize = 4_096;
/// Bytes of a request id.
pub const REQUEST_ID_BYTES_MAX: usize = 128;
/// Ended migrations kept, besides those that a VM names as its last one.
pub const MIGRATIONS_ENDED_MAX: usize = 1_000;
/// Deleted VMs whose last epoch is kept by name; the epochs of older ones go into one floor for all new names.
pub const RETIRED_MAX: usize = 10_000;
/// Automatic restarts of a failed VM after a `start`; then it stays failed, for a person to look at.
pub const RESTARTS_MAX: u32 = 3;

/// VMs in the cluster.
pub const VMS_MAX: usize = 20_000;
/// Hosts in the cluster.
pub const HOSTS_MAX: usize = 1_000;
/// vCPUs of one VM.
pub const VCPUS_MAX: u32 = 32;
/// The smallest guest, MiB: a kernel and its page tables fit.
pub const MEMORY_MIB_MIN: u64 = 16;
/// The largest guest, MiB.
pub const MEMORY_MIB_MAX: u64 = 1_048_576;
/// Bytes of a kernel command line: what the Linux boot protocol carries.
pub const CMDLINE_BYTES_MAX: usize = 2_048;
/// Bytes of a VM's or host's name: a DNS label.
pub const NAME_BYTES_MAX: usize = 63;
/// Bytes of an image's name.
pub const IMAGE_NAME_BYTES_MAX: usize = 128;
/// Images, CPU features or KVM capabilities that one host may report.
pub const HOST_LIST_MAX: usize = 4_096;
/// A host's boots that are remembered after a reboot: news of one of them comes too late. What was sent before as many
/// reboots is no longer under way.
pub const EARLIER_BOOTS_MAX: usize = 8;
/// Bytes of any other text that a host reports.
pub const TEXT_BYTES_MAX: usize = 1_024;
/// Characters of a VMM's version, and of its build id.
pub const BUILD_CHARS_MAX: usize = 64;
/// What is kept of why a host cannot take a VM by post-copy.
pub const POST_COPY_CHARS_MAX: usize = 512;
/// Bytes of a reason's message; longer ones are cut.
pub const REASON_BYTES_MAX: usize = 4_096;

/// Volumes in the cluster: more than one for each VM.
pub const VOLUMES_MAX: usize = 40_000;
/// Disks of one VM: the VMM's bus has room for them.
pub const DISKS_MAX: usize = 24;
/// Slots of a VM's bus, numbered from 1.
pub const SLOTS_MAX: u32 = 31;
/// The last slot that is given to a disk or NIC: 29 is a virtio console's, 30 a seed disk's, 31 a balloon's. Whatever a VM has otherwise has
/// room before.
pub const SLOTS_GIVEN_MAX: u32 = 28;
/// The device model that brought virtio consoles.
pub const MODEL_CONSOLE: u32 = 6;
/// Bytes of a disk's serial number: what virtio's `GET_ID` carries.
pub const SERIAL_BYTES_MAX: usize = 20;
/// A volume is a multiple of this, bytes, and at least one.
pub const VOLUME_BYTES_UNIT: u64 = 1 << 20;
/// The largest volume, bytes.
pub const VOLUME_BYTES_MAX: u64 = 64 << 40;
/// Pools that one host may report.
pub const HOST_POOLS_MAX: usize = 64;
/// The pool of a volume that names none.
pub const POOL_DEFAULT: &str = "default";

/// Networks in the cluster: as many as hosts can have VXLAN devices and bridges of without trouble.
pub const NETWORKS_MAX: usize = 4_000;
/// NICs of one VM: what the VMM's bus has room for beside its disks.
pub const NICS_MAX: usize = 4;
/// Characters of a MAC.
pub const MAC_CHARS: usize = 17;
/// Networks that one host may report.
pub const HOST_NETWORKS_MAX: usize = 64;
/// The largest VXLAN number: 24 bits (RFC 7348, 5).
pub const VNI_MAX: u32 = (1 << 24) - 1;
/// The UDP port that is assigned to VXLAN (RFC 7348, 8).
pub const VXLAN_PORT: u32 = 4_789;
/// What a tunnel adds to a frame, bytes: Ethernet, IPv4, UDP and VXLAN headers.
pub const MTU_VXLAN_OVERHEAD: u32 = 50;
/// The smallest MTU of a network, bytes: what every host must take of IPv4 (RFC 1122, 3.3.2).
pub const MTU_MIN: u32 = 576;
/// The largest, bytes: jumbo frames.
pub const MTU_MAX: u32 = 9_000;
/// Lengths of a subnet's prefix, bits: from as many addresses as a cluster never has VMs, to two.
pub const SUBNET_PREFIXES: std::ops::RangeInclusive<u32> = 8..=30;

/// Snapshots of one VM: a day's, hourly, and a month's, daily.
pub const SNAPSHOTS_OF_VM_MAX: usize = 64;
/// Snapshots in the cluster; each holds a copy of its VM's specification.
pub const SNAPSHOTS_MAX: usize = 10_000;
/// Contents of volumes that are still to be removed; beyond it one is left where it lies.
pub const REMOVALS_MAX: usize = 10_000;
/// Bytes of a VM's user data: what other clouds take as well.
pub const USER_DATA_BYTES_MAX: usize = 16 << 10;
/// Bytes of a VM's SSH keys, all of them.
pub const SSH_KEYS_BYTES_MAX: usize = 8 << 10;
/// Bytes of a network-config that is given.
pub const NETWORK_CONFIG_BYTES_MAX: usize = 8 << 10;
/// Bytes of a hostname (RFC 1035, 2.3.4).
pub const HOSTNAME_BYTES_MAX: usize = 253;
/// What cloud-init is told in all VMs together, bytes: an eighth of a snapshot.
pub const CLOUD_CLUSTER_BYTES_MAX: usize = 64 << 20;

/// vCPUs placed on a host for each of its CPUs: beyond it guests starve each other.
pub const VCPUS_PER_CPU_MAX: u32 = 8;
/// Hosts named with their reason when none fits; the rest is counted.
pub const REFUSALS_SHOWN_MAX: usize = 64;

/// The longest blackout that a migration may be asked to stay below, ms.
pub const MAX_DOWNTIME_MS_MAX: u32 = 600_000;
/// The longest deadline of a migration, ms: a week.
pub const DEADLINE_MS_MAX: u64 = 7 * 24 * 3_600_000;
/// The highest bandwidth cap, MiB/s.
pub const BANDWIDTH_MIB_S_MAX: u64 = 1_048_576;

/// The most TCP streams of a migration.
pub const STREAMS_MAX: u32 = 16;
/// The most that a migration may hold vCPUs back, percent: at 100 the guest would stand still.
pub const THROTTLE_PERCENT_MAX: u32 = 99;

/// Bytes of an encoded snapshot that is decoded.
pub const SNAPSHOT_BYTES_MAX: usize = 512 << 20;
