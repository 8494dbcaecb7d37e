//! Volumes: who may have one, where a VM that has one may be, and when it goes.

#![allow(clippy::unwrap_used, reason = "a panic is the test's failure")]

mod common;

use common::*;
use drover_proto::v1::command::Kind;
use drover_proto::v1::{
    DeleteVolume, HostSpec, Image, PlanMigration, ReportVolumeRequest, ResizeVolume, VmState, VolumeNews,
};
use drover_proto::{Code, Fault};
use drover_state::placement::{self, Purpose};
use drover_state::preflight::preflight;
use drover_state::{State, desired};

const MIB: u64 = 1 << 20;

/// host3 lacks the pool; volume data is there.
fn cluster() -> Cluster {
    let mut c = Cluster::new();
    c.ok(Kind::RegisterHost(HostSpec {
        pools: Vec::new(),
        ..host_spec("host3")
    }));
    c.ok(create_volume("data", "", 8 * MIB));
    c
}

fn fault(c: &mut Cluster, kind: Kind) -> Fault {
    let before = c.state.encode();
    let fault = c.apply(kind).unwrap_err();
    assert_eq!(c.state.encode(), before, "a refusal changed the state");
    fault
}

fn refusal(c: &mut Cluster, kind: Kind) -> (Code, String) {
    let fault = fault(c, kind);
    (fault.code, fault.field)
}

#[test]
fn a_volume_is_made_of_what_was_asked_for_and_of_the_leaders_clock() {
    let mut c = cluster();
    let Kind::CreateVolume(mut create) = create_volume("more", "default", MIB) else {
        unreachable!()
    };
    let asked = create.volume.as_mut().unwrap();
    (asked.used, asked.created_ms, asked.vms) = (true, 7, vec!["vm9".into()]);
    let made = c.ok(Kind::CreateVolume(create)).volume.unwrap();
    assert_eq!((made.created_ms, made.used), (c.now_ms, false));
    assert_eq!(made.vms, Vec::<String>::new());
    let volumes = c.state.volumes_with_users();
    let names: Vec<&str> = volumes.iter().map(|volume| volume.name.as_str()).collect();
    assert_eq!(names, ["data", "more"]);
    assert_eq!(c.state.volume("data").unwrap().pool, "default");
    assert_eq!(State::decode(&c.state.encode()).unwrap(), c.state);
}

#[test]
fn a_volume_out_of_its_form_is_refused_by_field() {
    let mut c = cluster();
    let invalid = Code::InvalidArgument;
    for (kind, wanted) in [
        (create_volume("Data", "", MIB), (invalid, "volume.name")),
        (create_volume("d", "../x", MIB), (invalid, "volume.pool")),
        (create_volume("d", "", 0), (invalid, "volume.size_bytes")),
        (create_volume("d", "", MIB + 512), (invalid, "volume.size_bytes")),
        (
            create_volume("d", "", (64 << 40) + MIB),
            (invalid, "volume.size_bytes"),
        ),
        (
            create_volume("data", "", MIB),
            (Code::VolumeExists, "volume.name"),
        ),
        (
            create_volume("d", "tape", MIB),
            (Code::PoolNotFound, "volume.pool"),
        ),
        (delete_volume("d"), (Code::VolumeNotFound, "name")),
    ] {
        let refused = refusal(&mut c, kind);
        assert_eq!((refused.0, refused.1.as_str()), wanted);
    }
    c.ok(create_volume("huge", "", 64 << 40));
}

#[test]
fn a_volume_that_is_written_to_belongs_to_one_vm() {
    let mut c = cluster();
    c.ok(create_with_disks("vm1", &["data"]));
    let in_use = (Code::VolumeInUse, "spec.disks.volume".to_owned());
    assert_eq!(refusal(&mut c, create_with_disks("vm2", &["data"])), in_use);
    assert_eq!(refusal(&mut c, create_with_disks("vm2", &["data:ro"])), in_use);
    let said = fault(&mut c, create_with_disks("vm2", &["data"])).message;
    assert!(said.contains("data") && said.contains("vm1"), "{said}");
    assert_eq!(
        refusal(&mut c, delete_volume("data")),
        (Code::VolumeInUse, "name".to_owned())
    );
    c.ok(delete("vm1"));
    c.ok(create_with_disks("vm2", &["data:ro"]));
    c.ok(create_with_disks("vm3", &["data:ro"]));
    assert_eq!(refusal(&mut c, create_with_disks("vm4", &["data"])), in_use);
    assert_eq!(c.state.volumes_with_users()[0].vms, ["vm2", "vm3"]);
    c.ok(delete("vm2"));
    c.ok(delete("vm3"));
    c.ok(delete_volume("data"));
    assert_eq!(c.state.volumes_with_users().len(), 0);
}

#[test]
fn what_a_deleted_volume_held_is_removed_by_one_host_that_reaches_it_unless_it_is_to_be_kept() {
    let removals = |c: &Cluster, host: &str| desired(&c.state, host).removals;
    let mut c = cluster();
    c.ok(create_volume("kept", "", MIB));
    c.ok(Kind::DeleteVolume(DeleteVolume {
        name: "kept".into(),
        remove_content: false,
    }));
    assert_eq!(removals(&c, "host1"), []);
    c.ok(create_volume("kept", "", MIB));

    c.ok(delete_volume("data"));
    let ordered = removals(&c, "host1");
    assert_eq!((ordered.len(), ordered[0].volume.as_str()), (1, "data"));
    assert_eq!((removals(&c, "host2").len(), removals(&c, "host3").len()), (0, 0));
    c.ok(host_down("host1"));
    assert_eq!(removals(&c, "host2"), ordered);
    // One of its name has a file of its own, whoever removes the other however late.
    let other = c.ok(create_volume("data", "", MIB)).volume.unwrap();
    assert_ne!(other.content, ordered[0].content);
    c.ok(content_removed("data", ordered[0].content));
    assert_eq!(removals(&c, "host2"), []);
    c.ok(delete_volume("data"));
    assert_eq!(removals(&c, "host2")[0].content, other.content);
}

#[test]
fn no_two_contents_of_a_name_have_one_number_also_within_a_millisecond_and_where_the_clock_goes_back() {
    let mut c = cluster();
    let mut seen = std::collections::BTreeSet::new();
    // Each step takes a millisecond here: 2 back, one is made in that of the one before.
    for back in [0, 2, 2, 500] {
        c.ok(delete_volume("data"));
        c.now_ms -= back;
        let made = c.ok(create_volume("data", "", MIB)).volume.unwrap();
        assert!(seen.insert(made.content), "{seen:?} and {}", made.content);
    }
}

fn image(name: &str, blake3: &str, disk_bytes: u64) -> Image {
    Image {
        name: name.into(),
        kind: "qcow2".into(),
        blake3: blake3.into(),
        disk_bytes,
        ..Image::default()
    }
}

fn has_images(c: &mut Cluster, host: &str, images: &[Image]) {
    let spec = c.state.host(host).unwrap().spec.clone().unwrap();
    let others = spec.images.iter().filter(|has| has.disk_bytes == 0);
    c.ok(Kind::RegisterHost(HostSpec {
        images: others.chain(images).cloned().collect(),
        ..spec
    }));
}

fn create_of(name: &str, image: &str, size_bytes: u64) -> Kind {
    let Kind::CreateVolume(mut create) = create_volume(name, "", size_bytes) else {
        unreachable!()
    };
    create.volume.as_mut().unwrap().image = image.into();
    Kind::CreateVolume(create)
}

fn news(name: &str, content: u64, news: VolumeNews) -> Kind {
    Kind::ReportVolume(ReportVolumeRequest {
        host: "host1".into(),
        volume: name.into(),
        content,
        news: news.into(),
        reason: Some(Fault::new(Code::DiskUnusable, "no room").into()),
        ..ReportVolumeRequest::default()
    })
}

#[test]
fn a_volume_of_an_image_is_nobodys_until_a_host_has_filled_it() {
    let mut c = cluster();
    let debian = [image("debian", "d1", 3 * MIB - 512)];
    for host in ["host1", "host2", "host3"] {
        has_images(&mut c, host, &debian);
    }
    let made = c.ok(create_of("root", "debian", 0)).volume.unwrap();
    assert_eq!((made.size_bytes, made.image_blake3.as_str()), (3 * MIB, "d1"));
    assert!(made.filling && made.content > 0);
    let fills = |c: &Cluster, host: &str| desired(&c.state, host).fills;
    assert_eq!(fills(&c, "host1"), std::slice::from_ref(&made));
    assert_eq!((fills(&c, "host2").len(), fills(&c, "host3").len()), (0, 0));
    let not_ready = |c: &mut Cluster| {
        let had = refusal(c, create_with_disks("vm1", &["root"]));
        assert_eq!(had, (Code::VolumeNotReady, "spec.disks.volume".to_owned()));
        let grown = ResizeVolume {
            name: "root".into(),
            size_bytes: 4 * MIB,
        };
        assert_eq!(refusal(c, Kind::ResizeVolume(grown)).0, Code::VolumeNotReady);
    };
    not_ready(&mut c);
    // It is another host's to fill where the first is down or has another image by now, and nobody's where none has it.
    has_images(&mut c, "host1", &[image("debian", "d2", 3 * MIB)]);
    assert_eq!(fills(&c, "host1").len(), 0);
    assert_eq!(fills(&c, "host2").len(), 1);
    let waits = |c: &Cluster| c.state.volumes_with_users()[1].waits.clone();
    assert_eq!(waits(&c), "");
    c.ok(host_down("host2"));
    assert_eq!((fills(&c, "host1").len(), fills(&c, "host2").len()), (0, 0));
    assert!(waits(&c).contains("image debian"), "{}", waits(&c));
    assert_eq!(State::decode(&c.state.encode()).unwrap(), c.state);

    let stale = c.ok(news("root", made.content + 1, VolumeNews::Filled));
    assert!(!stale.current, "of another content");
    not_ready(&mut c);
    assert!(c.ok(news("root", made.content, VolumeNews::Filled)).current);
    c.ok(create_with_disks("vm1", &["root"]));
    assert!(
        !c.ok(news("root", made.content, VolumeNews::Failed)).current,
        "it is filled"
    );
    assert!(!c.state.volume("root").unwrap().filling);
}

#[test]
fn a_volume_that_could_not_be_filled_says_why_until_it_is_deleted_and_what_there_is_of_it_goes() {
    let mut c = cluster();
    has_images(&mut c, "host1", &[image("debian", "d1", MIB)]);
    let made = c.ok(create_of("root", "debian", 2 * MIB)).volume.unwrap();
    // By the host that is asked, not by one that was.
    has_images(&mut c, "host2", &[image("debian", "d1", MIB)]);
    c.ok(host_down("host1"));
    assert!(!c.ok(news("root", made.content, VolumeNews::Failed)).current);
    assert!(c.state.volume("root").unwrap().reason.is_none());
    c.ok(host_up("host1", ""));
    c.ok(news("root", made.content, VolumeNews::Failed));
    assert_eq!(desired(&c.state, "host1").fills, []);
    let said = fault(&mut c, create_with_disks("vm1", &["root"]));
    assert_eq!(said.code, Code::VolumeNotReady);
    assert!(
        said.message.contains("no room") && said.message.contains("delete"),
        "{said}"
    );
    c.ok(Kind::DeleteVolume(DeleteVolume {
        name: "root".into(),
        remove_content: false,
    }));
    let removals = desired(&c.state, "host1").removals;
    assert_eq!((removals.len(), removals[0].content), (1, made.content));
}

#[test]
fn an_image_that_no_volume_can_be_made_of_is_refused_by_field() {
    let mut c = cluster();
    has_images(
        &mut c,
        "host1",
        &[image("debian", "d1", 2 * MIB), image("other", "o1", MIB)],
    );
    has_images(
        &mut c,
        "host2",
        &[image("other", "o2", MIB), image("kernel", "k", 0)],
    );
    has_images(&mut c, "host3", &[image("alone", "a", MIB)]);
    let image = "volume.image";
    for (kind, wanted) in [
        (create_of("d", "../debian", 0), (Code::InvalidArgument, image)),
        (create_of("d", "none", 0), (Code::ImageNotFound, image)),
        (create_of("d", "alone", 0), (Code::ImageNotFound, image)),
        (create_of("d", "probe", 0), (Code::ImageUnusable, image)),
        (create_of("d", "other", 0), (Code::ImageUnusable, image)),
        (
            create_of("d", "debian", MIB),
            (Code::InvalidArgument, "volume.size_bytes"),
        ),
        (
            create_of("d", "debian", MIB + 1),
            (Code::InvalidArgument, "volume.size_bytes"),
        ),
    ] {
        let (code, field) = refusal(&mut c, kind);
        assert_eq!((code, field.as_str()), wanted);
    }
}

#[test]
fn a_vm_that_is_being_deleted_has_its_volume_until_it_is_gone() {
    let mut c = cluster();
    c.ok(create_with_disks("vm1", &["data"]));
    c.run("vm1", "host1");
    c.ok(delete("vm1"));
    assert_eq!(
        refusal(&mut c, create_with_disks("vm2", &["data"])).0,
        Code::VolumeInUse
    );
    c.ok(report("host1", "vm1", 1, VmState::Stopped));
    c.ok(create_with_disks("vm2", &["data"]));
}

#[test]
fn disks_out_of_their_form_are_refused_by_field() {
    let mut c = cluster();
    let volume = "spec.disks.volume".to_owned();
    assert_eq!(
        refusal(&mut c, create_with_disks("vm1", &["none"])),
        (Code::VolumeNotFound, volume.clone())
    );
    assert_eq!(
        refusal(&mut c, create_with_disks("vm1", &["data", "data:ro"])),
        (Code::InvalidArgument, volume.clone())
    );
    assert_eq!(
        refusal(&mut c, create_with_disks("vm1", &["../data"])),
        (Code::InvalidArgument, volume)
    );
    let many: Vec<String> = (0..25).map(|at| format!("v{at}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    assert_eq!(
        refusal(&mut c, create_with_disks("vm1", &many)),
        (Code::InvalidArgument, "spec.disks".to_owned())
    );
    let Kind::CreateVm(mut create) = create_with_disks("vm1", &["data"]) else {
        unreachable!()
    };
    create.spec.as_mut().unwrap().disks[0].serial = "with blank".into();
    assert_eq!(
        refusal(&mut c, Kind::CreateVm(create)),
        (Code::InvalidArgument, "spec.disks.serial".to_owned())
    );
}

#[test]
fn a_vm_goes_only_to_hosts_that_have_the_pools_of_its_volumes() {
    let mut c = cluster();
    let Kind::CreateVm(mut pinned) = create_with_disks("vm1", &["data"]) else {
        unreachable!()
    };
    pinned.spec.as_mut().unwrap().host = "host3".into();
    let said = fault(&mut c, Kind::CreateVm(pinned));
    assert_eq!(said.code, Code::NoHostFits);
    assert!(
        said.message
            .contains("host3 has no pool \"default\", in which volume data is"),
        "{said}"
    );
    c.ok(create_with_disks("vm1", &["data"]));
    assert_eq!(c.refused(place("vm1", "host3", 0)), Code::PoolNotFound);
    c.run("vm1", "host1");
    let said = fault(&mut c, plan("vm1", "host3"));
    assert_eq!(
        (said.code, said.field.as_str()),
        (Code::NoHostFits, "to"),
        "{said}"
    );
    assert!(
        said.message.contains("host3") && said.message.contains("\"default\""),
        "{said}"
    );
    let dry = |to: &str| {
        let plan = PlanMigration {
            vm: "vm1".into(),
            to: to.into(),
            ..PlanMigration::default()
        };
        preflight(&c.state, &plan).unwrap()
    };
    let pools = |to: &str| {
        let findings = dry(to).findings;
        let found = findings.into_iter().find(|finding| finding.check == "pools");
        found.unwrap().outcome
    };
    assert!(pools("host2").is_ok() && pools("host3").is_err());
    assert_eq!(dry("").to, "host2", "placement knows it too");
}

#[test]
fn a_failed_vm_is_placed_again_only_where_its_pool_is() {
    let mut c = cluster();
    c.ok(create_with_disks("vm1", &["data"]));
    c.run("vm1", "host1");
    c.ok(report("host1", "vm1", 1, VmState::Failed));
    c.ok(host_down("host1"));
    c.ok(host_down("host2"));
    let spec = c.vm("vm1").spec.clone().unwrap();
    let fault = placement::choose(&c.state, &spec, Purpose::Start).unwrap_err();
    assert!(fault.message.contains("host3 has no pool"), "{fault}");
    c.ok(host_up("host2", "boot-1"));
    assert_eq!(
        placement::choose(&c.state, &spec, Purpose::Start).unwrap(),
        "host2"
    );
}

#[test]
fn a_host_is_told_the_volumes_of_its_vms_and_whether_they_were_used() {
    let mut c = cluster();
    c.ok(create_with_disks("vm1", &["data"]));
    c.ok(place("vm1", "host1", 0));
    let told = |c: &Cluster, host: &str| desired(&c.state, host).vms[0].volumes.clone();
    let first = told(&c, "host1");
    assert_eq!((first[0].name.as_str(), first[0].size_bytes), ("data", 8 * MIB));
    assert!(!first[0].used, "its file may be made");
    c.ok(report("host1", "vm1", 1, VmState::Running));
    assert!(told(&c, "host1")[0].used);
    c.copying("vm1", "host2");
    assert!(told(&c, "host2")[0].used, "a migration's target makes no file");
    c.ok(report("host1", "vm1", 1, VmState::Failed));
    c.ok(start("vm1"));
    c.run("vm1", "host2");
    assert!(told(&c, "host2")[0].used, "nor does the next start");
}

#[test]
fn a_repeated_request_for_a_volume_gets_the_first_answer() {
    let mut c = cluster();
    let first = c.apply_as("r1", create_volume("more", "", MIB)).unwrap();
    assert_eq!(c.apply_as("r1", create_volume("more", "", MIB)).unwrap(), first);
    assert_eq!(
        c.apply_as("r1", create_volume("more", "", 2 * MIB))
            .unwrap_err()
            .code,
        Code::RequestIdReused
    );
}
