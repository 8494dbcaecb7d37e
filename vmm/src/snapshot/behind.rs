//! Memory written behind a running guest: whoever writes to a page that is not copied yet waits until it is.
//!
//! ```text
//!   protect, by and by ──► the VM stands: protect again what was written meanwhile ──► copy
//!     who writes goes on,      nobody writes                                          who writes waits for his block
//!     and is noted
//! ```
//!
//! All memory is protected against writes by userfaultfd, for every writer that there is: vCPUs, KVM in the kernel on their behalf, devices' threads. To
//! protect it takes some 5 to 25 ms a GiB, so most of that is done before the VM stands: then only what was written since is left, however
//! large the guest is. From then on one thread copies blocks out, first those that somebody waits for, then all in order, and lets each be written to again.
//!
//! **That thread waits for nobody who may wait for it**: it takes no lock of the machine's, whose holder may be waiting for a vCPU to stop, none
//! that a device holds while it writes to memory, and writes to no guest memory itself. It waits for buffers alone, not for ever, and those who
//! empty them wait for files alone. However it ends, memory is released.

use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::time::Duration;

use drover_migration::codec::Run;
use drover_migration::vm::PageSet;
use drover_proto::{Code, Fault};
use tracing::error;

use super::format::{BLOCK, BLOCK_BYTES, is_zero};
use super::pipe::{Pipe, blocks};
use crate::memory::{Memory, PAGE};
use crate::uffd::Uffd;

/// Pages of a block.
const BLOCK_PAGES: u64 = BLOCK_BYTES / PAGE;
/// Blocks that are protected, or are holes and let go, at once: 32 MiB. That takes up to 1 ms, which a fault may have to wait.
const STEP_BLOCKS: u64 = 512;
/// What is waited for a fault or a buffer at once; both end the wait.
const NAP: Duration = Duration::from_secs(1);

/// The engine's end of the line to the thread that copies.
pub struct Engine {
    ask: Sender<()>,
    told: Receiver<()>,
}

/// The thread's end.
pub struct Copier {
    asked: Receiver<()>,
    tell: Sender<()>,
}

/// A line between an engine and the thread that copies.
pub fn line() -> (Engine, Copier) {
    let ((ask, asked), (tell, told)) = (channel(), channel());
    (Engine { ask, told }, Copier { asked, tell })
}

fn gone() -> Fault {
    Fault::new(Code::Internal, "whoever takes part in the snapshot has ended")
}

impl Engine {
    /// Waits until all memory was protected once: the VM can be stopped.
    pub fn await_protected(&self, pipe: &Pipe) -> Result<(), Fault> {
        let told = self.told.recv();
        // What ended the thread is in the pipe.
        pipe.check()?;
        told.map_err(|_| gone())
    }

    /// The VM stands, and no device writes: that instant is to be kept. On return it is.
    pub fn keep(&self, pipe: &Pipe) -> Result<(), Fault> {
        self.ask
            .send(())
            .map_err(|_| pipe.check().err().unwrap_or_else(gone))?;
        pipe.ring();
        self.await_protected(pipe)
    }
}

/// Memory that is protected against writes; dropping it releases it.
pub struct Protected<'a> {
    memory: &'a Memory,
    uffd: &'a Uffd,
}

impl<'a> Protected<'a> {
    /// Prepares memory for it; nothing is protected yet.
    pub fn prepare(memory: &'a Memory, uffd: &'a Uffd) -> Result<Self, Fault> {
        let protected = Self { memory, uffd };
        // A page that the guest gives up becomes a hole without a write that anybody waited for.
        memory.keep_whole(true);
        memory.watch_writes(uffd)?;
        Ok(protected)
    }

    /// Protects all memory, and from the instant that the engine asks for copies it out into sheet `sheet`, ahead of all who write to it.
    pub fn copy_out(&self, sheet: usize, pipe: &Pipe, engine: &Copier) -> Result<(), Fault> {
        let copied = self.protect_until_asked(pipe, engine).and_then(|()| {
            let mut copying = Copying {
                of: self,
                sheet,
                pipe,
                copied: self.no_blocks(),
                next: 0,
            };
            copying.run()
        });
        copied.inspect_err(|fault| pipe.fail(fault.clone()))
    }

    fn no_blocks(&self) -> PageSet {
        PageSet::empty(blocks(self.memory.bytes()))
    }

    /// The blocks that somebody waits for.
    fn faults(&self, addresses: &mut Vec<u64>) -> Result<Vec<u64>, Fault> {
        self.uffd.faults(Duration::ZERO, addresses)?;
        let pages = addresses
            .drain(..)
            .filter_map(|address| self.memory.page_at(address));
        Ok(pages.map(|page| page / BLOCK_PAGES).collect())
    }

    fn wait(&self, pipe: &Pipe) -> Result<(), Fault> {
        self.uffd.await_fault_or(pipe.bell(), NAP)?;
        pipe.heard();
        Ok(())
    }

    fn protect(&self, run: Run) -> Result<(), Fault> {
        let (first, count) = (run.first * BLOCK_PAGES, run.count * BLOCK_PAGES);
        self.memory.protect_pages(self.uffd, first, count)
    }

    /// Blocks may be written to again, by those too who wait for that.
    fn release(&self, run: Run) -> Result<(), Fault> {
        let (first, count) = (run.first * BLOCK_PAGES, run.count * BLOCK_PAGES);
        self.memory.release_pages(self.uffd, first, count)
    }

    fn protect_until_asked(&self, pipe: &Pipe, engine: &Copier) -> Result<(), Fault> {
        let (all, mut next) = (blocks(self.memory.bytes()), 0);
        let (mut written, mut addresses) = (self.no_blocks(), Vec::new());
        loop {
            pipe.check()?;
            for block in self.faults(&mut addresses)? {
                let run = Run {
                    first: block,
                    count: 1,
                };
                written.insert(run);
                self.release(run)?;
            }
            if next < all {
                let count = STEP_BLOCKS.min(all - next);
                self.protect(Run { first: next, count })?;
                next += count;
                if next == all {
                    engine.tell.send(()).map_err(|_| gone())?;
                }
                continue;
            }
            match engine.asked.try_recv() {
                Ok(()) => break,
                Err(TryRecvError::Empty) => self.wait(pipe)?,
                Err(TryRecvError::Disconnected) => return Err(gone()),
            }
        }
        // Nobody writes now. Who was turned out of his wait for a page by the stop may still be told of; that page is protected, and will be copied.
        written.runs().into_iter().try_for_each(|run| self.protect(run))?;
        engine.tell.send(()).map_err(|_| gone())
    }
}

impl Drop for Protected<'_> {
    fn drop(&mut self) {
        if let Err(fault) = self.memory.release_writes(self.uffd) {
            // When the descriptor is closed, which is next, the kernel releases everything.
            error!(%fault, "memory is not released at once");
        }
        self.memory.keep_whole(false);
    }
}

struct Copying<'a> {
    of: &'a Protected<'a>,
    sheet: usize,
    pipe: &'a Pipe,
    /// By blocks.
    copied: PageSet,
    /// The lowest block that may not be copied yet.
    next: u64,
}

impl Copying<'_> {
    fn run(&mut self) -> Result<(), Fault> {
        let (mut waiting, mut addresses) = (false, Vec::new());
        while self.find_next() {
            self.pipe.passed(self.sheet, self.next);
            if waiting {
                self.of.wait(self.pipe)?;
            }
            self.pipe.check()?;
            for block in self.of.faults(&mut addresses)? {
                self.copy_for(block)?;
            }
            waiting = !self.copy_next()?;
        }
        Ok(())
    }

    /// Whether there is a block that is not copied.
    fn find_next(&mut self) -> bool {
        while self.next < blocks(self.of.memory.bytes()) {
            if !self.copied.contains(self.next) {
                return true;
            }
            self.next += 1;
        }
        false
    }

    fn release(&mut self, first: u64, count: u64) -> Result<(), Fault> {
        let run = Run { first, count };
        self.copied.insert(run);
        self.of.release(run)
    }

    /// Somebody waits for `block`.
    fn copy_for(&mut self, block: u64) -> Result<(), Fault> {
        if self.copied.contains(block) {
            // It was copied between the fault and its being read of.
            return self.release(block, 1);
        }
        let buffer = self.pipe.buffer()?;
        self.copy(block, buffer)
    }

    fn copy(&mut self, block: u64, mut buffer: Vec<u8>) -> Result<(), Fault> {
        buffer.resize(BLOCK, 0);
        self.of.memory.read_file(block * BLOCK_PAGES, &mut buffer)?;
        self.release(block, 1)?;
        if is_zero(&buffer) {
            self.pipe.skipped(BLOCK_BYTES);
            self.pipe.give_back(buffer);
        } else {
            self.pipe.push(self.sheet, block, buffer);
        }
        Ok(())
    }

    /// Copies the next block in order, or passes over a hole. False: there is no buffer for it.
    fn copy_next(&mut self) -> Result<bool, Fault> {
        if !self.find_next() {
            return Ok(true);
        }
        let (first, most) = (self.next * BLOCK_PAGES, STEP_BLOCKS * BLOCK_PAGES);
        let holes = self.of.memory.hole_ahead(first, most) / BLOCK_PAGES;
        let holes = holes.min(blocks(self.of.memory.bytes()) - self.next);
        if holes > 0 {
            let uncopied = (0..holes).take_while(|at| !self.copied.contains(self.next + at));
            let uncopied = uncopied.count() as u64;
            self.release(self.next, uncopied)?;
            self.pipe.skipped(uncopied * BLOCK_BYTES);
            return Ok(true);
        }
        let Some(buffer) = self.pipe.spare_buffer()? else {
            return Ok(false);
        };
        self.copy(self.next, buffer)?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::snapshot::format::MEMORY;
    use crate::snapshot::sheet::Sheet;

    /// A hole would be in the file instead of what was there at the instant.
    #[test]
    fn no_page_is_given_up_while_memory_is_protected() {
        let uffd = match Uffd::open_for_writes() {
            Ok(uffd) => uffd,
            Err(fault) => return println!("SKIPPED: {fault}"),
        };
        let memory = Memory::new(1 << 20, false).unwrap();
        assert!(memory.giving_up().is_some());
        let protected = Protected::prepare(&memory, &uffd).unwrap();
        assert!(memory.giving_up().is_none());
        drop(protected);
        assert!(memory.giving_up().is_some());
    }

    /// Writers of every kind that runs in this process, while memory is copied out: the file has what was there at the instant.
    #[test]
    fn what_is_written_after_the_instant_is_not_in_the_file_and_not_lost_in_memory() {
        let uffd = match Uffd::open_for_writes() {
            Ok(uffd) => uffd,
            Err(fault) => return println!("SKIPPED: {fault}"),
        };
        for huge_pages in [true, false] {
            let memory = Memory::new(16 << 20, huge_pages).unwrap();
            // A part stays a hole; a part is written and zero.
            let mut old = vec![0x11; 4 << 20];
            memory.write_pages(0, &old).unwrap();
            memory.write_pages(2048, &vec![0; 1 << 20]).unwrap();
            let dir = tempfile::tempdir().unwrap();
            let mut sheets = [Sheet::create(dir.path(), MEMORY, memory.bytes()).unwrap()];
            let pipe = Pipe::new().unwrap();
            let protected = Protected::prepare(&memory, &uffd).unwrap();
            std::thread::scope(|scope| {
                let (engine, copier) = line();
                let (pipe, protected) = (&pipe, &protected);
                let copying = scope.spawn(move || protected.copy_out(0, pipe, &copier));
                engine.await_protected(pipe).unwrap();
                // Before the instant: it is in the file, and nobody waits for ever.
                for page in [3, 2047] {
                    memory
                        .mapped()
                        .write_obj(0x33_u8, GuestAddress(page * PAGE))
                        .unwrap();
                }
                old = vec![0; memory.bytes() as usize];
                memory.read_file(0, &mut old).unwrap();
                engine.keep(pipe).unwrap();
                let files = scope.spawn(|| pipe.write(&mut sheets));
                let writer = scope.spawn(|| {
                    for page in (0..memory.pages()).rev() {
                        memory
                            .mapped()
                            .write_obj(0x2222_2222_u32, GuestAddress(page * PAGE + 8))
                            .unwrap();
                    }
                });
                copying.join().unwrap().unwrap();
                pipe.close();
                files.join().unwrap();
                writer.join().unwrap();
            });
            drop(protected);
            let written = std::fs::read(dir.path().join(MEMORY)).unwrap();
            assert!(written == old, "what was written later is in the file");
            let amounts = pipe.amounts();
            assert_eq!(
                (amounts.done, amounts.stored),
                (memory.bytes(), (4 << 20) + BLOCK_BYTES)
            );
            for page in 0..memory.pages() {
                let word: u32 = memory.mapped().read_obj(GuestAddress(page * PAGE + 8)).unwrap();
                assert_eq!(word, 0x2222_2222, "page {page}");
            }
        }
    }

    /// As KVM writes a clock's page.
    #[test]
    fn the_kernel_waits_too_and_whoever_waits_is_let_go_when_the_snapshot_ends() {
        let uffd = match Uffd::open_for_writes() {
            Ok(uffd) => uffd,
            Err(fault) => return println!("SKIPPED: {fault}"),
        };
        let memory = Memory::new(1 << 20, false).unwrap();
        let protected = Protected::prepare(&memory, &uffd).unwrap();
        let count = blocks(memory.bytes());
        protected.protect(Run { first: 0, count }).unwrap();
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let mut bytes = std::fs::File::open("/dev/urandom").unwrap();
                memory.fill_through_the_kernel(9, &mut bytes)
            });
            let mut faults = Vec::new();
            while faults.is_empty() {
                assert!(!writer.is_finished(), "the kernel does not wait");
                uffd.faults(Duration::from_millis(100), &mut faults).unwrap();
            }
            assert_eq!(memory.page_at(faults[0]), Some(9));
            drop(protected);
            writer.join().unwrap().unwrap();
        });
        memory.mapped().write_obj(1_u8, GuestAddress(0)).unwrap();
    }
}
