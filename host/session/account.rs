//! What each principal may have of the host, and has.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use strait_memory::{Budget, BudgetExceeded, Charge};
use strait_protocol::{self as wire, QuotaConfig, QuotaSettings, Quotas};
use tokio::sync::Notify;

use super::cpu::CpuMeter;
use super::queue::Share;
use crate::engine::{Owner, Runner};
use crate::error::{Code, Reason, Status, used_up};
use crate::lease::Principal;

/// Connections at a time, on all sockets.
const CONNECTIONS_MAX: u64 = 1024;
/// How long whoever reads or writes inline waits for a place.
const STREAM_WAIT: Duration = Duration::from_secs(10);

/// One principal's part of what the host has.
#[derive(Debug)]
pub struct Account {
    principal: Principal,
    /// Unlike the principal a plain number: one for each account of this host, from 1.
    number: u64,
    quotas: Mutex<Quotas>,
    segments: Arc<Budget>,
    connections: Arc<Budget>,
    leases: Arc<Budget>,
    descriptors: Arc<Budget>,
    names: Arc<Budget>,
    // Connections, and those that have ended before their client received all that was sent.
    unread: Mutex<Vec<Arc<dyn Unread>>>,
    sessions: AtomicU64,
    streams: Arc<Streams>,
    /// What its invocations wait and run as.
    invocations: Arc<Share>,
}

/// A connection with descriptors on their way.
pub trait Unread: Send + Sync + std::fmt::Debug {
    /// Gives back the places of what has been received. True if nothing more will be sent and nothing is on its way.
    fn settle(&self) -> bool;
}

/// Inline reads and writes: whoever has as many as allowed waits for one of its own to end.
#[derive(Debug)]
struct Streams {
    places: Arc<Budget>,
    freed: Notify,
    /// Those that have waited in vain.
    refused: AtomicU64,
}

/// A place among a principal's streams, until it is dropped.
#[derive(Debug)]
pub struct StreamPermit {
    // Given back before the next one is told.
    place: Option<Charge>,
    streams: Arc<Streams>,
}

impl Drop for StreamPermit {
    fn drop(&mut self) {
        self.place = None;
        self.streams.freed.notify_one();
    }
}

/// The accounts, and what they may have.
#[derive(Debug)]
struct Inner {
    default: Quotas,
    /// For one principal alone, whether it ever came or not.
    set: BTreeMap<String, QuotaSettings>,
    // An account stays for the host's life: what its principal let go of may still be charged to it, and its
    // idle results wait for it.
    of: BTreeMap<Principal, Arc<Account>>,
}

impl Inner {
    fn quotas(&self, principal: &str) -> Quotas {
        match self.set.get(principal) {
            Some(set) => self.default.changed(set, &self.default),
            None => self.default,
        }
    }
}

/// An account for each principal.
#[derive(Debug)]
pub(super) struct Accounts {
    /// What the host was started with.
    configured: Quotas,
    segments: Arc<Budget>,
    connections: Arc<Budget>,
    leases: Arc<Budget>,
    descriptors: Arc<Budget>,
    names: Arc<Budget>,
    streams: Arc<Budget>,
    runner: Arc<dyn Runner>,
    // Held for map operations and atomics only.
    inner: Mutex<Inner>,
}

impl Accounts {
    /// Accounts whose segments are charged to `segments`, too; at most `descriptors` are on their way to all of them.
    /// `runner` knows the CPU time that is used in other processes.
    pub(super) fn new(
        quota: &QuotaConfig,
        segments: &Arc<Budget>,
        descriptors: u64,
        runner: &Arc<dyn Runner>,
    ) -> Self {
        Self {
            configured: quota.quotas(),
            segments: Arc::clone(segments),
            connections: Budget::new("connections", CONNECTIONS_MAX),
            // These are bounded by those of each principal.
            leases: Budget::new("leases", u64::MAX),
            names: Budget::new("names", u64::MAX),
            streams: Budget::new("streams", u64::MAX),
            descriptors: Budget::new("descriptors in flight", descriptors),
            runner: Arc::clone(runner),
            inner: Mutex::new(Inner {
                default: quota.quotas(),
                set: quota.of.clone(),
                of: BTreeMap::new(),
            }),
        }
    }

    pub(super) fn of(&self, principal: &Principal) -> Arc<Account> {
        let mut inner = self.inner.lock();
        if let Some(account) = inner.of.get(principal) {
            return Arc::clone(account);
        }
        let whose: Arc<str> = principal.to_string().into();
        let quotas = inner.quotas(&whose);
        let number = inner.of.len() as u64 + 1;
        let runner = Arc::clone(&self.runner);
        let elsewhere = Box::new(move || runner.cpu_time(Owner(number)));
        let account = Arc::new(Account {
            principal: principal.clone(),
            number,
            quotas: Mutex::new(quotas),
            segments: self.segments.child_for_segments(&whose, 0, 0),
            connections: self.connections.child(&whose, 0),
            leases: self.leases.child(&whose, 0),
            descriptors: self.descriptors.child(&whose, 0),
            names: self.names.child(&whose, 0),
            unread: Mutex::default(),
            sessions: AtomicU64::new(0),
            streams: Arc::new(Streams {
                places: self.streams.child(&whose, 0),
                freed: Notify::new(),
                refused: AtomicU64::new(0),
            }),
            invocations: Share::new(whose, 0, 0, CpuMeter::new(elsewhere)),
        });
        account.apply(&quotas);
        inner.of.insert(principal.clone(), Arc::clone(&account));
        account
    }

    /// Looks what clients have received: connections that have ended are held for what they have not.
    pub(super) fn settle(&self) {
        let accounts: Vec<_> = self.inner.lock().of.values().cloned().collect();
        for account in accounts {
            account.settle();
        }
    }

    /// Whose account has that number.
    pub(super) fn principal(&self, number: u64) -> Option<String> {
        let inner = self.inner.lock();
        let mut accounts = inner.of.values();
        let account = accounts.find(|account| account.number == number)?;
        Some(account.principal.to_string())
    }

    /// The number of a principal's account, if it ever came.
    pub(super) fn number(&self, principal: &str) -> Option<u64> {
        let inner = self.inner.lock();
        let mut accounts = inner.of.values();
        let account = accounts.find(|account| account.principal.to_string() == principal)?;
        Some(account.number)
    }

    /// Principals that ever came.
    pub(super) fn count(&self) -> u64 {
        self.inner.lock().of.len() as u64
    }

    pub(super) fn connections_max(&self) -> u64 {
        self.connections.limit()
    }

    pub(super) fn descriptors_max(&self) -> u64 {
        self.descriptors.limit()
    }

    pub(super) fn default_quotas(&self) -> Quotas {
        self.inner.lock().default
    }

    /// Those after `after` that ever came or have quotas of their own, at most `count`, by name.
    pub(super) fn list(&self, after: &str, count: usize) -> Vec<wire::AccountQuotas> {
        let inner = self.inner.lock();
        let came = inner.of.iter();
        let came = came.map(|(principal, account)| (principal.to_string(), Some(account)));
        let set = inner.set.keys().map(|principal| (principal.clone(), None));
        // Whoever came is told with its account.
        let all: BTreeMap<_, _> = set.chain(came).collect();
        let listed = all.into_iter().filter(|(name, _)| name.as_str() > after);
        let of = |(principal, account): (String, Option<&Arc<Account>>)| wire::AccountQuotas {
            quotas: inner.quotas(&principal),
            set: inner.set.get(&principal).copied().unwrap_or_default(),
            stats: account.map(|account| account.stats()).unwrap_or_default(),
            principal,
        };
        listed.take(count).map(of).collect()
    }

    /// Changes the quotas of `principal`, or of all for whom nothing else is set.
    pub(super) fn set(&self, principal: Option<&str>, changes: &QuotaSettings) {
        let mut inner = self.inner.lock();
        match principal {
            None => inner.default = inner.default.changed(changes, &self.configured),
            Some(principal) => {
                let set = inner.set.entry(principal.to_owned()).or_default();
                set.absorb(changes);
                if *set == QuotaSettings::default() {
                    inner.set.remove(principal);
                }
            }
        }
        for (principal, account) in &inner.of {
            account.apply(&inner.quotas(&principal.to_string()));
        }
    }
}

impl Account {
    /// Whose it is.
    pub fn principal(&self) -> &Principal {
        &self.principal
    }

    /// The account's number, unique in the host's life: whose results and whose workers are kept apart.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// What the principal's segments are charged to: a part of the host's own budget.
    pub fn segments(&self) -> &Arc<Budget> {
        &self.segments
    }

    /// A place among the connections until it is dropped, whatever was said on it.
    ///
    /// # Errors
    /// `QUOTA_EXCEEDED`, `BUDGET_EXCEEDED`.
    pub fn connect(&self) -> Result<Charge, Status> {
        if !self.connections.has_room(1) {
            self.settle();
        }
        let place = self.connections.try_reserve(1);
        place.map_err(|exceeded: BudgetExceeded| {
            let message = format!("{exceeded}; or close a connection and try again");
            Status::new(Code::ResourceExhausted, used_up(&exceeded), message)
        })
    }

    pub(super) fn invocations(&self) -> &Arc<Share> {
        &self.invocations
    }

    /// From now on.
    fn apply(&self, quotas: &Quotas) {
        *self.quotas.lock() = *quotas;
        let limit = |quota: Option<u64>| quota.unwrap_or(u64::MAX);
        let jobs = |quota| usize::try_from(limit(quota)).unwrap_or(usize::MAX);
        self.segments.set_limit(limit(quotas.bytes));
        if let Some(segments) = self.segments.segments() {
            segments.set_limit(limit(quotas.segments));
        }
        self.connections.set_limit(limit(quotas.connections));
        self.leases.set_limit(limit(quotas.leases));
        self.names.set_limit(limit(quotas.names));
        self.descriptors.set_limit(limit(quotas.descriptors));
        self.streams.places.set_limit(limit(quotas.streams));
        self.streams.freed.notify_waiters();
        self.invocations
            .set_limits(jobs(quotas.queued), jobs(quotas.running));
        self.invocations.cpu().set_limit(limit(quotas.cpu_percent));
    }

    /// A place among the inline reads and writes, as soon as there is one.
    ///
    /// # Errors
    /// `QUOTA_EXCEEDED` if none of them ends for too long.
    pub async fn stream(&self) -> Result<StreamPermit, Status> {
        if let Ok(permit) = tokio::time::timeout(STREAM_WAIT, self.next_stream()).await {
            return Ok(permit);
        }
        self.streams.refused.fetch_add(1, Relaxed);
        let (most, seconds) = (self.streams.places.limit(), STREAM_WAIT.as_secs());
        let message = format!(
            "{most} streams of {} are being read or written, as many as it may have, and none ended within {seconds} s; \
             finish or cancel some, map the flights instead, or have the operator raise quota.streams",
            self.principal
        );
        let status = Status::new(Code::ResourceExhausted, Reason::QuotaExceeded, message);
        Err(status.with("limit", most))
    }

    async fn next_stream(&self) -> StreamPermit {
        loop {
            let freed = self.streams.freed.notified();
            // Without counting a refusal: it only waits.
            if self.streams.places.has_room(1)
                && let Ok(place) = self.streams.places.try_reserve(1)
            {
                // Of several that are freed at once, before anybody waits, only one is remembered.
                if self.streams.places.has_room(1) {
                    self.streams.freed.notify_one();
                }
                return StreamPermit {
                    place: Some(place),
                    streams: Arc::clone(&self.streams),
                };
            }
            freed.await;
        }
    }

    /// A place among the leases, until it is dropped.
    pub(super) fn lease(&self) -> Result<Charge, Status> {
        self.leases(1)
    }

    fn leases(&self, count: usize) -> Result<Charge, Status> {
        let places = self.leases.try_reserve(count as u64);
        places.map_err(|exceeded: BudgetExceeded| {
            let message = format!("{exceeded}; RELEASE those that are no longer mapped");
            Status::new(Code::ResourceExhausted, used_up(&exceeded), message)
        })
    }

    /// A place among the names, until it is dropped.
    pub(super) fn name(&self) -> Result<Charge, Status> {
        let place = self.names.try_reserve(1);
        place.map_err(|exceeded: BudgetExceeded| {
            let message = format!("{exceeded}; or drop or replace some");
            Status::new(Code::ResourceExhausted, used_up(&exceeded), message)
        })
    }

    /// Refuses what will be answered with `count` leases and descriptors when there is no place for them, before
    /// anything is done.
    ///
    /// # Errors
    /// `QUOTA_EXCEEDED`, `BUDGET_EXCEEDED`.
    pub fn check_answer(&self, count: usize) -> Result<(), Status> {
        drop((self.leases(count)?, self.descriptors(count)?));
        Ok(())
    }

    /// Places for descriptors that are to be sent, until the client has received them.
    ///
    /// # Errors
    /// `QUOTA_EXCEEDED`, `BUDGET_EXCEEDED`.
    pub fn descriptors(&self, count: usize) -> Result<Charge, Status> {
        let count = count as u64;
        if !self.descriptors.has_room(count) {
            self.settle();
        }
        self.descriptors.try_reserve(count).map_err(|exceeded| {
            let message = format!("{exceeded}; receive the replies that have been sent");
            Status::new(Code::ResourceExhausted, used_up(&exceeded), message)
        })
    }

    /// What is sent on a connection counts until it is received, even beyond the connection's end.
    pub fn watch_unread(&self, connection: Arc<dyn Unread>) {
        self.settle();
        self.unread.lock().push(connection);
    }

    /// Refuses what could not begin before `at`, `ms` after it was asked for: too much CPU time has been used.
    ///
    /// # Errors
    /// `QUOTA_EXCEEDED`.
    pub(super) fn check_cpu(&self, at: Instant, ms: u64) -> Result<(), Status> {
        let cpu = self.invocations.cpu();
        let Some(over) = cpu.over() else {
            return Ok(());
        };
        let left = at.saturating_duration_since(Instant::now());
        // It waits for its turn.
        if over.wait.is_some_and(|wait| wait < left) {
            return Ok(());
        }
        cpu.count_refused();
        let whose = &self.principal;
        let message = format!(
            "{whose} has used {over}, and this call has a deadline of {ms} ms; \
             call again later or with a longer deadline, or ask the operator to raise the quota"
        );
        let status = Status::new(Code::ResourceExhausted, Reason::QuotaExceeded, message);
        Err(match over.wait {
            Some(wait) => status.with(
                "wait_ms",
                u64::try_from(wait.as_millis()).unwrap_or(u64::MAX),
            ),
            None => status,
        })
    }

    /// Looks what has been received.
    pub fn settle(&self) {
        self.unread.lock().retain(|connection| !connection.settle());
    }

    pub(super) fn count_session(&self, begins: bool) {
        match begins {
            true => self.sessions.fetch_add(1, Relaxed),
            false => self.sessions.fetch_sub(1, Relaxed),
        };
    }

    /// Its figures for STATS.
    pub(super) fn stats(&self) -> wire::AccountStats {
        self.settle();
        let (segments, elsewhere) = (&self.segments, self.segments.elsewhere());
        let count = segments.segments();
        let invocations = self.invocations.used();
        let cpu = self.invocations.cpu().used();
        wire::AccountStats {
            quotas: *self.quotas.lock(),
            bytes: segments.used(),
            peak_bytes: segments.peak(),
            segments: count.map_or(0, |count| count.used()),
            refused: segments.refused() + count.map_or(0, |count| count.refused()),
            elsewhere_bytes: elsewhere.bytes,
            elsewhere_segments: elsewhere.segments,
            connections: self.connections.used(),
            connections_refused: self.connections.refused(),
            sessions: self.sessions.load(Relaxed),
            streams: self.streams.places.used(),
            streams_refused: self.streams.refused.load(Relaxed),
            leases: self.leases.used(),
            leases_refused: self.leases.refused(),
            names: self.names.used(),
            names_refused: self.names.refused(),
            descriptors: self.descriptors.used(),
            descriptors_refused: self.descriptors.refused(),
            invocations: invocations.runs,
            queued: invocations.waiting as u64,
            running: invocations.running as u64,
            queue_refused: invocations.refused,
            cpu_percent: cpu.percent,
            cpu_refused: cpu.refused,
            cpu_seconds: cpu.total.as_secs_f64(),
        }
    }
}
