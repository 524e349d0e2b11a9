//! One greeted session over a connection: what every request of it carries, and how it is asked.
//! The verbs are in the files of their nouns.

use std::future::Future;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use strait_memory::{FrameSocket, HugeBirths};
use strait_ring::Spin;

use crate::address::DATA_SOCKET;
use crate::connection::{Beside, Connection, Pending, Waiter};
use crate::error::Error;
use crate::lease::Lease;
use crate::stats::Stats;
use crate::wire::{self, Mapping, Op, Welcome};

/// How a client behaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Whether leases are renewed in the background, at half their lifetime. Without it a lease
    /// ends when it expires, and [`Lease::check`] says so. On by default.
    pub renew: bool,
    /// Lifetime of leases; without it the host's default, and never more than its maximum.
    pub lease: Option<Duration>,
    /// Name and version by which the host's log knows this client.
    pub name: String,
    /// For how long a thread that waits for a prepared call's reply spins before it sleeps, at most 50 ms; zero, the default: it
    /// sleeps at once. At most one thread fewer than the process has CPUs spins at a time. Useful when a
    /// CPU is otherwise idle and the host spins as well (`server.spin_us`).
    pub spin: Duration,
}

impl Default for Options {
    fn default() -> Self {
        let name = concat!("strait-rust/", env!("CARGO_PKG_VERSION")).into();
        Self {
            renew: true,
            lease: None,
            name,
            spin: Duration::ZERO,
        }
    }
}

/// Connects to the host whose runtime directory is `directory`; the greeting is still to come.
pub(crate) fn connect(directory: &Path, options: &Options) -> Result<Arc<Connection>, Error> {
    let path = directory.join(DATA_SOCKET);
    match FrameSocket::connect(&path) {
        Ok(socket) => Connection::open(socket, options.renew),
        Err(source) => Err(Error::NoHost { path, source }),
    }
}

/// A greeted session. Clones share it, each with its own request id and kind of waiter.
#[derive(Clone, Debug)]
pub(crate) struct Session {
    greeted: Arc<Greeted>,
    request_id: Option<String>,
    waiter: Waiter,
}

#[derive(Debug)]
struct Greeted {
    connection: Arc<Connection>,
    welcome: Welcome,
    lease_ms: Option<u64>,
    spin: Spin,
    copied_bytes: AtomicU64,
    births: HugeBirths,
}

impl Session {
    /// Greets the host over a fresh connection.
    pub(crate) async fn greet(
        connection: Arc<Connection>,
        options: &Options,
        waiter: Waiter,
    ) -> Result<Self, Error> {
        let hello = wire::Hello {
            protocol: u32::from(wire::VERSION),
            client: options.name.clone(),
            request_id: None,
        };
        let reply = connection
            .request(Op::Hello, &hello, Beside::default(), waiter)?
            .await?;
        let (welcome, _) = reply.read::<Welcome>()?;
        let greeted = Greeted {
            connection,
            welcome,
            lease_ms: options.lease.map(milliseconds),
            spin: Spin::new(options.spin),
            copied_bytes: AtomicU64::new(0),
            births: HugeBirths::new(),
        };
        Ok(Self {
            greeted: Arc::new(greeted),
            request_id: None,
            waiter,
        })
    }

    /// The same session, whose replies are waited for by a thread or a task.
    pub(crate) fn waited_for_by(&self, waiter: Waiter) -> Self {
        Self {
            waiter,
            ..self.clone()
        }
    }

    /// The same session, whose requests carry this id.
    pub(crate) fn with_request_id(&self, id: &str) -> Result<Self, Error> {
        check_request_id(id)?;
        Ok(Self {
            request_id: Some(id.to_owned()),
            ..self.clone()
        })
    }

    pub(crate) fn welcome(&self) -> &Welcome {
        &self.greeted.welcome
    }

    pub(crate) fn connection(&self) -> &Arc<Connection> {
        &self.greeted.connection
    }

    pub(crate) fn request_id(&self) -> Option<String> {
        self.request_id.clone()
    }

    pub(crate) fn lease_ms(&self) -> Option<u64> {
        self.greeted.lease_ms
    }

    pub(crate) fn spin(&self) -> Spin {
        self.greeted.spin
    }

    pub(crate) fn copied_bytes(&self) -> u64 {
        self.greeted.copied_bytes.load(Relaxed)
    }

    pub(crate) fn count_copied(&self, bytes: u64) {
        self.greeted.copied_bytes.fetch_add(bytes, Relaxed);
    }

    pub(crate) fn births(&self) -> &HugeBirths {
        &self.greeted.births
    }

    /// Waits on the calling thread for one of this session's futures.
    pub(crate) fn wait<F: Future>(&self, future: F) -> F::Output {
        self.connection().wait(future)
    }

    pub(crate) fn request<B: Serialize>(
        &self,
        op: Op,
        body: &B,
        beside: Beside<'_>,
    ) -> Result<Pending, Error> {
        self.connection().request(op, body, beside, self.waiter)
    }

    /// A request without descriptors and leases in either direction.
    pub(crate) async fn ask<B: Serialize, T: DeserializeOwned>(
        &self,
        op: Op,
        body: &B,
    ) -> Result<T, Error> {
        let pending = self.request(op, body, Beside::default())?;
        let (answer, _) = pending.await?.read()?;
        Ok(answer)
    }

    /// A request that is answered by a mapping and a lease.
    pub(crate) async fn granted<B: Serialize>(
        &self,
        op: Op,
        body: &B,
        fds: Vec<OwnedFd>,
    ) -> Result<Granted, Error> {
        let beside = Beside { payload: &[], fds };
        let pending = self.request(op, body, beside)?;
        let (mapped, fds) = pending.await?.read::<wire::Mapped>()?;
        let wire::Mapped {
            mapping,
            lease,
            expires_ms,
            ..
        } = mapped;
        match (lease, expires_ms) {
            (Some(lease), Some(life)) => Ok(Granted {
                mapping,
                lease: self.lease(lease, life),
                fds,
            }),
            _ => Err(Error::Protocol(format!(
                "{op:?} was answered without a lease"
            ))),
        }
    }

    /// Takes over a lease that a reply granted.
    pub(crate) fn lease(&self, id: u64, expires_ms: u64) -> Lease {
        Lease::new(id, Duration::from_millis(expires_ms), self.connection())
    }

    pub(crate) async fn renew(
        &self,
        leases: &[&Lease],
        life: Option<Duration>,
    ) -> Result<Duration, Error> {
        let body = wire::Leases {
            leases: leases.iter().map(|lease| lease.id()).collect(),
            lease_ms: life.map(milliseconds),
            request_id: self.request_id(),
        };
        let renewed: wire::Renewed = self.ask(Op::Renew, &body).await?;
        let life = Duration::from_millis(renewed.expires_ms);
        self.connection().renewed(&body.leases, life);
        Ok(life)
    }

    pub(crate) async fn stats(&self) -> Result<Stats, Error> {
        let body = wire::Empty {
            request_id: self.request_id(),
        };
        let all: serde_json::Value = self.ask(Op::Stats, &body).await?;
        Stats::new(all, self.copied_bytes(), self.births().huge_bytes())
    }

    pub(crate) async fn ping(&self) -> Result<(), Error> {
        let body = wire::Empty {
            request_id: self.request_id(),
        };
        self.ask::<_, wire::Done>(Op::Ping, &body).await.map(drop)
    }
}

/// A right to a segment, and what came with it.
pub(crate) struct Granted {
    pub(crate) mapping: Mapping,
    pub(crate) lease: Lease,
    pub(crate) fds: Vec<OwnedFd>,
}

impl Granted {
    /// The one descriptor that a segment to be mapped comes with.
    pub(crate) fn single_fd(self) -> Result<(Mapping, Lease, OwnedFd), Error> {
        let Self {
            mapping,
            lease,
            mut fds,
        } = self;
        match (fds.pop(), fds.len()) {
            (Some(fd), 0) => Ok((mapping, lease, fd)),
            (None, _) => Err(Error::Protocol(
                "a mapping came without its descriptor".into(),
            )),
            (Some(_), more) => Err(Error::Protocol(format!(
                "a mapping came with {} descriptors",
                more + 1
            ))),
        }
    }
}

/// As the protocol counts time; a part of a millisecond counts as a whole one.
pub(crate) fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos().div_ceil(1_000_000))
        .unwrap_or(u64::MAX)
        .max(1)
}

pub(crate) fn check_request_id(id: &str) -> Result<(), Error> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._:-".contains(&byte);
    if (1..=64).contains(&id.len()) && id.bytes().all(allowed) {
        return Ok(());
    }
    Err(Error::RequestId(id.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_ids_are_checked_here_already() {
        let longest = "x".repeat(64);
        for good in ["a", "job-7.2:retry_1", &longest] {
            assert!(check_request_id(good).is_ok(), "{good}");
        }
        let too_long = "x".repeat(65);
        for bad in ["", "a b", "ü", "a\n", &too_long] {
            assert!(
                matches!(check_request_id(bad), Err(Error::RequestId(_))),
                "{bad}"
            );
        }
    }

    #[test]
    fn times_are_never_rounded_to_nothing() {
        assert_eq!(milliseconds(Duration::ZERO), 1);
        assert_eq!(milliseconds(Duration::from_micros(1500)), 2);
        assert_eq!(milliseconds(Duration::MAX), u64::MAX);
    }
}
