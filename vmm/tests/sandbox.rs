//! A VMM's sandbox: what a VMM cannot do from inside, whichever thread tries, and that all that it is for still works there.
//!
//! Real processes. What is tried is tried by the VMM itself, in a build for tests, as code would that a guest has taken over.

#![allow(clippy::unwrap_used, reason = "a test may, its helpers too")]

#[path = "common/caged.rs"]
mod cage;
mod common;
#[path = "common/inside.rs"]
mod inside;
#[path = "common/process.rs"]
mod running;

use std::fs;
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cage::{UID, caged, hand_disk, hand_in, hand_peer, hand_way, stranger};
use common::{PATIENCE, World, flat_out, has_seconds, incoming, seconds, slow_link};
use drover_proto::descriptors::Kind;
use drover_proto::v1::{
    AttachDiskRequest, MigrationOptions, OutcomeRequest, SetMemoryRequest, VmmState, WatchInfoRequest,
    WriteConsoleRequest,
};
use drover_proto::{Code, Fault, LOCAL_PREFIX};
use inside::Caged;
use nix::libc;
use running::{Process, watch};

fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        println!("SKIPPED: only root has users and namespaces to give");
    }
    root
}

fn field<'a>(status: &'a str, name: &str) -> Vec<&'a str> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {name} in {status}"))
        .split_whitespace()
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_runs_inside_and_every_thread_has_given_everything_up() {
    needs_kvm!();
    if !is_root() {
        return;
    }
    let world = World::new();
    let mut caged = Caged::start(&world, "host1", 1, |config| config["rng"] = true.into()).await;
    // Before the first grant, so before the guest's first instruction.
    caged.state(VmmState::Waiting).await;
    let threads = caged.status();
    assert!(threads.len() >= 4, "{threads:?}");
    let uid = UID.to_string();
    for status in &threads {
        for name in ["Uid", "Gid"] {
            assert_eq!(field(status, name), vec![&uid[..]; 4], "{status}");
        }
        for name in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(field(status, name), ["0000000000000000"], "{name} of {status}");
        }
        assert!(field(status, "Groups").is_empty(), "{status}");
        assert_eq!(field(status, "NoNewPrivs"), ["1"], "{status}");
        assert_eq!(field(status, "Seccomp"), ["2"], "{status}");
    }
    let pid = caged.process.child.id();
    for namespace in ["mnt", "net", "ipc", "uts"] {
        let of = |process: &str| fs::read_link(format!("/proc/{process}/ns/{namespace}")).unwrap();
        assert_ne!(of(&pid.to_string()), of("self"), "{namespace}");
    }
    let root = fs::read_dir(format!("/proc/{pid}/root")).unwrap();
    assert_eq!(root.count(), 0, "its root folder is not empty");
    let devices = fs::read_to_string(format!("/proc/{pid}/net/dev")).unwrap();
    assert_eq!(
        devices.lines().count(),
        3,
        "its networks have more than a loopback: {devices}"
    );
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let limit = |name: &str| {
        limits
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap()
            .trim()
            .to_owned()
    };
    assert!(limit("Max core file size").starts_with('0'), "{limits}");
    assert!(limit("Max open files").starts_with("1024"), "{limits}");
    caged.grant().await;
    caged.console("lines", has_seconds(2)).await;
    caged
        .vmm
        .destroy(drover_proto::v1::DestroyRequest::default())
        .await
        .unwrap();
    assert!(caged.process.child.wait().unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_moves_between_two_sandboxes() {
    needs_kvm!();
    let world = World::new();
    let mut source = Caged::start(&world, "host1", 1, |_| {}).await;
    source.grant().await;
    source.console("lines", has_seconds(1)).await;
    let mut target = Caged::start(&world, "host2", 2, |config| incoming(config, "host1")).await;
    let info = watch(&mut target.vmm, "address", |info| !info.listen_addr.is_empty()).await;
    // Its agent has handed nothing in yet.
    source.send("m1", info.listen_addr.clone(), None).await;
    let failed = |info: &drover_proto::v1::VmmInfo| info.migration.clone()?.failure;
    let info_failed = watch(&mut source.vmm, "failure", |info| failed(info).is_some()).await;
    assert_eq!(failed(&info_failed).unwrap().code, Code::Denied.as_str());
    let aborted = OutcomeRequest {
        migration: "m1".into(),
        committed: false,
    };
    source.vmm.outcome(aborted).await.unwrap();
    source.more_seconds().await;
    drop(target);

    let mut target = Caged::start(&world, "host2", 2, |config| {
        common::incoming_by(config, "m2", "host1")
    })
    .await;
    let info = watch(&mut target.vmm, "address", |info| !info.listen_addr.is_empty()).await;
    hand_host_way(&world, &source.folder, "m2");
    source.send("m2", info.listen_addr, None).await;
    target.state(VmmState::Ready).await;
    target.grant().await;
    source.committed("m2").await;
    target.more_seconds().await;
}

fn hand_host_way(world: &World, folder: &Path, migration: &str) {
    let files = ["ca.pem", "host1.pem", "host1.key"].map(|name| world.path().join(name));
    hand_way(folder, migration, [&files[0], &files[1], &files[2]]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_moves_by_post_copy_between_two_sandboxes() {
    needs_kvm!();
    if let Err(fault) = drover_vmm::uffd::Uffd::open() {
        return println!("SKIPPED: {fault}");
    }
    let world = World::new();
    let mut source = Caged::start(&world, "host1", 1, flat_out).await;
    source.grant().await;
    source.console("lines", has_seconds(2)).await;
    let mut target = Caged::start(&world, "host2", 2, |config| {
        flat_out(config);
        incoming(config, "host1");
    })
    .await;
    let info = watch(&mut target.vmm, "address", |info| !info.listen_addr.is_empty()).await;
    hand_host_way(&world, &source.folder, "m1");
    let options = MigrationOptions {
        allow_postcopy: true,
        ..slow_link(0).unwrap()
    };
    source.send("m1", info.listen_addr, Some(options)).await;
    target.state(VmmState::Ready).await;
    target.grant().await;
    source.committed("m1").await;
    let info = watch(&mut target.vmm, "receipt", |info| {
        info.migration
            .as_ref()
            .is_some_and(|migration| migration.receipt.is_some())
    })
    .await;
    let receipt = info.migration.unwrap().receipt.unwrap();
    assert!(receipt.post_copy.is_some(), "{receipt:?}");
    target.more_seconds().await;
    assert!(
        source.process.child.wait().unwrap().success(),
        "it is over when the target has all"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vmm_in_its_sandbox_is_replaced_by_another_one() {
    needs_kvm!();
    let world = World::new();
    let mut source = Caged::start(&world, "host1", 1, |_| {}).await;
    source.grant().await;
    source.console("lines", has_seconds(1)).await;
    let mut target = Caged::start(&world, "host1", 2, |config| {
        incoming(config, "host1");
        config["incoming"]["local"] = true.into();
    })
    .await;
    watch(&mut target.vmm, "address", |info| !info.listen_addr.is_empty()).await;
    let waits_at = target.folder.join("handover.sock");
    hand_peer(&source.folder, &waits_at);
    source
        .send("m1", format!("{LOCAL_PREFIX}{}", waits_at.display()), None)
        .await;
    target.state(VmmState::Ready).await;
    target.grant().await;
    source.committed("m1").await;
    target.more_seconds().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_comes_to_a_running_guest_if_the_agent_hands_it_in() {
    needs_kvm!();
    let world = World::new();
    let path = world.path().join("late.raw");
    fs::File::create(&path).unwrap().set_len(4 << 20).unwrap();
    let mut caged = Caged::start(&world, "host1", 1, |config| {
        config["cmdline"] = "own=16M hot=4M rate=20000 disk=hot-plug".into();
    })
    .await;
    caged.grant().await;
    caged.console("lines", has_seconds(1)).await;
    let request = AttachDiskRequest {
        revision: 1,
        slot: 5,
        path: path.to_str().unwrap().to_owned(),
        ..AttachDiskRequest::default()
    };
    let refused = caged.vmm.attach_disk(request.clone()).await.unwrap_err();
    let refused = Fault::from(&refused);
    assert_eq!(refused.code, Code::DiskUnusable, "{refused}");
    assert!(
        refused.message.contains("has not handed the file in"),
        "{refused}"
    );
    hand_disk(&caged.folder, &path);
    caged.vmm.attach_disk(request).await.unwrap();
    caged
        .console("use of the disk", |text| {
            seconds(text, "disk_seq").last().is_some_and(|seq| *seq > 8)
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_gives_memory_up_from_inside_and_its_host_has_it_back() {
    needs_kvm!();
    let world = World::new();
    let mut caged = Caged::start(&world, "host1", 1, |config| {
        config["memory_mib"] = 192.into();
        config["cmdline"] = "own=16M hot=1M rate=2000 spare=written balloon=quiet".into();
        config["balloon"] = serde_json::json!({"slot": 31});
    })
    .await;
    let shared_kib = |caged: &Caged| -> u64 { field(&caged.status()[0], "RssShmem")[0].parse().unwrap() };
    caged.grant().await;
    caged.console("line", has_seconds(1)).await;
    let before = shared_kib(&caged);
    for (revision, target_mib, held_mib) in [(1, 128, 64), (2, 184, 8), (3, 64, 128)] {
        let request = SetMemoryRequest { revision, target_mib };
        caged.vmm.set_memory(request).await.unwrap();
        let holds = |text: &str| seconds(text, "balloon").last() == Some(&(held_mib * 256));
        let seen = caged.console("what its balloon is to hold", holds).await;
        assert!(
            seconds(&seen, "balloon_lost").iter().all(|&lost| lost == 0),
            "{seen}"
        );
    }
    let after = shared_kib(&caged);
    assert!(
        after + (96 << 10) < before,
        "{before} KiB before, {after} KiB after"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_speaks_and_hears_by_a_virtio_console_from_inside_and_after_a_move() {
    needs_kvm!();
    let world = World::new();
    let with_console = |config: &mut serde_json::Value| {
        config["cmdline"] = "own=16M hot=1M rate=2000 console=virtio".into();
        config["console"] = serde_json::json!({"slot": 29});
    };
    let mut source = Caged::start(&world, "host1", 1, with_console).await;
    source.grant().await;
    source.console("line", has_seconds(1)).await;
    ask(&mut source, "before").await;
    let mut target = Caged::start(&world, "host2", 2, |config| {
        with_console(config);
        incoming(config, "host1");
    })
    .await;
    let info = watch(&mut target.vmm, "address", |info| !info.listen_addr.is_empty()).await;
    hand_host_way(&world, &source.folder, "m1");
    source.send("m1", info.listen_addr, None).await;
    target.state(VmmState::Ready).await;
    target.grant().await;
    source.committed("m1").await;
    let seen = ask(&mut target, "after").await;
    let lines = seconds(&seen, "t").len();
    let seen = target.console("a line after it", has_seconds(lines + 1)).await;
    assert_eq!(
        seconds(&seen, "console_typed").last(),
        Some(&23),
        "bytes of both words"
    );
}

/// Types a word and waits for the guest's answer.
async fn ask(caged: &mut Caged, word: &str) -> String {
    let mut data = format!("ping {word}\n").into_bytes();
    while !data.is_empty() {
        let request = WriteConsoleRequest {
            data: data.clone(),
            ..WriteConsoleRequest::default()
        };
        let accepted = caged
            .vmm
            .write_console(request)
            .await
            .unwrap()
            .into_inner()
            .accepted;
        data.drain(..usize::try_from(accepted).unwrap());
    }
    caged
        .console("an answer", |text| text.contains(&format!("probe pong {word}")))
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_use_is_refused_and_nobody_else_is_heard() {
    needs_kvm!();
    let world = World::new();
    let caged = Caged::start(&world, "host1", 1, |_| {}).await;
    let one = || vec![fs::File::open("/dev/null").unwrap().into()];
    assert_eq!(hand_in(&caged.folder, Kind::File, "/pool/a", &one()), "ok");
    if !is_root() {
        return;
    }
    // Another user gets no further than the folder; one who got there is told apart by the kernel.
    let socket = caged.folder.join("descriptors.sock");
    for folder in [world.path(), &caged.folder] {
        fs::set_permissions(folder, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    }
    fs::set_permissions(&socket, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    // Who it is, it is told by the kernel before anything is sent, which may come too late then.
    let script = format!(
        "import os,socket\nos.setuid({UID})\ns=socket.socket(socket.AF_UNIX)\ns.connect({:?})\n\
         try: socket.send_fds(s,[b'DRVFD\\x01n'],[0])\nexcept OSError: pass\nprint(s.recv(1000).decode())",
        socket.to_str().unwrap()
    );
    let said = Command::new("python3").arg("-c").arg(script).output();
    match said {
        Err(error) => println!("SKIPPED: python3: {error}"),
        Ok(said) => {
            let said = String::from_utf8_lossy(&said.stdout).into_owned();
            assert!(said.contains("is not this VMM's agent's"), "{said}");
        }
    }
}

/// What came of an attempt.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    /// The process was ended by its list of system calls.
    Killed,
    /// An error was the answer.
    Refused(String),
    /// It was done.
    Done(i64),
}

/// A VMM whose thread of kind `thread` tries `what`, with these layers alone, or with all.
fn attempt(world: &World, only: Option<&str>, thread: &str, what: &str) -> Outcome {
    static NUMBER: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
    let epoch = NUMBER.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
    let config = world.write("host2", epoch, |config| {
        config["rng"] = true.into();
        config["memory_mib"] = 16.into();
        config["cmdline"] = "own=1M".into();
        caged(config);
        config["sandbox"]["required"] = only.is_none().into();
        if thread == "migration" {
            incoming(config, "host1");
        }
    });
    let log = config.with_file_name("vmm.log");
    let file = fs::File::create(&log).unwrap();
    let mut process = Process::start_with(&config, |command| {
        if let Some(only) = only {
            command.env("DROVER_SANDBOX_ONLY", only);
        }
        command
            .env("DROVER_ATTEMPT", format!("{thread}:{what}"))
            .stdout(Stdio::null())
            .stderr(file)
    });
    let began = Instant::now();
    loop {
        let ended = process.child.try_wait().unwrap();
        let text = fs::read_to_string(&log).unwrap();
        if let Some(line) = text.lines().find(|line| line.contains("attempt: ")) {
            let said = line.split("attempt: ").nth(1).unwrap();
            if let Some((_, why)) = said.split_once(": refused, ") {
                return Outcome::Refused(why.to_owned());
            }
            let (_, value) = said.split_once(": done, ").unwrap();
            return Outcome::Done(value.trim().parse().unwrap());
        }
        if let Some(status) = ended {
            assert!(text.contains("attempt begins"), "it ended before:\n{text}");
            assert_eq!(status.signal(), Some(libc::SIGSYS), "{status}\n{text}");
            return Outcome::Killed;
        }
        assert!(began.elapsed() < PATIENCE, "no attempt:\n{text}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Somebody else's process.
struct Bystander(std::process::Child);

impl Bystander {
    fn new() -> Self {
        Self(Command::new("sleep").arg("600").spawn().unwrap())
    }
}

impl Drop for Bystander {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Whether attempts can be made; says loudly when not.
fn can_attempt() -> bool {
    if !cfg!(feature = "chaos") {
        println!("SKIPPED: only a build with the feature chaos makes attempts");
    }
    cfg!(feature = "chaos") && common::kvm()
}

#[test]
fn whatever_leads_out_ends_the_process_whichever_thread_tries_it() {
    if !can_attempt() {
        return;
    }
    let (world, other) = (World::new(), Bystander::new());
    let (_listener, addr) = stranger();
    let pid = other.0.id();
    let of = |what: &str| format!("{what}={pid}");
    let tcp = format!("tcp={}", addr.port());
    let all = [
        "exec=/bin/true".to_owned(),
        "fork".into(),
        of("kill"),
        of("tgkill"),
        of("ptrace"),
        of("peek"),
        of("pidfd"),
        "mount=/tmp".into(),
        "root".into(),
        "unshare".into(),
        "bpf".into(),
        "keyctl".into(),
        "socket".into(),
        "executable".into(),
        "terminal".into(),
        tcp.clone(),
    ];
    for what in &all {
        assert_eq!(attempt(&world, None, "vcpu", what), Outcome::Killed, "{what}");
    }
    for thread in ["device", "watch", "migration", "offers"] {
        for what in ["exec=/bin/true", &of("kill"), "fork", &tcp] {
            assert_eq!(
                attempt(&world, None, thread, what),
                Outcome::Killed,
                "{thread} {what}"
            );
        }
    }
    // What libraries try by themselves is answered.
    let answered = |what: &str| match attempt(&world, None, "vcpu", what) {
        Outcome::Refused(why) => why,
        other => panic!("{what}: {other:?}"),
    };
    let key = world.path().join("host1.key");
    for what in [
        "open=/etc/shadow",
        "list=/",
        "create=/tmp/drover-attempt",
        &format!("open={}", key.display()),
    ] {
        let why = answered(what);
        assert!(
            why.contains("Permission denied") || why.contains("No such file"),
            "{what}: {why}"
        );
    }
    assert!(answered("fork3").contains("not implemented"));
    assert!(!Path::new("/tmp/drover-attempt").exists());
}

#[test]
fn each_layer_holds_by_itself() {
    if !can_attempt() || !is_root() {
        return;
    }
    let (world, other) = (World::new(), Bystander::new());
    let (_listener, addr) = stranger();
    let socket = world.path().join("others.sock");
    let _theirs = UnixListener::bind(&socket).unwrap();
    let of = |what: &str| format!("{what}={}", other.0.id());
    let (tcp, unix) = (
        format!("tcp={}", addr.port()),
        format!("unix={}", socket.display()),
    );
    // Signals are tried by `tgkill`, which hits nobody where it is refused.
    let cases: [(&str, &[(&str, &str)]); 5] = [
        (
            "Landlock",
            &[
                ("open=/etc/shadow", "Permission denied"),
                ("create=/tmp/drover-attempt", "Permission denied"),
                ("list=/", "Permission denied"),
                (&of("kill"), "Operation not permitted"),
                (&of("ptrace"), "Operation not permitted"),
            ],
        ),
        (
            "namespaces,empty root",
            &[
                ("open=/etc/shadow", "No such file"),
                ("create=/drover-attempt", "Read-only"),
                ("exec=/bin/true", "No such file"),
                (&tcp, "unreachable"),
                (&unix, "No such file"),
            ],
        ),
        (
            "own user",
            &[
                ("open=/etc/shadow", "Permission denied"),
                ("root", "Operation not permitted"),
                ("mount=/tmp", "Operation not permitted"),
                (&of("kill"), "Operation not permitted"),
                (&of("ptrace"), "Operation not permitted"),
                (&unix, "Permission denied"),
            ],
        ),
        (
            "no capabilities",
            &[
                ("mount=/tmp", "Operation not permitted"),
                (&of("ptrace"), "Operation not permitted"),
            ],
        ),
        ("system calls", &[("open=/etc/shadow", "Permission denied")]),
    ];
    for (only, tries) in cases {
        for (what, why) in tries {
            match attempt(&world, Some(only), "vcpu", what) {
                Outcome::Refused(said) => assert!(said.contains(why), "{only}: {what}: {said}"),
                done => panic!("{only}: {what}: {done:?}"),
            }
        }
    }
    assert_eq!(
        attempt(&world, Some("namespaces,empty root"), "vcpu", "list=/"),
        Outcome::Done(0)
    );
    for what in ["exec=/bin/true", "mount=/tmp", &tcp, &unix, &of("kill")] {
        assert_eq!(
            attempt(&world, Some("system calls"), "vcpu", what),
            Outcome::Killed,
            "{what}"
        );
    }
    // Without any layer all of it is there to be had: the attempts are real ones.
    for what in ["open=/etc/shadow", &tcp, &unix, "root"] {
        let outcome = attempt(&world, Some("none"), "vcpu", what);
        assert!(matches!(outcome, Outcome::Done(_)), "{what}: {outcome:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_agents_vmm_has_no_sandbox_and_a_required_one_that_is_none_does_not_start() {
    needs_kvm!();
    let world = World::new();
    let config = world.write("host1", 1, |_| {});
    let process = Process::start(&config);
    let mut vmm = process.client().await;
    vmm.watch_info(WatchInfoRequest::default()).await.unwrap();
    assert!(!config.with_file_name("descriptors.sock").exists());
    if !is_root() {
        return;
    }
    let config = world.write("host1", 2, |config| {
        config["sandbox"] = serde_json::json!({"required": true})
    });
    let refused = Command::new(env!("CARGO_BIN_EXE_drover-vmm"))
        .arg("--config")
        .arg(config)
        .output()
        .unwrap();
    assert!(!refused.status.success());
    let log = String::from_utf8_lossy(&refused.stderr);
    assert!(
        log.contains("requires a sandbox") && log.contains("own user (the agent names none)"),
        "{log}"
    );
}

#[test]
fn the_program_says_what_its_sandbox_would_lack() {
    let ask = |question: &str| {
        let said = Command::new(env!("CARGO_BIN_EXE_drover-vmm"))
            .arg(question)
            .output()
            .unwrap();
        String::from_utf8(said.stdout).unwrap()
    };
    if is_root() {
        assert_eq!(ask(&format!("--sandbox={UID}:{UID}")), "ok\n");
        assert_eq!(ask("--sandbox"), "no sandbox: own user (the agent names none)\n");
    }
}
