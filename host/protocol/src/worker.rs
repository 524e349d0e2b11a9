//! WORKERS: the processes that run kernels for a host.

use serde::{Deserialize, Serialize};

/// One process in the answer to WORKERS.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Worker {
    /// Its number among those that the host has started.
    pub number: u64,
    /// Linux's number of it, as the host sees that.
    pub pid: u32,
    /// Whose kernels it runs; none: it is the spare, which nobody uses yet.
    pub principal: Option<String>,
    /// Invocations that it runs.
    pub running: u64,
    /// Invocations that it runs or ran.
    pub runs: u64,
    /// Milliseconds since it was started.
    pub age_ms: u64,
    /// What confines it.
    pub walls: Vec<String>,
    /// What of its confinement this Linux does not do, and why.
    pub lacks: Vec<String>,
}

/// OK to WORKERS.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerList {
    /// Those of everybody for an operator, and the principal's own for everybody else; by number.
    pub workers: Vec<Worker>,
    /// Ask again with `after`.
    pub more: bool,
    /// The request's id.
    pub request_id: String,
}
