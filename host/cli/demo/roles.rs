//! What the producer and the consumer do, each in a process of its own.

use std::hint::black_box;
use std::io::{self, BufRead};
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use strait_client::{Client, Dtype, NewTensor, OpenSegment};
use strait_memory::{Inode, process};

use super::formula::{Compared, Formula, x_of};
use super::inline;
use crate::cli::failure::Failure;
use crate::cli::output;

const X: &str = "x";
const Y: &str = "y";
pub(super) const KERNEL: &str = "scale-shift";

#[derive(Debug, Args)]
pub(in super::super) struct RoleArgs {
    #[arg(long)]
    directory: PathBuf,
    #[arg(long)]
    bytes: u64,
}

impl RoleArgs {
    fn elements(&self) -> u64 {
        self.bytes / size_of::<f64>() as u64
    }
}

/// Which memory an address is: device and inode by Linux's own list of this process's mappings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Pages {
    pub(super) device: u64,
    pub(super) inode: u64,
}

impl Pages {
    fn at(bytes: &[u8]) -> Result<Option<Self>, Failure> {
        let unread =
            |error: io::Error| Failure::other("LINUX", format!("/proc/self/maps: {error}"));
        let found = process::inode_at(bytes.as_ptr().addr()).map_err(unread)?;
        Ok(found.map(|(Inode { device, inode }, _)| Self { device, inode }))
    }
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum ToProducer {
    Call { formula: Formula, verify: bool },
    Native { formula: Formula },
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum ToConsumer {
    Check { formula: Formula },
    Inline { formula: Formula },
}

/// The producer has put x.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Filled {
    /// Where it wrote x.
    pub(super) pages: Option<Pages>,
    /// Smaller tensors are copied into the guest, not moved.
    pub(super) move_min_bytes: u64,
}

/// A call as the producer saw it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Called {
    /// From sending the request to having the result mapped.
    pub(super) seconds: f64,
    pub(super) instantiate_seconds: f64,
    pub(super) copied_bytes: u64,
    pub(super) minor_faults: u64,
    /// What the host's own maps said at the guest's addresses during `run`: x, y. Only if asked for.
    pub(super) guest: Option<[Pages; 2]>,
}

/// The native loop.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Looped {
    pub(super) seconds: f64,
}

/// A result as the consumer saw it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Checked {
    /// From asking for the result to having it mapped.
    pub(super) attach_seconds: f64,
    pub(super) pages: Option<Pages>,
    pub(super) compared: Compared,
}

/// A result read inline.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Inlined {
    pub(super) seconds: f64,
    /// By the host, in user space.
    pub(super) copied_bytes: u64,
    pub(super) compared: Compared,
}

/// Answers each question on stdin, until stdin ends.
fn serve<Q: DeserializeOwned>(
    mut answer: impl FnMut(Q) -> Result<(), Failure>,
) -> Result<(), Failure> {
    for line in io::stdin().lock().lines() {
        let line = line.map_err(|error| Failure::other("LINUX", format!("stdin: {error}")))?;
        let question = serde_json::from_str(&line).map_err(|error| {
            Failure::usage(format!("{line:?} is not a question of the demo: {error}"))
        })?;
        answer(question)?;
    }
    Ok(())
}

fn connect(directory: &Path) -> Result<Client, Failure> {
    Ok(Client::connect_to(directory)?)
}

fn tensor(name: &str, elements: u64) -> NewTensor {
    NewTensor {
        name: name.to_owned(),
        dtype: Dtype::Float64,
        shape: vec![elements],
    }
}

pub(in super::super) fn producer(args: &RoleArgs) -> Result<(), Failure> {
    let client = connect(&args.directory)?;
    let mut x = client.create(&[tensor(X, args.elements())])?;
    for (index, element) in x.tensor_mut::<f64>(X)?.iter_mut().enumerate() {
        *element = x_of(index);
    }
    let pages = Pages::at(x.bytes_mut(X)?)?;
    x.publish(X, false)?;
    output::json(&Filled {
        pages,
        move_min_bytes: client.welcome().move_min_bytes,
    })?;
    // Of the same kind as a result: shared memory, warm after the first round.
    let mut native = client.create(&[tensor(Y, args.elements())])?;
    serve(|question| match question {
        ToProducer::Call { formula, verify } => output::json(&call(&client, formula, verify)?),
        ToProducer::Native { formula } => output::json(&native_loop(&x, &mut native, formula)?),
    })
}

fn call(client: &Client, Formula { a, b }: Formula, verify: bool) -> Result<Called, Failure> {
    let start = Instant::now();
    let result = client
        .call(KERNEL)
        .input(X, X)
        .param("a", a)
        .param("b", b)
        .publish(Y, Y)
        .replace(true)
        .verify(verify)
        .send()?;
    let seconds = start.elapsed().as_secs_f64();
    let pages = |port: &str| {
        let of_port = result.pages.iter().find(|pages| pages.port == port)?;
        Some(Pages {
            device: of_port.device,
            inode: of_port.inode,
        })
    };
    Ok(Called {
        seconds,
        instantiate_seconds: result.seconds.instantiate,
        copied_bytes: result.copied_bytes,
        minor_faults: result.minor_faults,
        guest: pages(X).zip(pages(Y)).map(|(x, y)| [x, y]),
    })
}

/// The same computation over the very pages that the kernel reads, without sandbox or host.
fn native_loop(
    x: &OpenSegment,
    native: &mut OpenSegment,
    formula: Formula,
) -> Result<Looped, Failure> {
    let x = x.tensor(X)?.as_slice::<f64>()?;
    let y = native.tensor_mut::<f64>(Y)?;
    let start = Instant::now();
    scale_shift(x, y, formula);
    Ok(Looped {
        seconds: start.elapsed().as_secs_f64(),
    })
}

// A function of its own, so that nothing of it can be moved out of the measured time. With the
// 128-bit vectors of the baseline it is as fast as with AVX2 here: memory is what limits it.
#[inline(never)]
fn scale_shift(x: &[f64], y: &mut [f64], Formula { a, b }: Formula) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = a * x + b;
    }
    black_box(y);
}

pub(in super::super) fn consumer(args: &RoleArgs) -> Result<(), Failure> {
    let client = connect(&args.directory)?;
    let flight = inline::InlineReader::new(&client.welcome().flight)?;
    serve(|question| match question {
        ToConsumer::Check { formula } => output::json(&check(&client, formula)?),
        ToConsumer::Inline { formula } => {
            let copied = || {
                client
                    .stats()
                    .map(|stats| stats.counts.host.map_or(0, |host| host.copied_bytes))
            };
            let before = copied()?;
            let (seconds, compared) = flight.read(Y, formula)?;
            let copied_bytes = copied()? - before;
            output::json(&Inlined {
                seconds,
                copied_bytes,
                compared,
            })
        }
    })
}

fn check(client: &Client, formula: Formula) -> Result<Checked, Failure> {
    let start = Instant::now();
    let segment = client.map(Y)?;
    let attach_seconds = start.elapsed().as_secs_f64();
    let y = segment.tensor(Y)?;
    let mut compared = Compared::default();
    compared.add(y.as_slice::<f64>()?, formula);
    Ok(Checked {
        attach_seconds,
        pages: Pages::at(y.bytes())?,
        compared,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_bit_is_found() {
        let formula = Formula::of_round(3);
        let mut values: Vec<f64> = (0..1000).map(|index| formula.expected(index)).collect();
        let compare = |values: &[f64]| {
            let mut compared = Compared::default();
            for part in values.chunks(300) {
                compared.add(part, formula);
            }
            compared
        };
        let right = compare(&values);
        assert_eq!((right.elements, right.wrong), (1000, 0));
        values[700] = f64::from_bits(values[700].to_bits() ^ 1);
        let wrong = compare(&values);
        assert_eq!(wrong.wrong, 1);
        assert!(wrong.first_wrong.is_some_and(|(index, ..)| index == 700));
    }

    #[test]
    fn rounds_differ() {
        assert_ne!(
            Formula::of_round(0).expected(5).to_bits(),
            Formula::of_round(1).expected(5).to_bits()
        );
    }
}
