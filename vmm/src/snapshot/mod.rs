//! Snapshots of a running VM: memory, devices and disks at one instant, written behind it as it runs on.
//!
//! ```text
//!   begin ─► files ─► memory protected ─► [ vCPUs stand, devices drained ─► state read ─► disks guarded, what was written since protected again ]
//!                                                                                                                     ─► the VM runs ─┐
//!     manifest ◄─ lease lives ◄─ all files on the medium ◄─ disks copied ◄─ memory copied ◄──────────────────────────────────────────┘
//! ```
//!
//! | file | what |
//! | --- | --- |
//! | `stage.rs` | how far it is, and what it excludes: pure |
//! | `folder.rs` | where its files come from |
//! | `format.rs` | the form of its files: pure |
//! | `pipe.rs` | buffers between those who copy and the one who writes |
//! | `sheet.rs` | a file that is written by blocks |
//! | `behind.rs` | memory, ahead of its writers |
//! | `shadow.rs` | a disk, ahead of its guest |
//! | `load.rs` | a VM made from a snapshot |
//!
//! This file is the engine: it takes the steps, in its own thread, and asks the machine before each ([`crate::machine`]). A VMM that dies leaves a folder without
//! a manifest, which is no snapshot; what fails or is cancelled removes what it made. In a sandbox the manifest is as well written and sealed here, and named by the agent.

pub mod behind;
pub mod folder;
pub mod format;
pub mod load;
pub mod pipe;
pub mod shadow;
pub mod sheet;
pub mod stage;

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use drover_proto::v1::TakeSnapshotRequest;
use drover_proto::{Code, Fault};
use tracing::{info, warn};

use self::behind::Protected;
use self::folder::Folder;
use self::format::{FORMAT, ListedDisk, MEMORY, Manifest, STATE, is_disk_name};
use self::pipe::Pipe;
use self::shadow::Shadow;
use self::sheet::Sheet;
use self::stage::Whole;
use crate::config::DISKS_MAX;
use crate::devices::pci::SLOTS;
use crate::devices::virtio::blk::disk::{Disk, Guard};
use crate::machine::Machine;
use crate::sandbox::{self, ForSnapshot, Thread};
use crate::save::{self, Saved};
use crate::uffd::Uffd;
use crate::vm::Vm;

/// Between two reports of how far it is.
const REPORT_PERIOD: Duration = Duration::from_millis(200);
/// Between two questions whether the lease lives again.
const SEAL_AGAIN: Duration = Duration::from_millis(50);
/// Longest id, bytes.
const ID_BYTES_MAX: usize = 128;
/// The sheet of memory; those of disks follow.
const MEMORY_SHEET: usize = 0;

/// What a snapshot is to be, checked as far as it can be without touching the guest.
pub struct Task {
    id: String,
    folder: Folder,
    disks: Vec<Wanted>,
    uffd: Uffd,
    /// Between its threads; whoever fails it ends the snapshot.
    pub pipe: Arc<Pipe>,
}

struct Wanted {
    slot: u32,
    name: String,
    disk: Arc<Disk>,
}

fn invalid(field: &str, message: String) -> Fault {
    Fault::new(Code::InvalidArgument, message).field(field)
}

impl Task {
    /// What `request` asks of `vm`. `handed`: what its agent has handed in for it, where the VMM can make and open nothing.
    pub fn new(vm: &Vm, request: &TakeSnapshotRequest, handed: Option<ForSnapshot>) -> Result<Self, Fault> {
        if !(1..=ID_BYTES_MAX).contains(&request.id.len()) {
            let message = format!("id has {} bytes, must have 1..={ID_BYTES_MAX}", request.id.len());
            return Err(invalid("id", message));
        }
        let (files, device) = handed.map_or((None, None), |all| (Some(all.files), Some(all.uffd)));
        let folder = Folder::new(Path::new(&request.folder), files)?;
        if request.disks.len() > DISKS_MAX {
            let message = format!(
                "{} disks are too many, at most {DISKS_MAX} are",
                request.disks.len()
            );
            return Err(invalid("disks", message));
        }
        let mut disks: Vec<Wanted> = Vec::with_capacity(request.disks.len());
        for asked in &request.disks {
            let wanted = wanted(vm, folder.path(), asked.slot, &asked.path)?;
            if disks
                .iter()
                .any(|one| one.slot == wanted.slot || one.name == wanted.name)
            {
                let message = format!("slot {} or file {:?} is told twice", wanted.slot, wanted.name);
                return Err(invalid("disks", message));
            }
            disks.push(wanted);
        }
        folder.check(disks.iter().map(|disk| disk.name.as_str()))?;
        let uffd = match device {
            None => Uffd::open_for_writes(),
            Some(Some(device)) => Uffd::of_device_for_writes(&device),
            Some(None) => Err(folder::not_handed_in("/dev/userfaultfd")),
        };
        Ok(Self {
            id: request.id.clone(),
            folder,
            disks,
            uffd: uffd?,
            pipe: Arc::new(Pipe::new()?),
        })
    }
}

impl Task {
    /// Whether `vm` still has the disks that it is to be of.
    pub fn check(&self, vm: &Vm) -> Result<(), Fault> {
        let attached = &vm.devices().attached;
        let registers = vm.devices().acpi.registers();
        for wanted in &self.disks {
            let slot = usize::try_from(wanted.slot).expect("a slot was checked");
            let same = attached
                .disk(slot)
                .is_some_and(|disk| Arc::ptr_eq(&disk, &wanted.disk));
            if !same || registers.leaves(slot) {
                let message = format!("slot {slot} is being given up");
                return Err(Fault::new(Code::DeviceBusy, message).field("disks"));
            }
        }
        Ok(())
    }
}

fn wanted(vm: &Vm, folder: &Path, slot: u32, path: &str) -> Result<Wanted, Fault> {
    let place = usize::try_from(slot)
        .ok()
        .filter(|slot| (1..SLOTS).contains(slot));
    let disk = place.and_then(|slot| vm.devices().attached.disk(slot));
    let disk = disk.ok_or_else(|| invalid("disks", format!("slot {slot} has no disk")))?;
    let path = Path::new(path);
    let name = path
        .file_name()
        .and_then(|name| name.to_str())
        .filter(|name| is_disk_name(name));
    let Some(name) = name.filter(|_| path.parent() == Some(folder)) else {
        let message = format!(
            "the file {} for slot {slot}, must lie in {} and not be called as one of a snapshot's own",
            path.display(),
            folder.display()
        );
        return Err(invalid("disks", message));
    };
    Ok(Wanted {
        slot,
        name: name.to_owned(),
        disk,
    })
}

/// Takes the snapshot; the body of the engine's thread.
pub fn run(machine: &Machine, task: &Task) {
    sandbox::narrow(Thread::Snapshot);
    let began = Instant::now();
    info!(snapshot = task.id, folder = %task.folder.path().display(), "taking a snapshot");
    let result = take(machine, task);
    match &result {
        Ok(_) => info!(
            snapshot = task.id,
            ms = began.elapsed().as_millis(),
            stored = task.pipe.amounts().stored,
            "the snapshot is complete"
        ),
        Err(fault) => {
            warn!(snapshot = task.id, %fault, "there is no snapshot");
            task.folder
                .clear(task.disks.iter().map(|disk| disk.name.as_str()));
        }
    }
    machine.snapshot_ended(result);
}

/// The files that are written behind the VM, memory's first, and the disks' shadows, which fill the others.
fn prepare(vm: &Vm, task: &Task) -> Result<(Vec<Sheet>, Vec<Arc<Shadow>>), Fault> {
    let memory_bytes = vm.memory().bytes();
    let mut sheets = vec![task.folder.sheet(MEMORY, memory_bytes)?];
    let mut shadows = Vec::with_capacity(task.disks.len());
    task.pipe.expect(memory_bytes);
    for wanted in &task.disks {
        let shadow = Shadow::new(wanted.disk.clone(), sheets.len(), task.pipe.clone(), vm.io_gate());
        sheets.push(task.folder.sheet(&wanted.name, shadow.bytes())?);
        task.pipe.expect(shadow.bytes());
        shadows.push(Arc::new(shadow));
    }
    Ok((sheets, shadows))
}

/// Reports how far it is until the thread has ended that holds the other end.
fn report_until(ended: &Receiver<()>, machine: &Machine, pipe: &Pipe) {
    loop {
        machine.snapshot_at(pipe.amounts());
        if ended.recv_timeout(REPORT_PERIOD) != Err(RecvTimeoutError::Timeout) {
            return machine.snapshot_at(pipe.amounts());
        }
    }
}

fn take(machine: &Machine, task: &Task) -> Result<Whole, Fault> {
    let pipe = &task.pipe;
    let (mut sheets, shadows) = prepare(machine.built(), task)?;
    let (alive, writer_ended) = channel();
    let saved = std::thread::scope(|scope| {
        let writer = std::thread::Builder::new().name("snap-writer".to_owned());
        let sheets = &mut sheets;
        writer
            .spawn_scoped(scope, move || {
                sandbox::narrow(Thread::SnapshotWriter);
                pipe.write(sheets);
                drop(alive);
            })
            .map_err(|error| no_thread(&error))?;
        let saved = copy(machine, task, &shadows);
        match &saved {
            Ok(_) => pipe.close(),
            Err(fault) => pipe.fail(fault.clone()),
        }
        report_until(&writer_ended, machine, pipe);
        saved
    })?;
    pipe.check()?;
    complete(machine, task, sheets, &saved)
}

/// Puts everything on the medium, and makes it a snapshot.
fn complete(machine: &Machine, task: &Task, sheets: Vec<Sheet>, saved: &Saved) -> Result<Whole, Fault> {
    let mut contents = sheets.into_iter().map(Sheet::finish);
    let memory = contents.next().expect("memory has a sheet")?;
    let disk = |(wanted, content): (&Wanted, Result<_, Fault>)| {
        let (slot, content) = (wanted.slot, content?);
        Ok(ListedDisk { slot, content })
    };
    let disks = task
        .disks
        .iter()
        .zip(contents)
        .map(disk)
        .collect::<Result<_, Fault>>()?;
    let encoded = format::encode_state(&save::encode(saved));
    let mut state = task.folder.sheet(STATE, encoded.len() as u64)?;
    state.put_all(&encoded)?;
    let config = machine.config();
    let manifest = Manifest {
        format: FORMAT,
        id: task.id.clone(),
        vm: config.vm.clone(),
        epoch: config.epoch,
        realtime_ns: saved.clock.realtime_ns,
        vcpus: config.vcpus,
        cpu_profile: config.cpu_profile.name().to_owned(),
        device_model: saved.device_model(),
        memory,
        state: state.finish()?,
        disks,
        digest: String::new(),
    };
    drover_points::reach("snapshot.written");
    while !machine.seal_snapshot()? {
        task.pipe.rest(SEAL_AGAIN);
        task.pipe.check()?;
    }
    task.folder.publish(&manifest.encode())
}

fn no_thread(error: &std::io::Error) -> Fault {
    Fault::new(
        Code::SnapshotFailed,
        format!("no thread for the snapshot: {error}"),
    )
}

/// The disks that are guarded; dropping it ends that.
struct Guarded<'a>(&'a [Arc<Shadow>]);

impl<'a> Guarded<'a> {
    fn all(shadows: &'a [Arc<Shadow>]) -> Self {
        for shadow in shadows {
            shadow.disk().guard(Some(shadow.clone() as Arc<dyn Guard>));
        }
        Self(shadows)
    }
}

impl Drop for Guarded<'_> {
    fn drop(&mut self) {
        self.0.iter().for_each(|shadow| shadow.disk().guard(None));
    }
}

/// The instant: the state, and from then on no byte of disks and memory changes that was not copied before. The VM stands for it, and not on return.
fn instant<'a>(
    machine: &Machine,
    shadows: &'a [Arc<Shadow>],
    pipe: &Pipe,
    copier: &behind::Engine,
) -> Result<(Saved, Guarded<'a>), Fault> {
    let vm = machine.built();
    copier.await_protected(pipe)?;
    let began = Instant::now();
    machine.hold_for_snapshot()?;
    // A closure, since from here on every way out lets the VM go.
    let keep = || -> Result<_, Fault> {
        vm.await_drained()?;
        let saved = vm.save()?;
        let guarded = Guarded::all(shadows);
        copier.keep(pipe)?;
        drover_points::reach("snapshot.paused");
        Ok((saved, guarded))
    };
    let kept = keep();
    let released = machine.release_after_snapshot(began);
    kept.and_then(|kept| released.map(|()| kept))
}

/// The instant, and the copying behind the running VM. On return nothing is protected or guarded any more, and all that was copied is in the pipe.
fn copy(machine: &Machine, task: &Task, shadows: &[Arc<Shadow>]) -> Result<Saved, Fault> {
    let pipe = &task.pipe;
    let vm = machine.built();
    let protected = Protected::prepare(vm.memory(), &task.uffd).inspect_err(|_| vm.wake_devices())?;
    let kept = std::thread::scope(|scope| {
        let ((engine, copier), (alive, ended)) = (behind::line(), channel());
        let thread = std::thread::Builder::new().name("snap-memory".to_owned());
        // However this thread ends, it releases memory.
        thread
            .spawn_scoped(scope, move || {
                sandbox::narrow(Thread::SnapshotMemory);
                let copied = protected.copy_out(MEMORY_SHEET, pipe, &copier);
                drop(protected);
                drop(alive);
                copied
            })
            .map_err(|error| no_thread(&error))?;
        let kept = instant(machine, shadows, pipe, &engine);
        if let Err(fault) = &kept {
            pipe.fail(fault.clone());
        }
        report_until(&ended, machine, pipe);
        kept
    });
    // A balloon's requests waited for memory to be released.
    vm.wake_devices();
    let (saved, guarded) = kept?;
    pipe.check()?;
    let mut reported = Instant::now();
    for shadow in shadows {
        shadow.copy_all(|| {
            if reported.elapsed() >= REPORT_PERIOD {
                machine.snapshot_at(pipe.amounts());
                reported = Instant::now();
            }
        })?;
    }
    drop(guarded);
    pipe.check()?;
    Ok(saved)
}
