//! Messages over one socket between two processes of a host.
//!
//! ```text
//! packet: 1 byte, whether more follow │ a part of the message; descriptors beside it
//! ```
//! A packet that more follow is full, or has descriptors: so what bounds a message bounds its packets, too.
//! A message is bounded before memory is taken for it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use serde::Serialize;
use serde::de::DeserializeOwned;
use strait_memory::{FDS_MAX, FrameSocket};

/// Part of a message that goes into one packet: well below a socket's buffer.
const PART_BYTES: usize = 60 << 10;
/// Memory for messages that is kept for the next ones. A plugin, or what a hostile peer sends, may need far more.
const KEPT_BYTES: usize = 256 << 10;
const LAST: u8 = 0;
const MORE: u8 = 1;
/// What a peer gets to make room for a packet. One that does not is stopped, or broken.
const SEND_MAX: Duration = Duration::from_secs(5);

/// Why nothing came.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReceiveError {
    /// The peer closed its end: it is gone.
    #[error("the other process is gone")]
    Gone,
    /// Nothing came in time.
    #[error("the other process did not answer in time")]
    Late,
    /// What came is no message, or too long.
    #[error("the other process sent something that is no message: {0}")]
    Bad(String),
}

impl From<io::Error> for ReceiveError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => Self::Gone,
            _ => Self::Bad(error.to_string()),
        }
    }
}

/// One end.
#[derive(Debug)]
pub(super) struct Channel {
    socket: Arc<FrameSocket>,
    packet: Vec<u8>,
    message: Vec<u8>,
}

impl Channel {
    /// # Errors
    /// Linux refused.
    pub(super) fn new(socket: FrameSocket) -> io::Result<Self> {
        limit(&socket)?;
        Ok(Self::limited(socket))
    }

    /// Of a socket that whoever made it has set a [`limit`] to: a confined process cannot.
    pub(super) fn limited(socket: FrameSocket) -> Self {
        Self {
            socket: Arc::new(socket),
            packet: vec![0; 1 + PART_BYTES + 1],
            message: Vec::new(),
        }
    }

    /// For whoever ends the conversation without having a part in it.
    pub(super) fn socket(&self) -> Weak<FrameSocket> {
        Arc::downgrade(&self.socket)
    }

    /// Until something comes, or the peer is gone.
    ///
    /// # Errors
    /// [`ReceiveError::Late`].
    pub(super) fn wait(&self, until: Instant) -> Result<(), ReceiveError> {
        wait(self.socket.as_fd(), until)
    }

    /// # Errors
    /// The peer is gone, or takes nothing for [`SEND_MAX`].
    pub(super) fn send<T: Serialize>(
        &mut self,
        message: &T,
        fds: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let sent = self.send_whole(message, fds);
        self.let_go();
        sent
    }

    fn let_go(&mut self) {
        self.message.clear();
        self.message.shrink_to(KEPT_BYTES);
    }

    fn send_whole<T: Serialize>(&mut self, message: &T, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.message.clear();
        let buffer = std::mem::take(&mut self.message);
        self.message = postcard::to_extend(message, buffer)
            .map_err(|e| io::Error::other(format!("a message cannot be written: {e}")))?;
        let mut parts = self.message.chunks(PART_BYTES);
        let mut fds = fds.chunks(FDS_MAX);
        let (mut part, mut beside) = (parts.next(), fds.next());
        loop {
            let following = (parts.next(), fds.next());
            let more = match following {
                (None, None) => LAST,
                _ => MORE,
            };
            let (bytes, descriptors) = (part.unwrap_or_default(), beside.unwrap_or_default());
            self.socket.send(&[&[more], bytes], descriptors)?;
            if more == LAST {
                return Ok(());
            }
            (part, beside) = following;
        }
    }

    /// The next message of at most `most` bytes and `fds_most` descriptors, if it comes before `until`.
    ///
    /// # Errors
    /// [`ReceiveError`].
    pub(super) fn receive<T: DeserializeOwned>(
        &mut self,
        most: usize,
        fds_most: usize,
        until: Option<Instant>,
    ) -> Result<(T, Vec<OwnedFd>), ReceiveError> {
        let received = self.receive_whole(most, fds_most, until);
        self.let_go();
        received
    }

    fn receive_whole<T: DeserializeOwned>(
        &mut self,
        most: usize,
        fds_most: usize,
        until: Option<Instant>,
    ) -> Result<(T, Vec<OwnedFd>), ReceiveError> {
        let bad = |what: String| Err(ReceiveError::Bad(what));
        self.message.clear();
        let mut fds = Vec::new();
        loop {
            if let Some(until) = until {
                wait(self.socket.as_fd(), until)?;
            }
            let received = self.socket.recv(&mut self.packet)?;
            if received.truncated || received.no_room {
                return bad("a packet was cut".to_owned());
            }
            let Some((more, part)) = self.packet[..received.bytes].split_first() else {
                return Err(ReceiveError::Gone);
            };
            if *more == MORE && part.len() < PART_BYTES && received.fds.is_empty() {
                return bad("a packet that more follow is not full".to_owned());
            }
            fds.extend(received.fds);
            if self.message.len() + part.len() > most || fds.len() > fds_most {
                return bad(format!(
                    "over {most} bytes or {fds_most} descriptors, which is all that is taken"
                ));
            }
            self.message.extend_from_slice(part);
            match *more {
                MORE => {}
                LAST => break,
                other => return bad(format!("a packet of kind {other}")),
            }
        }
        match postcard::take_from_bytes(&self.message) {
            Ok((message, [])) => Ok((message, fds)),
            Ok(_) => bad("there are bytes behind it".to_owned()),
            Err(error) => bad(error.to_string()),
        }
    }
}

/// Sends nothing through `socket` for longer than [`SEND_MAX`], whoever has it.
///
/// # Errors
/// Linux refused.
pub(super) fn limit(socket: &FrameSocket) -> io::Result<()> {
    Ok(set_socket_timeout(socket, Timeout::Send, Some(SEND_MAX))?)
}

/// Waits until something can be received.
fn wait(socket: BorrowedFd<'_>, until: Instant) -> Result<(), ReceiveError> {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let left = left.try_into().map_err(io::Error::other)?;
        let mut polled = [PollFd::from_borrowed_fd(socket, PollFlags::IN)];
        match poll(&mut polled, Some(&left)) {
            Ok(0) => return Err(ReceiveError::Late),
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(io::Error::from(error).into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: usize = 10 << 20;

    fn pair() -> (Channel, Channel) {
        let (one, other) = FrameSocket::pair().expect("a pair");
        let channel = |socket| Channel::new(socket).expect("a channel");
        (channel(one), channel(other))
    }

    #[test]
    fn messages_of_any_length_come_whole_with_their_descriptors() {
        let (mut one, mut other) = pair();
        let (kept, _end) = FrameSocket::pair().expect("a pair");
        for (bytes, fds) in [
            (0, 0),
            (1, 1),
            (PART_BYTES, 3),
            (PART_BYTES + 1, 0),
            (7, 40),
            (3 << 20, 20),
        ] {
            let sent = vec![7_u8; bytes];
            let sender = std::thread::scope(|scope| {
                let sender = scope.spawn(|| one.send(&sent, &vec![kept.as_fd(); fds]));
                let (received, came) = other.receive::<Vec<u8>>(MOST, 40, None).expect("whole");
                assert!(received == sent && came.len() == fds, "{bytes} {fds}");
                sender.join().expect("no panic")
            });
            sender.expect("sent");
            let kept = one.message.capacity().max(other.message.capacity());
            assert!(
                kept <= KEPT_BYTES,
                "{kept} bytes after a message of {bytes}"
            );
        }
    }

    #[test]
    fn what_is_too_long_or_no_message_or_does_not_come_is_an_error() {
        let (mut one, mut other) = pair();
        let bad = |other: &mut Channel, words: &str| {
            let error = other.receive::<Vec<u8>>(100, 1, None).expect_err("bad");
            assert!(error.to_string().contains(words), "{error}");
        };
        one.send(&vec![1_u8; 101], &[]).expect("sent");
        bad(&mut other, "over 100 bytes");
        let (kept, _end) = FrameSocket::pair().expect("a pair");
        one.send(&vec![1_u8], &[kept.as_fd(); 2]).expect("sent");
        bad(&mut other, "1 descriptors");
        one.socket.send(&[&[2, 0]], &[]).expect("sent");
        bad(&mut other, "kind 2");
        one.socket.send(&[&[LAST, 3, 1]], &[]).expect("sent");
        bad(&mut other, "no message");
        one.socket.send(&[&[MORE]], &[]).expect("sent");
        bad(&mut other, "not full");
        one.socket.send(&[&[LAST, 1, 1, 1]], &[]).expect("sent");
        bad(&mut other, "bytes behind it");
        let late = other.receive::<Vec<u8>>(100, 1, Some(Instant::now()));
        assert!(matches!(late, Err(ReceiveError::Late)));
        drop(one);
        let gone = other.receive::<Vec<u8>>(100, 1, Some(Instant::now()));
        assert!(matches!(gone, Err(ReceiveError::Gone)));
    }
}
