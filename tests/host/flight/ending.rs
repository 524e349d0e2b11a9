//! A host that is told to end while it is used.

use std::time::Duration;

use arrow_flight::Ticket;
use futures::{StreamExt, TryStreamExt, stream};
use serde_json::json;
use tonic::Code;

use super::raw::{PREFACE, frame, raw, raw_do_get};
use super::{MIB, Rig, cmd, connect, eventually, floats, messages, path, put_to, refused, within};
use crate::{guest, served};

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
        .own_caller()
        .load_plugin(&guest::component("spins", &text))
        .unwrap();
    rig.put("x", floats(3)).await.unwrap();
    let mut client = rig.client().await;
    // Nothing moves on its connection for longer than a silent one is given.
    let spins = json!({"kernel": "spins/k", "inputs": {"x": "x"}, "deadline_ms": 3000});
    let call = tokio::spawn(async move { client.get_flight_info(cmd(&spins)).await });
    eventually("it runs", || rig.host.stats().running == 1).await;
    drop(rig.stop.take());
    let answer = within("its answer", call).await.unwrap();
    refused(answer, Code::DeadlineExceeded, "DEADLINE", &["3000 ms"]);
    within("the end", rig.end()).await;
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
