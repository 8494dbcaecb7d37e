//! The emulated host: QEMU's software emulation of a machine with AMD's hardware virtualization.
//!
//! Its root is an initramfs with busybox, KVM's modules and the programs under test; its whole life is one run of the driver.
//!
//! The host has one processor, and QEMU is kept on one of this machine's. QEMU's emulation of SVM is not sound where its threads run at
//! the same time: docs/testing.md tells what was seen and where it comes from.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::archive::Archive;
use crate::kernel::{Kernel, ask};
use crate::report::Report;

/// Emulation is slow, and the machine may be busy: a whole run takes one or two minutes on two idle processors.
const RUN_MAX: Duration = Duration::from_secs(540);
/// Lines of the host's console that a failure shows.
const TAIL_LINES: usize = 200;
/// Where a static busybox is looked for.
const BUSYBOX: [&str; 2] = ["/usr/bin/busybox", "/bin/busybox"];
const MEMORY_MIB: &str = "3072";
const QEMU: &str = "qemu-system-x86_64";

/// The guest's first program: its disk's drivers, then what is on its disk, where it is told to, or a shell on its console: by virtio, where there is such a device.
const GUEST_INIT: &str = "#!/bin/sh
/bin/busybox mkdir -p /proc /sys /dev /tmp
/bin/busybox --install -s /bin
export PATH=/bin HOME=/ PS1='guest-shell> '
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
for module in $(cat /modules/order); do insmod /modules/$module || echo \"insmod $module failed\"; done
root=$(sed -n 's/.*root=\\([^ ]*\\).*/\\1/p' /proc/cmdline)
if test -n \"$root\"; then mkdir -p /root; mount -t ext4 $root /root && exec switch_root /root /sbin/init; fi
tty=/dev/ttyS0; test -c /dev/hvc0 && tty=/dev/hvc0
exec setsid sh -c \"exec sh -i <$tty >$tty 2>&1\"
";

/// The first program of a guest whose root is its disk: the address that its seed disk tells (network-config, version 2), an echo service,
/// a shell on its serial port.
const INSTALLED_INIT: &str = "#!/bin/sh
/bin/busybox mkdir -p /proc /sys /dev /tmp
/bin/busybox --install -s /bin
export PATH=/bin HOME=/ PS1='guest-shell> '
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /tmp/seed
mount -t vfat -o ro /dev/vdb /tmp/seed
address=$(sed -n 's/.*addresses: .\"\\([^\"]*\\)\".*/\\1/p' /tmp/seed/network-config)
ip addr add $address dev eth0
ip link set eth0 up
nc -ll -p 7 -e /bin/cat &
exec setsid sh -c 'exec sh -i </dev/ttyS0 >/dev/ttyS0 2>&1'
";

/// The host's first program: KVM, then the driver, then off.
const HOST_INIT: &str = "#!/bin/sh
/bin/busybox mkdir -p /proc /sys /dev /tmp /run
/bin/busybox --install -s /bin
export PATH=/bin HOME=/
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
for module in $(cat /modules/order); do insmod /modules/$module || echo \"insmod $module failed\"; done
ip link set lo up
/bin/driver
echo driver ended: $?
poweroff -f
";

/// What a run needs.
#[derive(Clone, Debug)]
pub struct Programs {
    /// The driver of this crate.
    pub driver: PathBuf,
    /// The VMM under test.
    pub vmm: PathBuf,
}

/// Why this machine cannot emulate a host, if it cannot.
#[must_use]
pub fn obstacle(programs: &Programs) -> Option<String> {
    if ask(Command::new(QEMU).arg("--version")).is_err() {
        return Some(format!("{QEMU} is not installed (package qemu-system-x86)"));
    }
    if busybox().is_none() {
        return Some("no busybox in /usr/bin or /bin (package busybox-static)".to_owned());
    }
    [&programs.driver, &programs.vmm]
        .into_iter()
        .find(|path| !path.exists())
        .map(|path| format!("{} is missing: build the workspace first", path.display()))
}

fn busybox() -> Option<&'static Path> {
    BUSYBOX.iter().map(Path::new).find(|path| path.exists())
}

/// The host's initramfs, which holds the guest's kernel and initramfs as well.
///
/// # Errors
/// A file that is missing or cannot be read.
pub fn initramfs(kernel: &Kernel, programs: &Programs) -> Result<Vec<u8>, String> {
    let failed = |error: std::io::Error| error.to_string();
    let busybox = busybox().ok_or("no static busybox")?;
    let mut guest = Archive::new();
    guest.file("init", GUEST_INIT.as_bytes());
    guest.file("installed/init", INSTALLED_INIT.as_bytes());
    guest
        .copy("bin/busybox", busybox)
        .map_err(failed)?
        .link("bin/sh", "busybox");
    add_modules(&mut guest, &kernel.guest_modules)?;
    let mut host = Archive::new();
    host.file("init", HOST_INIT.as_bytes());
    host.copy("bin/busybox", busybox)
        .map_err(failed)?
        .link("bin/sh", "busybox");
    host.copy("bin/driver", &programs.driver).map_err(failed)?;
    host.copy("bin/drover-vmm", &programs.vmm).map_err(failed)?;
    add_modules(&mut host, &kernel.modules)?;
    for library in libraries(programs)? {
        host.copy(library.to_string_lossy().trim_start_matches('/'), &library)
            .map_err(failed)?;
    }
    host.copy("guest/vmlinuz", &kernel.image).map_err(failed)?;
    host.file("guest/initrd", &guest.finish());
    Ok(host.finish())
}

/// Adds modules and the list that says in which order they are loaded.
fn add_modules(archive: &mut Archive, modules: &[PathBuf]) -> Result<(), String> {
    let mut order = String::new();
    for module in modules {
        let name = module
            .file_name()
            .and_then(|name| name.to_str())
            .ok_or("a module without a name")?;
        archive
            .copy(&format!("modules/{name}"), module)
            .map_err(|error| error.to_string())?;
        order += name;
        order += "\n";
    }
    archive.file("modules/order", order.as_bytes());
    Ok(())
}

/// The shared libraries of the programs and the loader, by the paths they are looked for at.
fn libraries(programs: &Programs) -> Result<Vec<PathBuf>, String> {
    let mut libraries: Vec<PathBuf> = Vec::new();
    for program in [&programs.driver, &programs.vmm] {
        // "libc.so.6 => /lib/…/libc.so.6 (0x…)", or "/lib64/ld-linux-x86-64.so.2 (0x…)"
        for line in ask(Command::new("ldd").arg(program))?.lines() {
            if line.contains("not found") {
                return Err(format!("{}: {}", program.display(), line.trim()));
            }
            libraries.extend(
                line.split_whitespace()
                    .find(|word| word.starts_with('/'))
                    .map(PathBuf::from),
            );
        }
    }
    libraries.sort();
    libraries.dedup();
    Ok(libraries)
}

/// Ends QEMU whatever happens.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts the command so that it runs on the first processor that this process may use.
fn spawn_on_one_processor(mut command: Command) -> std::io::Result<Child> {
    let this_thread = Pid::from_raw(0);
    let spawner = std::thread::spawn(move || {
        // A child inherits the processors of the thread that starts it, and this thread does nothing else.
        let allowed = sched_getaffinity(this_thread)?;
        let mut one = CpuSet::new();
        if let Some(first) = (0..CpuSet::count()).find(|cpu| allowed.is_set(*cpu).unwrap_or(false)) {
            one.set(first)?;
            sched_setaffinity(this_thread, &one)?;
        }
        command.spawn()
    });
    spawner
        .join()
        .expect("the thread that starts QEMU does not panic")
}

/// Boots the host, waits for its end, and returns all reports; everything the host's console showed goes to the file `log`.
///
/// # Errors
/// QEMU could not be started or did not end; with the last lines of the console.
pub fn run(kernel: &Kernel, initramfs: &Path, log: &Path) -> Result<Vec<Report>, String> {
    let mut command = Command::new(QEMU);
    command
        .args([
            "-machine",
            "q35",
            "-accel",
            "tcg,thread=multi",
            "-cpu",
            "max,+svm",
        ])
        .args(["-smp", "1", "-m", MEMORY_MIB, "-nodefaults", "-no-reboot"])
        .args(["-display", "none", "-serial", "stdio"])
        .arg("-kernel")
        .arg(&kernel.image)
        .arg("-initrd")
        .arg(initramfs)
        .args(["-append", "console=ttyS0 quiet panic=-1"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let child = spawn_on_one_processor(command);
    let mut child = Ended(child.map_err(|error| format!("{QEMU}: {error}"))?);
    let output = BufReader::new(child.0.stdout.take().ok_or("QEMU has no output")?);
    let (sender, lines) = channel();
    std::thread::spawn(move || {
        for line in output.split(b'\n').map_while(Result::ok) {
            let _ = sender.send(String::from_utf8_lossy(&line).trim_end().to_owned());
        }
    });
    let deadline = Instant::now() + RUN_MAX;
    let mut console: Vec<String> = Vec::new();
    let mut reports = Vec::new();
    let timed_out = loop {
        match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                reports.extend(Report::parse(&line));
                console.push(line);
            }
            Err(ended) => break ended == RecvTimeoutError::Timeout,
        }
    };
    std::fs::write(log, console.join("\n")).map_err(|error| format!("{}: {error}", log.display()))?;
    if timed_out || reports.is_empty() {
        let what = if timed_out {
            "did not end in time"
        } else {
            "reported nothing"
        };
        let tail = console[console.len().saturating_sub(TAIL_LINES)..].join("\n");
        return Err(format!(
            "the emulated host {what}; the end of its console ({}):\n{tail}",
            log.display()
        ));
    }
    Ok(reports)
}
