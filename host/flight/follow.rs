//! DoGet of a channel: the batches of a stream as they come, for a client that maps nothing.
//!
//! ```text
//! session: Channel ── send ─▶ Follower ─▶ Outbox ─▶ tonic ─▶ client
//!              ◀── acknowledged: all messages of a batch are taken ──┘
//! ```
//! Flight has no word for "I have that", so a batch counts as acknowledged once the connection has taken all of it. What a
//! connection had taken when it broke is not sent again.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use arrow_flight::FlightData;
use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt};
use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFlags};
use strait_protocol::Header;

use super::batches::Batches;
use super::call::Call;
use super::connection::Working;
use super::outbox::{self, Offered, Outbox, Writer};
use super::refused::host_bug;
use super::upload::reserved;
use crate::error::Status;
use crate::session::{Consumer, Item, Said, Sent, StreamPermit};

/// A client as the channel's consumer.
struct Follower {
    call: Call,
    batches: Batches,
    writer: Writer,
    /// The bits of the number of the batch that is in the outbox.
    under_way: Mutex<Option<u32>>,
    /// Readable when the client has taken something, or left.
    moved: Arc<OwnedFd>,
    /// A host that ends waits for the channel's end.
    _working: Option<Working>,
}

impl std::fmt::Debug for Follower {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Follower")
            .field("under_way", &*self.under_way.lock())
            .finish_non_exhaustive()
    }
}

impl Follower {
    fn messages(&self, item: &Item) -> Result<VecDeque<FlightData>, Status> {
        match item {
            Item::Rows(payload) => {
                // The channel keeps its own until this is acknowledged.
                let bytes = payload.iter().skip(1).map(|part| part.len() as u64);
                self.call.caller.host().inline_copied().add(bytes.sum());
                self.batches.of(payload.clone(), None)
            }
            Item::End(notes) if notes.is_empty() => Ok(VecDeque::new()),
            Item::End(notes) => {
                let notes = Bytes::copy_from_slice(notes);
                self.batches.of(Vec::new(), Some(notes))
            }
        }
    }
}

impl Consumer for Follower {
    fn send(&self, number: u64, item: &Item) -> Sent {
        let mut under_way = self.under_way.lock();
        if under_way.is_some() {
            return Sent::Full;
        }
        let messages = match self.messages(item) {
            Ok(messages) => messages,
            Err(status) => {
                self.writer.finish(Err(status), false);
                return Sent::Gone;
            }
        };
        let ends = matches!(item, Item::End(_));
        if !messages.is_empty() {
            match self.writer.offer(messages) {
                Offered::Taken => {}
                Offered::Full(_) => return Sent::Full,
                Offered::Left => return Sent::Gone,
            }
        }
        if ends {
            self.writer.finish(Ok(()), false);
        }
        *under_way = Some(Header::sequence_of_batch(number));
        Sent::Whole
    }

    fn said(&self) -> Said {
        // Before it is looked at: what is taken after that makes it readable again.
        let _ = rustix::io::read(&*self.moved, &mut [0_u8; 8]);
        let mut under_way = self.under_way.lock();
        match *under_way {
            // Whoever has taken the end leaves.
            Some(bits) if self.writer.is_taken() => {
                *under_way = None;
                Said::Acknowledged(bits)
            }
            _ if self.writer.is_left() => Said::Gone,
            _ => Said::Nothing,
        }
    }

    fn fail(&self, status: &Status) -> Sent {
        self.writer.finish(Err(status.clone()), false);
        Sent::Whole
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.moved.as_fd()
    }

    fn events(&self, _: bool) -> PollFlags {
        PollFlags::IN
    }
}

/// The batches of the channel `name`, from the first that nobody has acknowledged on, until it ends.
///
/// # Errors
/// `CHANNEL_NOT_FOUND`, `WRONG_STATE` if somebody else reads it; that its outputs are no table.
pub(super) async fn channel(
    call: &Call,
    name: &str,
    place: StreamPermit,
) -> Result<BoxStream<'static, Result<FlightData, tonic::Status>>, Status> {
    let channel = call.caller.channel(name)?;
    let told = channel.to_wire(0, &call.request_id);
    let batches = Batches::new(call, &told.outputs)?;
    let charge = reserved(&call.caller, told.batch_bytes)?;
    let schema = batches.schema();
    let moved = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
    let moved = moved.map_err(|error| Status::no_descriptors(&format!("a read: {error}")))?;
    let moved = Arc::new(moved);
    let outbox = Arc::new(Outbox::told_by(Arc::clone(&moved)));
    // Among the streams, and of the bytes that are under way.
    let replies = outbox::replies(call, Arc::clone(&outbox), (place, charge));
    let follower = Arc::new(Follower {
        call: call.clone(),
        batches,
        writer: Writer(outbox),
        under_way: Mutex::default(),
        moved,
        _working: call.working(),
    });
    // It may wait a moment for whoever read it before.
    let attached = tokio::task::spawn_blocking(move || channel.attach(follower)).await;
    attached.map_err(|error| host_bug("reading a channel", error))??;
    Ok(stream::iter([Ok(schema)]).chain(replies).boxed())
}

/// What GetFlightInfo answers for a channel: one endpoint, which is read while the stream goes on.
///
/// # Errors
/// `CHANNEL_NOT_FOUND`; that its outputs are no table.
pub(super) fn info(call: &Call, name: &str) -> Result<arrow_flight::FlightInfo, Status> {
    let channel = call.caller.channel(name)?;
    let told = channel.to_wire(0, &call.request_id);
    let schema = Batches::new(call, &told.outputs)?.into_schema();
    super::info::channel(name, schema, &told)
}
