//! DoAction.

use arrow_flight::{
    Action, ActionType, CancelFlightInfoRequest, CancelFlightInfoResult, CancelStatus, FlightInfo,
    RenewFlightEndpointRequest, Result as ActionResult,
};
use bytes::Bytes;
use prost::Message;
use serde::de::DeserializeOwned;
use strait_protocol as wire;

use super::call::Call;
use super::info;
use super::invoke::{self, INVOKE};
use super::refused::bad_request;
use super::ticket::{Source, Wanted};
use crate::error::{Code, Reason, Status};
use crate::session::{Caller, Host};

/// Name and what ListActions says of it.
const ACTIONS: [(&str, &str); 12] = [
    (
        "kernels",
        "Body: nothing, or JSON {\"kernel\"?: name, \"after\"?: \"plugin/kernel\"}. One result for each kernel: its ports and parameters in JSON.",
    ),
    (
        "describe",
        "Body: `kernel` or `plugin/kernel`. Result: that kernel in JSON.",
    ),
    (
        "mapping",
        "Body: a flight's name. Result: its mapping in JSON: what to map on the same machine.",
    ),
    (
        "drop",
        "Body: a flight's name. Removes the name; the memory is freed once nobody holds it.",
    ),
    (
        "share",
        "Body: JSON {\"name\": name, \"add\"?: [principal or group:NAME], \"remove\"?: [the same, or *]}. Result: whom that flight is shared with, in JSON.",
    ),
    ("stats", "Body: nothing. Result: the host's counts in JSON."),
    (
        "welcome",
        "Body: nothing. Result: who the host is and what it takes, WELCOME of the data socket in JSON.",
    ),
    (
        INVOKE,
        "Body: an INVOKE frame of the data socket. Result: the OK frame. Larger results are kept, and read by the ticket {\"segment\": id}.",
    ),
    (
        "cancel",
        "Body: an idempotency key. Ends the invocation that has it. Result: {\"cancelled\": whether there was one}.",
    ),
    (
        "release",
        "Body: JSON {\"idempotency_keys\"?: [key], \"segments\"?: [id]}: answers that need not be kept for repeats, uploads without a name and results that need not be kept. Result: {\"released\": how many there were}.",
    ),
    (
        CANCEL,
        "Body: CancelFlightInfoRequest. Releases the unpublished results among the endpoints. Result: CancelFlightInfoResult.",
    ),
    (
        RENEW,
        "Body: RenewFlightEndpointRequest. Extends the life of an unpublished result. Result: the FlightEndpoint.",
    ),
];
const CANCEL: &str = "CancelFlightInfo";
const RENEW: &str = "RenewFlightEndpoint";

pub(super) fn types() -> impl Iterator<Item = ActionType> {
    ACTIONS.into_iter().map(|(name, description)| ActionType {
        r#type: name.to_owned(),
        description: description.to_owned(),
    })
}

/// Does what an action asks.
///
/// # Errors
/// `UNSUPPORTED_OP` for an unknown one, `BAD_REQUEST` for a body that does not fit, and what the
/// action itself says.
pub(super) fn run(host: &Host, call: &Call, action: &Action) -> Result<Vec<ActionResult>, Status> {
    let (caller, body) = (&call.caller, &action.body);
    if !matches!(action.r#type.as_str(), "kernels" | "describe" | "welcome") {
        call.known_only("this action")?;
    }
    let one = |bytes: Bytes| Ok(vec![ActionResult { body: bytes }]);
    match action.r#type.as_str() {
        "kernels" => kernels(caller, &json_or_default(body)?),
        "describe" => {
            let found = caller.kernel(text("describe", body)?)?;
            one(info::json(&wire::Kernel::from(&found))?)
        }
        "mapping" => {
            call.near_only("a mapping", "read the flight with DoGet")?;
            let segment = caller.lookup(text("mapping", body)?)?;
            one(info::mapping(host, &segment)?)
        }
        "drop" => caller.drop_flight(text("drop", body)?).map(|()| Vec::new()),
        "welcome" => one(info::json(&invoke::welcome(host, call))?),
        "cancel" => {
            let reply = wire::Cancelled {
                cancelled: caller.cancel_keyed(text("cancel", body)?)?,
                request_id: call.request_id.to_string(),
            };
            one(info::json(&reply)?)
        }
        "release" => one(info::json(&release(
            caller,
            &json_or_default(body)?,
            &call.request_id,
        )?)?),
        "share" => one(share(call, &json(body)?)?),
        "stats" => one(info::json(&caller.stats(NO_SESSION))?),
        CANCEL => {
            let request = CancelFlightInfoRequest::decode(body.clone())
                .map_err(|e| not_the_message(CANCEL, &e))?;
            let status = cancel(caller, &request.info.unwrap_or_default())?;
            one(CancelFlightInfoResult::new(status).encode_to_vec().into())
        }
        RENEW => {
            let request = RenewFlightEndpointRequest::decode(body.clone())
                .map_err(|e| not_the_message(RENEW, &e))?;
            let endpoint = info::renewed(call, &request.endpoint.unwrap_or_default())?;
            one(endpoint.encode_to_vec().into())
        }
        other => Err(Status::new(
            Code::Unimplemented,
            Reason::UnsupportedOp,
            format!(
                "there is no action `{}`; there are {}",
                crate::text::name(other),
                ACTIONS.map(|(name, _)| name).join(", ")
            ),
        )),
    }
}

/// Sessions count from 1: a Flight call has none, and so no leases of its own.
const NO_SESSION: crate::lease::SessionId = 0;

fn text<'a>(action: &str, body: &'a [u8]) -> Result<&'a str, Status> {
    match std::str::from_utf8(body) {
        Ok(text) if !text.is_empty() => Ok(text),
        _ => Err(bad_request(format!(
            "the body of `{action}` must be a name in UTF-8"
        ))),
    }
}

fn json_or_default<T: DeserializeOwned + Default>(body: &[u8]) -> Result<T, Status> {
    if body.is_empty() {
        return Ok(T::default());
    }
    json(body)
}

fn json<T: DeserializeOwned>(body: &[u8]) -> Result<T, Status> {
    serde_json::from_slice(body).map_err(|error| {
        bad_request(format!(
            "the action's body is not the JSON that it takes: {error}"
        ))
    })
}

fn not_the_message(action: &str, error: &prost::DecodeError) -> Status {
    bad_request(format!(
        "the body of `{action}` is not that request as a protobuf message: {error}"
    ))
}

fn kernels(caller: &Caller, request: &wire::Kernels) -> Result<Vec<ActionResult>, Status> {
    let result = |kernel| {
        let body = info::json(&kernel)?;
        Ok(ActionResult { body })
    };
    caller.kernels(request).map(result).collect()
}

/// Lets go of what a client is done with.
fn release(
    caller: &Caller,
    asked: &wire::Release,
    request_id: &str,
) -> Result<wire::Released, Status> {
    let mut released = 0_u64;
    for segment in &asked.segments {
        let id = segment
            .parse()
            .map_err(|error: String| bad_request(error))?;
        released += u64::from(caller.forget_undelivered(id));
    }
    for key in &asked.idempotency_keys {
        released += u64::from(caller.forget_answer(key));
    }
    Ok(wire::Released {
        released,
        request_id: request_id.to_owned(),
    })
}

fn share(call: &Call, request: &wire::Share) -> Result<Bytes, Status> {
    let shared = call
        .caller
        .share(&request.name, &request.add, &request.remove)?;
    info::json(&wire::Shared {
        name: request.name.clone(),
        shared,
        request_id: call.request_id.to_string(),
    })
}

/// Lets go of the results among the endpoints. A flight that has a name stays.
fn cancel(caller: &Caller, flight: &FlightInfo) -> Result<CancelStatus, Status> {
    let mut cancelled = 0;
    for ticket in flight
        .endpoint
        .iter()
        .filter_map(|endpoint| endpoint.ticket.as_ref())
    {
        if let Source::Segment(id) = Wanted::of(ticket)?.source()?
            && caller.forget_undelivered(id)
        {
            cancelled += 1;
        }
    }
    Ok(if cancelled > 0 {
        CancelStatus::Cancelled
    } else {
        CancelStatus::NotCancellable
    })
}
