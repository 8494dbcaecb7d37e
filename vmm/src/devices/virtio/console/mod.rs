//! A console (5.3) of one port, without `MULTIPORT`: another way to the same console as the serial port's.
//!
//! | file | what |
//! | --- | --- |
//! | `mod.rs` | the device: its two queues |
//! | `input.rs` | what was typed and is not the driver's yet (pure) |
//!
//! ```text
//!   typed ──► input ──► one chain at a time, as much as it holds    queue 0
//!   scroll-back ◄── chain                                           queue 1
//! ```
//!
//! What is typed goes here once the driver has given a buffer for it, and until it is reset or has broken a rule; else to the serial port. Once
//! taken it is the VM's, and moves with it until the driver has it. A driver that gives no further buffers fills the input, and then nothing more
//! is taken, as at the serial port: bytes change from one port to the other only where a driver comes or goes.
//!
//! What is written goes into the scroll-back at once, a chain as a whole and before it is given back; so over a pause it is there, or the chain is
//! still the driver's.

pub mod input;

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard};

use drover_proto::{Code, Fault};
use tracing::error;
use vmm_sys_util::eventfd::EventFd;

use self::input::{INPUT_BYTES_MAX, Input};
use super::buffers::Cursor;
use super::queue::{Broken, Chain, total};
use super::{Device, Incoming, Inlet};
use crate::devices::console::{Console, SCROLLBACK_BYTES};
use crate::devices::gate::Begun;
use crate::devices::saved::{SavedConsole, SavedDevice};
use crate::fd;
use crate::memory::Mapped;

const ID: u16 = 3;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const QUEUES: [u16; 2] = [64, 64];
/// Bytes of one chain that is written: a page in each descriptor of its queue, and no more than is kept of them.
const WRITE_BYTES_MAX: usize = SCROLLBACK_BYTES;

struct State {
    input: Input,
    /// So many of the oldest bytes are in a chain that is not the driver's yet: should it reset the device first, they wait for the next.
    given: usize,
    /// The bell is readable.
    rung: bool,
}

/// The device.
pub struct Port {
    console: Arc<Console>,
    /// Held for moments, never while guest memory is read or written: whoever types does not wait for a page.
    state: Mutex<State>,
    /// Readable exactly while something that was typed waits.
    bell: EventFd,
}

impl Port {
    /// A port of `console`.
    pub fn new(console: Arc<Console>) -> Result<Self, Fault> {
        let bell = EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK);
        let failed = |error| Fault::new(Code::VmmStartFailed, format!("a console's bell: {error}"));
        Ok(Self {
            console,
            state: Mutex::new(State {
                input: Input::default(),
                given: 0,
                rung: false,
            }),
            bell: bell.map_err(failed)?,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of a console's lock panics")
    }

    /// Makes the bell say whether something waits.
    fn tell(&self, state: &mut State) {
        let waits = !state.input.is_empty();
        if waits == state.rung {
            return;
        }
        let told = if waits {
            self.bell.write(1)
        } else {
            self.bell.read().map(drop)
        };
        match told {
            Ok(()) => state.rung = waits,
            Err(error) => error!(%error, "a console's bell cannot be changed: what is typed comes late"),
        }
    }

    /// Types `bytes`; returns how many fitted. None: no driver takes any.
    pub fn type_in(&self, bytes: &[u8]) -> Option<usize> {
        let mut state = self.state();
        let taken = state.input.type_in(bytes);
        self.tell(&mut state);
        taken
    }

    fn received(&self, chain: &Chain, memory: &Mapped) -> Result<u32, Broken> {
        let mut cursor = Cursor::new(memory, &chain.writable);
        let room = usize::try_from(cursor.left()).map_or(INPUT_BYTES_MAX, |left| left.min(INPUT_BYTES_MAX));
        // Bytes are only added meanwhile: the worker, which is here, alone gives them away.
        let bytes = self.state().input.oldest(room);
        cursor.write(&bytes)?;
        self.state().given = bytes.len();
        Ok(u32::try_from(bytes.len()).expect("bounded"))
    }

    fn written(&self, chain: &Chain, memory: &Mapped) -> Result<(), Broken> {
        let len = total(&chain.readable);
        let fits = usize::try_from(len).ok().filter(|&len| len <= WRITE_BYTES_MAX);
        let (Some(len), true) = (fits, chain.writable.is_empty()) else {
            return Err(Broken(format!(
                "{len} bytes for a console, and {} to be written: at most {WRITE_BYTES_MAX} to be read are due",
                total(&chain.writable)
            )));
        };
        let mut bytes = vec![0; len];
        Cursor::new(memory, &chain.readable).read(&mut bytes)?;
        self.console.append(&bytes);
        Ok(())
    }
}

impl Inlet for Port {
    fn queue(&self) -> usize {
        RECEIVE
    }

    fn next(&self, _features: u64) -> Option<Incoming> {
        let mut state = self.state();
        // It is asked for only where a driver that is ready has given a buffer.
        state.input.heard();
        (!state.input.is_empty()).then_some(Incoming {
            bytes: 1,
            several: false,
        })
    }

    /// Never: a chain without a reason to break the device holds a byte.
    fn refuse(&self) {}

    fn source(&self) -> BorrowedFd<'_> {
        fd::lend(&self.bell)
    }
}

impl Device for Port {
    fn id(&self) -> u16 {
        ID
    }

    fn class(&self) -> [u8; 3] {
        [7, 0x80, 0]
    }

    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> &'static [u16] {
        &QUEUES
    }

    fn read_config(&self, _offset: usize, _data: &mut [u8]) {}

    fn serve(
        &self,
        queue: usize,
        chain: &Chain,
        memory: &Mapped,
        _features: u64,
        _begun: &Begun<'_>,
    ) -> Result<u32, Broken> {
        match queue {
            RECEIVE => self.received(chain, memory),
            TRANSMIT => self.written(chain, memory).map(|()| 0),
            _ => Err(Broken(format!("queue {queue} of a console"))),
        }
    }

    fn pushed(&self, queue: usize) {
        if queue == RECEIVE {
            let mut state = self.state();
            let given = std::mem::take(&mut state.given);
            state.input.give(given);
            self.tell(&mut state);
        }
    }

    fn reset(&self) {
        let mut state = self.state();
        state.given = 0;
        state.input.forget_driver();
    }

    fn inlet(&self) -> Option<&dyn Inlet> {
        Some(self)
    }

    fn save(&self) -> SavedDevice {
        let state = self.state();
        SavedDevice::Console(SavedConsole {
            input: state.input.oldest(INPUT_BYTES_MAX),
            hears: state.input.hears(),
        })
    }

    fn restore(&self, saved: &SavedDevice) -> Result<(), String> {
        let SavedDevice::Console(saved) = saved else {
            return Err("the saved device is no console, this VM has one there".to_owned());
        };
        let mut state = self.state();
        state.input = Input::saved(&saved.input, saved.hears)?;
        self.tell(&mut state);
        Ok(())
    }
}
