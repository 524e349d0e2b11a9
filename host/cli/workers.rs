//! `workers`: the processes that run a host's kernels.

use std::time::Duration;

use clap::Args;
use serde_json::json;
use strait_client::wire::Worker;

use super::connection::Connection;
use super::failure::Failure;
use super::output;

#[derive(Debug, Args)]
pub(super) struct WorkersArgs {
    #[command(flatten)]
    pub(super) connection: Connection,
}

pub(super) fn workers(args: &WorkersArgs) -> Result<(), Failure> {
    let workers = args.connection.client()?.workers()?;
    match args.connection.json {
        true => output::json(&json!({ "workers": workers })),
        false => output::text(&table(&workers)),
    }
}

fn table(workers: &[Worker]) -> String {
    let heading = [
        "WORKER>",
        "PID>",
        "PRINCIPAL",
        "RUNNING>",
        "RUNS>",
        "AGE>",
        "WALLS>",
        "LACKS",
    ];
    let rows = workers.iter().map(|worker| {
        let lacks = match &*worker.lacks {
            [] => "-".to_owned(),
            lacks => lacks.join("; "),
        };
        let age = Duration::from_secs(worker.age_ms / 1000);
        vec![
            worker.number.to_string(),
            worker.pid.to_string(),
            worker
                .principal
                .clone()
                .unwrap_or_else(|| "spare".to_owned()),
            worker.running.to_string(),
            worker.runs.to_string(),
            indicatif::HumanDuration(age).to_string(),
            worker.walls.len().to_string(),
            lacks,
        ]
    });
    output::table(&heading, rows).to_string()
}
