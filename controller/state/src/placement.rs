//! Where a VM can run: a filter that gives a reason for every host it refuses, a score, and a tie-break by name. Pure,
//! so that every replica, and every pre-flight, answers alike.
//!
//! Used for starts, for migrations without a target, and to check a target that was named. The score spreads: the host
//! with the largest part of its memory free wins, then the one with the most vCPUs to spare, then the first by name.
//!
//! What it does not do: it moves nothing that already runs, and it knows no affinity.

use drover_proto::v1::{Host, HostCapacity, Image, VmSpec};
use drover_proto::{Code, Fault};

use crate::limits::{MODEL_CONSOLE, REFUSALS_SHOWN_MAX, VCPUS_PER_CPU_MAX};
use crate::networks;
use crate::snapshots;
use crate::state::{State, Usage};
use crate::validate::quoted;
use crate::volumes;

/// What the place is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose<'a> {
    /// A start on any host, or on the one that the spec pins.
    Start,
    /// A live migration away from the host of this name: the target must offer what the guest sees there.
    Migrate {
        /// The source.
        from: &'a str,
    },
    /// A start, as [`Purpose::Start`], that begins as a snapshot has it: the host must offer what its guest saw, as a migration's target.
    Restore {
        /// Its id.
        snapshot: &'a str,
        /// Where it is.
        pool: &'a str,
        /// What its host had.
        cpu_features: &'a [String],
        /// The least that reads its save-state.
        device_model: u32,
    },
}

/// How good a fitting host is; the greatest wins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Score {
    memory_free_permille: u64,
    vcpus_free: u32,
}

/// The best host for the VM, or `no_host_fits` with every host's reason.
pub fn choose(state: &State, spec: &VmSpec, purpose: Purpose<'_>) -> Result<String, Fault> {
    let usages = state.usages();
    let mut best: Option<(Score, &str)> = None;
    let mut refusals = Vec::new();
    for host in state.hosts() {
        let name = host_name(host);
        let usage = usages.get(name).copied().unwrap_or_default();
        match check(state, spec, purpose, host, usage) {
            // Hosts come in the order of their names, so an equal one later does not win.
            Ok(score) if best.is_none_or(|(best, _)| score > best) => best = Some((score, name)),
            Ok(_) => {}
            Err(fault) => refusals.push((name, fault)),
        }
    }
    match best {
        Some((_, name)) => Ok(name.to_owned()),
        None => Err(none_fits(spec, &refusals)),
    }
}

/// Whether the host of this name can take the VM; the fault says why not.
pub fn fits(state: &State, spec: &VmSpec, purpose: Purpose<'_>, host: &str) -> Result<(), Fault> {
    let usage = state.usages().get(host).copied().unwrap_or_default();
    let Some(host) = state.host(host) else {
        return Err(Fault::new(
            Code::HostNotFound,
            format!("no host is named {}", quoted(host)),
        ));
    };
    check(state, spec, purpose, host, usage).map(|_| ())
}

/// Whether any host could take the VM were everything else gone and every host up: a VM that fails this can never start
/// on the hosts as they are.
/// `more` is what else is asked of a host.
pub(crate) fn could_ever_fit(
    state: &State,
    spec: &VmSpec,
    purpose: Purpose<'_>,
    more: impl Fn(&Host) -> Result<(), Fault>,
) -> Result<(), Fault> {
    let mut refusals = Vec::new();
    for host in state.hosts() {
        let may = capacity(spec, host, Usage::default())
            .and_then(|_| pin(spec, purpose, host))
            .and_then(|()| volumes::reaches(state, spec, host))
            .and_then(|()| networks::reaches(state, spec, host))
            .and_then(|()| snapshots::restores(purpose, host))
            .and_then(|()| match purpose {
                Purpose::Restore { .. } => cpu(state, spec, purpose, host),
                // What a guest that boots sees is its host's to choose.
                _ => Ok(()),
            })
            .and_then(|()| device_model(state, spec, purpose, host))
            .and_then(|()| more(host));
        match may {
            Ok(()) => return Ok(()),
            Err(fault) => refusals.push((host_name(host), fault)),
        }
    }
    Err(none_fits(spec, &refusals))
}

fn none_fits(spec: &VmSpec, refusals: &[(&str, Fault)]) -> Fault {
    let mut message = format!(
        "no host can take {} ({} vCPUs, {} MiB): ",
        spec.name, spec.vcpus, spec.memory_mib
    );
    if refusals.is_empty() {
        message.push_str("no host is registered");
    }
    for (at, (host, fault)) in refusals.iter().take(REFUSALS_SHOWN_MAX).enumerate() {
        message.push_str(if at == 0 { "" } else { "; " });
        message.push_str(&format!("{host} {}", fault.message));
    }
    if refusals.len() > REFUSALS_SHOWN_MAX {
        message.push_str(&format!(
            "; and {} more hosts",
            refusals.len() - REFUSALS_SHOWN_MAX
        ));
    }
    Fault::new(Code::NoHostFits, message)
}

fn host_name(host: &Host) -> &str {
    host.spec.as_ref().map_or("", |spec| spec.name.as_str())
}

/// The whole filter, cheapest and plainest reason first. Messages go on after the host's name.
fn check(
    state: &State,
    spec: &VmSpec,
    purpose: Purpose<'_>,
    host: &Host,
    usage: Usage,
) -> Result<Score, Fault> {
    let name = host_name(host);
    if !state.host_is_up(name) {
        return Err(Fault::new(Code::HostDown, "is declared down: its lease ran out"));
    }
    pin(spec, purpose, host)?;
    if purpose == (Purpose::Migrate { from: name }) {
        return Err(Fault::new(Code::SameHost, "is where it runs"));
    }
    let score = capacity(spec, host, usage)?;
    // What is restored boots nothing.
    if !matches!(purpose, Purpose::Restore { .. }) {
        images(spec, host)?;
    }
    seeds(spec, host)?;
    volumes::reaches(state, spec, host)?;
    networks::reaches(state, spec, host)?;
    cpu(state, spec, purpose, host)?;
    device_model(state, spec, purpose, host)?;
    snapshots::restores(purpose, host)?;
    Ok(score)
}

/// A pin holds for starts only.
fn pin(spec: &VmSpec, purpose: Purpose<'_>, host: &Host) -> Result<(), Fault> {
    if !matches!(purpose, Purpose::Migrate { .. }) && !spec.host.is_empty() && spec.host != host_name(host) {
        return Err(Fault::new(
            Code::NoHostFits,
            format!("is not {}, to which it is pinned", spec.host),
        ));
    }
    Ok(())
}

/// Memory that is free, and that there is, MiB.
fn memory(spec: &VmSpec, host: &Host, usage: Usage) -> Result<(u64, u64), Fault> {
    let total = capacity_of(host).memory_mib;
    let free = total.saturating_sub(usage.memory_mib);
    if spec.memory_mib > free {
        return Err(Fault::new(
            Code::NoHostFits,
            format!(
                "has {free} MiB free of {total} MiB, {} MiB are needed",
                spec.memory_mib
            ),
        ));
    }
    Ok((free, total))
}

/// vCPUs that are free, and that there may be.
fn vcpus(spec: &VmSpec, host: &Host, usage: Usage) -> Result<(u32, u32), Fault> {
    let cpus = capacity_of(host).cpus;
    let total = cpus.saturating_mul(VCPUS_PER_CPU_MAX);
    let free = total.saturating_sub(usage.vcpus);
    if spec.vcpus > free {
        return Err(Fault::new(
            Code::NoHostFits,
            format!(
                "has {free} vCPUs free of {total} ({VCPUS_PER_CPU_MAX} for each of {cpus} CPUs), {} are needed",
                spec.vcpus
            ),
        ));
    }
    Ok((free, total))
}

fn capacity_of(host: &Host) -> HostCapacity {
    host.spec
        .as_ref()
        .and_then(|spec| spec.capacity)
        .unwrap_or_default()
}

fn capacity(spec: &VmSpec, host: &Host, usage: Usage) -> Result<Score, Fault> {
    let (memory_free, memory_total) = memory(spec, host, usage)?;
    let (vcpus_free, _) = vcpus(spec, host, usage)?;
    let memory_left = memory_free - spec.memory_mib;
    Ok(Score {
        memory_free_permille: memory_left.saturating_mul(1_000) / memory_total.max(1),
        vcpus_free: vcpus_free - spec.vcpus,
    })
}

/// What [`check`] asks of a migration's target that is up and not the source, each by itself: the name of the check, and
/// what was found. Texts go on after the host's name.
pub(crate) fn target_checks(
    state: &State,
    spec: &VmSpec,
    from: &str,
    host: &Host,
) -> Vec<(&'static str, Result<String, Fault>)> {
    let usage = state.usages().get(host_name(host)).copied().unwrap_or_default();
    let purpose = Purpose::Migrate { from };
    let memory = memory(spec, host, usage).map(|(free, total)| {
        format!(
            "has {free} MiB free of {total} MiB, {} MiB are needed",
            spec.memory_mib
        )
    });
    let vcpus = vcpus(spec, host, usage)
        .map(|(free, total)| format!("has {free} vCPUs free of {total}, {} are needed", spec.vcpus));
    let profile = &spec.cpu_profile;
    let mut checks = vec![
        ("memory", memory),
        ("vcpus", vcpus),
        (
            "images",
            images(spec, host).map(|()| "has the images that a start would need".to_owned()),
        ),
        (
            "cpu",
            cpu(state, spec, purpose, host)
                .map(|()| format!("has the CPU features that the profile {profile} shows to the guest")),
        ),
        (
            "device_model",
            device_model(state, spec, purpose, host)
                .map(|()| format!("reads the save-state that {from} writes")),
        ),
    ];
    if !spec.disks.is_empty() {
        let reaches = volumes::reaches(state, spec, host);
        checks.push((
            "pools",
            reaches.map(|()| "has the pools of its volumes".to_owned()),
        ));
    }
    if !spec.nics.is_empty() {
        let reaches = networks::reaches(state, spec, host);
        checks.push((
            "networks",
            reaches.map(|()| "offers the networks of its NICs".to_owned()),
        ));
    }
    checks
}

/// What is wrong with an image that is to be booted or loaded, if anything.
fn image<'a>(host: &'a Host, name: &str, kernel: bool) -> Result<&'a Image, Fault> {
    let images = host
        .spec
        .as_ref()
        .map(|spec| spec.images.as_slice())
        .unwrap_or_default();
    let Some(image) = images.iter().find(|image| image.name == name) else {
        return Err(Fault::new(
            Code::ImageNotFound,
            format!("has no image {}", quoted(name)),
        ));
    };
    if image.kind == "invalid" {
        return Err(Fault::new(
            Code::ImageInvalid,
            format!("has an invalid image {}: {}", quoted(name), image.problem),
        ));
    }
    if kernel && ["initrd", "disk", "qcow2"].contains(&image.kind.as_str()) {
        return Err(Fault::new(
            Code::ImageInvalid,
            format!(
                "has an image {} that is not a kernel (ELF or bzImage)",
                quoted(name)
            ),
        ));
    }
    Ok(image)
}

/// Whether its agent makes the seed disk, where there is to be one.
fn seeds(spec: &VmSpec, host: &Host) -> Result<(), Fault> {
    if spec.cloud_init.is_none() || host.spec.as_ref().is_some_and(|spec| spec.seeds) {
        return Ok(());
    }
    let message = "has an agent of a version that makes no seed disk for cloud-init: upgrade it";
    Err(Fault::new(Code::ProtocolVersion, message))
}

fn images(spec: &VmSpec, host: &Host) -> Result<(), Fault> {
    image(host, &spec.kernel, true)?;
    if !spec.initrd.is_empty() {
        image(host, &spec.initrd, false)?;
    }
    Ok(())
}

/// Whether at least one host holds each image of the spec in a form that can be used.
pub(crate) fn images_exist(state: &State, spec: &VmSpec) -> Result<(), Fault> {
    let wanted = [
        ("spec.kernel", &spec.kernel, true),
        ("spec.initrd", &spec.initrd, false),
    ];
    for (field, name, kernel) in wanted {
        if name.is_empty() {
            continue;
        }
        let mut worst: Option<Fault> = None;
        for host in state.hosts() {
            match image(host, name, kernel) {
                Ok(_) => {
                    worst = None;
                    break;
                }
                Err(fault) if fault.code == Code::ImageInvalid => {
                    let message = format!("{field}: {} {}", host_name(host), fault.message);
                    worst = Some(Fault::new(Code::ImageInvalid, message).field(field));
                }
                Err(_) if worst.is_none() => {
                    let message = format!("{field} is {}; no host has an image of this name", quoted(name));
                    worst = Some(Fault::new(Code::ImageNotFound, message).field(field));
                }
                Err(_) => {}
            }
        }
        if state.hosts.is_empty() {
            let message = format!(
                "{field} is {}; no host is registered that could have it",
                quoted(name)
            );
            worst = Some(Fault::new(Code::ImageNotFound, message).field(field));
        }
        if let Some(fault) = worst {
            return Err(fault);
        }
    }
    Ok(())
}

/// The features that a level of the x86-64 psABI adds to the baseline, each under every name it goes by.
const LEVEL_V2: &[&[&str]] = &[
    &["cx16", "cmpxchg16b"],
    &["lahf_lm", "lahf"],
    &["popcnt"],
    &["sse3", "pni"],
    &["ssse3"],
    &["sse4_1", "sse4.1"],
    &["sse4_2", "sse4.2"],
];
const LEVEL_V3_MORE: &[&[&str]] = &[
    &["avx"],
    &["avx2"],
    &["bmi1"],
    &["bmi2"],
    &["f16c"],
    &["fma"],
    &["lzcnt", "abm"],
    &["movbe"],
    &["xsave", "osxsave"],
];

/// Whether a host's features have one under any of its names.
fn names_feature(features: &[String], names: &[&str]) -> bool {
    names
        .iter()
        .any(|name| features.iter().any(|feature| feature == name))
}

/// What of a host's features a guest with this profile may have seen there, beyond what every host that it starts on has.
pub(crate) fn seen_there(profile: &str, features: &[String]) -> Vec<String> {
    let of_level = |feature: &&String| LEVEL_V2.iter().any(|names| names.contains(&feature.as_str()));
    match profile {
        "host" => features.to_vec(),
        "baseline" => features.iter().filter(of_level).cloned().collect(),
        _ => Vec::new(),
    }
}

/// The guest must never see a feature that the host lacks. A level is a fixed list (System V ABI, AMD64 supplement, table
/// 3.1). What a guest sees with "baseline" (level v2, less what its host lacks) and with "host" (all of its host) depends on
/// the host where it started: a start fits anywhere, a target must have as much of it as the source. A guest that came
/// from elsewhere sees no more than its source has, so this may refuse too much, never too little.
fn cpu(state: &State, spec: &VmSpec, purpose: Purpose<'_>, host: &Host) -> Result<(), Fault> {
    let has = host
        .spec
        .as_ref()
        .map(|spec| spec.cpu_features.as_slice())
        .unwrap_or_default();
    // What its guest may have seen so far; nothing of one that boots.
    let seen: &[String] = match purpose {
        Purpose::Start => &[],
        Purpose::Restore { cpu_features, .. } => cpu_features,
        Purpose::Migrate { from } => {
            let spec = state.host(from).and_then(|host| host.spec.as_ref());
            spec.map(|spec| spec.cpu_features.as_slice()).unwrap_or_default()
        }
    };
    let lacks = |names: &&[&str]| !names_feature(has, names);
    let mut missing: Vec<&str> = Vec::new();
    match spec.cpu_profile.as_str() {
        "x86-64-v2" => missing.extend(LEVEL_V2.iter().copied().filter(lacks).map(|names| names[0])),
        "x86-64-v3" => {
            let level = LEVEL_V2.iter().chain(LEVEL_V3_MORE).copied();
            missing.extend(level.filter(lacks).map(|names| names[0]));
        }
        "baseline" => {
            let seen = LEVEL_V2
                .iter()
                .copied()
                .filter(|names| names_feature(seen, names));
            missing.extend(seen.filter(lacks).map(|names| names[0]));
        }
        "host" => {
            missing.extend(
                seen.iter()
                    .map(String::as_str)
                    .filter(|name| lacks(&[*name].as_slice())),
            );
        }
        _ => {}
    }
    if missing.is_empty() {
        return Ok(());
    }
    Err(Fault::new(
        Code::NoHostFits,
        format!(
            "lacks CPU features that the profile {} shows to the guest: {}",
            spec.cpu_profile,
            missing.join(", ")
        ),
    ))
}

/// A host reads every save-state up to its own version, and knows the devices of that.
fn device_model(state: &State, spec: &VmSpec, purpose: Purpose<'_>, host: &Host) -> Result<(), Fault> {
    let version = |host: Option<&Host>| {
        host.and_then(|host| host.spec.as_ref())
            .map_or(0, |spec| spec.device_model)
    };
    let knows = version(Some(host));
    if spec.virtio_console && knows < MODEL_CONSOLE {
        // Its agent would start the VM without.
        let message = format!(
            "knows devices up to version {knows}, a virtio console is of version {MODEL_CONSOLE}: upgrade it first"
        );
        return Err(Fault::new(Code::NoHostFits, message));
    }
    let from = match purpose {
        Purpose::Start => return Ok(()),
        Purpose::Migrate { from } => from,
        Purpose::Restore {
            snapshot,
            device_model: writes,
            ..
        } => {
            let reads = version(Some(host));
            if writes <= reads {
                return Ok(());
            }
            let message = format!(
                "reads save-state up to version {reads}, snapshot {snapshot} is of version {writes}: upgrade it first"
            );
            return Err(Fault::new(Code::NoHostFits, message));
        }
    };
    // What the VM itself needs, where its VMM says so; else what its host's VMMs write.
    let needs = state.vm(&spec.name).and_then(|vm| vm.devices.as_ref());
    let needs = needs
        .map(|devices| devices.device_model)
        .filter(|model| *model > 0);
    let (writes, reads) = (
        needs.unwrap_or_else(|| version(state.host(from))),
        version(Some(host)),
    );
    if writes > reads {
        return Err(Fault::new(
            Code::NoHostFits,
            format!(
                "reads save-state up to version {reads}, {from} writes version {writes}: upgrade it first"
            ),
        ));
    }
    Ok(())
}
