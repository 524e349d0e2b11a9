//! What each call of Flight does, when it is asked rightly.

use std::time::{Duration, Instant};

use arrow_flight::{
    CancelFlightInfoRequest, CancelStatus, Criteria, Empty, FlightInfo, HandshakeRequest,
    RenewFlightEndpointRequest,
};
use futures::{TryStreamExt, stream};
use serde_json::{Value, json};
use strait::session::Session;
use tonic::{Code, Request};

use super::{Rig, cmd, f64s, floats, path, refused, shift};

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
    let session = Session::open(rig.me());
    assert_eq!(session.segment(id).unwrap().id().to_string(), id);
    let other = Session::open(rig.host.caller(Some(4242)).unwrap());
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
        let segment = rig.me().lookup("b").unwrap();
        rig.me()
            .publish(&segment, &format!("c{count:03}"), false)
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
    let before = rig.host.stats().invocations;
    let schema = rig.easy().await.get_schema(cmd(&shift("b"))).await.unwrap();
    assert_eq!(
        schema
            .fields()
            .iter()
            .map(|f| f.name().as_str())
            .collect::<Vec<_>>(),
        ["y"]
    );
    assert_eq!(rig.host.stats().invocations, before);

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
            "share",
            "stats",
            "welcome",
            "invoke",
            "cancel",
            "release",
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
        "FLIGHT_NOT_FOUND",
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
