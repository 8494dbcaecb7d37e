//! Pause points and seeded bugs, for tests that break things at an exact step.
//!
//! Only a build with the feature `chaos` contains them; in any other build these functions compile to nothing.
//!
//! A process waits at the point `name` while the file `$DROVER_POINTS_DIR/<name>` exists, after it has written its
//! process id to `<name>.reached`. A test creates the file, awaits `.reached`, breaks something, and deletes the file.
//!
//! `DROVER_LIMIT_<NAME>=<number>` makes something scarce ([`limit`]).
//!
//! `DROVER_SEEDED_BUG=<name>` turns on one deliberate mistake; `cargo xtask test seeded-bugs` expects each to be caught.

/// The names that [`seeded_bug`] knows.
pub const SEEDED_BUGS: [&str; 5] = [
    "no-final-dirty-pass",
    "resume-before-commit",
    "resume-on-lost-reply",
    "no-epoch-check",
    "vote-not-synced",
];

/// Whether the deliberate mistake `name` is on. Always `false` without the feature `chaos`.
#[cfg(not(feature = "chaos"))]
#[inline(always)]
pub const fn seeded_bug(_name: &str) -> bool {
    false
}

/// Waits while a test holds the point `name`. Nothing without the feature `chaos`.
#[cfg(not(feature = "chaos"))]
#[inline(always)]
pub fn reach(_name: &str) {}

/// How much of `name` there is to be, if a test says so. Always `None` without the feature `chaos`.
#[cfg(not(feature = "chaos"))]
#[inline(always)]
pub const fn limit(_name: &str) -> Option<u64> {
    None
}

#[cfg(feature = "chaos")]
pub use chaos::{limit, reach, seeded_bug};

#[cfg(feature = "chaos")]
mod chaos {
    use std::path::PathBuf;
    use std::sync::OnceLock;
    use std::time::Duration;

    /// Whether the deliberate mistake `name` is on.
    pub fn seeded_bug(name: &str) -> bool {
        debug_assert!(super::SEEDED_BUGS.contains(&name), "unknown seeded bug {name}");
        static BUG: OnceLock<Option<String>> = OnceLock::new();
        BUG.get_or_init(|| std::env::var("DROVER_SEEDED_BUG").ok())
            .as_deref()
            == Some(name)
    }

    /// How much of `name` there is to be, if a test says so in `DROVER_LIMIT_<name>`.
    pub fn limit(name: &str) -> Option<u64> {
        std::env::var(format!("DROVER_LIMIT_{name}")).ok()?.parse().ok()
    }

    /// Waits while the file `$DROVER_POINTS_DIR/<name>` exists. Blocks the calling thread: call it where that is allowed
    /// (in async code through `spawn_blocking` or `block_in_place`).
    pub fn reach(name: &str) {
        static DIR: OnceLock<Option<PathBuf>> = OnceLock::new();
        let Some(dir) = DIR.get_or_init(|| std::env::var_os("DROVER_POINTS_DIR").map(PathBuf::from)) else {
            return;
        };
        let held = dir.join(name);
        if !held.exists() {
            return;
        }
        let reached = dir.join(format!("{name}.reached"));
        let staged = dir.join(format!("{name}.reached.{}", std::process::id()));
        if std::fs::write(&staged, std::process::id().to_string()).is_ok() {
            let _ = std::fs::rename(&staged, &reached);
        }
        while held.exists() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
