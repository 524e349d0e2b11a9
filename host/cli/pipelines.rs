//! Pipelines as an argument: as text, or JSON in a file.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use strait_protocol::Pipeline;

use super::failure::Failure;
use crate::error::Status;
use crate::session::{is_pipeline, parse_pipeline};

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
