//! What is refused, with which code, and that nothing changes by it.

use drover_chaos_cluster::Client;
use drover_chaos_cluster::cluster::{CLUSTER_ID, controller_addrs};
use drover_pki::{ClusterCa, Credentials, Role};
use drover_proto::v1::VmSpec;
use drover_proto::{Code, Fault};

use super::*;

fn refused<T: std::fmt::Debug>(
    cluster: &Cluster,
    what: &str,
    code: Code,
    call: impl FnOnce(&Client) -> Result<T, Fault>,
) {
    let before = cluster.client.last_event().expect("events can be read");
    let fault = call(&cluster.client).expect_err(what);
    assert_eq!(fault.code, code, "{what}: {fault}");
    assert!(!fault.message.is_empty(), "{what}: a refusal without words");
    assert_eq!(
        cluster.client.last_event().expect("events can be read"),
        before,
        "{what} changed something"
    );
}

#[test]
fn what_makes_no_sense_is_refused_with_its_code_and_changes_nothing() {
    let Some(cluster) = cluster() else { return };
    let mut console = boot(&cluster, 1, STEADY);
    let (at, _) = cluster.await_runs_exactly_once(VM);
    let here = host_name(at);
    let spec = |change: fn(&mut VmSpec)| {
        let mut spec = probe_spec("vm2", "", 64, 1, STEADY);
        change(&mut spec);
        spec
    };
    let create = |spec: VmSpec| move |client: &Client| client.create_vm(&spec, true);

    refused(&cluster, "an unknown VM", Code::VmNotFound, |client| {
        client.vm("nobody")
    });
    refused(&cluster, "starting an unknown VM", Code::VmNotFound, |client| {
        client.start_vm("nobody")
    });
    refused(&cluster, "moving an unknown VM", Code::VmNotFound, |client| {
        client.migrate("nobody", "host2")
    });
    refused(
        &cluster,
        "moving to an unknown host",
        Code::HostNotFound,
        |client| client.migrate(VM, "host9"),
    );
    refused(
        &cluster,
        "moving to the host it is on",
        Code::SameHost,
        |client| client.migrate(VM, &here),
    );
    refused(
        &cluster,
        "an unknown migration",
        Code::MigrationNotFound,
        |client| client.migration("m999"),
    );
    refused(
        &cluster,
        "cancelling an unknown migration",
        Code::MigrationNotFound,
        |client| client.cancel("m999"),
    );
    refused(
        &cluster,
        "a name twice",
        Code::VmExists,
        create(spec(|spec| spec.name = VM.to_owned())),
    );
    refused(
        &cluster,
        "a bad name",
        Code::InvalidArgument,
        create(spec(|spec| spec.name = "Vm_2".to_owned())),
    );
    refused(
        &cluster,
        "no vCPU",
        Code::InvalidArgument,
        create(spec(|spec| spec.vcpus = 0)),
    );
    refused(
        &cluster,
        "an unknown host",
        Code::HostNotFound,
        create(spec(|spec| spec.host = "host9".to_owned())),
    );
    refused(
        &cluster,
        "an unknown image",
        Code::ImageNotFound,
        create(spec(|spec| spec.kernel = "none".to_owned())),
    );
    refused(
        &cluster,
        "a kernel that is none",
        Code::ImageInvalid,
        create(spec(|spec| spec.kernel = "novel".to_owned())),
    );
    refused(
        &cluster,
        "more memory than any host",
        Code::NoHostFits,
        create(spec(|spec| spec.memory_mib = 1 << 20)),
    );

    cluster.hold("source.round_end");
    let planned = migrate_on(&cluster, at);
    cluster.await_reached("source.round_end");
    let third = host_name(next(next(at)));
    refused(
        &cluster,
        "two migrations of one VM",
        Code::MigrationActive,
        |client| client.migrate(VM, &third),
    );
    cluster.release("source.round_end");
    assert_done(&cluster.client.await_end(&planned.id));
    refused(
        &cluster,
        "cancelling what is done",
        Code::MigrationEnded,
        |client| client.cancel(&planned.id),
    );
    assert_sound_at_the_end(&cluster, &mut console);
}

#[test]
fn a_stranger_and_a_host_are_no_users() {
    let Some(cluster) = cluster() else { return };
    let stranger_ca = ClusterCa::create(CLUSTER_ID).expect("a CA of the same name");
    let files = stranger_ca
        .issue_to(&cluster.scratch().join("stranger"), Role::User, "mallory")
        .expect("a certificate of another CA");
    let stranger = Credentials::load(&files, CLUSTER_ID).expect("sound files");
    let stranger = Client::new(&stranger, &controller_addrs()).expect("a client");
    let fault = stranger
        .cluster_at(0)
        .expect_err("a certificate of another cluster is refused");
    assert!(matches!(fault.code, Code::Denied | Code::NoLeader), "{fault}");

    let host = Credentials::load(
        &cluster.issue(Role::Host, "host1").expect("a certificate"),
        CLUSTER_ID,
    );
    let host = Client::new(&host.expect("sound files"), &controller_addrs()).expect("a client");
    let fault = host.cluster_at(0).expect_err("a host is no user");
    assert_eq!(fault.code, Code::Denied, "{fault}");
}
