//! Flight over TCP: which addresses may be served, and how clients are let in there.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::TcpListener;

use super::failure::Failure;
use crate::config::Server;
use crate::flight::{Doors, Tls, TlsFiles};

/// A listener, and what its clients pass.
pub(super) struct Tcp {
    pub(super) listener: TcpListener,
    pub(super) address: SocketAddr,
    pub(super) doors: Doors,
}

impl Tcp {
    /// As clients write it.
    pub(super) fn url(&self) -> String {
        let scheme = match self.doors.tls {
            Some(_) => "grpc+tls",
            None => "grpc+tcp",
        };
        format!("{scheme}://{}", self.address)
    }
}

/// What the settings say of TCP, listening; none if they say nothing.
pub(super) async fn bind(settings: &Server) -> Result<Option<Tcp>, Failure> {
    let tls = files(settings)?;
    let Some(address) = settings.tcp else {
        return Ok(None);
    };
    let open = settings.tokens.is_none() && settings.tls_client_ca.is_none();
    check(address, settings, tls.is_some(), open)?;
    let tls = tls.map(Tls::load).transpose();
    let tls = tls.map_err(|error| Failure::input("BAD_SETTING", error.to_string()))?;
    let bound = TcpListener::bind(address).await.and_then(|listener| {
        let address = listener.local_addr()?;
        Ok((listener, address))
    });
    let (listener, address) = bound
        .map_err(|error| Failure::other("LINUX", format!("cannot listen on {address}: {error}")))?;
    Ok(Some(Tcp {
        listener,
        address,
        doors: Doors {
            tls: tls.map(Arc::new),
            open,
        },
    }))
}

/// The files for TLS, which belong together.
fn files(settings: &Server) -> Result<Option<TlsFiles>, Failure> {
    let wrong = |what: &str| Err(Failure::input("BAD_SETTING", what));
    match (&settings.tls_cert, &settings.tls_key) {
        (Some(cert), Some(key)) => Ok(Some(TlsFiles {
            cert: cert.clone(),
            key: key.clone(),
            client_ca: settings.tls_client_ca.clone(),
            certificate_required: settings.tokens.is_none(),
        })),
        (None, None) if settings.tls_client_ca.is_some() => {
            wrong("--tls-client-ca needs TLS: give --tls-cert and --tls-key, too")
        }
        (None, None) => Ok(None),
        (Some(_), None) => wrong("--tls-cert needs its private key: give --tls-key, too"),
        (None, Some(_)) => wrong("--tls-key needs its certificate: give --tls-cert, too"),
    }
}

/// Refuses what would let anybody in, or show tokens to everybody.
fn check(address: SocketAddr, settings: &Server, tls: bool, open: bool) -> Result<(), Failure> {
    if address.ip().is_loopback() {
        return Ok(());
    }
    let wrong = |what: String| Err(Failure::input("BAD_SETTING", what));
    if open {
        return wrong(format!(
            "{address} can be reached from other machines, and nothing would say who comes: give --tokens FILE \
             (`strait token new` makes one) or --tls-client-ca FILE; or take a loopback address such as 127.0.0.1:{}",
            address.port()
        ));
    }
    if tls {
        return Ok(());
    }
    if !settings.insecure {
        return wrong(format!(
            "{address} can be reached from other machines, and without TLS everybody on the way reads tokens and tensors: \
             give --tls-cert and --tls-key; take a loopback address such as 127.0.0.1:{}; or say --insecure, where \
             something else encrypts",
            address.port()
        ));
    }
    tracing::warn!(%address, "serving other machines without TLS: everybody on the way can read tokens and tensors");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_let_anybody_in_is_refused() {
        let refused = |address: &str, change: fn(&mut Server)| {
            let mut settings = Server::default();
            change(&mut settings);
            let tls = files(&settings)
                .map_err(|failure| failure.to_string())?
                .is_some();
            let open = settings.tokens.is_none() && settings.tls_client_ca.is_none();
            let address = address.parse().expect("an address");
            check(address, &settings, tls, open).map_err(|failure| failure.to_string())
        };
        let far = "0.0.0.0:8815";
        for near in ["127.0.0.1:0", "127.7.7.7:1", "[::1]:0"] {
            assert_eq!(refused(near, |_| ()), Ok(()), "{near}");
        }
        let says = |result: Result<(), String>, word: &str| {
            let error = result.expect_err(word);
            assert!(error.contains(word), "{error}");
        };
        says(refused(far, |_| ()), "--tokens");
        says(refused("[::]:1", |_| ()), "loopback");
        says(refused(far, |s| s.insecure = true), "--tokens");
        says(refused(far, |s| s.tokens = Some("t".into())), "--insecure");
        says(
            refused(far, |s| s.tls_client_ca = Some("c".into())),
            "--tls-cert",
        );
        says(refused(far, |s| s.tls_cert = Some("c".into())), "--tls-key");
        says(refused(far, |s| s.tls_key = Some("k".into())), "--tls-cert");
        let tls = |s: &mut Server| (s.tls_cert, s.tls_key) = (Some("c".into()), Some("k".into()));
        says(
            refused(far, |s| {
                (s.tls_cert, s.tls_key) = (Some("c".into()), Some("k".into()))
            }),
            "--tokens",
        );
        let mut with_tokens = Server::default();
        tls(&mut with_tokens);
        with_tokens.tokens = Some("t".into());
        let address = far.parse().expect("an address");
        assert!(check(address, &with_tokens, true, false).is_ok());
        assert_eq!(
            refused(far, |s| (s.tokens, s.insecure) = (Some("t".into()), true)),
            Ok(())
        );
    }
}
