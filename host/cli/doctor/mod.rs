//! `doctor`: what this machine lacks for a host, and what to change.
//!
//! ```text
//! doctor ─▶ linux     features, each tried and not read off a version
//!        ├▶ limits    limits of processes, users and the machine, memory
//!        ├▶ cpu       what compiled kernels need
//!        ├▶ users     whose process this is, and who else has that uid
//!        ├▶ places    the runtime directory, a host in it, the cache
//!        └▶ speed     from which size on moving a tensor beats copying it
//! text: what /proc and /sys say, as values
//! ```
//!
//! Each judgement is a function of plain values, apart from what gathers them. Nothing is created
//! that outlives the command.

mod cpu;
mod limits;
mod linux;
mod places;
mod speed;
mod text;
mod users;

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::failure::Failure;
use super::hosting;
use super::output::{self, Colour};
use super::progress::Progress;

#[derive(Debug, Args)]
pub(super) struct DoctorArgs {
    /// The settings of the host that is to run here, as for `serve`.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The host's directory, as for `serve`.
    #[arg(long, value_name = "DIR")]
    directory: Option<PathBuf>,
    /// Say why each check matters, not only for those that ask for a change.
    #[arg(long)]
    why: bool,
    /// One JSON object on stdout instead of text.
    #[arg(long)]
    pub(super) json: bool,
}

/// What a check came to. The order is that of urgency.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    /// As it should be.
    Ok,
    /// Good to know; nothing to do.
    Info,
    /// A host runs, with less than it could have.
    Warn,
    /// A host does not run, or fails in ordinary use.
    Fail,
}

impl Status {
    fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Info => "info",
            Self::Warn => "warn",
            Self::Fail => "fail",
        }
    }

    fn colour(self) -> Option<Colour> {
        match self {
            Self::Ok => Some(Colour::Green),
            Self::Info => None,
            Self::Warn => Some(Colour::Yellow),
            Self::Fail => Some(Colour::Red),
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Check {
    group: &'static str,
    name: &'static str,
    status: Status,
    /// What was found.
    found: String,
    /// Why it matters.
    why: &'static str,
    /// What to do; none if nothing.
    change: Option<String>,
}

/// What is looked at: a place in the report and the reason for it.
#[derive(Clone, Copy, Debug)]
struct Subject {
    group: &'static str,
    name: &'static str,
    why: &'static str,
}

impl Subject {
    const fn new(group: &'static str, name: &'static str, why: &'static str) -> Self {
        Self { group, name, why }
    }

    fn check(self, status: Status, found: impl Into<String>) -> Check {
        Check {
            group: self.group,
            name: self.name,
            status,
            found: found.into(),
            why: self.why,
            change: None,
        }
    }

    fn ok(self, found: impl Into<String>) -> Check {
        self.check(Status::Ok, found)
    }

    fn info(self, found: impl Into<String>) -> Check {
        self.check(Status::Info, found)
    }

    fn warn(self, found: impl Into<String>, change: impl Into<String>) -> Check {
        Check {
            change: Some(change.into()),
            ..self.check(Status::Warn, found)
        }
    }

    fn fail(self, found: impl Into<String>, change: impl Into<String>) -> Check {
        Check {
            change: Some(change.into()),
            ..self.check(Status::Fail, found)
        }
    }
}

/// The whole answer; its JSON form is in docs/operations.md.
#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    kernel: String,
    uid: u32,
    status: Status,
    checks: Vec<Check>,
    copy_and_move: Vec<speed::Row>,
}

pub(super) fn doctor(args: &DoctorArgs) -> Result<(), Failure> {
    let config = hosting::settings(args.config.as_deref())?;
    let progress = Progress::waiting("trying what this machine can do");
    let mut checks = limits::checks(&config);
    // A memfd above the limit of file sizes is not an error but a signal that ends the process.
    let mut copy_and_move = Vec::new();
    if limits::files_can_have(speed::BYTES_MAX) {
        checks.extend(linux::checks());
        checks.push(linux::walls(&config));
        let (check, rows) = speed::check(config.engine.move_min_bytes);
        checks.push(check);
        copy_and_move = rows;
    }
    checks.extend(cpu::checks());
    checks.extend(users::checks());
    checks.extend(places::checks(&config, args.directory.as_deref()));
    drop(progress);
    let report = Report::new(checks, copy_and_move);
    if args.json {
        output::json(&report)?;
    } else {
        output::labelled(&report.lines(args.why))?;
    }
    report.outcome()
}

impl Report {
    fn new(mut checks: Vec<Check>, copy_and_move: Vec<speed::Row>) -> Self {
        const GROUPS: [&str; 6] = ["linux", "limits", "cpu", "users", "places", "speed"];
        checks.sort_by_key(|check| GROUPS.iter().position(|group| *group == check.group));
        let worst = checks.iter().map(|check| check.status).max();
        Self {
            version: env!("CARGO_PKG_VERSION"),
            kernel: text::read("/proc/sys/kernel/osrelease").trim().to_owned(),
            uid: rustix::process::geteuid().as_raw(),
            status: worst
                .filter(|worst| *worst > Status::Info)
                .unwrap_or(Status::Ok),
            checks,
            copy_and_move,
        }
    }

    fn lines(&self, why: bool) -> Vec<(Option<Colour>, String, String)> {
        let plain = |text: String| (None, String::new(), text);
        let width = self.checks.iter().map(|c| c.name.len()).max().unwrap_or(0);
        let mut lines = vec![plain(format!(
            "strait {} on Linux {}, as uid {}",
            self.version, self.kernel, self.uid
        ))];
        let mut group = "";
        for check in &self.checks {
            if check.group != group {
                group = check.group;
                lines.push(plain(String::new()));
                lines.push(plain(group.to_owned()));
            }
            lines.push((
                check.status.colour(),
                format!("  {:<4}", check.status.word()),
                format!("  {:<width$}  {}", check.name, check.found),
            ));
            if why || check.change.is_some() {
                lines.push(plain(format!("        why:    {}", check.why)));
            }
            if let Some(change) = &check.change {
                lines.push(plain(format!("        change: {change}")));
            }
        }
        lines.push(plain(String::new()));
        lines.push((self.status.colour(), self.summary(), String::new()));
        lines
    }

    fn named(&self, status: Status) -> Vec<&'static str> {
        self.checks
            .iter()
            .filter(|check| check.status == status)
            .map(|check| check.name)
            .collect()
    }

    fn summary(&self) -> String {
        let (failed, warned) = (self.named(Status::Fail), self.named(Status::Warn));
        let warnings = match warned.len() {
            0 => "no warnings".to_owned(),
            1 => "1 warning".to_owned(),
            count => format!("{count} warnings"),
        };
        if failed.is_empty() {
            format!("a host can run here; {warnings}")
        } else {
            format!("a host cannot run here: {}; {warnings}", failed.join(", "))
        }
    }

    /// Warnings are no failure: a host runs.
    fn outcome(&self) -> Result<(), Failure> {
        let failed = self.named(Status::Fail);
        if failed.is_empty() {
            return Ok(());
        }
        Err(Failure::unfit(format!(
            "a host cannot run here: {}; the report says what to change",
            failed.join(", ")
        ))
        .answered())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: Subject = Subject::new("limits", "open files", "each segment is one");
    const SECOND: Subject = Subject::new("linux", "seals", "they end writing");

    fn report(checks: Vec<Check>) -> Report {
        Report::new(checks, Vec::new())
    }

    #[test]
    fn the_worst_check_is_the_reports_status_and_only_a_failure_fails() {
        let (ok, info) = (FIRST.ok("1"), FIRST.info("2"));
        let (warn, fail) = (FIRST.warn("3", "more"), SECOND.fail("4", "newer"));
        for (checks, status, runs) in [
            (vec![ok.clone()], Status::Ok, true),
            (vec![ok.clone(), info.clone()], Status::Ok, true),
            (vec![warn.clone(), info.clone()], Status::Warn, true),
            (vec![ok, fail, warn], Status::Fail, false),
        ] {
            let report = report(checks);
            assert_eq!(report.status, status, "{report:?}");
            assert_eq!(report.outcome().is_ok(), runs, "{report:?}");
        }
    }

    #[test]
    fn a_person_reads_what_to_change_and_why() {
        let report = report(vec![
            FIRST.warn("64", "ulimit -n 65536"),
            SECOND.ok("there"),
        ]);
        let text = |why| {
            let lines = report.lines(why).into_iter();
            let lines: Vec<String> = lines.map(|(_, label, text)| label + &text).collect();
            lines.join("\n")
        };
        let short = text(false);
        assert!(
            short.contains(
                "\nlinux\n  ok    seals       there\n\nlimits\n  warn  open files  64\n        why:    each segment is one\n        change: ulimit -n 65536\n\na host can run here; 1 warning"
            ),
            "{short}"
        );
        assert!(!short.contains("they end writing"), "{short}");
        assert!(text(true).contains("why:    they end writing"));
    }

    #[test]
    fn a_failure_names_its_checks() {
        let report = report(vec![FIRST.fail("8", "more"), SECOND.fail("none", "newer")]);
        let failure = report.outcome().expect_err("two checks failed");
        assert!(
            failure.message().contains("seals, open files"),
            "{}",
            failure.message()
        );
    }
}
