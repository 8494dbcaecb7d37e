//! How a command ends when it does not end well: one shape for every error, and the exit code that follows from it.
//!
//! Scripts tell outcomes apart by the exit code, and finer by the stable code of `drover_proto::codes`. Both are on
//! standard error, so that standard output carries results only.

use std::fmt;
use std::io;

use drover_proto::{Code, Fault};
use serde::Serialize;

/// The process's exit code. Documented in `ctl --help` and docs/ctl.md; never renumbered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done as asked.
    Ok = 0,
    /// Failed, for a reason that has no number of its own.
    Failed = 1,
    /// The command line or one of its values is wrong.
    Usage = 2,
    /// No such VM, host, image, volume, pool, network, snapshot or migration.
    NotFound = 3,
    /// The state of things does not allow it: exists already, does not fit, wrong state.
    Refused = 4,
    /// No controller answers, or none of them leads.
    Unreachable = 5,
    /// The migration ended aborted; the VM runs where it was.
    Aborted = 6,
    /// It did not happen within `--timeout`.
    TimedOut = 7,
    /// This identity may not do it, or is of another cluster.
    Denied = 8,
    /// Ended by Ctrl-C.
    Interrupted = 130,
}

/// What `ctl --help` says about exit codes.
pub const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    failed
  2    wrong usage or an invalid argument
  3    no such VM, host, image, volume, pool, network, snapshot or migration
  4    refused by the state of things (exists, does not fit, wrong state)
  5    no controller answers, or none of them leads
  6    the migration ended aborted
  7    not done within --timeout
  8    denied: this identity may not do it, or is of another cluster
  130  ended by Ctrl-C";

/// An error on its way to the user.
#[derive(Debug)]
pub struct Failure {
    /// The exit code.
    pub exit: Exit,
    /// The stable code of the refusal, or one of ctl's own (`usage`, `dev`, `timeout`, `interrupted`, `io`).
    pub code: String,
    /// What is wrong, and what would be right.
    pub message: String,
    /// The request's field at fault, or empty.
    pub field: String,
    /// Nobody reads the output any more (a closed pipe): end without a word.
    pub silent: bool,
}

/// The result of nearly everything here.
pub type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    /// An error of ctl's own.
    pub fn new(exit: Exit, code: &str, message: impl Into<String>) -> Self {
        Self {
            exit,
            code: code.to_owned(),
            message: message.into(),
            field: String::new(),
            silent: false,
        }
    }

    /// A wrong command line that clap could not see.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, "usage", message)
    }

    /// Something on this machine failed.
    pub fn io(what: impl fmt::Display, error: &io::Error) -> Self {
        Self::new(Exit::Failed, "io", format!("{what}: {error}"))
    }

    /// What was waited for did not come in time.
    pub fn timed_out(message: impl Into<String>) -> Self {
        Self::new(Exit::TimedOut, "timeout", message)
    }

    /// The user pressed Ctrl-C.
    pub fn interrupted(message: impl Into<String>) -> Self {
        Self::new(Exit::Interrupted, "interrupted", message)
    }

    /// A failed write to standard output; a closed pipe (`ctl … | head`) is the reader's choice, not an error.
    pub fn output(error: &io::Error) -> Self {
        let closed = error.kind() == io::ErrorKind::BrokenPipe;
        Self {
            exit: if closed { Exit::Ok } else { Exit::Failed },
            silent: closed,
            ..Self::io("cannot write the output", error)
        }
    }

    /// Writes the error to standard error, as a line or as a JSON object.
    pub fn print(&self, json: bool) {
        if self.silent {
            return;
        }
        if json {
            #[derive(Serialize)]
            struct Error<'a> {
                error: Body<'a>,
            }
            #[derive(Serialize)]
            struct Body<'a> {
                code: &'a str,
                message: &'a str,
                #[serde(skip_serializing_if = "str::is_empty")]
                field: &'a str,
            }
            let error = Error {
                error: Body {
                    code: &self.code,
                    message: &self.message,
                    field: &self.field,
                },
            };
            eprintln!(
                "{}",
                serde_json::to_string(&error).unwrap_or_else(|_| self.message.clone())
            );
        } else {
            eprintln!("error: {self}");
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} [{}]", self.message, self.code)?;
        if !self.field.is_empty() {
            write!(f, " (field {})", self.field)?;
        }
        Ok(())
    }
}

/// The exit code that a refusal with `code` ends in.
pub fn exit_for(code: Code) -> Exit {
    match code {
        Code::InvalidArgument | Code::RequestIdReused => Exit::Usage,
        Code::VmNotFound
        | Code::HostNotFound
        | Code::ImageNotFound
        | Code::VolumeNotFound
        | Code::PoolNotFound
        | Code::NetworkNotFound
        | Code::SnapshotNotFound
        | Code::NicNotFound
        | Code::MigrationNotFound => Exit::NotFound,
        Code::VmExists
        | Code::VolumeExists
        | Code::VolumeInUse
        | Code::NetworkExists
        | Code::NetworkInUse
        | Code::AddressInUse
        | Code::ImageInvalid
        | Code::NoHostFits
        | Code::VmState
        | Code::SameHost
        | Code::MigrationActive
        | Code::MigrationEnded
        | Code::PostCopyNotAllowed
        | Code::PostCopyUnavailable
        | Code::DeviceBusy
        | Code::SnapshotExists
        | Code::SnapshotActive
        | Code::SnapshotNotReady
        | Code::SnapshotInUse
        | Code::SnapshotUnavailable
        | Code::RestoreActive
        | Code::VolumeChanged
        | Code::VolumeNotReady
        | Code::ImageUnusable
        | Code::StaleEpoch
        | Code::HostDown => Exit::Refused,
        Code::NoLeader | Code::HostUnreachable => Exit::Unreachable,
        Code::Denied => Exit::Denied,
        _ => Exit::Failed,
    }
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        Self {
            exit: exit_for(fault.code),
            code: fault.code.as_str().to_owned(),
            message: fault.message,
            field: fault.field,
            silent: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_has_the_documented_exit_code() {
        assert_eq!(exit_for(Code::InvalidArgument), Exit::Usage);
        assert_eq!(exit_for(Code::ImageNotFound), Exit::NotFound);
        assert_eq!(exit_for(Code::SameHost), Exit::Refused);
        assert_eq!(exit_for(Code::NoLeader), Exit::Unreachable);
        assert_eq!(exit_for(Code::Denied), Exit::Denied);
        assert_eq!(exit_for(Code::VmmDied), Exit::Failed);
        for exit in [0_u8, 1, 2, 3, 4, 5, 6, 7, 8, 130] {
            let listed = EXIT_CODES
                .lines()
                .any(|line| line.split_whitespace().next() == Some(&exit.to_string()));
            assert!(listed, "{exit} is not documented");
        }
    }

    #[test]
    fn an_error_names_code_and_field() {
        let fault =
            Fault::new(Code::InvalidArgument, "memory_mib is 4: at least 16").field("spec.memory_mib");
        let failure = Failure::from(fault);
        assert_eq!(
            failure.to_string(),
            "memory_mib is 4: at least 16 [invalid_argument] (field spec.memory_mib)"
        );
    }

    #[test]
    fn a_closed_pipe_is_no_error() {
        let failure = Failure::output(&io::Error::from(io::ErrorKind::BrokenPipe));
        assert!(failure.silent);
        assert_eq!(failure.exit, Exit::Ok);
        assert_eq!(
            Failure::output(&io::Error::from(io::ErrorKind::StorageFull)).exit,
            Exit::Failed
        );
    }
}
