//! What C asks of an error.

use std::ffi::CString;

use crate::failure::{Failure, asked, end};
use crate::pointer::StaticText;

fn field(error: Option<&Failure>, text: impl FnOnce(&Failure) -> Option<&CString>) -> StaticText {
    asked(error, StaticText::NULL, |error| {
        text(error).map_or(StaticText::NULL, |text| StaticText::new(text))
    })
}

/// What can be done about it: one of strait_error_kind. 0 for NULL.
#[unsafe(no_mangle)]
pub extern "C" fn strait_error_get_kind(error: Option<&Failure>) -> u32 {
    asked(error, 0, |error| error.kind as u32)
}

/// The name of a gRPC code, the class of the error: "NOT_FOUND". NULL for NULL, like the other texts.
#[unsafe(no_mangle)]
pub extern "C" fn strait_error_code(error: Option<&Failure>) -> StaticText {
    field(error, |error| Some(&error.code))
}

/// The stable word for the case, for programs: "FLIGHT_NOT_FOUND". docs/protocol.md has the host's; this library's own are
/// BAD_ARGUMENT, BAD_ADDRESS, REMOTE_ADDRESS, NO_HOST, DISCONNECTED, WRONG_STATE, FORKED, BROKEN_PROTOCOL, LINUX, HOST.
#[unsafe(no_mangle)]
pub extern "C" fn strait_error_reason(error: Option<&Failure>) -> StaticText {
    field(error, |error| Some(&error.reason))
}

/// For people: what, which, by how much, what to do.
#[unsafe(no_mangle)]
pub extern "C" fn strait_error_message(error: Option<&Failure>) -> StaticText {
    field(error, |error| Some(&error.message))
}

/// The id by which the host's log knows the request; NULL if the host was not asked.
#[unsafe(no_mangle)]
pub extern "C" fn strait_error_request_id(error: Option<&Failure>) -> StaticText {
    field(error, |error| error.request_id.as_ref())
}

/// The guest's stack when it trapped; NULL if there is none.
#[unsafe(no_mangle)]
pub extern "C" fn strait_error_backtrace(error: Option<&Failure>) -> StaticText {
    field(error, |error| error.backtrace.as_ref())
}

/// Figures and names, a JSON object as in docs/protocol.md; NULL if there are none.
#[unsafe(no_mangle)]
pub extern "C" fn strait_error_details(error: Option<&Failure>) -> StaticText {
    field(error, |error| error.details.as_ref())
}

/// Frees an error, and the texts that came from it. NULL is fine.
#[unsafe(no_mangle)]
pub extern "C" fn strait_error_free(error: Option<Box<Failure>>) {
    end(error);
}
