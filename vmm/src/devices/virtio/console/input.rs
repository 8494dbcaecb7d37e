//! What was typed on a console and is in no buffer of its driver's yet, and whether there is a driver that takes any. Pure.

use std::collections::VecDeque;

/// Bytes that wait for the driver, as many as for the serial port's.
pub const INPUT_BYTES_MAX: usize = 4096;

/// The input of a console.
#[derive(Debug, Default)]
pub struct Input {
    waiting: VecDeque<u8>,
    hears: bool,
}

impl Input {
    /// A saved one's. An error says what is wrong with it.
    pub fn saved(waiting: &[u8], hears: bool) -> Result<Self, String> {
        if waiting.len() > INPUT_BYTES_MAX {
            return Err(format!(
                "a console's input of {} bytes, at most {INPUT_BYTES_MAX} wait for a driver",
                waiting.len()
            ));
        }
        Ok(Self {
            waiting: waiting.iter().copied().collect(),
            hears,
        })
    }

    /// Whether the driver has given buffers for input since it came.
    pub fn hears(&self) -> bool {
        self.hears
    }

    /// The driver has given a buffer.
    pub fn heard(&mut self) {
        self.hears = true;
    }

    /// The driver is gone. What it has not taken waits for the next.
    pub fn forget_driver(&mut self) {
        self.hears = false;
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Takes what fits of `bytes`, and says how many; none without a driver that takes any.
    pub fn type_in(&mut self, bytes: &[u8]) -> Option<usize> {
        if !self.hears {
            return None;
        }
        let room = INPUT_BYTES_MAX - self.waiting.len();
        let taken = &bytes[..bytes.len().min(room)];
        self.waiting.extend(taken);
        Some(taken.len())
    }

    /// The oldest bytes, at most `max`, which stay.
    pub fn oldest(&self, max: usize) -> Vec<u8> {
        self.waiting.iter().take(max).copied().collect()
    }

    /// So many of the oldest bytes are the driver's now.
    pub fn give(&mut self, count: usize) {
        self.waiting.drain(..count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_driver_nothing_is_taken_and_beyond_the_bound_neither() {
        let mut input = Input::default();
        assert_eq!(input.type_in(b"x"), None);
        input.heard();
        assert_eq!(
            input.type_in(&[b'x'; INPUT_BYTES_MAX - 1]),
            Some(INPUT_BYTES_MAX - 1)
        );
        assert_eq!(input.type_in(b"yz"), Some(1));
        assert_eq!(input.type_in(b"z"), Some(0), "full is not the same as deaf");
        input.give(INPUT_BYTES_MAX - 1);
        assert_eq!(input.oldest(9), b"y");
    }

    #[test]
    fn what_a_driver_that_went_has_not_taken_waits_for_the_next() {
        let mut input = Input::default();
        input.heard();
        input.type_in(b"abc");
        input.give(1);
        input.forget_driver();
        assert_eq!(input.type_in(b"d"), None);
        input.heard();
        assert_eq!(input.type_in(b"e"), Some(1));
        assert_eq!(input.oldest(9), b"bce");
    }

    #[test]
    fn a_saved_input_is_bounded() {
        let input = Input::saved(&[b'x'; INPUT_BYTES_MAX], true).unwrap();
        assert!(input.hears() && input.oldest(usize::MAX).len() == INPUT_BYTES_MAX);
        assert!(Input::saved(&[b'x'; INPUT_BYTES_MAX + 1], true).is_err());
    }
}
