//! Flights by name: whose they are, and who reads or writes them inline.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use strait_memory::{Charge, MemoryError, Open, Refused, Sealed, Segment};
use strait_tensor::FileLayout;

use super::Host;
use super::caller::Caller;
use super::shares::{Key, Shares};
use super::state::{FlightState, StateWord, WrongState};
use crate::error::{Code, Reason, Status};
use crate::lease::{Body, LiveSegment, Principal};
use crate::text;

/// Longest flight name in bytes.
const NAME_BYTES_MAX: usize = 200;

/// A name's flight.
#[derive(Debug)]
pub struct FlightEntry {
    state: StateWord,
    // Set once the bytes are whole. Held for a clone only.
    segment: Mutex<Option<Arc<LiveSegment>>>,
}

impl FlightEntry {
    fn whole(segment: Arc<LiveSegment>) -> Arc<Self> {
        Arc::new(Self {
            state: StateWord::uploaded(),
            segment: Mutex::new(Some(segment)),
        })
    }

    fn segment(&self) -> Option<Arc<LiveSegment>> {
        self.segment.lock().clone()
    }

    /// Its state and the number of inline readers.
    pub fn state(&self) -> (FlightState, u32) {
        self.state.get()
    }
}

/// A name that is taken.
#[derive(Debug)]
pub(super) struct Named {
    entry: Arc<FlightEntry>,
    /// Among its principal's names.
    _place: Charge,
}

/// All names, and whom their flights are shared with.
#[derive(Debug, Default)]
pub(super) struct Flights {
    pub(super) named: BTreeMap<Key, Named>,
    pub(super) shares: Shares,
}

/// An inline read in progress.
#[derive(Debug)]
pub struct Reading {
    entry: Arc<FlightEntry>,
    /// What is read.
    pub segment: Arc<LiveSegment>,
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.entry.state.end_read();
    }
}

/// A flight whose bytes are arriving. Dropping it unfinished frees them and the name.
#[derive(Debug)]
pub struct Upload {
    caller: Caller,
    key: Key,
    entry: Arc<FlightEntry>,
    replaces: Option<Arc<FlightEntry>>,
    done: bool,
}

impl Caller {
    /// Its whole flights after `after`, and among them those that others share with it as `OWNER/NAME`, at most `count`, by name.
    ///
    /// # Errors
    /// `NO_RIGHT`.
    pub fn list(
        &self,
        after: Option<&str>,
        count: usize,
    ) -> Result<Vec<(String, Arc<LiveSegment>)>, Status> {
        self.check_get()?;
        let after = after.unwrap_or("");
        let from = Bound::Excluded(self.key(after));
        let grantees = self.grantees();
        let flights = self.host.flights.lock();
        let own = flights
            .named
            .range((from, Bound::Unbounded))
            .take_while(|((owner, _), _)| owner == self.principal())
            .filter_map(|((_, name), named)| Some((name.clone(), named.entry.segment()?)));
        let mut listed: BTreeMap<_, _> = own.take(count).collect();
        for (name, key) in flights.shares.list(&grantees, after, count) {
            let entry = flights.named.get(key).map(|named| &named.entry);
            if let Some(segment) = entry.and_then(|entry| entry.segment()) {
                // A name of its own counts before one that somebody shares with it.
                listed.entry(name.to_owned()).or_insert(segment);
            }
        }
        drop(flights);
        Ok(listed.into_iter().take(count).collect())
    }

    /// Before another principal than its owner gets to its bytes: they are not used again for anything else.
    fn note_reader(&self, segment: &LiveSegment) {
        if segment.owner() != self.principal() {
            segment.never_recycle();
        }
    }

    fn key(&self, name: &str) -> Key {
        (self.principal().clone(), name.to_owned())
    }

    /// Whether the name is taken.
    pub(super) fn has_flight(&self, name: &str) -> bool {
        self.host.flights.lock().named.contains_key(&self.key(name))
    }

    /// A flight of its own.
    fn own_entry(&self, name: &str) -> Result<Arc<FlightEntry>, Status> {
        let flights = self.host.flights.lock();
        let found = flights.named.get(&self.key(name));
        let found = found.map(|named| Arc::clone(&named.entry));
        drop(flights);
        found.ok_or_else(|| self.no_flight(name))
    }

    /// A flight of its own, or one that is shared with it.
    fn entry(&self, name: &str) -> Result<Arc<FlightEntry>, Status> {
        match self.own_entry(name) {
            Err(missing) if name.contains('/') => {
                let grantees = self.grantees();
                let flights = self.host.flights.lock();
                let key = flights.shares.find(&grantees, name);
                let found = key.and_then(|key| flights.named.get(key));
                let found = found.map(|named| Arc::clone(&named.entry));
                found.ok_or(missing)
            }
            found => found,
        }
    }

    pub(super) fn no_flight(&self, name: &str) -> Status {
        let (name, principal) = (text::name(name), self.principal());
        Status::new(
            Code::NotFound,
            Reason::FlightNotFound,
            format!("there is no flight `{name}` of {principal}; `list` shows those there are"),
        )
        .with("name", name)
    }

    /// The segment behind a name.
    ///
    /// # Errors
    /// `FLIGHT_NOT_FOUND`, `NO_RIGHT`; `WRONG_STATE` while it is still being uploaded.
    pub fn lookup(&self, name: &str) -> Result<Arc<LiveSegment>, Status> {
        self.check_get()?;
        let entry = self.entry(name)?;
        let segment = entry.segment().ok_or_else(|| WrongState {
            from: entry.state.get().0,
            to: FlightState::Streaming,
        })?;
        self.note_reader(&segment);
        Ok(segment)
    }

    /// The state of a flight, and how many read it inline.
    ///
    /// # Errors
    /// `FLIGHT_NOT_FOUND`.
    pub fn flight_state(&self, name: &str) -> Result<(FlightState, u32), Status> {
        Ok(self.own_entry(name)?.state())
    }

    /// Begins an inline read of a name.
    ///
    /// # Errors
    /// `FLIGHT_NOT_FOUND`, `NO_RIGHT`; `WRONG_STATE` while it is still being uploaded.
    pub fn begin_read(&self, name: &str) -> Result<Reading, Status> {
        self.check_get()?;
        let entry = self.entry(name)?;
        entry.state.begin_read()?;
        let segment = entry.segment();
        match segment {
            Some(segment) => {
                self.note_reader(&segment);
                Ok(Reading { entry, segment })
            }
            None => {
                entry.state.end_read();
                Err(Status::new(
                    Code::Internal,
                    Reason::Host,
                    format!("flight `{name}` is whole and has no segment"),
                ))
            }
        }
    }

    /// Takes a name for a flight whose bytes are to come.
    ///
    /// # Errors
    /// `BAD_NAME`, `NO_RIGHT`, `NAME_TAKEN` unless `replace`, `QUOTA_EXCEEDED`, `WRONG_STATE` if another upload has the
    /// name.
    pub fn begin_upload(&self, name: &str, replace: bool) -> Result<Upload, Status> {
        self.check_put()?;
        check_name(name)?;
        self.host.admit()?;
        let key = self.key(name);
        let entry = Arc::new(FlightEntry {
            state: StateWord::default(),
            segment: Mutex::new(None),
        });
        let mut flights = self.host.flights.lock();
        let replaces = flights
            .named
            .get(&key)
            .map(|named| Arc::clone(&named.entry));
        if let Some(old) = &replaces {
            let (state, _) = old.state.get();
            if matches!(state, FlightState::Uploading | FlightState::Idle) {
                return Err(WrongState {
                    from: state,
                    to: FlightState::Uploading,
                }
                .into());
            }
            if !replace {
                return Err(name_taken(name));
            }
        }
        entry.state.begin_upload()?;
        // A flight that is being replaced stays readable until the new bytes are whole.
        if replaces.is_none() {
            let named = Named {
                entry: Arc::clone(&entry),
                _place: self.account.name()?,
            };
            flights.named.insert(key.clone(), named);
        }
        drop(flights);
        Ok(Upload {
            caller: self.clone(),
            key,
            entry,
            replaces,
            done: false,
        })
    }

    /// Gives a whole segment a name.
    ///
    /// # Errors
    /// `BAD_NAME`, `NO_RIGHT`, `NAME_TAKEN`, `QUOTA_EXCEEDED`, `STILL_WRITABLE`, `BAD_SEGMENT`, `WRONG_STATE`.
    pub fn publish(
        &self,
        segment: &Arc<LiveSegment>,
        name: &str,
        replace: bool,
    ) -> Result<(), Status> {
        self.check_put()?;
        self.publish_all(&[(segment, name)], replace)
    }

    /// Gives whole segments their names, which differ: all of them or, after an error, none. That it may has been
    /// checked.
    ///
    /// # Errors
    /// As [`Caller::publish`].
    pub(super) fn publish_all(
        &self,
        named: &[(&Arc<LiveSegment>, &str)],
        replace: bool,
    ) -> Result<(), Status> {
        for (segment, name) in named {
            check_name(name)?;
            segment.seal()?;
        }
        let mut flights = self.host.flights.lock();
        // Of those that nobody has yet.
        let mut places = Vec::with_capacity(named.len());
        for (_, name) in named {
            let Some(old) = flights.named.get(&self.key(name)) else {
                places.push(Some(self.account.name()?));
                continue;
            };
            places.push(None);
            if !replace {
                return Err(name_taken(name));
            }
            // Whatever else it is, it can become Completed, and nothing becomes Uploading again.
            let (from, to) = (old.entry.state().0, FlightState::Completed);
            if from == FlightState::Uploading {
                return Err(WrongState { from, to }.into());
            }
        }
        let mut replaced = Vec::new();
        for ((segment, name), place) in named.iter().zip(places) {
            let entry = FlightEntry::whole(Arc::clone(segment));
            if let Some(place) = place {
                let named = Named {
                    entry,
                    _place: place,
                };
                flights.named.insert(self.key(name), named);
            } else if let Some(named) = flights.named.get_mut(&self.key(name)) {
                let old = std::mem::replace(&mut named.entry, entry);
                old.state.complete()?;
                replaced.push(old);
            }
        }
        drop(flights);
        // The replaced segments, if this was their last holder, are freed here: not under the lock.
        drop(replaced);
        Ok(())
    }

    /// Takes a name away.
    ///
    /// # Errors
    /// `FLIGHT_NOT_FOUND`, `NO_RIGHT`; `WRONG_STATE` while it is being uploaded.
    pub fn drop_flight(&self, name: &str) -> Result<(), Status> {
        self.check_put()?;
        let entry = self.own_entry(name)?;
        entry.state.complete()?;
        let mut flights = self.host.flights.lock();
        let key = self.key(name);
        if flights
            .named
            .get(&key)
            .is_some_and(|now| Arc::ptr_eq(&now.entry, &entry))
        {
            flights.named.remove(&key);
            flights.shares.forget(&key);
        }
        Ok(())
    }
}

impl Host {
    /// The names of `owner`, or all.
    pub(super) fn count_flights(&self, owner: Option<&Principal>) -> usize {
        let flights = self.flights.lock();
        match owner {
            // Not all: that would be the time of everybody.
            Some(owner) => flights
                .named
                .range((owner.clone(), String::new())..)
                .take_while(|((whose, _), _)| whose == owner)
                .count(),
            None => flights.named.len(),
        }
    }
}

impl Upload {
    /// Whose it will be.
    pub fn caller(&self) -> &Caller {
        &self.caller
    }

    /// The bytes are whole: the flight can be read from now on.
    ///
    /// # Errors
    /// `WRONG_STATE` if the flight that it replaces is itself being replaced; `QUOTA_EXCEEDED` if that was dropped and its
    /// place is taken; `INTERNAL` without random bytes.
    pub fn finish(
        mut self,
        segment: Segment<Open>,
        layout: FileLayout,
    ) -> Result<Arc<LiveSegment>, Status> {
        let sealed = sealed_own(segment)?;
        let live = self
            .caller
            .live(Body::Sealed(sealed), layout.bytes, layout.tensors, None)?;
        *self.entry.segment.lock() = Some(Arc::clone(&live));
        self.entry.state.finish_upload()?;
        let mut flights = self.caller.host.flights.lock();
        if let Some(old) = self.replaces.take() {
            // Somebody may have dropped or replaced it meanwhile; the latest bytes win.
            let entry = Arc::clone(&self.entry);
            match flights.named.get_mut(&self.key) {
                Some(now) => {
                    now.entry.state.complete()?;
                    now.entry = entry;
                }
                None => {
                    let named = Named {
                        entry,
                        _place: self.caller.account.name()?,
                    };
                    flights.named.insert(self.key.clone(), named);
                }
            }
            // Completing twice is legal; this covers an old one that left the map by itself.
            old.state.complete()?;
        }
        drop(flights);
        self.done = true;
        Ok(live)
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        // From Uploaded (when `finish` failed late) there is no way back to Idle, and no need.
        let _ = self.entry.state.fail_upload();
        let mut flights = self.caller.host.flights.lock();
        if flights
            .named
            .get(&self.key)
            .is_some_and(|now| Arc::ptr_eq(&now.entry, &self.entry))
        {
            flights.named.remove(&self.key);
            flights.shares.forget(&self.key);
        }
    }
}

impl Caller {
    /// Whether it may upload anything now.
    ///
    /// # Errors
    /// `NO_RIGHT`, `DRAINING`.
    pub fn check_upload(&self) -> Result<(), Status> {
        self.check_put()?;
        self.host.admit()
    }

    /// Makes an uploaded segment one of this caller's that has no name, and is kept as a result is that nobody published.
    ///
    /// # Errors
    /// `INTERNAL` without random bytes.
    pub fn keep_upload(
        &self,
        segment: Segment<Open>,
        layout: FileLayout,
    ) -> Result<Arc<LiveSegment>, Status> {
        let sealed = sealed_own(segment)?;
        let live = self.live(Body::Sealed(sealed), layout.bytes, layout.tensors, None)?;
        self.keep_undelivered(&live);
        Ok(live)
    }
}

/// Seals a segment that nobody but this process ever had. Linux may say for a moment that it can still be
/// written: while pages move, or between fork and exec of a child that this process starts.
fn sealed_own(mut segment: Segment<Open>) -> Result<Segment<Sealed>, MemoryError> {
    for wait_ms in [1, 4, 16, 64] {
        match segment.seal() {
            Ok(sealed) => return Ok(sealed),
            Err(Refused {
                segment: back,
                error: MemoryError::StillWritable { .. },
            }) => segment = back,
            Err(refused) => return Err(refused.error),
        }
        std::thread::sleep(Duration::from_millis(wait_ms));
    }
    segment.seal().map_err(|refused| refused.error)
}

pub(super) fn name_taken(name: &str) -> Status {
    Status::new(
        Code::AlreadyExists,
        Reason::NameTaken,
        format!("there is a flight `{name}` already; drop it, set replace, or take another name"),
    )
    .with("name", name)
}

/// # Errors
/// `BAD_NAME` with what a name may be.
pub fn check_name(name: &str) -> Result<(), Status> {
    let fine = !name.is_empty()
        && name.len() <= NAME_BYTES_MAX
        && !name.contains('#')
        && !name.chars().any(char::is_control);
    if fine {
        return Ok(());
    }
    Err(Status::new(
        Code::InvalidArgument,
        Reason::BadName,
        format!(
            "`{}` ({} bytes) is not a name: 1 to {NAME_BYTES_MAX} bytes without `#` and control characters",
            text::name(name),
            name.len()
        ),
    ))
}
