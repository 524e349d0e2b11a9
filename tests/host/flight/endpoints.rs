//! Several endpoints over the rows of one flight, for clients that ask for them.

use arrow_flight::{
    CancelFlightInfoRequest, CancelStatus, FlightClient, FlightDescriptor, FlightInfo,
    RenewFlightEndpointRequest, Ticket,
};
use futures::{StreamExt, TryStreamExt, stream};
use serde_json::{Value, json};
use tonic::{Code, Status};

use super::{MIB, Rig, cmd, f64s, floats, path, refused, shift};

const HEADER: &str = "x-strait-endpoints";

async fn small() -> Rig {
    Rig::with(|config| config.server.endpoint_bytes = Some(1 << 20)).await
}

impl Rig {
    async fn parted(&self, descriptor: FlightDescriptor, most: &str) -> Result<FlightInfo, Status> {
        let mut request = tonic::Request::new(descriptor);
        request.metadata_mut().insert(HEADER, most.parse().unwrap());
        let info = self.client().await.get_flight_info(request).await?;
        Ok(info.into_inner())
    }
}

fn tickets(info: &FlightInfo) -> Vec<Ticket> {
    let endpoints = info.endpoint.iter();
    endpoints
        .map(|endpoint| endpoint.ticket.clone().unwrap())
        .collect()
}

fn json_of(ticket: &Ticket) -> Value {
    serde_json::from_slice(&ticket.ticket).unwrap()
}

/// Each ticket by a connection of its own, all at once.
async fn read(rig: &Rig, tickets: Vec<Ticket>) -> Vec<Vec<f64>> {
    stream::iter(tickets)
        .map(|ticket| async {
            let mut client = FlightClient::new(rig.channel().await);
            let batches = client.do_get(ticket).await.unwrap();
            f64s(&batches.try_collect::<Vec<_>>().await.unwrap())
        })
        .buffered(8)
        .collect()
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn endpoints_are_the_rows_in_their_order() {
    let rig = small().await;
    let count = 3 * MIB / 8 + 17;
    rig.put("x", floats(count)).await.unwrap();
    let whole = f64s(&[floats(count)]);
    // Who does not ask reads the first endpoint, and all of it.
    let one = rig.info(path("x")).await.unwrap();
    assert_eq!((one.endpoint.len(), one.ordered), (1, false));
    for (most, endpoints) in [
        ("1", 1),
        ("2", 2),
        ("3", 3),
        ("4", 4),
        ("5", 4),
        ("1000000", 4),
    ] {
        let info = rig.parted(path("x"), most).await.unwrap();
        assert_eq!(info.endpoint.len(), endpoints, "of at most {most}");
        assert_eq!(info.ordered, endpoints > 1);
        assert_eq!(
            (info.total_records, info.total_bytes),
            (count as i64, 8 * count as i64)
        );
        assert_eq!(
            (&info.schema, &info.app_metadata),
            (&one.schema, &one.app_metadata)
        );
        // A client of this machine maps it, whichever endpoint it looks at.
        for endpoint in &info.endpoint {
            assert_eq!(endpoint.app_metadata, one.app_metadata);
            assert!(endpoint.location.is_empty());
        }
        let parts = read(&rig, tickets(&info)).await;
        let longest = parts.iter().map(Vec::len).max().unwrap();
        assert!(longest <= count.div_ceil(endpoints), "{longest}");
        assert!(parts.concat() == whole, "of at most {most}");
    }
    // At most 8; not more than rows; none of what is short.
    rig.put("y", floats(2 * MIB)).await.unwrap();
    let info = rig.parted(path("y"), "100").await.unwrap();
    assert_eq!(info.endpoint.len(), 8);
    assert!(read(&rig, tickets(&info)).await.concat() == f64s(&[floats(2 * MIB)]));
    rig.put("short", floats(MIB / 8)).await.unwrap();
    assert_eq!(
        rig.parted(path("short"), "8").await.unwrap().endpoint.len(),
        1
    );
    rig.put("empty", floats(0)).await.unwrap();
    assert_eq!(
        rig.parted(path("empty"), "8").await.unwrap().endpoint.len(),
        1
    );
    for wrong in ["0", "-1", "many", "1.5", "18446744073709551616"] {
        refused(
            rig.parted(path("x"), wrong).await,
            Code::InvalidArgument,
            "BAD_REQUEST",
            &[HEADER, "number"],
        );
    }
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_result_has_endpoints_too() {
    let rig = small().await;
    let count = 3 * MIB / 8;
    rig.put("x", floats(count)).await.unwrap();
    let info = rig.parted(cmd(&shift("x")), "3").await.unwrap();
    assert_eq!((info.endpoint.len(), info.ordered), (3, true));
    let parts = read(&rig, tickets(&info)).await;
    let expected = read(
        &rig,
        vec![Ticket::new(
            json!({"segment": json_of(&tickets(&info)[0])["segment"]}).to_string(),
        )],
    )
    .await;
    assert_eq!(expected[0].len(), count);
    assert!(parts.concat() == expected[0]);
    // One endpoint's new life is that of all, and stays its own rows.
    let last = info.endpoint.last().unwrap().clone();
    let mut client = rig.client().await;
    let renewed = client
        .do_action(action(
            "RenewFlightEndpoint",
            &RenewFlightEndpointRequest::new(last.clone()),
        ))
        .await
        .unwrap()
        .into_inner()
        .try_next()
        .await
        .unwrap()
        .unwrap();
    let renewed: arrow_flight::FlightEndpoint = prost::Message::decode(renewed.body).unwrap();
    assert_eq!(renewed.ticket, last.ticket);
    let mut easy = rig.easy().await;
    let cancelled = easy
        .cancel_flight_info(CancelFlightInfoRequest::new(info.clone()))
        .await
        .unwrap();
    assert_eq!(cancelled.status(), CancelStatus::Cancelled);
    let gone = easy.do_get(tickets(&info)[1].clone()).await.map(drop);
    assert!(gone.is_err(), "{gone:?}");
    rig.end().await;
}

fn action(kind: &str, message: &impl prost::Message) -> arrow_flight::Action {
    arrow_flight::Action::new(kind, message.encode_to_vec())
}

#[tokio::test(flavor = "multi_thread")]
async fn tickets_for_rows_that_are_not_there_are_refused() {
    let rig = small().await;
    let count = 2 * MIB / 8;
    rig.put("x", floats(count)).await.unwrap();
    let info = rig.parted(path("x"), "2").await.unwrap();
    let good = json_of(&tickets(&info)[0]);
    assert_eq!(good["rows"], json!([0, count / 2]));
    let with = |key: &str, value: Value| {
        let mut ticket = good.clone();
        ticket[key] = value;
        ticket.to_string()
    };
    for rows in [
        json!([0, count + 1]),
        json!([count + 1, count + 1]),
        json!([u64::MAX, u64::MAX]),
        json!([0, u64::MAX]),
        json!([2, 1]),
        json!([-1, 1]),
        json!([0]),
        json!("all"),
        json!([0, 1e30]),
    ] {
        refused(
            rig.get(with("rows", rows.clone())).await,
            Code::InvalidArgument,
            "BAD_REQUEST",
            &["rows", "FlightInfo"],
        );
    }
    // No rows are rows, too.
    for rows in [json!([0, 0]), json!([count, count])] {
        assert!(f64s(&rig.get(with("rows", rows)).await.unwrap()).is_empty());
    }
    let some = rig.get(with("rows", json!([7, 9]))).await.unwrap();
    assert_eq!(f64s(&some), [7.0, 8.0]);
    // Another's segment, or none, or that of another flight.
    rig.put("y", floats(count)).await.unwrap();
    let other = json_of(&tickets(&rig.parted(path("y"), "2").await.unwrap())[0]);
    let ids = [
        json!("0"),
        json!("s-00000000000000000000000000000000"),
        other["segment"].clone(),
    ];
    for id in ids {
        refused(
            rig.get(with("segment", id)).await,
            Code::NotFound,
            "SEGMENT_NOT_FOUND",
            &["`x`", "GetFlightInfo again"],
        );
    }
    // The name is another flight's by now: rows of both would be no table.
    rig.me().drop_flight("x").unwrap();
    rig.put("x", floats(count)).await.unwrap();
    refused(
        rig.get(good.to_string()).await,
        Code::NotFound,
        "SEGMENT_NOT_FOUND",
        &["`x`", "GetFlightInfo again"],
    );
    // A stranger's name is none, as ever.
    refused(
        rig.get(with("name", json!("z"))).await,
        Code::NotFound,
        "FLIGHT_NOT_FOUND",
        &["`z`"],
    );
    rig.end().await;
}
