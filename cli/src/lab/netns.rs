//! Network namespaces: made and removed with `ip netns`, entered with setns(2).

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, bail};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use super::layout::NETNS;

/// The file that stands for a namespace.
pub(crate) fn file(name: &str) -> PathBuf {
    Path::new(NETNS).join(name)
}

/// Moves the calling thread into the namespace that `file` stands for.
///
/// # Errors
/// If it does not exist.
pub(crate) fn enter(file: &Path) -> anyhow::Result<()> {
    let handle = File::open(file).with_context(|| format!("no network namespace {}", file.display()))?;
    move_into_link_name_space(handle.as_fd(), Some(LinkNameSpaceType::Network))
        .with_context(|| format!("cannot enter network namespace {}", file.display()))
}

/// Runs `work` on a thread of its own inside the namespace.
///
/// # Errors
/// If the namespace does not exist, or those of `work`.
pub(crate) fn within<T: Send>(
    name: &str,
    work: impl FnOnce() -> anyhow::Result<T> + Send,
) -> anyhow::Result<T> {
    let file = file(name);
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            enter(&file)?;
            work()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Writes kernel parameters (`net/ipv4/ip_forward`, value) inside the namespace.
///
/// # Errors
/// If a parameter does not exist. Those of IPv6 are skipped on a kernel without IPv6.
pub(crate) fn sysctl(name: &str, parameters: &[(&str, &str)]) -> anyhow::Result<()> {
    within(name, || {
        for (parameter, value) in parameters {
            let path = Path::new("/proc/sys").join(parameter);
            match std::fs::write(&path, value) {
                Err(e) if e.kind() == ErrorKind::NotFound && parameter.starts_with("net/ipv6/") => {}
                result => result.with_context(|| format!("cannot set {}", path.display()))?,
            }
        }
        Ok(())
    })
}

/// Runs a batch of `ip` commands, in the namespace `name` or, without one, where the caller is.
///
/// # Errors
/// If one of them fails: its text and what `ip` says.
pub(crate) async fn ip(name: Option<&str>, commands: &str) -> anyhow::Result<()> {
    if commands.is_empty() {
        return Ok(());
    }
    let mut ip = Command::new("ip");
    if let Some(name) = name {
        ip.args(["-n", name]);
    }
    let mut child = ip
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .context("cannot run `ip`; install iproute2 (`cargo xtask setup` does it)")?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(commands.as_bytes()).await.context("`ip` does not read its commands")?;
    }
    let output = child.wait_with_output().await.context("cannot wait for `ip`")?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr);
        let failed = failed_command(&message, commands).unwrap_or(commands);
        bail!(
            "`ip {failed}` failed in {}: {}",
            name.unwrap_or("the host"),
            message.trim().replace('\n', "; ")
        );
    }
    Ok(())
}

/// Removes a namespace; one that is not there is fine.
///
/// # Errors
/// If the kernel refuses.
pub(crate) async fn remove(name: &str) -> anyhow::Result<()> {
    if !file(name).exists() {
        return Ok(());
    }
    ip(None, &format!("netns del {name}\n")).await
}

/// Names of the namespaces that exist.
pub(crate) fn names() -> Vec<String> {
    let entries = std::fs::read_dir(NETNS).into_iter().flatten().filter_map(Result::ok);
    entries.filter_map(|e| e.file_name().into_string().ok()).collect()
}

/// TCP ports that listen inside the namespace, on any address.
///
/// # Errors
/// If the namespace does not exist.
pub(crate) fn listening_ports(name: &str) -> anyhow::Result<Vec<u16>> {
    within(name, || {
        // /proc/net would show the namespace of the main thread.
        let read = |table: &str| std::fs::read_to_string(format!("/proc/thread-self/net/{table}"));
        let mut ports = parse_listeners(&read("tcp").context("cannot read /proc/thread-self/net/tcp")?);
        ports.extend(parse_listeners(&read("tcp6").unwrap_or_default()));
        Ok(ports)
    })
}

fn parse_listeners(table: &str) -> Vec<u16> {
    const LISTEN: &str = "0A";
    let ports = table.lines().skip(1).filter_map(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let (local, state) = (fields.next()?, fields.nth(1)?);
        let port = local.rsplit(':').next()?;
        (state == LISTEN).then(|| u16::from_str_radix(port, 16).ok())?
    });
    ports.collect()
}

/// `ip` says "Command failed -:LINE"; the operator wants to see the command.
fn failed_command<'a>(message: &str, commands: &'a str) -> Option<&'a str> {
    let line = message.split("Command failed -:").nth(1)?.trim();
    let number: usize = line.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()?;
    commands.lines().nth(number.checked_sub(1)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners_are_read_from_the_kernels_table() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue\n   \
            0: 00000000:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 1\n   \
            1: 0100007F:1F91 0100007F:1234 01 00000000:00000000 00:00000000 00000000 0 0 1\n   \
            2: 00000000000000000000000000000000:0050 00000000000000000000000000000000:0000 0A 0:0 0 0\n";
        assert_eq!(parse_listeners(table), [8080, 80]);
    }

    #[test]
    fn the_failed_command_is_named() {
        let commands = "link set lo up\naddr add x\n";
        assert_eq!(failed_command("Error: bad\nCommand failed -:2\n", commands), Some("addr add x"));
        assert_eq!(failed_command("Error", commands), None);
    }
}
