//! `serve`: a host in the foreground.

use std::fs;
use std::io::{self, Read};
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use serde_json::json;
use strait_client::address::DATA_SOCKET;
use strait_memory::{FrameListener, process};
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use super::directory::{self, FLIGHT_SOCKET};
use super::failure::Failure;
use super::log::{self, LogFormat};
use super::{hosting, output};
use crate::config::Config;
use crate::{datasock, flight};

/// What the sockets get beyond the drain time to close connections.
const CLOSING: Duration = Duration::from_secs(2);

#[derive(Debug, Args)]
pub(super) struct ServeArgs {
    /// Settings in TOML; the environment (STRAIT__SECTION__KEY) and options take precedence.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The directory for the sockets: created with mode 0700; one that exists must be yours and have that mode
    /// [default: $RUNTIME_DIRECTORY, $XDG_RUNTIME_DIR/strait, /run/strait for root, /tmp/strait-UID].
    #[arg(long, value_name = "DIR")]
    directory: Option<PathBuf>,
    /// Serve from a new directory in $TMPDIR (or /tmp) that is removed when this host ends; the settings'
    /// `server.directory` and `server.tcp` do not count. A signal that ends it at once (SIGKILL, SIGHUP) leaves that directory and two dead sockets behind, nothing else.
    #[arg(long, conflicts_with = "directory")]
    temporary: bool,
    /// Load this plugin in addition to the standard one; can be repeated.
    #[arg(long = "plugin", value_name = "FILE")]
    plugins: Vec<PathBuf>,
    /// Serve Flight on this loopback address, too (reads and puts, without authentication: every user of
    /// this machine can do there whatever you can); port 0 picks a free port.
    #[arg(long, value_name = "ADDRESS:PORT")]
    tcp: Option<SocketAddr>,
    /// Format of the log lines on stderr.
    #[arg(long, value_enum, default_value = "human")]
    log_format: LogFormat,
    /// Log level: error, warn, info, debug or trace, or a filter such as info,strait::session=debug.
    #[arg(long, default_value = "info", value_name = "LEVEL")]
    log_level: String,
    /// End, as on SIGTERM, when stdin ends, so as not to outlive whoever holds the other end.
    #[arg(long)]
    until_stdin_ends: bool,
    /// Print the line that says that it is ready as one JSON object (address, flight, pid, version, protocol, ...).
    #[arg(long)]
    pub(super) json: bool,
}

pub(super) fn serve(args: &ServeArgs) -> Result<(), Failure> {
    log::start(args.log_format, &args.log_level)?;
    let mut config = hosting::settings(args.config.as_deref())?;
    config.server.plugins.extend(args.plugins.iter().cloned());
    if args.temporary {
        // The settings say where others find a host; nobody is meant to find this one.
        config.server.tcp = None;
    }
    config.server.tcp = args.tcp.or(config.server.tcp);
    config.workers.options = log::options(&args.log_level);

    let linux =
        |what: &str, error: io::Error| Failure::other("LINUX", format!("cannot {what}: {error}"));
    process::set_not_dumpable().map_err(|e| linux("hide this process's memory", e))?;
    process::raise_nofile().map_err(|e| linux("raise the limit of open files", e))?;
    let runtime = |threads: &mut tokio::runtime::Builder| {
        let runtime = threads.enable_all().build();
        runtime.map_err(|e| linux("start threads", e))
    };
    let main = runtime(&mut tokio::runtime::Builder::new_multi_thread())?;
    // Frames are short work, and what is not goes elsewhere: with two threads each small call would be
    // handed from one to the other and back.
    let data = runtime(
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("strait-data"),
    )?;
    let end = {
        let _entered = main.enter();
        Shutdown::new(args.until_stdin_ends)?
    };
    // Made once signals are watched for, and removed when this function returns.
    let temporary = args.temporary.then(directory::temporary).transpose()?;
    let directory = temporary
        .as_ref()
        .map(|temporary| temporary.path().to_owned())
        .or_else(|| args.directory.clone())
        .or_else(|| config.server.directory.clone())
        .unwrap_or_else(directory::usual_directory);
    let directory = directory::prepare(&directory)?;
    let done = main.block_on(serve_until_told(
        args,
        config,
        &directory,
        data.handle(),
        end,
    ));
    // A kernel that outlived the drain time must not keep the process.
    data.shutdown_background();
    main.shutdown_background();
    done
}

async fn serve_until_told(
    args: &ServeArgs,
    config: Config,
    directory: &Path,
    data_threads: &tokio::runtime::Handle,
    mut end: Shutdown,
) -> Result<(), Failure> {
    // Holding this socket is what makes this process the directory's host.
    let data = FrameListener::bind(&directory.join(DATA_SOCKET), 0o600).map_err(
        |error| match error.kind() {
            io::ErrorKind::AddrInUse => Failure::other(
                "HOST_RUNNING",
                format!(
                    "another host serves {} already; stop it, or give this one its own --directory",
                    directory.display()
                ),
            ),
            _ => Failure::other("LINUX", format!("no data socket: {error}")),
        },
    )?;
    // Before the plugins are compiled, too: whoever finds one of the sockets finds the other.
    let (listener, flight_path) = bind_flight(directory)?;
    let tcp = match config.server.tcp {
        Some(address) => Some(bind_tcp(address).await?),
        None => None,
    };
    let drain = config.drain();
    let starting = {
        let directory = directory.to_owned();
        tokio::task::spawn_blocking(move || hosting::start(config, &directory))
    };
    let host = tokio::select! {
        started = starting => started
            .map_err(|e| Failure::other("HOST", format!("the host stopped while starting: {e}")))??,
        // Compiling plugins can take longer than whoever started this host waits.
        what = end.told() => {
            tracing::info!("ended before it was ready: {what}");
            return Ok(());
        }
    };
    let (stop, stopped) = watch::channel(false);
    let told = |mut stopped: watch::Receiver<bool>| async move {
        // An error means that the sender is gone, which is an end, too.
        let _ = stopped.wait_for(|stop| *stop).await;
    };
    let mut data = data_threads.spawn(datasock::serve(
        Arc::clone(&host),
        data,
        told(stopped.clone()),
    ));
    let tcp_address = tcp.as_ref().map(|(_, address)| *address);
    let unix = flight::serve(Arc::clone(&host), listener, told(stopped.clone()));
    let remote = {
        let (host, told) = (Arc::clone(&host), told(stopped));
        async move {
            match tcp {
                Some((listener, _)) => flight::serve_tcp(host, listener, told).await,
                None => Ok(()),
            }
        }
    };
    let mut flight = tokio::spawn(async { tokio::try_join!(unix, remote).map(|_| ()) });
    let kernels = host.plugins().kernels().len();
    // Whoever started it may not read it.
    let _ = say_ready(args.json, directory, tcp_address, kernels);
    tracing::info!(directory = %directory.display(), host_id = host.id(), kernels, "ready");

    let broken = tokio::select! {
        what = end.told() => {
            tracing::info!(drain_ms = drain.as_millis(), "ending: {what}");
            None
        }
        outcome = &mut data => Some(("data socket", describe(outcome))),
        outcome = &mut flight => Some(("Flight socket", describe(outcome))),
    };
    host.drain();
    // While the data socket still says that this directory is ours: no successor's is removed.
    drop(flight_path);
    let _ = stop.send(true);
    if let Some((what, why)) = broken {
        data.abort();
        flight.abort();
        return Err(Failure::other("HOST", format!("the {what} broke: {why}")));
    }
    let finished = async {
        let outcomes = (describe((&mut data).await), describe((&mut flight).await));
        let workers = Arc::clone(&host);
        let _ = tokio::task::spawn_blocking(move || workers.join_workers()).await;
        outcomes
    };
    tokio::select! {
        outcomes = tokio::time::timeout(drain + CLOSING, finished) => match outcomes {
            Ok(_) => tracing::info!("ended"),
            Err(_) => tracing::warn!(drain_ms = drain.as_millis(), "ended at the end of the drain time, with work or Flight connections still there"),
        },
        what = end.told() => tracing::warn!("ended at once: {what} again"),
    }
    // Dropping what the tasks hold removes the data socket's path.
    data.abort();
    flight.abort();
    while !(data.is_finished() && flight.is_finished()) {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Ok(())
}

/// The one line on stdout: from here on clients are served.
fn say_ready(
    json: bool,
    directory: &Path,
    tcp: Option<SocketAddr>,
    kernels: usize,
) -> Result<(), Failure> {
    let version = env!("CARGO_PKG_VERSION");
    let address = format!("unix://{}", directory.display());
    let tcp = tcp.map(|address| format!("grpc+tcp://{address}"));
    if json {
        return output::json(&json!({
            "version": version,
            "protocol": strait_protocol::VERSION,
            "pid": std::process::id(),
            "address": address,
            "flight": format!("grpc+unix://{}", directory.join(FLIGHT_SOCKET).display()),
            "tcp": tcp,
            "kernels": kernels,
        }));
    }
    let over_tcp = tcp.map_or_else(String::new, |tcp| format!(" and {tcp}"));
    output::text(&format!(
        "strait {version} serves {address}{over_tcp} with {kernels} kernels"
    ))
}

fn describe<E: std::fmt::Display>(
    outcome: Result<Result<(), E>, tokio::task::JoinError>,
) -> String {
    match outcome {
        Ok(Ok(())) => "it ended by itself".to_owned(),
        Ok(Err(error)) => error.to_string(),
        Err(error) => error.to_string(),
    }
}

/// A listener for Flight over TCP, and its address.
async fn bind_tcp(address: SocketAddr) -> Result<(TcpListener, SocketAddr), Failure> {
    if !address.ip().is_loopback() {
        return Err(Failure::input(
            "BAD_SETTING",
            format!(
                "{address} can be reached from other machines, and Flight over TCP has no authentication yet; \
                 take a loopback address such as 127.0.0.1:{}, and a tunnel (ssh -L) from elsewhere",
                address.port()
            ),
        ));
    }
    let bound = TcpListener::bind(address).await.and_then(|listener| {
        let address = listener.local_addr()?;
        Ok((listener, address))
    });
    bound.map_err(|error| Failure::other("LINUX", format!("cannot listen on {address}: {error}")))
}

/// What can end a host.
struct Shutdown {
    terminate: Signal,
    interrupt: Signal,
    stdin: watch::Receiver<bool>,
    /// Told once, so that it does not count as the second signal.
    stdin_told: bool,
    /// Here if nobody reads stdin: without a sender it would look as if it had ended.
    _unread: Option<watch::Sender<bool>>,
}

impl Shutdown {
    fn new(until_stdin_ends: bool) -> Result<Self, Failure> {
        let failed = |error: io::Error| {
            Failure::other("SIGNALS", format!("cannot watch for signals: {error}"))
        };
        let (ended, stdin) = watch::channel(false);
        let mut unread = Some(ended);
        if until_stdin_ends {
            let ended = unread.take();
            let read = move || {
                let mut bytes = [0; 256];
                while io::stdin().read(&mut bytes).is_ok_and(|count| count > 0) {}
                if let Some(ended) = ended {
                    let _ = ended.send(true);
                }
            };
            // A thread of its own, not the runtime's: a read cannot be given up at the end.
            std::thread::Builder::new()
                .name("stdin".into())
                .spawn(read)
                .map_err(failed)?;
        }
        Ok(Self {
            terminate: signal(SignalKind::terminate()).map_err(failed)?,
            interrupt: signal(SignalKind::interrupt()).map_err(failed)?,
            stdin,
            stdin_told: false,
            _unread: unread,
        })
    }

    /// Waits for the next of them.
    async fn told(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
            // Also if it ended before anybody asked: while the plugins were compiled.
            Ok(_) = self.stdin.wait_for(|ended| *ended), if !self.stdin_told => {
                self.stdin_told = true;
                "stdin ended"
            }
        }
    }
}

/// A socket's path, removed on drop.
struct SocketPath(PathBuf);

impl Drop for SocketPath {
    fn drop(&mut self) {
        // If it is gone already, so much the better.
        let _ = fs::remove_file(&self.0);
    }
}

/// Called by the directory's host only: what is there is a dead one's.
fn bind_flight(directory: &Path) -> Result<(UnixListener, SocketPath), Failure> {
    let path = directory.join(FLIGHT_SOCKET);
    let failed = |error: io::Error| {
        Failure::other(
            "LINUX",
            format!("cannot listen on {}: {error}", path.display()),
        )
    };
    if fs::symlink_metadata(&path).is_ok_and(|found| found.file_type().is_socket()) {
        fs::remove_file(&path).map_err(failed)?;
    }
    let listener = UnixListener::bind(&path).map_err(failed)?;
    let guard = SocketPath(path.clone());
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
    Ok((listener, guard))
}
