//! The calls of Flight, each as short as the room behind it allows.

use std::sync::Arc;

use arrow_flight::flight_service_server::FlightService;
use arrow_flight::{
    Action, ActionType, Criteria, Empty, FlightData, FlightDescriptor, FlightInfo,
    HandshakeRequest, HandshakeResponse, PollInfo, PutResult, Result as ActionResult, SchemaResult,
    Ticket,
};
use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt};
use tonic::{Request, Response, Streaming};
use tracing::Instrument;

use super::bodies::Bodies;
use super::call::Call;
use super::info::{self, Target};
use super::refused::{Refused, bad_request, host_bug};
use super::ticket::{Source, Wanted};
use super::waiting::answered;
use super::{action, exchange, follow, invoke, read, remote, upload};
use crate::error::Status;
use crate::lease::LiveSegment;
use crate::session::{Caller, Host};

/// Flights that ListFlights looks up at a time.
const PAGE: usize = 64;
/// Request header of DoPut: `true` lets it take the name of another flight.
const REPLACE: &str = "x-strait-replace";
/// Request header of DoPut: how many rows come. An upload of another number is not kept.
const ROWS: &str = "x-strait-rows";
/// Request header of GetFlightInfo: how many endpoints the client reads, all of them and in their order.
const ENDPOINTS: &str = "x-strait-endpoints";

/// The Flight service.
pub(super) struct Service {
    host: Arc<Host>,
}

type Answered<T> = Result<Response<T>, tonic::Status>;
type Messages<T> = BoxStream<'static, Result<T, tonic::Status>>;

impl Service {
    pub(super) fn new(host: Arc<Host>) -> Self {
        Self { host }
    }

    /// What the descriptor of a call asks for, under the request id that its body may carry.
    async fn target(
        &self,
        request: &Request<FlightDescriptor>,
    ) -> Result<(Call, Target), tonic::Status> {
        let call = Call::of(request)?;
        let target = Target::of(request.get_ref()).await;
        let id = target.as_ref().ok().and_then(Target::request_id);
        let call = call.identified(&self.host, id)?;
        let target = target.and_then(|target| match target {
            Target::Invoke(_) => call.known_only("a kernel call").map(|()| target),
            Target::Name(_) | Target::Channel(_) => Ok(target),
        });
        match target {
            Ok(target) => Ok((call, target)),
            Err(status) => Err(call.failed(&status)),
        }
    }

    async fn flight_info(
        &self,
        call: &Call,
        target: Target,
        descriptor: FlightDescriptor,
        endpoints: Result<u64, Status>,
    ) -> Result<FlightInfo, Status> {
        let endpoints = endpoints?;
        match target {
            Target::Name(name) => {
                let segment = call.caller.lookup(&name)?;
                info::flight(&self.host, &name, &segment, endpoints)
                    .map(|info| told(call.remote, info))
            }
            Target::Channel(name) => follow::info(call, &name),
            Target::Invoke(invoke) => {
                let id = Arc::clone(&call.request_id);
                let start = |answer| call.caller.invoke(None, *invoke, id, answer);
                let invoked = answered(call, start).await?;
                info::results(call, descriptor, &invoked, endpoints)
            }
        }
    }

    async fn schema(&self, call: &Call, target: Target) -> Result<SchemaResult, Status> {
        let schema = match target {
            Target::Name(name) => info::segment_schema(&*call.caller.lookup(&name)?)?
                .bytes
                .into(),
            Target::Channel(name) => follow::info(call, &name)?.schema,
            Target::Invoke(invoke) => {
                let id = Arc::clone(&call.request_id);
                let start = |answer| call.caller.open_only(*invoke, id, answer);
                info::outputs_schema_bytes(&answered(call, start).await?)?
            }
        };
        Ok(SchemaResult { schema })
    }

    async fn read(&self, call: &Call, ticket: &Ticket) -> Result<Messages<FlightData>, Status> {
        let wanted = Wanted::of(ticket)?;
        // tonic's own limits end with the response's head.
        let place = call.caller.account().stream().await?;
        let (segment, reading) = match wanted.source()? {
            Source::Channel(name) => return follow::channel(call, name, place).await,
            Source::Name(name) => {
                let reading = call.caller.begin_read(name)?;
                (Arc::clone(&reading.segment), Some(reading))
            }
            Source::Segment(id) => (call.caller.undelivered(id)?, None),
        };
        let segment = settled(segment).await?;
        let rows = wanted.rows_of(&segment)?;
        read::stream(&self.host, segment, rows, (place, reading), call.clone())
    }
}

/// A segment whose bytes can be read where they lie: a worker process that filled it lets go first.
async fn settled(segment: Arc<LiveSegment>) -> Result<Arc<LiveSegment>, Status> {
    if segment.is_settled() {
        return Ok(segment);
    }
    let seal = move || segment.seal().map(|()| segment);
    let sealed = tokio::task::spawn_blocking(seal).await;
    Ok(sealed.map_err(|error| host_bug("sealing a result", error))??)
}

/// What is told of a flight: somebody far away has no use for a mapping.
fn told(remote: bool, mut info: FlightInfo) -> FlightInfo {
    if remote {
        info.app_metadata.clear();
        for endpoint in &mut info.endpoint {
            endpoint.app_metadata.clear();
        }
    }
    info
}

fn replaces<T>(request: &Request<T>) -> Result<bool, Status> {
    match request
        .metadata()
        .get(REPLACE)
        .map(|value| value.as_bytes())
    {
        None | Some(b"false") => Ok(false),
        Some(b"true") => Ok(true),
        Some(_) => Err(bad_request(format!(
            "the header {REPLACE} must be `true` or `false`"
        ))),
    }
}

/// How many rows the client says that its upload has. Some clients can only end an upload, and not break it off.
fn announced_rows<T>(request: &Request<T>) -> Result<Option<u64>, Status> {
    let Some(value) = request.metadata().get(ROWS) else {
        return Ok(None);
    };
    let count = value.to_str().ok().and_then(|text| text.parse().ok());
    count.map(Some).ok_or_else(|| {
        bad_request(format!(
            "the header {ROWS} must be a number: how many rows the upload has in all"
        ))
    })
}

/// The most endpoints that the client wants: 1 if it does not say. Many clients read the first one only.
fn endpoints<T>(request: &Request<T>) -> Result<u64, Status> {
    let Some(value) = request.metadata().get(ENDPOINTS) else {
        return Ok(1);
    };
    let count = value.to_str().ok().and_then(|text| text.parse().ok());
    count.filter(|count| *count > 0).ok_or_else(|| {
        bad_request(format!(
            "the header {ENDPOINTS} must be a number from 1 on: how many endpoints of a flight you read"
        ))
    })
}

/// All whole flights whose names begin with `prefix`, a page at a time.
fn listed(
    caller: Caller,
    prefix: String,
) -> impl futures::Stream<Item = Result<FlightInfo, Status>> {
    let pages = stream::unfold(Some(None::<String>), move |after| {
        let (caller, prefix) = (caller.clone(), prefix.clone());
        async move {
            let found = match caller.list(after?.as_deref(), PAGE) {
                Ok(found) => found,
                Err(status) => return Some((stream::iter(vec![Err(status)]).boxed(), None)),
            };
            let next = match found.last() {
                Some((last, _)) if found.len() == PAGE => Some(Some(last.clone())),
                _ => None,
            };
            // Names only: a client that reads slowly keeps no segment.
            let names: Vec<_> = found
                .into_iter()
                .map(|(name, _)| name)
                .filter(|name| name.starts_with(&prefix))
                .collect();
            let flights = stream::iter(names)
                .then(move |name| described(caller.clone(), name))
                .filter_map(std::future::ready)
                .boxed();
            Some((flights, next))
        }
    });
    pages.flatten()
}

/// A flight with the schemas of its up to 128 columns, which takes long enough to do it where nobody
/// else is served; none if it is gone.
async fn described(caller: Caller, name: String) -> Option<Result<FlightInfo, Status>> {
    let describe = move || {
        let segment = caller.lookup(&name).ok()?;
        Some(info::flight(caller.host(), &name, &segment, 1))
    };
    let described = tokio::task::spawn_blocking(describe).await;
    described.unwrap_or_else(|error| Some(Err(host_bug("describing a flight", error))))
}

#[tonic::async_trait]
impl FlightService for Service {
    type HandshakeStream = Messages<HandshakeResponse>;
    type ListFlightsStream = Messages<FlightInfo>;
    type DoGetStream = Messages<FlightData>;
    type DoPutStream = Messages<PutResult>;
    type DoExchangeStream = Messages<FlightData>;
    type DoActionStream = Messages<ActionResult>;
    type ListActionsStream = Messages<ActionType>;

    /// Who the peer is has been shown by its socket, its certificate or the token in a header. Whoever sent one gets it back as
    /// stock clients take it: as the header of the calls that follow.
    async fn handshake(
        &self,
        request: Request<Streaming<HandshakeRequest>>,
    ) -> Answered<Self::HandshakeStream> {
        let call = Call::of(&request)?;
        let token = match call.remote {
            true => remote::token_of(request.metadata().as_ref()),
            false => None,
        };
        let mut response = call
            .answer(Ok(
                stream::once(async { Ok(HandshakeResponse::default()) }).boxed()
            ))?;
        if let Some(value) = token.and_then(|token| format!("Bearer {token}").parse().ok()) {
            response.metadata_mut().insert("authorization", value);
        }
        Ok(response)
    }

    async fn list_flights(&self, request: Request<Criteria>) -> Answered<Self::ListFlightsStream> {
        let call = Call::of(&request)?;
        let prefix = String::from_utf8(request.into_inner().expression.to_vec()).map_err(|_| {
            bad_request(
                "the criteria's expression must be text: names beginning with it are listed",
            )
        });
        let errors = call.clone();
        let flights = prefix.map(|prefix| {
            listed(errors.caller.clone(), prefix)
                .map(move |flight| match flight {
                    Ok(info) => Ok(told(errors.remote, info)),
                    Err(status) => Err(errors.failed(&status)),
                })
                .boxed()
        });
        call.answer(flights)
    }

    async fn get_flight_info(&self, request: Request<FlightDescriptor>) -> Answered<FlightInfo> {
        let (call, target) = self.target(&request).await?;
        let endpoints = endpoints(&request);
        let info = self.flight_info(&call, target, request.into_inner(), endpoints);
        call.answer(info.instrument(call.span.clone()).await)
    }

    /// An invocation is run to its end: the first answer is the complete one.
    async fn poll_flight_info(&self, request: Request<FlightDescriptor>) -> Answered<PollInfo> {
        let (call, target) = self.target(&request).await?;
        let endpoints = endpoints(&request);
        let descriptor = request.into_inner();
        // A stream is under way until its channel is not there any more; all else is answered when it is whole.
        let goes_on = matches!(target, Target::Channel(_)).then(|| descriptor.clone());
        let info = self.flight_info(&call, target, descriptor, endpoints);
        let info = info.instrument(call.span.clone()).await;
        call.answer(info.map(|info| PollInfo {
            info: Some(info),
            progress: goes_on.is_none().then_some(1.0),
            flight_descriptor: goes_on,
            expiration_time: None,
        }))
    }

    async fn get_schema(&self, request: Request<FlightDescriptor>) -> Answered<SchemaResult> {
        let (call, target) = self.target(&request).await?;
        call.answer(
            self.schema(&call, target)
                .instrument(call.span.clone())
                .await,
        )
    }

    async fn do_get(&self, request: Request<Ticket>) -> Answered<Self::DoGetStream> {
        let call = Call::of(&request)?;
        call.answer(
            self.read(&call, request.get_ref())
                .instrument(call.span.clone())
                .await,
        )
    }

    /// Answers its head at once: clients may wait for that before they send.
    async fn do_put(&self, request: Request<Streaming<FlightData>>) -> Answered<Self::DoPutStream> {
        let call = Call::of(&request)?;
        let errors = call.clone();
        let replace = replaces(&request);
        let rows = announced_rows(&request);
        let refused = Refused::of(&request);
        let bodies = Bodies::of(&request);
        let stored = async move {
            let _place = errors.caller.account().stream().await?;
            let (segment, is_named) = upload::receive(
                &errors,
                (replace?, rows?),
                request.into_inner(),
                &bodies,
                &refused,
            )
            .await?;
            Ok(PutResult {
                app_metadata: match (errors.remote, is_named) {
                    (true, true) => Bytes::new(),
                    // What calls name it by.
                    (true, false) => {
                        info::json(&serde_json::json!({ "segment": segment.id().to_string() }))?
                    }
                    (false, _) => info::mapping(errors.caller.host(), &segment)?,
                },
            })
        };
        let errors = call.clone();
        let stored = async move { stored.await.map_err(|status| errors.failed(&status)) };
        call.answer(Ok(
            stream::once(stored.instrument(call.span.clone())).boxed()
        ))
    }

    /// Answers its head at once, as DoPut.
    async fn do_exchange(
        &self,
        request: Request<Streaming<FlightData>>,
    ) -> Answered<Self::DoExchangeStream> {
        let call = Call::of(&request)?;
        let refused = Refused::of(&request);
        let place = {
            let caller = call.caller.clone();
            async move { caller.account().stream().await }
        };
        let replies = exchange::start(&call, place, request.into_inner(), refused);
        call.answer(Ok(replies))
    }

    async fn do_action(&self, request: Request<Action>) -> Answered<Self::DoActionStream> {
        let call = Call::of(&request)?;
        if request.get_ref().r#type == invoke::INVOKE {
            let asked = invoke::Asked::of(request.get_ref());
            let id = asked.as_ref().ok().and_then(invoke::Asked::request_id);
            let call = call.identified(&self.host, id)?;
            let results = match asked {
                Ok(asked) => {
                    invoke::run(&call, asked)
                        .instrument(call.span.clone())
                        .await
                }
                Err(status) => Err(status),
            };
            return call.answer(results.map(|results| stream::iter(results).map(Ok).boxed()));
        }
        let results = call
            .span
            .in_scope(|| action::run(&self.host, &call, request.get_ref()));
        call.answer(results.map(|results| stream::iter(results).map(Ok).boxed()))
    }

    async fn list_actions(&self, request: Request<Empty>) -> Answered<Self::ListActionsStream> {
        let call = Call::of(&request)?;
        call.answer(Ok(stream::iter(action::types()).map(Ok).boxed()))
    }
}
