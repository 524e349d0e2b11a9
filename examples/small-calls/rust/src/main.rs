//! Times calls of a kernel over 1 KiB: ADDRESS CALLS. See ../../README.md.

use std::error::Error;
use std::time::{Duration, Instant};

use strait_client::{Client, Dtype, NewTensor, OpenSegment, Prepared, TensorSpec};

const ELEMENTS: u64 = 128;
const WARM_CALLS: u32 = 200;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [address, calls] = &arguments[..] else {
        return Err("usage: small-calls ADDRESS CALLS".into());
    };
    let calls: u32 = calls.parse()?;
    if calls == 0 {
        return Err("CALLS is a number from 1 on".into());
    }
    let client = Client::connect(Some(address))?;
    let mut x = client.create(&[NewTensor {
        name: "x".into(),
        dtype: Dtype::Float64,
        shape: vec![ELEMENTS],
    }])?;
    for i in 0..WARM_CALLS {
        cycle(&client, &mut x, i.into())?;
    }
    let times = (0..calls)
        .map(|i| cycle(&client, &mut x, i.into()))
        .collect::<Result<Vec<_>, _>>()?;
    tell("Rust", times);
    let spec = TensorSpec {
        dtype: Dtype::Float64,
        shape: vec![ELEMENTS],
    };
    for (what, ring) in [("Rust, prepared", false), ("Rust, ring", true)] {
        let prepare = client.prepare("scale-shift").input("x", &spec);
        let prepare = prepare.param("a", 2).param("b", 1);
        let prepare = if ring { prepare.ring() } else { prepare };
        let mut prepared = prepare.send()?;
        for i in 0..WARM_CALLS {
            prepared_cycle(&mut prepared, i.into())?;
        }
        let times = (0..calls)
            .map(|i| prepared_cycle(&mut prepared, i.into()))
            .collect::<Result<Vec<_>, _>>()?;
        tell(what, times);
    }
    Ok(())
}

fn tell(client: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    println!(
        r#"{{"client":"{client}","calls":{},"p50_us":{},"p99_us":{}}}"#,
        times.len(),
        percentile(&times, 50),
        percentile(&times, 99)
    );
}

/// A call of what was prepared: elements of this process, and back into it.
fn prepared_cycle(prepared: &mut Prepared, first: f64) -> Result<Duration, Box<dyn Error>> {
    let begun = Instant::now();
    let mut x = [0.0_f64; ELEMENTS as usize];
    x[0] = first;
    let result = prepared.call(&[(&x[..]).into()])?;
    let (got, want) = (result.tensor("y")?.as_slice::<f64>()?[0], 2.0 * first + 1.0);
    if got != want {
        return Err(format!("the first element is {got}, expected {want}").into());
    }
    Ok(begun.elapsed())
}

/// One whole cycle: the kernel, its result read and given back.
fn cycle(client: &Client, x: &mut OpenSegment, first: f64) -> Result<Duration, Box<dyn Error>> {
    let begun = Instant::now();
    x.tensor_mut::<f64>("x")?[0] = first;
    let result = client
        .call("scale-shift")
        .input("x", &*x)
        .param("a", 2)
        .param("b", 1)
        .send()?;
    let (got, want) = (result.tensor("y")?.as_slice::<f64>()?[0], 2.0 * first + 1.0);
    if got != want {
        return Err(format!("the first element is {got}, expected {want}").into());
    }
    drop(result);
    Ok(begun.elapsed())
}

/// Percentile of sorted times, in microseconds.
fn percentile(times: &[Duration], of: usize) -> f64 {
    times[(times.len() * of).div_ceil(100) - 1].as_secs_f64() * 1e6
}
