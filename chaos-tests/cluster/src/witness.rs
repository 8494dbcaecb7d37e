//! Who executes? A thread that asks every VMM, all the time, and holds what it learns against the one rule: at every
//! instant at most one VMM executes a VM's vCPUs, and only under a live lease.
//!
//! VMMs cannot be asked at one instant. But if A ran, then B ran, then A ran again, both ran when B was asked: a VMM whose
//! VM has been handed over may never run again, so A did not stop in between. That is what is looked for; a lone pair of
//! answers proves nothing.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::vmms::{Eyes, SeenVmm};

/// Between two rounds of questions.
const PERIOD: Duration = Duration::from_millis(15);

#[derive(Default)]
struct Findings {
    violations: Mutex<BTreeSet<String>>,
    rounds: AtomicU64,
    end: AtomicBool,
}

/// The thread; ends when dropped.
pub struct Witness {
    findings: Arc<Findings>,
    thread: Option<JoinHandle<()>>,
}

impl Witness {
    /// Watches the VMMs under these agents' data folders. `grace` is how long after its deadline a VMM may still say
    /// that it runs: the margin by which the controllers wait longer.
    pub fn start(hosts: Vec<PathBuf>, grace: Duration) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("starting the witness' runtime")?;
        let findings = Arc::new(Findings::default());
        let shared = Arc::clone(&findings);
        let thread = std::thread::spawn(move || {
            let mut eyes = Eyes::new(hosts);
            while !shared.end.load(Ordering::Relaxed) {
                let found = runtime.block_on(round(&mut eyes, grace));
                shared
                    .violations
                    .lock()
                    .expect("no one panics with the lock")
                    .extend(found);
                shared.rounds.fetch_add(1, Ordering::Release);
                std::thread::sleep(PERIOD);
            }
        });
        Ok(Self {
            findings,
            thread: Some(thread),
        })
    }

    /// Waits for `rounds` whole rounds from now, so that what is true now has been seen.
    pub fn await_rounds(&self, rounds: u64) {
        let wanted = self.findings.rounds.load(Ordering::Acquire) + rounds + 1;
        crate::await_some("the witness", || {
            match self.findings.rounds.load(Ordering::Acquire) {
                now if now >= wanted => Ok(()),
                now => Err(format!("round {now} of {wanted}")),
            }
        });
    }

    /// Fails if the rule was ever broken so far.
    pub fn assert_clean(&self) {
        self.await_rounds(1);
        let violations = self
            .findings
            .violations
            .lock()
            .expect("no one panics with the lock");
        assert!(
            violations.is_empty(),
            "the right to run was broken: {violations:#?}"
        );
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.findings.end.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Asks everybody once, and those who seem to run twice once more.
async fn round(eyes: &mut Eyes, grace: Duration) -> Vec<String> {
    let seen = eyes.look().await;
    let grace_ns = u64::try_from(grace.as_nanos()).expect("a grace of less than 584 years");
    let mut violations: Vec<String> = seen
        .iter()
        .filter_map(|vmm| beyond_lease(vmm, grace_ns))
        .collect();
    for (index, first) in seen.iter().enumerate().filter(|(_, vmm)| vmm.runs()) {
        for second in seen[index + 1..]
            .iter()
            .filter(|vmm| vmm.runs() && vmm.info.vm == first.info.vm)
        {
            let again = eyes.ask(first.host, first.dir.clone()).await;
            if again.is_some_and(|again| again.runs() && again.info.epoch == first.info.epoch) {
                violations.push(format!(
                    "{} executes twice: {} (epoch {}) and {} (epoch {})",
                    first.info.vm,
                    first.dir.display(),
                    first.info.epoch,
                    second.dir.display(),
                    second.info.epoch
                ));
            }
        }
    }
    violations
}

/// A VMM that executes although its lease had run out when it was asked.
fn beyond_lease(vmm: &SeenVmm, grace_ns: u64) -> Option<String> {
    let deadline = vmm.info.deadline_boottime_ns;
    (vmm.runs() && deadline.saturating_add(grace_ns) < vmm.asked_ns).then(|| match deadline {
        0 => format!("{} executes without ever having had a lease", vmm.dir.display()),
        _ => format!("{} executes after the end of its lease", vmm.dir.display()),
    })
}
