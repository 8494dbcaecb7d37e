//! The console: a 16550 at 0x3f8, polled, and once it is up a virtio console for all lines but last words.
//!
//! Every wait is bounded: when the other side does not read, the rest of the line is dropped and the guest goes on working.
#![allow(unsafe_code, reason = "whoever speaks has the virtio console to itself")]

use core::cell::UnsafeCell;
use core::fmt;
use core::sync::atomic::{AtomicBool, Ordering};

use super::machine;
use super::port::{LINE_BYTES, Port};

const PORT: u16 = 0x3f8;
const DATA: u16 = PORT;
const INTERRUPTS: u16 = PORT + 1;
const FIFO_CONTROL: u16 = PORT + 2;
const LINE_CONTROL: u16 = PORT + 3;
const MODEM_CONTROL: u16 = PORT + 4;
const LINE_STATUS: u16 = PORT + 5;
const CAN_READ: u8 = 0x01;
const CAN_WRITE: u8 = 0x20;
/// Bytes that an empty transmit queue takes.
const QUEUE: usize = 16;
/// Status reads, some microseconds each, before the rest of a line is given up.
const POLLS_MAX: u32 = 5000;
/// Longest line.
const LINE_MAX: usize = 512;
const _: () = assert!(LINE_MAX as u64 <= LINE_BYTES);

static BUSY: AtomicBool = AtomicBool::new(false);
static CUT: AtomicBool = AtomicBool::new(false);
/// The virtio console, once it is up.
static VIRTIO: Shared = Shared(UnsafeCell::new(None));

/// A virtio console that whoever has [`BUSY`] has to itself.
struct Shared(UnsafeCell<Option<Port>>);

// SAFETY: the cell is touched by `with_port` alone, which only the holder of `BUSY` enters.
unsafe impl Sync for Shared {}

/// What `act` makes of the virtio console, while nobody else speaks or looks.
fn with_port<T>(act: impl FnOnce(&mut Option<Port>) -> T) -> T {
    while BUSY
        .compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed)
        .is_err()
    {
        core::hint::spin_loop();
    }
    // SAFETY: `BUSY` was free and is this processor's until the end; no `act` comes here again.
    let made = act(unsafe { &mut *VIRTIO.0.get() });
    BUSY.store(false, Ordering::Release);
    made
}

/// Says a line.
macro_rules! say {
    ($($part:tt)*) => { $crate::kernel::console::say_line(format_args!($($part)*)) };
}
pub(super) use say;

struct Line {
    bytes: [u8; LINE_MAX],
    length: usize,
}

impl fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes().take(LINE_MAX - 2 - self.length) {
            self.bytes[self.length] = byte;
            self.length += 1;
        }
        Ok(())
    }
}

/// 115200 8N1, queues on, no interrupts.
pub fn open() {
    for (port, value) in [
        (INTERRUPTS, 0),
        (LINE_CONTROL, 0x80),
        (DATA, 1),
        (INTERRUPTS, 0),
        (LINE_CONTROL, 0x03),
        (FIFO_CONTROL, 0x07),
        (MODEM_CONTROL, 0x03),
    ] {
        machine::port_write(port, value);
    }
}

/// Says a line; lines of several processors never mix.
pub fn say_line(text: fmt::Arguments<'_>) {
    with_port(|port| write_line(text, port.as_mut()));
}

/// From now on lines are said on `port`, and what is typed there is heard too.
pub fn take_port(port: Port) {
    with_port(|place| *place = Some(port));
}

/// What was said and typed on the virtio console, if there is one.
pub fn port_counts() -> Option<[u64; 3]> {
    with_port(|port| port.as_ref().map(|port| port.counts))
}

/// Says a last line, whoever may be speaking.
pub fn say_without_waiting(text: fmt::Arguments<'_>) {
    write_line(format_args!("\r\n{text}"), None);
}

/// A byte that was typed.
pub fn typed() -> Option<u8> {
    if let Some(byte) = with_port(|port| port.as_mut().and_then(Port::typed)) {
        return Some(byte);
    }
    let status = machine::port_read(LINE_STATUS);
    (status != 0xff && status & CAN_READ != 0).then(|| machine::port_read(DATA))
}

fn write_line(text: fmt::Arguments<'_>, port: Option<&mut Port>) {
    let mut line = Line {
        bytes: [0; LINE_MAX],
        length: 0,
    };
    // Writing into the buffer cannot fail: what does not fit is cut.
    let _ = fmt::write(&mut line, text);
    line.bytes[line.length] = b'\r';
    line.bytes[line.length + 1] = b'\n';
    if let Some(port) = port {
        port.say(&line.bytes[..line.length + 2]);
        return;
    }
    if CUT.load(Ordering::Relaxed) && !send(b"\r\n") {
        return;
    }
    CUT.store(!send(&line.bytes[..line.length + 2]), Ordering::Relaxed);
}

/// Whether all of it was taken.
fn send(bytes: &[u8]) -> bool {
    for part in bytes.chunks(QUEUE) {
        if !(0..POLLS_MAX).any(|_| machine::port_read(LINE_STATUS) & CAN_WRITE != 0) {
            return false;
        }
        for byte in part {
            machine::port_write(DATA, *byte);
        }
    }
    true
}
