//! A NIC (5.1) on a tap.
//!
//! | file | what |
//! | --- | --- |
//! | `mod.rs` | the device: what it offers, its configuration, its three queues |
//! | `header.rs` | the header before each frame: what of it may pass (pure) |
//! | `tap.rs` | the tap: opened while the VM may run, frames, offloads |
//! | `announce.rs` | telling the network where the VM is, after a start and after a move |
//!
//! ```text
//!   tap ──► one frame held ──► chains with room for it        queue 0
//!   tap ◄── one frame ◄── chain                               queue 1
//!           answer ◄── command                                queue 2
//! ```
//!
//! A frame is taken from the tap only when the driver has made chains available and the VM may run. From then on it is part of the VM: where the
//! chains have no room yet it is held, and moves with the VM. What lies in the tap's own queue stays at its host, and is lost with it, as frames
//! on a wire are. A frame leaves only before the deadline of the lease, however long its chain took to read.

pub mod announce;
mod header;
pub mod tap;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use self::header::HEADER_BYTES;
use super::buffers::Cursor;
use super::queue::{Broken, Chain, QUEUE_SIZE_MAX, total};
use super::{Device, Incoming, Inlet};
use crate::devices::complaints::complain;
use crate::devices::gate::Begun;
use crate::devices::saved::{SavedDevice, SavedNet};
use crate::memory::Mapped;

const ID: u16 = 1;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const CONTROL: usize = 2;
const QUEUES: [u16; 3] = [QUEUE_SIZE_MAX, QUEUE_SIZE_MAX, 64];

/// The host completes checksums.
pub const F_CSUM: u64 = 1;
/// The driver takes frames whose checksum is to be completed.
pub const F_GUEST_CSUM: u64 = 1 << 1;
const F_MTU: u64 = 1 << 3;
const F_MAC: u64 = 1 << 5;
/// The driver takes TCP segments larger than the MTU.
pub const F_GUEST_TSO4: u64 = 1 << 7;
/// The same of IPv6.
pub const F_GUEST_TSO6: u64 = 1 << 8;
/// The host cuts TCP segments up.
pub const F_HOST_TSO4: u64 = 1 << 11;
/// The same of IPv6.
pub const F_HOST_TSO6: u64 = 1 << 12;
/// A frame may lie in several chains.
pub const F_MRG_RXBUF: u64 = 1 << 15;
const F_STATUS: u64 = 1 << 16;
const F_CTRL_VQ: u64 = 1 << 17;
/// The driver tells the network where it is when it is asked to.
pub const F_GUEST_ANNOUNCE: u64 = 1 << 21;

const STATUS_LINK_UP: u16 = 1;
const STATUS_ANNOUNCE: u16 = 2;
const CONFIG_BYTES: usize = 12;

/// Commands: class and number, and their answers (5.1.6.5).
const ANNOUNCE_ACK: [u8; 2] = [3, 0];
const ANSWER_OK: u8 = 0;
const ANSWER_ERROR: u8 = 1;

/// Most bytes of a frame with its header: 64 KiB of IP in Ethernet with a VLAN tag.
pub const FRAME_BYTES_MAX: usize = HEADER_BYTES + 18 + 65_535;
/// Frames in a row that the driver cannot take and that are passed over at once.
const PASSED_MAX: usize = 64;

/// A MAC address.
pub type Mac = [u8; 6];

/// Where frames go and come from.
pub trait Link: Send + Sync + 'static {
    /// The next frame with its header; `WouldBlock`: there is none now.
    fn receive(&self, into: &mut [u8]) -> io::Result<usize>;
    /// Sends a frame with its header, at once or not at all.
    fn send(&self, frame: &[u8]) -> io::Result<()>;
    /// The driver takes frames with these `TUN_F_…` properties from now on.
    fn set_offloads(&self, offloads: u32) -> io::Result<()>;
    /// Readable when there may be a frame.
    fn readable(&self) -> BorrowedFd<'_>;
}

struct State {
    /// A frame that was taken from the link and is in no chain yet: its bytes, or none.
    held: Vec<u8>,
    /// Where frames are read to and sent from.
    buffer: Box<[u8; FRAME_BYTES_MAX]>,
    /// The features that the link was told of.
    told: Option<u64>,
}

/// The device.
pub struct Net {
    link: Arc<dyn Link>,
    mac: Mac,
    mtu: u16,
    /// Held by the worker while it reads and writes guest memory, where it may have to wait for a page.
    state: Mutex<State>,
    /// The driver is asked to tell the network where it is.
    announce: AtomicBool,
}

impl Net {
    /// The device with address `mac` on `link`, which carries packets of at most `mtu` bytes.
    pub fn new(link: Arc<dyn Link>, mac: Mac, mtu: u16) -> Self {
        Self {
            link,
            mac,
            mtu,
            state: Mutex::new(State {
                held: Vec::with_capacity(FRAME_BYTES_MAX),
                buffer: Box::new([0; FRAME_BYTES_MAX]),
                told: None,
            }),
            announce: AtomicBool::new(false),
        }
    }

    /// Its address.
    pub fn mac(&self) -> Mac {
        self.mac
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of a NIC's lock panics")
    }

    /// The driver reads, from now until it says that it has, that it is to tell the network where it is.
    pub fn ask_to_announce(&self) {
        self.announce.store(true, Ordering::Release);
    }

    /// Sends a frame of the VMM's own, without its header.
    pub fn send_own(&self, frame: &[u8]) -> io::Result<()> {
        self.link.send(&[&[0; HEADER_BYTES], frame].concat())
    }

    /// Tells the link what the driver has accepted. A held frame that it cannot take is dropped.
    fn tell(&self, state: &mut State, features: u64) {
        if state.told == Some(features) {
            return;
        }
        state.told = Some(features);
        let mut offloads = 0;
        if features & F_GUEST_CSUM != 0 {
            offloads |= libc::TUN_F_CSUM;
            for (feature, offload) in [(F_GUEST_TSO4, libc::TUN_F_TSO4), (F_GUEST_TSO6, libc::TUN_F_TSO6)] {
                offloads |= if features & feature != 0 { offload } else { 0 };
            }
        }
        if let Err(error) = self.link.set_offloads(offloads) {
            complain(|| format!("a tap's offloads cannot be set: {error}"));
        }
        let kept = state
            .held
            .first_chunk_mut()
            .is_some_and(|header| header::receive(header, features));
        if !kept {
            state.held.clear();
        }
    }

    fn received(&self, chain: &Chain, memory: &Mapped, features: u64) -> Result<u32, Broken> {
        let mut state = self.state();
        let chains = if features & F_MRG_RXBUF != 0 {
            u16::try_from(chain.heads.len()).expect("no more than the queue has")
        } else {
            1
        };
        header::set_chains(&mut state.held, chains);
        Cursor::new(memory, &chain.writable).write(&state.held)?;
        let written = u32::try_from(state.held.len()).expect("a frame");
        state.held.clear();
        Ok(written)
    }

    fn transmit(
        &self,
        chain: &Chain,
        memory: &Mapped,
        features: u64,
        begun: &Begun<'_>,
    ) -> Result<(), Broken> {
        let len = total(&chain.readable);
        if !chain.writable.is_empty() || len < HEADER_BYTES as u64 {
            return Err(Broken(format!(
                "a frame to be sent of {len} bytes with its header"
            )));
        }
        let mut state = self.state();
        let frame = usize::try_from(len)
            .ok()
            .and_then(|len| state.buffer.get_mut(..len));
        let Some(frame) = frame else {
            complain(|| format!("the guest's frame of {len} bytes is too large"));
            return Ok(());
        };
        Cursor::new(memory, &chain.readable).read(frame)?;
        let header = frame.first_chunk_mut().expect("a header at least");
        if !header::transmit(header, features) {
            complain(|| format!("the guest's frame asks for what was not agreed: {header:?}"));
            return Ok(());
        }
        // Reading it may have taken long: a page may have come from another host.
        if begun.in_time()
            && let Err(error) = self.link.send(frame)
        {
            complain(|| format!("a frame of the guest's is not sent: {error}"));
        }
        Ok(())
    }

    fn command(&self, chain: &Chain, memory: &Mapped, features: u64) -> Result<u32, Broken> {
        let mut command = [0; 2];
        Cursor::new(memory, &chain.readable).read(&mut command)?;
        let answer = if command == ANNOUNCE_ACK && features & F_GUEST_ANNOUNCE != 0 {
            self.announce.store(false, Ordering::Release);
            ANSWER_OK
        } else {
            ANSWER_ERROR
        };
        Cursor::new(memory, &chain.writable).write(&[answer])?;
        Ok(1)
    }

    fn config(&self) -> [u8; CONFIG_BYTES] {
        let announce = if self.announce.load(Ordering::Acquire) {
            STATUS_ANNOUNCE
        } else {
            0
        };
        let mut config = [0; CONFIG_BYTES];
        config[..6].copy_from_slice(&self.mac);
        config[6..8].copy_from_slice(&(STATUS_LINK_UP | announce).to_le_bytes());
        // One pair of queues.
        config[8] = 1;
        config[10..].copy_from_slice(&self.mtu.to_le_bytes());
        config
    }
}

impl Inlet for Net {
    fn queue(&self) -> usize {
        RECEIVE
    }

    fn next(&self, features: u64) -> Option<Incoming> {
        let mut state = self.state();
        let state = &mut *state;
        self.tell(state, features);
        for _ in 0..PASSED_MAX {
            if !state.held.is_empty() {
                break;
            }
            match self.link.receive(&mut *state.buffer) {
                Ok(len) => {
                    let frame = &mut state.buffer[..len];
                    if frame
                        .first_chunk_mut()
                        .is_some_and(|header| header::receive(header, features))
                    {
                        state.held.extend_from_slice(frame);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    if error.kind() != io::ErrorKind::WouldBlock {
                        complain(|| format!("a tap cannot be read: {error}"));
                    }
                    return None;
                }
            }
        }
        (!state.held.is_empty()).then_some(Incoming {
            bytes: state.held.len() as u64,
            several: features & F_MRG_RXBUF != 0,
        })
    }

    fn refuse(&self) {
        let mut state = self.state();
        let bytes = state.held.len();
        state.held.clear();
        complain(|| format!("the guest has no room for a frame of {bytes} bytes with its header"));
    }

    fn source(&self) -> BorrowedFd<'_> {
        self.link.readable()
    }
}

impl Device for Net {
    fn id(&self) -> u16 {
        ID
    }

    fn class(&self) -> [u8; 3] {
        [2, 0, 0]
    }

    fn features(&self) -> u64 {
        F_CSUM
            | F_GUEST_CSUM
            | F_MTU
            | F_MAC
            | F_GUEST_TSO4
            | F_GUEST_TSO6
            | F_HOST_TSO4
            | F_HOST_TSO6
            | F_MRG_RXBUF
            | F_STATUS
            | F_CTRL_VQ
            | F_GUEST_ANNOUNCE
    }

    fn queues(&self) -> &'static [u16] {
        &QUEUES
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let config = self.config();
        for (at, byte) in (offset..).zip(data) {
            *byte = config.get(at).copied().unwrap_or(0);
        }
    }

    fn serve(
        &self,
        queue: usize,
        chain: &Chain,
        memory: &Mapped,
        features: u64,
        begun: &Begun<'_>,
    ) -> Result<u32, Broken> {
        match queue {
            RECEIVE => self.received(chain, memory, features),
            TRANSMIT => self.transmit(chain, memory, features, begun).map(|()| 0),
            CONTROL => self.command(chain, memory, features),
            _ => Err(Broken(format!("queue {queue} of a NIC"))),
        }
    }

    fn reset(&self) {
        self.state().held.clear();
        self.announce.store(false, Ordering::Release);
    }

    fn inlet(&self) -> Option<&dyn Inlet> {
        Some(self)
    }

    fn save(&self) -> SavedDevice {
        SavedDevice::Net(SavedNet {
            mac: self.mac,
            mtu: self.mtu,
            held: self.state().held.clone(),
        })
    }

    fn restore(&self, saved: &SavedDevice) -> Result<(), String> {
        match saved {
            SavedDevice::Net(net) if (net.mac, net.mtu) == (self.mac, self.mtu) => {
                self.state().held.clone_from(&net.held);
                Ok(())
            }
            SavedDevice::Net(net) => Err(format!(
                "the saved NIC has address {} and MTU {}, this VM has {} and {} there",
                text(net.mac),
                net.mtu,
                text(self.mac),
                self.mtu
            )),
            _ => Err("the saved device is no NIC, this VM has one there".to_owned()),
        }
    }
}

/// A MAC address as it is written.
pub fn text(mac: Mac) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// The MAC address that is written so: six bytes in hexadecimal, between colons.
pub fn parse(text: &str) -> Option<Mac> {
    let mut mac = Mac::default();
    let mut words = text.split(':');
    for byte in &mut mac {
        let word = words.next().filter(|word| word.len() == 2)?;
        *byte = word
            .bytes()
            .all(|digit| digit.is_ascii_hexdigit())
            .then(|| u8::from_str_radix(word, 16).ok())??;
    }
    words.next().is_none().then_some(mac)
}
