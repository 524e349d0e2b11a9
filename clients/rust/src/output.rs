//! A call's result, wherever it is.

use strait_tensor::{TensorPlace, TensorSpec};

use crate::connection::Payload;
use crate::error::Error;
use crate::segment::MappedSegment;
use crate::session::Session;
use crate::tensor::{TensorView, range};
use crate::wire::{Flight, InlineResult};

/// A call's result: pages that this process maps or, of a small one, its elements as the reply brought them.
#[derive(Debug)]
pub enum Output {
    /// In shared memory.
    Mapped(MappedSegment),
    /// In this process alone.
    Inline(InlineTensor),
}

impl Output {
    /// Its tensor, named as the port.
    ///
    /// # Errors
    /// [`Error::Forked`] in a child of the process that mapped it.
    pub fn tensor(&self) -> Result<TensorView<'_>, Error> {
        match self {
            Self::Inline(tensor) => Ok(tensor.view()),
            // A result's segment has one tensor.
            Self::Mapped(segment) => {
                let first = segment.tensors()?.next();
                first.ok_or_else(|| Error::Protocol("a result without a tensor".into()))
            }
        }
    }

    /// Its segment, if it has one.
    #[must_use]
    pub fn segment(&self) -> Option<&MappedSegment> {
        match self {
            Self::Mapped(segment) => Some(segment),
            Self::Inline(_) => None,
        }
    }
}

/// A small tensor that came in a reply.
#[derive(Debug)]
pub struct InlineTensor {
    place: TensorPlace,
    payload: Payload,
}

impl InlineTensor {
    /// The one that `result` says is in `payload`.
    pub(crate) fn new(name: &str, result: InlineResult, payload: &Payload) -> Result<Self, Error> {
        let wrong = |what: String| Err(Error::Protocol(format!("inline result {name:?}: {what}")));
        let InlineResult {
            dtype,
            shape,
            offset,
            length,
        } = result;
        let spec = TensorSpec { dtype, shape };
        match spec.bytes() {
            Ok(bytes) if bytes == length => {}
            Ok(bytes) => return wrong(format!("{spec} has {bytes} bytes, not {length}")),
            Err(error) => return wrong(error.to_string()),
        }
        let had = payload.bytes().len() as u64;
        if offset.checked_add(length).is_none_or(|end| end > had) {
            return wrong(format!("{length} bytes at {offset} of a payload of {had}"));
        }
        if length > 0 && offset % crate::wire::PAYLOAD_ALIGN as u64 != 0 {
            return wrong(format!(
                "it is at {offset}, where its elements are not aligned"
            ));
        }
        Ok(Self {
            place: TensorPlace {
                name: name.to_owned(),
                spec,
                offset,
                length,
            },
            payload: payload.clone(),
        })
    }

    fn view(&self) -> TensorView<'_> {
        TensorView::of(&self.place, self.payload.bytes())
    }

    /// Element type and sizes.
    #[must_use]
    pub fn spec(&self) -> &TensorSpec {
        &self.place.spec
    }

    /// Its bytes: little-endian, row-major, contiguous.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.payload.bytes()[range(&self.place)]
    }
}

impl Session {
    pub(crate) async fn publish_output(
        &self,
        output: &Output,
        name: &str,
        replace: bool,
    ) -> Result<Flight, Error> {
        match output {
            Output::Mapped(segment) => self.publish_result(segment, name, replace).await,
            Output::Inline(tensor) => {
                // As of one that has a segment: its tensor is named as the port.
                let place = &tensor.place;
                let filled = self.filled(&place.name, &place.spec, tensor.bytes());
                let mut segment = filled.await?;
                self.publish(&mut segment, name, replace).await
            }
        }
    }
}
