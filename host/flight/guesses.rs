//! Refused tokens, by the address that they came from: who guesses waits longer for each answer.
//!
//! Nobody guesses 256 bits. What is bounded here is what guessing costs the host, and what a client does that retries a token that
//! was revoked for ever.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Addresses that are remembered; all others are one.
const ADDRESSES_MAX: usize = 4096;
/// Refusals that are answered at once.
const FREE: u32 = 10;
/// Each further one is answered so much later than the one before.
const STEP: Duration = Duration::from_millis(20);
/// The longest wait.
const WAIT_MAX: Duration = Duration::from_secs(2);
/// Time in which one refusal is forgotten.
const FORGOTTEN: Duration = Duration::from_secs(1);
/// Answers that wait at a time; further ones do not.
const WAITING_MAX: usize = 1024;
/// Lines of the log about it are at least so far apart.
const TOLD_EACH: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, Debug)]
struct Tries {
    count: u32,
    at: Instant,
}

impl Tries {
    fn now(self, now: Instant) -> u32 {
        let passed = now.saturating_duration_since(self.at).as_secs() / FORGOTTEN.as_secs();
        self.count
            .saturating_sub(u32::try_from(passed).unwrap_or(u32::MAX))
    }
}

#[derive(Debug, Default)]
struct Table {
    of: HashMap<IpAddr, Tries>,
    pruned: Option<Instant>,
    untold: u64,
    told: Option<Instant>,
}

/// How many tokens from which addresses were refused lately.
#[derive(Debug, Default)]
pub(super) struct Guesses {
    // Held for a few operations on the table.
    table: Mutex<Table>,
    waiting: Mutex<usize>,
}

/// Those who share a line of a provider are one.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let bits = address.to_bits() >> 64 << 64;
            Ipv6Addr::from_bits(bits).into()
        }
        v4 @ IpAddr::V4(_) => v4,
    }
}

impl Guesses {
    /// Counts a refusal; how long its answer is to wait.
    pub(super) fn count(&self, address: IpAddr, why: &str, now: Instant) -> Duration {
        let mut table = self.table.lock();
        let mut from = network(address);
        if !table.of.contains_key(&from) && table.of.len() >= ADDRESSES_MAX {
            let is_due = |at: Instant| now.saturating_duration_since(at) >= FORGOTTEN;
            if table.pruned.is_none_or(is_due) {
                table.pruned = Some(now);
                table.of.retain(|_, tries| tries.now(now) > 0);
            }
            if table.of.len() >= ADDRESSES_MAX {
                from = Ipv4Addr::UNSPECIFIED.into();
            }
        }
        let tries = table.of.entry(from).or_insert(Tries { count: 0, at: now });
        *tries = Tries {
            count: tries.now(now).saturating_add(1),
            at: now,
        };
        let count = tries.count;
        table.untold += 1;
        let is_due = |at: Instant| now.saturating_duration_since(at) >= TOLD_EACH;
        if table.told.is_none_or(is_due) {
            tracing::warn!(target: "audit", %address, refused = table.untold, of_address = count, why, "tokens were refused");
            (table.untold, table.told) = (0, Some(now));
        }
        (STEP * count.saturating_sub(FREE)).min(WAIT_MAX)
    }

    /// A place among those who wait.
    fn enter(&self) -> Option<Waiting<'_>> {
        let mut waiting = self.waiting.lock();
        (*waiting < WAITING_MAX).then(|| {
            *waiting += 1;
            Waiting(self)
        })
    }

    /// Waits, if not too many do.
    pub(super) async fn wait(&self, time: Duration) {
        if !time.is_zero()
            && let Some(_place) = self.enter()
        {
            tokio::time::sleep(time).await;
        }
    }
}

struct Waiting<'a>(&'a Guesses);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        *self.0.waiting.lock() -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_guesses_waits_and_is_forgiven() {
        let guesses = Guesses::default();
        let now = Instant::now();
        let [one, other]: [IpAddr; 2] =
            ["2001:db8::1", "2001:db8::2:1"].map(|a| a.parse().expect("one"));
        for _ in 0..FREE {
            assert_eq!(guesses.count(one, "", now), Duration::ZERO);
        }
        assert_eq!(guesses.count(other, "", now), STEP, "the same network");
        assert_eq!(guesses.count(one, "", now), STEP * 2);
        let elsewhere = "2001:db8:1::1".parse().expect("an address");
        assert_eq!(guesses.count(elsewhere, "", now), Duration::ZERO);
        for _ in 0..1000 {
            guesses.count(one, "", now);
        }
        assert_eq!(guesses.count(one, "", now), WAIT_MAX);
        let later = now + FORGOTTEN * 2000;
        assert_eq!(guesses.count(one, "", later), Duration::ZERO);
    }

    #[test]
    fn the_table_is_bounded() {
        let guesses = Guesses::default();
        let now = Instant::now();
        let address = |n: u32| IpAddr::V4(Ipv4Addr::from_bits(n + 1));
        let waits = (0..10_000).map(|n| guesses.count(address(n), "", now));
        assert!(
            waits.last().expect("some") == WAIT_MAX,
            "those beyond are one"
        );
        assert_eq!(guesses.table.lock().of.len(), ADDRESSES_MAX + 1);
        assert_eq!(guesses.count(address(1), "", now), Duration::ZERO);
        guesses.count(address(20_000), "", now + FORGOTTEN * 20_000);
        assert_eq!(guesses.table.lock().of.len(), 1);
    }

    #[test]
    fn not_too_many_wait() {
        let guesses = Guesses::default();
        let places: Vec<_> = (0..WAITING_MAX).map(|_| guesses.enter()).collect();
        assert!(places.iter().all(Option::is_some) && guesses.enter().is_none());
        drop(places);
        assert!(guesses.enter().is_some());
    }
}
