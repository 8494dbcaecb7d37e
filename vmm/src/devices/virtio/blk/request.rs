//! One request of a disk (5.2.6): a header, data, and a byte for the answer.
//!
//! A request that cannot be carried out is answered with an error and changes nothing but, at worst, the sectors it named. One without room for
//! an answer, or without a header, is no request: [`Broken`].

use std::io;

use super::disk::Disk;
use super::{DATA_BYTES_MAX, DISCARD_ALIGNMENT, RANGE_SECTORS_MAX, RANGES_MAX, SECTOR, SERIAL_BYTES};
use crate::devices::complaints::complain;
use crate::devices::virtio::buffers::Cursor;
use crate::devices::virtio::queue::{Broken, Chain};
use crate::memory::Mapped;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const HEADER_BYTES: u64 = 16;
const RANGE_BYTES: u64 = 16;
/// Of a range: it may become a hole.
const MAY_UNMAP: u32 = 1;
/// Bytes copied at once between guest and file.
const CHUNK: usize = 64 << 10;

/// The answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// Why a request was not carried out.
enum Refused {
    /// The request or the file.
    Status(Status),
    /// The chain.
    Broken(Broken),
}

impl From<Broken> for Refused {
    fn from(broken: Broken) -> Self {
        Self::Broken(broken)
    }
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Self {
        complain(|| format!("a disk request failed: {error}"));
        Self::Status(Status::IoError)
    }
}

const IO_ERROR: Refused = Refused::Status(Status::IoError);
const UNSUPPORTED: Refused = Refused::Status(Status::Unsupported);

/// Carries out the request in `chain`; `flushes`: the driver knows flushes. Returns how many bytes were written to the guest.
pub fn serve(disk: &Disk, chain: &Chain, memory: &Mapped, flushes: bool) -> Result<u32, Broken> {
    let mut readable = Cursor::new(memory, &chain.readable);
    let mut writable = Cursor::new(memory, &chain.writable);
    let Some(room) = writable.left().checked_sub(1) else {
        return Err(Broken("a disk request without room for its answer".to_owned()));
    };
    // The answer is the last byte, whatever is written before it.
    let mut answer = writable.clone();
    answer.skip(room);
    let mut header = [0; HEADER_BYTES as usize];
    readable.read(&mut header)?;
    let (kind, sector) = (u32_at(&header, 0), sector_at(&header, 8));
    let done = match kind {
        IN => read(disk, sector, &mut writable, room),
        OUT => write(disk, sector, &mut readable, flushes),
        FLUSH => disk.flush().map(|()| 0).map_err(Refused::from),
        GET_ID => get_id(disk, &mut writable, room),
        kind @ (DISCARD | WRITE_ZEROES) => zero(disk, &mut readable, kind == DISCARD, flushes),
        _ => Err(UNSUPPORTED),
    };
    let (status, written) = match done {
        Ok(written) => (Status::Ok, written),
        Err(Refused::Status(status)) => (status, 0),
        Err(Refused::Broken(broken)) => return Err(broken),
    };
    answer.write(&[status as u8])?;
    Ok(u32::try_from(written + 1).expect("a request's data is bounded"))
}

/// Little-endian numbers of a request; `at` is a constant within it.
fn u32_at(bytes: &[u8; 16], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

fn sector_at(bytes: &[u8; 16], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

/// The data's place on the disk, bytes; whole sectors within it, and not too many.
fn place(disk: &Disk, sector: u64, bytes: u64) -> Result<u64, Refused> {
    if !bytes.is_multiple_of(SECTOR) || bytes > DATA_BYTES_MAX {
        return Err(IO_ERROR);
    }
    let end = sector
        .checked_add(bytes / SECTOR)
        .filter(|&end| end <= disk.sectors());
    end.map(|_| sector * SECTOR).ok_or(IO_ERROR)
}

fn read(disk: &Disk, sector: u64, to: &mut Cursor<'_>, bytes: u64) -> Result<u64, Refused> {
    let mut at = place(disk, sector, bytes)?;
    let mut buffer = vec![0; chunk(bytes)];
    let mut left = bytes;
    while left > 0 {
        let now = chunk(left);
        disk.read_at(&mut buffer[..now], at)?;
        to.write(&buffer[..now])?;
        at += now as u64;
        left -= now as u64;
    }
    Ok(bytes)
}

fn write(disk: &Disk, sector: u64, from: &mut Cursor<'_>, flushes: bool) -> Result<u64, Refused> {
    let mut left = from.left();
    let mut at = place(disk, sector, left)?;
    let mut buffer = vec![0; chunk(left)];
    while left > 0 {
        let now = chunk(left);
        from.read(&mut buffer[..now])?;
        disk.write_at(&buffer[..now], at)?;
        at += now as u64;
        left -= now as u64;
    }
    if !flushes {
        disk.flush()?;
    }
    Ok(0)
}

fn chunk(bytes: u64) -> usize {
    usize::try_from(bytes).map_or(CHUNK, |bytes| bytes.min(CHUNK))
}

fn get_id(disk: &Disk, to: &mut Cursor<'_>, room: u64) -> Result<u64, Refused> {
    let mut id = [0; SERIAL_BYTES];
    let serial = disk.serial().as_bytes();
    id[..serial.len()].copy_from_slice(serial);
    let len = usize::try_from(room).map_or(SERIAL_BYTES, |room| room.min(SERIAL_BYTES));
    to.write(&id[..len])?;
    Ok(len as u64)
}

fn zero(disk: &Disk, from: &mut Cursor<'_>, discard: bool, flushes: bool) -> Result<u64, Refused> {
    let bytes = from.left();
    if bytes == 0 || !bytes.is_multiple_of(RANGE_BYTES) || bytes / RANGE_BYTES > u64::from(RANGES_MAX) {
        return Err(IO_ERROR);
    }
    let mut range = [0; RANGE_BYTES as usize];
    from.read(&mut range)?;
    let sector = sector_at(&range, 0);
    let (count, flags) = (u32_at(&range, 8), u32_at(&range, 12));
    // A discard has no flags; of zeroes no others are known (5.2.6.2).
    if flags & !MAY_UNMAP != 0 || (discard && flags != 0) {
        return Err(UNSUPPORTED);
    }
    let end = sector
        .checked_add(u64::from(count))
        .filter(|&end| end <= disk.sectors());
    if count > RANGE_SECTORS_MAX || end.is_none() {
        return Err(IO_ERROR);
    }
    let (at, len) = (sector * SECTOR, u64::from(count) * SECTOR);
    if len == 0 {
        return Ok(0);
    }
    if discard {
        let whole = u64::from(DISCARD_ALIGNMENT) * SECTOR;
        // A hint: the parts of blocks at its ends are kept.
        let (first, last) = (at.next_multiple_of(whole), (at + len) / whole * whole);
        if first < last {
            disk.discard(first, last - first)?;
        }
    } else {
        disk.write_zeroes(at, len, flags & MAY_UNMAP != 0)?;
    }
    if !flushes {
        disk.flush()?;
    }
    Ok(0)
}
