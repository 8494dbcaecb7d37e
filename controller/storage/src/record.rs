//! The envelope of a record: format version, CRC, content.
//!
//! ```text
//! byte  0   version of the envelope
//! bytes 1–4 CRC-32 over key and content, little endian: a record found under another key is damaged, too
//! bytes 5…  content
//! ```

use crate::StorageError;

/// Version of the envelope.
const VERSION: u8 = 1;
const HEADER_BYTES: usize = 5;

fn crc(key: &[u8], content: &[u8]) -> [u8; 4] {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(key);
    hasher.update(content);
    hasher.finalize().to_le_bytes()
}

/// The record that stores `content` under `key`.
pub(crate) fn seal(key: &[u8], content: &[u8]) -> Vec<u8> {
    let mut record = Vec::with_capacity(HEADER_BYTES + content.len());
    record.push(VERSION);
    record.extend_from_slice(&crc(key, content));
    record.extend_from_slice(content);
    record
}

/// The content of a record found under `key`.
pub(crate) fn open<'a>(key: &[u8], record: &'a [u8]) -> Result<&'a [u8], StorageError> {
    let damaged = |problem: String| StorageError::Damaged {
        what: name(key),
        problem,
    };
    let Some((header, content)) = record.split_at_checked(HEADER_BYTES) else {
        return Err(damaged(format!(
            "{} bytes are too few for a record",
            record.len()
        )));
    };
    if header[0] != VERSION {
        return Err(damaged(format!(
            "version {} of the envelope is unknown, {VERSION} is known",
            header[0]
        )));
    }
    if header[1..] != crc(key, content) {
        return Err(damaged("its checksum does not match".to_owned()));
    }
    Ok(content)
}

fn name(key: &[u8]) -> String {
    key.escape_ascii().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_opens_only_unchanged_and_under_its_own_key() {
        let record = seal(b"vote", b"content");
        assert_eq!(open(b"vote", &record), Ok(&b"content"[..]));
        assert!(open(b"veto", &record).is_err());
        for at in 0..record.len() {
            for bit in 0..8 {
                let mut damaged = record.clone();
                damaged[at] ^= 1 << bit;
                assert!(open(b"vote", &damaged).is_err(), "bit {bit} of byte {at}");
            }
            assert!(open(b"vote", &record[..at]).is_err(), "cut at {at}");
        }
    }
}
