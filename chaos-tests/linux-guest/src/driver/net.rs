//! The network between the emulated host and its guest: two taps on a bridge, and a TCP stream both ways whose every byte is checked.
//!
//! The guest sends one block of random bytes again and again; the host sends bytes of its own. Both go slowly, so that the emulated processor
//! has time for other things, and back-pressure keeps the rest in the sockets' buffers.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use drover_linux_guest::report::Streamed;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

/// The host's address, and its network's length.
pub const HOST: &str = "10.0.0.1";
/// The guest's.
pub const GUEST: &str = "10.0.0.2";
/// The guest's NIC.
pub const MAC: &str = "52:54:00:0a:00:02";
/// The host's port of the stream.
pub const PORT: u16 = 7000;
/// What the guest sends again and again, bytes.
pub const BLOCK_BYTES: usize = 256 << 10;

const PACE: Duration = Duration::from_millis(50);
/// What is read and written between two rests; blocks are whole numbers of the former.
const READ_BYTES: usize = 64 << 10;
const WRITE_BYTES: usize = 4 << 10;
const CONNECT_MAX: Duration = Duration::from_secs(90);
/// The longest without a byte: a blackout, then TCP's own patience.
const PROGRESS_MAX: Duration = Duration::from_secs(90);

/// The taps of the two VMMs.
pub const TAPS: [&str; 2] = ["tap1", "tap2"];
/// A NIC that comes while the guest runs: the host's address in its network, the guest's, its own, and its taps.
pub const LATE_HOST: &str = "10.0.1.1";
/// See there.
pub const LATE_GUEST: &str = "10.0.1.2";
/// See there.
pub const LATE_MAC: &str = "52:54:00:0a:01:02";
/// See there.
pub const LATE_TAPS: [&str; 2] = ["tap3", "tap4"];

fn run(line: &str) -> Result<()> {
    let mut words = line.split(' ');
    let program = Path::new("/bin").join(words.next().context("a command")?);
    let output = Command::new(program).args(words).output().context("a command")?;
    if !output.status.success() {
        bail!("{line}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// Makes taps and bridges.
pub fn set_up() -> Result<()> {
    for (bridge, taps, address) in [("br0", TAPS, HOST), ("br1", LATE_TAPS, LATE_HOST)] {
        run(&format!("brctl addbr {bridge}"))?;
        for tap in taps {
            run(&format!("tunctl -t {tap}"))?;
            run(&format!("brctl addif {bridge} {tap}"))?;
            run(&format!("ip link set {tap} up"))?;
        }
        run(&format!("ip addr add {address}/24 dev {bridge}"))?;
        run(&format!("ip link set {bridge} up"))?;
    }
    Ok(())
}

/// The digest of a file, as `md5sum` prints it of its input.
fn digest(path: &Path) -> Result<String> {
    let output = Command::new("/bin/md5sum")
        .stdin(std::fs::File::open(path)?)
        .stderr(Stdio::inherit())
        .output()
        .context("md5sum")?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// The stream.
pub struct Stream {
    folder: PathBuf,
    received: Arc<AtomicU64>,
    over: Arc<AtomicBool>,
    reading: JoinHandle<Result<()>>,
    writing: JoinHandle<Result<u64>>,
}

impl Stream {
    /// Listens, lets the guest be told by `call`, and waits until it has connected. Files go to `folder`.
    pub async fn open(folder: PathBuf, call: impl Future<Output = Result<()>>) -> Result<Self> {
        let listener = TcpListener::bind((HOST, PORT)).await.context("listening")?;
        call.await?;
        let (socket, _) = timeout(CONNECT_MAX, listener.accept())
            .await
            .context("waiting for the guest to connect")??;
        let (reader, writer) = socket.into_split();
        let (received, over) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        Ok(Self {
            reading: tokio::spawn(read(reader, folder.join("block"), received.clone())),
            writing: tokio::spawn(write(writer, folder.join("sent"), over.clone())),
            folder,
            received,
            over,
        })
    }

    /// Waits until `bytes` more have come.
    pub async fn more(&self, bytes: u64) -> Result<()> {
        let until = self.received.load(Ordering::Relaxed) + bytes;
        let began = Instant::now();
        while self.received.load(Ordering::Relaxed) < until {
            ensure!(!self.reading.is_finished(), "the stream from the guest has ended");
            ensure!(began.elapsed() < PROGRESS_MAX, "the stream from the guest stands");
            sleep(PACE).await;
        }
        Ok(())
    }

    /// Reads to the end of what the guest sends, which it was told to end, ends the other way, and says what went over it.
    pub async fn close(self) -> Result<Streamed> {
        timeout(PROGRESS_MAX, self.reading)
            .await
            .context("waiting for the end of the stream")??
            .context("the stream from the guest")?;
        self.over.store(true, Ordering::Relaxed);
        let sent_bytes = timeout(PROGRESS_MAX, self.writing)
            .await
            .context("waiting for the end of the stream")??
            .context("the stream to the guest")?;
        Ok(Streamed {
            received_bytes: self.received.load(Ordering::Relaxed),
            block: digest(&self.folder.join("block"))?,
            sent_bytes,
            sent: digest(&self.folder.join("sent"))?,
        })
    }
}

/// Reads to the end. Each block must be the first one again, which goes to the file `first`.
async fn read(mut from: OwnedReadHalf, first: PathBuf, received: Arc<AtomicU64>) -> Result<()> {
    let mut block: Vec<u8> = Vec::with_capacity(BLOCK_BYTES);
    let mut buffer = vec![0; READ_BYTES];
    let mut total = 0;
    loop {
        let at = total % BLOCK_BYTES;
        let room = READ_BYTES - at % READ_BYTES;
        let len = from.read(&mut buffer[..room]).await?;
        if len == 0 {
            break;
        }
        if total < BLOCK_BYTES {
            block.extend_from_slice(&buffer[..len]);
        }
        ensure!(
            block[at..at + len] == buffer[..len],
            "bytes {total}..+{len} are not what was sent"
        );
        total += len;
        received.store(u64::try_from(total)?, Ordering::Relaxed);
        if total.is_multiple_of(READ_BYTES) {
            sleep(PACE).await;
        }
    }
    ensure!(
        total >= BLOCK_BYTES && total.is_multiple_of(BLOCK_BYTES),
        "{total} bytes came, must be whole blocks of {BLOCK_BYTES}"
    );
    std::fs::write(first, block)?;
    Ok(())
}

/// Writes until it is over; what was written goes to the file `copy`, too. Gives how many bytes that was.
async fn write(mut to: OwnedWriteHalf, copy: PathBuf, over: Arc<AtomicBool>) -> Result<u64> {
    let (mut written, mut word) = (Vec::new(), 0x9e37_79b9_7f4a_7c15u64);
    while !over.load(Ordering::Relaxed) {
        let from = written.len();
        for _ in 0..WRITE_BYTES / 8 {
            // Xorshift (Marsaglia, 2003): no two pieces are alike.
            word ^= word << 13;
            word ^= word >> 7;
            word ^= word << 17;
            written.extend(word.to_le_bytes());
        }
        to.write_all(&written[from..]).await?;
        sleep(PACE).await;
    }
    to.shutdown().await?;
    std::fs::write(copy, &written)?;
    Ok(u64::try_from(written.len())?)
}

/// Whether nobody has the tap open: only then is its carrier down.
pub fn is_free(tap: &str) -> Result<bool> {
    let carrier =
        std::fs::read_to_string(format!("/sys/class/net/{tap}/carrier")).context("a tap's carrier")?;
    Ok(carrier.trim() == "0")
}
