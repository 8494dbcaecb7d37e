//! Debian's stock cloud kernel, downloaded once by apt and unpacked into a cache folder; never installed.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The package that depends on the newest kernel of the release.
const NEWEST: &str = "linux-image-cloud-amd64";
/// What `/dev/kvm` of an SVM host needs, and taps on a bridge, in loading order. `ccp` exists in kernels built with SEV only.
const MODULES: [(&str, bool); 8] = [
    ("irqbypass", true),
    ("ccp", false),
    ("kvm", true),
    ("kvm-amd", true),
    ("tun", true),
    ("llc", true),
    ("stp", true),
    ("bridge", true),
];
/// What the guest needs for its disks and the seed's file system, its NIC, its random numbers, its balloon, its console, its power button and a root on its disk, in loading order; hot-plug of slots is built in. `virtio_pci_legacy_dev` exists in newer kernels only.
const GUEST_MODULES: [(&str, bool); 22] = [
    ("virtio_ring", true),
    ("virtio", true),
    ("virtio_pci_modern_dev", true),
    ("virtio_pci_legacy_dev", false),
    ("virtio_pci", true),
    ("virtio_blk", true),
    ("virtio-rng", true),
    ("virtio_balloon", true),
    ("virtio_console", true),
    ("button", true),
    ("evdev", true),
    ("failover", true),
    ("net_failover", true),
    ("virtio_net", true),
    ("nls_cp437", true),
    ("nls_ascii", true),
    ("fat", true),
    ("vfat", true),
    ("crc16", false),
    ("mbcache", false),
    ("jbd2", false),
    ("ext4", false),
];

/// An unpacked kernel package.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// The bzImage.
    pub image: PathBuf,
    /// The host's modules, in loading order.
    pub modules: Vec<PathBuf>,
    /// The guest's, in loading order.
    pub guest_modules: Vec<PathBuf>,
}

impl Kernel {
    /// The kernel in `cache`, downloaded first if it is not there.
    ///
    /// # Errors
    /// Why there is none.
    pub fn get(cache: &Path) -> Result<Self, String> {
        let unpacked = cache.join("kernel");
        if !unpacked.exists() {
            download(cache, &unpacked)?;
        }
        Self::find(&unpacked)
    }

    fn find(unpacked: &Path) -> Result<Self, String> {
        let image = entries(&unpacked.join("boot"))?
            .into_iter()
            .find(|path| file_name(path).starts_with("vmlinuz-"))
            .ok_or_else(|| format!("{}: no boot/vmlinuz-*", unpacked.display()))?;
        let release = file_name(&image).replacen("vmlinuz-", "", 1);
        let folder = unpacked.join("lib/modules").join(release).join("kernel");
        Ok(Self {
            image,
            modules: find_modules(&folder, &MODULES)?,
            guest_modules: find_modules(&folder, &GUEST_MODULES)?,
        })
    }
}

/// The modules of these names, where they are needed or there.
fn find_modules(folder: &Path, names: &[(&str, bool)]) -> Result<Vec<PathBuf>, String> {
    let mut modules = Vec::new();
    for (name, needed) in names {
        match find_file(folder, &format!("{name}.ko"))? {
            Some(path) => modules.push(path),
            None if *needed => return Err(format!("{}: no module {name}", folder.display())),
            None => {}
        }
    }
    Ok(modules)
}

fn download(cache: &Path, unpacked: &Path) -> Result<(), String> {
    let packages = cache.join("packages");
    std::fs::create_dir_all(&packages).map_err(|error| format!("{}: {error}", packages.display()))?;
    let depends = ask(Command::new("apt-cache").args(["depends", "--important", NEWEST]))?;
    let package = depends
        .lines()
        .find_map(|line| line.trim().strip_prefix("Depends: "))
        .ok_or_else(|| format!("apt knows no {NEWEST}: run `apt-get update`"))?;
    ask(Command::new("apt-get")
        .args(["download", package])
        .current_dir(&packages))?;
    let file = entries(&packages)?
        .into_iter()
        .find(|path| file_name(path).starts_with(&format!("{package}_")))
        .ok_or_else(|| {
            format!(
                "apt-get download {package} left no file in {}",
                packages.display()
            )
        })?;
    // Unpacked beside, then renamed: a folder of that name is whole.
    let staged = cache.join("kernel.new");
    if staged.exists() {
        std::fs::remove_dir_all(&staged).map_err(|error| format!("{}: {error}", staged.display()))?;
    }
    ask(Command::new("dpkg-deb").arg("-x").arg(&file).arg(&staged))?;
    std::fs::rename(&staged, unpacked).map_err(|error| format!("{}: {error}", unpacked.display()))
}

/// Runs a program and returns what it printed.
pub(crate) fn ask(command: &mut Command) -> Result<String, String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|error| format!("{program}: {error}"))?;
    if !output.status.success() {
        return Err(format!(
            "{program}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        ));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>, String> {
    let failed = |error: std::io::Error| format!("{}: {error}", folder.display());
    let listing = std::fs::read_dir(folder).map_err(failed)?;
    listing
        .map(|entry| entry.map(|entry| entry.path()).map_err(failed))
        .collect()
}

fn find_file(folder: &Path, name: &str) -> Result<Option<PathBuf>, String> {
    for path in entries(folder)? {
        if path.is_dir() {
            if let Some(found) = find_file(&path, name)? {
                return Ok(Some(found));
            }
        } else if file_name(&path) == name {
            return Ok(Some(path));
        }
    }
    Ok(None)
}
