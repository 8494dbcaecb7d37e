//! The machine that the figures are of: without it they mean nothing.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde::Serialize;

use crate::qemu::PROGRAM;

/// What a reader needs to know of it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Host {
    /// The processor's name.
    pub cpu: String,
    /// How many.
    pub cpus: usize,
    /// Its memory.
    pub memory_mib: u64,
    /// The kernel's release.
    pub kernel: String,
    /// The KVM in use: `kvm_intel`, `kvm_amd`, or one that does without hardware virtualization.
    pub kvm: String,
    /// The peer's version.
    pub qemu: String,
    /// Ours.
    pub drover: String,
    /// How busy the machine was before the first run, over one minute.
    pub load_1m: f64,
}

impl Host {
    /// This machine.
    pub fn here() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, name: &str| -> String {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            let value = line.unwrap_or_default().trim_start();
            value.strip_prefix(':').unwrap_or(value).trim().to_owned()
        };
        let memory = field(&read("/proc/meminfo"), "MemTotal");
        let memory_kib: u64 = memory
            .split(' ')
            .next()
            .and_then(|kib| kib.parse().ok())
            .unwrap_or_default();
        let kvm = ["kvm_intel", "kvm_amd", "kvm_pvm"]
            .into_iter()
            .find(|module| Path::new("/sys/module").join(module).exists());
        Self {
            cpu: field(&read("/proc/cpuinfo").replace('\t', ""), "model name"),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory_mib: memory_kib / 1024,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            kvm: kvm.unwrap_or("unknown").to_owned(),
            qemu: qemu_version(),
            drover: env!("CARGO_PKG_VERSION").to_owned(),
            load_1m: read("/proc/loadavg")
                .split(' ')
                .next()
                .and_then(|load| load.parse().ok())
                .unwrap_or_default(),
        }
    }
}

/// The first line that QEMU says of itself; empty if it cannot be started.
pub fn qemu_version() -> String {
    let output = Command::new(PROGRAM).arg("--version").output();
    let text = output.map(|output| output.stdout).unwrap_or_default();
    let text = String::from_utf8_lossy(&text).into_owned();
    text.lines().next().unwrap_or_default().to_owned()
}
