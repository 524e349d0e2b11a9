//! Pipelines as an argument, as text or JSON in a file; and `pipelines`: those that have names.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use clap::{Args, Subcommand};
use serde_json::json;
use strait_client::PublishPipeline;
use strait_protocol::Pipeline;

use super::connection::Connection;
use super::failure::Failure;
use super::output;
use crate::error::Status;
use crate::session::{is_pipeline, parse_pipeline};

#[derive(Debug, Args)]
pub(super) struct PipelinesArgs {
    #[command(subcommand)]
    change: Option<Change>,
    #[command(flatten)]
    pub(super) connection: Connection,
}

#[derive(Debug, Subcommand)]
enum Change {
    /// List them, as without a command.
    Ls,
    /// Give a pipeline a name, by which it is called as a kernel is, until it is removed or the host ends.
    Publish(PublishArgs),
    /// Take names away; calls under way go on.
    Rm {
        /// The pipelines' names.
        #[arg(required = true)]
        names: Vec<String>,
    },
}

#[derive(Debug, Args)]
struct PublishArgs {
    /// The name: 1 to 64 characters from A-Z a-z 0-9 . _ - +
    name: String,
    /// The pipeline, as "clip(lo=0) | cast(to=int8)", or FILE.json with one.
    pipeline: String,
    /// Replace the pipeline that already has this name.
    #[arg(long)]
    replace: bool,
    /// For all principals of the host (operators only).
    #[arg(long)]
    shared: bool,
}

pub(super) fn pipelines(args: &PipelinesArgs) -> Result<(), Failure> {
    let mut publish = None;
    if let Some(Change::Publish(PublishArgs {
        name,
        pipeline: text,
        replace,
        shared,
    })) = &args.change
    {
        let pipeline = match pipeline(text)? {
            Some(pipeline) => pipeline,
            // One kernel alone.
            None => parse_pipeline(text).map_err(Status::from)?,
        };
        publish = Some(PublishPipeline {
            name: name.clone(),
            pipeline: Some(pipeline),
            replace: *replace,
            shared: *shared,
            ..Default::default()
        });
    }
    let client = args.connection.client()?;
    if let Some(Change::Rm { names }) = &args.change {
        for name in names {
            client.drop_pipeline(name)?;
        }
    }
    let listed = match publish {
        Some(publish) => client.publish_pipeline(publish)?,
        None => client.pipelines()?,
    };
    if args.connection.json {
        return output::json(&json!({ "pipelines": listed }));
    }
    let lists = matches!(args.change, None | Some(Change::Ls));
    if listed.is_empty() || !lists {
        return Ok(());
    }
    let rows = listed.into_iter().map(|one| {
        let whose = match one.shared {
            true => "everybody",
            false => "you",
        };
        vec![one.name, whose.to_owned(), one.text]
    });
    let heading = ["PIPELINE", "FOR", "STAGES"];
    output::text(&output::lines(&output::table(&heading, rows)))
}

/// Longest file with a pipeline that is read: a request has no room for more.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// The pipeline that a KERNEL argument stands for, if it is one: its text, or FILE.json.
pub(super) fn pipeline(kernel: &str) -> Result<Option<Pipeline>, Failure> {
    let file = Path::new(kernel);
    let is_json = file
        .extension()
        .is_some_and(|end| end.eq_ignore_ascii_case("json"));
    if is_pipeline(kernel) && !file.exists() {
        return Ok(Some(parse_pipeline(kernel).map_err(Status::from)?));
    }
    is_json.then(|| read(file)).transpose()
}

fn read(file: &Path) -> Result<Pipeline, Failure> {
    let shown = file.display();
    let mut json = String::new();
    File::open(file)
        .and_then(|file| file.take(FILE_BYTES_MAX + 1).read_to_string(&mut json))
        .map_err(|error| Failure::file(&error, format!("{shown}: cannot read it: {error}")))?;
    if json.len() as u64 > FILE_BYTES_MAX {
        let message = format!(
            "{shown}: it has more than {FILE_BYTES_MAX} bytes; a pipeline has at most 32 stages"
        );
        return Err(Failure::input("BAD_PIPELINE", message));
    }
    serde_json::from_str(&json).map_err(|error| {
        let message = format!("{shown}: not a pipeline as JSON: {error}");
        Failure::input("BAD_PIPELINE", message)
    })
}
