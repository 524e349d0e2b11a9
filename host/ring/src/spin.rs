//! Looking again and again before sleeping.

use std::hint::spin_loop;
use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use strait_memory::{FrameSocket, Received};

/// How long a thread looks again for what it waits for before it sleeps: waking a processor that sleeps is most of what a
/// small call takes. At most as many threads of a process do so at a time as it has processors beside one, so where there is
/// one alone nobody does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spin(Duration);

/// Threads of this process that spin now.
static SPINNING: AtomicUsize = AtomicUsize::new(0);

/// How many of them may.
fn most() -> usize {
    static MOST: OnceLock<usize> = OnceLock::new();
    // Of its affinity and its share of them.
    *MOST.get_or_init(|| std::thread::available_parallelism().map_or(0, |count| count.get() - 1))
}

/// One of them.
struct Permit;

impl Permit {
    fn take() -> Option<Self> {
        let free = |spinning| (spinning < most()).then_some(spinning + 1);
        let taken = SPINNING.fetch_update(Relaxed, Relaxed, free);
        taken.ok().map(|_| Self)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        SPINNING.fetch_sub(1, Relaxed);
    }
}

impl Spin {
    /// For longer nobody looks, so that a peer's end is noticed within a tenth of a second.
    pub const LONGEST: Duration = Duration::from_millis(50);
    /// Sleeps at once.
    pub const NEVER: Self = Self(Duration::ZERO);

    /// For that long, and no longer than [`Self::LONGEST`].
    #[must_use]
    pub fn new(time: Duration) -> Self {
        Self(time.min(Self::LONGEST))
    }

    /// What `look` finds; none once the time is over, or if enough others spin.
    pub fn until<T>(self, mut look: impl FnMut() -> Option<T>) -> Option<T> {
        if self == Self::NEVER {
            return None;
        }
        let _permit = Permit::take()?;
        let begun = Instant::now();
        loop {
            if let Some(found) = look() {
                return Some(found);
            }
            if begun.elapsed() >= self.0 {
                return None;
            }
            spin_loop();
        }
    }

    /// Receives a frame as [`FrameSocket::recv`] does, on a socket that blocks.
    ///
    /// # Errors
    /// Those of [`FrameSocket::recv`].
    pub fn recv(self, socket: &FrameSocket, buffer: &mut [u8]) -> io::Result<Received> {
        let found = self.until(|| match socket.recv_now(buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            result => Some(result),
        });
        found.unwrap_or_else(|| socket.recv(buffer))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_so_many_spin_and_none_for_ever() {
        let short = Spin::new(Duration::from_micros(50));
        assert_eq!(Spin::NEVER.until(|| Some(1)), None);
        assert_eq!(short.until(|| None::<u32>), None);
        assert_eq!(Spin::new(Duration::MAX), Spin::new(Spin::LONGEST));
        let mut looks = 0;
        let third = || {
            looks += 1;
            (looks == 3).then_some(looks)
        };
        let found = Spin::new(Spin::LONGEST).until(third);
        assert_eq!(found, (most() > 0).then_some(3));
        let permits: Vec<_> = std::iter::from_fn(Permit::take).collect();
        assert_eq!(permits.len(), most());
        assert_eq!(short.until(|| Some(1)), None, "all permits are taken");
        drop(permits);
        assert_eq!(SPINNING.load(Relaxed), 0);
    }
}
