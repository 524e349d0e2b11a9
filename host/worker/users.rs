//! Whose worker processes are, and that they end with their host. Of two that live at a time no two have the same user.
//!
//! What Linux lets one process of a user do to another of the same user (signals, `/proc`, limits) is then no matter between workers, nor
//! between a worker and anybody else: nobody logs in as such a user, and no file is its.

use std::collections::VecDeque;
use std::io;
use std::ops::RangeInclusive;
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::process::{Gid, Signal, Uid, getppid, set_parent_process_death_signal};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use strait_memory::process;

/// Those that are there.
#[derive(Debug)]
pub(super) struct Users {
    /// The next one first: one that has just ended waits the longest.
    free: Mutex<VecDeque<u32>>,
    asked: RangeInclusive<u32>,
}

/// One, until this is dropped.
#[derive(Debug)]
pub(super) struct User {
    pub(super) uid: u32,
    of: Arc<Users>,
}

impl Users {
    pub(super) fn new(uids: RangeInclusive<u32>) -> Arc<Self> {
        Arc::new(Self {
            free: Mutex::new(uids.clone().collect()),
            asked: uids,
        })
    }

    /// # Errors
    /// All are taken.
    pub(super) fn take(self: &Arc<Self>) -> io::Result<User> {
        let Some(uid) = self.free.lock().pop_front() else {
            let (first, last) = (self.asked.start(), self.asked.end());
            return Err(io::Error::other(format!(
                "each user of workers.uids ({first}-{last}) has a process already; give it more, or lower workers.max or workers.compilers"
            )));
        };
        Ok(User {
            uid,
            of: Arc::clone(self),
        })
    }
}

impl Drop for User {
    fn drop(&mut self) {
        self.of.free.lock().push_back(self.uid);
    }
}

/// Has Linux end this process when its host ends, however that does and whatever this process is about.
///
/// # Errors
/// Linux's.
pub(super) fn end_with_host() -> io::Result<()> {
    Ok(set_parent_process_death_signal(Some(Signal::KILL))?)
}

/// Makes this process one of that user and of its group alone, for good. It has no other threads yet.
///
/// # Errors
/// It is not root, or its host is gone.
pub(super) fn become_user(uid: u32) -> io::Result<()> {
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
