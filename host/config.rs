//! Settings: flag > environment (`STRAIT__SECTION__KEY`) > file (TOML) > default.

use std::num::NonZeroU64;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use strait_memory::{Budget, Lot, ResultPool};
use strait_protocol::QuotaConfig;
use strait_ring::Spin;

use crate::engine::{EngineConfig, Interruption, Limits};

/// All settings of a host. Sizes in bytes, times in milliseconds.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Sockets.
    pub server: Server,
    /// Defaults and upper bounds for each invocation.
    pub limits: LimitSettings,
    /// Memory of the host.
    pub memory: Memory,
    /// What each principal may have of it.
    pub quota: QuotaConfig,
    /// How kernels run.
    pub engine: EngineSettings,
    /// Kernels in worker processes.
    pub workers: WorkerSettings,
    /// Lives of leases.
    pub lease: LeaseSettings,
}

/// Sockets.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Server {
    /// The runtime directory; none: the first usable of `$RUNTIME_DIRECTORY`,
    /// `$XDG_RUNTIME_DIR/strait`, `/run/strait` for root, `/tmp/strait-UID`.
    pub directory: Option<PathBuf>,
    /// Plugins to load beside the standard ones.
    pub plugins: Vec<PathBuf>,
    /// A plugin in the place of the standard one; none: the one that is built in.
    pub standard_plugin: Option<PathBuf>,
    /// An address on which Flight is served over TCP, too; none: not at all. With neither tokens nor certificates of clients
    /// it is a loopback address, and whoever can connect reads and puts as the host's own user.
    pub tcp: Option<std::net::SocketAddr>,
    /// The tokens by which clients are let in over TCP, as `strait token` writes them; none: nobody has one.
    pub tokens: Option<PathBuf>,
    /// Who may do what, and which groups there are; none: every user of this machine has what concerns its own flights.
    pub rights: Option<PathBuf>,
    /// The certificates that the host shows over TCP, in PEM, its own first; none: no TLS.
    pub tls_cert: Option<PathBuf>,
    /// The private key of the first of them, in PEM.
    pub tls_key: Option<PathBuf>,
    /// The authorities, in PEM, whose certificates let clients in; none: certificates let nobody in.
    pub tls_client_ca: Option<PathBuf>,
    /// Serve other machines without TLS.
    pub insecure: bool,
    /// A Linux group, by name or number, whose members reach the sockets; none: the host's own user alone.
    pub socket_group: Option<String>,
    /// Time that running invocations get at the end.
    pub drain_ms: Option<u64>,
    /// Longest gRPC message; a tensor row above it cannot be read inline.
    pub message_bytes_max: Option<usize>,
    /// Time in which a Flight connection must begin to speak HTTP/2, each frame of it and each
    /// request that is no upload must arrive whole.
    pub request_ms: Option<u64>,
    /// Longest pause of a Flight upload, or of a client that reads.
    pub stall_ms: Option<u64>,
    /// What one endpoint gives of a flight, for clients that ask for several.
    pub endpoint_bytes: Option<u64>,
    /// Microseconds for which a prepared call's thread looks for the next one before it sleeps, at most 50000; 0: it sleeps at once.
    pub spin_us: Option<u64>,
}

/// Defaults and upper bounds for each invocation.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LimitSettings {
    /// Deadline of an invocation that names none.
    pub deadline_ms_default: u64,
    /// Longest deadline that can be asked for.
    pub deadline_ms_max: u64,
    /// A guest's own memory.
    pub guest_bytes: u64,
    /// Inputs and outputs together.
    pub window_bytes: u64,
    /// Outputs together.
    pub result_bytes: u64,
    /// Log lines together.
    pub log_bytes: u64,
    /// Largest tensor that travels in a frame of the data socket; 0: none does.
    pub inline_bytes: u64,
}

impl Default for LimitSettings {
    fn default() -> Self {
        Self {
            deadline_ms_default: 30_000,
            deadline_ms_max: 600_000,
            guest_bytes: 256 << 20,
            window_bytes: 4 << 30,
            result_bytes: 2 << 30,
            log_bytes: 64 << 10,
            inline_bytes: 32 << 10,
        }
    }
}

impl LimitSettings {
    /// As the engine takes them.
    #[must_use]
    pub fn limits(&self) -> Limits {
        Limits {
            guest_bytes: self.guest_bytes,
            window_bytes: self.window_bytes,
            result_bytes: self.result_bytes,
            log_bytes: self.log_bytes,
        }
    }
}

/// Kernels in worker processes.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WorkerSettings {
    /// Run kernels in a process of their own.
    pub enabled: bool,
    /// Milliseconds that a run gets beyond its deadline, or after it was cancelled, before its worker is killed.
    pub grace_ms: u64,
    /// Processes at most: one of each principal that runs kernels, and the spare.
    pub max: usize,
    /// Milliseconds without a run after which a worker ends.
    pub idle_ms: u64,
    /// Keep one that is ready for the next principal, or to succeed one that is lost.
    pub spare: bool,
    /// Streams that are under way at a time in one: prepared ones and exchanges. Each has a thread there.
    pub streams: usize,
    /// A plugin whose kernels cost a principal so many workers within [`Self::strikes_ms`] is out of service for it; 0: never.
    pub strikes: usize,
    /// Milliseconds.
    pub strikes_ms: u64,
    /// Milliseconds of CPU, in whole seconds, in which a plugin must be compiled. It may wait for twice as long.
    pub compile_ms: u64,
    /// Addresses of the process that compiles a plugin.
    pub compile_bytes: u64,
    /// Plugins that are compiled or describe themselves at a time.
    pub compilers: usize,
    /// Run no kernel where a wall around worker processes is lacking; without it that is a warning.
    pub require_walls: bool,
    /// Memory of its own that one may have; none: as its runs may need.
    pub memory_bytes: Option<u64>,
    /// Users for worker and compiler processes, `FIRST-LAST`: each has one of its own. The host must be root. None: they have the host's.
    pub uids: Option<String>,
    /// The `strait` program for it; none: the one that the host runs.
    pub program: Option<PathBuf>,
    /// Its options; for whoever starts a host, not a setting.
    #[serde(skip)]
    pub options: Vec<String>,
}

impl Default for WorkerSettings {
    fn default() -> Self {
        Self {
            enabled: false,
            grace_ms: 500,
            max: 16,
            idle_ms: 600_000,
            spare: true,
            streams: 32,
            require_walls: false,
            memory_bytes: None,
            uids: None,
            strikes: 3,
            strikes_ms: 600_000,
            compile_ms: 60_000,
            compile_bytes: 2 << 30,
            compilers: 2,
            program: None,
            options: Vec::new(),
        }
    }
}

impl WorkerSettings {
    /// [`Self::grace_ms`], at most an hour.
    #[must_use]
    pub fn grace(&self) -> Duration {
        Duration::from_millis(self.grace_ms.min(3_600_000))
    }

    /// [`Self::streams`], at most 1024.
    #[must_use]
    pub fn streams(&self) -> usize {
        self.streams.min(1024)
    }

    /// [`Self::strikes_ms`], at most a week.
    #[must_use]
    pub fn window(&self) -> Duration {
        Duration::from_millis(self.strikes_ms.min(7 * 86_400_000))
    }

    /// [`Self::compile_ms`] in whole seconds, as Linux limits CPU time: at least one, at most an hour.
    #[must_use]
    pub fn compile_seconds(&self) -> u64 {
        self.compile_ms.clamp(1, 3_600_000).div_ceil(1000)
    }
}

/// Memory of the host.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Memory {
    /// All segments together; none: half of what is available at the start.
    pub budget_bytes: Option<u64>,
    /// Segments at a time; none: half of the limit of open files.
    pub segments: Option<u64>,
    /// Idle results kept warm; none: a quarter of the budget.
    pub pool_idle_bytes: Option<u64>,
    /// Idle parked mappings; none: an eighth of `vm.max_map_count`.
    pub parked_mappings: Option<u64>,
}

/// How kernels run.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EngineSettings {
    /// Tensors from this size on are moved into the guest, smaller ones copied.
    pub move_min_bytes: u64,
    /// Rows that a kernel gets at a time if it streams; none: all at once.
    pub chunk_rows: Option<NonZeroU64>,
    /// Memory between two kernels of a pipeline that run at once, at most 2 MiB; 0: they run one after the other.
    pub link_bytes: u64,
    /// Check for deadlines and cancels inside kernels that run in the host's own process.
    pub epoch_interruption: bool,
    /// Where compiled plugins are kept; empty: nowhere; none: `strait` in `$XDG_CACHE_HOME` or `~/.cache`.
    pub cache: Option<PathBuf>,
    /// Threads that run kernels; none: one for each CPU.
    pub workers: Option<usize>,
    /// Threads that one invocation can run on, in slices; none: as many as run kernels.
    pub threads: Option<usize>,
    /// Invocations that may wait for a worker, of all principals.
    pub queue_len: usize,
}

impl Default for EngineSettings {
    fn default() -> Self {
        Self {
            move_min_bytes: 512 << 10,
            chunk_rows: None,
            link_bytes: 256 << 10,
            epoch_interruption: true,
            cache: None,
            workers: None,
            threads: None,
            queue_len: 1024,
        }
    }
}

/// Lives of leases.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LeaseSettings {
    /// A lease that names no life.
    pub lease_ms_default: u64,
    /// Longest life.
    pub lease_ms_max: u64,
    /// Results that nobody has fetched over Flight yet.
    pub undelivered_ms: u64,
}

impl Default for LeaseSettings {
    fn default() -> Self {
        Self {
            lease_ms_default: 600_000,
            lease_ms_max: 86_400_000,
            undelivered_ms: 60_000,
        }
    }
}

impl Config {
    /// The settings of `file` (if one is named), overlaid by the environment.
    ///
    /// # Errors
    /// If the file cannot be read, or a setting does not exist or has a wrong value; names it.
    pub fn load(file: Option<&Path>) -> anyhow::Result<Self> {
        let mut builder = config::Config::builder();
        if let Some(file) = file {
            builder = builder.add_source(
                config::File::from(file)
                    .format(config::FileFormat::Toml)
                    .required(true),
            );
        }
        let environment = config::Environment::with_prefix("STRAIT")
            .prefix_separator("__")
            .separator("__")
            .try_parsing(true)
            .list_separator(":")
            .with_list_parse_key("server.plugins");
        Ok(builder.add_source(environment).build()?.try_deserialize()?)
    }

    /// Time that running invocations get at the end.
    #[must_use]
    pub fn drain(&self) -> Duration {
        Duration::from_millis(self.server.drain_ms.unwrap_or(10_000))
    }

    /// Longest gRPC message.
    #[must_use]
    pub fn message_bytes_max(&self) -> usize {
        self.server.message_bytes_max.unwrap_or(256 << 20)
    }

    /// Time for what a client must send at once.
    #[must_use]
    pub fn request_time(&self) -> Duration {
        Duration::from_millis(self.server.request_ms.unwrap_or(10_000))
    }

    /// Longest pause of a stream.
    #[must_use]
    pub fn stall(&self) -> Duration {
        Duration::from_millis(self.server.stall_ms.unwrap_or(60_000))
    }

    /// What one of several endpoints gives.
    #[must_use]
    pub fn endpoint_bytes(&self) -> u64 {
        self.server.endpoint_bytes.unwrap_or(64 << 20)
    }

    /// How long a prepared call's thread looks for the next one.
    #[must_use]
    pub fn spin(&self) -> Spin {
        Spin::new(Duration::from_micros(self.server.spin_us.unwrap_or(0)))
    }

    /// Segments at a time: each holds a descriptor, and connections need some, too.
    #[must_use]
    pub fn segments_max(&self) -> u64 {
        let files = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        self.memory
            .segments
            .unwrap_or_else(|| files.unwrap_or(1 << 20) / 2)
    }

    /// Descriptors on their way to clients: beyond the limit of open files Linux lets nobody of the host's user send any.
    #[must_use]
    pub fn descriptors_max(&self) -> u64 {
        let files = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        files.unwrap_or(1 << 20) / 2
    }

    /// Bytes that all segments together may have.
    #[must_use]
    pub fn budget_bytes(&self) -> u64 {
        // Where Linux does not say how much there is, a modest amount.
        let half = || strait_memory::process::memory_available().map_or(1 << 30, |bytes| bytes / 2);
        self.memory.budget_bytes.unwrap_or_else(half)
    }

    /// The engine's part.
    #[must_use]
    pub fn engine(&self) -> EngineConfig {
        EngineConfig {
            move_min_bytes: self.engine.move_min_bytes,
            chunk_rows: self.engine.chunk_rows,
            interruption: match self.engine.epoch_interruption {
                true => Interruption::Checks,
                false => Interruption::None,
            },
            cache: self.cache(),
            idle_guests_max: 16,
            threads: self.threads(),
        }
    }

    /// Runs of a worker process at a time.
    #[must_use]
    pub fn worker_lanes(&self) -> usize {
        // One for each thread that waits, and one for a plugin that is loaded meanwhile.
        self.workers() + 2
    }

    /// The users of worker processes.
    ///
    /// # Errors
    /// The setting is no range of users, or this process cannot give others.
    pub fn worker_uids(&self) -> Result<Option<RangeInclusive<u32>>, String> {
        // 65534 is whoever has no name here, and the last one stands for none.
        const NOBODY: [u32; 2] = [65_534, u32::MAX];
        let Some(text) = &self.workers.uids else {
            return Ok(None);
        };
        let bad = |what: &str| Err(format!("workers.uids is `{text}`: {what}"));
        let range = text.split_once('-').and_then(|(first, last)| {
            Some(first.trim().parse::<u32>().ok()?..=last.trim().parse().ok()?)
        });
        let Some(range) = range.filter(|range| !range.is_empty()) else {
            return bad("it is to be FIRST-LAST, such as 300000-300063");
        };
        if range.end() - range.start() >= 65_536 {
            return bad("more than 65536 users are never needed");
        }
        if range.contains(&0) || NOBODY.iter().any(|uid| range.contains(uid)) {
            return bad("0, 65534 and 4294967295 are nobody's to give");
        }
        if !rustix::process::geteuid().is_root() {
            return bad(
                "only a host that is root can give its processes other users; leave it out",
            );
        }
        Ok(Some(range))
    }

    /// Memory of its own that a worker process may have.
    #[must_use]
    pub fn worker_memory(&self) -> u64 {
        /// The process itself, and each of its threads.
        const LEAST: u64 = 64 << 20;
        const LANE_LEAST: u64 = 4 << 20;
        /// With plugins and messages, whose largest are half as large.
        const BASE: u64 = 1 << 30;
        const LANE: u64 = 16 << 20;
        /// All that a guest can address.
        const GUEST: u64 = 4 << 30;
        // A slice has a guest, as a lane has.
        let lanes = (self.worker_lanes() + self.threads() - 1) as u64;
        let streams = (self.workers.streams() as u64).saturating_mul(LANE_LEAST);
        let guest = self.limits.guest_bytes;
        let guest = guest.saturating_add(self.limits.window_bytes).min(GUEST);
        let needed = BASE.saturating_add(lanes.saturating_mul(LANE + guest) + streams);
        let asked = self.workers.memory_bytes.unwrap_or(needed);
        asked.max(LEAST.saturating_add(lanes.saturating_mul(LANE_LEAST) + streams))
    }

    /// Descriptors that a worker process may have: a segment's for each input that it keeps warm, and what a run brings along.
    #[must_use]
    pub fn worker_files(&self) -> u64 {
        const BASE: u64 = 64;
        /// Its socket, its scrap memory and as many inputs as one message has.
        const LANE: u64 = 258;
        /// Its socket and its scrap memory.
        const STREAM: u64 = 2;
        let lanes = (self.worker_lanes() as u64).saturating_mul(LANE);
        let streams = self.workers.streams() as u64 * STREAM;
        self.segments_max().saturating_add(BASE + lanes + streams)
    }

    /// Where warm mappings of inputs wait.
    #[must_use]
    pub fn lot(&self) -> Arc<Lot> {
        Lot::new(self.parked_mappings_max(), self.budget_bytes())
    }

    /// Warm mappings of inputs, idle or in use.
    #[must_use]
    pub fn parked_mappings_max(&self) -> u64 {
        let asked = self.memory.parked_mappings;
        asked.unwrap_or_else(|| strait_memory::process::mappings_max() / 8)
    }

    /// Segments for results, charged to `budget`.
    #[must_use]
    pub fn pool(&self, budget: &Arc<Budget>) -> Arc<ResultPool> {
        let idle = self.memory.pool_idle_bytes;
        let idle = idle.unwrap_or_else(|| self.budget_bytes() / 4);
        ResultPool::new(Arc::clone(budget), idle)
    }

    fn cache(&self) -> Option<PathBuf> {
        match &self.engine.cache {
            Some(path) if path.as_os_str().is_empty() => None,
            Some(path) => Some(path.clone()),
            None => std::env::var_os("XDG_CACHE_HOME")
                .map(PathBuf::from)
                .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))
                .filter(|base| base.is_absolute())
                .map(|base| base.join("strait")),
        }
    }

    /// Threads that one invocation can run on.
    #[must_use]
    pub fn threads(&self) -> usize {
        const MOST: usize = 64;
        let asked = self.engine.threads.unwrap_or_else(|| self.workers());
        asked.clamp(1, MOST)
    }

    /// Threads that run kernels.
    #[must_use]
    pub fn workers(&self) -> usize {
        let cpus = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        self.engine.workers.unwrap_or_else(cpus)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_of_workers_are_a_range_that_is_there_to_be_given() {
        let uids = |text: &str| {
            let mut config = Config::default();
            config.workers.uids = Some(text.to_owned());
            config.worker_uids()
        };
        for (text, says) in [
            ("", "FIRST-LAST"),
            ("5", "FIRST-LAST"),
            ("6-5", "FIRST-LAST"),
            ("-1-5", "FIRST-LAST"),
            ("a-b", "FIRST-LAST"),
            ("1-4294967296", "FIRST-LAST"),
            ("0-5", "nobody's to give"),
            ("60000-70000", "nobody's to give"),
            ("4294967290-4294967295", "nobody's to give"),
            ("100000-165536", "more than 65536"),
        ] {
            let refused = uids(text).expect_err(text);
            assert!(
                refused.contains(says) && refused.contains(text),
                "{refused}"
            );
        }
        let fine = uids("300000 - 365535");
        match rustix::process::geteuid().is_root() {
            true => assert_eq!(fine, Ok(Some(300_000..=365_535))),
            false => assert!(fine.expect_err("not root").contains("root")),
        }
        assert_eq!(Config::default().worker_uids(), Ok(None));
    }
}
