//! The files that say who is let in are read again when they change, and on SIGHUP.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::failure::Failure;
use crate::config::Server;
use crate::flight::Tls;
use crate::session::Host;

/// How often they are looked at: a few `stat`s.
const LOOK_EACH: Duration = Duration::from_secs(1);

/// Whether there are such files, and the signal.
pub(super) struct Reload {
    /// None: there is nothing to read again, and SIGHUP ends the host as it ends other programs.
    hangup: Option<Signal>,
}

impl Reload {
    /// From now on SIGHUP does not end the host, if it has such files.
    pub(super) fn watch(settings: &Server) -> Result<Self, Failure> {
        let files = [
            &settings.tokens,
            &settings.rights,
            &settings.tls_cert,
            &settings.tls_client_ca,
        ];
        let hangup = files
            .iter()
            .any(|file| file.is_some())
            .then(|| signal(SignalKind::hangup()))
            .transpose();
        let hangup = hangup.map_err(|error| {
            Failure::other("SIGNALS", format!("cannot watch for SIGHUP: {error}"))
        })?;
        Ok(Self { hangup })
    }

    /// Of that host.
    pub(super) fn of(self, host: &Arc<Host>, tls: Option<Arc<Tls>>) -> Reloading {
        Reloading {
            hangup: self.hangup,
            host: Arc::clone(host),
            tls,
        }
    }
}

/// A host whose files are watched.
pub(super) struct Reloading {
    hangup: Option<Signal>,
    host: Arc<Host>,
    tls: Option<Arc<Tls>>,
}

impl Reloading {
    /// Does not end.
    pub(super) async fn run(&mut self) {
        let Some(hangup) = &mut self.hangup else {
            return std::future::pending().await;
        };
        let mut ticks = tokio::time::interval(LOOK_EACH);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let all = tokio::select! {
                _ = ticks.tick() => false,
                _ = hangup.recv() => {
                    tracing::info!("SIGHUP: reading again who is let in");
                    true
                }
            };
            let (host, tls) = (Arc::clone(&self.host), self.tls.clone());
            let read = tokio::task::spawn_blocking(move || {
                host.access().reload(all, SystemTime::now());
                if let Some(tls) = tls {
                    tls.reload(all);
                }
            });
            if let Err(error) = read.await {
                tracing::error!(%error, "the files that say who is let in could not be read again");
            }
        }
    }
}
