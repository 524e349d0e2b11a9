//! Requests as they leave and replies as they arrive.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

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
        payload: &[u8],
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
        let payload_bytes = u32::try_from(payload.len()).map_err(|_| too_long())?;
        let mut bytes = Header {
            op,
            sequence,
            body_bytes,
            payload_bytes,
            trace: TraceContext::NONE,
        }
        .encode()
        .to_vec();
        bytes.extend_from_slice(&body);
        bytes.extend_from_slice(payload);
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
    pub(super) payload: Payload,
    pub(super) fds: Vec<OwnedFd>,
}

/// The bytes of tensors in a reply, where their elements are aligned.
#[derive(Clone, Debug, Default)]
pub(crate) struct Payload {
    words: Arc<[u128]>,
    length: usize,
}

impl Payload {
    pub(super) fn new(bytes: &[u8]) -> Self {
        if bytes.is_empty() {
            return Self::default();
        }
        let mut words = vec![0; bytes.len().div_ceil(size_of::<u128>())];
        bytemuck::cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(bytes);
        Self {
            words: words.into(),
            length: bytes.len(),
        }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.length]
    }
}

impl Reply {
    /// Reads an OK (or WELCOME); an ERROR becomes [`Error::Remote`].
    pub(crate) fn read<T: DeserializeOwned>(self) -> Result<(T, Vec<OwnedFd>), Error> {
        if self.op == Op::Error {
            return Err(parse::<wire::Failure>(&self.body)?.into());
        }
        Ok((parse(&self.body)?, self.fds))
    }

    /// What follows its JSON; then that is gone from here.
    pub(crate) fn take_payload(&mut self) -> Payload {
        std::mem::take(&mut self.payload)
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
