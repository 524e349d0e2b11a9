//! What travels with each call of what is prepared: which inputs those are, and where they lie in a payload.

use std::sync::Arc;

use strait_protocol::{self as wire, PreparedTensor};
use strait_tensor::{TensorPlace, TensorSpec};

use crate::engine::{CancelToken, FramePart, Job, Means};
use crate::error::{Code, Reason, Status};
use crate::plugin::Kernel;
use crate::session::pipeline::Piped;
use crate::session::prepare::{Found, Resolved};

/// What is to be made ready.
#[derive(Debug)]
pub(super) enum ToPrepare {
    Kernel(Box<Job>, Means),
    Pipeline(Box<Piped>),
}

impl ToPrepare {
    /// What each CALL brings.
    pub(super) fn brought(&self) -> Vec<&TensorPlace> {
        match self {
            Self::Kernel(job, means) => {
                let inputs = job.inputs.iter().zip(&means.inputs);
                let brought = inputs.filter(|(_, source)| source.is_inline());
                brought.map(|(input, _)| &input.place).collect()
            }
            Self::Pipeline(piped) => {
                let brought = piped.inputs().iter().filter(|(found, _)| found.is_inline());
                brought.map(|(_, place)| place).collect()
            }
        }
    }

    /// Names it in log lines, and ends it.
    pub(super) fn ids(&self) -> (Arc<str>, CancelToken) {
        match self {
            Self::Kernel(job, means) => (Arc::clone(&job.request_id), means.cancel.clone()),
            Self::Pipeline(piped) => (Arc::clone(piped.request_id()), piped.cancel().clone()),
        }
    }
}

/// Whether `kernel` can be given `inputs` in chunks.
pub(super) fn check_stream(kernel: &Kernel, inputs: &Resolved) -> Result<(), Status> {
    let refused = |reason, message| Err(Status::new(Code::InvalidArgument, reason, message));
    if !kernel.streaming {
        let message = format!(
            "kernel `{}` does not stream: it must see whole tensors; call it with those",
            kernel.name
        );
        return refused(Reason::Unsupported, message);
    }
    for port in &kernel.inputs {
        // What is missing or wrong is told with the other arguments.
        let Some(Ok((found, place))) = inputs.get(&port.name) else {
            continue;
        };
        let name = &port.name;
        let wrong = match (found, port.whole) {
            (Found::Inline(_), true) => format!(
                "input `{name}` comes whole and not in chunks; give it as a flight or a segment"
            ),
            (Found::Segment(_), false) => format!(
                "input `{name}` comes in chunks; give its dtype, and its shape with the most rows of a chunk"
            ),
            (Found::Inline(_), false) if place.spec.shape.first().is_none_or(|rows| *rows == 0) => {
                format!(
                    "input `{name}` comes in chunks of rows; its shape begins with the most rows of one, at least 1"
                )
            }
            (Found::Inline(_), false) | (Found::Segment(_), true) => continue,
        };
        return refused(Reason::BadInput, wrong);
    }
    Ok(())
}

/// An input that each CALL brings.
pub(super) fn framed_place(port: &str, spec: TensorSpec) -> Result<(Found, TensorPlace), Status> {
    let port = crate::text::name(port);
    let length = spec.bytes().map_err(|error| {
        let message = format!("input `{port}`: {error}");
        Status::new(Code::InvalidArgument, Reason::BadInput, message)
    })?;
    let place = TensorPlace {
        name: port,
        spec,
        offset: 0,
        length,
    };
    Ok((Found::Inline(FramePart::default()), place))
}

/// Where tensors lie in a payload, and its length.
pub(super) fn placed<'a>(
    places: impl Iterator<Item = &'a TensorPlace>,
) -> Result<(Vec<PreparedTensor>, u64), Status> {
    let places: Vec<_> = places.collect();
    let (offsets, bytes) =
        wire::places(places.iter().map(|place| place.length)).ok_or_else(|| {
            let message = "the tensors of a CALL have more bytes together than can be counted";
            Status::new(Code::InvalidArgument, Reason::BadInput, message)
        })?;
    let tensors = places
        .iter()
        .zip(offsets)
        .map(|(place, offset)| PreparedTensor {
            port: place.name.clone(),
            dtype: place.spec.dtype,
            shape: place.spec.shape.clone(),
            offset,
            length: place.length,
        });
    Ok((tensors.collect(), bytes))
}

/// Whether `shape` is one of a tensor that is at most `most` along each axis.
pub(super) fn within(shape: &[u64], most: &[u64]) -> bool {
    shape.len() == most.len() && shape.iter().zip(most).all(|(size, most)| size <= most)
}
