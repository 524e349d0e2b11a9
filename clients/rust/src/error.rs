//! What can go wrong between this process and the host.

use std::io;
use std::path::PathBuf;

use strait_tensor::{Dtype, TensorSpec};

use crate::address::AddressError;
use crate::wire::{Failure, Writers};

/// Why an operation failed.
///
/// Three ends are distinct: there is no host ([`Error::NoHost`]), the connection is over
/// ([`Error::Disconnected`]), a lease is over while the connection is fine ([`Error::LeaseExpired`]).
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address does not lead to a host.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// Nobody answers at the data socket.
    #[error("no strait host at {}: {source}; start one with `strait serve`", path.display())]
    NoHost {
        /// The data socket.
        path: PathBuf,
        /// What connecting to it failed with.
        source: io::Error,
    },
    /// The connection is over: the host ended or closed it, or this client did.
    #[error(
        "the connection to the host is over; mapped tensors stay readable, but everything else \
         needs a new connection"
    )]
    Disconnected,
    /// A lease on a segment is over; the connection is fine.
    #[error("{message} [LEASE_EXPIRED, request {request_id}]")]
    LeaseExpired {
        /// Which lease, since when, and what to do.
        message: String,
        /// The request that needed it; `-` if this side knew without asking.
        request_id: String,
    },
    /// The host refused, or the kernel failed.
    #[error(
        "{} [{} {}, request {}]",
        .0.message, .0.code, .0.reason, .0.request_id
    )]
    Remote(Box<Failure>),
    /// The host said something that the protocol does not allow.
    #[error("the host broke the protocol: {0}; check that host and client have the same version")]
    Protocol(String),
    /// A segment could not be mapped.
    #[error(transparent)]
    Memory(#[from] strait_memory::MappingError),
    /// Linux refused something that this process needs.
    #[error("cannot {what}: {source}")]
    Linux {
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// The connection was made before a fork; its threads and mappings are the parent's.
    #[error(
        "this connection belongs to process {owner}, of which this process ({here}) is a fork; \
         connect again after the fork"
    )]
    Forked {
        /// The process that connected.
        owner: i32,
        /// The process that asked.
        here: i32,
    },
    /// A request does not fit into one frame.
    #[error(
        "a request of {bytes} bytes; at most {max} fit into a frame: shorten its lists or names"
    )]
    RequestTooLong {
        /// Of the body.
        bytes: usize,
        /// The protocol's limit.
        max: usize,
    },
    /// A request id that the protocol does not allow.
    #[error("request id {0:?}; it needs 1 to 64 characters from A-Z a-z 0-9 . _ : -")]
    RequestId(String),
    /// A segment has no tensor of that name.
    #[error("no tensor {name:?} in the segment; it has {}", .known.join(", "))]
    NoTensor {
        /// The name asked for.
        name: String,
        /// What there is.
        known: Vec<String>,
    },
    /// A tensor was asked for with another element type than it has.
    #[error("tensor {name:?} is {dtype}; {asked} was asked for")]
    Dtype {
        /// The tensor.
        name: String,
        /// What it is.
        dtype: Dtype,
        /// What the caller's type stands for.
        asked: Dtype,
    },
    /// The data is not as long as the tensor.
    #[error("{spec} has {expected} bytes; {given} were given")]
    Length {
        /// The tensor.
        spec: TensorSpec,
        /// Its bytes.
        expected: u64,
        /// The data's bytes.
        given: u64,
    },
    /// A prepared call was given more or fewer inputs than it brings.
    #[error("{given} inputs for a call that brings {}: {}", .prepared.len(), .prepared.join(", "))]
    Inputs {
        /// The ports of those that it brings, in their order.
        prepared: Vec<String>,
        /// How many were given.
        given: usize,
    },
    /// An input of a prepared call is larger than was prepared, or has other axes.
    #[error("input {name:?} has the shape {given:?}; at most {most:?} was prepared")]
    Shape {
        /// Its port.
        name: String,
        /// What was given.
        given: Vec<u64>,
        /// What was prepared.
        most: Vec<u64>,
    },
    /// An impossible tensor.
    #[error(transparent)]
    Layout(#[from] strait_tensor::LayoutError),
    /// Somebody can still write to the segment, so it cannot be lent out as a slice.
    #[error(
        "segment {segment} can still be written to (writers: {}); publish it first, \
         so that it gets sealed",
        writers.name()
    )]
    StillWritten {
        /// The segment's id.
        segment: String,
        /// Who can write.
        writers: Writers,
    },
    /// The segment was published: nobody can write any more.
    #[error(
        "segment {segment} is not writable any more: publishing it replaced its mapping; make a new one"
    )]
    NotWritable {
        /// The segment's id.
        segment: String,
    },
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        if failure.reason == "LEASE_EXPIRED" {
            return Error::LeaseExpired {
                message: failure.message,
                request_id: failure.request_id,
            };
        }
        Error::Remote(Box::new(failure))
    }
}

impl Error {
    /// The protocol's stable word for the mistake, if the host named one: `KERNEL_NOT_FOUND`.
    #[must_use]
    pub fn reason(&self) -> Option<&str> {
        match self {
            Error::Remote(failure) => Some(&failure.reason),
            Error::LeaseExpired { .. } => Some("LEASE_EXPIRED"),
            _ => None,
        }
    }
}
