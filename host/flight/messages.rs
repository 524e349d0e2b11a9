//! The messages of an exchange's client, as they come.

use arrow_flight::FlightData;
use futures::stream::StreamExt;
use tonic::Streaming;

use super::call::Call;
use super::refused::Refused;
use super::upload::broken_off;
use crate::error::Status;

/// Longest cmd of an exchange.
pub(super) const CMD_BYTES_MAX: usize = 64 << 10;

/// They may be waited for and left again: none is lost.
pub(super) struct Messages {
    pub(super) call: Call,
    pub(super) stream: Streaming<FlightData>,
    pub(super) refused: Refused,
}

impl Messages {
    /// The next one; none at their end.
    pub(super) async fn next(&mut self) -> Result<Option<FlightData>, Status> {
        let message_bytes_max = self.call.caller.host().config().message_bytes_max();
        let next = self.stream.next().await.transpose();
        next.map_err(|status| {
            let refused = self.refused.take();
            refused.unwrap_or_else(|| broken_off(&status, message_bytes_max))
        })
    }

    /// Throws away what is still to come.
    pub(super) async fn discard(&mut self) {
        while let Some(Ok(_)) = self.stream.next().await {}
    }
}
