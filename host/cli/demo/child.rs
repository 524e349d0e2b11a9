//! A process of the demo: this program again, asked by lines of JSON.

use std::process::Stdio;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{ChildStdin, ChildStdout, Command};

use crate::cli::failure::Failure;

/// Killed when it is dropped.
pub(super) struct Child {
    name: &'static str,
    process: tokio::process::Child,
    pid: u32,
    stdin: ChildStdin,
    stdout: Lines<BufReader<ChildStdout>>,
}

impl Child {
    pub(super) fn spawn(name: &'static str, arguments: &[String]) -> Result<Self, Failure> {
        let failed = |error: std::io::Error| {
            Failure::other("LINUX", format!("the {name} cannot be started: {error}"))
        };
        let missing = || {
            Failure::other(
                "LINUX",
                format!("the {name} has no stdin, stdout or process id"),
            )
        };
        let program = std::env::current_exe().map_err(failed)?;
        let mut process = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        let stdin = process.stdin.take().ok_or_else(missing)?;
        let stdout = process.stdout.take().ok_or_else(missing)?;
        let pid = process.id().ok_or_else(missing)?;
        Ok(Self {
            name,
            process,
            pid,
            stdin,
            stdout: BufReader::new(stdout).lines(),
        })
    }

    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    /// The next line that it says.
    pub(super) async fn line(&mut self, patience: Duration) -> Result<String, Failure> {
        match tokio::time::timeout(patience, self.stdout.next_line()).await {
            Ok(Ok(Some(line))) => Ok(line),
            Ok(Ok(None)) => Err(self.ended_early().await),
            Ok(Err(error)) => Err(Failure::other(
                "LINUX",
                format!("cannot read from the {}: {error}", self.name),
            )),
            Err(_) => Err(self.too_slow(patience)),
        }
    }

    /// Its next answer.
    pub(super) async fn reply<T: DeserializeOwned>(
        &mut self,
        patience: Duration,
    ) -> Result<T, Failure> {
        let line = self.line(patience).await?;
        serde_json::from_str(&line).map_err(|error| {
            Failure::other(
                "HOST",
                format!("the {} answered {line:?}: {error}", self.name),
            )
        })
    }

    /// Its answer to `question`.
    pub(super) async fn ask<T: DeserializeOwned>(
        &mut self,
        question: &impl Serialize,
        patience: Duration,
    ) -> Result<T, Failure> {
        let mut line = serde_json::to_string(question)
            .map_err(|error| Failure::other("HOST", error.to_string()))?;
        line.push('\n');
        if self.stdin.write_all(line.as_bytes()).await.is_err() {
            return Err(self.ended_early().await);
        }
        self.reply(patience).await
    }

    async fn ended_early(&mut self) -> Failure {
        let how = match self.process.wait().await {
            Ok(status) => status.to_string(),
            Err(error) => error.to_string(),
        };
        Failure::other(
            "DEMO",
            format!("the {} ended early ({how}); its output is above", self.name),
        )
    }

    fn too_slow(&self, patience: Duration) -> Failure {
        Failure::other(
            "DEMO",
            format!(
                "the {} did not answer within {} s",
                self.name,
                patience.as_secs()
            ),
        )
    }

    /// Ends it at once.
    pub(super) async fn kill(mut self) {
        // It may have ended by itself.
        let _ = self.process.kill().await;
    }

    /// Ends it by the end of its stdin, and sees that it ends well.
    pub(super) async fn end(self, patience: Duration) -> Result<(), Failure> {
        let Self {
            name,
            mut process,
            stdin,
            stdout,
            ..
        } = self;
        drop(stdin);
        let ended = tokio::time::timeout(patience, process.wait()).await;
        drop(stdout);
        match ended {
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(Ok(status)) => Err(Failure::other(
                "DEMO",
                format!("the {name} failed: {status}"),
            )),
            Ok(Err(error)) => Err(Failure::other(
                "LINUX",
                format!("the {name} cannot be waited for: {error}"),
            )),
            Err(_) => Err(Failure::other(
                "DEMO",
                format!("the {name} did not end within {} s", patience.as_secs()),
            )),
        }
    }
}
