//! A request's body on its way to tonic: how long it may take, and how large it may be.
//!
//! tonic collects a whole message before a handler sees it, up to its limit and for as long as that
//! takes. [`Arriving`] stands in between: it follows the lengths of the messages, refuses a long
//! one at its first byte, charges what is collected to the host's budget, and ends a body that
//! does not go on. Of an upload's long messages tonic gets all but the values, which go to where the
//! upload says ([`Bodies`]).

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, Bytes};
use http_body::{Frame, SizeHint};
use strait_memory::{Charge, MemoryError};
use tokio::time::{Instant, Sleep};
use tonic::body::Body;

use super::bodies::{Bodies, Head};
use super::refused::{Refused, bad_request};
use crate::error::{Code, Reason, Status};
use crate::session::Host;

/// Longest request of a call that is no upload.
const REQUEST_BYTES_MAX: u32 = 1 << 20;
/// Messages up to here are not charged, so that a full budget does not keep a `drop` out.
const UNCHARGED_BYTES_MAX: u32 = 64 << 10;
/// What comes before each message: whether it is compressed, and its length.
const PREFIX_BYTES: usize = 5;
/// What of them is written at a time, before others have their turn on the thread.
const WRITTEN_BYTES_MAX: u64 = 1 << 20;

/// Where in a request's body its next byte is.
#[derive(Clone, Copy)]
enum At {
    /// In what comes before a message.
    Prefix,
    /// In a message of which so many bytes are still to come.
    Message(u32),
    /// In the first bytes of one of that length, whose body may go past tonic.
    Head(u32),
    /// In such a body: of so many bytes that many have passed.
    Past { length: u64, passed: u64 },
}

/// A request's body on its way to tonic.
pub(super) struct Arriving {
    body: Body,
    /// Of an upload.
    bodies: Option<Bodies>,
    host: Arc<Host>,
    refused: Refused,
    at: At,
    /// What came and has not passed.
    rest: Bytes,
    /// What of a head came before that.
    head: Vec<u8>,
    prefix: [u8; PREFIX_BYTES],
    prefix_len: usize,
    messages: u64,
    /// Bytes of bodies since the last poll began.
    written: u64,
    /// For the message at hand, until the next one begins: then it has been taken.
    charge: Option<Charge>,
    /// How long it may take: the whole of a request, each wait of an upload.
    patience: Duration,
    since: Option<Instant>,
    // Never later than `since` and `patience` together.
    timer: Pin<Box<Sleep>>,
}

impl Arriving {
    pub(super) fn new(
        body: Body,
        bodies: Option<Bodies>,
        host: &Arc<Host>,
        refused: Refused,
    ) -> Self {
        let config = host.config();
        let is_upload = bodies.is_some();
        let patience = match is_upload {
            true => config.stall(),
            false => config.request_time(),
        };
        Self {
            body,
            bodies,
            host: Arc::clone(host),
            refused,
            at: At::Prefix,
            rest: Bytes::new(),
            head: Vec::new(),
            prefix: [0; PREFIX_BYTES],
            prefix_len: 0,
            messages: 0,
            written: 0,
            charge: None,
            patience,
            since: (!is_upload).then(Instant::now),
            timer: Box::pin(tokio::time::sleep(patience)),
        }
    }

    /// The next bytes for tonic of what came. None: all that came has passed.
    fn pass(&mut self) -> Result<Option<Bytes>, Status> {
        while !self.rest.is_empty() {
            match self.at {
                At::Prefix => {
                    self.prefix[self.prefix_len] = self.rest[0];
                    self.prefix_len += 1;
                    self.rest.advance(1);
                    if self.prefix_len == PREFIX_BYTES {
                        self.prefix_len = 0;
                        self.begin()?;
                        if !matches!(self.at, At::Head(_)) {
                            return Ok(Some(Bytes::copy_from_slice(&self.prefix)));
                        }
                    }
                }
                At::Message(left) => {
                    let part = self.rest.split_to(self.rest.len().min(left as usize));
                    let left = left - u32::try_from(part.len()).unwrap_or(left);
                    self.at = match left {
                        0 => At::Prefix,
                        left => At::Message(left),
                    };
                    return Ok(Some(part));
                }
                At::Head(length) => {
                    if let Some(head) = self.pass_head(length)? {
                        return Ok(Some(head));
                    }
                }
                At::Past { length, passed } => {
                    let left = usize::try_from(length - passed).unwrap_or(usize::MAX);
                    let part = self.rest.split_to(self.rest.len().min(left));
                    self.write(length, passed, &part)?;
                }
            }
        }
        Ok(None)
    }

    /// The message behind the prefix begins.
    fn begin(&mut self) -> Result<(), Status> {
        let [compressed, length @ ..] = self.prefix;
        let length = u32::from_be_bytes(length);
        self.messages += 1;
        self.charge = None;
        if self.bodies.is_none() {
            if length > REQUEST_BYTES_MAX {
                return Err(bad_request(format!(
                    "the request has {length} bytes; at most {REQUEST_BYTES_MAX} are taken: \
                     only DoPut and DoExchange take more, in as many messages as it needs"
                )));
            }
            if self.messages > 1 {
                return Err(bad_request("a request of more than one message; send one"));
            }
        }
        let is_taken = length as usize <= self.host.config().message_bytes_max();
        let goes_past = self
            .bodies
            .as_ref()
            .is_some_and(|bodies| bodies.take_past(length));
        if goes_past && compressed == 0 && is_taken {
            self.at = At::Head(length);
            return Ok(());
        }
        self.collect(length)
    }

    /// tonic collects the message at hand.
    fn collect(&mut self, length: u32) -> Result<(), Status> {
        self.at = match length {
            0 => At::Prefix,
            length => At::Message(length),
        };
        // tonic refuses a longer one as soon as it sees the length.
        if length > UNCHARGED_BYTES_MAX && length as usize <= self.host.config().message_bytes_max()
        {
            let charge = self.host.budget().try_reserve(length.into());
            self.charge = Some(charge.map_err(MemoryError::from)?);
        }
        Ok(())
    }

    /// The head of a message of `length` bytes, as one of its own, as soon as it is there.
    fn pass_head(&mut self, length: u32) -> Result<Option<Bytes>, Status> {
        if !self.head.is_empty() {
            self.head.extend_from_slice(&self.rest);
            self.rest = std::mem::take(&mut self.head).into();
        }
        let within = self.rest.len().min(length as usize);
        match Head::of(&self.rest[..within], length.into()) {
            Head::Short => {
                self.head = std::mem::take(&mut self.rest).into();
                Ok(None)
            }
            Head::Other => {
                self.collect(length)?;
                Ok(Some(Bytes::copy_from_slice(&self.prefix)))
            }
            Head::Before(end, start) => {
                let mut head = Vec::with_capacity(PREFIX_BYTES + end);
                head.push(0);
                head.extend_from_slice(&u32::try_from(end).unwrap_or(length).to_be_bytes());
                head.extend_from_slice(&self.rest[..end]);
                self.rest.advance(start);
                let length = u64::from(length) - start as u64;
                self.at = At::Past { length, passed: 0 };
                if let Some(bodies) = &self.bodies {
                    bodies.announce(self.messages, length);
                }
                Ok(Some(head.into()))
            }
        }
    }

    /// The bytes of a body behind the first `passed`.
    fn write(&mut self, length: u64, passed: u64, part: &[u8]) -> Result<(), Status> {
        let now = passed + part.len() as u64;
        if let Some(bodies) = &self.bodies {
            bodies.write(passed, part)?;
            self.written += part.len() as u64;
            if now == length {
                bodies.end();
            }
        }
        self.at = match now == length {
            true => At::Prefix,
            false => At::Past {
                length,
                passed: now,
            },
        };
        Ok(())
    }

    /// The end of the body, and what of a message was held back: tonic says what is wrong with it.
    ///
    /// # Errors
    /// `CANCELLED` in the middle of an upload's message, which tonic takes for an end if nothing of it came.
    fn end(&mut self) -> Result<Option<Bytes>, Status> {
        let missing = match self.at {
            At::Prefix => (PREFIX_BYTES - self.prefix_len) % PREFIX_BYTES,
            At::Message(left) => left as usize,
            At::Head(length) => length as usize - self.head.len(),
            At::Past { length, passed } => usize::try_from(length - passed).unwrap_or(usize::MAX),
        };
        if self.bodies.is_some() && missing > 0 {
            return Err(Status::new(
                Code::Cancelled,
                Reason::Cancelled,
                format!("the upload ended too early: {missing} bytes of a message did not come"),
            ));
        }
        let held = &self.prefix[..std::mem::take(&mut self.prefix_len)];
        Ok((!held.is_empty()).then(|| Bytes::copy_from_slice(held)))
    }

    fn refuse(&mut self, status: Status) -> tonic::Status {
        self.charge = None;
        // Any code but that of a client that went away, which tonic takes for an end.
        let refusal = tonic::Status::aborted(status.message.as_str());
        self.refused.set(status);
        refusal
    }

    fn too_slow(&self) -> Status {
        let (what, setting) = match self.bodies.is_some() {
            true => ("nothing of the upload came for", "server.stall_ms"),
            false => (
                "the request did not arrive whole within",
                "server.request_ms",
            ),
        };
        Status::new(
            Code::DeadlineExceeded,
            Reason::Deadline,
            format!(
                "{what} {} ms (setting {setting}); send it again without such a pause",
                self.patience.as_millis()
            ),
        )
    }

    /// Whether the wait has become too long; if not, this task is woken when it does.
    fn is_over(&mut self, context: &mut Context<'_>) -> bool {
        let until = *self.since.get_or_insert_with(Instant::now) + self.patience;
        while self.timer.as_mut().poll(context).is_ready() {
            if Instant::now() >= until {
                return true;
            }
            self.timer.as_mut().reset(until);
        }
        false
    }
}

impl http_body::Body for Arriving {
    type Data = Bytes;
    type Error = tonic::Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, tonic::Status>>> {
        let this = self.get_mut();
        this.written = 0;
        loop {
            match this.pass() {
                Ok(Some(bytes)) => return Poll::Ready(Some(Ok(Frame::data(bytes)))),
                Ok(None) if this.written < WRITTEN_BYTES_MAX => {}
                Ok(None) => {
                    context.waker().wake_by_ref();
                    return Poll::Pending;
                }
                Err(status) => return Poll::Ready(Some(Err(this.refuse(status)))),
            }
            let frame = match Pin::new(&mut this.body).poll_frame(context) {
                Poll::Ready(Some(Ok(frame))) => frame.into_data().ok(),
                Poll::Ready(None) => None,
                Poll::Pending if this.is_over(context) => {
                    let status = this.too_slow();
                    return Poll::Ready(Some(Err(this.refuse(status))));
                }
                other => return other,
            };
            // Trailers, of which a request has no use, are the end, too.
            let Some(data) = frame else {
                return Poll::Ready(match this.end() {
                    Ok(held) => held.map(|held| Ok(Frame::data(held))),
                    Err(status) => Some(Err(this.refuse(status))),
                });
            };
            if this.bodies.is_some() {
                this.since = None;
            }
            this.rest = data;
        }
    }

    fn is_end_stream(&self) -> bool {
        let is_between = matches!(self.at, At::Prefix) && self.prefix_len == 0;
        is_between && self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        // What goes past tonic is not among what it gets.
        SizeHint::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;

    use arrow_flight::FlightData;
    use proptest::prelude::{
        ProptestConfig, TestCaseError, prop_assert, prop_assert_eq, prop_oneof,
    };
    use proptest::test_runner::TestRunner;
    use prost::Message;
    use strait_memory::{Budget, Growing, HugeBirths};

    use crate::flight::bodies::Route;

    /// Bodies of this size go past tonic.
    const LONG: usize = 5_000_000;

    /// Frames that are there.
    struct Frames(VecDeque<Bytes>);

    impl http_body::Body for Frames {
        type Data = Bytes;
        type Error = tonic::Status;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, tonic::Status>>> {
            Poll::Ready(self.0.pop_front().map(|bytes| Ok(Frame::data(bytes))))
        }
    }

    /// What tonic gets of `frames`, as messages, and the bodies that go past it.
    fn received(host: &Arc<Host>, frames: VecDeque<Bytes>) -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
        let bodies = Bodies::default();
        let (body, given) = (Body::new(Frames(frames)), Some(bodies.clone()));
        let mut arriving = Arriving::new(body, given, host, Refused::default());
        let budget = Budget::new("bytes", 1 << 30);
        let (births, copied) = (HugeBirths::new(), strait_memory::Copied::new());
        let mut context = Context::from_waker(std::task::Waker::noop());
        let (mut bytes, mut messages, mut past) = (Vec::new(), Vec::new(), Vec::new());
        loop {
            match http_body::Body::poll_frame(Pin::new(&mut arriving), &mut context) {
                Poll::Ready(Some(frame)) => {
                    let frame = frame.expect("no error").into_data();
                    bytes.extend_from_slice(&frame.expect("data"));
                }
                Poll::Ready(None) => break,
                Poll::Pending => continue,
            }
            while let [_, a, b, c, d, rest @ ..] = bytes.as_slice() {
                let length = u32::from_be_bytes([*a, *b, *c, *d]) as usize;
                let Some(message) = rest.get(..length) else {
                    break;
                };
                messages.push(message.to_vec());
                bytes.drain(..PREFIX_BYTES + length);
                let Some(body) = bodies.take() else { continue };
                let file = Growing::new(&budget).expect("a memfd");
                file.grow(body, 0..0, &births).expect("fits");
                past.push((file.clone(), body));
                let pieces = vec![(0..body, 0)];
                let host = Arc::clone(host);
                bodies.route(Route { file, pieces, host });
            }
        }
        assert!(bytes.is_empty(), "{} bytes of no message", bytes.len());
        let past = past.into_iter().map(|(file, length)| {
            let mut body = vec![0; usize::try_from(length).expect("short")];
            file.read_at(0, &mut body, &copied).expect("within");
            body
        });
        (messages, past.collect())
    }

    /// A message of each size, in frames cut like that.
    fn check(host: &Arc<Host>, sizes: &[usize], cuts: &[usize]) -> Result<(), TestCaseError> {
        let messages = sizes.iter().zip(1_u8..).map(|(size, n)| {
            let pattern = |at: usize| n.wrapping_mul(31).wrapping_add(at.to_le_bytes()[0]);
            FlightData {
                data_header: vec![n; size % 400].into(),
                data_body: (0..*size).map(pattern).collect::<Vec<_>>().into(),
                ..FlightData::default()
            }
        });
        let messages: Vec<_> = messages.collect();
        let bytes = messages.iter().flat_map(|message| {
            let message = message.encode_to_vec();
            let length = u32::try_from(message.len()).expect("short").to_be_bytes();
            [&[0], &length[..], &message].concat()
        });
        let mut frames = VecDeque::new();
        let mut rest: Bytes = bytes.collect::<Vec<u8>>().into();
        for cut in cuts.iter().chain(&[200_000]).cycle() {
            if rest.is_empty() {
                break;
            }
            frames.push_back(rest.split_to((*cut).min(rest.len())));
        }
        let (got, past) = received(host, frames);
        let mut past = past.into_iter();
        prop_assert_eq!(got.len(), messages.len());
        for (got, sent) in got.iter().zip(&messages) {
            let mut got = FlightData::decode(&got[..]).expect("a message");
            if sent.data_body.len() >= LONG {
                prop_assert!(got.data_body.is_empty());
                got.data_body = past.next().expect("a body").into();
            }
            prop_assert!(&got == sent, "{} bytes", sent.data_body.len());
        }
        prop_assert!(past.next().is_none());
        Ok(())
    }

    /// However an upload is cut into frames: what tonic gets and what goes past it are its messages.
    #[tokio::test]
    async fn nothing_of_an_upload_is_lost() {
        let directory = tempfile::tempdir().expect("a directory");
        let mut config = crate::config::Config::default();
        config.engine.cache = Some(std::path::PathBuf::new());
        let host = Host::start(config, directory.path()).expect("a host");
        let size = prop_oneof![0..300_usize, LONG..LONG + 1_000_000];
        let cut = prop_oneof![1..40_usize, 1..300_000_usize];
        let sizes = proptest::collection::vec(size, 1..5);
        let cuts = proptest::collection::vec(cut, 1..30);
        let mut runner = TestRunner::new(ProptestConfig {
            failure_persistence: None,
            ..ProptestConfig::with_cases(30)
        });
        runner
            .run(&(sizes, cuts), |(sizes, cuts)| check(&host, &sizes, &cuts))
            .expect("all messages");
    }
}
