//! Prepared calls and channels for an edge that brings frames from elsewhere.
//!
//! ```text
//! Flight's DoExchange ── frames ──▶ a pair of sockets ──▶ what serves the data socket's clients, too
//! ```
//! The two edges know nothing of each other: the one that has the frames' protocol leaves here what serves a socket of them.

use std::fmt::Debug;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};

use strait_memory::FrameSocket;
use strait_protocol as wire;

use super::{Caller, Host};
use crate::error::{Code, Reason, Status};

/// What is told of a PREPARE, once it is.
pub type Told<T> = Pin<Box<dyn Future<Output = Result<T, Status>> + Send + Sync>>;

/// What serves a socket of frames.
pub trait FrameLanes: Debug + Send + Sync {
    /// Starts what a PREPARE asks for.
    ///
    /// # Errors
    /// What it is answered.
    fn prepare(
        &self,
        caller: &Caller,
        request: wire::Prepare,
        request_id: &Arc<str>,
    ) -> Result<FrameLane<wire::Prepared>, Status>;

    /// Reads the channel that a STREAM names.
    ///
    /// # Errors
    /// What it is answered.
    fn stream(
        &self,
        caller: &Caller,
        request: &wire::Stream,
        request_id: &Arc<str>,
    ) -> Result<FrameLane<wire::Streamed>, Status>;
}

/// A socket of frames that is served.
pub struct FrameLane<T> {
    /// The client's end.
    pub socket: FrameSocket,
    /// What the client is told first.
    pub told: Told<T>,
    /// It ends when this drops.
    pub serving: Box<dyn Serving>,
}

impl<T> Debug for FrameLane<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FrameLane")
            .field("serving", &self.serving)
            .finish_non_exhaustive()
    }
}

/// What goes on behind a socket of frames.
pub trait Serving: Debug + Send + Sync {
    /// Ends what it does now; false if that is nothing.
    fn cancel(&self) -> bool;

    /// Waits until nothing serves the socket any more, and lets go of that end. For ever, if whoever serves it lets go of it.
    fn ended(&mut self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>>;
}

/// What serves frames in this host.
pub(super) type Lanes = OnceLock<Arc<dyn FrameLanes>>;

impl Host {
    /// From now on frames are served by `lanes`; the first ones stay.
    pub fn serve_frames(&self, lanes: Arc<dyn FrameLanes>) {
        let _ = self.lanes.set(lanes);
    }

    /// What serves frames.
    ///
    /// # Errors
    /// `UNSUPPORTED_OP` while nothing does.
    pub fn frame_lanes(&self) -> Result<&Arc<dyn FrameLanes>, Status> {
        self.lanes.get().ok_or_else(|| {
            Status::new(
                Code::Unimplemented,
                Reason::UnsupportedOp,
                "this host serves no data socket, whose frames these are",
            )
        })
    }
}
