//! What goes in and comes out: every dtype and shape, all that a schema says, and how large tensors are cut.

use std::collections::HashMap;
use std::sync::Arc;

use arrow_array::{
    Array, ArrayRef, FixedSizeListArray, Float32Array, Float64Array, Int8Array, Int64Array,
    RecordBatch, UInt16Array,
};
use arrow_flight::utils::flight_data_to_batches;
use arrow_flight::{FlightClient, Ticket};
use arrow_schema::{DataType, Field, Schema};
use futures::TryStreamExt;
use serde_json::{Value, json};
use strait_memory::InputSource;
use tonic::transport::Endpoint;
use tonic::{Code, Status};

use super::{MIB, Rig, batch, f64s, floats, lists, messages, path, refused};

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
    assert_eq!(mapping["writers"], "none");

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
    // columns start on multiples of 64 bytes, once by gRPC, and once from HTTP/2's short frames for the socket.
    let copied = || rig.host.stats().host.unwrap().copied;
    let bytes = 4 * 8 + 24 * 4 + 24 * 4 + 4 * 2 + 4;
    assert_eq!(copied()["flight_in"], 2 * bytes);
    assert_eq!(copied()["flight_out"], 3 * bytes);
    // A single column goes from the segment's own pages.
    let values = 64 * 1024 + 3;
    rig.put("y", self::floats(values)).await.unwrap();
    let before = copied()["flight_out"];
    rig.get("y").await.unwrap();
    let bytes = 8 * values as u64;
    assert_eq!(copied()["flight_out"] - before, 2 * bytes);
    // To a client that takes long frames it goes as gRPC has it.
    let socket = rig.directory.path().join("flight.sock");
    let endpoint = Endpoint::from_shared(format!("unix:{}", socket.display())).unwrap();
    let channel = endpoint.max_frame_size(1 << 20).connect().await.unwrap();
    let before = copied()["flight_out"];
    let mut client = FlightClient::new(channel);
    let batches = client.do_get(Ticket::new("y")).await.unwrap();
    let got: Vec<_> = batches.try_collect().await.unwrap();
    assert_eq!(f64s(&got), f64s(&[self::floats(values)]));
    assert_eq!(copied()["flight_out"] - before, bytes);
    rig.end().await;
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
    let segment = rig.me().lookup("x").unwrap();
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
    rig.me().drop_flight("most").unwrap();
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
        (rig.used(), rig.me().list(None, 10).unwrap().len()),
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
    let (segment, fd) = rig.me().create(tensors).unwrap();
    drop(fd);
    rig.me().publish(&segment, "wide", false).unwrap();
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
