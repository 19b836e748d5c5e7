//! The guest's file system: an archive that the kernel unpacks into memory.

use crate::shell;
use anyhow::Context as _;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Programs of this machine that the guest gets, with their libraries. Everything else is busybox's.
const TOOLS: &[&str] = &["ip", "tc", "setpriv", "nsenter", "unshare"];
/// Those that only scenarios need.
const LAB_TOOLS: &[&str] = &["etcd", "etcdctl"];

/// A file system that is being put together in a folder.
pub(super) struct Image {
    root: PathBuf,
    libraries: BTreeSet<PathBuf>,
}

impl Image {
    /// An empty one; what is in the folder is removed.
    pub(super) fn new(folder: &Path) -> anyhow::Result<Self> {
        if folder.exists() {
            fs::remove_dir_all(folder).with_context(|| format!("cannot remove {}", folder.display()))?;
        }
        for place in
            ["bin", "usr/bin", "etc", "opt/clustermesh/bin", "opt/modules", "src", "dev", "proc", "sys"]
        {
            fs::create_dir_all(folder.join(place))?;
        }
        fs::write(
            folder.join("etc/passwd"),
            "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n",
        )?;
        fs::write(folder.join("etc/hosts"), "127.0.0.1 localhost\n::1 localhost\n")?;
        let mut image = Self { root: folder.to_owned(), libraries: BTreeSet::new() };
        image.tool("busybox", "bin")?;
        // Busybox's own shell prefers its own commands to any in the search path.
        image.tool("sh", "bin")?;
        for tool in TOOLS {
            image.tool(tool, "usr/bin")?;
        }
        Ok(image)
    }

    /// What a lab needs besides our programs.
    pub(super) fn lab_tools(&mut self) -> anyhow::Result<()> {
        LAB_TOOLS.iter().try_for_each(|tool| self.tool(tool, "usr/bin"))
    }

    /// A program of this machine.
    pub(super) fn tool(&mut self, name: &str, place: &str) -> anyhow::Result<()> {
        let path = find_program(name).with_context(|| format!("there is no {name} on this machine"))?;
        self.program(&path, place, name)
    }

    /// A program that was built here, without what debuggers read.
    pub(super) fn built(&mut self, path: &Path, name: &str) -> anyhow::Result<()> {
        self.closure(path)?;
        let target = self.root.join("opt/clustermesh/bin").join(name);
        shell::run_quietly(Command::new("strip").arg("--strip-debug").arg("-o").arg(target).arg(path))
    }

    /// A program that lies somewhere else, under a name.
    pub(super) fn program(&mut self, path: &Path, place: &str, name: &str) -> anyhow::Result<()> {
        self.closure(path)?;
        copy(path, &self.root.join(place).join(name))
    }

    /// A folder with everything in it, below the one that programs run in.
    pub(super) fn source(&self, from: &Path, name: &str) -> anyhow::Result<()> {
        copy_all(from, &self.root.join("src").join(name))
    }

    /// A folder of this machine with everything in it, where it is here.
    pub(super) fn folder(&self, path: &Path) -> anyhow::Result<()> {
        copy_all(path, &self.root.join(path.strip_prefix("/")?))
    }

    /// Where kernel modules go.
    pub(super) fn modules(&self) -> PathBuf {
        self.root.join("opt/modules")
    }

    /// A script, by its path in the guest.
    pub(super) fn script(&self, path: &str, text: &str) -> anyhow::Result<()> {
        let target = self.root.join(path);
        fs::write(&target, text)?;
        fs::set_permissions(&target, fs::Permissions::from_mode(0o755))?;
        Ok(())
    }

    /// Writes the archive; its size in bytes.
    pub(super) fn pack(&self, archive: &Path) -> anyhow::Result<u64> {
        let mut command = Command::new("cpio");
        command
            .args(["--create", "--format=newc", "--null", "--quiet", "--owner=0:0"])
            .current_dir(&self.root);
        command.stdin(Stdio::piped()).stdout(File::create(archive)?);
        let mut child = command.spawn().context("cannot run cpio")?;
        let mut names = Vec::new();
        list(&self.root, Path::new(""), &mut names)?;
        // It ends at the end of its input, which is when this is dropped.
        child.stdin.take().context("cpio has no input")?.write_all(&names)?;
        let status = child.wait()?;
        anyhow::ensure!(status.success(), "cpio failed ({status})");
        Ok(fs::metadata(archive)?.len())
    }

    /// The libraries that a program loads, and what loads them.
    fn closure(&mut self, program: &Path) -> anyhow::Result<()> {
        // It fails on a program without any.
        let text = shell::try_output("ldd", &[&program.to_string_lossy()]).unwrap_or_default();
        for library in libraries(&text)? {
            if self.libraries.insert(library.clone()) {
                copy(&library, &self.root.join(library.strip_prefix("/")?))?;
            }
        }
        Ok(())
    }
}

/// Paths that `ldd` prints.
fn libraries(text: &str) -> anyhow::Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for line in text.lines().map(str::trim) {
        anyhow::ensure!(!line.contains("not found"), "a library is missing on this machine: {line}");
        let path = line.split_once(" => ").map_or(line, |(_, path)| path);
        if let Some((path, _address)) = path.split_once(" (0x")
            && path.starts_with('/')
        {
            paths.push(path.into());
        }
    }
    Ok(paths)
}

/// All below `folder`, each name ended by a zero, folders before what is in them.
fn list(root: &Path, folder: &Path, names: &mut Vec<u8>) -> anyhow::Result<()> {
    let mut entries: Vec<PathBuf> = fs::read_dir(root.join(folder))?
        .map(|entry| Ok(folder.join(entry?.file_name())))
        .collect::<anyhow::Result<_>>()?;
    entries.sort();
    for entry in entries {
        names.extend_from_slice(entry.as_os_str().as_encoded_bytes());
        names.push(0);
        if root.join(&entry).symlink_metadata()?.is_dir() {
            list(root, &entry, names)?;
        }
    }
    Ok(())
}

fn copy_all(from: &Path, target: &Path) -> anyhow::Result<()> {
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        fs::create_dir_all(target.join(&folder))?;
        for entry in
            fs::read_dir(from.join(&folder)).with_context(|| format!("cannot read {}", from.display()))?
        {
            let inside = folder.join(entry?.file_name());
            match from.join(&inside).is_dir() {
                true => folders.push(inside),
                false => copy(&from.join(&inside), &target.join(&inside))?,
            }
        }
    }
    Ok(())
}

fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::copy(from, to).with_context(|| format!("cannot copy {}", from.display()))?;
    Ok(())
}

/// In the search path, or where only root's has it.
fn find_program(name: &str) -> Option<PathBuf> {
    shell::find_program(name, ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_ldd_prints() {
        let text = "\tlinux-vdso.so.1 (0x00007ffd)\n\
            \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f1e)\n\
            \t/lib64/ld-linux-x86-64.so.2 (0x00007f1f)\n";
        let expected = ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from);
        assert_eq!(libraries(text).unwrap(), expected);
        assert_eq!(libraries("\tstatically linked\n").unwrap(), Vec::<PathBuf>::new());
        libraries("\tlibbpf.so.1 => not found\n").unwrap_err();
    }

    #[test]
    fn folders_come_before_what_is_in_them() {
        let mut names = Vec::new();
        list(Path::new(env!("CARGO_MANIFEST_DIR")), Path::new("src"), &mut names).unwrap();
        let names = String::from_utf8(names).unwrap();
        let place = |name: &str| names.split('\0').position(|other| other == name).unwrap();
        assert!(place("src/vm") < place("src/vm/image.rs"));
    }
}
