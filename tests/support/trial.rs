//! A guest on trial: what its call must end with, and that nothing comes of it.

use std::time::{Duration, Instant};

use serde_json::json;
use strait::error::{Code, Status};

use super::{Holdings, Rig, bytes_of, guest};

/// A window, and a copy.
const SIZES: [(&str, usize); 2] = [("large", 100_000), ("small", 100)];

/// A guest and the reason that its call ends with.
pub struct Case {
    pub name: String,
    pub text: String,
    pub reason: &'static str,
}

pub fn case(name: impl Into<String>, text: impl Into<String>, reason: &'static str) -> Case {
    Case {
        name: name.into(),
        text: text.into(),
        reason,
    }
}

/// A host with the kernel `copies/k` and an input of each size.
pub struct Trial {
    pub rig: Rig,
    before: Holdings,
    pub inputs: Vec<Vec<u8>>,
}

impl Trial {
    pub fn new() -> Self {
        let rig = Rig::with(|config| config.limits.guest_bytes = 32 << 20);
        let copies = guest::component("copies", "");
        rig.host.own_caller().load_plugin(&copies).unwrap();
        let inputs = SIZES.map(|(name, n)| {
            let values: Vec<f64> = (0..n).map(|i| i as f64 * 0.5 - 7.0).collect();
            bytes_of(&rig.put_f64(name, &values))
        });
        let mut trial = Self {
            before: rig.holdings(),
            rig,
            inputs: inputs.to_vec(),
        };
        // Once to warm what stays: pool, workers, parked mappings.
        (0..2).for_each(|_| trial.next_is_right("copies"));
        trial.before = trial.rig.holdings();
        trial
    }

    pub fn call(&self, kernel: &str, input: &str, deadline_ms: u64) -> Result<Vec<u8>, Status> {
        let call = json!({"kernel": format!("{kernel}/k"), "inputs": {"x": input}, "deadline_ms": deadline_ms});
        let invoked = self.rig.invoke(call)?;
        Ok(bytes_of(invoked.results[0].segment().unwrap()))
    }

    /// A copy of each input, which is also that the input is as it was.
    pub fn next_is_right(&self, after: &str) {
        for ((input, _), bytes) in SIZES.iter().zip(&self.inputs) {
            let copy = self.call("copies", input, 60_000).unwrap();
            assert!(copy == *bytes, "{input} after {after}");
        }
    }

    pub fn check(&self, case: &Case, deadline_ms: u64) {
        let name = &case.name;
        let component = guest::component(name, &case.text);
        if let Err(status) = self.rig.host.own_caller().load_plugin(&component) {
            panic!("{name}: {status}");
        }
        for (input, _) in SIZES {
            let start = Instant::now();
            let status = match self.call(name, input, deadline_ms) {
                Err(status) => status,
                Ok(bytes) => panic!("{name} on {input} gave {} bytes", bytes.len()),
            };
            assert_eq!(status.reason, case.reason, "{name} on {input}: {status}");
            assert!(status.message.contains("`k`"), "{name}: {status}");
            let took = start.elapsed();
            assert!(took < Duration::from_secs(10), "{name} took {took:?}");
        }
        self.rig.check_holdings(&self.before, name);
        self.next_is_right(name);
    }

    pub fn check_all(&self, cases: &[Case], deadline_ms: u64) {
        cases.iter().for_each(|case| self.check(case, deadline_ms));
    }

    /// Such a plugin is not loaded; the message has `word`.
    #[track_caller]
    pub fn refused(&self, name: &str, component: &[u8], word: &str) {
        let start = Instant::now();
        let status = match self.rig.host.own_caller().load_plugin(component) {
            Err(status) => status,
            Ok(_) => panic!("{name} was loaded"),
        };
        assert_eq!(
            (status.code, status.reason.name()),
            (Code::InvalidArgument, "BAD_PLUGIN"),
            "{name}: {status}"
        );
        assert!(
            status.message.contains(word),
            "{name}: {word:?} in {status}"
        );
        let took = start.elapsed();
        assert!(took < Duration::from_secs(20), "{name} took {took:?}");
    }

    /// Such a guest is not loaded.
    #[track_caller]
    pub fn guest_refused(&self, name: &str, text: &str, word: &str) {
        self.refused(name, &guest::component(name, text), word);
    }

    pub fn ended(&self) {
        self.rig.check_holdings(&self.before, "what was refused");
        self.next_is_right("all that was refused");
    }
}
