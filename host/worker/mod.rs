//! Kernels in a process of their own: a hole in the sandbox, a crash or a loop that nothing ends takes that process, and not
//! the host.
//!
//! ```text
//! host                                          worker (`strait worker`, one of each principal)
//! WorkerRunner ─ Crew ─ Process ─ control ────▶ serve: forget, cancel
//!      │                   └── lanes, one a run ▶ └─ Engine: load, fill
//!      ├ Compilers: a plugin on its way in, in two processes more
//!      └ policy: who gets which segment,
//!        when it is sealed, what is believed       mappings of inputs and results, warm
//! ```
//! The host makes every segment, and keeps what can write or seal it. The worker is given descriptors of inputs that
//! only read, and of new results, which it maps; before anybody else sees a result no new mapping of it can write
//! (`F_SEAL_FUTURE_WRITE`). What a worker says is held against what it was asked (`exchange.rs`); it sends no descriptors.

mod artifact;
mod calls;
mod chained;
mod channel;
mod compiler;
mod confine;
mod crew;
mod exchange;
mod log;
mod messages;
mod prepared;
mod process;
mod program;
mod runner;
mod runs;
mod serve;
mod users;

pub use compiler::CompilerSettings;
pub use confine::Bounds;
pub use crew::CrewSettings;
pub use process::lacking_walls;
pub use runner::{WorkerRunner, WorkerSettings};
pub use serve::serve;
