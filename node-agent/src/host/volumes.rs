//! Volumes' files: `<pool's folder>/<volume>/data-<content>.raw`, on storage that several hosts reach; `data.raw` of volumes from before contents had
//! numbers.
//!
//! The file is made by the agent that first starts a VM with it, thin and whole: written beside its place, then linked into it.
//! A link, not a rename: it fails where something is, so that no agent, however late, puts an empty file over another's. What is
//! there is never truncated or replaced, and grown only with its volume; if it has another size then, no VM gets it. Once a VM that has the
//! volume was seen running, nobody makes its file any more: a host that does not find it lacks the storage, and an empty disk
//! would look to the guest as if all was lost.
//!
//! Beside it lies the record of who had the volume last (`writer`), which VMMs read and write: a run that a later one has followed does not
//! get the disk, also where a host was cut off and heard of nothing. It is of the volume, whichever of its files is its content.
//!
//! What comes from a snapshot, or an image, is a file of its own beside the other, `data-<content>.raw`, put there in the same way: whole or not at all, and
//! never over anything. Which of them is the volume's content its record says (`Volume.content`), so that a copy that is cut short, or an
//! agent that comes too late with its own, harms nothing. A file is removed only where the controllers order it by volume and content.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use drover_proto::v1::Volume;
use drover_proto::{Code, Fault};

use super::copy;
use super::image::Disk;
use crate::key::{Key, is_name};

/// A volume's content, in its folder. Its number is no other's of that volume, nor of one of its name before.
fn data(content: u64) -> String {
    match content {
        0 => "data.raw".to_owned(),
        number => format!("data-{number}.raw"),
    }
}

/// The record of who had the volume last, in its folder.
const WRITER: &str = "writer";

/// What a VMM opens of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// Its content.
    pub content: PathBuf,
    /// The record of who had it last, for who writes to it.
    pub fence: Option<PathBuf>,
}

/// As [`ensure`], and the record with it for who `writes`.
///
/// # Errors
/// `disk_unusable`, with what is wrong.
pub fn files(pool: &Path, volume: &Volume, host: &str, maker: &Key, writes: bool) -> Result<Files, Fault> {
    let content = ensure(pool, volume, host, maker)?;
    let fence = writes.then(|| fence(pool, volume)).transpose()?;
    Ok(Files { content, fence })
}

/// Makes sure that the volume's record is there, empty where nobody had the volume yet. Its folder is.
fn fence(pool: &Path, volume: &Volume) -> Result<PathBuf, Fault> {
    let path = pool.join(&volume.name).join(WRITER);
    let made = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path);
    let made = match made {
        Ok(file) => file
            .sync_all()
            .and_then(|()| File::open(pool.join(&volume.name))?.sync_all()),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    };
    made.map_err(|error| {
        let what = format!("{error}; the volume's folder must be its agents' to write to");
        unusable(volume, &path, &what)
    })?;
    Ok(path)
}

/// The volume's file in the pool's folder.
pub fn path(pool: &Path, volume: &Volume) -> PathBuf {
    pool.join(&volume.name).join(data(volume.content))
}

/// Where a file is made before it is linked into its place.
fn staged(volume: &Volume, host: &str, maker: &Key) -> String {
    format!(".{}.{host}.{}.{}", data(volume.content), maker.vm, maker.epoch)
}

fn unusable(volume: &Volume, path: &Path, what: &str) -> Fault {
    let message = format!("volume {}: {}: {what}", volume.name, path.display());
    Fault::new(Code::DiskUnusable, message).field("disks")
}

/// Makes sure that the volume's restored content is there, a copy of `source`; blocks on the storage. `goes_on` is told how many bytes
/// there are by now, and says whether to go on.
///
/// # Errors
/// `snapshot_damaged` where the source is not as large as the volume; `vm_stopped` when it is not to go on; `disk_unusable`.
pub fn install(
    pool: &Path,
    volume: &Volume,
    source: &Path,
    (host, maker): (&str, &Key),
    goes_on: &dyn Fn(u64) -> bool,
) -> Result<PathBuf, Fault> {
    let path = path(pool, volume);
    if is_there(volume, &path, "no volume with a restored content")? {
        return Ok(path);
    }
    let damaged = |what: String| {
        let message = format!("{}: {what}", source.display());
        Fault::new(Code::SnapshotDamaged, message).field("disks")
    };
    let from = File::open(source).map_err(|error| damaged(error.to_string()))?;
    let bytes = from.metadata().map_err(|error| damaged(error.to_string()))?.len();
    if bytes != volume.size_bytes {
        let message = format!(
            "it has {bytes} bytes, volume {} had {}",
            volume.name, volume.size_bytes
        );
        return Err(damaged(message));
    }
    let staged = staged(volume, host, maker);
    make_by_copy(pool, volume, &path, &staged, goes_on, |to, goes_on| {
        copy::copy(&from, to, goes_on)
    })?;
    Ok(path)
}

/// Whether the content is in its place: then it was linked there whole, and nobody has had it yet. `other`: what a volume is that cannot get one so.
fn is_there(volume: &Volume, path: &Path, other: &str) -> Result<bool, Fault> {
    if !is_name(&volume.name) || volume.content == 0 {
        return Err(unusable(volume, path, other));
    }
    match look(path).map_err(|error| unusable(volume, path, &error.to_string()))? {
        Some(Found::File(bytes)) if bytes == volume.size_bytes => Ok(true),
        Some(_) => {
            let what = "something else is there: nothing was changed";
            Err(unusable(volume, path, what))
        }
        None => Ok(false),
    }
}

/// As [`make`], by a copy that asks whether to go on.
fn make_by_copy(
    pool: &Path,
    volume: &Volume,
    path: &Path,
    staged: &str,
    goes_on: &dyn Fn(u64) -> bool,
    copy: impl FnOnce(&File, &dyn Fn(u64) -> bool) -> io::Result<()>,
) -> Result<(), Fault> {
    let stopped = std::cell::Cell::new(false);
    let more = |done| {
        stopped.set(stopped.get() || !goes_on(done));
        !stopped.get()
    };
    let made = make(pool, volume, path, staged, |file| copy(file, &more));
    made.map_err(|error| match stopped.get() {
        true => not_desired(),
        false => unusable(volume, path, &error.to_string()),
    })
}

fn not_desired() -> Fault {
    Fault::new(Code::VmStopped, "it is no longer desired on this host")
}

/// Makes sure that the volume's content, that of an image, is there; blocks on the storage. `goes_on` is told how many bytes of the image's disk are dealt
/// with, and says whether to go on.
///
/// # Errors
/// `image_unusable`: it is another by now, or no disk can be read of it; `vm_stopped` when it is not to go on; `disk_unusable`.
pub fn fill(
    pool: &Path,
    volume: &Volume,
    image: &Path,
    host: &str,
    goes_on: &dyn Fn(u64) -> bool,
) -> Result<(), Fault> {
    let path = path(pool, volume);
    if is_there(volume, &path, "no volume that is made of an image")? {
        return Ok(());
    }
    let unfit = |what: String| {
        let message = format!("image {}: {what}", volume.image);
        Fault::new(Code::ImageUnusable, message).field("image")
    };
    let unread = |error: io::Error| unfit(format!("{}: {error}", image.display()));
    let mut file = File::open(image).map_err(unread)?;
    let mut hasher = blake3::Hasher::new();
    io::copy(&mut file, &mut hasher).map_err(unread)?;
    if hasher.finalize().to_hex().as_str() != volume.image_blake3 {
        let what = "it is not what it was when the volume was created: delete the volume, and create it anew";
        return Err(unfit(what.to_owned()));
    }
    let disk = Disk::open(file).map_err(unread)?;
    let bytes = disk.bytes().map_err(unread)?;
    if bytes > volume.size_bytes {
        let what = format!("its disk has {bytes} bytes, the volume {}", volume.size_bytes);
        return Err(unfit(what));
    }
    let staged = format!(".{}.{host}.fill", data(volume.content));
    make_by_copy(pool, volume, &path, &staged, goes_on, |to, goes_on| {
        disk.copy_to(to, goes_on)
    })?;
    // Whoever removed it may have come before it was there.
    if goes_on(bytes) {
        return Ok(());
    }
    remove(&path).map_err(|error| unusable(volume, &path, &error.to_string()))?;
    Err(not_desired())
}

/// Removes a content of a volume, which the controllers have ordered; what is not there is removed.
pub fn remove_content(pool: &Path, volume: &str, content: u64) -> io::Result<()> {
    if !is_name(volume) {
        return Err(io::Error::other("no name of a volume"));
    }
    fs::metadata(pool)?; // Where the pool's storage is missing nothing was removed.
    let folder = pool.join(volume);
    let entries = match fs::read_dir(&folder) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    // What somebody is still making of it first: then it cannot come to its place after this.
    let making = format!(".{}.", data(content));
    for entry in entries {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(&making) {
            remove(&entry.path())?;
        }
    }
    remove(&folder.join(data(content)))?;
    File::open(&folder)?.sync_all()
}

/// Makes sure that the volume's file is there and is of its size; blocks on the storage. `maker`: the VMM that needs it, of the
/// agent's host `host`.
///
/// # Errors
/// `disk_unusable`, with what is wrong.
pub fn ensure(pool: &Path, volume: &Volume, host: &str, maker: &Key) -> Result<PathBuf, Fault> {
    let path = path(pool, volume);
    let unusable = |what: String| unusable(volume, &path, &what);
    let failed = |error: io::Error| unusable(error.to_string());
    if !is_name(&volume.name) {
        return Err(unusable("no name of a volume".to_owned()));
    }
    let mut found = look(&path).map_err(failed)?;
    if found.is_none() {
        if volume.used || !volume.image.is_empty() || maker.migration().is_some() {
            let why = "it is not there, but was used before: is the pool's storage mounted on this host?";
            return Err(unusable(why.to_owned()));
        }
        let numbered = || match volume.content {
            0 => numbered_content(pool, volume),
            _ => Ok(None),
        };
        if let Some(other) = numbered().map_err(failed)? {
            let what = format!(
                "it is not there, but {other} is, the content of a volume of this name that was deleted: rename it to {} to go on with it, or remove it",
                data(0)
            );
            return Err(unusable(what));
        }
        let staged = staged(volume, host, maker);
        make(pool, volume, &path, &staged, |_| Ok(())).map_err(failed)?;
        found = look(&path).map_err(failed)?;
    }
    if let Some(Found::File(bytes)) = found
        && (volume.initial_bytes..volume.size_bytes).contains(&bytes)
        && volume.initial_bytes > 0
    {
        grow(&path, volume.size_bytes).map_err(failed)?;
        found = look(&path).map_err(failed)?;
    }
    match found {
        Some(Found::File(bytes)) if bytes == volume.size_bytes => Ok(path.clone()),
        Some(Found::File(bytes)) => Err(unusable(format!(
            "it has {bytes} bytes, the volume has {}: nothing was changed",
            volume.size_bytes
        ))),
        Some(Found::Other) => Err(unusable("it is no regular file".to_owned())),
        None => Err(unusable("it was removed as soon as it was made".to_owned())),
    }
}

/// A content with a number in the volume's folder, if there is one.
fn numbered_content(pool: &Path, volume: &Volume) -> io::Result<Option<String>> {
    let entries = match fs::read_dir(pool.join(&volume.name)) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        entries => entries?,
    };
    for entry in entries {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.starts_with("data-") && name.ends_with(".raw") {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

/// Makes the file that long, never shorter: by allocating its last block, which leaves what is there alone however long the file has
/// become meanwhile.
fn grow(path: &Path, bytes: u64) -> io::Result<()> {
    const BLOCK: u64 = 4096;
    let file = OpenOptions::new().write(true).open(path)?;
    let signed = |value: u64| i64::try_from(value).map_err(io::Error::other);
    let (at, len) = (signed(bytes.saturating_sub(BLOCK))?, signed(BLOCK.min(bytes))?);
    nix::fcntl::fallocate(&file, nix::fcntl::FallocateFlags::empty(), at, len)?;
    file.sync_all()
}

enum Found {
    File(u64),
    Other,
}

fn look(path: &Path) -> io::Result<Option<Found>> {
    match fs::metadata(path) {
        Ok(meta) if meta.is_file() => Ok(Some(Found::File(meta.len()))),
        Ok(_) => Ok(Some(Found::Other)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Puts a file of the volume's size, its content as `fill` makes it, in its place, unless something is there by then.
fn make(
    pool: &Path,
    volume: &Volume,
    path: &Path,
    staged: &str,
    fill: impl FnOnce(&File) -> io::Result<()>,
) -> io::Result<()> {
    let folder = pool.join(&volume.name);
    // The pool's own folder is never made: where it is missing its storage is.
    match fs::DirBuilder::new().mode(0o700).create(&folder) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let staged = folder.join(staged);
    remove(&staged)?; // Of an agent that died here.
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&staged)?;
    let filled = file.set_len(volume.size_bytes).and_then(|()| fill(&file));
    if let Err(error) = filled.and_then(|()| file.sync_all()) {
        remove(&staged)?;
        return Err(error);
    }
    match fs::hard_link(&staged, path) {
        // Another host was quicker: its file is as good.
        Err(error) if error.kind() != ErrorKind::AlreadyExists => {
            remove(&staged)?;
            return Err(error);
        }
        _ => {}
    }
    remove(&staged)?;
    File::open(&folder)?.sync_all()?;
    File::open(pool)?.sync_all()
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;

    const MIB: u64 = 1 << 20;

    fn volume(used: bool) -> Volume {
        Volume {
            name: "data".into(),
            pool: "default".into(),
            size_bytes: 64 * MIB,
            used,
            ..Volume::default()
        }
    }

    fn start(epoch: u64) -> Key {
        Key::start("vm1", epoch)
    }

    #[test]
    fn a_record_is_made_once_and_what_it_holds_stays() {
        let pool = tempfile::tempdir().unwrap();
        fence(pool.path(), &volume(false)).unwrap_err();
        ensure(pool.path(), &volume(false), "host1", &start(1)).unwrap();
        let path = fence(pool.path(), &volume(false)).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"");
        fs::write(&path, b"turn").unwrap();
        assert_eq!(fence(pool.path(), &volume(true)).unwrap(), path);
        assert_eq!(fs::read(&path).unwrap(), b"turn");
    }

    fn refused(pool: &Path, volume: &Volume, key: &Key) -> String {
        let fault = ensure(pool, volume, "host1", key).unwrap_err();
        assert_eq!(fault.code, Code::DiskUnusable);
        fault.message
    }

    #[test]
    fn the_first_start_makes_a_thin_file_and_later_ones_leave_its_content_alone() {
        let pool = tempfile::tempdir().unwrap();
        let path = ensure(pool.path(), &volume(false), "host1", &start(1)).unwrap();
        assert_eq!(path, pool.path().join("data/data.raw"));
        let meta = fs::metadata(&path).unwrap();
        assert_eq!(meta.len(), 64 * MIB);
        assert!(meta.blocks() * 512 < MIB, "it takes room before it is written to");
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(b"kept", MIB).unwrap();
        for (used, key) in [
            (false, start(2)),
            (true, start(3)),
            (true, Key::incoming("vm1", 4, "m1")),
        ] {
            assert_eq!(ensure(pool.path(), &volume(used), "host2", &key).unwrap(), path);
        }
        assert_eq!(&fs::read(&path).unwrap()[1 << 20..][..4], b"kept");
        let names = fs::read_dir(pool.path().join("data")).unwrap().count();
        assert_eq!(names, 1, "what it was staged in is gone");
    }

    #[test]
    fn a_volume_made_anew_is_not_empty_where_a_content_of_the_one_before_it_lies() {
        let pool = tempfile::tempdir().unwrap();
        let folder = pool.path().join("data");
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("data-7.raw"), b"kept").unwrap();
        let said = refused(pool.path(), &volume(false), &start(1));
        assert!(said.contains("data-7.raw"), "{said}");
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
        fs::remove_file(folder.join("data-7.raw")).unwrap();
        ensure(pool.path(), &volume(false), "host1", &start(1)).unwrap();
    }

    #[test]
    fn a_volume_is_filled_once_and_whole_from_the_image_that_was_meant_and_from_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let (pool, image) = (dir.path().join("pool"), dir.path().join("image"));
        fs::create_dir(&pool).unwrap();
        let content = vec![7; 2 * MIB as usize + 512];
        fs::write(&image, &content).unwrap();
        let of = |bytes: &[u8]| Volume {
            content: 9,
            size_bytes: 3 * MIB,
            image: "image".into(),
            image_blake3: blake3::hash(bytes).to_hex().to_string(),
            ..volume(false)
        };
        let go_on = |_| true;
        let put = |volume: &Volume, goes_on: &dyn Fn(u64) -> bool| {
            fill(&pool, volume, &image, "host1", goes_on).map_err(|fault| (fault.code, fault.message))
        };
        let left = || fs::read_dir(pool.join("data")).map_or(0, Iterator::count);
        let (code, said) = put(&of(b"another"), &go_on).unwrap_err();
        assert_eq!(code, Code::ImageUnusable);
        assert!(said.contains("is not what it was"), "{said}");
        let small = Volume {
            size_bytes: 2 * MIB,
            ..of(&content)
        };
        assert_eq!(put(&small, &go_on).unwrap_err().0, Code::ImageUnusable);
        // It is given up in the middle, and nothing is left of it.
        let (code, _) = put(&of(&content), &|bytes| bytes < MIB).unwrap_err();
        assert_eq!((code, left()), (Code::VmStopped, 0));
        // Nor where that is heard of only when it is in its place.
        let path = pool.join("data/data-9.raw");
        let (code, _) = put(&of(&content), &|_| !path.exists()).unwrap_err();
        assert_eq!((code, left()), (Code::VmStopped, 0));
        put(&of(&content), &go_on).unwrap();
        let mut found = fs::read(&path).unwrap();
        assert!(found.split_off(content.len()).iter().all(|byte| *byte == 0));
        assert!(found == content && left() == 1);
        // Again, by whoever comes late: what is there stays.
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(b"kept", 0).unwrap();
        put(&of(&content), &go_on).unwrap();
        assert_eq!(&fs::read(&path).unwrap()[..4], b"kept");
        file.set_len(MIB).unwrap();
        assert_eq!(put(&of(&content), &go_on).unwrap_err().0, Code::DiskUnusable);
    }

    #[test]
    fn a_content_is_removed_with_what_anybody_is_still_making_of_it_and_no_other() {
        let pool = tempfile::tempdir().unwrap();
        remove_content(pool.path(), "data", 9).unwrap();
        let folder = pool.path().join("data");
        fs::create_dir(&folder).unwrap();
        let others = ["data-90.raw", "data-10.raw", ".data-90.raw.host1.fill", WRITER];
        let made = ["data-9.raw", ".data-9.raw.host1.fill", ".data-9.raw.host2.vm1.3"];
        for name in others.iter().chain(&made) {
            fs::write(folder.join(name), b"content").unwrap();
        }
        remove_content(pool.path(), "data", 9).unwrap();
        let left = fs::read_dir(&folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name());
        let mut left: Vec<_> = left.map(|name| name.into_string().unwrap()).collect();
        left.sort();
        let mut wanted = others;
        wanted.sort_unstable();
        assert_eq!(left, wanted);
        remove_content(&pool.path().join("not-mounted"), "data", 9).unwrap_err();
    }

    #[test]
    fn a_numbered_volume_that_nobody_has_used_gets_a_file_of_its_own_beside_whatever_lies_there() {
        let pool = tempfile::tempdir().unwrap();
        let folder = pool.path().join("data");
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("data-7.raw"), b"of one before").unwrap();
        let new = Volume {
            content: 8,
            ..volume(false)
        };
        let path = ensure(pool.path(), &new, "host1", &start(1)).unwrap();
        assert_eq!(path, folder.join("data-8.raw"));
        fs::remove_file(&path).unwrap();
        let used = Volume {
            used: true,
            ..new.clone()
        };
        refused(pool.path(), &used, &start(2));
        let of_image = Volume {
            image: "debian".into(),
            ..new
        };
        refused(pool.path(), &of_image, &start(2));
        assert_eq!(fs::read(folder.join("data-7.raw")).unwrap(), b"of one before");
    }

    #[test]
    fn a_file_of_another_size_is_refused_and_stays_as_it_is() {
        let pool = tempfile::tempdir().unwrap();
        fs::create_dir(pool.path().join("data")).unwrap();
        let path = pool.path().join("data/data.raw");
        fs::write(&path, b"somebody's").unwrap();
        let said = refused(pool.path(), &volume(false), &start(1));
        assert!(said.contains("10 bytes") && said.contains("67108864"), "{said}");
        assert_eq!(fs::read(&path).unwrap(), b"somebody's");
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(refused(pool.path(), &volume(false), &start(1)).contains("no regular file"));
    }

    #[test]
    fn nobody_makes_a_file_for_a_volume_that_was_used_nor_for_a_migration_nor_a_pool() {
        let pool = tempfile::tempdir().unwrap();
        let none = pool.path().join("not-mounted");
        refused(&none, &volume(false), &start(1));
        assert!(!none.exists());
        assert!(refused(pool.path(), &volume(true), &start(2)).contains("mounted"));
        refused(pool.path(), &volume(false), &Key::incoming("vm1", 2, "m1"));
        let leads_out = Volume {
            name: "..".into(),
            ..volume(false)
        };
        refused(pool.path(), &leads_out, &start(1));
        assert_eq!(fs::read_dir(pool.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_a_crash_left_and_what_another_host_made_meanwhile_harm_nothing() {
        let pool = tempfile::tempdir().unwrap();
        let folder = pool.path().join("data");
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join(".data.raw.host1.vm1.1"), b"half").unwrap();
        let path = ensure(pool.path(), &volume(false), "host1", &start(1)).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 64 * MIB);
        // The other host looked before this file was there, and comes to its link only now.
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(b"kept", 0).unwrap();
        make(
            pool.path(),
            &volume(false),
            &path,
            ".data.raw.host2.vm2.1",
            |_| Ok(()),
        )
        .unwrap();
        assert_eq!(&fs::read(&path).unwrap()[..4], b"kept");
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
    }

    fn restored(content: u64) -> Volume {
        Volume {
            content,
            size_bytes: 4 * MIB,
            ..volume(true)
        }
    }

    /// A source of 4 MiB with something at its beginning and its end, and a hole between.
    fn source(dir: &Path, bytes: u64) -> PathBuf {
        let path = dir.join("disk-1.raw");
        let file = File::create(&path).unwrap();
        file.set_len(bytes).unwrap();
        file.write_all_at(b"first", 0).unwrap();
        file.write_all_at(b"last", bytes - 4).unwrap();
        path
    }

    #[test]
    fn a_restored_content_is_a_file_of_its_own_and_never_put_over_another() {
        let pool = tempfile::tempdir().unwrap();
        let before = ensure(pool.path(), &volume(false), "host1", &start(1)).unwrap();
        let from = source(pool.path(), 4 * MIB);
        let by = ("host1", &start(2));
        let path = install(pool.path(), &restored(7), &from, by, &|_| true).unwrap();
        assert_eq!(path, pool.path().join("data/data-7.raw"));
        assert!(before.exists(), "what was there before stays");
        assert_eq!(fs::read(&path).unwrap(), fs::read(&from).unwrap());
        assert!(
            fs::metadata(&path).unwrap().blocks() * 512 < MIB,
            "holes stay holes"
        );
        assert_eq!(
            ensure(pool.path(), &restored(7), "host1", &start(2)).unwrap(),
            path
        );
        // It runs, and writes; an agent that was cut off comes with its own copy only now.
        OpenOptions::new()
            .write(true)
            .open(&path)
            .unwrap()
            .write_all_at(b"later", 0)
            .unwrap();
        install(pool.path(), &restored(7), &from, ("host2", &start(1)), &|_| true).unwrap();
        make(pool.path(), &restored(7), &path, ".late", |_| Ok(())).unwrap();
        assert_eq!(&fs::read(&path).unwrap()[..5], b"later");
        remove_content(pool.path(), "data", 0).unwrap();
        assert!(!before.exists() && path.exists());
        remove_content(pool.path(), "data", 0).unwrap();
        remove_content(&pool.path().join("not-mounted"), "data", 0).unwrap_err();
        remove_content(pool.path(), "../data", 7).unwrap_err();
    }

    #[test]
    fn a_copy_that_is_cut_short_leaves_no_content() {
        let pool = tempfile::tempdir().unwrap();
        let from = source(pool.path(), 4 * MIB);
        let by = ("host1", &start(2));
        let fault = install(pool.path(), &restored(7), &from, by, &|_| false).unwrap_err();
        assert_eq!(fault.code, Code::VmStopped, "{fault}");
        let short = source(pool.path(), 2 * MIB);
        let fault = install(pool.path(), &restored(7), &short, by, &|_| true).unwrap_err();
        assert_eq!(fault.code, Code::SnapshotDamaged, "{fault}");
        assert_eq!(fs::read_dir(pool.path().join("data")).unwrap().count(), 0);
        refused(pool.path(), &restored(7), &start(3));
        // A crash came in the middle of the copy: what it left is made anew.
        fs::write(pool.path().join("data/.data-7.raw.host1.vm1.2"), b"half").unwrap();
        let from = source(pool.path(), 4 * MIB);
        let path = install(pool.path(), &restored(7), &from, by, &|_| true).unwrap();
        assert_eq!(fs::read(path).unwrap(), fs::read(from).unwrap());
        assert_eq!(fs::read_dir(pool.path().join("data")).unwrap().count(), 1);
    }
}
