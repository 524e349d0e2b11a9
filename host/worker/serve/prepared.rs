//! Prepared kernels in a worker: they wait here for the runs and chunks that the host sends.
//!
//! ```text
//! lane ── prepare ──▶ All: number, Ready        call ──▶ run, ended, renew, waits
//! lane of a stream (a thread for each that may be under way) ── stream ──▶ chunk ──▶ piece, … ──▶ ended, renew, waits
//! ```
//! A call runs on whichever lane it comes; a stream's invocation stays on one thread from its first chunk to its last. The
//! threads are there before the walls: no other can be started behind them.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, mpsc};
use std::time::Instant;

use parking_lot::Mutex;
use serde_bytes::ByteBuf;
use strait_tensor::TensorSpec;

use super::super::channel::Channel;
use super::super::messages::{
    Answer, Ask, Bring, Call, Chunk, Filled, FilledIn, Outcome, Piece, Run,
};
use super::{ASK_BYTES_MAX, Worker, deadline, host_failed};
use crate::engine::{Batch, Batches, CancelToken, Cause, Done, Failed, OutputBody, Ready};

/// Those that are prepared, by their numbers.
pub(super) type All = Mutex<HashMap<u64, Arc<Mutex<Box<dyn Ready>>>>>;

/// What comes of `work`, whose bugs must not end the lane for the others.
fn caught<R>(work: impl FnOnce() -> Result<R, Failed>) -> Result<R, Failed> {
    let caught = catch_unwind(AssertUnwindSafe(work));
    caught.unwrap_or_else(|_| Err(host_failed("it panicked; this is a bug of strait")))
}

fn outputs(done: Done) -> Result<Outcome, Failed> {
    let outputs = done.outputs.into_iter().map(|output| match output.body {
        OutputBody::Inline { spec, bytes } => Ok(Filled {
            port: output.port,
            spec,
            body: FilledIn::Inline(ByteBuf::from(bytes)),
        }),
        OutputBody::Segment { .. } => Err(host_failed("a prepared call left no bytes")),
    });
    Ok(Outcome::Filled(
        outputs.collect::<Result<_, _>>()?,
        done.report,
    ))
}

impl Worker {
    /// # Errors
    /// The host is gone.
    pub(super) fn prepare(
        &self,
        lane: &mut Channel,
        number: u64,
        run: Run,
        fds: Vec<OwnedFd>,
    ) -> io::Result<()> {
        let (deadline, of_run) = (deadline(run.left_us), run.run);
        let ready = self.cancellable(of_run, |cancel| {
            let (job, inputs) = self.job(run, &mut fds.into_iter())?;
            self.engine.ready(job, inputs, deadline, cancel)
        });
        let ready = match ready {
            Ok(ready) => ready,
            Err(failed) => return self.tell_end(lane, Err(failed)),
        };
        let (outputs, bytes) = (ready.outputs(), ready.waiting_bytes());
        let ready = Arc::new(Mutex::new(ready));
        self.prepared.lock().insert(number, ready);
        self.tell_end(lane, Ok(Outcome::Specs(outputs)))?;
        lane.send(&Answer::Waits(bytes), &[])
    }

    /// # Errors
    /// The host is gone.
    pub(super) fn call(&self, lane: &mut Channel, call: Call) -> io::Result<()> {
        let deadline = deadline(call.left_us);
        self.with(lane, (call.prepared, call.run), |ready, _, cancel| {
            let brought = Bring::into_brought(call.brought);
            outputs(ready.run(brought, deadline, cancel)?)
        })
    }

    /// # Errors
    /// The host is gone, or has nobody for the stream any more.
    fn stream(&self, lane: &mut Channel) -> io::Result<()> {
        let Ok((Ask::Stream(call), _)) = lane.receive(ASK_BYTES_MAX, 0, None) else {
            return Ok(());
        };
        self.with(lane, (call.prepared, call.run), |ready, lane, cancel| {
            let mut fed = Fed {
                worker: self,
                lane,
                deadline: Instant::now(),
            };
            ready.stream(&mut fed, cancel).map(Outcome::Streamed)
        })
    }

    /// Does `work` with what is prepared, tells what came of it, and makes it ready again.
    fn with(
        &self,
        lane: &mut Channel,
        (prepared, run): (u64, u64),
        work: impl FnOnce(&mut dyn Ready, &mut Channel, &CancelToken) -> Result<Outcome, Failed>,
    ) -> io::Result<()> {
        let ready = self.prepared.lock().get(&prepared).cloned();
        let Some(ready) = ready else {
            self.tell_end(lane, Err(host_failed("it is not prepared")))?;
            return lane.send(&Answer::Waits(0), &[]);
        };
        let mut ready = ready.lock();
        let outcome = self.cancellable(run, |cancel| work(&mut **ready, lane, cancel));
        self.tell_end(lane, outcome)?;
        // What it fails of the next run is told.
        let _ = caught(|| ready.renew());
        lane.send(&Answer::Waits(ready.waiting_bytes()), &[])
    }

    fn cancellable<R>(
        &self,
        run: u64,
        work: impl FnOnce(&CancelToken) -> Result<R, Failed>,
    ) -> Result<R, Failed> {
        let cancel = self.cancels.lock().begin(run);
        let outcome = caught(|| work(&cancel));
        self.cancels.lock().running.remove(&run);
        outcome
    }

    fn tell_end(&self, lane: &mut Channel, outcome: Result<Outcome, Failed>) -> io::Result<()> {
        let ended = self.ended(outcome, Vec::new());
        lane.send(&Answer::Ended(Box::new(ended)), &[])
    }

    /// Threads for `count` streams at a time, whose lanes come one after the other.
    pub(super) fn begin_streams(
        self: &Arc<Self>,
        count: usize,
        lanes: mpsc::Receiver<Channel>,
    ) -> Result<(), String> {
        let lanes = Arc::new(Mutex::new(lanes));
        for index in 0..count {
            let (worker, lanes) = (Arc::clone(self), Arc::clone(&lanes));
            let serve = move || {
                loop {
                    let lane = lanes.lock().recv();
                    let Ok(mut lane) = lane else { return };
                    // The host has heard, or is not there any more.
                    let _ = worker.stream(&mut lane);
                }
            };
            std::thread::Builder::new()
                .name(format!("strait-stream-{index}"))
                .spawn(serve)
                .map_err(|e| e.to_string())?;
        }
        Ok(())
    }
}

/// The host's side of a stream.
struct Fed<'a> {
    worker: &'a Worker,
    lane: &'a mut Channel,
    deadline: Instant,
}

impl Fed<'_> {
    fn hear(&mut self) -> Result<Ask, Cause> {
        let heard = self.lane.receive(ASK_BYTES_MAX, 0, None);
        heard.map(|(ask, _)| ask).map_err(|_| Cause::Cancelled)
    }

    fn tell(&mut self, answer: &Answer) -> Result<(), Cause> {
        self.lane.send(answer, &[]).map_err(|_| Cause::Cancelled)
    }

    /// The host knows why it does not go on.
    fn go_on(&mut self) -> Result<Instant, Cause> {
        match self.hear()? {
            Ask::GoOn(left_us) => {
                self.deadline = deadline(left_us);
                Ok(self.deadline)
            }
            _ => Err(Cause::Cancelled),
        }
    }
}

impl Batches for Fed<'_> {
    fn next(&mut self) -> Result<Batch, Cause> {
        match self.hear()? {
            Ask::Chunk(chunk) => {
                let Chunk {
                    brought,
                    last,
                    left_us,
                } = *chunk;
                self.deadline = deadline(left_us);
                Ok(Batch {
                    brought: Bring::into_brought(brought),
                    last,
                    deadline: self.deadline,
                })
            }
            _ => Err(Cause::Cancelled),
        }
    }

    fn keeps(&mut self, bytes: u64) -> Result<(), Cause> {
        self.tell(&Answer::Keeps(bytes))?;
        self.go_on().map(drop)
    }

    fn give(&mut self, outputs: Vec<(TensorSpec, Vec<u8>)>, done: bool) -> Result<Instant, Cause> {
        let outputs = outputs.into_iter();
        let piece = Piece {
            outputs: outputs
                .map(|(spec, bytes)| (spec, ByteBuf::from(bytes)))
                .collect(),
            done,
            totals: self.worker.totals(),
        };
        self.tell(&Answer::Piece(Box::new(piece)))?;
        match done {
            true => Ok(self.deadline),
            false => self.go_on(),
        }
    }
}
