//! Loads and streams that go on while other steps are done.

use crate::evidence::{CallEvent, StreamReport, Timeline};
use crate::interrupt::Interrupt;
use crate::{pace, process};
use anyhow::Context as _;
use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

const STOP_DEADLINE: Duration = Duration::from_secs(10);

/// Calls that go on until stopped.
pub(super) struct RunningLoad {
    child: Child,
    reader: Option<JoinHandle<()>>,
    timeline: Arc<Mutex<Timeline>>,
    /// What the load must be answered by from a time on: the last expectation that was met.
    pub(super) settled: Option<(Vec<String>, u64)>,
}

impl RunningLoad {
    /// Starts `mesh-probe call --until-eof -o jsonl`.
    pub(super) fn start(mut command: Command) -> anyhow::Result<Self> {
        let what = process::describe(&command);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .with_context(|| format!("cannot run `{what}`"))?;
        let output = child.stdout.take().context("the load has no output")?;
        let timeline = Arc::new(Mutex::new(Timeline::default()));
        let shared = timeline.clone();
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(output).lines() {
                let Ok(line) = line else { break };
                // The last line is the summary, which we count ourselves.
                if let Ok(event) = serde_json::from_str::<CallEvent>(&line) {
                    shared.lock().unwrap_or_else(PoisonError::into_inner).push(event);
                }
            }
        });
        Ok(Self { child, reader: Some(reader), timeline, settled: None })
    }

    /// The calls so far.
    pub(super) fn timeline(&self) -> MutexGuard<'_, Timeline> {
        self.timeline.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fails if the load has ended by itself.
    pub(super) fn alive(&mut self) -> anyhow::Result<()> {
        match self.child.try_wait()? {
            Some(status) => anyhow::bail!("the load has ended early ({status})"),
            None => Ok(()),
        }
    }

    /// Ends it and gives all of its calls.
    pub(super) fn stop(mut self, interrupt: &Interrupt) -> anyhow::Result<Timeline> {
        self.alive()?;
        drop(self.child.stdin.take());
        process::wait(&mut self.child, pace::slowed(STOP_DEADLINE), interrupt)
            .context("the load does not stop")?;
        if let Some(reader) = self.reader.take() {
            reader.join().map_err(|_| anyhow::anyhow!("the load's reader panicked"))?;
        }
        Ok(self.timeline().clone())
    }
}

impl Drop for RunningLoad {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// A stream with its end in the future.
pub(super) struct RunningStream {
    child: Child,
    deadline: Duration,
}

impl RunningStream {
    /// Starts `mesh-probe stream -o json`.
    pub(super) fn start(mut command: Command, span: Duration) -> anyhow::Result<Self> {
        let what = process::describe(&command);
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .with_context(|| format!("cannot run `{what}`"))?;
        Ok(Self { child, deadline: span + pace::slowed(STOP_DEADLINE) })
    }

    /// Waits for its end.
    pub(super) fn finish(mut self, interrupt: &Interrupt) -> anyhow::Result<StreamReport> {
        let status =
            process::wait(&mut self.child, self.deadline, interrupt).context("the stream does not end")?;
        let output = self.child.stdout.take().context("the stream has no output")?;
        let text = std::io::read_to_string(output)?;
        serde_json::from_str(text.trim())
            .with_context(|| format!("the stream ended with {status} and {text:?}"))
    }
}

impl Drop for RunningStream {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// Ends a child that may have ended already.
fn end(child: &mut Child) {
    drop(child.stdin.take());
    if !matches!(child.try_wait(), Ok(Some(_))) {
        let _ = child.kill();
        let _ = child.wait();
    }
}
