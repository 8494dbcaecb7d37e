//! `ctl vm console`: the guest's serial console, scroll-back first.
//!
//! The console is a log of bytes with absolute offsets, kept by the VMM and carried along by a migration. So a reader
//! asks for "from this offset on" again and again, and a move of the VM costs it nothing but a few refused attempts:
//!
//! ```text
//! read(offset) ─┬─ bytes, same epoch ──────────────────────→ print, offset = next
//!               ├─ bytes, new epoch, reached by hand-overs ─→ print, offset = next
//!               ├─ bytes, new epoch, a cold start ──────────→ say so, offset = 0
//!               └─ refused (moving, restarting, agent away) → again, for QUIET_FOR; ends when the VM is not wanted running
//! ```
//!
//! Input is sent in order, what the guest did not take yet is offered again. On a terminal Ctrl-] leaves; the VM
//! notices neither.

use std::io::{self, Write};
use std::time::{Duration, Instant};

use drover_proto::{Code, v1};
use serde::Serialize;
use tokio::sync::mpsc;

use super::terminal::{RawMode, input};
use super::{POLL, Session, not_too_soon};
use crate::args::ConsoleArgs;
use crate::failure::{Exit, Failure, Result};
use crate::view::vm_state_word;

/// Ctrl-].
const DETACH: u8 = 0x1d;
/// One long poll.
const WAIT: Duration = Duration::from_secs(10);
/// How long a VM that is wanted running may give no answer: several restarts of an agent, a hand-over, an election.
const QUIET_FOR: Duration = Duration::from_secs(60);
/// Reads of what is there, at most: four times the largest scroll-back.
const DUMP_READS_MAX: u32 = 16;
/// How long a VM that is wanted running may have no console to read from.
const DUMP_FOR: Duration = Duration::from_secs(10);
/// Input that the guest does not read is offered for so long.
const INPUT_FOR: Duration = Duration::from_secs(30);

/// `ctl vm console`
pub async fn run(session: &Session, args: &ConsoleArgs) -> Result<()> {
    // A VM that does not exist is an error at once, not something to wait for.
    session.client.vm(&args.vm).await?;
    if args.no_follow {
        return dump(session, args).await;
    }
    let raw = RawMode::enter()?;
    if raw.is_some() {
        session
            .out
            .remark(&format!("attached to {}, Ctrl-] leaves\r", args.vm));
    }
    let ended = tokio::select! {
        ended = follow(session, args) => ended,
        ended = send(session, &args.vm, raw.is_some()) => ended,
        () = asked_to_end() => Ok(()),
    };
    let was_raw = raw.is_some();
    drop(raw);
    if was_raw {
        session.out.remark(&format!("\ndetached from {}", args.vm));
    }
    ended
}

/// Ctrl-C where the terminal is not raw, and the signals that would otherwise leave it raw.
async fn asked_to_end() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut terminate), Ok(mut hangup)) = (signal(SignalKind::terminate()), signal(SignalKind::hangup()))
    else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = terminate.recv() => {}
        _ = hangup.recv() => {}
    }
}

/// Prints what is there. A VM that is on the move is waited for.
async fn dump(session: &Session, args: &ConsoleArgs) -> Result<()> {
    let mut offset = args.offset;
    let begun = Instant::now();
    let mut reads = 0;
    while reads < DUMP_READS_MAX {
        match session
            .client
            .read_console(&args.vm, offset, Duration::ZERO)
            .await
        {
            Ok(answer) if answer.data.is_empty() => break,
            Ok(answer) => {
                offset = answer.next_offset;
                reads += 1;
                write(session, &answer)?;
            }
            Err(failure) if passing(&failure) => {
                if let Some(state) = over(session, &args.vm).await? {
                    let message = format!("{} is {state}: it has no console", args.vm);
                    return Err(Failure::new(Exit::Refused, Code::VmState.as_str(), message));
                }
                if begun.elapsed() >= DUMP_FOR {
                    return Err(failure);
                }
                tokio::time::sleep(POLL).await;
            }
            Err(failure) => return Err(failure),
        }
    }
    Ok(())
}

/// Prints what is there and what comes, until the VM ends.
async fn follow(session: &Session, args: &ConsoleArgs) -> Result<()> {
    let mut place = Place {
        offset: args.offset,
        epoch: None,
    };
    let mut heard = Instant::now();
    loop {
        let asked = Instant::now();
        match session.client.read_console(&args.vm, place.offset, WAIT).await {
            Ok(answer) => {
                heard = Instant::now();
                let moved = match place.epoch {
                    Some(epoch) if epoch != answer.epoch => {
                        handed_over(session, &args.vm, epoch, answer.epoch).await?
                    }
                    _ => true,
                };
                if place.advance(&answer, moved) {
                    write(session, &answer)?;
                    if answer.data.is_empty() {
                        not_too_soon(asked).await;
                    }
                } else {
                    session
                        .out
                        .remark(&format!("\r\n[{} was started again]\r", args.vm));
                }
            }
            Err(failure) if passing(&failure) => {
                if let Some(state) = over(session, &args.vm).await? {
                    session.out.remark(&format!("\r\n[{} is {state}]\r", args.vm));
                    return Ok(());
                }
                if heard.elapsed() >= QUIET_FOR {
                    return Err(failure);
                }
                tokio::time::sleep(POLL).await;
            }
            Err(failure) => return Err(failure),
        }
    }
}

/// How far a reader is.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    offset: u64,
    epoch: Option<u64>,
}

impl Place {
    /// Takes in an answer; false when it is of a guest that was started afresh, whose offsets begin at 0 again.
    fn advance(&mut self, answer: &v1::ReadConsoleResponse, same_guest: bool) -> bool {
        self.epoch = Some(answer.epoch);
        self.offset = if same_guest { answer.next_offset } else { 0 };
        same_guest
    }
}

/// Whether every epoch after `before` up to `now` came by a hand-over, so that the guest is the same one.
async fn handed_over(session: &Session, vm: &str, before: u64, now: u64) -> Result<bool> {
    let migrations = session.client.migrations(vm).await?;
    Ok(handed_over_by(&migrations, before, now))
}

fn handed_over_by(migrations: &[v1::Migration], before: u64, now: u64) -> bool {
    let committed = |epoch: u64| {
        migrations.iter().any(|migration| {
            migration.epoch == epoch
                && matches!(
                    migration.phase(),
                    v1::MigrationPhase::Committed | v1::MigrationPhase::Done
                )
        })
    };
    before < now && now - before <= migrations.len() as u64 && (before + 1..=now).all(committed)
}

/// Whether a refusal may be over in a moment: the VM moves, starts, or its agent is away. A host that does not know the
/// VM says so as `vm_not_found`; whether there is such a VM at all, the cluster tells.
fn passing(failure: &Failure) -> bool {
    let codes = [
        Code::VmState,
        Code::VmNotFound,
        Code::StaleEpoch,
        Code::HostUnreachable,
        Code::HostDown,
        Code::NoLeader,
    ];
    codes.iter().any(|code| code.as_str() == failure.code)
}

/// The state of a VM that will say nothing more; `None` when it may.
async fn over(session: &Session, vm: &str) -> Result<Option<&'static str>> {
    let vm = session.client.vm(vm).await?;
    let restarts = vm
        .spec
        .as_ref()
        .is_some_and(|spec| spec.restart() == v1::RestartPolicy::OnFailure);
    let ended = match vm.state() {
        v1::VmState::Stopped => true,
        v1::VmState::Failed => !(restarts && vm.wanted_running),
        _ => false,
    };
    Ok(ended.then(|| vm_state_word(vm.state())))
}

/// Sends standard input to the guest, until Ctrl-] on a terminal. Elsewhere the end of input ends nothing.
async fn send(session: &Session, vm: &str, terminal: bool) -> Result<()> {
    let mut chunks = input();
    while let Some(chunk) = next_chunk(&mut chunks).await {
        let (typed, detach) = split_at_detach(&chunk, terminal);
        offer(session, vm, typed).await?;
        if detach {
            return Ok(());
        }
    }
    std::future::pending().await
}

/// What was read next, and all that has been read since.
async fn next_chunk(chunks: &mut mpsc::Receiver<Vec<u8>>) -> Option<Vec<u8>> {
    let mut all = chunks.recv().await?;
    while let Ok(more) = chunks.try_recv() {
        all.extend(more);
    }
    Some(all)
}

/// The input before Ctrl-], and whether there was one.
fn split_at_detach(chunk: &[u8], terminal: bool) -> (&[u8], bool) {
    match chunk.iter().position(|&byte| byte == DETACH) {
        Some(at) if terminal => (&chunk[..at], true),
        _ => (chunk, false),
    }
}

/// Offers input until the guest's console has taken all of it.
async fn offer(session: &Session, vm: &str, mut typed: &[u8]) -> Result<()> {
    let mut taken = Instant::now();
    while !typed.is_empty() {
        match session.client.write_console(vm, typed).await {
            Ok(Some(accepted)) => {
                let accepted = usize::try_from(accepted).unwrap_or(usize::MAX).min(typed.len());
                typed = &typed[accepted..];
                if accepted > 0 {
                    taken = Instant::now();
                    continue;
                }
            }
            Ok(None) => {
                session
                    .out
                    .remark("\r\n[input may be lost: the connection broke while it was sent]\r");
                return Ok(());
            }
            Err(failure) if passing(&failure) => {}
            Err(failure) => return Err(failure),
        }
        if taken.elapsed() >= INPUT_FOR {
            session.out.remark(&format!(
                "\r\n[{} bytes of input dropped: {vm} does not take them]\r",
                typed.len()
            ));
            return Ok(());
        }
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

/// A part of the console, in JSON.
#[derive(Serialize)]
struct Chunk<'a> {
    epoch: u64,
    offset: u64,
    next_offset: u64,
    data: std::borrow::Cow<'a, str>,
}

/// Writes console bytes as they are, or as a JSON object on a line.
fn write(session: &Session, answer: &v1::ReadConsoleResponse) -> Result<()> {
    if answer.data.is_empty() {
        return Ok(());
    }
    if session.out.json() {
        let data = String::from_utf8_lossy(&answer.data);
        let v1::ReadConsoleResponse {
            epoch,
            offset,
            next_offset,
            ..
        } = *answer;
        return session.out.stream(
            &Chunk {
                epoch,
                offset,
                next_offset,
                data,
            },
            "",
        );
    }
    let mut stdout = io::stdout().lock();
    stdout
        .write_all(&answer.data)
        .and_then(|()| stdout.flush())
        .map_err(|error| Failure::output(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(offset: u64, next_offset: u64, epoch: u64) -> v1::ReadConsoleResponse {
        v1::ReadConsoleResponse {
            data: vec![],
            offset,
            next_offset,
            epoch,
        }
    }

    fn migration(epoch: u64, phase: v1::MigrationPhase) -> v1::Migration {
        v1::Migration {
            epoch,
            phase: phase.into(),
            ..Default::default()
        }
    }

    #[test]
    fn a_reader_goes_on_across_a_hand_over_and_begins_again_after_a_cold_start() {
        let mut place = Place {
            offset: 0,
            epoch: None,
        };
        assert!(place.advance(&answer(100, 150, 3), true));
        assert_eq!(
            place,
            Place {
                offset: 150,
                epoch: Some(3)
            }
        );
        assert!(place.advance(&answer(150, 180, 4), true));
        assert_eq!(
            place,
            Place {
                offset: 180,
                epoch: Some(4)
            }
        );
        assert!(!place.advance(&answer(180, 180, 5), false));
        assert_eq!(
            place,
            Place {
                offset: 0,
                epoch: Some(5)
            }
        );
    }

    #[test]
    fn a_new_epoch_is_the_same_guest_only_by_committed_hand_overs() {
        use v1::MigrationPhase::{Aborted, Committed, Done};
        let migrations = [migration(5, Committed), migration(4, Done), migration(3, Aborted)];
        assert!(handed_over_by(&migrations, 3, 5));
        assert!(handed_over_by(&migrations, 4, 5));
        assert!(!handed_over_by(&migrations, 2, 3));
        assert!(!handed_over_by(&migrations, 2, 5));
        assert!(!handed_over_by(&migrations, 5, 6));
        assert!(!handed_over_by(&migrations, 5, 4));
        assert!(!handed_over_by(&[], 0, u64::MAX));
    }

    #[test]
    fn ctrl_right_bracket_detaches_on_a_terminal_only() {
        assert_eq!(split_at_detach(b"ls\n\x1dmore", true), (&b"ls\n"[..], true));
        assert_eq!(
            split_at_detach(b"ls\n\x1dmore", false),
            (&b"ls\n\x1dmore"[..], false)
        );
        assert_eq!(split_at_detach(b"ls\n", true), (&b"ls\n"[..], false));
    }

    #[test]
    fn only_refusals_that_pass_are_waited_out() {
        let failure = |code: Code| Failure::from(drover_proto::Fault::new(code, ""));
        assert!(passing(&failure(Code::HostUnreachable)));
        assert!(passing(&failure(Code::StaleEpoch)));
        assert!(passing(&failure(Code::VmNotFound)));
        assert!(!passing(&failure(Code::Denied)));
    }
}
