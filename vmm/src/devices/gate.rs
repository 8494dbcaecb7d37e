//! When devices may work: only while the VM may run. Their counterpart of the vCPUs' gate.
//!
//! ```text
//!   closed ──open(deadline)──► open ──deadline──► nobody begins ──open──► open
//!      ▲                         │
//!      └───close; drained when the last request that had begun has ended
//! ```
//!
//! A device begins each request here and ends it here. Past the deadline of the lease none begins, whatever became of the agent, as no
//! vCPU enters the guest; what had begun is finished. What must be held while the VM may run, the locks of its disks, is taken on
//! opening and given back once the gate is closed and nothing is under way.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use drover_proto::{Code, Fault};
use tracing::error;
use vmm_sys_util::eventfd::EventFd;

use crate::time::boottime_ns;

/// What is held exactly while the VM may run.
pub trait Held: Send + Sync {
    /// Takes it; must not be called while it is held.
    fn take(&self) -> Result<(), Fault>;
    /// Makes what was written last.
    fn sync(&self) -> Result<(), Fault>;
    /// Gives it back.
    fn release(&self);
}

#[derive(Default)]
struct State {
    open: bool,
    held: bool,
    /// Closed for a hand-over, which releases by itself.
    handing_over: bool,
    quit: bool,
    deadline_ns: u64,
    under_way: u32,
    /// Somebody was turned away since the gate was opened last.
    turned_away: bool,
}

/// The gate of all devices of a VM.
#[derive(Default)]
pub struct IoGate {
    state: Mutex<State>,
    changed: Condvar,
    held: Mutex<Vec<Arc<dyn Held>>>,
    /// By the slot of the device.
    bells: Mutex<BTreeMap<usize, EventFd>>,
}

/// A request that may be served; dropping it is its end.
pub struct Begun<'a>(&'a IoGate);

impl Begun<'_> {
    /// Whether the deadline is still ahead: for what must not leave the host after it, however long the request has taken.
    pub fn in_time(&self) -> bool {
        boottime_ns() < self.0.state().deadline_ns
    }
}

impl Drop for Begun<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.under_way -= 1;
        self.0.release_if_idle(&mut state);
        self.0.changed.notify_all();
    }
}

impl IoGate {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of the devices' gate panics")
    }

    fn held(&self) -> MutexGuard<'_, Vec<Arc<dyn Held>>> {
        self.held.lock().expect("no holder of this lock panics")
    }

    fn bells(&self) -> MutexGuard<'_, BTreeMap<usize, EventFd>> {
        self.bells.lock().expect("no holder of this lock panics")
    }

    /// The worker of the device in `slot` waits for `bell`: rung whenever there may be work that was turned away before.
    pub fn add_bell(&self, slot: usize, bell: EventFd) {
        self.bells().insert(slot, bell);
    }

    /// The device in `slot` has no worker any more.
    pub fn remove_bell(&self, slot: usize) {
        self.bells().remove(&slot);
    }

    /// Something to be held while the gate is open; not while it is.
    pub fn add_held(&self, held: Arc<dyn Held>) {
        let state = self.state();
        assert!(!state.held, "what the others hold, this one lacks");
        self.held().push(held);
    }

    /// Something that the caller has taken already, to be held from now on with the rest. A fault: the others are not held now, since
    /// the VM may not run; it stays the caller's.
    pub fn add_taken(&self, taken: Arc<dyn Held>) -> Result<(), Fault> {
        let state = self.state();
        if !state.held || !state.open {
            return Err(Fault::new(Code::VmState, "the VM does not run"));
        }
        self.held().push(taken);
        Ok(())
    }

    /// What is not to be held any more, with all that was written through it. Its device has ended.
    pub fn remove_held(&self, held: &Arc<dyn Held>) {
        if let Err(fault) = held.sync() {
            error!(%fault, "what a device wrote before it was taken away may be lost with its host");
        }
        let state = self.state();
        let mut all = self.held();
        let before = all.len();
        all.retain(|one| !Arc::ptr_eq(one, held));
        if state.held && all.len() < before {
            held.release();
        }
    }

    fn ring(&self) {
        for bell in self.bells().values() {
            if let Err(error) = bell.write(1) {
                error!(%error, "a device's worker cannot be woken");
            }
        }
    }

    /// Wakes the workers: there may be work that they passed over.
    pub fn wake(&self) {
        self.ring();
    }

    /// Lets requests begin until the `CLOCK_BOOTTIME` `deadline_ns`. A fault: what is to be held cannot be, and nothing begins.
    pub fn open(&self, deadline_ns: u64) -> Result<(), Fault> {
        let mut state = self.state();
        if !state.held {
            let held = self.held();
            for (index, one) in held.iter().enumerate() {
                if let Err(fault) = one.take() {
                    held[..index].iter().for_each(|taken| taken.release());
                    return Err(fault);
                }
            }
            state.held = true;
        }
        let stood = !std::mem::replace(&mut state.open, true);
        let missed = std::mem::take(&mut state.turned_away);
        state.handing_over = false;
        state.deadline_ns = deadline_ns;
        drop(state);
        if stood || missed {
            self.ring();
        }
        Ok(())
    }

    /// Lets no further request begin. `hand_over`: what is held is kept until [`IoGate::drain`].
    pub fn close(&self, hand_over: bool) {
        let mut state = self.state();
        state.open = false;
        state.handing_over = hand_over;
        self.release_if_idle(&mut state);
        self.changed.notify_all();
    }

    fn release_if_idle(&self, state: &mut State) {
        if state.held && !state.open && !state.handing_over && state.under_way == 0 {
            self.held().iter().for_each(|held| held.release());
            state.held = false;
        }
    }

    /// How long it is until the deadline.
    pub fn left(&self) -> Duration {
        Duration::from_nanos(self.state().deadline_ns.saturating_sub(boottime_ns()))
    }

    /// Begins a request, if one may begin now.
    pub fn begin(&self) -> Option<Begun<'_>> {
        let mut state = self.state();
        if !state.open || state.quit || boottime_ns() >= state.deadline_ns {
            state.turned_away = true;
            return None;
        }
        state.under_way += 1;
        Some(Begun(self))
    }

    /// Waits, at most `bound`, until a closed gate has nothing under way; with `sync` makes what was written last; gives back what is
    /// held. A fault: it took longer, or the gate was opened again, and nothing is given back.
    pub fn drain(&self, bound: Duration, sync: bool) -> Result<(), Fault> {
        let until = Instant::now() + bound;
        let mut state = self.state();
        while state.under_way > 0 && !state.open {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let message = format!(
                    "{} requests of devices are under way {} ms after the pause",
                    state.under_way,
                    bound.as_millis()
                );
                return Err(Fault::new(Code::SourceFailed, message));
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.expect("no holder of the devices' gate panics").0;
        }
        if state.open {
            return Err(Fault::new(Code::Cancelled, "the VM runs again"));
        }
        if sync {
            // Also of a VM that stood before, whose locks are given back already. Without the lock of the state: an abort must not wait for
            // the disk, and `handing_over` keeps what is held.
            drop(state);
            let held: Vec<_> = self.held().clone();
            held.iter().try_for_each(|held| held.sync())?;
            state = self.state();
        }
        if state.open {
            return Err(Fault::new(Code::Cancelled, "the VM runs again"));
        }
        state.handing_over = false;
        self.release_if_idle(&mut state);
        Ok(())
    }

    /// Waits, at most `bound`, until a closed gate has nothing under way. What is held stays held.
    pub fn await_drained(&self, bound: Duration) -> Result<(), Fault> {
        let waited = self
            .changed
            .wait_timeout_while(self.state(), bound, |state| state.under_way > 0 && !state.open);
        let (state, _) = waited.expect("no holder of the devices' gate panics");
        if !state.open && state.under_way == 0 {
            return Ok(());
        }
        let message = format!(
            "{} requests of devices are under way {} ms after the pause",
            state.under_way,
            bound.as_millis()
        );
        Err(Fault::new(Code::SnapshotFailed, message))
    }

    /// Whether a closed gate has nothing under way.
    pub fn is_drained(&self) -> bool {
        let state = self.state();
        !state.open && state.under_way == 0
    }

    /// Whether nothing is under way.
    pub fn is_idle(&self) -> bool {
        self.state().under_way == 0
    }

    /// Ends all workers: nothing begins any more, whoever opens the gate.
    pub fn quit(&self) {
        self.state().quit = true;
        self.changed.notify_all();
        self.ring();
    }

    /// Waits for `time`, or until the workers are to end: then it gives true.
    pub fn rest(&self, time: Duration) -> bool {
        let waited = self
            .changed
            .wait_timeout_while(self.state(), time, |state| !state.quit);
        waited.expect("no holder of the devices' gate panics").0.quit
    }

    /// Whether the workers are to end.
    pub fn quits(&self) -> bool {
        self.state().quit
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicI32, Ordering};

    use super::*;

    #[derive(Default)]
    struct Lock {
        taken: AtomicI32,
        fails: bool,
    }

    impl Held for Lock {
        fn take(&self) -> Result<(), Fault> {
            if self.fails {
                return Err(Fault::new(Code::DiskUnusable, "locked"));
            }
            assert_eq!(self.taken.fetch_add(1, Ordering::SeqCst), 0);
            Ok(())
        }
        fn sync(&self) -> Result<(), Fault> {
            Ok(())
        }
        fn release(&self) {
            assert_eq!(self.taken.fetch_sub(1, Ordering::SeqCst), 1);
        }
    }

    const SOON: Duration = Duration::from_millis(1);

    fn gate() -> (IoGate, Arc<Lock>) {
        let (gate, lock) = (IoGate::default(), Arc::new(Lock::default()));
        gate.add_held(lock.clone());
        (gate, lock)
    }

    #[test]
    fn after_the_end_nothing_begins_although_a_lease_opens_the_gate() {
        let (gate, _) = gate();
        gate.open(u64::MAX).unwrap();
        let begun = gate.begin();
        assert!(begun.is_some() && !gate.is_idle());
        gate.quit();
        drop(begun);
        gate.open(u64::MAX).unwrap();
        assert!(gate.begin().is_none() && gate.is_idle());
    }

    #[test]
    fn nothing_begins_before_the_first_grant_nor_after_the_deadline() {
        let (gate, lock) = gate();
        assert!(gate.begin().is_none());
        gate.open(boottime_ns()).unwrap();
        assert!(gate.begin().is_none(), "past the deadline");
        gate.open(u64::MAX).unwrap();
        assert!(gate.begin().is_some());
        assert_eq!(lock.taken.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn what_is_held_is_given_back_when_the_last_request_has_ended() {
        let (gate, lock) = gate();
        gate.open(u64::MAX).unwrap();
        let begun = gate.begin().unwrap();
        gate.close(false);
        assert_eq!(lock.taken.load(Ordering::SeqCst), 1, "released under a request");
        drop(begun);
        assert_eq!(lock.taken.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn a_hand_over_waits_for_what_is_under_way_but_not_for_ever() {
        let (gate, lock) = gate();
        gate.open(u64::MAX).unwrap();
        let begun = gate.begin().unwrap();
        gate.close(true);
        assert_eq!(gate.drain(SOON, true).unwrap_err().code, Code::SourceFailed);
        assert!(gate.begin().is_none());
        drop(begun);
        assert_eq!(lock.taken.load(Ordering::SeqCst), 1, "released before the drain");
        gate.drain(SOON, true).unwrap();
        assert!(gate.is_drained());
        assert_eq!(lock.taken.load(Ordering::SeqCst), 0);
        gate.open(u64::MAX).unwrap();
        assert_eq!(gate.drain(SOON, false).unwrap_err().code, Code::Cancelled);
    }

    #[test]
    fn a_snapshots_pause_waits_for_what_is_under_way_and_keeps_what_is_held() {
        let (gate, lock) = gate();
        gate.open(u64::MAX).unwrap();
        let begun = gate.begin().unwrap();
        gate.close(true);
        assert_eq!(gate.await_drained(SOON).unwrap_err().code, Code::SnapshotFailed);
        drop(begun);
        gate.await_drained(SOON).unwrap();
        assert!(gate.is_drained() && gate.begin().is_none());
        assert_eq!(lock.taken.load(Ordering::SeqCst), 1);
        gate.open(u64::MAX).unwrap();
        assert!(gate.begin().is_some());
        gate.close(false);
        assert_eq!(lock.taken.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn a_lock_that_cannot_be_taken_leaves_the_gate_closed_and_the_others_free() {
        let (gate, lock) = gate();
        gate.add_held(Arc::new(Lock {
            fails: true,
            ..Lock::default()
        }));
        assert_eq!(gate.open(u64::MAX).unwrap_err().code, Code::DiskUnusable);
        assert_eq!(lock.taken.load(Ordering::SeqCst), 0);
        assert!(gate.begin().is_none());
    }

    #[test]
    fn what_comes_and_goes_while_the_gate_is_open_is_held_just_so_long() {
        let (gate, lock) = gate();
        let late = Arc::new(Lock::default());
        late.take().unwrap();
        assert_eq!(gate.add_taken(late.clone()).unwrap_err().code, Code::VmState);
        gate.open(u64::MAX).unwrap();
        gate.add_taken(late.clone()).unwrap();
        gate.close(false);
        assert_eq!(late.taken.load(Ordering::SeqCst), 0);
        gate.open(u64::MAX).unwrap();
        let as_held: Arc<dyn Held> = late.clone();
        gate.remove_held(&as_held);
        gate.remove_held(&as_held);
        assert_eq!(late.taken.load(Ordering::SeqCst), 0);
        gate.close(false);
        gate.remove_held(&(lock.clone() as Arc<dyn Held>));
        gate.open(u64::MAX).unwrap();
        assert_eq!(lock.taken.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn whoever_was_turned_away_is_woken_by_the_next_opening() {
        let gate = IoGate::default();
        let bell = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        gate.add_bell(1, bell.try_clone().unwrap());
        gate.open(boottime_ns()).unwrap();
        bell.read().unwrap();
        gate.open(boottime_ns()).unwrap();
        assert!(bell.read().is_err(), "rung for nobody");
        assert!(gate.begin().is_none());
        gate.open(u64::MAX).unwrap();
        bell.read().unwrap();
    }
}
