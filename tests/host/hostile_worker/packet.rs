//! Messages as `host/worker/channel.rs` cuts them into packets.

use std::os::fd::{AsFd, OwnedFd};

use strait_memory::{FDS_MAX, FrameSocket};

/// Of a packet: whether more of the message follow.
pub(super) const LAST: u8 = 0;
pub(super) const MORE: u8 = 1;

/// A whole message, without the first bytes of its packets. None: the other side is gone.
pub(super) fn receive(socket: &FrameSocket) -> Option<(Vec<u8>, Vec<OwnedFd>)> {
    let mut buffer = vec![0; 1 << 17];
    let (mut message, mut fds) = (Vec::new(), Vec::new());
    loop {
        let received = socket.recv(&mut buffer).ok()?;
        let (more, part) = buffer[..received.bytes].split_first()?;
        message.extend_from_slice(part);
        fds.extend(received.fds);
        if *more == LAST {
            return Some((message, fds));
        }
    }
}

/// Whether the other side still listens.
pub(super) fn send(socket: &FrameSocket, message: &[u8], fds: &[OwnedFd]) -> bool {
    let mut parts = message.chunks(60 << 10).peekable();
    let mut fds = fds.chunks(FDS_MAX).peekable();
    loop {
        let (part, beside) = (
            parts.next().unwrap_or_default(),
            fds.next().unwrap_or_default(),
        );
        let more = parts.peek().is_some() || fds.peek().is_some();
        let beside: Vec<_> = beside.iter().map(AsFd::as_fd).collect();
        if socket.send(&[&[u8::from(more)], part], &beside).is_err() {
            return false;
        }
        if !more {
            return true;
        }
    }
}
