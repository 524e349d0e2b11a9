//! TLS for Flight over TCP: which certificates the host shows, and whose certificates let clients in.
//!
//! TLS is undone before anything else looks at a connection's bytes. The files are read again when they change; connections
//! that stand go on with what they began with.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::version::TLS13;
use tokio_rustls::rustls::{self, RootCertStore, ServerConfig};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::access::{FileError, Stamp, file, is_certificate_name};

/// What gRPC speaks, and nothing else.
const PROTOCOL: &[u8] = b"h2";
/// A certificate that ends sooner is warned of when it is read.
const ENDS_SOON: Duration = Duration::from_secs(14 * 86_400);

/// Where a host's certificates are.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// Those that it shows, its own first, in PEM.
    pub cert: PathBuf,
    /// The private key of its own, in PEM.
    pub key: PathBuf,
    /// The authorities whose certificates let clients in, in PEM.
    pub client_ca: Option<PathBuf>,
    /// Nobody is let in without such a certificate.
    pub certificate_required: bool,
}

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// What is in it does not fit.
    #[error("{path}: {what}", path = path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// Certificate and key, or the authorities, are not accepted.
    #[error("the certificates are not accepted: {0}")]
    Refused(String),
}

#[derive(Debug)]
struct Loaded {
    config: Arc<ServerConfig>,
    stamps: Vec<Option<Stamp>>,
}

/// TLS as it is offered to new connections.
#[derive(Debug)]
pub struct Tls {
    files: TlsFiles,
    // Held for a clone, and while files are read, which new connections then wait for.
    loaded: Mutex<Loaded>,
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn load(files: TlsFiles) -> Result<Self, TlsError> {
        // Before they are read: what changes meanwhile is read again.
        let stamps = files.stamps();
        let config = files.config()?;
        Ok(Self {
            files,
            loaded: Mutex::new(Loaded { config, stamps }),
        })
    }

    /// Reads the files again if one has changed, or `all` is set. Blocks. If that fails it is told in the log, and what was
    /// read before still holds.
    pub fn reload(&self, all: bool) {
        let stamps = self.files.stamps();
        if !all && self.loaded.lock().stamps == stamps {
            return;
        }
        let read = self.files.config();
        let mut loaded = self.loaded.lock();
        loaded.stamps = stamps;
        match read {
            Ok(config) => {
                loaded.config = config;
                tracing::info!(target: "audit", cert = %self.files.cert.display(), "certificates read again");
            }
            Err(error) => tracing::error!(
                target: "audit",
                "{error}; connections still get the certificates that were read before"
            ),
        }
    }

    pub(super) fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.loaded.lock().config)
    }
}

impl TlsFiles {
    fn stamps(&self) -> Vec<Option<Stamp>> {
        let paths = [Some(&self.cert), Some(&self.key), self.client_ca.as_ref()];
        let paths = paths.into_iter().flatten();
        paths.map(|path| Stamp::now(path)).collect()
    }

    fn config(&self) -> Result<Arc<ServerConfig>, TlsError> {
        let provider = Arc::new(ring::default_provider());
        let chain = certificates(&self.cert)?;
        let (text, _) = file::read(&self.key)?;
        self.warn_of_readers();
        let key = PrivateKeyDer::from_pem_slice(text.as_bytes())
            .map_err(|error| content(&self.key, &format!("no private key in PEM: {error}")))?;
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&TLS13])
            .map_err(refused)?;
        let builder = match &self.client_ca {
            None => builder.with_no_client_auth(),
            Some(path) => {
                let mut roots = RootCertStore::empty();
                for certificate in certificates(path)? {
                    roots
                        .add(certificate)
                        .map_err(|error| content(path, &error.to_string()))?;
                }
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
                let verifier = match self.certificate_required {
                    true => verifier,
                    false => verifier.allow_unauthenticated(),
                };
                let verifier = verifier.build();
                builder.with_client_cert_verifier(
                    verifier.map_err(|error| content(path, &error.to_string()))?,
                )
            }
        };
        self.warn_of_the_end(&chain);
        let mut config = builder.with_single_cert(chain, key).map_err(refused)?;
        config.alpn_protocols = vec![PROTOCOL.to_vec()];
        Ok(Arc::new(config))
    }

    fn warn_of_readers(&self) {
        let readable = |found: std::fs::Metadata| found.permissions().mode() & 0o004 != 0;
        if std::fs::metadata(&self.key).is_ok_and(readable) {
            let key = self.key.display();
            tracing::warn!(%key, "every user of this machine can read the private key: chmod o-r it");
        }
    }

    fn warn_of_the_end(&self, chain: &[CertificateDer<'static>]) {
        let own = chain.first().and_then(|der| Certificate::end(der));
        if let Some(end) = own
            && end <= SystemTime::now() + ENDS_SOON
        {
            tracing::warn!(
                cert = %self.cert.display(),
                ends = crate::access::time_text(end),
                "the certificate ends soon; put another in its place, which is seen by itself"
            );
        }
    }
}

fn content(path: &std::path::Path, what: &str) -> TlsError {
    TlsError::Content {
        path: path.to_owned(),
        what: what.to_owned(),
    }
}

#[expect(clippy::needless_pass_by_value, reason = "it is what map_err gives")]
fn refused(error: rustls::Error) -> TlsError {
    TlsError::Refused(error.to_string())
}

fn certificates(path: &std::path::Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let (text, _) = file::read(path)?;
    let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
    match read {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(content(path, "no certificate in PEM")),
        Err(error) => Err(content(path, &format!("no certificates in PEM: {error}"))),
    }
}

/// A client's certificate, which has been verified.
#[derive(Clone, Debug)]
pub(super) struct Certificate {
    /// The common name of its subject.
    pub(super) name: String,
    /// It is good until then.
    pub(super) expires: SystemTime,
}

impl Certificate {
    /// What is said in the first of a client's certificates.
    ///
    /// # Errors
    /// What is wrong with its common name.
    pub(super) fn of(der: &CertificateDer<'_>) -> Result<Self, String> {
        let (_, read) = X509Certificate::from_der(der).map_err(|error| error.to_string())?;
        let mut names = read.subject().iter_common_name();
        let (Some(name), None) = (names.next(), names.next()) else {
            return Err("its subject must have one common name (CN)".to_owned());
        };
        let name = name.as_str().map_err(|error| error.to_string())?;
        if !is_certificate_name(name) {
            return Err(format!(
                "its common name `{}` must have 1 to 64 bytes without `/`, `,` and control characters",
                crate::text::name(name)
            ));
        }
        Ok(Self {
            name: name.to_owned(),
            expires: end(&read),
        })
    }

    fn end(der: &CertificateDer<'_>) -> Option<SystemTime> {
        let (_, read) = X509Certificate::from_der(der).ok()?;
        Some(end(&read))
    }
}

fn end(certificate: &X509Certificate<'_>) -> SystemTime {
    let seconds = certificate.validity().not_after.timestamp();
    UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}
