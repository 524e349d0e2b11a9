//! Connections over TCP: TLS is undone here, and each call is asked who makes it.
//!
//! ```text
//! TCP ── accept ──▶ handshakes, side by side, none for long ──▶ Remote: a certificate, if there is one
//!                                                                  └── each call: token, certificate ──▶ Caller
//! ```
//! A connection is a stranger's until a call on it has shown who makes it; the host has few of those, and none for long.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use tokio::io::BufReader;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::either::Either;
use tonic::codegen::http::HeaderMap;
use tonic::codegen::http::header::AUTHORIZATION;

use super::guesses::Guesses;
use super::tls::{Certificate, Tls};
use crate::access::{Refusal, Rights, time_text};
use crate::error::{Code, Reason, Status};
use crate::session::{Caller, Host};

/// Handshakes at a time: beyond that the oldest one is given up.
const HANDSHAKES_MAX: usize = 128;
/// What one may take.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// What is read of a connection at a time: rustls itself asks for 4 KiB.
const READ_BYTES: usize = 64 << 10;
/// Handshakes that failed are told of once in this time.
const TOLD_EACH: Duration = Duration::from_secs(1);

/// A connection without TLS, or with it.
pub(super) type RemoteStream = Either<TcpStream, TlsStream<BufReader<TcpStream>>>;

/// How clients are let in over TCP.
#[derive(Debug)]
pub struct Doors {
    /// TLS, if there is any.
    pub tls: Option<Arc<Tls>>,
    /// With neither tokens nor certificates: whoever connects reads and puts as the host's own user.
    pub open: bool,
}

/// Whoever is at the other end of a TCP connection, as far as the connection shows it.
#[derive(Debug)]
pub(super) struct Remote {
    address: IpAddr,
    certificate: Option<Certificate>,
    is_open: bool,
    guesses: Arc<Guesses>,
}

/// A call that was not let in.
pub(super) struct NotLetIn {
    pub(super) status: Status,
    /// Its answer waits for so long.
    pub(super) wait: Duration,
}

impl Remote {
    /// Whether no call is asked who makes it.
    pub(super) fn is_open(&self) -> bool {
        self.is_open
    }

    /// Answers wait on behalf of these.
    pub(super) fn guesses(&self) -> &Arc<Guesses> {
        &self.guesses
    }

    /// Who makes the call with those headers. A token counts before a certificate.
    pub(super) fn caller(&self, host: &Arc<Host>, headers: &HeaderMap) -> Result<Caller, NotLetIn> {
        if self.is_open {
            // It sees which kernels there are; that it runs none is `Call::known_only`'s.
            let rights = Rights {
                share: false,
                ..Rights::of_a_user()
            };
            let principal = host.own_caller().principal().clone();
            return Ok(host.caller_with(principal, rights));
        }
        let refused = |status: Status| {
            let why = status.reason.name();
            let wait = self.guesses.count(self.address, why, Instant::now());
            NotLetIn { status, wait }
        };
        if headers.contains_key(AUTHORIZATION) {
            let token = token_of(headers).ok_or_else(|| refused(Refusal::Missing.into()))?;
            return host.caller_by_token(&token).map_err(refused);
        }
        match &self.certificate {
            None => Err(refused(Refusal::Missing.into())),
            Some(certificate) if certificate.expires <= SystemTime::now() => {
                Err(refused(Status::new(
                    Code::Unauthenticated,
                    Reason::CertificateExpired,
                    format!(
                        "the client certificate of {} expired at {}; connect with another",
                        certificate.name,
                        time_text(certificate.expires)
                    ),
                )))
            }
            Some(certificate) => Ok(host.caller_by_certificate(&certificate.name)),
        }
    }
}

/// The token in `authorization`: `Bearer TOKEN`, or `Basic` with the token as the password.
pub(super) fn token_of(headers: &HeaderMap) -> Option<String> {
    let text = headers.get(AUTHORIZATION)?.to_str().ok()?;
    let (scheme, value) = text.split_once(' ')?;
    let value = value.trim();
    if scheme.eq_ignore_ascii_case("bearer") {
        return Some(value.to_owned());
    }
    if scheme.eq_ignore_ascii_case("basic") {
        let decoded = String::from_utf8(STANDARD.decode(value).ok()?).ok()?;
        return Some(decoded.split_once(':')?.1.to_owned());
    }
    None
}

type Shaken = Result<(TlsStream<BufReader<TcpStream>>, Remote), String>;

/// Accepts on TCP, and shakes hands.
#[derive(Debug)]
pub(super) struct RemoteListener {
    tcp: TcpListener,
    doors: Doors,
    guesses: Arc<Guesses>,
    handshakes: JoinSet<Shaken>,
    /// The oldest first.
    order: VecDeque<AbortHandle>,
    untold: u64,
    told: Option<Instant>,
}

impl RemoteListener {
    pub(super) fn new(tcp: TcpListener, doors: Doors) -> Self {
        Self {
            tcp,
            doors,
            guesses: Arc::default(),
            handshakes: JoinSet::new(),
            order: VecDeque::new(),
            untold: 0,
            told: None,
        }
    }

    fn remote(&self, address: SocketAddr) -> Remote {
        Remote {
            address: address.ip(),
            certificate: None,
            is_open: self.doors.open,
            guesses: Arc::clone(&self.guesses),
        }
    }

    /// The next connection that has shaken hands.
    pub(super) async fn next(&mut self) -> io::Result<(RemoteStream, Remote)> {
        loop {
            tokio::select! {
                accepted = self.tcp.accept() => {
                    let (stream, address) = accepted?;
                    // Best effort: without it the end of a message may wait for an acknowledgement.
                    let _ = stream.set_nodelay(true);
                    let remote = self.remote(address);
                    match &self.doors.tls {
                        None => return Ok((Either::Left(stream), remote)),
                        Some(tls) => {
                            let acceptor = TlsAcceptor::from(tls.config());
                            self.begin(shake(acceptor, stream, remote));
                        }
                    }
                }
                Some(shaken) = self.handshakes.join_next(), if !self.handshakes.is_empty() => {
                    match shaken {
                        Ok(Ok((stream, remote))) => return Ok((Either::Right(stream), remote)),
                        Ok(Err(why)) => self.tell(&why),
                        // Given up for a younger one.
                        Err(_) => self.tell("too many at a time"),
                    }
                }
            }
        }
    }

    fn begin(&mut self, handshake: impl Future<Output = Shaken> + Send + 'static) {
        self.order.retain(|handshake| !handshake.is_finished());
        if self.order.len() >= HANDSHAKES_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            oldest.abort();
        }
        self.order.push_back(self.handshakes.spawn(handshake));
    }

    fn tell(&mut self, why: &str) {
        self.untold += 1;
        if self.told.is_none_or(|told| told.elapsed() > TOLD_EACH) {
            tracing::warn!(failed = self.untold, why, "TLS handshakes failed");
            (self.untold, self.told) = (0, Some(Instant::now()));
        }
    }
}

async fn shake(acceptor: TlsAcceptor, stream: TcpStream, remote: Remote) -> Shaken {
    let address = remote.address;
    let stream = BufReader::with_capacity(READ_BYTES, stream);
    let shaken = tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await;
    let stream = match shaken {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return Err(format!("{address}: {error}")),
        Err(_) => return Err(format!("{address}: it took longer than {HANDSHAKE:?}")),
    };
    let (_, session) = stream.get_ref();
    let shown = session.peer_certificates().and_then(<[_]>::first);
    let certificate = shown
        .map(Certificate::of)
        .transpose()
        .map_err(|what| format!("{address}: a client certificate cannot be used: {what}"))?;
    let remote = Remote {
        certificate,
        ..remote
    };
    Ok((stream, remote))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_found_in_headers() {
        let token = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(AUTHORIZATION, value.parse().expect("a value"));
            token_of(&headers)
        };
        assert_eq!(token("Bearer strait_x").as_deref(), Some("strait_x"));
        assert_eq!(token("bearer  strait_x ").as_deref(), Some("strait_x"));
        let basic = format!("Basic {}", STANDARD.encode("alice:strait_x"));
        assert_eq!(token(&basic).as_deref(), Some("strait_x"));
        for none in [
            "Bearer",
            "strait_x",
            "Basic strait_x",
            "Digest x",
            "Basic YQ==",
        ] {
            assert_eq!(token(none), None, "{none}");
        }
        assert_eq!(token_of(&HeaderMap::new()), None);
    }
}
