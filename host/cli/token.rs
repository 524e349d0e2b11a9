//! `token`: the file of tokens by which clients are let in over TCP. Hosts that serve with it see what changes by themselves.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::failure::Failure;
use super::output;
use crate::access::{Entry, FileError, Rights, Tokens, is_name, time_text};

/// Lives that a token can have.
const LIFE_MIN: Duration = Duration::from_secs(1);
const LIFE_MAX: Duration = Duration::from_secs(100 * 366 * 86_400);

#[derive(Debug, Args)]
pub(super) struct TokenArgs {
    #[command(subcommand)]
    action: Action,
    /// The file of tokens: made if there is none, with mode 0600.
    #[arg(
        long,
        value_name = "FILE",
        global = true,
        env = "STRAIT__SERVER__TOKENS"
    )]
    tokens: Option<PathBuf>,
    /// One JSON object on stdout instead of text.
    #[arg(long, global = true)]
    pub(super) json: bool,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Make a token and print it, once: the file has only its hash.
    New(NewArgs),
    /// List tokens: whose, what they may do, until when.
    Ls,
    /// Revoke tokens.
    Rm(RmArgs),
}

#[derive(Debug, Args)]
struct NewArgs {
    /// Whom it is for: it acts as the principal token:NAME. Several tokens may have the same name.
    name: String,
    /// What it may do, separated by commas: put, get, call, call:PATTERN (of kernel or plugin/kernel), share, load, admin.
    #[arg(long, value_name = "RIGHTS", default_value = "put,get,call")]
    can: String,
    /// For how long, such as 12h, 30d or 1y [default: until it is revoked].
    #[arg(long, value_name = "TIME")]
    expires: Option<String>,
}

#[derive(Debug, Args)]
struct RmArgs {
    /// A name (all of its tokens) or the id of one token; `ls` shows both.
    #[arg(value_name = "NAME|ID", required = true)]
    which: Vec<String>,
}

pub(super) fn token(args: &TokenArgs) -> Result<(), Failure> {
    let path = args.tokens.as_deref().ok_or_else(|| {
        Failure::usage("say which file of tokens: --tokens FILE, the one that `strait serve` gets")
    })?;
    match &args.action {
        Action::New(new) => {
            let (token, entry) = Tokens::add(path, new.name()?, new.rights()?, new.life()?)?;
            match args.json {
                true => {
                    let mut told = to_json(&entry);
                    told["token"] = token.text().into();
                    output::json(&told)
                }
                false => output::text(token.text()),
            }
        }
        Action::Ls => {
            let (tokens, _) = Tokens::read(path)?;
            match args.json {
                true => {
                    let entries = tokens.entries().iter().map(to_json);
                    output::json(&json!({ "tokens": entries.collect::<Vec<_>>() }))
                }
                false => output::text(&table(tokens.entries())),
            }
        }
        Action::Rm(rm) => {
            let mut revoked = Vec::new();
            for which in &rm.which {
                let found = Tokens::revoke(path, which)?;
                if found.is_empty() {
                    return Err(Failure::input(
                        "TOKEN_UNKNOWN",
                        format!(
                            "{} has no token of the name or id `{which}` that is still good; `strait token ls` shows them",
                            path.display()
                        ),
                    ));
                }
                revoked.extend(found);
            }
            match args.json {
                true => {
                    let entries = revoked.iter().map(to_json);
                    output::json(&json!({ "revoked": entries.collect::<Vec<_>>() }))
                }
                false => Ok(()),
            }
        }
    }
}

impl NewArgs {
    fn name(&self) -> Result<&str, Failure> {
        match is_name(&self.name) {
            true => Ok(&self.name),
            false => Err(Failure::usage(format!(
                "`{}` cannot be the name of a token; it has 1 to 64 characters from A-Z a-z 0-9 . _ @ -",
                crate::text::name(&self.name)
            ))),
        }
    }

    fn rights(&self) -> Result<Rights, Failure> {
        let words = self.can.split(',').map(str::trim);
        Rights::parse(words).map_err(|what| Failure::usage(format!("--can: {what}")))
    }

    fn life(&self) -> Result<Option<Duration>, Failure> {
        let Some(text) = &self.expires else {
            return Ok(None);
        };
        match humantime::parse_duration(text) {
            Ok(life) if (LIFE_MIN..=LIFE_MAX).contains(&life) => Ok(Some(life)),
            Ok(_) => Err(Failure::usage(format!(
                "--expires {text}: it must be from 1s to 100y"
            ))),
            Err(error) => Err(Failure::usage(format!(
                "--expires {text}: {error}; give a time such as 12h, 30d or 1y"
            ))),
        }
    }
}

impl From<FileError> for Failure {
    fn from(error: FileError) -> Self {
        let reason = match &error {
            FileError::System { .. } => "FILE",
            FileError::Unsafe { .. } | FileError::Content { .. } => "BAD_SETTING",
        };
        Self::input(reason, error.to_string())
    }
}

fn state(entry: &Entry, now: SystemTime) -> &'static str {
    match entry {
        _ if entry.revoked.is_some() => "revoked",
        _ if entry.is_expired(now) => "expired",
        _ => "good",
    }
}

fn to_json(entry: &Entry) -> Value {
    json!({
        "id": entry.hash.id(),
        "name": entry.name,
        "principal": format!("token:{}", entry.name),
        "can": entry.rights.words(),
        "created": time_text(entry.created),
        "expires": entry.expires.map(time_text),
        "revoked": entry.revoked.map(time_text),
        "state": state(entry, SystemTime::now()),
    })
}

fn table(entries: &[Entry]) -> String {
    let heading = ["NAME", "ID", "CAN", "EXPIRES", "STATE"];
    let now = SystemTime::now();
    let rows = entries.iter().map(|entry| {
        vec![
            entry.name.clone(),
            entry.hash.id(),
            entry.rights.to_string(),
            entry.expires.map_or_else(|| "-".to_owned(), time_text),
            state(entry, now).to_owned(),
        ]
    });
    output::table(&heading, rows).to_string()
}
