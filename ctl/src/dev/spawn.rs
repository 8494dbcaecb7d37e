//! Starts a daemon that outlives `ctl` and its terminal, and reads what it said when it dies.

#![allow(unsafe_code)]

use std::fs;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// A log that is larger when its daemon starts is put aside, once.
const LOG_BYTES_MAX: u64 = 16 << 20;
/// Of a dead daemon's log so much is shown.
const TAIL_BYTES: u64 = 8192;
/// … and at most so many lines.
const TAIL_LINES: usize = 15;

/// A daemon's log, from where its last start began.
#[derive(Clone, Debug)]
pub struct Log {
    /// The file.
    pub path: PathBuf,
    from: u64,
}

/// Starts `program --config config` in a session of its own, its output appended to `log`.
pub fn detached(program: &Path, config: &Path, log: &Path) -> io::Result<(Child, Log)> {
    if fs::metadata(log).is_ok_and(|meta| meta.len() > LOG_BYTES_MAX) {
        fs::rename(log, log.with_extension("log.old"))?;
    }
    let file = fs::File::options().create(true).append(true).open(log)?;
    let from = file.metadata()?.len();
    let mut command = Command::new(program);
    command
        .arg("--config")
        .arg(config)
        .current_dir(config.parent().unwrap_or(Path::new("/")))
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file);
    // SAFETY: between fork and exec only async-signal-safe functions may be called; setsid(2) is one
    // (signal-safety(7)), and the closure neither allocates nor takes a lock.
    unsafe {
        command.pre_exec(|| nix::unistd::setsid().map(drop).map_err(io::Error::from));
    }
    Ok((
        command.spawn()?,
        Log {
            path: log.to_owned(),
            from,
        },
    ))
}

impl Log {
    /// What was written last since the start, a few lines of it.
    pub fn tail(&self) -> String {
        let read = || -> io::Result<Vec<u8>> {
            let mut file = fs::File::open(&self.path)?;
            let end = file.metadata()?.len();
            file.seek(SeekFrom::Start(self.from.max(end.saturating_sub(TAIL_BYTES))))?;
            let mut text = Vec::new();
            file.take(TAIL_BYTES).read_to_end(&mut text)?;
            Ok(text)
        };
        let text = read().unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_gets_its_own_session_and_its_words_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let (config, log) = (dir.path().join("config.json"), dir.path().join("daemon.log"));
        fs::write(&log, "of an earlier start\n").unwrap();
        let script = dir.path().join("daemon");
        fs::write(
            &script,
            "#!/bin/sh\necho \"$@\"\ncut -d' ' -f6 /proc/$$/stat\necho $$ >&2\n",
        )
        .unwrap();
        fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let (mut child, log) = detached(&script, &config, &log).unwrap();
        assert!(child.wait().unwrap().success());
        let pid = child.id();
        assert_eq!(log.tail(), format!("--config {}\n{pid}\n{pid}", config.display()));
    }

    #[test]
    fn the_tail_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("daemon.log");
        let text: String = (0..10_000).map(|n| format!("line {n}\n")).collect();
        fs::write(&path, text).unwrap();
        let tail = Log {
            path: path.clone(),
            from: 0,
        }
        .tail();
        assert_eq!(tail.lines().count(), TAIL_LINES);
        assert!(tail.ends_with("line 9999"));
        assert_eq!(
            Log {
                path: dir.path().join("none"),
                from: 0
            }
            .tail(),
            ""
        );
    }
}
