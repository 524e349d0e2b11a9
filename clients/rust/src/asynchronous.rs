//! The client as futures. They run on any executor: the connection's own thread wakes them.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use strait_memory::{FrameSocket, HugeBirths};
use strait_tensor::{TensorPlace, TensorSpec};

use crate::address::{self, DATA_SOCKET};
use crate::call::{Call, CallResult, check_request_id, milliseconds};
use crate::client::Options;
use crate::connection::{Connection, Face, Pending, Reply};
use crate::element::{self, Element};
use crate::error::Error;
use crate::lease::Lease;
use crate::segment::{AdoptedSegment, MappedSegment, OpenSegment};
use crate::stats::Stats;
use crate::wire::{self, Flight, Kernel, Mapping, NewTensor, Op, Welcome};

/// A connection to a host whose operations are futures. Clones share the connection.
///
/// Every future can be dropped at any time: what the host still grants is released, and a call
/// that was sent is cancelled. Bytes are copied (by [`AsyncClient::put`] alone) on the task that
/// awaits, about 100 ms for a gigabyte.
#[derive(Clone, Debug)]
pub struct AsyncClient {
    session: Arc<Session>,
    request_id: Option<String>,
    /// Who waits for its futures; tasks, except inside of a [`Client`](crate::Client).
    face: Face,
}

#[derive(Debug)]
struct Session {
    connection: Arc<Connection>,
    welcome: Welcome,
    lease_ms: Option<u64>,
    copied_bytes: AtomicU64,
    births: HugeBirths,
}

impl AsyncClient {
    /// Connects to the host at `address` (`unix:///DIRECTORY`), or without one to the host that
    /// [`address::directory`] finds.
    ///
    /// # Errors
    /// [`Error::Address`] or [`Error::NoHost`] if there is none, [`Error::Remote`] if it speaks
    /// another protocol version.
    pub async fn connect(address: Option<&str>) -> Result<Self, Error> {
        Self::connect_with(&address::directory(address)?, &Options::default()).await
    }

    /// Connects to the host whose runtime directory is `directory`.
    ///
    /// # Errors
    /// As [`AsyncClient::connect`].
    pub async fn connect_with(directory: &Path, options: &Options) -> Result<Self, Error> {
        let path = directory.join(DATA_SOCKET);
        match FrameSocket::connect(&path) {
            Ok(socket) => Self::over(socket, options).await,
            Err(source) => Err(Error::NoHost { path, source }),
        }
    }

    /// Begins a session over a connected socket, such as one that a service manager handed over.
    ///
    /// # Errors
    /// As [`AsyncClient::connect`].
    pub async fn over(socket: FrameSocket, options: &Options) -> Result<Self, Error> {
        let connection = Connection::open(socket, options.renew)?;
        let hello = wire::Hello {
            protocol: 1,
            client: options.name.clone(),
            request_id: None,
        };
        let reply = connection
            .request(Op::Hello, &hello, Vec::new(), Face::Task)?
            .await?;
        let (welcome, _) = reply.read::<Welcome>()?;
        let lease_ms = options.lease.map(milliseconds);
        let session = Session {
            connection,
            welcome,
            lease_ms,
            copied_bytes: AtomicU64::new(0),
            births: HugeBirths::new(),
        };
        Ok(Self {
            session: Arc::new(session),
            request_id: None,
            face: Face::Task,
        })
    }

    /// The same connection, whose every request from here carries this id into the host's log
    /// lines and errors.
    ///
    /// # Errors
    /// [`Error::RequestId`] unless it is 1 to 64 characters from `A-Z a-z 0-9 . _ : -`.
    pub fn with_request_id(&self, id: &str) -> Result<Self, Error> {
        check_request_id(id)?;
        Ok(Self {
            session: Arc::clone(&self.session),
            request_id: Some(id.to_owned()),
            face: self.face,
        })
    }

    /// What the host said when it was connected to.
    #[must_use]
    pub fn welcome(&self) -> &Welcome {
        &self.session.welcome
    }

    /// Time until the host ends, once it announced that.
    #[must_use]
    pub fn draining(&self) -> Option<Duration> {
        self.connection().draining()
    }

    /// Tensor bytes that this client copied: those that went through `put`.
    #[must_use]
    pub fn copied_bytes(&self) -> u64 {
        self.session.copied_bytes.load(Relaxed)
    }

    /// Bytes of segments to fill that this client backed with huge pages, before their first write.
    #[must_use]
    pub fn huge_bytes(&self) -> u64 {
        self.session.births.huge_bytes()
    }

    pub(crate) fn births(&self) -> &HugeBirths {
        &self.session.births
    }

    /// Ends the connection for every clone and segment of it. What is mapped stays readable.
    pub fn close(&self) {
        self.connection().close();
    }

    /// A segment with room for tensors, to be filled in place. Its bytes are zero. All tensors of
    /// a segment share the size of their leading axis.
    ///
    /// # Errors
    /// [`Error::Remote`] if the host refuses, [`Error::Memory`] if it cannot be mapped.
    pub async fn create(&self, tensors: &[NewTensor]) -> Result<OpenSegment, Error> {
        let tensors = tensors.to_vec();
        let lease_ms = self.session.lease_ms;
        let body = wire::Create {
            tensors,
            lease_ms,
            request_id: self.request_id(),
        };
        let granted = self.granted(Op::Create, &body, Vec::new()).await?;
        let Granted {
            mapping,
            lease,
            mut fds,
            ..
        } = granted;
        OpenSegment::new(mapping, lease, single(&mut fds)?, self.clone())
    }

    /// Gives a segment a name under which others find it; it then lives on without this client.
    /// Its writable mapping is replaced by a read-only one first, even if the host refuses the name.
    ///
    /// # Errors
    /// [`Error::Remote`] with `NAME_TAKEN` if another flight has the name and `replace` is false.
    pub async fn publish(
        &self,
        segment: &mut OpenSegment,
        name: &str,
        replace: bool,
    ) -> Result<Flight, Error> {
        segment.freeze()?;
        let flight = self
            .publish_id(&segment.mapping().segment, name, replace)
            .await?;
        segment.published(flight.mapping.clone());
        Ok(flight)
    }

    /// Gives a call's result a name, as it is.
    ///
    /// # Errors
    /// As [`AsyncClient::publish`].
    pub async fn publish_result(
        &self,
        segment: &MappedSegment,
        name: &str,
        replace: bool,
    ) -> Result<Flight, Error> {
        segment.lease().check()?;
        self.publish_id(&segment.mapping().segment, name, replace)
            .await
    }

    async fn publish_id(&self, segment: &str, name: &str, replace: bool) -> Result<Flight, Error> {
        let body = wire::Publish {
            segment: segment.to_owned(),
            name: name.to_owned(),
            replace,
            request_id: self.request_id(),
        };
        let mapped: wire::Mapped = self.ask(Op::Publish, &body).await?;
        Ok(Flight {
            name: name.to_owned(),
            mapping: mapped.mapping,
        })
    }

    /// Copies a tensor into a segment of its own and publishes it; the column has the same name.
    ///
    /// # Errors
    /// [`Error::Dtype`] or [`Error::Length`] if `data` is not what `spec` says, and as
    /// [`AsyncClient::create`] and [`AsyncClient::publish`].
    pub async fn put<T: Element>(
        &self,
        name: &str,
        spec: &TensorSpec,
        data: &[T],
        replace: bool,
    ) -> Result<Flight, Error> {
        element::check::<T>(name, spec.dtype)?;
        self.put_bytes(name, spec, bytemuck::cast_slice(data), replace)
            .await
    }

    /// [`AsyncClient::put`] for bytes of any dtype: little-endian, row-major, contiguous.
    ///
    /// # Errors
    /// As [`AsyncClient::put`].
    pub async fn put_bytes(
        &self,
        name: &str,
        spec: &TensorSpec,
        data: &[u8],
        replace: bool,
    ) -> Result<Flight, Error> {
        let expected = spec.bytes()?;
        let given = data.len() as u64;
        if given != expected {
            return Err(Error::Length {
                spec: spec.clone(),
                expected,
                given,
            });
        }
        let TensorSpec { dtype, shape } = spec.clone();
        let mut segment = self
            .create(&[NewTensor {
                name: name.to_owned(),
                dtype,
                shape,
            }])
            .await?;
        segment.bytes_mut(name)?.copy_from_slice(data);
        self.session.copied_bytes.fetch_add(given, Relaxed);
        self.publish(&mut segment, name, replace).await
    }

    /// Hands over a memfd of one's own, sealed as the protocol asks (ADOPT), and with a name
    /// publishes it. It need not be an Arrow file.
    ///
    /// # Errors
    /// [`Error::Remote`] with `BAD_SEGMENT` and the reason if the host does not take it.
    pub async fn adopt(
        &self,
        memfd: OwnedFd,
        tensors: &[TensorPlace],
        name: Option<&str>,
        replace: bool,
    ) -> Result<AdoptedSegment, Error> {
        let body = wire::Adopt {
            tensors: tensors.iter().map(Into::into).collect(),
            name: name.map(str::to_owned),
            replace,
            lease_ms: self.session.lease_ms,
            request_id: self.request_id(),
        };
        let granted = self.granted(Op::Adopt, &body, vec![memfd]).await?;
        Ok(AdoptedSegment::new(granted.mapping, granted.lease))
    }

    /// Maps a flight's pages, read-only.
    ///
    /// # Errors
    /// [`Error::Remote`] with `TENSOR_NOT_FOUND` if there is no such flight, [`Error::Memory`] if
    /// it cannot be mapped.
    pub async fn map(&self, name: &str) -> Result<MappedSegment, Error> {
        let body = wire::Map {
            name: Some(name.to_owned()),
            segment: None,
            lease_ms: self.session.lease_ms,
            request_id: self.request_id(),
        };
        let Granted {
            mapping,
            lease,
            mut fds,
        } = self.granted(Op::Map, &body, Vec::new()).await?;
        MappedSegment::new(mapping, lease, single(&mut fds)?)
    }

    /// Gives leases a new life, counted from now; without `life` the host's default.
    /// It answers the life that the host granted.
    ///
    /// # Errors
    /// [`Error::LeaseExpired`] if one of them is over; then none is renewed.
    pub async fn renew(
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
        leases
            .iter()
            .for_each(|lease| self.connection().renewed(lease.id(), life));
        Ok(life)
    }

    /// What a flight is, without mapping it.
    ///
    /// # Errors
    /// [`Error::Remote`] with `TENSOR_NOT_FOUND`.
    pub async fn lookup(&self, name: &str) -> Result<Mapping, Error> {
        let body = wire::Name {
            name: name.to_owned(),
            request_id: self.request_id(),
        };
        let mapped: wire::Mapped = self.ask(Op::Lookup, &body).await?;
        Ok(mapped.mapping)
    }

    /// All flights of this principal, sorted by name.
    ///
    /// # Errors
    /// The ends of the connection.
    pub async fn list(&self) -> Result<Vec<Flight>, Error> {
        let mut flights: Vec<Flight> = Vec::new();
        loop {
            let after = flights.last().map(|flight| flight.name.clone());
            let page = self.list_page(after).await?;
            flights.extend(page.flights);
            if !page.more {
                return Ok(flights);
            }
        }
    }

    /// The flights that follow the name `after`; as many as fit into a frame.
    pub(crate) async fn list_page(&self, after: Option<String>) -> Result<wire::Flights, Error> {
        let body = wire::List {
            after,
            request_id: self.request_id(),
        };
        let page: wire::Flights = self.ask(Op::List, &body).await?;
        check_page(page.more, page.flights.is_empty())?;
        Ok(page)
    }

    /// Takes a flight's name away; its memory goes when the last lease ends.
    ///
    /// # Errors
    /// [`Error::Remote`] with `TENSOR_NOT_FOUND`.
    pub async fn drop_flight(&self, name: &str) -> Result<(), Error> {
        let body = wire::Name {
            name: name.to_owned(),
            request_id: self.request_id(),
        };
        self.ask::<_, wire::Done>(Op::Drop, &body).await.map(drop)
    }

    /// All kernels, sorted by plugin and name; with `name` those of that name.
    ///
    /// # Errors
    /// The ends of the connection; [`Error::Remote`] with `KERNEL_NOT_FOUND`.
    pub async fn kernels(&self, name: Option<&str>) -> Result<Vec<Kernel>, Error> {
        let mut kernels: Vec<Kernel> = Vec::new();
        loop {
            let after = kernels
                .last()
                .map(|kernel| format!("{}/{}", kernel.plugin, kernel.name));
            let kernel = name.map(str::to_owned);
            let body = wire::Kernels {
                after,
                kernel,
                request_id: self.request_id(),
            };
            let page: wire::KernelList = self.ask(Op::Kernels, &body).await?;
            check_page(page.more, page.kernels.is_empty())?;
            kernels.extend(page.kernels);
            if !page.more {
                return Ok(kernels);
            }
        }
    }

    /// The host's counts, with this client's own copied bytes.
    ///
    /// # Errors
    /// The ends of the connection.
    pub async fn stats(&self) -> Result<Stats, Error> {
        let body = wire::Empty {
            request_id: self.request_id(),
        };
        let all: serde_json::Value = self.ask(Op::Stats, &body).await?;
        Stats::new(all, self.copied_bytes(), self.huge_bytes())
    }

    /// Asks whether the host is there.
    ///
    /// # Errors
    /// The ends of the connection.
    pub async fn ping(&self) -> Result<(), Error> {
        let body = wire::Empty {
            request_id: self.request_id(),
        };
        self.ask::<_, wire::Done>(Op::Ping, &body).await.map(drop)
    }

    /// Begins a call of `kernel`, or `plugin/kernel` where two plugins have one of that name.
    pub fn call(&self, kernel: &str) -> Call<'_, Self> {
        Call::new(self, kernel, self.session.lease_ms)
    }

    pub(crate) fn connection(&self) -> &Arc<Connection> {
        &self.session.connection
    }

    pub(crate) fn lease_ms(&self) -> Option<u64> {
        self.session.lease_ms
    }

    pub(crate) fn request_id(&self) -> Option<String> {
        self.request_id.clone()
    }

    pub(crate) fn facing(&self, face: Face) -> Self {
        Self {
            face,
            ..self.clone()
        }
    }

    pub(crate) fn request<B: Serialize>(
        &self,
        op: Op,
        body: &B,
        fds: Vec<OwnedFd>,
    ) -> Result<Pending, Error> {
        self.connection().request(op, body, fds, self.face)
    }

    /// A request without descriptors and leases in either direction.
    async fn ask<B: Serialize, T: DeserializeOwned>(&self, op: Op, body: &B) -> Result<T, Error> {
        let pending = self.request(op, body, Vec::new())?;
        let (answer, _) = pending.await?.read()?;
        Ok(answer)
    }

    /// A request that is answered by a mapping and a lease.
    async fn granted<B: Serialize>(
        &self,
        op: Op,
        body: &B,
        fds: Vec<OwnedFd>,
    ) -> Result<Granted, Error> {
        let pending = self.request(op, body, fds)?;
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

    fn lease(&self, id: u64, expires_ms: u64) -> Lease {
        Lease::new(id, Duration::from_millis(expires_ms), self.connection())
    }

    /// Maps what an INVOKE answered.
    pub(crate) fn results(&self, reply: Reply) -> Result<CallResult, Error> {
        let (invoked, fds) = reply.read::<wire::Invoked>()?;
        let mut fds: BTreeMap<usize, OwnedFd> = fds.into_iter().enumerate().collect();
        let mut published = Vec::new();
        let mut held = Vec::new();
        // All leases are taken over before the first mapping is tried: a failure releases them.
        for entry in invoked.results {
            let wire::ResultEntry {
                port,
                mapping,
                lease,
                expires_ms,
                fd,
                name,
            } = entry;
            if let Some(name) = name {
                published.push(Flight {
                    name,
                    mapping: mapping.clone(),
                });
            }
            if let (Some(lease), Some(life)) = (lease, expires_ms) {
                held.push((port, mapping, self.lease(lease, life), fd));
            }
        }
        let mut results = Vec::with_capacity(held.len());
        for (port, mapping, lease, fd) in held {
            let fd = fd.and_then(|index| fds.remove(&index)).ok_or_else(|| {
                Error::Protocol(format!(
                    "result {port:?} came without a descriptor of its own"
                ))
            })?;
            results.push((port, MappedSegment::new(mapping, lease, fd)?));
        }
        Ok(CallResult {
            results,
            published,
            notes: invoked.notes,
            copied_bytes: invoked.copied_bytes,
            pages: invoked.pages,
            minor_faults: invoked.minor_faults,
            seconds: invoked.seconds,
            request_id: invoked.request_id,
        })
    }
}

struct Granted {
    mapping: Mapping,
    lease: Lease,
    fds: Vec<OwnedFd>,
}

fn single(fds: &mut Vec<OwnedFd>) -> Result<OwnedFd, Error> {
    match (fds.pop(), fds.len()) {
        (Some(fd), 0) => Ok(fd),
        (None, _) => Err(Error::Protocol(
            "a mapping came without its descriptor".into(),
        )),
        (Some(_), more) => Err(Error::Protocol(format!(
            "a mapping came with {} descriptors",
            more + 1
        ))),
    }
}

/// A page that promises more but is empty would be asked for without end.
fn check_page(more: bool, empty: bool) -> Result<(), Error> {
    if more && empty {
        return Err(Error::Protocol(
            "an empty page of a list promises more".into(),
        ));
    }
    Ok(())
}
