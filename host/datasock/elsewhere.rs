//! Lanes whose frames come from elsewhere: another edge has the client.

use std::pin::Pin;
use std::sync::Arc;

use strait_protocol as wire;

use super::handlers::channels;
use super::lane::{Lane, Lanes};
use crate::error::{Code, Reason, Status};
use crate::session::{Caller, FrameLane, FrameLanes, Serving};

/// Serves each lane as one of a connection that has no other.
#[derive(Debug)]
pub(super) struct Elsewhere;

/// One lane, which ends with this.
struct Only {
    lane: Option<Arc<Lane>>,
    lanes: Lanes,
}

impl std::fmt::Debug for Only {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Only").field("lane", &self.lane).finish()
    }
}

impl Serving for Only {
    fn cancel(&self) -> bool {
        self.lane.as_ref().is_some_and(|lane| lane.cancel())
    }

    fn ended(&mut self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(async {
            self.lanes.ended().await;
            self.lane = None;
        })
    }
}

/// A channel's consumer, which does nothing that could be cancelled.
#[derive(Debug)]
struct Reading;

impl Serving for Reading {
    fn cancel(&self) -> bool {
        false
    }

    fn ended(&mut self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(std::future::pending())
    }
}

impl FrameLanes for Elsewhere {
    fn prepare(
        &self,
        caller: &Caller,
        request: wire::Prepare,
        request_id: &Arc<str>,
    ) -> Result<FrameLane<wire::Prepared>, Status> {
        if request.ring {
            let message =
                "a ring is memory of one machine; leave out `ring` where frames come over Flight";
            return Err(Status::new(
                Code::InvalidArgument,
                Reason::Unsupported,
                message,
            ));
        }
        let mut lanes = Lanes::default();
        let starting = lanes.start((caller, None), request, Arc::clone(request_id))?;
        let result = starting.result;
        let told = async move {
            let (prepared, _) = super::connection::joined(result).await?;
            Ok(prepared)
        };
        Ok(FrameLane {
            socket: starting.socket,
            told: Box::pin(told),
            serving: Box::new(Only {
                lane: Some(starting.lane),
                lanes,
            }),
        })
    }

    fn stream(
        &self,
        caller: &Caller,
        request: &wire::Stream,
        request_id: &Arc<str>,
    ) -> Result<FrameLane<wire::Streamed>, Status> {
        let (socket, told) = channels::attach(caller, request, request_id)?;
        Ok(FrameLane {
            socket,
            told: Box::pin(std::future::ready(Ok(told))),
            serving: Box::new(Reading),
        })
    }
}
