//! What a worker has mapped, as segments and results of the host know it.

use std::sync::{Arc, Weak};

use strait_memory::{Author, Filler, KeepsMappings};

use super::Process;
use super::burial::Burial;
use crate::worker::messages::Control;

/// What segments tell that they are gone, and results that they are not what they should be.
#[derive(Debug)]
pub(super) struct Keeper(pub(super) Weak<Process>);

impl KeepsMappings for Keeper {
    fn let_go(&self, segment: u64) -> Box<dyn Send> {
        let process = self.0.upgrade();
        let kept = process.filter(|process| process.inputs.lock().remove(&segment));
        // When it drops: memory is freed where that is nobody's time.
        Box::new(kept.map(|process| Kept { process, segment }))
    }

    fn is_slow(&self) -> bool {
        self.0.strong_count() > 0
    }
}

impl Author for Keeper {
    fn distrust(&self, why: &str) {
        if let Some(process) = self.0.upgrade() {
            process.kill(why);
        }
    }
}

/// A segment that the worker has open for reading, and is to let go of.
struct Kept {
    process: Arc<Process>,
    segment: u64,
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.process.forget(&Control::ForgetInput(self.segment));
    }
}

/// A segment that the worker has mapped writable.
#[derive(Debug)]
pub(in crate::worker) struct Mapped {
    number: u64,
    // Results outlive workers, whose sockets need not.
    process: Weak<Process>,
    burial: Arc<Burial>,
    segment: u64,
}

impl Mapped {
    pub(in crate::worker) fn new(process: &Arc<Process>, segment: u64) -> Self {
        Self {
            number: process.number,
            process: Arc::downgrade(process),
            burial: Arc::clone(&process.burial),
            segment,
        }
    }
}

impl Filler for Mapped {
    fn process(&self) -> u64 {
        self.number
    }

    fn is_there(&self) -> bool {
        self.process
            .upgrade()
            .is_some_and(|process| !process.is_gone())
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        match self.process.upgrade() {
            Some(process) => process.forget(&Control::ForgetResult(self.segment)),
            None => self.burial.wait(),
        }
    }
}
