//! The counts of STATS, and WORKERS.

use std::sync::atomic::Ordering;

use strait_protocol as wire;

use super::{Caller, Host};
use crate::engine::{Owner, RunnerCounts};
use crate::lease::SessionId;

impl Caller {
    /// The processes that run kernels, those after the number `after`: everybody's for an operator, the principal's own
    /// for anybody else.
    pub fn worker_processes(&self, after: Option<u64>) -> Vec<wire::Worker> {
        let own = Owner(self.account.number());
        let processes = self.host.runner.processes().into_iter();
        let seen = processes.filter(|process| {
            (self.is_operator() || process.owner == Some(own)) && Some(process.number) > after
        });
        let name = |owner: Owner| self.host.accounts.principal(owner.0);
        seen.map(|process| wire::Worker {
            number: process.number,
            pid: process.pid,
            principal: process.owner.and_then(name),
            running: process.running,
            runs: process.runs,
            age_ms: u64::try_from(process.age.as_millis()).unwrap_or(u64::MAX),
            walls: process.walls.into_iter().map(str::to_owned).collect(),
            lacks: process.lacks,
        })
        .collect()
    }

    /// What there is of it, and of the session that it asks on; everything for an operator.
    pub fn stats(&self, session: SessionId) -> wire::Stats {
        self.host.stats_for(Some((session, self)))
    }
}

impl Host {
    /// Everything, for this process itself.
    pub fn stats(&self) -> wire::Stats {
        self.stats_for(None)
    }

    fn stats_for(&self, asking: Option<(SessionId, &Caller)>) -> wire::Stats {
        let (session, caller) = asking.map_or((0, None), |(id, caller)| (id, Some(caller)));
        let principal = caller.map(Caller::principal);
        let account = caller.map(|caller| caller.account().stats());
        let ran = self.runner.counts();
        let host = caller
            .is_none_or(Caller::is_operator)
            .then(|| self.host_stats(&ran));
        let (leases, own_leases) = self.leases.count(session);
        let (segments, segment_bytes) = self
            .leases
            .count_segments(principal.filter(|_| host.is_none()));
        let flights = self.count_flights(principal);
        let everybody = wire::Stats {
            host,
            segments: segments as u64,
            segment_bytes,
            flights: flights as u64,
            leases: leases as u64,
            sessions: self.sessions.load(Ordering::Relaxed),
            invocations: ran.invocations,
            running: ran.running,
            account,
            channels: caller.map_or_else(Vec::new, |caller| {
                self.channels.stats(caller.account().number())
            }),
            own: wire::OwnStats {
                leases: own_leases as u64,
                segments: self.leases.count_own_segments(session) as u64,
            },
            request_id: String::new(),
        };
        match account.filter(|_| everybody.host.is_none()) {
            None => everybody,
            Some(account) => wire::Stats {
                leases: account.leases,
                sessions: account.sessions,
                invocations: account.invocations,
                running: account.running,
                ..everybody
            },
        }
    }

    fn host_stats(&self, ran: &RunnerCounts) -> wire::HostStats {
        // Without /proc there are no figures; the rest still counts.
        let process = strait_memory::process::counts().unwrap_or_default();
        let copied = [
            ("guest_in", ran.copied_in),
            ("guest_out", ran.copied_out),
            ("flight_in", self.uploads_copied.get()),
            ("flight_out", self.inline_copied.get()),
            ("frame_in", self.framed.inputs.get()),
            ("frame_out", self.framed.results.get()),
        ];
        let pool = self.pool.stats();
        let (lot, births) = (ran.parked, ran.births);
        wire::HostStats {
            process: wire::ProcessStats {
                fds: process.fds,
                mappings: process.mappings,
                threads: process.threads,
                minor_faults: process.minor_faults,
                resident_bytes: process.resident_bytes,
            },
            budget_bytes: self.budget.limit(),
            budget_used_bytes: self.budget.used(),
            copied_bytes: copied.iter().map(|(_, bytes)| bytes).sum(),
            copied: copied
                .into_iter()
                .map(|(place, bytes)| (place.to_owned(), bytes))
                .collect(),
            slices: ran.slices,
            huge: wire::HugeStats {
                asked_bytes: pool.huge_asked_bytes + births.0 + self.births.asked_bytes(),
                huge_bytes: pool.huge_bytes + births.1 + self.births.huge_bytes(),
            },
            pool: wire::PoolStats {
                segments: pool.segments,
                bytes: pool.bytes,
                idle_segments: pool.idle_segments,
                idle_bytes: pool.idle_bytes,
            },
            parked: wire::ParkedStats {
                mappings: lot.mappings,
                idle_mappings: lot.idle_mappings,
                idle_bytes: lot.idle_bytes,
            },
            workers: wire::WorkerStats {
                processes: ran.processes.0,
                started: ran.processes.1,
                lost: ran.processes.2,
                fds: ran.process_fds,
            },
            accounts: self.accounts.count(),
        }
    }
}
