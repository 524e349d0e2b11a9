//! A prepared kernel that is given a tensor in chunks of rows, and what comes of each.
//!
//! ```text
//! ChunkEdge::receive ─▶ Chunks (a turn for each) ─▶ engine: Ready::stream ─▶ ChunkEdge::send
//! ```
//! The kernel's state and its windows stay from the first chunk to the last; between two of them it has no turn.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use strait_memory::Charge;
use strait_tensor::TensorSpec;

use super::prepare::Deadline;
use super::prepared::{Called, Prepared};
use super::workers::OwnTurn;
use crate::engine::{Batch, Batches, CancelToken, Cause};
use crate::error::{Code, Reason, Status};

/// A chunk as it came: its payload in a frame.
#[derive(Debug)]
pub struct ChunkFrame {
    /// The frame.
    pub frame: Arc<Vec<u8>>,
    /// Where its payload is.
    pub payload: Range<usize>,
    /// No rows come after it.
    pub last: bool,
}

/// Why nothing more can be sent.
#[derive(Debug)]
pub enum Parted {
    /// Whoever asked for it has left.
    Left,
    /// Somebody is told this.
    Failed(Status),
}

/// Where the chunks of a stream come from and its results go.
pub trait ChunkEdge {
    /// Waits for the next chunk; none if none comes any more.
    ///
    /// # Errors
    /// What came and is no chunk.
    fn receive(&mut self) -> Result<Option<ChunkFrame>, Status>;

    /// Sends rows of the outputs, the payload in parts, without waiting. `done`: they are the last for the chunk that was
    /// received last.
    ///
    /// # Errors
    /// [`Parted`].
    fn send(&mut self, payload: Vec<Vec<u8>>, done: bool) -> Result<(), Parted>;

    /// Whether something of that could not be sent yet.
    fn is_full(&self) -> bool;

    /// Waits until all of it is sent.
    ///
    /// # Errors
    /// [`Parted`].
    fn flush(&mut self) -> Result<(), Parted>;
}

/// The chunks of one stream, each in its turn among all invocations.
struct Chunks<'a> {
    prepared: &'a Prepared,
    cancel: &'a CancelToken,
    edge: &'a mut dyn ChunkEdge,
    first: Option<ChunkFrame>,
    /// Number of the chunk that is under way, from 0, and whether it is the last.
    at: (u64, bool),
    deadline: Deadline,
    turn: Option<OwnTurn>,
    /// Of memory that the guest has taken.
    memory: Option<Charge>,
    /// What came of the last chunk.
    end: Vec<Vec<u8>>,
    /// Why it ended, where that is not the engine's affair.
    refused: Option<Status>,
}

impl Prepared {
    /// Runs the kernel on chunk after chunk, the first of which is `first`, until the last; what the OK to that says, which
    /// `edge` was not given. Blocks.
    ///
    /// # Errors
    /// What the chunk is answered at which it ended: which, and why.
    pub fn stream(
        &self,
        first: ChunkFrame,
        cancel: &CancelToken,
        edge: &mut dyn ChunkEdge,
    ) -> Result<Called, Status> {
        let mut chunks = Chunks {
            prepared: self,
            cancel,
            edge,
            first: Some(first),
            at: (0, false),
            deadline: Deadline::after(self.deadline_ms),
            turn: None,
            memory: None,
            end: Vec::new(),
            refused: None,
        };
        let mut ready = self.ready.lock();
        let ended = ready.stream(&mut chunks, cancel);
        let (refused, (at, _)) = (chunks.refused.take(), chunks.at);
        let mut status = match (ended, refused) {
            (Ok(notes), _) => {
                // Within the turn that the last chunk has.
                self.renew(&mut **ready);
                let payload = std::mem::take(&mut chunks.end);
                return Ok(Called { payload, notes });
            }
            (Err(_), Some(status)) => status,
            (Err(failed), None) => {
                self.caller.note_cost(&self.kernel.plugin, &failed);
                failed.into()
            }
        };
        status.message = format!("chunk {at} of a stream: {}", status.message);
        let status = status.with("chunk", at);
        self.warn(&status);
        Err(status)
    }
}

impl Chunks<'_> {
    /// The engine ends the invocation with that, and `status` is answered.
    fn refuse(&mut self, status: Status) -> Cause {
        self.refused = Some(status);
        Cause::Cancelled
    }

    /// Nobody is there any more.
    fn left(&mut self) -> Cause {
        let gone = "the stream ended before its last chunk; send that as LAST";
        self.refuse(Status::new(Code::Cancelled, Reason::Cancelled, gone))
    }

    fn parted(&mut self, parted: Parted) -> Cause {
        match parted {
            Parted::Left => self.left(),
            Parted::Failed(status) => self.refuse(status),
        }
    }

    fn take_turn(&mut self) -> Result<(), Cause> {
        let Prepared { caller, kernel, .. } = self.prepared;
        let turn = caller
            .turn(self.prepared.name(), self.deadline, self.cancel)
            .and_then(|turn| {
                // Others of its calls may have been the last straw meanwhile, and a stream lives longer than a right may.
                caller.check_in_service(&kernel.plugin)?;
                caller.check_call(kernel)?;
                Ok(turn)
            });
        self.turn = Some(turn.map_err(|status| self.refuse(status))?);
        Ok(())
    }
}

impl Batches for Chunks<'_> {
    fn next(&mut self) -> Result<Batch, Cause> {
        // Others have theirs while it waits.
        self.turn = None;
        let flushed = self.edge.flush();
        flushed.map_err(|parted| self.parted(parted))?;
        let chunk = match self.first.take() {
            Some(first) => first,
            None => {
                self.at.0 += 1;
                let received = self.edge.receive();
                let received = received.map_err(|status| self.refuse(status))?;
                received.ok_or_else(|| self.left())?
            }
        };
        self.at.1 = chunk.last;
        self.deadline = Deadline::after(self.prepared.deadline_ms);
        let begun = self
            .prepared
            .brought(&chunk.frame, chunk.payload)
            .and_then(|brought| {
                self.prepared.caller.host().admit()?;
                Ok(brought)
            });
        let brought = begun.map_err(|status| self.refuse(status))?;
        self.take_turn()?;
        Ok(Batch {
            brought,
            last: chunk.last,
            deadline: self.deadline.at,
        })
    }

    fn keeps(&mut self, bytes: u64) -> Result<(), Cause> {
        self.memory = None;
        let charge = self.prepared.caller.charge(bytes);
        self.memory = Some(charge.map_err(|status| self.refuse(status))?);
        Ok(())
    }

    fn give(&mut self, outputs: Vec<(TensorSpec, Vec<u8>)>, done: bool) -> Result<Instant, Cause> {
        let payload = self.prepared.payload(outputs);
        let payload = payload.map_err(|status| self.refuse(status))?;
        if done && self.at.1 {
            // It goes with what the kernel has to say.
            self.end = payload;
            return Ok(self.deadline.at);
        }
        let sent = self.edge.send(payload, done);
        sent.map_err(|parted| self.parted(parted))?;
        if !done && self.edge.is_full() {
            // Whoever does not read keeps no turn, and that is not the kernel's time: it has what is left of its own.
            let left = self.deadline.at.saturating_duration_since(Instant::now());
            self.turn = None;
            let flushed = self.edge.flush();
            flushed.map_err(|parted| self.parted(parted))?;
            self.deadline = Deadline::after(self.prepared.deadline_ms);
            self.take_turn()?;
            self.deadline.at = Instant::now() + left;
        }
        Ok(self.deadline.at)
    }
}
