//! What an upload is for: a flight, or an input of calls to come.

use std::sync::Arc;

use arrow_flight::FlightDescriptor;
use arrow_flight::flight_descriptor::DescriptorType;
use strait_memory::{Open, Segment};
use strait_tensor::FileLayout;

use super::refused::bad_request;
use crate::error::Status;
use crate::lease::LiveSegment;
use crate::session::{Caller, Upload};

/// The cmd of an upload that gets no name.
const UNNAMED: &str = "unnamed";

/// What becomes of an upload.
#[derive(Debug)]
pub(super) enum Goal {
    /// A flight.
    Named(Upload),
    /// What calls name by its segment. It is kept as a result is that nobody published: nothing of it is left if its client
    /// never comes back.
    Unnamed(Caller),
}

impl Goal {
    /// What the stream's first message says of it.
    ///
    /// # Errors
    /// `BAD_REQUEST`; as [`Caller::begin_upload`].
    pub(super) fn of(
        caller: &Caller,
        descriptor: Option<&FlightDescriptor>,
        replace: bool,
    ) -> Result<Self, Status> {
        let Some(descriptor) = descriptor else {
            return Err(bad_request(
                "the upload's first message has no descriptor; it must be the path [name]",
            ));
        };
        match (descriptor.r#type(), descriptor.path.as_slice()) {
            (DescriptorType::Cmd, _) if descriptor.cmd == UNNAMED => {
                caller.check_upload()?;
                Ok(Self::Unnamed(caller.clone()))
            }
            (DescriptorType::Cmd, _) => Err(bad_request(format!(
                "the upload's descriptor is a cmd that is not `{UNNAMED}`; it must be that, or the path [name]"
            ))),
            (_, [name]) => Ok(Self::Named(caller.begin_upload(name, replace)?)),
            (_, path) => Err(bad_request(format!(
                "the upload's descriptor has a path of {} parts; it must be [name]",
                path.len()
            ))),
        }
    }

    /// Whose it will be.
    pub(super) fn caller(&self) -> &Caller {
        match self {
            Self::Named(upload) => upload.caller(),
            Self::Unnamed(caller) => caller,
        }
    }

    pub(super) fn is_named(&self) -> bool {
        matches!(self, Self::Named(_))
    }

    /// All of it is there.
    pub(super) fn reached(
        self,
        segment: Segment<Open>,
        layout: FileLayout,
    ) -> Result<Arc<LiveSegment>, Status> {
        match self {
            Self::Named(upload) => upload.finish(segment, layout),
            Self::Unnamed(caller) => caller.keep_upload(segment, layout),
        }
    }
}
