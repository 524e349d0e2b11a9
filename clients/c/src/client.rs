//! Connections, and what a host has.

use std::ffi::{CString, c_char};
use std::mem::MaybeUninit;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::json;
use strait_client::{AsyncClient, Error, address};

use crate::failure::{Failure, asked, c_text, end, entry};
use crate::operation::{Operation, Outcome, done, hand_out_started};
use crate::pointer::{StaticText, Text, free_text, hand_out, hand_out_text};

/// A connection to a host.
#[derive(Debug)]
pub struct Client {
    client: strait_client::Client,
    host_id: CString,
}

/// For strait_options.flags: leases are not renewed in the background, and end when they expire.
pub const STRAIT_NO_RENEWAL: u32 = 1;

/// How a client behaves. Set all of it to zero first, which is the default.
#[repr(C)]
#[derive(Debug)]
pub struct Options {
    /// Lifetime of leases in milliseconds; 0: the host's default. Never more than its maximum.
    pub lease_ms: u64,
    /// Name and version by which the host's log knows this client; NULL: strait-c/VERSION.
    pub name: *const c_char,
    /// STRAIT_NO_RENEWAL, or 0.
    pub flags: u32,
    /// 0.
    pub reserved: [u32; 7],
}

impl Options {
    fn of(options: Option<&Self>) -> Result<strait_client::Options, Failure> {
        let mut wanted = strait_client::Options {
            name: concat!("strait-c/", env!("CARGO_PKG_VERSION")).into(),
            ..strait_client::Options::default()
        };
        let Some(options) = options else {
            return Ok(wanted);
        };
        if options.flags & !STRAIT_NO_RENEWAL != 0 || options.reserved != [0; 7] {
            return Err(Failure::argument(
                "`options` has flags that this library does not know, or is not zeroed".to_owned(),
            ));
        }
        wanted.renew = options.flags & STRAIT_NO_RENEWAL == 0;
        wanted.lease = milliseconds(options.lease_ms);
        if let Some(name) = Text::at(options.name).optional("options.name")? {
            name.clone_into(&mut wanted.name);
        }
        Ok(wanted)
    }
}

/// 0 is as if nothing was said.
pub(crate) fn milliseconds(number: u64) -> Option<Duration> {
    (number > 0).then(|| Duration::from_millis(number))
}

fn found(
    address: &Text,
    options: Option<&Options>,
) -> Result<(PathBuf, strait_client::Options), Failure> {
    let directory = address::directory(address.optional("address")?).map_err(Error::from)?;
    Ok((directory, Options::of(options)?))
}

impl Client {
    fn new(client: strait_client::Client) -> Self {
        let host_id = c_text(&*client.welcome().host_id);
        Self { client, host_id }
    }

    pub(crate) fn of(client: Option<&Self>) -> Result<&strait_client::Client, Failure> {
        let client = client.ok_or_else(|| Failure::null("client"))?;
        Ok(&client.client)
    }
}

fn kernels_text(kernels: Vec<strait_client::Kernel>) -> String {
    json!({ "kernels": kernels }).to_string()
}

fn flights_text(flights: Vec<strait_client::Flight>) -> String {
    json!({ "flights": flights }).to_string()
}

fn stats_text(stats: &strait_client::Stats) -> String {
    stats.all.to_string()
}

/// Starts what asks the host, as futures.
fn start<F>(
    client: Option<&Client>,
    ask: impl FnOnce(AsyncClient) -> Result<F, Failure>,
) -> Result<Operation, Failure>
where
    F: Future<Output = Result<Outcome, Failure>> + Send + 'static,
{
    Operation::start(ask(Client::of(client)?.asynchronous())?)
}

/// Connects to the host at `address` ("unix:///DIRECTORY"). NULL: the one that STRAIT_ADDRESS names, or the first one found in the usual places
/// (docs/protocol.md). Addresses of other machines are refused for now (REMOTE_ADDRESS). `options` may be NULL.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_connect(
    address: Text,
    options: Option<&Options>,
    client: Option<&mut MaybeUninit<*mut Client>>,
) -> Option<Box<Failure>> {
    entry(|| {
        hand_out(client, "client", || {
            let (directory, options) = found(&address, options)?;
            let client = strait_client::Client::connect_with(&directory, &options)?;
            Ok(Client::new(client))
        })
    })
}

/// Starts a strait_connect; strait_finish_client ends it.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_connect_start(
    address: Text,
    options: Option<&Options>,
    operation: Option<&mut MaybeUninit<*mut Operation>>,
) -> Option<Box<Failure>> {
    hand_out_started(operation, || {
        let (directory, options) = found(&address, options)?;
        Operation::start(async move {
            let client = AsyncClient::connect_with(&directory, &options).await?;
            done(Client::new(client.blocking()))
        })
    })
}

/// The same connection, with this id in each of its requests, and so in the host's log and in errors: 1 to 64 characters from
/// A-Z a-z 0-9 . _ : -
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_client_with_request_id(
    client: Option<&Client>,
    request_id: Text,
    with_id: Option<&mut MaybeUninit<*mut Client>>,
) -> Option<Box<Failure>> {
    entry(|| {
        hand_out(with_id, "with_id", || {
            let id = request_id.get("request_id")?;
            Ok(Client::new(Client::of(client)?.with_request_id(id)?))
        })
    })
}

/// Ends the connection now, for everything that uses it. What is mapped stays readable.
#[unsafe(no_mangle)]
pub extern "C" fn strait_client_close(client: Option<&Client>) {
    asked(client, (), |client| client.client.close());
}

/// Frees a client. The connection ends with the last of its clients, segments and operations. NULL is fine.
#[unsafe(no_mangle)]
pub extern "C" fn strait_client_free(client: Option<Box<Client>>) {
    end(client);
}

/// The host's id; NULL for NULL.
#[unsafe(no_mangle)]
pub extern "C" fn strait_client_host_id(client: Option<&Client>) -> StaticText {
    asked(client, StaticText::NULL, |client| {
        StaticText::new(&client.host_id)
    })
}

/// Bytes from which on a tensor reaches a kernel without a copy; 0 for NULL.
#[unsafe(no_mangle)]
pub extern "C" fn strait_client_move_min_bytes(client: Option<&Client>) -> u64 {
    asked(client, 0, |client| client.client.welcome().move_min_bytes)
}

/// Bytes up to which a tensor travels in a call's request and reply; 0 for NULL.
#[unsafe(no_mangle)]
pub extern "C" fn strait_client_inline_bytes(client: Option<&Client>) -> u64 {
    asked(client, 0, |client| client.client.welcome().inline_bytes)
}

/// Tensor bytes that this library copied for this connection; 0 for NULL.
#[unsafe(no_mangle)]
pub extern "C" fn strait_client_copied_bytes(client: Option<&Client>) -> u64 {
    asked(client, 0, |client| client.client.copied_bytes())
}

/// Removes the name of a flight. Its memory is freed when nobody uses it any more.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_drop(client: Option<&Client>, name: Text) -> Option<Box<Failure>> {
    entry(|| Ok(Client::of(client)?.drop_flight(name.get("name")?)?))
}

/// Starts a strait_drop; strait_finish ends it.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_drop_start(
    client: Option<&Client>,
    name: Text,
    operation: Option<&mut MaybeUninit<*mut Operation>>,
) -> Option<Box<Failure>> {
    hand_out_started(operation, || {
        let name = name.get("name")?.to_owned();
        start(client, |client| {
            Ok(async move {
                client.drop_flight(&name).await?;
                done(())
            })
        })
    })
}

/// The caller's flights, by name: {"flights": [{"name", "mapping"}, ...]}, as in LIST of docs/protocol.md. strait_text_free
/// frees the text.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_list(
    client: Option<&Client>,
    text: Option<&mut MaybeUninit<*mut c_char>>,
) -> Option<Box<Failure>> {
    entry(|| {
        hand_out_text(text, "text", || {
            let flights: Result<Vec<_>, Error> = Client::of(client)?.list().collect();
            Ok(flights_text(flights?))
        })
    })
}

/// Starts a strait_list; strait_finish_text ends it.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_list_start(
    client: Option<&Client>,
    operation: Option<&mut MaybeUninit<*mut Operation>>,
) -> Option<Box<Failure>> {
    hand_out_started(operation, || {
        start(client, |client| {
            Ok(async move { done(flights_text(client.list().await?)) })
        })
    })
}

/// The kernels, by plugin and name, all of them or those called `kernel`: {"kernels": [{"name", "plugin", "inputs", "outputs",
/// "parameters", ...}, ...]}, as in KERNELS of docs/protocol.md. strait_text_free frees the text.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_kernels(
    client: Option<&Client>,
    kernel: Text,
    text: Option<&mut MaybeUninit<*mut c_char>>,
) -> Option<Box<Failure>> {
    entry(|| {
        hand_out_text(text, "text", || {
            let kernels = Client::of(client)?.kernels(kernel.optional("kernel")?)?;
            Ok(kernels_text(kernels))
        })
    })
}

/// Starts a strait_kernels; strait_finish_text ends it.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_kernels_start(
    client: Option<&Client>,
    kernel: Text,
    operation: Option<&mut MaybeUninit<*mut Operation>>,
) -> Option<Box<Failure>> {
    hand_out_started(operation, || {
        let kernel = kernel.optional("kernel")?.map(str::to_owned);
        start(client, |client| {
            Ok(async move {
                let kernels = client.kernels(kernel.as_deref()).await?;
                done(kernels_text(kernels))
            })
        })
    })
}

/// The host's counts, as in STATS of docs/protocol.md. strait_text_free frees the text.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_stats(
    client: Option<&Client>,
    text: Option<&mut MaybeUninit<*mut c_char>>,
) -> Option<Box<Failure>> {
    entry(|| {
        hand_out_text(text, "text", || {
            Ok(stats_text(&Client::of(client)?.stats()?))
        })
    })
}

/// Starts a strait_stats; strait_finish_text ends it.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn strait_stats_start(
    client: Option<&Client>,
    operation: Option<&mut MaybeUninit<*mut Operation>>,
) -> Option<Box<Failure>> {
    hand_out_started(operation, || {
        start(client, |client| {
            Ok(async move { done(stats_text(&client.stats().await?)) })
        })
    })
}

/// Frees a text that a function returned. NULL is fine.
#[unsafe(no_mangle)]
pub extern "C" fn strait_text_free(text: *mut c_char) {
    free_text(text);
}
