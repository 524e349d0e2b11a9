//! The file of rights, which people write: who may do what, and which groups there are.
//!
//! ```toml
//! [groups]
//! lab = ["uid:1000", "token:alice", "cert:pipeline"]
//!
//! [rights]
//! "uid:1000" = ["put", "get", "call:scale-*"]
//! "group:lab" = ["get", "share"]
//! "uid:*" = ["get"]          # users of this machine who are not named
//! "cert:*" = []              # holders of a certificate who are not named
//! ```
//! Somebody has the rights of its own line and of its groups' lines together.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::Deserialize;

use super::file::{self, FileError, Stamp};
use super::rights::Rights;
use super::tokens::is_name;

/// Most lines of each table.
const LINES_MAX: usize = 65_536;
/// Longest name of a certificate in bytes.
const CERTIFICATE_BYTES_MAX: usize = 64;

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Lines {
    groups: BTreeMap<String, BTreeSet<String>>,
    rights: BTreeMap<String, Vec<String>>,
}

/// What is in such a file.
#[derive(Clone, Debug, Default)]
pub(super) struct Grants {
    /// Name to members.
    groups: BTreeMap<String, BTreeSet<String>>,
    /// By principal, group or kind.
    rights: BTreeMap<String, Rights>,
}

/// Whether a certificate's common name can name somebody.
#[must_use]
pub fn is_certificate_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= CERTIFICATE_BYTES_MAX
        && name != "*"
        && !name.contains(['/', ','])
        && !name.chars().any(crate::text::is_obeyed)
}

/// Whether that is how a principal is written.
#[must_use]
pub fn is_principal(text: &str) -> bool {
    match text.split_once(':') {
        Some(("uid", uid)) => uid.parse::<u32>().is_ok_and(|n| n.to_string() == uid),
        Some(("token", name)) => is_name(name),
        Some(("cert", name)) => is_certificate_name(name),
        _ => false,
    }
}

impl Grants {
    /// What is in a file, and its version.
    ///
    /// # Errors
    /// [`FileError`].
    pub(super) fn read(path: &Path) -> Result<(Self, Stamp), FileError> {
        let (text, stamp) = file::read(path)?;
        let grants = Self::parse(&text).map_err(|what| FileError::Content {
            path: path.to_owned(),
            what,
        })?;
        Ok((grants, stamp))
    }

    fn parse(text: &str) -> Result<Self, String> {
        let lines: Lines = toml::from_str(text).map_err(|error| error.message().to_owned())?;
        if lines.groups.len() > LINES_MAX || lines.rights.len() > LINES_MAX {
            return Err(format!("more than {LINES_MAX} lines of a table"));
        }
        let shown = crate::text::name;
        for (name, members) in &lines.groups {
            if !is_name(name) {
                return Err(format!("`{}` cannot be the name of a group", shown(name)));
            }
            if let Some(wrong) = members.iter().find(|member| !is_principal(member)) {
                return Err(format!(
                    "`{}` in group `{name}` is not somebody such as uid:1000, token:alice or cert:pipeline",
                    shown(wrong)
                ));
            }
        }
        let mut rights = BTreeMap::new();
        for (who, words) in lines.rights {
            let is_known = match who.split_once(':') {
                Some(("uid" | "cert", "*")) => true,
                Some(("token", _)) => {
                    return Err(format!(
                        "the rights of `{}` are in the file of tokens: make another one with `strait token new`, or put its name into a group",
                        shown(&who)
                    ));
                }
                Some(("group", group)) => lines.groups.contains_key(group),
                _ => is_principal(&who),
            };
            if !is_known {
                return Err(format!(
                    "`{}` is neither a user (uid:1000), a certificate's name (cert:pipeline), a group of this file (group:lab), uid:* nor cert:*",
                    shown(&who)
                ));
            }
            let read = Rights::parse(words.iter().map(String::as_str))
                .map_err(|what| format!("rights of `{}`: {what}", shown(&who)))?;
            rights.insert(who, read);
        }
        Ok(Self {
            groups: lines.groups,
            rights,
        })
    }

    /// Adds to `rights` what the lines of that principal and its groups allow; answers whether there are any.
    pub(super) fn add_to(&self, rights: &mut Rights, principal: &str) -> bool {
        let own = self.rights.get(principal).into_iter();
        let groups = self.groups_of(principal);
        let groups = groups.filter_map(|group| self.rights.get(&format!("group:{group}")));
        let mut any = false;
        for more in own.chain(groups) {
            rights.add(more);
            any = true;
        }
        any
    }

    /// The line for those of a kind who have none: `uid:*` or `cert:*`.
    pub(super) fn of_kind(&self, kind: &str) -> Option<&Rights> {
        self.rights.get(kind)
    }

    /// The names of the groups that somebody is in.
    pub(super) fn groups_of(&self, principal: &str) -> impl Iterator<Item = &str> {
        let groups = self.groups.iter();
        groups
            .filter(move |(_, members)| members.contains(principal))
            .map(|(name, _)| name.as_str())
    }

    /// Whether there is a group of that name.
    pub(super) fn has_group(&self, name: &str) -> bool {
        self.groups.contains_key(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_lines_and_those_of_groups_count_together() {
        let grants = Grants::parse(
            r#"
            [groups]
            lab = ["uid:1000", "token:alice"]
            all = ["uid:1000"]
            [rights]
            "uid:1000" = ["put"]
            "group:lab" = ["get", "call:scale-*"]
            "cert:a b" = ["share"]
            "uid:*" = ["get"]
            "#,
        )
        .expect("grants");
        let of = |principal| {
            let mut rights = Rights::none();
            grants
                .add_to(&mut rights, principal)
                .then(|| rights.to_string())
        };
        assert_eq!(of("uid:1000").as_deref(), Some("put,get,call:scale-*"));
        assert_eq!(of("token:alice").as_deref(), Some("get,call:scale-*"));
        assert_eq!(of("cert:a b").as_deref(), Some("share"));
        assert_eq!(of("uid:7"), None);
        assert_eq!(
            grants.of_kind("uid:*").map(Rights::to_string).as_deref(),
            Some("get")
        );
        assert!(grants.of_kind("cert:*").is_none());
        assert_eq!(
            grants.groups_of("uid:1000").collect::<Vec<_>>(),
            ["all", "lab"]
        );
        assert!(grants.has_group("lab") && !grants.has_group("other"));
    }

    #[test]
    fn wrong_files_are_told_what_is_wrong() {
        for (text, says) in [
            ("[rights]\n\"token:alice\" = [\"get\"]", "strait token new"),
            ("[rights]\n\"group:lab\" = [\"get\"]", "group:lab"),
            ("[rights]\n\"uid:01\" = []", "uid:01"),
            ("[rights]\n\"alice\" = []", "alice"),
            ("[rights]\n\"cert:a/b\" = []", "cert:a/b"),
            ("[rights]\n\"uid:7\" = [\"gets\"]", "gets"),
            ("[rights]\n\"uid:7\" = \"get\"", "sequence"),
            ("[groups]\nlab = [\"alice\"]", "alice"),
            ("[groups]\n\"l b\" = []", "l b"),
            ("[right]", "right"),
            ("[rights", "unclosed"),
        ] {
            let error = Grants::parse(text).expect_err(text);
            assert!(error.contains(says), "{text}: {error}");
        }
    }
}
