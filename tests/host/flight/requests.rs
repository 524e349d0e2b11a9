//! Requests that are wrong, too long or never whole, and what they are told.

use arrow_flight::{Criteria, FlightData, FlightDescriptor};
use bytes::Bytes;
use futures::{StreamExt, stream};
use serde_json::json;
use tonic::Code;

use super::{MIB, Rig, cmd, eventually, f64s, floats, messages, path, refused, shift};

#[tokio::test(flavor = "multi_thread")]
async fn wrong_requests_are_told_what_is_wrong() {
    let rig = Rig::new().await;
    rig.put("x", floats(3)).await.unwrap();
    let invalid = Code::InvalidArgument;
    refused(
        rig.info(path("nope")).await,
        Code::NotFound,
        "FLIGHT_NOT_FOUND",
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
        "FLIGHT_NOT_FOUND",
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
