//! Who is let in, and what each may do: what the operator's files say of tokens, users, certificates and groups.
//!
//! ```text
//! file of tokens ──▶ Tokens ─┐
//!                            ├─▶ Snapshot ──▶ Access ──▶ Standing: a principal's rights as they are now
//! file of rights ──▶ Grants ─┘        ▲
//!                                     └── reload: when a file has changed, or on SIGHUP
//! ```
//! A file that is broken changes nothing: what was read before holds. What changes is told in lines of the log with the target
//! `audit`. The edges ask [`Access`] once for each connection or call; nobody else looks at tokens.

pub mod file;
mod grants;
mod rights;
mod token;
mod tokens;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::SystemTime;

use parking_lot::Mutex;

use crate::error::{Code, Reason, Status};
use crate::lease::Principal;
use grants::Grants;

pub use file::{FileError, Stamp};
pub use grants::{is_certificate_name, is_principal};
pub use rights::{Kernels, Rights};
pub use token::{Token, TokenHash};
pub use tokens::{Entry, Tokens, is_name, time_text};

/// Of the log lines that say who was given or lost what.
const AUDIT: &str = "audit";

/// What the files said when they were read last.
#[derive(Debug, Default)]
struct Snapshot {
    tokens: Tokens,
    grants: Grants,
}

/// A file, and which version of it counts.
#[derive(Debug)]
struct Watched {
    path: Option<PathBuf>,
    stamp: Option<Stamp>,
}

impl Watched {
    fn has_changed(&self) -> bool {
        let path = self.path.as_deref();
        path.is_some_and(|path| Stamp::now(path) != self.stamp)
    }
}

#[derive(Debug)]
struct Files {
    tokens: Watched,
    rights: Watched,
    /// Until then tokens that expired have been told.
    told: SystemTime,
}

/// How somebody was authenticated, as far as its rights depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Basis {
    /// Nothing changes them.
    Fixed,
    /// The host's own user, or root.
    Operator,
    User,
    Certificate,
    /// The token of that hash, while it is good.
    Token(TokenHash),
}

/// What a principal may do as of now: it changes with the files.
#[derive(Debug)]
pub struct Standing {
    basis: Basis,
    // Held for a clone only.
    rights: Mutex<Arc<Rights>>,
}

impl Standing {
    /// Rights that nothing changes.
    #[must_use]
    pub fn fixed(rights: Rights) -> Arc<Self> {
        Arc::new(Self {
            basis: Basis::Fixed,
            rights: Mutex::new(Arc::new(rights)),
        })
    }

    /// As they are now.
    #[must_use]
    pub fn rights(&self) -> Arc<Rights> {
        Arc::clone(&self.rights.lock())
    }
}

/// Why a token is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// There is none, and nothing else says who asks.
    #[error(
        "this host asks for a token: send the header `authorization: Bearer TOKEN`; its operator makes one with `strait token new`"
    )]
    Missing,
    /// Nobody knows it, or any more.
    #[error(
        "this host does not know the token; compare it with what `strait token new` printed, or have the operator make another"
    )]
    Unknown,
    /// Its time is over.
    #[error("the token {id} of {name} expired at {at}; have the operator make another")]
    Expired {
        /// Of the token.
        id: String,
        /// Whom it was for.
        name: String,
        /// Since when.
        at: String,
    },
    /// It was taken back.
    #[error("the token {id} of {name} was revoked at {at}; have the operator make another")]
    Revoked {
        /// Of the token.
        id: String,
        /// Whom it was for.
        name: String,
        /// Since when.
        at: String,
    },
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let reason = match &refusal {
            Refusal::Missing => Reason::TokenMissing,
            Refusal::Unknown => Reason::TokenUnknown,
            Refusal::Expired { .. } => Reason::TokenExpired,
            Refusal::Revoked { .. } => Reason::TokenRevoked,
        };
        Self::new(Code::Unauthenticated, reason, refusal.to_string())
    }
}

/// Who is let in, by the operator's files.
#[derive(Debug)]
pub struct Access {
    // Held while files are read, so that one reload is done before the next begins.
    files: Mutex<Files>,
    // Held for a clone only.
    current: Mutex<Arc<Snapshot>>,
    /// Of those who are connected; each token has its own.
    standings: Mutex<BTreeMap<(Principal, String), Weak<Standing>>>,
}

impl Access {
    /// What those files say, if there are any.
    ///
    /// # Errors
    /// [`FileError`], of which there must be none at the start.
    pub fn open(tokens: Option<&Path>, rights: Option<&Path>) -> Result<Self, FileError> {
        let own = |path: &Path| path.to_owned();
        let mut files = Files {
            tokens: Watched {
                path: tokens.map(own),
                stamp: None,
            },
            rights: Watched {
                path: rights.map(own),
                stamp: None,
            },
            told: SystemTime::now(),
        };
        let mut snapshot = Snapshot::default();
        if let Some(path) = tokens {
            let (read, stamp) = Tokens::read(path)?;
            (snapshot.tokens, files.tokens.stamp) = (read, Some(stamp));
        }
        if let Some(path) = rights {
            let (read, stamp) = Grants::read(path)?;
            (snapshot.grants, files.rights.stamp) = (read, Some(stamp));
        }
        Ok(Self {
            files: Mutex::new(files),
            current: Mutex::new(Arc::new(snapshot)),
            standings: Mutex::default(),
        })
    }

    fn current(&self) -> Arc<Snapshot> {
        Arc::clone(&self.current.lock())
    }

    /// Whether there is a file of tokens.
    #[must_use]
    pub fn has_tokens(&self) -> bool {
        self.files.lock().tokens.path.is_some()
    }

    /// Whose token that is, and what it may do now.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn authenticate(
        &self,
        text: &str,
        now: SystemTime,
    ) -> Result<(Principal, Arc<Standing>), Refusal> {
        let hash = TokenHash::of(text).ok_or(Refusal::Unknown)?;
        let current = self.current();
        let entry = current.tokens.find(&hash).ok_or(Refusal::Unknown)?;
        let told = |at| (entry.hash.id(), entry.name.clone(), time_text(at));
        if let Some(at) = entry.revoked {
            let (id, name, at) = told(at);
            return Err(Refusal::Revoked { id, name, at });
        }
        if let Some(at) = entry.expires.filter(|at| *at <= now) {
            let (id, name, at) = told(at);
            return Err(Refusal::Expired { id, name, at });
        }
        let principal = Principal::of_token(&entry.name);
        let standing = self.standing(&principal, Basis::Token(hash));
        Ok((principal, standing))
    }

    /// What a user of this machine may do, from now on.
    #[must_use]
    pub fn of_user(&self, uid: u32) -> Arc<Standing> {
        let own = rustix::process::geteuid().as_raw();
        let basis = match uid == 0 || uid == own {
            true => Basis::Operator,
            false => Basis::User,
        };
        self.standing(&Principal::of_uid(uid), basis)
    }

    /// What the holder of a certificate may do, from now on.
    #[must_use]
    pub fn of_certificate(&self, principal: &Principal) -> Arc<Standing> {
        self.standing(principal, Basis::Certificate)
    }

    fn standing(&self, principal: &Principal, basis: Basis) -> Arc<Standing> {
        let id = match basis {
            Basis::Token(hash) => hash.id(),
            Basis::Fixed | Basis::Operator | Basis::User | Basis::Certificate => String::new(),
        };
        let key = (principal.clone(), id);
        let mut standings = self.standings.lock();
        let known = standings.get(&key).and_then(Weak::upgrade);
        if let Some(known) = known {
            return known;
        }
        if standings.len() >= 64 && standings.len().is_power_of_two() {
            standings.retain(|_, standing| standing.strong_count() > 0);
        }
        // Under the lock: a reload changes it before or after this, not between.
        let rights = self.current().rights(principal, basis, SystemTime::now());
        let standing = Arc::new(Standing {
            basis,
            rights: Mutex::new(Arc::new(rights)),
        });
        standings.insert(key, Arc::downgrade(&standing));
        standing
    }

    /// The names of the groups that somebody is in.
    #[must_use]
    pub fn groups_of(&self, principal: &Principal) -> Vec<String> {
        let current = self.current();
        let groups = current.grants.groups_of(principal.as_str());
        groups.map(str::to_owned).collect()
    }

    /// Whether there is a group of that name.
    #[must_use]
    pub fn has_group(&self, name: &str) -> bool {
        self.current().grants.has_group(name)
    }

    /// Reads the files that have changed; all of them if `all`. Blocks while it reads. A file that cannot be read or is wrong
    /// is told in the log, once for each version of it, and what was read before still holds.
    pub fn reload(&self, all: bool, now: SystemTime) {
        let mut files = self.files.lock();
        let before = self.current();
        let tokens = reread(&mut files.tokens, all, Tokens::read);
        let grants = reread(&mut files.rights, all, Grants::read);
        if tokens.is_some() || grants.is_some() {
            let snapshot = Arc::new(Snapshot {
                tokens: tokens.unwrap_or_else(|| before.tokens.clone()),
                grants: grants.unwrap_or_else(|| before.grants.clone()),
            });
            *self.current.lock() = Arc::clone(&snapshot);
            tell_changes(&before.tokens, &snapshot.tokens);
            self.apply(&snapshot, now);
        }
        let since = std::mem::replace(&mut files.told, now);
        drop(files);
        let current = self.current();
        let tokens = current.tokens.entries().iter();
        let expired = tokens.filter(|entry| {
            let is_new = entry.expires.is_some_and(|at| since < at && at <= now);
            is_new && entry.revoked.is_none()
        });
        let mut any = false;
        for entry in expired {
            any = true;
            tracing::info!(target: AUDIT, token = entry.hash.id(), name = entry.name, "token expired");
        }
        if any {
            self.apply(&current, now);
        }
    }

    /// Gives those who are connected the rights that they have by `snapshot`.
    fn apply(&self, snapshot: &Snapshot, now: SystemTime) {
        for ((principal, _), standing) in &*self.standings.lock() {
            let Some(standing) = standing.upgrade() else {
                continue;
            };
            let rights = snapshot.rights(principal, standing.basis, now);
            let before = standing.rights();
            if *before != rights {
                tracing::info!(target: AUDIT, %principal, before = %before, now = %rights, "rights changed");
                *standing.rights.lock() = Arc::new(rights);
            }
        }
    }
}

impl Snapshot {
    fn rights(&self, principal: &Principal, basis: Basis, now: SystemTime) -> Rights {
        let (kind, otherwise) = match basis {
            Basis::Fixed | Basis::Operator => return Rights::of_an_operator(),
            Basis::User => ("uid:*", Rights::of_a_user()),
            Basis::Certificate => ("cert:*", Rights::none()),
            Basis::Token(hash) => {
                let entry = self.tokens.find(&hash).filter(|entry| entry.is_live(now));
                let Some(entry) = entry else {
                    return Rights::none();
                };
                let mut rights = entry.rights.clone();
                self.grants.add_to(&mut rights, principal.as_str());
                return rights;
            }
        };
        let mut rights = Rights::none();
        match self.grants.add_to(&mut rights, principal.as_str()) {
            true => rights,
            false => self.grants.of_kind(kind).cloned().unwrap_or(otherwise),
        }
    }
}

/// What is in a file now, if that is another version and can be used.
fn reread<T>(
    file: &mut Watched,
    all: bool,
    read: impl Fn(&Path) -> Result<(T, Stamp), FileError>,
) -> Option<T> {
    if !all && !file.has_changed() {
        return None;
    }
    let path = file.path.as_deref()?;
    match read(path) {
        Ok((content, stamp)) => {
            file.stamp = Some(stamp);
            tracing::info!(target: AUDIT, path = %path.display(), "read again");
            Some(content)
        }
        Err(error) => {
            // That version is not told again; a mended one has another stamp.
            file.stamp = Stamp::now(path);
            tracing::error!(target: AUDIT, "{error}; what was read before still holds");
            None
        }
    }
}

/// Tells which tokens came, and which went.
fn tell_changes(before: &Tokens, now: &Tokens) {
    let known: HashMap<_, _> = before
        .entries()
        .iter()
        .map(|entry| (entry.hash.id(), entry))
        .collect();
    for entry in now.entries() {
        let (token, name) = (entry.hash.id(), &entry.name);
        let expires = entry.expires.map(time_text);
        let can = entry.rights.to_string();
        match known.get(&token) {
            None if entry.revoked.is_none() => {
                tracing::info!(target: AUDIT, token, name, can, expires, "token made");
            }
            Some(old) if old.revoked.is_none() && entry.revoked.is_some() => {
                tracing::info!(target: AUDIT, token, name, "token revoked");
            }
            Some(old) if (&old.rights, &old.expires) != (&entry.rights, &entry.expires) => {
                let before = old.rights.to_string();
                tracing::info!(target: AUDIT, token, name, before, can, expires, "token changed");
            }
            None | Some(_) => {}
        }
    }
    for old in before.entries() {
        if old.revoked.is_none() && now.find(&old.hash).is_none() {
            let token = old.hash.id();
            tracing::info!(target: AUDIT, token, name = old.name, "token revoked: it is no longer in the file");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn words(standing: &Standing) -> String {
        standing.rights().to_string()
    }

    #[test]
    fn tokens_are_let_in_until_they_are_over() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("tokens.toml");
        let rights = Rights::parse(["get"]).expect("rights");
        let hour = Duration::from_secs(3600);
        let (token, made) = Tokens::add(&path, "alice", rights, Some(hour)).expect("made");
        let access = Access::open(Some(&path), None).expect("read");
        let now = SystemTime::now();
        let (who, standing) = access.authenticate(token.text(), now).expect("in");
        assert_eq!(
            (who.to_string(), words(&standing)),
            ("token:alice".into(), "get".into())
        );
        let refused = |text: &str, now| {
            let status = Status::from(access.authenticate(text, now).expect_err(text));
            assert_eq!(status.code, Code::Unauthenticated);
            status.reason
        };
        assert_eq!(refused("strait_no", now), Reason::TokenUnknown);
        assert_eq!(refused(&"x".repeat(1 << 20), now), Reason::TokenUnknown);
        assert_eq!(refused(token.text(), now + hour), Reason::TokenExpired);

        Tokens::revoke(&path, &made.hash.id()).expect("done");
        access
            .authenticate(token.text(), now)
            .expect("not read yet");
        assert_eq!(words(&standing), "get");
        access.reload(false, now);
        assert_eq!(refused(token.text(), now), Reason::TokenRevoked);
        // What is under way with it learns that, too.
        assert_eq!(words(&standing), "nothing");

        let rights = Rights::parse(["put"]).expect("rights");
        let (token, _) = Tokens::add(&path, "bob", rights, Some(hour)).expect("made");
        access.reload(false, now);
        let (_, standing) = access.authenticate(token.text(), now).expect("in");
        access.reload(false, now + hour / 2);
        assert_eq!(words(&standing), "put");
        access.reload(false, now + hour * 2);
        assert_eq!(words(&standing), "nothing", "it expired");
    }

    #[test]
    fn rights_change_under_those_who_are_connected_and_broken_files_change_nothing() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("rights.toml");
        let write = |text: &str| file::replace(&path, text).expect("written");
        write("[rights]\n\"uid:4242\" = [\"get\"]");
        let access = Access::open(None, Some(&path)).expect("read");
        let own = rustix::process::geteuid().as_raw();
        let standings = [4242, 4243, 0, own].map(|uid| access.of_user(uid));
        let cert = access.of_certificate(&Principal::of_certificate("p"));
        let all = || standings.iter().map(|one| words(one)).collect::<Vec<_>>();
        let operator = Rights::of_an_operator().to_string();
        let user = Rights::of_a_user().to_string();
        assert_eq!(all(), ["get", &user, &operator, &operator]);
        assert_eq!(words(&cert), "nothing");

        write("[rights]\n\"uid:*\" = [\"put\"]\n\"cert:p\" = [\"call:a\"]\n\"uid:0\" = []");
        assert_eq!(all()[0], "get", "not read yet");
        let now = SystemTime::now();
        access.reload(false, now);
        assert_eq!(all(), ["put", "put", &operator, &operator]);
        assert_eq!(words(&cert), "call:a");
        for broken in ["[rights", "[rights]\n\"uid:1\" = [\"gets\"]"] {
            write(broken);
            access.reload(false, now);
            access.reload(true, now);
            assert_eq!(all()[0], "put");
        }
        std::fs::remove_file(&path).expect("removed");
        access.reload(false, now);
        assert_eq!(all()[0], "put");
        write("");
        access.reload(false, now);
        assert_eq!(all(), [&*user, &*user, &*operator, &*operator]);
    }

    #[test]
    fn groups_are_those_of_the_file() {
        let directory = tempfile::tempdir().expect("a directory");
        let [tokens, rights] = ["t", "r"].map(|name| directory.path().join(name));
        let (token, _) = Tokens::add(&tokens, "alice", Rights::none(), None).expect("made");
        let text = "[groups]\nlab = [\"token:alice\"]\n[rights]\n\"group:lab\" = [\"get\"]";
        file::replace(&rights, text).expect("written");
        let access = Access::open(Some(&tokens), Some(&rights)).expect("read");
        let (who, standing) = access
            .authenticate(token.text(), SystemTime::now())
            .expect("in");
        assert_eq!(words(&standing), "get");
        assert_eq!(access.groups_of(&who), ["lab"]);
        assert!(access.has_group("lab") && !access.has_group("other"));
        assert!(Access::open(Some(&directory.path().join("none")), None).is_err());
    }
}
