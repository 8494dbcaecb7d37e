//! The name of one VMM on a host: the VM, the run epoch it was started for, and why it was started. It is the VMM's
//! folder, `vms/<vm>/e<epoch>-start` or `vms/<vm>/e<epoch>-<migration>`, and is used for one VMM process at most.

use std::fmt;

/// Longest name: a DNS label.
const NAME_MAX: usize = 63;
/// Longest migration id: "m" and a 64-bit number.
const MIGRATION_ID_MAX: usize = 21;
/// What a cold start is called in a folder's name; no migration id looks like it.
const START: &str = "start";

/// Why a VMM was started.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// To boot the VM.
    Start,
    /// To receive it by the migration of this id.
    Incoming(String),
}

/// One VMM of this host, in its whole life.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// The VM.
    pub vm: String,
    /// The run epoch.
    pub epoch: u64,
    /// Why it was started.
    pub kind: Kind,
}

impl Key {
    /// The VMM that boots `vm` for `epoch`.
    pub fn start(vm: &str, epoch: u64) -> Self {
        Self {
            vm: vm.to_owned(),
            epoch,
            kind: Kind::Start,
        }
    }

    /// The VMM that receives `vm` for `epoch` by `migration`.
    pub fn incoming(vm: &str, epoch: u64, migration: &str) -> Self {
        Self {
            vm: vm.to_owned(),
            epoch,
            kind: Kind::Incoming(migration.to_owned()),
        }
    }

    /// The migration that it was started for.
    pub fn migration(&self) -> Option<&str> {
        match &self.kind {
            Kind::Start => None,
            Kind::Incoming(migration) => Some(migration),
        }
    }

    /// The last component of its folder.
    pub fn folder_name(&self) -> String {
        format!("e{}-{}", self.epoch, self.migration().unwrap_or(START))
    }

    /// Reads a folder's name back; `None` for what no VMM's folder is called.
    pub fn parse(vm: &str, folder_name: &str) -> Option<Self> {
        let (epoch, kind) = folder_name.strip_prefix('e')?.split_once('-')?;
        let epoch: u64 = epoch.parse().ok()?;
        let key = if kind == START {
            Self::start(vm, epoch)
        } else {
            Self::incoming(vm, epoch, kind)
        };
        (key.is_well_formed() && key.folder_name() == folder_name).then_some(key)
    }

    /// Whether VM and migration are names that stay inside their folder. A controller's word is not taken for it.
    pub fn is_well_formed(&self) -> bool {
        let vm = is_name(&self.vm) && !self.vm.starts_with('-') && !self.vm.ends_with('-');
        let migration = self
            .migration()
            .is_none_or(|id| migration_number(id).is_some() && id.len() <= MIGRATION_ID_MAX);
        vm && migration && self.epoch > 0
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.vm, self.folder_name())
    }
}

/// Whether `name`, of a VM, a volume or a pool, is one folder's name that leads nowhere else.
pub fn is_name(name: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=NAME_MAX).contains(&name.len()) && name.bytes().all(inner)
}

/// The number in a migration's id: a later migration has a higher one.
pub fn migration_number(id: &str) -> Option<u64> {
    let digits = id.strip_prefix('m')?;
    digits
        .bytes()
        .all(|byte| byte.is_ascii_digit())
        .then(|| digits.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_name_reads_back() {
        for key in [
            Key::start("vm1", 1),
            Key::incoming("vm1", 12, "m7"),
            Key::start("a", u64::MAX),
        ] {
            assert_eq!(Key::parse(&key.vm, &key.folder_name()), Some(key));
        }
    }

    #[test]
    fn names_that_would_leave_the_folder_are_no_keys() {
        for (vm, folder) in [
            ("vm1", "e1"),
            ("vm1", "e01-start"),
            ("vm1", "e0-start"),
            ("vm1", "e1-x"),
            ("vm1", "e1-m"),
            ("vm1", "e1-m1/.."),
            ("..", "e1-start"),
            ("a/b", "e1-start"),
            ("", "e1-start"),
            ("-a", "e1-start"),
            ("vm1", "highest_epoch"),
        ] {
            assert_eq!(Key::parse(vm, folder), None, "{vm}/{folder}");
        }
    }
}
