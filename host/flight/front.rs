//! What every call passes before tonic: who asks.
//!
//! ```text
//! tonic's connection ──▶ Front: a Call, or refused ──▶ tonic's decoding ──▶ Service
//!                          └─ the body: Arriving ───────────┘
//! ```
//! What tonic refuses by itself gets a reason here, as every error has.

use std::convert::Infallible;
use std::sync::Arc;
use std::task::{Context, Poll};

use arrow_flight::flight_service_server::FlightServiceServer;
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service as _, http};
use tonic_health::pb::health_server::HealthServer;
use tonic_health::server::HealthService;

use super::Peer;
use super::arriving::Arriving;
use super::bodies::Bodies;
use super::call::{Call, REASON};
use super::health;
use super::refused::{Refused, foreign};
use super::service::Service;
use crate::session::Host;

const DO_PUT: &str = "DoPut";
const DO_EXCHANGE: &str = "DoExchange";
const CALLS: [&str; 11] = [
    "Handshake",
    "ListFlights",
    "GetFlightInfo",
    "PollFlightInfo",
    "GetSchema",
    "DoGet",
    DO_PUT,
    DO_EXCHANGE,
    "DoAction",
    "ListActions",
    "unknown",
];

/// The Flight service behind its checks.
#[derive(Clone)]
pub(super) struct Front {
    flight: FlightServiceServer<Service>,
    health: HealthServer<HealthService>,
    host: Arc<Host>,
}

impl Front {
    pub(super) fn new(
        flight: FlightServiceServer<Service>,
        health: HealthServer<HealthService>,
        host: Arc<Host>,
    ) -> Self {
        Self {
            flight,
            health,
            host,
        }
    }

    /// A call of the health service.
    fn ask_health(
        &self,
        request: http::Request<Body>,
    ) -> BoxFuture<http::Response<Body>, Infallible> {
        let (parts, body) = request.into_parts();
        let body = Arriving::new(body, None, &self.host, Refused::default());
        let request = http::Request::from_parts(parts, Body::new(body));
        self.health.clone().call(request)
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
        if request.uri().path().starts_with(health::PATH) {
            return self.ask_health(request);
        }
        let called = request.uri().path().rsplit('/').next().unwrap_or_default();
        let [.., unknown] = CALLS;
        let name = CALLS
            .into_iter()
            .find(|name| *name == called)
            .unwrap_or(unknown);
        let peer = request.extensions().get::<Peer>();
        let call = match Call::begin(&self.host, name, peer, request.headers()) {
            Ok(call) => call,
            Err(refused) => {
                return Box::pin(async move {
                    if let Some((guesses, time)) = refused.wait {
                        guesses.wait(time).await;
                    }
                    Ok(refused.status.into_http())
                });
            }
        };
        let refused = Refused::default();
        let (mut parts, body) = request.into_parts();
        parts.extensions.insert(call.clone());
        parts.extensions.insert(refused.clone());
        let bodies = match name {
            DO_PUT => Some(Bodies::default()),
            DO_EXCHANGE => Some(Bodies::staying()),
            _ => None,
        };
        if let Some(bodies) = &bodies {
            parts.extensions.insert(bodies.clone());
        }
        let body = Arriving::new(body, bodies, &self.host, refused.clone());
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
