//! Requests as they leave and replies as they arrive.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use serde::Serialize;
use serde::de::DeserializeOwned;
use strait_memory::FrameSocket;

use crate::error::Error;
use crate::wire::{self, BODY_BYTES_MAX, Header, Op, TraceContext};

/// A request with its descriptors.
#[derive(Debug)]
pub(super) struct Frame {
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Frame {
    /// # Errors
    /// [`Error::RequestTooLong`].
    pub(super) fn new<B: Serialize>(
        op: Op,
        sequence: u32,
        body: &B,
        fds: Vec<OwnedFd>,
    ) -> Result<Self, Error> {
        let body = serde_json::to_vec(body).expect("bodies are maps with text keys");
        let too_long = || Error::RequestTooLong {
            bytes: body.len(),
            max: BODY_BYTES_MAX,
        };
        if body.len() > BODY_BYTES_MAX {
            return Err(too_long());
        }
        let body_bytes = u32::try_from(body.len()).map_err(|_| too_long())?;
        let mut bytes = Header {
            op,
            sequence,
            body_bytes,
            trace: TraceContext::NONE,
        }
        .encode()
        .to_vec();
        bytes.extend_from_slice(&body);
        Ok(Self { bytes, fds })
    }

    pub(super) fn send(&self, socket: &FrameSocket) -> io::Result<()> {
        let fds: Vec<_> = self.fds.iter().map(AsFd::as_fd).collect();
        socket.send(&[&self.bytes], &fds)
    }
}

/// A reply with its descriptors.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(super) op: Op,
    pub(super) body: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

impl Reply {
    /// Reads an OK (or WELCOME); an ERROR becomes [`Error::Remote`].
    pub(crate) fn read<T: DeserializeOwned>(self) -> Result<(T, Vec<OwnedFd>), Error> {
        if self.op == Op::Error {
            return Err(parse::<wire::Failure>(&self.body)?.into());
        }
        Ok((parse(&self.body)?, self.fds))
    }

    /// The leases that it grants, without caring what it answers.
    pub(super) fn leases(&self) -> Vec<u64> {
        let Ok(body) = serde_json::from_slice::<serde_json::Value>(&self.body) else {
            return Vec::new();
        };
        let results = body["results"].as_array().into_iter().flatten();
        let entries = std::iter::once(&body).chain(results);
        entries
            .filter_map(|entry| entry["lease"].as_u64())
            .collect()
    }
}

pub(super) fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(body).map_err(|error| {
        let what = std::any::type_name::<T>()
            .rsplit("::")
            .next()
            .unwrap_or_default();
        Error::Protocol(format!("its reply is not a {what}: {error}"))
    })
}
