//! The action `invoke`: a call in one message and its answer in another, small tensors in both.
//!
//! ```text
//! client ─▶ an INVOKE frame ─▶ session: Caller::invoke ─▶ OK frame: small results
//!                                                          └─▶ larger ones are kept, and read by their tickets
//! ```
//! A result that is not in the answer lives as one of GetFlightInfo does.

use std::sync::Arc;

use arrow_flight::{Action, Result as ActionResult};
use strait_protocol::{self as wire, Header, Op};

use super::call::Call;
use super::refused::bad_request;
use super::waiting::answered;
use crate::error::{Code, Reason, Status};
use crate::session::{Framed, Host, Invoked, ResultBody};

/// The action.
pub(super) const INVOKE: &str = "invoke";

/// What a call asks for, and the bytes of its inputs.
pub(super) struct Asked {
    header: Header,
    invoke: wire::Invoke,
    payload: Vec<u8>,
}

impl Asked {
    /// # Errors
    /// `BAD_FRAME`, `BAD_REQUEST`.
    pub(super) fn of(action: &Action) -> Result<Self, Status> {
        let bad_frame = |what: String| {
            let message = format!(
                "the body of `{INVOKE}` must be an INVOKE frame of the data socket: {what}"
            );
            Status::new(Code::InvalidArgument, Reason::BadFrame, message)
        };
        let (header, body, payload) =
            Header::decode(&action.body).map_err(|error| bad_frame(error.to_string()))?;
        if header.op != Op::Invoke {
            return Err(bad_frame(format!("this is {:?}", header.op)));
        }
        let invoke = serde_json::from_slice(body)
            .map_err(|error| bad_request(format!("the body of INVOKE: {error}")))?;
        Ok(Self {
            header,
            invoke,
            payload: payload.to_vec(),
        })
    }

    /// The request id in its body.
    pub(super) fn request_id(&self) -> Option<&str> {
        self.invoke.request_id.as_deref()
    }
}

/// Runs it; the OK frame, as the only result of the action.
///
/// # Errors
/// As for INVOKE.
pub(super) async fn run(call: &Call, asked: Asked) -> Result<Vec<ActionResult>, Status> {
    call.known_only("a kernel call")?;
    let Asked {
        header,
        invoke,
        payload,
    } = asked;
    let id = Arc::clone(&call.request_id);
    let start = |answer| {
        let framed = Framed {
            session: None,
            payload: &payload,
            room: wire::PAYLOAD_BYTES_MAX as u64,
        };
        call.caller.invoke(Some(framed), invoke, id, answer)
    };
    let invoked = answered(call, start).await?;
    let body = reply(call, &header, &invoked)?.into();
    Ok(vec![ActionResult { body }])
}

/// The OK frame. Results that are not in it are kept for whoever has it.
fn reply(call: &Call, asked: &Header, invoked: &Invoked) -> Result<Vec<u8>, Status> {
    let host = call.caller.host();
    let mut results = Vec::with_capacity(invoked.results.len());
    let mut payload = Vec::new();
    for result in &invoked.results {
        let mut entry = host.entry(result, payload.len() as u64);
        match &result.body {
            ResultBody::Inline(_, bytes) => {
                let bytes = bytes.as_ref().as_ref();
                host.framed().results.add(bytes.len() as u64);
                payload.extend_from_slice(bytes);
                payload.resize(payload.len().next_multiple_of(wire::PAYLOAD_ALIGN), 0);
            }
            ResultBody::Segment(segment) => {
                if result.name.is_none() {
                    let life = call.caller.keep_undelivered(segment);
                    entry.expires_ms = Some(u64::try_from(life.as_millis()).unwrap_or(u64::MAX));
                }
                if call.remote
                    && let Some(mapping) = &mut entry.mapping
                {
                    // Nothing to connect to from afar.
                    mapping.socket.clear();
                }
            }
        }
        results.push(entry);
    }
    let body = super::info::json(&invoked.to_wire(results, &call.request_id))?;
    let lengths = (body.len(), payload.len());
    let mut frame = Header::of(Op::Ok, asked.sequence, lengths, asked.trace)
        .encode()
        .to_vec();
    frame.extend_from_slice(&body);
    frame.append(&mut payload);
    Ok(frame)
}

/// What `welcome` answers: WELCOME of the data socket. Somebody far away has no use for paths.
pub(super) fn welcome(host: &Host, call: &Call) -> wire::Welcome {
    let own = host.welcome(&call.caller, String::new(), &call.request_id);
    match call.remote {
        false => own,
        true => wire::Welcome {
            directory: String::new(),
            flight: String::new(),
            ..own
        },
    }
}
