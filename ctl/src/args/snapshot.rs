//! `ctl vm snapshot …`

use std::time::Duration;

use clap::Subcommand;

use super::{WAIT_DEFAULT, parse_duration};

/// `ctl vm snapshot …`
#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// Take a snapshot of a running VM, memory and disks at one instant, and wait until it is complete; Ctrl-C ends it
    Create {
        /// The VM's name
        vm: String,
        /// The snapshot's name [default: its id]
        name: Option<String>,
        /// Wait until it is complete: the default
        #[arg(long, conflicts_with = "no_wait")]
        wait: bool,
        /// Return as soon as it is begun
        #[arg(long)]
        no_wait: bool,
    },
    /// List snapshots, oldest first
    List {
        /// Only this VM's
        vm: Option<String>,
    },
    /// Show one snapshot
    Show {
        /// The VM's name
        vm: String,
        /// The snapshot's name or id
        snapshot: String,
    },
    /// Start a VM as a snapshot has it, in its place or as a new VM, and wait until it runs
    Restore {
        /// The VM's name; it must be stopped, unless --as is given
        vm: String,
        /// The snapshot's name or id
        snapshot: String,
        /// A new VM of this name, with volumes of its own
        #[arg(long = "as", value_name = "NAME")]
        clone: Option<String>,
        /// With NICs and addresses of its own; its guest is asked to give up those that it remembers
        #[arg(long, requires = "clone")]
        new_addresses: bool,
        /// Return as soon as the cluster has accepted it
        #[arg(long)]
        no_wait: bool,
        /// Give up waiting after this long [default: never, copying disks takes what it takes]
        #[arg(long, value_parser = parse_duration, value_name = "LENGTH")]
        timeout: Option<Duration>,
    },
    /// Delete a snapshot, or end one that is being taken, and wait until its files are removed
    Delete {
        /// The VM's name
        vm: String,
        /// The snapshot's name or id
        snapshot: String,
        /// Return as soon as the cluster has accepted it
        #[arg(long)]
        no_wait: bool,
        /// Give up waiting after this long
        #[arg(long, value_parser = parse_duration, default_value = WAIT_DEFAULT, value_name = "LENGTH")]
        timeout: Duration,
    },
}
