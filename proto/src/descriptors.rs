//! What an agent says of the descriptors that it hands to a VMM in its sandbox, which can open nothing itself.
//!
//! ```text
//!  agent                                     VMM, on `descriptors.sock` in its folder
//!  one message + 1..=17 descriptors ───────▶ is it who started me, or root?  is it one of ours?
//!        ◀─────────────────────────────────  "ok", or what is wrong; then either end hangs up
//! ```
//!
//! A message is a magic number with the form's version, what the descriptors are, and what for. gRPC carries no descriptors, so
//! this goes beside it: the call that needs them comes after the answer, and names the same thing.

/// The socket's name, in the VMM's folder.
pub const SOCKET: &str = "descriptors.sock";
/// The answer to a message that was taken.
pub const TAKEN: &[u8] = b"ok";
/// Most descriptors of a message: the sockets of a migration.
pub const COUNT_MAX: usize = 17;
/// Longest name, bytes: a path.
pub const NAME_BYTES_MAX: usize = 4096;
/// Longest message, bytes.
pub const MESSAGE_BYTES_MAX: usize = MAGIC.len() + 1 + NAME_BYTES_MAX;
/// A snapshot's guest memory, in its folder.
pub const SNAPSHOT_MEMORY: &str = "memory";
/// The state of all else.
pub const SNAPSHOT_STATE: &str = "state";
/// What makes the folder a snapshot.
pub const SNAPSHOT_MANIFEST: &str = "manifest";
/// The manifest until it is whole, and until the agent has named what a VMM has sealed.
pub const SNAPSHOT_MANIFEST_UNNAMED: &str = "manifest.new";
/// What is handed in for a snapshot beside its disks' files.
pub const SNAPSHOT_FILES: [&str; 3] = [SNAPSHOT_MEMORY, SNAPSHOT_STATE, SNAPSHOT_MANIFEST_UNNAMED];
const MAGIC: [u8; 6] = *b"DRVFD\x01";

/// What descriptors are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A file, for the call that names its path.
    File,
    /// TCP sockets that are not connected, for the migration of this name.
    Tcp,
    /// A connection to the VMM that waits at this path, for an upgrade.
    Peer,
    /// The host's CA, certificate and key, in this order, for the migration of this name.
    Tls,
    /// `/dev/net/tun`, opened in the host's network and not yet a tap. No name.
    Tun,
    /// An empty file of a snapshot, which is to be taken next, by its path. Of two folders' files only the newer folder's are kept.
    Snapshot,
    /// `/dev/userfaultfd`, for the snapshot that is to be taken next. No name.
    Uffd,
}

impl Kind {
    const ALL: [(Self, u8); 7] = [
        (Self::File, b'f'),
        (Self::Tcp, b't'),
        (Self::Peer, b'p'),
        (Self::Tls, b'c'),
        (Self::Tun, b'n'),
        (Self::Snapshot, b's'),
        (Self::Uffd, b'u'),
    ];

    fn letter(self) -> u8 {
        let found = Self::ALL.iter().find(|(kind, _)| *kind == self);
        found.expect("every kind has its letter").1
    }
}

/// The message about descriptors of `kind` for `name`.
///
/// # Panics
/// The name is longer than [`NAME_BYTES_MAX`].
pub fn encode(kind: Kind, name: &str) -> Vec<u8> {
    assert!(name.len() <= NAME_BYTES_MAX, "a name is at most a path");
    let mut message = MAGIC.to_vec();
    message.push(kind.letter());
    message.extend(name.as_bytes());
    message
}

/// What a message says.
///
/// # Errors
/// What is wrong with it.
pub fn decode(message: &[u8]) -> Result<(Kind, &str), String> {
    let rest = message
        .strip_prefix(&MAGIC)
        .ok_or_else(|| format!("{} bytes that are no message about descriptors", message.len()))?;
    let (letter, name) = rest.split_first().ok_or("a message without a kind")?;
    let kind = Kind::ALL.iter().find(|(_, known)| known == letter);
    let (kind, _) = kind.ok_or_else(|| format!("descriptors of an unknown kind {letter}"))?;
    if name.len() > NAME_BYTES_MAX {
        return Err(format!(
            "a name of {} bytes; at most {NAME_BYTES_MAX} are taken",
            name.len()
        ));
    }
    let name = std::str::from_utf8(name).map_err(|error| format!("a name that is no text: {error}"))?;
    Ok((*kind, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_read_as_it_was_written() {
        for (kind, _) in Kind::ALL {
            let message = encode(kind, "/pool/vol/data.raw");
            assert_eq!(decode(&message), Ok((kind, "/pool/vol/data.raw")));
        }
        assert_eq!(decode(&encode(Kind::Tun, "")), Ok((Kind::Tun, "")));
    }

    #[test]
    fn what_is_no_message_is_refused() {
        let long = [&encode(Kind::File, "")[..], &[b'x'; NAME_BYTES_MAX + 1]].concat();
        for wrong in [
            &b""[..],
            b"GET / HTTP/1.1",
            &MAGIC,
            b"DRVFD\x01?x",
            b"DRVFD\x01f\xff",
            &long,
        ] {
            assert!(decode(wrong).is_err(), "{wrong:?}");
        }
    }
}
