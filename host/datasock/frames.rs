//! Frames on their way out.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use serde::Serialize;
use strait_memory::{Charge, FrameSocket};
use strait_protocol::{self as wire, Header, Op, TraceContext};

use crate::error::{Code, Reason, Status};
use crate::session::InlineBytes;

/// A frame that is to be sent.
#[derive(Debug)]
pub(super) struct Outgoing {
    pub(super) op: Op,
    pub(super) sequence: u32,
    /// Of the request that it answers.
    pub(super) trace: TraceContext,
    pub(super) body: Vec<u8>,
    /// What follows it.
    pub(super) payload: Vec<Arc<InlineBytes>>,
    pub(super) fds: Vec<Arc<OwnedFd>>,
    /// Their places among those on their way to the principal.
    pub(super) places: Option<Charge>,
}

impl Outgoing {
    /// Of the whole frame.
    pub(super) fn bytes(&self) -> u64 {
        (wire::HEADER_BYTES + self.body.len() + self.payload_bytes()) as u64
    }

    fn payload_bytes(&self) -> usize {
        self.parts().map(<[u8]>::len).sum()
    }

    /// The payload: each tensor, and what is left free behind it but for the last one.
    fn parts(&self) -> impl Iterator<Item = &[u8]> {
        const FREE: [u8; wire::PAYLOAD_ALIGN] = [0; wire::PAYLOAD_ALIGN];
        let last = self.payload.len().saturating_sub(1);
        self.payload
            .iter()
            .enumerate()
            .flat_map(move |(index, bytes)| {
                let bytes = bytes.as_ref().as_ref();
                let free = match index == last {
                    true => 0,
                    false => bytes.len().next_multiple_of(wire::PAYLOAD_ALIGN) - bytes.len(),
                };
                [bytes, &FREE[..free]]
            })
    }

    /// The bytes before its body.
    pub(super) fn header(&self) -> [u8; wire::HEADER_BYTES] {
        let lengths = (self.body.len(), self.payload_bytes());
        Header::of(self.op, self.sequence, lengths, self.trace).encode()
    }

    /// Sends it at once, or not at all.
    pub(super) fn send(&self, socket: &FrameSocket) -> std::io::Result<()> {
        let header = self.header();
        let fds: Vec<_> = self.fds.iter().map(AsFd::as_fd).collect();
        let mut parts: Vec<&[u8]> = vec![&header, &self.body];
        parts.extend(self.parts());
        socket.send(&parts, &fds)
    }
}

/// A frame of `body`, in no trace yet; one that is too long becomes an error.
pub(super) fn encode(
    op: Op,
    sequence: u32,
    body: &impl Serialize,
    fds: Vec<Arc<OwnedFd>>,
) -> Outgoing {
    framed(op, sequence, serde_json::to_vec(body), fds)
}

/// A frame of the JSON `body`; one that is too long becomes an error.
pub(super) fn framed(
    op: Op,
    sequence: u32,
    body: serde_json::Result<Vec<u8>>,
    fds: Vec<Arc<OwnedFd>>,
) -> Outgoing {
    let status = match body {
        Ok(body) if body.len() <= wire::BODY_BYTES_MAX => {
            return Outgoing {
                op,
                sequence,
                trace: TraceContext::NONE,
                body,
                payload: Vec::new(),
                fds,
                places: None,
            };
        }
        Ok(body) => {
            let message = format!(
                "the reply has {} bytes, a frame takes {}; use fewer tensors or shorter names",
                body.len(),
                wire::BODY_BYTES_MAX
            );
            Status::new(Code::OutOfRange, Reason::BadRequest, message)
        }
        Err(error) => Status::new(Code::Internal, Reason::Host, error.to_string()),
    };
    failure(sequence, &status, "-")
}

/// ERROR.
pub(super) fn failure(sequence: u32, status: &Status, request_id: &str) -> Outgoing {
    let cut = |text: &str, most: usize| text[..text.floor_char_boundary(most)].to_owned();
    let body = |message: usize, backtrace: usize, details: bool| {
        let body = wire::Failure {
            code: status.code.name().to_owned(),
            reason: status.reason.name().to_owned(),
            message: cut(&status.message, message),
            request_id: request_id.to_owned(),
            backtrace: status.backtrace.as_deref().map(|text| cut(text, backtrace)),
            details: match details {
                true => status.details.clone(),
                false => serde_json::Map::new(),
            },
        };
        serde_json::to_vec(&body).unwrap_or_else(|_| b"{}".to_vec())
    };
    let mut whole = body(8192, 16_384, true);
    if whole.len() > wire::BODY_BYTES_MAX {
        // Each byte may become six in JSON, and this fits even so.
        whole = body(2048, 4096, false);
    }
    Outgoing {
        op: Op::Error,
        sequence,
        trace: TraceContext::NONE,
        body: whole,
        payload: Vec::new(),
        fds: Vec::new(),
        places: None,
    }
}
