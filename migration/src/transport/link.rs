//! Frames over a stream.

use std::io;
use std::time::{Duration, Instant};

use drover_proto::{Code, Fault};

use super::{SLICE, Stream, failure, is_slice_over};
use crate::codec::{self, Frame, HEADER_BYTES, Kind, Message, bad};
use crate::control::Control;

/// How long the frame that says why may take; the peer may be gone.
const LAST_WORD: Duration = Duration::from_secs(1);
/// How long, and how much, a side that refused goes on reading, so that its refusal is not lost in a reset connection.
const DRAIN_TIME: Duration = Duration::from_secs(1);
const DRAIN_BYTES_MAX: usize = 256 << 20;
const DRAIN_STEP: usize = 64 << 10;

/// Why a call on the link ended early.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The cancel flag was raised.
    Cancelled,
    /// The link is of no more use.
    Failed(Fault),
}

impl From<Fault> for Stop {
    fn from(fault: Fault) -> Self {
        Self::Failed(fault)
    }
}

/// What a link looks at whenever it waits, and is told when it moves.
pub trait Watch: Sync {
    /// Whether the wait is to end, and why.
    fn stop(&self) -> Option<Stop>;
    /// The link moved some bytes.
    fn moved(&self) {}
    /// A count that grows whenever something else moved that excuses this link's silence.
    fn moved_elsewhere(&self) -> u64 {
        0
    }
}

impl Watch for Control {
    fn stop(&self) -> Option<Stop> {
        self.is_cancelled().then_some(Stop::Cancelled)
    }
}

/// One end of a link between the two VMMs.
pub struct Link<'c, S> {
    stream: S,
    watch: &'c dyn Watch,
    timeout: Duration,
    sent: u64,
    received: u64,
    /// A frame was begun and not finished: nothing can follow it.
    torn: bool,
    scratch: Vec<u8>,
}

/// How long a call may take, and whether it heeds its watch.
#[derive(Clone, Copy)]
struct Patience {
    /// Without a byte moved. None: for ever.
    idle: Option<Duration>,
    heeds_watch: bool,
}

impl Patience {
    /// A last exchange with a peer that may be gone.
    fn last(idle: Duration) -> Self {
        Self {
            idle: Some(idle),
            heeds_watch: false,
        }
    }
}

/// When something moved last.
struct Moved {
    at: Instant,
    elsewhere: u64,
    /// What the peer's host had still to acknowledge, once that was looked at.
    unacknowledged: Option<u64>,
}

impl<'c, S: Stream> Link<'c, S> {
    /// A link that counts as lost after `timeout` without a byte moved, be it by a call or, of what was written before, by the kernel.
    pub fn new(stream: S, timeout: Duration, watch: &'c dyn Watch) -> Result<Self, Fault> {
        let set = stream.set_slice(SLICE.min(timeout));
        set.map_err(|error| Fault::new(Code::Internal, format!("cannot set a socket's timeouts: {error}")))?;
        Ok(Self {
            stream,
            watch,
            timeout,
            sent: 0,
            received: 0,
            torn: false,
            scratch: Vec::new(),
        })
    }

    /// The stream, for another link on it. That one begins with frame 0.
    pub fn into_stream(self) -> S {
        self.stream
    }

    /// From now on it counts as lost after `timeout` without a byte moved.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// See [`Stream::is_guarded`].
    pub fn is_guarded(&self) -> bool {
        self.stream.is_guarded()
    }

    /// The number that the next frame to be sent must carry.
    pub fn next_sequence(&self) -> u64 {
        self.sent
    }

    /// Sends a frame that was sealed with [`Link::next_sequence`].
    pub fn send_frame(&mut self, frame: &[u8]) -> Result<(), Stop> {
        self.write(frame, self.usual())
    }

    /// Sends a message.
    pub fn send(&mut self, message: &Message) -> Result<(), Stop> {
        self.send_with(message, self.usual())
    }

    fn usual(&self) -> Patience {
        Patience {
            idle: Some(self.timeout),
            heeds_watch: true,
        }
    }

    /// Tells the peer why this side ends, if that is still possible.
    pub fn last_word(&mut self, message: &Message) {
        if let Err(stop) = self.send_with(message, Patience::last(LAST_WORD)) {
            tracing::debug!(?stop, "the peer could not be told why");
        }
    }

    fn send_with(&mut self, message: &Message, patience: Patience) -> Result<(), Stop> {
        let mut frame = std::mem::take(&mut self.scratch);
        codec::encode(message, self.sent, &mut frame)?;
        let result = self.write(&frame, patience);
        self.scratch = frame;
        result
    }

    fn write(&mut self, frame: &[u8], patience: Patience) -> Result<(), Stop> {
        if self.torn {
            return Err(Fault::new(Code::LinkLost, "the link to the peer is broken").into());
        }
        self.torn = true;
        let (mut rest, mut moved) = (frame, self.still());
        while !rest.is_empty() {
            match self.stream.write(rest) {
                Ok(0) => return Err(Fault::new(Code::LinkLost, "the peer takes no more bytes").into()),
                Ok(count) => {
                    rest = &rest[count..];
                    moved = self.moved();
                }
                Err(error) => self.bear("cannot send to the peer", &error, &mut moved, patience)?,
            }
        }
        while let Err(error) = self.stream.flush() {
            self.bear("cannot send to the peer", &error, &mut moved, patience)?;
        }
        self.torn = false;
        self.sent += 1;
        Ok(())
    }

    /// Reads one frame into `buffer`; gives it and its length on the wire.
    pub fn receive<'b>(&mut self, buffer: &'b mut Vec<u8>) -> Result<(Frame<'b>, usize), Stop> {
        self.receive_with(buffer, self.usual(), self.usual())
    }

    /// As [`Link::receive`], but however long it takes until the frame begins.
    pub fn receive_in_time<'b>(&mut self, buffer: &'b mut Vec<u8>) -> Result<(Frame<'b>, usize), Stop> {
        let until_it_begins = Patience {
            idle: None,
            heeds_watch: true,
        };
        self.receive_with(buffer, until_it_begins, self.usual())
    }

    /// The peer's last word, if there is one: a refusal or a cancel that comes soon.
    pub fn hear_last_word(&mut self, within: Duration) -> Option<Message> {
        let (until, mut buffer) = (Instant::now() + within, Vec::new());
        loop {
            let left = until.checked_duration_since(Instant::now())?;
            let patience = Patience::last(left);
            let (frame, _) = self.receive_with(&mut buffer, patience, patience).ok()?;
            if let Frame::Message(message @ (Message::Refusal(_) | Message::Cancel(_))) = frame {
                return Some(message);
            }
        }
    }

    fn receive_with<'b>(
        &mut self,
        buffer: &'b mut Vec<u8>,
        until_it_begins: Patience,
        inside: Patience,
    ) -> Result<(Frame<'b>, usize), Stop> {
        let mut raw = [0; HEADER_BYTES];
        let (begin, rest) = raw.split_at_mut(1);
        self.read(begin, 0, until_it_begins)?;
        self.read(rest, 1, inside)?;
        let header = codec::decode_header(&raw, self.received)?;
        if header.kind == Kind::GuardedPages && !self.is_guarded() {
            return Err(bad("pages without a checksum came on a stream without TLS").into());
        }
        if buffer.len() < header.length {
            buffer.resize(header.length, 0);
        }
        let payload = &mut buffer[..header.length];
        self.read(payload, HEADER_BYTES, inside)?;
        self.received += 1;
        Ok((
            codec::decode_payload(&raw, header, payload)?,
            HEADER_BYTES + header.length,
        ))
    }

    /// Fills `out`, before which `before` bytes of the frame were read.
    fn read(&mut self, out: &mut [u8], before: usize, patience: Patience) -> Result<(), Stop> {
        let (mut filled, mut moved) = (0, self.still());
        while filled < out.len() {
            match self.stream.read(&mut out[filled..]) {
                Ok(0) if before + filled == 0 => {
                    return Err(Fault::new(Code::LinkLost, "the peer closed the link").into());
                }
                Ok(0) => {
                    let message = format!("the stream ended inside a frame, after {} bytes", before + filled);
                    return Err(bad(message).into());
                }
                Ok(count) => {
                    filled += count;
                    moved = self.moved();
                }
                Err(error) => self.bear("cannot receive from the peer", &error, &mut moved, patience)?,
            }
        }
        Ok(())
    }

    /// Nothing moved yet.
    fn still(&self) -> Moved {
        Moved {
            at: Instant::now(),
            elsewhere: self.watch.moved_elsewhere(),
            unacknowledged: None,
        }
    }

    /// What was written and has not reached the peer's host yet, and whether that is not what it was `before`, which takes on what it
    /// is. Then the link moves, and the watch is told so.
    pub fn unacknowledged(&self, before: &mut Option<u64>) -> (u64, bool) {
        let now = self.stream.unacknowledged();
        let moves = before.is_some() && now != *before;
        if moves {
            self.watch.moved();
        }
        *before = now;
        (now.unwrap_or(0), moves)
    }

    fn moved(&self) -> Moved {
        self.watch.moved();
        self.still()
    }

    /// A call failed: whether it is to be tried again.
    fn bear(
        &self,
        doing: &str,
        error: &io::Error,
        moved: &mut Moved,
        patience: Patience,
    ) -> Result<(), Stop> {
        if !is_slice_over(error) {
            return Err(failure(doing, error).into());
        }
        if let Some(stop) = self.watch.stop().filter(|_| patience.heeds_watch) {
            return Err(stop);
        }
        if self.watch.moved_elsewhere() != moved.elsewhere {
            *moved = self.still();
        }
        // A last word is not worth waiting until all before it is out.
        if patience.heeds_watch {
            let (_, moves) = self.unacknowledged(&mut moved.unacknowledged);
            if moves {
                moved.at = Instant::now();
            }
        }
        match patience.idle {
            Some(idle) if moved.at.elapsed() >= idle => {
                let stalled = format!("{doing}: no byte moved for {} ms", idle.as_millis());
                Err(Fault::new(Code::LinkLost, stalled).into())
            }
            _ => Ok(()),
        }
    }

    /// Reads and drops what the peer still sends, for a bounded while. Closing a socket with unread bytes resets the
    /// connection, and the peer might never see the last word.
    pub fn drain(&mut self) {
        let (until, mut bytes) = (Instant::now() + DRAIN_TIME, 0);
        let mut sink = vec![0; DRAIN_STEP];
        while bytes < DRAIN_BYTES_MAX && Instant::now() < until {
            match self.stream.read(&mut sink) {
                Ok(0) => return,
                Ok(count) => bytes += count,
                Err(error) if is_slice_over(&error) => {}
                Err(_) => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::codec::RoundAck;

    const SHORT: Duration = Duration::from_millis(200);

    fn control() -> Control {
        Control::new(|_| {})
    }

    fn ack(round: u32) -> Message {
        Message::RoundAck(RoundAck { round })
    }

    #[test]
    fn frames_come_out_as_they_went_in() {
        let (near, far) = UnixStream::pair().unwrap();
        let (control, mut buffer) = (control(), Vec::new());
        let mut sender = Link::new(near, SHORT, &control).unwrap();
        let mut receiver = Link::new(far, SHORT, &control).unwrap();
        for round in 1..=3 {
            sender.send(&ack(round)).unwrap();
            assert_eq!(
                receiver.receive(&mut buffer).unwrap().0,
                Frame::Message(ack(round))
            );
        }
        drop(sender);
        let Err(Stop::Failed(fault)) = receiver.receive(&mut buffer) else {
            panic!("no fault")
        };
        assert_eq!(fault.code, Code::LinkLost);
    }

    #[test]
    fn pages_without_a_checksum_are_refused_where_nothing_else_guards_them() {
        let (near, far) = UnixStream::pair().unwrap();
        let (control, mut batch) = (control(), codec::Batch::default());
        batch.begin(1);
        batch.add(codec::Run { first: 0, count: 1 }, |_, out| out.fill(1));
        let mut sender = Link::new(near, SHORT, &control).unwrap();
        sender
            .send_frame(batch.seal_guarded_pages(0).unwrap().unwrap())
            .unwrap();
        let mut buffer = Vec::new();
        let mut receiver = Link::new(far, SHORT, &control).unwrap();
        let Err(Stop::Failed(fault)) = receiver.receive(&mut buffer) else {
            panic!("no fault")
        };
        assert_eq!(fault.code, Code::BadFrame);
    }

    #[test]
    fn a_stream_that_ends_inside_a_frame_is_a_bad_frame() {
        let (near, far) = UnixStream::pair().unwrap();
        let (control, mut frame) = (control(), Vec::new());
        codec::encode(&ack(1), 0, &mut frame).unwrap();
        (&near).write_all(&frame[..frame.len() - 1]).unwrap();
        drop(near);
        let Err(Stop::Failed(fault)) = Link::new(far, SHORT, &control).unwrap().receive(&mut Vec::new())
        else {
            panic!("no fault")
        };
        assert_eq!(fault.code, Code::BadFrame);
    }

    #[test]
    fn a_peer_that_sends_nothing_or_takes_nothing_is_lost_after_the_timeout() {
        let (near, far) = UnixStream::pair().unwrap();
        let control = control();
        let mut link = Link::new(near, SHORT, &control).unwrap();
        let Err(Stop::Failed(fault)) = link.receive(&mut Vec::new()) else {
            panic!("no fault")
        };
        assert_eq!(fault.code, Code::LinkLost);
        let refusal = loop {
            if let Err(stop) = link.send(&ack(1)) {
                break stop;
            }
        };
        assert!(matches!(refusal, Stop::Failed(fault) if fault.code == Code::LinkLost));
        drop(far);
    }

    /// A stream on which no call gets anywhere for `slices` slices, of which the kernel still sends for the first `moving`. Then an answer comes.
    struct Slow {
        slices: u64,
        moving: u64,
        over: std::sync::atomic::AtomicU64,
        answer: std::io::Cursor<Vec<u8>>,
    }

    impl Slow {
        fn new(slices: u64, moving: u64) -> Self {
            let mut answer = Vec::new();
            codec::encode(&ack(1), 0, &mut answer).unwrap();
            Self {
                slices,
                moving,
                over: 0.into(),
                answer: std::io::Cursor::new(answer),
            }
        }

        fn slice(&self) -> io::Result<()> {
            if self.over.fetch_add(1, std::sync::atomic::Ordering::Relaxed) >= self.slices {
                return Ok(());
            }
            std::thread::sleep(SHORT / 20);
            Err(io::ErrorKind::WouldBlock.into())
        }
    }

    impl Read for Slow {
        fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
            self.slice()?;
            self.answer.read(out)
        }
    }

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.slice().map(|()| bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Stream for Slow {
        fn set_slice(&self, _: Duration) -> io::Result<()> {
            Ok(())
        }

        fn unacknowledged(&self) -> Option<u64> {
            let over = self.over.load(std::sync::atomic::Ordering::Relaxed);
            Some(self.moving.saturating_sub(over))
        }
    }

    #[test]
    fn what_the_kernel_still_sends_is_movement_whether_the_link_waits_for_an_answer_or_to_send_more() {
        let control = control();
        // Three times as long as a link may be silent.
        for moving in [60, 50] {
            let mut link = Link::new(Slow::new(60, moving), SHORT, &control).unwrap();
            let mut buffer = Vec::new();
            let answer = link.receive(&mut buffer).unwrap().0;
            assert_eq!(answer, Frame::Message(ack(1)), "{moving}");
            let mut link = Link::new(Slow::new(60, moving), SHORT, &control).unwrap();
            assert_eq!(link.send(&ack(1)), Ok(()), "{moving}");
        }
    }

    #[test]
    fn a_link_on_which_the_kernel_sends_no_more_is_lost_however_much_lies_there() {
        let control = control();
        for moving in [0, 20] {
            let slow = || Link::new(Slow::new(u64::MAX, moving), SHORT, &control).unwrap();
            let (mut waits, mut sends) = (slow(), slow());
            let stops = [waits.receive(&mut Vec::new()).map(drop), sends.send(&ack(1))];
            for stop in stops {
                assert!(
                    matches!(&stop, Err(Stop::Failed(fault)) if fault.code == Code::LinkLost),
                    "{stop:?}"
                );
            }
        }
    }

    #[test]
    fn a_cancel_ends_a_wait_but_lets_the_last_word_out() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let control = control();
        let mut link = Link::new(near, Duration::from_secs(60), &control).unwrap();
        control.cancel();
        assert_eq!(link.receive(&mut Vec::new()), Err(Stop::Cancelled));
        link.last_word(&ack(9));
        drop(link);
        let mut bytes = Vec::new();
        far.read_to_end(&mut bytes).unwrap();
        assert_eq!(codec::decode(&bytes, 0).unwrap().0, Frame::Message(ack(9)));
    }
}
