//! DoPut of batches whose buffers are compressed.

use std::collections::HashMap;
use std::sync::Arc;

use arrow_array::{Float64Array, Int32Array, RecordBatch};
use arrow_flight::FlightData;
use arrow_flight::encode::FlightDataEncoderBuilder;
use arrow_ipc::CompressionType;
use arrow_ipc::writer::IpcWriteOptions;
use futures::{TryStreamExt, stream};
use tonic::Code;

use super::{Rig, batch, column, eventually, f64s, path, reason, refused};

/// The messages of an upload, LZ4 in all buffers. `message_bytes`: how long they may be.
async fn messages(name: &str, table: &RecordBatch, message_bytes: usize) -> Vec<FlightData> {
    let options = IpcWriteOptions::default()
        .try_with_compression(Some(CompressionType::LZ4_FRAME))
        .unwrap();
    FlightDataEncoderBuilder::new()
        .with_options(options)
        .with_max_flight_data_size(message_bytes)
        .with_flight_descriptor(Some(path(name)))
        .build(stream::iter([Ok(table.clone())]))
        .try_collect()
        .await
        .unwrap()
}

fn table(rows: u32, value: impl Fn(u32) -> f64) -> RecordBatch {
    let floats: Float64Array = (0..rows).map(value).collect();
    let integers: Int32Array = (0..rows).map(|row| row.cast_signed() / 3).collect();
    batch(vec![
        ("x", Arc::new(floats), HashMap::new()),
        ("n", Arc::new(integers), HashMap::new()),
    ])
}

/// A value that no codec makes shorter.
fn noise(row: u32) -> f64 {
    f64::from_bits(u64::from(row).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 2)
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_come_back_as_they_were() {
    let rig = Rig::new().await;
    for (rows, message_bytes) in [
        (0, 1 << 20),
        (1, 1 << 20),
        (1000, 1000),
        (1_500_000, 64 << 20),
    ] {
        for (kind, value) in [
            ("noise", noise as fn(u32) -> f64),
            ("same", |_| 1.5),
            ("ramp", f64::from),
        ] {
            let sent = table(rows, value);
            let data = messages("x", &sent, message_bytes).await;
            rig.put_all("x", data, &[("x-strait-replace", "true")])
                .await
                .unwrap();
            let read = rig.get("x").await.unwrap();
            assert!(
                f64s(&read).into_iter().eq((0..rows).map(value)),
                "{rows} {kind}"
            );
            let integers = column::<Int32Array>(&read, 1);
            let integers = integers.iter().flat_map(|part| part.values().to_vec());
            assert!(
                integers.eq((0..rows).map(|row| row.cast_signed() / 3)),
                "{rows} {kind}"
            );
        }
    }
    // Some batches are compressed, and some are not.
    let (plain, packed) = (table(700_000, f64::from), table(700_000, noise));
    let mut data = super::messages(&plain, Some("mixed")).await;
    data.extend(
        messages("mixed", &packed, 64 << 20)
            .await
            .into_iter()
            .skip(1),
    );
    data.extend(super::messages(&plain, None).await.into_iter().skip(1));
    rig.put_all("mixed", data, &[]).await.unwrap();
    let read = f64s(&rig.get("mixed").await.unwrap());
    let ramp = || (0..700_000).map(f64::from);
    assert!(
        read.into_iter()
            .eq(ramp().chain((0..700_000).map(noise)).chain(ramp()))
    );
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_comes_of_few_bytes_is_charged_before() {
    let rig = Rig::with(|config| config.memory.budget_bytes = Some(64 << 20)).await;
    let used = rig.used();
    let data = messages("bomb", &table(20_000_000, |_| 0.0), 1 << 30).await;
    let bytes: usize = data.iter().map(|data| data.data_body.len()).sum();
    assert!(bytes < 4 << 20, "{bytes} bytes for 240 MB");
    let refused = rig.put_all("bomb", data, &[]).await.unwrap_err();
    assert_eq!(
        (refused.code(), &*reason(&refused)),
        (Code::ResourceExhausted, "BUDGET_EXCEEDED")
    );
    eventually("all of it is given back", || rig.used() == used).await;
    let data = messages("fits", &table(100_000, |_| 0.0), 1 << 30).await;
    rig.put_all("fits", data, &[]).await.unwrap();
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_bodies_are_refused() {
    let rig = Rig::new().await;
    let used = rig.used();
    let sent = messages("bad", &table(5_000, f64::from), 1 << 20).await;
    let at = sent
        .iter()
        .position(|data| !data.data_body.is_empty())
        .unwrap();
    let body = sent[at].data_body.to_vec();
    let with = |body: Vec<u8>| {
        let mut data = sent.clone();
        data[at].data_body = body.into();
        rig.put_all("bad", data, &[])
    };
    // The length of the first column's values, and the first bytes of their frame.
    let header = arrow_ipc::root_as_message(&sent[at].data_header).unwrap();
    let buffers = header.header_as_record_batch().unwrap().buffers().unwrap();
    // Behind its validity.
    let first = usize::try_from(buffers.get(1).offset()).unwrap();
    let mut shorter = body.clone();
    shorter[first..first + 8].copy_from_slice(&7_u64.to_le_bytes());
    refused(
        with(shorter).await,
        Code::InvalidArgument,
        "BAD_TENSOR",
        &["`x`", "7 bytes"],
    );
    let mut broken = body.clone();
    broken[first + 8] ^= 0xff;
    refused(
        with(broken).await,
        Code::InvalidArgument,
        "BAD_TENSOR",
        &["`x`", "damaged"],
    );
    let cut = body[..body.len() / 2].to_vec();
    refused(
        with(cut).await,
        Code::InvalidArgument,
        "BAD_TENSOR",
        &["does not hold"],
    );
    refused(
        rig.get("bad").await,
        Code::NotFound,
        "FLIGHT_NOT_FOUND",
        &[],
    );
    eventually("nothing is left", || rig.used() == used).await;
    rig.end().await;
}
