//! What the guests do while they are moved. The same words go to the guest under us and under QEMU (docs/probe.md).

use anyhow::{Result, bail};

/// One kind of guest and link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workload {
    /// How it is called on the command line and in every result.
    pub name: &'static str,
    /// For people.
    pub about: &'static str,
    /// The guest's memory.
    pub memory_mib: u64,
    /// Its processors.
    pub vcpus: u32,
    /// The probe's parameters.
    pub parameters: &'static str,
    /// What the guest has written to of its memory: what a plain copy has to carry.
    pub populated_mib: u64,
    /// The rate of the hosts' links, where it is not the machine's.
    pub link_mbit_s: Option<u32>,
    /// Whether a guest that writes faster than the link carries may be held back, by either side's means.
    pub throttle: bool,
    /// Whether our pages go unencrypted, as QEMU's do by default.
    pub plaintext: bool,
    /// Whether QEMU's go encrypted too, by its own TLS.
    pub peer_tls: bool,
    /// Moves a guest makes before it is ended: there and back, or only there.
    pub moves: usize,
    /// Whether the guest reads back everything at the end: that takes a while.
    pub sweep: bool,
    /// Whether it is not moved, but its VMM replaced on its own host. QEMU 7.2 cannot, and there is nothing to copy.
    pub upgrade: bool,
    /// Whether it is run when none is named.
    pub by_default: bool,
}

const IDLE: Workload = Workload {
    name: "idle",
    about: "1 GiB of random pages, not written after the start",
    memory_mib: 1056,
    parameters: "own=1G hot=1M rate=0",
    populated_mib: 1024,
    // A page that the guest reads for the first time at its new place is mapped there, and KVM's log calls it dirty: the
    // way back would not be that of an idle guest.
    moves: 1,
    ..PLAIN
};

const PLAIN: Workload = Workload {
    name: "",
    about: "",
    memory_mib: 1024,
    vcpus: 1,
    parameters: "",
    populated_mib: 512,
    link_mbit_s: None,
    throttle: false,
    plaintext: false,
    peer_tls: false,
    moves: 2,
    sweep: true,
    upgrade: false,
    by_default: true,
};

const HANDOVER: Workload = Workload {
    name: "",
    about: "the VMM is replaced on its own host, 64 MiB written flat out",
    upgrade: true,
    moves: 1,
    ..PLAIN
};

/// All of them, in the order in which they are run.
pub const ALL: [Workload; 13] = [
    IDLE,
    Workload {
        name: "idle-plaintext",
        about: "idle, our pages unencrypted as QEMU's are",
        plaintext: true,
        ..IDLE
    },
    Workload {
        name: "idle-tls",
        about: "idle, QEMU's pages encrypted as ours are",
        peer_tls: true,
        ..IDLE
    },
    Workload {
        name: "hot-64M",
        about: "512 MiB of random pages, 64 MiB of them written flat out",
        parameters: "own=512M hot=64M rate=max",
        ..PLAIN
    },
    Workload {
        name: "hot-256M",
        about: "512 MiB of random pages, 256 MiB of them written flat out",
        parameters: "own=512M hot=256M rate=max",
        ..PLAIN
    },
    Workload {
        name: "zipf",
        about: "768 MiB of random pages, 20,000 a second written, few of them often (zipf)",
        memory_mib: 832,
        parameters: "own=768M hot=768M rate=20000 pattern=zipf",
        populated_mib: 768,
        ..PLAIN
    },
    Workload {
        name: "zeroes",
        about: "4 GiB of memory, 64 MiB of it ever written to",
        memory_mib: 4096,
        parameters: "own=64M hot=1M rate=0",
        populated_mib: 64,
        ..PLAIN
    },
    Workload {
        name: "link-1g",
        about: "hot-64M over links of 1 Gbit/s, the guest may be held back",
        parameters: "own=512M hot=64M rate=max",
        link_mbit_s: Some(1000),
        throttle: true,
        ..PLAIN
    },
    Workload {
        name: "2vcpu",
        about: "hot-64M with two processors that write flat out",
        vcpus: 2,
        parameters: "own=512M hot=64M rate=max cpus=2",
        ..PLAIN
    },
    Workload {
        name: "handover-256M",
        memory_mib: 256,
        parameters: "own=240M hot=64M rate=max",
        populated_mib: 240,
        ..HANDOVER
    },
    Workload {
        name: "handover-1G",
        memory_mib: 1024,
        parameters: "own=1000M hot=64M rate=max",
        populated_mib: 1000,
        ..HANDOVER
    },
    Workload {
        name: "handover-4G",
        memory_mib: 4096,
        parameters: "own=4000M hot=64M rate=max",
        populated_mib: 4000,
        ..HANDOVER
    },
    Workload {
        name: "smoke",
        about: "a small guest that shows in seconds that the benchmark itself works",
        memory_mib: 64,
        parameters: "own=16M hot=4M rate=2000",
        populated_mib: 16,
        moves: 1,
        sweep: false,
        by_default: false,
        ..PLAIN
    },
];

/// The workloads of these names, in our order; the default ones if there is no name.
pub fn chosen(names: &[String]) -> Result<Vec<Workload>> {
    for name in names {
        if !ALL.iter().any(|workload| workload.name == name) {
            let known: Vec<_> = ALL.iter().map(|workload| workload.name).collect();
            bail!("there is no workload {name:?}: there are {}", known.join(", "));
        }
    }
    let wanted = |workload: &Workload| match names {
        [] => workload.by_default,
        names => names.iter().any(|name| name == workload.name),
    };
    Ok(ALL.into_iter().filter(wanted).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workloads_are_chosen_by_name_and_a_wrong_name_is_answered_with_the_right_ones() {
        let names = |only: &[&str]| -> Result<Vec<&str>> {
            let only: Vec<String> = only.iter().map(|&name| name.to_owned()).collect();
            Ok(chosen(&only)?.iter().map(|workload| workload.name).collect())
        };
        let all = names(&[]).unwrap();
        assert_eq!(
            all,
            [
                "idle",
                "idle-plaintext",
                "idle-tls",
                "hot-64M",
                "hot-256M",
                "zipf",
                "zeroes",
                "link-1g",
                "2vcpu",
                "handover-256M",
                "handover-1G",
                "handover-4G"
            ]
        );
        assert_eq!(names(&["zipf", "idle"]).unwrap(), ["idle", "zipf"]);
        let wrong = names(&["idel"]).unwrap_err().to_string();
        assert!(
            wrong.contains("\"idel\"") && wrong.contains("idle, idle-plaintext"),
            "{wrong}"
        );
    }

    #[test]
    fn every_guest_has_room_for_what_it_owns() {
        for workload in ALL {
            let record_mib = workload.populated_mib.div_ceil(512);
            assert!(
                workload.memory_mib >= workload.populated_mib + record_mib + 4,
                "{}",
                workload.name
            );
        }
    }
}
