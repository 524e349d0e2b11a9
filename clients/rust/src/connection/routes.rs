//! Requests under way, and who gets each reply. No I/O.

use std::collections::HashMap;
use std::task::Waker;

use super::frames::Reply;
use super::renewal::Renewal;

/// Who waits for a reply: a thread can receive it itself, a task cannot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waiter {
    Thread,
    Task,
}

/// What becomes of a reply.
#[derive(Debug)]
pub(super) enum Route {
    /// Somebody waits, and is to be woken if they asked already.
    Caller(Waiter, Option<Waker>),
    /// It is here and nobody took it yet.
    Arrived(Reply),
    /// Nobody wants it any more; its leases are released when it comes.
    Nobody,
    /// The connection's own RENEW.
    Renewal(Renewal),
}

/// What is left to do about a reply that came.
#[derive(Debug)]
pub(super) enum Delivery {
    /// It waits for its caller, who is to be woken if they asked already.
    Caller(Option<Waker>),
    /// It answers a RENEW of the connection's own.
    Renewal(Renewal, Reply),
    /// Nobody waits for it: its leases are to be released.
    Nobody(Reply),
}

/// The requests under way, by sequence.
#[derive(Debug, Default)]
pub(super) struct Routes {
    sequence: u32,
    routes: HashMap<u32, Route>,
}

impl Routes {
    /// Takes a sequence that no request under way has; never 0.
    pub(super) fn add(&mut self, route: Route) -> u32 {
        loop {
            self.sequence = self.sequence.wrapping_add(1);
            if self.sequence != 0 && !self.routes.contains_key(&self.sequence) {
                self.routes.insert(self.sequence, route);
                return self.sequence;
            }
        }
    }

    /// Forgets a request: it was never sent, or its caller was told of the connection's end.
    pub(super) fn remove(&mut self, sequence: u32) {
        self.routes.remove(&sequence);
    }

    pub(super) fn deliver(&mut self, sequence: u32, reply: Reply) -> Delivery {
        match self.routes.remove(&sequence) {
            Some(Route::Caller(_, waker)) => {
                self.routes.insert(sequence, Route::Arrived(reply));
                Delivery::Caller(waker)
            }
            Some(Route::Renewal(renewal)) => Delivery::Renewal(renewal, reply),
            Some(Route::Nobody) | None => Delivery::Nobody(reply),
            // A second reply to one request; the first one stands.
            Some(arrived @ Route::Arrived(_)) => {
                self.routes.insert(sequence, arrived);
                Delivery::Nobody(reply)
            }
        }
    }

    /// The reply, for its caller, if it is here.
    pub(super) fn take(&mut self, sequence: u32) -> Option<Reply> {
        match self.routes.remove(&sequence)? {
            Route::Arrived(reply) => Some(reply),
            other => {
                self.routes.insert(sequence, other);
                None
            }
        }
    }

    /// Wakes the caller of that sequence by `waker` from now on.
    pub(super) fn wake_by(&mut self, sequence: u32, waker: &Waker) {
        if let Some(Route::Caller(_, wakes)) = self.routes.get_mut(&sequence) {
            *wakes = Some(waker.clone());
        }
    }

    /// The caller lost interest. Returns the reply if it is here already.
    pub(super) fn abandon(&mut self, sequence: u32) -> Option<Reply> {
        match self.routes.remove(&sequence)? {
            Route::Arrived(reply) => Some(reply),
            _ => {
                self.routes.insert(sequence, Route::Nobody);
                None
            }
        }
    }

    /// The connection is over: only callers keep their places, to be told. Returns who of them
    /// is to be woken.
    pub(super) fn end(&mut self) -> Vec<Waker> {
        self.routes
            .retain(|_, route| matches!(route, Route::Caller(..) | Route::Arrived(_)));
        let routes = self.routes.values_mut();
        routes
            .filter_map(|route| match route {
                Route::Caller(_, waker) => waker.take(),
                _ => None,
            })
            .collect()
    }

    /// Whether a task waits, which cannot receive by itself.
    pub(super) fn task_waits(&self) -> bool {
        let mut routes = self.routes.values();
        routes.any(|route| matches!(route, Route::Caller(Waiter::Task, _)))
    }

    /// What wakes a thread that waits.
    pub(super) fn waiting_thread(&self) -> Option<Waker> {
        self.routes.values().find_map(|route| match route {
            Route::Caller(Waiter::Thread, waker) => waker.clone(),
            _ => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::frames::Payload;
    use super::*;
    use crate::wire::Op;

    fn reply(body: &str) -> Reply {
        Reply {
            op: Op::Ok,
            body: body.into(),
            payload: Payload::default(),
            fds: Vec::new(),
        }
    }

    fn caller() -> Route {
        Route::Caller(Waiter::Task, None)
    }

    #[test]
    fn sequences_skip_zero_and_those_under_way() {
        let mut routes = Routes {
            sequence: u32::MAX - 1,
            ..Routes::default()
        };
        let taken: Vec<u32> = (0..3).map(|_| routes.add(Route::Nobody)).collect();
        assert_eq!(taken, [u32::MAX, 1, 2]);
        routes.sequence = u32::MAX - 1;
        assert_eq!(routes.add(Route::Nobody), 3);
    }

    #[test]
    fn the_first_reply_stands_and_a_second_one_is_nobodys() {
        let mut routes = Routes::default();
        let sequence = routes.add(caller());
        assert!(routes.take(sequence).is_none());
        routes.wake_by(sequence, Waker::noop());
        let first = routes.deliver(sequence, reply("1"));
        assert!(matches!(first, Delivery::Caller(Some(_))), "{first:?}");
        let second = routes.deliver(sequence, reply("2"));
        assert!(
            matches!(&second, Delivery::Nobody(reply) if reply.body == b"2"),
            "{second:?}"
        );
        assert_eq!(routes.take(sequence).expect("it is here").body, b"1");
        let late = routes.deliver(sequence, reply("3"));
        assert!(matches!(late, Delivery::Nobody(_)), "{late:?}");
    }

    #[test]
    fn an_abandoned_reply_comes_back_or_is_nobodys_when_it_comes() {
        let mut routes = Routes::default();
        let (here, coming) = (routes.add(caller()), routes.add(caller()));
        routes.deliver(here, reply("1"));
        assert_eq!(routes.abandon(here).expect("it is here").body, b"1");
        assert!(routes.abandon(coming).is_none());
        let late = routes.deliver(coming, reply("2"));
        assert!(matches!(late, Delivery::Nobody(_)), "{late:?}");
        assert!(routes.routes.is_empty());
    }

    #[test]
    fn the_end_wakes_callers_and_keeps_what_arrived() {
        let mut routes = Routes::default();
        let (waits, arrived) = (routes.add(caller()), routes.add(caller()));
        routes.add(Route::Nobody);
        routes.wake_by(waits, Waker::noop());
        routes.deliver(arrived, reply("1"));
        assert_eq!(routes.end().len(), 1);
        assert_eq!(routes.routes.len(), 2);
        assert!(routes.take(waits).is_none());
        assert!(routes.take(arrived).is_some());
    }
}
