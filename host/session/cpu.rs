//! What one principal uses of the CPUs, and when it has used too much of them.
//!
//! Of what it has used a sixtieth flows off in each second, but never more than its quota gives. Whoever stays below the quota
//! never waits, and what is left is what it used in about the last minute; whoever has used more waits for the rest
//! to flow off. `docs/decisions/0012` has the reasons.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

const MINUTE: f64 = 60.0;

/// Tells the CPU time that a principal's runs have used in other processes.
pub(super) type Elsewhere = Box<dyn Fn() -> Duration + Send + Sync>;

/// What flows off.
#[derive(Clone, Copy, Debug)]
struct Level {
    seconds: f64,
    at: Instant,
    /// Of one CPU.
    percent: u64,
}

impl Level {
    /// What the quota gives in a minute, in seconds.
    fn quota(&self) -> f64 {
        self.percent as f64 / 100.0 * MINUTE
    }

    fn flow(&mut self, now: Instant) {
        let mut passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.at = self.at.max(now);
        let (quota, wait) = (self.quota(), self.wait());
        if passed < wait {
            self.seconds -= passed * quota / MINUTE;
            return;
        }
        self.seconds = self.seconds.min(quota);
        passed -= wait;
        self.seconds *= (-passed / MINUTE).exp();
    }

    /// Until no more is left than the quota, in seconds; infinite where it gives nothing.
    fn wait(&self) -> f64 {
        match self.percent {
            0 => f64::INFINITY,
            _ => ((self.seconds / self.quota() - 1.0) * MINUTE).max(0.0),
        }
    }
}

#[derive(Debug)]
struct State {
    own: Duration,
    elsewhere: Duration,
    level: Level,
}

/// One principal's CPU time.
pub(super) struct CpuMeter {
    elsewhere: Elsewhere,
    refused: AtomicU64,
    // Nobody else is asked about.
    is_limited: AtomicBool,
    state: Mutex<State>,
}

impl fmt::Debug for CpuMeter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CpuMeter")
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

/// CPU time of a principal.
#[derive(Clone, Copy, Debug)]
pub(super) struct CpuUsed {
    /// Since the start.
    pub(super) total: Duration,
    /// In percent of one CPU, in about the last minute and what was more than the quota before.
    pub(super) percent: u64,
    /// Invocations that would have waited beyond their deadline.
    pub(super) refused: u64,
}

/// A principal has used more than its quota gives.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct CpuOver {
    used: Duration,
    percent: u64,
    /// Until it may have more; none: never.
    pub(super) wait: Option<Duration>,
}

impl fmt::Display for CpuOver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let given = Duration::from_millis(self.percent.saturating_mul(600));
        let more = self.used.saturating_sub(given).as_millis();
        let (used, percent) = (self.used.as_millis(), self.percent);
        write!(
            f,
            "{used} ms of CPU time, {more} ms more than a quota.cpu_percent of {percent} gives in a minute"
        )?;
        match self.wait {
            Some(wait) => write!(f, "; the next one may begin in {} ms", wait.as_millis()),
            None => write!(f, "; none may begin"),
        }
    }
}

impl CpuMeter {
    /// Without a quota. `elsewhere` is asked whenever something is counted.
    pub(super) fn new(elsewhere: Elsewhere) -> Self {
        let level = Level {
            seconds: 0.0,
            at: Instant::now(),
            percent: u64::MAX,
        };
        Self {
            elsewhere,
            refused: AtomicU64::new(0),
            is_limited: AtomicBool::new(false),
            state: Mutex::new(State {
                own: Duration::ZERO,
                elsewhere: Duration::ZERO,
                level,
            }),
        }
    }

    /// From now on it may use `percent` of one CPU.
    pub(super) fn set_limit(&self, percent: u64) {
        let mut state = self.state.lock();
        // What has flowed off did so by the old one.
        state.level.flow(Instant::now());
        state.level.percent = percent;
        self.is_limited.store(percent != u64::MAX, Relaxed);
    }

    /// `own` has been used in this process, and what has been used in others since the last time.
    pub(super) fn count(&self, own: Duration) {
        let elsewhere = (self.elsewhere)();
        let mut state = self.state.lock();
        let more = own + elsewhere.saturating_sub(state.elsewhere);
        state.own += own;
        state.elsewhere = state.elsewhere.max(elsewhere);
        state.level.flow(Instant::now());
        state.level.seconds += more.as_secs_f64();
    }

    /// Whether there is a quota.
    pub(super) fn is_limited(&self) -> bool {
        self.is_limited.load(Relaxed)
    }

    /// Whether it has used too much, and by how much.
    pub(super) fn over(&self) -> Option<CpuOver> {
        if !self.is_limited() {
            return None;
        }
        let mut state = self.state.lock();
        state.level.flow(Instant::now());
        let level = state.level;
        (level.wait() > 0.0).then(|| CpuOver {
            used: Duration::try_from_secs_f64(level.seconds).unwrap_or_default(),
            percent: level.percent,
            // Not a moment too early.
            wait: Duration::try_from_secs_f64(level.wait() + 0.001).ok(),
        })
    }

    /// Something was refused for that.
    pub(super) fn count_refused(&self) {
        self.refused.fetch_add(1, Relaxed);
    }

    /// As of now.
    pub(super) fn used(&self) -> CpuUsed {
        self.count(Duration::ZERO);
        let state = self.state.lock();
        CpuUsed {
            total: state.own + state.elsewhere,
            percent: percent(state.level.seconds),
            refused: self.refused.load(Relaxed),
        }
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "seconds that were counted are not negative, and a cast saturates"
)]
fn percent(seconds: f64) -> u64 {
    (seconds / MINUTE * 100.0).round() as u64
}

#[cfg(test)]
impl Default for CpuMeter {
    fn default() -> Self {
        Self::new(Box::new(|| Duration::ZERO))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    /// What one gets that asks for so many seconds in each of `seconds`.
    fn run(level: &mut Level, asks: f64, seconds: u32) -> f64 {
        let mut used = 0.0;
        for _ in 0..seconds {
            let now = level.at + Duration::from_secs(1);
            level.flow(now);
            if level.wait() == 0.0 {
                level.seconds += asks;
                used += asks;
            }
        }
        used
    }

    fn level(percent: u64) -> Level {
        Level {
            seconds: 0.0,
            at: Instant::now(),
            percent,
        }
    }

    #[test]
    fn nobody_gets_more_than_its_quota_and_a_minute_of_it() {
        for (percent, asks, most) in [
            (50, 1.0, 1800.0),
            (50, 8.0, 1800.0),
            (1, 600.0, 36.0),
            (300, 4.0, 10_800.0),
        ] {
            let mut level = level(percent);
            let used = run(&mut level, asks, 3600);
            let burst = level.quota() + asks;
            assert!(
                (most - burst..=most + burst).contains(&used),
                "{percent} {asks}: {used}"
            );
        }
    }

    #[test]
    fn whoever_uses_less_never_waits_and_sees_what_it_uses() {
        for given in [51, 100, u64::MAX] {
            let mut level = level(given);
            let used = run(&mut level, 0.5, 600);
            assert!((used - 300.0).abs() < 1e-6, "{given}: {used}");
            assert!((49..=51).contains(&percent(level.seconds)), "{level:?}");
            level.flow(level.at + Duration::from_secs(600));
            assert_eq!(percent(level.seconds), 0);
        }
    }

    #[test]
    fn what_is_owed_is_waited_for_to_the_end() {
        let mut level = level(10);
        level.seconds = 606.0;
        assert!((level.wait() - 6000.0).abs() < 1e-6, "{level:?}");
        level.flow(level.at + Duration::from_secs(5999));
        assert!((0.99..1.01).contains(&level.wait()), "{level:?}");
        level.flow(level.at + Duration::from_secs(2));
        assert!(level.wait() == 0.0 && level.seconds < 6.0, "{level:?}");
        // A clock that goes back changes nothing.
        let before = level.seconds;
        level.flow(
            level
                .at
                .checked_sub(Duration::from_secs(1))
                .unwrap_or(level.at),
        );
        assert!((level.seconds - before).abs() < f64::EPSILON);
    }

    #[test]
    fn a_quota_can_change_and_says_by_how_much_it_is_exceeded() {
        let meter = CpuMeter::default();
        meter.count(Duration::from_secs(30));
        assert_eq!((meter.over(), meter.used().percent), (None, 50));
        meter.set_limit(10);
        let over = meter.over().expect("30 of 6 seconds");
        let text = over.to_string();
        assert!(
            text.starts_with(
                "30000 ms of CPU time, 24000 ms more than a quota.cpu_percent of 10 gives"
            ) || text.starts_with("29999 ms of CPU time, 23999 ms"),
            "{text}"
        );
        let wait = over.wait.expect("some day");
        assert!((239..=241).contains(&wait.as_secs()), "{wait:?}");
        meter.set_limit(0);
        let over = meter.over().expect("nothing is given");
        assert!(
            over.wait.is_none() && over.to_string().ends_with("none may begin"),
            "{over}"
        );
        meter.set_limit(u64::MAX);
        assert_eq!(meter.over(), None);
        assert_eq!(meter.used().total, Duration::from_secs(30));
    }

    #[test]
    fn other_processes_count_once() {
        let told = Arc::new(Mutex::new(Duration::from_secs(3)));
        let tells = Arc::clone(&told);
        let meter = CpuMeter::new(Box::new(move || *tells.lock()));
        meter.count(Duration::from_secs(1));
        meter.count(Duration::from_secs(1));
        assert_eq!(meter.used().total, Duration::from_secs(5));
        // Those of a process that is gone are not known for a moment.
        *told.lock() = Duration::from_secs(2);
        meter.count(Duration::ZERO);
        *told.lock() = Duration::from_secs(4);
        assert_eq!(meter.used().total, Duration::from_secs(6));
        assert_eq!(meter.used().percent, 10);
    }
}
