//! `limits`: what each principal may have of a host, and has.

use clap::{Args, Subcommand};
use serde_json::json;
use strait_client::wire::{AccountQuotas, QuotaList, QuotaSettings, Quotas, Setting, SettingWord};

use super::arguments::pair;
use super::connection::Connection;
use super::failure::Failure;
use super::output;

#[derive(Debug, Args)]
pub(super) struct LimitsArgs {
    #[command(subcommand)]
    change: Option<Change>,
    #[command(flatten)]
    pub(super) connection: Connection,
}

#[derive(Debug, Subcommand)]
enum Change {
    /// Change quotas until the host ends; to make a change permanent, put it in the settings (`quota.NAME`, `quota.of`).
    Set(SetArgs),
}

#[derive(Debug, Args)]
struct SetArgs {
    /// Whose quotas: a principal such as uid:1000, or `default` for all principals without quotas of their own.
    principal: String,
    #[arg(required = true, value_parser = pair, value_name = "NAME=VALUE", help = changes_help())]
    quotas: Vec<(String, String)>,
}

fn changes_help() -> String {
    format!(
        "NAME is one of {} (of one CPU); VALUE is a number (2GiB), `none` (as many as the host has) or `default`",
        Quotas::NAMES.join(", ")
    )
}

impl SetArgs {
    fn settings(&self) -> Result<QuotaSettings, Failure> {
        let mut settings = QuotaSettings::default();
        for (name, text) in &self.quotas {
            let setting = setting(text).ok_or_else(|| {
                Failure::usage(format!(
                    "{name}={text}: give a number, such as 100 or 2GiB, `none` or `default`"
                ))
            })?;
            if !settings.set(name, setting) {
                let names = Quotas::NAMES.join(", ");
                return Err(Failure::usage(format!(
                    "there is no quota `{name}`; quotas are {names}"
                )));
            }
        }
        Ok(settings)
    }
}

/// A quota as somebody types it; sizes with the units of 1024.
fn setting(text: &str) -> Option<Setting> {
    match text {
        "default" => return Some(Setting::Word(SettingWord::Default)),
        "none" => return Some(Setting::Word(SettingWord::None)),
        _ => {}
    }
    let units = [("KiB", 10), ("MiB", 20), ("GiB", 30), ("TiB", 40)];
    let (number, shift) = units
        .iter()
        .find_map(|(unit, shift)| Some((text.strip_suffix(unit)?, *shift)))
        .unwrap_or((text, 0));
    let number: u64 = number.trim_end().parse().ok()?;
    number.checked_mul(1 << shift).map(Setting::Limit)
}

pub(super) fn limits(args: &LimitsArgs) -> Result<(), Failure> {
    let changes = match &args.change {
        None => None,
        Some(Change::Set(set)) => Some((set.principal.as_str(), set.settings()?)),
    };
    let client = args.connection.client()?;
    let list = match changes {
        None => client.limits()?,
        Some(("default", settings)) => client.set_limits(None, settings)?,
        Some((principal, settings)) => client.set_limits(Some(principal), settings)?,
    };
    match args.connection.json {
        true => output::json(&json!({
            "host": list.host, "default": list.default, "accounts": list.accounts,
        })),
        false => output::text(&table(&list)),
    }
}

fn table(list: &QuotaList) -> String {
    let mut heading = vec!["PRINCIPAL"];
    let names: Vec<String> = Quotas::NAMES
        .iter()
        .map(|name| format!("{}>", name.to_uppercase()))
        .collect();
    heading.extend(names.iter().map(String::as_str));
    let limits = |whose: &str, quotas: &Quotas| {
        let mut row = vec![whose.to_owned()];
        row.extend(quotas.each().map(|(name, limit)| limit_text(name, limit)));
        row
    };
    let mut rows = vec![limits("host", &list.host), limits("default", &list.default)];
    rows.extend(list.accounts.iter().map(account));
    output::table(&heading, rows).to_string()
}

/// `used / limit` of each quota; what was set for it alone has a star.
fn account(account: &AccountQuotas) -> Vec<String> {
    let mut row = vec![account.principal.clone()];
    row.extend(account.each().map(|quota| {
        let star = if quota.is_own { "*" } else { "" };
        let used = number(quota.name, quota.used);
        format!("{used} / {}{star}", limit_text(quota.name, quota.limit))
    }));
    row
}

fn limit_text(name: &str, limit: Option<u64>) -> String {
    limit.map_or_else(|| "-".to_owned(), |limit| number(name, limit))
}

fn number(name: &str, number: u64) -> String {
    match name {
        "bytes" => indicatif::BinaryBytes(number).to_string(),
        _ => number.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotas_are_numbers_sizes_and_words() {
        for (text, expected) in [
            ("0", Some(Setting::Limit(0))),
            ("17", Some(Setting::Limit(17))),
            ("2GiB", Some(Setting::Limit(2 << 30))),
            ("64 KiB", Some(Setting::Limit(64 << 10))),
            ("none", Some(Setting::Word(SettingWord::None))),
            ("default", Some(Setting::Word(SettingWord::Default))),
            ("", None),
            ("-1", None),
            ("2GB", None),
            ("1.5GiB", None),
            ("16777216TiB", None),
        ] {
            assert_eq!(setting(text), expected, "{text}");
        }
    }
}
