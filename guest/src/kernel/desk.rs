//! Processor 0's other duties: a line each second, answers to what is typed, and the fault that was asked for.

use core::sync::atomic::Ordering;

use drover_probe::clock::microseconds;
use drover_probe::params::Fault;
use drover_probe::report::{ConsoleSecond, Second};

use super::console::{self, say};
use super::machine;
use super::plan::Plan;
use super::worker::DONE;

/// Looks at the serial line's input a second.
const LOOKS_PER_S: u64 = 50;
/// Bytes taken in one look.
const TYPED_MAX: usize = 64;
/// Longest line that can be typed.
const INPUT_MAX: usize = 128;
/// QEMU's and Drover's ACPI PM1a control register, and the value that powers off (SLP_EN, SLP_TYP 0).
const POWER_PORT: u16 = 0x604;
const POWER_OFF: u16 = 0x2000;

/// The desk.
pub struct Desk {
    plan: &'static Plan,
    next_line: u64,
    next_look: u64,
    ticks: u64,
    ticks_back: u64,
    max_gap_us: u64,
    input: [u8; INPUT_MAX],
    length: usize,
}

impl Desk {
    /// Opens at once; the first line is due a second later.
    pub fn new(plan: &'static Plan) -> Desk {
        let now = machine::counter();
        let next_line = now + plan.clock.ticks_per_s();
        Desk {
            plan,
            next_line,
            next_look: now,
            ticks: 0,
            ticks_back: 0,
            max_gap_us: 0,
            input: [0; INPUT_MAX],
            length: 0,
        }
    }

    /// Does what is due; `said` holds what drivers say of themselves.
    pub fn tend(&mut self, said: Second) {
        let now = machine::counter();
        let second = self.plan.clock.ticks_per_s();
        if now >= self.next_look {
            self.next_look = now + second / LOOKS_PER_S;
            self.read_input();
        }
        if now >= self.next_line {
            // After a stop the seconds missed are left out.
            self.next_line = (self.next_line + second).max(now);
            let report = Second {
                disk: said.disk,
                net: said.net,
                balloon: said.balloon,
                disk_load: said.disk_load,
                net_load: said.net_load,
                console: console::port_counts().map(|[lines, unsaid, typed]| ConsoleSecond {
                    lines,
                    unsaid,
                    typed,
                }),
                ..self.report(now)
            };
            say!("{report}");
            self.fail_if_due(report.t_s);
        }
    }

    fn report(&mut self, now: u64) -> Second {
        let khz = self.plan.clock.tsc_khz;
        let area = machine::area(0);
        let ticks = area.ticks.load(Ordering::Relaxed);
        if ticks < self.ticks {
            self.ticks_back += 1;
        }
        self.ticks = ticks;
        let gap_us = microseconds(area.gap.swap(0, Ordering::Relaxed), khz);
        self.max_gap_us = self.max_gap_us.max(gap_us);
        let mut second = Second {
            t_s: microseconds(now.saturating_sub(self.plan.clock.boot), khz) / 1_000_000,
            ticks,
            gap_us,
            max_gap_us: self.max_gap_us,
            back: self.ticks_back,
            ..Second::default()
        };
        for (processor, done) in DONE.iter().enumerate() {
            second.written += done.written.load(Ordering::Relaxed);
            second.verified += done.verified.load(Ordering::Relaxed);
            second.lost += done.lost.load(Ordering::Relaxed);
            second.back +=
                done.back.load(Ordering::Relaxed) + machine::area(processor).back.load(Ordering::Relaxed);
        }
        second
    }

    fn read_input(&mut self) {
        for _ in 0..TYPED_MAX {
            match console::typed() {
                None => return,
                Some(b'\r' | b'\n') => self.answer(),
                Some(byte) if self.length < INPUT_MAX => {
                    self.input[self.length] = byte;
                    self.length += 1;
                }
                Some(_) => {}
            }
        }
    }

    fn answer(&mut self) {
        let line = core::str::from_utf8(&self.input[..self.length])
            .unwrap_or("(not UTF-8)")
            .trim();
        match line.split_once(' ') {
            _ if line.is_empty() => {}
            Some(("ping", word)) => say!("probe pong {}", word.trim()),
            _ => say!("probe unknown command \"{line}\", known: ping <word>"),
        }
        self.length = 0;
    }

    fn fail_if_due(&self, t_s: u64) {
        match self.plan.params.fault {
            Some((fault, after_s)) if t_s >= after_s => match fault {
                Fault::Triple => machine::triple_fault(),
                Fault::Emulation => machine::fail_emulation(),
                Fault::Shutdown => machine::port_write_word(POWER_PORT, POWER_OFF),
            },
            _ => {}
        }
    }
}
