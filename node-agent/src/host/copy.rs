//! One file's content into another: shared by reference where the file system can, else what is not a hole, copied.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom, ioctl_ficlone, seek};
use rustix::io::Errno;

/// Copied at once; between two of them whoever waits is told.
const BLOCK_BYTES: usize = 1 << 20;

/// Makes `to`, which is empty and of the same size, hold what `from` does. `goes_on` is told how many bytes are dealt with, and says whether to
/// go on; if not, this fails.
pub fn copy(from: &File, to: &File, goes_on: &dyn Fn(u64) -> bool) -> io::Result<()> {
    let bytes = from.metadata()?.len();
    if !goes_on(0) {
        return Err(stopped());
    }
    if ioctl_ficlone(to, from).is_ok() {
        goes_on(bytes);
        return Ok(());
    }
    let mut block = vec![0; BLOCK_BYTES];
    let mut at = 0;
    while let Some((start, end)) = next_data(from, at, bytes)? {
        at = start;
        while at < end {
            let left = usize::try_from(end - at).unwrap_or(BLOCK_BYTES);
            let part = &mut block[..left.min(BLOCK_BYTES)];
            from.read_exact_at(part, at)?;
            to.write_all_at(part, at)?;
            at += part.len() as u64;
            if !goes_on(at) {
                return Err(stopped());
            }
        }
    }
    goes_on(bytes);
    Ok(())
}

/// What ends a copy that is not to go on.
pub fn stopped() -> io::Error {
    io::Error::new(io::ErrorKind::Interrupted, "it is not to go on")
}

/// The next range at or after `at` that is not a hole.
fn next_data(file: &File, at: u64, bytes: u64) -> io::Result<Option<(u64, u64)>> {
    if at >= bytes {
        return Ok(None);
    }
    match seek(file, SeekFrom::Data(at)) {
        Ok(start) => Ok(Some((start, seek(file, SeekFrom::Hole(start))?.min(bytes)))),
        // Nothing but a hole is left (lseek(2)).
        Err(Errno::NXIO) => Ok(None),
        // It knows no holes.
        Err(Errno::INVAL) => Ok(Some((at, bytes))),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_and_holes_of_all_sizes_arrive() {
        let dir = tempfile::tempdir().unwrap();
        let from = File::create_new(dir.path().join("from")).unwrap();
        let bytes = 5 * BLOCK_BYTES as u64 + 512;
        from.set_len(bytes).unwrap();
        for (at, length) in [
            (0, 1),
            (4096 * 3 + 5, 9_000),
            (BLOCK_BYTES, BLOCK_BYTES + 1),
            (5 * BLOCK_BYTES, 512),
        ] {
            from.write_all_at(&vec![7; length], at as u64).unwrap();
        }
        let from = File::open(dir.path().join("from")).unwrap();
        let to = File::create_new(dir.path().join("to")).unwrap();
        to.set_len(bytes).unwrap();
        let told = std::cell::Cell::new(0);
        let rises = |done| {
            assert!(done >= told.get());
            told.set(done);
            true
        };
        copy(&from, &to, &rises).unwrap();
        assert_eq!(told.get(), bytes);
        let read = |name| std::fs::read(dir.path().join(name)).unwrap();
        assert!(read("from") == read("to"));
    }
}
