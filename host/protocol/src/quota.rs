//! LIMITS: what each principal may have of a host.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What a quota is set to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Setting {
    /// At most so many.
    Limit(u64),
    /// One of the words.
    Word(SettingWord),
}

/// What a quota is set to, in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SettingWord {
    /// What is set for everybody; for everybody what the host was started with.
    Default,
    /// As many as the host has.
    None,
}

macro_rules! quotas {
    ($($(#[$doc:meta])* $name:ident = $default:expr,)*) => {
        /// What a principal may have. None: as many as the host has.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(default)]
        pub struct Quotas { $($(#[$doc])* pub $name: Option<u64>,)* }

        /// Changes of quotas; one that is not there stays.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub struct QuotaSettings {
            $(
                $(#[$doc])*
                #[serde(skip_serializing_if = "Option::is_none")]
                pub $name: Option<Setting>,
            )*
        }

        /// What a host is started with: what each principal may have. None: as many as the host has.
        #[derive(Clone, Debug, Serialize, Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub struct QuotaConfig {
            $(
                $(#[$doc])*
                pub $name: Option<u64>,
            )*
            /// What differs for one principal, such as `uid:1000`.
            pub of: BTreeMap<String, QuotaSettings>,
        }

        impl Default for QuotaConfig {
            fn default() -> Self {
                Self { $($name: $default,)* of: BTreeMap::new() }
            }
        }

        impl QuotaConfig {
            /// Of a principal for whom nothing else is set.
            #[must_use]
            pub fn quotas(&self) -> Quotas {
                Quotas { $($name: self.$name,)* }
            }
        }

        impl Quotas {
            /// The quotas' names.
            pub const NAMES: &[&'static str] = &[$(stringify!($name)),*];

            /// By name, in the order of [`Self::NAMES`].
            pub fn each(&self) -> impl Iterator<Item = (&'static str, Option<u64>)> {
                [$((stringify!($name), self.$name)),*].into_iter()
            }

            /// With `changes`; `default` is what that word in them stands for.
            #[must_use]
            pub fn changed(&self, changes: &QuotaSettings, default: &Self) -> Self {
                Self {
                    $($name: match changes.$name {
                        None => self.$name,
                        Some(Setting::Limit(limit)) => Some(limit),
                        Some(Setting::Word(SettingWord::None)) => None,
                        Some(Setting::Word(SettingWord::Default)) => default.$name,
                    },)*
                }
            }
        }

        impl QuotaSettings {
            /// Sets one by name. False if there is none of that name.
            pub fn set(&mut self, name: &str, setting: Setting) -> bool {
                match name {
                    $(stringify!($name) => self.$name = Some(setting),)*
                    _ => return false,
                }
                true
            }

            /// Takes over what `newer` sets; the default is forgotten.
            pub fn absorb(&mut self, newer: &Self) {
                let kept = |setting: &Setting| *setting != Setting::Word(SettingWord::Default);
                $(self.$name = newer.$name.or(self.$name).filter(kept);)*
            }
        }

        impl AccountQuotas {
            /// Each quota with what of it is in use, in the order of [`Quotas::NAMES`].
            pub fn each(&self) -> impl Iterator<Item = QuotaUse> {
                [$(QuotaUse {
                    name: stringify!($name),
                    limit: self.quotas.$name,
                    is_own: self.set.$name.is_some(),
                    used: self.stats.$name,
                }),*].into_iter()
            }
        }
    };
}

quotas! {
    /// Bytes of its segments, idle results among them.
    bytes = None,
    /// Its segments, idle results among them.
    segments = None,
    /// Its connections to all sockets, of 1024 in all.
    connections = Some(256),
    /// Its leases, on all of its connections.
    leases = Some(65_536),
    /// Its names: flights, and reads and uploads of some.
    names = Some(65_536),
    /// Descriptors that were sent to it and that it may not have received yet, of half the limit of open files in all.
    descriptors = Some(1024),
    /// Its inline reads and writes at a time over Flight.
    streams = Some(64),
    /// Its invocations that wait for a worker, of `engine.queue_len` in all; one may always wait.
    queued = Some(256),
    /// Its invocations that run at a time; one always may.
    running = None,
    /// CPU time of its invocations, in percent of one CPU, over a minute; what is more waits.
    cpu_percent = None,
}

/// What a principal has of a host, and had.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AccountStats {
    /// What it may have.
    pub quotas: Quotas,
    /// Bytes of its segments, idle results among them.
    pub bytes: u64,
    /// The most there were at a time.
    pub peak_bytes: u64,
    /// Its segments, idle results among them.
    pub segments: u64,
    /// Segments that did not fit its quota.
    pub refused: u64,
    /// Bytes that the host let go of and somebody still has open.
    pub elsewhere_bytes: u64,
    /// Segments that the host let go of and somebody still has open.
    pub elsewhere_segments: u64,
    /// Its connections, whatever was said on them.
    pub connections: u64,
    /// Connections that did not fit its quota.
    pub connections_refused: u64,
    /// Its connections to the data socket that said HELLO or may still.
    pub sessions: u64,
    /// Its inline reads and writes.
    pub streams: u64,
    /// Inline reads and writes that found no place in time.
    pub streams_refused: u64,
    /// Its leases.
    pub leases: u64,
    /// Leases that did not fit its quota.
    pub leases_refused: u64,
    /// Its names: flights, and reads and uploads that are to become some.
    pub names: u64,
    /// Names that did not fit what a principal may have.
    pub names_refused: u64,
    /// Descriptors that were sent to it and that it may not have received yet.
    pub descriptors: u64,
    /// Answers with descriptors that did not fit its quota.
    pub descriptors_refused: u64,
    /// Its invocations that have begun since the start.
    pub invocations: u64,
    /// Its invocations that wait for a worker.
    pub queued: u64,
    /// Its invocations that run.
    pub running: u64,
    /// Invocations that found no place in the queue.
    pub queue_refused: u64,
    /// CPU time of its invocations that have ended, in percent of one CPU: in about the last minute, and what was more
    /// than the quota before.
    pub cpu_percent: u64,
    /// Invocations that would have waited for that quota beyond their deadline.
    pub cpu_refused: u64,
    /// CPU time of its invocations that have ended.
    pub cpu_seconds: f64,
}

/// One quota of a principal and its use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuotaUse {
    /// The quota's name.
    pub name: &'static str,
    /// What the principal may have; none: as many as the host has.
    pub limit: Option<u64>,
    /// Whether that was set for it alone.
    pub is_own: bool,
    /// What it has.
    pub used: u64,
}

/// One principal in the answer to LIMITS.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AccountQuotas {
    /// Who.
    pub principal: String,
    /// What it may have.
    pub quotas: Quotas,
    /// What of that was set for it alone.
    pub set: QuotaSettings,
    /// What it has, and had.
    pub stats: AccountStats,
}

/// OK to LIMITS.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct QuotaList {
    /// What all principals together may have; running: the workers.
    pub host: Quotas,
    /// What a principal may have for whom nothing else is set.
    pub default: Quotas,
    /// All principals that ever connected or have quotas of their own, by name.
    pub accounts: Vec<AccountQuotas>,
    /// Ask again with `after`.
    pub more: bool,
    /// The request's id.
    pub request_id: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_numbers_and_words() {
        let settings: QuotaSettings =
            serde_json::from_str(r#"{"bytes": 7, "segments": "none", "leases": "default"}"#)
                .expect("settings");
        let before = Quotas {
            bytes: Some(1),
            segments: Some(2),
            leases: Some(3),
            streams: Some(4),
            ..Quotas::default()
        };
        let default = Quotas {
            leases: Some(9),
            ..Quotas::default()
        };
        let after = before.changed(&settings, &default);
        assert_eq!(
            (after.bytes, after.segments, after.leases, after.streams),
            (Some(7), None, Some(9), Some(4))
        );
        let mut kept = QuotaSettings::default();
        assert!(kept.set("leases", Setting::Limit(5)) && !kept.set("lease", Setting::Limit(5)));
        kept.absorb(&settings);
        assert_eq!(
            serde_json::to_string(&kept).expect("JSON"),
            r#"{"bytes":7,"segments":"none"}"#
        );
        for wrong in [r#"{"byte": 1}"#, r#"{"bytes": -1}"#, r#"{"bytes": "many"}"#] {
            assert!(
                serde_json::from_str::<QuotaSettings>(wrong).is_err(),
                "{wrong}"
            );
        }
    }

    #[test]
    fn what_is_used_has_the_names_of_the_quotas() {
        let mut account = AccountQuotas {
            principal: "uid:1".to_owned(),
            quotas: Quotas::default(),
            set: QuotaSettings::default(),
            stats: AccountStats {
                bytes: 1,
                segments: 2,
                connections: 3,
                leases: 4,
                descriptors: 5,
                streams: 6,
                queued: 7,
                running: 8,
                cpu_percent: 9,
                ..AccountStats::default()
            },
        };
        account.quotas.leases = Some(9);
        assert!(account.set.set("queued", Setting::Limit(1)));
        let json = serde_json::to_value(account.stats).expect("JSON");
        for (name, found) in Quotas::NAMES.iter().zip(account.each()) {
            assert_eq!(found.name, *name);
            assert_eq!(json[name], found.used, "{name}");
            assert_eq!(found.limit, (*name == "leases").then_some(9), "{name}");
            assert_eq!(found.is_own, *name == "queued", "{name}");
        }
        assert_eq!(account.each().count(), Quotas::NAMES.len());
    }
}
