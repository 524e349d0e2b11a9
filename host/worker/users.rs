//! Whose worker processes are, what that may do, and that they end with their host. Of two that live at a time no two have the same user.
//!
//! What Linux lets one process of a user do to another of the same user (signals, `/proc`, limits) is then no matter between workers, nor
//! between a worker and anybody else: nobody logs in as such a user, and no file is its.

use std::collections::VecDeque;
use std::io;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::io::Errno;
use rustix::process::{Gid, Signal, Uid, getppid, set_parent_process_death_signal};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_thread_groups, set_thread_res_gid,
    set_thread_res_uid,
};
use strait_memory::process;

/// How long one waits for a process to be gone.
const LEAVING_MAX: Duration = Duration::from_secs(2);

/// Those that are there.
#[derive(Debug)]
pub(super) struct Users {
    state: Mutex<State>,
    changed: Condvar,
    asked: RangeInclusive<u32>,
}

#[derive(Debug)]
struct State {
    /// The next one first: one that has just ended waits the longest.
    free: VecDeque<u32>,
    /// How many are about to be.
    leaving: usize,
}

/// One, until this is dropped.
#[derive(Debug)]
pub(super) struct User {
    pub(super) uid: u32,
    is_leaving: bool,
    of: Arc<Users>,
}

impl Users {
    pub(super) fn new(uids: RangeInclusive<u32>) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                free: uids.clone().collect(),
                leaving: 0,
            }),
            changed: Condvar::new(),
            asked: uids,
        })
    }

    /// One of them, as soon as there is one, if that will be soon.
    ///
    /// # Errors
    /// All are taken.
    pub(super) fn take(self: &Arc<Self>) -> io::Result<User> {
        let until = Instant::now() + LEAVING_MAX;
        let mut state = self.state.lock();
        while state.free.is_empty()
            && state.leaving > 0
            && !self.changed.wait_until(&mut state, until).timed_out()
        {}
        let Some(uid) = state.free.pop_front() else {
            let (first, last) = (self.asked.start(), self.asked.end());
            return Err(io::Error::other(format!(
                "each user of workers.uids ({first}-{last}) has a process already; give it more, or lower workers.max or workers.compilers"
            )));
        };
        Ok(User {
            uid,
            is_leaving: false,
            of: Arc::clone(self),
        })
    }
}

impl User {
    /// Its process was killed, and is being taken apart.
    pub(super) fn leave(&mut self) {
        if !std::mem::replace(&mut self.is_leaving, true) {
            self.of.state.lock().leaving += 1;
        }
    }
}

impl Drop for User {
    fn drop(&mut self) {
        let mut state = self.of.state.lock();
        state.free.push_back(self.uid);
        state.leaving -= usize::from(self.is_leaving);
        self.of.changed.notify_all();
    }
}

/// Has Linux end this process when its host ends, however that does and whatever this process is about.
///
/// # Errors
/// Linux's.
pub(super) fn end_with_host() -> io::Result<()> {
    Ok(set_parent_process_death_signal(Some(Signal::KILL))?)
}

/// Takes all capabilities from this process for good, and makes it one of user `uid`, if there is one, and of that user's
/// group alone. It has no other threads yet. Answers what this Linux would not do, in words.
///
/// # Errors
/// It cannot become that user: it is not root, or its host is gone.
pub(super) fn step_down(uid: Option<u32>) -> io::Result<Option<String>> {
    // Which takes a capability itself.
    let unbound = empty_bounding_set();
    if let Some(uid) = uid {
        become_user(uid)?;
    }
    let dropped = unbound.and(drop_capabilities());
    let lacking = dropped.map_err(|error| format!("no capabilities: {error}"));
    Ok(lacking.err())
}

/// From now on no program that this process runs is given any. Who has none itself is given none in any case: it gets no
/// new privileges.
fn empty_bounding_set() -> rustix::io::Result<()> {
    if !capabilities(None)?
        .effective
        .contains(CapabilitySet::SETPCAP)
    {
        return Ok(());
    }
    for bit in 0..u64::BITS {
        match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << bit)) {
            // This Linux knows no more of them.
            Err(Errno::INVAL) => break,
            removed => removed?,
        }
    }
    Ok(())
}

/// Root without them is a user like others, but for whose files there are.
fn drop_capabilities() -> rustix::io::Result<()> {
    let none = CapabilitySet::empty();
    clear_ambient_capability_set()?;
    set_capabilities(
        None,
        CapabilitySets {
            effective: none,
            permitted: none,
            inheritable: none,
        },
    )
}

fn become_user(uid: u32) -> io::Result<()> {
    let host = getppid();
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
    set_thread_groups(&[])?;
    set_thread_res_gid(group, group, group)?;
    // Its capabilities go with the last root.
    set_thread_res_uid(user, user, user)?;
    // Both were undone by that.
    process::set_not_dumpable()?;
    end_with_host()?;
    match getppid() == host {
        true => Ok(()),
        false => Err(io::Error::other("the host has ended")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_about_to_be_free_is_waited_for() {
        let users = Users::new(7..=8);
        let (mut one, other) = (users.take().expect("one"), users.take().expect("another"));
        assert_eq!((one.uid, other.uid), (7, 8));
        let full = users.take().expect_err("all are taken");
        assert!(full.to_string().contains("workers.uids (7-8)"), "{full}");
        one.leave();
        std::thread::scope(|scope| {
            let next = scope.spawn(|| users.take().expect("it is free soon"));
            drop(one);
            assert_eq!(next.join().expect("no panic").uid, 7);
        });
        drop(other);
        // Who was free first comes first.
        assert_eq!(users.take().expect("nobody is left").uid, 7);
    }
}
