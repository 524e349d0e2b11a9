//! Channels read by stock Flight clients.

use arrow_array::Float64Array;
use arrow_array::cast::AsArray;
use arrow_flight::FlightDescriptor;
use arrow_flight::Ticket;
use arrow_flight::decode::FlightRecordBatchStream;
use arrow_flight::flight_service_client::FlightServiceClient;
use futures::TryStreamExt;
use serde_json::{Value, json};
use strait_client::{ChannelOptions, Client, Dtype, Error, PreparedStream, TensorSpec};
use strait_protocol::Op;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

use super::channel::sums;
use crate::served::{Served, ramp};

type Flight = FlightServiceClient<Channel>;

async fn flight(host: &Served) -> Flight {
    let socket = host.directory().join("flight.sock");
    let endpoint = Endpoint::from_shared(format!("unix:{}", socket.display())).unwrap();
    FlightServiceClient::new(endpoint.connect().await.unwrap())
}

fn cmd() -> FlightDescriptor {
    FlightDescriptor::new_cmd(json!({"channel": "levels"}).to_string())
}

fn ticket() -> Ticket {
    Ticket::new(json!({"channel": "levels"}).to_string())
}

fn reason(status: &tonic::Status) -> (Code, &str) {
    let reason = status.metadata().get("x-strait-reason");
    (status.code(), reason.map_or("", |r| r.to_str().unwrap()))
}

fn told(error: Error) -> String {
    match error {
        Error::Remote(failure) => failure.reason,
        other => panic!("{other}"),
    }
}

fn produce(client: &Client, rows: u64, options: ChannelOptions) -> PreparedStream {
    let spec = TensorSpec {
        dtype: Dtype::Float64,
        shape: vec![rows, 1],
    };
    let channel = ChannelOptions {
        name: "levels".to_owned(),
        ..options
    };
    let prepare = client.prepare("cumsum").input("x", &spec).channel(channel);
    prepare.stream().expect("prepared")
}

#[test]
fn a_flight_client_reads_while_the_stream_goes_on() {
    let host = Served::start(&[]);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut flight = runtime.block_on(flight(&host));
    let missing = runtime.block_on(flight.get_flight_info(cmd())).unwrap_err();
    assert_eq!(reason(&missing), (Code::NotFound, "CHANNEL_NOT_FOUND"));
    let missing = runtime.block_on(flight.do_get(ticket())).unwrap_err();
    assert_eq!(reason(&missing), (Code::NotFound, "CHANNEL_NOT_FOUND"));

    let client = Client::connect_to(&host.directory()).unwrap();
    let mut producer = produce(&client, 100, ChannelOptions::default());
    let info = runtime
        .block_on(flight.get_flight_info(cmd()))
        .unwrap()
        .into_inner();
    assert_eq!((info.total_records, info.endpoint.len()), (-1, 1));
    assert_eq!(info.endpoint[0].ticket.as_ref(), Some(&ticket()));
    let about: Value = serde_json::from_slice(&info.app_metadata).unwrap();
    assert_eq!(
        (&about["kernel"], &about["channel"]),
        (&json!("cumsum"), &json!("levels"))
    );
    let poll = runtime
        .block_on(flight.poll_flight_info(cmd()))
        .unwrap()
        .into_inner();
    assert_eq!((poll.flight_descriptor, poll.progress), (Some(cmd()), None));

    let x = ramp(1000);
    let expected = sums(&x);
    let producing = std::thread::spawn(move || {
        for rows in x.chunks(70) {
            producer.chunk(&[rows.into()]).expect("taken");
        }
        let end: [f64; 0] = [];
        producer.last(&[(&end[..]).into()]).expect("the end");
    });
    let copied = || {
        host.greeted().ok(Op::Stats, json!({}))["copied"]["flight_out"]
            .as_u64()
            .unwrap()
    };
    let before = copied();
    let messages = runtime
        .block_on(flight.do_get(ticket()))
        .unwrap()
        .into_inner();
    let batches = FlightRecordBatchStream::new_from_flight_data(messages.map_err(Into::into));
    let batches: Vec<arrow_array::RecordBatch> = runtime.block_on(batches.try_collect()).unwrap();
    let values: Vec<f64> = batches
        .iter()
        .flat_map(|batch| {
            let list = batch.column(0).as_fixed_size_list();
            let values: &Float64Array = list.values().as_primitive();
            values.values().to_vec()
        })
        .collect();
    assert_eq!(values, expected);
    assert!(batches.len() >= 10, "as they come: {}", batches.len());
    producing.join().unwrap();
    let after = copied();
    assert!(after >= before + 8 * 1000, "{before} {after}");
    assert_eq!(
        host.greeted().ok(Op::Stats, json!({}))["account"]["streams"],
        0
    );
}

#[test]
fn each_end_is_told_of_the_others() {
    let host = Served::start(&[]);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut flight = runtime.block_on(flight(&host));
    let client = Client::connect_to(&host.directory()).unwrap();
    let x = ramp(16_000);

    // One reader at a time, of whatever kind.
    let mut producer = produce(&client, 16_000, ChannelOptions::default());
    let reader = runtime.block_on(flight.do_get(ticket())).unwrap();
    let second = runtime.block_on(flight.do_get(ticket())).unwrap_err();
    assert_eq!(reason(&second), (Code::FailedPrecondition, "WRONG_STATE"));
    let third = client.read_channel("levels").expect_err("it is read");
    assert_eq!(told(third), "WRONG_STATE");
    // A reader that leaves.
    producer.chunk(&[x[..].into()]).expect("taken");
    drop(reader);
    let mut chunks = std::iter::repeat_with(|| producer.chunk(&[(&x[..1]).into()]));
    let lost = chunks.find_map(Result::err).expect("it left");
    assert_eq!(told(lost), "CONSUMER_LOST");

    // A producer that leaves: what came before is read first.
    let mut producer = produce(&client, 16_000, ChannelOptions::default());
    for _ in 0..3 {
        producer.chunk(&[x[..].into()]).expect("taken");
    }
    let mut reader = runtime
        .block_on(flight.do_get(ticket()))
        .unwrap()
        .into_inner();
    let mut came = 0;
    while came == 0 {
        came += runtime
            .block_on(reader.try_next())
            .unwrap()
            .unwrap()
            .data_body
            .len();
    }
    drop(producer);
    let lost = loop {
        match runtime.block_on(reader.try_next()) {
            Ok(message) => came += message.expect("an error is its end").data_body.len(),
            Err(status) => break status,
        }
    };
    assert_eq!(reason(&lost), (Code::Unavailable, "PRODUCER_LOST"));
    assert_eq!(came, 3 * 8 * 16_000);

    // A reader that does not read holds up its producer, for as long as that wants it.
    let patient = ChannelOptions {
        batches: Some(2),
        wait_ms: Some(300),
        ..ChannelOptions::default()
    };
    let mut producer = produce(&client, 16_000, patient);
    let mut reader = runtime
        .block_on(flight.do_get(ticket()))
        .unwrap()
        .into_inner();
    let mut taken = 0;
    let late = loop {
        match producer.chunk(&[x[..].into()]) {
            Ok(_) => taken += 1,
            Err(error) => break told(error),
        }
        assert!(taken < 10_000, "nobody reads");
    };
    assert_eq!(late, "DEADLINE");
    let late = loop {
        match runtime.block_on(reader.try_next()) {
            Ok(message) => drop(message.expect("an error is its end")),
            Err(status) => break status,
        }
    };
    assert_eq!(reason(&late), (Code::DeadlineExceeded, "DEADLINE"));
}
