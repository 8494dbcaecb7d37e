//! QEMU's control socket: a command a line, answers and events a line, all JSON (QEMU's documentation, "QMP protocol").

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::{LOOK_AGAIN, interrupt};

/// An answer that takes longer does not come.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);

/// QEMU makes its socket within this time.
const SOCKET_LIMIT: Duration = Duration::from_secs(20);

/// A line longer than this is not QEMU's.
const LINE_MAX: u64 = 1 << 20;

/// A connection to one QEMU.
pub struct Qmp {
    stream: UnixStream,
    answers: Receiver<Value>,
    events: Receiver<(Instant, String)>,
}

impl Qmp {
    /// Connects as soon as the socket is there, and leaves the negotiation.
    pub fn connect(socket: &Path) -> Result<Self> {
        let deadline = Instant::now() + SOCKET_LIMIT;
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > deadline => {
                    bail!("QEMU does not listen on {}: {error}", socket.display());
                }
                Err(_) => {}
            }
            interrupt::check()?;
            std::thread::sleep(LOOK_AGAIN);
        };
        let (to_answers, answers) = channel();
        let (to_events, events) = channel();
        let reader = stream.try_clone().context("copying QEMU's socket")?;
        // Ends when QEMU closes the socket, or when the receivers are gone.
        std::thread::spawn(move || {
            let mut reader = BufReader::new(reader);
            let mut line = String::new();
            while matches!(reader.by_ref().take(LINE_MAX).read_line(&mut line), Ok(length) if length > 0) {
                let now = Instant::now();
                let message: Value = serde_json::from_str(&line).unwrap_or_default();
                let taken = match message["event"].as_str() {
                    Some(event) => to_events.send((now, event.to_owned())).is_ok(),
                    None => message.get("QMP").is_some() || to_answers.send(message).is_ok(),
                };
                if !taken {
                    return;
                }
                line.clear();
            }
        });
        let mut qmp = Self {
            stream,
            answers,
            events,
        };
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// One command; what it returned.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let mut line = json!({"execute": command, "arguments": arguments}).to_string();
        line.push('\n');
        self.stream
            .write_all(line.as_bytes())
            .with_context(|| format!("asking QEMU to {command}"))?;
        let answer = self
            .answers
            .recv_timeout(ANSWER_LIMIT)
            .with_context(|| format!("QEMU's answer to {command}"))?;
        if let Some(error) = answer.get("error") {
            bail!("QEMU refuses {command}: {error}");
        }
        Ok(answer["return"].clone())
    }

    /// When the event came that is awaited.
    pub fn await_event(&self, name: &str, limit: Duration) -> Result<Instant> {
        let deadline = Instant::now() + limit;
        loop {
            match self.events.recv_timeout(LOOK_AGAIN) {
                Ok((at, event)) if event == name => return Ok(at),
                Ok(_) => {}
                Err(RecvTimeoutError::Disconnected) => bail!("QEMU ended before its event {name}"),
                Err(RecvTimeoutError::Timeout) if Instant::now() > deadline => {
                    bail!("QEMU's event {name} did not come within {limit:?}");
                }
                Err(RecvTimeoutError::Timeout) => interrupt::check()?,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    /// A QEMU that greets, sends an event before its answers, and refuses whatever it does not know.
    fn pretend(listener: &UnixListener) {
        let (stream, _) = listener.accept().unwrap();
        let mut writer = stream.try_clone().unwrap();
        writeln!(writer, "{}", json!({"QMP": {"version": {}}})).unwrap();
        for line in BufReader::new(stream).lines() {
            let asked: Value = serde_json::from_str(&line.unwrap()).unwrap();
            writeln!(writer, "{}", json!({"event": "RESUME", "timestamp": {}})).unwrap();
            let answer = match asked["execute"].as_str() {
                Some("qmp_capabilities") => json!({"return": {}}),
                Some("query-migrate") => json!({"return": {"status": "completed"}}),
                _ => json!({"error": {"desc": "unknown"}}),
            };
            writeln!(writer, "{answer}").unwrap();
        }
    }

    #[test]
    fn answers_and_events_are_told_apart_and_refusals_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("qmp");
        let listener = UnixListener::bind(&socket).unwrap();
        let server = std::thread::spawn(move || pretend(&listener));
        let mut qmp = Qmp::connect(&socket).unwrap();
        let answer = qmp.execute("query-migrate", json!({})).unwrap();
        assert_eq!(answer["status"], "completed");
        qmp.await_event("RESUME", ANSWER_LIMIT).unwrap();
        let refused = qmp.execute("dance", json!({})).unwrap_err().to_string();
        assert!(
            refused.contains("dance") && refused.contains("unknown"),
            "{refused}"
        );
        qmp.stream.shutdown(std::net::Shutdown::Both).unwrap();
        server.join().unwrap();
    }
}
