//! Calls of kernels, and what they give.

use std::collections::BTreeMap;
use std::mem::MaybeUninit;
use std::sync::Arc;

use parking_lot::Mutex;
use serde_json::Value;
use strait_client::{
    Call as Request, CallInput, CancelHandle, Client as Connected, Output, Param, Prepare,
    TensorSpec,
};

use crate::answer::Answer;
use crate::client::{Client, milliseconds};
use crate::failure::{Failure, asked, end, entry};
use crate::operation::{Operation, done, hand_out_started};
use crate::pointer::{Lent, Many, Text, hand_out};
use crate::segment::{Held, Memory, Segment};
use crate::tensor::Tensor;

/// What to call a kernel with. It can be sent any number of times, even at once, and be changed in between.
#[derive(Debug)]
pub struct Call {
    client: Connected,
    plan: Mutex<Plan>,
    runs: Arc<Mutex<Runs>>,
}

#[derive(Clone, Debug)]
enum Input {
    /// A flight by name.
    Flight(String),
    Segment(Arc<Memory>, Option<String>),
    Elements(TensorSpec, Lent),
    /// What each call of a prepared kernel brings.
    Each(TensorSpec),
}

#[derive(Clone, Debug, Default)]
struct Plan {
    kernel: String,
    inputs: Vec<(String, Input)>,
    parameters: Vec<(String, Param)>,
    publish: Vec<(String, String)>,
    replace: bool,
    seal: bool,
    verify: bool,
    deadline_ms: u64,
    lease_ms: u64,
    inline_bytes: Option<u64>,
    request_id: Option<String>,
    idempotency_key: Option<String>,
}

/// A plan with what it needs for one run.
pub(crate) struct Ready {
    client: Connected,
    plan: Plan,
    /// In the place of each input that is a segment.
    held: Vec<Option<Arc<Held>>>,
}

impl Ready {
    /// Each input that is there, by port.
    fn inputs(&self) -> impl Iterator<Item = (&str, CallInput<'_>)> {
        let inputs = self.plan.inputs.iter().zip(&self.held);
        inputs.filter_map(|((port, input), held)| {
            let input = match (input, held.as_deref()) {
                (Input::Flight(name), _) => name.into(),
                (Input::Elements(spec, lent), _) => CallInput::of_bytes(spec, lent.bytes()),
                (Input::Segment(_, None), Some(Held::Open(segment))) => segment.into(),
                (Input::Segment(_, Some(tensor)), Some(Held::Open(segment))) => {
                    (segment, tensor.as_str()).into()
                }
                (Input::Segment(_, Some(tensor)), Some(Held::Given(Output::Mapped(segment)))) => {
                    (segment, tensor.as_str()).into()
                }
                (Input::Segment(..), Some(Held::Given(output))) => output.into(),
                (Input::Segment(..), None) | (Input::Each(_), _) => return None,
            };
            Some((port.as_str(), input))
        })
    }

    fn dress<'a, C>(&'a self, mut call: Request<'a, C>) -> Request<'a, C> {
        let plan = &self.plan;
        for (port, input) in self.inputs() {
            call = call.input(port, input);
        }
        for (name, value) in &plan.parameters {
            call = call.param(name, value.clone());
        }
        for (port, name) in &plan.publish {
            call = call.publish(port, name);
        }
        call = call
            .replace(plan.replace)
            .seal(plan.seal)
            .verify(plan.verify);
        if let Some(most) = plan.inline_bytes {
            call = call.inline_bytes(most);
        }
        if let Some(deadline) = milliseconds(plan.deadline_ms) {
            call = call.deadline(deadline);
        }
        if let Some(life) = milliseconds(plan.lease_ms) {
            call = call.lease(life);
        }
        if let Some(id) = &plan.request_id {
            call = call.request_id(id);
        }
        if let Some(key) = &plan.idempotency_key {
            call = call.idempotency_key(key);
        }
        call
    }

    pub(crate) fn client(&self) -> Result<Connected, Failure> {
        Ok(match &self.plan.request_id {
            Some(id) => self.client.with_request_id(id)?,
            None => self.client.clone(),
        })
    }

    pub(crate) fn kernel(&self) -> &str {
        &self.plan.kernel
    }

    pub(crate) fn dress_prepare<'a, C>(&'a self, mut prepare: Prepare<'a, C>) -> Prepare<'a, C> {
        for (port, input) in &self.plan.inputs {
            if let Input::Each(spec) = input {
                prepare = prepare.input(port, spec);
            }
        }
        for (port, input) in self.inputs() {
            prepare = prepare.fixed(port, input);
        }
        for (name, value) in &self.plan.parameters {
            prepare = prepare.param(name, value.clone());
        }
        match milliseconds(self.plan.deadline_ms) {
            Some(deadline) => prepare.deadline(deadline),
            None => prepare,
        }
    }
}

impl Plan {
    /// Gives a port its input, in the place of an earlier one.
    fn input(&mut self, port: &str, input: Input) {
        self.inputs.retain(|(known, _)| known != port);
        self.inputs.push((port.to_owned(), input));
    }
}

/// The runs of a call that are under way, by a number that no two of them have.
#[derive(Debug, Default)]
struct Runs {
    begun: u64,
    cancels: BTreeMap<u64, CancelHandle>,
}

/// One of them; it is taken out however the run ends.
struct UnderWay {
    runs: Arc<Mutex<Runs>>,
    number: u64,
}

impl UnderWay {
    /// Notes a run, so that it can be cancelled.
    fn new(runs: &Arc<Mutex<Runs>>, cancel: CancelHandle) -> Self {
        let mut noted = runs.lock();
        noted.begun += 1;
        let number = noted.begun;
        noted.cancels.insert(number, cancel);
        drop(noted);
        Self {
            runs: Arc::clone(runs),
            number,
        }
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.runs.lock().cancels.remove(&self.number);
    }
}

impl Call {
    fn ready(&self) -> Result<Ready, Failure> {
        let plan = self.plan.lock().clone();
        let held = plan.inputs.iter().map(|(_, input)| match input {
            Input::Segment(memory, _) => memory.share().map(Some),
            Input::Flight(_) | Input::Elements(..) | Input::Each(_) => Ok(None),
        });
        let held = held.collect::<Result<_, _>>()?;
        Ok(Ready {
            client: self.client.clone(),
            plan,
            held,
        })
    }

    fn ready_to_send(&self) -> Result<Ready, Failure> {
        let ready = self.ready()?;
        let each = |(_, input): &&(String, Input)| matches!(input, Input::Each(_));
        match ready.plan.inputs.iter().find(each) {
            Some((port, _)) => Err(Failure::argument(format!(
                "input `{port}` has a spec and no elements: that is for strait_prepare"
            ))),
            None => Ok(ready),
        }
    }

    pub(crate) fn ready_to_prepare(call: Option<&Self>) -> Result<Ready, Failure> {
        let ready = Self::of(call)?.ready()?;
        let plan = &ready.plan;
        let only_a_call = [
            ("publish", !plan.publish.is_empty()),
            ("seal", plan.seal),
            ("verify", plan.verify),
            ("lease", plan.lease_ms > 0),
            ("inline_bytes", plan.inline_bytes.is_some()),
            ("idempotency_key", plan.idempotency_key.is_some()),
        ];
        match only_a_call.iter().find(|(_, said)| *said) {
            Some((what, _)) => Err(Failure::argument(format!(
                "what is prepared has no {what}: that is for strait_call_send"
            ))),
            None => Ok(ready),
        }
    }

    fn of(call: Option<&Self>) -> Result<&Self, Failure> {
        call.ok_or_else(|| Failure::null("call"))
    }

    fn set(
        call: Option<&Self>,
        set: impl FnOnce(&mut Plan) -> Result<(), Failure>,
    ) -> Option<Box<Failure>> {
        entry(|| set(&mut Self::of(call)?.plan.lock()))
    }

    fn param(call: Option<&Self>, name: &Text, value: impl Into<Param>) -> Option<Box<Failure>> {
        Self::set(call, |plan| {
            let name = name.get("name")?;
            plan.parameters.retain(|(known, _)| known != name);
            plan.parameters.push((name.to_owned(), value.into()));
            Ok(())
        })
    }

    fn send(&self) -> Result<Answer, Failure> {
        let ready = self.ready_to_send()?;
        let call = ready.dress(ready.client.call(&ready.plan.kernel));
        let _run = UnderWay::new(&self.runs, call.cancel_handle());
        Ok(Answer::of_call(ready.client.clone(), call.send()?))
    }

    fn start(&self) -> Result<Operation, Failure> {
        let ready = self.ready_to_send()?;
        let client = ready.client.asynchronous();
        let runs = Arc::clone(&self.runs);
        Operation::start(async move {
            let call = ready.dress(client.call(&ready.plan.kernel));
            let _run = UnderWay::new(&runs, call.cancel_handle());
            let result = call.send().await?;
            done(Answer::of_call(ready.client.clone(), result))
        })
    }
}

/// Begins a call of `kernel`, or "plugin/kernel" if two plugins have one of that name. Nothing is sent yet.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_call_new(
    client: Option<&Client>,
    kernel: Text,
    call: Option<&mut MaybeUninit<*mut Call>>,
) -> Option<Box<Failure>> {
    entry(|| {
        hand_out(call, "call", || {
            let plan = Plan {
                kernel: kernel.get("kernel")?.to_owned(),
                ..Plan::default()
            };
            Ok(Call {
                client: Client::of(client)?.clone(),
                plan: Mutex::new(plan),
                runs: Arc::default(),
            })
        })
    })
}

/// Gives an input port a flight by name: "x", or "x#tensor" for one of its tensors.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_call_flight(
    call: Option<&Call>,
    port: Text,
    name: Text,
) -> Option<Box<Failure>> {
    Call::set(call, |plan| {
        plan.input(
            port.get("port")?,
            Input::Flight(name.get("name")?.to_owned()),
        );
        Ok(())
    })
}

/// Gives an input port a tensor of a segment (NULL: its only one). The segment may be freed before the call is sent.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_call_segment(
    call: Option<&Call>,
    port: Text,
    segment: Option<&Segment>,
    tensor: Text,
) -> Option<Box<Failure>> {
    Call::set(call, |plan| {
        let memory = Segment::of(segment)?.memory();
        let tensor = tensor.optional("tensor")?.map(str::to_owned);
        plan.input(port.get("port")?, Input::Segment(memory, tensor));
        Ok(())
    })
}

/// Gives an input port elements in the program's memory, which each run copies: small ones into its request, others into a segment. They must stay, and
/// not be written to while the call is under way, until strait_call_free and the end of every operation that it started.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_call_tensor(
    call: Option<&Call>,
    port: Text,
    tensor: Option<&Tensor>,
) -> Option<Box<Failure>> {
    Call::set(call, |plan| {
        let port = port.get("port")?;
        let tensor = tensor.ok_or_else(|| Failure::null("tensor"))?;
        let (spec, lent) = tensor.elements(&format!("input `{port}`"))?;
        plan.input(port, Input::Elements(spec, lent));
        Ok(())
    })
}

/// For strait_prepare and strait_prepare_stream: an input whose elements each call brings, at most as many along each axis as `spec` says; for a stream
/// the first axis is the largest number of rows in a chunk.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_call_each(
    call: Option<&Call>,
    port: Text,
    spec: Option<&Tensor>,
) -> Option<Box<Failure>> {
    Call::set(call, |plan| {
        let port = port.get("port")?;
        let spec = spec.ok_or_else(|| Failure::null("spec"))?;
        plan.input(port, Input::Each(spec.spec(&format!("input `{port}`"))?));
        Ok(())
    })
}

/// Gives a parameter an integer. It reaches the kernel exactly, as do the values of the functions below. An axis is 0-based and row-major.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_call_param_int(
    call: Option<&Call>,
    name: Text,
    value: i64,
) -> Option<Box<Failure>> {
    Call::param(call, &name, value)
}

/// Gives a parameter an integer that may be beyond INT64_MAX.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_call_param_uint(
    call: Option<&Call>,
    name: Text,
    value: u64,
) -> Option<Box<Failure>> {
    Call::param(call, &name, value)
}

/// Gives a parameter a real number, including NaN and the infinities.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_call_param_real(
    call: Option<&Call>,
    name: Text,
    value: f64,
) -> Option<Box<Failure>> {
    Call::param(call, &name, value)
}

/// Gives a parameter a truth value.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_call_param_bool(
    call: Option<&Call>,
    name: Text,
    value: bool,
) -> Option<Box<Failure>> {
    Call::param(call, &name, value)
}

/// Gives a parameter a text.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_call_param_text(
    call: Option<&Call>,
    name: Text,
    value: Text,
) -> Option<Box<Failure>> {
    match value.get("value") {
        Ok(value) => Call::param(call, &name, value),
        Err(failure) => Some(Box::new(failure)),
    }
}

/// Gives a parameter a list of `count` integers.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_call_param_ints(
    call: Option<&Call>,
    name: Text,
    values: Many<i64>,
    count: usize,
) -> Option<Box<Failure>> {
    match values.of(count, "values") {
        Ok(values) => Call::param(call, &name, Value::from(values)),
        Err(failure) => Some(Box::new(failure)),
    }
}

/// Gives a parameter a list of `count` real numbers.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_call_param_reals(
    call: Option<&Call>,
    name: Text,
    values: Many<f64>,
    count: usize,
) -> Option<Box<Failure>> {
    match values.of(count, "values") {
        Ok(values) => Call::param(call, &name, values),
        Err(failure) => Some(Box::new(failure)),
    }
}

/// Gives a parameter a value in JSON, such as a list that mixes integers and real numbers. "nan", "inf" and "-inf" stand for those numbers.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_call_param_json(
    call: Option<&Call>,
    name: Text,
    json: Text,
) -> Option<Box<Failure>> {
    let parsed = json.get("json").and_then(|text| {
        let value: Result<Value, _> = serde_json::from_str(text);
        value.map_err(|error| Failure::argument(format!("`json` is no JSON: {error}")))
    });
    match parsed {
        Ok(value) => Call::param(call, &name, value),
        Err(failure) => Some(Box::new(failure)),
    }
}

/// Gives an output a name, under which others find it. With `replace` the call may take its names from other flights.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_call_publish(
    call: Option<&Call>,
    port: Text,
    name: Text,
    replace: bool,
) -> Option<Box<Failure>> {
    Call::set(call, |plan| {
        let (port, name) = (port.get("port")?, name.get("name")?);
        plan.publish.retain(|(known, _)| known != port);
        plan.publish.push((port.to_owned(), name.to_owned()));
        plan.replace |= replace;
        Ok(())
    })
}

/// The outputs are sealed permanently, so that not even the host can write to them again.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_call_seal(call: Option<&Call>, seal: bool) -> Option<Box<Failure>> {
    Call::set(call, |plan| {
        plan.seal = seal;
        Ok(())
    })
}

/// The host looks up in its own maps which pages the guest saw: "pages" of strait_result_report.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_call_verify(call: Option<&Call>, verify: bool) -> Option<Box<Failure>> {
    Call::set(call, |plan| {
        plan.verify = verify;
        Ok(())
    })
}

/// Milliseconds of wall time for a run, from the host's receipt on; 0: the host's default. For a prepared kernel: for each call.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_call_deadline(call: Option<&Call>, ms: u64) -> Option<Box<Failure>> {
    Call::set(call, |plan| {
        plan.deadline_ms = ms;
        Ok(())
    })
}

/// Lifetime of the results' leases in milliseconds; 0: the client's.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_call_lease(call: Option<&Call>, ms: u64) -> Option<Box<Failure>> {
    Call::set(call, |plan| {
        plan.lease_ms = ms;
        Ok(())
    })
}

/// Bytes of the largest result that comes in the reply and not in a segment; 0: none does. Without this as many as the host allows.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_call_inline_bytes(call: Option<&Call>, most: u64) -> Option<Box<Failure>> {
    Call::set(call, |plan| {
        plan.inline_bytes = Some(most);
        Ok(())
    })
}

/// The id of the call in the host's log and in errors: 1 to 64 characters from A-Z a-z 0-9 . _ : -
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_call_request_id(call: Option<&Call>, id: Text) -> Option<Box<Failure>> {
    Call::set(call, |plan| {
        plan.request_id = Some(id.get("id")?.to_owned());
        Ok(())
    })
}

/// A repeat of the same call with the same key within a minute gets the same results without another run.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_call_idempotency_key(
    call: Option<&Call>,
    key: Text,
) -> Option<Box<Failure>> {
    Call::set(call, |plan| {
        plan.idempotency_key = Some(key.get("key")?.to_owned());
        Ok(())
    })
}

/// Runs the kernel and waits for its results.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_call_send(
    call: Option<&Call>,
    result: Option<&mut MaybeUninit<*mut Answer>>,
) -> Option<Box<Failure>> {
    entry(|| hand_out(result, "result", || Call::of(call)?.send()))
}

/// Starts a strait_call_send; strait_finish_result ends it, strait_operation_free cancels it. The call may be freed before.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_call_start(
    call: Option<&Call>,
    operation: Option<&mut MaybeUninit<*mut Operation>>,
) -> Option<Box<Failure>> {
    hand_out_started(operation, || Call::of(call)?.start())
}

/// Asks the host to end all runs of the call that are under way, in whatever thread; they fail with CANCELLED. No effect if there is none.
#[unsafe(no_mangle)]
pub extern "C" fn strait_call_cancel(call: Option<&Call>) {
    asked(call, (), |call| {
        let cancels: Vec<_> = call.runs.lock().cancels.values().cloned().collect();
        cancels.iter().for_each(CancelHandle::cancel);
    });
}

/// Ends a call; operations that it started go on. NULL is fine.
#[unsafe(no_mangle)]
pub extern "C" fn strait_call_free(call: Option<Box<Call>>) {
    end(call);
}
