//! Where a call's time goes: `cargo run --release -p strait-client --example anatomy -- [ADDRESS]`.
//!
//! Calls `scale-shift` on 1 KiB, 10 MiB and 100 MiB at a running host and prints the medians of each
//! stage in microseconds, beside a PING and the same loop in this process over the same kind of pages.
//! `docs/anatomy-of-a-call.md` explains the stages.

use std::error::Error;
use std::hint::black_box;
use std::time::Instant;

use strait_client::wire::Seconds;
use strait_client::{Client, Dtype, NewTensor};

const SIZES: [(&str, u64, usize); 3] = [
    ("1 KiB", 1 << 10, 3000),
    ("10 MiB", 10 << 20, 300),
    ("100 MiB", 100 << 20, 60),
];

type Stage = (&'static str, fn(&Seconds) -> f64);
const STAGES: [Stage; 7] = [
    ("queue", |s| s.queue),
    ("instantiate", |s| s.instantiate),
    ("open", |s| s.open),
    ("reserve", |s| s.reserve),
    ("move in", |s| s.move_in),
    ("run", |s| s.run),
    ("move out", |s| s.move_out),
];

fn main() -> Result<(), Box<dyn Error>> {
    let address = std::env::args().nth(1);
    let client = Client::connect(address.as_deref())?;
    let pings = (0..2000)
        .map(|_| {
            let begun = Instant::now();
            client.ping()?;
            Ok(begun.elapsed().as_secs_f64())
        })
        .collect::<Result<Vec<_>, strait_client::Error>>()?;
    println!("PING {:.0} us; medians in microseconds:", median(pings));
    print!("{:12}{:>10}{:>10}{:>10}", "", "native", "call", "client");
    for (name, _) in STAGES {
        print!("{name:>12}");
    }
    println!("{:>12}{:>8}", "rest of host", "faults");
    for (label, bytes, calls) in SIZES {
        measure(&client, label, bytes, calls)?;
    }
    Ok(())
}

fn measure(client: &Client, label: &str, bytes: u64, calls: usize) -> Result<(), Box<dyn Error>> {
    let elements = bytes / 8;
    let mut x = client.create(&[NewTensor {
        name: "x".into(),
        dtype: Dtype::Float64,
        shape: vec![elements],
    }])?;
    x.tensor_mut::<f64>("x")?.fill(1.5);
    let mut y = client.create(&[NewTensor {
        name: "y".into(),
        dtype: Dtype::Float64,
        shape: vec![elements],
    }])?;
    let (mut whole, mut native, mut faults, mut stages) = (vec![], vec![], vec![], vec![]);
    for call in 0..calls + calls / 10 + 3 {
        let begun = Instant::now();
        let result = client
            .call("scale-shift")
            .input("x", &x)
            .param("a", 2)
            .param("b", 1)
            .send()?;
        let first = result.tensor("y")?.as_slice::<f64>()?[0];
        let took = begun.elapsed().as_secs_f64();
        if first.to_bits() != 4_f64.to_bits() {
            return Err(format!("the first element is {first}, expected 4").into());
        }
        let seconds = result.seconds;
        let minor_faults = result.minor_faults;
        drop(result);
        let begun = Instant::now();
        scale_shift(x.tensor("x")?.as_slice()?, y.tensor_mut("y")?);
        let alone = begun.elapsed().as_secs_f64();
        // The first ones warm everything up.
        if call >= calls / 10 + 3 {
            whole.push(took);
            native.push(alone);
            stages.push(seconds);
            #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
            faults.push(minor_faults as f64 / 1e6);
        }
    }
    let of = |part: &dyn Fn(&Seconds) -> f64| median(stages.iter().map(part).collect());
    let client_side = median(
        whole
            .iter()
            .zip(&stages)
            .map(|(whole, seconds)| whole - seconds.total)
            .collect(),
    );
    print!(
        "{label:12}{:>10.0}{:>10.0}{client_side:>10.0}",
        median(native),
        median(whole.clone())
    );
    for (_, stage) in STAGES {
        print!("{:>12.0}", of(&stage));
    }
    let rest = of(&|s| s.total - STAGES.iter().map(|(_, stage)| stage(s)).sum::<f64>());
    println!("{rest:>12.0}{:>8.0}", median(faults));
    Ok(())
}

/// The kernel's loop in this process.
fn scale_shift(x: &[f64], y: &mut [f64]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = 2.0 * *x + 1.0;
    }
    black_box(y);
}

/// The median, in microseconds.
fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2] * 1e6
}
