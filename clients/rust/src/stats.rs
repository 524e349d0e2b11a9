//! The host's counts.

use serde::Deserialize;
use serde_json::Value;

use crate::error::Error;

/// What [`Client::stats`](crate::Client::stats) answers: counts at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Stats {
    /// The host's process, as Linux sees it.
    pub process: ProcessStats,
    /// Live segments.
    pub segments: u64,
    /// Their bytes.
    pub segment_bytes: u64,
    /// This principal's flights.
    pub flights: u64,
    /// Leases of all sessions.
    pub leases: u64,
    /// Data socket connections.
    pub sessions: u64,
    /// Invocations since the host's start.
    pub invocations: u64,
    /// Invocations at this moment.
    pub running: u64,
    /// Tensor bytes that the host copied since its start.
    pub copied_bytes: u64,
    /// The segments that results are taken from.
    pub pool: PoolStats,
    /// Mappings that are kept warm.
    pub parked: ParkedStats,
    /// This session's share.
    pub own: OwnStats,
    /// Tensor bytes that this client copied since it connected: those that went through `put`.
    #[serde(skip)]
    pub client_copied_bytes: u64,
    /// Bytes of segments to fill that this client backed with huge pages.
    #[serde(skip)]
    pub client_huge_bytes: u64,
    /// The whole answer.
    #[serde(skip)]
    pub all: Value,
}

/// A process, as Linux sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct ProcessStats {
    /// Open file descriptors.
    pub fds: u64,
    /// Lines in its memory map.
    pub mappings: u64,
    /// Threads.
    pub threads: u64,
    /// Page faults since its start that needed no I/O.
    pub minor_faults: u64,
    /// Resident memory in bytes.
    pub resident_bytes: u64,
}

/// The host's pool of result segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct PoolStats {
    /// All of them.
    pub segments: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Those that wait for the next result.
    pub idle_segments: u64,
    /// Their bytes.
    pub idle_bytes: u64,
}

/// The host's parking area.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct ParkedStats {
    /// Warm mappings, in guests or idle.
    pub mappings: u64,
    /// Those that wait for their next use.
    pub idle_mappings: u64,
    /// Bytes of the idle ones.
    pub idle_bytes: u64,
}

/// What one session holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct OwnStats {
    /// Its leases.
    pub leases: u64,
    /// Segments that it has leases on.
    pub segments: u64,
}

impl Stats {
    pub(crate) fn new(
        all: Value,
        client_copied_bytes: u64,
        client_huge_bytes: u64,
    ) -> Result<Self, Error> {
        let stats = Self::deserialize(&all)
            .map_err(|error| Error::Protocol(format!("its reply is not Stats: {error}")))?;
        Ok(Self {
            client_copied_bytes,
            client_huge_bytes,
            all,
            ..stats
        })
    }
}
