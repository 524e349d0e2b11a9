//! Channels: the output of a stream that another session feeds.

use crate::connection::Beside;
use crate::error::Error;
use crate::prepared::{Prepared, PreparedResult};
use crate::session::Session;
use crate::wire::{self, Header, Note, Op, PreparedTensor, TraceContext};

/// Reads a channel: batches of rows, in their order. It has a socket of its own; dropping it leaves the channel, which
/// tells its producer, unless that lets a consumer come back.
///
/// A batch is acknowledged when the next one is requested, or by [`acknowledge`](Self::acknowledge), so that a consumer
/// that comes back gets again those that were not finished.
#[derive(Debug)]
pub struct ChannelReader {
    kernel: String,
    /// Receives as what is prepared does, and sends nothing.
    batches: Prepared,
    /// Of the batch that was received last.
    number: u64,
    is_acknowledged: bool,
    /// The kernel's notes, once it is over.
    notes: Option<Vec<Note>>,
}

impl Session {
    pub(crate) async fn read_channel(&self, name: &str) -> Result<ChannelReader, Error> {
        let body = wire::Stream {
            channel: name.to_owned(),
            request_id: self.request_id(),
        };
        let pending = self.request(Op::Stream, &body, Beside::default())?;
        let (told, fds) = pending.await?.read::<wire::Streamed>()?;
        let batches = wire::Prepared {
            prepared: 0,
            request_bytes: 0,
            inputs: Vec::new(),
            reply_bytes: told.batch_bytes,
            outputs: told.outputs,
            ring: None,
            request_id: told.request_id,
        };
        let first = told.first.checked_sub(1);
        Ok(ChannelReader {
            kernel: told.kernel,
            batches: Prepared::new(self.clone(), batches, fds, false)?,
            number: first.ok_or_else(|| {
                Error::Protocol("the OK to STREAM: batches are counted from 1".to_owned())
            })?,
            is_acknowledged: true,
            notes: None,
        })
    }
}

impl ChannelReader {
    /// The kernel whose outputs come.
    #[must_use]
    pub fn kernel(&self) -> &str {
        &self.kernel
    }

    /// The outputs, their shapes with the most rows of a batch.
    #[must_use]
    pub fn outputs(&self) -> &[PreparedTensor] {
        self.batches.outputs()
    }

    /// Number of the batch that was received last; the channel's first one is 1.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.number
    }

    /// The kernel's notes, at the end.
    #[must_use]
    pub fn notes(&self) -> &[Note] {
        self.notes.as_deref().unwrap_or_default()
    }

    /// Acknowledges the batch before, and waits for the next one; none at the end of the stream.
    ///
    /// # Errors
    /// [`Error::Remote`] with the reason why no more comes: `PRODUCER_LOST`, or what the producer was told;
    /// [`Error::Disconnected`] if the host has ended.
    #[expect(
        clippy::should_implement_trait,
        reason = "a batch borrows what was received"
    )]
    pub fn next(&mut self) -> Result<Option<PreparedResult<'_>>, Error> {
        if self.notes.is_some() {
            return Ok(None);
        }
        if self.batches.broken {
            return Err(Error::Disconnected);
        }
        self.acknowledge()?;
        self.batches.sequence = Header::sequence_of_batch(self.number + 1);
        let received = self.batches.receive(&[Op::Chunk, Op::Last]);
        // After an error nothing comes.
        self.batches.broken = true;
        let (op, notes) = received?;
        self.batches.broken = false;
        self.number += 1;
        self.is_acknowledged = false;
        if op == Op::Last {
            self.notes = Some(notes);
            // Whoever does not take it has ended, and that is what it was for.
            let _ = self.acknowledge();
            return Ok(None);
        }
        Ok(Some(self.batches.result(notes)))
    }

    /// Acknowledges the batch that was received last, without waiting for the next one.
    ///
    /// # Errors
    /// Those of Linux, but for a channel that is over: why is what [`Self::next`] tells.
    pub fn acknowledge(&mut self) -> Result<(), Error> {
        if self.is_acknowledged {
            return Ok(());
        }
        let header = Header::of(Op::Ok, self.batches.sequence, (0, 0), TraceContext::NONE);
        // Why it is over is what comes next.
        match self.batches.link.send(&[&header.encode()]) {
            Ok(()) | Err(Error::Disconnected) => {}
            Err(error) => return Err(error),
        }
        self.is_acknowledged = true;
        Ok(())
    }
}
