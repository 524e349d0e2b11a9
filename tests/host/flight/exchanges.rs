//! DoExchange: wrong starts, wrong messages, clients that leave, and what is left of each.

use std::sync::Arc;

use arrow_array::types::Int32Type;
use arrow_array::{ArrayRef, DictionaryArray, Float64Array, RecordBatch};
use arrow_flight::utils::flight_data_to_batches;
use arrow_flight::{FlightData, FlightDescriptor};
use futures::{Stream, TryStreamExt, stream};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tonic::{Code, Status, Streaming};

use super::{MIB, Rig, batch, cmd, eventually, f64s, floats, messages, path, refused};

fn sent_to(receiver: mpsc::Receiver<FlightData>) -> impl Stream<Item = FlightData> {
    stream::unfold(receiver, |mut receiver| async move {
        let message = receiver.recv().await?;
        Some((message, receiver))
    })
}

/// Messages of `batch`, the first with `descriptor`.
async fn asking(descriptor: FlightDescriptor, batch: &RecordBatch) -> Vec<FlightData> {
    let mut messages = messages(batch, None).await;
    messages[0].flight_descriptor = Some(descriptor);
    messages
}

fn cumsum() -> Value {
    json!({"kernel": "cumsum"})
}

impl Rig {
    async fn exchanging(&self, data: Vec<FlightData>) -> Result<Vec<FlightData>, Status> {
        let mut client = self.client().await;
        let replies = client.do_exchange(stream::iter(data)).await?;
        replies.into_inner().try_collect().await
    }

    /// One that goes on: where to send, and what comes.
    async fn open(&self) -> (mpsc::Sender<FlightData>, Streaming<FlightData>) {
        let (sender, receiver) = mpsc::channel(1);
        let mut client = self.client().await;
        let replies = client.do_exchange(sent_to(receiver)).await.unwrap();
        (sender, replies.into_inner())
    }

    fn streams(&self) -> u64 {
        self.me().stats(0).account.unwrap().streams
    }
}

/// The host's threads that run exchanges.
fn threads() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let name = |task: std::io::Result<std::fs::DirEntry>| {
        std::fs::read_to_string(task.ok()?.path().join("comm")).ok()
    };
    tasks
        .filter_map(name)
        .filter(|name| name == "strait-exchange\n")
        .count()
}

fn sums(count: usize) -> Vec<f64> {
    let sums = (0..count).scan(0.0, |sum, value| {
        *sum += value as f64;
        Some(*sum)
    });
    sums.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_come_back_summed() {
    let rig = Rig::new().await;
    let used = rig.used();
    let rows = 3 * MIB / 8;
    let copied = || rig.host.stats().host.unwrap().copied;
    let before = copied();
    let replies = rig
        .exchanging(asking(cmd(&cumsum()), &floats(rows)).await)
        .await
        .unwrap();
    assert!(replies.len() > 5, "{}", replies.len());
    assert!(
        replies
            .iter()
            .all(|reply| reply.data_body.len() <= 512 << 10)
    );
    assert_eq!(f64s(&flight_data_to_batches(&replies).unwrap()), sums(rows));
    let (after, bytes) = (copied(), 3 * MIB as u64);
    let more = |place: &str| after[place] - before[place];
    assert_eq!(
        [more("flight_in"), more("guest_in"), more("guest_out")],
        [bytes; 3]
    );
    // gRPC's copy, and that for the socket unless the client takes long frames.
    assert!(
        [bytes, 2 * bytes].contains(&more("flight_out")),
        "{}",
        more("flight_out")
    );
    assert_eq!([more("frame_in"), more("frame_out")], [0; 2]);
    eventually("what it had is given back", || rig.used() == used).await;
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_exchange_is_refused_by_name() {
    let rig = Rig::new().await;
    let used = rig.used();
    let rows = floats(10);
    let bad = Code::InvalidArgument;
    let ask = |what: Value| asking(cmd(&what), &rows);
    for (data, code, reason, words) in [
        (vec![], bad, "BAD_REQUEST", "without messages"),
        (
            vec![FlightData::default()],
            bad,
            "BAD_REQUEST",
            "no descriptor",
        ),
        (asking(path("x"), &rows).await, bad, "BAD_REQUEST", "no cmd"),
        (
            ask(json!({"kernel": "cumsum", "what": 1})).await,
            bad,
            "BAD_REQUEST",
            "`what`",
        ),
        (
            ask(json!({"kernel": "cumsum", "rows": 0})).await,
            bad,
            "BAD_REQUEST",
            "at least 1",
        ),
        (
            ask(json!({"kernel": "cumsum", "request_id": "a"})).await,
            bad,
            "BAD_REQUEST",
            "x-request-id",
        ),
        (
            ask(json!({"kernel": "nope"})).await,
            Code::NotFound,
            "KERNEL_NOT_FOUND",
            "nope",
        ),
        (
            ask(json!({"kernel": "zscore"})).await,
            bad,
            "UNSUPPORTED",
            "does not stream",
        ),
        (
            ask(json!({"kernel": "fir"})).await,
            bad,
            "MISSING_INPUT",
            "taps",
        ),
        (
            ask(json!({"kernel": "fir", "inputs": {"taps": "nope"}})).await,
            Code::NotFound,
            "FLIGHT_NOT_FOUND",
            "nope",
        ),
        (
            ask(json!({"kernel": "histogram", "parameters": {"bins": 4, "lo": 0.0, "hi": 1.0}}))
                .await,
            Code::Unimplemented,
            "UNSUPPORTED_OP",
            "different lengths",
        ),
    ] {
        refused(rig.exchanging(data).await, code, reason, &[words]);
    }
    let mut alone = ask(cumsum()).await;
    alone.truncate(1);
    alone[0].data_header.clear();
    refused(
        rig.exchanging(alone).await,
        bad,
        "BAD_REQUEST",
        &["before its schema"],
    );
    let mut early = ask(cumsum()).await;
    early.remove(0);
    early[0].flight_descriptor = Some(cmd(&cumsum()));
    refused(
        rig.exchanging(early).await,
        bad,
        "BAD_REQUEST",
        &["RecordBatch"],
    );
    eventually("all of it is given back", || {
        rig.used() == used && rig.streams() == 0
    })
    .await;
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_does_not_belong_ends_it() {
    let rig = Rig::new().await;
    let used = rig.used();
    let dictionary: DictionaryArray<Int32Type> = vec!["a", "b"].into_iter().collect();
    let dictionary = batch(vec![(
        "x",
        Arc::new(dictionary) as ArrayRef,
        Default::default(),
    )]);
    let nulls = Float64Array::from(vec![Some(1.0), None]);
    let nulls = batch(vec![("x", Arc::new(nulls) as ArrayRef, Default::default())]);
    let good = asking(cmd(&cumsum()), &floats(10)).await;
    for (other, reason, words) in [
        (
            messages(&floats(3), None).await[0].clone(),
            "BAD_REQUEST",
            "second schema",
        ),
        (
            messages(&dictionary, None).await[1].clone(),
            "BAD_TENSOR",
            "dictionary batch",
        ),
        (
            messages(&nulls, None).await[1].clone(),
            "BAD_TENSOR",
            "1 nulls",
        ),
        (
            FlightData::new().with_data_header(vec![1; 40]),
            "BAD_REQUEST",
            "corrupt",
        ),
        (
            FlightData::new().with_data_body(vec![1; 40]),
            "BAD_REQUEST",
            "no header",
        ),
    ] {
        let mut data = good.clone();
        data.push(other);
        data.extend(messages(&floats(10), None).await.split_off(1));
        refused(
            rig.exchanging(data).await,
            Code::InvalidArgument,
            reason,
            &["chunk 1 of a stream", words],
        );
    }
    eventually("all of it is given back", || {
        rig.used() == used && rig.streams() == 0
    })
    .await;
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_takes_all_of_it_away() {
    let rig = Rig::new().await;
    let used = rig.used();
    let data = asking(cmd(&cumsum()), &floats(1000)).await;
    for steps in 0..=3 {
        let (sender, mut replies) = rig.open().await;
        for message in data.iter().take(steps) {
            sender.send(message.clone()).await.unwrap();
        }
        if steps >= 1 {
            assert!(replies.message().await.unwrap().is_some(), "the schema");
        }
        if steps >= 2 {
            assert!(replies.message().await.unwrap().is_some(), "a batch");
        }
        if steps >= 3 {
            drop(sender);
            assert!(replies.message().await.unwrap().is_none(), "the end");
            drop(replies);
        } else {
            // What is still to be sent keeps the stream alive.
            drop((replies, sender));
        }
        eventually("all of it is given back", || {
            rig.used() == used && rig.streams() == 0
        })
        .await;
    }
    eventually("its threads end", || threads() == 0).await;
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_read_is_told_when_it_does() {
    let rig = Rig::with(|config| config.server.stall_ms = Some(500)).await;
    let used = rig.used();
    let batch = floats(MIB / 8);
    let data = asking(cmd(&cumsum()), &batch).await;
    let (sender, mut replies) = rig.open().await;
    sender.send(data[0].clone()).await.unwrap();
    // More than the windows of 16 MiB in both directions.
    for _ in 0..64 {
        sender.send(data[1].clone()).await.unwrap();
    }
    drop(sender);
    eventually("the host holds nothing for it", || rig.streams() == 0).await;
    let end = loop {
        match replies.message().await {
            Ok(Some(_)) => {}
            Ok(None) => break Ok(()),
            Err(status) => break Err(status),
        }
    };
    refused(
        end,
        Code::DeadlineExceeded,
        "DEADLINE",
        &["read while you write"],
    );
    eventually("all of it is given back", || rig.used() == used).await;
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_drains_ends_it_at_the_next_chunk() {
    let rig = Rig::new().await;
    let data = asking(cmd(&cumsum()), &floats(10)).await;
    let (sender, mut replies) = rig.open().await;
    sender.send(data[0].clone()).await.unwrap();
    sender.send(data[1].clone()).await.unwrap();
    assert!(replies.message().await.unwrap().is_some(), "the schema");
    assert!(replies.message().await.unwrap().is_some(), "a batch");
    rig.host.drain();
    sender.send(data[1].clone()).await.unwrap();
    refused(
        replies.message().await,
        Code::Unavailable,
        "DRAINING",
        &["chunk 1"],
    );
    rig.end().await;
}
