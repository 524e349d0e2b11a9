//! Reads a tensor inline through Arrow Flight, as a far client would.

use std::time::Instant;

use arrow_array::RecordBatch;
use arrow_array::cast::AsArray;
use arrow_array::types::Float64Type;
use arrow_flight::flight_service_client::FlightServiceClient;
use arrow_flight::{FlightClient, FlightDescriptor};
use futures::TryStreamExt;
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};

use super::formula::{Compared, Formula};
use crate::cli::failure::Failure;

/// Room on the way: with the default of 64 KiB a stream waits more than it moves.
const WINDOW_BYTES: u32 = 16 << 20;
/// A message of the host in one frame, not in 33.
const FRAME_BYTES: u32 = 1 << 20;

pub(super) struct InlineReader {
    runtime: Runtime,
    channel: Channel,
}

fn failed(what: &str, error: &dyn std::fmt::Display) -> Failure {
    Failure::other("FLIGHT", format!("{what} through Flight: {error}"))
}

impl InlineReader {
    /// A connection to the Flight service at `address`.
    pub(super) fn new(address: &str) -> Result<Self, Failure> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| failed("connecting", &error))?;
        let endpoint =
            Endpoint::try_from(address.to_owned()).map_err(|error| failed("connecting", &error))?;
        let channel = runtime
            .block_on(
                endpoint
                    .initial_stream_window_size(WINDOW_BYTES)
                    .initial_connection_window_size(WINDOW_BYTES)
                    .max_frame_size(FRAME_BYTES)
                    .connect(),
            )
            .map_err(|error| failed("connecting", &error))?;
        Ok(Self { runtime, channel })
    }

    /// Reads a float64 tensor with one axis; how long that took, and how it compares.
    pub(super) fn read(&self, name: &str, formula: Formula) -> Result<(f64, Compared), Failure> {
        let read = self.runtime.block_on(async {
            let mut client =
                FlightClient::new_from_inner(FlightServiceClient::new(self.channel.clone()));
            let info = client
                .get_flight_info(FlightDescriptor::new_path(vec![name.to_owned()]))
                .await?;
            let ticket = info
                .endpoint
                .into_iter()
                .find_map(|endpoint| endpoint.ticket);
            let start = Instant::now();
            let batches: Vec<RecordBatch> = client
                .do_get(ticket.unwrap_or_default())
                .await?
                .try_collect()
                .await?;
            Ok((start.elapsed().as_secs_f64(), batches))
        });
        let (seconds, batches) =
            read.map_err(|error: arrow_flight::error::FlightError| failed("reading", &error))?;
        let mut compared = Compared::default();
        for batch in &batches {
            let column = batch
                .columns()
                .first()
                .and_then(|column| column.as_primitive_opt::<Float64Type>())
                .ok_or_else(|| {
                    failed(
                        "reading",
                        &format_args!("`{name}` came as {:?}, not as float64", batch.schema()),
                    )
                })?;
            compared.add(column.values(), formula);
        }
        Ok((seconds, compared))
    }
}
