//! A stock Debian kernel boots under `drover-vmm` on a host with hardware virtualization (emulated), answers on its serial console, is
//! migrated between two VMMs there, and goes on answering.

use std::path::{Path, PathBuf};

use drover_linux_guest::host::{self, Programs};
use drover_linux_guest::kernel::Kernel;
use drover_linux_guest::report::{Asked, GuestFacts, NETWORK_CONFIG, Report};

/// The folder that cargo builds into: an integration test's temporary folder lies in it.
fn target_dir() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
        .parent()
        .expect("a folder in the target folder")
        .to_owned()
}

/// The newer of the VMM that `cargo xtask test` put aside and the one of a plain build.
fn vmm(target: &Path) -> PathBuf {
    let built = |path: &PathBuf| path.metadata().and_then(|file| file.modified()).ok();
    let places = ["chaos-bin/drover-vmm", "debug/drover-vmm"].map(|path| target.join(path));
    places
        .into_iter()
        .max_by_key(built)
        .expect("there are two places")
}

/// Runs the emulated host, or says why that is not possible here.
fn reports() -> Result<Vec<Report>, String> {
    let target = target_dir();
    let programs = Programs {
        driver: PathBuf::from(env!("CARGO_BIN_EXE_drover-linux-guest-driver")),
        vmm: vmm(&target),
    };
    if let Some(why) = host::obstacle(&programs) {
        return Err(why);
    }
    let cache = target.join("linux-guest");
    let kernel = Kernel::get(&cache)?;
    let folder = tempfile::tempdir().expect("a temporary folder");
    let initramfs = folder.path().join("initramfs");
    let bytes = host::initramfs(&kernel, &programs).expect("the initramfs is built");
    std::fs::write(&initramfs, bytes).expect("the initramfs is written");
    Ok(host::run(&kernel, &initramfs, &cache.join("console.log")).expect("the emulated host runs"))
}

fn answer(reports: &[Report], after: bool) -> (&GuestFacts, Asked) {
    let found = reports.iter().find_map(|report| match report {
        Report::Answered {
            migrated,
            guest,
            asked,
        } if *migrated == after => Some((guest, *asked)),
        _ => None,
    });
    found.unwrap_or_else(|| panic!("no answer (after the migration: {after}) in {reports:#?}"))
}

/// The grain of `/proc/uptime`, and how far the host's clock may be read apart from the guest's, ms.
const UPTIME_SLACK_MS: u64 = 50;
/// The grain of `date +%s`, ms.
const WALL_SLACK_MS: u64 = 1000;

/// So much time passed for the guest between its answers as for its host: at least from the first answer to the second question,
/// at most from the first question to the second answer. Clocks under emulation differ by up to a hundredth.
fn assert_time_is_true(what: &str, guest_ms: u64, slack_ms: u64, first: Asked, second: Asked) {
    let least = (second.typed_ns - first.answered_ns) / 1_000_000;
    let most = (second.answered_ns - first.typed_ns) / 1_000_000;
    println!("{what}: {guest_ms} ms in the guest, {least} to {most} ms on its host");
    assert!(
        guest_ms + slack_ms >= least - least / 100 && guest_ms <= most + most / 100 + slack_ms,
        "{what} advanced by {guest_ms} ms, the host's clock by {least} to {most} ms"
    );
}

/// The guest's own driver gave memory up, had it up after the move as well, and took it back.
fn assert_ballooned(reports: &[Report]) {
    let ballooned = reports.iter().find_map(|report| match report {
        Report::Ballooned {
            asked_kib,
            available_kib,
            features,
        } => Some((*asked_kib, *available_kib, features)),
        _ => None,
    });
    let (asked, [before, given_up, moved, back], features) = ballooned.expect("a balloon");
    println!(
        "available {before} KiB, {given_up} once {asked} were given up, {moved} after the move, {back} at last"
    );
    // Caches come and go meanwhile.
    let slack = asked / 4;
    for (less, more) in [(given_up, before), (moved, before), (moved, back)] {
        let differ = more.saturating_sub(less);
        assert!((asked - slack..=asked + slack).contains(&differ), "{reports:#?}");
    }
    // It deflates where memory is short, and reports what is free (VIRTIO 1.2, 5.5.3).
    for feature in [2, 5] {
        assert_eq!(
            features.as_bytes().get(feature),
            Some(&b'1'),
            "feature {feature}: {features}"
        );
    }
}

/// What was in memory and on the disk at the snapshot is there again, whatever the guest had become, and its network works.
fn assert_restored(reports: &[Report]) {
    let restored = reports.iter().find_map(|report| match report {
        Report::Restored {
            paused_us,
            contents,
            echoes,
        } => Some((*paused_us, contents, *echoes)),
        _ => None,
    });
    let (paused_us, [before, between, after], echoes) = restored.expect("a restored guest");
    println!("stood for the snapshot: {paused_us} us");
    assert_eq!(before[0], before[1], "the disk holds the file: {reports:#?}");
    assert_ne!(before, between, "{reports:#?}");
    assert_eq!((after, echoes), (before, 3), "{reports:#?}");
}

/// The guest wrote to its disk before it moved, meanwhile and afterwards, and whatever the disk had taken is there.
fn assert_wrote(reports: &[Report]) {
    let wrote = reports.iter().find_map(|report| match report {
        Report::Wrote { blocks, lost } => Some((*blocks, *lost)),
        _ => None,
    });
    let ([before, moved, all], lost) = wrote.expect("writes");
    println!("blocks on the disk: {before} before, {moved} when it had moved, {all} in all");
    assert!(before > 0 && moved >= before && all > moved, "{reports:#?}");
    assert_eq!(lost, 0, "{reports:#?}");
}

#[test]
fn a_linux_guest_answers_before_and_after_its_migration_linux_guest() {
    let reports = match reports() {
        Ok(reports) => reports,
        Err(why) => {
            println!("SKIPPED: {why}");
            return;
        }
    };
    println!("{reports:#?}");
    assert_eq!(reports.last(), Some(&Report::Done), "{reports:#?}");
    let ((before, first), (after, second)) = (answer(&reports, false), answer(&reports, true));
    assert!(
        before.release.ends_with("-cloud-amd64"),
        "a stock kernel: {before:?}"
    );
    assert_eq!(
        before.digest.len(),
        "d41d8cd98f00b204e9800998ecf8427e  -".len(),
        "{before:?}"
    );
    assert_eq!((before.cpus, before.complaints), (2, 0), "{before:?}");
    assert_eq!(before.terminal, "/dev/hvc0", "typed and answered by virtio");
    // Linux's own drivers found disk and random numbers, and the disk holds what was written, before and after.
    let devices = &before.devices;
    assert_eq!(
        (devices.sectors, devices.serial.as_str(), &devices.digest),
        (32768, "vol-1", &before.digest),
        "{before:?}"
    );
    assert!(
        devices.message_lines > 0 && devices.random.starts_with("virtio_rng"),
        "{before:?}"
    );
    assert_eq!(
        (devices.nic.as_str(), devices.echoes),
        ("52:54:00:0a:00:02 1500 virtio_net", 3),
        "{before:?}"
    );
    // Checksums, segments, the MTU, merged buffers, commands and announcements (VIRTIO 1.2, 5.1.3).
    for feature in [0, 1, 3, 5, 7, 8, 11, 12, 15, 16, 17, 21] {
        let digit = devices.nic_features.as_bytes().get(feature);
        assert_eq!(digit, Some(&b'1'), "feature {feature}: {before:?}");
    }
    // Time goes on, at its pace; everything else is as it was: the same shell, the same memory, nothing new to complain about.
    assert!(
        after.uptime_cs > before.uptime_cs && after.wall_s > before.wall_s,
        "{before:?} {after:?}"
    );
    let uptime_ms = (after.uptime_cs - before.uptime_cs) * 10;
    assert_time_is_true("uptime", uptime_ms, UPTIME_SLACK_MS, first, second);
    let wall_ms = (after.wall_s - before.wall_s) * 1000;
    assert_time_is_true("the time of day", wall_ms, WALL_SLACK_MS, first, second);
    assert_eq!(
        after,
        &GuestFacts {
            uptime_cs: after.uptime_cs,
            wall_s: after.wall_s,
            ..before.clone()
        }
    );
    let migrated = reports.iter().find_map(|report| match report {
        Report::Migrated {
            bytes,
            blackout_us,
            source_ended,
            ..
        } => Some((*bytes, *blackout_us, *source_ended)),
        _ => None,
    });
    let (bytes, blackout_us, source_ended) = migrated.expect("a receipt");
    assert!(
        bytes > 8 << 20 && blackout_us > 0,
        "the guest's 8 MiB of random bytes went over the wire"
    );
    let streamed = reports.iter().find_map(|report| match report {
        Report::Streamed { host, guest } => Some((host, guest)),
        _ => None,
    });
    let (host, guest) = streamed.expect("a stream");
    assert!(host.sent_bytes > 0 && host.received_bytes > 1 << 20, "{host:?}");
    assert_eq!([&host.block, &host.sent], [&guest[0], &guest[1]], "{host:?}");
    assert!(source_ended, "the source's VMM ends when it learns of the commit");
    // A disk came while it ran, moved with it, and went when it was asked for; another grew; the button shut it down.
    let came_and_went = reports.iter().find_map(|report| match report {
        Report::HotPlugged {
            digests,
            given_up,
            remains,
            grown_sectors,
        } => Some((digests, given_up.as_str(), *remains, *grown_sectors)),
        _ => None,
    });
    let both = [before.digest.clone(), before.digest.clone()];
    assert_eq!(came_and_went, Some((&both, "0", false, 49152)), "{reports:#?}");
    // The kernel mounts the seed disk and reads what cloud-init would, before the guest moved and after.
    let seeded = reports.iter().find_map(|report| match report {
        Report::Seeded { files, volume } => Some((files, volume)),
        _ => None,
    });
    let (files, volume) = seeded.expect("a seed disk");
    let network: Vec<String> = NETWORK_CONFIG
        .lines()
        .map(|line| format!("network-config:{line}"))
        .collect();
    let told = format!(
        "meta-data:instance-id: \"linux-1\"\n{}\nuser-data:#cloud-config\nuser-data:hostname: linux",
        network.join("\n")
    );
    assert_eq!(files, &[told.clone(), told]);
    assert_eq!(volume, "cidata     FAT12");
    // So did a NIC.
    let nic = Report::NicHotPlugged {
        echoes: [3, 3],
        given_up: "0".to_owned(),
        remains: false,
        tap_is_free: true,
    };
    assert!(reports.contains(&nic), "{reports:#?}");
    assert_ballooned(&reports);
    assert_restored(&reports);
    assert_wrote(&reports);
    // What it put on its disk boots from there, with the address of its seed disk.
    let installed = Report::Installed {
        root: "/dev/vda ext4".to_owned(),
        digest: before.digest.clone(),
        echoed: "over the network, and back".to_owned(),
    };
    assert!(reports.contains(&installed), "{reports:#?}");
    let shut_down = |report: &&Report| **report == Report::PoweredOff { heeded: true };
    assert_eq!(reports.iter().filter(shut_down).count(), 2, "{reports:#?}");
}
