//! MSI-X: a device's interrupts as messages, each with an address and a value that the guest chose. Pure.
//!
//! Source: PCI Local Bus Specification 3.0, 6.8.2. A message that may not be sent now is remembered as pending and sent when it may.

/// Bytes of a table entry: address, value, control.
pub const ENTRY_BYTES: usize = 16;
/// The capability's id.
pub const CAPABILITY: u8 = 0x11;
/// Most vectors of a device here: a page of table.
pub const VECTORS_MAX: usize = 4096 / ENTRY_BYTES;

const CONTROL: usize = 12;
const MASKED: u8 = 1;
const ENABLE: u16 = 1 << 15;
const MASK_ALL: u16 = 1 << 14;

/// A message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Message {
    /// Where it is written.
    pub address: u64,
    /// What is written.
    pub data: u32,
}

/// The table, the pending bits and the two switches of the capability.
#[derive(Clone, Debug)]
pub struct Msix {
    table: Vec<u8>,
    pending: Vec<bool>,
    control: u16,
}

impl Msix {
    /// `vectors` vectors, masked all, as after a reset.
    pub fn new(vectors: usize) -> Self {
        assert!((1..=VECTORS_MAX).contains(&vectors), "vectors fit the table");
        let mut msix = Self {
            table: vec![0; vectors * ENTRY_BYTES],
            pending: vec![false; vectors],
            control: 0,
        };
        for entry in msix.table.chunks_mut(ENTRY_BYTES) {
            entry[CONTROL] = MASKED;
        }
        msix
    }

    /// Number of vectors.
    pub fn vectors(&self) -> usize {
        self.pending.len()
    }

    /// The capability's body, and which bits of it the guest may change: the table at `table` and the pending bits at `pending`, both
    /// offsets in region `bar`.
    pub fn capability(&self, bar: u8, table: u32, pending: u32) -> ([u8; 10], [u8; 2]) {
        let size = u16::try_from(self.vectors() - 1).expect("vectors fit the table");
        let mut body = [0; 10];
        body[..2].copy_from_slice(&size.to_le_bytes());
        body[2..6].copy_from_slice(&(table | u32::from(bar)).to_le_bytes());
        body[6..].copy_from_slice(&(pending | u32::from(bar)).to_le_bytes());
        (body, (ENABLE | MASK_ALL).to_le_bytes())
    }

    /// The capability's control word, as the guest has written it.
    pub fn set_control(&mut self, control: u16) {
        self.control = control & (ENABLE | MASK_ALL);
    }

    /// The guest reads the table.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = index(at).and_then(|at| self.table.get(at)).copied().unwrap_or(0);
        }
    }

    /// The guest writes the table. Of the control word only the mask can change.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        for (at, &byte) in (offset..).zip(data) {
            let Some(at) = index(at).filter(|&at| at < self.table.len()) else {
                continue;
            };
            self.table[at] = match at % ENTRY_BYTES {
                CONTROL => byte & MASKED,
                within if within > CONTROL => 0,
                _ => byte,
            };
        }
    }

    /// The guest reads the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            let bit = |n: usize| {
                let vector = index(at)?.checked_mul(8)?.checked_add(n)?;
                self.pending.get(vector).copied()
            };
            *byte = (0..8).fold(0, |all, n| all | u8::from(bit(n).unwrap_or(false)) << n);
        }
    }

    fn entry(&self, vector: usize) -> &[u8] {
        &self.table[vector * ENTRY_BYTES..][..ENTRY_BYTES]
    }

    /// The vector's message, if it may be sent now.
    pub fn message(&self, vector: usize) -> Option<Message> {
        let may = vector < self.vectors()
            && self.control & ENABLE != 0
            && self.control & MASK_ALL == 0
            && self.entry(vector)[CONTROL] & MASKED == 0;
        let field = |at: usize| {
            let mut bytes = [0; 4];
            bytes.copy_from_slice(&self.entry(vector)[at..at + 4]);
            u32::from_le_bytes(bytes)
        };
        may.then(|| Message {
            address: u64::from(field(0)) | u64::from(field(4)) << 32,
            data: field(8),
        })
    }

    /// The device raises a vector. False: it may not be sent now, and is pending, unless there is no such vector or no MSI-X at all.
    pub fn raise(&mut self, vector: usize) -> bool {
        let now = self.message(vector).is_some();
        if !now
            && self.control & ENABLE != 0
            && let Some(pending) = self.pending.get_mut(vector)
        {
            *pending = true;
        }
        now
    }

    /// The vectors that were pending and may be sent now; they are pending no more.
    pub fn take_due(&mut self) -> Vec<usize> {
        let due: Vec<usize> = (0..self.vectors())
            .filter(|&vector| self.pending[vector] && self.message(vector).is_some())
            .collect();
        due.iter().for_each(|&vector| self.pending[vector] = false);
        due
    }

    /// Table and pending bits, as they are saved. The control word is saved with the configuration space.
    pub fn save(&self) -> (Vec<u8>, Vec<u8>) {
        let mut pending = vec![0; self.vectors().div_ceil(8)];
        self.read_pending(0, &mut pending);
        (self.table.clone(), pending)
    }

    /// Takes over what was saved.
    pub fn restore(&mut self, table: &[u8], pending: &[u8], control: u16) -> Result<(), String> {
        if table.len() != self.table.len() || pending.len() != self.vectors().div_ceil(8) {
            return Err(format!(
                "an MSI-X table of {} bytes and {} of pending bits, must have {} and {}",
                table.len(),
                pending.len(),
                self.table.len(),
                self.vectors().div_ceil(8)
            ));
        }
        self.write_table(0, table);
        for (vector, is) in self.pending.iter_mut().enumerate() {
            *is = pending[vector / 8] >> (vector % 8) & 1 == 1;
        }
        self.set_control(control);
        Ok(())
    }
}

fn index(at: u64) -> Option<usize> {
    usize::try_from(at).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn programmed() -> Msix {
        let mut msix = Msix::new(3);
        msix.write_table(16, &0xfee0_1000u64.to_le_bytes());
        msix.write_table(24, &0x41u32.to_le_bytes());
        msix
    }

    #[test]
    fn a_masked_vector_is_sent_when_the_last_mask_goes() {
        let mut msix = programmed();
        assert!(!msix.raise(1), "switched off");
        assert_eq!(msix.take_due(), [] as [usize; 0]);
        msix.set_control(ENABLE | MASK_ALL);
        assert!(!msix.raise(1));
        let mut bits = [0; 8];
        msix.read_pending(0, &mut bits);
        assert_eq!(bits[0], 2);
        msix.set_control(ENABLE);
        assert_eq!(msix.take_due(), [] as [usize; 0], "its own mask is still set");
        msix.write_table(28, &[0; 4]);
        let message = Message {
            address: 0xfee0_1000,
            data: 0x41,
        };
        assert_eq!(msix.message(1), Some(message));
        assert_eq!(msix.take_due(), [1]);
        assert_eq!(msix.take_due(), [] as [usize; 0]);
        assert!(msix.raise(1));
    }

    #[test]
    fn a_saved_table_with_its_pending_bits_comes_back() {
        let mut source = programmed();
        source.set_control(ENABLE);
        source.raise(2);
        let (table, pending) = source.save();
        let mut target = Msix::new(3);
        target.restore(&table, &pending, ENABLE).unwrap();
        assert_eq!(target.save(), source.save());
        assert!(Msix::new(4).restore(&table, &pending, 0).is_err());
    }

    proptest! {
        #[test]
        fn no_access_reaches_beyond_the_table(
            accesses in proptest::collection::vec((any::<bool>(), 0u64..100, proptest::collection::vec(any::<u8>(), 0..9)), 1..40),
            far in any::<u64>(),
            vector in 0usize..10,
        ) {
            let mut msix = Msix::new(3);
            msix.set_control(ENABLE);
            for (write, offset, bytes) in accesses {
                if write {
                    msix.write_table(offset, &bytes);
                } else {
                    msix.read_table(offset, &mut vec![0; bytes.len()]);
                    msix.read_pending(offset, &mut vec![0; bytes.len()]);
                }
            }
            msix.write_table(far, &[0]);
            msix.raise(vector);
            prop_assert_eq!(msix.table.len(), 48);
            prop_assert!(msix.table.chunks(16).all(|entry| entry[12] <= 1 && entry[13..] == [0, 0, 0]));
            prop_assert!(msix.take_due().iter().all(|&due| msix.message(due).is_some()));
        }
    }
}
