//! Kernels that are made ready once, for tensors in chunks of rows.

use std::ffi::CString;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use strait_client::wire::PreparedTensor;
use strait_client::{Client as Connected, PreparedStream as Chunks, Rows};

use crate::answer::Answer;
use crate::call::{Call, Ready};
use crate::failure::{Failure, asked, c_text, end, entry};
use crate::operation::{Lane, Operation, Outcome, done, hand_out_started, ready};
use crate::pointer::{Many, answer, hand_out};
use crate::prepared::{Bay, Borrowed, Brought, cancel, gone, named, spec_at};
use crate::tensor::Tensor;

/// A kernel that is ready for tensors that come in chunks of rows. It has a socket of its own.
pub struct Stream {
    slot: Arc<Bay<Chunks>>,
    ports: Vec<CString>,
    inputs: Vec<(CString, PreparedTensor)>,
    client: Connected,
}

/// A chunk of a stream, under way.
struct Chunking {
    chunks: Borrowed<Chunks>,
    /// Empty once they are all here.
    rows: Option<Rows>,
    ports: Vec<CString>,
    client: Connected,
}

impl Drop for Chunking {
    fn drop(&mut self) {
        if let Some(chunks) = &self.chunks.has {
            cancel(&self.client, chunks.number());
        }
    }
}

impl Lane for Chunking {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.chunks.has.as_ref().map(AsFd::as_fd)
    }

    fn advance(&mut self, wait: bool) -> Result<Option<Outcome>, Failure> {
        let rows = self.rows.as_mut().ok_or_else(gone)?;
        let chunks = self.chunks.get()?;
        while ready(chunks.as_fd(), wait)? {
            let received = chunks.receive(rows);
            if let Ok(false) = received {
                continue;
            }
            self.chunks.give_back();
            received?;
            let rows = self.rows.take().ok_or_else(gone)?;
            let ports = std::mem::take(&mut self.ports);
            let answer = Answer::of_rows(self.client.clone(), ports, rows);
            return done(answer).map(Some);
        }
        Ok(None)
    }
}

impl Stream {
    fn new(client: Connected, chunks: Chunks) -> Self {
        let ports = chunks.outputs().iter().map(|output| c_text(&*output.port));
        Self {
            ports: ports.collect(),
            inputs: named(chunks.inputs()),
            client,
            slot: Bay::new(chunks),
        }
    }

    fn of(stream: Option<&Self>) -> Result<&Self, Failure> {
        stream.ok_or_else(|| Failure::null("stream"))
    }
}

impl Ready {
    async fn prepare_stream(self) -> Result<Stream, Failure> {
        let client = self.client()?;
        let asynchronous = client.asynchronous();
        let prepare = self.dress_prepare(asynchronous.prepare(self.kernel()));
        let chunks = prepare.stream().await?;
        Ok(Stream::new(client, chunks))
    }
}

/// Makes a kernel that streams ready for a tensor in chunks of rows, as strait_prepare does for calls. The kernel keeps its state from the first chunk to the last,
/// and all its output rows are bit for bit those of one call on all rows.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_prepare_stream(
    call: Option<&Call>,
    stream: Option<&mut MaybeUninit<*mut Stream>>,
) -> Option<Box<Failure>> {
    entry(|| {
        hand_out(stream, "stream", || {
            let ready = Call::ready_to_prepare(call)?;
            let client = ready.client()?;
            let prepare = ready.dress_prepare(client.prepare(ready.kernel()));
            let chunks = prepare.stream()?;
            Ok(Stream::new(client.clone(), chunks))
        })
    })
}

/// Starts a strait_prepare_stream; strait_finish_stream ends it.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_prepare_stream_start(
    call: Option<&Call>,
    operation: Option<&mut MaybeUninit<*mut Operation>>,
) -> Option<Box<Failure>> {
    hand_out_started(operation, || {
        let ready = Call::ready_to_prepare(call)?;
        Operation::start(async move { done(ready.prepare_stream().await?) })
    })
}

/// How many inputs come in chunks; 0 for NULL.
#[unsafe(no_mangle)]
pub extern "C" fn strait_stream_inputs(stream: Option<&Stream>) -> usize {
    asked(stream, 0, |stream| stream.inputs.len())
}

/// Port and spec of the input at `index`; the first size is the largest number of rows in a chunk.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_stream_input(
    stream: Option<&Stream>,
    index: usize,
    spec: Option<&mut MaybeUninit<Tensor>>,
) -> Option<Box<Failure>> {
    entry(|| {
        answer(spec, Tensor::NONE, "spec", || {
            spec_at(&Stream::of(stream)?.inputs, index)
        })
    })
}

/// Sends the next rows of each input, in the order of strait_stream_input, perhaps none, and waits for the output, perhaps no rows either. With
/// `last` they are the last ones: the rest of the output comes, with the kernel's notes, and the next chunk begins another stream. A kernel that fails ends
/// the stream (strait_error_details has the number of the chunk), and so does an operation that is abandoned.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_stream_chunk(
    stream: Option<&Stream>,
    inputs: Many<Tensor>,
    count: usize,
    last: bool,
    result: Option<&mut MaybeUninit<*mut Answer>>,
) -> Option<Box<Failure>> {
    entry(|| {
        hand_out(result, "result", || {
            let stream = Stream::of(stream)?;
            let brought = Brought::new(&inputs, count)?;
            let rows = stream.slot.with(|chunks| {
                let elements = brought.elements();
                Ok(match last {
                    true => chunks.last(&elements)?,
                    false => chunks.chunk(&elements)?,
                })
            })?;
            let ports = stream.ports.clone();
            Ok(Answer::of_rows(stream.client.clone(), ports, rows))
        })
    })
}

/// Starts a strait_stream_chunk; strait_finish_result ends it. The rows have been sent when this returns.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_stream_chunk_start(
    stream: Option<&Stream>,
    inputs: Many<Tensor>,
    count: usize,
    last: bool,
    operation: Option<&mut MaybeUninit<*mut Operation>>,
) -> Option<Box<Failure>> {
    hand_out_started(operation, || {
        let stream = Stream::of(stream)?;
        let brought = Brought::new(&inputs, count)?;
        let (chunks, rows) = stream.slot.lend(|chunks| {
            let elements = brought.elements();
            Ok(chunks.begin(&elements, last)?)
        })?;
        Operation::on(Chunking {
            chunks,
            rows: Some(rows),
            ports: stream.ports.clone(),
            client: stream.client.clone(),
        })
    })
}

/// Ends a stream, in the host too. NULL is fine.
#[unsafe(no_mangle)]
pub extern "C" fn strait_stream_free(stream: Option<Box<Stream>>) {
    end(stream);
}
