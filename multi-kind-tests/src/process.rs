//! Child processes with a deadline, whose output is kept.

use crate::interrupt::Interrupt;
use anyhow::Context as _;
use std::io::Read;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

const POLL: Duration = Duration::from_millis(3);
const LEFT_OPEN: Duration = Duration::from_secs(1);

/// What a finished command left.
#[derive(Debug)]
pub struct Finished {
    /// How it ended.
    pub status: ExitStatus,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Finished {
    /// The output of a command that succeeded.
    ///
    /// # Errors
    /// What the command said on standard error, if it failed.
    pub fn success(self, what: &str) -> anyhow::Result<String> {
        anyhow::ensure!(self.status.success(), "`{what}` failed ({}): {}", self.status, self.message());
        Ok(self.stdout)
    }

    fn message(&self) -> &str {
        let text = if self.stderr.trim().is_empty() { &self.stdout } else { &self.stderr };
        text.trim()
    }
}

/// Runs a command to its end.
///
/// # Errors
/// If it cannot be started, or does not end in time (it is then killed), or we are interrupted.
pub fn run(mut command: Command, deadline: Duration, interrupt: &Interrupt) -> anyhow::Result<Finished> {
    let what = describe(&command);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run `{what}`"))?;
    let stdout = drain(child.stdout.take());
    let stderr = drain(child.stderr.take());
    let status = wait(&mut child, deadline, interrupt)
        .with_context(|| format!("`{what}` did not end within {deadline:?}"));
    if status.is_err() {
        // It may have ended in between; either way it is gone afterwards.
        let _ = child.kill();
        let _ = child.wait();
    }
    let (stdout, stderr) = (collect(stdout), collect(stderr));
    let status = status.with_context(|| stderr.trim().to_owned())?;
    Ok(Finished { status, stdout, stderr })
}

/// Waits for the end of a child.
///
/// # Errors
/// If it does not end in time (it goes on running), or we are interrupted.
pub fn wait(child: &mut Child, deadline: Duration, interrupt: &Interrupt) -> anyhow::Result<ExitStatus> {
    let deadline = Instant::now() + deadline;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        anyhow::ensure!(Instant::now() < deadline, "still running at its deadline");
        interrupt.wait(POLL)?;
    }
}

/// A command line as one would type it.
pub fn describe(command: &Command) -> String {
    let program = std::path::Path::new(command.get_program());
    let program = program.file_name().unwrap_or(program.as_os_str());
    let mut text = program.to_string_lossy().into_owned();
    for argument in command.get_args() {
        text.push(' ');
        text.push_str(&argument.to_string_lossy());
    }
    text
}

/// A pipe that is read in the background.
struct Drain {
    bytes: Arc<Mutex<Vec<u8>>>,
    done: Receiver<()>,
}

fn drain(pipe: Option<impl Read + Send + 'static>) -> Option<Drain> {
    let mut pipe = pipe?;
    let bytes = Arc::new(Mutex::new(Vec::new()));
    let (finished, done) = mpsc::channel();
    let shared = bytes.clone();
    std::thread::spawn(move || {
        let mut buffer = [0; 8192];
        // What was read until an error is still worth showing.
        while let Ok(length @ 1..) = pipe.read(&mut buffer) {
            shared.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&buffer[..length]);
        }
        // Nobody listens any more if the command was given up.
        let _ = finished.send(());
    });
    Some(Drain { bytes, done })
}

/// All that was written; a grandchild that keeps the pipe open is not waited for.
fn collect(drain: Option<Drain>) -> String {
    let Some(drain) = drain else { return String::new() };
    // Either it is done, or we take what there is.
    let _ = drain.done.recv_timeout(LEFT_OPEN);
    let bytes = drain.bytes.lock().unwrap_or_else(PoisonError::into_inner);
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, deadline: Duration) -> anyhow::Result<Finished> {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        run(command, deadline, &Interrupt::default())
    }

    #[test]
    fn keeps_both_outputs_and_the_status() {
        let done = shell("echo out; echo err >&2; exit 3", Duration::from_secs(10)).expect("runs");
        assert_eq!((done.stdout.as_str(), done.stderr.as_str()), ("out\n", "err\n"));
        assert_eq!(done.status.code(), Some(3));
        assert!(done.success("sh").is_err());
    }

    #[test]
    fn a_command_that_hangs_is_killed() {
        let error = shell("exec sleep 600", Duration::from_millis(50)).expect_err("too slow");
        assert!(format!("{error:#}").contains("did not end"), "{error:#}");
    }
}
