//! What a worker writes on stderr, as the host tells it in its own log: who has broken out there could else write over that
//! log, or into it in the host's name. It is read no faster than it is told, lest it cost the host more than that: the pipe
//! is full then, and whoever writes waits.

use std::io::{self, BufRead, BufReader, Read};
use std::process::ChildStderr;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Map, Value};

/// Longest line; what is behind it is skipped.
const LINE_BYTES_MAX: u64 = 1 << 20;
/// Most of one worker in a second, with what a line costs beside its text.
const SECOND_BYTES_MAX: usize = 1 << 20;
const LINE_BYTES: usize = 256;
const SECOND: Duration = Duration::from_secs(1);

/// An event of the worker's, as `strait worker` writes it.
#[derive(Debug, Deserialize)]
struct Event {
    level: String,
    target: String,
    fields: Fields,
}

#[derive(Debug, Deserialize)]
struct Fields {
    #[serde(default)]
    message: String,
    request_id: Option<String>,
    plugin: Option<String>,
    #[serde(flatten)]
    others: Map<String, Value>,
}

/// Tells the lines of `worker` until it has ended, on a thread of its own.
///
/// # Errors
/// Linux gives no thread.
pub(super) fn relay(worker: &str, stderr: ChildStderr) -> io::Result<()> {
    let worker = worker.to_owned();
    std::thread::Builder::new()
        .name("strait-relay".to_owned())
        .spawn(move || relay_all(&worker, stderr, tell))
        .map(drop)
}

fn relay_all(worker: &str, stderr: impl Read, mut tell: impl FnMut(&str, &str)) {
    let mut lines = BufReader::new(Slow {
        stderr,
        rate: Rate::new(worker),
    });
    while let Ok(Some(line)) = next(&mut lines) {
        lines.get_mut().rate.spend(LINE_BYTES);
        tell(worker, &line);
    }
}

/// Reads as fast as there is something to spend.
struct Slow<'a, R> {
    stderr: R,
    rate: Rate<'a>,
}

impl<R: Read> Read for Slow<'_, R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = self.stderr.read(into)?;
        self.rate.spend(count);
        Ok(count)
    }
}

/// [`SECOND_BYTES_MAX`] of each second.
struct Rate<'a> {
    worker: &'a str,
    since: Instant,
    bytes: usize,
    told: bool,
}

impl<'a> Rate<'a> {
    fn new(worker: &'a str) -> Self {
        Self {
            worker,
            since: Instant::now(),
            bytes: 0,
            told: false,
        }
    }

    /// Waits for the next second if this one's are spent.
    fn spend(&mut self, bytes: usize) {
        let elapsed = self.since.elapsed();
        if elapsed < SECOND && self.bytes <= SECOND_BYTES_MAX {
            self.bytes += bytes;
            return;
        }
        if let Some(rest) = SECOND.checked_sub(elapsed) {
            if !std::mem::replace(&mut self.told, true) {
                tracing::warn!(
                    worker = self.worker,
                    "a worker writes more into the log than is told in a second: it has to wait"
                );
            }
            std::thread::sleep(rest);
        }
        (self.since, self.bytes) = (Instant::now(), bytes);
    }
}

/// The next line without its end; none at the end of all.
fn next(lines: &mut impl BufRead) -> io::Result<Option<String>> {
    let mut line = Vec::new();
    let read = lines.take(LINE_BYTES_MAX).read_until(b'\n', &mut line)?;
    if read == 0 {
        return Ok(None);
    }
    if line.pop_if(|last| *last == b'\n').is_none() {
        lines.skip_until(b'\n')?;
    }
    Ok(Some(String::from_utf8_lossy(&line).into_owned()))
}

/// One line of `worker`.
fn tell(worker: &str, line: &str) {
    let Ok(event) = serde_json::from_str::<Event>(line) else {
        if !line.is_empty() {
            tracing::warn!(worker, "{line}");
        }
        return;
    };
    let Fields {
        message,
        request_id,
        plugin,
        others,
    } = &event.fields;
    let mut text = message.clone();
    // Where it comes from in a library that does not use `tracing` itself.
    let others = others.iter().filter(|(name, _)| !name.starts_with("log."));
    for (name, value) in others {
        text.push_str(&format!(" {name}={value}"));
    }
    let (request_id, plugin) = (request_id.as_deref(), plugin.as_deref());
    macro_rules! told {
        ($level:ident) => {
            match event.target.as_str() {
                "strait::guest" => {
                    tracing::$level!(target: "strait::guest", worker, request_id, plugin, "{text}");
                }
                from => tracing::$level!(worker, from, request_id, plugin, "{text}"),
            }
        };
    }
    match event.level.as_str() {
        "ERROR" => told!(error),
        "WARN" => told!(warn),
        "INFO" => told!(info),
        "DEBUG" => told!(debug),
        _ => told!(trace),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_have_a_length() {
        let most = usize::try_from(LINE_BYTES_MAX).expect("a length");
        let long = vec![b'x'; most + 10];
        let text = [&b"one\n\n\xff\n"[..], &long, b"\nlast"].concat();
        let mut told = Vec::new();
        relay_all("1", &text[..], |_, line| told.push(line.to_owned()));
        let lengths: Vec<_> = told.iter().map(String::len).collect();
        assert_eq!(lengths, [3, 0, 3, most, 4]);
        assert_eq!(
            (&*told[0], &*told[2], &*told[4]),
            ("one", "\u{fffd}", "last")
        );
    }

    #[test]
    fn lines_and_bytes_have_a_rate() {
        // As much as a second has room for, and half of that again.
        let full = SECOND_BYTES_MAX + SECOND_BYTES_MAX / 2;
        let lines = "a\n".repeat(full / (LINE_BYTES + 2));
        for text in ["x".repeat(full), lines] {
            let (begin, mut told) = (Instant::now(), 0);
            relay_all("1", text.as_bytes(), |_, _| told += 1);
            assert_eq!(told, text.lines().count(), "none is lost");
            assert!(begin.elapsed() >= SECOND, "{:?}", begin.elapsed());
        }
    }

    #[test]
    fn what_a_worker_writes_is_an_event_or_a_line() {
        let written = r#"{"level":"ERROR","fields":{"message":"a\nb","request_id":"r-1","plugin":"p","done":3},"target":"strait::guest"}"#;
        let event: Event = serde_json::from_str(written).expect("an event");
        assert_eq!(
            (event.level.as_str(), event.target.as_str()),
            ("ERROR", "strait::guest")
        );
        assert_eq!(event.fields.message, "a\nb");
        assert_eq!(event.fields.request_id.as_deref(), Some("r-1"));
        assert_eq!(event.fields.others["done"], 3);
        for line in ["", "{", "{}", "thread panicked", "[1]", r#"{"level":1}"#] {
            assert!(serde_json::from_str::<Event>(line).is_err(), "{line}");
            tell("1", line);
        }
    }
}
