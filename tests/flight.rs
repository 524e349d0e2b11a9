//! Arrow Flight against a real host: every call, every kind of refusal, clients that misbehave.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends")]

#[path = "support/guest.rs"]
mod guest;
#[path = "support/served.rs"]
mod served;

use std::collections::HashMap;
use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use arrow_array::{
    Array, ArrayRef, BooleanArray, DictionaryArray, FixedSizeListArray, Float32Array, Float64Array,
    Int8Array, Int64Array, RecordBatch, StringArray, UInt16Array, types::Int32Type,
};
use arrow_flight::encode::{DictionaryHandling, FlightDataEncoderBuilder};
use arrow_flight::flight_service_client::FlightServiceClient;
use arrow_flight::utils::{batches_to_flight_data, flight_data_to_batches};
use arrow_flight::{
    Action, CancelFlightInfoRequest, CancelStatus, Criteria, Empty, FlightClient, FlightData,
    FlightDescriptor, FlightInfo, HandshakeRequest, RenewFlightEndpointRequest, Ticket,
};
use arrow_schema::{DataType, Field, Schema};
use bytes::Bytes;
use futures::{Stream, StreamExt, TryStreamExt, stream};
use serde_json::{Value, json};
use strait::config::Config;
use strait::lease::Principal;
use strait::session::{FlightState, Host};
use tokio::sync::{mpsc, oneshot};
use tonic::body::Body;
use tonic::codegen::http;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

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

    fn me(&self) -> Principal {
        Principal {
            uid: rustix::process::geteuid().as_raw(),
        }
    }

    /// Budget bytes in use beside what the pool keeps warm.
    fn used(&self) -> u64 {
        let pool = self.host.stats(None)["pool"]["bytes"].as_u64().unwrap();
        self.host.budget().used() - pool
    }

    async fn end(mut self) {
        drop(self.stop.take());
        self.served.await.unwrap().unwrap();
    }
}

/// What a test sends bit by bit, as a request's stream.
fn sent_to(receiver: mpsc::Receiver<FlightData>) -> impl Stream<Item = FlightData> {
    stream::unfold(receiver, |mut receiver| async move {
        let message = receiver.recv().await?;
        Some((message, receiver))
    })
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

#[tokio::test(flavor = "multi_thread")]
async fn a_table_goes_in_and_comes_out() {
    let rig = Rig::new().await;
    let floats: Float32Array = (0..24).map(|i| i as f32).collect();
    let item = Arc::new(Field::new("item", DataType::Float32, true));
    let matrix = FixedSizeListArray::new(item, 6, Arc::new(floats), None);
    let tensor = |shape: &str| {
        HashMap::from([
            (
                "ARROW:extension:name".to_owned(),
                "arrow.fixed_shape_tensor".to_owned(),
            ),
            (
                "ARROW:extension:metadata".to_owned(),
                format!("{{\"shape\":{shape}}}"),
            ),
        ])
    };
    let one = |key: &str, value: &str| HashMap::from([(key.to_owned(), value.to_owned())]);
    let sent = batch(vec![
        (
            "i",
            Arc::new(Int64Array::from(vec![-1, 2, i64::MIN, i64::MAX])),
            HashMap::new(),
        ),
        ("t", Arc::new(matrix.clone()), tensor("[2,3]")),
        ("list", Arc::new(matrix), HashMap::new()),
        (
            "b",
            Arc::new(UInt16Array::from(vec![1, 2, 3, 0x7fc0])),
            one("strait.dtype", "bfloat16"),
        ),
        ("m", Arc::new(Int8Array::from(vec![0, 1, 1, 0])), {
            let mut bool8 = one("ARROW:extension:name", "arrow.bool8");
            bool8.insert("ARROW:extension:metadata".to_owned(), String::new());
            bool8
        }),
    ]);
    let mapping = rig.put("x", sent.clone()).await.unwrap();
    let shapes: Vec<_> = mapping["tensors"]
        .as_array()
        .unwrap()
        .iter()
        .map(|t| (t["dtype"].as_str().unwrap(), t["shape"].clone()))
        .collect();
    assert_eq!(
        shapes,
        [
            ("int64", json!([4])),
            ("float32", json!([4, 2, 3])),
            ("float32", json!([4, 6])),
            ("bfloat16", json!([4])),
            ("bool8", json!([4])),
        ]
    );
    assert_eq!(mapping["seal"], "write");

    let got = rig.get("x").await.unwrap();
    assert_eq!(got.len(), 1);
    for index in 0..sent.num_columns() {
        assert_eq!(
            got[0].column(index).to_data(),
            sent.column(index).to_data(),
            "column {index}"
        );
    }
    assert_eq!(got[0].schema().field(1).metadata(), &tensor("[2,3]"));
    assert_eq!(
        got[0].schema().field(3).metadata(),
        &one("strait.dtype", "bfloat16")
    );

    // Copied: out of gRPC's buffer, and into the segment; out of it once into a message, whose
    // columns start on multiples of 64 bytes, and once by gRPC.
    let copied = || rig.host.stats(None)["copied"].clone();
    assert_eq!(
        copied()["flight_in"],
        2 * (4 * 8 + 24 * 4 + 24 * 4 + 4 * 2 + 4)
    );
    let out = 2 * (64 + 128 + 128 + 64 + 64);
    assert_eq!(copied()["flight_out"], out);
    // A single column goes from the segment's own pages.
    rig.put("y", self::floats(80)).await.unwrap();
    rig.get("y").await.unwrap();
    assert_eq!(copied()["flight_out"], out + 640);
    rig.end().await;
}

fn lists(size: i32, values: Vec<f64>) -> FixedSizeListArray {
    let item = Arc::new(Field::new("item", DataType::Float64, true));
    FixedSizeListArray::new(item, size, Arc::new(Float64Array::from(values)), None)
}

fn notes(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    let own = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
    pairs.iter().map(own).collect()
}

/// One column of every kind that is taken, with all that a schema can say about it.
fn everything() -> RecordBatch {
    let extension = "ARROW:extension:name";
    let parameters = "ARROW:extension:metadata";
    let tensor = |json| notes(&[(extension, "arrow.fixed_shape_tensor"), (parameters, json)]);
    let f64s = || -> ArrayRef { Arc::new(Float64Array::from(vec![1.5, f64::NAN])) };
    let lists = |size: i32| -> ArrayRef {
        Arc::new(self::lists(size, (0..2 * size).map(f64::from).collect()))
    };
    let named = Arc::new(
        Field::new("élément", DataType::Float64, false).with_metadata(notes(&[("unit", "m")])),
    );
    let deep = |depth: usize| -> ArrayRef {
        (0..depth).fold(
            Arc::new(Float64Array::from_iter_values(
                (0..1 << (depth + 1)).map(f64::from),
            )),
            |values: ArrayRef, _| {
                let item = Arc::new(Field::new("item", values.data_type().clone(), true));
                Arc::new(FixedSizeListArray::new(item, 2, values, None))
            },
        )
    };
    let complex: ArrayRef = lists(2);
    let columns: Vec<(&str, bool, ArrayRef, HashMap<String, String>)> = vec![
        ("plain", false, f64s(), notes(&[])),
        (
            "nullable",
            true,
            f64s(),
            notes(&[("unit", "K"), ("empty", ""), ("ü", "\u{1f600}\n")]),
        ),
        ("list", true, lists(3), notes(&[])),
        (
            "named item",
            false,
            Arc::new(FixedSizeListArray::new(named, 1, f64s(), None)),
            notes(&[]),
        ),
        ("lists of lists", true, deep(2), notes(&[("k", "v")])),
        ("as deep as it goes", false, deep(7), notes(&[])),
        ("tensor", true, lists(6), tensor(r#"{"shape":[2,3]}"#)),
        (
            "dim_names",
            true,
            lists(6),
            tensor(r#"{ "dim_names": ["H", "W"], "shape": [2, 3] }"#),
        ),
        (
            "identity",
            true,
            lists(6),
            tensor(r#"{"shape":[2,3],"permutation":[0,1]}"#),
        ),
        (
            "bool8",
            true,
            Arc::new(Int8Array::from(vec![7, 0])),
            notes(&[(extension, "arrow.bool8"), (parameters, ""), ("k", "v")]),
        ),
        (
            "bf16",
            true,
            Arc::new(UInt16Array::from(vec![1, 2])),
            notes(&[("strait.dtype", "bfloat16")]),
        ),
        (
            "c128",
            false,
            complex,
            notes(&[("strait.dtype", "complex128")]),
        ),
        (
            "theirs",
            true,
            Arc::new(Int64Array::from(vec![1, 2])),
            notes(&[(extension, "acme.id"), (parameters, "{}")]),
        ),
    ];
    let fields: Vec<_> = columns
        .iter()
        .map(|(name, nullable, array, metadata)| {
            Field::new(*name, array.data_type().clone(), *nullable).with_metadata(metadata.clone())
        })
        .collect();
    let arrays = columns.into_iter().map(|(_, _, array, _)| array).collect();
    let schema =
        Schema::new_with_metadata(fields, notes(&[("pandas", "{\"index\": []}"), ("", "")]));
    RecordBatch::try_new(Arc::new(schema), arrays).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_schema_says_comes_back() {
    let rig = Rig::new().await;
    let sent = everything();
    rig.put("x", sent.clone()).await.unwrap();
    let [got] = <[RecordBatch; 1]>::try_from(rig.get("x").await.unwrap()).unwrap();
    assert_eq!(got.schema(), sent.schema());
    for (index, field) in sent.schema().fields().iter().enumerate() {
        let (got, sent) = (got.column(index).to_data(), sent.column(index).to_data());
        assert_eq!(got, sent, "{}", field.name());
    }
    let info = rig.info(path("x")).await.unwrap();
    assert_eq!(info.try_decode_schema().unwrap(), *sent.schema());
    let schema = rig.easy().await.get_schema(path("x")).await.unwrap();
    assert_eq!(schema, *sent.schema());

    // And mapped: the segment is an Arrow file, with all of it.
    let segment = rig.host.lookup(rig.me(), "x").unwrap();
    let mut file = vec![0; usize::try_from(segment.bytes()).unwrap()];
    let uncounted = strait_memory::Copied::new();
    segment.read_at(0, &mut file, &uncounted).unwrap();
    assert_eq!(
        strait_tensor::read_layout(&file).unwrap(),
        segment.tensors()
    );
    let reader = arrow_ipc::reader::FileReader::try_new(std::io::Cursor::new(&file), None).unwrap();
    assert_eq!(reader.schema(), sent.schema());
    let [mapped] =
        <[RecordBatch; 1]>::try_from(reader.collect::<Result<Vec<_>, _>>().unwrap()).unwrap();
    assert_eq!(mapped.column(4).to_data(), sent.column(4).to_data());

    // Of one row, 0-d.
    let point = batch(vec![(
        "p",
        Arc::new(Float64Array::from(vec![7.0])),
        notes(&[("strait.shape", "[]"), ("unit", "m")]),
    )]);
    rig.put("point", point.clone()).await.unwrap();
    assert_eq!(rig.get("point").await.unwrap(), [point]);
    // arrow-rs's own writing of a tensor, which pyarrow cannot read: without its nulls.
    let nulls = r#"{"shape":[2,3],"dim_names":null,"permutations":null}"#;
    let tensor = |json| {
        notes(&[
            ("ARROW:extension:name", "arrow.fixed_shape_tensor"),
            ("ARROW:extension:metadata", json),
        ])
    };
    let values: ArrayRef = Arc::new(lists(6, vec![0.0; 6]));
    rig.put(
        "nulls",
        batch(vec![("t", Arc::clone(&values), tensor(nulls))]),
    )
    .await
    .unwrap();
    let without = batch(vec![("t", values, tensor(r#"{"shape":[2,3]}"#))]);
    assert_eq!(rig.get("nulls").await.unwrap(), [without]);
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn metadata_that_cannot_be_kept_is_refused_by_name() {
    let rig = Rig::new().await;
    let used = rig.used();
    let column = || -> Vec<ArrayRef> { vec![Arc::new(Float64Array::from(vec![1.0]))] };
    let of = |metadata: HashMap<String, String>, own: HashMap<String, String>| {
        let field = Field::new("x", DataType::Float64, false).with_metadata(own);
        let schema = Schema::new_with_metadata(vec![field], metadata);
        RecordBatch::try_new(Arc::new(schema), column()).unwrap()
    };
    let refused = |result: Result<Value, Status>, words: &[&str]| {
        self::refused(result, Code::InvalidArgument, "BAD_TENSOR", words);
    };
    let half = "v".repeat(32 << 10);
    let most = of(notes(&[("a", &half[1..])]), notes(&[("b", &half[1..])]));
    rig.put("most", most.clone()).await.unwrap();
    assert_eq!(rig.get("most").await.unwrap(), [most]);
    rig.host.drop_flight(rig.me(), "most").unwrap();
    let more = of(notes(&[("a", &half)]), notes(&[("b", &half[1..])]));
    refused(rig.put("x", more).await, &["65537 bytes", "65536"]);

    // Two entries of one key, and one that is no text, as C++ may write them.
    let data = messages(
        &of(notes(&[("key1", "v"), ("key2", "w")]), notes(&[])),
        Some("x"),
    )
    .await;
    let changed = |from: &[u8], to: &[u8]| {
        let mut data = data.clone();
        let mut header = data[0].data_header.to_vec();
        let at = header
            .windows(from.len())
            .position(|part| part == from)
            .unwrap();
        header[at..at + to.len()].copy_from_slice(to);
        data[0].data_header = header.into();
        data
    };
    let twice = changed(b"key2", b"key1");
    refused(
        rig.put_all("x", twice, &[]).await,
        &["schema", "two", "`key1`"],
    );
    let bytes = changed(b"key2", b"key\xff");
    refused(rig.put_all("x", bytes, &[]).await, &["UTF-8", "base64"]);
    // A batch's own metadata.
    let mut batch = data.clone();
    let mut builder = arrow_ipc::convert::IpcSchemaEncoder::new().schema_to_fb(&Schema::empty());
    builder.reset();
    let pairs = arrow_ipc::convert::metadata_to_fb(&mut builder, &notes(&[("offset", "7")]).into());
    let mut message = arrow_ipc::MessageBuilder::new(&mut builder);
    message.add_version(arrow_ipc::MetadataVersion::V5);
    message.add_custom_metadata(pairs);
    let message = message.finish();
    builder.finish(message, None);
    batch[1].data_header = builder.finished_data().to_vec().into();
    refused(
        rig.put_all("x", batch, &[]).await,
        &["`offset`", "schema's"],
    );
    assert_eq!(
        (rig.used(), rig.host.list(rig.me(), None, 10).len()),
        (used, 0)
    );
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_has_the_limits_of_the_data_socket() {
    let rig = Rig::new().await;
    let used = rig.used();
    let named = |names: &[&str]| {
        let column = |name| {
            (
                name,
                Arc::new(Float64Array::from(vec![1.0])) as ArrayRef,
                HashMap::new(),
            )
        };
        batch(names.iter().copied().map(column).collect())
    };
    let many = |count: usize| {
        let names: Vec<_> = (0..count).map(|i| format!("c{i}")).collect();
        named(&names.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let long = "n".repeat(200);
    rig.put("most", many(128)).await.unwrap();
    rig.put("long", named(&[&long, "#", "é"])).await.unwrap();
    for name in ["most", "long"] {
        rig.host.drop_flight(rig.me(), name).unwrap();
    }
    let huge = "n".repeat(50_000);
    for (batch, words) in [
        (many(129), &["129 tensors", "128"][..]),
        (many(1000), &["1000 tensors", "128"]),
        (many(50_000), &["header of", "1048576"]),
        (named(&[""]), &["\"\"", "0 bytes"]),
        (named(&[&format!("{long}n")]), &["201 bytes", "200"]),
        (named(&[&huge]), &["50000 bytes"]),
        (named(&["a\nb"]), &["a\\nb", "control"]),
        (named(&["a", "b", "a"]), &["two tensors", "\"a\""]),
    ] {
        let data = messages(&batch, Some("x")).await;
        // By the schema alone, before the first batch.
        for count in [1, data.len()] {
            let sent = data[..count].to_vec();
            refused(
                rig.put_all("x", sent, &[]).await,
                Code::InvalidArgument,
                "BAD_TENSOR",
                words,
            );
        }
    }
    let none = arrow_flight::SchemaAsIpc::new(&Schema::empty(), &Default::default()).into();
    let none = FlightData::with_descriptor(none, path("x"));
    refused(
        rig.put_all("x", vec![none], &[]).await,
        Code::InvalidArgument,
        "BAD_TENSOR",
        &["0 tensors"],
    );
    assert_eq!(
        (rig.used(), rig.host.list(rig.me(), None, 10).len()),
        (used, 0)
    );
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unusual_shapes_go_both_ways() {
    let rig = Rig::new().await;
    rig.put("empty", floats(0)).await.unwrap();
    assert!(f64s(&rig.get("empty").await.unwrap()).is_empty());
    let info = rig.info(path("empty")).await.unwrap();
    assert_eq!((info.total_records, info.total_bytes), (0, 0));

    let point = |values: Vec<f64>| {
        batch(vec![(
            "x",
            Arc::new(Float64Array::from(values)),
            HashMap::from([("strait.shape".to_owned(), "[]".to_owned())]),
        )])
    };
    let mapping = rig.put("point", point(vec![7.0])).await.unwrap();
    assert_eq!(mapping["tensors"][0]["shape"], json!([]));
    let got = rig.get("point").await.unwrap();
    assert_eq!(f64s(&got), [7.0]);
    assert_eq!(got[0].schema().field(0).metadata()["strait.shape"], "[]");
    refused(
        rig.put("points", point(vec![1.0, 2.0])).await,
        Code::InvalidArgument,
        "BAD_TENSOR",
        &["`x`", "0-d", "2 rows"],
    );

    // A slice of a list column: the writer sends only its part, whatever lies before it.
    let item = Arc::new(Field::new("item", DataType::Float32, true));
    let values: Float32Array = (0..30).map(|i| i as f32).collect();
    let lists = FixedSizeListArray::new(item, 3, Arc::new(values), None).slice(4, 2);
    rig.put(
        "slice",
        batch(vec![("l", Arc::new(lists.clone()), HashMap::new())]),
    )
    .await
    .unwrap();
    let got = rig.get("slice").await.unwrap();
    let got = got[0]
        .column(0)
        .as_any()
        .downcast_ref::<FixedSizeListArray>()
        .unwrap();
    assert_eq!(
        (got.value(0).to_data(), got.value(1).to_data()),
        (lists.value(0).to_data(), lists.value(1).to_data())
    );
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn large_tensors_are_cut_by_rows() {
    let rig = Rig::new().await;
    let count = 3 * MIB / 8 + 17;
    rig.put("x", floats(count)).await.unwrap();
    let mut stream = rig
        .client()
        .await
        .do_get(Ticket::new("x"))
        .await
        .unwrap()
        .into_inner();
    let mut bodies = Vec::new();
    let mut data = Vec::new();
    while let Some(message) = stream.try_next().await.unwrap() {
        assert!(!message.data_header.is_empty());
        bodies.push(message.data_body.len());
        data.push(message);
    }
    assert_eq!(
        bodies,
        [
            0,
            MIB / 2,
            MIB / 2,
            MIB / 2,
            MIB / 2,
            MIB / 2,
            MIB / 2,
            (17_usize * 8).next_multiple_of(64)
        ]
    );
    let values = f64s(&flight_data_to_batches(&data).unwrap());
    assert!(
        values
            .iter()
            .enumerate()
            .all(|(i, value)| *value == i as f64)
            && values.len() == count
    );
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_beyond_the_limit_names_the_mapped_way() {
    let rig = Rig::with(|config| config.server.message_bytes_max = Some(2 * MIB)).await;
    let row = |bytes: usize| {
        let item = Arc::new(Field::new("item", DataType::Float64, true));
        let values: Float64Array = (0..bytes / 8).map(|i| i as f64).collect();
        let list = FixedSizeListArray::new(
            item,
            i32::try_from(bytes / 8).unwrap(),
            Arc::new(values),
            None,
        );
        batch(vec![("x", Arc::new(list), HashMap::new())])
    };
    // One message of 2 MiB, four times the usual.
    rig.put("fits", row(2 * MIB)).await.unwrap();
    let mut client = rig.client().await.max_decoding_message_size(usize::MAX);
    let got: Vec<_> = client
        .do_get(Ticket::new("fits"))
        .await
        .unwrap()
        .into_inner()
        .try_collect()
        .await
        .unwrap();
    assert_eq!(
        got.iter().map(|m| m.data_body.len()).collect::<Vec<_>>(),
        [0, 2 * MIB]
    );

    // Uploads have the same bound, and say so.
    refused(
        rig.put("long", row(4 * MIB)).await,
        Code::OutOfRange,
        "INLINE_TOO_LARGE",
        &["server.message_bytes_max", "fewer rows"],
    );

    // A segment with such a row, made through the data socket's own calls.
    let tensors = vec![
        serde_json::from_value(json!({"name": "x", "dtype": "float64", "shape": [1, 3 * MIB / 8]}))
            .unwrap(),
    ];
    let (segment, fd) = rig.host.create(rig.me(), tensors).unwrap();
    drop(fd);
    rig.host.publish(rig.me(), &segment, "wide", false).unwrap();
    let socket = rig.directory.path().join("data.sock").display().to_string();
    refused(
        rig.get("wide").await,
        Code::OutOfRange,
        "INLINE_TOO_LARGE",
        &["3145728", "2097152", &socket, &segment.id().to_string()],
    );
    assert_eq!(
        rig.info(path("wide")).await.unwrap().total_bytes,
        3 * MIB as i64
    );
    drop(segment);
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kernel_runs_by_descriptor() {
    let rig = Rig::new().await;
    rig.put("x", floats(200_000)).await.unwrap();
    let info = rig.info(cmd(&shift("x"))).await.unwrap();
    assert_eq!(
        (info.total_records, info.total_bytes, info.endpoint.len()),
        (200_000, 1_600_000, 1)
    );
    let endpoint = info.endpoint[0].clone();
    assert!(endpoint.location.is_empty());
    let mapping: Value = serde_json::from_slice(&endpoint.app_metadata).unwrap();
    assert_eq!(mapping["strait-mmap"], 1);
    assert_eq!(mapping["tensors"][0]["name"], "y");
    let expires = endpoint.expiration_time.unwrap().seconds;
    let now = i64::try_from(std::time::UNIX_EPOCH.elapsed().unwrap().as_secs()).unwrap();
    assert!(
        (now + 50..=now + 61).contains(&expires),
        "{expires} at {now}"
    );
    let outcome: Value = serde_json::from_slice(&info.app_metadata).unwrap();
    assert_eq!(outcome["copied_bytes"], 0);
    assert_eq!(outcome["results"][0]["mapping"], mapping);

    // It may be read again until it expires, and be mapped through the data socket.
    let ticket = endpoint.ticket.clone().unwrap().ticket;
    for _ in 0..2 {
        let values = f64s(&rig.get(ticket.clone()).await.unwrap());
        assert!(
            values
                .iter()
                .enumerate()
                .all(|(i, value)| *value == 2.0 * i as f64 + 1.0)
                && values.len() == 200_000
        );
    }
    let id = mapping["segment"].as_str().unwrap();
    let session = rig.host.open_session(rig.me());
    assert_eq!(session.segment(id).unwrap().id().to_string(), id);
    let other = rig.host.open_session(Principal {
        uid: rig.me().uid + 1,
    });
    assert_eq!(other.segment(id).unwrap_err().reason, "SEGMENT_NOT_FOUND");
    drop((session, other));

    // Renewed, then let go.
    let mut easy = rig.easy().await;
    let renewed = easy
        .renew_flight_endpoint(RenewFlightEndpointRequest::new(endpoint))
        .await
        .unwrap();
    assert!(renewed.expiration_time.unwrap().seconds >= expires);
    let cancelled = easy
        .cancel_flight_info(CancelFlightInfoRequest::new(info.clone()))
        .await
        .unwrap();
    assert_eq!(cancelled.status(), CancelStatus::Cancelled);
    let again = easy
        .cancel_flight_info(CancelFlightInfoRequest::new(info))
        .await
        .unwrap();
    assert_eq!(again.status(), CancelStatus::NotCancellable);
    refused(
        rig.get(ticket).await,
        Code::NotFound,
        "SEGMENT_NOT_FOUND",
        &["60000 ms"],
    );

    // A published output is a flight like any other.
    let mut publish = shift("x");
    publish["publish"] = json!({"y": "shifted"});
    let info = rig.info(cmd(&publish)).await.unwrap();
    assert_eq!(info.endpoint[0].expiration_time, None);
    let values = f64s(&rig.get("shifted").await.unwrap());
    assert_eq!(values[199_999], 399_999.0);
    refused(
        rig.info(cmd(&publish)).await,
        Code::AlreadyExists,
        "NAME_TAKEN",
        &["`shifted`"],
    );
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn results_that_nobody_fetches_go() {
    let rig = Rig::with(|config| config.lease.undelivered_ms = 60).await;
    rig.put("x", floats(1000)).await.unwrap();
    let used = rig.used();
    let mut keyed = shift("x");
    keyed["idempotency_key"] = json!("once");
    let first = rig.info(cmd(&keyed)).await.unwrap();
    let second = rig.info(cmd(&keyed)).await.unwrap();
    assert_eq!(
        first.endpoint[0].ticket, second.endpoint[0].ticket,
        "a retry has the same result"
    );
    tokio::time::sleep(Duration::from_millis(70)).await;
    let ticket = first.endpoint[0].ticket.clone().unwrap().ticket;
    refused(
        rig.get(ticket).await,
        Code::NotFound,
        "SEGMENT_NOT_FOUND",
        &[],
    );
    // The sweep of the data socket calls this; the retry's answer is kept longer than the result.
    rig.host.expire(Instant::now() + Duration::from_secs(61));
    assert_eq!(rig.used(), used);
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn listing_schemas_and_polling() {
    let rig = Rig::new().await;
    for name in ["a/2", "b", "a/1"] {
        rig.put(name, floats(3)).await.unwrap();
    }
    let names = |infos: Vec<FlightInfo>| -> Vec<String> {
        infos
            .into_iter()
            .map(|info| info.flight_descriptor.unwrap().path[0].clone())
            .collect()
    };
    let mut client = rig.client().await;
    let all: Vec<_> = client
        .list_flights(Criteria::default())
        .await
        .unwrap()
        .into_inner()
        .try_collect()
        .await
        .unwrap();
    assert_eq!(names(all.clone()), ["a/1", "a/2", "b"]);
    assert_eq!(all[0], rig.info(path("a/1")).await.unwrap());
    let some = client
        .list_flights(Criteria {
            expression: "a/".into(),
        })
        .await
        .unwrap();
    assert_eq!(
        names(some.into_inner().try_collect().await.unwrap()),
        ["a/1", "a/2"]
    );
    for count in 0..150 {
        let segment = rig.host.lookup(rig.me(), "b").unwrap();
        rig.host
            .publish(rig.me(), &segment, &format!("c{count:03}"), false)
            .unwrap();
    }
    let all: Vec<_> = client
        .list_flights(Criteria::default())
        .await
        .unwrap()
        .into_inner()
        .try_collect()
        .await
        .unwrap();
    assert_eq!(names(all).len(), 153);

    let schema = rig.easy().await.get_schema(path("b")).await.unwrap();
    assert_eq!(schema, *floats(0).schema());
    let info = rig.info(path("b")).await.unwrap();
    assert_eq!(info.clone().try_decode_schema().unwrap(), schema);

    // An invocation is opened, not run, for its schema.
    let before = rig.host.stats(None)["invocations"].clone();
    let schema = rig.easy().await.get_schema(cmd(&shift("b"))).await.unwrap();
    assert_eq!(
        schema
            .fields()
            .iter()
            .map(|f| f.name().as_str())
            .collect::<Vec<_>>(),
        ["y"]
    );
    assert_eq!(rig.host.stats(None)["invocations"], before);

    let poll = rig
        .easy()
        .await
        .poll_flight_info(cmd(&shift("b")))
        .await
        .unwrap();
    assert_eq!((poll.progress, poll.flight_descriptor), (Some(1.0), None));
    let ticket = poll.info.unwrap().endpoint[0].ticket.clone().unwrap();
    assert_eq!(
        f64s(&rig.get(ticket.ticket).await.unwrap()),
        [1.0, 3.0, 5.0]
    );
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn actions() {
    let rig = Rig::new().await;
    let mapping = rig.put("x", floats(3)).await.unwrap();
    let listed: Vec<_> = rig
        .client()
        .await
        .list_actions(Empty {})
        .await
        .unwrap()
        .into_inner()
        .try_collect()
        .await
        .unwrap();
    let names: Vec<_> = listed.iter().map(|action| action.r#type.as_str()).collect();
    assert_eq!(
        names,
        [
            "kernels",
            "describe",
            "mapping",
            "drop",
            "stats",
            "CancelFlightInfo",
            "RenewFlightEndpoint"
        ]
    );
    assert!(
        listed
            .iter()
            .all(|action| action.description.starts_with("Body: "))
    );

    assert_eq!(rig.act("mapping", "x").await.unwrap(), [mapping]);
    let kernels = rig.act("kernels", "").await.unwrap();
    let one = rig.act("describe", "scale-shift").await.unwrap();
    assert!(kernels.contains(&one[0]), "{kernels:?}");
    assert_eq!(one[0]["parameters"][0]["name"], "a");
    assert_eq!(
        rig.act("kernels", r#"{"kernel": "scale-shift"}"#)
            .await
            .unwrap(),
        one
    );
    assert_eq!(
        rig.act("kernels", r#"{"after": "zzz/"}"#).await.unwrap(),
        [] as [Value; 0]
    );
    assert_eq!(rig.act("stats", "").await.unwrap()[0]["flights"], 1);
    assert_eq!(rig.act("drop", "x").await.unwrap(), [] as [Value; 0]);
    assert_eq!(rig.act("stats", "").await.unwrap()[0]["flights"], 0);

    refused(
        rig.act("drop", "x").await,
        Code::NotFound,
        "TENSOR_NOT_FOUND",
        &["`x`"],
    );
    refused(
        rig.act("drop", vec![0xff]).await,
        Code::InvalidArgument,
        "BAD_REQUEST",
        &["UTF-8"],
    );
    refused(
        rig.act("kernels", "{\"kernal\":1}").await,
        Code::InvalidArgument,
        "BAD_REQUEST",
        &["kernal"],
    );
    refused(
        rig.act("describe", "nope").await,
        Code::NotFound,
        "KERNEL_NOT_FOUND",
        &["nope"],
    );
    refused(
        rig.act("CancelFlightInfo", "\u{1}").await,
        Code::InvalidArgument,
        "BAD_REQUEST",
        &["protobuf"],
    );
    refused(
        rig.act("RenewFlightEndpoint", "").await,
        Code::InvalidArgument,
        "BAD_REQUEST",
        &["ticket"],
    );
    refused(
        rig.act("explode", "").await,
        Code::Unimplemented,
        "UNSUPPORTED_OP",
        &["explode", "kernels, describe"],
    );

    let hands = rig
        .client()
        .await
        .handshake(stream::iter([HandshakeRequest::default()]))
        .await
        .unwrap();
    assert_eq!(
        hands
            .into_inner()
            .try_collect::<Vec<_>>()
            .await
            .unwrap()
            .len(),
        1
    );
    let exchange = rig
        .client()
        .await
        .do_exchange(stream::iter([FlightData::default()]))
        .await;
    refused(exchange, Code::Unimplemented, "UNSUPPORTED_OP", &["DoPut"]);
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn request_ids_come_back() {
    let rig = Rig::new().await;
    let mut client = rig.client().await;
    let with_id = |id: &'static str| {
        let mut request = Request::new(path("x"));
        request
            .metadata_mut()
            .insert("x-request-id", id.parse().unwrap());
        request
    };
    let error = client.get_flight_info(with_id("mine-1")).await.unwrap_err();
    assert_eq!(error.metadata().get("x-request-id").unwrap(), "mine-1");
    rig.put("x", floats(3)).await.unwrap();
    let response = client.get_flight_info(with_id("mine-2")).await.unwrap();
    assert_eq!(response.metadata().get("x-request-id").unwrap(), "mine-2");
    let response = client.get_flight_info(path("x")).await.unwrap();
    assert!(
        !response.metadata().get("x-request-id").unwrap().is_empty(),
        "the host makes one"
    );
    refused(
        client.get_flight_info(with_id("not an id")).await,
        Code::InvalidArgument,
        "BAD_REQUEST",
        &["1 to 64"],
    );

    let mut invoke = shift("x");
    invoke["request_id"] = json!("in-body");
    let response = client.get_flight_info(cmd(&invoke)).await.unwrap();
    assert_eq!(response.metadata().get("x-request-id").unwrap(), "in-body");
    let outcome: Value = serde_json::from_slice(&response.into_inner().app_metadata).unwrap();
    assert_eq!(outcome["request_id"], "in-body");
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_requests_are_told_what_is_wrong() {
    let rig = Rig::new().await;
    rig.put("x", floats(3)).await.unwrap();
    let invalid = Code::InvalidArgument;
    refused(
        rig.info(path("nope")).await,
        Code::NotFound,
        "TENSOR_NOT_FOUND",
        &["`nope`"],
    );
    refused(
        rig.info(FlightDescriptor::new_path(vec![])).await,
        invalid,
        "BAD_REQUEST",
        &["0 parts"],
    );
    refused(
        rig.info(FlightDescriptor::default()).await,
        invalid,
        "BAD_REQUEST",
        &["type"],
    );
    refused(
        rig.info(FlightDescriptor::new_cmd("{")).await,
        invalid,
        "BAD_REQUEST",
        &["JSON", "zscore"],
    );
    let misspelt = json!({"kernel": "scale-shift", "inputs": {"x": "x"}, "prameters": {}});
    refused(
        rig.info(cmd(&misspelt)).await,
        invalid,
        "BAD_REQUEST",
        &["prameters"],
    );
    let unknown = json!({"kernel": "nope", "inputs": {}});
    refused(
        rig.info(cmd(&unknown)).await,
        Code::NotFound,
        "KERNEL_NOT_FOUND",
        &["nope"],
    );
    let parameter = json!({"kernel": "scale-shift", "inputs": {"x": "x"}, "parameters": {"c": 1}});
    refused(
        rig.info(cmd(&parameter)).await,
        invalid,
        "UNKNOWN_PARAMETER",
        &["c"],
    );
    let opened = rig.client().await.get_schema(cmd(&parameter)).await;
    refused(opened, invalid, "UNKNOWN_PARAMETER", &["c"]);
    refused(
        rig.get("nope").await,
        Code::NotFound,
        "TENSOR_NOT_FOUND",
        &["`nope`"],
    );
    refused(
        rig.get("{\"name\": 1}").await,
        invalid,
        "BAD_REQUEST",
        &["ticket"],
    );
    refused(
        rig.get("{\"segment\": \"xyz\"}").await,
        invalid,
        "BAD_REQUEST",
        &["32 hex digits"],
    );
    refused(
        rig.get(vec![0xff, 0xfe]).await,
        invalid,
        "BAD_REQUEST",
        &["ticket"],
    );
    let absent = "{\"segment\": \"00000000000000000000000000000000\"}";
    refused(
        rig.get(absent).await,
        Code::NotFound,
        "SEGMENT_NOT_FOUND",
        &["0000"],
    );

    refused(
        rig.put("x", floats(3)).await,
        Code::AlreadyExists,
        "NAME_TAKEN",
        &["`x`"],
    );
    refused(rig.put("x#y", floats(3)).await, invalid, "BAD_NAME", &["#"]);
    let again = messages(&floats(5), Some("x")).await;
    let header = [("x-strait-replace", "yes")];
    refused(
        rig.put_all("x", again.clone(), &header).await,
        invalid,
        "BAD_REQUEST",
        &["x-strait-replace"],
    );
    rig.put_all("x", again, &[("x-strait-replace", "true")])
        .await
        .unwrap();
    assert_eq!(f64s(&rig.get("x").await.unwrap()).len(), 5);

    rig.host.drain();
    refused(
        rig.put("y", floats(3)).await,
        Code::Unavailable,
        "DRAINING",
        &[],
    );
    refused(
        rig.info(cmd(&shift("x"))).await,
        Code::Unavailable,
        "DRAINING",
        &[],
    );
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_that_are_no_tensors_are_refused_by_name() {
    let rig = Rig::new().await;
    let used = rig.used();
    let text: ArrayRef = Arc::new(StringArray::from(vec!["a", "b"]));
    let words: ArrayRef = Arc::new(
        vec!["a", "b", "a"]
            .into_iter()
            .collect::<DictionaryArray<Int32Type>>(),
    );
    let truth: ArrayRef = Arc::new(BooleanArray::from(vec![true, false]));
    let holes: ArrayRef = Arc::new(Float64Array::from(vec![Some(1.0), None]));
    let moments: ArrayRef = Arc::new(arrow_array::TimestampSecondArray::from(vec![1, 2]));
    let item = Arc::new(Field::new("item", DataType::Float64, true));
    let inner = FixedSizeListArray::new(
        item,
        2,
        Arc::new(Float64Array::from(vec![Some(1.0), None])),
        None,
    );
    let pairs: ArrayRef = Arc::new(lists(2, (0..6).map(f64::from).collect()));
    let tensor = |json: &str| {
        HashMap::from([
            (
                "ARROW:extension:name".to_owned(),
                "arrow.fixed_shape_tensor".to_owned(),
            ),
            ("ARROW:extension:metadata".to_owned(), json.to_owned()),
        ])
    };
    for (column, metadata, words) in [
        (text, HashMap::new(), &["`bad`", "Utf8", "text"][..]),
        (words, HashMap::new(), &["`bad`", "dictionary"]),
        (truth, HashMap::new(), &["`bad`", "int8"]),
        (holes, HashMap::new(), &["`bad`", "1 nulls", "mask"]),
        (moments, HashMap::new(), &["`bad`", "time"]),
        (Arc::new(inner), HashMap::new(), &["`bad`", "1 nulls"]),
        (
            Arc::new(UInt16Array::from(vec![0])),
            HashMap::from([("strait.dtype".to_owned(), "float64".to_owned())]),
            &["bad", "float64", "uint16"],
        ),
        (
            pairs.clone(),
            tensor(r#"{"shape":[2,1],"permutation":[1,0]}"#),
            &["`bad`", "permuted", "[1, 0]"],
        ),
        (
            pairs.clone(),
            tensor(r#"{"shape":[2,1],"permutations":[1,0],"dim_names":null}"#),
            &["`bad`", "permuted"],
        ),
        (
            pairs,
            tensor(r#"{"shape":[2,1],"dim_names":["x"]}"#),
            &["`bad`", "1 dim_names", "2 axes"],
        ),
        (
            Arc::new(Float64Array::from(vec![1.0])),
            HashMap::from([("strait.shape".to_owned(), "[1]".to_owned())]),
            &["`bad`", "strait.shape"],
        ),
    ] {
        let data = messages(&batch(vec![("bad", column, metadata)]), Some("x")).await;
        refused(
            rig.put_all("x", data, &[]).await,
            Code::InvalidArgument,
            "BAD_TENSOR",
            words,
        );
    }
    assert_eq!(
        (rig.used(), rig.host.list(rig.me(), None, 10).len()),
        (used, 0)
    );
    // The name is free.
    rig.put("x", floats(3)).await.unwrap();
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_uploads_leave_nothing() {
    let rig = Rig::new().await;
    let used = rig.used();
    let good = messages(&floats(100), Some("x")).await;
    let (schema, rows) = (good[0].clone(), good[1].clone());
    let body = rows.data_body.clone();
    let request = |data: Vec<FlightData>| rig.put_all("x", data, &[]);
    let invalid = Code::InvalidArgument;
    let header = |bytes: &'static [u8]| FlightData {
        data_header: Bytes::from_static(bytes),
        ..schema.clone()
    };
    refused(
        request(vec![]).await,
        invalid,
        "BAD_REQUEST",
        &["without messages"],
    );
    refused(
        request(vec![rows.clone()]).await,
        invalid,
        "BAD_REQUEST",
        &["descriptor"],
    );
    let two = FlightDescriptor::new_path(vec!["x".into(), "y".into()]);
    refused(
        request(vec![FlightData {
            flight_descriptor: Some(two),
            ..schema.clone()
        }])
        .await,
        invalid,
        "BAD_REQUEST",
        &["2 parts"],
    );
    refused(
        request(vec![header(b"")]).await,
        invalid,
        "BAD_REQUEST",
        &["before its schema"],
    );
    refused(
        request(vec![header(b"\xff\xff\xff\xff nonsense")]).await,
        invalid,
        "BAD_REQUEST",
        &["corrupt"],
    );
    let early = FlightData {
        flight_descriptor: schema.flight_descriptor.clone(),
        ..rows.clone()
    };
    refused(
        request(vec![early]).await,
        invalid,
        "BAD_REQUEST",
        &["RecordBatch", "schema"],
    );
    refused(
        request(vec![schema.clone(), schema.clone()]).await,
        invalid,
        "BAD_REQUEST",
        &["second schema"],
    );
    let headless = FlightData {
        data_header: Bytes::new(),
        ..rows.clone()
    };
    refused(
        request(vec![schema.clone(), headless]).await,
        invalid,
        "BAD_REQUEST",
        &["no header"],
    );
    let short = FlightData {
        data_body: body.slice(..body.len() / 2),
        ..rows.clone()
    };
    refused(
        request(vec![schema.clone(), short]).await,
        invalid,
        "BAD_TENSOR",
        &["`x`", "100 rows"],
    );
    // A batch of another schema.
    let other = messages(
        &batch(vec![
            ("x", Arc::new(Float64Array::from(vec![1.0])), HashMap::new()),
            ("y", Arc::new(Float64Array::from(vec![1.0])), HashMap::new()),
        ]),
        None,
    )
    .await;
    refused(
        request(vec![schema.clone(), other[1].clone()]).await,
        invalid,
        "BAD_TENSOR",
        &["more nodes"],
    );
    refused(
        request(vec![other[0].clone()]).await,
        invalid,
        "BAD_REQUEST",
        &["descriptor"],
    );

    // Every bit of both headers turned round once: an answer each time, and never a broken host.
    let mut client = rig.client().await;
    let mut stored = 0;
    for (which, message) in [&schema, &rows].into_iter().enumerate() {
        for bit in (0..message.data_header.len() * 8).step_by(3) {
            let mut bytes = message.data_header.to_vec();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let mut sent = [schema.clone(), rows.clone()];
            sent[which].data_header = bytes.into();
            let put = async {
                client
                    .do_put(stream::iter(sent))
                    .await?
                    .into_inner()
                    .try_collect::<Vec<_>>()
                    .await
            };
            match put.await {
                Ok(_) => {
                    stored += 1;
                    rig.host.drop_flight(rig.me(), "x").unwrap();
                }
                Err(status) => {
                    let why = reason(&status);
                    assert!(
                        ["BAD_REQUEST", "BAD_TENSOR", "BUDGET_EXCEEDED"].contains(&why.as_str()),
                        "{why}: {status:?}"
                    );
                }
            }
        }
    }
    assert!(stored > 0, "some bits do not matter");
    assert_eq!(
        (rig.used(), rig.host.list(rig.me(), None, 10).len()),
        (used, 0)
    );
    rig.put("x", floats(3)).await.unwrap();
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_are_charged_while_they_arrive() {
    let rig = Rig::with(|config| config.memory.budget_bytes = Some(8 << 20)).await;
    let data = messages(&floats(6 * MIB / 8), Some("x")).await;
    // 6 MiB fit, and no second 6 MiB for the segment; 12 MiB do not even arrive.
    refused(
        rig.put_all("x", data.clone(), &[]).await,
        Code::ResourceExhausted,
        "BUDGET_EXCEEDED",
        &["segment"],
    );
    let twice: Vec<_> = data.iter().chain(&data[1..]).cloned().collect();
    refused(
        rig.put_all("x", twice, &[]).await,
        Code::ResourceExhausted,
        "BUDGET_EXCEEDED",
        &["8388608"],
    );
    assert_eq!(rig.host.budget().used(), 0);
    rig.put("x", floats(3 * MIB / 8)).await.unwrap();
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_breaks_off_frees_its_name() {
    let rig = Rig::new().await;
    let used = rig.used();
    let data = messages(&floats(MIB), Some("x")).await;
    let (sender, receiver) = mpsc::channel(1);
    // A client with a runtime of its own: when that goes, its connection breaks.
    let dies = tokio::runtime::Runtime::new().unwrap();
    let socket = rig
        .directory
        .path()
        .join("flight.sock")
        .display()
        .to_string();
    dies.spawn(async move {
        let channel = Endpoint::from_shared(format!("unix:{socket}"))
            .unwrap()
            .connect()
            .await
            .unwrap();
        let messages = sent_to(receiver);
        FlightServiceClient::new(channel)
            .do_put(messages)
            .await?
            .into_inner()
            .try_collect::<Vec<_>>()
            .await
    });
    for message in data.into_iter().take(4) {
        sender.send(message).await.unwrap();
    }
    eventually("the upload begins", || {
        rig.host
            .lookup(rig.me(), "x")
            .is_err_and(|e| e.reason == "WRONG_STATE")
    })
    .await;
    // While it arrives it can be neither read nor replaced nor dropped.
    refused(
        rig.get("x").await,
        Code::FailedPrecondition,
        "WRONG_STATE",
        &["Uploading", "Streaming"],
    );
    refused(
        rig.put("x", floats(1)).await,
        Code::FailedPrecondition,
        "WRONG_STATE",
        &["Uploading"],
    );
    refused(
        rig.act("drop", "x").await,
        Code::FailedPrecondition,
        "WRONG_STATE",
        &["Uploading", "Completed"],
    );
    dies.shutdown_background();
    eventually("the name is free", || {
        rig.host
            .lookup(rig.me(), "x")
            .is_err_and(|e| e.reason == "TENSOR_NOT_FOUND")
    })
    .await;
    eventually("its bytes are free", || rig.used() == used).await;
    drop(sender);
    rig.put("x", floats(3)).await.unwrap();
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_read_at_once() {
    let rig = Rig::new().await;
    let count = 4 * MIB / 8;
    rig.put("x", floats(count)).await.unwrap();
    let channel = rig.channel().await;
    let readers: Vec<_> = (0..100)
        .map(|_| {
            let mut client = FlightClient::new(channel.clone());
            tokio::spawn(async move {
                let batches: Vec<_> = client
                    .do_get(Ticket::new("x"))
                    .await
                    .unwrap()
                    .try_collect()
                    .await
                    .unwrap();
                f64s(&batches)
            })
        })
        .collect();
    for reader in readers {
        let values = reader.await.unwrap();
        assert!(
            values
                .iter()
                .enumerate()
                .all(|(i, value)| *value == i as f64)
                && values.len() == count
        );
    }
    rig.end().await;
}

fn state(rig: &Rig, name: &str) -> (FlightState, u32) {
    rig.host.flight_state(rig.me(), name).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_hangs_up_leaves_nothing() {
    let rig = Rig::new().await;
    let used = rig.used();
    rig.put("x", floats(8 * MIB)).await.unwrap();
    let mut client = rig.client().await;
    let mut stream = client.do_get(Ticket::new("x")).await.unwrap().into_inner();
    stream.try_next().await.unwrap().unwrap();
    assert_eq!(state(&rig, "x"), (FlightState::Streaming, 1));
    drop(stream);
    eventually("the reader is gone", || {
        state(&rig, "x") == (FlightState::Uploaded, 0)
    })
    .await;

    // The connection itself goes.
    let mut stream = client.do_get(Ticket::new("x")).await.unwrap().into_inner();
    stream.try_next().await.unwrap().unwrap();
    drop((stream, client));
    eventually("the connection is gone", || {
        state(&rig, "x") == (FlightState::Uploaded, 0)
    })
    .await;

    // A reader that had begun finishes although the name is dropped, and then the bytes go.
    let mut client = rig.client().await;
    let stream = client.do_get(Ticket::new("x")).await.unwrap().into_inner();
    rig.act("drop", "x").await.unwrap();
    let data: Vec<_> = stream.try_collect().await.unwrap();
    assert_eq!(f64s(&flight_data_to_batches(&data).unwrap()).len(), 8 * MIB);
    eventually("its bytes are free", || rig.used() == used).await;
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_read_holds_only_its_own_stream() {
    let rig = Rig::new().await;
    rig.put("x", floats(8 * MIB)).await.unwrap();
    let mut stuck = Vec::new();
    for _ in 0..20 {
        stuck.push(
            rig.client()
                .await
                .do_get(Ticket::new("x"))
                .await
                .unwrap()
                .into_inner(),
        );
    }
    let values = f64s(&rig.get("x").await.unwrap());
    assert_eq!(values.len(), 8 * MIB);
    drop(stuck);
    eventually("the readers are gone", || {
        state(&rig, "x") == (FlightState::Uploaded, 0)
    })
    .await;
    rig.end().await;
}

/// A client that waits for the answer's head before it sends anything.
#[tokio::test(flavor = "multi_thread")]
async fn an_upload_may_wait_for_the_head() {
    let rig = Rig::new().await;
    let (sender, receiver) = mpsc::channel(1);
    let messages_sent = sent_to(receiver);
    let mut client = rig.client().await;
    let mut results = client.do_put(messages_sent).await.unwrap().into_inner();
    for message in messages(&floats(3), Some("x")).await {
        sender.send(message).await.unwrap();
    }
    drop(sender);
    assert!(
        results
            .next()
            .await
            .unwrap()
            .unwrap()
            .app_metadata
            .starts_with(b"{\"strait-mmap\":1")
    );
    assert_eq!(f64s(&rig.get("x").await.unwrap()), [0.0, 1.0, 2.0]);
    rig.end().await;
}

/// What gRPC C++ sends for a unix socket: `%2F` in `:authority`.
#[tokio::test(flavor = "multi_thread")]
async fn an_encoded_path_as_authority_is_no_obstacle() {
    let rig = Rig::new().await;
    rig.put("x", floats(3)).await.unwrap();
    let socket = tokio::net::UnixStream::connect(rig.directory.path().join("flight.sock"))
        .await
        .unwrap();
    let answer = raw_list_actions(socket).await;
    let text = String::from_utf8_lossy(&answer);
    assert!(text.contains("One result for each kernel"), "{text}");
    rig.end().await;
}

/// One ListActions in HTTP/2 by hand; answers what came back until the trailers or a reset.
async fn raw_list_actions(mut socket: tokio::net::UnixStream) -> Vec<u8> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let sent = [
        PREFACE.to_vec(),
        frame(4, 0, 0, b""),
        frame(1, 4, 1, &headers("ListActions")),
        frame(0, 1, 1, &[0; 5]),
    ]
    .concat();
    // A byte at a time: the repair has no other bytes to look at.
    for byte in sent {
        socket.write_all(&[byte]).await.unwrap();
        socket.flush().await.unwrap();
    }
    let mut answer = Vec::new();
    loop {
        let mut header = [0; 9];
        socket.read_exact(&mut header).await.unwrap();
        let length =
            usize::from(header[0]) << 16 | usize::from(header[1]) << 8 | usize::from(header[2]);
        let mut payload = vec![0; length];
        socket.read_exact(&mut payload).await.unwrap();
        let (kind, ends) = (header[3], header[4] & 1 != 0 && header[3] != 4);
        answer.extend(payload);
        if ends || kind == 3 || kind == 7 {
            return answer;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_are_no_grpc_do_no_harm() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let rig = Rig::new().await;
    let preface = PREFACE;
    for garbage in [
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![0xff; 4096],
        [preface, &[0xff; 64]].concat(),
        [preface, &[0, 0, 4, 1, 0x0c, 0, 0, 0, 1, 0xff, 0, 0, 0]].concat(),
    ] {
        let mut socket = tokio::net::UnixStream::connect(rig.directory.path().join("flight.sock"))
            .await
            .unwrap();
        socket.write_all(&garbage).await.unwrap();
        socket.shutdown().await.unwrap();
        let mut answer = Vec::new();
        // The host closes; whether it says why is HTTP/2's affair.
        let _ = tokio::time::timeout(Duration::from_secs(5), socket.read_to_end(&mut answer))
            .await
            .unwrap();
    }
    rig.put("x", floats(3)).await.unwrap();
    rig.end().await;
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

/// Every call whose request is one message.
const UNARY: [&str; 7] = [
    "ListFlights",
    "GetFlightInfo",
    "PollFlightInfo",
    "GetSchema",
    "DoGet",
    "DoAction",
    "ListActions",
];

#[tokio::test(flavor = "multi_thread")]
async fn a_request_has_a_size_and_a_time() {
    let rig = Rig::with(|config| config.server.request_ms = Some(300)).await;
    let used = rig.used();
    for method in UNARY {
        let long = FlightData::new().with_data_body(vec![0; MIB]);
        refused(
            rig.divert(method, stream::iter([long])).await,
            Code::InvalidArgument,
            "BAD_REQUEST",
            &["1048", "1048576", "DoPut"],
        );
        // Whole, and then never the end.
        let endless = stream::iter([FlightData::new()]).chain(stream::pending());
        refused(
            rig.divert(method, endless).await,
            Code::DeadlineExceeded,
            "DEADLINE",
            &["300 ms", "server.request_ms"],
        );
        let two = stream::iter([FlightData::new(), FlightData::new()]);
        refused(
            rig.divert(method, two).await,
            Code::InvalidArgument,
            "BAD_REQUEST",
            &["more than one message"],
        );
    }
    refused(
        rig.divert("Nonsense", stream::iter([FlightData::new()]))
            .await,
        Code::Unimplemented,
        "UNSUPPORTED_OP",
        &["no such call"],
    );
    // A cmd as large as it may be, and a longer one.
    let padded = |bytes: usize| {
        let mut invoke = shift("x");
        invoke["parameters"]["text"] = "n".repeat(bytes).into();
        cmd(&invoke)
    };
    rig.put("x", floats(3)).await.unwrap();
    refused(
        rig.info(padded(MIB - 1000)).await,
        Code::InvalidArgument,
        "UNKNOWN_PARAMETER",
        &["`text`"],
    );
    for bytes in [MIB, 60 * MIB] {
        refused(
            rig.info(padded(bytes)).await,
            Code::InvalidArgument,
            "BAD_REQUEST",
            &["1048576"],
        );
    }
    rig.act("drop", "x").await.unwrap();
    eventually("nothing is left", || rig.used() == used).await;
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_budget_still_lets_a_drop_in() {
    let rig = Rig::with(|config| config.memory.budget_bytes = Some(4 << 20)).await;
    rig.put("x", floats(MIB / 8)).await.unwrap();
    let rest = rig
        .host
        .budget()
        .try_reserve(rig.host.budget().limit() - rig.host.budget().used());
    refused(
        rig.put("y", floats(MIB / 8)).await,
        Code::ResourceExhausted,
        "BUDGET_EXCEEDED",
        &["4194304"],
    );
    rig.act("drop", "x").await.unwrap();
    drop(rest);
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn text_that_is_no_utf8_is_told_so() {
    let rig = Rig::new().await;
    // As a descriptor this is a path, as an action its kind.
    let path = FlightData::new().with_app_metadata(vec![0xff]);
    let kind = FlightData::new().with_descriptor(FlightDescriptor::new_cmd(vec![0xff]));
    for (method, message) in [
        ("GetFlightInfo", &path),
        ("GetSchema", &path),
        ("PollFlightInfo", &path),
        ("DoAction", &kind),
    ] {
        refused(
            rig.divert(method, stream::iter([message.clone()])).await,
            Code::InvalidArgument,
            "BAD_REQUEST",
            &[method, "UTF-8"],
        );
    }
    refused(
        rig.info(FlightDescriptor::new_cmd(vec![0xff])).await,
        Code::InvalidArgument,
        "BAD_REQUEST",
        &["cmd", "JSON"],
    );
    let prefix = Criteria {
        expression: Bytes::from_static(b"\xff"),
    };
    refused(
        rig.client().await.list_flights(prefix).await,
        Code::InvalidArgument,
        "BAD_REQUEST",
        &["text"],
    );
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_stay_on_one_line_and_short() {
    let rig = Rig::new().await;
    let forged = "x`\n2026-01-01T00:00:00Z  INFO strait: forged\r\u{0}\u{1b}[2J";
    let long = "n".repeat(900 << 10);
    for name in [forged, &long] {
        for refused in [
            rig.info(path(name)).await.map(|_| ()),
            rig.get(name.to_owned()).await.map(|_| ()),
            rig.put(name, floats(1)).await.map(|_| ()),
            rig.act("drop", name.to_owned()).await.map(|_| ()),
            rig.act(name, "").await.map(|_| ()),
            rig.act("describe", name.to_owned()).await.map(|_| ()),
            rig.info(cmd(&json!({"kernel": name, "inputs": {}})))
                .await
                .map(|_| ()),
            rig.info(cmd(&shift(name))).await.map(|_| ()),
        ] {
            let status = refused.unwrap_err();
            let text = format!(
                "{}{}",
                status.message(),
                String::from_utf8_lossy(status.details())
            );
            assert!(
                text.len() < 8 << 10 && !text.contains(char::is_control),
                "{text:?}"
            );
        }
    }
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_pauses_too_long_is_ended() {
    let rig = Rig::with(|config| config.server.stall_ms = Some(300)).await;
    let used = rig.used();
    let data = messages(&floats(MIB), Some("x")).await;
    for count in [0, 1, 4] {
        let sent = data.clone().into_iter().take(count);
        let paused = stream::iter(sent).chain(stream::pending());
        refused(
            rig.divert("DoPut", paused).await,
            Code::DeadlineExceeded,
            "DEADLINE",
            &["300 ms", "server.stall_ms"],
        );
    }
    assert_eq!(
        (rig.used(), rig.host.list(rig.me(), None, 10).len()),
        (used, 0)
    );
    // One that takes longer in all, without such a pause.
    let slow = stream::iter(data).then(|message| async {
        tokio::time::sleep(Duration::from_millis(30)).await;
        message
    });
    rig.divert("DoPut", slow).await.unwrap();
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_pauses_too_long_is_ended() {
    let rig = Rig::with(|config| config.server.stall_ms = Some(300)).await;
    let used = rig.used();
    rig.put("x", floats(8 * MIB)).await.unwrap();
    let mut client = rig.client().await;
    let mut paused = client.do_get(Ticket::new("x")).await.unwrap().into_inner();
    paused.try_next().await.unwrap().unwrap();
    // It reads from time to time: longer in all, and to the end.
    let mut slow = rig
        .client()
        .await
        .do_get(Ticket::new("x"))
        .await
        .unwrap()
        .into_inner();
    let mut bytes = 0;
    while let Some(message) = slow.try_next().await.unwrap() {
        bytes += message.data_body.len();
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(bytes, 64 * MIB);
    eventually("the paused reader holds nothing", || {
        state(&rig, "x") == (FlightState::Uploaded, 0)
    })
    .await;
    rig.act("drop", "x").await.unwrap();
    eventually("its bytes are free", || rig.used() == used).await;
    let end: Result<Vec<_>, _> = paused.try_collect().await;
    refused(
        end,
        Code::DeadlineExceeded,
        "DEADLINE",
        &["300 ms", "server.stall_ms"],
    );
    rig.end().await;
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A frame of HTTP/2.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// The header block of a call.
fn headers(method: &str) -> Vec<u8> {
    let literal = |name: &str, value: &str| {
        let text = |text: &str| [&[u8::try_from(text.len()).unwrap()], text.as_bytes()].concat();
        [vec![0x40], text(name), text(value)].concat()
    };
    let path = format!("/arrow.flight.protocol.FlightService/{method}");
    [
        vec![0x83, 0x86],
        literal(":path", &path),
        literal(":authority", "tmp%2Fa%2Fflight.sock"),
        literal("content-type", "application/grpc"),
        literal("te", "trailers"),
    ]
    .concat()
}

/// A DoGet of `x` whose client has room for everything, and says so.
fn raw_do_get() -> Vec<u8> {
    let window = (1_u32 << 30).to_be_bytes();
    let settings = [&[0, 4], &window[..]].concat();
    let ticket = [&[0, 0, 0, 0, 3, 0x0a, 1], &b"x"[..]].concat();
    [
        PREFACE.to_vec(),
        frame(4, 0, 0, &settings),
        frame(8, 0, 0, &window),
        frame(1, 4, 1, &headers("DoGet")),
        frame(0, 1, 1, &ticket),
    ]
    .concat()
}

async fn raw(directory: &std::path::Path, sent: &[u8]) -> tokio::net::UnixStream {
    use tokio::io::AsyncWriteExt;
    let socket = directory.join("flight.sock");
    let mut socket = tokio::net::UnixStream::connect(socket).await.unwrap();
    socket.write_all(sent).await.unwrap();
    socket
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_must_go_on_with_what_it_began() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let rig = Rig::with(|config| {
        config.server.request_ms = Some(300);
        config.server.stall_ms = Some(600);
    })
    .await;
    rig.put("x", floats(8 * MIB)).await.unwrap();
    let settings = frame(4, 0, 0, b"");
    let block = headers("ListActions");
    for begun in [
        vec![],
        PREFACE[..10].to_vec(),
        PREFACE.to_vec(),
        [PREFACE, &settings, &[0, 0]].concat(),
        [PREFACE, &settings, &frame(1, 0, 1, &block[..20])].concat(),
        [PREFACE, &settings, &frame(1, 4, 1, &block)[..20]].concat(),
    ] {
        let mut socket = raw(rig.directory.path(), &begun).await;
        let mut answer = Vec::new();
        // What it says, if anything, is HTTP/2's affair.
        let _ = within(
            "the end of what was only begun",
            socket.read_to_end(&mut answer),
        )
        .await;
    }
    // Byte by byte, each in time, the whole too late.
    let mut socket = raw(rig.directory.path(), &[]).await;
    let dripped = async {
        for byte in PREFACE {
            if socket.write_all(&[*byte]).await.is_err() {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        false
    };
    assert!(within("the drip ends", dripped).await);
    // Whole, and then silent: an idle connection.
    let idle = rig.client().await;
    let mut quiet = raw(rig.directory.path(), &[PREFACE, &settings].concat()).await;
    // One that takes nothing of what it asked for.
    let mut deaf = raw(rig.directory.path(), &raw_do_get()).await;
    eventually("it is read for", || {
        state(&rig, "x").0 == FlightState::Streaming
    })
    .await;
    eventually("it is no longer waited for", || {
        state(&rig, "x") == (FlightState::Uploaded, 0)
    })
    .await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let mut answer = Vec::new();
    let _ = within("the deaf one's end", deaf.read_to_end(&mut answer)).await;
    assert!(answer.len() < 64 * MIB, "{}", answer.len());
    idle.clone().list_actions(Empty {}).await.unwrap();
    quiet.write_all(&frame(1, 5, 1, &block)).await.unwrap();
    let mut start = [0; 9];
    within("an answer", quiet.read_exact(&mut start))
        .await
        .unwrap();
    drop((idle, quiet));
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn floods_do_no_harm() {
    use tokio::io::AsyncWriteExt;
    let rig = Rig::with(|config| {
        config.server.request_ms = Some(500);
        config.server.stall_ms = Some(500);
    })
    .await;
    rig.put("x", floats(8 * MIB)).await.unwrap();
    let used = rig.used();
    let start = [PREFACE, &frame(4, 0, 0, b"")].concat();
    let get = headers("DoGet");
    let ticket = [&[0, 0, 0, 0, 3, 0x0a, 1], &b"x"[..]].concat();
    let ids = || (0..20_000_u32).map(|n| 2 * n + 1);
    let floods: [(&str, Vec<u8>); 7] = [
        (
            "calls that are reset at once",
            ids()
                .flat_map(|id| [frame(1, 4, id, &get), frame(3, 0, id, &[0, 0, 0, 8])].concat())
                .collect(),
        ),
        (
            "reads that are reset at once",
            ids()
                .flat_map(|id| {
                    let read = [frame(1, 4, id, &get), frame(0, 1, id, &ticket)].concat();
                    [read, frame(3, 0, id, &[0, 0, 0, 8])].concat()
                })
                .collect(),
        ),
        (
            "more calls than there may be",
            ids().flat_map(|id| frame(1, 4, id, &get)).collect(),
        ),
        (
            "a header block without end",
            std::iter::once(frame(1, 0, 1, &get))
                .chain((0..100_000).map(|_| frame(9, 0, 1, &[0x82])))
                .flatten()
                .collect(),
        ),
        ("pings", frame(6, 0, 0, &[0; 8]).repeat(100_000)),
        ("settings", frame(4, 0, 0, b"").repeat(100_000)),
        (
            "empty data",
            [frame(1, 4, 1, &get), frame(0, 0, 1, b"").repeat(100_000)].concat(),
        ),
    ];
    for (what, flood) in floods {
        let mut socket = raw(rig.directory.path(), &start).await;
        // Until the host has had enough; nothing is read.
        let sent = tokio::time::timeout(Duration::from_secs(2), socket.write_all(&flood)).await;
        rig.info(path("x")).await.unwrap();
        assert_eq!(
            f64s(&rig.get("x").await.unwrap()).len(),
            8 * MIB,
            "{what}: {sent:?}"
        );
        drop(socket);
        eventually(what, || state(&rig, "x") == (FlightState::Uploaded, 0)).await;
        eventually(what, || rig.used() == used).await;
    }
    rig.end().await;
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

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_holds_the_bytes_of_its_tensors() {
    let served = served::Served::start(&[]);
    let mut watcher = served.greeted();
    let mut client = connect(&served).await;
    let resident = |watcher: &mut served::Raw| {
        let stats = watcher.ok(strait_client::wire::Op::Stats, json!({}));
        stats["process"]["resident_bytes"].as_u64().unwrap()
    };
    let before = resident(&mut watcher);
    let data = messages(&floats(1), Some("x")).await;
    let empty = floats(0);
    let empty = batches_to_flight_data(&empty.schema(), [&empty]).unwrap();
    let empty = FlightData {
        data_body: vec![0xff; MIB].into(),
        ..empty[1].clone()
    };
    let [schema, row] = <[FlightData; 2]>::try_from(data).unwrap();
    let padding = FlightData {
        app_metadata: vec![0xff; MIB].into(),
        ..row.clone()
    };
    // 900 MiB in all, for 600 rows.
    let sent = (0..300).flat_map(move |_| [empty.clone(), row.clone(), padding.clone()]);
    put_to(&mut client, stream::iter([schema].into_iter().chain(sent))).await;
    let after = resident(&mut watcher);
    assert!(after < before + (64 << 20), "{before} to {after} bytes");
    let stats = watcher.ok(strait_client::wire::Op::Stats, json!({}));
    assert!(
        stats["budget_used_bytes"].as_u64().unwrap() < 1 << 20,
        "{stats}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn ending_does_not_wait_for_clients_that_do_not_go_on() {
    // Nothing but the end of everybody else ends it.
    let served = served::Served::with(&[], &[("STRAIT__SERVER__DRAIN_MS", "3600000")]);
    let mut client = connect(&served).await;
    let data = messages(&floats(8 * MIB), Some("x")).await;
    put_to(&mut client, stream::iter(data.clone())).await;
    // It reads no further, while its library still speaks HTTP/2.
    let mut paused = client.do_get(Ticket::new("x")).await.unwrap().into_inner();
    paused.try_next().await.unwrap().unwrap();
    // They read nothing at all: with something to read, and with nothing.
    let directory = served.directory();
    let _deaf = raw(&directory, &raw_do_get()).await;
    let _silent = raw(&directory, &[PREFACE, &frame(4, 0, 0, b"")].concat()).await;
    let _nothing = raw(&directory, b"").await;
    // It sends no further.
    let mut sender = connect(&served).await;
    let name = data[0].clone().with_descriptor(path("y"));
    let half = stream::iter([name]).chain(stream::pending());
    let _upload = sender.do_put(half).await.unwrap();
    // And one that reads to the end.
    let mut reader = connect(&served).await;
    let mut read = reader.do_get(Ticket::new("x")).await.unwrap().into_inner();
    read.try_next().await.unwrap().unwrap();
    served.terminate();
    let mut bytes = 0;
    while let Some(message) = within("the rest", read.try_next()).await.unwrap() {
        bytes += message.data_body.len();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(bytes, 64 * MIB);
    tokio::task::spawn_blocking(move || served.ended())
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn ending_waits_for_a_call_that_runs() {
    let mut rig = Rig::new().await;
    let text = std::fs::read_to_string("tests/guests/spins.wat").unwrap();
    rig.host
        .load_plugin(&guest::component("spins", &text))
        .unwrap();
    rig.put("x", floats(3)).await.unwrap();
    let mut client = rig.client().await;
    // Nothing moves on its connection for longer than a silent one is given.
    let spins = json!({"kernel": "spins/k", "inputs": {"x": "x"}, "deadline_ms": 3000});
    let call = tokio::spawn(async move { client.get_flight_info(cmd(&spins)).await });
    eventually("it runs", || rig.host.stats(None)["running"] == 1).await;
    drop(rig.stop.take());
    let answer = within("its answer", call).await.unwrap();
    refused(answer, Code::DeadlineExceeded, "DEADLINE", &["3000 ms"]);
    within("the end", rig.end()).await;
}

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), future)
        .await
        .unwrap_or_else(|_| panic!("never: {what}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn ending_lets_streams_finish() {
    let mut rig = Rig::new().await;
    rig.put("x", floats(8 * MIB)).await.unwrap();
    let mut client = rig.client().await;
    let mut stream = client.do_get(Ticket::new("x")).await.unwrap().into_inner();
    stream.try_next().await.unwrap().unwrap();
    drop(rig.stop.take());
    let mut bytes = 0;
    while let Some(message) = within("the rest", stream.try_next()).await.unwrap() {
        bytes += message.data_body.len();
    }
    assert_eq!(bytes, 64 * MIB);
    drop((stream, client));
    within("the end", rig.end()).await;
}
