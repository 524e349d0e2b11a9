//! A host in this process: its settings, its start, its plugins.

use std::path::Path;
use std::sync::Arc;

use super::failure::Failure;
use crate::config::Config;
use crate::plugin::Plugin;
use crate::session::Host;

/// The settings of a file and the environment.
pub(super) fn settings(file: Option<&Path>) -> Result<Config, Failure> {
    Config::load(file).map_err(|error| {
        // A mistake in TOML is drawn over several lines.
        let error = format!("{error:#}");
        let lines: Vec<&str> = error.lines().map(str::trim).collect();
        Failure::input("BAD_SETTING", format!("settings: {}", lines.join(" ")))
    })
}

/// A host that nobody else can reach.
pub(super) fn private_host(mut config: Config) -> Result<Arc<Host>, Failure> {
    config.engine.workers = Some(1);
    config.workers.enabled = false;
    // Nobody comes who would have a token, or rights of its own.
    (config.server.tokens, config.server.rights) = (None, None);
    start(config, Path::new("/nonexistent"))
}

/// A host that has no sockets yet.
pub(super) fn start(config: Config, directory: &Path) -> Result<Arc<Host>, Failure> {
    Host::start(config, directory)
        .map_err(|error| Failure::other("HOST", format!("no host could be started: {error:#}")))
}

/// Whether a kernel's name means a plugin's file.
pub(super) fn is_plugin(file: &Path) -> bool {
    file.extension()
        .is_some_and(|e| e.eq_ignore_ascii_case("wasm"))
}

/// The only plugin of a private host from now on: it may have the name of another one.
pub(super) fn load_plugin(host: &Arc<Host>, file: &Path) -> Result<Arc<Plugin>, Failure> {
    let shown = file.display();
    let bytes = Plugin::read(file)
        .map_err(|error| Failure::file(&error, format!("{shown}: cannot read it: {error}")))?;
    host.plugins().clear();
    host.own_caller().load_plugin(&bytes).map_err(|mut status| {
        status.message = format!("{shown}: {}", status.message);
        status.into()
    })
}
