//! A guest's lines in the host's log, told with request and plugin, bounded in bytes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::limits::Stop;
use super::regions::Regions;

/// What a log line costs beside its text, in bytes: time, level, request and plugin. Without it
/// empty lines would be free.
const LINE_BYTES: u64 = 64;
/// Between two lines about progress; what comes in between is not told.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// Bytes of log lines of all guests of one invocation.
#[derive(Clone, Debug, Default)]
pub struct Logged(Arc<AtomicU64>);

impl Logged {
    /// Adds `bytes`, unless there are more than `most` then: how many there would be.
    fn add(&self, bytes: u64, most: u64) -> Result<(), u64> {
        let sum = |before: u64| before.saturating_add(bytes);
        self.0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |before| {
                Some(sum(before)).filter(|sum| *sum <= most)
            })
            .map(drop)
            .map_err(sum)
    }
}

/// Whose lines they are, and how much there was.
#[derive(Debug)]
pub(super) struct Log {
    request_id: Arc<str>,
    plugin: Arc<str>,
    logged: Logged,
    bytes_max: u64,
    progress_told: Option<Instant>,
    /// Nobody has asked for anything yet, so that nobody could be told.
    is_nobodys: bool,
}

impl Log {
    /// Lines of `plugin` for a request, of together at most `bytes_max` bytes, each with 64 for what stands
    /// before its text.
    pub(super) fn new(request_id: Arc<str>, plugin: Arc<str>, bytes_max: u64) -> Self {
        Self {
            request_id,
            plugin,
            logged: Logged::default(),
            bytes_max,
            progress_told: None,
            is_nobodys: false,
        }
    }

    /// Takes no line at all, also about progress.
    pub(super) fn nobodys() -> Self {
        Self {
            is_nobodys: true,
            ..Self::new(Arc::from("-"), Arc::from("-"), 0)
        }
    }

    /// From now on its lines count with those in `logged`.
    pub(super) fn count_in(&mut self, logged: &Logged) {
        self.logged = logged.clone();
    }

    fn line(
        &mut self,
        regions: Option<&Regions>,
        address: u64,
        bytes: u64,
    ) -> Result<String, Stop> {
        self.logged
            .add(bytes.saturating_add(LINE_BYTES), self.bytes_max)
            .map_err(|asked| Stop::LogBytes {
                asked,
                limit: self.bytes_max,
            })?;
        let text = regions
            .ok_or_else(|| Stop::LogRange("the plugin has no linear memory".to_owned()))?
            .read(address, bytes)
            .map_err(|e| Stop::LogRange(e.to_string()))?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    /// Tells the line that lies in the guest's own memory.
    ///
    /// # Errors
    /// [`Stop`] if it is too much, or lies elsewhere.
    pub(super) fn tell(
        &mut self,
        regions: Option<&Regions>,
        level: u32,
        address: u64,
        bytes: u64,
    ) -> Result<(), Stop> {
        let text = self.line(regions, address, bytes)?;
        let (request_id, plugin) = (&*self.request_id, &*self.plugin);
        match level {
            0 => tracing::error!(target: "strait::guest", request_id, plugin, "{text}"),
            1 => tracing::warn!(target: "strait::guest", request_id, plugin, "{text}"),
            2 => tracing::info!(target: "strait::guest", request_id, plugin, "{text}"),
            _ => tracing::debug!(target: "strait::guest", request_id, plugin, "{text}"),
        }
        Ok(())
    }

    /// Tells how far it is, now and then.
    ///
    /// # Errors
    /// [`Stop`] if nobody could be told.
    pub(super) fn progress(&mut self, done: u64, total: u64) -> Result<(), Stop> {
        if self.is_nobodys {
            return Err(Stop::LogBytes {
                asked: LINE_BYTES,
                limit: 0,
            });
        }
        if self
            .progress_told
            .is_some_and(|told| told.elapsed() < PROGRESS_EVERY)
        {
            return Ok(());
        }
        self.progress_told = Some(Instant::now());
        let (request_id, plugin) = (&*self.request_id, &*self.plugin);
        tracing::debug!(target: "strait::guest", request_id, plugin, done, total, "progress");
        Ok(())
    }
}
