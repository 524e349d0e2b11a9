//! The options of every command that talks to a host.

use clap::Args;
use strait_client::{Client, address};

use super::failure::Failure;

/// Where the host is, and how to talk to it.
#[derive(Debug, Args)]
pub(super) struct Connection {
    /// The host's directory as unix:///DIRECTORY [default: $STRAIT_ADDRESS, else the usual places].
    #[arg(long, value_name = "URL", global = true)]
    address: Option<String>,
    /// Id of this request in the host's log and in errors: 1 to 64 characters from A-Z a-z 0-9 . _ : -
    #[arg(long, value_name = "ID", global = true)]
    request_id: Option<String>,
    /// One JSON object on stdout instead of text.
    #[arg(long, global = true)]
    pub(super) json: bool,
}

impl Connection {
    /// A session with that host.
    pub(super) fn client(&self) -> Result<Client, Failure> {
        let directory = address::directory(self.address.as_deref())
            .map_err(|e| Failure::from(strait_client::Error::from(e)))?;
        let options = strait_client::Options {
            name: concat!("strait-cli/", env!("CARGO_PKG_VERSION")).into(),
            ..Default::default()
        };
        let client = Client::connect_with(&directory, &options)?;
        match &self.request_id {
            Some(id) => Ok(client.with_request_id(id)?),
            None => Ok(client),
        }
    }
}
