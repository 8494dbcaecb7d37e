//! An initramfs: a cpio archive in the `newc` form (kernel documentation, `Documentation/driver-api/early-userspace/buffer-format.rst`).

use std::collections::BTreeSet;
use std::io;
use std::path::Path;

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;
const SYMLINK: u32 = 0o120_777;

/// An archive under construction. Parent folders appear by themselves.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    folders: BTreeSet<String>,
    entries: u32,
}

impl Archive {
    /// An archive with the console's device node, which the kernel needs before anything is mounted.
    #[must_use]
    pub fn new() -> Self {
        let mut archive = Self::default();
        archive.parents("dev/console");
        archive.entry("dev/console", CHARACTER_DEVICE, (5, 1), &[]);
        archive
    }

    /// Adds a folder. Paths are relative to the root and have no leading slash.
    pub fn folder(&mut self, path: &str) -> &mut Self {
        self.parents(&format!("{path}/x"));
        self
    }

    /// Adds an executable file.
    pub fn file(&mut self, path: &str, content: &[u8]) -> &mut Self {
        self.parents(path);
        self.entry(path, PROGRAM, (0, 0), content);
        self
    }

    /// Adds an executable file with the content of one on this machine.
    ///
    /// # Errors
    /// Reading it failed.
    pub fn copy(&mut self, path: &str, from: &Path) -> io::Result<&mut Self> {
        let content = std::fs::read(from)
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", from.display())))?;
        Ok(self.file(path, &content))
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, path: &str, to: &str) -> &mut Self {
        self.parents(path);
        self.entry(path, SYMLINK, (0, 0), to.as_bytes());
        self
    }

    /// The archive's bytes, uncompressed.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn parents(&mut self, path: &str) {
        for (end, _) in path.match_indices('/') {
            if self.folders.insert(path[..end].to_owned()) {
                self.entry(&path[..end], DIRECTORY, (0, 0), &[]);
            }
        }
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries += 1;
        let size = u32::try_from(content.len()).expect("files of an initramfs are below 4 GiB");
        let name_size = u32::try_from(name.len() + 1).expect("names are short");
        let links = if mode == DIRECTORY { 2 } else { 1 };
        // inode, mode, uid, gid, links, time, size, the file system's device (2), the node's device (2), the name's size, checksum
        let fields = [
            self.entries,
            mode,
            0,
            0,
            links,
            0,
            size,
            0,
            0,
            device.0,
            device.1,
            name_size,
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn cpio_reads_what_was_written() {
        let mut archive = Archive::new();
        archive
            .file("a/b/hello", b"world\n")
            .file("a/empty", b"")
            .link("a/link", "b/hello")
            .folder("proc");
        let Ok(mut cpio) = Command::new("cpio")
            .args(["-tv", "--quiet"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
        else {
            println!("SKIPPED: cpio is not installed");
            return;
        };
        cpio.stdin.take().unwrap().write_all(&archive.finish()).unwrap();
        let listing = String::from_utf8(cpio.wait_with_output().unwrap().stdout).unwrap();
        assert_eq!(listing.lines().count(), 8, "{listing}");
        assert!(listing.contains("a/link -> b/hello"), "{listing}");
        assert!(listing.contains("5,   1"), "the console is a device: {listing}");
    }
}
