//! Which kernels there are, and how Debian's archive gives them.

use crate::{setup, shell};
use anyhow::Context as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A kernel series that distributions ship, named as in `--kernel` and in the table of figures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Kernel {
    pub(crate) series: &'static str,
    /// Packages that depend on the newest kernel of a release; that of our series is the one to take.
    /// Which it is depends on the Debian release of this machine.
    meta_packages: &'static [&'static str],
}

/// The oldest that the programs are made for, without links for interfaces (tcx), and one with them.
pub(crate) const ALL: [Kernel; 2] = [
    Kernel { series: "6.1", meta_packages: &["linux-image-cloud-amd64"] },
    Kernel { series: "6.12", meta_packages: &["linux-image-6.12-cloud-amd64", "linux-image-cloud-amd64"] },
];

/// A kernel that can be booted.
#[derive(Debug)]
pub(super) struct Installed {
    /// As `uname -r` says.
    pub(super) release: String,
    pub(super) image: PathBuf,
    pub(super) modules: PathBuf,
}

impl Kernel {
    /// Unpacks the kernel below `folder`, if it is not there yet. Nothing is installed on this machine.
    ///
    /// # Errors
    /// If Debian's archive cannot be reached or has no such kernel.
    pub(super) fn fetch(self, folder: &Path) -> anyhow::Result<Installed> {
        let place = folder.join(format!("kernel-{}", self.series));
        if let Some(installed) = find(&place) {
            return Ok(installed);
        }
        anyhow::ensure!(
            shell::try_output("apt-get", &["--version"]).is_some(),
            "kernels are taken from Debian's archive, and there is no apt-get"
        );
        // The lists of a machine that was just made are empty or old.
        let package = match self.download(&place) {
            Ok(package) => package,
            Err(_) => {
                shell::run(&mut setup::apt_get(&["update", "-q"]))?;
                self.download(&place)?
            }
        };
        unpack(&package, &place)?;
        find(&place).with_context(|| format!("{} holds no kernel", package.display()))
    }

    /// Gives the path of the package.
    fn download(self, place: &Path) -> anyhow::Result<PathBuf> {
        let depends = |meta: &str| shell::try_output("apt-cache", &["depends", meta]);
        let package =
            self.meta_packages.iter().find_map(|meta| newest(&depends(meta)?, self.series)).with_context(
                || format!("Debian's archive, as apt knows it here, has no kernel {}", self.series),
            )?;
        download(&package, place)
    }
}

/// Downloads a package into `place` and gives its path.
pub(super) fn download(package: &str, place: &Path) -> anyhow::Result<PathBuf> {
    let folder = place.join("package");
    // What a run left behind that was ended half-way.
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::create_dir_all(&folder)?;
    // apt's own user may not write here; then apt warns and downloads as who runs it.
    shell::run(setup::apt_get(&["download", "-q", package]).current_dir(&folder))?;
    let mut files = fs::read_dir(&folder)?;
    Ok(files.next().with_context(|| format!("apt-get downloaded no {package}"))??.path())
}

/// Unpacks a package and removes it.
pub(super) fn unpack(package: &Path, place: &Path) -> anyhow::Result<()> {
    let half = place.join("unpacking");
    shell::run(Command::new("dpkg-deb").arg("-x").arg(package).arg(&half))?;
    let whole = place.join("root");
    if whole.exists() {
        fs::remove_dir_all(&whole)?;
    }
    fs::rename(half, whole)?;
    fs::remove_dir_all(place.join("package"))?;
    Ok(())
}

/// The kernel that was unpacked in `place`.
fn find(place: &Path) -> Option<Installed> {
    let root = place.join("root");
    let release = fs::read_dir(root.join("boot"))
        .ok()?
        .flatten()
        .find_map(|entry| entry.file_name().to_str()?.strip_prefix("vmlinuz-").map(str::to_owned))?;
    let modules = ["usr/lib/modules", "lib/modules"]
        .iter()
        .map(|folder| root.join(folder).join(&release))
        .find(|folder| folder.is_dir())?;
    Some(Installed { image: root.join("boot").join(format!("vmlinuz-{release}")), modules, release })
}

/// What a meta package depends on, as `apt-cache depends` prints it, if that is a kernel of this series.
fn newest(depends: &str, series: &str) -> Option<String> {
    let package = depends.lines().find_map(|line| line.trim().strip_prefix("Depends: "))?;
    let version = package.strip_prefix("linux-image-")?;
    version.strip_prefix(series)?.starts_with('.').then(|| package.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_series_decides_which_package_it_is() {
        let depends = "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-56-cloud-amd64\n";
        assert_eq!(newest(depends, "6.1").as_deref(), Some("linux-image-6.1.0-56-cloud-amd64"));
        assert_eq!(newest(depends, "6.12"), None);
        let depends = "linux-image-6.12-cloud-amd64\n  Depends: linux-image-6.12.117+deb12-cloud-amd64\n";
        assert_eq!(newest(depends, "6.1"), None, "6.12 is not 6.1");
        assert!(newest(depends, "6.12").is_some());
        assert_eq!(newest("N: Unable to locate package\n", "6.1"), None);
    }
}
