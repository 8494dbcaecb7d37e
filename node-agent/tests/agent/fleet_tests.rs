//! Between the agent and the controllers.

use std::net::SocketAddr;

use drover_node_agent::{Agent, AgentError};
use drover_pki::{Credentials, Role, host_dns};
use drover_proto::v1::agent_client::AgentClient;
use drover_proto::v1::*;
use drover_proto::{Code, Fault};
use tonic::transport::Endpoint;

use crate::fake_fleet::{Call, FakeFleet};
use crate::world::{World, run};

fn registered(call: &Call) -> Option<HostSpec> {
    match call {
        Call::Register(spec) => Some(spec.clone()),
        _ => None,
    }
}

pub async fn a_host_registers_what_it_has_and_again_when_an_image_is_added() {
    let world = World::new().await;
    let agent = world.agent().await;
    let spec = world.fleet.until("register", registered).await;
    assert_eq!(spec.name, "host1");
    assert_eq!(
        spec.capacity,
        Some(HostCapacity {
            cpus: 2,
            memory_mib: 4096
        })
    );
    assert_eq!(spec.agent_addr, agent.addr().to_string());
    assert!(!spec.cpu_features.is_empty() && !spec.kvm_caps.is_empty() && !spec.boot_id.is_empty());
    assert_eq!(
        spec.images
            .iter()
            .map(|image| image.name.as_str())
            .collect::<Vec<_>>(),
        ["kernel"]
    );
    std::fs::write(world.config.images_dir.join("broken.elf"), "no kernel").unwrap();
    let again = |call: &Call| registered(call).filter(|spec| spec.images.len() == 2);
    let spec = world.fleet.until("register with the new image", again).await;
    assert_eq!(spec.images[0].kind, "invalid");
}

pub async fn a_host_unknown_to_the_controllers_registers_again() {
    let world = World::new().await;
    let _agent = world.agent().await;
    world.fleet.until("register", registered).await;
    world.fleet.forget_calls();
    world.fleet.say(|script| script.unknown_host = true);
    world.fleet.until("register again", registered).await;
}

pub async fn calls_go_to_the_leader_that_a_heartbeat_names_unless_it_does_not_answer() {
    let mut world = World::new().await;
    let tls = world
        .ca
        .issue_to(&world.dir.path().join("tls"), Role::Controller, "c2")
        .unwrap();
    let (leader, addr) = FakeFleet::start(&Credentials::load(&tls, "test").unwrap()).await;
    world.config.controllers.push(addr);
    world.fleet.say(|script| script.leader = addr.to_string());
    leader.say(|script| script.leader = addr.to_string());
    let _agent = world.agent().await;
    leader.until_heartbeats(3).await;
    // It answers no more and is named all the same: what it does not answer, the other one does, again and again.
    leader.say(|script| script.mute = true);
    world.fleet.until_heartbeats(10).await;
}

pub async fn dead_silent_and_leaderless_controllers_are_passed_over() {
    let mut world = World::new().await;
    // One that nobody listens at, one that accepts and says nothing, one without a leader.
    let dead = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap()
    };
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let tls = world
        .ca
        .issue_to(&world.dir.path().join("tls"), Role::Controller, "c2")
        .unwrap();
    let (leaderless, leaderless_addr) = FakeFleet::start(&Credentials::load(&tls, "test").unwrap()).await;
    leaderless.say(|script| script.mute = true);
    world
        .config
        .controllers
        .splice(0..0, [dead, silent.local_addr().unwrap(), leaderless_addr]);
    let _agent = world.agent().await;
    world.fleet.until("register", registered).await;
    world.fleet.until_heartbeats(10).await;
    // The good one falls silent, another comes back.
    world.fleet.say(|script| script.mute = true);
    leaderless.say(|script| script.mute = false);
    leaderless.until_heartbeats(10).await;
}

async fn console_as(
    world: &World,
    agent: SocketAddr,
    role: Role,
    name: &str,
) -> AgentClient<tonic::transport::Channel> {
    let tls = world
        .ca
        .issue_to(&world.dir.path().join("callers"), role, name)
        .unwrap();
    let credentials = Credentials::load(&tls, "test").unwrap();
    let endpoint = Endpoint::from_shared(format!("https://{agent}")).unwrap();
    AgentClient::new(
        endpoint
            .tls_config(credentials.tonic_client(&host_dns("host1")))
            .unwrap()
            .connect()
            .await
            .unwrap(),
    )
}

pub async fn consoles_are_for_controllers_only() {
    let world = World::new().await;
    let agent = world.agent().await;
    world.fleet.say(|script| script.desired = run(1, None));
    world.until_state("e1-start", VmmState::Waiting).await;
    let read = |vm: &str, epoch| ReadConsoleRequest {
        vm: vm.into(),
        epoch,
        offset: 5,
        ..Default::default()
    };
    let mut controller = console_as(&world, agent.addr(), Role::Controller, "c9").await;
    for epoch in [0, 1] {
        let answer = controller
            .read_console(read("vm1", epoch))
            .await
            .unwrap()
            .into_inner();
        assert_eq!((answer.offset, answer.epoch), (5, 1));
    }
    let write = WriteConsoleRequest {
        vm: "vm1".into(),
        data: b"progress".to_vec(),
        epoch: 1,
    };
    assert_eq!(
        controller
            .write_console(write.clone())
            .await
            .unwrap()
            .into_inner()
            .accepted,
        8
    );
    let code = |status: tonic::Status| Fault::from(&status).code;
    let dry_run = |epoch| ForecastRequest {
        vm: "vm1".into(),
        epoch,
        bandwidth_bytes_per_s: 77,
        ..Default::default()
    };
    let forecast = controller.forecast(dry_run(1)).await.unwrap().into_inner();
    assert_eq!((forecast.rounds, forecast.bandwidth_bytes_per_s), (3, 77));
    assert_eq!(
        code(controller.forecast(dry_run(2)).await.unwrap_err()),
        Code::StaleEpoch
    );
    assert_eq!(
        code(controller.read_console(read("vm1", 2)).await.unwrap_err()),
        Code::StaleEpoch
    );
    assert_eq!(
        code(controller.read_console(read("vm2", 0)).await.unwrap_err()),
        Code::VmState
    );
    for (role, name) in [(Role::User, "admin"), (Role::Host, "host1")] {
        let mut other = console_as(&world, agent.addr(), role, name).await;
        assert_eq!(
            code(other.read_console(read("vm1", 1)).await.unwrap_err()),
            Code::Denied
        );
        assert_eq!(
            code(other.write_console(write.clone()).await.unwrap_err()),
            Code::Denied
        );
        assert_eq!(code(other.forecast(dry_run(1)).await.unwrap_err()), Code::Denied);
    }
}

pub async fn an_agent_with_anothers_certificate_does_not_start() {
    let mut world = World::new().await;
    world.config.tls = world
        .ca
        .issue_to(&world.dir.path().join("tls"), Role::Host, "host2")
        .unwrap();
    let error = Agent::start(world.config.clone())
        .await
        .err()
        .expect("it started");
    assert!(
        matches!(&error, AgentError::Identity { found, .. } if found == "drover://test/host/host2"),
        "{error}"
    );
}
