//! The shell of a post-copy's target: from when pages are discarded until none is missing. See [`crate::post_copy`].
//!
//! ```text
//!  faults   reads who waits for which page; a page that was never missing it makes zero itself ─┐
//!  restore  gives KVM the state, and may have to wait for pages like a guest                     ├─▶ machine ─▶ link: asks, places what comes
//!  pages    places what comes in the background, one thread a stream                            ─┘
//! ```
//!
//! The link's thread takes no lock but the machine's, and waits for nobody: whoever else does may be waiting for a page that it brings.

use std::sync::PoisonError;
use std::thread::Builder;
use std::time::Duration;

use drover_proto::{Code, Fault};

use super::machine::{Action, Admission, Done, Event};
use super::streams::Streams;
use super::{Driver, OnFault, PageSet};
use crate::codec::{Frame, Message, PageRequest, Runs};
use crate::post_copy::{PATIENCE, PostCopyVm};
use crate::transport::{SLICE, Stop, Stream};
use crate::vm::PAGE_SIZE;

/// What the link's thread does next.
enum Next {
    Ask(PageRequest),
    Restored(Result<(), Fault>),
    End(Vec<Action<'static>>),
    Stop(Stop),
}

impl<'env, S, A> Driver<'_, 'env, S, A>
where
    S: Stream + 'env,
    A: FnOnce(&Admission) -> Result<Vec<S>, Fault>,
{
    /// Discards what is missing, and has a thread read who waits for it.
    pub(super) fn arm(&mut self, missing: &PageSet) -> Result<(), Fault> {
        let streams = self.streams;
        streams.post_copy()?.arm(missing)?;
        let thread = Builder::new().name("faults".to_owned());
        thread
            .spawn_scoped(self.scope, move || streams.read_faults())
            .map(drop)
            .map_err(no_thread)
    }

    /// Whether pages are missing by now.
    pub(super) fn lacks_soon(&self) -> bool {
        self.streams.lacks()
    }

    /// Restores the VM on a thread of its own: it may have to wait for pages, which come to this one.
    pub(super) fn restore_aside(&mut self, state: Vec<u8>) -> Result<(), Fault> {
        let streams = self.streams;
        self.lacks = true;
        self.link.set_timeout(self.link_timeout * PATIENCE);
        let thread = Builder::new().name("restore".to_owned());
        thread
            .spawn_scoped(self.scope, move || streams.restore(&state))
            .map(drop)
            .map_err(no_thread)
    }

    /// From the state on, until nothing is missing or all is lost.
    pub(super) fn fill(&mut self) -> Result<Done, Fault> {
        let mut buffer = Vec::new();
        loop {
            let result = match self.streams.await_next() {
                Next::Ask(request) => self.ask(request, &mut buffer),
                Next::Restored(Ok(())) => self.tell(Event::Restored),
                Next::Restored(Err(fault)) => self.tell(Event::VmFailed(fault)),
                Next::End(actions) => self.carry_out(actions),
                Next::Stop(stop) => {
                    let event = self.stopped(stop);
                    self.tell(event)
                }
            };
            if let Some(result) = result {
                return result;
            }
        }
    }

    fn tell(&mut self, event: Event<'_>) -> Option<Result<Done, Fault>> {
        let actions = self.streams.handle(event);
        self.carry_out(actions)
    }

    /// Asks for pages and takes what comes until they all have.
    fn ask(&mut self, request: PageRequest, buffer: &mut Vec<u8>) -> Option<Result<Done, Fault>> {
        if let Err(stop) = self.link.send(&Message::PageRequest(request)) {
            let event = self.stopped(stop);
            return self.tell(event);
        }
        loop {
            let (event, last) = match self.link.receive(buffer) {
                Ok((frame, bytes)) => {
                    let last = matches!(frame, Frame::Message(Message::PageAnswer(_)));
                    (Event::Received(frame, bytes), last)
                }
                Err(stop) => (self.stopped(stop), true),
            };
            let ended = self.tell(event);
            if ended.is_some() || last {
                return ended;
            }
        }
    }
}

fn no_thread(error: std::io::Error) -> Fault {
    Fault::new(Code::Internal, format!("no thread for a post-copy: {error}"))
}

impl Streams<'_> {
    pub(super) fn post_copy(&self) -> Result<&dyn PostCopyVm, Fault> {
        self.vm().post_copy()
    }

    pub(super) fn lacks(&self) -> bool {
        self.machine().lacking().is_some()
    }

    pub(super) fn stand(&self, done: Done) -> Result<(), Fault> {
        self.post_copy()?.stand(done.received(self.origin))
    }

    /// Gives missing pages their content, or zeroes.
    pub(super) fn place(&self, runs: Runs<'_>, data: Option<&[u8]>) -> Result<(), Fault> {
        let vm = self.post_copy()?;
        let mut rest = data;
        runs.iter()
            .flat_map(|run| self.regions.split(run))
            .try_for_each(|run| match rest {
                Some(data) => {
                    let bytes = usize::try_from(run.count).expect("a frame's data fits memory") * PAGE_SIZE;
                    let (part, after) = data.split_at(bytes);
                    rest = Some(after);
                    vm.place_pages(run.first, part)
                }
                None => vm.place_zeros(run.first, run.count),
            })
    }

    fn restore(&self, state: &[u8]) {
        let restored = self.vm().restore(state);
        *self.restored.lock().unwrap_or_else(PoisonError::into_inner) = Some(restored);
        self.changed.notify_all();
    }

    fn read_faults(&self) {
        let read = || -> Result<(), Fault> {
            let (vm, mut pages) = (self.post_copy()?, Vec::new());
            while !self.is_closed() {
                vm.faults(SLICE, &mut pages)?;
                for page in pages.drain(..) {
                    let on_fault = self.machine().fault(self.origin.elapsed(), page);
                    match on_fault {
                        OnFault::Zero => vm.place_zeros(page, 1)?,
                        OnFault::Wait => self.changed.notify_all(),
                    }
                }
            }
            Ok(())
        };
        if let Err(fault) = read() {
            self.fail(fault);
        }
    }

    fn await_next(&self) -> Next {
        const GLANCE: Duration = SLICE;
        let mut machine = self.machine();
        loop {
            if let Some(stop) = self.stop() {
                return Next::Stop(stop);
            }
            let restored = self
                .restored
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take();
            if let Some(restored) = restored {
                return Next::Restored(restored);
            }
            let now = self.origin.elapsed();
            if let Some(actions) = machine.complete(now) {
                return Next::End(actions);
            }
            if let Some(request) = machine.next_request(now) {
                return Next::Ask(request);
            }
            let waited = self.changed.wait_timeout(machine, GLANCE);
            machine = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The post-copy is over, if there was one: nothing is missing, or what is will never come.
    pub(super) fn end_post_copy(&self, ended: Result<&Done, &Fault>) {
        let missing = match self.machine().take_lacking() {
            Some(missing) => missing,
            None => return,
        };
        let Ok(vm) = self.post_copy() else { return };
        if let Err(why) = ended {
            vm.lose(&missing, why);
        } else if let Err(fault) = vm.disarm() {
            tracing::warn!(%fault, "memory is whole, but still watched for pages that are missing");
        }
    }
}
