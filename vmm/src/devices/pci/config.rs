//! A device's configuration space: 256 bytes of which the guest may change some bits. Pure.
//!
//! Source: PCI Local Bus Specification 3.0, chapter 6. What may be changed is a mask beside the bytes, so nothing else ever changes,
//! whatever the guest writes, in whatever width. The mask also answers the question how large a region is: of a base address that is
//! written as all ones those bits remain that the guest may choose.

use super::MMIO;

/// Bytes of it.
pub const CONFIG_BYTES: usize = 256;
/// Base address registers of a device.
pub const BARS: usize = 6;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR_0: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;

/// Memory space is decoded.
const COMMAND_MEMORY: u8 = 1 << 1;
/// The device may write to memory.
const COMMAND_MASTER: u8 = 1 << 2;
/// No interrupt pin is driven (bit 10).
const COMMAND_NO_PIN: u8 = 1 << 2;
const STATUS_HAS_CAPABILITIES: u8 = 1 << 4;

/// What a device says it is.
#[derive(Clone, Copy, Debug)]
pub struct Ident {
    /// Vendor and device.
    pub id: (u16, u16),
    /// Base class, subclass, programming interface.
    pub class: [u8; 3],
    /// Revision.
    pub revision: u8,
    /// Vendor and device of the subsystem.
    pub subsystem: (u16, u16),
}

/// The configuration space of one device.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; CONFIG_BYTES],
    writable: [u8; CONFIG_BYTES],
    bar_bytes: [u32; BARS],
    last_capability: usize,
    free: usize,
}

impl ConfigSpace {
    /// A space without regions or capabilities.
    pub fn new(ident: Ident) -> Self {
        let mut space = Self {
            bytes: [0; CONFIG_BYTES],
            writable: [0; CONFIG_BYTES],
            bar_bytes: [0; BARS],
            last_capability: CAPABILITIES,
            free: FIRST_CAPABILITY,
        };
        space.put(0x00, &ident.id.0.to_le_bytes());
        space.put(0x02, &ident.id.1.to_le_bytes());
        let [base, sub, interface] = ident.class;
        space.put(0x08, &[ident.revision, interface, sub, base]);
        space.put(0x2c, &ident.subsystem.0.to_le_bytes());
        space.put(0x2e, &ident.subsystem.1.to_le_bytes());
        space.writable[COMMAND] = COMMAND_MEMORY | COMMAND_MASTER;
        space.writable[COMMAND + 1] = COMMAND_NO_PIN;
        // Cache line size and interrupt line: storage for the guest's own notes.
        space.writable[0x0c] = 0xff;
        space.writable[0x3c] = 0xff;
        space
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Adds region `bar` of `bytes` (a power of two, 4 KiB and more) that lies at `gpa` until the guest moves it.
    pub fn add_bar(&mut self, bar: usize, bytes: u32, gpa: u32) {
        assert!(
            bytes.is_power_of_two() && bytes >= 0x1000 && gpa.is_multiple_of(bytes),
            "a region of whole pages, placed by its size"
        );
        let at = BAR_0 + 4 * bar;
        self.bar_bytes[bar] = bytes;
        self.put(at, &gpa.to_le_bytes());
        self.writable[at..at + 4].copy_from_slice(&(!(bytes - 1)).to_le_bytes());
    }

    /// Adds a capability after those before; returns where it stands. `body` follows the capability's two bytes of header, and the guest
    /// may change what is set in `writable`.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let at = self.free;
        self.free = (at + 2 + body.len()).next_multiple_of(4);
        assert!(
            self.free <= CONFIG_BYTES && writable.len() <= body.len(),
            "the capabilities fit"
        );
        self.bytes[STATUS] |= STATUS_HAS_CAPABILITIES;
        self.bytes[self.last_capability] = u8::try_from(at).expect("within 256 bytes");
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.writable[at + 2..at + 2 + writable.len()].copy_from_slice(writable);
        self.last_capability = at + 1;
        at
    }

    /// Reads from `offset` on; beyond the end stands nothing.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = self.bytes.get(at).copied().unwrap_or(0xff);
        }
    }

    /// Writes what may be changed of it.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for (at, byte) in (offset..).zip(data) {
            if let (Some(old), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *old = *old & !mask | byte & mask;
            }
        }
    }

    /// 32 bits at `offset`.
    pub fn word(&self, offset: usize) -> u32 {
        let mut word = [0; 4];
        self.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    /// Where region `bar` lies, if it is decoded: the guest has switched memory space on and placed all of it in [`MMIO`].
    pub fn bar(&self, bar: usize) -> Option<u64> {
        let bytes = u64::from(*self.bar_bytes.get(bar)?);
        let gpa = u64::from(self.word(BAR_0 + 4 * bar)) & !0xf;
        let placed = bytes > 0 && gpa >= MMIO.start && gpa + bytes <= MMIO.end;
        (placed && self.bytes[COMMAND] & COMMAND_MEMORY != 0).then_some(gpa)
    }

    /// The region and the offset in it of an access of `len` bytes at `gpa`.
    pub fn decode(&self, gpa: u64, len: usize) -> Option<(usize, u64)> {
        (0..BARS).find_map(|bar| {
            let offset = gpa.checked_sub(self.bar(bar)?)?;
            let end = offset.checked_add(len as u64)?;
            (end <= u64::from(self.bar_bytes[bar])).then_some((bar, offset))
        })
    }

    /// Whether the device may read and write memory, and send messages.
    pub fn is_master(&self) -> bool {
        self.bytes[COMMAND] & COMMAND_MASTER != 0
    }

    /// All bytes, as they are saved.
    pub fn save(&self) -> Vec<u8> {
        self.bytes.to_vec()
    }

    /// Takes over saved bytes. Those that no guest can change must be this device's.
    pub fn restore(&mut self, saved: &[u8]) -> Result<(), String> {
        if saved.len() != CONFIG_BYTES {
            return Err(format!(
                "a configuration space of {} bytes, must have {CONFIG_BYTES}",
                saved.len()
            ));
        }
        let fixed = |bytes: &[u8], at: usize| bytes[at] & !self.writable[at];
        if let Some(at) = (0..CONFIG_BYTES).find(|&at| fixed(saved, at) != fixed(&self.bytes, at)) {
            return Err(format!(
                "the configuration space is another device's: byte {at:#x} is {:#04x} there and {:#04x} here",
                saved[at], self.bytes[at]
            ));
        }
        self.bytes.copy_from_slice(saved);
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::memory::layout;

    pub(crate) const IDENT: Ident = Ident {
        id: (0x1af4, 0x1042),
        class: [1, 0, 0],
        revision: 1,
        subsystem: (0x1af4, 2),
    };

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(IDENT);
        space.add_bar(0, 0x8000, 0xc000_0000);
        space.add_bar(2, 0x1000, 0xc001_0000);
        space.add_capability(0x11, &[1, 0, 0, 0x40, 0, 0, 0, 0x50, 0, 0], &[0, 0xc0]);
        space.add_capability(9, &[20, 0, 0, 0], &[0, 0, 0xff]);
        space
    }

    #[test]
    fn a_region_tells_its_size_and_moves_only_within_the_window() {
        let mut space = space();
        assert_eq!(space.bar(0), None, "decoded before it was switched on");
        space.write(COMMAND, &[0xff, 0xff]);
        assert_eq!(space.bar(0), Some(0xc000_0000));
        space.write(BAR_0, &[0xff; 4]);
        assert_eq!(space.word(BAR_0), 0xffff_8000);
        assert_eq!(space.bar(0), None, "beyond the window");
        space.write(BAR_0, &0xdfff_8000u32.to_le_bytes());
        assert_eq!(space.decode(0xdfff_fffc, 4), Some((0, 0x7ffc)));
        assert_eq!(space.decode(0xdfff_fffd, 4), None, "half of it beyond the region");
        space.write(BAR_0, &0x10_0000u32.to_le_bytes());
        assert_eq!(space.bar(0), None, "on memory");
        space.write(BAR_0 + 4, &[0xff; 4]);
        assert_eq!(space.word(BAR_0 + 4), 0, "a region that does not exist");
    }

    #[test]
    fn capabilities_form_a_list_that_ends() {
        let space = space();
        let (mut at, mut found) = (space.word(CAPABILITIES) as usize & 0xff, vec![]);
        while at != 0 {
            let word = space.word(at);
            found.push(word & 0xff);
            at = word as usize >> 8 & 0xff;
        }
        assert_eq!(found, [0x11, 9]);
        assert_eq!(space.word(COMMAND) >> 16, 0x10);
    }

    #[test]
    fn only_the_bytes_of_the_same_device_are_taken_over() {
        let mut source = space();
        source.write(0, &[0xa5; CONFIG_BYTES]);
        let mut target = space();
        target.restore(&source.save()).unwrap();
        assert_eq!(target.save(), source.save());
        let mut other = source.save();
        other[2] ^= 1;
        assert!(space().restore(&other).unwrap_err().contains("0x2"));
        assert!(space().restore(&other[1..]).unwrap_err().contains("255"));
    }

    proptest! {
        #[test]
        fn whatever_is_written_fixed_bits_stay_and_no_region_lies_on_memory(
            accesses in proptest::collection::vec((0usize..300, proptest::collection::vec(any::<u8>(), 0..9), any::<bool>()), 1..60),
            gib in 1u64..8,
        ) {
            let (mut space, fresh) = (space(), space());
            for (offset, bytes, read) in accesses {
                if read {
                    space.read(offset, &mut vec![0; bytes.len()]);
                } else {
                    space.write(offset, &bytes);
                }
                for at in 0..CONFIG_BYTES {
                    prop_assert_eq!((space.bytes[at] ^ fresh.bytes[at]) & !space.writable[at], 0);
                }
                for bar in 0..BARS {
                    let Some(gpa) = space.bar(bar) else { continue };
                    let end = gpa + u64::from(space.bar_bytes[bar]);
                    prop_assert!(layout(gib << 30).iter().all(|region| end <= region.gpa || gpa >= region.gpa + region.len));
                    prop_assert_eq!(space.decode(gpa, 1).map(|(_, offset)| offset), Some(0));
                }
            }
        }
    }
}
