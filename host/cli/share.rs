//! `share`, `unshare`: who else reads a flight.

use clap::Args;
use serde_json::json;

use super::arguments::grantees;
use super::connection::Connection;
use super::failure::Failure;
use super::output;

#[derive(Debug, Args)]
pub(super) struct ShareArgs {
    /// The flight.
    name: String,
    /// Whom it is shared with: token:alice (or just alice), uid:1000, cert:pipeline, group:lab; several in one word are separated by
    /// commas. They see it as OWNER/NAME. Without any: show whom it is shared with.
    #[arg(value_name = "WHO")]
    with: Vec<String>,
    #[command(flatten)]
    pub(super) connection: Connection,
}

#[derive(Debug, Args)]
pub(super) struct UnshareArgs {
    /// The flight.
    name: String,
    /// Whom it is no longer shared with, as for `share`; without any: with nobody.
    #[arg(value_name = "WHO")]
    with: Vec<String>,
    #[command(flatten)]
    pub(super) connection: Connection,
}

pub(super) fn share(args: &ShareArgs) -> Result<(), Failure> {
    change(&args.connection, &args.name, &grantees(&args.with), &[])
}

pub(super) fn unshare(args: &UnshareArgs) -> Result<(), Failure> {
    let everybody = || vec!["*".to_owned()];
    let gone = match grantees(&args.with) {
        gone if gone.is_empty() => everybody(),
        gone => gone,
    };
    change(&args.connection, &args.name, &[], &gone)
}

fn change<'a>(
    connection: &Connection,
    name: &str,
    add: &'a [String],
    remove: &'a [String],
) -> Result<(), Failure> {
    let words =
        |texts: &'a [String]| -> Vec<&'a str> { texts.iter().map(String::as_str).collect() };
    let (add, remove) = (words(add), words(remove));
    let shared = connection.client()?.share(name, &add, &remove)?;
    match connection.json {
        true => output::json(&json!({ "name": name, "shared": shared })),
        false if shared.is_empty() => Ok(()),
        false => output::text(&shared.join("\n")),
    }
}
