//! The limit: as many bytes as the guest has, sent by plain TCP from memory to memory between the same two places.
//!
//! One thread writes, one reads, 1 MiB a call, nothing is looked at. Twice: once from memory as large as the guest's into fresh memory of
//! the kind that a VMM gives its guest, which is the limit for a migration, whose target must keep what it gets; and once from one buffer into another, again
//! and again, which shows what the link does when memory costs nothing.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use drover_chaos_cluster::Cluster;
use drover_chaos_cluster::cluster::{PARTIES, host_ip};
use drover_chaos_cluster::network::Namespace;

use crate::result::{Run, Side};
use crate::warm;
use crate::workload::Workload;

/// One call moves so much.
const CHUNK: usize = 1 << 20;

/// No byte for so long: the link is gone.
const STALL_LIMIT: Duration = Duration::from_secs(10);

/// Copies what the workload's guest has written from host `from` to host `to`.
pub fn measure(cluster: &Cluster, workload: &Workload, from: usize, to: usize, pair: usize) -> Result<Run> {
    let chunks = usize::try_from(workload.populated_mib).context("a size that fits")?;
    let place = |host: usize| &cluster.network.place(PARTIES + host).namespace;
    let link = Link {
        from: place(from),
        to: place(to),
        ip: host_ip(to),
    };
    let reused = link.copy(chunks, false)?;
    warm::memory(2 * workload.populated_mib)?;
    let whole = link.copy(chunks, true)?;
    Ok(Run {
        mib_per_s: Some(whole),
        reused_mib_per_s: Some(reused),
        ..Run::new(pair, Side::Copy)
    })
}

struct Link<'a> {
    from: &'a Namespace,
    to: &'a Namespace,
    ip: Ipv4Addr,
}

impl Link<'_> {
    /// Sends `chunks` MiB, from as much memory into as much fresh memory if `whole`, else from one buffer to another; MiB a second, from
    /// the connection until the last byte is where it belongs.
    fn copy(&self, chunks: usize, whole: bool) -> Result<f64> {
        let (to_sender, address) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            let receiver = scope.spawn(move || -> Result<()> {
                self.to.enter()?;
                let listener = TcpListener::bind((self.ip, 0)).context("listening for the copy")?;
                to_sender
                    .send(listener.local_addr()?)
                    .context("the sender is gone")?;
                receive(accept(&listener)?, chunks, whole)
            });
            let sender = scope.spawn(move || -> Result<Duration> {
                self.from.enter()?;
                let address = address
                    .recv_timeout(STALL_LIMIT)
                    .context("the receiver does not listen")?;
                let content = vec![0xA5; if whole { chunks * CHUNK } else { CHUNK }];
                let begun = Instant::now();
                let mut stream =
                    TcpStream::connect_timeout(&address, STALL_LIMIT).context("connecting for the copy")?;
                stream.set_write_timeout(Some(STALL_LIMIT))?;
                stream.set_read_timeout(Some(STALL_LIMIT))?;
                for chunk in content.chunks(CHUNK).cycle().take(chunks) {
                    stream.write_all(chunk).context("sending the copy")?;
                }
                // The receiver's word that it has all.
                stream
                    .read_exact(&mut [0])
                    .context("the receiver's acknowledgement")?;
                Ok(begun.elapsed())
            });
            let sent = sender.join().map_err(|_| anyhow!("the copy's sender panicked"))?;
            let received = receiver
                .join()
                .map_err(|_| anyhow!("the copy's receiver panicked"))?;
            received?;
            let length = sent?.as_secs_f64();
            ensure!(length > 0.0, "a copy that took no time");
            Ok(chunks as f64 / length)
        })
    }
}

/// Waits for the sender, but not for ever: it may have failed.
fn accept(listener: &TcpListener) -> Result<TcpStream> {
    listener.set_nonblocking(true)?;
    let deadline = Instant::now() + STALL_LIMIT;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(error) => return Err(error).context("waiting for the copy's sender"),
        }
    }
}

fn receive(mut stream: TcpStream, chunks: usize, whole: bool) -> Result<()> {
    stream.set_read_timeout(Some(STALL_LIMIT))?;
    let mut chunk = vec![0; CHUNK];
    let kept = whole
        .then(|| drover_vmm::backing::create((chunks * CHUNK) as u64, true))
        .transpose()
        .map_err(|fault| anyhow!("{fault}"))?;
    for number in 0..chunks {
        stream.read_exact(&mut chunk).context("receiving the copy")?;
        if let Some(memory) = &kept {
            memory
                .write_all_at(&chunk, (number * CHUNK) as u64)
                .context("keeping the copy")?;
        }
    }
    stream.write_all(&[1]).context("acknowledging the copy")
}
