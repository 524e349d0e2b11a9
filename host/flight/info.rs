//! Descriptors and tickets in, FlightInfo and schemas out.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arrow_flight::flight_descriptor::DescriptorType;
use arrow_flight::{FlightDescriptor, FlightEndpoint, FlightInfo};
use bytes::Bytes;
use serde::Serialize;
use strait_memory::{Copied, InputSource};
use strait_protocol as wire;
use strait_tensor::{SchemaMessage, TensorSpec};

use super::call::Call;
use super::refused::{bad_request, host_bug};
use super::ticket::{Source, Wanted, parts};
use crate::error::Status;
use crate::lease::LiveSegment;
use crate::session::{Host, Invoked, InvokedResult};

/// Longer JSON is not parsed on a thread of the runtime.
const PARSED_INLINE_BYTES_MAX: usize = 64 << 10;

/// What a descriptor asks for.
#[derive(Debug)]
pub(super) enum Target {
    /// A flight.
    Name(String),
    /// What comes of a stream.
    Channel(String),
    /// An invocation.
    Invoke(Box<wire::Invoke>),
}

impl Target {
    pub(super) async fn of(descriptor: &FlightDescriptor) -> Result<Self, Status> {
        match (descriptor.r#type(), descriptor.path.as_slice()) {
            (DescriptorType::Path, [name]) => Ok(Self::Name(name.clone())),
            (DescriptorType::Path, path) => Err(bad_request(format!(
                "a path of {} parts; a flight's path is its name, one part",
                path.len()
            ))),
            (DescriptorType::Cmd, _) if descriptor.cmd.len() <= PARSED_INLINE_BYTES_MAX => {
                Self::parse(&descriptor.cmd)
            }
            (DescriptorType::Cmd, _) => {
                let cmd = descriptor.cmd.clone();
                match tokio::task::spawn_blocking(move || Self::parse(&cmd)).await {
                    Ok(parsed) => parsed,
                    Err(error) => Err(host_bug("reading a cmd", error)),
                }
            }
            (DescriptorType::Unknown, _) => Err(bad_request(
                "a descriptor without a type; make it a path [name] or a cmd",
            )),
        }
    }

    fn parse(cmd: &[u8]) -> Result<Self, Status> {
        if let Ok(wire::Stream { channel, .. }) = serde_json::from_slice(cmd) {
            return Ok(Self::Channel(channel));
        }
        serde_json::from_slice(cmd)
            .map(|invoke| Self::Invoke(Box::new(invoke)))
            .map_err(|error| {
                bad_request(format!(
                    "the descriptor's cmd is not an invocation in JSON ({error}); \
                     it looks like {{\"kernel\": \"zscore\", \"inputs\": {{\"x\": \"name\"}}, \"parameters\": {{\"axis\": 0}}}}"
                ))
            })
    }

    /// The request id in an invocation's JSON.
    pub(super) fn request_id(&self) -> Option<&str> {
        match self {
            Self::Name(_) | Self::Channel(_) => None,
            Self::Invoke(invoke) => invoke.request_id.as_deref(),
        }
    }
}

fn schema_bytes<'a>(
    tensors: impl IntoIterator<Item = (&'a str, &'a TensorSpec)>,
) -> Result<Bytes, Status> {
    Ok(SchemaMessage::of(tensors)?.bytes.into())
}

/// A segment's schema: as it was put, with its metadata.
///
/// # Errors
/// `BAD_TENSOR` for an adopted segment with a tensor that Arrow has no type for.
pub(super) fn segment_schema(segment: &LiveSegment) -> Result<SchemaMessage, Status> {
    // The host's own header, which is no tensor's bytes: not counted.
    let uncounted = Copied::new();
    let read = |offset, bytes: &mut [u8]| segment.read_at(offset, bytes, &uncounted);
    // An adopted segment need not be an Arrow file.
    if let Some(own) = SchemaMessage::in_file(segment.tensors(), read)? {
        return Ok(own);
    }
    let tensors = segment.tensors().iter();
    let tensors = tensors.map(|tensor| (tensor.name.as_str(), &tensor.spec));
    Ok(SchemaMessage::of(tensors)?)
}

/// What `GetSchema` answers for an invocation: all outputs as columns.
pub(super) fn outputs_schema_bytes(outputs: &[(String, TensorSpec)]) -> Result<Bytes, Status> {
    schema_bytes(outputs.iter().map(|(port, spec)| (port.as_str(), spec)))
}

/// The mapping as JSON.
pub(super) fn mapping(host: &Host, segment: &LiveSegment) -> Result<Bytes, Status> {
    json(&host.mapping(segment))
}

pub(super) fn json(value: &impl Serialize) -> Result<Bytes, Status> {
    serde_json::to_vec(value)
        .map(Bytes::from)
        .map_err(|error| host_bug("writing JSON", error))
}

fn endpoint(
    host: &Host,
    segment: &LiveSegment,
    wanted: &Wanted,
    life: Option<Duration>,
) -> Result<FlightEndpoint, Status> {
    let mut endpoint = FlightEndpoint::new()
        .with_ticket(wanted.ticket()?)
        // No location means "this service", which the oldest clients know too.
        .with_app_metadata(mapping(host, segment)?);
    if let Some(life) = life {
        let at = (SystemTime::now() + life)
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let expires = endpoint.expiration_time.get_or_insert_default();
        expires.seconds = i64::try_from(at.as_secs()).unwrap_or(i64::MAX);
        expires.nanos = at.subsec_nanos().cast_signed();
    }
    Ok(endpoint)
}

fn signed(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// What comes of a stream, in one endpoint; nobody knows yet how much that is.
pub(super) fn channel(
    name: &str,
    schema: SchemaMessage,
    told: &wire::Streamed,
) -> Result<FlightInfo, Status> {
    let descriptor = json(&serde_json::json!({ "channel": name }))?;
    let endpoint = FlightEndpoint::new().with_ticket(Wanted::channel(name).ticket()?);
    Ok(FlightInfo {
        schema: schema.bytes.into(),
        flight_descriptor: Some(FlightDescriptor::new_cmd(descriptor)),
        endpoint: vec![endpoint],
        ordered: true,
        total_records: -1,
        total_bytes: -1,
        app_metadata: json(told)?,
    })
}

/// A flight by its name, in at most `most` endpoints.
pub(super) fn flight(
    host: &Host,
    name: &str,
    segment: &LiveSegment,
    most: u64,
) -> Result<FlightInfo, Status> {
    let whole = Wanted::name(name);
    let endpoints = parts(host, segment, most)
        .into_iter()
        .map(|rows| endpoint(host, segment, &whole.part(segment, rows), None))
        .collect::<Result<Vec<_>, _>>()?;
    let tensors = segment.tensors();
    Ok(FlightInfo {
        // An adopted segment may hold what Arrow cannot say; its mapping does.
        schema: segment_schema(segment)
            .map(|schema| schema.bytes.into())
            .unwrap_or_default(),
        flight_descriptor: Some(FlightDescriptor::new_path(vec![name.to_owned()])),
        ordered: endpoints.len() > 1,
        endpoint: endpoints,
        total_records: tensors
            .first()
            .map_or(0, |tensor| signed(tensor.spec.rows())),
        total_bytes: signed(tensors.iter().map(|tensor| tensor.length).sum()),
        app_metadata: mapping(host, segment)?,
    })
}

/// An invocation's results: one endpoint each, or up to `most` if it is one; its figures in `app_metadata`. Somebody far away
/// is told of no mapping.
pub(super) fn results(
    call: &Call,
    descriptor: FlightDescriptor,
    invoked: &Invoked,
    most: u64,
) -> Result<FlightInfo, Status> {
    let (caller, request_id) = (&call.caller, &*call.request_id);
    let host = caller.host();
    let mut endpoints = Vec::with_capacity(invoked.results.len());
    let mut entries = Vec::with_capacity(invoked.results.len());
    for result in &invoked.results {
        // None is in a frame: Flight asks for none.
        let Some(segment) = result.segment() else {
            continue;
        };
        let (wanted, life) = match &result.name {
            Some(name) => (Wanted::name(name), None),
            None => (
                Wanted::segment(segment),
                Some(caller.keep_undelivered(segment)),
            ),
        };
        // The endpoints of several tables in a row would be those of one.
        let most = if invoked.results.len() == 1 { most } else { 1 };
        for rows in parts(host, segment, most) {
            let mut endpoint = endpoint(host, segment, &wanted.part(segment, rows), life)?;
            if call.remote {
                endpoint.app_metadata.clear();
            }
            endpoints.push(endpoint);
        }
        let mut entry = host.entry(result, 0);
        entry.expires_ms = life.map(|life| u64::try_from(life.as_millis()).unwrap_or(u64::MAX));
        if call.remote {
            entry.mapping = None;
        }
        entries.push(entry);
    }
    let segments = || invoked.results.iter().filter_map(InvokedResult::segment);
    let tensors = || segments().flat_map(|segment| segment.tensors());
    Ok(FlightInfo {
        schema: schema_bytes(tensors().map(|t| (t.name.as_str(), &t.spec)))?,
        flight_descriptor: Some(descriptor),
        ordered: invoked.results.len() == 1 && endpoints.len() > 1,
        endpoint: endpoints,
        // Several outputs are several tables: a sum over them would mean nothing.
        total_records: match invoked.results.len() {
            1 => tensors()
                .next()
                .map_or(0, |tensor| signed(tensor.spec.rows())),
            _ => -1,
        },
        total_bytes: signed(tensors().map(|tensor| tensor.length).sum()),
        app_metadata: json(&invoked.to_wire(entries, request_id))?,
    })
}

/// A new life for a result's endpoint.
///
/// # Errors
/// `BAD_REQUEST` without a ticket; `SEGMENT_NOT_FOUND`, `FLIGHT_NOT_FOUND`.
pub(super) fn renewed(
    call: &Call,
    endpoint_given: &FlightEndpoint,
) -> Result<FlightEndpoint, Status> {
    let caller = &call.caller;
    let ticket = endpoint_given
        .ticket
        .as_ref()
        .ok_or_else(|| bad_request("an endpoint without a ticket"))?;
    let wanted = Wanted::of(ticket)?;
    let (segment, life): (Arc<LiveSegment>, _) = match wanted.source()? {
        Source::Name(name) => (caller.lookup(name)?, None),
        Source::Channel(_) => {
            return Err(bad_request(
                "the endpoint of a channel has no time that could be renewed; it is there as long as its producer",
            ));
        }
        Source::Segment(id) => {
            let segment = caller.undelivered(id)?;
            let life = caller.keep_undelivered(&segment);
            (segment, Some(life))
        }
    };
    wanted.rows_of(&segment)?;
    let mut endpoint = endpoint(caller.host(), &segment, &wanted, life)?;
    if call.remote {
        endpoint.app_metadata.clear();
    }
    Ok(endpoint)
}
