//! Flight over TCP: tokens, certificates, rights, and clients that would get in otherwise.

mod certificates;
mod hostile;
mod proxy;
mod shares;
mod tokens;

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use arrow_array::{Float64Array, RecordBatch};
use arrow_flight::encode::FlightDataEncoderBuilder;
use arrow_flight::flight_service_client::FlightServiceClient;
use arrow_flight::utils::flight_data_to_batches;
use arrow_flight::{Action, Criteria, FlightData, FlightDescriptor, FlightInfo, Ticket};
use arrow_schema::{DataType, Field, Schema};
use futures::{TryStreamExt, stream};
use hyper_util::rt::TokioIo;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio_rustls::rustls::version::TLS13;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::codegen::{BoxFuture, Service, http};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

use crate::served::{PATIENCE, Served};

type Client = FlightServiceClient<Channel>;

/// Who signs certificates.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

/// A certificate and its key, in PEM.
#[derive(Clone)]
struct Pair {
    cert: String,
    key: String,
}

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self {
            issuer: Issuer::new(params, key),
            pem,
        }
    }

    /// For `name`, which is also the host's, until `life` from now.
    fn sign(&self, name: &str, life: Duration) -> Pair {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let end = Duration::from_secs((now + life).as_secs());
        params.not_after = rcgen::date_time_ymd(1970, 1, 1) + end;
        let key = KeyPair::generate().unwrap();
        Pair {
            cert: params.signed_by(&key, &self.issuer).unwrap().pem(),
            key: key.serialize_pem(),
        }
    }
}

const DAY: Duration = Duration::from_secs(86_400);

/// How somebody connects.
#[derive(Clone)]
struct Dial {
    address: SocketAddr,
    name: &'static str,
    config: Option<Arc<ClientConfig>>,
}

impl Dial {
    /// With TLS, trusting `authority` and showing `own`.
    fn tls(address: SocketAddr, authority: &str, own: Option<&Pair>) -> Self {
        let mut roots = RootCertStore::empty();
        for found in CertificateDer::pem_slice_iter(authority.as_bytes()) {
            roots.add(found.unwrap()).unwrap();
        }
        let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .unwrap()
            .with_root_certificates(roots);
        let mut config = match own {
            None => builder.with_no_client_auth(),
            Some(pair) => {
                let chain = CertificateDer::pem_slice_iter(pair.cert.as_bytes());
                let key = PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).unwrap();
                let chain = chain.collect::<Result<_, _>>().unwrap();
                builder.with_client_auth_cert(chain, key).unwrap()
            }
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        Self {
            address,
            name: "localhost",
            config: Some(Arc::new(config)),
        }
    }

    fn plain(address: SocketAddr) -> Self {
        Self {
            address,
            name: "localhost",
            config: None,
        }
    }

    async fn handshake(&self) -> io::Result<TlsStream<TcpStream>> {
        let stream = TcpStream::connect(self.address).await?;
        stream.set_nodelay(true)?;
        let config = Arc::clone(self.config.as_ref().unwrap());
        let name = ServerName::try_from(self.name).unwrap();
        TlsConnector::from(config).connect(name, stream).await
    }

    async fn client(&self) -> Result<Client, tonic::transport::Error> {
        let endpoint = Endpoint::from_static("http://localhost")
            .initial_stream_window_size(16 << 20)
            .initial_connection_window_size(16 << 20);
        let channel = endpoint.connect_with_connector(self.clone()).await?;
        Ok(FlightServiceClient::new(channel))
    }
}

/// A connection with or without TLS.
type Either = tokio_util::either::Either<TcpStream, TlsStream<TcpStream>>;

impl Service<http::Uri> for Dial {
    type Response = TokioIo<Either>;
    type Error = io::Error;
    type Future = BoxFuture<Self::Response, io::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: http::Uri) -> Self::Future {
        let dial = self.clone();
        Box::pin(async move {
            let stream = match dial.config {
                Some(_) => Either::Right(dial.handshake().await?),
                None => {
                    let stream = TcpStream::connect(dial.address).await?;
                    stream.set_nodelay(true)?;
                    Either::Left(stream)
                }
            };
            Ok(TokioIo::new(stream))
        })
    }
}

/// A host with TLS, and files beside it that say who is let in.
struct Rig {
    host: Served,
    authority: Authority,
    address: SocketAddr,
}

/// The command line without a host.
fn strait(words: &[&str]) -> (Option<i32>, String, String) {
    let done = Command::new(env!("CARGO_BIN_EXE_strait"))
        .args(words)
        .env_remove("STRAIT__SERVER__TOKENS")
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (done.status.code(), text(done.stdout), text(done.stderr))
}

fn path(directory: &TempDir, name: &str) -> String {
    directory.path().join(name).to_str().unwrap().to_owned()
}

/// A token as an operator makes one.
fn token(directory: &TempDir, words: &[&str]) -> String {
    let file = path(directory, "tokens.toml");
    let words = [&["token", "new", "--tokens", &file], words].concat();
    let (code, out, error) = strait(&words);
    assert_eq!(code, Some(0), "{error}");
    out.strip_suffix('\n').unwrap().to_owned()
}

/// The address in the line by which a host says that it serves.
fn address(host: &Served) -> SocketAddr {
    let (_, rest) = host.ready.split_once("grpc+t").unwrap();
    let (_, rest) = rest.split_once("://").unwrap();
    rest.split(' ').next().unwrap().parse().unwrap()
}

impl Rig {
    /// With these arguments more; `files` puts what they name into the directory.
    fn start(files: impl FnOnce(&TempDir, &Authority) -> Vec<String>) -> Self {
        let directory = TempDir::new().unwrap();
        let authority = Authority::new("strait tests");
        let own = authority.sign("localhost", 365 * DAY);
        let write = |name: &str, text: &str| {
            fs::write(directory.path().join(name), text).unwrap();
            path(&directory, name)
        };
        let (cert, key) = (write("cert.pem", &own.cert), write("key.pem", &own.key));
        let more = files(&directory, &authority);
        let mut words = vec![
            "--tcp",
            "127.0.0.1:0",
            "--tls-cert",
            &cert,
            "--tls-key",
            &key,
        ];
        words.extend(more.iter().map(String::as_str));
        let host = Served::start_in(directory, &words);
        Self {
            address: address(&host),
            host,
            authority,
        }
    }

    fn dial(&self) -> Dial {
        Dial::tls(self.address, &self.authority.pem, None)
    }

    async fn client(&self) -> Client {
        self.dial().client().await.unwrap()
    }

    fn file(&self, name: &str) -> PathBuf {
        self.host.path().join(name)
    }

    /// Waits until the host's log has a line with all those words.
    fn logged(&self, words: &[&str]) {
        let start = Instant::now();
        let has = |line: &str| words.iter().all(|word| line.contains(word));
        while !self.host.log().lines().any(has) {
            assert!(start.elapsed() < PATIENCE, "never logged: {words:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn blocking<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    runtime.unwrap().block_on(future)
}

/// The same with that token.
fn by<T>(token: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    let value = format!("Bearer {token}").parse().unwrap();
    request.metadata_mut().insert("authorization", value);
    request
}

#[track_caller]
fn reason(status: &Status) -> (Code, String) {
    let reason = status.metadata().get("x-strait-reason");
    let reason = reason.unwrap_or_else(|| panic!("no reason: {status:?}"));
    (status.code(), reason.to_str().unwrap().to_owned())
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, Status>, code: Code, why: &str) -> String {
    let status = result.unwrap_err();
    assert_eq!(
        reason(&status),
        (code, why.to_owned()),
        "{}",
        status.message()
    );
    status.message().to_owned()
}

fn name(name: &str) -> FlightDescriptor {
    FlightDescriptor::new_path(vec![name.to_owned()])
}

fn ramp(count: u32) -> RecordBatch {
    let values: Float64Array = (0..count).map(f64::from).collect();
    let schema = Schema::new(vec![Field::new("x", DataType::Float64, false)]);
    RecordBatch::try_new(Arc::new(schema), vec![Arc::new(values)]).unwrap()
}

async fn put(
    client: &mut Client,
    token: &str,
    flight: &str,
    batch: &RecordBatch,
) -> Result<(), Status> {
    let messages: Vec<FlightData> = FlightDataEncoderBuilder::new()
        .with_flight_descriptor(Some(name(flight)))
        .build(stream::iter([Ok(batch.clone())]))
        .try_collect()
        .await
        .unwrap();
    let results = client.do_put(by(token, stream::iter(messages))).await?;
    let results: Vec<_> = results.into_inner().try_collect().await?;
    assert!(results.iter().all(|result| result.app_metadata.is_empty()));
    Ok(())
}

async fn get(client: &mut Client, token: &str, ticket: Ticket) -> Result<Vec<f64>, Status> {
    let data = client.do_get(by(token, ticket)).await?.into_inner();
    let data: Vec<_> = data.try_collect().await?;
    let batches = flight_data_to_batches(&data).unwrap();
    let columns = batches.iter().map(|batch| {
        let column = batch.column(0).as_any().downcast_ref::<Float64Array>();
        column.unwrap().values().to_vec()
    });
    Ok(columns.flatten().collect())
}

async fn info(
    client: &mut Client,
    token: &str,
    of: FlightDescriptor,
) -> Result<FlightInfo, Status> {
    Ok(client.get_flight_info(by(token, of)).await?.into_inner())
}

async fn listed(client: &mut Client, token: &str) -> Result<Vec<String>, Status> {
    let flights = client.list_flights(by(token, Criteria::default())).await?;
    let flights: Vec<FlightInfo> = flights.into_inner().try_collect().await?;
    let names = flights.into_iter().map(|info| {
        let [name] = <[String; 1]>::try_from(info.flight_descriptor.unwrap().path).unwrap();
        name
    });
    Ok(names.collect())
}

async fn act(
    client: &mut Client,
    token: &str,
    kind: &str,
    body: impl Into<bytes::Bytes>,
) -> Result<Vec<bytes::Bytes>, Status> {
    let action = Action::new(kind, body.into());
    let results = client.do_action(by(token, action)).await?.into_inner();
    let results: Vec<_> = results.try_collect().await?;
    Ok(results.into_iter().map(|result| result.body).collect())
}
