//! What agents have left in a BPF file system, and how it is taken away.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use super::{Datapath, INTERFACE_PROGRAMS, links, maps, pins};
use crate::{DatapathError, abi::Config, sys};

/// All names that are ours begin so.
const PREFIX: &str = "cm_";

/// A datapath without an agent. No agent can start on it, and nobody else take it away, while this exists.
#[derive(Debug)]
pub struct Remains {
    root: PathBuf,
    links: Vec<String>,
    maps: Vec<String>,
    config: Option<Config>,
    lock: File,
}

impl Datapath {
    /// What is pinned under `bpf_root`; none if there is no such folder. Nothing is changed.
    ///
    /// # Errors
    /// [`DatapathError::InUse`] if an agent runs on it, [`DatapathError::Foreign`] if others have pins there.
    pub fn remains(bpf_root: &Path) -> Result<Option<Remains>, DatapathError> {
        let lock = match File::open(bpf_root) {
            Ok(lock) => lock,
            Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(pins::failed("open", bpf_root, source)),
        };
        let foreign = |what: String| DatapathError::Foreign { root: bpf_root.to_owned(), what };
        if !sys::is_bpffs(bpf_root).map_err(|source| pins::failed("look at", bpf_root, source))? {
            return Err(foreign("it is not in a BPF file system".to_owned()));
        }
        pins::lock_root(&lock, bpf_root)?;
        if let Some(other) = names(bpf_root)?.into_iter().find(|name| name != "links" && name != "maps") {
            return Err(foreign(format!("{other} is none of ours")));
        }
        let (links, maps) = (names(&bpf_root.join("links"))?, names(&bpf_root.join("maps"))?);
        if let Some(other) = links.iter().chain(&maps).find(|name| !name.starts_with(PREFIX)) {
            return Err(foreign(format!("{other} is none of ours")));
        }
        let config = bpf_root.join("maps").join("cm_config");
        // One that cannot be read is a reason to take it away.
        let config = config.exists().then(|| maps::read_config(&config).ok()).flatten();
        Ok(Some(Remains { root: bpf_root.to_owned(), links, maps, config, lock }))
    }
}

impl Remains {
    /// Takes the programs off their hooks, then the maps. Traffic of the mesh ends with it.
    ///
    /// # Errors
    /// [`DatapathError::File`] if a pin cannot be removed; what was not reached stays.
    pub fn remove(self) -> Result<(), DatapathError> {
        if !links::has_tcx() {
            links::remove_filters(&INTERFACE_PROGRAMS);
        }
        let removed = pins::remove_all(&self.root);
        sys::unlock(&self.lock);
        removed
    }

    /// Pinned links, by name.
    #[must_use]
    pub fn links(&self) -> &[String] {
        &self.links
    }

    /// Pinned maps, by name.
    #[must_use]
    pub fn maps(&self) -> &[String] {
        &self.maps
    }

    /// What the node was configured as, if that can be read.
    #[must_use]
    pub fn config(&self) -> Option<Config> {
        self.config
    }
}

/// Sorted; none of a folder that is not there.
fn names(folder: &Path) -> Result<Vec<String>, DatapathError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(pins::failed("read", folder, source)),
    };
    let mut names: Vec<String> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort_unstable();
    Ok(names)
}
