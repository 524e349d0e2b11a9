//! The state of a flight: one atomic word, `state | readers << 3`.
//!
//! ```text
//! Idle ──▶ Uploading ──▶ Uploaded ⇄ Streaming (readers > 0) ──▶ Completed
//!   ▲          │ failed      └────────────────────────────────────▲
//!   └──────────┘
//! ```
//! Completed: the name is gone; readers that had begun finish.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};

/// What a flight is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum FlightState {
    /// Nothing there yet.
    Idle = 0,
    /// Its bytes are arriving.
    Uploading = 1,
    /// Whole, nobody reads it inline.
    Uploaded = 2,
    /// Whole, being read inline.
    Streaming = 3,
    /// Dropped or replaced.
    Completed = 4,
}

impl fmt::Display for FlightState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Idle => "Idle",
            Self::Uploading => "Uploading",
            Self::Uploaded => "Uploaded",
            Self::Streaming => "Streaming",
            Self::Completed => "Completed",
        })
    }
}

/// A move that the state machine does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a flight cannot go from {from} to {to}")]
pub struct WrongState {
    /// Where it is.
    pub from: FlightState,
    /// Where it should have gone.
    pub to: FlightState,
}

/// The word.
#[derive(Debug, Default)]
pub struct StateWord(AtomicU32);

const READERS_SHIFT: u32 = 3;

fn state(word: u32) -> FlightState {
    match word & ((1 << READERS_SHIFT) - 1) {
        0 => FlightState::Idle,
        1 => FlightState::Uploading,
        2 => FlightState::Uploaded,
        3 => FlightState::Streaming,
        _ => FlightState::Completed,
    }
}

impl StateWord {
    /// A flight that is whole from the start.
    #[must_use]
    pub fn uploaded() -> Self {
        Self(AtomicU32::new(FlightState::Uploaded as u32))
    }

    /// State and readers now.
    pub fn get(&self) -> (FlightState, u32) {
        let word = self.0.load(Ordering::Acquire);
        (state(word), word >> READERS_SHIFT)
    }

    fn step(
        &self,
        to: FlightState,
        next: impl Fn(FlightState, u32) -> Option<(FlightState, u32)>,
    ) -> Result<(), WrongState> {
        self.0
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| {
                next(state(word), word >> READERS_SHIFT)
                    .map(|(s, readers)| s as u32 | readers << READERS_SHIFT)
            })
            .map(|_| ())
            .map_err(|word| WrongState {
                from: state(word),
                to,
            })
    }

    /// Idle → Uploading.
    ///
    /// # Errors
    /// [`WrongState`] from any other state.
    pub fn begin_upload(&self) -> Result<(), WrongState> {
        self.step(FlightState::Uploading, |s, n| {
            (s == FlightState::Idle).then_some((FlightState::Uploading, n))
        })
    }

    /// Uploading → Uploaded.
    ///
    /// # Errors
    /// [`WrongState`] from any other state.
    pub fn finish_upload(&self) -> Result<(), WrongState> {
        self.step(FlightState::Uploaded, |s, n| {
            (s == FlightState::Uploading).then_some((FlightState::Uploaded, n))
        })
    }

    /// Uploading → Idle.
    ///
    /// # Errors
    /// [`WrongState`] from any other state.
    pub fn fail_upload(&self) -> Result<(), WrongState> {
        self.step(FlightState::Idle, |s, n| {
            (s == FlightState::Uploading).then_some((FlightState::Idle, n))
        })
    }

    /// Uploaded or Streaming → Streaming with one reader more.
    ///
    /// # Errors
    /// [`WrongState`] from any other state: what is still arriving cannot be read.
    pub fn begin_read(&self) -> Result<(), WrongState> {
        self.step(FlightState::Streaming, |s, n| {
            let readable = matches!(s, FlightState::Uploaded | FlightState::Streaming);
            readable.then_some((FlightState::Streaming, n + 1))
        })
    }

    /// One reader less; the last one leaves it Uploaded (or Completed, if that it was).
    pub fn end_read(&self) {
        let step = self.step(FlightState::Uploaded, |s, n| match (s, n) {
            (FlightState::Streaming, 1) => Some((FlightState::Uploaded, 0)),
            (FlightState::Streaming | FlightState::Completed, n) if n > 0 => Some((s, n - 1)),
            _ => None,
        });
        debug_assert!(step.is_ok(), "end_read without begin_read: {step:?}");
    }

    /// → Completed; readers that had begun finish.
    ///
    /// # Errors
    /// [`WrongState`] while it is Uploading: only the upload itself ends that.
    pub fn complete(&self) -> Result<(), WrongState> {
        self.step(FlightState::Completed, |s, n| {
            (s != FlightState::Uploading).then_some((FlightState::Completed, n))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_moves() {
        use FlightState::{Completed, Idle, Streaming, Uploaded, Uploading};
        let word = StateWord::default();
        assert_eq!(
            word.begin_read(),
            Err(WrongState {
                from: Idle,
                to: Streaming
            })
        );
        word.begin_upload().expect("from Idle");
        assert_eq!(
            word.begin_upload(),
            Err(WrongState {
                from: Uploading,
                to: Uploading
            })
        );
        assert_eq!(
            word.begin_read(),
            Err(WrongState {
                from: Uploading,
                to: Streaming
            })
        );
        assert_eq!(
            word.complete(),
            Err(WrongState {
                from: Uploading,
                to: Completed
            })
        );
        word.fail_upload().expect("from Uploading");
        assert_eq!(word.get(), (Idle, 0));
        word.begin_upload().expect("again");
        word.finish_upload().expect("from Uploading");
        assert_eq!(
            word.fail_upload(),
            Err(WrongState {
                from: Uploaded,
                to: Idle
            })
        );
        word.begin_read().expect("first reader");
        word.begin_read().expect("second reader");
        assert_eq!(word.get(), (Streaming, 2));
        word.end_read();
        word.end_read();
        assert_eq!(word.get(), (Uploaded, 0));
        word.begin_read().expect("reader");
        word.complete().expect("while streaming");
        assert_eq!(
            word.begin_read(),
            Err(WrongState {
                from: Completed,
                to: Streaming
            })
        );
        assert_eq!(word.get(), (Completed, 1));
        word.end_read();
        assert_eq!(word.get(), (Completed, 0));
    }
}
