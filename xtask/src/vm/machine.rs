//! QEMU without KVM, for as long as the guest needs and never longer.

use super::kernels::Installed;
use anyhow::Context as _;
use std::ffi::OsString;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

/// Memory of the guest in MiB; its file system is in it.
const MEMORY: u32 = 3072;
const CPUS: u32 = 2;
/// Lines of the console that are shown when something went wrong.
const TAIL: usize = 40;

/// Boots a kernel and gives each line that the guest says to `line`, until it powers itself off.
///
/// # Errors
/// If it does not within `limit`; the last lines of its console are in the error. QEMU is gone afterwards.
pub(super) fn run(
    kernel: &Installed,
    initrd: &Path,
    console: &Path,
    limit: Duration,
    mut line: impl FnMut(&str),
) -> anyhow::Result<()> {
    // That of an earlier run must not pass for this one's.
    fs::write(console, "")?;
    // Should we be killed, the kernel kills QEMU as well.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).args(command_line(&kernel.image, initrd, console));
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut machine = Machine(command.spawn().context("cannot run setpriv and qemu-system-x86_64")?);
    let output = machine.0.stdout.take().context("QEMU has no output")?;
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        for bytes in BufReader::new(output).split(b'\n') {
            let Ok(bytes) = bytes else { return };
            // Nobody listens any more if the time was up.
            let _ = sender.send(String::from_utf8_lossy(&bytes).into_owned());
        }
    });
    let deadline = Instant::now() + limit;
    loop {
        match receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(text) => line(&text),
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                anyhow::bail!("the guest was ended after {} s\n{}", limit.as_secs(), tail_of(console))
            }
        }
    }
    let status = machine.0.wait()?;
    anyhow::ensure!(status.success(), "QEMU failed ({status})\n{}", tail_of(console));
    Ok(())
}

/// The console is the first serial port; what the script says comes from the second one.
fn command_line(kernel: &Path, initrd: &Path, console: &Path) -> Vec<OsString> {
    let mut words: Vec<OsString> =
        ["qemu-system-x86_64", "-machine", "pc", "-accel", "tcg,thread=multi", "-cpu", "max"]
            .into_iter()
            .map(OsString::from)
            .collect();
    words.extend(["-smp", &CPUS.to_string(), "-m", &MEMORY.to_string()].map(OsString::from));
    words.extend(
        ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-kernel"].map(OsString::from),
    );
    words.push(kernel.into());
    words.push("-initrd".into());
    words.push(initrd.into());
    // A panic ends the guest, and a restart ends QEMU.
    words.extend(["-append", "console=ttyS0 loglevel=5 panic=-1 oops=panic"].map(OsString::from));
    let mut file = OsString::from("file:");
    file.push(console);
    words.extend(["-serial".into(), file, "-serial".into(), "stdio".into()]);
    words
}

/// The last lines of the console, with a word about where it is.
pub(super) fn tail_of(console: &Path) -> String {
    let text = String::from_utf8_lossy(&fs::read(console).unwrap_or_default()).into_owned();
    format!("the end of {}:\n{}", console.display(), tail(&text))
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
    lines[lines.len().saturating_sub(TAIL)..].iter().map(|line| format!("  | {line}\n")).collect()
}

/// Killed when dropped, if it still runs.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        // It may have ended by itself; either way it is gone afterwards.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_console_and_the_results_are_two_ports() {
        let words = command_line(Path::new("/k"), Path::new("/i"), Path::new("/c"));
        let text: Vec<&str> = words.iter().filter_map(|word| word.to_str()).collect();
        let text = text.join(" ");
        assert!(text.contains("-accel tcg,thread=multi"), "{text}");
        assert!(text.ends_with("-serial file:/c -serial stdio"), "{text}");
        assert!(text.contains("-kernel /k -initrd /i -append"), "{text}");
    }

    #[test]
    fn the_tail_is_short() {
        let text: String = (0..100).map(|n| format!("{n}\r\n")).collect();
        let tail = tail(&text);
        assert_eq!(tail.lines().count(), TAIL);
        assert!(tail.ends_with("  | 99\n"), "{tail:?}");
        assert_eq!(super::tail(""), "");
    }
}
