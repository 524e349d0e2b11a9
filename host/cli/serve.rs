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
use tokio::net::UnixListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use super::directory::{self, FLIGHT_SOCKET};
use super::failure::Failure;
use super::log::{self, LogFormat};
use super::reload::Reload;
use super::{hosting, output, tcp};
use crate::config::{Config, Server};
use crate::{datasock, flight};

/// What the sockets get beyond the drain time to close connections.
const CLOSING: Duration = Duration::from_secs(2);

/// Mode of the sockets of a host that serves a group.
const SOCKET_OF_A_GROUP: u32 = 0o660;

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
    /// Serve Flight on this address, too; port 0 picks a free port. Other machines are served only with TLS, and clients that have
    /// a token or a certificate. With neither, a loopback address lets every user of this machine read and put as you do.
    #[arg(long, value_name = "ADDRESS:PORT")]
    tcp: Option<SocketAddr>,
    #[command(flatten)]
    access: AccessArgs,
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

/// Who is let in.
#[derive(Debug, Args)]
struct AccessArgs {
    /// The tokens by which clients are let in over TCP; `strait token` makes and revokes them. Read again when it changes.
    #[arg(long, value_name = "FILE")]
    tokens: Option<PathBuf>,
    /// Who may do what, and which groups there are, in TOML. Read again when it changes.
    #[arg(long, value_name = "FILE")]
    rights: Option<PathBuf>,
    /// The certificates to show over TCP, in PEM, the host's own first. Read again when it changes.
    #[arg(long, value_name = "FILE")]
    tls_cert: Option<PathBuf>,
    /// The private key of the host's own certificate, in PEM.
    #[arg(long, value_name = "FILE")]
    tls_key: Option<PathBuf>,
    /// Let in clients with a certificate of these authorities, in PEM; they are the principal cert:COMMON-NAME.
    #[arg(long, value_name = "FILE")]
    tls_client_ca: Option<PathBuf>,
    /// Serve other machines without TLS: tokens and tensors can be read on the way.
    #[arg(long)]
    insecure: bool,
    /// Let the members of this Linux group (a name or number) reach the sockets: the directory has mode 0750 and the sockets 0660.
    #[arg(long, value_name = "GROUP")]
    socket_group: Option<String>,
}

impl AccessArgs {
    /// What is given here takes precedence.
    fn apply(&self, settings: &mut Server) {
        let set = |setting: &mut Option<PathBuf>, given: &Option<PathBuf>| {
            if given.is_some() {
                setting.clone_from(given);
            }
        };
        set(&mut settings.tokens, &self.tokens);
        set(&mut settings.rights, &self.rights);
        set(&mut settings.tls_cert, &self.tls_cert);
        set(&mut settings.tls_key, &self.tls_key);
        set(&mut settings.tls_client_ca, &self.tls_client_ca);
        settings.insecure |= self.insecure;
        if self.socket_group.is_some() {
            settings.socket_group.clone_from(&self.socket_group);
        }
    }
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
    args.access.apply(&mut config.server);
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
    let group = config.server.socket_group.as_deref();
    let group = group.map(directory::Group::find).transpose()?;
    let directory = directory::prepare(&directory, group)?;
    let done = main.block_on(serve_until_told(
        args,
        config,
        (&directory, group),
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
    (directory, group): (&Path, Option<directory::Group>),
    data_threads: &tokio::runtime::Handle,
    mut end: Shutdown,
) -> Result<(), Failure> {
    let reload = Reload::watch(&config.server)?;
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
    if let Some(group) = group {
        group.let_in(&directory.join(DATA_SOCKET), SOCKET_OF_A_GROUP)?;
        group.let_in(&directory.join(FLIGHT_SOCKET), SOCKET_OF_A_GROUP)?;
    }
    let tcp = tcp::bind(&config.server).await?;
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
    let tcp_url = tcp.as_ref().map(tcp::Tcp::url);
    let tls = tcp.as_ref().and_then(|tcp| tcp.doors.tls.clone());
    let unix = flight::serve(Arc::clone(&host), listener, told(stopped.clone()));
    let remote = {
        let (host, told) = (Arc::clone(&host), told(stopped));
        async move {
            match tcp {
                Some(tcp) => flight::serve_tcp(host, tcp.listener, tcp.doors, told).await,
                None => Ok(()),
            }
        }
    };
    let mut flight = tokio::spawn(async { tokio::try_join!(unix, remote).map(|_| ()) });
    let kernels = host.plugins().kernels().len();
    // Whoever started it may not read it.
    let _ = say_ready(args.json, directory, tcp_url, kernels);
    tracing::info!(directory = %directory.display(), host_id = host.id(), kernels, "ready");

    let mut reload = reload.of(&host, tls);
    let broken = tokio::select! {
        // It never ends.
        () = reload.run() => None,
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
    tcp: Option<String>,
    kernels: usize,
) -> Result<(), Failure> {
    let version = env!("CARGO_PKG_VERSION");
    let address = format!("unix://{}", directory.display());
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
