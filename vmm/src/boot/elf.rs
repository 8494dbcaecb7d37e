//! ELF executables for x86-64: their loadable segments, their entry, and the PVH note.
//!
//! Sources: the System V gABI, chapter 5 (program headers, notes); the x86-64 psABI; for the note (`Xen`, type 18,
//! a 32-bit physical entry) Xen's include/public/elfnote.h.

use drover_proto::Fault;

use super::image::Part;
use super::invalid;

/// The first bytes of every ELF file.
pub const MAGIC: [u8; 4] = [0x7f, b'E', b'L', b'F'];

const HEADER_BYTES: usize = 64;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const TYPE_EXEC: u16 = 2;
const TYPE_DYN: u16 = 3;
const MACHINE_X86_64: u16 = 62;
const PHDR_BYTES: u64 = 56;
/// Program headers looked at. Kernels have fewer than ten.
const PHDRS_MAX: u16 = 64;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const NOTE_HEADER_BYTES: usize = 12;
const NOTE_PHYS32_ENTRY: u32 = 18;
const NOTE_NAME: &[u8] = b"Xen\0";
/// Notes looked at in a segment.
const NOTES_MAX: usize = 256;

/// An ELF executable.
#[derive(Debug)]
pub struct Elf<'a> {
    /// Physical address of the 64-bit entry.
    pub entry: u64,
    /// Physical address of the 32-bit PVH entry, if the file has the note.
    pub pvh_entry: Option<u64>,
    segments: Vec<Segment<'a>>,
}

#[derive(Debug)]
struct Segment<'a> {
    gpa: u64,
    bytes: &'a [u8],
    end: u64,
}

/// Little-endian integers at an offset; a read beyond the end says so.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&self, offset: u64, len: u64) -> Result<&'a [u8], Fault> {
        let range = usize::try_from(offset).ok().zip(offset.checked_add(len));
        range
            .and_then(|(start, end)| self.0.get(start..usize::try_from(end).ok()?))
            .ok_or_else(|| {
                invalid(format!(
                    "the ELF file ends before its bytes {offset}..+{len}: truncated?"
                ))
            })
    }

    fn array<const N: usize>(&self, offset: u64) -> Result<[u8; N], Fault> {
        let bytes = self.bytes(offset, N as u64)?;
        Ok(bytes.try_into().expect("as many bytes as were asked for"))
    }

    fn u16(&self, offset: u64) -> Result<u16, Fault> {
        Ok(u16::from_le_bytes(self.array(offset)?))
    }

    fn u32(&self, offset: u64) -> Result<u32, Fault> {
        Ok(u32::from_le_bytes(self.array(offset)?))
    }

    fn u64(&self, offset: u64) -> Result<u64, Fault> {
        Ok(u64::from_le_bytes(self.array(offset)?))
    }
}

/// Parses an ELF file.
pub fn parse(file: &[u8]) -> Result<Elf<'_>, Fault> {
    let reader = Reader(file);
    reader.bytes(0, HEADER_BYTES as u64)?;
    if file[4] != CLASS_64 || file[5] != LITTLE_ENDIAN || reader.u16(18)? != MACHINE_X86_64 {
        return Err(invalid(
            "the ELF file is not for 64-bit x86; want class 64, little-endian, machine x86-64",
        ));
    }
    if !matches!(reader.u16(16)?, TYPE_EXEC | TYPE_DYN) {
        return Err(invalid(
            "the ELF file is not an executable (an object file or a core dump?)",
        ));
    }
    let (phoff, phentsize, phnum) = (reader.u64(32)?, reader.u16(54)?, reader.u16(56)?);
    if u64::from(phentsize) != PHDR_BYTES || phnum == 0 || phnum > PHDRS_MAX {
        let message =
            format!("{phnum} program headers of {phentsize} bytes; want 1..={PHDRS_MAX} of {PHDR_BYTES}");
        return Err(invalid(format!("the ELF file has {message}")));
    }
    let mut elf = Elf {
        entry: reader.u64(24)?,
        pvh_entry: None,
        segments: Vec::new(),
    };
    for index in 0..u64::from(phnum) {
        let header = phoff
            .checked_add(index * PHDR_BYTES)
            .ok_or_else(|| invalid("the ELF file's program headers lie beyond any file"))?;
        reader.bytes(header, PHDR_BYTES)?;
        let (offset, filesz) = (reader.u64(header + 8)?, reader.u64(header + 32)?);
        match reader.u32(header)? {
            PT_LOAD => elf.segments.extend(segment(&reader, header)?),
            PT_NOTE if elf.pvh_entry.is_none() => elf.pvh_entry = pvh_entry(reader.bytes(offset, filesz)?),
            _ => {}
        }
    }
    elf.check()?;
    Ok(elf)
}

fn segment<'a>(reader: &Reader<'a>, header: u64) -> Result<Option<Segment<'a>>, Fault> {
    let (offset, gpa) = (reader.u64(header + 8)?, reader.u64(header + 24)?);
    let (filesz, memsz) = (reader.u64(header + 32)?, reader.u64(header + 40)?);
    if memsz == 0 {
        return Ok(None);
    }
    if filesz > memsz {
        let message = format!("a segment with {filesz} bytes in the file but {memsz} in memory");
        return Err(invalid(format!("the ELF file has {message}")));
    }
    let end = gpa.checked_add(memsz).ok_or_else(|| {
        invalid(format!(
            "the ELF file has a segment at {gpa:#x} that ends beyond any memory"
        ))
    })?;
    Ok(Some(Segment {
        gpa,
        bytes: reader.bytes(offset, filesz)?,
        end,
    }))
}

/// The entry that a segment of notes names, if one of them is the PVH note.
fn pvh_entry(notes: &[u8]) -> Option<u64> {
    let entry = note(notes, NOTE_NAME, NOTE_PHYS32_ENTRY)?.get(..4)?;
    Some(u64::from(u32::from_le_bytes(
        entry.try_into().expect("four bytes were taken"),
    )))
}

/// The content of the first note of `owner` and `kind` in an executable of which `head` is the beginning; `None` also for what is
/// damaged, no ELF file, or lies beyond the head.
pub fn find_note<'a>(head: &'a [u8], owner: &[u8], kind: u32) -> Option<&'a [u8]> {
    let reader = Reader(head);
    if head.get(..4)? != MAGIC || head.get(4) != Some(&CLASS_64) {
        return None;
    }
    let (phoff, phnum) = (reader.u64(32).ok()?, reader.u16(56).ok()?);
    (0..u64::from(phnum.min(PHDRS_MAX))).find_map(|index| {
        let header = phoff.checked_add(index * PHDR_BYTES)?;
        if reader.u32(header).ok()? != PT_NOTE {
            return None;
        }
        let (offset, filesz) = (reader.u64(header + 8).ok()?, reader.u64(header + 32).ok()?);
        note(reader.bytes(offset, filesz).ok()?, owner, kind)
    })
}

/// The content of the first note of `owner` and `kind`. Damaged notes end the search.
fn note<'a>(notes: &'a [u8], owner: &[u8], wanted: u32) -> Option<&'a [u8]> {
    let mut rest = notes;
    for _ in 0..NOTES_MAX {
        let field = |at: usize| {
            let bytes = rest.get(at..at + 4)?;
            Some(u32::from_le_bytes(
                bytes.try_into().expect("four bytes were taken"),
            ))
        };
        let (name_len, desc_len, kind) = (field(0)?, field(4)?, field(8)?);
        let name_len = usize::try_from(name_len).ok()?;
        let desc_start = NOTE_HEADER_BYTES.checked_add(name_len.checked_next_multiple_of(4)?)?;
        let desc_len = usize::try_from(desc_len).ok()?;
        let name = rest.get(NOTE_HEADER_BYTES..NOTE_HEADER_BYTES.checked_add(name_len)?)?;
        let desc = rest.get(desc_start..desc_start.checked_add(desc_len)?)?;
        if kind == wanted && name == owner {
            return Some(desc);
        }
        rest = rest.get(desc_start + desc_len.checked_next_multiple_of(4)?..)?;
    }
    None
}

impl<'a> Elf<'a> {
    /// The segments and where they go.
    pub fn parts(&self) -> Vec<Part<'a>> {
        self.segments
            .iter()
            .map(|seg| Part {
                gpa: seg.gpa,
                bytes: seg.bytes,
                end: seg.end,
            })
            .collect()
    }

    fn check(&self) -> Result<(), Fault> {
        let entry = self.pvh_entry.unwrap_or(self.entry);
        if !self
            .segments
            .iter()
            .any(|segment| (segment.gpa..segment.end).contains(&entry))
        {
            return Err(invalid(format!(
                "the ELF file's entry {entry:#x} lies in none of its segments"
            )));
        }
        for (index, segment) in self.segments.iter().enumerate() {
            let overlaps = |other: &&Segment| segment.gpa < other.end && other.gpa < segment.end;
            if self.segments[..index].iter().any(|other| overlaps(&other)) {
                return Err(invalid(format!(
                    "the ELF file's segment at {:#x} overlaps another",
                    segment.gpa
                )));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// An ELF file with one segment of `code` at `gpa`, entered there, with a PVH note if asked for.
    pub(crate) fn build(gpa: u64, code: &[u8], pvh: bool) -> Vec<u8> {
        let mut file = vec![0; 64 + 2 * 56];
        file[..7].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1]);
        file[16..20].copy_from_slice(&[2, 0, 62, 0]);
        file[24..32].copy_from_slice(&gpa.to_le_bytes());
        file[32..40].copy_from_slice(&64u64.to_le_bytes());
        file[54..58].copy_from_slice(&[56, 0, 1 + u8::from(pvh), 0]);
        let mut note = Vec::new();
        for word in [4u32, 4, NOTE_PHYS32_ENTRY] {
            note.extend(word.to_le_bytes());
        }
        note.extend(NOTE_NAME);
        note.extend(u32::try_from(gpa).unwrap().to_le_bytes());
        let code_at = file.len() as u64;
        let headers = [
            (PT_LOAD, code_at, code.len()),
            (PT_NOTE, code_at + code.len() as u64, note.len()),
        ];
        for (index, (kind, offset, len)) in headers.into_iter().enumerate() {
            let header = &mut file[64 + index * 56..][..56];
            header[..4].copy_from_slice(&kind.to_le_bytes());
            header[8..16].copy_from_slice(&offset.to_le_bytes());
            header[24..32].copy_from_slice(&gpa.to_le_bytes());
            header[32..40].copy_from_slice(&(len as u64).to_le_bytes());
            header[40..48].copy_from_slice(&(len as u64).to_le_bytes());
        }
        file.extend(code);
        file.extend(note);
        file
    }

    #[test]
    fn segments_entry_and_pvh_note_are_found() {
        let file = build(0x20_0000, &[0xf4; 100], true);
        let elf = parse(&file).unwrap();
        assert_eq!((elf.entry, elf.pvh_entry), (0x20_0000, Some(0x20_0000)));
        assert_eq!(
            elf.parts(),
            [Part {
                gpa: 0x20_0000,
                bytes: &[0xf4; 100],
                end: 0x20_0064
            }]
        );
        let without = build(0x20_0000, &[0xf4; 100], false);
        assert_eq!(parse(&without).unwrap().pvh_entry, None);
    }

    #[test]
    fn a_truncated_file_is_refused_at_every_length() {
        let file = build(0x20_0000, &[0xf4; 100], true);
        for len in 4..file.len() {
            assert!(
                parse(&file[..len]).is_err(),
                "{len} of {} bytes were taken for a kernel",
                file.len()
            );
        }
    }

    #[test]
    fn a_file_that_lies_about_itself_is_refused_with_the_reason() {
        let good = build(0x20_0000, &[0xf4; 100], false);
        let cases: [(usize, u64, &str); 5] = [
            (64 + 32, u64::MAX, "in the file but"),
            (64 + 24, u64::MAX - 8, "beyond any memory"),
            (64 + 8, u64::MAX - 8, "truncated"),
            (24, 0x1000, "in none of its segments"),
            (32, u64::MAX - 3, "truncated"),
        ];
        for (at, value, want) in cases {
            let mut file = good.clone();
            file[at..at + 8].copy_from_slice(&value.to_le_bytes());
            let fault = parse(&file).unwrap_err();
            assert!(fault.message.contains(want), "{}", fault.message);
        }
        let mut arm = good;
        arm[18] = 183;
        assert!(parse(&arm).unwrap_err().message.contains("64-bit x86"));
    }
}
