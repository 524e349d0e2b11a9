//! Who may do what: names, rights, states, and the way of an invocation.
//!
//! ```text
//! Host ── flights: (principal, name) → FlightEntry (state word, segment)
//!   ├── leases: session → segments            Session ── ends its leases when it drops
//!   ├── plugins, engine
//!   └── workers: one queue, a bounded number of threads
//! ```
//! The edges (`datasock`, `flight`, `cli`) call in here with the types of the wire and get plain
//! data or a [`Status`]. No async here: an invocation's answer comes through a callback.

mod idempotency;
mod invoke;
mod run;
mod state;
mod status;
mod to_wire;
mod undelivered;
mod workers;

use std::collections::BTreeMap;
use std::ops::Bound;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use strait_client::wire;
use strait_memory::{Adopted, Budget, Copied, HugeBirths, Open, Segment};
use strait_tensor::{Column, FileLayout, TensorPlace};

use crate::config::Config;
use crate::engine::Engine;
use crate::error::{Code, Status};
use crate::lease::{Body, Ended, Framing, Leases, LiveSegment, Principal, SegmentId, SessionId};
use crate::plugin::{Plugin, Plugins};

pub use crate::lease::{Gone, LeaseId};
pub use invoke::{Answer, Invoked, InvokedResult};
pub use run::Call;
pub use state::{FlightState, StateWord, WrongState};

use run::Deadlines;
use workers::Workers;

/// Longest flight name in bytes.
const NAME_BYTES_MAX: usize = 200;
/// Most tensors of one segment that a client makes or hands over.
const COLUMNS_MAX: usize = 128;
/// Longest name of such a tensor in bytes.
const COLUMN_BYTES_MAX: usize = 200;
/// Longest part of a reply's JSON around one mapping: name, request id, lease, and the brackets
/// of a listing.
const REPLY_BYTES: usize = 1024;
/// Longest request id or idempotency key in characters.
const ID_CHARS_MAX: usize = 64;

/// A name's flight.
#[derive(Debug)]
pub struct FlightEntry {
    state: StateWord,
    // Set once the bytes are whole. A std mutex: held for a clone only.
    segment: Mutex<Option<Arc<LiveSegment>>>,
}

impl FlightEntry {
    fn whole(segment: Arc<LiveSegment>) -> Arc<Self> {
        Arc::new(Self {
            state: StateWord::uploaded(),
            segment: Mutex::new(Some(segment)),
        })
    }

    fn segment(&self) -> Option<Arc<LiveSegment>> {
        self.segment
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .clone()
    }

    /// Its state and the number of inline readers.
    pub fn state(&self) -> (FlightState, u32) {
        self.state.get()
    }
}

type Flights = BTreeMap<(Principal, String), Arc<FlightEntry>>;

/// Everything that one host process is.
#[derive(Debug)]
pub struct Host {
    config: Config,
    id: String,
    directory: PathBuf,
    budget: Arc<Budget>,
    engine: Arc<Engine>,
    plugins: Plugins,
    leases: Leases,
    flights: Mutex<Flights>,
    idempotency: idempotency::Answers,
    undelivered: undelivered::Undelivered,
    deadlines: Deadlines,
    // An Option so that draining can end the threads while the host is still shared.
    workers: Mutex<Option<Workers>>,
    uploads_copied: Copied,
    births: HugeBirths,
    inline_copied: Copied,
    sessions: AtomicU64,
    last_session: AtomicU64,
    last_request: AtomicU64,
    draining: AtomicBool,
}

/// One connection's rights; ends its leases when it drops.
#[derive(Debug)]
pub struct Session {
    host: Arc<Host>,
    /// Unique in the host's life.
    pub id: SessionId,
    /// Who is connected.
    pub principal: Principal,
}

impl Drop for Session {
    fn drop(&mut self) {
        let ended = self.host.leases.end_session(self.id);
        self.host.budget.free(ended.bytes(), ended);
        self.host.sessions.fetch_sub(1, Ordering::Relaxed);
    }
}

/// An inline read in progress.
#[derive(Debug)]
pub struct Reading {
    entry: Arc<FlightEntry>,
    /// What is read.
    pub segment: Arc<LiveSegment>,
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.entry.state.end_read();
    }
}

/// A flight whose bytes are arriving. Dropping it unfinished frees them and the name.
#[derive(Debug)]
pub struct Upload {
    host: Arc<Host>,
    key: (Principal, String),
    entry: Arc<FlightEntry>,
    replaces: Option<Arc<FlightEntry>>,
    done: bool,
}

/// `getrandom` failed.
fn no_random(error: std::io::Error) -> Status {
    Status::new(
        Code::Internal,
        "HOST",
        format!("no random bytes for an id: {error}"),
    )
}

impl Host {
    /// A host for the runtime directory `directory`, with the standard plugin and those of the settings.
    ///
    /// # Errors
    /// If this machine cannot run it or a plugin does not load; names what.
    pub fn start(config: Config, directory: &Path) -> anyhow::Result<Arc<Self>> {
        let budget = Budget::for_segments(config.budget_bytes(), config.segments_max());
        budget.free_elsewhere()?;
        let engine = Engine::new(config.engine(), &budget).map_err(anyhow::Error::msg)?;
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
            budget,
            engine: Arc::new(engine),
            plugins: Plugins::default(),
            leases: Leases::default(),
            flights: Mutex::default(),
            idempotency: idempotency::Answers::default(),
            undelivered: undelivered::Undelivered::default(),
            deadlines: Deadlines::new()?,
            workers: Mutex::new(Some(workers)),
            uploads_copied: Copied::new(),
            births: HugeBirths::new(),
            inline_copied: Copied::new(),
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
        host.load_plugin(standard.as_deref().unwrap_or(crate::STANDARD_PLUGIN))
            .map_err(|e| anyhow::anyhow!("the standard plugin does not load: {e}"))?;
        for path in &host.config.server.plugins {
            host.load_plugin(&read(path)?)
                .map_err(|e| anyhow::anyhow!("plugin {}: {}", path.display(), e.message))?;
        }
        Ok(host)
    }

    /// Loads a plugin from its bytes.
    ///
    /// # Errors
    /// `BAD_PLUGIN`, `NAME_TAKEN`.
    pub fn load_plugin(&self, bytes: &[u8]) -> Result<Arc<Plugin>, Status> {
        let plugin = self.engine.load(Arc::from(bytes))?;
        Ok(self.plugins.add(plugin)?)
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

    /// The engine.
    pub fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    /// What all segments are charged to.
    pub fn budget(&self) -> &Arc<Budget> {
        &self.budget
    }

    /// Counts the bytes that Flight copies on its way out.
    pub fn inline_copied(&self) -> &Copied {
        &self.inline_copied
    }

    /// Counts the bytes that Flight copies on their way in.
    pub fn uploads_copied(&self) -> &Copied {
        &self.uploads_copied
    }

    fn flights(&self) -> MutexGuard<'_, Flights> {
        self.flights
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// A session for a connection of `principal`.
    pub fn open_session(self: &Arc<Self>, principal: Principal) -> Session {
        self.sessions.fetch_add(1, Ordering::Relaxed);
        let id = self.last_session.fetch_add(1, Ordering::Relaxed) + 1;
        Session {
            host: Arc::clone(self),
            id,
            principal,
        }
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

    /// What a client needs in order to map `segment`.
    pub fn mapping(&self, segment: &LiveSegment) -> wire::Mapping {
        let seal = match &*segment.body() {
            Body::Open(_) | Body::Lost => wire::Seal::None,
            Body::Client(_) => wire::Seal::ClientWrite,
            Body::Sealed(_) => wire::Seal::Write,
            Body::Result(_) => wire::Seal::HostWrite,
        };
        self.mapping_of(segment.id(), segment.bytes(), seal, segment.tensors())
    }

    fn mapping_of(
        &self,
        segment: SegmentId,
        bytes: u64,
        seal: wire::Seal,
        tensors: &[TensorPlace],
    ) -> wire::Mapping {
        wire::Mapping {
            strait_mmap: 1,
            host_id: self.id.clone(),
            socket: self.directory.join("data.sock").display().to_string(),
            segment: segment.to_string(),
            generation: 1,
            bytes,
            seal,
            tensors: tensors.to_vec(),
        }
    }

    /// Whether every reply that tells of these tensors will fit a frame: with the longest name, in
    /// a listing, too. Asked before there is a segment.
    fn check_told(&self, tensors: &[TensorPlace]) -> Result<(), Status> {
        // Names have 200 bytes at most, and each of them may need two in JSON.
        if tensors.len() <= COLUMNS_MAX / 4 {
            return Ok(());
        }
        let longest = self.mapping_of(
            SegmentId::default(),
            u64::MAX,
            wire::Seal::ClientWrite,
            tensors,
        );
        let bytes = serde_json::to_vec(&longest).map_or(usize::MAX, |json| json.len());
        let most = wire::BODY_BYTES_MAX - REPLY_BYTES;
        if bytes <= most {
            return Ok(());
        }
        Err(Status::new(
            Code::InvalidArgument,
            "BAD_TENSOR",
            format!(
                "the mapping of these {} tensors has {bytes} bytes of JSON, and a reply has room for {most}; \
                 take shorter names (a quotation mark counts twice), or put the tensors into several segments",
                tensors.len()
            ),
        ))
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

    /// Whole flights of `principal` after `after`, at most `count`, by name.
    pub fn list(
        &self,
        principal: Principal,
        after: Option<&str>,
        count: usize,
    ) -> Vec<(String, Arc<LiveSegment>)> {
        let after = after.unwrap_or("").to_owned();
        self.flights()
            .range((Bound::Excluded((principal, after)), Bound::Unbounded))
            .take_while(|((owner, _), _)| *owner == principal)
            .filter_map(|((_, name), entry)| Some((name.clone(), entry.segment()?)))
            .take(count)
            .collect()
    }

    fn entry(&self, principal: Principal, name: &str) -> Result<Arc<FlightEntry>, Status> {
        self.flights()
            .get(&(principal, name.to_owned()))
            .cloned()
            .ok_or_else(|| {
                let name = shown(name);
                Status::new(
                    Code::NotFound,
                    "TENSOR_NOT_FOUND",
                    format!(
                        "there is no tensor `{name}` of {principal}; `list` shows those there are"
                    ),
                )
                .with("name", name)
            })
    }

    /// The segment behind a name.
    ///
    /// # Errors
    /// `TENSOR_NOT_FOUND`; `WRONG_STATE` while it is still being uploaded.
    pub fn lookup(&self, principal: Principal, name: &str) -> Result<Arc<LiveSegment>, Status> {
        let entry = self.entry(principal, name)?;
        entry.segment().ok_or_else(|| {
            WrongState {
                from: entry.state.get().0,
                to: FlightState::Streaming,
            }
            .into()
        })
    }

    /// The state of a flight, and how many read it inline.
    ///
    /// # Errors
    /// `TENSOR_NOT_FOUND`.
    pub fn flight_state(
        &self,
        principal: Principal,
        name: &str,
    ) -> Result<(FlightState, u32), Status> {
        Ok(self.entry(principal, name)?.state())
    }

    /// Begins an inline read of a name.
    ///
    /// # Errors
    /// `TENSOR_NOT_FOUND`; `WRONG_STATE` while it is still being uploaded.
    pub fn begin_read(&self, principal: Principal, name: &str) -> Result<Reading, Status> {
        let entry = self.entry(principal, name)?;
        entry.state.begin_read()?;
        let segment = entry.segment();
        match segment {
            Some(segment) => Ok(Reading { entry, segment }),
            None => {
                entry.state.end_read();
                Err(Status::new(
                    Code::Internal,
                    "HOST",
                    format!("flight `{name}` is whole and has no segment"),
                ))
            }
        }
    }

    /// Takes a name for a flight whose bytes are to come.
    ///
    /// # Errors
    /// `BAD_NAME`, `NAME_TAKEN` unless `replace`, `WRONG_STATE` if another upload has the name.
    pub fn begin_upload(
        self: &Arc<Self>,
        principal: Principal,
        name: &str,
        replace: bool,
    ) -> Result<Upload, Status> {
        check_name(name)?;
        self.admit()?;
        let key = (principal, name.to_owned());
        let entry = Arc::new(FlightEntry {
            state: StateWord::default(),
            segment: Mutex::new(None),
        });
        let mut flights = self.flights();
        let replaces = flights.get(&key).cloned();
        if let Some(old) = &replaces {
            let (state, _) = old.state.get();
            if matches!(state, FlightState::Uploading | FlightState::Idle) {
                return Err(WrongState {
                    from: state,
                    to: FlightState::Uploading,
                }
                .into());
            }
            if !replace {
                return Err(name_taken(name));
            }
        }
        entry.state.begin_upload()?;
        // A flight that is being replaced stays readable until the new bytes are whole.
        if replaces.is_none() {
            flights.insert(key.clone(), Arc::clone(&entry));
        }
        drop(flights);
        Ok(Upload {
            host: Arc::clone(self),
            key,
            entry,
            replaces,
            done: false,
        })
    }

    /// Gives a whole segment a name.
    ///
    /// # Errors
    /// `BAD_NAME`, `NAME_TAKEN`, `STILL_WRITABLE`, `BAD_SEGMENT`, `WRONG_STATE`.
    pub fn publish(
        &self,
        principal: Principal,
        segment: &Arc<LiveSegment>,
        name: &str,
        replace: bool,
    ) -> Result<(), Status> {
        self.publish_all(principal, &[(segment, name)], replace)
    }

    /// Gives whole segments their names, which differ: all of them or, after an error, none.
    ///
    /// # Errors
    /// As [`Host::publish`].
    pub fn publish_all(
        &self,
        principal: Principal,
        named: &[(&Arc<LiveSegment>, &str)],
        replace: bool,
    ) -> Result<(), Status> {
        for (segment, name) in named {
            check_name(name)?;
            segment.seal()?;
        }
        let mut flights = self.flights();
        for (_, name) in named {
            let Some(old) = flights.get(&(principal, (*name).to_owned())) else {
                continue;
            };
            if !replace {
                return Err(name_taken(name));
            }
            // Whatever else it is, it can become Completed, and nothing becomes Uploading again.
            let (from, to) = (old.state().0, FlightState::Completed);
            if from == FlightState::Uploading {
                return Err(WrongState { from, to }.into());
            }
        }
        let mut replaced = Vec::new();
        for (segment, name) in named {
            let key = (principal, (*name).to_owned());
            if let Some(old) = flights.insert(key, FlightEntry::whole(Arc::clone(segment))) {
                old.state.complete()?;
                replaced.push(old);
            }
        }
        drop(flights);
        // The replaced segments, if this was their last holder, are freed here: not under the lock.
        drop(replaced);
        Ok(())
    }

    /// Takes a name away.
    ///
    /// # Errors
    /// `TENSOR_NOT_FOUND`; `WRONG_STATE` while it is being uploaded.
    pub fn drop_flight(&self, principal: Principal, name: &str) -> Result<(), Status> {
        let entry = self.entry(principal, name)?;
        entry.state.complete()?;
        let mut flights = self.flights();
        let key = (principal, name.to_owned());
        if flights
            .get(&key)
            .is_some_and(|now| Arc::ptr_eq(now, &entry))
        {
            flights.remove(&key);
        }
        Ok(())
    }

    /// Counts the huge pages of segments that are filled in this process.
    #[must_use]
    pub fn births(&self) -> &HugeBirths {
        &self.births
    }

    /// A segment for the host's own code to fill: large tensors in huge pages, which takes time that no
    /// runtime thread has.
    ///
    /// # Errors
    /// `BUDGET_EXCEEDED`, `DRAINING`.
    pub fn allocate_to_fill(&self, layout: &FileLayout) -> Result<Segment<Open>, Status> {
        let segment = self.allocate(layout)?;
        for tensor in &layout.tensors {
            let range = tensor.offset..tensor.offset + tensor.length;
            segment.back_with_huge_pages(range, &self.births);
        }
        Ok(segment)
    }

    /// A segment for that layout, with header and footer already in it.
    ///
    /// # Errors
    /// `BAD_TENSOR` if no reply could tell of it; `BUDGET_EXCEEDED`, `DRAINING`.
    fn allocate(&self, layout: &FileLayout) -> Result<Segment<Open>, Status> {
        self.admit()?;
        self.check_told(&layout.tensors)?;
        let made =
            Segment::create(layout.capacity, &self.budget).and_then(|segment: Segment<Open>| {
                let uncounted = Copied::new();
                segment.write_at(0, &layout.header, &uncounted)?;
                segment.write_at(layout.footer_offset, &layout.footer, &uncounted)?;
                Ok(segment)
            });
        made.map_err(|e| status::memory("no segment could be made", e))
    }

    /// A segment for a client to fill, and the descriptor to send.
    ///
    /// # Errors
    /// `BAD_TENSOR`, `BUDGET_EXCEEDED`, `DRAINING`.
    pub fn create(
        &self,
        principal: Principal,
        tensors: Vec<wire::NewTensor>,
    ) -> Result<(Arc<LiveSegment>, Arc<OwnedFd>), Status> {
        check_columns(tensors.iter().map(|t| t.name.as_str()))?;
        let columns = tensors
            .into_iter()
            .map(|t| {
                Column::new(
                    t.name,
                    strait_tensor::TensorSpec {
                        dtype: t.dtype,
                        shape: t.shape,
                    },
                )
            })
            .collect::<Result<Vec<_>, _>>()?;
        let layout = FileLayout::plan(&columns)?;
        let segment = self.allocate(&layout)?;
        let fd = segment.client_fd();
        let framing = Framing::from(&layout);
        Ok((
            self.live(
                principal,
                Body::Open(segment),
                layout.bytes,
                layout.tensors,
                Some(framing),
            )?,
            fd,
        ))
    }

    /// Takes over a client's memfd.
    ///
    /// # Errors
    /// `BAD_SEGMENT` with the reason, `BAD_TENSOR`, `BUDGET_EXCEEDED`, `DRAINING`.
    pub fn adopt(
        &self,
        principal: Principal,
        fd: OwnedFd,
        tensors: Vec<TensorPlace>,
    ) -> Result<Arc<LiveSegment>, Status> {
        self.admit()?;
        let bad = |message: String| Status::new(Code::InvalidArgument, "BAD_TENSOR", message);
        check_columns(tensors.iter().map(|t| t.name.as_str()))?;
        let mut ranges = Vec::with_capacity(tensors.len());
        for (index, tensor) in tensors.iter().enumerate() {
            let bytes = tensor.spec.bytes()?;
            if bytes != tensor.length {
                return Err(bad(format!(
                    "tensor `{}` has length {}, its dtype and shape make {bytes}",
                    tensor.name, tensor.length
                )));
            }
            if tensors[..index]
                .iter()
                .any(|other| other.name == tensor.name)
            {
                return Err(bad(format!("two tensors are named `{}`", tensor.name)));
            }
            let end = tensor
                .offset
                .checked_add(bytes)
                .ok_or_else(|| bad(format!("tensor `{}` ends beyond 2^64 bytes", tensor.name)))?;
            ranges.push(tensor.offset..end);
        }
        self.check_told(&tensors)?;
        let body = match strait_memory::adopt(fd, &ranges, &self.budget)? {
            Adopted::Sealed(segment) => Body::Sealed(segment),
            Adopted::Lent(segment) => Body::Client(segment),
        };
        let bytes = match &body {
            Body::Sealed(s) => s.bytes(),
            Body::Client(s) => s.bytes(),
            Body::Open(_) | Body::Result(_) | Body::Lost => 0,
        };
        self.live(principal, body, bytes, tensors, None)
    }

    fn live(
        &self,
        principal: Principal,
        body: Body,
        bytes: u64,
        tensors: Vec<TensorPlace>,
        framing: Option<Framing>,
    ) -> Result<Arc<LiveSegment>, Status> {
        let segment = LiveSegment::new(principal, body, bytes, tensors, framing, self.engine.lot())
            .map_err(no_random)?;
        self.leases.register(&segment);
        Ok(segment)
    }

    /// Ends leases whose time is over; their sessions are to be told.
    pub fn expire(&self, now: Instant) -> Vec<Gone> {
        let (gone, ended) = self.leases.expire(now);
        self.budget.free(ended.bytes(), ended);
        let kept = self.undelivered.expire(now);
        self.budget.free(bytes_of(kept.iter()), kept);
        let answers = self.idempotency.expire(now);
        let results = answers.iter().flat_map(|answer| &answer.results);
        self.budget
            .free(bytes_of(results.map(|result| &result.segment)), answers);
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
        let workers = self
            .workers
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .take();
        drop(workers);
    }

    /// The counts of STATS, for a session.
    pub fn stats(&self, session: Option<(SessionId, Principal)>) -> serde_json::Value {
        // Without /proc there are no figures; the rest still counts.
        let process = strait_memory::process::counts().unwrap_or_default();
        let (segments, segment_bytes) = self.leases.count_segments();
        let (session_id, principal) = session.map_or((0, None), |(id, p)| (id, Some(p)));
        let (leases, own_leases) = self.leases.count(session_id);
        let (invocations, running) = self.engine.counts();
        let copies = self.engine.copies();
        let places = [
            ("guest_in", copies.guest_in.get()),
            ("guest_out", copies.guest_out.get()),
            ("flight_in", self.uploads_copied.get()),
            ("flight_out", self.inline_copied.get()),
        ];
        let pool = self.engine.pool().stats();
        let lot = self.engine.lot().stats();
        let flights = self
            .flights()
            .keys()
            .filter(|(owner, _)| principal.is_none_or(|p| p == *owner))
            .count();
        serde_json::json!({
            "process": {
                "fds": process.fds, "mappings": process.mappings, "threads": process.threads,
                "minor_faults": process.minor_faults, "resident_bytes": process.resident_bytes,
            },
            "segments": segments, "segment_bytes": segment_bytes,
            "budget_bytes": self.budget.limit(), "budget_used_bytes": self.budget.used(),
            "flights": flights, "leases": leases,
            "sessions": self.sessions.load(Ordering::Relaxed),
            "invocations": invocations, "running": running,
            "copied_bytes": places.iter().map(|(_, n)| n).sum::<u64>(),
            "copied": places.iter().map(|(k, n)| ((*k).to_owned(), (*n).into())).collect::<serde_json::Map<_, _>>(),
            "huge": {
                "asked_bytes": pool.huge_asked_bytes + self.births.asked_bytes(),
                "huge_bytes": pool.huge_bytes + self.births.huge_bytes(),
            },
            "pool": { "segments": pool.segments, "bytes": pool.bytes, "idle_segments": pool.idle_segments, "idle_bytes": pool.idle_bytes },
            "parked": { "mappings": lot.mappings, "idle_mappings": lot.idle_mappings, "idle_bytes": lot.idle_bytes },
            "own": { "leases": own_leases, "segments": self.leases.count_own_segments(session_id) },
        })
    }
}

impl Session {
    /// The host.
    pub fn host(&self) -> &Arc<Host> {
        &self.host
    }

    /// Leases that this session has.
    pub fn lease_count(&self) -> usize {
        self.host.leases.count(self.id).1
    }

    /// A lease for this session.
    pub fn grant(&self, segment: &Arc<LiveSegment>, lease_ms: Option<u64>) -> (LeaseId, u64) {
        let life = self.host.lease_life(lease_ms);
        if segment.owner() != self.principal {
            segment.never_recycle();
        }
        let lease = self
            .host
            .leases
            .grant(self.id, segment, life, Instant::now());
        (lease, u64::try_from(life.as_millis()).unwrap_or(u64::MAX))
    }

    /// A segment that this session has a lease on, or a result of its principal over Flight.
    ///
    /// # Errors
    /// `BAD_REQUEST` if `id` is no segment id; `SEGMENT_NOT_FOUND`, `LEASE_EXPIRED`.
    pub fn segment(&self, id: &str) -> Result<Arc<LiveSegment>, Status> {
        self.host.leased(self.id, id).or_else(|missing| {
            let kept = id
                .parse()
                .ok()
                .and_then(|id| self.host.undelivered(self.principal, id).ok());
            kept.ok_or(missing)
        })
    }

    /// Ends leases that the client no longer maps. Results that are recyclable are so once this is
    /// dropped.
    pub fn release(&self, leases: &[LeaseId]) -> Ended {
        self.host.leases.release(self.id, leases)
    }

    /// Prolongs leases; answers their new life in milliseconds.
    ///
    /// # Errors
    /// `LEASE_EXPIRED`.
    pub fn renew(&self, leases: &[LeaseId], lease_ms: Option<u64>) -> Result<u64, Status> {
        let life = self.host.lease_life(lease_ms);
        self.host
            .leases
            .renew(self.id, leases, life, Instant::now())?;
        Ok(u64::try_from(life.as_millis()).unwrap_or(u64::MAX))
    }
}

impl Host {
    fn leased(&self, session: SessionId, id: &str) -> Result<Arc<LiveSegment>, Status> {
        let id: SegmentId = id
            .parse()
            .map_err(|e: String| Status::new(Code::InvalidArgument, "BAD_REQUEST", e))?;
        Ok(self.leases.find(session, id, Instant::now())?)
    }
}

impl Upload {
    /// The bytes are whole: the flight can be read from now on.
    ///
    /// # Errors
    /// `WRONG_STATE` if the flight that it replaces is itself being replaced; what `Host::live` says.
    pub fn finish(
        mut self,
        segment: Segment<Open>,
        layout: FileLayout,
    ) -> Result<Arc<LiveSegment>, Status> {
        let sealed = segment
            .seal()
            .map_err(|refused| Status::from(refused.error))?;
        let live = self.host.live(
            self.key.0,
            Body::Sealed(sealed),
            layout.bytes,
            layout.tensors,
            None,
        )?;
        *self.entry.segment.lock().unwrap_or_else(|e| e.into_inner()) = Some(Arc::clone(&live));
        self.entry.state.finish_upload()?;
        let mut flights = self.host.flights();
        if let Some(old) = self.replaces.take() {
            // Somebody may have dropped or replaced it meanwhile; the latest bytes win.
            if let Some(now) = flights.get(&self.key) {
                now.state.complete()?;
            }
            // Completing twice is legal; this covers an old one that left the map by itself.
            old.state.complete()?;
            flights.insert(self.key.clone(), Arc::clone(&self.entry));
        }
        drop(flights);
        self.done = true;
        Ok(live)
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        // From Uploaded (when `finish` failed late) there is no way back to Idle, and no need.
        let _ = self.entry.state.fail_upload();
        let mut flights = self.host.flights();
        if flights
            .get(&self.key)
            .is_some_and(|now| Arc::ptr_eq(now, &self.entry))
        {
            flights.remove(&self.key);
        }
    }
}

fn bytes_of<'a>(segments: impl Iterator<Item = &'a Arc<LiveSegment>>) -> u64 {
    segments.fold(0, |sum, segment| sum.saturating_add(segment.capacity()))
}

/// What somebody calls something, short and on one line, for a message.
fn shown(name: &str) -> String {
    let mut shown: String = name
        .chars()
        .take(NAME_BYTES_MAX)
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect();
    if shown.len() < name.len() && name.chars().nth(NAME_BYTES_MAX).is_some() {
        shown.push('…');
    }
    shown
}

fn draining() -> Status {
    Status::new(
        Code::Unavailable,
        "DRAINING",
        "the host is ending and takes no new work; connect to its successor",
    )
}

fn name_taken(name: &str) -> Status {
    Status::new(
        Code::AlreadyExists,
        "NAME_TAKEN",
        format!("there is a tensor `{name}` already; drop it, say replace, or take another name"),
    )
    .with("name", name)
}

/// # Errors
/// `BAD_NAME` with what a name may be.
pub fn check_name(name: &str) -> Result<(), Status> {
    let fine = !name.is_empty()
        && name.len() <= NAME_BYTES_MAX
        && !name.contains('#')
        && !name.chars().any(char::is_control);
    if fine {
        return Ok(());
    }
    let shown: String = name.chars().take(40).collect();
    Err(Status::new(
        Code::InvalidArgument,
        "BAD_NAME",
        format!(
            "{shown:?} ({} bytes) is not a name: 1 to {NAME_BYTES_MAX} bytes without `#` and control characters",
            name.len()
        ),
    ))
}

/// Names of a segment's tensors: few and short enough for a mapping to fit a frame.
///
/// # Errors
/// `BAD_TENSOR` with what is possible.
pub fn check_columns<'a>(names: impl ExactSizeIterator<Item = &'a str>) -> Result<(), Status> {
    let bad = |message: String| Err(Status::new(Code::InvalidArgument, "BAD_TENSOR", message));
    if names.len() == 0 || names.len() > COLUMNS_MAX {
        return bad(format!(
            "{} tensors; a segment has 1 to {COLUMNS_MAX}",
            names.len()
        ));
    }
    for name in names {
        if name.is_empty() || name.len() > COLUMN_BYTES_MAX || name.chars().any(char::is_control) {
            let shown: String = name.chars().take(40).collect();
            return bad(format!(
                "a tensor is named {shown:?} ({} bytes); a name has 1 to {COLUMN_BYTES_MAX} bytes without control characters",
                name.len()
            ));
        }
    }
    Ok(())
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
        "BAD_REQUEST",
        format!("{what} must be 1 to {ID_CHARS_MAX} characters from A-Z a-z 0-9 . _ : -"),
    ))
}
