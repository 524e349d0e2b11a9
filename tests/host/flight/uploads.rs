//! DoPut: what is refused, what is charged, and uploads that wait, break off or cheat.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use arrow_array::types::Int32Type;
use arrow_array::{
    ArrayRef, BooleanArray, DictionaryArray, FixedSizeListArray, Float64Array, StringArray,
    UInt16Array,
};
use arrow_flight::flight_service_client::FlightServiceClient;
use arrow_flight::utils::batches_to_flight_data;
use arrow_flight::{FlightData, FlightDescriptor};
use arrow_schema::{DataType, Field, Schema};
use bytes::Bytes;
use futures::{Stream, StreamExt, TryStreamExt, stream};
use serde_json::json;
use tokio::sync::mpsc;
use tonic::Code;
use tonic::transport::Endpoint;

use super::{
    MIB, Rig, batch, connect, eventually, f64s, floats, lists, messages, path, put_to, reason,
    refused,
};
use crate::served;

/// What a test sends bit by bit, as a request's stream.
fn sent_to(receiver: mpsc::Receiver<FlightData>) -> impl Stream<Item = FlightData> {
    stream::unfold(receiver, |mut receiver| async move {
        let message = receiver.recv().await?;
        Some((message, receiver))
    })
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
        rig.me().drop_flight(name).unwrap();
    }
    let huge = "n".repeat(50_000);
    for (batch, words) in [
        (many(129), &["129 tensors", "128"][..]),
        (many(1000), &["1000 tensors", "128"]),
        (many(50_000), &["header of", "1048576"]),
        (named(&[""]), &["``", "0 bytes"]),
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
        (rig.used(), rig.me().list(None, 10).unwrap().len()),
        (used, 0)
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
        (rig.used(), rig.me().list(None, 10).unwrap().len()),
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
                    rig.me().drop_flight("x").unwrap();
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
        (rig.used(), rig.me().list(None, 10).unwrap().len()),
        (used, 0)
    );
    rig.put("x", floats(3)).await.unwrap();
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_are_charged_while_they_arrive() {
    let rig = Rig::with(|config| config.memory.budget_bytes = Some(16 << 20)).await;
    let freed = || eventually("what was refused is free", || rig.host.budget().used() == 0);
    let full = |result| {
        refused(
            result,
            Code::ResourceExhausted,
            "BUDGET_EXCEEDED",
            &["segment", "16777216"],
        );
    };
    // 12 MiB are where they stay, once; 24 MiB do not even arrive.
    let data = messages(&floats(12 * MIB / 8), Some("x")).await;
    rig.put_all("x", data.clone(), &[]).await.unwrap();
    rig.act("drop", "x").await.unwrap();
    freed().await;
    let twice: Vec<_> = data.iter().chain(&data[1..]).cloned().collect();
    full(rig.put_all("x", twice, &[]).await);
    freed().await;
    // Of two columns what comes later cannot follow at once: there is no room for 12 MiB and their copy.
    let values = || Arc::new(Float64Array::from(vec![1.0; 3 * MIB / 8])) as ArrayRef;
    let none = HashMap::new;
    let two = batch(vec![("a", values(), none()), ("b", values(), none())]);
    let data = messages(&two, Some("x")).await;
    let twice: Vec<_> = data.iter().chain(&data[1..]).cloned().collect();
    full(rig.put_all("x", twice, &[]).await);
    freed().await;
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
        rig.me()
            .lookup("x")
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
        rig.me()
            .lookup("x")
            .is_err_and(|e| e.reason == "FLIGHT_NOT_FOUND")
    })
    .await;
    eventually("its bytes are free", || rig.used() == used).await;
    drop(sender);
    rig.put("x", floats(3)).await.unwrap();
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
    assert_eq!(rig.me().list(None, 10).unwrap().len(), 0);
    eventually("their bytes are free", || rig.used() == used).await;
    // One that takes longer in all, without such a pause.
    let slow = stream::iter(data).then(|message| async {
        tokio::time::sleep(Duration::from_millis(30)).await;
        message
    });
    rig.divert("DoPut", slow).await.unwrap();
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn long_and_short_messages_are_copied_in_their_order() {
    let rig = Rig::new().await;
    let used = rig.used();
    let before = rig.host.stats().host.unwrap().copied["flight_in"];
    let values: Vec<f64> = (0..MIB).map(|n| n as f64).collect();
    // 8 MiB: short, 4 MiB, short, short, nearly 4 MiB.
    let cuts = [0, 1000, 1000 + MIB / 2, 1001 + MIB / 2, 2000 + MIB / 2, MIB];
    let mut sent = Vec::new();
    for cut in cuts.windows(2) {
        let part = Float64Array::from(values[cut[0]..cut[1]].to_vec());
        let part = batch(vec![("x", Arc::new(part) as ArrayRef, HashMap::new())]);
        let data = batches_to_flight_data(&part.schema(), [&part]).unwrap();
        let skipped = usize::from(!sent.is_empty());
        sent.extend(data.into_iter().skip(skipped));
    }
    sent[0].flight_descriptor = Some(path("x"));
    rig.put_all("x", sent, &[]).await.unwrap();
    assert_eq!(f64s(&rig.get("x").await.unwrap()), values);
    let copied = rig.host.stats().host.unwrap().copied["flight_in"] - before;
    // Those before the first long one twice: nobody knew yet that the tensor would be long.
    assert_eq!(copied, 8 * (MIB + 1000) as u64);
    rig.act("drop", "x").await.unwrap();
    eventually("its bytes are free", || rig.used() == used).await;
    rig.end().await;
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
