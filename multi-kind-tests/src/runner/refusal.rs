//! Commands that must fail, and how well they say why.

use super::steps::Stage;
use crate::scenario::Fails;
use anyhow::Context as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::Command;

/// Runs a command that must fail: with its status, in time, and with one clear message.
pub(super) fn fails_clearly(stage: &Stage<'_>, fails: &Fails) -> anyhow::Result<Option<String>> {
    let folder = Scratch::new()?;
    for (name, text) in &fails.files {
        let file = folder.0.join(name);
        std::fs::create_dir_all(file.parent().unwrap_or(&folder.0))?;
        std::fs::write(file, fill(stage, &folder, text)?)?;
    }
    let words: Vec<String> =
        fails.run.iter().map(|word| fill(stage, &folder, word)).collect::<Result<_, _>>()?;
    let (program, arguments) = words.split_first().context("`run` is empty")?;
    let mut program = stage.options.binaries.path(program);
    let mut prefix: Vec<String> = Vec::new();
    if let Some(node) = &fails.on {
        let namespace = stage.lab()?.node_namespace(node);
        prefix.extend(["nsenter".to_owned(), format!("--net={}", namespace.display()), "--".to_owned()]);
    }
    if fails.unprivileged {
        // Where the programs are, that user may not be allowed to go.
        let copy = folder.0.join("program");
        std::fs::copy(&program, &copy)?;
        program = copy;
        std::fs::set_permissions(&folder.0, std::fs::Permissions::from_mode(0o777))?;
        prefix.extend(
            [
                "setpriv",
                "--reuid=65534",
                "--regid=65534",
                "--clear-groups",
                "--inh-caps=-all",
                "--bounding-set=-all",
            ]
            .map(str::to_owned),
        );
    }
    prefix.push(program.to_string_lossy().into_owned());
    let mut command = Command::new(&prefix[0]);
    command.args(&prefix[1..]).args(arguments);
    let done = stage.run(command, fails.within.0)?;
    let code = done.status.code();
    let said = done.stderr.trim();
    anyhow::ensure!(
        code == Some(fails.exit),
        "{}, expected status {}; it said: {said}",
        done.status,
        fails.exit
    );
    let messages = said.matches("error: ").count();
    anyhow::ensure!(messages == 1, "{messages} messages instead of one: {said}");
    anyhow::ensure!(!said.contains("panicked"), "it panicked: {said}");
    for part in &fails.says {
        let part = fill(stage, &folder, part)?;
        anyhow::ensure!(
            said.to_lowercase().contains(&part.to_lowercase()),
            "{part:?} is not in its message: {said}"
        );
    }
    let message = said.lines().find(|line| line.starts_with("error")).unwrap_or_default();
    Ok(Some(message.to_owned()))
}

fn fill(stage: &Stage<'_>, folder: &Scratch, text: &str) -> anyhow::Result<String> {
    let mut text = text.replace("{dir}", &folder.0.to_string_lossy());
    text = text.replace("{scenario}", &stage.scenario.base.to_string_lossy());
    if text.contains("{lab}") {
        text = text.replace("{lab}", stage.lab()?.name());
    }
    Ok(text)
}

/// A folder that is gone afterwards.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> anyhow::Result<Self> {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("multi-kind-tests-{}-{number}", std::process::id()));
        std::fs::create_dir(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What is left is a few small files below the system's temporary folder.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
