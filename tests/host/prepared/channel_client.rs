//! Channels by the Rust client.

use strait_client::{ChannelOptions, Client, Dtype, Error, TensorSpec};

use super::channel::sums;
use crate::served::{Served, ramp};

#[test]
fn the_rust_client_writes_and_reads() {
    let host = Served::start(&[]);
    let connect = || Client::connect_to(&host.directory()).expect("connected");
    let (one, other) = (connect(), connect());
    let reason = |error: Error| match error {
        Error::Remote(failure) => failure.reason,
        other => panic!("{other}"),
    };
    let none = other.read_channel("levels").expect_err("not there yet");
    assert_eq!(reason(none), "CHANNEL_NOT_FOUND");
    let spec = TensorSpec {
        dtype: Dtype::Float64,
        shape: vec![100, 1],
    };
    let open = |resume_ms| {
        let channel = ChannelOptions {
            name: "levels".to_owned(),
            resume_ms: Some(resume_ms),
            ..ChannelOptions::default()
        };
        let prepare = one.prepare("cumsum").input("x", &spec).channel(channel);
        prepare.stream().expect("prepared")
    };
    let mut producer = open(60_000);
    let x = ramp(1000);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for rows in x.chunks(100) {
                let given = producer.chunk(&[rows.into()]).expect("taken");
                assert!(given.tensor("y").is_err(), "it goes to the channel");
            }
            let end: [f64; 0] = [];
            producer.last(&[(&end[..]).into()]).expect("the end");
        });
        let (mut came, mut came_back) = (Vec::new(), 0);
        let mut reader = other.read_channel("levels").expect("a reader");
        assert_eq!((reader.kernel(), reader.outputs().len()), ("cumsum", 1));
        loop {
            // Comes back in the middle: what was not acknowledged comes again.
            if reader.number() == 4 && came.len() == 400 && came_back == 0 {
                came_back = 1;
                drop(reader);
                reader = other.read_channel("levels").expect("again");
                assert_eq!(reader.number(), 3);
                came.truncate(300);
            }
            if reader.number() == 6 && came_back == 1 {
                came_back = 2;
                reader.acknowledge().expect("it is there");
                reader.acknowledge().expect("it was");
                drop(reader);
                reader = other.read_channel("levels").expect("again");
                assert_eq!(reader.number(), 6);
            }
            let Some(batch) = reader.next().expect("a batch") else {
                break;
            };
            let rows = batch.tensor("y").expect("y");
            came.extend_from_slice(rows.as_slice::<f64>().expect("float64"));
        }
        assert_eq!(came, sums(&x));
        assert!(reader.next().expect("it stays the end").is_none());
    });
    // Each end is told of the other's.
    let mut producer = open(0);
    let mut reader = other.read_channel("levels").expect("a reader");
    producer.chunk(&[(&x[..1]).into()]).expect("taken");
    assert!(reader.next().expect("a batch").is_some());
    drop(producer);
    assert_eq!(reason(reader.next().expect_err("it left")), "PRODUCER_LOST");
    assert!(matches!(reader.next(), Err(Error::Disconnected)));
    let mut producer = open(0);
    let reader = other.read_channel("levels").expect("a reader");
    producer.chunk(&[(&x[..1]).into()]).expect("taken");
    drop(reader);
    // A process that another test starts may have its socket open for a moment longer.
    let mut chunks = std::iter::repeat_with(|| producer.chunk(&[(&x[..1]).into()]));
    let told = chunks.find_map(Result::err).expect("it left");
    assert_eq!(reason(told), "CONSUMER_LOST");
}
