//! The file of tokens: who each is for, what it may do, until when. `strait token` writes it, hosts read it.
//!
//! ```toml
//! [[token]]
//! name = "alice"
//! sha256 = "…"
//! can = ["put", "get", "call:scale-*"]
//! created = "2026-11-27T20:50:00Z"
//! expires = "2026-12-27T20:50:00Z"
//! ```
//! A name may have several tokens, so that a new one is in use before the old one is revoked. A revoked one stays in the file for
//! a while: whoever still sends it is told why it is refused.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::file::{self, FileError, Stamp, Turn};
use super::rights::Rights;
use super::token::{Token, TokenHash};

/// Longest name in bytes.
pub(super) const NAME_BYTES_MAX: usize = 64;
/// Most tokens of one file.
const TOKENS_MAX: usize = 65_536;
/// How long a token that is over stays in the file.
const KEPT: Duration = Duration::from_secs(90 * 86_400);
/// What stands at the top of the file.
const HEAD: &str =
    "# Written by `strait token`. It has the sha256 of each token, not the token.\n\n";

/// One token, as far as it is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Whom it is for: it acts as the principal `token:NAME`.
    pub name: String,
    /// Of the token.
    pub hash: TokenHash,
    /// What it may do.
    pub rights: Rights,
    /// When it was made.
    pub created: SystemTime,
    /// From then on it is refused.
    pub expires: Option<SystemTime>,
    /// When that was taken back.
    pub revoked: Option<SystemTime>,
}

impl Entry {
    /// Whether it has a time that is over.
    #[must_use]
    pub fn is_expired(&self, now: SystemTime) -> bool {
        self.expires.is_some_and(|expires| expires <= now)
    }

    /// Whether it may do anything at all.
    #[must_use]
    pub fn is_live(&self, now: SystemTime) -> bool {
        self.revoked.is_none() && !self.is_expired(now)
    }

    fn ended(&self) -> Option<SystemTime> {
        [self.revoked, self.expires].into_iter().flatten().min()
    }
}

/// An entry as it is written.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    name: String,
    sha256: String,
    can: Vec<String>,
    created: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    expires: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    revoked: Option<String>,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Lines {
    #[serde(default)]
    token: Vec<Line>,
}

/// Whether somebody can have that name.
#[must_use]
pub fn is_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= NAME_BYTES_MAX
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "._@-".contains(c))
}

/// A time as it is written in files and tables: in UTC, to the second.
#[must_use]
pub fn time_text(time: SystemTime) -> String {
    humantime::format_rfc3339_seconds(time).to_string()
}

fn time(what: &str, text: &str) -> Result<SystemTime, String> {
    humantime::parse_rfc3339(text).map_err(|error| {
        format!("{what} = {text:?} is no time such as 2026-11-27T20:50:00Z: {error}")
    })
}

impl Line {
    fn of(entry: &Entry) -> Self {
        Self {
            name: entry.name.clone(),
            sha256: entry.hash.hex(),
            can: entry.rights.words(),
            created: time_text(entry.created),
            expires: entry.expires.map(time_text),
            revoked: entry.revoked.map(time_text),
        }
    }

    fn entry(self) -> Result<Entry, String> {
        if !is_name(&self.name) {
            return Err(format!(
                "a name has 1 to {NAME_BYTES_MAX} characters from A-Z a-z 0-9 . _ @ -"
            ));
        }
        let rights = Rights::parse(self.can.iter().map(String::as_str))?;
        let optional = |what, text: Option<String>| text.map(|text| time(what, &text)).transpose();
        Ok(Entry {
            hash: TokenHash::from_hex(&self.sha256)
                .ok_or_else(|| "sha256 must be 64 hex digits".to_owned())?,
            rights,
            created: time("created", &self.created)?,
            expires: optional("expires", self.expires)?,
            revoked: optional("revoked", self.revoked)?,
            name: self.name,
        })
    }
}

/// All tokens of a file.
#[derive(Clone, Debug, Default)]
pub struct Tokens {
    entries: Vec<Entry>,
    /// By id.
    index: HashMap<String, usize>,
}

impl Tokens {
    fn of(entries: Vec<Entry>) -> Result<Self, String> {
        if entries.len() > TOKENS_MAX {
            return Err(format!("more than {TOKENS_MAX} tokens"));
        }
        let mut index = HashMap::with_capacity(entries.len());
        for (at, entry) in entries.iter().enumerate() {
            if index.insert(entry.hash.id(), at).is_some() {
                return Err(format!("the token {} is there twice", entry.hash.id()));
            }
        }
        Ok(Self { entries, index })
    }

    fn parse(text: &str) -> Result<Self, String> {
        let lines: Lines = toml::from_str(text).map_err(|error| error.message().to_owned())?;
        let entries = lines.token.into_iter().map(|line| {
            let name = crate::text::name(&line.name);
            line.entry()
                .map_err(|what| format!("token of `{name}`: {what}"))
        });
        Self::of(entries.collect::<Result<_, _>>()?)
    }

    /// What is in a file, and its version.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn read(path: &Path) -> Result<(Self, Stamp), FileError> {
        let (text, stamp) = file::read(path)?;
        let tokens = Self::parse(&text).map_err(|what| FileError::Content {
            path: path.to_owned(),
            what,
        })?;
        Ok((tokens, stamp))
    }

    /// Has `change` change what is in a file, which is made if there is none; answers what `change` does.
    ///
    /// # Errors
    /// [`FileError`]; then the file is as it was.
    pub fn change<T>(
        path: &Path,
        change: impl FnOnce(&mut Vec<Entry>) -> T,
    ) -> Result<T, FileError> {
        let _turn = Turn::wait(path)?;
        let mut entries = match Self::read(path) {
            Ok((tokens, _)) => tokens.entries,
            Err(error) if error.is_missing() => Vec::new(),
            Err(error) => return Err(error),
        };
        let now = SystemTime::now();
        entries.retain(|entry| entry.ended().is_none_or(|ended| ended + KEPT > now));
        let before = entries.clone();
        let answer = change(&mut entries);
        if entries == before {
            return Ok(answer);
        }
        let content = |what| FileError::Content {
            path: path.to_owned(),
            what,
        };
        let tokens = Self::of(entries).map_err(content)?;
        let lines = Lines {
            token: tokens.entries.iter().map(Line::of).collect(),
        };
        let text = toml::to_string(&lines).map_err(|error| content(error.to_string()))?;
        file::replace(path, &format!("{HEAD}{text}"))?;
        Ok(answer)
    }

    /// Makes a token and puts it into a file.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn add(
        path: &Path,
        name: &str,
        rights: Rights,
        life: Option<Duration>,
    ) -> Result<(Token, Entry), FileError> {
        let failed = |source| FileError::System {
            path: path.to_owned(),
            doing: "make a token for",
            source,
        };
        let token = Token::generate().map_err(failed)?;
        let hash = TokenHash::of(token.text())
            .ok_or_else(|| failed(std::io::Error::other("it is too long")))?;
        // As it is written: to the second.
        let now = SystemTime::UNIX_EPOCH
            + Duration::from_secs(
                SystemTime::now()
                    .duration_since(SystemTime::UNIX_EPOCH)
                    .unwrap_or_default()
                    .as_secs(),
            );
        let entry = Entry {
            name: name.to_owned(),
            hash,
            rights,
            created: now,
            expires: life.and_then(|life| now.checked_add(life)),
            revoked: None,
        };
        Self::change(path, |entries| entries.push(entry.clone()))?;
        Ok((token, entry))
    }

    /// Revokes the live tokens of that name or id in a file; answers which.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn revoke(path: &Path, which: &str) -> Result<Vec<Entry>, FileError> {
        let now = SystemTime::now();
        Self::change(path, |entries| {
            let mut revoked = Vec::new();
            for entry in entries {
                let is_meant = entry.name == which || entry.hash.id() == which;
                if is_meant && entry.is_live(now) {
                    entry.revoked = Some(now);
                    revoked.push(entry.clone());
                }
            }
            revoked
        })
    }

    /// The token that somebody sent.
    #[must_use]
    pub fn find(&self, hash: &TokenHash) -> Option<&Entry> {
        let entry = self.entries.get(*self.index.get(&hash.id())?)?;
        (entry.hash == *hash).then_some(entry)
    }

    /// All of them, the oldest first.
    #[must_use]
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_made_found_and_revoked() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("tokens.toml");
        let rights = Rights::parse(["get", "call:scale-*"]).expect("rights");
        let month = Duration::from_secs(30 * 86_400);
        let (token, made) = Tokens::add(&path, "alice", rights.clone(), Some(month)).expect("made");
        let (other, _) = Tokens::add(&path, "alice", rights, None).expect("made");
        let (tokens, _) = Tokens::read(&path).expect("read");
        let hash = |token: &Token| TokenHash::of(token.text()).expect("short");
        assert_eq!(tokens.find(&hash(&token)), Some(&made));
        assert!(
            tokens
                .find(&TokenHash::of("strait_guess").expect("short"))
                .is_none()
        );
        let now = SystemTime::now();
        assert!(made.is_live(now) && !made.is_live(now + month));
        let text = std::fs::read_to_string(&path).expect("text");
        assert!(!text.contains(token.text()) && text.contains(&made.hash.hex()));

        assert_eq!(Tokens::revoke(&path, "bob").expect("read").len(), 0);
        assert_eq!(
            Tokens::revoke(&path, &made.hash.id()).expect("done").len(),
            1
        );
        assert_eq!(Tokens::revoke(&path, "alice").expect("done").len(), 1);
        assert_eq!(Tokens::revoke(&path, "alice").expect("done").len(), 0);
        let (tokens, _) = Tokens::read(&path).expect("read");
        for token in [&token, &other] {
            let entry = tokens.find(&hash(token)).expect("known still");
            assert!(!entry.is_live(now));
        }
        // Long after that it is not.
        let old = |entries: &mut Vec<Entry>| {
            entries[0].revoked = Some(now - KEPT - Duration::from_secs(1));
        };
        Tokens::change(&path, old).expect("written");
        Tokens::add(&path, "bob", Rights::none(), None).expect("made");
        let (tokens, _) = Tokens::read(&path).expect("read");
        assert_eq!(tokens.entries().len(), 2);
        assert_eq!(
            std::fs::read_dir(directory.path()).expect("there").count(),
            1
        );
    }

    #[test]
    fn wrong_files_are_told_what_is_wrong() {
        let hash = "0".repeat(64);
        let line = |name: &str, more: &str| {
            format!(
                "[[token]]\nname = {name:?}\nsha256 = \"{hash}\"\ncan = [\"get\"]\ncreated = \"2026-11-27T20:50:00Z\"\n{more}"
            )
        };
        let twice = line("a", "") + &line("b", "");
        for (text, says) in [
            ("[[token]]\nname = 1", "string"),
            ("[[tokens]]", "tokens"),
            (&line("a/b", ""), "A-Z"),
            (&line("a", "expires = \"soon\""), "soon"),
            (&line("a", "other = 1"), "other"),
            (&line("a", "").replace("get", "gets"), "gets"),
            (&line("a", "").replace("00", "0"), "64 hex digits"),
            (&twice, "twice"),
        ] {
            let error = Tokens::parse(text).expect_err(text);
            assert!(error.contains(says), "{text}: {error}");
        }
        assert!(Tokens::parse("").expect("none").entries().is_empty());
    }
}
