//! The command line's grammar, and nothing of what it does.

mod parse;
mod snapshot;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use drover_proto::v1;

use self::parse::{parse_disk, parse_image, parse_nic};
pub use self::snapshot::SnapshotCommand;
use crate::failure::EXIT_CODES;
use crate::units::{parse_bandwidth, parse_duration, parse_mib, parse_percent, parse_streams};

/// How long a command waits for a VM's state unless told otherwise.
const WAIT_DEFAULT: &str = "60s";

/// Drover's command line.
#[derive(Debug, Parser)]
#[command(name = "ctl", version, about = "Drover's command line", after_help = EXIT_CODES, max_term_width = 110)]
pub struct Cli {
    /// Options that every command takes.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Options that every command takes.
#[derive(Clone, Debug, Args)]
pub struct Global {
    /// The form of the output; events and consoles become one JSON object a line
    #[arg(short, long, value_enum, default_value_t, global = true, value_name = "FORM")]
    pub output: Format,
    /// Only what scripts need: lists print names, actions print nothing
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// The context file: cluster, controllers and identity [default: the development cluster's]
    #[arg(long, global = true, env = "DROVER_CONTEXT", value_name = "FILE")]
    pub context: Option<PathBuf>,
}

/// The form of the output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Tables and sentences, for people
    #[default]
    Table,
    /// JSON, for scripts
    Json,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// A whole cluster on this machine: three controllers and three hosts
    #[command(subcommand)]
    Dev(DevCommand),
    /// The controllers
    #[command(subcommand)]
    Cluster(ClusterCommand),
    /// The hosts that VMs run on
    #[command(subcommand)]
    Host(HostCommand),
    /// The boot images that hosts have
    #[command(subcommand)]
    Image(ImageCommand),
    /// Virtual machines
    #[command(subcommand)]
    Vm(VmCommand),
    /// Volumes: what VMs' disks hold
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Networks: what VMs' NICs are attached to
    #[command(subcommand)]
    Network(NetworkCommand),
    /// Move a running VM to another host and show how it went
    Migrate(MigrateArgs),
    /// Migrations, under way and ended
    #[command(subcommand)]
    Migration(MigrationCommand),
    /// What happened in the cluster
    Events(EventsArgs),
    /// The cluster's certificate authority, for setting a cluster up
    #[command(subcommand)]
    Ca(CaCommand),
    /// Print the completion script of a shell
    Completion {
        /// The shell
        #[arg(value_enum)]
        shell: Shell,
    },
}

/// `ctl dev …`
#[derive(Debug, Subcommand)]
pub enum DevCommand {
    /// Start the cluster, or whatever of it does not run
    Up {
        /// Where the cluster lives
        #[command(flatten)]
        dir: StateDir,
        /// Copy an image in, for all hosts; may be repeated
        #[arg(long = "image", value_name = "NAME=PATH", value_parser = parse_image)]
        images: Vec<NamedImage>,
        /// Give up when the cluster is not ready by then
        #[arg(long, value_parser = parse_duration, default_value = "90s", value_name = "LENGTH")]
        timeout: Duration,
    },
    /// Stop VMs, hosts and controllers
    Down {
        /// Where the cluster lives
        #[command(flatten)]
        dir: StateDir,
        /// Remove the cluster's folder as well
        #[arg(long)]
        purge: bool,
    },
    /// Show what of the cluster runs
    Status {
        /// Where the cluster lives
        #[command(flatten)]
        dir: StateDir,
    },
}

/// Where the development cluster lives.
#[derive(Clone, Debug, Args)]
pub struct StateDir {
    /// The cluster's folder [default: $XDG_STATE_HOME/drover/dev, ~/.local/state/drover/dev]
    #[arg(long, env = crate::context::DEV_DIR_VAR, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
}

/// `--image NAME=PATH`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedImage {
    /// The name by which VMs refer to it.
    pub name: String,
    /// The file to copy.
    pub path: PathBuf,
}

/// `ctl cluster …`
#[derive(Debug, Subcommand)]
pub enum ClusterCommand {
    /// Show the controllers and who leads
    Status,
}

/// `ctl host …`
#[derive(Debug, Subcommand)]
pub enum HostCommand {
    /// List the hosts
    List,
    /// Show one host
    Show {
        /// Its name
        host: String,
    },
}

/// `ctl image …`
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// List the images and the hosts that have them
    List,
}

/// `ctl vm …`
#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// Create a VM
    Create(CreateArgs),
    /// List the VMs
    List,
    /// Show one VM
    Show {
        /// Its name
        vm: String,
        /// Print its user data for cloud-init as it is, and nothing else; it may hold secrets
        #[arg(long)]
        user_data: bool,
    },
    /// Start a VM, and wait until it runs
    Start(ActArgs),
    /// Stop a VM, and wait until it has stopped
    Stop(ActArgs),
    /// Press a VM's power button, and wait until its guest has shut down
    Shutdown(ShutdownArgs),
    /// Give a VM a volume as a disk, and wait until its VMM has it, if it runs
    AttachDisk {
        /// The VM's name
        vm: String,
        /// The volume, `:ro` behind it to only read it
        #[arg(value_name = "VOLUME[:ro]", value_parser = parse_disk)]
        disk: v1::VmDisk,
        /// How to wait
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Ask a VM's guest to give a disk up, and wait until it has
    DetachDisk {
        /// The VM's name
        vm: String,
        /// The volume's name
        volume: String,
        /// How to wait
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Change how much of its memory a VM's guest is to have, and wait until its VMM knows, if it runs
    Set(SetArgs),
    /// Give a VM a NIC in a network, and wait until its VMM has it, if it runs
    AttachNic {
        /// The VM's name
        vm: String,
        /// The network, and addresses unless they are to be chosen
        #[arg(value_name = "NETWORK[:mac=…,ip=…]", value_parser = parse_nic)]
        nic: v1::VmNic,
        /// How to wait
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Ask a VM's guest to give a NIC up, and wait until it has
    DetachNic {
        /// The VM's name
        vm: String,
        /// The NIC's MAC, or its network where the VM has no other NIC
        #[arg(value_name = "NETWORK|MAC")]
        nic: String,
        /// How to wait
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Snapshots: VMs with memory and disks at one instant
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
    /// Make a new VM that goes on as a running one is now, with volumes, NICs and addresses of its own
    Clone {
        /// The running VM's name
        vm: String,
        /// The new VM's name
        name: String,
    },
    /// Delete a VM, stopping it first, and wait until it is gone
    Delete(ActArgs),
    /// Show a VM's serial console and type into it; Ctrl-] leaves
    Console(ConsoleArgs),
    /// Let VMs go on in the VMM that is installed on their host, which costs each a blackout of milliseconds
    Upgrade(UpgradeArgs),
}

/// `ctl volume …`
#[derive(Debug, Subcommand)]
pub enum VolumeCommand {
    /// Create a volume, for `ctl vm create --disk`
    Create {
        /// Its name: lower-case letters, digits and '-'
        name: String,
        /// Its size in MiB, or with a unit, as 10GiB; its file takes room only as it is written to. Of an image: its disk's, if not given
        #[arg(long, value_parser = parse_mib, value_name = "SIZE", required_unless_present = "image")]
        size: Option<u64>,
        /// What it begins with: an image of the hosts, of kind `disk` or `qcow2` (see `ctl image list`)
        #[arg(long)]
        image: Option<String>,
        /// The storage that it is on, one that the VM's hosts have (see `ctl host show`)
        #[arg(long, default_value = "default")]
        pool: String,
        /// Do not wait until the image's content is there
        #[arg(long)]
        no_wait: bool,
    },
    /// Grow a volume; a guest that has it is told
    Resize {
        /// Its name
        volume: String,
        /// Its new size in MiB, or with a unit, as 20GiB
        #[arg(value_parser = parse_mib, value_name = "SIZE")]
        size: u64,
    },
    /// List the volumes and the VMs that have them
    List,
    /// Delete a volume that no VM has, and what it holds
    Delete {
        /// Its name
        volume: String,
        /// Only forget the volume: its file stays in the pool
        #[arg(long)]
        keep_content: bool,
    },
}

/// `ctl network …`
#[derive(Debug, Subcommand)]
pub enum NetworkCommand {
    /// Create a network, for `ctl vm create --nic`
    Create(NetworkArgs),
    /// List the networks
    List,
    /// Show one network, its VMs and the hosts that offer it
    Show {
        /// Its name
        network: String,
    },
    /// Delete a network in which no VM has a NIC
    Delete {
        /// Its name
        network: String,
    },
}

/// `ctl network create …`
#[derive(Debug, Args)]
pub struct NetworkArgs {
    /// Its name: lower-case letters, digits and '-'. Without --vxlan, hosts offer it by this name
    pub name: String,
    /// A tunnel between the hosts, with this number (1 to 16777215) [default: a bridge of each host]
    #[arg(long, value_name = "VNI")]
    pub vxlan: Option<u32>,
    /// The UDP port of its tunnels [default: 4789]
    #[arg(long, requires = "vxlan", value_name = "PORT")]
    pub port: Option<u32>,
    /// Give each VM an IPv4 address out of this, as 10.1.0.0/24
    #[arg(long, value_name = "CIDR")]
    pub subnet: Option<String>,
    /// The address in the subnet that no VM gets [default: the subnet's first]
    #[arg(long, requires = "subnet", value_name = "IP")]
    pub gateway: Option<String>,
    /// The largest packet, bytes [default: 1500, with --vxlan 1450]
    #[arg(long, value_name = "BYTES")]
    pub mtu: Option<u32>,
    /// Let VMs send with source addresses that are not theirs: for those that route
    #[arg(long)]
    pub allow_spoofing: bool,
}

/// `ctl vm create …`
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Its name: lower-case letters, digits and '-'
    pub name: String,
    /// The kernel to boot, an image's name (see `ctl image list`)
    #[arg(long)]
    pub image: String,
    /// An initrd, an image's name
    #[arg(long, value_name = "IMAGE")]
    pub initrd: Option<String>,
    /// The kernel's command line
    #[arg(long, default_value = "", value_name = "TEXT")]
    pub cmdline: String,
    /// Memory in MiB, or with a unit, as 1GiB
    #[arg(long, value_parser = parse_mib, default_value = "256", value_name = "SIZE")]
    pub memory: u64,
    /// Virtual CPUs
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..), default_value_t = 1, value_name = "N")]
    pub vcpus: u32,
    /// The CPU features that the guest sees: baseline (x86-64-v2 less what the host it starts on lacks), a level in full, or all
    /// of that host's; it moves only to hosts that have them
    #[arg(long, value_parser = ["baseline", "x86-64-v2", "x86-64-v3", "host"], default_value = "baseline", value_name = "PROFILE")]
    pub cpu_profile: String,
    /// Whether the VM starts again by itself after it failed
    #[arg(long, value_enum, default_value_t, value_name = "POLICY")]
    pub restart: Restart,
    /// A volume as a disk, `:ro` behind it to only read it; may be repeated, in the order in which the guest finds them
    #[arg(long = "disk", value_name = "VOLUME[:ro]", value_parser = parse_disk)]
    pub disks: Vec<v1::VmDisk>,
    /// A NIC in a network, with addresses of its own or, without, ones that are chosen; may be repeated, in the order in which the
    /// guest finds them
    #[arg(long = "nic", value_name = "NETWORK[:mac=…,ip=…]", value_parser = parse_nic)]
    pub nics: Vec<v1::VmNic>,
    /// Whether its guest can be asked to give memory up, and says which is free; auto: if every host is of a version that knows it
    #[arg(long, value_enum, default_value_t, num_args = 0..=1, require_equals = true, default_missing_value = "on", value_name = "WHEN")]
    pub balloon: WithBalloon,
    /// Give its console a virtio device beside the serial port (Linux: hvc0); starts on and moves to hosts of device model 6 and later only
    #[arg(long)]
    pub virtio_console: bool,
    /// Start on this host only [default: placement decides]
    #[arg(long, value_name = "HOST")]
    pub host: Option<String>,
    /// What its guest's cloud-init is told
    #[command(flatten)]
    pub cloud: CloudArgs,
    /// Start it at once
    #[arg(long)]
    pub start: bool,
    /// Wait until it runs; asks for --start
    #[arg(long, requires = "start")]
    pub wait: bool,
    /// Give up waiting after this long
    #[arg(long, value_parser = parse_duration, default_value = WAIT_DEFAULT, value_name = "LENGTH")]
    pub timeout: Duration,
}

/// What a guest's cloud-init is told, by a seed disk; without any of these the VM has none.
#[derive(Debug, Default, Args)]
pub struct CloudArgs {
    /// User data for cloud-init: #cloud-config, a script, or what else it takes; at most 16 KiB
    #[arg(long, value_name = "FILE")]
    pub user_data: Option<PathBuf>,
    /// The guest's name [default: the VM's]
    #[arg(long, value_name = "NAME")]
    pub hostname: Option<String>,
    /// Public keys that may log in, a line each, as in ~/.ssh/id_ed25519.pub; may be repeated
    #[arg(long = "ssh-key", value_name = "FILE")]
    pub ssh_keys: Vec<PathBuf>,
    /// A network-config of your own [default: the NICs' addresses as the cluster chose them]
    #[arg(long, value_name = "FILE")]
    pub network_config: Option<PathBuf>,
}

/// Whether a VM starts again by itself after it failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Restart {
    /// It stays failed
    #[default]
    Never,
    /// It starts again, on any host that fits
    OnFailure,
}

/// Whether a VM gets a balloon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum WithBalloon {
    /// If every host could take the VM then
    #[default]
    Auto,
    /// Yes
    On,
    /// No
    Off,
}

/// `ctl vm set …`
#[derive(Debug, Args)]
pub struct SetArgs {
    /// The VM's name
    pub vm: String,
    /// Memory that its guest is to have, in MiB, or with a unit, as 1GiB: at most what the VM was created with
    #[arg(long, value_parser = parse_mib, value_name = "SIZE")]
    pub memory: u64,
    /// How to wait
    #[command(flatten)]
    pub wait: WaitArgs,
}

/// `ctl vm start|stop|delete …`
#[derive(Debug, Args)]
pub struct ActArgs {
    /// The VM's name
    pub vm: String,
    /// Return as soon as the cluster has accepted it
    #[arg(long)]
    pub no_wait: bool,
    /// Give up waiting after this long
    #[arg(long, value_parser = parse_duration, default_value = WAIT_DEFAULT, value_name = "LENGTH")]
    pub timeout: Duration,
}

/// How an action on a disk or a NIC is waited for.
#[derive(Debug, Args)]
pub struct WaitArgs {
    /// Return as soon as the cluster has accepted it
    #[arg(long)]
    pub no_wait: bool,
    /// Give up waiting after this long
    #[arg(long, value_parser = parse_duration, default_value = WAIT_DEFAULT, value_name = "LENGTH")]
    pub timeout: Duration,
}

/// `ctl vm shutdown …`
#[derive(Debug, Args)]
pub struct ShutdownArgs {
    /// What to act on, and how to wait
    #[command(flatten)]
    pub act: ActArgs,
    /// Stop the VM when its guest has not shut down by then
    #[arg(long, value_parser = parse_duration, value_name = "LENGTH", conflicts_with = "no_wait")]
    pub force_after: Option<Duration>,
}

/// `ctl vm upgrade …`
#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("which").required(true).args(["vms", "host", "all"])))]
pub struct UpgradeArgs {
    /// The VMs' names
    #[arg(value_name = "VM")]
    pub vms: Vec<String>,
    /// All that run on this host
    #[arg(long)]
    pub host: Option<String>,
    /// All that run
    #[arg(long)]
    pub all: bool,
    /// The longest each guest may stand still [default: the cluster's]
    #[arg(long, value_parser = parse_duration, value_name = "LENGTH")]
    pub max_downtime: Option<Duration>,
    /// Abort one that has not ended by then
    #[arg(long, value_parser = parse_duration, value_name = "LENGTH")]
    pub deadline: Option<Duration>,
    /// Also those that run in the installed VMM already
    #[arg(long)]
    pub force: bool,
    /// Replace nothing: show what speaks against it
    #[arg(long)]
    pub dry_run: bool,
}

/// `ctl vm console …`
#[derive(Debug, Args)]
pub struct ConsoleArgs {
    /// The VM's name
    pub vm: String,
    /// Show what is there and end
    #[arg(long)]
    pub no_follow: bool,
    /// Begin at this absolute offset; below the oldest kept byte, at the oldest
    #[arg(long, default_value_t = 0, value_name = "BYTES")]
    pub offset: u64,
}

/// `ctl migrate …`
#[derive(Debug, Args)]
pub struct MigrateArgs {
    /// The VM to move
    pub vm: String,
    /// The host to move it to [default: placement decides]
    pub host: Option<String>,
    /// The longest the guest may stand still [default: the cluster's]
    #[arg(long, value_parser = parse_duration, value_name = "LENGTH")]
    pub max_downtime: Option<Duration>,
    /// Abort when it has not ended by then
    #[arg(long, value_parser = parse_duration, value_name = "LENGTH")]
    pub deadline: Option<Duration>,
    /// Use at most this much of the network, MiB a second, as 500MiB
    #[arg(long, value_parser = parse_bandwidth, value_name = "SIZE")]
    pub bandwidth: Option<u64>,
    /// Hold each vCPU back for up to this share of its time, 1 to 99, if the guest writes faster than the network carries
    /// [default: never; such a migration is aborted]
    #[arg(long, value_parser = parse_percent, value_name = "PERCENT")]
    pub throttle: Option<u32>,
    /// If the guest writes faster than the network carries, or would at the deadline, let it run at the target before all its pages are
    /// there. Until they are, a lost source or link costs the VM
    #[arg(long)]
    pub allow_postcopy: bool,
    /// Carry the pages over this many TCP streams, 1 to 16 [default: as many as suit the source's processors]
    #[arg(long, value_parser = parse_streams, value_name = "N")]
    pub streams: Option<u32>,
    /// Make pages smaller on their way: by what is measured of the network and the processors, not at all, or always by one method
    #[arg(long, value_enum, default_value_t = Compression::Auto)]
    pub compression: Compression,
    /// Send the pages unencrypted; only where the cluster's setting `allow_plaintext` says so
    #[arg(long)]
    pub plaintext: bool,
    /// Move nothing: watch the guest for a second, and show what speaks against the migration and how it would go
    #[arg(long, conflicts_with = "detach")]
    pub dry_run: bool,
    /// Return as soon as it is planned; `ctl migration show --follow` tells the rest
    #[arg(long)]
    pub detach: bool,
}

/// How pages are made smaller on their way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Compression {
    /// Where it is quicker than sending them as they are
    Auto,
    /// Never
    Off,
    /// Always with LZ4
    Lz4,
    /// Always with Zstandard
    Zstd,
}

impl From<Compression> for v1::Compression {
    fn from(compression: Compression) -> Self {
        match compression {
            Compression::Auto => Self::Auto,
            Compression::Off => Self::Off,
            Compression::Lz4 => Self::Lz4,
            Compression::Zstd => Self::Zstd,
        }
    }
}

/// `ctl migration …`
#[derive(Debug, Subcommand)]
pub enum MigrationCommand {
    /// List migrations, the newest first
    List {
        /// Only this VM's
        #[arg(long)]
        vm: Option<String>,
        /// Only those from or to this host
        #[arg(long)]
        host: Option<String>,
        /// Only those that are, or have ended, so
        #[arg(long, value_enum)]
        state: Option<MigrationState>,
    },
    /// Show one migration and its receipt
    Show {
        /// Its id, as m1
        id: String,
        /// Show how it goes on, stream by stream, until it ends, and end with its exit code; Ctrl-C only stops following
        #[arg(short, long)]
        follow: bool,
    },
    /// Let a migration that was begun with --allow-postcopy go on by post-copy now
    Postcopy {
        /// Its id, as m1
        id: String,
    },
    /// Cancel a migration and wait for its end; the VM runs on where it was
    Cancel {
        /// Its id, as m1
        id: String,
        /// Return as soon as the cluster has accepted it
        #[arg(long)]
        no_wait: bool,
        /// Give up waiting after this long
        #[arg(long, value_parser = parse_duration, default_value = WAIT_DEFAULT, value_name = "LENGTH")]
        timeout: Duration,
    },
}

/// How far a migration has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum MigrationState {
    /// Under way
    Active,
    /// Done or aborted
    Ended,
    /// Done: the VM runs on the target
    Done,
    /// Aborted: the VM stayed where it was
    Aborted,
}

/// `ctl events …`
#[derive(Debug, Args)]
pub struct EventsArgs {
    /// Go on with new events until Ctrl-C
    #[arg(short, long)]
    pub follow: bool,
    /// Only events after this number
    #[arg(long, default_value_t = 0, value_name = "SEQ")]
    pub after: u64,
}

/// `ctl ca …`
#[derive(Debug, Subcommand)]
pub enum CaCommand {
    /// Make the CA of a new cluster: ca.pem and ca.key
    Create {
        /// The folder to write to
        dir: PathBuf,
        /// The cluster's id: lower-case letters, digits and '-'
        #[arg(long, value_name = "ID")]
        cluster: String,
    },
    /// Issue an identity: ca.pem, NAME.pem and NAME.key
    Issue {
        /// The CA's folder
        dir: PathBuf,
        /// What it is for
        #[arg(long, value_enum)]
        role: CaRole,
        /// The controller's, host's or user's name
        #[arg(long)]
        name: String,
        /// The folder to write to
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
}

/// What an identity is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CaRole {
    /// A drover-controller
    Controller,
    /// A drover-agent and its VMMs
    Host,
    /// A person or a script with ctl
    User,
    /// What reads metrics, and may do nothing else
    Monitor,
}

/// The shells that have a completion script.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Shell {
    /// GNU bash
    Bash,
    /// zsh
    Zsh,
    /// fish
    Fish,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn the_grammar_has_no_contradiction() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_migration_takes_its_intents() {
        let cli =
            parse("ctl migrate vm1 host2 --max-downtime 100ms --deadline 60s --bandwidth 500MiB -o json")
                .unwrap();
        assert_eq!(cli.global.output, Format::Json);
        let Command::Migrate(args) = cli.command else {
            panic!("{:?}", cli.command)
        };
        assert_eq!((args.vm.as_str(), args.host.as_deref()), ("vm1", Some("host2")));
        assert_eq!(args.max_downtime, Some(Duration::from_millis(100)));
        assert_eq!(args.deadline, Some(Duration::from_secs(60)));
        assert_eq!(args.bandwidth, Some(500));
        assert!(!args.detach && !args.plaintext);
        assert_eq!((args.throttle, args.streams), (None, None));
    }

    #[test]
    fn a_throttle_is_a_percentage_with_or_without_its_sign() {
        for text in ["--throttle 90", "--throttle 90%"] {
            let cli = parse(&format!("ctl migrate vm1 {text} --streams 4 --plaintext")).unwrap();
            let Command::Migrate(args) = cli.command else {
                panic!("{:?}", cli.command)
            };
            assert_eq!(
                (args.throttle, args.streams, args.plaintext),
                (Some(90), Some(4), true)
            );
            assert_eq!(args.compression, Compression::Auto);
        }
    }

    #[test]
    fn a_vm_takes_sizes_with_units_and_has_defaults() {
        let cli = parse("ctl vm create vm1 --image probe --memory 1GiB --restart on-failure --start --wait")
            .unwrap();
        let Command::Vm(VmCommand::Create(args)) = cli.command else {
            panic!("{:?}", cli.command)
        };
        assert_eq!(
            (args.memory, args.vcpus, args.restart),
            (1024, 1, Restart::OnFailure)
        );
        assert_eq!(args.cpu_profile, "baseline");
        assert_eq!(args.timeout, Duration::from_secs(60));
        assert!(args.start && args.wait);
    }

    #[test]
    fn values_that_are_none_are_refused_at_once() {
        for line in [
            "ctl vm create vm1",
            "ctl vm create vm1 --image probe --memory lots",
            "ctl vm create vm1 --image probe --vcpus 0",
            "ctl vm create vm1 --image probe --wait",
            "ctl vm create vm1 --image probe --disk data:rw",
            "ctl vm create vm1 --image probe --disk :ro",
            "ctl vm create vm1 --image probe --nic :mac=52:54:00:00:00:01",
            "ctl vm create vm1 --image probe --nic lan:52:54:00:00:00:01",
            "ctl vm create vm1 --image probe --nic lan:ip=",
            "ctl vm create vm1 --image probe --nic lan:ip=10.0.0.1,ip=10.0.0.2",
            "ctl network create lan --port 4789",
            "ctl network create lan --gateway 10.0.0.1",
            "ctl network create lan --vxlan many",
            "ctl volume create data",
            "ctl volume create data --size some",
            "ctl vm create vm1 --image probe --cpu-profile pentium",
            "ctl migrate vm1 host2 --max-downtime 100",
            "ctl migrate vm1 host2 --throttle 0",
            "ctl migrate vm1 host2 --throttle 100",
            "ctl migrate vm1 host2 --throttle most",
            "ctl migrate vm1 host2 --streams 0",
            "ctl migrate vm1 host2 --streams 17",
            "ctl migrate vm1 host2 --plaintext yes please",
            "ctl dev up --image probe",
            "ctl dev up --image ../x=/tmp/x",
            "ctl completion powershell",
            "ctl vm",
            "ctl vm snapshot create",
            "ctl vm snapshot create vm1 --wait --no-wait",
            "ctl vm snapshot restore vm1 s1 --as",
        ] {
            let error = parse(line).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }

    #[test]
    fn an_image_is_a_name_and_a_path() {
        let image = parse_image("linux-6.1=/boot/vmlinuz=x").unwrap();
        assert_eq!(
            image,
            NamedImage {
                name: "linux-6.1".to_owned(),
                path: PathBuf::from("/boot/vmlinuz=x")
            }
        );
        assert!(parse_image("a b=/x").unwrap_err().contains("a b"));
        assert!(parse_image(".hidden=/x").is_err());
        assert!(parse_image("x=").is_err());
    }
}
