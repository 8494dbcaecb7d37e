//! Three controllers agree: through elections, restarts, snapshots, and the loss of a majority.
#![allow(clippy::unwrap_used, reason = "in a test, unwrap is the check")]

mod support;

use drover_controller::server::Controller;
use drover_pki::{ClusterCa, Credentials, Role, controller_dns};
use drover_proto::v1::raft_client::RaftClient;
use drover_proto::{Code, Fault, v1};
use support::{Cluster, Files, name, no_leader, register, small_log, until, usual};
use tonic::transport::Endpoint;

#[tokio::test(flavor = "multi_thread")]
async fn three_controllers_elect_one_and_replicate() {
    let cluster = Cluster::start(3, &usual()).await;
    let leader = cluster.leader().await;
    let answer = cluster.propose(register("host1")).await;
    assert_eq!(answer.host.unwrap().spec.unwrap().name, "host1");
    for at in 0..3 {
        cluster.knows(at, "host1").await;
        let (id, lease_ms) = cluster
            .node(at)
            .read(|state| (state.cluster_id().to_owned(), state.settings().lease_ms));
        assert_eq!(
            (id.as_str(), lease_ms),
            (support::CLUSTER, 4000),
            "formed as configured"
        );
    }
    let status = cluster.node(leader).status();
    assert_eq!(status.leader, Some(cluster.node(leader).me().clone()));
    assert_eq!(status.members.len(), 3);
    assert!(
        status.members.iter().all(|member| member.role != "unreachable"),
        "{status:?}"
    );
    let states: Vec<_> = (0..3)
        .map(|at| cluster.node(at).read(drover_state::State::encode))
        .collect();
    assert!(
        states.iter().all(|state| *state == states[0]),
        "replicas hold the same bytes"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_neither_writes_nor_confirms_reads_and_names_the_leader() {
    let cluster = Cluster::start(3, &usual()).await;
    cluster.propose(register("host1")).await;
    let leader = cluster.leader().await;
    cluster.node(leader).linearize().await.unwrap();
    let follower = (leader + 1) % 3;
    cluster.knows(follower, "host1").await;
    let named = format!("{} at {}", name(leader), cluster.files.addrs[leader]);
    assert!(no_leader(cluster.node(follower).propose(register("host2")).await).contains(&named));
    assert!(no_leader(cluster.node(follower).linearize().await).contains(&named));
    assert_eq!(
        cluster.node(follower).leader(),
        Some(cluster.node(leader).me().clone())
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_of_apply_comes_back_with_code_and_field() {
    let cluster = Cluster::start(1, &usual()).await;
    let leader = cluster.leader().await;
    let nobody = v1::Command {
        kind: Some(v1::command::Kind::StartVm(v1::StartVm {
            name: "vm9".to_owned(),
        })),
        ..Default::default()
    };
    let fault = cluster.node(leader).propose(nobody).await.unwrap_err();
    assert_eq!((fault.code, fault.field.as_str()), (Code::VmNotFound, "name"));
    let mut large = register("host1");
    large.caller = "x".repeat(2 << 20);
    assert_eq!(
        cluster.node(leader).propose(large).await.unwrap_err().code,
        Code::InvalidArgument
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cluster_survives_its_leader_and_takes_it_back() {
    let mut cluster = Cluster::start(3, &usual()).await;
    cluster.propose(register("host1")).await;
    let first = cluster.leader().await;
    cluster.stop(first).await;
    let second = cluster.leader().await;
    assert_ne!(first, second);
    assert!(
        cluster.node(second).read(|state| state.host("host1").is_some()),
        "a leader knows all that was committed"
    );
    cluster.propose(register("host2")).await;
    cluster.start_again(first).await;
    cluster.knows(first, "host2").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_cluster_remembers_everything() {
    let mut cluster = Cluster::start(3, &usual()).await;
    for number in 0..10 {
        cluster.propose(register(&format!("host{number}"))).await;
    }
    let before = cluster
        .node(cluster.leader().await)
        .read(drover_state::State::encode);
    cluster.stop_all().await;
    for at in 0..3 {
        cluster.start_again(at).await;
    }
    let leader = cluster.leader().await;
    assert_eq!(cluster.node(leader).read(drover_state::State::encode), before);
    // The answer to a request that was carried out before is the first answer.
    let again = cluster.propose(register("host3")).await;
    assert_eq!(again.host.unwrap().spec.unwrap().name, "host3");
    assert_eq!(cluster.node(leader).read(drover_state::State::encode), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_missed_more_than_the_log_holds_catches_up_by_snapshot() {
    let mut cluster = Cluster::start(3, &small_log()).await;
    cluster.propose(register("early")).await;
    let late = (cluster.leader().await + 1) % 3;
    cluster.knows(late, "early").await;
    cluster.stop(late).await;
    let missed_from = cluster.node(cluster.leader().await).status().applied;
    for number in 0..100 {
        cluster.propose(register(&format!("host{number}"))).await;
    }
    let leader = cluster.leader().await;
    until("the leader drops what its snapshot holds", || {
        (cluster.node(leader).status().purged > missed_from).then_some(())
    })
    .await;
    cluster.start_again(late).await;
    cluster.knows(late, "host99").await;
    assert!(cluster.node(late).read(|state| state.host("host7").is_some()));

    // What it received is durable: it comes back with it, alone.
    let state = cluster.node(late).read(drover_state::State::encode);
    cluster.stop_all().await;
    cluster.start_again(late).await;
    cluster.knows(late, "host7").await;
    let known = cluster.node(late).read(|state| state.hosts().count());
    assert!(known >= 20, "{known} hosts from the snapshot");
    for at in (0..3).filter(|&at| at != late) {
        cluster.start_again(at).await;
    }
    cluster.knows(late, "host99").await;
    assert_eq!(cluster.node(late).read(drover_state::State::encode), state);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_minority_neither_commits_nor_confirms_reads() {
    let mut cluster = Cluster::start(3, &usual()).await;
    cluster.propose(register("host1")).await;
    let leader = cluster.leader().await;
    for at in (0..3).filter(|&at| at != leader) {
        cluster.stop(at).await;
    }
    let alone = cluster.node(leader);
    let (written, confirmed) = tokio::join!(alone.propose(register("host2")), alone.linearize());
    no_leader(written);
    no_leader(confirmed);
    assert!(alone.read(|state| state.host("host2").is_none()));
    let unreachable = || {
        alone
            .status()
            .members
            .iter()
            .filter(|member| member.role == "unreachable")
            .count()
    };
    until("both others are seen to be gone", || {
        (unreachable() == 2 || !alone.is_leader()).then_some(())
    })
    .await;

    cluster.start_again((leader + 1) % 3).await;
    cluster.propose(register("host3")).await;
    assert!(
        cluster
            .node(cluster.leader().await)
            .read(|state| state.host("host1").is_some())
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn five_controllers_survive_two() {
    let mut cluster = Cluster::start(5, &usual()).await;
    cluster.propose(register("host1")).await;
    let leader = cluster.leader().await;
    cluster.stop(leader).await;
    cluster.stop((leader + 1) % 5).await;
    cluster.propose(register("host2")).await;
    for at in cluster.running().collect::<Vec<_>>() {
        cluster.knows(at, "host2").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_with_another_clusters_certificate_stays_outside() {
    let (files, listeners) = Files::new(3, &usual()).await;
    // Another CA, the same cluster id and names: only the chain gives it away.
    let foreign = ClusterCa::create(support::CLUSTER).unwrap();
    foreign.issue_to(&files.home(2), Role::Controller, "c3").unwrap();
    let mut nodes = Vec::new();
    for (at, listener) in listeners.into_iter().enumerate() {
        nodes.push(Controller::start_on(&files.config(at), listener).await.unwrap());
    }
    let leads = |at: &usize| nodes[*at].consensus().leadership().borrow().is_some();
    let leader = until("the two others elect one", || (0..2).find(leads)).await;
    nodes[leader]
        .consensus()
        .propose(register("host1"))
        .await
        .unwrap();
    let outside = nodes[2].consensus();
    assert!(outside.leader().is_none());
    assert!(
        outside.read(|state| state.cluster_id().is_empty()),
        "nothing reached it"
    );
    let status = nodes[leader].consensus().status();
    let roles: Vec<_> = status.members.iter().map(|member| member.role.as_str()).collect();
    assert_eq!(roles[2], "unreachable", "{roles:?}");
}

async fn ask_for_a_vote(
    addr: std::net::SocketAddr,
    credentials: &Credentials,
) -> Result<v1::VoteResponse, Fault> {
    let endpoint = Endpoint::from_shared(format!("https://{addr}")).unwrap();
    let endpoint = endpoint
        .tls_config(credentials.tonic_client(&controller_dns(Some("c1"))))
        .unwrap();
    let vote = v1::RaftVote {
        term: 1_000,
        node: 1,
        committed: false,
    };
    let request = v1::VoteRequest {
        vote: Some(vote),
        last: None,
    };
    let answer = RaftClient::new(endpoint.connect_lazy()).vote(request).await;
    answer
        .map(tonic::Response::into_inner)
        .map_err(|status| drover_pki::tls_fault(&status).unwrap_or_else(|| Fault::from(&status)))
}

#[tokio::test(flavor = "multi_thread")]
async fn only_members_may_speak_raft() {
    let cluster = Cluster::start(1, &usual()).await;
    cluster.leader().await;
    let term = cluster.node(0).status().term;
    let folder = tempfile::tempdir().unwrap();
    let foreign = ClusterCa::create(support::CLUSTER).unwrap();
    for (ca, role, name) in [
        (&cluster.files.ca, Role::Host, "host1"),
        (&cluster.files.ca, Role::User, "admin"),
        (&cluster.files.ca, Role::Controller, "c9"),
    ] {
        let files = ca.issue_to(&folder.path().join(name), role, name).unwrap();
        let credentials = Credentials::load(&files, support::CLUSTER).unwrap();
        let refused = ask_for_a_vote(cluster.files.addrs[0], &credentials)
            .await
            .unwrap_err();
        assert_eq!(refused.code, Code::Denied, "{role} {name}: {refused}");
    }
    let files = foreign
        .issue_to(&folder.path().join("foreign"), Role::Controller, "c1")
        .unwrap();
    let credentials = Credentials::load(&files, support::CLUSTER).unwrap();
    let refused = ask_for_a_vote(cluster.files.addrs[0], &credentials)
        .await
        .unwrap_err();
    assert_eq!(refused.code, Code::Denied, "{refused}");
    assert_eq!(cluster.node(0).status().term, term, "none of them moved the term");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_refuses_to_start_with_what_is_not_its_own() {
    let (files, listeners) = Files::new(3, &usual()).await;
    drop(listeners);
    let refusal = async |config: &drover_controller::config::Config| {
        format!(
            "{:#}",
            Controller::start(config).await.err().expect("it must not start")
        )
    };
    // Somebody else's certificate.
    let mut config = files.config(0);
    config.tls = files.config(1).tls;
    let refused = refusal(&config).await;
    assert!(
        refused.contains("/controller/c2; want a certificate of the controller c1"),
        "{refused}"
    );
    // Another cluster's.
    let other = ClusterCa::create("other").unwrap();
    config.tls = other
        .issue_to(&files.home(0).join("other"), Role::Controller, "c1")
        .unwrap();
    let refused = refusal(&config).await;
    assert!(refused.contains("other") && refused.contains("test"), "{refused}");
    // Another member's memory.
    let started = Controller::start(&files.config(1)).await.unwrap();
    started.stop().await;
    let mut config = files.config(0);
    config.data_dir = files.config(1).data_dir;
    let refused = refusal(&config).await;
    assert!(refused.contains("belongs to the controller 2"), "{refused}");
    // A memory in use.
    let started = Controller::start(&files.config(2)).await.unwrap();
    let mut config = files.config(2);
    config.listen.set_port(0);
    let refused = refusal(&config).await;
    assert!(refused.contains("in use by another process"), "{refused}");
    started.stop().await;
}
