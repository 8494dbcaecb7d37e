//! A chain's buffers as one run of bytes, however the driver has cut it (2.7.4.1: no device may rely on that).

use vm_memory::{Bytes, GuestAddress};

use super::queue::{Broken, Buffer, total};
use crate::memory::Mapped;

/// A place in a run of buffers.
#[derive(Clone, Debug)]
pub struct Cursor<'a> {
    memory: &'a Mapped,
    buffers: &'a [Buffer],
    /// Bytes of the first buffer that are behind the place.
    used: u32,
    left: u64,
}

impl<'a> Cursor<'a> {
    /// The beginning of `buffers`.
    pub fn new(memory: &'a Mapped, buffers: &'a [Buffer]) -> Self {
        Self {
            memory,
            buffers,
            used: 0,
            left: total(buffers),
        }
    }

    /// Bytes after this place.
    pub fn left(&self) -> u64 {
        self.left
    }

    /// Passes over `count` bytes, at most all.
    pub fn skip(&mut self, mut count: u64) {
        while let Some((_, len)) = self.piece(count) {
            self.advance(len);
            count -= len as u64;
        }
    }

    /// The next piece in one buffer, of at most `max` bytes: where it is and its length. None: there is none, or `max` is 0.
    fn piece(&self, max: u64) -> Option<(GuestAddress, usize)> {
        let buffer = self.buffers.first()?;
        let len = u64::from(buffer.len - self.used).min(max);
        let len = usize::try_from(len).ok().filter(|&len| len > 0)?;
        Some((GuestAddress(buffer.gpa + u64::from(self.used)), len))
    }

    fn advance(&mut self, len: usize) {
        self.left -= len as u64;
        self.used += u32::try_from(len).expect("a piece of a buffer");
        if self.buffers.first().is_some_and(|buffer| buffer.len == self.used) {
            (self.buffers, self.used) = (&self.buffers[1..], 0);
        }
    }

    /// Reads exactly `out.len()` bytes.
    pub fn read(&mut self, mut out: &mut [u8]) -> Result<(), Broken> {
        while !out.is_empty() {
            let (at, len) = self.piece(out.len() as u64).ok_or_else(|| short(out.len()))?;
            let (now, later) = out.split_at_mut(len);
            self.memory.read_slice(now, at).map_err(gone)?;
            self.advance(len);
            out = later;
        }
        Ok(())
    }

    /// Writes all of `data`.
    pub fn write(&mut self, mut data: &[u8]) -> Result<(), Broken> {
        while !data.is_empty() {
            let (at, len) = self.piece(data.len() as u64).ok_or_else(|| short(data.len()))?;
            let (now, later) = data.split_at(len);
            self.memory.write_slice(now, at).map_err(gone)?;
            self.advance(len);
            data = later;
        }
        Ok(())
    }
}

fn short(missing: usize) -> Broken {
    Broken(format!("a request is {missing} bytes short"))
}

fn gone(error: vm_memory::GuestMemoryError) -> Broken {
    Broken(format!("a request's buffer: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Memory;

    #[test]
    fn bytes_are_one_run_however_they_are_cut() {
        let memory = Memory::new(1 << 20, false).unwrap();
        let buffers = [(0x1000, 3), (0x3000, 1), (0x2000, 4)].map(|(gpa, len)| Buffer { gpa, len });
        let mut cursor = Cursor::new(memory.mapped(), &buffers);
        cursor.write(b"abcdefgh").unwrap();
        assert_eq!(cursor.left(), 0);
        assert!(cursor.write(b"i").is_err());
        let mut cursor = Cursor::new(memory.mapped(), &buffers);
        cursor.skip(2);
        let mut out = [0; 4];
        cursor.read(&mut out).unwrap();
        assert_eq!((&out, cursor.left()), (b"cdef", 2));
        assert!(cursor.clone().read(&mut [0; 3]).is_err());
        cursor.skip(100);
        assert_eq!(cursor.left(), 0);
    }
}
