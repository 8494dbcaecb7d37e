//! Moves a made-up VM over mutual TLS on the loopback and prints what the engine made of it:
//! `cargo run -p drover-migration --example throughput -- 1024` for 1024 MiB, a quarter of them zero.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use drover_migration::Control;
use drover_migration::source::{self, Outcome};
use drover_migration::target;
use drover_migration::transport::{LINK_TIMEOUT, Listener, connect};
use drover_migration::vm::{Layout, PAGE_SIZE, PageSet, Region, SourceVm, TargetVm};
use drover_pki::{ClusterCa, Credentials, Role, host_dns};
use drover_proto::Fault;
use drover_proto::v1::MigrationOptions;

struct Memory(Vec<u8>);

impl Memory {
    fn regions(&self) -> Layout {
        vec![Region {
            gpa: 0,
            len: self.0.len() as u64,
        }]
    }

    fn at(first: u64) -> usize {
        usize::try_from(first).expect("memory fits the address space") * PAGE_SIZE
    }
}

impl SourceVm for Memory {
    fn layout(&self) -> Layout {
        self.regions()
    }
    fn start_dirty_log(&mut self) -> Result<(), Fault> {
        Ok(())
    }
    fn stop_dirty_log(&mut self) {}
    fn take_dirty(&mut self, _into: &mut PageSet) -> Result<(), Fault> {
        Ok(())
    }
    fn read_pages(&self, first: u64, out: &mut [u8]) {
        out.copy_from_slice(&self.0[Self::at(first)..][..out.len()]);
    }
    fn pause(&mut self) -> Result<(), Fault> {
        Ok(())
    }
    fn save(&mut self) -> Result<Vec<u8>, Fault> {
        Ok(vec![7; 64 << 10])
    }
}

impl TargetVm for Memory {
    fn layout(&self) -> Layout {
        self.regions()
    }
    fn write_pages(&mut self, first: u64, data: &[u8]) -> Result<(), Fault> {
        self.0[Self::at(first)..][..data.len()].copy_from_slice(data);
        Ok(())
    }
    fn zero_pages(&mut self, _first: u64, _count: u64) -> Result<(), Fault> {
        Ok(())
    }
    fn restore(&mut self, _state: &[u8]) -> Result<(), Fault> {
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    drover_pki::install_provider();
    let mib: usize = std::env::args().nth(1).map_or(Ok(1024), |text| text.parse())?;
    let dir = tempfile::tempdir()?;
    let ca = ClusterCa::create("bench")?;
    let host1 = Credentials::load(&ca.issue_to(dir.path(), Role::Host, "host1")?, "bench")?;
    let host2 = Credentials::load(&ca.issue_to(dir.path(), Role::Host, "host2")?, "bench")?;
    let mut memory = vec![0; mib << 20];
    for (index, page) in memory
        .chunks_exact_mut(PAGE_SIZE)
        .enumerate()
        .filter(|(index, _)| index % 4 != 0)
    {
        page.fill(u8::try_from(index % 255)? + 1);
    }
    let listener = Listener::bind(IpAddr::V4(Ipv4Addr::LOCALHOST))?;
    let addr = listener.addr()?;
    let (migration, vm, cpu_profile) = ("m1".to_owned(), "vm1".to_owned(), "baseline".to_owned());
    let (from_host, epoch, device_model, link_timeout) = ("host1".to_owned(), 2, 1, LINK_TIMEOUT);
    let target = target::Params {
        migration: migration.clone(),
        vm: vm.clone(),
        from_host: from_host.clone(),
        epoch,
        device_model,
        cpu_profile: cpu_profile.clone(),
        link_timeout,
    };
    let params = source::Params {
        migration,
        vm,
        from_host,
        source_epoch: 1,
        target_epoch: epoch,
        options: MigrationOptions::default(),
        device_model,
        cpu_profile,
        tracker: "none",
        link_timeout,
    };
    let receiver = std::thread::spawn(move || {
        let control = Control::new(|_| {});
        let stream = listener.accept(host2.rustls_server(), |_| Ok(()), &control)?;
        target::run(&mut Memory(vec![0; mib << 20]), stream, &target, &control)
    });
    let control = Control::new(|_| {});
    let dial = || connect(addr, &host_dns("host2"), host1.rustls_client(), &control);
    let outcome = source::run(&mut Memory(memory), dial, &params, &control);
    let received = receiver.join().expect("the target does not panic")?;
    assert_eq!(outcome, Outcome::AwaitOutcome);
    let ready_at = received.ready_at;
    let receipt = received.finish(ready_at, ready_at);
    let seconds = Duration::from_millis(receipt.total_ms).as_secs_f64();
    println!("{receipt:#?}");
    println!(
        "{mib} MiB of memory in {seconds:.2} s: {:.0} MiB/s on the wire",
        receipt.bytes as f64 / 1_048_576.0 / seconds
    );
    Ok(())
}
