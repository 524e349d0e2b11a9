//! OK to STATS, and what the Flight action `stats` answers: counts at one moment.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::quota::AccountStats;

/// Counts of a host. Its operators see those of everybody, others their own only.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// For operators: what belongs to everybody.
    #[serde(flatten)]
    pub host: Option<HostStats>,
    /// Live segments: the host's for its operators, the principal's for others. The same holds for the other
    /// counts beside this one.
    pub segments: u64,
    /// Their bytes.
    pub segment_bytes: u64,
    /// The principal's flights.
    pub flights: u64,
    /// Live leases.
    pub leases: u64,
    /// Data socket connections.
    pub sessions: u64,
    /// Invocations since the host's start.
    pub invocations: u64,
    /// Invocations that run.
    pub running: u64,
    /// What the principal has, and had.
    pub account: Option<AccountStats>,
    /// The principal's channels, by name.
    #[serde(default)]
    pub channels: Vec<ChannelStats>,
    /// This session's part.
    pub own: OwnStats,
    /// The request's id; empty over Flight, where it is a header.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub request_id: String,
}

/// A channel, and how far its consumer is behind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelStats {
    /// Its name.
    pub name: String,
    /// Whose outputs come over it.
    pub kernel: String,
    /// Batches so far.
    pub batches: u64,
    /// Those that are not acknowledged.
    pub lag_batches: u64,
    /// How long the oldest of them has been there.
    pub lag_ms: u64,
    /// Whether somebody reads it now.
    pub is_read: bool,
}

/// Counts that belong to nobody alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostStats {
    /// The host's process.
    pub process: ProcessStats,
    /// Bytes that all segments together may have.
    #[serde(default)]
    pub budget_bytes: u64,
    /// Bytes that they have, idle results among them.
    #[serde(default)]
    pub budget_used_bytes: u64,
    /// Tensor bytes that the host copied since its start.
    pub copied_bytes: u64,
    /// The same by place.
    #[serde(default)]
    pub copied: BTreeMap<String, u64>,
    /// Slices of invocations that the host has cut, since its start.
    #[serde(default)]
    pub slices: u64,
    /// What was born in huge pages.
    #[serde(default)]
    pub huge: HugeStats,
    /// The segments that results are taken from.
    pub pool: PoolStats,
    /// Mappings that are kept warm.
    pub parked: ParkedStats,
    /// Processes that run kernels; all 0 if the host itself runs them.
    #[serde(default)]
    pub workers: WorkerStats,
    /// Principals that ever connected.
    #[serde(default)]
    pub accounts: u64,
}

/// A process, as Linux sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
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

/// Bytes of results, uploads and files since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HugeStats {
    /// Those that were to be born in huge pages.
    pub asked_bytes: u64,
    /// Those that were.
    pub huge_bytes: u64,
}

/// The host's pool of result segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParkedStats {
    /// Warm mappings, in guests or idle.
    pub mappings: u64,
    /// Those that wait for their next use.
    pub idle_mappings: u64,
    /// Bytes of the idle ones.
    pub idle_bytes: u64,
}

/// A host's worker processes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct WorkerStats {
    /// Those that live.
    pub processes: u64,
    /// Those that were started since the host's start.
    pub started: u64,
    /// Those of them that ended before the host had done with them, or that it had to kill.
    pub lost: u64,
    /// Descriptors that the host has open for those that live.
    pub fds: u64,
}

/// What one session holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnStats {
    /// Its leases.
    pub leases: u64,
    /// Segments that it has leases on.
    pub segments: u64,
}
