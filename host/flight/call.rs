//! One call: who asks, under which request id, and how its end is told.

use std::sync::Arc;
use std::time::Duration;

use tonic::codegen::http::HeaderMap;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response};

use super::connection::{State, Working};
use super::guesses::Guesses;
use super::{Peer, Who};
use crate::error::{Code, Reason, Status};
use crate::session::{Caller, Host};

/// Header of requests and responses: the request id.
pub(super) const REQUEST_ID: &str = "x-request-id";
/// Trailer of errors: the stable reason.
pub(super) const REASON: &str = "x-strait-reason";

/// Longest error text sent, in bytes: gRPC C++ refuses more than 8 KiB of trailers in all.
const MESSAGE_BYTES_MAX: usize = 2048;
/// Longest details sent, in bytes before base64.
const DETAILS_BYTES_MAX: usize = 3072;
/// Longest part of a guest's stack that is sent; the host's log has all of it.
const BACKTRACE_BYTES_MAX: usize = 2048;

/// A call that was let in.
#[derive(Clone, Debug)]
pub(super) struct Call {
    pub(super) caller: Caller,
    /// Over TCP: whoever asks cannot map.
    pub(super) remote: bool,
    /// And need not have shown who it is.
    is_open: bool,
    pub(super) request_id: Arc<str>,
    pub(super) span: tracing::Span,
    name: &'static str,
    connection: Option<Arc<State>>,
    /// The client chose the id, in a header.
    is_id_given: bool,
}

/// A call that was not let in, and how long that is kept from it.
pub(super) struct NotBegun {
    pub(super) status: tonic::Status,
    pub(super) wait: Option<(Arc<Guesses>, Duration)>,
}

impl From<tonic::Status> for NotBegun {
    fn from(status: tonic::Status) -> Self {
        Self { status, wait: None }
    }
}

impl Call {
    /// Lets a request in. Its id is the header's, or a new one.
    ///
    /// # Errors
    /// `BAD_REQUEST` for an id that is none; `PRINCIPAL` for a peer whom the host did not let in; over TCP what is wrong with the
    /// token or certificate.
    pub(super) fn begin(
        host: &Arc<Host>,
        name: &'static str,
        peer: Option<&Peer>,
        headers: &HeaderMap,
    ) -> Result<Self, NotBegun> {
        // Not even text: refused as every other id that is none.
        let id = headers.get(REQUEST_ID);
        let given = id.map(|id| id.to_str().unwrap_or("\u{fffd}"));
        let request_id = match host.request_id(given) {
            Ok(id) => id,
            Err(status) => {
                let fresh = host
                    .request_id(None)
                    .map_err(|status| to_tonic(&status, "-"))?;
                return Err(to_tonic(&status, &fresh).into());
            }
        };
        let connection = peer.and_then(|peer| peer.connection.clone());
        let far = match peer.map(|peer| &peer.who) {
            Some(Who::Far(remote)) => Some(remote),
            Some(Who::Near(_)) | None => None,
        };
        let caller = match peer.map(|peer| &peer.who) {
            None => host.caller(None),
            Some(Who::Near(caller)) => caller.clone(),
            Some(Who::Far(remote)) => match remote.caller(host, headers) {
                // It is told in the log by whoever counts it.
                Err(refused) => {
                    return Err(NotBegun {
                        status: to_tonic(&refused.status, &request_id),
                        wait: Some((Arc::clone(remote.guesses()), refused.wait)),
                    });
                }
                Ok(caller) => match connection.as_ref().map(|state| state.admit(&caller)) {
                    Some(Err(status)) => Err(status),
                    Some(Ok(())) | None => Ok(caller),
                },
            },
        };
        let span = span(name, &request_id, caller.as_ref().ok());
        match caller {
            Ok(caller) => Ok(Self {
                caller,
                remote: far.is_some(),
                is_open: far.is_some_and(|remote| remote.is_open()),
                request_id,
                span,
                name,
                connection,
                is_id_given: id.is_some(),
            }),
            Err(status) => {
                span.in_scope(|| tracing::warn!(reason = status.reason.name(), "refused"));
                Err(to_tonic(&status, &request_id).into())
            }
        }
    }

    /// The call that let this request in.
    ///
    /// # Errors
    /// If none did, which is a bug of ours.
    pub(super) fn of<T>(request: &Request<T>) -> Result<Self, tonic::Status> {
        let found = request.extensions().get::<Self>().cloned();
        found.ok_or_else(|| tonic::Status::internal("a request that nobody let in"))
    }

    /// The same under the id in the request's body, if there is one and none in the header.
    ///
    /// # Errors
    /// `BAD_REQUEST` for an id that is none.
    pub(super) fn identified(self, host: &Host, id: Option<&str>) -> Result<Self, tonic::Status> {
        let Some(id) = id.filter(|_| !self.is_id_given) else {
            return Ok(self);
        };
        let request_id = host
            .request_id(Some(id))
            .map_err(|status| self.failed(&status))?;
        let span = span(self.name, &request_id, Some(&self.caller));
        Ok(Self {
            request_id,
            span,
            ..self
        })
    }

    /// What it came on.
    pub(super) fn connection(&self) -> Option<Arc<State>> {
        self.connection.clone()
    }

    /// The host does something for it until the guard drops: its connection is waited for.
    pub(super) fn working(&self) -> Option<Working> {
        self.connection.as_ref().map(State::working)
    }

    /// Whether somebody has shown who it is.
    ///
    /// # Errors
    /// `UNSUPPORTED_OP` for a call over TCP to a host that asks nobody; `what` it asked for.
    pub(super) fn known_only(&self, what: &str) -> Result<(), Status> {
        if !self.is_open {
            return Ok(());
        }
        let message = format!(
            "{what} over TCP needs a token or a client certificate, and this host asks for none; \
             connect to the unix socket, or have it started with --tokens"
        );
        Err(Status::new(
            Code::Unimplemented,
            Reason::UnsupportedOp,
            message,
        ))
    }

    /// Whether it comes from this machine by a unix socket.
    ///
    /// # Errors
    /// `UNSUPPORTED_OP` for a call over TCP; `what` it asked for, and what there is `instead`.
    pub(super) fn near_only(&self, what: &str, instead: &str) -> Result<(), Status> {
        if !self.remote {
            return Ok(());
        }
        let message = format!(
            "{what} is for processes on the host's machine, and this call came over TCP; {instead}"
        );
        Err(Status::new(
            Code::Unimplemented,
            Reason::UnsupportedOp,
            message,
        ))
    }

    /// The end of the call.
    pub(super) fn answer<T>(
        &self,
        result: Result<T, Status>,
    ) -> Result<Response<T>, tonic::Status> {
        let message = result.map_err(|status| self.failed(&status))?;
        self.span.in_scope(|| tracing::debug!("answered"));
        let mut response = Response::new(message);
        insert(response.metadata_mut(), REQUEST_ID, &self.request_id);
        Ok(response)
    }

    /// A failure, logged and as it goes out.
    pub(super) fn failed(&self, status: &Status) -> tonic::Status {
        self.span.in_scope(|| {
            tracing::warn!(
                code = status.code.name(),
                reason = status.reason.name(),
                message = status.message,
                backtrace = status.backtrace,
                "call failed"
            );
        });
        to_tonic(status, &self.request_id)
    }
}

fn span(name: &'static str, request_id: &str, caller: Option<&Caller>) -> tracing::Span {
    let principal = caller.map(|caller| tracing::field::display(caller.principal()));
    tracing::info_span!("flight", call = name, request_id, principal)
}

fn insert(metadata: &mut MetadataMap, key: &'static str, value: &str) {
    // Ids and reasons are plain ASCII; one that were not would be left out, not panic.
    if let Ok(value) = value.parse() {
        metadata.insert(key, value);
    }
}

fn grpc_code(code: Code) -> tonic::Code {
    match code {
        Code::InvalidArgument => tonic::Code::InvalidArgument,
        Code::NotFound => tonic::Code::NotFound,
        Code::AlreadyExists => tonic::Code::AlreadyExists,
        Code::FailedPrecondition => tonic::Code::FailedPrecondition,
        Code::ResourceExhausted => tonic::Code::ResourceExhausted,
        Code::OutOfRange => tonic::Code::OutOfRange,
        Code::DeadlineExceeded => tonic::Code::DeadlineExceeded,
        Code::Cancelled => tonic::Code::Cancelled,
        Code::Internal => tonic::Code::Internal,
        Code::PermissionDenied => tonic::Code::PermissionDenied,
        Code::Unauthenticated => tonic::Code::Unauthenticated,
        Code::Unavailable => tonic::Code::Unavailable,
        Code::Unimplemented => tonic::Code::Unimplemented,
    }
}

/// The status as gRPC has it; its details are JSON.
fn to_tonic(status: &Status, request_id: &str) -> tonic::Status {
    let mut details = serde_json::json!({
        "code": status.code.name(),
        "reason": status.reason.name(),
        "request_id": request_id,
        "details": status.details,
    });
    if let Some(backtrace) = &status.backtrace {
        details["backtrace"] =
            backtrace[..backtrace.floor_char_boundary(BACKTRACE_BYTES_MAX)].into();
    }
    let mut json = details.to_string();
    if json.len() > DETAILS_BYTES_MAX
        && let Some(of_error) = details["details"].as_object_mut()
    {
        // The longest one; the data socket has it.
        of_error.remove("diagnostic");
        json = details.to_string();
    }
    if json.len() > DETAILS_BYTES_MAX {
        details["details"] = serde_json::json!({});
        json = details.to_string();
    }
    let mut metadata = MetadataMap::new();
    insert(&mut metadata, REQUEST_ID, request_id);
    insert(&mut metadata, REASON, status.reason.name());
    let end = status.message.floor_char_boundary(MESSAGE_BYTES_MAX);
    let message = &status.message[..end];
    tonic::Status::with_details_and_metadata(grpc_code(status.code), message, json.into(), metadata)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_keeps_its_words_and_fits_the_trailers() {
        let mut status =
            Status::new(Code::Internal, Reason::GuestTrap, "ü".repeat(5000)).with("during", "run");
        status.backtrace = Some("0: frame\n".repeat(2000));
        let sent = to_tonic(&status, "id-1");
        assert_eq!(sent.code(), tonic::Code::Internal);
        assert_eq!(sent.message(), "ü".repeat(1024));
        assert_eq!(
            sent.metadata().get(REASON).expect("there").as_bytes(),
            b"GUEST_TRAP"
        );
        assert_eq!(
            sent.metadata().get(REQUEST_ID).expect("there").as_bytes(),
            b"id-1"
        );
        let details: serde_json::Value = serde_json::from_slice(sent.details()).expect("JSON");
        assert_eq!(details["details"]["during"], "run");
        assert!(
            details["backtrace"]
                .as_str()
                .expect("text")
                .starts_with("0: frame\n")
        );
        assert!(
            sent.details().len() <= DETAILS_BYTES_MAX,
            "{}",
            sent.details().len()
        );

        // A diagnostic that does not fit takes nothing else with it.
        let mut failed =
            Status::new(Code::Internal, Reason::KernelFailed, "m").with("during", "run");
        let diagnostic = "A".repeat(5464).into();
        failed.details.insert("diagnostic".to_owned(), diagnostic);
        let sent = to_tonic(&failed, "id");
        let details: serde_json::Value = serde_json::from_slice(sent.details()).expect("JSON");
        assert_eq!(details["details"], serde_json::json!({"during": "run"}));

        let huge =
            Status::new(Code::NotFound, Reason::FlightNotFound, "m").with("name", "n".repeat(9000));
        assert!(to_tonic(&huge, "id").details().len() < 200);
    }

    #[test]
    fn a_peer_without_a_user_is_refused() {
        let directory = tempfile::tempdir().expect("a directory");
        let mut config = crate::config::Config::default();
        config.engine.cache = Some(std::path::PathBuf::new());
        let host = Host::start(config, directory.path()).expect("a host");
        let from = |uid| {
            let peer = Peer::of(Who::Near(host.caller(uid)));
            Call::begin(&host, "DoGet", Some(&peer), &HeaderMap::new())
                .map(|call| call.caller.principal().to_string())
                .map_err(|refused| refused.status)
        };
        assert_eq!(from(Some(7)).expect("a user"), "uid:7");
        for nobody in [Some(65534), None] {
            let status = from(nobody).expect_err("nobody");
            assert_eq!(status.code(), tonic::Code::PermissionDenied);
            assert_eq!(
                status.metadata().get(REASON).expect("there").as_bytes(),
                b"PRINCIPAL"
            );
        }
    }

    #[test]
    fn every_code_is_grpcs_code_of_that_name() {
        for code in [
            Code::InvalidArgument,
            Code::NotFound,
            Code::AlreadyExists,
            Code::FailedPrecondition,
            Code::ResourceExhausted,
            Code::OutOfRange,
            Code::DeadlineExceeded,
            Code::Cancelled,
            Code::Internal,
            Code::PermissionDenied,
            Code::Unauthenticated,
            Code::Unavailable,
            Code::Unimplemented,
        ] {
            let camel = format!("{:?}", grpc_code(code));
            assert_eq!(camel.to_uppercase(), code.name().replace('_', ""));
        }
    }
}
