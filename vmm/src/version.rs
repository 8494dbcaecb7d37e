//! Which program this is: its version, and the id that the linker computed over it.
//!
//! Two builds of one version differ in their ids, and the same build has the same one wherever it is copied to. It is read from this
//! process's own executable, which the kernel keeps even when another was installed in its place.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use drover_proto::v1::VmmBuild;

use crate::boot::elf;

/// The kernel's name for the program that this process runs (proc(5)).
const OWN_PROGRAM: &str = "/proc/self/exe";
/// So much of a program is read: its headers and its notes stand at the beginning.
const HEAD_BYTES: usize = 64 << 10;
/// The note that holds the build id, and whose it is (binutils, `--build-id`).
const NOTE_BUILD_ID: u32 = 3;
const NOTE_OWNER: &[u8] = b"GNU\0";
/// Longest id that is believed, bytes: a digest of 256 bits.
const BUILD_BYTES_MAX: usize = 32;

/// This process's program.
pub fn own() -> &'static VmmBuild {
    static OWN: OnceLock<VmmBuild> = OnceLock::new();
    OWN.get_or_init(|| VmmBuild {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        build: own_build_id().unwrap_or_default(),
    })
}

/// As `--version` says it, and as agents read it.
pub fn text() -> &'static str {
    static TEXT: OnceLock<String> = OnceLock::new();
    TEXT.get_or_init(|| match own() {
        VmmBuild { version, build } if build.is_empty() => version.clone(),
        VmmBuild { version, build } => format!("{version} build {build}"),
    })
}

/// Lower-case hexadecimal; `None` where the linker left none.
fn own_build_id() -> Option<String> {
    let mut head = vec![0; HEAD_BYTES];
    let length = read_head(&mut head).ok()?;
    build_id(&head[..length])
}

fn read_head(head: &mut [u8]) -> io::Result<usize> {
    let (file, mut filled) = (File::open(OWN_PROGRAM)?, 0);
    while filled < head.len() {
        match file.read_at(&mut head[filled..], filled as u64)? {
            0 => break,
            count => filled += count,
        }
    }
    Ok(filled)
}

fn build_id(head: &[u8]) -> Option<String> {
    let id = elf::find_note(head, NOTE_OWNER, NOTE_BUILD_ID)?;
    let bounded = !id.is_empty() && id.len() <= BUILD_BYTES_MAX;
    bounded.then(|| id.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_without_notes_or_of_another_form_has_no_id() {
        assert_eq!(build_id(b""), None);
        assert_eq!(build_id(&[0x7f; 4096]), None);
        let mut head = vec![0; HEAD_BYTES];
        let length = read_head(&mut head).unwrap();
        assert_eq!(build_id(&head[..length.min(100)]), None, "cut off");
    }

    #[test]
    fn the_version_is_this_builds() {
        assert_eq!(own().version, env!("CARGO_PKG_VERSION"));
        assert!(text().starts_with(env!("CARGO_PKG_VERSION")));
        assert!(own().build.bytes().all(|byte| byte.is_ascii_hexdigit()));
    }
}
