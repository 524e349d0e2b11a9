//! What the demo measured, and what should not be.

use indicatif::BinaryBytes;
use serde_json::{Value, json};

use super::formula::Compared;
use super::roles::{Called, Checked, Filled, Inlined, KERNEL, Looped, Pages};
use crate::cli::output;

const NATIVE: &str = "the same loop in the producer's process over its own mapping of the pages that the kernel reads: \
     auto-vectorised Rust, one thread, no sandbox, everything warm, taking turns with the calls";

/// A call, its check and the native loop after it.
#[derive(Debug)]
pub(super) struct Round {
    pub(super) warm_up: bool,
    pub(super) called: Called,
    pub(super) checked: Checked,
    pub(super) looped: Looped,
}

/// All of it.
#[derive(Debug)]
pub(super) struct Report {
    bytes: u64,
    filled: Filled,
    pids: [u32; 3],
    rounds: Vec<Round>,
    /// Without the first, which warms up.
    inline: Vec<Inlined>,
    elements_checked: u64,
    problems: Vec<String>,
}

impl Report {
    pub(super) fn new(bytes: u64, filled: Filled, pids: [u32; 3]) -> Self {
        let bytes = bytes - bytes % size_of::<f64>() as u64;
        Self {
            bytes,
            filled,
            pids,
            rounds: Vec::new(),
            inline: Vec::new(),
            elements_checked: 0,
            problems: Vec::new(),
        }
    }

    /// Whether tensors of this size are moved into the guest, not copied.
    fn is_moved(&self) -> bool {
        self.bytes >= self.filled.move_min_bytes
    }

    pub(super) fn add(&mut self, round: Round) {
        let number = self.rounds.len() + 1;
        self.compared(&format!("call {number}"), &round.checked.compared);
        if let (Some(seen), true) = (round.called.guest, self.is_moved()) {
            let [x, y] = seen;
            for (what, guest, other) in [
                ("x", x, ("producer", self.filled.pages)),
                ("y", y, ("consumer", round.checked.pages)),
            ] {
                let (who, pages) = other;
                if pages != Some(guest) {
                    let pages = pages.map_or_else(|| "no memfd".to_owned(), shown);
                    let problem = format!(
                        "call {number}: the guest saw {} for {what}, the {who} {pages}",
                        shown(guest)
                    );
                    self.problems.push(problem);
                }
            }
        }
        if self.is_moved() && round.called.copied_bytes != 0 {
            self.problems.push(format!(
                "call {number}: {} bytes were copied",
                round.called.copied_bytes
            ));
        }
        self.rounds.push(round);
    }

    pub(super) fn add_inline(&mut self, warm_up: bool, inlined: Inlined) {
        self.compared("inline Flight", &inlined.compared);
        if !warm_up {
            self.inline.push(inlined);
        }
    }

    fn compared(&mut self, what: &str, compared: &Compared) {
        self.elements_checked += compared.elements;
        let elements = self.bytes / size_of::<f64>() as u64;
        if compared.elements != elements {
            self.problems.push(format!(
                "{what}: {} of {elements} elements arrived",
                compared.elements
            ));
        }
        if let Some((index, value, expected)) = compared.first_wrong {
            let wrong = compared.wrong;
            self.problems.push(format!(
                "{what}: {wrong} elements are wrong, first {index}: {value} is not {expected}"
            ));
        }
    }

    pub(super) fn problems(&self) -> &[String] {
        &self.problems
    }

    /// The median over the measured rounds.
    fn median(&self, of: impl Fn(&Round) -> f64) -> f64 {
        median(self.rounds.iter().filter(|round| !round.warm_up).map(of))
    }

    fn native_seconds(&self) -> f64 {
        self.median(|round| round.looped.seconds)
    }

    fn measured(&self) -> impl Iterator<Item = &Round> {
        self.rounds.iter().filter(|round| !round.warm_up)
    }

    /// Whether producer, guest and consumer had the same pages, in every call where the host looked.
    fn same_pages(&self) -> bool {
        let mut looked = self
            .rounds
            .iter()
            .filter_map(|round| Some((round.called.guest?, round.checked.pages)));
        looked.clone().next().is_some()
            && looked.all(|([x, y], consumer)| self.filled.pages == Some(x) && consumer == Some(y))
    }

    fn paths(&self) -> Vec<Path> {
        let call = Path {
            name: "mapped call",
            seconds: self.median(|round| round.called.seconds),
            copied_bytes: self
                .measured()
                .map(|round| round.called.copied_bytes)
                .max()
                .unwrap_or(0),
            same_pages: self.same_pages(),
            minor_faults: Some(self.median(|round| count(round.called.minor_faults))),
            sandbox_seconds: Some(self.median(|round| round.called.instantiate_seconds)),
        };
        let inline = Path {
            name: "inline Flight",
            seconds: median(self.inline.iter().map(|inlined| inlined.seconds)),
            copied_bytes: self
                .inline
                .iter()
                .map(|inlined| inlined.copied_bytes)
                .max()
                .unwrap_or(0),
            same_pages: false,
            minor_faults: None,
            sandbox_seconds: None,
        };
        vec![call, inline]
    }

    pub(super) fn to_json(&self) -> Value {
        let native = self.native_seconds();
        let paths: Vec<Value> = self
            .paths()
            .iter()
            .map(|path| {
                json!({
                    "name": path.name,
                    "bytes": self.bytes,
                    "seconds": path.seconds,
                    "copied_bytes": path.copied_bytes,
                    "same_pages": path.same_pages,
                    "gb_per_second": self.gb_per_second(path.seconds),
                    "times_native": path.seconds / native,
                    "minor_faults": path.minor_faults,
                    "sandbox_seconds": path.sandbox_seconds,
                })
            })
            .collect();
        json!({
            "verified": self.problems.is_empty(),
            "problems": self.problems,
            "kernel": KERNEL,
            "bytes": self.bytes,
            "calls": self.measured().count(),
            "elements_checked": self.elements_checked,
            "native_seconds": native,
            "native": NATIVE,
            "attach_seconds": self.median(|round| round.checked.attach_seconds),
            "paths": paths,
            "every_call_seconds": self.measured().map(|round| round.called.seconds).collect::<Vec<_>>(),
            "every_native_seconds": self.measured().map(|round| round.looped.seconds).collect::<Vec<_>>(),
            "pids": { "host": self.pids[0], "producer": self.pids[1], "consumer": self.pids[2] },
        })
    }

    fn gb_per_second(&self, seconds: f64) -> f64 {
        count(self.bytes) / seconds / 1e9
    }

    pub(super) fn to_text(&self) -> String {
        let native = self.native_seconds();
        let row = |name: &str, seconds: f64, rest: [String; 4]| {
            let mut row = vec![
                name.to_owned(),
                format!("{:.2}", self.gb_per_second(seconds)),
                format!("{:.2}", seconds * 1e3),
                format!("{:.2}", seconds / native),
            ];
            row.extend(rest);
            row
        };
        let none = || "-".to_owned();
        let mut rows = vec![row(
            "native loop (*)",
            native,
            [none(), none(), none(), none()],
        )];
        for path in self.paths() {
            let same = if path.same_pages { "yes" } else { "no" };
            let faults = path
                .minor_faults
                .map_or_else(none, |faults| format!("{faults:.0}"));
            let sandbox = path
                .sandbox_seconds
                .map_or_else(none, |seconds| format!("{:.0} us", seconds * 1e6));
            rows.push(row(
                path.name,
                path.seconds,
                [
                    path.copied_bytes.to_string(),
                    same.to_owned(),
                    faults,
                    sandbox,
                ],
            ));
        }
        let heading = [
            "PATH",
            "GB/s>",
            "ms>",
            "x NATIVE>",
            "BYTES COPIED>",
            "SAME MEMFD",
            "MINOR FAULTS>",
            "SANDBOX READY>",
        ];
        let [host, producer, consumer] = self.pids;
        let size = BinaryBytes(self.bytes);
        let calls = self.measured().count();
        let mut text = format!(
            "{KERNEL} (y = a*x + b) on {size} of float64: producer (pid {producer}) -> host (pid {host}) -> consumer (pid {consumer}).\n\
             Medians of {calls} calls, each in a fresh sandbox; GB/s counts the result's bytes once.\n\n{}\n\n(*) {NATIVE}.\n",
            output::lines(&output::table(&heading, rows))
        );
        text += &self.pages_in_words();
        text += &format!(
            "The consumer attached to a result in {:.0} us and compared {} elements with its own computation, bit for bit: ",
            self.median(|round| round.checked.attach_seconds) * 1e6,
            self.elements_checked
        );
        text += if self.problems.is_empty() {
            "all equal.\nverified"
        } else {
            "see below.\nNOT verified"
        };
        for problem in &self.problems {
            text += &format!("\n  {problem}");
        }
        text
    }

    fn pages_in_words(&self) -> String {
        if !self.is_moved() {
            return format!(
                "Tensors below {} are copied into the guest, which is cheaper than moving their pages.\n",
                BinaryBytes(self.filled.move_min_bytes)
            );
        }
        let looked = self
            .rounds
            .iter()
            .filter_map(|round| Some((round.called.guest?, round.checked.pages?)))
            .next_back();
        match (looked, self.filled.pages) {
            (Some(([x, y], consumer)), Some(producer)) => format!(
                "Memory (device:inode in /proc/PID/maps): x is {} in the producer and {} in the guest, y is {} in the guest and {} in the consumer.\n",
                shown(producer),
                shown(x),
                shown(y),
                shown(consumer)
            ),
            _ => String::new(),
        }
    }
}

/// A row of the table.
struct Path {
    name: &'static str,
    seconds: f64,
    copied_bytes: u64,
    same_pages: bool,
    minor_faults: Option<f64>,
    sandbox_seconds: Option<f64>,
}

fn shown(pages: Pages) -> String {
    format!("{}:{}", pages.device, pages.inode)
}

#[expect(
    clippy::cast_precision_loss,
    reason = "for a rate or a median of counts"
)]
fn count(number: u64) -> f64 {
    number as f64
}

/// The middle one; of two middle ones their mean; 0 of none.
fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => 0.0,
        length if length % 2 == 0 => f64::midpoint(values[middle - 1], values[middle]),
        _ => values[middle],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const X: Pages = Pages {
        device: 1,
        inode: 10,
    };
    const Y: Pages = Pages {
        device: 1,
        inode: 11,
    };

    fn report(change: impl Fn(&mut Round), inline_elements: u64) -> Report {
        let filled = Filled {
            pages: Some(X),
            move_min_bytes: 8,
        };
        let mut report = Report::new(80, filled, [1, 2, 3]);
        let compared = || Compared {
            elements: 10,
            ..Default::default()
        };
        for warm_up in [true, false, false] {
            let called = Called {
                seconds: 2.0,
                instantiate_seconds: 1e-5,
                copied_bytes: 0,
                minor_faults: 4,
                guest: Some([X, Y]),
            };
            let checked = Checked {
                attach_seconds: 1e-4,
                pages: Some(Y),
                compared: compared(),
            };
            let mut round = Round {
                warm_up,
                called,
                checked,
                looped: Looped { seconds: 1.0 },
            };
            change(&mut round);
            report.add(round);
        }
        for warm_up in [true, false] {
            let compared = Compared {
                elements: inline_elements,
                ..Default::default()
            };
            report.add_inline(
                warm_up,
                Inlined {
                    seconds: 4.0,
                    copied_bytes: 80,
                    compared,
                },
            );
        }
        report
    }

    #[test]
    fn a_good_run_is_verified() {
        let report = report(|_| (), 10);
        let json = report.to_json();
        assert_eq!(json["verified"], true, "{json}");
        assert_eq!(json["native_seconds"], 1.0);
        assert_eq!(json["elements_checked"], 50);
        let paths = json["paths"].as_array().expect("a list");
        assert_eq!(paths.len(), 2);
        assert_eq!(paths[0]["same_pages"], true);
        assert_eq!(paths[0]["times_native"], 2.0);
        assert_eq!(paths[1]["copied_bytes"], 80);
        assert!(report.to_text().ends_with("verified"));
    }

    #[test]
    fn everything_that_is_wrong_is_a_problem() {
        let wrong = |change: fn(&mut Round), inline_elements, says: &str| {
            let report = report(change, inline_elements);
            assert_eq!(report.to_json()["verified"], false, "{says}");
            assert!(
                report
                    .problems()
                    .iter()
                    .any(|problem| problem.contains(says)),
                "{:?}",
                report.problems()
            );
            assert!(report.to_text().contains("NOT verified"));
        };
        wrong(
            |round| round.checked.compared.first_wrong = Some((3, 1.0, 2.0)),
            10,
            "first 3: 1 is not 2",
        );
        wrong(
            |round| round.checked.compared.elements = 9,
            10,
            "9 of 10 elements",
        );
        wrong(
            |round| round.checked.pages = Some(X),
            10,
            "the guest saw 1:11 for y, the consumer 1:10",
        );
        wrong(|round| round.checked.pages = None, 10, "no memfd");
        wrong(
            |round| round.called.guest = Some([Y, Y]),
            10,
            "for x, the producer 1:10",
        );
        wrong(
            |round| round.called.copied_bytes = 160,
            10,
            "160 bytes were copied",
        );
        wrong(|_| (), 9, "inline Flight: 9 of 10");
    }

    #[test]
    fn medians() {
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), 2.0);
        assert_eq!(median([4.0, 1.0, 2.0, 3.0].into_iter()), 2.5);
        assert_eq!(median(std::iter::empty()), 0.0);
    }
}
