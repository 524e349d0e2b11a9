//! Prepared calls: `prepare`, `call_prepared`.

use std::collections::HashMap;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Map, Value, json};
use strait_client::wire::PreparedTensor;
use strait_client::{CallInput, Elements, Param, Prepared, TensorSpec};

use super::{Answer, Driver, Failed, Handle, described, once, view};

#[derive(Deserialize)]
pub(super) struct PrepareRequest {
    r#as: String,
    kernel: String,
    inputs: Map<String, Value>,
    #[serde(default)]
    parameters: Map<String, Value>,
    deadline_ms: Option<u64>,
    request_id: Option<String>,
}

#[derive(Deserialize)]
pub(super) struct CallPrepared {
    prepared: String,
    inputs: Map<String, Value>,
    #[serde(default)]
    files: HashMap<String, String>,
    cancel_after_ms: Option<u64>,
    #[serde(default = "once")]
    repeat: u32,
}

/// Ports as the runner is told of them.
pub(super) fn told(tensors: &[PreparedTensor]) -> Vec<Value> {
    let one = |tensor: &PreparedTensor| json!({"port": tensor.port, "dtype": tensor.dtype, "shape": tensor.shape});
    tensors.iter().map(one).collect()
}

impl Driver {
    pub(super) fn prepare(&mut self, request: PrepareRequest) -> Answer {
        let client = self.client_as(request.request_id.as_deref())?;
        let mut specs = Vec::new();
        for (port, input) in &request.inputs {
            if input["dtype"].is_string() {
                let spec: TensorSpec = serde_json::from_value(input.clone())?;
                specs.push((port, spec));
            }
        }
        let mut prepare = client.prepare(&request.kernel);
        for (port, spec) in &specs {
            prepare = prepare.input(port, spec);
        }
        for (port, input) in &request.inputs {
            prepare = match (input.as_str(), input["handle"].as_str()) {
                (Some(flight), _) => prepare.fixed(port, flight),
                (None, Some(name)) => match self.handle(name)? {
                    Handle::Open(segment) => prepare.fixed(port, segment),
                    Handle::Given(output) => prepare.fixed(port, output),
                    Handle::Ordinary(spec, data) => {
                        prepare.fixed(port, CallInput::of_bytes(spec, data))
                    }
                    Handle::Released => return Err(Failed::Released(name.to_owned())),
                },
                // A spec.
                (None, None) => prepare,
            };
        }
        for (name, value) in &request.parameters {
            prepare = prepare.param(name, Param::from(value.clone()));
        }
        if let Some(milliseconds) = request.deadline_ms {
            prepare = prepare.deadline(Duration::from_millis(milliseconds));
        }
        let prepared = prepare.send()?;
        let answer =
            json!({"inputs": told(prepared.inputs()), "outputs": told(prepared.outputs())});
        self.prepared.insert(request.r#as, prepared);
        Ok(answer)
    }

    pub(super) fn call_prepared(&mut self, request: &CallPrepared) -> Answer {
        let missing = || Failed::Driver(format!("nothing is prepared as {}", request.prepared));
        let mut prepared = self
            .prepared
            .remove(&request.prepared)
            .ok_or_else(missing)?;
        let answer = self.call_one(&mut prepared, request);
        self.prepared.insert(request.prepared.clone(), prepared);
        answer
    }

    /// The dtype, shape and bytes of an input that is a handle.
    pub(super) fn elements(&self, input: &Value) -> Result<(TensorSpec, &[u8]), Failed> {
        let name = input["handle"].as_str().unwrap_or_default();
        Ok(match self.handle(name)? {
            Handle::Ordinary(spec, data) => (spec.clone(), data.as_slice()),
            handle => {
                let tensor = view(handle)?;
                let spec = TensorSpec {
                    dtype: tensor.dtype(),
                    shape: tensor.shape().to_vec(),
                };
                (spec, tensor.bytes())
            }
        })
    }

    fn call_one(&self, prepared: &mut Prepared, request: &CallPrepared) -> Answer {
        let client = self.client()?;
        let before = client.copied_bytes();
        // By position: those that are brought, then any others.
        let ports: Vec<String> = prepared.inputs().iter().map(|t| t.port.clone()).collect();
        let known = ports.iter().filter_map(|port| request.inputs.get(port));
        let others = request
            .inputs
            .iter()
            .filter(|(port, _)| !ports.contains(port));
        let mut tensors = Vec::new();
        for input in known.chain(others.map(|(_, input)| input)) {
            tensors.push(self.elements(input)?);
        }
        let elements: Vec<_> = tensors
            .iter()
            .map(|(spec, bytes)| Elements::of_tensor(spec, bytes))
            .collect();
        let (number, over) = (prepared.number(), AtomicBool::new(false));
        let mut seconds = Vec::new();
        let mut answer = json!({});
        thread::scope(|scope| {
            // The next call does not begin before the last cancel was answered.
            if let Some(milliseconds) = request.cancel_after_ms {
                let over = &over;
                scope.spawn(move || {
                    thread::sleep(Duration::from_millis(milliseconds));
                    // One that comes before the host has taken the call finds nothing to end.
                    while !over.load(Relaxed) && !client.cancel_prepared(number).unwrap_or(true) {
                        thread::sleep(Duration::from_millis(2));
                    }
                });
            }
            let mut run = || -> Result<(), Failed> {
                for _ in 0..request.repeat.max(1) {
                    let start = Instant::now();
                    let result = prepared.call(&elements)?;
                    seconds.push(start.elapsed().as_secs_f64());
                    let mut outputs = Map::new();
                    let ports = result.ports();
                    for port in ports {
                        let tensor = result.tensor(port)?;
                        if let Some(file) = request.files.get(port) {
                            fs::write(file, tensor.bytes())?;
                        }
                        outputs.insert(port.to_owned(), described(&tensor)?);
                    }
                    let notes = result
                        .notes
                        .iter()
                        .map(|note| json!({"key": note.key, "text": note.text}));
                    let notes: Vec<_> = notes.collect();
                    answer = json!({"outputs": outputs, "notes": notes});
                }
                Ok(())
            };
            let ended = run();
            over.store(true, Relaxed);
            ended
        })?;
        answer["client_copied_bytes"] = (client.copied_bytes() - before).into();
        answer["seconds"] = json!(seconds);
        Ok(answer)
    }
}
