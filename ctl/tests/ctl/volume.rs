//! `ctl volume` and the disks of `ctl vm`.

use drover_proto::v1;
use serde_json::json;

use crate::fake::Fake;

fn volume(name: &str, vms: &[&str]) -> v1::Volume {
    v1::Volume {
        name: name.to_owned(),
        pool: "default".to_owned(),
        size_bytes: 10 << 30,
        vms: vms.iter().map(|vm| (*vm).to_owned()).collect(),
        ..Default::default()
    }
}

#[test]
fn a_volume_is_created_with_its_size_in_bytes_and_one_request_id() {
    let fake = Fake::start();
    fake.state().lose_answers = 1;
    let ended = fake.run("volume create data --size 10G");
    assert_eq!(
        (ended.code, ended.stdout.as_str()),
        (Some(0), "data is created: 10.0 GiB in pool default\n"),
        "{ended:?}"
    );
    let state = fake.state();
    let asked = &state.volumes[0];
    assert_eq!((asked.pool.as_str(), asked.size_bytes), ("default", 10 << 30));
    let ids: Vec<_> = state.calls.iter().map(|(_, id)| id).collect();
    assert!(
        ids.len() == 2 && ids[0] == ids[1] && !ids[0].is_empty(),
        "{ids:?}"
    );
}

#[test]
fn volumes_are_listed_with_the_vms_that_have_them() {
    let fake = Fake::start();
    fake.state().volumes = vec![volume("base", &["vm1", "vm2"]), volume("data", &[])];
    let ended = fake.run("volume list");
    assert!(
        ended.stdout.contains("vm1, vm2") && ended.stdout.contains("10.0 GiB"),
        "{ended:?}"
    );
    assert_eq!(fake.run("volume list -q").stdout, "base\ndata\n");
    let json = fake.run("volume list -o json").json();
    assert_eq!(json[0]["vms"], json!(["vm1", "vm2"]));
    assert_eq!(json[1]["size_bytes"], json!(10_u64 << 30));
}

#[test]
fn a_volume_of_an_image_is_waited_for_and_what_goes_wrong_is_the_commands_failure() {
    let fake = Fake::start();
    assert_eq!(
        fake.run("volume create data").code,
        Some(2),
        "neither size nor image"
    );
    fake.state().fills = vec![v1::Volume::default(), v1::Volume::default()];
    let ended = fake.run("volume create root --image debian");
    assert_eq!(
        (ended.code, ended.stdout.as_str()),
        (
            Some(0),
            "root is created: 2.0 GiB in pool default, of image debian\n"
        ),
        "{ended:?}"
    );
    assert_eq!(fake.state().volumes[0].image, "debian");
    fake.state().fills = vec![v1::Volume {
        reason: Some(v1::Reason {
            code: "image_unusable".into(),
            message: "it is cut short".into(),
        }),
        ..v1::Volume::default()
    }];
    let ended = fake.run("volume create other --image debian -o json");
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(
        ended.stderr.contains("image_unusable") && ended.stderr.contains("it is cut short"),
        "{ended:?}"
    );
    let listed = fake.run("volume list -o json").json();
    assert_eq!(
        (&listed[0]["state"], &listed[1]["state"]),
        (&json!("ready"), &json!("failed"))
    );
    fake.state().fills = vec![v1::Volume::default(); 9];
    let ended = fake.run("volume create third --image debian --no-wait -o json");
    assert_eq!(ended.json()["state"], json!("filling"));
}

#[test]
fn deleting_a_volume_tells_what_becomes_of_its_file_and_a_refusal_has_its_exit_code() {
    let fake = Fake::start();
    fake.state().volumes = vec![volume("base", &["vm1"]), volume("data", &[]), volume("more", &[])];
    let ended = fake.run("volume delete base -o json");
    assert_eq!(ended.code, Some(4), "{ended:?}");
    assert!(ended.stderr.contains("volume_in_use"), "{ended:?}");
    assert_eq!(fake.run("volume delete none").code, Some(3));
    let ended = fake.run("volume delete data --keep-content");
    assert!(
        ended.code == Some(0) && ended.stdout.contains("data/data.raw"),
        "{ended:?}"
    );
    let ended = fake.run("volume delete more");
    assert!(
        ended.code == Some(0) && ended.stdout.contains("removes"),
        "{ended:?}"
    );
    assert_eq!(fake.state().kept, ["data"]);
}

#[test]
fn a_vm_gets_a_balloon_where_every_host_knows_it_and_its_memory_is_set() {
    let fake = Fake::start();
    let host = |device_model: u32| v1::Host {
        spec: Some(v1::HostSpec {
            name: format!("host{device_model}"),
            device_model,
            ..Default::default()
        }),
        ..Default::default()
    };
    let balloon = |name: &str| {
        let state = fake.state();
        state.vms[name].0.spec.as_ref().unwrap().balloon()
    };
    for (name, hosts, more, want) in [
        ("vm1", vec![5, 6], "", v1::Balloon::On),
        ("vm2", vec![5, 4], "", v1::Balloon::Off),
        ("vm3", vec![5, 4], "--balloon", v1::Balloon::On),
        ("vm4", vec![5], "--balloon=off", v1::Balloon::Off),
    ] {
        fake.state().hosts = hosts.into_iter().map(host).collect();
        let ended = fake.run(&format!("vm create {name} --image probe {more}"));
        assert_eq!((ended.code, balloon(name)), (Some(0), want), "{name}: {ended:?}");
    }
    let ended = fake.run("vm set vm1 --memory 128MiB");
    assert_eq!(
        (ended.code, ended.stdout.as_str()),
        (
            Some(0),
            "vm1: memory 256 MiB, of which the guest is to have 128 MiB\n"
        ),
        "{ended:?}"
    );
    assert_eq!(fake.run("vm set vm9 --memory 128MiB").code, Some(3));
}

#[test]
fn a_vm_is_created_with_a_virtio_console_if_that_is_asked_for_and_shows_it() {
    let fake = Fake::start();
    for (name, more, shown) in [
        ("vm1", "", "serial port\n"),
        ("vm2", "--virtio-console", "serial port, virtio\n"),
    ] {
        let ended = fake.run(&format!("vm create {name} --image probe {more}"));
        assert_eq!(ended.code, Some(0), "{ended:?}");
        let json = fake.run(&format!("vm show {name} -o json")).json();
        assert_eq!(json["spec"]["virtio_console"], !more.is_empty());
        let show = fake.run(&format!("vm show {name}"));
        let line = show.stdout.lines().find(|line| line.starts_with("console"));
        assert_eq!(
            line.map(|line| line.trim_start_matches("console").trim()),
            Some(shown.trim()),
            "{show:?}"
        );
    }
}

#[test]
fn a_vm_is_created_with_its_disks_and_shows_them() {
    let fake = Fake::start();
    let ended = fake.run("vm create vm1 --image probe --disk data --disk base:ro");
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let shown = fake.run("vm show vm1");
    assert!(shown.stdout.contains("data, base (read-only)"), "{shown:?}");
    let json = fake.run("vm show vm1 -o json").json();
    assert_eq!(
        json["spec"]["disks"],
        json!([
            {"volume": "data", "read_only": false, "serial": null},
            {"volume": "base", "read_only": true, "serial": null},
        ])
    );
}
