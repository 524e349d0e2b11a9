//! Plugins whose kernels cost too many worker processes are out of service, for those whom they cost them.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use strait_protocol as wire;

use super::Caller;
use crate::engine::Failed;
use crate::error::{Code, Reason, Status};
use crate::plugin::{Plugin, PluginHash, hex};
use crate::text;

/// Longest text of a last error that is kept, in bytes.
const LAST_BYTES_MAX: usize = 512;

/// Most that a plugin's incidents may take of a reply, in bytes of JSON: its kernels' names need the rest.
const INCIDENTS_BYTES_MAX: usize = 16 << 10;

/// Who calls, by the number of the account, and what.
type Whose = (u64, PluginHash);

/// Of a host that runs kernels in worker processes.
#[derive(Debug)]
pub(super) struct Quarantine {
    /// So many within `window`; 0: never.
    strikes: usize,
    window: Duration,
    records: Mutex<HashMap<Whose, Record>>,
}

#[derive(Debug, Default)]
struct Record {
    /// The latest of them, no more than it takes.
    at: VecDeque<Instant>,
    last: String,
    out_since: Option<Instant>,
}

impl Record {
    fn forget_before(&mut self, begin: Option<Instant>) {
        while self.out_since.is_none()
            && self.at.front().copied() < begin
            && self.at.pop_front().is_some()
        {}
    }
}

impl Quarantine {
    pub(super) fn new(strikes: usize, window: Duration) -> Self {
        Self {
            strikes,
            window,
            records: Mutex::default(),
        }
    }

    /// # Errors
    /// `PLUGIN_OUT_OF_SERVICE`.
    fn check(&self, account: u64, plugin: &Plugin) -> Result<(), Status> {
        let records = self.records.lock();
        let record = records.get(&(account, plugin.hash));
        let out = record.and_then(|record| Some((record, record.out_since?)));
        let Some((record, since)) = out else {
            return Ok(());
        };
        let name = &plugin.description.name;
        Err(Status::new(
            Code::FailedPrecondition,
            Reason::PluginOutOfService,
            format!(
                "plugin `{name}` has been out of service for you for {} s: its kernels ended {} worker processes within {} s, the last time: {}; an operator of the host puts it back by `strait plugins enable {name}`",
                since.elapsed().as_secs(),
                record.at.len(),
                self.window.as_secs(),
                record.last
            ),
        ))
    }

    /// A call of `plugin` took a worker process with it. True if that was one too many.
    fn strike(&self, account: u64, plugin: &Plugin, why: &Failed) -> bool {
        if self.strikes == 0 {
            return false;
        }
        let now = Instant::now();
        let mut records = self.records.lock();
        let record = records.entry((account, plugin.hash)).or_default();
        record.forget_before(now.checked_sub(self.window));
        record.at.push_back(now);
        record.last = text::one_line(why.to_string(), LAST_BYTES_MAX);
        let out = record.at.len() >= self.strikes && record.out_since.is_none();
        if out {
            record.out_since = Some(now);
        }
        // Calls that were under way already may cost more.
        while record.at.len() > self.strikes {
            record.at.pop_front();
        }
        out
    }

    fn enable(&self, plugin: &PluginHash, account: Option<u64>) {
        let mut records = self.records.lock();
        records
            .retain(|(whose, hash), _| hash != plugin || account.is_some_and(|one| one != *whose));
    }

    /// Account, how often, the last error, and for how long it is out of service.
    fn incidents(&self, plugin: &PluginHash) -> Vec<(u64, usize, String, Option<Duration>)> {
        let begin = Instant::now().checked_sub(self.window);
        let mut records = self.records.lock();
        records
            .iter_mut()
            .for_each(|(_, record)| record.forget_before(begin));
        records.retain(|_, record| !record.at.is_empty());
        let of_plugin = records.iter().filter(|((_, hash), _)| hash == plugin);
        let mut all: Vec<_> = of_plugin
            .map(|((account, _), record)| {
                let out = record.out_since.map(|since| since.elapsed());
                (*account, record.at.len(), record.last.clone(), out)
            })
            .collect();
        all.sort_by_key(|(account, ..)| *account);
        all
    }
}

impl Caller {
    /// # Errors
    /// `PLUGIN_OUT_OF_SERVICE`.
    pub(super) fn check_in_service(&self, plugin: &Plugin) -> Result<(), Status> {
        self.host.quarantine.check(self.account.number(), plugin)
    }

    /// Notes what a call of `plugin` cost, if it did.
    pub(super) fn note_cost(&self, plugin: &Plugin, failed: &Failed) {
        if failed.took_process
            && self
                .host
                .quarantine
                .strike(self.account.number(), plugin, failed)
        {
            tracing::error!(
                plugin = plugin.description.name,
                principal = %self.principal(),
                "a plugin is out of service: its kernels cost too many worker processes"
            );
        }
    }

    /// The plugins that are loaded, those after the name `after`, with what they cost: everybody for an operator, the caller
    /// for anybody else.
    pub fn plugins(&self, after: Option<&str>) -> Vec<wire::Plugin> {
        let own = self.account.number();
        let incidents = |plugin: &Plugin| {
            let all = self.host.quarantine.incidents(&plugin.hash).into_iter();
            let seen = all.filter(|(account, ..)| self.is_operator() || *account == own);
            told(seen.filter_map(|(account, count, last, out)| {
                Some(wire::Incidents {
                    principal: self.host.accounts.principal(account)?,
                    count: count as u64,
                    last,
                    out_ms: out.map(|out| u64::try_from(out.as_millis()).unwrap_or(u64::MAX)),
                })
            }))
        };
        let loaded = self.host.plugins.all().into_iter();
        let asked = loaded.filter(|plugin| Some(plugin.description.name.as_str()) > after);
        asked
            .map(|plugin| wire::Plugin {
                name: plugin.description.name.clone(),
                sha256: hex(&plugin.hash),
                kernels: plugin
                    .description
                    .kernels
                    .iter()
                    .map(|kernel| kernel.name.clone())
                    .collect(),
                incidents: incidents(&plugin),
            })
            .collect()
    }

    /// Puts a plugin back into service, for `principal` or for everybody.
    ///
    /// # Errors
    /// `NO_RIGHT`; `BAD_REQUEST` for a plugin that is not loaded or a principal that never came.
    pub fn enable_plugin(&self, plugin: &str, principal: Option<&str>) -> Result<(), Status> {
        self.check_admin("put a plugin back into service")?;
        let unknown = |what: String| Status::new(Code::InvalidArgument, Reason::BadRequest, what);
        let loaded = self.host.plugins.all();
        let mut loaded = loaded.iter().filter(|one| one.description.name == plugin);
        let found = loaded.next().ok_or_else(|| {
            unknown(format!("there is no plugin `{plugin}`; PLUGINS (`strait plugins`) lists those that there are"))
        })?;
        let account = principal
            .map(|principal| {
                self.host.accounts.number(principal).ok_or_else(|| {
                    unknown(format!(
                        "`{principal}` never called this host; a principal looks like `uid:1000`"
                    ))
                })
            })
            .transpose()?;
        self.host.quarantine.enable(&found.hash, account);
        tracing::info!(by = %self.principal(), plugin, of = principal.unwrap_or("everybody"), "a plugin is in service again");
        Ok(())
    }
}

/// As many incidents of a plugin as a reply has room for: first those that keep it out of service, the latest before the others.
fn told(all: impl Iterator<Item = wire::Incidents>) -> Vec<wire::Incidents> {
    let mut all: Vec<_> = all.collect();
    all.sort_by_key(|incidents| incidents.out_ms.unwrap_or(u64::MAX));
    let mut bytes = 0;
    let fits = |incidents: &wire::Incidents| {
        bytes += serde_json::to_vec(incidents).map_or(0, |json| json.len() + 1);
        bytes <= INCIDENTS_BYTES_MAX
    };
    all.into_iter().take_while(fits).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_of_many_principals_fits_a_reply() {
        let incidents = |of: u64| wire::Incidents {
            principal: format!("uid:{of}"),
            count: 3,
            last: "\"".repeat(LAST_BYTES_MAX),
            out_ms: of.is_multiple_of(2).then_some(of),
        };
        let few = told((0..4).map(incidents));
        let whose: Vec<_> = few.iter().map(|one| one.principal.as_str()).collect();
        assert_eq!(whose, ["uid:0", "uid:2", "uid:1", "uid:3"]);
        let many = told((0..1000).rev().map(incidents));
        let bytes = serde_json::to_vec(&many).expect("JSON").len();
        assert!(
            !many.is_empty() && bytes <= INCIDENTS_BYTES_MAX + 2,
            "{bytes}"
        );
        assert_eq!(many[0].principal, "uid:0", "the latest first");
    }

    #[test]
    fn only_as_many_within_the_window_count() {
        let minute = Duration::from_secs(60);
        let now = Instant::now();
        let mut record = Record::default();
        record.at.extend([now, now + minute, now + 2 * minute]);
        record.forget_before(Some(now + minute));
        assert_eq!(record.at.len(), 2);
        record.out_since = Some(now);
        record.forget_before(Some(now + 9 * minute));
        assert_eq!(record.at.len(), 2, "what put it out of service is kept");
        record.out_since = None;
        record.forget_before(Some(now + 9 * minute));
        assert!(record.at.is_empty());
        record.forget_before(Some(now));
    }
}
