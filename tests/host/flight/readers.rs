//! DoGet: many readers at once, and readers that hang up, pause or do not read.

use std::time::Duration;

use arrow_flight::utils::flight_data_to_batches;
use arrow_flight::{FlightClient, Ticket};
use futures::TryStreamExt;
use strait::session::FlightState;
use tonic::Code;

use super::{MIB, Rig, eventually, f64s, floats, refused, state};

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

#[tokio::test(flavor = "multi_thread")]
async fn what_a_connection_gathers_is_charged_until_it_is_idle() {
    let rig = Rig::with(|config| config.memory.budget_bytes = Some(8 << 20)).await;
    rig.put("x", floats(MIB / 4)).await.unwrap();
    let whole = f64s(&[floats(MIB / 4)]);
    let mut client = rig.easy().await;
    let mut get = async |name: &'static str| {
        let batches = client.do_get(Ticket::new(name)).await.unwrap();
        f64s(&batches.try_collect::<Vec<_>>().await.unwrap())
    };
    // What is short is not charged, so that a full host still answers.
    rig.put("short", floats(10)).await.unwrap();
    let used = rig.host.budget().used();
    assert_eq!(get("short").await.len(), 10);
    assert_eq!(rig.host.budget().used(), used);
    let mut gets = 0;
    loop {
        assert!(get("x").await == whole);
        gets += 1;
        // It may have been idle for long already, on a busy machine.
        match rig.host.budget().used() - used {
            262_144 => break,
            held => assert!(held == 0 && gets < 20, "{held} bytes after {gets} gets"),
        }
    }
    eventually("it is given back", || rig.host.budget().used() == used).await;
    assert_eq!(get("short").await.len(), 10);

    let free = rig.host.budget().limit() - used;
    let rest = rig.host.budget().try_reserve(free).unwrap();
    assert!(
        f64s(&rig.get("x").await.unwrap()) == whole,
        "in shorter pieces"
    );
    drop(rest);
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_stream_too_many_waits_and_is_refused_by_how_many_there_are() {
    let rig = Rig::with(|config| config.quota.streams = Some(1)).await;
    rig.put("x", floats(8 * MIB)).await.unwrap();
    let streams = || {
        let account = rig.me().stats(0).account.unwrap();
        (account.streams, account.streams_refused)
    };
    let mut client = rig.client().await;
    let mut first = client.do_get(Ticket::new("x")).await.unwrap().into_inner();
    first.try_next().await.unwrap().unwrap();
    let second = client.do_get(Ticket::new("x")).await;
    let said = ["1 streams of uid:", "within 10 s", "quota.streams"];
    refused(second, Code::ResourceExhausted, "QUOTA_EXCEEDED", &said);
    assert_eq!(streams(), (1, 1));
    drop(first);
    client.do_get(Ticket::new("x")).await.unwrap();
    eventually("nobody reads", || streams() == (0, 1)).await;
    rig.end().await;
}
