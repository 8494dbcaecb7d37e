//! Nothing to open and nobody to call: namespaces of its own, an empty root folder, and Landlock.
//!
//! In a build for tests the folder of pause points stays, and can be written by the VMM's user.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope,
};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{chdir, pivot_root};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change, mount_remount, unmount,
};

/// The newest Landlock that this code knows: files, TCP ports, devices' ioctls, signals and abstract sockets.
const LANDLOCK: ABI = ABI::V6;

/// The folder of pause points, in a build that has them.
pub fn points() -> Option<PathBuf> {
    if !cfg!(feature = "chaos") {
        return None;
    }
    std::env::var_os("DROVER_POINTS_DIR").map(PathBuf::from)
}

/// Mounts, IPC, host name and networks of its own; the networks are empty.
pub fn own_namespaces() -> io::Result<()> {
    let all = [
        CloneFlags::CLONE_NEWNS,
        CloneFlags::CLONE_NEWIPC,
        CloneFlags::CLONE_NEWUTS,
        CloneFlags::CLONE_NEWNET,
    ];
    Ok(unshare(all.into_iter().collect())?)
}

/// Makes an empty folder, read-only, the root of this process, which must have mounts of its own. It is mounted over `on`.
pub fn empty_root(on: &Path, keep: Option<&Path>) -> io::Result<()> {
    let attributes = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    // Resolved before something is mounted over it.
    let kept = keep.map(fs::canonicalize).transpose()?;
    let aside = kept.as_deref().map(fs::File::open).transpose()?;
    mount("tmpfs", on, "tmpfs", attributes, Some(c"size=64k,mode=0755"))?;
    if let (Some(kept), Some(aside)) = (&kept, &aside) {
        let inside = on.join(kept.strip_prefix("/").unwrap_or(kept));
        fs::create_dir_all(&inside)?;
        for folder in inside.ancestors().take_while(|folder| *folder != on) {
            fs::set_permissions(folder, Permissions::from_mode(0o755))?;
        }
        let source = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(aside));
        mount_bind(source, &inside)?;
        fs::set_permissions(&inside, Permissions::from_mode(0o777))?;
    }
    chdir(on)?;
    pivot_root(".", ".")?;
    // What was the root lies on top of the new one.
    unmount(".", UnmountFlags::DETACH)?;
    chdir("/")?;
    mount_remount("/", attributes | MountFlags::BIND | MountFlags::RDONLY, c"")?;
    Ok(())
}

/// What of Landlock this kernel is too old for.
pub type Partly = Result<(), &'static str>;

/// No file can be opened, made or removed by name, but below `keep`; no port bound; no process signalled but this one.
///
/// # Errors
/// There is no Landlock.
pub fn restrict(keep: Option<&Path>) -> io::Result<Partly> {
    let failed = |error: &dyn std::fmt::Display| io::Error::other(error.to_string());
    let ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(LANDLOCK))
        .and_then(|ruleset| ruleset.handle_access(AccessNet::BindTcp))
        .and_then(|ruleset| ruleset.scope(Scope::from_all(LANDLOCK)))
        .and_then(Ruleset::create)
        .map_err(|error| failed(&error))?;
    let ruleset = match keep {
        None => ruleset,
        Some(keep) => {
            let below = PathFd::new(keep).map_err(|error| failed(&error))?;
            let rule = PathBeneath::new(below, AccessFs::from_all(LANDLOCK));
            ruleset.add_rule(rule).map_err(|error| failed(&error))?
        }
    };
    match ruleset.restrict_self().map_err(|error| failed(&error))?.ruleset {
        RulesetStatus::FullyEnforced => Ok(Ok(())),
        RulesetStatus::PartiallyEnforced => Ok(Err("it came with Linux 6.12")),
        RulesetStatus::NotEnforced => Err(io::Error::other("this kernel has none")),
    }
}
