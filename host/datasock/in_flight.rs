//! Descriptors that were sent on a connection and that its client may not have received yet.
//!
//! Linux counts those of all connections against the host's user, and at its limit nobody can be sent any. It does not say
//! which frames are unread, only how many bytes of memory they take, and that is never less than their length. So the
//! latest frames count, as many as may be in that: if all counted until nothing is unread, a client that always has
//! something to receive would be taken for one that never receives. As long as any counts the socket is kept, and with it
//! the connection's place, or a client could have any number of sockets here that have ended.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use strait_memory::{Charge, FrameSocket};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::frames::Outgoing;
use crate::session::Unread;

/// Those of one connection.
#[derive(Debug)]
pub(super) struct InFlight {
    socket: Arc<AsyncFd<FrameSocket>>,
    /// The connection has ended: nothing is sent on it any more.
    ended: AtomicBool,
    /// Of the frames with descriptors, the latest last: their bytes and places.
    held: Mutex<VecDeque<(u64, Charge)>>,
    /// Among the connections of its principal.
    _place: Charge,
}

/// Ends the connection when it drops, also with a task that is broken off.
pub(super) struct Ending(pub(super) Arc<InFlight>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.end();
    }
}

impl InFlight {
    pub(super) fn new(socket: Arc<AsyncFd<FrameSocket>>, place: Charge) -> Arc<Self> {
        Arc::new(Self {
            socket,
            ended: AtomicBool::new(false),
            held: Mutex::default(),
            _place: place,
        })
    }

    /// Sends a frame at once, or not at all.
    pub(super) fn send(&self, outgoing: &mut Outgoing) -> io::Result<()> {
        outgoing.send(self.socket.get_ref())?;
        self.count(outgoing);
        Ok(())
    }

    /// Sends a frame as soon as the client has made room for it.
    pub(super) async fn send_when_writable(&self, outgoing: &mut Outgoing) -> io::Result<()> {
        let send = |socket: &FrameSocket| outgoing.send(socket);
        self.socket.async_io(Interest::WRITABLE, send).await?;
        self.count(outgoing);
        Ok(())
    }

    fn count(&self, sent: &mut Outgoing) {
        if let Some(places) = sent.places.take() {
            self.held.lock().push_back((sent.bytes(), places));
        }
    }

    /// Nothing more is sent. The client still receives what was, and then the end.
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::Release);
        // It may have ended by itself.
        let _ = self.socket.get_ref().shutdown();
    }
}

impl Unread for InFlight {
    fn settle(&self) -> bool {
        let mut held = self.held.lock();
        // If Linux does not say, they may still be on their way.
        if !held.is_empty()
            && let Ok(mut unread) = self.socket.get_ref().unread_bytes()
        {
            let latest = held.iter().rev();
            let fit = latest.take_while(|(bytes, _)| {
                let rest = unread.checked_sub(*bytes);
                unread = rest.unwrap_or(0);
                rest.is_some()
            });
            let received = held.len() - fit.count();
            held.drain(..received);
        }
        held.is_empty() && self.ended.load(Ordering::Acquire)
    }
}
