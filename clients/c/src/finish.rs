//! The ends of operations, by what they answer.

use std::any::Any;
use std::ffi::c_char;
use std::mem::MaybeUninit;
use std::sync::Arc;

use crate::answer::Answer;
use crate::client::Client;
use crate::failure::{Failure, entry};
use crate::operation::Operation;
use crate::pointer::{Room, hand_out, hand_out_text};
use crate::prepared::{Prepared, Slot};
use crate::segment::Segment;
use crate::stream::Stream;
use crate::tensor::Tensor;

/// Waits for an operation, and takes what it ends with.
fn finish<T: Any>(operation: Option<Box<Operation>>, what: &str) -> Result<T, Failure> {
    let operation = operation.ok_or_else(|| Failure::null("operation"))?;
    let outcome = operation.finish()?.downcast();
    outcome.map(|outcome| *outcome).map_err(|_| {
        Failure::argument(format!(
            "this operation does not end with {what}; finish it with the function that its start names"
        ))
    })
}

/// Ends an operation that has no result: waits for it if it is not done, and frees it, as do all the functions below, whatever they return.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_finish(operation: Option<Box<Operation>>) -> Option<Box<Failure>> {
    entry(|| finish(operation, "nothing"))
}

/// Ends a strait_connect_start.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_finish_client(
    operation: Option<Box<Operation>>,
    client: Option<&mut MaybeUninit<*mut Client>>,
) -> Option<Box<Failure>> {
    entry(|| {
        let done: Result<Client, _> = finish(operation, "a client");
        hand_out(client, "client", || done)
    })
}

/// Ends a strait_create_start or strait_map_start.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_finish_segment(
    operation: Option<Box<Operation>>,
    segment: Option<&mut MaybeUninit<*mut Segment>>,
) -> Option<Box<Failure>> {
    entry(|| {
        let done: Result<Segment, _> = finish(operation, "a segment");
        hand_out(segment, "segment", || done)
    })
}

/// Ends a strait_call_start or strait_stream_chunk_start.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_finish_result(
    operation: Option<Box<Operation>>,
    result: Option<&mut MaybeUninit<*mut Answer>>,
) -> Option<Box<Failure>> {
    entry(|| {
        let done: Result<Answer, _> = finish(operation, "a result");
        hand_out(result, "result", || done)
    })
}

/// Ends a strait_prepare_start.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_finish_prepared(
    operation: Option<Box<Operation>>,
    prepared: Option<&mut MaybeUninit<*mut Prepared>>,
) -> Option<Box<Failure>> {
    entry(|| {
        let done: Result<Prepared, _> = finish(operation, "a prepared call");
        hand_out(prepared, "prepared", || done)
    })
}

/// Ends a strait_prepare_stream_start.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_finish_stream(
    operation: Option<Box<Operation>>,
    stream: Option<&mut MaybeUninit<*mut Stream>>,
) -> Option<Box<Failure>> {
    entry(|| {
        let done: Result<Stream, _> = finish(operation, "a stream");
        hand_out(stream, "stream", || done)
    })
}

/// Ends a strait_prepared_call_start; see strait_prepared_call for `outputs`.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_finish_outputs(
    operation: Option<Box<Operation>>,
    outputs: Room<Tensor>,
    count: usize,
) -> Option<Box<Failure>> {
    entry(|| {
        let slot: Arc<Slot> = finish(operation, "the outputs of a prepared call")?;
        slot.outputs(outputs, count)
    })
}

/// Ends a strait_list_start, strait_kernels_start or strait_stats_start; strait_text_free frees the text.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_finish_text(
    operation: Option<Box<Operation>>,
    text: Option<&mut MaybeUninit<*mut c_char>>,
) -> Option<Box<Failure>> {
    entry(|| {
        let done: Result<String, _> = finish(operation, "a text");
        hand_out_text(text, "text", || done)
    })
}
