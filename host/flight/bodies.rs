//! Long bodies of an upload on a way of their own: from the frames into shared memory, past gRPC.
//!
//! ```text
//! message ── head: all but the values ──▶ tonic ──▶ upload: where do the values belong? ──▶ Route
//!    └────── body: the values ─────────── as they come ─────────────────────────────────────▶ Growing
//! ```
//! gRPC would collect a message before anybody sees it: memory of its whole length, and a copy into it.

use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;
use strait_memory::{Growing, MemoryError};

use super::compressed::is_compressed;
use crate::session::Host;

/// Bodies of longer messages have a way of their own: such a batch is large enough to lie where it stays.
const PAST_BYTES_MIN: u32 = 4 << 20;
/// Once there is a place for all that comes, those of shorter ones as well.
const PLACED_PAST_BYTES_MIN: u32 = 64 << 10;
/// Longest head of a message whose body goes past gRPC.
pub(super) const HEAD_BYTES_MAX: usize = 64 << 10;
/// Most fields of such a head. `FlightData` has three beside the body.
const FIELDS_MAX: usize = 8;
/// The fields of Arrow's message and of its body in the protobuf message `FlightData`.
const DATA_HEADER: u64 = 2;
const DATA_BODY: u64 = 1000;

/// Where the values of a body belong.
#[derive(Debug)]
pub(super) struct Route {
    pub(super) file: Growing,
    /// Ranges of the body, and where in the file each begins. What is in none is left out.
    pub(super) pieces: Vec<(Range<u64>, u64)>,
    /// Counts the copies.
    pub(super) host: Arc<Host>,
}

impl Route {
    /// Writes the bytes of the body from `start` on.
    ///
    /// # Errors
    /// [`MemoryError::System`].
    pub(super) fn write(&self, start: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        let end = start + bytes.len() as u64;
        for (range, offset) in &self.pieces {
            let part = range.start.max(start)..range.end.min(end);
            // Both lie within `bytes`, so they fit.
            let within = |at: u64| usize::try_from(at.saturating_sub(start)).unwrap_or(bytes.len());
            if part.start < part.end {
                let offset = offset + (part.start - range.start);
                let part = &bytes[within(part.start)..within(part.end)];
                self.file
                    .write_at(offset, part, self.host.uploads_copied())?;
            }
        }
        Ok(())
    }
}

#[derive(Debug, Default)]
struct Passing {
    /// The message whose body is to come, by its number, and that body's length.
    announced: Option<(u64, u64)>,
    route: Option<Route>,
    /// Messages that were taken from tonic.
    taken: u64,
    /// There is a place for all that comes.
    has_place: bool,
    /// None goes past.
    all_stay: bool,
}

/// What the two ends of an upload, before tonic and behind it, tell each other of a body that goes past it.
#[derive(Clone, Debug, Default)]
pub(super) struct Bodies(Arc<Mutex<Passing>>);

impl Bodies {
    pub(super) fn of<T>(request: &tonic::Request<T>) -> Self {
        let found = request.extensions().get::<Self>();
        found.cloned().unwrap_or_default()
    }

    /// Of a stream of messages whose bodies stay in them.
    pub(super) fn staying() -> Self {
        let bodies = Self::default();
        bodies.0.lock().all_stay = true;
        bodies
    }

    /// Whether the body of a message of that length goes past gRPC.
    pub(super) fn take_past(&self, length: u32) -> bool {
        let passing = self.0.lock();
        let least = match passing.has_place {
            true => PLACED_PAST_BYTES_MIN,
            false => PAST_BYTES_MIN,
        };
        !passing.all_stay && length > least
    }

    /// From now on there is a place for all that comes.
    pub(super) fn have_place(&self) {
        self.0.lock().has_place = true;
    }

    /// The head of the message of that number, from 1 on, has gone to tonic, and a body of `length` bytes is to come.
    pub(super) fn announce(&self, number: u64, length: u64) {
        let mut passing = self.0.lock();
        passing.announced = Some((number, length));
        passing.route = None;
    }

    /// The next message has come from tonic: the length of its body, if that is still to come.
    pub(super) fn take(&self) -> Option<u64> {
        let mut passing = self.0.lock();
        passing.taken += 1;
        let number = passing.taken;
        let announced = passing.announced.take_if(|(of, _)| *of == number);
        announced.map(|(_, length)| length)
    }

    /// Where the body that was announced goes. Without this it goes nowhere.
    pub(super) fn route(&self, route: Route) {
        self.0.lock().route = Some(route);
    }

    /// The bytes of that body from `start` on.
    pub(super) fn write(&self, start: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        match &self.0.lock().route {
            Some(route) => route.write(start, bytes),
            None => Ok(()),
        }
    }

    /// That was all of it.
    pub(super) fn end(&self) {
        self.0.lock().route = None;
    }
}

/// What the first bytes of a message say of its body.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Head {
    /// Nothing yet.
    Short,
    /// The other fields end at the first number, the body begins at the second and ends with the message.
    Before(usize, usize),
    /// It is not at the end, or not there.
    Other,
}

impl Head {
    /// Of a `FlightData` of `length` bytes that begins with `bytes`.
    pub(super) fn of(bytes: &[u8], length: u64) -> Self {
        let mut at = 0;
        let mut header = 0..0;
        for _ in 0..=FIELDS_MAX {
            let before = at;
            let Some(tag) = varint(bytes, &mut at) else {
                return Self::cut(bytes, before);
            };
            // Only fields with a length: gRPC skips the others, which no client sends.
            if tag & 7 != 2 {
                return Self::Other;
            }
            let Some(field) = varint(bytes, &mut at) else {
                return Self::cut(bytes, before);
            };
            if tag >> 3 == DATA_BODY {
                let ends = (at as u64).checked_add(field) == Some(length);
                // What is compressed is not the values: it is collected as a whole.
                return if ends && !is_compressed(&bytes[header]) {
                    Self::Before(before, at)
                } else {
                    Self::Other
                };
            }
            let next = usize::try_from(field).ok().and_then(|n| at.checked_add(n));
            match next {
                Some(next) if next < HEAD_BYTES_MAX => {
                    if tag >> 3 == DATA_HEADER {
                        header = at..next;
                    }
                    at = next;
                }
                _ => return Self::Other,
            }
            if at > bytes.len() {
                return Self::Short;
            }
        }
        Self::Other
    }

    /// A tag or length at `at` that is not whole, or none at all.
    fn cut(bytes: &[u8], at: usize) -> Self {
        // Two varints have 20 bytes at most.
        if bytes.len() < at + 20 && bytes.len() < HEAD_BYTES_MAX {
            Self::Short
        } else {
            Self::Other
        }
    }
}

/// The varint at `at`, which moves behind it. None if it is not whole, or no varint.
fn varint(bytes: &[u8], at: &mut usize) -> Option<u64> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let byte = *bytes.get(*at)?;
        *at += 1;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow_flight::{FlightData, FlightDescriptor};
    use prost::Message;

    fn data(body: usize) -> FlightData {
        FlightData {
            flight_descriptor: Some(FlightDescriptor::new_path(vec!["x".into()])),
            data_header: vec![1; 300].into(),
            app_metadata: vec![2; 5].into(),
            data_body: vec![3; body].into(),
        }
    }

    #[test]
    fn the_head_of_a_message_is_found_however_it_is_cut() {
        let body = 100_000;
        let bytes = data(body).encode_to_vec();
        let begin = bytes.len() - body;
        let length = bytes.len() as u64;
        for cut in 0..=bytes.len() {
            let found = Head::of(&bytes[..cut], length);
            if cut < begin {
                assert_eq!(found, Head::Short, "{cut} of {begin}");
                continue;
            }
            let Head::Before(end, start) = found else {
                panic!("{found:?} of {cut}");
            };
            assert_eq!(start, begin);
            let head = FlightData::decode(&bytes[..end]).expect("a message");
            assert_eq!(
                head,
                FlightData {
                    data_body: Default::default(),
                    ..data(body)
                }
            );
        }
    }

    #[test]
    fn a_body_that_is_not_the_end_of_its_message_stays_in_it() {
        let bytes = data(1000).encode_to_vec();
        let length = bytes.len() as u64;
        // More behind it, or less of it than it says.
        for wrong in [length + 1, length - 1, 0, u64::MAX] {
            assert_eq!(Head::of(&bytes, wrong), Head::Other, "{wrong}");
        }
        let headless = [0xff; 64];
        assert_eq!(Head::of(&headless, 64), Head::Other, "no varint");
        let number = [0x08, 1];
        assert_eq!(
            Head::of(&number, 2),
            Head::Other,
            "a field without a length"
        );
        let long = FlightData {
            data_header: vec![0; HEAD_BYTES_MAX].into(),
            ..data(10)
        };
        let long = long.encode_to_vec();
        assert_eq!(Head::of(&long, long.len() as u64), Head::Other);
        let many = [0x12, 0].repeat(FIELDS_MAX + 1);
        assert_eq!(Head::of(&many, 1 << 30), Head::Other, "too many fields");
        // A length near the largest integer.
        let huge = [
            0xc2, 0x3e, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1,
        ];
        assert_eq!(Head::of(&huge, 1 << 30), Head::Other);
    }
}
