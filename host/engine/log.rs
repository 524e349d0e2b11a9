//! A guest's lines in the host's log, told with request and plugin, bounded in bytes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::limits::Stop;
use super::regions::Regions;

/// What a log line costs beside its text, in bytes: time, level, request and plugin. Without it
/// empty lines would be free.
const LINE_BYTES: u64 = 64;
/// Between two lines about progress; what comes in between is not told.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// Whose lines they are, and how much there was.
#[derive(Debug)]
pub(super) struct Log {
    request_id: Arc<str>,
    plugin: Arc<str>,
    bytes: u64,
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
            bytes: 0,
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

    fn line(
        &mut self,
        regions: Option<&Regions>,
        address: u64,
        bytes: u64,
    ) -> Result<String, Stop> {
        let asked = self.bytes.saturating_add(bytes).saturating_add(LINE_BYTES);
        if asked > self.bytes_max {
            return Err(Stop::LogBytes {
                asked,
                limit: self.bytes_max,
            });
        }
        let text = regions
            .ok_or_else(|| Stop::LogRange("the plugin has no linear memory".to_owned()))?
            .read(address, bytes)
            .map_err(|e| Stop::LogRange(e.to_string()))?;
        self.bytes = asked;
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
