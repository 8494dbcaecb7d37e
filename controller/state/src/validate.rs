//! The form of what comes in, checked before anything looks at its meaning. Every refusal names the field, the value,
//! and what would be right.

use std::net::{IpAddr, SocketAddr};

use drover_proto::v1::{
    Balloon, Compression, HostSpec, MigrationOptions, RestartPolicy, Settings, VmSpec, VmmBuild, Volume,
};
use drover_proto::{Code, Fault};

use crate::limits::{
    BANDWIDTH_MIB_S_MAX, BUILD_CHARS_MAX, CMDLINE_BYTES_MAX, DEADLINE_MS_MAX, DISKS_MAX, HOST_LIST_MAX,
    HOST_POOLS_MAX, IMAGE_NAME_BYTES_MAX, MAX_DOWNTIME_MS_MAX, MEMORY_MIB_MAX, MEMORY_MIB_MIN,
    NAME_BYTES_MAX, POOL_DEFAULT, POST_COPY_CHARS_MAX, SERIAL_BYTES_MAX, STREAMS_MAX, TEXT_BYTES_MAX,
    THROTTLE_PERCENT_MAX, VCPUS_MAX, VOLUME_BYTES_MAX, VOLUME_BYTES_UNIT,
};
use crate::state::default_settings;
use crate::{cloud, networks};

/// CPU profiles by name; the first is the default.
pub(crate) const CPU_PROFILES: [&str; 4] = ["baseline", "x86-64-v2", "x86-64-v3", "host"];

pub(crate) fn invalid(field: &str, message: String) -> Fault {
    Fault::new(Code::InvalidArgument, message).field(field)
}

/// A VM's or host's name: a DNS label in lower case.
pub(crate) fn name(field: &str, value: &str) -> Result<(), Fault> {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let well_formed = value.len() <= NAME_BYTES_MAX
        && value.bytes().all(|byte| inner(byte) || byte == b'-')
        && value.bytes().next().is_some_and(inner)
        && value.bytes().last().is_some_and(inner);
    if well_formed {
        return Ok(());
    }
    Err(invalid(
        field,
        format!(
            "{field} is {}; a name has 1 to {NAME_BYTES_MAX} characters of a-z, 0-9 and -, and begins and ends with a letter or digit",
            quoted(value)
        ),
    ))
}

/// `value` in quotes, cut to a length that fits a sentence.
pub(crate) fn quoted(value: &str) -> String {
    const SHOWN_CHARS_MAX: usize = 80;
    if value.chars().count() <= SHOWN_CHARS_MAX {
        return format!("{value:?}");
    }
    let start: String = value.chars().take(SHOWN_CHARS_MAX).collect();
    format!("{start:?}… ({} bytes)", value.len())
}

/// Checks a VM's spec and fills in its defaults.
pub(crate) fn vm_spec(spec: Option<&VmSpec>) -> Result<VmSpec, Fault> {
    let Some(spec) = spec else {
        return Err(invalid(
            "spec",
            "spec is missing; it says what the VM is".to_owned(),
        ));
    };
    let mut spec = spec.clone();
    name("spec.name", &spec.name)?;
    if !(1..=VCPUS_MAX).contains(&spec.vcpus) {
        return Err(invalid(
            "spec.vcpus",
            format!("spec.vcpus is {}; 1 to {VCPUS_MAX} are possible", spec.vcpus),
        ));
    }
    if !(MEMORY_MIB_MIN..=MEMORY_MIB_MAX).contains(&spec.memory_mib) {
        return Err(invalid(
            "spec.memory_mib",
            format!(
                "spec.memory_mib is {}; {MEMORY_MIB_MIN} to {MEMORY_MIB_MAX} are possible",
                spec.memory_mib
            ),
        ));
    }
    image_name("spec.kernel", &spec.kernel)?;
    if !spec.initrd.is_empty() {
        image_name("spec.initrd", &spec.initrd)?;
    }
    if spec.cmdline.len() > CMDLINE_BYTES_MAX || spec.cmdline.contains('\0') {
        return Err(invalid(
            "spec.cmdline",
            format!(
                "spec.cmdline has {} bytes; at most {CMDLINE_BYTES_MAX} are possible, none of them NUL",
                spec.cmdline.len()
            ),
        ));
    }
    if spec.cpu_profile.is_empty() {
        CPU_PROFILES[0].clone_into(&mut spec.cpu_profile);
    }
    if !CPU_PROFILES.contains(&spec.cpu_profile.as_str()) {
        return Err(invalid(
            "spec.cpu_profile",
            format!(
                "spec.cpu_profile is {}; one of {} is possible",
                quoted(&spec.cpu_profile),
                CPU_PROFILES.join(", ")
            ),
        ));
    }
    match RestartPolicy::try_from(spec.restart) {
        Ok(RestartPolicy::Unspecified) => spec.set_restart(RestartPolicy::Never),
        Ok(_) => {}
        Err(_) => {
            return Err(invalid(
                "spec.restart",
                format!(
                    "spec.restart is {}; 1 (never) or 2 (on failure) are possible",
                    spec.restart
                ),
            ));
        }
    }
    if Balloon::try_from(spec.balloon).is_err() {
        let message = format!("spec.balloon is {}; 1 (off) or 2 (on) are possible", spec.balloon);
        return Err(invalid("spec.balloon", message));
    }
    if !spec.host.is_empty() {
        name("spec.host", &spec.host)?;
    }
    disks(&spec)?;
    networks::check_nics(&mut spec)?;
    cloud::check(&spec)?;
    // The cluster's own to say.
    spec.devices_revision = 0;
    (spec.memory_target_mib, spec.memory_revision) = (0, 0);
    if let Some(cloud) = &mut spec.cloud_init {
        cloud.user_data_bytes = 0;
    }
    for disk in &mut spec.disks {
        (disk.slot, disk.attach_revision, disk.detach_revision) = (0, 0, 0);
    }
    for nic in &mut spec.nics {
        (nic.slot, nic.attach_revision, nic.detach_revision) = (0, 0, 0);
        nic.unplugged = false;
    }
    Ok(spec)
}

/// The form of a spec's disks. What they name is looked up elsewhere.
pub(crate) fn disks(spec: &VmSpec) -> Result<(), Fault> {
    const FIELD: &str = "spec.disks";
    if spec.disks.len() > DISKS_MAX {
        let message = format!(
            "{FIELD} has {} disks; at most {DISKS_MAX} are possible",
            spec.disks.len()
        );
        return Err(invalid(FIELD, message));
    }
    for (at, disk) in spec.disks.iter().enumerate() {
        name("spec.disks.volume", &disk.volume)?;
        if spec.disks[..at].iter().any(|other| other.volume == disk.volume) {
            let message = format!("{FIELD} names volume {} twice; once is possible", disk.volume);
            return Err(invalid("spec.disks.volume", message));
        }
        let printable = disk.serial.bytes().all(|byte| byte.is_ascii_graphic());
        if disk.serial.len() > SERIAL_BYTES_MAX || !printable {
            let message = format!(
                "the serial number of volume {} is {}; at most {SERIAL_BYTES_MAX} printable ASCII characters without blanks are possible",
                disk.volume,
                quoted(&disk.serial)
            );
            return Err(invalid("spec.disks.serial", message));
        }
    }
    Ok(())
}

/// Checks what is asked for of a volume and fills in its pool; all else of it is the cluster's to say.
pub(crate) fn volume(asked: Option<&Volume>) -> Result<Volume, Fault> {
    let asked = asked.cloned().unwrap_or_default();
    name("volume.name", &asked.name)?;
    let pool = if asked.pool.is_empty() {
        POOL_DEFAULT.to_owned()
    } else {
        asked.pool
    };
    name("volume.pool", &pool)?;
    if !asked.image.is_empty() {
        image_name("volume.image", &asked.image)?;
    }
    // Of an image it can be left out: it is the image's then.
    if asked.image.is_empty() || asked.size_bytes > 0 {
        volume_bytes("volume.size_bytes", asked.size_bytes)?;
    }
    Ok(Volume {
        name: asked.name,
        pool,
        size_bytes: asked.size_bytes,
        image: asked.image,
        ..Volume::default()
    })
}

/// Whether a volume can have this size.
pub(crate) fn volume_bytes(field: &str, bytes: u64) -> Result<(), Fault> {
    let whole = bytes.is_multiple_of(VOLUME_BYTES_UNIT);
    if whole && (VOLUME_BYTES_UNIT..=VOLUME_BYTES_MAX).contains(&bytes) {
        return Ok(());
    }
    let message = format!(
        "{field} is {bytes}; a multiple of {VOLUME_BYTES_UNIT} (1 MiB), at most {VOLUME_BYTES_MAX} (64 TiB), is possible"
    );
    Err(invalid(field, message))
}

fn image_name(field: &str, value: &str) -> Result<(), Fault> {
    let well_formed = !value.is_empty()
        && value.len() <= IMAGE_NAME_BYTES_MAX
        && !value.starts_with('.')
        && value.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/');
    if well_formed {
        return Ok(());
    }
    Err(invalid(
        field,
        format!(
            "{field} is {}; an image's name has 1 to {IMAGE_NAME_BYTES_MAX} printable characters without / and space, and does not begin with a dot",
            quoted(value)
        ),
    ))
}

/// Checks what a host says about itself and brings its lists into order.
pub(crate) fn host_spec(spec: &HostSpec) -> Result<HostSpec, Fault> {
    let mut spec = spec.clone();
    name("spec.name", &spec.name)?;
    if spec.agent_addr.parse::<SocketAddr>().is_err() {
        return Err(invalid(
            "spec.agent_addr",
            format!(
                "spec.agent_addr is {}; it is an ip:port",
                quoted(&spec.agent_addr)
            ),
        ));
    }
    if spec.migration_ip.parse::<IpAddr>().is_err() {
        return Err(invalid(
            "spec.migration_ip",
            format!(
                "spec.migration_ip is {}; it is an IP address",
                quoted(&spec.migration_ip)
            ),
        ));
    }
    let capacity = spec.capacity.unwrap_or_default();
    if capacity.cpus == 0 || capacity.memory_mib == 0 {
        return Err(invalid(
            "spec.capacity",
            format!(
                "spec.capacity is {} cpus and {} MiB; both are at least 1",
                capacity.cpus, capacity.memory_mib
            ),
        ));
    }
    host_lists(&spec)?;
    networks::check_host(&mut spec)?;
    spec.vmm = spec.vmm.as_ref().map(vmm_build);
    spec.post_copy = spec.post_copy.chars().take(POST_COPY_CHARS_MAX).collect();
    spec.sandbox = spec.sandbox.chars().take(POST_COPY_CHARS_MAX).collect();
    spec.cpu_features.sort_unstable();
    spec.cpu_features.dedup();
    spec.kvm_caps.sort_unstable();
    spec.kvm_caps.dedup();
    spec.pools.sort_unstable();
    spec.pools.dedup();
    spec.images.sort_by(|a, b| a.name.cmp(&b.name));
    spec.images.dedup_by(|a, b| a.name == b.name);
    Ok(spec)
}

/// What a VMM says of itself, brought below its bounds: it is shown and compared, nothing else.
pub(crate) fn vmm_build(build: &VmmBuild) -> VmmBuild {
    let short = |text: &str| text.chars().take(BUILD_CHARS_MAX).collect();
    VmmBuild {
        version: short(&build.version),
        build: short(&build.build),
    }
}

/// Bounds what a host lists and says of itself in its own words.
fn host_lists(spec: &HostSpec) -> Result<(), Fault> {
    for (field, text) in [("spec.version", &spec.version), ("spec.boot_id", &spec.boot_id)] {
        if text.len() > TEXT_BYTES_MAX {
            return Err(invalid(
                field,
                format!(
                    "{field} has {} bytes; at most {TEXT_BYTES_MAX} are possible",
                    text.len()
                ),
            ));
        }
    }
    for (field, list) in [
        ("spec.cpu_features", &spec.cpu_features),
        ("spec.kvm_caps", &spec.kvm_caps),
    ] {
        if list.len() > HOST_LIST_MAX || list.iter().any(|text| text.len() > IMAGE_NAME_BYTES_MAX) {
            return Err(invalid(
                field,
                format!(
                    "{field} has {} names; at most {HOST_LIST_MAX} of {IMAGE_NAME_BYTES_MAX} bytes are possible",
                    list.len()
                ),
            ));
        }
    }
    if spec.pools.len() > HOST_POOLS_MAX {
        let message = format!(
            "spec.pools has {} pools; at most {HOST_POOLS_MAX} are possible",
            spec.pools.len()
        );
        return Err(invalid("spec.pools", message));
    }
    spec.pools.iter().try_for_each(|pool| name("spec.pools", pool))?;
    let too_long = |text: &str| text.len() > TEXT_BYTES_MAX;
    if spec.images.len() > HOST_LIST_MAX
        || spec.images.iter().any(|image| {
            [&image.name, &image.kind, &image.blake3, &image.problem]
                .into_iter()
                .any(|text| too_long(text))
        })
    {
        return Err(invalid(
            "spec.images",
            format!(
                "spec.images has {} images; at most {HOST_LIST_MAX}, each text below {TEXT_BYTES_MAX} bytes",
                spec.images.len()
            ),
        ));
    }
    Ok(())
}

/// Checks a migration's options and fills in the cluster's defaults.
pub(crate) fn options(
    options: Option<&MigrationOptions>,
    settings: &Settings,
) -> Result<MigrationOptions, Fault> {
    let mut options = options.copied().unwrap_or_default();
    if options.max_downtime_ms == 0 {
        options.max_downtime_ms = settings.max_downtime_ms;
    }
    let bounded = [
        (
            "options.max_downtime_ms",
            u64::from(options.max_downtime_ms),
            u64::from(MAX_DOWNTIME_MS_MAX),
        ),
        ("options.deadline_ms", options.deadline_ms, DEADLINE_MS_MAX),
        (
            "options.bandwidth_mib_s",
            options.bandwidth_mib_s,
            BANDWIDTH_MIB_S_MAX,
        ),
        (
            "options.streams",
            u64::from(options.streams),
            u64::from(STREAMS_MAX),
        ),
        (
            "options.max_throttle_percent",
            u64::from(options.max_throttle_percent),
            u64::from(THROTTLE_PERCENT_MAX),
        ),
    ];
    for (field, value, max) in bounded {
        if value > max {
            return Err(invalid(
                field,
                format!("{field} is {value}; at most {max} is possible"),
            ));
        }
    }
    if Compression::try_from(options.compression).is_err() {
        let message = format!(
            "options.compression is {}; 0 (auto), 1 (off), 2 (lz4) and 3 (zstd) are known here",
            options.compression
        );
        return Err(invalid("options.compression", message));
    }
    if options.plaintext && !settings.allow_plaintext {
        let message = "options.plaintext asks for unencrypted pages, which the cluster's setting allow_plaintext does not allow";
        return Err(Fault::new(Code::Denied, message).field("options.plaintext"));
    }
    Ok(options)
}

/// [`options`] of an upgrade, in which no page is sent: what is about pages has no meaning there, and asking for it is a mistake.
pub(crate) fn upgrade_options(
    options: Option<&MigrationOptions>,
    settings: &Settings,
) -> Result<MigrationOptions, Fault> {
    let given = options.copied().unwrap_or_default();
    let about_pages = [
        ("options.bandwidth_mib_s", given.bandwidth_mib_s > 0),
        ("options.streams", given.streams > 0),
        ("options.plaintext", given.plaintext),
        ("options.max_throttle_percent", given.max_throttle_percent > 0),
        ("options.allow_postcopy", given.allow_postcopy),
    ];
    if let Some((field, _)) = about_pages.into_iter().find(|(_, asked)| *asked) {
        return Err(invalid(
            field,
            format!("{field} is set; an upgrade sends no page, leave it out"),
        ));
    }
    self::options(options, settings)
}

/// Fills a cluster's settings up with the defaults and checks that they hold together.
pub(crate) fn settings(settings: Option<&Settings>) -> Result<Settings, Fault> {
    const HOUR_MS: u64 = 3_600_000;
    let given = settings.copied().unwrap_or_default();
    let default = default_settings();
    let or = |value: u64, default: u64| if value == 0 { default } else { value };
    let lease_ms = or(given.lease_ms, default.lease_ms);
    let full = Settings {
        lease_ms,
        // By default a tenth of the lease: far above any drift of two clocks over that time.
        drift_margin_ms: or(given.drift_margin_ms, (lease_ms / 10).max(100)),
        // By default five renewals fit into a lease.
        heartbeat_ms: or(given.heartbeat_ms, (lease_ms / 5).max(50)),
        max_downtime_ms: if given.max_downtime_ms == 0 {
            default.max_downtime_ms
        } else {
            given.max_downtime_ms
        },
        prepare_timeout_ms: or(given.prepare_timeout_ms, default.prepare_timeout_ms),
        stall_timeout_ms: or(given.stall_timeout_ms, default.stall_timeout_ms),
        switchover_timeout_ms: or(given.switchover_timeout_ms, default.switchover_timeout_ms),
        allow_plaintext: given.allow_plaintext,
    };
    let bounded = [
        ("settings.lease_ms", full.lease_ms, 200, HOUR_MS),
        (
            "settings.drift_margin_ms",
            full.drift_margin_ms,
            full.lease_ms / 1_000 + 1,
            HOUR_MS,
        ),
        ("settings.heartbeat_ms", full.heartbeat_ms, 10, full.lease_ms / 2),
        (
            "settings.max_downtime_ms",
            u64::from(full.max_downtime_ms),
            1,
            u64::from(MAX_DOWNTIME_MS_MAX),
        ),
        (
            "settings.prepare_timeout_ms",
            full.prepare_timeout_ms,
            100,
            HOUR_MS,
        ),
        ("settings.stall_timeout_ms", full.stall_timeout_ms, 100, HOUR_MS),
        (
            "settings.switchover_timeout_ms",
            full.switchover_timeout_ms,
            100,
            HOUR_MS,
        ),
    ];
    for (field, value, min, max) in bounded {
        if !(min..=max).contains(&value) {
            return Err(invalid(
                field,
                format!("{field} is {value}; {min} to {max} are possible here"),
            ));
        }
    }
    Ok(full)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> VmSpec {
        VmSpec {
            name: "vm1".into(),
            vcpus: 1,
            memory_mib: 64,
            kernel: "probe".into(),
            ..VmSpec::default()
        }
    }

    #[test]
    fn a_good_spec_gets_its_defaults() {
        let full = vm_spec(Some(&spec())).unwrap();
        assert_eq!(full.cpu_profile, "baseline");
        assert_eq!(full.restart(), RestartPolicy::Never);
    }

    #[test]
    fn a_bad_field_is_named_with_its_value() {
        type Change = fn(&mut VmSpec);
        let cases: [(&str, Change, &str); 10] = [
            ("spec.name", |s| s.name = "Vm_1".into(), "\"Vm_1\""),
            ("spec.name", |s| s.name = "-a".into(), "\"-a\""),
            ("spec.name", |s| s.name = "a".repeat(64), "aaaa"),
            ("spec.vcpus", |s| s.vcpus = 0, "is 0"),
            ("spec.vcpus", |s| s.vcpus = 33, "is 33"),
            ("spec.memory_mib", |s| s.memory_mib = 15, "is 15"),
            (
                "spec.kernel",
                |s| s.kernel = "../etc/passwd".into(),
                "../etc/passwd",
            ),
            ("spec.cmdline", |s| s.cmdline = "x".repeat(2049), "2049"),
            ("spec.cpu_profile", |s| s.cpu_profile = "v9".into(), "\"v9\""),
            ("spec.restart", |s| s.restart = 7, "is 7"),
        ];
        for (field, change, shown) in cases {
            let mut spec = spec();
            change(&mut spec);
            let fault = vm_spec(Some(&spec)).unwrap_err();
            assert_eq!((fault.code, fault.field.as_str()), (Code::InvalidArgument, field));
            assert!(
                fault.message.contains(shown),
                "{} does not show {shown}",
                fault.message
            );
        }
    }

    #[test]
    fn options_out_of_bounds_are_refused_by_field_and_value() {
        let asked = |change: fn(&mut MigrationOptions)| {
            let mut asked = MigrationOptions::default();
            change(&mut asked);
            options(Some(&asked), &default_settings())
        };
        type Change = fn(&mut MigrationOptions);
        let bad: [(&str, Change, &str); 6] = [
            ("options.compression", |o| o.compression = 9, "9; 0 (auto)"),
            ("options.streams", |o| o.streams = 17, "17; at most 16"),
            (
                "options.max_throttle_percent",
                |o| o.max_throttle_percent = 100,
                "100; at most 99",
            ),
            (
                "options.max_downtime_ms",
                |o| o.max_downtime_ms = u32::MAX,
                "at most",
            ),
            ("options.deadline_ms", |o| o.deadline_ms = u64::MAX, "at most"),
            (
                "options.bandwidth_mib_s",
                |o| o.bandwidth_mib_s = u64::MAX,
                "at most",
            ),
        ];
        for (field, change, shown) in bad {
            let fault = asked(change).unwrap_err();
            assert_eq!((fault.code, fault.field.as_str()), (Code::InvalidArgument, field));
            assert!(fault.message.contains(shown), "{fault}");
        }
        let good = asked(|o| (o.streams, o.max_throttle_percent) = (16, 99)).unwrap();
        assert_eq!(good.max_downtime_ms, 100, "the default is filled in");
    }

    #[test]
    fn pages_go_unencrypted_only_where_the_policy_allows_it() {
        let plain = MigrationOptions {
            plaintext: true,
            ..MigrationOptions::default()
        };
        let fault = options(Some(&plain), &default_settings()).unwrap_err();
        assert_eq!(
            (fault.code, fault.field.as_str()),
            (Code::Denied, "options.plaintext")
        );
        let open = settings(Some(&Settings {
            allow_plaintext: true,
            ..Settings::default()
        }))
        .unwrap();
        assert!(options(Some(&plain), &open).unwrap().plaintext);
    }

    #[test]
    fn settings_are_filled_from_the_lease() {
        let full = settings(Some(&Settings {
            lease_ms: 2_000,
            ..Settings::default()
        }))
        .unwrap();
        assert_eq!((full.drift_margin_ms, full.heartbeat_ms), (200, 400));
        assert_eq!(settings(None).unwrap(), default_settings());
        let fault = settings(Some(&Settings {
            lease_ms: 1_000,
            heartbeat_ms: 900,
            ..Settings::default()
        }));
        assert_eq!(fault.unwrap_err().field, "settings.heartbeat_ms");
    }
}
