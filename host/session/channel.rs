//! Channels: what comes of a stream, under a name, for another session of the same principal to read.
//!
//! ```text
//! producer's lane ── push ──▶ Channel: batches from the first that is not acknowledged on ── send ──▶ Consumer
//!                                      ◀───────────────── acknowledged ───────────────────────────────┘
//! ```
//! A batch is kept until the consumer has acknowledged it, so that one that comes back goes on there. There is no thread of
//! a channel's own: the producer's lane, and whoever attaches a consumer, send what can be sent without waiting.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use strait_protocol::{self as wire, Header, PreparedTensor};

use super::Host;
use super::caller::Caller;
use super::flights::check_name;
use crate::error::{Code, Reason, Status};

/// Most batches that one channel keeps.
const BATCHES_MAX: u64 = 1024;
/// Those that it keeps if nobody says how many.
const BATCHES: u64 = 8;
/// How long, and how often, whoever wants to read a channel waits for another one to be gone.
const LEAVING_LOOK: Duration = Duration::from_millis(1);
const LEAVING_LOOKS: usize = 20;
/// What a consumer gets to take what is there when its channel fails.
const FAREWELL: Duration = Duration::from_secs(1);

/// What a channel hands on, in parts.
#[derive(Debug)]
pub enum Item {
    /// Rows of the outputs, as the payload of a frame.
    Rows(Vec<Vec<u8>>),
    /// The end, and what the kernel had to say, as the body of a frame.
    End(Vec<u8>),
}

/// What became of something that was sent without waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// It is on its way.
    Whole,
    /// The consumer has to read first.
    Full,
    /// Nobody is there any more.
    Gone,
}

/// What a consumer has said.
#[derive(Debug, PartialEq, Eq)]
pub enum Said {
    /// Nothing yet.
    Nothing,
    /// It needs nothing up to the batch whose number ends in these bits.
    Acknowledged(u32),
    /// What is no acknowledgement, in words.
    Wrong(String),
    /// Nothing any more.
    Gone,
}

/// Whoever reads a channel.
pub trait Consumer: Send + Sync + std::fmt::Debug {
    /// Sends `item`, which has `number`, without waiting.
    fn send(&self, number: u64, item: &Item) -> Sent;

    /// Takes the next thing that it said, without waiting.
    fn said(&self) -> Said;

    /// Tells why nothing more comes, without waiting.
    fn fail(&self, status: &Status) -> Sent;

    /// What to wait on for it.
    fn fd(&self) -> BorrowedFd<'_>;

    /// What to wait for there, until it says something, or, if something is `unsent`, until it has room.
    fn events(&self, unsent: bool) -> PollFlags;
}

/// What came up while a producer waited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Woken {
    /// The producer said something.
    Producer,
    /// The producer is gone.
    Gone,
    /// Something else, or nothing within the time.
    Other,
}

#[derive(Debug)]
struct Kept {
    item: Item,
    since: Instant,
}

#[derive(Debug)]
struct State {
    /// From the first that is not acknowledged on.
    kept: VecDeque<Kept>,
    /// Number of the first of them; of the first batch of all 1.
    first: u64,
    /// How many of them the present consumer was sent.
    sent: usize,
    consumer: Option<Arc<dyn Consumer>>,
    /// When a consumer left that nobody has come after.
    left: Option<Instant>,
    /// The end was acknowledged: whoever leaves then has all there was.
    is_over: bool,
    /// When something was acknowledged, or a consumer came.
    moved: Instant,
    /// Nobody comes to read it any more.
    is_closed: bool,
}

impl State {
    fn lose(&mut self) {
        self.consumer = None;
        self.sent = 0;
        self.left = Some(Instant::now());
    }

    /// Takes what the consumer said.
    fn hear(&mut self) {
        while let Some(consumer) = self.consumer.clone() {
            match consumer.said() {
                Said::Nothing => break,
                Said::Acknowledged(bits) => {
                    // Of those that were sent there are fewer than 2^32.
                    let first = Header::sequence_of_batch(self.first);
                    let through = bits.wrapping_sub(first).wrapping_add(1) as usize;
                    if through > self.sent {
                        let message = format!(
                            "an acknowledgement of batch {bits}, and the batches from {} to {} are on their way",
                            self.first,
                            self.first + self.sent as u64 - u64::from(self.sent > 0),
                        );
                        consumer.fail(&bad_frame(message));
                        return self.lose();
                    }
                    let mut done = self.kept.drain(..through);
                    self.is_over |= done.any(|kept| matches!(kept.item, Item::End(_)));
                    drop(done);
                    self.first += through as u64;
                    self.sent -= through;
                    self.moved = Instant::now();
                }
                Said::Wrong(message) => {
                    consumer.fail(&bad_frame(message));
                    return self.lose();
                }
                Said::Gone => return self.lose(),
            }
        }
    }

    /// Takes what the consumer said, and sends what it may have.
    fn pump(&mut self) {
        self.hear();
        let Some(consumer) = self.consumer.clone() else {
            return;
        };
        while let Some(kept) = self.kept.get(self.sent) {
            match consumer.send(self.first + self.sent as u64, &kept.item) {
                Sent::Whole => self.sent += 1,
                Sent::Full => return,
                Sent::Gone => {
                    // It may have said something before it left, since it was heard.
                    self.hear();
                    if self.consumer.is_some() {
                        self.lose();
                    }
                    return;
                }
            }
        }
    }
}

fn bad_frame(message: String) -> Status {
    Status::new(Code::InvalidArgument, Reason::BadFrame, message)
}

/// How a channel is to be.
#[derive(Clone, Debug)]
pub(super) struct ChannelPlan {
    name: String,
    batches: usize,
    wait: Duration,
    resume: Duration,
}

impl ChannelPlan {
    /// What `asked` asks for; a producer is held up for `stall` if that does not say how long.
    ///
    /// # Errors
    /// `BAD_NAME`, `BAD_REQUEST`.
    pub(super) fn new(asked: wire::ChannelOptions, stall: Duration) -> Result<Self, Status> {
        check_name(&asked.name)?;
        let batches = asked.batches.unwrap_or(BATCHES);
        if !(1..=BATCHES_MAX).contains(&batches) {
            let message =
                format!("a channel keeps 1 to {BATCHES_MAX} batches, not {batches} (`batches`)");
            return Err(Status::new(
                Code::InvalidArgument,
                Reason::BadRequest,
                message,
            ));
        }
        Ok(Self {
            name: asked.name,
            batches: usize::try_from(batches).unwrap_or(usize::MAX),
            wait: asked.wait_ms.map_or(stall, Duration::from_millis),
            resume: Duration::from_millis(asked.resume_ms.unwrap_or(0)),
        })
    }

    /// Bytes that it can keep, of batches that have `batch_bytes` each.
    pub(super) fn bytes(&self, batch_bytes: u64) -> u64 {
        batch_bytes.saturating_mul(self.batches as u64)
    }
}

/// One channel.
#[derive(Debug)]
pub struct Channel {
    plan: ChannelPlan,
    kernel: String,
    outputs: Vec<PreparedTensor>,
    batch_bytes: u64,
    state: Mutex<State>,
    /// Readable when a consumer has come.
    came: OwnedFd,
}

/// The channels that producers have open, by the number of the account and name.
#[derive(Debug, Default)]
pub(super) struct Channels(Mutex<BTreeMap<(u64, String), Arc<Channel>>>);

impl Channels {
    /// The figures of one account's, by name.
    pub(super) fn stats(&self, account: u64) -> Vec<wire::ChannelStats> {
        let all = self.0.lock();
        let own = all.range((account, String::new())..(account + 1, String::new()));
        let own: Vec<_> = own.map(|(_, channel)| Arc::clone(channel)).collect();
        drop(all);
        own.iter().map(|channel| channel.stats()).collect()
    }
}

/// A channel under its name, as its producer has it.
#[derive(Debug)]
pub struct OpenChannel {
    channel: Arc<Channel>,
    host: Arc<Host>,
    key: (u64, String),
}

impl OpenChannel {
    /// Its name is free again, and nobody comes to read it any more.
    pub fn close(&self) {
        // Once: the name may be another's by now.
        if !std::mem::replace(&mut self.channel.state.lock().is_closed, true) {
            self.host.channels.0.lock().remove(&self.key);
        }
    }

    /// Ends it. Its consumer, if it has one, is told why, or has all there is. Waits a moment for one that is behind.
    pub fn end(&self, status: Option<&Status>) {
        self.close();
        if let Some(status) = status {
            self.channel.fail(status, FAREWELL);
        }
        self.channel.state.lock().consumer = None;
    }
}

impl std::ops::Deref for OpenChannel {
    type Target = Channel;

    fn deref(&self) -> &Channel {
        &self.channel
    }
}

impl Drop for OpenChannel {
    fn drop(&mut self) {
        self.end(Some(&producer_lost()));
    }
}

/// What a consumer is told whose producer is gone.
#[must_use]
pub fn producer_lost() -> Status {
    let how = "the producer of the channel left before its last chunk, or the host ends; what came before stands";
    Status::new(Code::Unavailable, Reason::ProducerLost, how)
}

impl Caller {
    /// Opens a channel for what comes of `kernel`.
    ///
    /// # Errors
    /// `NAME_TAKEN`; that there are no descriptors left.
    pub(super) fn open_channel(
        &self,
        plan: ChannelPlan,
        kernel: &str,
        outputs: Vec<PreparedTensor>,
        batch_bytes: u64,
    ) -> Result<OpenChannel, Status> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let came = rustix::event::eventfd(0, flags)
            .map_err(|error| Status::no_descriptors(&format!("a channel: {error}")))?;
        let channel = Arc::new(Channel {
            plan,
            kernel: kernel.to_owned(),
            outputs,
            batch_bytes,
            state: Mutex::new(State {
                kept: VecDeque::new(),
                first: 1,
                sent: 0,
                consumer: None,
                left: None,
                is_over: false,
                moved: Instant::now(),
                is_closed: false,
            }),
            came,
        });
        let name = channel.plan.name.clone();
        let key = (self.account.number(), name.clone());
        let mut channels = self.host.channels.0.lock();
        if channels.contains_key(&key) {
            let message = format!(
                "there is a channel `{name}` already; end its producer, or take another name"
            );
            return Err(
                Status::new(Code::AlreadyExists, Reason::NameTaken, message).with("name", name)
            );
        }
        channels.insert(key.clone(), Arc::clone(&channel));
        drop(channels);
        Ok(OpenChannel {
            channel,
            host: Arc::clone(&self.host),
            key,
        })
    }

    /// The principal's channel of that name.
    ///
    /// # Errors
    /// `NO_RIGHT`, `CHANNEL_NOT_FOUND`.
    pub fn channel(&self, name: &str) -> Result<Arc<Channel>, Status> {
        self.check_get()?;
        let key = (self.account.number(), name.to_owned());
        let found = self.host.channels.0.lock().get(&key).cloned();
        found.ok_or_else(|| {
            let name = crate::text::name(name);
            let message = format!(
                "there is no channel `{name}` of {}; it is there from its producer's PREPARE until that ends",
                self.principal()
            );
            Status::new(Code::NotFound, Reason::ChannelNotFound, message).with("name", name)
        })
    }
}

impl Channel {
    /// What a consumer is told of it, whose first batch will be number `first`.
    #[must_use]
    pub fn to_wire(&self, first: u64, request_id: &str) -> wire::Streamed {
        wire::Streamed {
            channel: self.plan.name.clone(),
            kernel: self.kernel.clone(),
            outputs: self.outputs.clone(),
            batch_bytes: self.batch_bytes,
            first,
            request_id: request_id.to_owned(),
        }
    }

    /// Its figures for STATS.
    #[must_use]
    pub fn stats(&self) -> wire::ChannelStats {
        let state = self.state.lock();
        let lag = state.kept.front().map(|kept| kept.since.elapsed());
        wire::ChannelStats {
            name: self.plan.name.clone(),
            kernel: self.kernel.clone(),
            batches: state.first - 1 + state.kept.len() as u64,
            lag_batches: state.kept.len() as u64,
            lag_ms: lag.map_or(0, |lag| u64::try_from(lag.as_millis()).unwrap_or(u64::MAX)),
            is_read: state.consumer.is_some(),
        }
    }

    /// Has `consumer` read from the first batch on that is not acknowledged: its number.
    ///
    /// Waits a moment for whoever read it before to be gone.
    ///
    /// # Errors
    /// `WRONG_STATE` if somebody else reads it; `CHANNEL_NOT_FOUND` if it has ended meanwhile.
    pub fn attach(&self, consumer: Arc<dyn Consumer>) -> Result<u64, Status> {
        let mut state = self.state.lock();
        // Whoever read it before may have left unnoticed, or a moment before this process closed what it had sent to it.
        for _ in 0..LEAVING_LOOKS {
            state.pump();
            if state.consumer.is_none() {
                break;
            }
            parking_lot::MutexGuard::unlocked(&mut state, || std::thread::sleep(LEAVING_LOOK));
        }
        if state.is_closed {
            let name = &self.plan.name;
            let message = format!(
                "the channel `{name}` has just ended; its next producer's PREPARE opens it again"
            );
            return Err(
                Status::new(Code::NotFound, Reason::ChannelNotFound, message)
                    .with("name", name.clone()),
            );
        }
        if state.consumer.is_some() {
            let name = &self.plan.name;
            let message = format!(
                "somebody reads the channel `{name}` already; a channel has one consumer at a time"
            );
            return Err(Status::new(
                Code::FailedPrecondition,
                Reason::WrongState,
                message,
            ));
        }
        (state.consumer, state.left) = (Some(consumer), None);
        state.moved = Instant::now();
        let first = state.first;
        state.pump();
        drop(state);
        // Full of such, it is readable all the same.
        let _ = rustix::io::write(&self.came, &1_u64.to_ne_bytes());
        Ok(first)
    }

    /// Adds `item` as the next batch.
    pub fn push(&self, item: Item) {
        let mut state = self.state.lock();
        let since = Instant::now();
        if state.kept.is_empty() {
            // It was nobody's fault that nothing was acknowledged.
            state.moved = since;
        }
        state.kept.push_back(Kept { item, since });
        state.pump();
    }

    /// Whether there is room for a batch.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.state.lock().kept.len() < self.plan.batches
    }

    /// Whether everything was acknowledged.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.state.lock().kept.is_empty()
    }

    /// Takes what the consumer said, sends what it may have, and says whether the producer has waited long enough.
    ///
    /// # Errors
    /// `CONSUMER_LOST`, `DEADLINE`.
    pub fn advance(&self) -> Result<(), Status> {
        let mut state = self.state.lock();
        state.pump();
        let name = &self.plan.name;
        if let Some(left) = state.left
            && !state.is_over
            && left.elapsed() >= self.plan.resume
        {
            let ms = self.plan.resume.as_millis();
            let message = format!(
                "the consumer of the channel `{name}` left after batch {} and none came in its place within {ms} ms (`resume_ms`)",
                state.first - 1
            );
            return Err(Status::new(
                Code::Unavailable,
                Reason::ConsumerLost,
                message,
            ));
        }
        if !state.kept.is_empty() && state.moved.elapsed() >= self.plan.wait {
            let (ms, kept) = (self.plan.wait.as_millis(), state.kept.len());
            let who = match state.consumer {
                Some(_) => "its consumer acknowledged none",
                None => "nobody came to read them",
            };
            let message = format!(
                "the channel `{name}` keeps {kept} batches from {} on and {who} for {ms} ms (`wait_ms`)",
                state.first
            );
            return Err(Status::new(
                Code::DeadlineExceeded,
                Reason::Deadline,
                message,
            ));
        }
        Ok(())
    }

    /// Waits until the producer at `producer` says something (if `for_requests`) or leaves, the consumer moves, or `most` is over.
    ///
    /// # Errors
    /// Any error of `poll`.
    pub fn wait(
        &self,
        producer: BorrowedFd<'_>,
        for_requests: bool,
        most: Option<Duration>,
    ) -> std::io::Result<Woken> {
        let (consumer, unsent) = {
            let state = self.state.lock();
            (state.consumer.clone(), state.sent < state.kept.len())
        };
        let asked = match for_requests {
            true => PollFlags::IN,
            false => PollFlags::empty(),
        };
        let mut polled = vec![
            PollFd::from_borrowed_fd(producer, asked),
            PollFd::new(&self.came, PollFlags::IN),
        ];
        if let Some(consumer) = &consumer {
            polled.push(PollFd::from_borrowed_fd(
                consumer.fd(),
                consumer.events(unsent),
            ));
        }
        let most = most.map(|most| Timespec {
            tv_sec: i64::try_from(most.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: most.subsec_nanos().into(),
        });
        match rustix::event::poll(&mut polled, most.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let said = polled[0].revents();
        if polled[1].revents().contains(PollFlags::IN) {
            let _ = rustix::io::read(&self.came, &mut [0_u8; 8]);
        }
        Ok(if said.contains(PollFlags::IN) {
            Woken::Producer
        } else if said.intersects(PollFlags::HUP | PollFlags::ERR) {
            Woken::Gone
        } else {
            Woken::Other
        })
    }

    /// Tells the consumer why nothing more comes, after what it is still to have, for which it gets `most` of time.
    fn fail(&self, status: &Status, most: Duration) {
        let end = Instant::now() + most;
        loop {
            let (consumer, done) = {
                let mut state = self.state.lock();
                state.pump();
                (state.consumer.clone(), state.sent == state.kept.len())
            };
            let Some(consumer) = consumer else { return };
            let left = end.saturating_duration_since(Instant::now());
            // What was sent last may have filled its socket.
            let told = (done || left.is_zero()) && consumer.fail(status) != Sent::Full;
            if told || left.is_zero() {
                return;
            }
            let events = consumer.events(true);
            let mut polled = [PollFd::from_borrowed_fd(consumer.fd(), events)];
            let timeout = Timespec {
                tv_sec: 0,
                tv_nsec: left.min(Duration::from_millis(50)).subsec_nanos().into(),
            };
            // Whatever it says, what can be sent is looked at again until the time is over.
            let _ = rustix::event::poll(&mut polled, Some(&timeout));
        }
    }
}
