//! Installs what building and running needs.
//!
//! [`needs`] is the list, with reasons. On Debian what is missing is installed; elsewhere it is named.

mod needs;

use crate::shell;
use crate::workspace;
use anyhow::Context as _;
use needs::{BPF_LINKER, LLVM, Package};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// Checks everything, installs what is missing, and fails with a list of what remains.
pub(crate) fn run() -> anyhow::Result<()> {
    let begin = Instant::now();
    let mut missing = Vec::new();
    let mut changed = false;
    if Path::new("/etc/debian_version").exists() {
        changed |= debian_packages(&mut missing)?;
    } else {
        missing.extend(missing_programs());
    }
    // Without its libraries there is nothing to build the linker with.
    if missing.is_empty() {
        changed |= bpf_linker(&mut missing)?;
    }
    kernel(&mut missing)?;
    if !missing.is_empty() {
        anyhow::bail!("setup is not complete; missing:\n  {}", missing.join("\n  "));
    }
    let what = if changed { "setup is complete" } else { "setup: everything is there" };
    eprintln!("{what} ({:.1} s)", begin.elapsed().as_secs_f64());
    Ok(())
}

/// Installs what virtual machines need besides, and fails with a list of what remains.
pub(crate) fn run_for_vm() -> anyhow::Result<()> {
    let wanted: Vec<&Package> = absent_programs(needs::VM_PACKAGES);
    let mut missing = Vec::new();
    if !wanted.is_empty() && Path::new("/etc/debian_version").exists() {
        install(&wanted, &mut missing)?;
    } else {
        missing.extend(wanted.into_iter().map(described));
    }
    anyhow::ensure!(missing.is_empty(), "virtual machines need more; missing:\n  {}", missing.join("\n  "));
    Ok(())
}

/// Installs Debian packages that are not there; true if any was.
fn debian_packages(missing: &mut Vec<String>) -> anyhow::Result<bool> {
    let installed = installed_packages()?;
    let absent = needs::PACKAGES.iter().filter(|package| !installed.contains(package.name));
    // Asked only if it matters: rustup takes its time.
    let wanted: Vec<&Package> =
        absent.filter(|package| !package.or_nightly || !rustup_nightly_has_source()).collect();
    if wanted.is_empty() {
        return Ok(false);
    }
    let installed = install(&wanted, missing)?;
    if installed && wanted.iter().any(|package| package.name == "etcd-server") {
        stop_etcd_service();
    }
    Ok(installed)
}

/// Installs packages, or says in `missing` who has to; true if it did.
fn install(wanted: &[&Package], missing: &mut Vec<String>) -> anyhow::Result<bool> {
    for package in wanted {
        eprintln!("needed: {:<26} {}", package.name, package.why);
    }
    let names: Vec<&str> = wanted.iter().map(|package| package.name).collect();
    if !workspace::is_root() {
        missing.push(format!("as root: apt-get install --no-install-recommends {}", names.join(" ")));
        return Ok(false);
    }
    shell::run(&mut apt_get(&["update", "-q"]))?;
    let mut install = apt_get(&["install", "-q", "-y", "--no-install-recommends"]);
    install.args(&names);
    shell::run(&mut install).context(
        "a package cannot be installed; on another Debian release than 12 its name may differ (LLVM's above all)",
    )?;
    Ok(true)
}

/// Labs start their own etcd; the one that the package may have started on its own is not for us.
/// One that was there before is left alone: it is somebody's.
fn stop_etcd_service() {
    if Path::new("/run/systemd/system").exists() {
        eprintln!("the etcd service that the package brought is switched off: labs start their own etcd");
        // The package may not have made a service; then there is nothing to switch off.
        let _ = shell::run(Command::new("systemctl").args(["disable", "--now", "etcd"]));
    } else if Path::new("/etc/init.d/etcd").exists() {
        eprintln!("the etcd service that the package brought is stopped: labs start their own etcd");
        let _ = shell::run(Command::new("service").args(["etcd", "stop"]));
    }
}

/// Builds bpf-linker if this version is not there; true if it was built.
fn bpf_linker(missing: &mut Vec<String>) -> anyhow::Result<bool> {
    let present = find_bpf_linker().and_then(|path| shell::try_output(path.to_str()?, &["--version"]));
    if present.is_some_and(|version| version.split_whitespace().any(|word| word == BPF_LINKER)) {
        return Ok(false);
    }
    eprintln!("needed: bpf-linker {BPF_LINKER}         links the eBPF programs");
    let prefix = Path::new(needs::LLVM_PREFIX);
    if !prefix.join("bin/llvm-config").exists() {
        missing.push(format!(
            "bpf-linker {BPF_LINKER}: install LLVM {LLVM} with its headers, then: LLVM_PREFIX=<where it is> cargo install \
             bpf-linker --version {BPF_LINKER} --no-default-features --features llvm-{LLVM}"
        ));
        return Ok(false);
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let paths = std::iter::once(prefix.join("bin")).chain(std::env::split_paths(&path));
    shell::run_quietly(
        workspace::cargo()
            .args(["install", "bpf-linker", "--version", BPF_LINKER, "--no-default-features", "--features"])
            .arg(format!("llvm-{LLVM}"))
            .arg("--locked")
            // Not into our target folder, whose settings are not for it.
            .env_remove("CARGO_TARGET_DIR")
            .current_dir("/")
            .env("LLVM_PREFIX", prefix)
            .env("PATH", std::env::join_paths(paths)?),
    )?;
    Ok(true)
}

/// In the search path, or where `cargo install` puts it.
fn find_bpf_linker() -> Option<PathBuf> {
    let home = std::env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(Path::new(&std::env::var_os("HOME")?).join(".cargo")));
    shell::find_program("bpf-linker", home.map(|home| home.join("bin")))
}

/// What the running kernel must offer.
fn kernel(missing: &mut Vec<String>) -> anyhow::Result<()> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").context("this is not Linux")?;
    if kernel_version(&release).is_none_or(|version| version < needs::KERNEL) {
        let (major, minor) = needs::KERNEL;
        missing.push(format!("a Linux kernel of {major}.{minor} or later; this is {}", release.trim()));
    }
    let mounts = std::fs::read_to_string("/proc/mounts")?;
    let mounted = |kind: &str| mounts.lines().any(|line| line.split(' ').nth(2) == Some(kind));
    if !mounted("cgroup2") {
        missing.push(
            "a cgroup2 mount (mount -t cgroup2 none /sys/fs/cgroup/unified): sockets are balanced there"
                .into(),
        );
    }
    if !mounted("bpf") {
        if workspace::is_root() {
            eprintln!("needed: bpffs at /sys/fs/bpf     keeps the kernel maps while agents are down");
            shell::run(Command::new("mount").args(["-t", "bpf", "bpf", "/sys/fs/bpf"]))?;
        } else {
            missing.push("as root: mount -t bpf bpf /sys/fs/bpf".into());
        }
    }
    Ok(())
}

/// `6.18.44-x` is (6, 18).
fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.trim().split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn installed_packages() -> anyhow::Result<BTreeSet<String>> {
    // Unknown names make it exit with 1, and the rest is still listed.
    let output = Command::new("dpkg-query")
        .args(["-W", "-f", "${db:Status-Status} ${Package}\n"])
        .args(needs::PACKAGES.iter().map(|package| package.name))
        .output()
        .context("cannot run dpkg-query")?;
    Ok(String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| line.strip_prefix("installed "))
        .map(str::to_owned)
        .collect())
}

/// Not Debian: which programs are not there, and what they are for.
fn missing_programs() -> Vec<String> {
    let mut missing: Vec<String> = absent_programs(needs::PACKAGES).into_iter().map(described).collect();
    if !rustup_nightly_has_source() && !distribution_rustc_has_bpf() {
        missing.push(
            "rustup toolchain install nightly --component rust-src (compiles the eBPF programs)".into(),
        );
    }
    missing
}

/// Packages whose program is not in the search path.
fn absent_programs(packages: &'static [Package]) -> Vec<&'static Package> {
    let has = |program: &str| shell::find_program(program, None).is_some();
    packages.iter().filter(|package| package.program.is_some_and(|program| !has(program))).collect()
}

fn described(package: &Package) -> String {
    format!("{} ({})", package.program.unwrap_or_default(), package.why)
}

fn rustup_nightly_has_source() -> bool {
    // Asks for nothing that rustup would first have to download.
    let Some(list) = shell::try_output("rustup", &["toolchain", "list"]) else { return false };
    list.lines().any(|line| line.starts_with("nightly"))
        && shell::try_output("rustup", &["run", "nightly", "rustc", "--print", "sysroot"]).is_some_and(
            |sysroot| Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core").is_dir(),
        )
}

fn distribution_rustc_has_bpf() -> bool {
    shell::try_output("/usr/bin/rustc", &["--print", "sysroot"])
        .is_some_and(|sysroot| Path::new(sysroot.trim()).join("lib/rustlib/bpfel-unknown-none/lib").is_dir())
}

/// Debian's package tool, which asks nothing.
pub(crate) fn apt_get(arguments: &[&str]) -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive").args(arguments);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_versions() {
        assert_eq!(kernel_version("6.18.44-fc\n"), Some((6, 18)));
        assert_eq!(kernel_version("6.1-rc3"), Some((6, 1)));
        assert_eq!(kernel_version("linux"), None);
        assert!((6, 1) > (5, 15));
    }
}
