//! The Rust client's conformance driver; `tests/conformance/README.md` says what it is asked.

mod channel;
mod prepared;

use std::collections::HashMap;
use std::fs;
use std::io::{self, BufRead, Write};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Map, Value, json};
use strait_client::{
    CallInput, CallResult, Client, Dtype, Error, NewTensor, OpenSegment, Options, Output, Param,
    Prepared, TensorPlace, TensorSpec, TensorView, address,
};

/// Why an operation has no answer: the client's word, or this driver's own mistake.
enum Failed {
    Client(Error),
    Released(String),
    Driver(String),
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self::Client(error)
    }
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Self {
        Self::Driver(error.to_string())
    }
}

impl From<serde_json::Error> for Failed {
    fn from(error: serde_json::Error) -> Self {
        Self::Driver(error.to_string())
    }
}

type Answer = Result<Value, Failed>;

enum Handle {
    Open(OpenSegment),
    Ordinary(TensorSpec, Vec<u8>),
    /// A flight, or a call's result.
    Given(Output),
    Released,
}

#[derive(Default)]
struct Driver {
    client: Option<Client>,
    handles: HashMap<String, Handle>,
    calls: AtomicU64,
    prepared: HashMap<String, Prepared>,
    kept: channel::Kept,
}

#[derive(Deserialize)]
struct Make {
    r#as: String,
    dtype: Dtype,
    shape: Vec<u64>,
    file: String,
    how: String,
}

#[derive(Deserialize)]
struct CallRequest {
    kernel: String,
    inputs: Map<String, Value>,
    #[serde(default)]
    parameters: Map<String, Value>,
    #[serde(default)]
    r#as: HashMap<String, String>,
    #[serde(default)]
    files: HashMap<String, String>,
    #[serde(default)]
    publish: HashMap<String, String>,
    #[serde(default)]
    replace: bool,
    deadline_ms: Option<u64>,
    lease_ms: Option<u64>,
    #[serde(default)]
    verify: bool,
    request_id: Option<String>,
    inline_bytes: Option<u64>,
    cancel_after_ms: Option<u64>,
    #[serde(default = "once")]
    repeat: u32,
}

fn once() -> u32 {
    1
}

impl Driver {
    fn answer(&mut self, op: &str, fields: Value) -> Answer {
        let text = |name: &str| {
            let found = fields[name].as_str().map(str::to_owned);
            found.ok_or_else(|| Failed::Driver(format!("{op} needs {name}")))
        };
        match op {
            "hello" => Ok(json!({
                "language": "rust",
                "client": concat!("strait-rust/", env!("CARGO_PKG_VERSION")),
                "fork": "unsupported",
                "channels": true,
            })),
            "connect" => self.connect(&text("address")?, fields["renew"].as_bool().unwrap_or(true)),
            "close" => {
                self.client()?.close();
                self.kept = channel::Kept::default();
                Ok(json!({}))
            }
            "make" => self.make(serde_json::from_value(fields)?),
            "put" => {
                let replace = fields["replace"].as_bool().unwrap_or(false);
                self.put(&text("handle")?, &text("name")?, replace)
            }
            "get" => self.get(text("as")?, &text("name")?, fields["lease_ms"].as_u64()),
            "read" => self.read(&text("handle")?, &text("file")?),
            "write" => self.write(&text("handle")?, &text("file")?),
            "call" => self.call_and_keep(serde_json::from_value(fields)?),
            "prepare" => self.prepare(serde_json::from_value(fields)?),
            "call_prepared" => self.call_prepared(&serde_json::from_value(fields)?),
            "close_prepared" => {
                self.prepared.remove(&text("prepared")?);
                Ok(json!({}))
            }
            "channel_produce" => self.channel_produce(serde_json::from_value(fields)?),
            "channel_read" => self.channel_read(serde_json::from_value(fields)?),
            "concurrent" => self.concurrent(&fields),
            "delete" => {
                self.client()?.drop_flight(&text("name")?)?;
                Ok(json!({}))
            }
            "list" => self.list(),
            "kernels" => self.kernels(),
            "stats" => Ok(json!({ "stats": self.client()?.stats()?.all })),
            "client_stats" => Ok(json!({
                "copied_bytes": self.copied()?,
                "calls": self.calls.load(Relaxed),
                "mappings": self.mappings(),
            })),
            "renew" => self.renew(&text("handle")?, fields["lease_ms"].as_u64()),
            "release" => self.release(text("handle")?),
            "forget" => {
                self.handles.remove(&text("handle")?);
                Ok(json!({}))
            }
            "fork" => Ok(json!({ "child": "unsupported" })),
            _ => Err(Failed::Driver(format!("unknown op {op}"))),
        }
    }

    fn connect(&mut self, address: &str, renew: bool) -> Answer {
        if let Some(client) = self.client.take() {
            client.close();
        }
        let directory = address::directory(Some(address)).map_err(Error::from)?;
        let options = Options {
            renew,
            ..Options::default()
        };
        let client = Client::connect_with(&directory, &options)?;
        let welcome = client.welcome();
        let answer = json!({ "host_id": welcome.host_id, "move_min_bytes": welcome.move_min_bytes, "inline_bytes": welcome.inline_bytes });
        self.client = Some(client);
        self.prepared.clear();
        self.kept = channel::Kept::default();
        self.calls = AtomicU64::new(0);
        Ok(answer)
    }

    fn client(&self) -> Result<&Client, Failed> {
        self.client
            .as_ref()
            .ok_or_else(|| Failed::Driver("not connected".into()))
    }

    /// The client, whose requests have that id.
    fn client_as(&self, request_id: Option<&str>) -> Result<Client, Failed> {
        Ok(match request_id {
            Some(id) => self.client()?.with_request_id(id)?,
            None => self.client()?.clone(),
        })
    }

    fn handle(&self, name: &str) -> Result<&Handle, Failed> {
        match self.handles.get(name) {
            None => Err(Failed::Driver(format!("no handle {name}"))),
            Some(Handle::Released) => Err(Failed::Released(name.to_owned())),
            Some(handle) => Ok(handle),
        }
    }

    fn copied(&self) -> Result<u64, Failed> {
        Ok(self.client()?.copied_bytes())
    }

    fn mappings(&self) -> usize {
        let mapped =
            |handle: &&Handle| matches!(handle, Handle::Open(_) | Handle::Given(Output::Mapped(_)));
        self.handles.values().filter(mapped).count()
    }

    fn make(&mut self, make: Make) -> Answer {
        let data = fs::read(&make.file)?;
        let spec = TensorSpec {
            dtype: make.dtype,
            shape: make.shape,
        };
        let handle = if make.how == "segment" {
            Handle::Open(self.fill(&spec, &data)?)
        } else {
            Handle::Ordinary(spec, data)
        };
        let answer = array(&handle)?;
        self.handles.insert(make.r#as, handle);
        Ok(answer)
    }

    fn fill(&self, spec: &TensorSpec, data: &[u8]) -> Result<OpenSegment, Failed> {
        let tensor = NewTensor {
            name: "x".into(),
            dtype: spec.dtype,
            shape: spec.shape.clone(),
        };
        let mut segment = self.client()?.create(&[tensor])?;
        overwrite(&mut segment, data)?;
        Ok(segment)
    }

    fn put(&mut self, handle: &str, name: &str, replace: bool) -> Answer {
        let before = self.copied()?;
        self.handle(handle)?;
        let client = self.client()?.clone();
        match self.handles.get_mut(handle) {
            Some(Handle::Open(segment)) => {
                segment.publish(name, replace)?;
            }
            Some(Handle::Given(output)) => {
                client.publish_result(output, name, replace)?;
            }
            Some(Handle::Ordinary(spec, data)) => {
                client.put_bytes(name, spec, data, replace)?;
            }
            Some(Handle::Released) | None => return Err(Failed::Released(handle.to_owned())),
        }
        Ok(json!({ "copied_bytes": self.copied()? - before }))
    }

    fn get(&mut self, r#as: String, name: &str, lease_ms: Option<u64>) -> Answer {
        let segment = self.client()?.map(name)?;
        if let Some(milliseconds) = lease_ms {
            let life = Duration::from_millis(milliseconds);
            self.client()?.renew(&[segment.lease()], Some(life))?;
        }
        let handle = Handle::Given(Output::Mapped(segment));
        let answer = array(&handle)?;
        self.handles.insert(r#as, handle);
        Ok(answer)
    }

    fn read(&self, handle: &str, file: &str) -> Answer {
        let handle = self.handle(handle)?;
        match handle {
            Handle::Ordinary(_, data) => fs::write(file, data)?,
            _ => fs::write(file, view(handle)?.bytes())?,
        }
        array(handle)
    }

    fn write(&mut self, handle: &str, file: &str) -> Answer {
        let data = fs::read(file)?;
        match self.handles.get_mut(handle) {
            Some(Handle::Open(segment)) => overwrite(segment, &data)?,
            _ => return Err(Failed::Driver(format!("{handle} is no segment to fill"))),
        }
        Ok(json!({}))
    }

    fn call_and_keep(&mut self, mut request: CallRequest) -> Answer {
        let keep = std::mem::take(&mut request.r#as);
        let (answer, mut result) = self.call(&request)?;
        for (port, handle) in keep {
            let output = result.take(&port)?;
            self.handles.insert(handle, Handle::Given(output));
        }
        Ok(answer)
    }

    fn call(&self, request: &CallRequest) -> Result<(Value, CallResult), Failed> {
        let mut seconds = Vec::new();
        let mut copied = 0;
        let mut last = None;
        for _ in 0..request.repeat.max(1) {
            drop(last.take());
            let start = Instant::now();
            let (result, bytes) = self.call_once(request)?;
            seconds.push(start.elapsed().as_secs_f64());
            copied += bytes;
            last = Some(result);
        }
        let result = last.ok_or_else(|| Failed::Driver("repeat is 0".into()))?;
        let mut outputs = Map::new();
        for (port, output) in &result.results {
            let tensor = output.tensor()?;
            if let Some(file) = request.files.get(port) {
                fs::write(file, tensor.bytes())?;
            }
            outputs.insert(port.clone(), described(&tensor)?);
        }
        let notes: Vec<_> = result
            .notes
            .iter()
            .map(|note| json!({ "key": note.key, "text": note.text }))
            .collect();
        let pages: Vec<_> = result
            .pages
            .iter()
            .map(|page| json!({ "port": page.port, "device": page.device, "inode": page.inode }))
            .collect();
        let answer = json!({
            "outputs": outputs,
            "notes": notes,
            "pages": pages,
            "copied_bytes": result.copied_bytes,
            "client_copied_bytes": copied,
            "seconds": seconds,
        });
        Ok((answer, result))
    }

    fn call_once(&self, request: &CallRequest) -> Result<(CallResult, u64), Failed> {
        let client = self.client()?;
        let before = client.copied_bytes();
        self.calls.fetch_add(1, Relaxed);

        let mut call = client.call(&request.kernel);
        for (port, input) in &request.inputs {
            call = match (input.as_str(), input["handle"].as_str()) {
                (Some(flight), _) => call.input(port, flight),
                (None, Some(name)) => match self.handle(name)? {
                    Handle::Open(segment) => call.input(port, segment),
                    // A flight may have several tensors; those of the suite have one.
                    Handle::Given(output) => call.input(port, output),
                    Handle::Ordinary(spec, data) => {
                        call.input(port, CallInput::of_bytes(spec, data))
                    }
                    Handle::Released => return Err(Failed::Released(name.to_owned())),
                },
                (None, None) => return Err(Failed::Driver(format!("input {port} is {input}"))),
            };
        }
        for (name, value) in &request.parameters {
            call = call.param(name, Param::from(value.clone()));
        }
        for (port, name) in &request.publish {
            call = call.publish(port, name);
        }
        call = call.replace(request.replace).verify(request.verify);
        if let Some(most) = request.inline_bytes {
            call = call.inline_bytes(most);
        }
        if let Some(milliseconds) = request.deadline_ms {
            call = call.deadline(Duration::from_millis(milliseconds));
        }
        if let Some(milliseconds) = request.lease_ms {
            call = call.lease(Duration::from_millis(milliseconds));
        }
        if let Some(id) = &request.request_id {
            call = call.request_id(id);
        }
        if let Some(milliseconds) = request.cancel_after_ms {
            let cancel = call.cancel_handle();
            thread::spawn(move || {
                thread::sleep(Duration::from_millis(milliseconds));
                cancel.cancel();
            });
        }
        let result = call.send()?;
        // Of others at the same time, too.
        Ok((result, client.copied_bytes() - before))
    }

    fn concurrent(&self, fields: &Value) -> Answer {
        let calls: Vec<CallRequest> = serde_json::from_value(fields["calls"].clone())?;
        let repeat = fields["repeat"].as_u64().unwrap_or(1);
        let many = |call: &CallRequest| {
            let mut last = self.call(call);
            for _ in 1..repeat {
                if last.is_err() {
                    break;
                }
                last = self.call(call);
            }
            finished(last.map(|(answer, _)| answer))
        };
        let answers: Vec<Value> = thread::scope(|scope| {
            let callers: Vec<_> = calls
                .iter()
                .map(|call| scope.spawn(|| many(call)))
                .collect();
            callers
                .into_iter()
                .map(|caller| {
                    let died =
                        |_| json!({ "ok": false, "kind": "driver", "message": "it panicked" });
                    caller.join().unwrap_or_else(died)
                })
                .collect()
        });
        Ok(json!({ "answers": answers }))
    }

    fn list(&self) -> Answer {
        let mut flights = Vec::new();
        for flight in self.client()?.list() {
            let flight = flight?;
            let tensor = |place: &TensorPlace| json!({ "name": place.name, "dtype": place.spec.dtype, "shape": place.spec.shape });
            let tensors: Vec<_> = flight.mapping.tensors.iter().map(tensor).collect();
            flights.push(json!({ "name": flight.name, "tensors": tensors }));
        }
        Ok(json!({ "flights": flights }))
    }

    fn kernels(&self) -> Answer {
        let mut kernels = Vec::new();
        for kernel in self.client()?.kernels(None)? {
            let names = |ports: &[strait_client::wire::Port]| -> Vec<String> {
                ports.iter().map(|port| port.name.clone()).collect()
            };
            let parameters: Vec<_> = kernel.parameters.iter().map(|p| p.name.clone()).collect();
            kernels.push(json!({
                "name": kernel.name,
                "plugin": kernel.plugin,
                "doc": kernel.doc,
                "inputs": names(&kernel.inputs),
                "outputs": names(&kernel.outputs),
                "parameters": parameters,
            }));
        }
        Ok(json!({ "kernels": kernels }))
    }

    fn renew(&self, handle: &str, lease_ms: Option<u64>) -> Answer {
        let lease = match self.handle(handle)? {
            Handle::Open(segment) => segment.lease(),
            Handle::Given(Output::Mapped(segment)) => segment.lease(),
            _ => return Err(Failed::Driver(format!("{handle} has no lease"))),
        };
        let life = lease_ms.map(Duration::from_millis);
        let granted = self.client()?.renew(&[lease], life)?;
        let expires_ms = u64::try_from(granted.as_millis()).unwrap_or(u64::MAX);
        Ok(json!({ "expires_ms": expires_ms }))
    }

    fn release(&mut self, handle: String) -> Answer {
        self.handles.insert(handle, Handle::Released);
        Ok(json!({}))
    }
}

fn overwrite(segment: &mut OpenSegment, data: &[u8]) -> Result<(), Failed> {
    let bytes = segment.bytes_mut("x")?;
    if bytes.len() != data.len() {
        let (room, given) = (bytes.len(), data.len());
        return Err(Failed::Driver(format!("{given} bytes for {room}")));
    }
    bytes.copy_from_slice(data);
    Ok(())
}

fn view(handle: &Handle) -> Result<TensorView<'_>, Failed> {
    match handle {
        Handle::Open(segment) => Ok(segment.tensor("x")?),
        Handle::Given(output) => Ok(output.tensor()?),
        _ => Err(Failed::Driver("not in a segment".into())),
    }
}

fn array(handle: &Handle) -> Answer {
    match handle {
        Handle::Ordinary(spec, data) => with_place(spec.dtype, &spec.shape, data),
        _ => described(&view(handle)?),
    }
}

fn described(tensor: &TensorView<'_>) -> Answer {
    with_place(tensor.dtype(), tensor.shape(), tensor.bytes())
}

/// With what Linux says about the memory of the first element.
fn with_place(dtype: Dtype, shape: &[u64], data: &[u8]) -> Answer {
    let (mut device, mut inode) = (0, 0);
    if !data.is_empty() {
        let maps = fs::read_to_string("/proc/self/maps")?;
        (device, inode) = maps
            .lines()
            .find_map(|line| place(line, data.as_ptr().addr() as u64))
            .unwrap_or_default();
    }
    Ok(json!({
        "dtype": dtype, "shape": shape, "bytes": data.len(), "device": device, "inode": inode,
    }))
}

/// Device and inode of a line of maps, if the address lies in it.
fn place(line: &str, address: u64) -> Option<(u64, u64)> {
    let number = |text: &str| u64::from_str_radix(text, 16).ok();
    let mut words = line.split_whitespace();
    let (first, last) = words.next()?.split_once('-')?;
    if !(number(first)?..number(last)?).contains(&address) {
        return None;
    }
    let (major, minor) = words.nth(2)?.split_once(':')?;
    let inode: u64 = words.next()?.parse().ok()?;
    let device = number(major)? << 8 | number(minor)?;
    Some(if inode == 0 { (0, 0) } else { (device, inode) })
}

fn finished(answer: Answer) -> Value {
    let failure = match answer {
        Ok(mut answer) => {
            answer["ok"] = true.into();
            return answer;
        }
        Err(failure) => failure,
    };
    let (kind, message) = match &failure {
        Failed::Driver(what) => ("driver", what.clone()),
        Failed::Released(handle) => ("released", format!("{handle} was released")),
        Failed::Client(Error::Remote(remote)) => {
            let mut answer = json!({
                "ok": false,
                "kind": "remote",
                "message": remote.message,
                "code": remote.code,
                "reason": remote.reason,
                "request_id": remote.request_id,
            });
            if let Some(backtrace) = &remote.backtrace {
                answer["backtrace"] = backtrace.as_str().into();
            }
            if !remote.details.is_empty() {
                answer["details"] = remote.details.clone().into();
            }
            return answer;
        }
        Failed::Client(error) => {
            let kind = match error {
                Error::LeaseExpired { .. } => "lease_expired",
                Error::Disconnected => "disconnected",
                Error::NoHost { .. } | Error::Address(address::AddressError::Nowhere(_)) => {
                    "no_host"
                }
                Error::Forked { .. } => "forked",
                _ => "argument",
            };
            (kind, error.to_string())
        }
    };
    json!({ "ok": false, "kind": kind, "message": message })
}

fn main() -> io::Result<()> {
    let mut driver = Driver::default();
    let mut out = io::stdout().lock();
    for line in io::stdin().lock().lines() {
        let request: Value = serde_json::from_str(&line?)?;
        let op = request["op"].as_str().unwrap_or_default().to_owned();
        let answer = if op == "exit" {
            json!({ "ok": true })
        } else {
            finished(driver.answer(&op, request))
        };
        writeln!(out, "{answer}")?;
        out.flush()?;
        if op == "exit" {
            break;
        }
    }
    Ok(())
}
