//! Builds `programs/` for bpfel-unknown-none into `OUT_DIR/clustermesh-bpf`.
//!
//! The programs need a compiler that has (or can build) `core` for that target. Stable toolchains
//! have neither, so this looks for, in order:
//! 1. a distribution's rustc with the target's libraries (Debian: `libstd-rust-web-dev-bpf`);
//! 2. a rustup nightly with `rust-src`, which builds `core` itself.

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

const TARGET: &str = "bpfel-unknown-none";
const DISTRIBUTION_RUSTC: &str = "/usr/bin/rustc";
const OBJECT: &str = "clustermesh-bpf";

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            println!("cargo::error={message}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    let root = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(variable("OUT_DIR")?);
    for watched in ["programs/src", "programs/Cargo.toml", "programs/Cargo.lock", "abi/src", "abi/Cargo.toml"]
    {
        println!("cargo::rerun-if-changed={}", root.join(watched).display());
    }

    let linker = linker()?;
    let mut cargo = cargo()?;
    let target_dir = out.join("programs");
    cargo
        .current_dir(root.join("programs"))
        .args(["build", "--release", "--locked", "--target", TARGET, "--target-dir"])
        .arg(&target_dir)
        .env("CARGO_ENCODED_RUSTFLAGS", rustflags(&linker));
    let output = cargo.output().map_err(|error| format!("cannot run {cargo:?}: {error}"))?;
    if !output.status.success() {
        // Cargo shows one line of an error; what the compiler said goes to the build script's output.
        eprintln!("{}", String::from_utf8_lossy(&output.stderr));
        return Err("the eBPF programs do not compile: see the compiler's output below".to_owned());
    }
    let built = target_dir.join(TARGET).join("release").join(OBJECT);
    std::fs::copy(&built, out.join(OBJECT))
        .map_err(|error| format!("cannot copy {}: {error}", built.display()))?;
    Ok(())
}

/// A cargo that can compile for the target, free of what the outer cargo says about its own build.
fn cargo() -> Result<Command, String> {
    if has(Path::new(DISTRIBUTION_RUSTC), &format!("lib/rustlib/{TARGET}/lib")) {
        println!("cargo::rerun-if-changed={DISTRIBUTION_RUSTC}");
        let mut command = Command::new(variable("CARGO")?);
        scrub(&mut command);
        // The target's options are unstable for every compiler, also for one that ships its libraries.
        command.env("RUSTC", DISTRIBUTION_RUSTC).env("RUSTC_BOOTSTRAP", "1");
        return Ok(command);
    }
    let sysroot = Command::new("rustup")
        .args(["run", "nightly", "rustc", "--print", "sysroot"])
        .env_remove("RUSTUP_TOOLCHAIN")
        .output()
        .ok()
        .filter(|output| output.status.success())
        .map(|output| PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()));
    if !sysroot.is_some_and(|sysroot| sysroot.join("lib/rustlib/src/rust/library/core").is_dir()) {
        return Err(format!("no compiler for {TARGET}: run `cargo xtask setup`"));
    }
    let mut command = Command::new("rustup");
    scrub(&mut command);
    command.args(["run", "nightly", "cargo", "-Z", "build-std=core"]);
    Ok(command)
}

/// Removes the outer build's settings: its compiler, wrappers, flags and folders are for another target.
fn scrub(command: &mut Command) {
    let foreign = |name: &str| {
        name.starts_with("RUSTC")
            || name.starts_with("CARGO_ENCODED_")
            || name.starts_with("CARGO_BUILD_")
            || name.starts_with("CARGO_PROFILE_")
            || name.starts_with("CARGO_FEATURE_")
            || name.starts_with("CARGO_CFG_")
            || name.starts_with("CARGO_PKG_")
            || name.starts_with("CARGO_MANIFEST_")
            || matches!(
                name,
                "RUSTFLAGS"
                    | "RUSTUP_TOOLCHAIN"
                    | "CARGO_TARGET_DIR"
                    | "CARGO_MAKEFLAGS"
                    | "TARGET"
                    | "HOST"
                    | "PROFILE"
                    | "OPT_LEVEL"
                    | "DEBUG"
            )
    };
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(foreign) {
            command.env_remove(name);
        }
    }
}

/// bpf-linker, in the search path or where `cargo install` puts it.
fn linker() -> Result<PathBuf, String> {
    let home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::home_dir().map(|home| home.join(".cargo")))
        .map(|home| home.join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(home)
        .map(|folder| folder.join("bpf-linker"))
        .find(|candidate| candidate.is_file())
        .ok_or_else(|| "bpf-linker is not installed: run `cargo xtask setup`".to_owned())
}

fn rustflags(linker: &Path) -> OsString {
    let mut flags = OsString::from("-Clinker=");
    flags.push(linker);
    // BTF tells the kernel, and whoever dumps a map, what the fields are.
    flags.push("\u{1f}-Clink-arg=--btf\u{1f}-Cdebuginfo=2");
    flags
}

fn has(rustc: &Path, folder: &str) -> bool {
    Command::new(rustc)
        .args(["--print", "sysroot"])
        .env_remove("RUSTUP_TOOLCHAIN")
        .output()
        .is_ok_and(|output| Path::new(String::from_utf8_lossy(&output.stdout).trim()).join(folder).is_dir())
}

fn variable(name: &str) -> Result<OsString, String> {
    env::var_os(name).ok_or_else(|| format!("cargo does not set {name}"))
}
