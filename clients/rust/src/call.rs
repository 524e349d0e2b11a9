//! Calling a kernel: what goes in, and what comes out.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::Value;

use crate::asynchronous::AsyncClient;
use crate::client::Client;
use crate::connection::{Connection, Pending};
use crate::error::Error;
use crate::lease::Lease;
use crate::segment::{AdoptedSegment, MappedSegment, OpenSegment, TensorView};
use crate::wire::{Failure, Flight, Input, Invoke, Limits, Note, Op, Pages, Seconds};

/// A call to be sent: [`Client::call`] or [`AsyncClient::call`] begin it.
///
/// It borrows the segments that go in, so that they are not written while it runs.
#[must_use = "a call does nothing until it is sent"]
pub struct Call<'a, C> {
    client: &'a C,
    invoke: Invoke,
    leases: Vec<&'a Lease>,
    cancel: CancelHandle,
}

/// A kernel's input: a flight by name (`"x"`, `"x#column"`), or a segment of this session.
pub struct CallInput<'a> {
    input: Input,
    lease: Option<&'a Lease>,
}

impl From<&str> for CallInput<'_> {
    fn from(name: &str) -> Self {
        Self {
            input: Input::Text(name.to_owned()),
            lease: None,
        }
    }
}

impl From<&String> for CallInput<'_> {
    fn from(name: &String) -> Self {
        name.as_str().into()
    }
}

impl<'a> CallInput<'a> {
    fn segment(segment: &str, lease: &'a Lease, column: Option<&str>) -> Self {
        let column = column.map(str::to_owned);
        Self {
            input: Input::Segment {
                segment: segment.to_owned(),
                column,
            },
            lease: Some(lease),
        }
    }
}

macro_rules! segment_inputs {
    ($($segment:ty),*) => { $(
        impl<'a> From<&'a $segment> for CallInput<'a> {
            fn from(segment: &'a $segment) -> Self {
                Self::segment(&segment.mapping().segment, segment.lease(), None)
            }
        }

        /// A segment and the name of one of its tensors.
        impl<'a> From<(&'a $segment, &str)> for CallInput<'a> {
            fn from((segment, column): (&'a $segment, &str)) -> Self {
                Self::segment(&segment.mapping().segment, segment.lease(), Some(column))
            }
        }
    )* };
}

segment_inputs!(OpenSegment, MappedSegment, AdoptedSegment);

impl fmt::Debug for CallInput<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.input.fmt(f)
    }
}

/// A parameter's value: a truth value, a number, a text or a list of numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct Param(Value);

impl From<Value> for Param {
    fn from(value: Value) -> Self {
        Self(value)
    }
}

impl From<f64> for Param {
    fn from(number: f64) -> Self {
        // JSON has no word for these three; the protocol has.
        Self(match number {
            _ if number.is_nan() => "nan".into(),
            f64::INFINITY => "inf".into(),
            f64::NEG_INFINITY => "-inf".into(),
            _ => number.into(),
        })
    }
}

impl From<f32> for Param {
    fn from(number: f32) -> Self {
        f64::from(number).into()
    }
}

impl From<&[f64]> for Param {
    fn from(numbers: &[f64]) -> Self {
        Self(
            numbers
                .iter()
                .map(|&number| Param::from(number).0)
                .collect(),
        )
    }
}

impl From<Vec<f64>> for Param {
    fn from(numbers: Vec<f64>) -> Self {
        numbers.as_slice().into()
    }
}

impl<const N: usize> From<[f64; N]> for Param {
    fn from(numbers: [f64; N]) -> Self {
        numbers.as_slice().into()
    }
}

macro_rules! plain_params {
    ($($type:ty),*) => {
        $(impl From<$type> for Param { fn from(value: $type) -> Self { Self(value.into()) } })*
    };
}

plain_params!(
    bool, i8, i16, i32, i64, u8, u16, u32, u64, usize, &str, String
);

impl<'a, C> Call<'a, C> {
    pub(crate) fn new(client: &'a C, kernel: &str, lease_ms: Option<u64>) -> Self {
        let invoke = Invoke {
            kernel: kernel.to_owned(),
            lease_ms,
            ..Invoke::default()
        };
        Self {
            client,
            invoke,
            leases: Vec::new(),
            cancel: CancelHandle::default(),
        }
    }

    /// Gives an input port its tensor. A segment must not be written by anybody while the call runs.
    pub fn input(mut self, port: &str, input: impl Into<CallInput<'a>>) -> Self {
        let CallInput { input, lease } = input.into();
        self.leases.extend(lease);
        self.invoke.inputs.insert(port.to_owned(), input);
        self
    }

    /// Gives a parameter its value. `axis` is 0-based and row-major.
    pub fn param(mut self, name: &str, value: impl Into<Param>) -> Self {
        self.invoke
            .parameters
            .insert(name.to_owned(), value.into().0);
        self
    }

    /// Publishes an output under a name, which must be free unless [`Call::replace`].
    pub fn publish(mut self, port: &str, name: &str) -> Self {
        self.invoke.publish.insert(port.to_owned(), name.to_owned());
        self
    }

    /// Whether [`Call::publish`] may take names from other flights.
    pub fn replace(mut self, replace: bool) -> Self {
        self.invoke.replace = replace;
        self
    }

    /// Whether the outputs are sealed for good, so that not even the host can write to them again.
    pub fn seal(mut self, seal: bool) -> Self {
        self.invoke.seal = seal;
        self
    }

    /// Whether the outputs are mapped here; if not, each should be published.
    pub fn map(mut self, map: bool) -> Self {
        self.invoke.map = Some(map);
        self
    }

    /// Wall time for the call, from the host's receipt on.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.invoke.deadline_ms = Some(milliseconds(deadline));
        self
    }

    /// Life of the results' leases.
    pub fn lease(mut self, life: Duration) -> Self {
        self.invoke.lease_ms = Some(milliseconds(life));
        self
    }

    /// Limits of this call, lower than the host's own.
    pub fn limits(mut self, limits: Limits) -> Self {
        self.invoke.limits = Some(limits);
        self
    }

    /// Whether the host reads from its own maps which pages the guest saw ([`CallResult::pages`]).
    pub fn verify(mut self, verify: bool) -> Self {
        self.invoke.verify = verify;
        self
    }

    /// A repeat of the same key within a minute gets the same results without another run.
    pub fn idempotency_key(mut self, key: &str) -> Self {
        self.invoke.idempotency_key = Some(key.to_owned());
        self
    }

    /// Names this call in the host's log and in errors: 1 to 64 characters from
    /// `A-Z a-z 0-9 . _ : -`.
    pub fn request_id(mut self, id: &str) -> Self {
        self.invoke.request_id = Some(id.to_owned());
        self
    }

    /// What ends this call from another thread or task.
    #[must_use]
    pub fn cancel_handle(&self) -> CancelHandle {
        self.cancel.clone()
    }

    /// What can be said before the host is asked.
    fn check(&self) -> Result<(), Error> {
        self.invoke
            .request_id
            .as_deref()
            .map_or(Ok(()), check_request_id)?;
        self.leases.iter().try_for_each(|lease| lease.check())
    }
}

impl Call<'_, Client> {
    /// Runs the kernel and waits for its results.
    ///
    /// # Errors
    /// [`Error::Remote`] if the host refuses or the kernel fails, [`Error::LeaseExpired`] if an
    /// input's lease is over, and the ends of the connection.
    pub fn send(self) -> Result<CallResult, Error> {
        let Call {
            client,
            invoke,
            leases,
            cancel,
        } = self;
        let client = client.inner();
        client.connection().wait(
            Call {
                client,
                invoke,
                leases,
                cancel,
            }
            .send(),
        )
    }
}

impl Call<'_, AsyncClient> {
    /// Runs the kernel. Dropping the future cancels the kernel; results that were already under
    /// way are released.
    ///
    /// # Errors
    /// As for the blocking call.
    pub async fn send(mut self) -> Result<CallResult, Error> {
        self.check()?;
        if self.invoke.request_id.is_none() {
            self.invoke.request_id = self.client.request_id();
        }
        let pending = self.cancel.start(self.client, &self.invoke)?;
        // Ended on drop too, so that a late cancel cannot hit another call's sequence.
        let _running = Running(&self.cancel);
        self.client.results(pending.await?)
    }
}

impl<C> fmt::Debug for Call<'_, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Call").field(&self.invoke).finish()
    }
}

/// Ends a call from another thread or task; the call then fails with `CANCELLED`.
#[derive(Clone, Debug, Default)]
pub struct CancelHandle(Arc<Mutex<Phase>>);

#[derive(Debug, Default)]
enum Phase {
    #[default]
    Unsent,
    Running {
        connection: Arc<Connection>,
        sequence: u32,
    },
    Cancelled,
    Done,
}

impl CancelHandle {
    /// Asks the host to end the call, or keeps it from being sent. Without effect once it is
    /// answered. Returns at once: the call itself tells how it went.
    pub fn cancel(&self) {
        let mut phase = self.phase();
        match &*phase {
            Phase::Unsent => *phase = Phase::Cancelled,
            Phase::Running {
                connection,
                sequence,
            } => connection.cancel(*sequence),
            Phase::Cancelled | Phase::Done => {}
        }
    }

    fn start(&self, client: &AsyncClient, invoke: &Invoke) -> Result<Pending, Error> {
        let mut phase = self.phase();
        if matches!(*phase, Phase::Cancelled) {
            return Err(cancelled(invoke).into());
        }
        let pending = client.request(Op::Invoke, invoke, Vec::new())?;
        let sequence = pending.sequence();
        *phase = Phase::Running {
            connection: Arc::clone(client.connection()),
            sequence,
        };
        Ok(pending)
    }

    fn phase(&self) -> MutexGuard<'_, Phase> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Running<'a>(&'a CancelHandle);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        *self.0.phase() = Phase::Done;
    }
}

fn cancelled(invoke: &Invoke) -> Failure {
    Failure {
        code: "CANCELLED".into(),
        reason: "CANCELLED".into(),
        message: format!(
            "the call of {} was cancelled before it was sent",
            invoke.kernel
        ),
        request_id: invoke.request_id.clone().unwrap_or_else(|| "-".into()),
        backtrace: None,
        details: serde_json::Map::new(),
    }
}

/// What a kernel gave back.
#[derive(Debug)]
pub struct CallResult {
    /// Each output port with its segment, in the kernel's order; empty after
    /// [`Call::map`]`(false)`.
    pub results: Vec<(String, MappedSegment)>,
    /// The outputs that were published.
    pub published: Vec<Flight>,
    /// What the kernel had to say.
    pub notes: Vec<Note>,
    /// Bytes of this call's tensors that the host copied.
    pub copied_bytes: u64,
    /// The pages that the guest saw; filled by [`Call::verify`].
    pub pages: Vec<Pages>,
    /// Page faults of the host's process during the call that needed no I/O.
    pub minor_faults: u64,
    /// Where the time went.
    pub seconds: Seconds,
    /// Names this call in the host's log.
    pub request_id: String,
}

impl CallResult {
    /// The tensor of an output port.
    ///
    /// # Errors
    /// [`Error::NoTensor`] if the kernel has no such port or it was not mapped.
    pub fn tensor(&self, port: &str) -> Result<TensorView<'_>, Error> {
        match self.results.iter().find(|(name, _)| name == port) {
            Some((_, segment)) => segment.tensor(port),
            None => Err(self.no_port(port)),
        }
    }

    /// Takes an output port's segment out, to keep it or to call the next kernel with it.
    ///
    /// # Errors
    /// As [`CallResult::tensor`]; also if it was taken before.
    pub fn take(&mut self, port: &str) -> Result<MappedSegment, Error> {
        match self.results.iter().position(|(name, _)| name == port) {
            Some(index) => Ok(self.results.remove(index).1),
            None => Err(self.no_port(port)),
        }
    }

    fn no_port(&self, port: &str) -> Error {
        let known = self.results.iter().map(|(name, _)| name.clone()).collect();
        Error::NoTensor {
            name: port.to_owned(),
            known,
        }
    }
}

/// As the protocol counts time; a part of a millisecond counts as a whole one.
pub(crate) fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos().div_ceil(1_000_000))
        .unwrap_or(u64::MAX)
        .max(1)
}

pub(crate) fn check_request_id(id: &str) -> Result<(), Error> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._:-".contains(&byte);
    if (1..=64).contains(&id.len()) && id.bytes().all(allowed) {
        return Ok(());
    }
    Err(Error::RequestId(id.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_json_lacks_have_words() {
        let value = |param: Param| param.0;
        assert_eq!(value(f64::NAN.into()), "nan");
        assert_eq!(value(f64::NEG_INFINITY.into()), "-inf");
        assert_eq!(value(0.1.into()), serde_json::json!(0.1));
        assert_eq!(
            value([1.0, f64::INFINITY].into()),
            serde_json::json!([1.0, "inf"])
        );
        assert_eq!(value(1.into()), serde_json::json!(1));
        assert_eq!(value(u64::MAX.into()).to_string(), "18446744073709551615");
        assert_eq!(value(i64::MIN.into()).to_string(), "-9223372036854775808");
        assert_eq!(value(true.into()), serde_json::json!(true));
    }

    #[test]
    fn request_ids_are_checked_here_already() {
        let longest = "x".repeat(64);
        for good in ["a", "job-7.2:retry_1", &longest] {
            assert!(check_request_id(good).is_ok(), "{good}");
        }
        let too_long = "x".repeat(65);
        for bad in ["", "a b", "ü", "a\n", &too_long] {
            assert!(
                matches!(check_request_id(bad), Err(Error::RequestId(_))),
                "{bad}"
            );
        }
    }

    #[test]
    fn times_are_never_rounded_to_nothing() {
        assert_eq!(milliseconds(Duration::ZERO), 1);
        assert_eq!(milliseconds(Duration::from_micros(1500)), 2);
        assert_eq!(milliseconds(Duration::MAX), u64::MAX);
    }
}
