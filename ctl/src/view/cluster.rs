//! The cluster, its hosts, images and events as users see them.

use std::collections::BTreeMap;

use drover_proto::v1;
use serde::Serialize;

use super::{VmmView, dash, some};
use crate::output::{Detailed, Tabular};
use crate::units::{bytes, instant};

/// The controllers and the cluster's settings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ClusterView {
    /// The cluster's id.
    pub id: String,
    /// The controller that leads.
    pub leader: Option<String>,
    /// The Raft term.
    pub term: u64,
    /// The log index that the answer includes.
    pub applied: u64,
    /// The controller that answered.
    pub answered_by: String,
    /// The controllers.
    pub members: Vec<MemberView>,
    /// What the cluster was formed with.
    pub settings: SettingsView,
}

/// A controller.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MemberView {
    /// Its number.
    pub id: u64,
    /// Its name.
    pub name: String,
    /// `ip:port`.
    pub addr: String,
    /// `leader`, `follower` or `unreachable`.
    pub role: String,
    /// Replicated up to this log index, as the leader knows it.
    pub matched: u64,
}

/// The cluster's settings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SettingsView {
    /// A host's right to run.
    pub lease_ms: u64,
    /// The controllers wait this much longer.
    pub drift_margin_ms: u64,
    /// How often a host renews.
    pub heartbeat_ms: u64,
    /// The default intent of a migration.
    pub max_downtime_ms: u32,
    /// A migration's target must listen by then.
    pub prepare_timeout_ms: u64,
    /// A migration without any progress for so long is aborted.
    pub stall_timeout_ms: u64,
    /// From the source's pause to the commit.
    pub switchover_timeout_ms: u64,
    /// Whether migrations may ask for unencrypted pages.
    pub allow_plaintext: bool,
}

impl From<v1::Cluster> for ClusterView {
    fn from(cluster: v1::Cluster) -> Self {
        let settings = cluster.settings.unwrap_or_default();
        Self {
            id: cluster.id,
            leader: some(cluster.leader),
            term: cluster.term,
            applied: cluster.applied,
            answered_by: cluster.answered_by,
            members: cluster.members.into_iter().map(MemberView::from).collect(),
            settings: SettingsView {
                lease_ms: settings.lease_ms,
                drift_margin_ms: settings.drift_margin_ms,
                heartbeat_ms: settings.heartbeat_ms,
                max_downtime_ms: settings.max_downtime_ms,
                prepare_timeout_ms: settings.prepare_timeout_ms,
                stall_timeout_ms: settings.stall_timeout_ms,
                switchover_timeout_ms: settings.switchover_timeout_ms,
                allow_plaintext: settings.allow_plaintext,
            },
        }
    }
}

impl From<v1::Member> for MemberView {
    fn from(member: v1::Member) -> Self {
        let v1::Member {
            id,
            name,
            addr,
            role,
            matched,
        } = member;
        Self {
            id,
            name,
            addr,
            role,
            matched,
        }
    }
}

impl Tabular for MemberView {
    const HEAD: &'static [&'static str] = &["ID", "NAME", "ADDRESS", "ROLE", "MATCHED"];

    fn id(&self) -> &str {
        &self.name
    }

    fn row(&self) -> Vec<String> {
        vec![
            self.id.to_string(),
            self.name.clone(),
            self.addr.clone(),
            self.role.clone(),
            self.matched.to_string(),
        ]
    }
}

impl Detailed for ClusterView {
    fn fields(&self) -> Vec<(&'static str, String)> {
        vec![
            ("cluster", self.id.clone()),
            ("leader", dash(self.leader.as_deref())),
            ("term", self.term.to_string()),
            ("applied", self.applied.to_string()),
            ("answered by", self.answered_by.clone()),
            (
                "lease",
                format!(
                    "{} ms, renewed every {} ms",
                    self.settings.lease_ms, self.settings.heartbeat_ms
                ),
            ),
            ("max downtime", format!("{} ms", self.settings.max_downtime_ms)),
        ]
    }
}

/// A host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HostView {
    /// Its name.
    pub name: String,
    /// `up` or `down`.
    pub state: &'static str,
    /// VMs placed on it.
    pub vms: u32,
    /// CPUs of the host.
    pub cpus: u32,
    /// Virtual CPUs of the VMs placed on it.
    pub used_vcpus: u32,
    /// What guests may use.
    pub memory_mib: u64,
    /// What the VMs placed on it use.
    pub used_memory_mib: u64,
    /// `ip:port` of its agent.
    pub agent_addr: String,
    /// Migrations to it come to this address.
    pub migration_ip: String,
    /// Of its agent.
    pub version: String,
    /// The VMM that is installed; null: it could not be asked.
    pub vmm: Option<VmmView>,
    /// Version of the save-state it writes.
    pub device_model: u32,
    /// Of its kernel.
    pub boot_id: String,
    /// The images it has.
    pub images: Vec<HostImageView>,
    /// Storage for volumes that it reaches.
    pub pools: Vec<String>,
    /// Networks of kind `bridge` that it offers.
    pub networks: Vec<String>,
    /// Its address in tunnels; null: it offers no network of kind `vxlan`.
    pub vxlan: Option<String>,
    /// `ok`, or why it offers less than it is configured to; null: nothing is configured.
    pub networking: Option<String>,
    /// `ok`, or what its VMMs' sandbox lacks; null: it did not say.
    pub sandbox: Option<String>,
    /// What KVM offers.
    pub kvm_caps: Vec<String>,
    /// The CPU's features.
    pub cpu_features: Vec<String>,
    /// Unix milliseconds.
    pub registered_ms: u64,
    /// Unix milliseconds.
    pub changed_ms: u64,
}

/// An image as one host has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HostImageView {
    /// Its name.
    pub name: String,
    /// `elf-pvh`, `elf-linux`, `bzimage`, `disk`, `qcow2`, `initrd` or `invalid`.
    pub kind: String,
    /// Its length.
    pub bytes: u64,
    /// The size of the disk that it is the content of.
    pub disk_bytes: Option<u64>,
    /// Its BLAKE3 digest.
    pub blake3: String,
    /// What is wrong with an invalid one.
    pub problem: Option<String>,
}

fn host_state_word(state: v1::HostState) -> &'static str {
    match state {
        v1::HostState::Unspecified => "unspecified",
        v1::HostState::Up => "up",
        v1::HostState::Down => "down",
    }
}

impl From<v1::Host> for HostView {
    fn from(host: v1::Host) -> Self {
        let state = host_state_word(host.state());
        let spec = host.spec.unwrap_or_default();
        let capacity = spec.capacity.unwrap_or_default();
        Self {
            name: spec.name,
            state,
            vms: host.vms,
            cpus: capacity.cpus,
            used_vcpus: host.used_vcpus,
            memory_mib: capacity.memory_mib,
            used_memory_mib: host.used_memory_mib,
            agent_addr: spec.agent_addr,
            migration_ip: spec.migration_ip,
            version: spec.version,
            vmm: spec.vmm.map(VmmView::from),
            device_model: spec.device_model,
            boot_id: spec.boot_id,
            images: spec.images.into_iter().map(HostImageView::from).collect(),
            pools: spec.pools,
            networks: spec.networks,
            vxlan: some(spec.vxlan),
            networking: some(spec.networking),
            sandbox: some(spec.sandbox),
            kvm_caps: spec.kvm_caps,
            cpu_features: spec.cpu_features,
            registered_ms: host.registered_ms,
            changed_ms: host.changed_ms,
        }
    }
}

impl From<v1::Image> for HostImageView {
    fn from(image: v1::Image) -> Self {
        let v1::Image {
            name,
            kind,
            bytes,
            blake3,
            problem,
            disk_bytes,
        } = image;
        Self {
            name,
            kind,
            bytes,
            disk_bytes: Some(disk_bytes).filter(|bytes| *bytes > 0),
            blake3,
            problem: some(problem),
        }
    }
}

impl Tabular for HostView {
    const HEAD: &'static [&'static str] = &["NAME", "STATE", "VMS", "VCPUS", "MEMORY", "AGENT", "VERSION"];

    fn id(&self) -> &str {
        &self.name
    }

    fn row(&self) -> Vec<String> {
        vec![
            self.name.clone(),
            self.state.to_owned(),
            self.vms.to_string(),
            format!("{} on {}", self.used_vcpus, self.cpus),
            format!("{} of {} MiB", self.used_memory_mib, self.memory_mib),
            self.agent_addr.clone(),
            self.version.clone(),
        ]
    }
}

impl Detailed for HostView {
    fn fields(&self) -> Vec<(&'static str, String)> {
        let images: Vec<_> = self
            .images
            .iter()
            .map(|image| format!("{} ({})", image.name, image.kind))
            .collect();
        vec![
            ("name", self.name.clone()),
            ("state", self.state.to_owned()),
            ("vms", self.vms.to_string()),
            ("vcpus", format!("{} on {} CPUs", self.used_vcpus, self.cpus)),
            (
                "memory",
                format!("{} of {} MiB used", self.used_memory_mib, self.memory_mib),
            ),
            ("agent", self.agent_addr.clone()),
            ("migration ip", self.migration_ip.clone()),
            ("version", self.version.clone()),
            ("vmm", dash(self.vmm.as_ref().map(VmmView::line).as_deref())),
            ("device model", self.device_model.to_string()),
            ("boot id", self.boot_id.clone()),
            ("images", images.join(", ")),
            ("pools", dash(some(self.pools.join(", ")).as_deref())),
            ("networks", dash(some(self.networks.join(", ")).as_deref())),
            ("vxlan", dash(self.vxlan.as_deref())),
            ("networking", dash(self.networking.as_deref())),
            ("sandbox", dash(self.sandbox.as_deref())),
            ("kvm", self.kvm_caps.join(" ")),
            ("cpu", self.cpu_features.join(" ")),
            ("registered", instant(self.registered_ms)),
            ("changed", instant(self.changed_ms)),
        ]
    }
}

/// An image and the hosts that have it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ImageView {
    /// The image.
    #[serde(flatten)]
    pub image: HostImageView,
    /// Names of hosts.
    pub hosts: Vec<String>,
}

impl ImageView {
    /// The images of `hosts`, by name; files that differ under one name are rows of their own.
    pub fn of_hosts(hosts: &[HostView]) -> Vec<Self> {
        let mut images: BTreeMap<(&str, &str), Self> = BTreeMap::new();
        for host in hosts {
            for image in &host.images {
                images
                    .entry((&image.name, &image.blake3))
                    .or_insert_with(|| Self {
                        image: image.clone(),
                        hosts: vec![],
                    })
                    .hosts
                    .push(host.name.clone());
            }
        }
        images.into_values().collect()
    }
}

impl Tabular for ImageView {
    const HEAD: &'static [&'static str] = &["NAME", "KIND", "SIZE", "BLAKE3", "HOSTS", "PROBLEM"];

    fn id(&self) -> &str {
        &self.image.name
    }

    fn row(&self) -> Vec<String> {
        vec![
            self.image.name.clone(),
            self.image.kind.clone(),
            bytes(self.image.bytes),
            self.image.blake3.chars().take(12).collect(),
            self.hosts.join(","),
            self.image.problem.clone().unwrap_or_default(),
        ]
    }
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EventView {
    /// Rises by one, cluster-wide.
    pub seq: u64,
    /// Unix milliseconds.
    pub time_ms: u64,
    /// `vm.running`, `migration.planned`, …
    pub kind: String,
    /// `vm/vm1`, `host/host1`, `migration/m1`.
    pub subject: String,
    /// For people.
    pub message: String,
}

impl From<v1::Event> for EventView {
    fn from(event: v1::Event) -> Self {
        let v1::Event {
            seq,
            time_ms,
            kind,
            subject,
            message,
        } = event;
        Self {
            seq,
            time_ms,
            kind,
            subject,
            message,
        }
    }
}

impl EventView {
    /// One line for people, in columns that fit most events.
    pub fn line(&self) -> String {
        let Self {
            seq,
            kind,
            subject,
            message,
            ..
        } = self;
        format!(
            "{seq:>6}  {}  {kind:<19}  {subject:<20}  {message}",
            instant(self.time_ms)
        )
        .trim_end()
        .to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(name: &str, images: &[(&str, &str)]) -> HostView {
        let images = images
            .iter()
            .map(|&(name, blake3)| v1::Image {
                name: name.into(),
                blake3: blake3.into(),
                ..Default::default()
            })
            .collect();
        let spec = v1::HostSpec {
            name: name.to_owned(),
            images,
            ..Default::default()
        };
        HostView::from(v1::Host {
            spec: Some(spec),
            state: v1::HostState::Up.into(),
            ..Default::default()
        })
    }

    #[test]
    fn images_are_gathered_over_the_hosts_and_kept_apart_where_they_differ() {
        let hosts = [
            host("host1", &[("probe", "aa"), ("linux", "cc")]),
            host("host2", &[("probe", "aa"), ("linux", "dd")]),
        ];
        let images = ImageView::of_hosts(&hosts);
        let seen: Vec<_> = images
            .iter()
            .map(|i| (i.id(), i.image.blake3.as_str(), i.hosts.join(",")))
            .collect();
        assert_eq!(
            seen,
            [
                ("linux", "cc", "host1".to_owned()),
                ("linux", "dd", "host2".to_owned()),
                ("probe", "aa", "host1,host2".to_owned())
            ]
        );
        let json = serde_json::to_value(&images[2]).unwrap();
        assert_eq!(
            (json["name"].as_str(), json["hosts"][1].as_str()),
            (Some("probe"), Some("host2"))
        );
    }

    #[test]
    fn a_cluster_without_a_leader_says_null() {
        let json = serde_json::to_value(ClusterView::from(v1::Cluster::default())).unwrap();
        assert!(json["leader"].is_null());
        assert_eq!(json["members"].as_array().map(Vec::len), Some(0));
    }

    #[test]
    fn rows_have_a_cell_for_each_heading() {
        let host = host("host1", &[("probe", "aa")]);
        assert_eq!(host.row().len(), HostView::HEAD.len());
        assert_eq!(host.state, "up");
        assert_eq!(ImageView::of_hosts(&[host])[0].row().len(), ImageView::HEAD.len());
        assert_eq!(
            MemberView::from(v1::Member::default()).row().len(),
            MemberView::HEAD.len()
        );
    }

    #[test]
    fn an_event_is_one_line() {
        let event = EventView {
            seq: 7,
            time_ms: 1_700_000_000_000,
            kind: "vm.running".to_owned(),
            subject: "vm/vm1".to_owned(),
            message: "on host1".to_owned(),
        };
        let line = event.line();
        assert!(
            line.contains("2023-11-14T22:13:20.000Z") && line.ends_with("on host1"),
            "{line}"
        );
    }
}
