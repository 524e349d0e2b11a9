//! Kernels that are made ready once, for calls; what operations borrow.

use std::ffi::{CString, c_char};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Waker};

use parking_lot::{Mutex, MutexGuard};
use strait_client::wire::PreparedTensor;
use strait_client::{Client as Connected, Elements, Prepared as Calls, TensorSpec};

use crate::answer::Notes;
use crate::call::{Call, Ready};
use crate::failure::{Failure, asked, c_text, end, entry};
use crate::operation::{Lane, Operation, Outcome, done, hand_out_started, ready};
use crate::pointer::{Lent, Many, Room, StaticText, Text, answer, hand_out, hand_out_text};
use crate::tensor::Tensor;

/// A kernel that is ready to be called again and again on small tensors. It has a socket of its own.
pub struct Prepared(Arc<Slot>);

/// Where something is that an operation takes while it is under way.
pub(crate) struct Bay<T>(Mutex<Berth<T>>);

enum Berth<T> {
    Here(T),
    Lent,
    /// The operation was given up.
    Gone,
}

impl<T> Bay<T> {
    pub(crate) fn new(has: T) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Berth::Here(has))))
    }

    /// Does something with it here and now; others wait.
    pub(crate) fn with<R>(
        &self,
        run: impl FnOnce(&mut T) -> Result<R, Failure>,
    ) -> Result<R, Failure> {
        match &mut *self.0.lock() {
            Berth::Here(has) => run(has),
            Berth::Lent => Err(lent()),
            Berth::Gone => Err(gone()),
        }
    }

    /// Lends it to an operation, once `send` succeeded with it.
    pub(crate) fn lend<R>(
        self: &Arc<Self>,
        send: impl FnOnce(&mut T) -> Result<R, Failure>,
    ) -> Result<(Borrowed<T>, R), Failure> {
        let mut berth: MutexGuard<'_, Berth<T>> = self.0.lock();
        let sent = match &mut *berth {
            Berth::Here(has) => send(has)?,
            Berth::Lent => return Err(lent()),
            Berth::Gone => return Err(gone()),
        };
        let Berth::Here(has) = std::mem::replace(&mut *berth, Berth::Lent) else {
            return Err(lent());
        };
        let borrowed = Borrowed {
            has: Some(has),
            home: Arc::clone(self),
        };
        Ok((borrowed, sent))
    }
}

fn lent() -> Failure {
    Failure::state("an operation on it is under way; finish that first")
}

pub(crate) fn gone() -> Failure {
    Failure::state(
        "an operation on it was given up before its end, and with it what was prepared; prepare it again",
    )
}

/// Something in the hands of an operation.
pub(crate) struct Borrowed<T> {
    /// Empty once it is back.
    pub(crate) has: Option<T>,
    home: Arc<Bay<T>>,
}

impl<T> Borrowed<T> {
    pub(crate) fn get(&mut self) -> Result<&mut T, Failure> {
        self.has.as_mut().ok_or_else(gone)
    }

    pub(crate) fn give_back(&mut self) {
        if let Some(has) = self.has.take() {
            *self.home.0.lock() = Berth::Here(has);
        }
    }
}

impl<T> Drop for Borrowed<T> {
    fn drop(&mut self) {
        if self.has.is_some() {
            *self.home.0.lock() = Berth::Gone;
        }
    }
}

pub(crate) fn named(tensors: &[PreparedTensor]) -> Vec<(CString, PreparedTensor)> {
    let one = |tensor: &PreparedTensor| (c_text(&*tensor.port), tensor.clone());
    tensors.iter().map(one).collect()
}

pub(crate) fn spec_at(
    tensors: &[(CString, PreparedTensor)],
    index: usize,
) -> Result<Tensor, Failure> {
    let found = tensors.get(index).ok_or_else(|| {
        Failure::argument(format!(
            "number {index} of {}, counted from 0",
            tensors.len()
        ))
    });
    let (name, tensor) = found?;
    Ok(Tensor::spec_of(
        name,
        tensor.dtype,
        &tensor.shape,
        tensor.length,
    ))
}

/// Elements that C brings, as the client takes them.
pub(crate) struct Brought(Vec<(TensorSpec, Lent)>);

impl Brought {
    pub(crate) fn new(inputs: &Many<Tensor>, count: usize) -> Result<Self, Failure> {
        let inputs = inputs.of(count, "inputs")?;
        let each = inputs.iter().enumerate();
        let each = each.map(|(index, input)| input.elements(&format!("input {index}")));
        Ok(Self(each.collect::<Result<_, _>>()?))
    }

    pub(crate) fn elements(&self) -> Vec<Elements<'_>> {
        let each = self.0.iter();
        each.map(|(spec, lent)| Elements::of_tensor(spec, lent.bytes()))
            .collect()
    }
}

/// What is prepared for calls, with what the last of them gave.
pub(crate) struct Slot {
    calls: Arc<Bay<Calls>>,
    number: u64,
    client: Connected,
    inputs: Vec<(CString, PreparedTensor)>,
    outputs: Vec<(CString, PreparedTensor)>,
    last: Mutex<Last>,
}

#[derive(Default)]
struct Last {
    /// The shape of each, and where it is.
    outputs: Vec<(Vec<u64>, Lent)>,
    notes: Notes,
}

impl Slot {
    fn new(client: Connected, calls: Calls) -> Arc<Self> {
        Arc::new(Self {
            number: calls.number(),
            client,
            inputs: named(calls.inputs()),
            outputs: named(calls.outputs()),
            calls: Bay::new(calls),
            last: Mutex::default(),
        })
    }

    /// Takes the reply to the call that was begun.
    fn end(&self, calls: &mut Calls) -> Result<(), Failure> {
        let mut last = self.last.lock();
        last.outputs.clear();
        last.notes = Notes::default();
        let result = calls.end()?;
        for (_, output) in &self.outputs {
            let tensor = result.tensor(&output.port)?;
            let shown = (tensor.shape().to_vec(), Lent::shown(tensor.bytes()));
            last.outputs.push(shown);
        }
        last.notes = Notes::new(&result.notes);
        Ok(())
    }

    /// Shows C what the last call gave.
    pub(crate) fn outputs(&self, outputs: Room<Tensor>, count: usize) -> Result<(), Failure> {
        if count < self.outputs.len() {
            return Err(Failure::argument(format!(
                "room for {count} outputs; the kernel has {}",
                self.outputs.len()
            )));
        }
        let last = self.last.lock();
        let shown = self.outputs.iter().zip(&last.outputs);
        let shown = shown
            .map(|((name, output), (shape, at))| Tensor::shown(name, output.dtype, shape, *at));
        outputs.write(count, &shown.collect::<Vec<_>>(), "outputs")
    }
}

/// Asks the host to end what was given up, and does not wait for its answer.
pub(crate) fn cancel(client: &Connected, number: u64) {
    let client = client.asynchronous();
    let asked = pin!(client.cancel_prepared(number));
    // The request is sent here; that it cannot be is the end of the connection, and of what it was to end.
    let _ = asked.poll(&mut Context::from_waker(Waker::noop()));
}

/// A call of what is prepared, under way.
struct Calling {
    slot: Arc<Slot>,
    calls: Borrowed<Calls>,
}

impl Drop for Calling {
    fn drop(&mut self) {
        if self.calls.has.is_some() {
            cancel(&self.slot.client, self.slot.number);
        }
    }
}

impl Lane for Calling {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.calls.has.as_ref().map(AsFd::as_fd)
    }

    fn advance(&mut self, wait: bool) -> Result<Option<Outcome>, Failure> {
        let calls = self.calls.get()?;
        if !ready(calls.as_fd(), wait)? {
            return Ok(None);
        }
        let ended = self.slot.end(calls);
        self.calls.give_back();
        ended?;
        done(Arc::clone(&self.slot)).map(Some)
    }
}

impl Prepared {
    fn of(prepared: Option<&Self>) -> Result<&Arc<Slot>, Failure> {
        Ok(&prepared.ok_or_else(|| Failure::null("prepared"))?.0)
    }
}

impl Ready {
    async fn prepare(self) -> Result<Prepared, Failure> {
        let client = self.client()?;
        let asynchronous = client.asynchronous();
        let prepare = self.dress_prepare(asynchronous.prepare(self.kernel()));
        let calls = prepare.send().await?;
        Ok(Prepared(Slot::new(client, calls)))
    }
}

/// Makes a kernel ready to be called again and again: `call` says which, with what parameters, which inputs each call brings (strait_call_each), and
/// which are the same for all. The inputs that calls bring and the outputs have at most 131072 bytes together, each way.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_prepare(
    call: Option<&Call>,
    prepared: Option<&mut MaybeUninit<*mut Prepared>>,
) -> Option<Box<Failure>> {
    entry(|| {
        hand_out(prepared, "prepared", || {
            let ready = Call::ready_to_prepare(call)?;
            let client = ready.client()?;
            let calls = ready.dress_prepare(client.prepare(ready.kernel())).send()?;
            Ok(Prepared(Slot::new(client.clone(), calls)))
        })
    })
}

/// Starts a strait_prepare; strait_finish_prepared ends it.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_prepare_start(
    call: Option<&Call>,
    operation: Option<&mut MaybeUninit<*mut Operation>>,
) -> Option<Box<Failure>> {
    hand_out_started(operation, || {
        let ready = Call::ready_to_prepare(call)?;
        Operation::start(async move { done(ready.prepare().await?) })
    })
}

/// How many inputs each call brings; 0 for NULL.
#[unsafe(no_mangle)]
pub extern "C" fn strait_prepared_inputs(prepared: Option<&Prepared>) -> usize {
    asked(prepared, 0, |prepared| prepared.0.inputs.len())
}

/// Port and spec, at its largest, of the input at `index`, in the order in which calls bring them.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_prepared_input(
    prepared: Option<&Prepared>,
    index: usize,
    spec: Option<&mut MaybeUninit<Tensor>>,
) -> Option<Box<Failure>> {
    entry(|| {
        answer(spec, Tensor::NONE, "spec", || {
            spec_at(&Prepared::of(prepared)?.inputs, index)
        })
    })
}

/// How many outputs the kernel has; 0 for NULL.
#[unsafe(no_mangle)]
pub extern "C" fn strait_prepared_outputs(prepared: Option<&Prepared>) -> usize {
    asked(prepared, 0, |prepared| prepared.0.outputs.len())
}

/// Port and spec, at its largest, of the output at `index`, in the kernel's order.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_prepared_output(
    prepared: Option<&Prepared>,
    index: usize,
    spec: Option<&mut MaybeUninit<Tensor>>,
) -> Option<Box<Failure>> {
    entry(|| {
        answer(spec, Tensor::NONE, "spec", || {
            spec_at(&Prepared::of(prepared)?.outputs, index)
        })
    })
}

/// Runs the kernel on `inputs`, in the order of strait_prepared_input, and waits for its results: `outputs`, which must have room for at least as many
/// tensors as there are outputs, shows them until the next call of the same handle. Calls from several threads wait for each other, and overwrite each
/// other's outputs: threads that call at once should each prepare their own. A kernel that fails does not affect later calls.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_prepared_call(
    prepared: Option<&Prepared>,
    inputs: Many<Tensor>,
    input_count: usize,
    outputs: Room<Tensor>,
    output_count: usize,
) -> Option<Box<Failure>> {
    entry(|| {
        let slot = Prepared::of(prepared)?;
        let brought = Brought::new(&inputs, input_count)?;
        slot.calls.with(|calls| {
            calls.begin(&brought.elements())?;
            slot.end(calls)
        })?;
        slot.outputs(outputs, output_count)
    })
}

/// Starts a strait_prepared_call; strait_finish_outputs ends it. The inputs have been sent when this returns.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_prepared_call_start(
    prepared: Option<&Prepared>,
    inputs: Many<Tensor>,
    input_count: usize,
    operation: Option<&mut MaybeUninit<*mut Operation>>,
) -> Option<Box<Failure>> {
    hand_out_started(operation, || {
        let slot = Prepared::of(prepared)?;
        let brought = Brought::new(&inputs, input_count)?;
        let begin = |calls: &mut Calls| Ok(calls.begin(&brought.elements())?);
        let (calls, ()) = slot.calls.lend(begin)?;
        let slot = Arc::clone(slot);
        Operation::on(Calling { slot, calls })
    })
}

/// The kernel's note under that key in the last call, valid until the next call; NULL if there is none.
#[unsafe(no_mangle)]
pub extern "C" fn strait_prepared_note(prepared: Option<&Prepared>, key: Text) -> StaticText {
    asked(prepared, StaticText::NULL, |prepared| {
        prepared.0.last.lock().notes.text(&key)
    })
}

/// What else the host told of the last call, a JSON object: "notes", all of them, as INVOKE of docs/protocol.md has them. strait_text_free frees the text.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_prepared_report(
    prepared: Option<&Prepared>,
    text: Option<&mut MaybeUninit<*mut c_char>>,
) -> Option<Box<Failure>> {
    entry(|| {
        hand_out_text(text, "text", || {
            Ok(Prepared::of(prepared)?.last.lock().notes.report())
        })
    })
}

/// Asks the host to end the call that is under way, which then fails with CANCELLED. `cancelled` (may be NULL) says whether there was one that the host
/// had begun: if not, ask again until the call is answered, and do not call again before this has returned.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_prepared_cancel(
    prepared: Option<&Prepared>,
    cancelled: Option<&mut MaybeUninit<bool>>,
) -> Option<Box<Failure>> {
    entry(|| {
        let slot = Prepared::of(prepared)?;
        let ended = slot.client.cancel_prepared(slot.number)?;
        cancelled.map_or(Ok(()), |out| {
            answer(Some(out), false, "cancelled", || Ok(ended))
        })
    })
}

/// Ends a prepared kernel, in the host too, and frees the outputs of its last call. NULL is fine.
#[unsafe(no_mangle)]
pub extern "C" fn strait_prepared_free(prepared: Option<Box<Prepared>>) {
    end(prepared);
}
