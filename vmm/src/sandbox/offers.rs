//! What the agent handed in, until it is used: this process opens and connects nothing itself.
//!
//! The agent, also one that was restarted, connects to a socket in the VMM's folder and sends descriptors with what they are for
//! ([`drover_proto::descriptors`]). They are kept by kind and name until the call that needs them takes them. The kernel says who
//! sends: only who started this VMM is heard, and root. What a descriptor is good for is looked at by whoever takes it.
//!
//! A name that comes again replaces what lay there; of a migration's sockets only the newest migration's are kept, and of snapshots'
//! files the newest snapshot's. All of it is bounded, so an agent that sends too much is refused and costs no more descriptors.

use std::collections::{BTreeMap, VecDeque};
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use drover_migration::transport::receive_descriptors;
use drover_proto::descriptors::{COUNT_MAX, Kind, MESSAGE_BYTES_MAX, TAKEN, decode};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use tracing::{debug, error, warn};

use super::Thread;

/// Most names with descriptors: each disk of a VM, and what a migration and a snapshot take.
const NAMES_MAX: usize = 64;
/// Most descriptors of `/dev/net/tun` that lie ready.
const TUNS_MAX: usize = 64;
/// A caller sends at once what it has to say.
const PATIENCE_MS: u16 = 1000;
/// After a failure to accept, which the next may meet as well.
const AFTER_FAILURE: Duration = Duration::from_millis(100);

type Table = BTreeMap<(Kind, String), VecDeque<OwnedFd>>;

/// See the module.
#[derive(Debug)]
pub struct Offers {
    owner: u32,
    table: Mutex<Table>,
}

impl Offers {
    /// Nothing yet; `owner`: the user who started this VMM.
    pub fn new(owner: u32) -> Self {
        Self {
            owner,
            table: Mutex::default(),
        }
    }

    /// The user who started this VMM.
    pub fn owner(&self) -> u32 {
        self.owner
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().expect("no holder of the offers' lock panics")
    }

    /// Keeps `descriptors`.
    pub fn put(&self, kind: Kind, name: &str, descriptors: Vec<OwnedFd>) {
        // Closed without the lock.
        let refused = self.keep(kind, name, descriptors);
        if let Err((why, _closed)) = refused {
            warn!(?kind, name, "descriptors are not kept: {why}");
        }
    }

    fn keep(
        &self,
        kind: Kind,
        name: &str,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), (&'static str, Vec<OwnedFd>)> {
        let mut table = self.table();
        if matches!(kind, Kind::Tcp | Kind::Tls) {
            table.retain(|(other, of), _| *other != kind || of == name);
        }
        if kind == Kind::Snapshot {
            let folder = Path::new(name).parent();
            table.retain(|(other, of), _| *other != kind || Path::new(of).parent() == folder);
        }
        let key = (kind, name.to_owned());
        if table.len() >= NAMES_MAX && !table.contains_key(&key) {
            return Err(("too many lie here unused", descriptors));
        }
        let kept = table.entry(key).or_default();
        if kind != Kind::Tun {
            kept.clear();
        }
        kept.extend(descriptors);
        kept.truncate(TUNS_MAX);
        Ok(())
    }

    /// One descriptor of this name, which is the caller's from now on.
    pub fn take(&self, kind: Kind, name: &str) -> Option<OwnedFd> {
        let mut table = self.table();
        let key = (kind, name.to_owned());
        let kept = table.get_mut(&key)?;
        let taken = kept.pop_front();
        if kept.is_empty() {
            table.remove(&key);
        }
        taken
    }

    /// The files of a snapshot in `folder`, by their paths, which are the caller's from now on. Of other snapshots' nothing stays here.
    pub fn take_snapshot(&self, folder: &Path) -> Vec<(String, OwnedFd)> {
        let mut table = self.table();
        let is_one = |((kind, _), _): &((Kind, String), _)| *kind == Kind::Snapshot;
        let (all, rest): (Table, Table) = std::mem::take(&mut *table).into_iter().partition(is_one);
        *table = rest;
        drop(table);
        let of_folder = all
            .into_iter()
            .filter(|((_, path), _)| Path::new(path).parent() == Some(folder));
        of_folder
            .filter_map(|((_, path), mut files)| Some((path, files.pop_front()?)))
            .collect()
    }

    /// Copies of all descriptors of this name; they can be asked for again.
    pub fn all(&self, kind: Kind, name: &str) -> Option<Vec<OwnedFd>> {
        let table = self.table();
        let kept = table.get(&(kind, name.to_owned()))?;
        kept.iter().map(|fd| fd.try_clone().ok()).collect()
    }

    /// Takes what callers hand in; the body of a thread that ends with the process.
    pub fn serve(&self, listener: &UnixListener) {
        super::narrow(Thread::Offers);
        loop {
            match listener.accept() {
                Ok((caller, _)) => self.meet(&caller),
                Err(error) => {
                    error!(%error, "nobody can hand descriptors in");
                    std::thread::sleep(AFTER_FAILURE);
                }
            }
        }
    }

    fn meet(&self, mut caller: &UnixStream) {
        let answer = match self.receive(caller) {
            Ok(()) => TAKEN.to_vec(),
            Err(why) => {
                warn!("descriptors were refused: {why}");
                why.into_bytes()
            }
        };
        // Who hung up meanwhile asks again.
        let _ = caller.write_all(&answer);
    }

    fn receive(&self, caller: &UnixStream) -> Result<(), String> {
        let peer = getsockopt(caller, PeerCredentials).map_err(|error| error.to_string())?;
        if peer.uid() != self.owner && peer.uid() != 0 {
            return Err(format!("user {} is not this VMM's agent's", peer.uid()));
        }
        let mut fds = [PollFd::new(caller.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::from(PATIENCE_MS)) != Ok(1) {
            return Err("nothing was said in time".to_owned());
        }
        let mut message = vec![0; MESSAGE_BYTES_MAX + 1];
        let (length, descriptors) =
            receive_descriptors::<COUNT_MAX>(caller, &mut message).map_err(|error| error.to_string())?;
        let (kind, name) = decode(&message[..length])?;
        if descriptors.is_empty() {
            return Err(format!("no descriptor came for {name:?}"));
        }
        debug!(?kind, name, count = descriptors.len(), "handed in");
        self.keep(kind, name, descriptors)
            .map_err(|(why, _closed)| why.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{IoSlice, Read};
    use std::os::fd::AsRawFd;
    use std::sync::Arc;

    use drover_proto::descriptors::encode;
    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

    use super::*;

    fn descriptor() -> OwnedFd {
        tempfile::tempfile().unwrap().into()
    }

    fn offers() -> Offers {
        Offers::new(nix::unistd::geteuid().as_raw())
    }

    #[test]
    fn what_is_handed_in_is_used_once_and_what_comes_again_replaces_it() {
        let offers = offers();
        let newer = descriptor();
        let newer_number = newer.as_raw_fd();
        offers.put(Kind::File, "/a", vec![descriptor()]);
        offers.put(Kind::File, "/a", vec![newer]);
        assert!(offers.take(Kind::File, "/b").is_none());
        assert!(offers.take(Kind::Tcp, "/a").is_none());
        assert_eq!(offers.take(Kind::File, "/a").unwrap().as_raw_fd(), newer_number);
        assert!(offers.take(Kind::File, "/a").is_none());
        assert!(offers.table().is_empty());
    }

    #[test]
    fn of_migrations_only_the_newest_ones_sockets_are_kept() {
        let offers = offers();
        offers.put(Kind::Tcp, "m1", vec![descriptor(), descriptor()]);
        offers.put(Kind::Tls, "m1", vec![descriptor(), descriptor(), descriptor()]);
        offers.put(Kind::Tcp, "m2", vec![descriptor()]);
        assert!(offers.take(Kind::Tcp, "m1").is_none());
        assert!(offers.take(Kind::Tcp, "m2").is_some());
        assert_eq!(offers.all(Kind::Tls, "m1").unwrap().len(), 3);
        assert_eq!(
            offers.all(Kind::Tls, "m1").unwrap().len(),
            3,
            "they can be read again"
        );
    }

    #[test]
    fn of_snapshots_only_the_newest_ones_files_are_kept_and_whoever_asks_leaves_none() {
        let offers = offers();
        offers.put(Kind::Snapshot, "/pool/s1/memory", vec![descriptor()]);
        for name in ["memory", "state"] {
            offers.put(Kind::Snapshot, &format!("/pool/s2/{name}"), vec![descriptor()]);
        }
        offers.put(Kind::File, "/pool/s2/vol", vec![descriptor()]);
        assert_eq!(offers.table().len(), 3, "of the first one nothing is kept");
        let files = offers.take_snapshot(Path::new("/pool/s2"));
        let paths: Vec<&str> = files.iter().map(|(path, _)| &path[..]).collect();
        assert_eq!(paths, ["/pool/s2/memory", "/pool/s2/state"]);
        offers.put(Kind::Snapshot, "/pool/s3/memory", vec![descriptor()]);
        assert!(offers.take_snapshot(Path::new("/pool/s2")).is_empty());
        assert_eq!(offers.table().len(), 1, "only the disk's file lies here");
    }

    #[test]
    fn no_more_than_a_bound_is_kept() {
        let offers = offers();
        for number in 0..NAMES_MAX {
            offers.put(Kind::File, &number.to_string(), vec![descriptor()]);
        }
        offers.put(Kind::File, "one more", vec![descriptor()]);
        assert!(offers.take(Kind::File, "one more").is_none());
        offers.put(Kind::File, "0", vec![descriptor()]);
        assert!(offers.take(Kind::File, "0").is_some());
        for _ in 0..TUNS_MAX + 5 {
            offers.put(Kind::Tun, "", vec![descriptor()]);
        }
        assert_eq!(offers.all(Kind::Tun, "").unwrap().len(), TUNS_MAX);
    }

    #[test]
    fn a_caller_is_told_whether_it_was_taken() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("descriptors.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let offers = Arc::new(offers());
        let serving = offers.clone();
        std::thread::spawn(move || serving.serve(&listener));
        let say = |message: &[u8], count: usize| {
            let mut stream = UnixStream::connect(&path).unwrap();
            let files: Vec<_> = (0..count).map(|_| descriptor()).collect();
            let raw: Vec<_> = files.iter().map(AsRawFd::as_raw_fd).collect();
            let rights = [ControlMessage::ScmRights(&raw)];
            let rights = if count == 0 { &[][..] } else { &rights[..] };
            sendmsg::<()>(
                stream.as_raw_fd(),
                &[IoSlice::new(message)],
                rights,
                MsgFlags::empty(),
                None,
            )
            .unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            answer
        };
        assert_eq!(say(&encode(Kind::File, "/pool/a"), 1), "ok");
        assert_eq!(say(&encode(Kind::Tcp, "m1"), COUNT_MAX), "ok");
        assert!(say(&encode(Kind::File, "/pool/b"), 0).contains("no descriptor"));
        assert!(say(b"hello there", 1).contains("no message"));
        assert!(offers.take(Kind::File, "/pool/a").is_some());
        assert!(offers.take(Kind::File, "/pool/b").is_none());
    }
}
