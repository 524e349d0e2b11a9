//! A guest that can be called: store, instance, and what it means when a call does not come back.

use std::sync::Arc;
use std::time::{Duration, Instant};

use strait_memory::FaultRange;
use wasmtime::{Store, UpdateDeadline, WasmBacktrace};

use super::abi::{self, Guest, types};
use super::error::{Broken, Cause, Limit, Refusal, Stage};
use super::fault::{self, Faults};
use super::guest_memory::{GuestMemory, collect};
use super::job::CancelToken;
use super::leash::{Leash, Until};
use super::limits::{Limits, Stop};
use super::panicked::Panic;
use super::regions::Regions;
use super::state::State;
use super::ticker::Ticking;
use super::{Compiled, Engine, Failed, Interruption};
use crate::plugin::Description;
use crate::text::{self, BACKTRACE_BYTES_MAX};

/// Most bytes that a failing kernel hands over.
const DIAGNOSTIC_BYTES_MAX: usize = 4096;
/// Longest name or reason of a guest, in bytes.
const WORDS_BYTES_MAX: usize = 1024;
const INSTANTIATED: &str = "there is no instance without its regions";

/// A guest that nobody calls now: it is in its first state, or waits for the call that it has been made ready for.
pub(super) struct Made {
    guest: Guest,
    store: Store<State>,
    /// Of its memory, in its first state.
    bytes: u64,
}

impl Made {
    /// In its first state; `leash` ends its start function.
    ///
    /// # Errors
    /// That failed, or it is of another contract.
    pub(super) fn new(
        engine: &Engine,
        compiled: &Compiled,
        state: State,
        leash: &Arc<Leash>,
    ) -> Result<Self, Broken> {
        const STAGE: Stage = Stage::Instantiate;
        let mut store = Store::new(&engine.wasmtime, state);
        store.limiter(|state| state);
        check(engine, &mut store, leash);
        let (plugin, mut made) = collect(|| leash.around(|| compiled.pre.instantiate(&mut store)));
        let plugin = plugin.map_err(|error| match error.is::<wasmtime::Trap>() || error.is::<Stop>() {
            true => STAGE.broke(stopped(&error, leash.stopped())),
            false => STAGE.broken_contract(format!(
                "it does not fit this host's strait:kernel: {}; build the plugin again with this version's SDK",
                error.root_cause()
            )),
        })?;
        let memory = made
            .pop()
            .ok_or_else(|| STAGE.broken_contract("the plugin has no linear memory of its own"))?;
        let bytes = memory.size() as u64;
        store.data_mut().regions = Some(Regions::new(memory));
        Ok(Self {
            bytes,
            guest: plugin.strait_kernel_kernels().clone(),
            store,
        })
    }

    /// Bytes of its memory.
    pub(super) fn memory_bytes(&self) -> u64 {
        self.bytes
    }

    /// Its memory as it is now.
    pub(super) fn memory(&self) -> &Arc<GuestMemory> {
        self.store
            .data()
            .regions
            .as_ref()
            .expect(INSTANTIATED)
            .memory()
    }

    /// The same for a call that has `state`, and that `leash` ends.
    fn given(mut self, engine: &Engine, state: State, leash: &Arc<Leash>) -> Self {
        let before = self.store.data_mut();
        let (regions, allowance) = (before.regions.take(), before.allowance);
        *before = State {
            regions,
            allowance,
            ..state
        };
        check(engine, &mut self.store, leash);
        self
    }
}

/// Has a guest that checks ask `leash`.
fn check(engine: &Engine, store: &mut Store<State>, leash: &Arc<Leash>) {
    if engine.config.interruption == Interruption::Checks {
        let checking = Arc::clone(leash);
        store.epoch_deadline_callback(move |_| match checking.due() {
            Some(stop) => Err(stop.into()),
            None => Ok(UpdateDeadline::Continue(1)),
        });
        store.set_epoch_deadline(1);
    }
}

/// A guest ready for calls. Fields drop in order: the instance's store last of all that it needs.
pub(super) struct Instance {
    made: Made,
    /// Guest address of the panic record; 0: none.
    panic_record: u64,
    ticking: Ticking,
}

impl Instance {
    /// A fresh one, in its first state: `made`, if there is one.
    ///
    /// # Errors
    /// Its start function failed, or it is of another contract.
    pub(super) fn new(
        engine: &Engine,
        compiled: &Compiled,
        made: Option<Made>,
        state: State,
        until: Until,
        panic_record: u64,
    ) -> Result<Self, Broken> {
        let leash = Leash::new(
            until,
            Arc::clone(&state.faults),
            Arc::clone(&compiled.traps),
        );
        let ticking = engine
            .ticker
            .start(Arc::clone(&leash))
            .map_err(|e| Stage::Instantiate.host(e))?;
        let made = match made {
            Some(made) => made.given(engine, state, &leash),
            None => Made::new(engine, compiled, state, &leash)?,
        };
        Ok(Self {
            made,
            panic_record,
            ticking,
        })
    }

    /// Calls one of the guest's functions.
    ///
    /// # Errors
    /// The guest trapped or was ended.
    pub(super) fn call<R>(
        &mut self,
        stage: Stage,
        function: impl FnOnce(&Guest, &mut Store<State>) -> wasmtime::Result<R>,
    ) -> Result<R, Broken> {
        let leash = self.ticking.leash();
        let called = leash.around(|| function(&self.made.guest, &mut self.made.store));
        called.map_err(|error| {
            let mut cause = stopped(&error, leash.stopped());
            if let Cause::Trap { panic, .. } = &mut cause {
                *panic = Panic::read(self.regions(), self.panic_record).map(Box::new);
            }
            stage.broke(cause)
        })
    }

    /// Why `run` failed, in the kernel's words.
    ///
    /// # Errors
    /// `last-error` itself failed.
    pub(super) fn last_error(&mut self) -> Result<Cause, Broken> {
        const STAGE: Stage = Stage::LastError;
        let failure = self.call(STAGE, |guest, store| guest.call_last_error(store))?;
        let bytes = failure.diagnostic.len();
        if bytes > DIAGNOSTIC_BYTES_MAX {
            return Err(STAGE.broken_contract(format!(
                "a diagnostic of {bytes} bytes, at most {DIAGNOSTIC_BYTES_MAX} are allowed"
            )));
        }
        Ok(refused(failure.error, failure.diagnostic))
    }

    /// What another call can go on with, if it is brought back to where it was.
    pub(super) fn rest(self) -> Made {
        self.made
    }

    /// Bytes that its memory had before anybody called it.
    pub(super) fn first_bytes(&self) -> u64 {
        self.made.memory_bytes()
    }

    pub(super) fn regions(&self) -> &Regions {
        self.made.store.data().regions.as_ref().expect(INSTANTIATED)
    }

    pub(super) fn regions_mut(&mut self) -> &mut Regions {
        self.made
            .store
            .data_mut()
            .regions
            .as_mut()
            .expect(INSTANTIATED)
    }

    pub(super) fn faults(&self) -> &Arc<Faults> {
        &self.made.store.data().faults
    }

    /// From now on it runs until `deadline`.
    pub(super) fn extend(&self, deadline: Instant) {
        self.ticking.leash().extend(deadline);
    }

    /// Lets the memory grow by `bytes` beyond what the guest may have for itself.
    pub(super) fn allow(&mut self, bytes: u64) {
        self.made.store.data_mut().allowance = bytes;
    }

    /// Runs `steps` with an eye on the read-only windows `ranges`.
    pub(super) fn watched<R>(
        &mut self,
        compiled: &Compiled,
        ranges: Vec<FaultRange>,
        steps: impl FnOnce(&mut Self) -> R,
    ) -> R {
        self.watch(compiled, ranges);
        let result = steps(self);
        self.unwatch();
        result
    }

    /// From now on an eye is kept on the read-only windows `ranges`, until [`Self::unwatch`], before they move home.
    pub(super) fn watch(&mut self, compiled: &Compiled, ranges: Vec<FaultRange>) {
        let (engine, seen) = (self.made.store.engine().clone(), Arc::clone(self.faults()));
        fault::watch(
            &mut self.made.store,
            engine,
            Arc::clone(&compiled.traps),
            ranges,
            seen,
        );
    }

    /// See [`Self::watch`].
    pub(super) fn unwatch(&mut self) {
        fault::unwatch(&mut self.made.store);
    }
}

/// What a failed call of a guest means, which was perhaps sent to a trap for a reason. A trap's panic is not known here.
fn stopped(error: &wasmtime::Error, pulled: Option<&Stop>) -> Cause {
    let limited = |limit, asked: &u64, most: &u64| Cause::Limit {
        limit,
        asked: *asked,
        most: *most,
    };
    match pulled.or_else(|| error.downcast_ref::<Stop>()) {
        Some(Stop::Cancelled) => return Cause::Cancelled,
        Some(Stop::Deadline(ms)) => return Cause::Deadline(*ms),
        Some(Stop::GuestBytes { asked, limit }) => return limited(Limit::Guest, asked, limit),
        Some(Stop::LogBytes { asked, limit }) => return limited(Limit::Log, asked, limit),
        Some(stop @ (Stop::LogRange(_) | Stop::Table { .. })) => {
            return Cause::Contract(stop.to_string());
        }
        // `run` says which one; no other call has inputs to write to.
        Some(Stop::InputWritten) => {}
        None => {}
    }
    let backtrace = error
        .downcast_ref::<WasmBacktrace>()
        .map(|backtrace| text::lines(backtrace.to_string(), BACKTRACE_BYTES_MAX));
    Cause::Trap {
        trap: error.root_cause().to_string(),
        panic: None,
        backtrace,
    }
}

/// A kernel's own error.
pub(super) fn refused(error: types::Error, diagnostic: Vec<u8>) -> Cause {
    let words = |text| text::one_line(text, WORDS_BYTES_MAX);
    let (refusal, reason) = match error {
        types::Error::BadArgument(bad) => (Refusal::Argument(words(bad.name)), bad.reason),
        types::Error::Unsupported(reason) => (Refusal::Unsupported, reason),
        types::Error::Failed(reason) => (Refusal::Failed, reason),
    };
    Cause::Refused {
        refusal,
        reason: words(reason),
        diagnostic,
    }
}

/// Asks a plugin what it offers.
pub(super) fn describe(engine: &Engine, compiled: &Compiled) -> Result<Description, Failed> {
    const STAGE: Stage = Stage::Describe;
    const DEADLINE_MS: u64 = 5000;
    let limits = Limits {
        guest_bytes: 64 << 20,
        window_bytes: 0,
        result_bytes: 0,
        log_bytes: 16 << 10,
    };
    let until = Until {
        deadline: Instant::now() + Duration::from_millis(DEADLINE_MS),
        deadline_ms: DEADLINE_MS,
        cancel: CancelToken::default(),
    };
    let state = State::new(limits, Arc::from("load"), Arc::from("(loading)"));
    // Where it leaves its panics is not known yet.
    Instance::new(engine, compiled, None, state, until, 0)
        .and_then(|mut instance| instance.call(STAGE, |guest, store| guest.call_describe(store)))
        .and_then(|answer| abi::description(answer).map_err(|e| STAGE.broken_contract(e)))
        .map_err(|broken| broken.of("(describe)"))
}
