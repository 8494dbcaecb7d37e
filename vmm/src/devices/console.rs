//! The console's memory: the newest bytes that the guest wrote, with absolute offsets, and readers that wait for more.
//!
//! Offsets count every byte since the VM's cold start, so a reader that reconnects, or follows the VM to another host,
//! goes on where it was, and knows what it missed.

use std::collections::VecDeque;
use std::sync::Mutex;

use tokio::sync::watch;

/// Bytes kept.
pub const SCROLLBACK_BYTES: usize = 256 << 10;

/// The console of one VM.
#[derive(Debug)]
pub struct Console {
    kept: Mutex<VecDeque<u8>>,
    next: watch::Sender<u64>,
}

/// A piece of the console.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The bytes.
    pub data: Vec<u8>,
    /// Absolute offset of the first of them.
    pub offset: u64,
    /// Absolute offset after the last.
    pub next: u64,
}

impl Default for Console {
    fn default() -> Self {
        Self {
            kept: Mutex::default(),
            next: watch::Sender::new(0),
        }
    }
}

impl Console {
    fn kept(&self) -> std::sync::MutexGuard<'_, VecDeque<u8>> {
        self.kept.lock().expect("no holder of the console's lock panics")
    }

    /// Appends what the guest wrote; the oldest bytes give way.
    pub fn append(&self, bytes: &[u8]) {
        let mut kept = self.kept();
        kept.extend(bytes);
        let excess = kept.len().saturating_sub(SCROLLBACK_BYTES);
        kept.drain(..excess);
        self.next.send_modify(|next| *next += bytes.len() as u64);
    }

    /// Absolute offset after the last byte.
    pub fn next(&self) -> u64 {
        *self.next.borrow()
    }

    /// Told of every change of [`Self::next`].
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.next.subscribe()
    }

    /// At most `max` bytes from `offset` on; from the oldest kept byte if that one is gone, from the end if it is not there yet.
    pub fn read(&self, offset: u64, max: usize) -> Piece {
        let kept = self.kept();
        let end = self.next();
        let start = end - kept.len() as u64;
        let offset = offset.clamp(start, end);
        let skip = usize::try_from(offset - start).expect("no more than is kept");
        let data: Vec<u8> = kept.iter().skip(skip).take(max).copied().collect();
        let next = offset + data.len() as u64;
        Piece { data, offset, next }
    }

    /// Everything kept, and the offset after it.
    pub fn save(&self) -> (Vec<u8>, u64) {
        let kept = self.kept();
        (kept.iter().copied().collect(), self.next())
    }

    /// Takes over a saved console. The caller has checked that it is no longer than what is kept here, nor than `next`.
    pub fn restore(&self, scrollback: &[u8], next: u64) {
        let mut kept = self.kept();
        *kept = scrollback.iter().copied().collect();
        self.next.send_replace(next);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_stay_absolute_when_old_bytes_give_way() {
        let console = Console::default();
        for round in 0..3u8 {
            console.append(&vec![b'a' + round; SCROLLBACK_BYTES / 2]);
        }
        assert_eq!(console.next(), 3 * (SCROLLBACK_BYTES / 2) as u64);
        let piece = console.read(0, 4);
        let oldest = (SCROLLBACK_BYTES / 2) as u64;
        assert_eq!(
            piece,
            Piece {
                data: b"bbbb".to_vec(),
                offset: oldest,
                next: oldest + 4
            }
        );
        let last = console.read(console.next() - 2, 100);
        assert_eq!(last.data, b"cc");
        assert_eq!(
            console.read(u64::MAX, 100),
            Piece {
                data: vec![],
                offset: console.next(),
                next: console.next()
            }
        );
    }

    #[test]
    fn a_restored_console_goes_on_at_the_same_offset() {
        let console = Console::default();
        console.restore(b"login: ", 1_000_007);
        console.append(b"root");
        assert_eq!(console.read(1_000_000, 100).data, b"login: root");
        assert_eq!(console.next(), 1_000_011);
    }
}
