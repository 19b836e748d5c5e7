use std::collections::BTreeMap;
use std::fs::{self, Metadata};
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use super::parse::ManifestError;
use super::settle::Stamp;

/// What a look at the directory tree showed.
#[derive(Default)]
pub(super) struct Listing {
    /// Manifests by their path below the root.
    pub(super) files: BTreeMap<String, Stamp>,
    /// Directories that could not be read, by their path below the root.
    pub(super) unreadable: Vec<(String, String)>,
    /// Device and inode of the root.
    pub(super) root: (u64, u64),
}

impl Listing {
    /// Whether a file may be there although it was not seen.
    pub(super) fn is_unknown(&self, name: &str) -> bool {
        self.unreadable.iter().any(|(directory, _)| {
            name.strip_prefix(directory.as_str()).is_some_and(|rest| rest.starts_with('/'))
        })
    }
}

/// Lists all manifests below `root`.
///
/// # Errors
/// The root itself cannot be read.
pub(super) fn list(root: &Path) -> io::Result<Listing> {
    let mut listing = Listing { root: inode(&fs::metadata(root)?), ..Listing::default() };
    walk(root, "", &mut vec![listing.root], &mut listing)?;
    Ok(listing)
}

/// The text of a file, or `None` if it has changed or gone meanwhile.
pub(super) fn read(root: &Path, name: &str, stamp: &Stamp) -> Option<Result<String, ManifestError>> {
    let path = root.join(name);
    if stamp.size > MAX_SIZE {
        let what = format_args!("has {} bytes; at most {MAX_SIZE} are read", stamp.size);
        return Some(Err(ManifestError::of_file(what)));
    }
    match fs::read(&path) {
        Ok(bytes) => {
            let now = fs::metadata(&path).ok().map(|metadata| self::stamp(&metadata))?;
            let text = String::from_utf8(bytes).map_err(|_| ManifestError::of_file("is not UTF-8 text"));
            (now == *stamp).then_some(text)
        }
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => Some(Err(ManifestError::of_file(format_args!("cannot be read: {error}")))),
    }
}

const MAX_SIZE: u64 = 256 << 20;
const MAX_DEPTH: usize = 16;

/// Symbolic links are followed, but not into a directory that we are in already.
fn walk(root: &Path, below: &str, path: &mut Vec<(u64, u64)>, listing: &mut Listing) -> io::Result<()> {
    for entry in fs::read_dir(root.join(below))? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        // Editors' and Kubernetes' own (`..data`) temporary names.
        if name.starts_with('.') {
            continue;
        }
        let name = if below.is_empty() { name } else { format!("{below}/{name}") };
        let Ok(metadata) = fs::metadata(entry.path()) else { continue };
        if metadata.is_file() && is_manifest(&entry.path()) {
            listing.files.insert(name, stamp(&metadata));
        } else if metadata.is_dir() && path.len() < MAX_DEPTH && !path.contains(&inode(&metadata)) {
            path.push(inode(&metadata));
            match walk(root, &name, path, listing) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    listing.unreadable.push((name, error.to_string()));
                }
                _ => {}
            }
            path.pop();
        }
    }
    Ok(())
}

fn is_manifest(path: &Path) -> bool {
    path.extension().is_some_and(|extension| ["yaml", "yml", "json"].iter().any(|known| extension == *known))
}

fn inode(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

fn stamp(metadata: &Metadata) -> Stamp {
    let seconds = Duration::from_secs(metadata.ctime().try_into().unwrap_or(0));
    let nanoseconds = Duration::from_nanos(metadata.ctime_nsec().try_into().unwrap_or(0));
    Stamp { inode: inode(metadata), size: metadata.len(), changed: UNIX_EPOCH + seconds + nanoseconds }
}
