//! What crosses a strait socket, as `docs/protocol.md` states it: one definition for the host and the
//! Rust client. No I/O.
//!
//! ```text
//! frame ── header: op, sequence, lengths, trace      request, reply ── JSON bodies, by the op
//! prepared ── the payloads of prepared calls   ring ── where they lie in memory that both sides share
//! real ── floats that JSON has no number for
//! reason ── the code and the reason of an ERROR, and of a Flight status
//! stats ── what a host counts              quota ── what each principal may have of it
//! worker ── the processes that run its kernels   plugin ── what is loaded
//! ```

mod frame;
mod plugin;
mod prepared;
mod quota;
mod real;
mod reason;
mod reply;
mod request;
mod ring;
mod stats;
mod worker;

pub use frame::{
    BODY_BYTES_MAX, FDS_MAX, FrameError, HEADER_BYTES, Header, MAGIC, Op, PAYLOAD_ALIGN,
    PAYLOAD_BYTES_MAX, TraceContext, VERSION, padded, payload_room,
};
pub use plugin::{Incidents, Plugin, PluginList};
pub use prepared::{SIZES_BYTES, places, shape, sizes};
pub use quota::{
    AccountQuotas, AccountStats, QuotaConfig, QuotaList, QuotaSettings, QuotaUse, Quotas, Setting,
    SettingWord,
};
pub use real::{real_from_word, real_to_json};
pub use reason::{Code, Reason};
pub use reply::{
    BlockTree, Called, Cancelled, Done, Failure, Flight, Flights, Gone, InlineResult, Invoked,
    Kernel, KernelList, Mapped, Mapping, Note, Pages, Parameter, Port, Prepared, PreparedTensor,
    Released, Renewed, ResultEntry, Seconds, Shared, Shutdown, Streamed, Welcome, Writers,
};
pub use request::{
    Adopt, AskLimits, AskPlugins, AskWorkers, Cancel, ChannelOptions, Create, Empty, Exchange,
    Hello, InlineTensor, Input, Invoke, Kernels, Leases, Limits, List, Map, Name, NewTensor,
    PlacedTensor, Prepare, PreparedInput, Publish, Release, Request, SegmentId, Share, Stream,
};
pub use ring::{Ring, Side, Word};
pub use stats::{
    ChannelStats, HostStats, HugeStats, OwnStats, ParkedStats, PoolStats, ProcessStats, Stats,
    WorkerStats,
};
pub use worker::{Worker, WorkerList};

/// The data socket's name in a host's runtime directory.
pub const DATA_SOCKET: &str = "data.sock";
/// Flight's socket there.
pub const FLIGHT_SOCKET: &str = "flight.sock";
