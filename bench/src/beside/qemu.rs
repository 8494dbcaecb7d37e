//! The other side: a QEMU with the same guest, its serial port on a pipe that this process reads.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use drover_chaos_cluster::process::Daemon;
use nix::fcntl::OFlag;
use nix::unistd::{Pid, pipe2};

use super::{Bench, Given, MAC, Vm};
use crate::LOOK_AGAIN;
use crate::guest::Feed;
use crate::qemu::{FIRMWARE, PROGRAM};

/// A kind of machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machine {
    /// The small one, made to start quickly.
    Microvm,
    /// The usual one.
    Q35,
}

impl Machine {
    fn option(self) -> &'static str {
        match self {
            Self::Microvm => "microvm,memory-backend=guest",
            Self::Q35 => "q35,memory-backend=guest",
        }
    }
}

/// How a disk's file is read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aio {
    /// By a pool of threads.
    Threads,
    /// By io_uring.
    IoUring,
}

/// What QEMU does before a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Firmware {
    /// The small firmware that comes with it, which enters the kernel.
    Usual,
    /// One whose first instructions say an empty line on the serial port, and halt: no kernel is loaded.
    Beacon,
}

/// Bytes of a firmware: QEMU wants whole 64 KiB.
const BEACON_BYTES: usize = 64 << 10;

/// At the processor's reset vector, 16 bytes before the firmware's end: `mov dx, 0x3f8; mov al, 10; out dx, al; cli; hlt; jmp` to the `hlt`.
const BEACON: [u8; 10] = [0xba, 0xf8, 0x03, 0xb0, 0x0a, 0xee, 0xfa, 0xf4, 0xeb, 0xfd];
const RESET_VECTOR_FROM_END: usize = 16;

/// One QEMU with its VM.
pub struct Qemu {
    daemon: Daemon,
    begun: Instant,
    console: Console,
}

struct Console {
    pieces: Receiver<(Instant, Vec<u8>)>,
    /// Read already, and to be read again.
    again: Option<Vec<u8>>,
}

impl Feed for Console {
    fn pull(&mut self) -> Result<Vec<u8>> {
        if let Some(bytes) = self.again.take() {
            return Ok(bytes);
        }
        match self.pieces.recv_timeout(LOOK_AGAIN) {
            Ok((_, bytes)) => Ok(bytes),
            Err(RecvTimeoutError::Timeout) => Ok(Vec::new()),
            Err(RecvTimeoutError::Disconnected) => bail!("QEMU has ended"),
        }
    }
}

fn beacon(folder: &Path) -> Result<std::path::PathBuf> {
    let file = folder.join("beacon.bin");
    let mut image = vec![0; BEACON_BYTES];
    let at = BEACON_BYTES - RESET_VECTOR_FROM_END;
    image[at..at + BEACON.len()].copy_from_slice(&BEACON);
    fs::write(&file, image).context("writing a firmware")?;
    Ok(file)
}

fn command(given: &Given, machine: Machine, aio: Aio) -> Command {
    let mut command = Command::new(PROGRAM);
    command.args(["-accel", "kvm", "-cpu", "qemu64", "-machine", machine.option()]);
    command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
    command.args(["-name", "probe,debug-threads=on", "-smp", "1"]);
    let size = format!("{}M", given.memory_mib);
    command.args(["-m", &size]);
    command.args([
        "-object",
        &format!("memory-backend-memfd,id=guest,size={size},share=on"),
    ]);
    if let Some(disk) = &given.disk {
        let aio = match aio {
            Aio::Threads => "threads",
            Aio::IoUring => "io_uring",
        };
        let drive = format!(
            "file={},if=none,id=disk,format=raw,cache=writeback,aio={aio}",
            disk.display()
        );
        command.args(["-object", "iothread,id=io", "-drive", &drive]);
        command.args([
            "-device",
            "virtio-blk-pci,drive=disk,iothread=io,num-queues=1,queue-size=256,disable-legacy=on",
        ]);
    }
    if let Some(tap) = &given.tap {
        let netdev = format!("tap,id=net,ifname={tap},script=no,downscript=no,vhost=off");
        let device = format!(
            "virtio-net-pci,netdev=net,mac={MAC},disable-legacy=on,romfile=,rx_queue_size=256,tx_queue_size=256"
        );
        command.args(["-netdev", &netdev, "-device", &device]);
    }
    command
}

impl Qemu {
    /// Starts the process.
    pub fn start(
        bench: &Bench<'_>,
        given: &Given,
        machine: Machine,
        firmware: Firmware,
        aio: Aio,
    ) -> Result<Self> {
        let folder = bench.subfolder("qemu")?;
        let mut command = command(given, machine, aio);
        match firmware {
            Firmware::Usual => {
                if Path::new(FIRMWARE.1).exists() {
                    command.args(["-bios", FIRMWARE.0]);
                }
                command.arg("-kernel").arg(&bench.arguments.probe);
                command.args(["-append", &given.parameters]);
            }
            Firmware::Beacon => {
                command.arg("-bios").arg(beacon(&folder)?);
            }
        }
        let (out, into) = pipe2(OFlag::O_CLOEXEC).context("making a pipe")?;
        let log = fs::File::create(folder.join("log")).context("making a log")?;
        command
            .args(["-serial", "stdio"])
            .stdin(Stdio::null())
            .stdout(into)
            .stderr(log);
        let (pieces, received) = channel();
        // Ends when QEMU, which alone has the other end then, closes it.
        std::thread::spawn(move || {
            let (mut out, mut buffer) = (fs::File::from(out), vec![0; 64 << 10]);
            while let Ok(length) = out.read(&mut buffer) {
                let piece = (Instant::now(), buffer[..length].to_vec());
                if length == 0 || pieces.send(piece).is_err() {
                    return;
                }
            }
        });
        let begun = Instant::now();
        let daemon = Daemon::start(&bench.spawner, command)?;
        Ok(Self {
            daemon,
            begun,
            console: Console {
                pieces: received,
                again: None,
            },
        })
    }
}

impl Vm for Qemu {
    fn pid(&self) -> Pid {
        self.daemon.pid()
    }

    fn first_byte(&mut self, limit: Duration) -> Result<Duration> {
        let piece = self.console.pieces.recv_timeout(limit);
        let (at, bytes) = piece.with_context(|| format!("the guest said nothing within {limit:?}"))?;
        self.console.again = Some(bytes);
        Ok(at - self.begun)
    }

    fn console(&mut self) -> &mut dyn Feed {
        &mut self.console
    }
}
