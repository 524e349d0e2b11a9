//! Who else may read a flight. Others see it as `OWNER/NAME`; whoever it is not shared with, as if it were not there.
//!
//! A share belongs to the name: what replaces a flight is shared as it was, and DROP ends it. It gives the right to read. What
//! somebody has mapped by then stays mapped until its lease ends.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use strait_memory::Charge;

use super::caller::Caller;
use crate::access::is_principal;
use crate::error::{Code, Reason, Status};
use crate::lease::Principal;
use crate::text;

/// Whom one flight can be shared with at most, groups counting as one.
const SHARES_MAX: usize = 64;
/// Takes all shares of a flight back.
const EVERYBODY: &str = "*";

/// A flight's owner and name.
pub(super) type Key = (Principal, String);

/// The shares of all flights.
#[derive(Debug, Default)]
pub(super) struct Shares {
    /// By flight; each has a place among its owner's names.
    of: BTreeMap<Key, BTreeMap<String, Charge>>,
    /// By whom it is shared with, and the name that it has there.
    with: BTreeMap<(String, String), Key>,
}

/// The name of a flight for others than its owner.
fn shown((owner, name): &Key) -> String {
    format!("{owner}/{name}")
}

impl Shares {
    fn add(&mut self, key: &Key, who: &str, place: Charge) {
        let of = self.of.entry(key.clone()).or_default();
        of.insert(who.to_owned(), place);
        self.with.insert((who.to_owned(), shown(key)), key.clone());
    }

    fn remove(&mut self, key: &Key, who: &str) {
        let Some(of) = self.of.get_mut(key) else {
            return;
        };
        if of.remove(who).is_some() {
            self.with.remove(&(who.to_owned(), shown(key)));
        }
        if of.is_empty() {
            self.of.remove(key);
        }
    }

    /// Takes back all shares of a flight.
    pub(super) fn forget(&mut self, key: &Key) {
        for who in self.of.remove(key).unwrap_or_default().into_keys() {
            self.with.remove(&(who, shown(key)));
        }
    }

    fn of(&self, key: &Key) -> Vec<String> {
        let of = self.of.get(key);
        of.map(|of| of.keys().cloned().collect())
            .unwrap_or_default()
    }

    fn has(&self, key: &Key, who: &str) -> bool {
        self.of.get(key).is_some_and(|of| of.contains_key(who))
    }

    /// The flight that one of `grantees` sees under that name.
    pub(super) fn find(&self, grantees: &[String], name: &str) -> Option<&Key> {
        let mut found = grantees
            .iter()
            .filter_map(|who| self.with.get(&(who.clone(), name.to_owned())));
        found.next()
    }

    /// What one of `grantees` sees after the name `after`, at most `count`, by name.
    pub(super) fn list(
        &self,
        grantees: &[String],
        after: &str,
        count: usize,
    ) -> BTreeMap<&str, &Key> {
        let mut listed = BTreeMap::new();
        for who in grantees {
            let from = Bound::Excluded((who.clone(), after.to_owned()));
            let range = self.with.range((from, Bound::Unbounded));
            let own = range.take_while(|((grantee, _), _)| grantee == who);
            listed.extend(own.take(count).map(|((_, name), key)| (name.as_str(), key)));
        }
        listed
    }
}

impl Caller {
    /// As whom flights may be shared with it.
    pub(super) fn grantees(&self) -> Vec<String> {
        let groups = self.host.access().groups_of(self.principal());
        let groups = groups.into_iter().map(|group| format!("group:{group}"));
        std::iter::once(self.principal().to_string())
            .chain(groups)
            .collect()
    }

    /// Shares a flight of its with those in `add`, and no longer with those in `remove` (`*`: with nobody); answers whom it is
    /// shared with then.
    ///
    /// # Errors
    /// `FLIGHT_NOT_FOUND`, `NO_RIGHT`, `QUOTA_EXCEEDED`; `BAD_REQUEST` for a text that is neither a principal nor a group, or too
    /// many of them: then nothing has changed.
    pub fn share(
        &self,
        name: &str,
        add: &[String],
        remove: &[String],
    ) -> Result<Vec<String>, Status> {
        self.check_share()?;
        add.iter().try_for_each(|who| self.check_grantee(who))?;
        let key = (self.principal().clone(), name.to_owned());
        let mut flights = self.host.flights.lock();
        if !flights.named.contains_key(&key) {
            drop(flights);
            return Err(self.no_flight(name));
        }
        let shares = &mut flights.shares;
        let stays = |who: &str| !remove.iter().any(|gone| gone == who || gone == EVERYBODY);
        let before: BTreeSet<String> = shares.of(&key).into_iter().collect();
        let mut after: BTreeSet<&str> = before.iter().map(String::as_str).collect();
        after.retain(|who| stays(who));
        after.extend(add.iter().map(String::as_str));
        if after.len() > SHARES_MAX {
            return Err(bad_request(format!(
                "a flight can be shared with {SHARES_MAX} at most; have the operator make a group"
            )));
        }
        let new = after.iter().filter(|who| !shares.has(&key, who));
        let places: Result<Vec<_>, Status> = new
            .map(|who| self.account.name().map(|place| (*who, place)))
            .collect();
        let places = places?;
        for who in before.iter().filter(|who| !after.contains(who.as_str())) {
            shares.remove(&key, who);
        }
        for (who, place) in places {
            shares.add(&key, who, place);
        }
        let now = shares.of(&key);
        drop(flights);
        if now.iter().ne(&before) {
            let with = now.join(",");
            tracing::info!(target: "audit", by = %self.principal(), flight = text::name(name), with, "flight shared");
        }
        Ok(now)
    }

    /// Whether that is somebody, or a group that there is.
    fn check_grantee(&self, who: &str) -> Result<(), Status> {
        let shown = || text::name(who);
        match who.strip_prefix("group:") {
            Some(group) if self.host.access().has_group(group) => Ok(()),
            Some(_) => Err(bad_request(format!(
                "there is no `{}`: groups are in the host's file of rights",
                shown()
            ))),
            None if is_principal(who) => Ok(()),
            None => Err(bad_request(format!(
                "`{}` is nobody that a flight can be shared with: give uid:1000, token:alice, cert:pipeline or group:lab",
                shown()
            ))),
        }
    }
}

fn bad_request(message: String) -> Status {
    Status::new(Code::InvalidArgument, Reason::BadRequest, message)
}
