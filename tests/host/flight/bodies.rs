//! DoPut of long messages, whose bodies go past gRPC to where they stay.

use std::collections::{HashMap, VecDeque};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use arrow_array::{ArrayRef, Float32Array, Float64Array, RecordBatch};
use arrow_flight::FlightData;
use arrow_flight::utils::batches_to_flight_data;
use bytes::Bytes;
use prost::Message;
use tonic::Code;
use tonic::body::Body;
use tonic::codegen::{Service, http};

use super::{MIB, Rig, batch, column, eventually, f64s, floats, path, refused};

/// Two columns of `rows` rows from `start` on, 12 bytes each.
fn table(start: usize, rows: usize) -> RecordBatch {
    let doubles: Float64Array = (start..start + rows).map(|n| n as f64).collect();
    let singles: Float32Array = (start..start + rows).map(|n| -(n as f32)).collect();
    batch(vec![
        ("d", Arc::new(doubles) as ArrayRef, HashMap::new()),
        ("s", Arc::new(singles), HashMap::new()),
    ])
}

/// Each batch in one message.
fn whole(batches: &[RecordBatch]) -> Vec<FlightData> {
    let mut data = batches_to_flight_data(&batches[0].schema(), batches).unwrap();
    data[0].flight_descriptor = Some(path("x"));
    data
}

fn flight_in(rig: &Rig) -> u64 {
    rig.host.stats().host.unwrap().copied["flight_in"]
}

async fn holds(rig: &Rig, rows: usize) {
    let got = rig.get("x").await.unwrap();
    let doubles: Vec<Float64Array> = column(&got, 0);
    let singles: Vec<Float32Array> = column(&got, 1);
    let doubles: Vec<f64> = doubles
        .iter()
        .flat_map(|part| part.values().to_vec())
        .collect();
    let singles: Vec<f32> = singles
        .iter()
        .flat_map(|part| part.values().to_vec())
        .collect();
    assert_eq!((doubles.len(), singles.len()), (rows, rows));
    assert!(
        doubles
            .iter()
            .enumerate()
            .all(|(n, value)| *value == n as f64)
    );
    assert!(
        singles
            .iter()
            .enumerate()
            .all(|(n, value)| *value == -(n as f32))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn one_long_batch_is_copied_once_however_many_columns_it_has() {
    let rig = Rig::new().await;
    let used = rig.used();
    let rows = MIB + 5;
    rig.put_all("x", whole(&[table(0, rows)]), &[])
        .await
        .unwrap();
    assert_eq!(flight_in(&rig), 12 * rows as u64);
    holds(&rig, rows).await;
    let segment = rig.me().lookup("x").unwrap();
    assert_eq!(segment.capacity(), rig.used() - used);
    drop(segment);
    rig.act("drop", "x").await.unwrap();
    eventually("its bytes are free", || rig.used() == used).await;

    let before = flight_in(&rig);
    let count = 5 * MIB;
    rig.put_all("x", whole(&[floats(count)]), &[])
        .await
        .unwrap();
    assert_eq!(flight_in(&rig) - before, 8 * count as u64);
    assert_eq!(f64s(&rig.get("x").await.unwrap()).len(), count);
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn several_batches_of_several_columns_are_put_together() {
    let rig = Rig::new().await;
    let used = rig.used();
    let (long, short) = (MIB / 2, 1000);
    // The first one lies where it would be if it were the only one; or it does not, since something came before it.
    for order in [vec![long, short, long], vec![short, long, short]] {
        let before = flight_in(&rig);
        let mut start = 0;
        let batches: Vec<_> = order
            .iter()
            .map(|rows| {
                let batch = table(start, *rows);
                start += rows;
                batch
            })
            .collect();
        rig.put_all("x", whole(&batches), &[]).await.unwrap();
        holds(&rig, start).await;
        // Out of the messages, and into the segment: from the file through a buffer.
        let copies = |rows: &usize| if *rows == long { 3 } else { 2 };
        let copied: usize = order.iter().map(|rows| 12 * rows * copies(rows)).sum();
        assert_eq!(flight_in(&rig) - before, copied as u64, "{order:?}");
        rig.act("drop", "x").await.unwrap();
        eventually("its bytes are free", || rig.used() == used).await;
    }
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_takes_its_long_body_with_it() {
    let rig = Rig::new().await;
    let used = rig.used();
    let data = whole(&[floats(MIB)]);
    let mut shorter = data.clone();
    shorter[1].data_body = shorter[1].data_body.slice(..8 * MIB - 8);
    refused(
        rig.put_all("x", shorter, &[]).await,
        Code::InvalidArgument,
        "BAD_TENSOR",
        &["`x`", "8388600", "1048576 rows"],
    );
    let mut headless = data.clone();
    headless[1].data_header = Bytes::new();
    refused(
        rig.put_all("x", headless, &[]).await,
        Code::InvalidArgument,
        "BAD_REQUEST",
        &["8388608", "no header"],
    );
    // What a schema has for a body belongs nowhere; what surrounds the values neither.
    let mut padded = data.clone();
    padded[0].data_body = vec![7; 5 * MIB].into();
    padded[1].data_body = [&padded[1].data_body[..], &[9; 5 * MIB]].concat().into();
    rig.put_all("x", padded, &[]).await.unwrap();
    assert_eq!(f64s(&rig.get("x").await.unwrap()), f64s(&[floats(MIB)]));
    assert_eq!(flight_in(&rig), 8 * MIB as u64);
    rig.act("drop", "x").await.unwrap();
    eventually("all is free", || rig.used() == used).await;
    rig.end().await;
}

/// Bytes as a request's body, whatever they are.
struct Raw(VecDeque<Bytes>);

impl http_body::Body for Raw {
    type Data = Bytes;
    type Error = tonic::Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, tonic::Status>>> {
        Poll::Ready(self.0.pop_front().map(http_body::Frame::data).map(Ok))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_ends_too_early_is_no_upload() {
    let rig = Rig::new().await;
    let used = rig.used();
    let data = whole(&[floats(2 * MIB)]);
    let framed = |message: &FlightData| {
        let bytes = message.encode_to_vec();
        let length = u32::try_from(bytes.len()).unwrap().to_be_bytes();
        [&[0], &length[..], &bytes].concat()
    };
    let (schema, batch) = (framed(&data[0]), framed(&data[1]));
    // In the prefix, in the head, at the beginning and before the end of the body.
    for cut in [3, 5, 40, 10_000, batch.len() - 1, batch.len()] {
        let sent = [&schema[..], &batch[..cut]].concat();
        let pieces = sent.chunks(100_001).map(Bytes::copy_from_slice).collect();
        let request = http::Request::post("/arrow.flight.protocol.FlightService/DoPut")
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(Body::new(Raw(pieces)));
        let mut channel = rig.channel().await;
        std::future::poll_fn(|context| channel.poll_ready(context))
            .await
            .unwrap();
        let mut answer = channel.call(request.unwrap()).await.unwrap().into_body();
        let mut trailers = http::HeaderMap::new();
        while let Some(frame) = std::future::poll_fn(|context| {
            http_body::Body::poll_frame(Pin::new(&mut answer), context)
        })
        .await
        {
            if let Ok(found) = frame.unwrap().into_trailers() {
                trailers = found;
            }
        }
        if cut == batch.len() {
            assert_eq!(trailers["grpc-status"], "0");
            continue;
        }
        let reason = trailers.get("x-strait-reason");
        assert_eq!(reason.unwrap(), "CANCELLED", "{cut}: {trailers:?}");
        let told = trailers["grpc-message"].to_str().unwrap();
        assert!(told.contains("ended%20too%20early"), "{cut}: {told}");
        assert!(rig.me().list(None, 1).unwrap().is_empty(), "{cut}");
        eventually("what came is free", || rig.used() == used).await;
    }
    assert_eq!(f64s(&rig.get("x").await.unwrap()).len(), 2 * MIB);
    rig.end().await;
}
