//! Bars on a terminal.

use std::io::{self, IsTerminal};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::text::on_one_line;

/// Shown before a bar appears: what is done by then needs none.
const BAR_AFTER: Duration = Duration::from_secs(1);
const BAR_EVERY: Duration = Duration::from_millis(100);

/// A bar on the terminal for work that takes a while, as long as it lives.
#[derive(Debug)]
pub(super) struct Progress {
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Progress {
    /// Shows `what` and how much of `total` bytes this process has read or written since now, by
    /// Linux's own count. Nothing is shown if stderr is no terminal.
    pub(super) fn start(what: &str, total: u64) -> Self {
        Self::show(what, Some(total))
    }

    /// Shows `what` and the time since now, for work that cannot tell how far it is.
    pub(super) fn waiting(what: &str) -> Self {
        Self::show(what, None)
    }

    fn show(what: &str, total: Option<u64>) -> Self {
        let what = on_one_line(what).into_owned();
        if !io::stderr().is_terminal() {
            return Self {
                stop: None,
                thread: None,
            };
        }
        let (stop, stopped) = mpsc::channel();
        let before = transferred();
        let thread = std::thread::Builder::new()
            .name("progress".into())
            .spawn(move || {
                if stopped.recv_timeout(BAR_AFTER) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
                let (bar, style) = match total {
                    Some(total) => (
                        ProgressBar::new(total),
                        "{msg} {bar:30} {bytes}/{total_bytes} {elapsed}",
                    ),
                    None => (ProgressBar::new_spinner(), "{msg} {spinner} {elapsed}"),
                };
                let bar = bar.with_message(what);
                let style = ProgressStyle::with_template(style);
                bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
                loop {
                    if let Some(total) = total {
                        bar.set_position(transferred().saturating_sub(before).min(total));
                    }
                    bar.tick();
                    if stopped.recv_timeout(BAR_EVERY) != Err(RecvTimeoutError::Timeout) {
                        break;
                    }
                }
                bar.finish_and_clear();
            });
        // Without the thread there is no bar; the work goes on.
        Self {
            stop: Some(stop),
            thread: thread.ok(),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // It only draws.
            let _ = thread.join();
        }
    }
}

/// Bytes that this process read and wrote by system calls; 0 where Linux does not count them.
fn transferred() -> u64 {
    let io = std::fs::read_to_string("/proc/self/io").unwrap_or_default();
    let field = |name| {
        io.lines()
            .find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok())
    };
    field("rchar:")
        .unwrap_or(0)
        .saturating_add(field("wchar:").unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_read_something() {
        assert!(transferred() > 0);
    }
}
