//! Inline Flight from Rust: a host process, arrow-flight as its client, over the unix socket.
//!
//! `cargo bench --bench flight`. The baseline moves as many bytes through a socket between two threads, and nothing else.
//! `flight.py` does the same from stock pyarrow, beside a pyarrow server.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "a bench that cannot go on ends"
)]

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow_array::{Float64Array, RecordBatch};
use arrow_flight::encode::FlightDataEncoderBuilder;
use arrow_flight::{FlightClient, FlightDescriptor, Ticket};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use futures::{StreamExt, TryStreamExt, stream};
use tonic::transport::{Channel, Endpoint};

const BYTES: usize = 100 << 20;
/// As `docs/protocol.md` advises.
const WINDOW_BYTES: u32 = 16 << 20;
/// A message of the host in one frame.
const FRAME_BYTES: u32 = 1 << 20;

struct Host(Child);

impl Host {
    fn start(directory: &Path) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_strait"))
            .args(["serve", "--log-level", "warn", "--directory"])
            .arg(directory)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let socket = directory.join("flight.sock");
        let started = Instant::now();
        while UnixStream::connect(&socket).is_err() {
            let ended = child.try_wait().unwrap();
            assert!(
                ended.is_none() && started.elapsed() < Duration::from_secs(120),
                "{ended:?}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        Self(child)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn connect(directory: &Path) -> Channel {
    let socket = directory.join("flight.sock");
    let endpoint = Endpoint::from_shared(format!("unix:{}", socket.display())).unwrap();
    endpoint
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES)
        .connect()
        .await
        .unwrap()
}

fn path(name: &str) -> FlightDescriptor {
    FlightDescriptor::new_path(vec![name.to_owned()])
}

async fn put(client: &mut FlightClient, batch: &RecordBatch) {
    let data = FlightDataEncoderBuilder::new()
        .with_flight_descriptor(Some(path("bench")))
        .build(stream::iter([Ok(batch.clone())]));
    let results = client.do_put(data).await.unwrap();
    results.try_collect::<Vec<_>>().await.unwrap();
}

/// Reads a batch and lets it go, one after the other: whoever keeps them all pays for fresh pages, too.
async fn get(client: &mut FlightClient, ticket: Ticket) -> usize {
    let batches = client.do_get(ticket).await.unwrap();
    let rows = batches.try_fold(0, |rows, batch| async move { Ok(rows + batch.num_rows()) });
    rows.await.unwrap()
}

/// As many bytes as a tensor has from one thread to another, a message's worth at a time.
fn through_a_socket(bytes: &[u8]) -> Duration {
    let (mut from, mut to) = UnixStream::pair().unwrap();
    let _ = rustix::net::sockopt::set_socket_send_buffer_size(&from, 2 << 20);
    let mut buffer = vec![0; 512 << 10];
    let start = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            bytes
                .chunks(512 << 10)
                .for_each(|part| from.write_all(part).unwrap())
        });
        while to.read(&mut buffer).unwrap() > 0 {}
    });
    start.elapsed()
}

fn flight(criterion: &mut Criterion) {
    let temporary = tempfile::tempdir().unwrap();
    // The host makes it, for itself alone.
    let directory = temporary.path().join("host");
    let _host = Host::start(&directory);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let rows = BYTES / 8;
    let values: Float64Array = (0..rows).map(|n| n as f64).collect();
    let batch = RecordBatch::try_from_iter([("x", Arc::new(values) as _)]).unwrap();
    let mut clients: Vec<_> = (0..2)
        .map(|_| FlightClient::new(runtime.block_on(connect(&directory))))
        .collect();
    for client in &mut clients {
        let headers = HashMap::from([("x-strait-replace", "true"), ("x-strait-endpoints", "2")]);
        for (key, value) in headers {
            client.add_header(key, value).unwrap();
        }
    }
    runtime.block_on(put(&mut clients[0], &batch));

    let mut group = criterion.benchmark_group("100MiB");
    group.throughput(Throughput::Bytes(BYTES as u64));
    group.sample_size(15);
    let bytes = vec![1; BYTES];
    group.bench_function("socket alone", |bencher| {
        bencher.iter_custom(|count| (0..count).map(|_| through_a_socket(&bytes)).sum());
    });
    group.bench_function("get", |bencher| {
        bencher.iter(|| {
            let got = runtime.block_on(get(&mut clients[0], Ticket::new("bench")));
            assert_eq!(got, rows);
        });
    });
    group.bench_function("get, two endpoints", |bencher| {
        bencher.iter(|| {
            let got = runtime.block_on(async {
                let info = clients[0].get_flight_info(path("bench")).await.unwrap();
                assert_eq!(info.endpoint.len(), clients.len());
                let tickets = info.endpoint.into_iter().map(|part| part.ticket.unwrap());
                let parts = clients.iter_mut().zip(tickets);
                let reads = parts.map(|(client, ticket)| get(client, ticket));
                let read: Vec<_> = stream::iter(reads).buffered(2).collect().await;
                read.iter().sum::<usize>()
            });
            assert_eq!(got, rows);
        });
    });
    group.bench_function("put", |bencher| {
        bencher.iter(|| runtime.block_on(put(&mut clients[0], &batch)));
    });
    group.finish();
}

criterion_group!(benches, flight);
criterion_main!(benches);
