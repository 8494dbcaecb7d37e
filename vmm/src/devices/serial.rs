//! The serial port: a 16550 at 0x3f8 with IRQ 4, whose other end is the console.
//!
//! vm-superio emulates the registers. Its receive FIFO holds 64 bytes; what was typed and does not fit waits in a
//! queue here, bounded too, and follows as the guest reads. The guest cannot block: what it sends goes into the console's
//! scroll-back at once.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::Arc;

use drover_proto::{Code, Fault};
use tracing::warn;
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use super::console::{Console, SCROLLBACK_BYTES};

/// First port.
pub const BASE: u16 = 0x3f8;
/// Last port.
pub const LAST: u16 = BASE + 7;
/// The interrupt line.
pub const IRQ: u32 = 4;
/// Length of the saved registers, in the order of [`SerialState`]'s fields.
pub const REGISTERS: usize = 9;

/// Bytes of input that wait for the guest, beside its FIFO.
const QUEUE_BYTES_MAX: usize = 4096;
/// Size of the emulated receive FIFO.
const FIFO_BYTES: usize = 64;

/// The saved serial port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedSerial {
    /// Divisor low and high, interrupt enable and identification, line control and status, modem control and status, scratch.
    pub registers: [u8; REGISTERS],
    /// The newest console bytes.
    pub scrollback: Vec<u8>,
    /// Absolute offset after them.
    pub console_next: u64,
    /// Bytes the guest has not read: the FIFO's, then the queue's.
    pub input: Vec<u8>,
}

impl SavedSerial {
    /// What is wrong with its shape, if anything.
    pub fn check(&self) -> Result<(), String> {
        if self.scrollback.len() > SCROLLBACK_BYTES || self.scrollback.len() as u64 > self.console_next {
            return Err(format!(
                "the console's scroll-back has {} bytes, at most {SCROLLBACK_BYTES} and no more than the {} ever written can be",
                self.scrollback.len(),
                self.console_next
            ));
        }
        if self.input.len() > FIFO_BYTES + QUEUE_BYTES_MAX {
            return Err(format!("the console's input has {} bytes", self.input.len()));
        }
        Ok(())
    }
}

/// The interrupt line as an eventfd that KVM listens to.
#[derive(Debug)]
struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;
    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The guest's output.
#[derive(Debug)]
struct Output(Arc<Console>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.append(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The port.
#[derive(Debug)]
pub struct SerialPort {
    uart: Serial<Line, NoEvents, Output>,
    queue: VecDeque<u8>,
    console: Arc<Console>,
    line: EventFd,
}

impl SerialPort {
    /// A port in its reset state that raises `line` and writes to `console`.
    pub fn new(line: EventFd, console: Arc<Console>) -> Result<Self, Fault> {
        let trigger = Line(clone(&line)?);
        let uart = Serial::new(trigger, Output(console.clone()));
        Ok(Self {
            uart,
            queue: VecDeque::new(),
            console,
            line,
        })
    }

    /// The guest writes. The port is one byte wide: a wider or repeated access is as many single ones.
    pub fn write(&mut self, port: u16, data: &[u8]) {
        for &byte in data {
            if let Err(error) = self.uart.write(offset(port), byte) {
                warn!(%error, "the serial port's interrupt cannot be raised");
            }
        }
    }

    /// The guest reads.
    pub fn read(&mut self, port: u16, data: &mut [u8]) {
        for byte in data {
            *byte = self.uart.read(offset(port));
        }
        self.refill();
    }

    /// Types `bytes`; returns how many fitted.
    pub fn type_in(&mut self, bytes: &[u8]) -> usize {
        let room = QUEUE_BYTES_MAX - self.queue.len();
        let taken = &bytes[..bytes.len().min(room)];
        self.queue.extend(taken);
        self.refill();
        taken.len()
    }

    fn refill(&mut self) {
        let room = self.uart.fifo_capacity().min(self.queue.len());
        if room == 0 {
            return;
        }
        let bytes: Vec<u8> = self.queue.iter().take(room).copied().collect();
        match self.uart.enqueue_raw_bytes(&bytes) {
            // In loopback mode none is taken; the queue waits.
            Ok(taken) => drop(self.queue.drain(..taken)),
            Err(error) => warn!(%error, "the serial port's interrupt cannot be raised"),
        }
    }

    /// The port's state and its console's.
    pub fn save(&self) -> SavedSerial {
        let state = self.uart.state();
        let (scrollback, console_next) = self.console.save();
        SavedSerial {
            registers: [
                state.baud_divisor_low,
                state.baud_divisor_high,
                state.interrupt_enable,
                state.interrupt_identification,
                state.line_control,
                state.line_status,
                state.modem_control,
                state.modem_status,
                state.scratch,
            ],
            scrollback,
            console_next,
            input: state.in_buffer.iter().chain(&self.queue).copied().collect(),
        }
    }

    /// Takes over a saved port.
    pub fn restore(&mut self, saved: &SavedSerial) -> Result<(), Fault> {
        saved
            .check()
            .map_err(|message| Fault::new(Code::BadState, message))?;
        let [low, high, ier, iir, lcr, lsr, mcr, msr, scratch] = saved.registers;
        let (fifo, queue) = saved.input.split_at(saved.input.len().min(FIFO_BYTES));
        let state = SerialState {
            baud_divisor_low: low,
            baud_divisor_high: high,
            interrupt_enable: ier,
            interrupt_identification: iir,
            line_control: lcr,
            line_status: lsr,
            modem_control: mcr,
            modem_status: msr,
            scratch,
            in_buffer: fifo.to_vec(),
        };
        // An interrupt that was pending is raised again: an edge too many is harmless, a lost one is not.
        self.uart = Serial::from_state(
            &state,
            Line(clone(&self.line)?),
            NoEvents,
            Output(self.console.clone()),
        )
        .map_err(|error| Fault::new(Code::BadState, format!("serial port: {error}")))?;
        self.queue = queue.iter().copied().collect();
        self.console.restore(&saved.scrollback, saved.console_next);
        Ok(())
    }
}

fn clone(line: &EventFd) -> Result<EventFd, Fault> {
    line.try_clone().map_err(|error| {
        Fault::new(
            Code::VmmStartFailed,
            format!("the serial port's interrupt line: {error}"),
        )
    })
}

fn offset(port: u16) -> u8 {
    u8::try_from(port - BASE).expect("the bus passes on the port's own addresses")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port() -> SerialPort {
        SerialPort::new(EventFd::new(libc::EFD_NONBLOCK).unwrap(), Arc::default()).unwrap()
    }

    fn read_all(port: &mut SerialPort) -> Vec<u8> {
        let mut out = vec![];
        let mut byte = [0];
        loop {
            port.read(BASE + 5, &mut byte);
            if byte[0] & 1 == 0 {
                return out;
            }
            port.read(BASE, &mut byte);
            out.push(byte[0]);
        }
    }

    #[test]
    fn what_the_guest_sends_stands_on_the_console() {
        let mut port = port();
        port.write(BASE, b"hello\n");
        assert_eq!(port.console.read(0, 100).data, b"hello\n");
    }

    #[test]
    fn typing_beyond_the_fifo_waits_and_beyond_the_queue_is_not_accepted() {
        let mut port = port();
        let typed: Vec<u8> = (0..=255)
            .cycle()
            .take(FIFO_BYTES + QUEUE_BYTES_MAX + 10)
            .collect();
        let mut accepted = 0;
        while accepted < typed.len() {
            match port.type_in(&typed[accepted..]) {
                0 => break,
                taken => accepted += taken,
            }
        }
        assert_eq!(accepted, FIFO_BYTES + QUEUE_BYTES_MAX);
        assert_eq!(read_all(&mut port), typed[..accepted]);
    }

    #[test]
    fn a_restored_port_has_registers_input_and_console_of_the_saved_one() {
        let mut source = port();
        source.write(BASE, b"abc");
        source.write(BASE + 7, &[0x5a]);
        source.type_in(&[b'q'; 100]);
        let saved = source.save();
        let mut target = port();
        target.restore(&saved).unwrap();
        assert_eq!(target.save(), saved);
        assert_eq!(read_all(&mut target), [b'q'; 100]);
    }

    #[test]
    fn a_pending_interrupt_is_raised_again_after_the_restore() {
        let mut source = port();
        source.write(BASE + 1, &[1]);
        source.type_in(b"x");
        let mut target = port();
        target.restore(&source.save()).unwrap();
        assert!(target.line.read().is_ok());
    }
}
