//! `plugins`: what a host has loaded, and what of it is out of service.

use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::json;
use strait_client::wire::{Incidents, Plugin};

use super::connection::Connection;
use super::failure::Failure;
use super::output;

#[derive(Debug, Args)]
pub(super) struct PluginsArgs {
    #[command(subcommand)]
    change: Option<Change>,
    #[command(flatten)]
    pub(super) connection: Connection,
}

#[derive(Debug, Subcommand)]
enum Change {
    /// Re-enable a plugin whose kernels cost too many worker processes (operators only).
    Enable(EnableArgs),
}

#[derive(Debug, Args)]
struct EnableArgs {
    /// Name of the plugin.
    plugin: String,
    /// Only for this principal, such as uid:1000.
    #[arg(long)]
    principal: Option<String>,
}

pub(super) fn plugins(args: &PluginsArgs) -> Result<(), Failure> {
    let client = args.connection.client()?;
    let plugins = match &args.change {
        None => client.plugins()?,
        Some(Change::Enable(enable)) => {
            client.enable_plugin(&enable.plugin, enable.principal.as_deref())?
        }
    };
    match args.connection.json {
        true => output::json(&json!({ "plugins": plugins })),
        false => output::text(&table(&plugins)),
    }
}

fn table(plugins: &[Plugin]) -> String {
    let heading = ["PLUGIN", "SHA256", "KERNELS", "STATE"];
    let rows = plugins.iter().map(|plugin| {
        let state = match &*plugin.incidents {
            [] => "in service".to_owned(),
            incidents => incidents.iter().map(state).collect::<Vec<_>>().join("; "),
        };
        vec![
            plugin.name.clone(),
            plugin.sha256.chars().take(12).collect(),
            plugin.kernels.join(", "),
            state,
        ]
    });
    output::table(&heading, rows).to_string()
}

fn state(of: &Incidents) -> String {
    let Incidents {
        principal,
        count,
        last,
        out_ms,
    } = of;
    match out_ms {
        Some(ms) => {
            let out = indicatif::HumanDuration(Duration::from_secs(ms / 1000));
            format!("out of service for {principal} since {out}: {last}")
        }
        None => format!("{count} worker processes lost by {principal}: {last}"),
    }
}
