//! The frames of a network benchmark: numbered, and filled so that a damaged one is found. Both ends use this module.
//!
//! ```text
//!   to, from, type 0x88b5 (14)   kind (2)   number (8)   filling: words made from the number, to the frame's end
//! ```
//!
//! The type is the one that the IEEE sets aside for local experiments, which no protocol of a host answers.

/// Shortest frame: an Ethernet's, without its checksum.
pub const FRAME_MIN: usize = 60;
/// Longest.
pub const FRAME_MAX: usize = 1514;
/// Frames that a sink takes between two of its answers.
pub const ANSWER_EVERY: u64 = 64;

const TYPE: [u8; 2] = [0x88, 0xb5];
const KIND: usize = 14;
const NUMBER: usize = 16;
const FILLING: usize = 24;

/// What a frame is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// To be counted.
    Data = 1,
    /// Says where frames are to be sent to.
    Hello = 2,
    /// Its number is how many frames have come.
    Count = 3,
}

/// A frame that was understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Who sent it.
    pub from: [u8; 6],
    /// What for.
    pub kind: Kind,
    /// Its number.
    pub number: u64,
    /// Whether it is filled as it was sent.
    pub whole: bool,
}

fn word(number: u64, index: usize) -> u64 {
    number
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .wrapping_add((index as u64).wrapping_mul(0x0101_0101_0101_0101))
}

/// Fills the whole of `frame`, of [`FRAME_MIN`] bytes at least.
pub fn write(frame: &mut [u8], to: [u8; 6], from: [u8; 6], kind: Kind, number: u64) {
    frame[..6].copy_from_slice(&to);
    frame[6..12].copy_from_slice(&from);
    frame[12..14].copy_from_slice(&TYPE);
    frame[KIND..NUMBER].copy_from_slice(&[kind as u8, 0]);
    frame[NUMBER..FILLING].copy_from_slice(&number.to_le_bytes());
    let mut words = frame[FILLING..].chunks_exact_mut(8);
    for (index, bytes) in words.by_ref().enumerate() {
        bytes.copy_from_slice(&word(number, index).to_le_bytes());
    }
    words.into_remainder().fill(0);
}

/// Reads a frame; none: it is another's, or cut.
#[must_use]
pub fn read(frame: &[u8]) -> Option<Seen> {
    if frame.len() < FRAME_MIN || frame[12..14] != TYPE {
        return None;
    }
    let kind = match frame[KIND] {
        1 => Kind::Data,
        2 => Kind::Hello,
        3 => Kind::Count,
        _ => return None,
    };
    let number = u64::from_le_bytes(*frame[NUMBER..].first_chunk()?);
    let differs = frame[FILLING..]
        .chunks_exact(8)
        .enumerate()
        .fold(0, |differs, (index, bytes)| {
            let mut found = [0; 8];
            found.copy_from_slice(bytes);
            differs | (u64::from_le_bytes(found) ^ word(number, index))
        });
    Some(Seen {
        from: *frame[6..].first_chunk()?,
        kind,
        number,
        whole: differs == 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_reads_back_and_any_changed_byte_of_its_filling_is_found() {
        for len in [FRAME_MIN, 61, 1000, FRAME_MAX] {
            let mut frame = [0; FRAME_MAX];
            let frame = &mut frame[..len];
            write(frame, [1; 6], [2; 6], Kind::Data, 77);
            let seen = Seen {
                from: [2; 6],
                kind: Kind::Data,
                number: 77,
                whole: true,
            };
            assert_eq!(read(frame), Some(seen));
            for at in FILLING..len / 8 * 8 {
                frame[at] ^= 4;
                assert!(!read(frame).unwrap().whole, "byte {at} of {len}");
                frame[at] ^= 4;
            }
        }
    }

    #[test]
    fn other_frames_are_left_alone() {
        let mut frame = [0; FRAME_MIN];
        write(&mut frame, [1; 6], [2; 6], Kind::Hello, 0);
        assert!(read(&frame[..FRAME_MIN - 1]).is_none());
        frame[13] = 0;
        assert!(read(&frame).is_none());
        write(&mut frame, [1; 6], [2; 6], Kind::Count, 0);
        frame[KIND] = 9;
        assert!(read(&frame).is_none());
    }
}
