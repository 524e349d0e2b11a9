//! DoExchange of frames: prepared calls, streams and channels as on the data socket, for clients that are not on this machine.
//!
//! ```text
//! client ─ app_metadata: a frame ─▶ Exchange ─▶ a socket ─▶ session::FrameLanes
//!        ◀─ app_metadata: a frame ─ Outbox ◀──┘
//! ```
//! Each message is one frame, header and all, as it would be one packet there. Nothing of them is read here but CANCEL, which there
//! goes over the connection that a lane belongs to.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;

use arrow_flight::flight_descriptor::DescriptorType;
use arrow_flight::{FlightData, FlightDescriptor};
use bytes::Bytes;
use strait_memory::{Charge, FrameSocket};
use strait_protocol::{self as wire, Header, Op, TraceContext};
use tokio::io::unix::AsyncFd;

use super::call::Call;
use super::connection::Working;
use super::messages::{CMD_BYTES_MAX, Messages};
use super::outbox::Writer;
use super::refused::{bad_request, host_bug};
use super::upload::reserved;
use crate::error::{Code, Reason, Status};
use crate::session::{FrameLane, Serving};

const FRAME_BYTES_MAX: usize = wire::HEADER_BYTES + wire::BODY_BYTES_MAX + wire::PAYLOAD_BYTES_MAX;

/// What an exchange of frames begins with: the body of the request that would bring the socket.
pub(super) enum Asked {
    Prepare(wire::Prepare),
    Stream(wire::Stream),
    /// It is one, and wrong.
    Wrong(Status),
}

impl Asked {
    /// None if the exchange is one of batches.
    pub(super) fn of(descriptor: Option<&FlightDescriptor>) -> Option<Self> {
        let descriptor = descriptor.filter(|descriptor| {
            descriptor.r#type() == DescriptorType::Cmd && descriptor.cmd.len() <= CMD_BYTES_MAX
        })?;
        let cmd: BTreeMap<String, serde_json::Value> =
            serde_json::from_slice(&descriptor.cmd).ok()?;
        let only = (cmd.len() == 1)
            .then_some(cmd)
            .and_then(|mut cmd| cmd.pop_first());
        let parsed = match only {
            Some((key, body)) if key == "prepare" => {
                serde_json::from_value(body).map(Self::Prepare)
            }
            Some((key, body)) if key == "stream" => serde_json::from_value(body).map(Self::Stream),
            _ => return None,
        };
        Some(parsed.unwrap_or_else(|error| {
            Self::Wrong(bad_request(format!("the exchange's cmd: {error}")))
        }))
    }

    /// Starts what is asked for.
    ///
    /// # Errors
    /// What PREPARE or STREAM is answered.
    pub(super) async fn start(self, call: &Call) -> Result<Frames, Status> {
        let lanes = call.caller.host().frame_lanes()?;
        let id = &call.request_id;
        let _working = call.working();
        match self {
            Self::Wrong(status) => Err(status),
            Self::Prepare(request) => {
                let lane = lanes.prepare(&call.caller, request, id)?;
                Frames::new(lane, call, |told| {
                    told.request_bytes.saturating_add(told.reply_bytes)
                })
                .await
            }
            Self::Stream(request) => {
                // It may wait a moment for whoever read it before.
                let (lanes, caller, id) = (lanes.clone(), call.caller.clone(), id.clone());
                let attach = move || lanes.stream(&caller, &request, &id);
                let lane = tokio::task::spawn_blocking(attach).await;
                let lane = lane.map_err(|error| host_bug("reading a channel", error))??;
                let mut frames = Frames::new(lane, call, |told| told.batch_bytes).await?;
                // A host that ends waits for the channel's end.
                frames.always = call.working();
                Ok(frames)
            }
        }
    }
}

/// An exchange of frames that was let in.
pub(super) struct Frames {
    socket: AsyncFd<FrameSocket>,
    serving: Box<dyn Serving>,
    call: Call,
    /// What the client is told first.
    told: Bytes,
    always: Option<Working>,
    charge: Charge,
}

impl Frames {
    async fn new<T: serde::Serialize>(
        lane: FrameLane<T>,
        call: &Call,
        bytes: impl FnOnce(&T) -> u64,
    ) -> Result<Self, Status> {
        let FrameLane {
            socket,
            told,
            serving,
        } = lane;
        let told = told.await?;
        // One frame each way is here.
        let charge = reserved(&call.caller, bytes(&told))?;
        let body = super::info::json(&told)?;
        let header = Header::of(Op::Ok, 0, (body.len(), 0), TraceContext::NONE).encode();
        let cannot = |error| host_bug("an exchange's socket", error);
        socket.set_nonblocking(true).map_err(cannot)?;
        Ok(Self {
            socket: watched(socket).map_err(cannot)?,
            serving,
            call: call.clone(),
            told: [&header[..], &body].concat().into(),
            always: None,
            charge,
        })
    }

    /// Passes frames both ways, until the lane ends or the client does.
    ///
    /// # Errors
    /// What the client sent that is no frame.
    pub(super) async fn pass(self, messages: &mut Messages, writer: &Writer) -> Result<(), Status> {
        let Self {
            socket,
            mut serving,
            call,
            told,
            always,
            charge,
        } = self;
        let mut goes_on = writer.put(message(told)).await;
        let (mut is_open, mut is_served) = (true, true);
        // What the socket has no room for yet: nothing more is taken from the client before that.
        let mut unsent: Option<Bytes> = None;
        // What is under way is waited for by a host that ends.
        let mut working = None;
        let mut buffer = vec![0; FRAME_BYTES_MAX];
        while goes_on {
            tokio::select! {
                received = receive(&socket, &mut buffer) => {
                    let Some(bytes) = received else { break };
                    working = None;
                    goes_on = writer.put(message(Bytes::copy_from_slice(&buffer[..bytes]))).await;
                }
                // With its end of the socket, which is seen once all that it sent is received.
                () = serving.ended(), if is_served => is_served = false,
                // Whether anybody is there is seen by whoever receives.
                _ = send(&socket, unsent.as_ref()), if unsent.is_some() => unsent = None,
                next = messages.next(), if is_open && unsent.is_none() => match next? {
                    None => {
                        is_open = false;
                        // The lane sees its client's end, and answers what is under way.
                        let _ = socket.get_ref().shutdown_sending();
                    }
                    // Only that it is still there.
                    Some(next) if next.app_metadata.is_empty() => {}
                    Some(next) => {
                        unsent = taken(&*serving, next.app_metadata)?;
                        working = call.working();
                    }
                },
            }
        }
        // What it had is given back before its end is told.
        drop((working, always, serving, socket, charge));
        let end = Header::of(Op::Shutdown, 0, (0, 0), TraceContext::NONE).encode();
        if goes_on && is_open && writer.put(message(end.to_vec().into())).await {
            // Not all clients can be told that a call is over while they write.
            let stall = call.caller.host().config().stall();
            let _ = tokio::time::timeout(stall, messages.discard()).await;
        }
        Ok(())
    }
}

/// One frame of the client's, if it goes to the lane.
fn taken(serving: &dyn Serving, frame: Bytes) -> Result<Option<Bytes>, Status> {
    if frame.len() > FRAME_BYTES_MAX {
        let message = format!(
            "a message of {} bytes; a frame has at most {FRAME_BYTES_MAX}",
            frame.len()
        );
        return Err(Status::new(
            Code::InvalidArgument,
            Reason::BadFrame,
            message,
        ));
    }
    if let Ok((header, _, _)) = Header::decode(&frame)
        && header.op == Op::Cancel
    {
        serving.cancel();
        return Ok(None);
    }
    Ok(Some(frame))
}

async fn send(socket: &AsyncFd<FrameSocket>, frame: Option<&Bytes>) -> io::Result<()> {
    let Some(frame) = frame else { return Ok(()) };
    loop {
        let mut ready = socket.writable().await?;
        match ready.try_io(|socket| socket.get_ref().send_now(&[frame])) {
            Ok(sent) => return sent,
            Err(_would_block) => {}
        }
    }
}

/// The next packet's length, or none at the end.
async fn receive(socket: &AsyncFd<FrameSocket>, buffer: &mut [u8]) -> Option<usize> {
    loop {
        let mut ready = socket.readable().await.ok()?;
        match ready.try_io(|socket| socket.get_ref().recv_now(buffer)) {
            Ok(received) => return received.ok().map(|it| it.bytes).filter(|bytes| *bytes > 0),
            Err(_would_block) => {}
        }
    }
}

fn message(frame: Bytes) -> FlightData {
    FlightData::new().with_app_metadata(frame)
}

/// `fd` with tokio's reactor behind it.
fn watched<T: AsRawFd>(fd: T) -> io::Result<AsyncFd<T>> {
    // As in `datasock`: the successor is unsafe for a promise that our types keep.
    #[expect(
        deprecated,
        reason = "the successor needs `unsafe` for a promise that our types keep"
    )]
    AsyncFd::new(fd)
}
