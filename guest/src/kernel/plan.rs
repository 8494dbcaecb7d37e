//! What all processors agree on, made by processor 0 and published once.
#![allow(unsafe_code, reason = "published once by one processor, then only read")]

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, Ordering};

use drover_probe::PAGE_SIZE;
use drover_probe::layout::Layout;
use drover_probe::params::{BadParam, Params, Why};
use drover_probe::report::Up;

use super::time::Clock;
use super::{balloon, disk, disk_load, machine, net, net_load, port};

const RECORD_BYTES: u64 = 8;

/// Parameters and where the memory for them lies.
pub struct Draft {
    /// The command line's.
    pub params: Params,
    layout: Layout,
    record: u64,
    /// Memory for the disk, where there is to be one: see [`super::disk`] and [`super::disk_load`].
    pub disk: Option<u64>,
    /// Memory for the NIC, where there is to be one: see [`super::net`] and [`super::net_load`].
    pub net: Option<u64>,
    /// Memory for the balloon's driver, where there is to be one: see [`super::balloon`].
    pub balloon: Option<u64>,
    /// Memory for the virtio console's driver, where there is to be one: see [`super::port`].
    pub port: Option<u64>,
}

/// The same, and the machine as it was found.
pub struct Plan {
    /// The command line's.
    pub params: Params,
    /// Owned pages are the layout's first `params.own_pages`.
    pub layout: Layout,
    /// Address of the record of what was last written: a 64-bit sequence a page.
    pub record: u64,
    /// Time.
    pub clock: Clock,
    /// The timer's counts a second.
    pub timer_hz: u64,
    /// Processors that work.
    pub cpus: usize,
}

impl Plan {
    /// Follows the command line within the memory there is.
    pub fn make<'a>(line: &'a str, memory: &Layout) -> Result<Draft, BadParam<'a>> {
        let params = Params::parse(line)?;
        let mut layout = memory.clone();
        let room = layout.pages();
        let wanted = [
            match params.disk_bench {
                Some(_) => disk_load::PAGES,
                None => u64::from(params.disk) * disk::PAGES,
            },
            match params.net_bench {
                Some(_) => net_load::PAGES,
                None => u64::from(params.net.is_some()) * net::PAGES,
            },
            u64::from(params.balloon) * balloon::PAGES,
            u64::from(params.virtio_console) * port::PAGES,
        ];
        let taken = wanted.map(|pages| (pages > 0).then(|| layout.take(pages)).flatten());
        let [disk, net, balloon, port] = taken;
        let needed: u64 = wanted.iter().sum();
        let record_pages = params.own_pages.saturating_mul(RECORD_BYTES).div_ceil(PAGE_SIZE);
        let record = layout
            .take(record_pages)
            .filter(|_| layout.pages() >= params.own_pages)
            .filter(|_| wanted.map(|pages| pages > 0) == taken.map(|memory| memory.is_some()));
        let Some(record) = record else {
            let room = room.saturating_sub(needed);
            let pages = room - room.div_ceil(1 + PAGE_SIZE / RECORD_BYTES);
            let word = line
                .split_ascii_whitespace()
                .rfind(|word| word.starts_with("own="))
                .unwrap_or("own=64M");
            return Err(BadParam {
                word,
                why: Why::DoesNotFit { pages },
            });
        };
        machine::map_up_to(layout.end());
        Ok(Draft {
            params,
            layout,
            record,
            disk,
            net,
            balloon,
            port,
        })
    }

    /// Pages that nobody owns.
    pub fn spare(&self) -> u64 {
        self.layout.pages() - self.params.own_pages
    }

    /// The address of the `index`-th of them.
    pub fn spare_page(&self, index: u64) -> u64 {
        let found = self.layout.address(self.params.own_pages + index);
        found.expect("spare pages lie within the layout")
    }

    /// What the guest says when it is up.
    pub fn up(&self) -> Up {
        Up {
            cpus: self.cpus as u32,
            own_pages: self.params.own_pages,
            hot_pages: self.params.hot_pages,
            tsc_khz: self.clock.tsc_khz,
            clock: self.clock.source,
        }
    }
}

impl Draft {
    /// Completes the plan. With fewer hot pages than processors, the last processors stay idle.
    pub fn with_machine(self, clock: Clock, timer_hz: u64, cpus: usize) -> Plan {
        let cpus = cpus.min(self.params.hot_pages as usize);
        Plan {
            params: self.params,
            layout: self.layout,
            record: self.record,
            clock,
            timer_hz,
            cpus,
        }
    }
}

/// The place of the one plan.
pub static PLAN: Published = Published {
    plan: UnsafeCell::new(None),
    ready: AtomicBool::new(false),
};

/// A plan that is written once and then only read.
pub struct Published {
    plan: UnsafeCell<Option<Plan>>,
    ready: AtomicBool,
}

// SAFETY: the cell is written before `ready` is set and read only after; see `publish` and `wait`.
unsafe impl Sync for Published {}

impl Published {
    /// Publishes the plan. Called by processor 0, once.
    pub fn publish(&'static self, plan: Plan) -> &'static Plan {
        assert!(!self.ready.load(Ordering::Relaxed), "the plan is published once");
        // SAFETY: nobody reads the cell before `ready`, and only processor 0 comes here, once.
        unsafe { *self.plan.get() = Some(plan) };
        self.ready.store(true, Ordering::Release);
        self.wait()
    }

    /// Waits for the plan.
    pub fn wait(&'static self) -> &'static Plan {
        while !self.ready.load(Ordering::Acquire) {
            core::hint::spin_loop();
        }
        // SAFETY: `ready` is set, so the cell was written and is never written again.
        unsafe { (*self.plan.get()).as_ref() }.expect("the plan was written before it was made ready")
    }
}
