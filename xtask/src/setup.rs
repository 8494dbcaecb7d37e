//! What the machine must have: Debian's packages, and a `/dev/kvm` that can be opened.
//!
//! Packages are installed only when they are missing, and only by the machine's own package manager. What the build needs
//! must be there; what only some tests need is asked for, and without it those tests say that they were skipped.

use std::fs::File;
use std::process::Command;

use crate::Outcome;
use crate::tool::{ask, command, show, succeeds};

/// Without these nothing can be built.
const TO_BUILD: [&str; 5] = ["gcc", "libc6-dev", "librocksdb-dev", "libclang-dev", "clang"];

/// Without these some tests are skipped.
const TO_TEST: [&str; 7] = [
    "iproute2",
    "nftables",
    "qemu-system-x86",
    "qemu-utils",
    "busybox-static",
    "cpio",
    "ca-certificates",
];

/// apt is asked for this package by the test with a stock kernel; on a fresh machine it knows none before its lists are there.
const GUEST_KERNEL: &str = "linux-image-cloud-amd64";

/// What a command needs of the machine.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// To build and to run on this machine.
    Build,
    /// Also to run every test.
    Tests,
}

/// Sets the machine up.
pub fn prepare(need: Need) -> Outcome<()> {
    if !succeeds(&mut command("dpkg-query", &["--version"])) {
        eprintln!(
            "This is not Debian: nothing is installed. The build needs what Debian calls {}.",
            TO_BUILD.join(", ")
        );
        return Ok(());
    }
    let missing = missing(&TO_BUILD);
    let wanted = if need == Need::Tests {
        self::missing(&TO_TEST)
    } else {
        Vec::new()
    };
    if missing.is_empty() && wanted.is_empty() {
        if need == Need::Tests
            && !succeeds(&mut command("apt-cache", &["show", GUEST_KERNEL]))
            && let Err(why) = apt_get(&["update"]).and_then(|mut update| show(&mut update))
        {
            eprintln!(
                "{why}\napt does not know {GUEST_KERNEL}: the test with a stock kernel may be skipped."
            );
        }
        return Ok(());
    }
    let all: Vec<&str> = missing.iter().chain(&wanted).copied().collect();
    eprintln!("Missing packages: {}", all.join(" "));
    match install(&all) {
        Ok(()) => Ok(()),
        Err(why) if missing.is_empty() => {
            eprintln!("{why}\nTests that need {} will be skipped.", wanted.join(", "));
            Ok(())
        }
        Err(why) => Err(format!(
            "{why}\nThe build needs {}. Install by hand: apt-get install {}",
            missing.join(", "),
            all.join(" ")
        )),
    }
}

/// Why KVM cannot be used here, if it cannot.
pub fn kvm_problem() -> Option<String> {
    match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => None,
        Err(error) => Some(format!(
            "/dev/kvm cannot be opened ({error}): no VM can run on this machine. It needs hardware virtualization, enabled, \
             and your user in the group kvm."
        )),
    }
}

fn missing(packages: &[&'static str]) -> Vec<&'static str> {
    packages
        .iter()
        .copied()
        .filter(|package| !installed(package))
        .collect()
}

fn installed(package: &str) -> bool {
    ask(&mut command("dpkg-query", &["-W", "-f=${Status}", package]))
        .is_ok_and(|status| status.ends_with(" installed"))
}

/// Whether we are root.
pub fn is_root() -> bool {
    ask(&mut command("id", &["-u"])).is_ok_and(|id| id.trim() == "0")
}

fn install(packages: &[&str]) -> Outcome<()> {
    show(&mut apt_get(&["update"])?)?;
    show(apt_get(&["install", "--no-install-recommends"])?.args(packages))
}

fn apt_get(words: &[&str]) -> Outcome<Command> {
    let mut command = if is_root() {
        Command::new("env")
    } else if succeeds(&mut command("sudo", &["--version"])) {
        let mut sudo = Command::new("sudo");
        sudo.arg("env");
        sudo
    } else {
        return Err("Only root can install packages, and there is no sudo.".to_owned());
    };
    command.args(["DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", "-y"]);
    command.args(words);
    Ok(command)
}
