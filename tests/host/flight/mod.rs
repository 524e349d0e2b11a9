//! Arrow Flight against a real host: every call, every kind of refusal, clients that misbehave.

mod bodies;
mod calls;
mod compressed;
mod ending;
mod endpoints;
mod exchanges;
mod raw;
mod readers;
mod requests;
mod tables;
mod uploads;

use std::collections::HashMap;
use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use arrow_array::{Array, ArrayRef, FixedSizeListArray, Float64Array, RecordBatch};
use arrow_flight::encode::{DictionaryHandling, FlightDataEncoderBuilder};
use arrow_flight::flight_service_client::FlightServiceClient;
use arrow_flight::utils::flight_data_to_batches;
use arrow_flight::{Action, FlightClient, FlightData, FlightDescriptor, FlightInfo, Ticket};
use arrow_schema::{DataType, Field, Schema};
use bytes::Bytes;
use futures::{Stream, TryStreamExt, stream};
use serde_json::{Value, json};
use strait::config::Config;
use strait::session::{Caller, FlightState, Host};
use tokio::sync::oneshot;
use tonic::body::Body;
use tonic::codegen::http;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

use crate::served;

const MIB: usize = 1 << 20;

/// A host with its Flight socket.
struct Rig {
    host: Arc<Host>,
    directory: tempfile::TempDir,
    stop: Option<oneshot::Sender<()>>,
    served: tokio::task::JoinHandle<Result<(), strait::flight::ServeError>>,
}

type Client = FlightServiceClient<Channel>;

impl Rig {
    async fn new() -> Self {
        Self::with(|_| {}).await
    }

    async fn with(change: impl FnOnce(&mut Config)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        config.memory.budget_bytes = Some(2 << 30);
        config.engine.cache = Some(PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("cache"));
        // The same suite, with kernels in a process of their own.
        config.workers.enabled = std::env::var_os("STRAIT_TEST_WORKERS").is_some();
        config.workers.program = Some(env!("CARGO_BIN_EXE_strait").into());
        // What starts in the background is counted at no certain time.
        config.workers.spare = false;
        change(&mut config);
        let path = directory.path().to_owned();
        let host = tokio::task::spawn_blocking(move || Host::start(config, &path))
            .await
            .unwrap()
            .unwrap();
        let listener =
            tokio::net::UnixListener::bind(directory.path().join("flight.sock")).unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let served = tokio::spawn(strait::flight::serve(Arc::clone(&host), listener, async {
            let _ = stopped.await;
        }));
        Self {
            host,
            directory,
            stop: Some(stop),
            served,
        }
    }

    async fn channel(&self) -> Channel {
        let socket = self.directory.path().join("flight.sock");
        Endpoint::from_shared(format!("unix:{}", socket.display()))
            .unwrap()
            .initial_stream_window_size(16 << 20)
            .initial_connection_window_size(16 << 20)
            .connect()
            .await
            .unwrap()
    }

    async fn client(&self) -> Client {
        FlightServiceClient::new(self.channel().await)
    }

    async fn easy(&self) -> FlightClient {
        FlightClient::new(self.channel().await)
    }

    async fn put(&self, name: &str, batch: RecordBatch) -> Result<Value, Status> {
        self.put_all(name, messages(&batch, Some(name)).await, &[])
            .await
    }

    async fn put_all(
        &self,
        _: &str,
        data: Vec<FlightData>,
        headers: &[(&'static str, &'static str)],
    ) -> Result<Value, Status> {
        let mut request = Request::new(stream::iter(data));
        for (key, value) in headers {
            request.metadata_mut().insert(*key, value.parse().unwrap());
        }
        let results: Vec<_> = self
            .client()
            .await
            .do_put(request)
            .await?
            .into_inner()
            .try_collect()
            .await?;
        assert_eq!(results.len(), 1);
        Ok(serde_json::from_slice(&results[0].app_metadata).unwrap())
    }

    async fn get(&self, ticket: impl Into<Bytes>) -> Result<Vec<RecordBatch>, Status> {
        let request = Ticket::new(ticket.into());
        let data: Vec<_> = self
            .client()
            .await
            .do_get(request)
            .await?
            .into_inner()
            .try_collect()
            .await?;
        Ok(flight_data_to_batches(&data).unwrap())
    }

    async fn act(&self, action: &str, body: impl Into<Bytes>) -> Result<Vec<Value>, Status> {
        let action = Action::new(action, body.into());
        let results: Vec<_> = self
            .client()
            .await
            .do_action(action)
            .await?
            .into_inner()
            .try_collect()
            .await?;
        Ok(results
            .iter()
            .map(|result| serde_json::from_slice(&result.body).unwrap())
            .collect())
    }

    async fn info(&self, descriptor: FlightDescriptor) -> Result<FlightInfo, Status> {
        Ok(self
            .client()
            .await
            .get_flight_info(descriptor)
            .await?
            .into_inner())
    }

    fn me(&self) -> Caller {
        self.host.own_caller()
    }

    /// Budget bytes in use beside what the pool keeps warm.
    fn used(&self) -> u64 {
        let pool = self.host.stats().host.unwrap().pool.bytes;
        self.host.budget().used() - pool
    }

    async fn end(mut self) {
        drop(self.stop.take());
        self.served.await.unwrap().unwrap();
    }
}

async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(20), "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn path(name: &str) -> FlightDescriptor {
    FlightDescriptor::new_path(vec![name.to_owned()])
}

fn cmd(invoke: &Value) -> FlightDescriptor {
    FlightDescriptor::new_cmd(invoke.to_string())
}

fn shift(input: &str) -> Value {
    json!({"kernel": "scale-shift", "inputs": {"x": input}, "parameters": {"a": 2, "b": 1}})
}

fn floats(count: usize) -> RecordBatch {
    let values: Float64Array = (0..count).map(|i| i as f64).collect();
    batch(vec![("x", Arc::new(values), HashMap::new())])
}

fn batch(columns: Vec<(&str, ArrayRef, HashMap<String, String>)>) -> RecordBatch {
    let fields: Vec<_> = columns
        .iter()
        .map(|(name, array, metadata)| {
            Field::new(*name, array.data_type().clone(), array.null_count() > 0)
                .with_metadata(metadata.clone())
        })
        .collect();
    let arrays = columns.into_iter().map(|(_, array, _)| array).collect();
    RecordBatch::try_new(Arc::new(Schema::new(fields)), arrays).unwrap()
}

async fn messages(batch: &RecordBatch, name: Option<&str>) -> Vec<FlightData> {
    FlightDataEncoderBuilder::new()
        .with_dictionary_handling(DictionaryHandling::Resend)
        .with_flight_descriptor(name.map(path))
        .build(stream::iter([Ok(batch.clone())]))
        .try_collect()
        .await
        .unwrap()
}

fn column<T: Array + Clone + 'static>(batches: &[RecordBatch], index: usize) -> Vec<T> {
    batches
        .iter()
        .map(|b| {
            b.column(index)
                .as_any()
                .downcast_ref::<T>()
                .unwrap()
                .clone()
        })
        .collect()
}

fn f64s(batches: &[RecordBatch]) -> Vec<f64> {
    column::<Float64Array>(batches, 0)
        .iter()
        .flat_map(|array| array.values().to_vec())
        .collect()
}

#[track_caller]
fn reason(status: &Status) -> String {
    let reason = status
        .metadata()
        .get("x-strait-reason")
        .unwrap_or_else(|| panic!("no reason: {status:?}"));
    let details: Value = serde_json::from_slice(status.details()).unwrap();
    assert_eq!(details["reason"], reason.to_str().unwrap());
    assert_eq!(
        details["request_id"],
        status
            .metadata()
            .get("x-request-id")
            .unwrap()
            .to_str()
            .unwrap()
    );
    reason.to_str().unwrap().to_owned()
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, Status>, code: Code, why: &str, words: &[&str]) {
    let status = result.unwrap_err();
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (code, why),
        "{}",
        status.message()
    );
    for word in words {
        assert!(
            status.message().contains(word),
            "{word:?} is not in {:?}",
            status.message()
        );
    }
}

fn lists(size: i32, values: Vec<f64>) -> FixedSizeListArray {
    let item = Arc::new(Field::new("item", DataType::Float64, true));
    FixedSizeListArray::new(item, size, Arc::new(Float64Array::from(values)), None)
}

fn state(rig: &Rig, name: &str) -> (FlightState, u32) {
    rig.me().flight_state(name).unwrap()
}

/// A channel on which every call goes to another method: whatever is sent to `do_put` is the body.
#[derive(Clone)]
struct Diverted(Channel, &'static str);

impl tonic::codegen::Service<http::Request<Body>> for Diverted {
    type Response = http::Response<Body>;
    type Error = tonic::transport::Error;
    type Future = <Channel as tonic::codegen::Service<http::Request<Body>>>::Future;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        let uri = request.uri().to_string().replace("DoPut", self.1);
        *request.uri_mut() = uri.parse().unwrap();
        self.0.call(request)
    }
}

impl Rig {
    async fn divert(
        &self,
        method: &'static str,
        messages: impl Stream<Item = FlightData> + Send + 'static,
    ) -> Result<(), Status> {
        let mut client = FlightServiceClient::new(Diverted(self.channel().await, method));
        let mut answer = client.do_put(messages).await?.into_inner();
        while answer.message().await?.is_some() {}
        Ok(())
    }
}

/// Flight of a host process.
async fn connect(served: &served::Served) -> Client {
    let socket = served.directory().join("flight.sock");
    let endpoint = Endpoint::from_shared(format!("unix:{}", socket.display())).unwrap();
    FlightServiceClient::new(endpoint.connect().await.unwrap())
}

async fn put_to(client: &mut Client, data: impl Stream<Item = FlightData> + Send + 'static) {
    let mut answer = client.do_put(data).await.unwrap().into_inner();
    while answer.try_next().await.unwrap().is_some() {}
}

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), future)
        .await
        .unwrap_or_else(|_| panic!("never: {what}"))
}
