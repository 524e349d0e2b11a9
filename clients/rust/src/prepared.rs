//! Kernels that are made ready once and called again and again.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use strait_tensor::{TensorPlace, TensorSpec};

use crate::argument::{CallInput, Given, Param};
use crate::connection::Beside;
use crate::elements::Elements;
use crate::error::Error;
use crate::lease::Lease;
use crate::link::Link;
use crate::session::{Session, milliseconds};
use crate::tensor::{TensorView, range};
use crate::wire::{
    self, ChannelOptions, HEADER_BYTES, Header, Limits, Note, Op, PreparedInput, PreparedTensor,
    SIZES_BYTES, TraceContext,
};

/// What is to be prepared: [`Client::prepare`](crate::Client::prepare) or
/// [`AsyncClient::prepare`](crate::AsyncClient::prepare) begin it, and `C` says which of them sends it.
#[must_use = "nothing is prepared until it is sent"]
pub struct Prepare<'a, C> {
    session: &'a Session,
    request: wire::Prepare,
    /// Elements that are still to go into a segment.
    elements: Vec<(String, TensorSpec, &'a [u8])>,
    misfit: Option<Error>,
    leases: Vec<&'a Lease>,
    client: std::marker::PhantomData<&'a C>,
}

impl<'a, C> Prepare<'a, C> {
    pub(crate) fn new(session: &'a Session, kernel: &str) -> Self {
        Self {
            session,
            request: wire::Prepare {
                kernel: kernel.to_owned(),
                ..wire::Prepare::default()
            },
            elements: Vec::new(),
            misfit: None,
            leases: Vec::new(),
            client: std::marker::PhantomData,
        }
    }

    /// An input whose elements each call brings.
    pub fn input(mut self, port: &str, spec: &TensorSpec) -> Self {
        let input = PreparedInput::Spec {
            dtype: spec.dtype,
            shape: spec.shape.clone(),
        };
        self.request.inputs.insert(port.to_owned(), input);
        self
    }

    /// An input that is the same for all calls: a flight or a segment, which the host keeps for as long as what is
    /// prepared, or elements of this process, which are copied into a segment.
    pub fn fixed(mut self, port: &str, input: impl Into<CallInput<'a>>) -> Self {
        let CallInput { given, lease } = input.into();
        self.leases.extend(lease);
        match given {
            Given::Named(input) => {
                let input = PreparedInput::Fixed(input);
                self.request.inputs.insert(port.to_owned(), input);
            }
            Given::Elements(spec, bytes) => self.elements.push((port.to_owned(), spec, bytes)),
            Given::Misfit(error) => self.misfit = self.misfit.or(Some(error)),
        }
        self
    }

    /// Gives a parameter its value. `axis` is 0-based and row-major.
    pub fn param(mut self, name: &str, value: impl Into<Param>) -> Self {
        self.request
            .parameters
            .insert(name.to_owned(), value.into().0);
        self
    }

    /// Wall time of each call, from the host's receipt on.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.request.deadline_ms = Some(milliseconds(deadline));
        self
    }

    /// Limits of each call, lower than the host's own.
    pub fn limits(mut self, limits: Limits) -> Self {
        self.request.limits = Some(limits);
        self
    }

    /// The output goes to whoever reads the channel of that name, and not to this process: for
    /// [`stream`](Prepare::stream), whose chunks then return no rows.
    pub fn channel(mut self, channel: ChannelOptions) -> Self {
        self.request.channel = Some(channel);
        self
    }

    pub(crate) fn session(&self) -> &'a Session {
        self.session
    }

    /// Has calls go through a ring of slots in memory that the host shares with this process, and not over a socket: while both
    /// sides spin ([`Options::spin`](crate::Options::spin), the host's `server.spin_us`) a call makes no system call.
    /// The ring's memory counts as a segment. Not for [streams](crate::PreparedStream).
    pub fn ring(mut self) -> Self {
        self.request.ring = true;
        self
    }

    /// The same for chunks of rows.
    pub(crate) fn of_chunks(mut self) -> Self {
        self.request.stream = true;
        self
    }

    pub(crate) async fn run(mut self) -> Result<Prepared, Error> {
        if let Some(misfit) = self.misfit.take() {
            return Err(misfit);
        }
        self.leases.iter().try_for_each(|lease| lease.check())?;
        self.request.request_id = self.session.request_id();
        // Kept until the host has them.
        let mut segments = Vec::with_capacity(self.elements.len());
        for (port, spec, bytes) in std::mem::take(&mut self.elements) {
            let segment = self.session.filled(&port, &spec, bytes).await?;
            let input = PreparedInput::Fixed(wire::Input::Segment {
                segment: segment.mapping().segment.clone(),
                tensor: None,
            });
            self.request.inputs.insert(port, input);
            segments.push(segment);
        }
        let pending = self
            .session
            .request(Op::Prepare, &self.request, Beside::default())?;
        let (prepared, fds) = pending.await?.read::<wire::Prepared>()?;
        Prepared::new(self.session.clone(), prepared, fds, self.request.ring)
    }
}

impl<C> fmt::Debug for Prepare<'_, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Prepare").field(&self.request).finish()
    }
}

/// A kernel that is ready. It has a socket of its own, and a ring if that was [asked for](Prepare::ring); dropping it ends it in the host.
///
/// A call sends its inputs straight from their memory and receives its results into memory that is reused: it allocates
/// nothing that grows with them. It waits on the calling thread, so asynchronous code calls from a thread that may wait.
#[derive(Debug)]
pub struct Prepared {
    pub(crate) session: Session,
    pub(crate) link: Link,
    pub(crate) number: u64,
    pub(crate) inputs: Vec<PreparedTensor>,
    /// The sizes of all inputs, as they stand before the elements.
    sizes: Vec<u8>,
    request_bytes: u32,
    pub(crate) outputs: Vec<PreparedTensor>,
    /// Where the outputs of the last call are in what was received.
    pub(crate) places: Vec<TensorPlace>,
    reply_bytes: usize,
    /// What was received; an array of words, so that elements are aligned.
    received: Vec<u128>,
    pub(crate) sequence: u32,
    /// A call is under way, or was broken off.
    pub(crate) broken: bool,
}

/// What a call of a [`Prepared`] returned, until the next one.
#[derive(Debug)]
pub struct PreparedResult<'a> {
    places: &'a [TensorPlace],
    bytes: &'a [u8],
    /// The kernel's notes.
    pub notes: Vec<Note>,
}

impl<'a> PreparedResult<'a> {
    /// The output ports, in the kernel's order.
    #[must_use]
    pub fn ports(&self) -> Vec<&'a str> {
        self.places.iter().map(|place| &*place.name).collect()
    }

    /// The tensor of an output port.
    ///
    /// # Errors
    /// [`Error::NoTensor`] if the kernel has no such port.
    pub fn tensor(&self, port: &str) -> Result<TensorView<'a>, Error> {
        let place = self.places.iter().find(|place| place.name == port);
        let place = place.ok_or_else(|| Error::NoTensor {
            name: port.to_owned(),
            known: self.places.iter().map(|place| place.name.clone()).collect(),
        })?;
        Ok(TensorView::of(place, self.bytes))
    }
}

/// What is sent behind a tensor that is smaller than it could be.
static GAP: [u8; wire::PAYLOAD_BYTES_MAX] = [0; wire::PAYLOAD_BYTES_MAX];

impl Prepared {
    pub(crate) fn new(
        session: Session,
        told: wire::Prepared,
        fds: Vec<OwnedFd>,
        ring: bool,
    ) -> Result<Self, Error> {
        let wrong = |what: &str| Error::Protocol(format!("the OK to PREPARE: {what}"));
        let request_bytes = checked(&told.inputs, told.request_bytes)
            .ok_or_else(|| wrong("its inputs do not lie where they must"))?;
        let reply_bytes = checked(&told.outputs, told.reply_bytes)
            .ok_or_else(|| wrong("its outputs do not lie where they must"))?;
        let mut fds = fds.into_iter();
        let (socket, ring) = match (fds.next(), fds.next(), fds.next()) {
            (Some(socket), None, None) if !ring => (socket, None),
            (Some(socket), Some(memory), None) if ring => {
                let expected = wire::Ring::of(request_bytes.into(), reply_bytes.into());
                let layout = expected.filter(|expected| told.ring == Some(*expected));
                let layout = layout.ok_or_else(|| wrong("its ring does not lie as it must"))?;
                (socket, Some((layout, memory)))
            }
            _ => {
                let what = "it brings the socket for calls, and the memory of a ring if that was asked for";
                return Err(wrong(what));
            }
        };
        let link = Link::new(socket, ring, session.spin())?;
        let reply_bytes = reply_bytes as usize;
        let sizes = told
            .inputs
            .iter()
            .flat_map(|tensor| wire::sizes(&tensor.shape));
        let places = told.outputs.iter().map(|tensor| TensorPlace {
            name: tensor.port.clone(),
            spec: TensorSpec {
                dtype: tensor.dtype,
                shape: tensor.shape.clone(),
            },
            offset: tensor.offset,
            length: 0,
        });
        // An OK with what the kernel has to say, or an ERROR.
        let most = HEADER_BYTES + wire::BODY_BYTES_MAX + reply_bytes;
        Ok(Self {
            session,
            link,
            number: told.prepared,
            sizes: sizes.collect(),
            places: places.collect(),
            inputs: told.inputs,
            request_bytes,
            outputs: told.outputs,
            reply_bytes,
            received: vec![0; most.div_ceil(size_of::<u128>())],
            sequence: 0,
            broken: false,
        })
    }

    /// The inputs that each call brings, in the order in which it brings them.
    #[must_use]
    pub fn inputs(&self) -> &[PreparedTensor] {
        &self.inputs
    }

    /// The outputs, at their largest.
    #[must_use]
    pub fn outputs(&self) -> &[PreparedTensor] {
        &self.outputs
    }

    /// Runs the kernel on `elements`, those of [`Self::inputs`] in their order, and waits for its results.
    ///
    /// # Errors
    /// [`Error::Dtype`] or [`Error::Length`] if they are not what was prepared; [`Error::Remote`] if the kernel fails, which
    /// does not affect other calls; [`Error::Disconnected`] if the host or this connection has ended.
    pub fn call(&mut self, elements: &[Elements<'_>]) -> Result<PreparedResult<'_>, Error> {
        self.begin(elements)?;
        self.end()
    }

    /// The first half of [`Self::call`]: sends it. Its descriptor (`AsFd`) becomes readable when [`Self::end`] no longer waits; with
    /// [`Prepare::ring`] it does not.
    ///
    /// # Errors
    /// As [`Self::call`], and [`Error::Disconnected`] if the call before has not been ended.
    pub fn begin(&mut self, elements: &[Elements<'_>]) -> Result<(), Error> {
        self.check(elements)?;
        self.begin_checked(Op::Call, elements)
    }

    pub(crate) fn begin_checked(&mut self, op: Op, elements: &[Elements<'_>]) -> Result<(), Error> {
        // What is prepared ends with its connection, a moment after it.
        if self.broken || self.session.connection().has_ended() {
            return Err(Error::Disconnected);
        }
        // If the reply is not taken, the next one would be taken for another call's.
        self.broken = true;
        self.send(op, elements)
    }

    /// The second half of [`Self::call`]: waits for the results.
    ///
    /// # Errors
    /// As [`Self::call`], and [`Error::Linux`] if none was begun.
    pub fn end(&mut self) -> Result<PreparedResult<'_>, Error> {
        self.check_begun()?;
        let (_, notes) = self.receive(&[Op::Ok])?;
        Ok(self.result(notes))
    }

    /// What was received last.
    pub(crate) fn result(&self, notes: Vec<Note>) -> PreparedResult<'_> {
        let bytes = self.places.iter().map(|place| place.length);
        self.session.count_copied(bytes.sum());
        let received: &[u8] = bytemuck::cast_slice(&self.received);
        PreparedResult {
            places: &self.places,
            // Where tensors are aligned.
            bytes: &received[HEADER_BYTES..],
            notes,
        }
    }

    /// A reply that nobody asked for would be waited for without end.
    pub(crate) fn check_begun(&self) -> Result<(), Error> {
        match self.broken {
            true => Ok(()),
            false => Err(Error::Linux {
                what: "end a call that was not begun",
                source: io::ErrorKind::InvalidInput.into(),
            }),
        }
    }

    pub(crate) fn check(&self, elements: &[Elements<'_>]) -> Result<(), Error> {
        if elements.len() != self.inputs.len() {
            return Err(Error::Inputs {
                prepared: self
                    .inputs
                    .iter()
                    .map(|tensor| tensor.port.clone())
                    .collect(),
                given: elements.len(),
            });
        }
        for (tensor, given) in self.inputs.iter().zip(elements) {
            given.kind.check(&tensor.port, tensor.dtype)?;
            let shape = given.shape.unwrap_or(&tensor.shape);
            if !within(shape, &tensor.shape) {
                return Err(Error::Shape {
                    name: tensor.port.clone(),
                    given: shape.to_vec(),
                    most: tensor.shape.clone(),
                });
            }
            // No more than of the largest, which is a number.
            let expected = shape.iter().product::<u64>() * tensor.dtype.size();
            if given.bytes.len() as u64 != expected {
                return Err(Error::Length {
                    spec: TensorSpec {
                        dtype: tensor.dtype,
                        shape: shape.to_vec(),
                    },
                    expected,
                    given: given.bytes.len() as u64,
                });
            }
        }
        Ok(())
    }

    pub(crate) fn send(&mut self, op: Op, elements: &[Elements<'_>]) -> Result<(), Error> {
        self.sequence = self.sequence.wrapping_add(1).max(1);
        let sizes = self.sizes.chunks_exact_mut(SIZES_BYTES);
        for ((sizes, tensor), given) in sizes.zip(&self.inputs).zip(elements) {
            let shape = given.shape.unwrap_or(&tensor.shape);
            sizes.copy_from_slice(&wire::sizes(shape));
        }
        let header = Header {
            payload_bytes: self.request_bytes,
            ..Header::of(op, self.sequence, (0, 0), TraceContext::NONE)
        }
        .encode();
        let mut parts: Vec<&[u8]> = Vec::with_capacity(2 + 2 * elements.len());
        parts.extend([&header[..], &self.sizes]);
        for (tensor, given) in self.inputs.iter().zip(elements) {
            // As long as for the largest.
            let room = wire::padded(tensor.length).and_then(|room| usize::try_from(room).ok());
            let gap = room.map_or(0, |room| room - given.bytes.len());
            parts.extend([given.bytes, &GAP[..gap]]);
        }
        self.link.send(&parts)?;
        let bytes = elements.iter().map(|given| given.bytes.len() as u64);
        self.session.count_copied(bytes.sum());
        Ok(())
    }

    /// A reply that is one of `ops`: which, and what the kernel had to say.
    pub(crate) fn receive(&mut self, ops: &[Op]) -> Result<(Op, Vec<Note>), Error> {
        let packet: &mut [u8] = bytemuck::cast_slice_mut(&mut self.received);
        let bytes = self.link.receive(packet, HEADER_BYTES + self.reply_bytes)?;
        let wrong = |what: String| Error::Protocol(format!("the reply to CALL: {what}"));
        let decoded = Header::decode(&packet[..bytes]);
        let (header, body, payload) = decoded.map_err(|error| wrong(error.to_string()))?;
        // What ends a channel answers no request.
        let expected = match header.op {
            Op::Error if header.sequence == 0 => 0,
            _ => self.sequence,
        };
        if header.sequence != expected {
            return Err(wrong(format!(
                "sequence {} where {} was asked",
                header.sequence, self.sequence
            )));
        }
        match header.op {
            op if ops.contains(&op) => {}
            Op::Error => {
                let failure: wire::Failure = parse(body)?;
                self.broken = false;
                return Err(failure.into());
            }
            other => return Err(wrong(format!("{other:?}"))),
        }
        // The end of a channel has none.
        let reply_bytes = match header.op {
            Op::Last => 0,
            _ => self.reply_bytes,
        };
        if payload.len() != reply_bytes {
            return Err(wrong(format!(
                "a payload of {} bytes where {reply_bytes} were said",
                payload.len(),
            )));
        }
        let notes = match body.is_empty() {
            true => Vec::new(),
            false => parse::<wire::Called>(body)?.notes,
        };
        let sizes = payload.chunks_exact(SIZES_BYTES);
        for ((place, tensor), sizes) in self.places.iter_mut().zip(&self.outputs).zip(sizes) {
            let shape = wire::shape(sizes, tensor.shape.len());
            let shape = shape.filter(|shape| within(shape, &tensor.shape));
            let shape = shape.ok_or_else(|| {
                wrong(format!(
                    "output {:?} has a shape beyond what was said",
                    tensor.port
                ))
            })?;
            place.spec.shape = shape;
            // No more than the bytes of the largest, which were held against the payload.
            place.length = place.spec.bytes()?;
        }
        let body_bytes = body.len();
        if body_bytes > 0 {
            // To where it is without a body.
            let from = HEADER_BYTES + body_bytes;
            packet.copy_within(from..from + reply_bytes, HEADER_BYTES);
        }
        self.broken = false;
        Ok((header.op, notes))
    }

    /// What was received of an output last.
    pub(crate) fn received(&self, place: &TensorPlace) -> &[u8] {
        let received: &[u8] = bytemuck::cast_slice(&self.received);
        &received[HEADER_BYTES..][range(place)]
    }

    /// Its number in this session, by which the host can be told to end a call: see
    /// [`Client::cancel_prepared`](crate::Client::cancel_prepared).
    #[must_use]
    pub fn number(&self) -> u64 {
        self.number
    }
}

impl AsFd for Prepared {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.link.socket().as_fd()
    }
}

impl Session {
    pub(crate) async fn cancel_prepared(&self, number: u64) -> Result<bool, Error> {
        let body = wire::Cancel {
            sequence: None,
            prepared: Some(number),
            request_id: self.request_id(),
        };
        let cancelled: wire::Cancelled = self.ask(Op::Cancel, &body).await?;
        Ok(cancelled.cancelled)
    }
}

fn parse<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(body)
        .map_err(|error| Error::Protocol(format!("the reply to CALL: its JSON: {error}")))
}

/// Whether `shape` is one of a tensor that is at most `most` along each axis.
fn within(shape: &[u64], most: &[u64]) -> bool {
    shape.len() == most.len() && shape.iter().zip(most).all(|(size, most)| size <= most)
}

/// The length of a payload whose tensors lie where they must.
fn checked(tensors: &[PreparedTensor], bytes: u64) -> Option<u32> {
    let (offsets, all) = wire::places(tensors.iter().map(|tensor| tensor.length))?;
    let right = tensors.iter().zip(offsets).all(|(tensor, offset)| {
        let spec = TensorSpec {
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
        };
        tensor.offset == offset
            && tensor.shape.len() <= SIZES_BYTES / 8
            && spec.bytes().is_ok_and(|bytes| bytes == tensor.length)
    });
    (right && all == bytes && all <= wire::PAYLOAD_BYTES_MAX as u64)
        .then(|| u32::try_from(all).ok())
        .flatten()
}
