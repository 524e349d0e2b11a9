//! What every call passes before tonic: who asks, and how long and how large its request may be.
//!
//! ```text
//! tonic's connection ──▶ Front: a Call, or refused ──▶ tonic's decoding ──▶ Service
//!                          └─ the body: Arriving ───────────┘
//! ```
//! tonic collects a whole message before a handler sees it, up to its limit and for as long as that
//! takes. [`Arriving`] stands in between: it follows the lengths of the messages, refuses a long
//! one at its first byte, charges what is collected to the host's budget, and ends a body that
//! does not go on. What tonic refuses by itself gets a reason here, as every error has.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use arrow_flight::flight_service_server::FlightServiceServer;
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use strait_memory::{Charge, MemoryError};
use tokio::time::{Instant, Sleep};
use tonic::body::Body;
use tonic::codegen::{BoxFuture, http};

use super::Peer;
use super::call::{Call, REASON, REQUEST_ID};
use super::info::bad_request;
use super::lengths::Lengths;
use super::refused::{Refused, foreign};
use super::service::Service;
use crate::error::{Code, Reason, Status};
use crate::session::Host;

/// Longest request of a call that is no upload.
const REQUEST_BYTES_MAX: u32 = 1 << 20;
/// Messages up to here are not charged, so that a full budget does not keep a `drop` out.
const UNCHARGED_BYTES_MAX: u32 = 64 << 10;
/// What comes before each message: whether it is compressed, and its length.
const PREFIX_BYTES: usize = 5;

const DO_PUT: &str = "DoPut";
const CALLS: [&str; 11] = [
    "Handshake",
    "ListFlights",
    "GetFlightInfo",
    "PollFlightInfo",
    "GetSchema",
    "DoGet",
    DO_PUT,
    "DoExchange",
    "DoAction",
    "ListActions",
    "unknown",
];

/// The Flight service behind its checks.
#[derive(Clone)]
pub(super) struct Front {
    flight: FlightServiceServer<Service>,
    host: Arc<Host>,
}

impl Front {
    pub(super) fn new(flight: FlightServiceServer<Service>, host: Arc<Host>) -> Self {
        Self { flight, host }
    }
}

impl tonic::codegen::Service<http::Request<Body>> for Front {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let called = request.uri().path().rsplit('/').next().unwrap_or_default();
        let [.., unknown] = CALLS;
        let name = CALLS
            .into_iter()
            .find(|name| *name == called)
            .unwrap_or(unknown);
        let peer = request.extensions().get::<Peer>();
        let id = request.headers().get(REQUEST_ID);
        let call = match Call::begin(&self.host, name, peer, id) {
            Ok(call) => call,
            Err(status) => return Box::pin(std::future::ready(Ok(status.into_http()))),
        };
        let refused = Refused::default();
        let (mut parts, body) = request.into_parts();
        parts.extensions.insert(call.clone());
        parts.extensions.insert(refused.clone());
        let lengths = (name == DO_PUT).then(Lengths::default);
        if let Some(lengths) = &lengths {
            parts.extensions.insert(lengths.clone());
        }
        let body = Arriving::new(body, lengths, &self.host, refused.clone());
        let answer = self
            .flight
            .call(http::Request::from_parts(parts, Body::new(body)));
        Box::pin(async move {
            let response = answer.await?;
            let headers = response.headers();
            if headers.contains_key(REASON) {
                return Ok(response);
            }
            let Some(status) = tonic::Status::from_header_map(headers) else {
                return Ok(response);
            };
            let status = refused.take().unwrap_or_else(|| foreign(name, &status));
            Ok(call.failed(&status).into_http())
        })
    }
}

/// A request's body on its way to tonic.
struct Arriving {
    body: Body,
    /// Of an upload.
    lengths: Option<Lengths>,
    host: Arc<Host>,
    refused: Refused,
    prefix: [u8; PREFIX_BYTES],
    prefix_len: usize,
    /// Bytes of the message at hand that are still to come.
    left: u32,
    messages: u64,
    /// For the message at hand, until the next one begins: then it has been taken.
    charge: Option<Charge>,
    /// How long it may take: the whole of a request, each wait of an upload.
    patience: Duration,
    since: Option<Instant>,
    // Never later than `since` and `patience` together.
    timer: Pin<Box<Sleep>>,
}

impl Arriving {
    fn new(body: Body, lengths: Option<Lengths>, host: &Arc<Host>, refused: Refused) -> Self {
        let config = host.config();
        let is_upload = lengths.is_some();
        let patience = match is_upload {
            true => config.stall(),
            false => config.request_time(),
        };
        Self {
            body,
            lengths,
            host: Arc::clone(host),
            refused,
            prefix: [0; PREFIX_BYTES],
            prefix_len: 0,
            left: 0,
            messages: 0,
            charge: None,
            patience,
            since: (!is_upload).then(Instant::now),
            timer: Box::pin(tokio::time::sleep(patience)),
        }
    }

    /// Follows the messages in the next bytes.
    fn pass(&mut self, mut bytes: &[u8]) -> Result<(), Status> {
        while let Some((first, rest)) = bytes.split_first() {
            if self.left > 0 {
                let done = bytes.len().min(self.left as usize);
                self.left -= u32::try_from(done).unwrap_or(self.left);
                bytes = &bytes[done..];
                continue;
            }
            self.prefix[self.prefix_len] = *first;
            self.prefix_len += 1;
            bytes = rest;
            if self.prefix_len == PREFIX_BYTES {
                let [_, length @ ..] = self.prefix;
                self.prefix_len = 0;
                self.begin(u32::from_be_bytes(length))?;
            }
        }
        Ok(())
    }

    fn begin(&mut self, length: u32) -> Result<(), Status> {
        self.left = length;
        self.messages += 1;
        self.charge = None;
        if let Some(lengths) = &self.lengths {
            lengths.put(length);
        } else {
            if length > REQUEST_BYTES_MAX {
                return Err(bad_request(format!(
                    "the request has {length} bytes; at most {REQUEST_BYTES_MAX} are taken: \
                     only DoPut takes more, in as many messages as it needs"
                )));
            }
            if self.messages > 1 {
                return Err(bad_request("a request of more than one message; send one"));
            }
        }
        // tonic refuses a longer one as soon as it sees the length.
        if length > UNCHARGED_BYTES_MAX && length as usize <= self.host.config().message_bytes_max()
        {
            let charge = self.host.budget().try_reserve(length.into());
            self.charge = Some(charge.map_err(MemoryError::from)?);
        }
        Ok(())
    }

    fn refuse(&mut self, status: Status) -> tonic::Status {
        self.charge = None;
        // Any code but that of a client that went away, which tonic takes for an end.
        let refusal = tonic::Status::aborted(status.message.as_str());
        self.refused.set(status);
        refusal
    }

    fn too_slow(&self) -> Status {
        let (what, setting) = match self.lengths.is_some() {
            true => ("nothing of the upload came for", "server.stall_ms"),
            false => (
                "the request did not arrive whole within",
                "server.request_ms",
            ),
        };
        Status::new(
            Code::DeadlineExceeded,
            Reason::Deadline,
            format!(
                "{what} {} ms (setting {setting}); send it again without such a pause",
                self.patience.as_millis()
            ),
        )
    }

    /// Whether the wait has become too long; if not, this task is woken when it does.
    fn is_over(&mut self, context: &mut Context<'_>) -> bool {
        let until = *self.since.get_or_insert_with(Instant::now) + self.patience;
        while self.timer.as_mut().poll(context).is_ready() {
            if Instant::now() >= until {
                return true;
            }
            self.timer.as_mut().reset(until);
        }
        false
    }
}

impl http_body::Body for Arriving {
    type Data = Bytes;
    type Error = tonic::Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, tonic::Status>>> {
        let this = self.get_mut();
        match Pin::new(&mut this.body).poll_frame(context) {
            Poll::Ready(Some(Ok(frame))) => {
                if this.lengths.is_some() {
                    this.since = None;
                }
                let passed = frame.data_ref().map_or(Ok(()), |data| this.pass(data));
                Poll::Ready(Some(match passed {
                    Ok(()) => Ok(frame),
                    Err(status) => Err(this.refuse(status)),
                }))
            }
            Poll::Pending if this.is_over(context) => {
                let status = this.too_slow();
                Poll::Ready(Some(Err(this.refuse(status))))
            }
            other => other,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
