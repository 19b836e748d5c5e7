//! Runs other programs, with an error that says which one failed and what it said.

use anyhow::{Context as _, bail};
use std::io::Write as _;
use std::process::{Command, Stdio};

/// Runs a command line without quoting (words separated by blanks) and returns its standard output.
pub(super) fn run(line: &str) -> anyhow::Result<String> {
    run_with_input(line, "")
}

/// As [`run`], with `input` on standard input.
pub(super) fn run_with_input(line: &str, input: &str) -> anyhow::Result<String> {
    let mut child = command(line)?
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run `{line}`; `cargo xtask setup` installs what is needed"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that does not read its input reports its own error below.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("`{line}` failed ({}): {}", output.status, said.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A command from a line without quoting.
pub(super) fn command(line: &str) -> anyhow::Result<Command> {
    let mut words = line.split_whitespace();
    let mut command = Command::new(words.next().context("an empty command line")?);
    command.args(words);
    Ok(command)
}

/// The command line prefix that runs the rest in a named network namespace. Unlike `ip netns exec` it
/// does not mount another /sys over the pinned maps.
pub(super) fn inside(netns: &str) -> String {
    format!("nsenter --net=/run/netns/{netns} --")
}
