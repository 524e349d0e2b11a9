//! Authority as a value: an edge authenticates once and gets a [`Caller`]; every verb is a method on it.
//!
//! ```text
//! edge ── credentials ──▶ Host::caller ──▶ Caller { account (principal, quotas), rights }
//!                                            ├── names     list, lookup, publish, drop, read, upload
//!                                            ├── segments  create, adopt, seal, undelivered results
//!                                            ├── kernels   list, invoke, open_only, prepare, channels
//!                                            ├── plugins   load, out of service, back in service
//!                                            └── figures   stats, worker processes; quotas: for operators
//! ```
//! What is another's looks as if it were not there.

use std::sync::Arc;
use std::time::SystemTime;

use super::Host;
use super::account::Account;
use crate::access::{Rights, Standing};
use crate::error::{Code, Reason, Status};
use crate::lease::Principal;
use crate::plugin::{KernelRef, Plugin};

/// Where Linux says which uid stands for every user outside of a user namespace.
const OVERFLOW_UID: &str = "/proc/sys/kernel/overflowuid";

/// Somebody who was let in. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Caller {
    pub(super) host: Arc<Host>,
    pub(super) account: Arc<Account>,
    standing: Arc<Standing>,
}

impl Host {
    /// Lets in the process at the other end of a unix socket, which runs as `uid`. The host's own user and root
    /// are its operators; the file of rights says what others may do.
    ///
    /// # Errors
    /// `PRINCIPAL` if Linux does not say who that is, or says only that the host's user namespace does not know it.
    pub fn caller(self: &Arc<Self>, uid: Option<u32>) -> Result<Caller, Status> {
        match uid {
            Some(uid) if uid != self.overflow_uid => {
                let standing = self.access.of_user(uid);
                Ok(self.caller_of(&Principal::of_uid(uid), standing))
            }
            _ => Err(Status::new(
                Code::PermissionDenied,
                Reason::Principal,
                format!(
                    "this connection's process has no user that the host can name (uid {}); \
                     connect from within the host's user namespace",
                    uid.map_or_else(|| "unknown".to_owned(), |uid| uid.to_string())
                ),
            )),
        }
    }

    /// The user that this process runs as, as an operator.
    pub fn own_caller(self: &Arc<Self>) -> Caller {
        let uid = rustix::process::geteuid().as_raw();
        self.caller_with(Principal::of_uid(uid), Rights::of_an_operator())
    }

    /// Somebody whom the embedding program has authenticated.
    pub fn caller_with(self: &Arc<Self>, principal: Principal, rights: Rights) -> Caller {
        self.caller_of(&principal, Standing::fixed(rights))
    }

    /// Lets in whoever sends that token.
    ///
    /// # Errors
    /// `TOKEN_UNKNOWN`, `TOKEN_EXPIRED`, `TOKEN_REVOKED`.
    pub fn caller_by_token(self: &Arc<Self>, token: &str) -> Result<Caller, Status> {
        let (principal, standing) = self.access.authenticate(token, SystemTime::now())?;
        Ok(self.caller_of(&principal, standing))
    }

    /// Lets in the holder of a certificate of that name, which the edge has verified.
    pub fn caller_by_certificate(self: &Arc<Self>, name: &str) -> Caller {
        let principal = Principal::of_certificate(name);
        let standing = self.access.of_certificate(&principal);
        self.caller_of(&principal, standing)
    }

    fn caller_of(self: &Arc<Self>, principal: &Principal, standing: Arc<Standing>) -> Caller {
        Caller {
            account: self.accounts.of(principal),
            host: Arc::clone(self),
            standing,
        }
    }
}

impl Caller {
    /// The host.
    pub fn host(&self) -> &Arc<Host> {
        &self.host
    }

    /// Who it is.
    pub fn principal(&self) -> &Principal {
        self.account.principal()
    }

    /// What it has of the host, and may have.
    pub fn account(&self) -> &Arc<Account> {
        &self.account
    }

    /// Whether it may see and change what belongs to everybody.
    pub fn is_operator(&self) -> bool {
        self.rights().admin
    }

    /// What it may do as of now.
    pub(super) fn rights(&self) -> Arc<Rights> {
        self.standing.rights()
    }

    /// The kernel `name` or `plugin/name`.
    ///
    /// # Errors
    /// `KERNEL_NOT_FOUND`, `AMBIGUOUS_KERNEL`; `NO_RIGHT` if it may not run that.
    pub fn kernel(&self, name: &str) -> Result<KernelRef, Status> {
        let found = self.host.plugins.find(name)?;
        self.check_call(&found).map(|()| found)
    }

    /// Whether it may run that kernel, still: what was prepared lives longer than a right may.
    pub(super) fn check_call(&self, found: &KernelRef) -> Result<(), Status> {
        if self.may_call(found) {
            return Ok(());
        }
        let (plugin, kernel) = found.names();
        let what = format!("run the kernel `{plugin}/{kernel}`");
        Err(self.may_not(&what, &format!("call:{kernel}")))
    }

    pub(super) fn may_call(&self, found: &KernelRef) -> bool {
        let (plugin, kernel) = found.names();
        self.rights().may_call(plugin, kernel)
    }

    /// Loads a plugin from its bytes.
    ///
    /// # Errors
    /// `NO_RIGHT`, `BAD_PLUGIN`, `NAME_TAKEN`.
    pub fn load_plugin(&self, bytes: &[u8]) -> Result<Arc<Plugin>, Status> {
        if !self.rights().load {
            return Err(self.may_not("add plugins", "load"));
        }
        self.host.load_plugin(bytes, self.principal())
    }

    pub(super) fn check_admin(&self, what: &str) -> Result<(), Status> {
        match self.rights().admin {
            true => Ok(()),
            false => Err(self.may_not(what, "admin")),
        }
    }

    pub(super) fn check_get(&self) -> Result<(), Status> {
        match self.rights().get {
            true => Ok(()),
            false => Err(self.may_not("list, read or map flights", "get")),
        }
    }

    pub(super) fn check_share(&self) -> Result<(), Status> {
        match self.rights().share {
            true => Ok(()),
            false => Err(self.may_not("let others read its flights", "share")),
        }
    }

    pub(super) fn check_put(&self) -> Result<(), Status> {
        match self.rights().put {
            true => Ok(()),
            false => Err(self.may_not("make, name or drop flights", "put")),
        }
    }

    fn may_not(&self, what: &str, right: &str) -> Status {
        let principal = self.principal();
        Status::new(
            Code::PermissionDenied,
            Reason::NoRight,
            format!("{principal} may not {what}; have the operator of this host grant it the right `{right}`"),
        )
        .with("right", right)
    }
}

/// The uid that Linux shows for users whom the host's user namespace does not map.
///
/// # Errors
/// If `/proc` does not say.
pub(super) fn overflow_uid() -> std::io::Result<u32> {
    let read = || -> std::io::Result<u32> {
        let text = std::fs::read_to_string(OVERFLOW_UID)?;
        text.trim().parse().map_err(std::io::Error::other)
    };
    read().map_err(|error| {
        let message = format!("cannot read {OVERFLOW_UID}: {error}; is /proc mounted?");
        std::io::Error::new(error.kind(), message)
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::json;

    use super::*;
    use crate::access::Kernels;
    use crate::session::Session;

    fn host() -> (tempfile::TempDir, Arc<Host>) {
        let directory = tempfile::tempdir().expect("a directory");
        let mut config = crate::config::Config::default();
        config.engine.cache = Some(std::path::PathBuf::new());
        let host = Host::start(config, directory.path()).expect("a host");
        (directory, host)
    }

    #[test]
    fn the_hosts_own_user_and_root_are_operators() {
        let (_directory, host) = host();
        let own = rustix::process::geteuid().as_raw();
        for (uid, operator) in [(own, true), (0, true), (own + 4242, false)] {
            let caller = host.caller(Some(uid)).expect("a user");
            assert_eq!(caller.is_operator(), operator, "{uid}");
            assert_eq!(caller.principal().to_string(), format!("uid:{uid}"));
        }
        for nobody in [None, Some(host.overflow_uid)] {
            let refused = host.caller(nobody).expect_err("nobody");
            assert_eq!(refused.reason, Reason::Principal);
        }
    }

    #[test]
    fn whoever_has_no_right_is_told_which_and_leaves_nothing() {
        let (_directory, host) = host();
        let principal = Principal::of_uid(4242);
        let full = host.caller_with(principal.clone(), Rights::of_a_user());
        let tensor = || {
            serde_json::from_value(json!([{"name": "x", "dtype": "float64", "shape": [2]}]))
                .expect("tensors")
        };
        let (segment, fd) = full.create(tensor()).expect("made");
        drop(fd);
        full.publish(&segment, "x", false).expect("published");
        let bare = host.caller_with(principal, Rights::none());
        let used = full.account().segments().used();

        let mut refused = Vec::new();
        let mut told = |right: &str, result: Result<(), Status>| {
            let status = result.expect_err(right);
            assert_eq!(
                (status.code, status.reason),
                (Code::PermissionDenied, Reason::NoRight),
                "{status}"
            );
            assert!(
                status.message.contains("uid:4242")
                    && status.message.contains(&format!("`{right}`")),
                "{status}"
            );
            refused.push(right.to_owned());
        };
        told("get", bare.list(None, 10).map(drop));
        told("get", bare.lookup("x").map(drop));
        told("get", bare.begin_read("x").map(drop));
        told("get", bare.undelivered(segment.id()).map(drop));
        told("put", bare.create(tensor()).map(drop));
        told("put", bare.seal(&segment));
        told("put", bare.publish(&segment, "y", false));
        told("put", bare.begin_upload("y", false).map(drop));
        told("put", bare.drop_flight("x"));
        told("load", bare.load_plugin(b"").map(drop));
        let scale = |inputs: &str, publish: BTreeMap<&str, &str>| {
            serde_json::from_value(json!({
                "kernel": "scale-shift", "inputs": {"x": inputs}, "parameters": {"a": 1.0, "b": 0.0},
                "publish": publish,
            }))
            .expect("an INVOKE")
        };
        let id = || host.request_id(None).expect("an id");
        let calls = |rights: Rights| host.caller_with(Principal::of_uid(4242), rights);
        let get = Rights {
            get: true,
            ..Rights::none()
        };
        told(
            "call:scale-shift",
            calls(get.clone())
                .invoke_and_wait(scale("x", BTreeMap::new()), id())
                .map(drop),
        );
        let call = Rights {
            call: Kernels::Matching(vec!["scale-*".to_owned()]),
            ..get
        };
        told(
            "put",
            calls(call.clone())
                .invoke_and_wait(scale("x", BTreeMap::from([("y", "y")])), id())
                .map(drop),
        );
        assert_eq!(refused.len(), 12);
        // What it may do, it can.
        let done = calls(call).invoke_and_wait(scale("x", BTreeMap::new()), id());
        assert_eq!(done.expect("it may").results.len(), 1);
        assert!(full.lookup("y").is_err() && full.lookup("x").is_ok());
        drop(segment);
        // An idle result is kept for the next call.
        let idle = host.pool().stats().idle_bytes;
        assert_eq!(
            full.account().segments().used(),
            used + idle,
            "x, as before"
        );
    }

    #[test]
    fn names_are_as_many_as_one_may_have_also_of_one_segment() {
        let (_directory, host) = host();
        let [one, other] = [4242, 4243].map(|uid| host.caller(Some(uid)).expect("a user"));
        let result = |caller: &Caller| {
            let tensors = json!([{"name": "x", "dtype": "float64", "shape": [1]}]);
            let tensors = serde_json::from_value(tensors).expect("tensors");
            let (segment, fd) = caller.create(tensors).expect("made");
            drop(fd);
            caller.publish(&segment, "x", false).expect("published");
            let call = json!({"kernel": "scale-shift", "inputs": {"x": "x"}, "parameters": {"a": 1.0, "b": 0.0}});
            let call = serde_json::from_value(call).expect("an INVOKE");
            let id = host.request_id(None).expect("an id");
            let done = caller.invoke_and_wait(call, id).expect("it runs");
            Arc::clone(done.results[0].segment().expect("a segment"))
        };
        let segment = result(&one);
        for n in 1..65_536 {
            one.publish(&segment, &n.to_string(), false)
                .expect("a name");
        }
        let told = |refused: Status| {
            assert_eq!(refused.reason, Reason::QuotaExceeded);
            assert!(
                refused
                    .message
                    .contains("names of uid:4242: 1 more would exceed its quota of 65536 by 1"),
                "{refused}"
            );
        };
        told(one.publish(&segment, "more", false).expect_err("too many"));
        told(one.begin_upload("more", false).expect_err("too many"));
        let two = [(&segment, "7"), (&segment, "more")];
        told(one.publish_all(&two, true).expect_err("one too many"));
        assert_eq!(host.count_flights(Some(one.principal())), 65_536);
        one.publish(&segment, "7", true).expect("no more than were");
        other
            .publish(&result(&other), "y", false)
            .expect("another's names");
        assert_eq!(host.count_flights(Some(other.principal())), 2);
        assert_eq!(host.count_flights(None), 65_538);
        one.drop_flight("7").expect("it is there");
        one.publish_all(&two[1..], false).expect("there is room");
    }

    #[test]
    fn what_is_anothers_looks_as_if_it_were_not_there() {
        let (_directory, host) = host();
        let [one, other] = [4242, 4243].map(|uid| host.caller(Some(uid)).expect("a user"));
        let tensors = serde_json::from_value(json!([{"name": "x", "dtype": "int8", "shape": [1]}]));
        let (segment, fd) = one.create(tensors.expect("tensors")).expect("made");
        drop(fd);
        one.publish(&segment, "x", false).expect("published");
        let own = Session::open(one);
        own.grant(&segment, None).expect("a lease");
        let theirs = Session::open(other);
        let id = segment.id().to_string();
        assert_eq!(own.segment(&id).expect("its own").id(), segment.id());
        let refused = theirs.segment(&id).expect_err("not theirs");
        assert_eq!(refused.reason, Reason::SegmentNotFound);
        let refused = theirs.caller().lookup("x").expect_err("not theirs");
        assert_eq!(refused.reason, Reason::FlightNotFound);
        assert!(theirs.caller().list(None, 10).expect("may").is_empty());
    }
}
