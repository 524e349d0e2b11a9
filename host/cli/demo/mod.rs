//! `demo`: a tensor's whole way on this machine, measured and checked.
//!
//! ```text
//! demo ──spawns──▶ strait serve            the host, in a private directory
//!      ──spawns──▶ producer                puts x, calls the kernel, runs the native loop
//!      ──spawns──▶ consumer                maps each result, computes it itself, compares;
//!                                          then reads the last one inline through Flight
//! ```
//! The children are this same program. Each ends when its stdin does, so that none outlives a
//! demo that was killed.

mod child;
mod formula;
mod inline;
mod report;
mod roles;

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use clap::Args;
use indicatif::BinaryBytes;
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use super::failure::Failure;
use super::output;
use child::Child;
use formula::Formula;
use report::{Report, Round};
use roles::{Called, Checked, Filled, Inlined, Looped, ToConsumer, ToProducer};

pub(super) use roles::{RoleArgs, consumer, producer};

/// Calls before those that are measured: two results take turns, and each has to be made once.
const WARM_UP: usize = 3;
/// Inline reads; all but the first are measured.
const INLINE_READS: usize = 6;
/// The demo's processes together hold about this many times the tensor.
const MEMORY_TIMES: u64 = 8;
const READY_MAX: Duration = Duration::from_secs(60);
const STEP_MAX: Duration = Duration::from_secs(300);

#[derive(Debug, Args)]
pub(super) struct DemoArgs {
    /// Size of the float64 tensor.
    #[arg(long, default_value_t = 100 << 20, value_parser = clap::value_parser!(u64).range(8..))]
    bytes: u64,
    /// Number of measured calls.
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u16).range(1..=1000))]
    calls: u16,
    /// One JSON object on stdout instead of text.
    #[arg(long)]
    pub(super) json: bool,
}

pub(super) fn demo(args: &DemoArgs) -> Result<(), Failure> {
    let linux =
        |error: std::io::Error| Failure::other("LINUX", format!("the demo cannot begin: {error}"));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(linux)?;
    let shown = runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt()).map_err(linux)?;
        let mut terminate = signal(SignalKind::terminate()).map_err(linux)?;
        // For this user alone, gone with this value.
        let directory = tempfile::Builder::new()
            .prefix("strait-demo-")
            .permissions(Permissions::from_mode(0o700))
            .tempdir()
            .map_err(linux)?;
        let mut cast = Cast::default();
        let shown = tokio::select! {
            report = show(args, directory.path(), &mut cast) => report,
            _ = interrupt.recv() => Err(Failure::signal(SignalKind::interrupt())),
            _ = terminate.recv() => Err(Failure::signal(SignalKind::terminate())),
        };
        // Those that a failed show left; only then the directory can go.
        for child in [cast.consumer, cast.producer, cast.host]
            .into_iter()
            .flatten()
        {
            child.kill().await;
        }
        shown
    });
    match shown {
        Ok(report) => {
            if args.json {
                output::json(&report.to_json())?;
            } else {
                output::text(&report.to_text())?;
            }
            if report.problems().is_empty() {
                return Ok(());
            }
            let message = format!(
                "the demo found that something is wrong: {}",
                report.problems().join("; ")
            );
            Err(Failure::other("NOT_VERIFIED", message).answered())
        }
        Err(failure) if args.json => {
            output::json(&json!({ "verified": false, "error": failure.to_json() }))?;
            Err(failure.answered())
        }
        Err(failure) => Err(failure),
    }
}

/// The processes that are there.
#[derive(Default)]
struct Cast {
    host: Option<Child>,
    producer: Option<Child>,
    consumer: Option<Child>,
}

async fn show(args: &DemoArgs, directory: &Path, cast: &mut Cast) -> Result<Report, Failure> {
    enough_memory(args.bytes)?;
    let host = cast
        .host
        .insert(Child::spawn("host", &host_arguments(directory))?);
    host.line(READY_MAX).await?;
    let producer = Child::spawn(
        "producer",
        &role_arguments("demo-producer", directory, args.bytes),
    )?;
    let producer = cast.producer.insert(producer);
    let filled: Filled = producer.reply(STEP_MAX).await?;
    let consumer = Child::spawn(
        "consumer",
        &role_arguments("demo-consumer", directory, args.bytes),
    )?;
    let consumer = cast.consumer.insert(consumer);

    let mut report = Report::new(
        args.bytes,
        filled,
        [host.pid(), producer.pid(), consumer.pid()],
    );
    for number in 0..WARM_UP + usize::from(args.calls) {
        let warm_up = number < WARM_UP;
        let formula = Formula::of_round(number);
        // Looking at the maps takes time of its own, so the measured calls go without.
        let called: Called = producer
            .ask(
                &ToProducer::Call {
                    formula,
                    verify: warm_up,
                },
                STEP_MAX,
            )
            .await?;
        let checked: Checked = consumer
            .ask(&ToConsumer::Check { formula }, STEP_MAX)
            .await?;
        let looped: Looped = producer
            .ask(&ToProducer::Native { formula }, STEP_MAX)
            .await?;
        report.add(Round {
            warm_up,
            called,
            checked,
            looped,
        });
    }
    let formula = Formula::of_round(WARM_UP + usize::from(args.calls) - 1);
    for number in 0..INLINE_READS {
        let inlined: Inlined = consumer
            .ask(&ToConsumer::Inline { formula }, STEP_MAX)
            .await?;
        report.add_inline(number == 0, inlined);
    }
    for child in [&mut cast.consumer, &mut cast.producer, &mut cast.host] {
        if let Some(child) = child.take() {
            child.end(STEP_MAX).await?;
        }
    }
    Ok(report)
}

fn enough_memory(bytes: u64) -> Result<(), Failure> {
    let needed = bytes.saturating_mul(MEMORY_TIMES);
    match strait_memory::process::memory_available() {
        Ok(available) if available < needed => Err(Failure::input(
            "BAD_SETTING",
            format!(
                "--bytes {bytes} needs about {} of memory in all, {} are available; take fewer",
                BinaryBytes(needed),
                BinaryBytes(available)
            ),
        )),
        // Where it cannot be known, trying tells.
        _ => Ok(()),
    }
}

fn host_arguments(directory: &Path) -> Vec<String> {
    let directory = directory.display().to_string();
    [
        "serve",
        "--directory",
        &directory,
        "--log-level",
        "warn",
        "--until-stdin-ends",
    ]
    .map(str::to_owned)
    .into()
}

fn role_arguments(role: &str, directory: &Path, bytes: u64) -> Vec<String> {
    vec![
        role.to_owned(),
        "--directory".to_owned(),
        directory.display().to_string(),
        "--bytes".to_owned(),
        bytes.to_string(),
    ]
}
