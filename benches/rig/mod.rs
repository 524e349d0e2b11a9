//! What benches share: a host in their process, and the baseline.
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    clippy::unwrap_used,
    reason = "a module of benches, each of which uses a part of it and ends where it cannot go on"
)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use strait::config::Config;
use strait::engine::{Owner, RunnerProcess};
use strait::session::{Caller, Host, Invoked};
use strait_memory::Copied;
use strait_tensor::{Column, Dtype, FileLayout, TensorSpec};

pub const MIB: usize = 1 << 20;

/// The baseline: the same loop as the kernel's, as rustc vectorises it for this CPU's baseline.
pub fn native(x: &[f64], y: &mut [f64], a: f64, b: f64) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = a * *x + b;
    }
}

/// A host in this process, without sockets.
pub struct Rig(pub Caller);

impl Rig {
    pub fn new(change: impl FnOnce(&mut Config)) -> Self {
        let mut config = Config::default();
        config.engine.cache = Some(concat!(env!("CARGO_TARGET_TMPDIR"), "/compiled").into());
        change(&mut config);
        Self(
            Host::start(config, std::path::Path::new("nowhere"))
                .unwrap()
                .own_caller(),
        )
    }

    /// For another user of the same host.
    pub fn of(&self, uid: u32) -> Self {
        Self(self.0.host().caller(Some(uid)).unwrap())
    }

    pub fn wait_for_spare(&self, spare: bool) {
        let is_spare = |process: &RunnerProcess| process.owner.is_none();
        while spare && !self.0.host().runner().processes().iter().any(is_spare) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub fn kill_worker(&self) {
        let own = Some(Owner(self.0.account().number()));
        for process in self.0.host().runner().processes() {
            if process.owner == own {
                let pid = i32::try_from(process.pid).unwrap();
                kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
            }
        }
    }

    pub fn put(&self, name: &str, bytes: usize) {
        let spec = TensorSpec {
            dtype: Dtype::Float64,
            shape: vec![bytes as u64 / 8],
        };
        let upload = self.0.begin_upload(name, true).unwrap();
        let layout = FileLayout::plan(&[Column::new("x", spec).unwrap()]).unwrap();
        let segment = self.0.allocate_to_fill(&layout).unwrap();
        let values: Vec<u8> = (0..bytes / 8)
            .flat_map(|i| (i as f64).to_le_bytes())
            .collect();
        segment
            .write_at(layout.tensors[0].offset, &values, &Copied::new())
            .unwrap();
        upload.finish(segment, layout).unwrap();
    }

    /// On one thread.
    pub fn call(&self) -> Arc<Invoked> {
        self.call_in(1)
    }

    /// In so many slices.
    pub fn call_in(&self, slices: u32) -> Arc<Invoked> {
        self.ask(json!({"kernel": "scale-shift", "inputs": {"x": "x"}, "parameters": {"a": 2.0, "b": 1.0}, "threads": slices}))
    }

    pub fn ask(&self, call: Value) -> Arc<Invoked> {
        let id = self.0.host().request_id(None).unwrap();
        let invoke = serde_json::from_value(call).unwrap();
        self.0.invoke_and_wait(invoke, id).unwrap()
    }

    /// How long `spins/k` goes on after its deadline.
    pub fn runaway(&self, deadline_ms: u64) -> Duration {
        let call = json!({"kernel": "spins/k", "inputs": {"x": "x"}, "deadline_ms": deadline_ms});
        let id = self.0.host().request_id(None).unwrap();
        let invoke = serde_json::from_value(call).unwrap();
        let begin = Instant::now();
        self.0.invoke_and_wait(invoke, id).unwrap_err();
        begin.elapsed() - Duration::from_millis(deadline_ms)
    }
}
