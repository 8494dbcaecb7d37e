//! The source of random numbers (5.4): fills the buffers it is given from the host's own. It has no state.

use drover_proto::{Code, Fault};
use rustix::rand::{GetRandomFlags, getrandom};

use super::Device;
use super::buffers::Cursor;
use super::queue::{Broken, Chain};
use crate::devices::gate::Begun;
use crate::devices::saved::SavedDevice;
use crate::memory::Mapped;

const ID: u16 = 4;
const QUEUES: [u16; 1] = [64];
/// Bytes given at once; a larger buffer is filled in part.
const BYTES_MAX: usize = 4096;

/// The device.
pub struct Rng(());

impl Rng {
    /// The device, once the host's source is ready.
    pub fn new() -> Result<Self, Fault> {
        fill(&mut [0; 8]).map_err(|error| {
            Fault::new(
                Code::VmmStartFailed,
                format!("the host's random numbers: {error}"),
            )
        })?;
        Ok(Self(()))
    }
}

fn fill(bytes: &mut [u8]) -> rustix::io::Result<()> {
    let mut filled = 0;
    while filled < bytes.len() {
        match getrandom(&mut bytes[filled..], GetRandomFlags::empty()) {
            Ok(more) => filled += more,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

impl Device for Rng {
    fn id(&self) -> u16 {
        ID
    }

    fn class(&self) -> [u8; 3] {
        [0xff, 0, 0]
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
        _queue: usize,
        chain: &Chain,
        memory: &Mapped,
        _features: u64,
        _begun: &Begun<'_>,
    ) -> Result<u32, Broken> {
        if !chain.readable.is_empty() || chain.writable.is_empty() {
            return Err(Broken(
                "random numbers into a buffer that is to be read".to_owned(),
            ));
        }
        let mut cursor = Cursor::new(memory, &chain.writable);
        let mut bytes = [0; BYTES_MAX];
        let len = usize::try_from(cursor.left()).map_or(BYTES_MAX, |left| left.min(BYTES_MAX));
        fill(&mut bytes[..len]).map_err(|error| Broken(format!("the host's random numbers: {error}")))?;
        cursor.write(&bytes[..len])?;
        Ok(u32::try_from(len).expect("at most a page"))
    }

    fn save(&self) -> SavedDevice {
        SavedDevice::Rng
    }

    fn restore(&self, saved: &SavedDevice) -> Result<(), String> {
        match saved {
            SavedDevice::Rng => Ok(()),
            SavedDevice::Blk(_) => Err("a disk stands where this VM has its random numbers".to_owned()),
            SavedDevice::Net(_) => Err("a NIC stands where this VM has its random numbers".to_owned()),
            SavedDevice::Balloon(_) => {
                Err("a balloon stands where this VM has its random numbers".to_owned())
            }
            SavedDevice::Console(_) => {
                Err("a console stands where this VM has its random numbers".to_owned())
            }
        }
    }
}
