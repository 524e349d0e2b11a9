//! Who may do what: names, rights, states, and the way of an invocation.
//!
//! ```text
//! Caller (account, rights) ── every verb      Session ── a caller's connection: ends its leases when it drops
//!   └── Host ── flights: (principal, name) → FlightEntry (state word, segment)
//!         ├── accounts: principal → what it may have, and has
//!         ├── leases: session → segments
//!         ├── plugins, runner (the engine), pool of results
//!         └── workers: a bounded number of threads ◀── queue: everybody's jobs, by turns
//! ```
//! The edges (`datasock`, `flight`, `cli`) authenticate whoever comes, get a [`Caller`], and call its
//! methods with the types of the wire; they get plain data or a [`Status`]. No async here: an
//! invocation's answer comes through a callback.

mod account;
mod answer;
mod caller;
mod channel;
mod chunks;
mod cpu;
mod flights;
mod idempotency;
mod invoke;
mod lanes;
mod prepare;
mod prepared;
mod quarantine;
mod queue;
mod quotas;
mod run;
mod segments;
mod shares;
mod state;
mod stats;
mod status;
mod to_wire;
mod undelivered;
mod welcome;
mod workers;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use strait_memory::{Budget, Copied, HugeBirths, Lot, ResultPool};

use crate::access::Access;
use crate::config::Config;
use crate::engine::{Engine, EngineConfig, Interruption, Runner};
use crate::error::{Code, Reason, Status};
use crate::lease::{Ended, Leases, LiveSegment, SegmentId, SessionId};
use crate::plugin::{Plugin, Plugins};
use crate::worker::{Bounds, CompilerSettings, CrewSettings, WorkerRunner, WorkerSettings};

pub use crate::access::{Kernels, Rights};
pub use crate::lease::{Gone, LeaseId, Principal};
pub use account::{Account, StreamPermit, Unread};
pub use answer::{Answer, InlineBytes, Invoked, InvokedResult, Outputs, ResultBody};
pub use caller::Caller;
pub use channel::{Channel, Consumer, Item, OpenChannel, Said, Sent, Woken, producer_lost};
pub use chunks::{ChunkEdge, ChunkFrame, Parted};
pub use flights::{FlightEntry, Reading, Upload, check_name};
pub use lanes::{FrameLane, FrameLanes, Serving, Told};
pub use prepare::Framed;
pub use prepared::{Called, Origin, Prepared, Preparing};
pub use run::Call;
pub use segments::check_tensor_names;
pub use state::{FlightState, StateWord, WrongState};

use channel::Channels;
use flights::Flights;
use quarantine::Quarantine;
use run::Deadlines;
use workers::Workers;

/// Longest part of a reply's JSON around one mapping: name, request id, lease, and the brackets
/// of a listing.
const REPLY_BYTES: usize = 1024;
/// Longest request id or idempotency key in characters.
const ID_CHARS_MAX: usize = 64;

/// Everything that one host process is.
#[derive(Debug)]
pub struct Host {
    config: Config,
    id: String,
    directory: PathBuf,
    /// What Linux shows for every user that the host's user namespace does not map.
    overflow_uid: u32,
    access: Access,
    budget: Arc<Budget>,
    accounts: account::Accounts,
    runner: Arc<dyn Runner>,
    pool: Arc<ResultPool>,
    /// Warm mappings of inputs, where kernels run in this process.
    lot: Arc<Lot>,
    plugins: Plugins,
    quarantine: Quarantine,
    leases: Leases,
    flights: Mutex<Flights>,
    channels: Channels,
    lanes: lanes::Lanes,
    idempotency: idempotency::Answers,
    undelivered: undelivered::Undelivered,
    deadlines: Deadlines,
    // An Option so that draining can end the threads while the host is still shared.
    workers: Mutex<Option<Workers>>,
    uploads_copied: Copied,
    births: HugeBirths,
    inline_copied: Copied,
    /// Tensor bytes taken out of frames of the data socket, and put into them.
    framed: Framing,
    sessions: AtomicU64,
    last_session: AtomicU64,
    last_request: AtomicU64,
    draining: AtomicBool,
}

/// Counts the tensor bytes that travel in frames.
#[derive(Debug, Default)]
pub struct Framing {
    /// Of inputs.
    pub inputs: Copied,
    /// Of results.
    pub results: Copied,
}

/// A caller's connection; ends its leases when it drops.
#[derive(Debug)]
pub struct Session {
    caller: Caller,
    /// Unique in the host's life.
    pub id: SessionId,
}

impl Drop for Session {
    fn drop(&mut self) {
        let host = self.host();
        let ended = host.leases.end_session(self.id);
        host.budget.free(ended.bytes(), ended);
        host.sessions.fetch_sub(1, Ordering::Relaxed);
        self.caller.account().count_session(false);
    }
}

impl Host {
    /// A host for the runtime directory `directory`, with the standard plugin and those of the settings.
    ///
    /// # Errors
    /// If this machine cannot run it or a plugin does not load; names what.
    pub fn start(config: Config, directory: &Path) -> anyhow::Result<Arc<Self>> {
        let budget = Budget::for_segments(config.budget_bytes(), config.segments_max());
        budget.free_elsewhere()?;
        let server = &config.server;
        let access = Access::open(server.tokens.as_deref(), server.rights.as_deref())?;
        let (lot, pool) = (config.lot(), config.pool(&budget));
        let runner = runner(&config, &lot, &pool)?;
        let workers = Workers::new(config.workers(), config.engine.queue_len)?;
        let random = SegmentId::random()?.to_string();
        let id = [
            &random[..8],
            &random[8..12],
            &random[12..16],
            &random[16..20],
            &random[20..],
        ]
        .join("-");
        let host = Arc::new(Self {
            id,
            directory: directory.to_owned(),
            overflow_uid: caller::overflow_uid()?,
            access,
            accounts: account::Accounts::new(
                &config.quota,
                &budget,
                config.descriptors_max(),
                &runner,
            ),
            budget,
            runner,
            pool,
            lot,
            plugins: Plugins::default(),
            quarantine: Quarantine::new(config.workers.strikes, config.workers.window()),
            leases: Leases::default(),
            flights: Mutex::default(),
            channels: Channels::default(),
            lanes: lanes::Lanes::default(),
            idempotency: idempotency::Answers::default(),
            undelivered: undelivered::Undelivered::default(),
            deadlines: Deadlines::new()?,
            workers: Mutex::new(Some(workers)),
            uploads_copied: Copied::new(),
            births: HugeBirths::new(),
            inline_copied: Copied::new(),
            framed: Framing::default(),
            sessions: AtomicU64::new(0),
            last_session: AtomicU64::new(0),
            last_request: AtomicU64::new(0),
            draining: AtomicBool::new(false),
            config,
        });
        let read = |path: &PathBuf| {
            Plugin::read(path).map_err(|e| anyhow::anyhow!("plugin {}: {e}", path.display()))
        };
        let standard = host
            .config
            .server
            .standard_plugin
            .as_ref()
            .map(read)
            .transpose()?;
        let own = host.own_caller();
        host.load_plugin(
            standard.as_deref().unwrap_or(crate::STANDARD_PLUGIN),
            own.principal(),
        )
        .map_err(|e| anyhow::anyhow!("the standard plugin does not load: {e}"))?;
        for path in &host.config.server.plugins {
            host.load_plugin(&read(path)?, own.principal())
                .map_err(|e| anyhow::anyhow!("plugin {}: {}", path.display(), e.message))?;
        }
        Ok(host)
    }

    /// Loads a plugin from its bytes, for `by`.
    ///
    /// # Errors
    /// `BAD_PLUGIN`, `NAME_TAKEN`.
    fn load_plugin(&self, bytes: &[u8], by: &Principal) -> Result<Arc<Plugin>, Status> {
        let plugin = self.runner.load(Arc::from(bytes))?;
        let plugin = self.plugins.add(plugin)?;
        let sha256 = crate::plugin::hex(&plugin.hash);
        tracing::info!(target: "audit", %by, plugin = plugin.description.name, sha256, "plugin loaded");
        Ok(plugin)
    }

    /// Who is let in, and what each may do.
    pub fn access(&self) -> &Access {
        &self.access
    }

    /// The settings.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The host's uuid, new at every start.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The runtime directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The loaded plugins.
    pub fn plugins(&self) -> &Plugins {
        &self.plugins
    }

    /// What runs the kernels.
    pub fn runner(&self) -> &Arc<dyn Runner> {
        &self.runner
    }

    /// The results' segments.
    pub fn pool(&self) -> &Arc<ResultPool> {
        &self.pool
    }

    /// What all segments are charged to.
    pub fn budget(&self) -> &Arc<Budget> {
        &self.budget
    }

    /// Counts the bytes that Flight copies on its way out.
    pub fn inline_copied(&self) -> &Copied {
        &self.inline_copied
    }

    /// Counts the tensor bytes that travel in frames of the data socket.
    pub fn framed(&self) -> &Framing {
        &self.framed
    }

    /// Counts the bytes that Flight copies on their way in.
    pub fn uploads_copied(&self) -> &Copied {
        &self.uploads_copied
    }

    /// The caller's request id, checked, or a new one.
    ///
    /// # Errors
    /// `BAD_REQUEST` if the caller's is not 1 to 64 characters from `[A-Za-z0-9._:-]`.
    pub fn request_id(&self, given: Option<&str>) -> Result<Arc<str>, Status> {
        match given {
            Some(id) => {
                check_id("request_id", id)?;
                Ok(Arc::from(id))
            }
            None => {
                let n = self.last_request.fetch_add(1, Ordering::Relaxed) + 1;
                Ok(Arc::from(format!("{}-{n}", &self.id[..8]).as_str()))
            }
        }
    }

    /// The life of a lease for which `asked` milliseconds were asked.
    pub fn lease_life(&self, asked: Option<u64>) -> Duration {
        let settings = &self.config.lease;
        Duration::from_millis(
            asked
                .unwrap_or(settings.lease_ms_default)
                .min(settings.lease_ms_max),
        )
    }

    /// Counts the huge pages of segments that are filled in this process.
    #[must_use]
    pub fn births(&self) -> &HugeBirths {
        &self.births
    }

    /// Ends leases whose time is over, and workers that were idle for too long; the leases' sessions are to be told.
    pub fn expire(&self, now: Instant) -> Vec<Gone> {
        let (gone, ended) = self.leases.expire(now);
        self.budget.free(ended.bytes(), ended);
        self.accounts.settle();
        self.runner.end_idle(now);
        let kept = self.undelivered.expire(now);
        self.budget.free(bytes_of(kept.iter()), kept);
        let answers = self.idempotency.expire(now);
        let results = answers.iter().flat_map(|answer| &answer.results);
        let segments = results.filter_map(InvokedResult::segment);
        self.budget.free(bytes_of(segments), answers);
        gone
    }

    fn admit(&self) -> Result<(), Status> {
        if self.draining.load(Ordering::Acquire) {
            return Err(draining());
        }
        Ok(())
    }

    /// From now on new work is refused.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Release);
    }

    /// Ends the worker threads after what is queued. Blocks.
    pub fn join_workers(&self) {
        let workers = self.workers.lock().take();
        drop(workers);
    }
}

impl Session {
    /// A session for a connection of `caller`.
    pub fn open(caller: Caller) -> Self {
        let host = caller.host();
        host.sessions.fetch_add(1, Ordering::Relaxed);
        caller.account().count_session(true);
        let id = host.last_session.fetch_add(1, Ordering::Relaxed) + 1;
        Self { caller, id }
    }

    /// Whose it is.
    pub fn caller(&self) -> &Caller {
        &self.caller
    }

    /// The host.
    pub fn host(&self) -> &Arc<Host> {
        self.caller.host()
    }

    /// Leases that this session has.
    pub fn lease_count(&self) -> usize {
        self.host().leases.count(self.id).1
    }

    /// A lease for this session: its id, and its life in milliseconds.
    ///
    /// # Errors
    /// `QUOTA_EXCEEDED`.
    pub fn grant(
        &self,
        segment: &Arc<LiveSegment>,
        lease_ms: Option<u64>,
    ) -> Result<(LeaseId, u64), Status> {
        let place = self.caller.account().lease()?;
        let life = self.host().lease_life(lease_ms);
        if segment.owner() != self.caller.principal() {
            segment.never_recycle();
        }
        let lease = self
            .host()
            .leases
            .grant(self.id, segment, life, Instant::now(), place);
        Ok((lease, u64::try_from(life.as_millis()).unwrap_or(u64::MAX)))
    }

    /// A segment that this session has a lease on, or a result of its principal over Flight.
    ///
    /// # Errors
    /// `BAD_REQUEST` if `id` is no segment id; `SEGMENT_NOT_FOUND`, `LEASE_EXPIRED`.
    pub fn segment(&self, id: &str) -> Result<Arc<LiveSegment>, Status> {
        self.host().leased(self.id, id).or_else(|missing| {
            let kept = id
                .parse()
                .ok()
                .and_then(|id| self.caller.undelivered(id).ok());
            kept.ok_or(missing)
        })
    }

    /// Ends leases that the client no longer maps. Results that are recyclable are so once this is
    /// dropped.
    pub fn release(&self, leases: &[LeaseId]) -> Ended {
        self.host().leases.release(self.id, leases)
    }

    /// Prolongs leases; answers their new life in milliseconds.
    ///
    /// # Errors
    /// `LEASE_EXPIRED`.
    pub fn renew(&self, leases: &[LeaseId], lease_ms: Option<u64>) -> Result<u64, Status> {
        let life = self.host().lease_life(lease_ms);
        self.host()
            .leases
            .renew(self.id, leases, life, Instant::now())?;
        Ok(u64::try_from(life.as_millis()).unwrap_or(u64::MAX))
    }
}

impl Host {
    fn leased(&self, session: SessionId, id: &str) -> Result<Arc<LiveSegment>, Status> {
        let id: SegmentId = id
            .parse()
            .map_err(|e: String| Status::new(Code::InvalidArgument, Reason::BadRequest, e))?;
        Ok(self.leases.find(session, id, Instant::now())?)
    }
}

fn bytes_of<'a>(segments: impl Iterator<Item = &'a Arc<LiveSegment>>) -> u64 {
    segments.fold(0, |sum, segment| sum.saturating_add(segment.capacity()))
}

/// What runs the kernels: this process, or others.
fn runner(
    config: &Config,
    lot: &Arc<Lot>,
    pool: &Arc<ResultPool>,
) -> anyhow::Result<Arc<dyn Runner>> {
    if !config.workers.enabled {
        let engine = Engine::new(config.engine(), Arc::clone(lot)).map_err(anyhow::Error::msg)?;
        return Ok(Arc::new(engine));
    }
    let options = config.workers.options.iter().cloned();
    let settings = WorkerSettings {
        program: config.workers.program.as_deref(),
        arguments: std::iter::once("worker".to_owned())
            .chain(options)
            .collect(),
        lanes: config.worker_lanes(),
        streams: config.workers.streams(),
        require_walls: config.workers.require_walls,
        grace: config.workers.grace(),
        bounds: Bounds {
            memory_bytes: config.worker_memory(),
            files: config.worker_files(),
        },
        uids: config.worker_uids().map_err(anyhow::Error::msg)?,
        crew: CrewSettings {
            max: config.workers.max,
            idle: Duration::from_millis(config.workers.idle_ms),
            spare: config.workers.spare,
        },
        engine: EngineConfig {
            interruption: Interruption::Signals,
            ..config.engine()
        },
        compilers: CompilerSettings {
            seconds: config.workers.compile_seconds(),
            bytes: config.workers.compile_bytes,
            at_once: config.workers.compilers.max(1),
        },
        parked_mappings_max: config.parked_mappings_max(),
        parked_bytes_max: config.budget_bytes(),
    };
    Ok(Arc::new(WorkerRunner::new(settings, Arc::clone(pool))?))
}

fn draining() -> Status {
    Status::new(
        Code::Unavailable,
        Reason::Draining,
        "the host is ending and takes no new work; connect to its successor",
    )
}

fn check_id(what: &str, id: &str) -> Result<(), Status> {
    let fine = !id.is_empty()
        && id.len() <= ID_CHARS_MAX
        && id
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "._:-".contains(c));
    if fine {
        return Ok(());
    }
    Err(Status::new(
        Code::InvalidArgument,
        Reason::BadRequest,
        format!("{what} must be 1 to {ID_CHARS_MAX} characters from A-Z a-z 0-9 . _ : -"),
    ))
}
