//! Snapshots' folders: `<pool's folder>/.snapshots/<cluster>/<id>/`, on storage that several hosts reach. No volume's name begins with a dot, no
//! two clusters have one id, and a snapshot's id is never given twice: so nothing that is removed here is anybody else's.
//!
//! A folder is made before its VMM is told, and not cleared when it is there already: whether the VMM has begun to write in it nobody knows who
//! comes after an agent that died. The VMM takes it when it is empty, and else says so.
//!
//! A VMM in its sandbox makes no file: those of its snapshot are made here, opened as they are when they are there already, for the same
//! reason, and handed to it. It writes all of them, the manifest last and as `manifest.new`; that gets its name here, when the VMM has said
//! that it is whole and on the medium. Only then is the folder a snapshot.

use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use drover_proto::descriptors::{SNAPSHOT_FILES, SNAPSHOT_MANIFEST, SNAPSHOT_MANIFEST_UNNAMED};

use crate::key::is_name;

/// Of all snapshots in a pool.
const ALL: &str = ".snapshots";
/// Longest id: "s" and a 64-bit number.
const ID_MAX: usize = 21;

/// The snapshot's folder, if the names are such that it lies in the pool.
pub fn folder(pool: &Path, cluster: &str, id: &str) -> io::Result<PathBuf> {
    let is_id = id.len() <= ID_MAX
        && id
            .strip_prefix('s')
            .is_some_and(|digits| !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()));
    if !is_id || !is_name(cluster) {
        return Err(io::Error::other(format!(
            "{cluster:?} and {id:?} name no snapshot"
        )));
    }
    Ok(pool.join(ALL).join(cluster).join(id))
}

/// The file that holds what was on the disk in this slot.
pub fn disk_name(slot: u32) -> String {
    format!("disk-{slot}.raw")
}

/// Makes sure that the folder is there.
pub fn make(pool: &Path, cluster: &str, id: &str) -> io::Result<PathBuf> {
    let folder = folder(pool, cluster, id)?;
    let parents = [pool.join(ALL), pool.join(ALL).join(cluster)];
    // The pool's own folder is never made: where it is missing its storage is.
    for made in parents.iter().chain([&folder]) {
        match DirBuilder::new().mode(0o700).create(made) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    if !fs::symlink_metadata(&folder)?.is_dir() {
        return Err(io::Error::other(format!("{} is no folder", folder.display())));
    }
    for parent in [pool].into_iter().chain(parents.iter().map(PathBuf::as_path)) {
        File::open(parent)?.sync_all()?;
    }
    Ok(folder)
}

/// Opens the files of a snapshot that its VMM cannot make, each with its path; makes those that are not there.
///
/// # Errors
/// One cannot be had; the text names it.
pub fn open_files(folder: &Path, slots: &[u32]) -> io::Result<Vec<(PathBuf, File)>> {
    let own = SNAPSHOT_FILES.into_iter().map(str::to_owned);
    let all = own.chain(slots.iter().map(|&slot| disk_name(slot)));
    let open = |name: String| {
        let path = folder.join(name);
        let opened = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path);
        match opened {
            Ok(file) => Ok((path, file)),
            Err(error) => Err(io::Error::new(
                error.kind(),
                format!("{}: {error}", path.display()),
            )),
        }
    };
    let files = all.map(open).collect::<io::Result<_>>()?;
    File::open(folder)?.sync_all()?;
    Ok(files)
}

/// Makes the folder a snapshot, whose VMM has said that all else is done. One that is a snapshot already stays so.
///
/// # Errors
/// It is not certain that it is one.
pub fn name_manifest(pool: &Path, cluster: &str, id: &str) -> io::Result<()> {
    let folder = folder(pool, cluster, id)?;
    let (unnamed, named) = (
        folder.join(SNAPSHOT_MANIFEST_UNNAMED),
        folder.join(SNAPSHOT_MANIFEST),
    );
    match fs::rename(&unnamed, &named) {
        // An agent before this one came as far.
        Err(error) if error.kind() == ErrorKind::NotFound && named.exists() => {}
        renamed => renamed?,
    }
    File::open(&folder)?.sync_all()
}

/// Removes the folder and all that is in it; what is not there is removed.
pub fn remove(pool: &Path, cluster: &str, id: &str) -> io::Result<()> {
    fs::metadata(pool)?; // Where the pool's storage is missing nothing was removed.
    let folder = folder(pool, cluster, id)?;
    match fs::remove_dir_all(&folder) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        removed => removed?,
    }
    folder
        .parent()
        .map_or(Ok(()), |parent| File::open(parent)?.sync_all())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_made_left_as_it_is_and_removed_with_all_that_is_in_it() {
        let pool = tempfile::tempdir().unwrap();
        let made = make(pool.path(), "dev-1", "s7").unwrap();
        assert_eq!(made, pool.path().join(".snapshots/dev-1/s7"));
        fs::write(made.join("memory"), "pages").unwrap();
        make(pool.path(), "dev-1", "s7").unwrap();
        assert!(made.join("memory").exists(), "a VMM may be writing there");
        make(pool.path(), "dev-1", "s8").unwrap();
        for _ in 0..2 {
            remove(pool.path(), "dev-1", "s7").unwrap();
            assert!(!made.exists());
        }
        assert!(pool.path().join(".snapshots/dev-1/s8").exists());
    }

    #[test]
    fn files_are_made_once_and_left_as_they_are_and_the_manifest_is_named_once() {
        let pool = tempfile::tempdir().unwrap();
        let folder = make(pool.path(), "dev-1", "s7").unwrap();
        name_manifest(pool.path(), "dev-1", "s7").unwrap_err();
        let files = open_files(&folder, &[4]).unwrap();
        let names = ["memory", "state", "manifest.new", "disk-4.raw"];
        let paths: Vec<PathBuf> = files.iter().map(|(path, _)| path.clone()).collect();
        assert_eq!(paths, names.map(|name| folder.join(name)));
        fs::write(folder.join("memory"), "pages").unwrap();
        open_files(&folder, &[4]).unwrap();
        assert_eq!(
            fs::read(folder.join("memory")).unwrap(),
            b"pages",
            "a VMM may be writing there"
        );
        assert!(!folder.join("manifest").exists());
        for _ in 0..2 {
            name_manifest(pool.path(), "dev-1", "s7").unwrap();
            assert!(folder.join("manifest").exists() && !folder.join("manifest.new").exists());
        }
        std::os::unix::fs::symlink("/etc/passwd", folder.join("disk-5.raw")).unwrap();
        let error = open_files(&folder, &[5]).unwrap_err();
        assert!(error.to_string().contains("disk-5.raw"), "{error}");
    }

    #[test]
    fn nothing_outside_a_pool_is_made_or_removed_and_a_pool_that_is_missing_is_no_success() {
        let pool = tempfile::tempdir().unwrap();
        for (cluster, id) in [
            ("dev-1", "../s1"),
            ("dev-1", "s"),
            ("..", "s1"),
            ("", "s1"),
            ("dev-1", "s1/x"),
            ("dev-1", ""),
        ] {
            make(pool.path(), cluster, id).unwrap_err();
            remove(pool.path(), cluster, id).unwrap_err();
        }
        let missing = pool.path().join("not-mounted");
        make(&missing, "dev-1", "s1").unwrap_err();
        remove(&missing, "dev-1", "s1").unwrap_err();
        assert_eq!(fs::read_dir(pool.path()).unwrap().count(), 0);
    }
}
