//! A lane whose answers go to a channel: it waits on its producer's socket and on the consumer's at once.
//!
//! ```text
//! CHUNK, LAST ─▶ produce ─▶ kernel ─▶ Channel ─▶ ConsumerSocket ─▶ CHUNK …, LAST or ERROR
//!          OK ◀────┘                        OK with the number of a batch ◀─┘
//! ```

use std::os::fd::AsFd;
use std::time::Duration;

use strait_protocol::SIZES_BYTES;

use super::Edge;
use crate::datasock::line::notes_body;
use crate::engine::CancelToken;
use crate::error::{Code, Reason, Status};
use crate::session::{
    Called, Channel, ChunkEdge, ChunkFrame, Item, OpenChannel, Parted, Prepared, Woken,
    producer_lost,
};

/// How often a producer that is held up looks whether it was cancelled, or has waited long enough.
const TICK: Duration = Duration::from_millis(50);

/// The chunks of `edge`, and the channel for what comes of them.
struct Producing<'a, 'b, 'c> {
    edge: &'a mut Edge<'b, 'c>,
    channel: &'a Channel,
    cancel: &'a CancelToken,
    /// The chunk that was received last is answered: what happens now is told with the next one.
    is_answered: bool,
}

/// Runs the kernel on chunk after chunk, the first of which is `first`, and hands what comes of them to the channel, until
/// its consumer has all of it. Then it is over.
pub(super) fn produce(
    prepared: &Prepared,
    channel: &OpenChannel,
    first: ChunkFrame,
    cancel: &CancelToken,
    edge: &mut Edge<'_, '_>,
) {
    let mut producing = Producing {
        edge,
        channel,
        cancel,
        is_answered: false,
    };
    let ended = prepared
        .stream(first, cancel, &mut producing)
        .and_then(|called| producing.finish(called));
    let told = ended.as_ref().err().map(|status| producing.told(status));
    // Before its producer can know that it is over.
    channel.close();
    producing.edge.end(prepared, ended);
    channel.end(told.as_ref());
}

impl Producing<'_, '_, '_> {
    /// What the consumer is told of how it ended: one that left is cancelled, wherever the lane was by then, and did not
    /// cancel it.
    fn told(&self, status: &Status) -> Status {
        let mut told = status.clone();
        let woken = || self.woken(false, Some(Duration::ZERO));
        if told.reason == Reason::Cancelled && matches!(woken(), Ok(Woken::Gone)) {
            let lost = producer_lost();
            (told.code, told.reason, told.message) = (lost.code, lost.reason, lost.message);
        }
        told
    }

    fn put(&self, payload: Vec<Vec<u8>>) {
        if has_rows(&payload) {
            self.channel.push(Item::Rows(payload));
        }
    }

    /// The rest, and the end; waits until the consumer has acknowledged that.
    fn finish(&mut self, called: Called) -> Result<Called, Status> {
        let notes = notes_body(called.notes.clone())?;
        self.put(called.payload);
        self.channel.push(Item::End(notes));
        self.wait(Channel::is_empty)?;
        Ok(Called {
            payload: Vec::new(),
            notes: called.notes,
        })
    }

    /// Waits until `ready`, while the producer is there.
    fn wait(&self, ready: impl Fn(&Channel) -> bool) -> Result<(), Status> {
        loop {
            self.channel.advance()?;
            if ready(self.channel) {
                return Ok(());
            }
            // Whoever has left was cancelled, too.
            if self.woken(false, Some(TICK))? == Woken::Gone {
                return Err(producer_lost());
            }
            if self.cancel.is_cancelled() {
                let message = "the stream was cancelled while its channel was full";
                return Err(Status::new(Code::Cancelled, Reason::Cancelled, message));
            }
        }
    }

    fn woken(&self, for_requests: bool, most: Option<Duration>) -> Result<Woken, Status> {
        let woken = self
            .channel
            .wait(self.edge.line.socket().as_fd(), for_requests, most);
        woken.map_err(|error| {
            let message = format!("waiting on a channel: {error}");
            Status::new(Code::Internal, Reason::Host, message)
        })
    }
}

impl ChunkEdge for Producing<'_, '_, '_> {
    fn receive(&mut self) -> Result<Option<ChunkFrame>, Status> {
        loop {
            match self.woken(true, None)? {
                Woken::Producer => break,
                Woken::Gone => return Err(producer_lost()),
                // What is wrong with the consumer is told with the next chunk.
                Woken::Other => drop(self.channel.advance()),
            }
        }
        let chunk = self.edge.receive()?.ok_or_else(producer_lost)?;
        self.is_answered = false;
        self.wait(Channel::has_room)?;
        Ok(Some(chunk))
    }

    fn send(&mut self, payload: Vec<Vec<u8>>, done: bool) -> Result<(), Parted> {
        self.put(payload);
        if done {
            self.is_answered = true;
            self.edge.send(Vec::new(), true)?;
        }
        Ok(())
    }

    fn is_full(&self) -> bool {
        self.edge.is_full() || !self.channel.has_room()
    }

    fn flush(&mut self) -> Result<(), Parted> {
        self.edge.flush()?;
        match self.is_answered {
            true => Ok(()),
            false => self.wait(Channel::has_room).map_err(Parted::Failed),
        }
    }
}

/// Whether any output in `payload`, the first part of which are their sizes, has rows.
fn has_rows(payload: &[Vec<u8>]) -> bool {
    let sizes = payload.first().map_or(&[][..], Vec::as_slice);
    sizes.chunks_exact(SIZES_BYTES).any(|sizes| {
        sizes
            .first_chunk::<8>()
            .is_some_and(|rows| u64::from_le_bytes(*rows) > 0)
    })
}
