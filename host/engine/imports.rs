//! What a plugin may import: `log-sink`. `linalg` is in the contract and refused until it is built.

use wasmtime::Engine;
use wasmtime::component::{Component, HasSelf, Linker};

use super::LoadError;
use super::abi::log_sink;
use super::state::State;

/// A linker that has all that is offered.
///
/// # Errors
/// wasmtime's, which names the interface.
pub(super) fn linker(engine: &Engine) -> wasmtime::Result<Linker<State>> {
    let mut linker = Linker::new(engine);
    log_sink::add_to_linker::<State, HasSelf<State>>(&mut linker, |state| state)?;
    Ok(linker)
}

/// # Errors
/// [`LoadError::NotOffered`] if `component` imports a part of the contract that is not there yet.
pub(super) fn check(engine: &Engine, component: &Component) -> Result<(), LoadError> {
    let ty = component.component_type();
    let linalg = ty
        .imports(engine)
        .find(|(name, _)| name.starts_with("strait:kernel/linalg@"));
    match linalg {
        Some((name, _)) => Err(LoadError::NotOffered(name.to_owned())),
        None => Ok(()),
    }
}

impl log_sink::Host for State {
    fn log(&mut self, level: u32, address: u64, bytes: u64) -> wasmtime::Result<()> {
        Ok(self
            .log
            .tell(self.regions.as_ref(), level, address, bytes)?)
    }

    fn progress(&mut self, done: u64, total: u64) -> wasmtime::Result<()> {
        Ok(self.log.progress(done, total)?)
    }
}
