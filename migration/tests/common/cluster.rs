//! Two hosts with certificates of one cluster that move a fake VM over TCP, and what such a migration is asked for.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use drover_migration::Control;
use drover_migration::source::{self, Outcome, Way};
use drover_migration::target::{self, Admission, Received};
use drover_migration::transport::{LINK_TIMEOUT, Listener, connect, connect_plain};
use drover_pki::{ClusterCa, Credentials, Role, host_dns};
use drover_proto::Fault;
use drover_proto::v1::{Compression, MigrationOptions};

use super::{FakeVm, Rng};

/// Pages of a usual VM.
pub const PAGES: u64 = 4096;
/// A target that nobody calls any more is cancelled after so long.
const ABANDONED: Duration = Duration::from_secs(8);

pub fn source_params(streams: u32, plaintext: bool) -> source::Params {
    source::Params {
        migration: "m1".into(),
        vm: "vm1".into(),
        from_host: "host1".into(),
        source_epoch: 1,
        target_epoch: 2,
        options: MigrationOptions {
            max_downtime_ms: 2000,
            streams,
            plaintext,
            compression: Compression::Off.into(),
            ..MigrationOptions::default()
        },
        device_model: 1,
        cpu_profile: "baseline".into(),
        tracker: "bitmap",
        local: false,
        link_timeout: LINK_TIMEOUT,
    }
}

pub fn target_params(plaintext: bool) -> target::Params {
    target::Params {
        migration: "m1".into(),
        vm: "vm1".into(),
        from_host: "host1".into(),
        epoch: 2,
        device_model: 1,
        cpu_profile: "baseline".into(),
        plaintext,
        local: false,
        link_timeout: LINK_TIMEOUT,
    }
}

pub fn quiet() -> Control {
    Control::new(|_| {})
}

/// A VM of which every fourth page is zero.
pub fn filled_vm() -> FakeVm {
    filled_vm_of(PAGES)
}

/// The same of another size.
pub fn filled_vm_of(pages: u64) -> FakeVm {
    let (vm, mut rng) = (FakeVm::new(pages), Rng(11));
    for page in (0..usize::try_from(pages).unwrap()).filter(|page| page % 4 != 0) {
        vm.guest_writes(page, rng.byte());
    }
    vm
}

/// Runs `move_it` while the guest writes to a small part of its memory.
pub fn with_guest<T>(vm: &FakeVm, move_it: impl FnOnce() -> T) -> T {
    let over = AtomicBool::new(false);
    let [first, count, poked] =
        [1000, 100, 200].map(|of_usual| of_usual * vm.pages() / usize::try_from(PAGES).unwrap());
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut rng = Rng(3);
            while !over.load(Ordering::Relaxed) {
                if !vm.guest_writes(first + rng.below(count), rng.byte()) {
                    return;
                }
                // None of those that are zero.
                vm.guest_pokes(1 + 4 * rng.below(poked), rng.below(64), rng.byte());
                thread::yield_now();
            }
        });
        let moved = move_it();
        over.store(true, Ordering::Relaxed);
        moved
    })
}

pub fn assert_moved(source_vm: &FakeVm, target_vm: &FakeVm) {
    let (source, target) = (source_vm.lock(), target_vm.lock());
    assert!(source.paused && source.pauses == 1);
    assert!(source.memory == target.memory, "memory differs");
    assert_eq!(target.restored.as_deref(), Some(&b"registers and devices"[..]));
}

/// Certificates of one cluster.
pub struct Cluster {
    pub host1: Credentials,
    pub host2: Credentials,
}

impl Cluster {
    pub fn new() -> Self {
        drover_pki::install_provider();
        let (ca, dir) = (ClusterCa::create("test").unwrap(), tempfile::tempdir().unwrap());
        let host = |name| {
            let files = ca.issue_to(dir.path(), Role::Host, name).unwrap();
            Credentials::load(&files, "test").unwrap()
        };
        Self {
            host1: host("host1"),
            host2: host("host2"),
        }
    }

    /// host1 moves its VM to host2; `before_pages` is done when the target waits for the first stream.
    pub fn migrate(
        &self,
        vms: (&FakeVm, &FakeVm),
        params: &source::Params,
        target_params: &target::Params,
        before_pages: impl Fn(SocketAddr),
    ) -> (Outcome, Result<Received, Fault>) {
        self.migrate_by(vms, params, target_params, &quiet(), |way, addr| {
            if way != Way::Link {
                before_pages(addr);
            }
            addr
        })
    }

    /// The same, each connection by the address that `route` gives for it.
    pub fn migrate_by(
        &self,
        vms: (&FakeVm, &FakeVm),
        params: &source::Params,
        target_params: &target::Params,
        source_control: &Control,
        mut route: impl FnMut(Way, SocketAddr) -> SocketAddr,
    ) -> (Outcome, Result<Received, Fault>) {
        let listener = Listener::bind(IpAddr::V4(Ipv4Addr::LOCALHOST)).unwrap();
        let addr = listener.addr().unwrap();
        let target_control = quiet();
        let tls = self.host2.rustls_server();
        let dial = |way| {
            let addr = route(way, addr);
            match way {
                Way::Pages { plaintext: true } => connect_plain(addr),
                _ => connect(
                    addr,
                    &host_dns("host2"),
                    self.host1.rustls_client(),
                    source_control,
                ),
            }
        };
        thread::scope(|scope| {
            let target = scope.spawn(|| {
                let stream = listener.accept(&tls, |_| Ok(()), &target_control)?;
                let admit = |admission: &Admission| {
                    listener.accept_streams(&tls, |_| Ok(()), admission, &target_control)
                };
                target::run(vms.1, stream, admit, target_params, &target_control)
            });
            let outcome = with_guest(vms.0, || source::run(vms.0, dial, params, source_control));
            let ended = Instant::now();
            while !target.is_finished() && ended.elapsed() < ABANDONED {
                thread::sleep(Duration::from_millis(2));
            }
            target_control.cancel();
            (outcome, target.join().unwrap())
        })
    }
}
