//! Commands, shown before they run.

use anyhow::Context as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// Runs a command with our own output; shows it first.
pub(crate) fn run(command: &mut Command) -> anyhow::Result<()> {
    eprintln!("$ {}", describe(command));
    run_quietly(command)
}

/// Runs a command with our own output.
pub(crate) fn run_quietly(command: &mut Command) -> anyhow::Result<()> {
    let status = command.status().with_context(|| format!("cannot run `{}`", describe(command)))?;
    anyhow::ensure!(status.success(), "`{}` failed ({status})", describe(command));
    Ok(())
}

/// Standard output of a command if there is such a command and it succeeds.
pub(crate) fn try_output(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A program in the search path, or else in one of some other folders.
pub(crate) fn find_program(name: &str, elsewhere: impl IntoIterator<Item = PathBuf>) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(elsewhere);
    folders.map(|folder| folder.join(name)).find(|file| file.is_file())
}

/// A command line as one would type it.
pub(crate) fn describe(command: &Command) -> String {
    let mut words: Vec<String> = command
        .get_envs()
        .filter_map(|(key, value)| Some(format!("{}={}", key.to_str()?, value?.to_str()?)))
        .collect();
    words.push(command.get_program().to_string_lossy().into_owned());
    words.extend(command.get_args().map(|argument| argument.to_string_lossy().into_owned()));
    words.join(" ")
}
