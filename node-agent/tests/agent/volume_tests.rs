//! Volumes on their way from the desired state to a VMM's configuration.

use std::os::unix::fs::PermissionsExt;

use drover_proto::Code;
use drover_proto::v1::*;
use serde_json::json;

use crate::fake_fleet::Call;
use crate::world::{World, run};

const BYTES: u64 = 4 << 20;

fn volume(name: &str, pool: &str, used: bool) -> Volume {
    Volume {
        name: name.into(),
        pool: pool.into(),
        size_bytes: BYTES,
        used,
        writers: 6,
        ..Volume::default()
    }
}

/// vm1 with the volume, written to, and `base`, read.
fn with_disks(volumes: Vec<Volume>) -> HostDesired {
    let mut desired = run(1, None);
    let disk = |volume: &Volume| VmDisk {
        volume: volume.name.clone(),
        read_only: volume.name == "base",
        serial: if volume.name == "base" { "S-1" } else { "" }.into(),
        ..VmDisk::default()
    };
    let vm = &mut desired.vms[0];
    vm.spec.as_mut().unwrap().disks = volumes.iter().map(disk).collect();
    vm.volumes = volumes;
    desired
}

pub async fn a_vm_gets_its_volumes_as_disks_and_their_files_are_made_once() {
    let world = World::new().await;
    let pool = world.config.pools["default"].clone();
    let base = pool.join("base/data.raw");
    std::fs::create_dir(pool.join("base")).unwrap();
    let content = vec![7; usize::try_from(BYTES).unwrap()];
    std::fs::write(&base, &content).unwrap();
    let _agent = world.agent().await;
    let long = "a-name-of-more-than-twenty-characters";
    let desired = with_disks(vec![
        volume(long, "default", false),
        volume("base", "default", true),
    ]);
    world.fleet.say(|script| {
        script.desired = desired;
        script.grants = vec![("vm1".into(), 1)];
    });
    world.until_state("e1-start", VmmState::Running).await;
    let config = std::fs::read(world.folder("e1-start").join("config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
    let made = pool.join(long).join("data.raw");
    assert_eq!(
        config["disks"],
        json!([
            {"path": made, "read_only": false, "serial": "a-name-of-more-than-",
                "fence": {"path": pool.join(long).join("writer"), "writers": 6}},
            {"path": base, "read_only": true, "serial": "S-1"},
        ])
    );
    assert_eq!(made.metadata().unwrap().len(), BYTES);
    assert!(pool.join(long).join("writer").exists() && !pool.join("base/writer").exists());
    assert_eq!(std::fs::read(&base).unwrap(), content, "what was there stays");
}

pub async fn a_volume_that_cannot_be_had_fails_the_start_with_its_code_and_starts_nothing() {
    for (bad, code) in [
        (volume("data", "tape", false), Code::PoolNotFound),
        (volume("data", "default", true), Code::DiskUnusable),
        (volume("small", "default", false), Code::DiskUnusable),
    ] {
        let world = World::new().await;
        let pool = world.config.pools["default"].clone();
        std::fs::create_dir(pool.join("small")).unwrap();
        std::fs::write(pool.join("small/data.raw"), "somebody's").unwrap();
        let _agent = world.agent().await;
        let desired = with_disks(vec![bad]);
        world.fleet.say(|script| script.desired = desired);
        let reason = world.fleet.until_vm(VmState::Failed, 1).await.reason.unwrap();
        assert_eq!(reason.code, code.as_str(), "{}", reason.message);
        assert!(!world.folder("e1-start").join("config.json").exists());
        assert!(!pool.join("data").exists());
        assert_eq!(std::fs::read(pool.join("small/data.raw")).unwrap(), b"somebody's");
    }
}

pub async fn a_vm_with_a_seed_gets_it_as_a_disk_beside_its_volumes_and_for_the_agents_eyes_only() {
    let world = World::new().await;
    let _agent = world.agent().await;
    let mut desired = with_disks(vec![volume("data", "default", false)]);
    desired.vms[0].seed = Some(CloudSeed {
        user_data: b"#!/bin/sh\n".to_vec(),
        meta_data: "instance-id: \"vm1-7\"\n".to_owned(),
        network_config: String::new(),
    });
    world.fleet.say(|script| {
        script.desired = desired;
        script.grants = vec![("vm1".into(), 1)];
    });
    world.until_state("e1-start", VmmState::Running).await;
    let config = std::fs::read(world.folder("e1-start").join("config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
    let seed = world.folder("e1-start").join("seed.img");
    assert_eq!(config["disks"].as_array().unwrap().len(), 2);
    assert_eq!(
        config["disks"][1],
        json!({"path": seed, "read_only": true, "serial": "cidata", "slot": 30})
    );
    let found = seed.metadata().unwrap();
    assert_eq!(
        (found.len(), found.permissions().mode() & 0o777),
        (256 << 10, 0o600)
    );
}

pub async fn a_volume_is_filled_from_its_image_and_reported_and_what_does_not_work_too() {
    let world = World::new().await;
    let image = vec![7; 3 << 20];
    std::fs::write(world.config.images_dir.join("root.raw"), &image).unwrap();
    let volume = |name: &str, content: u64, image: &[u8]| Volume {
        name: name.into(),
        pool: "default".into(),
        size_bytes: 4 << 20,
        content,
        image: "root.raw".into(),
        image_blake3: blake3::hash(image).to_hex().to_string(),
        filling: true,
        ..Volume::default()
    };
    let fills = vec![volume("root", 9, &image), volume("other", 10, b"another")];
    world.fleet.say(|script| script.desired.fills = fills);
    let _agent = world.agent().await;
    let news = |name: &'static str| {
        move |call: &Call| match call {
            Call::Volume(report) if report.volume == name && report.news() != VolumeNews::Progress => {
                Some(report.clone())
            }
            _ => None,
        }
    };
    let filled = world.fleet.until("the news of root", news("root")).await;
    assert_eq!(
        (filled.host.as_str(), filled.content, filled.news()),
        ("host1", 9, VolumeNews::Filled)
    );
    let pool = &world.config.pools["default"];
    let mut there = std::fs::read(pool.join("root/data-9.raw")).unwrap();
    assert!(there.split_off(image.len()).iter().all(|byte| *byte == 0));
    assert!(there == image);
    let failed = world.fleet.until("the news of other", news("other")).await;
    assert_eq!(failed.news(), VolumeNews::Failed);
    assert_eq!(failed.reason.unwrap().code, Code::ImageUnusable.as_str());
    assert!(!pool.join("other").exists());
    // Each is reported once.
    world.fleet.until_heartbeats(5).await;
    let reports = |calls: &[Call]| calls.iter().filter_map(news("root")).count() == 1;
    world.fleet.until_calls("one report", reports).await;
}
