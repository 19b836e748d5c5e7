//! One cluster's entry for a remote one: the files in the directory that its agents watch.
//!
//! An entry `beta` is an etcd configuration `beta` and, beside it, the certificates it names:
//! `beta.etcd-client-ca.crt`, `beta.etcd-client.crt`, `beta.etcd-client.key`. Agents act when the
//! configuration appears, changes or vanishes, so it is written last and removed first. Each file is
//! replaced by a rename; no agent ever reads half of one. [`install`] writes several entries or none.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use clustermesh_kvstore::cluster::ClusterName;
use clustermesh_kvstore::etcd::EtcdConfig;
use clustermesh_kvstore::virtual_cidrs::VirtualCidrs;

use super::plan::EntryState;
use crate::context::Context;
use crate::error::usage;

/// Readable by the agents' user only: among the files are a private key and, perhaps, a password.
const MODE: u32 = 0o600;

/// What should stand in a directory for one remote cluster.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    /// In the order in which they are put; `None`: the file should not exist.
    files: Vec<(PathBuf, Option<Vec<u8>>)>,
    config: PathBuf,
}

impl Entry {
    /// The entry that lets the agents of `reader` follow `peer`, through their mirror if they have one, and know its
    /// pods by these addresses.
    /// Reads the peer's certificates.
    ///
    /// # Errors
    /// A usage error if the directory is missing or a certificate of the peer's context cannot be read.
    pub(crate) fn new(
        reader: &Context,
        peer: &Context,
        virtual_cidrs: &VirtualCidrs,
    ) -> anyhow::Result<Self> {
        if let Some(dir) = reader.config_dirs().find(|dir| !dir.is_dir()) {
            return Err(usage(format!(
                "{}: clustermeshConfig {} is not a directory",
                reader.dir.join(crate::context::FILE).display(),
                dir.display()
            )));
        }
        let mirror = reader.kvstoremesh.as_ref();
        let followed = mirror.map_or(&reader.clustermesh_config, |mirror| &mirror.clustermesh_config);
        let paths = Paths::new(followed, &peer.cluster);
        let etcd = reader.access_to(peer);
        let client = if etcd.cert_file == peer.etcd.cert_file { peer } else { reader };
        let read = |file: &Option<PathBuf>, of: &Context| {
            file.as_ref()
                .map(|path| {
                    fs::read(path).map_err(|e| {
                        usage(format!(
                            "cannot read {} (named in {}): {e}",
                            path.display(),
                            of.dir.join(crate::context::FILE).display()
                        ))
                    })
                })
                .transpose()
        };
        let ca = read(&etcd.trusted_ca_file, peer)?;
        let (cert, key) = (read(&etcd.cert_file, client)?, read(&etcd.key_file, client)?);
        let yaml = EtcdConfig {
            trusted_ca_file: ca.as_ref().map(|_| paths.ca.clone()),
            cert_file: cert.as_ref().map(|_| paths.cert.clone()),
            key_file: key.as_ref().map(|_| paths.key.clone()),
            virtual_pod_cidrs: if mirror.is_none() { virtual_cidrs.clone() } else { VirtualCidrs::default() },
            ..etcd
        }
        .to_yaml();
        let mut files = vec![(paths.ca, ca), (paths.cert, cert), (paths.key, key)];
        // Certificates that are no longer named go after the configuration that named them.
        files.sort_by_key(|(_, contents)| contents.is_none());
        let named = files.partition_point(|(_, contents)| contents.is_some());
        files.insert(named, (paths.config.clone(), Some(yaml.into_bytes())));
        let mut config = paths.config;
        if let Some(mirror) = mirror {
            // The agents follow their own etcd; whose certificates it takes is theirs to know.
            config = Paths::new(&reader.clustermesh_config, &peer.cluster).config;
            let etcd = EtcdConfig { virtual_pod_cidrs: virtual_cidrs.clone(), ..mirror.etcd.clone() };
            files.push((config.clone(), Some(etcd.to_yaml().into_bytes())));
        }
        Ok(Self { files, config })
    }

    /// What stands there now, compared with this entry.
    ///
    /// # Errors
    /// If the directory or a file in it cannot be read.
    pub(crate) fn state(&self) -> anyhow::Result<EntryState> {
        let mut same = true;
        for (path, wanted) in &self.files {
            match fs::symlink_metadata(path) {
                Ok(meta) if meta.is_symlink() => {
                    return Ok(EntryState::Foreign(format!("{} is a symbolic link", path.display())));
                }
                Ok(meta) if !meta.is_file() => {
                    return Ok(EntryState::Foreign(format!("{} is not a file", path.display())));
                }
                Ok(_) | Err(_) => {}
            }
            same &= read_if_present(path)? == *wanted;
        }
        Ok(match (same, self.config.exists()) {
            (true, _) => EntryState::Same,
            // Certificates alone are left-overs; nothing refers to them.
            (false, false) => EntryState::Absent,
            (false, true) => EntryState::Different,
        })
    }
}

/// Writes all `entries`, or none of them: after an error everything is as it was before.
///
/// # Errors
/// [`InstallError`], which says whether the state before could be restored.
pub(crate) fn install(disk: &impl Disk, entries: &[&Entry]) -> Result<(), InstallError> {
    let mut before = Vec::new();
    for (path, contents) in entries.iter().flat_map(|entry| &entry.files) {
        let step = Snapshot::take(path).and_then(|snapshot| {
            // Before the step: a step that fails may still have had its effect.
            before.push(snapshot);
            match contents {
                Some(contents) => disk.put(path, contents, MODE),
                None => disk.remove(path),
            }
        });
        if let Err(source) = step {
            let path = path.clone();
            return Err(match restore(disk, before) {
                Ok(()) => InstallError::Undone { path, source },
                Err(undo) => InstallError::HalfDone { path, source, undo },
            });
        }
    }
    Ok(())
}

/// Removes all that `context` has of `peer`; see [`remove`].
///
/// # Errors
/// Of the file system, with the path.
pub(crate) fn forget(disk: &impl Disk, context: &Context, peer: &ClusterName) -> anyhow::Result<bool> {
    let mut existed = false;
    for dir in context.config_dirs() {
        existed |= remove(disk, dir, peer)?;
    }
    Ok(existed)
}

/// Removes the entry of `peer` in `dir`: the configuration first, which disconnects, then the
/// certificates. Says whether there was a configuration.
///
/// # Errors
/// Of the file system, with the path.
fn remove(disk: &impl Disk, dir: &Path, peer: &ClusterName) -> anyhow::Result<bool> {
    let Paths { ca, cert, key, config } = Paths::new(dir, peer);
    let existed = fs::symlink_metadata(&config).is_ok();
    for path in [&config, &ca, &cert, &key] {
        disk.remove(path)
            .map_err(|e| anyhow::anyhow!("cannot remove {}: {e}; remove it by hand", path.display()))?;
    }
    Ok(existed)
}

/// By which addresses the agents of `reader` know the pods of `peer`, as its entry says; an entry that cannot be read
/// is replaced, and one that is not there says nothing.
pub(crate) fn virtual_cidrs(reader: &Context, peer: &ClusterName) -> VirtualCidrs {
    let Paths { config, .. } = Paths::new(&reader.clustermesh_config, peer);
    EtcdConfig::load(&config).map(|config| config.virtual_pod_cidrs).unwrap_or_default()
}

/// The clusters for which there is an entry, by the rule that agents use: a file that is named like a
/// cluster, other than their own, and contains `endpoints:`. None if the directory cannot be read.
pub(crate) fn peers(context: &Context) -> BTreeSet<ClusterName> {
    let entries = fs::read_dir(&context.clustermesh_config).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            entry.file_name().to_str()?.parse::<ClusterName>().ok().map(|name| (name, entry.path()))
        })
        .filter(|(name, path)| {
            *name != context.cluster && fs::read_to_string(path).is_ok_and(|text| text.contains("endpoints:"))
        })
        .map(|(name, _)| name)
        .collect()
}

/// Not everything could be written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InstallError {
    /// Everything is as it was before.
    #[error("cannot write {}: {source}; neither cluster was changed", path.display())]
    Undone { path: PathBuf, source: io::Error },
    /// Not even that.
    #[error(
        "cannot write {}: {source}; and what was written before cannot be taken back ({undo}): \
         run `clustermesh disconnect` once the file system works",
        path.display()
    )]
    HalfDone { path: PathBuf, source: io::Error, undo: io::Error },
}

/// Changes of single files, each of which happens wholly or not at all.
pub(crate) trait Disk {
    /// Creates or replaces `path`.
    fn put(&self, path: &Path, contents: &[u8], mode: u32) -> io::Result<()>;
    /// Removes `path`; one that is missing is fine.
    fn remove(&self, path: &Path) -> io::Result<()>;
}

/// The file system.
pub(crate) struct FileSystem;

impl Disk for FileSystem {
    fn put(&self, path: &Path, contents: &[u8], mode: u32) -> io::Result<()> {
        let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        // Agents take every file with `endpoints:` in it for a cluster, but for names with a leading dot.
        let temporary = dir.join(format!(".{}.{}", name.to_string_lossy(), std::process::id()));
        // A left-over of a run that was killed.
        self.remove(&temporary)?;
        let written = (|| {
            let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
            // The umask must not take away what a restored file had.
            file.set_permissions(Permissions::from_mode(mode))?;
            file.write_all(contents)?;
            file.sync_all()?;
            fs::rename(&temporary, path)
        })();
        if written.is_err() {
            // Best effort: the first error is the one to report.
            let _ = fs::remove_file(&temporary);
        }
        written?;
        fs::File::open(dir)?.sync_all()
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        match fs::remove_file(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }
}

/// A file as it was, `None` if there was none.
struct Snapshot {
    path: PathBuf,
    file: Option<(Vec<u8>, u32)>,
}

impl Snapshot {
    fn take(path: &Path) -> io::Result<Self> {
        let file = match read_if_present(path)? {
            Some(contents) => Some((contents, fs::metadata(path)?.permissions().mode() & 0o7777)),
            None => None,
        };
        Ok(Self { path: path.into(), file })
    }
}

/// Latest change first. Goes on after an error, and returns the first one.
fn restore(disk: &impl Disk, before: Vec<Snapshot>) -> io::Result<()> {
    let mut result = Ok(());
    for Snapshot { path, file } in before.into_iter().rev() {
        let restored = match file {
            Some((contents, mode)) => disk.put(&path, &contents, mode),
            None => disk.remove(&path),
        };
        result = result.and(restored);
    }
    result
}

fn read_if_present(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(contents) => Ok(Some(contents)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(io::Error::new(e.kind(), format!("{}: {e}", path.display()))),
    }
}

/// The files of one entry.
struct Paths {
    config: PathBuf,
    ca: PathBuf,
    cert: PathBuf,
    key: PathBuf,
}

impl Paths {
    fn new(dir: &Path, peer: &ClusterName) -> Self {
        let file = |suffix: &str| dir.join(format!("{peer}{suffix}"));
        Self {
            config: file(""),
            ca: file(".etcd-client-ca.crt"),
            cert: file(".etcd-client.crt"),
            key: file(".etcd-client.key"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::collections::BTreeMap;

    use clustermesh_kvstore::etcd::TlsVersion;
    use proptest::prelude::*;

    use super::*;
    use crate::context::{Agent, ClientFiles};

    /// Fails at the n-th change, before or after it took effect, and works again for what follows.
    struct FailsAt {
        countdown: Cell<usize>,
        after_the_effect: bool,
    }

    impl FailsAt {
        fn strike(&self, change: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
            let left = self.countdown.get();
            self.countdown.set(left.wrapping_sub(1));
            if left != 0 {
                return change();
            }
            if self.after_the_effect {
                change()?;
            }
            Err(io::Error::other("injected"))
        }
    }

    impl Disk for FailsAt {
        fn put(&self, path: &Path, contents: &[u8], mode: u32) -> io::Result<()> {
            self.strike(|| FileSystem.put(path, contents, mode))
        }
        fn remove(&self, path: &Path) -> io::Result<()> {
            self.strike(|| FileSystem.remove(path))
        }
    }

    fn context(root: &Path, cluster: &str, tls: bool) -> Context {
        let dir = root.join(cluster);
        let pki = dir.join("pki");
        fs::create_dir_all(&pki).unwrap();
        fs::create_dir_all(dir.join("clustermesh")).unwrap();
        let file = |name: &str| {
            let path = pki.join(name);
            fs::write(&path, format!("{name} of {cluster}")).unwrap();
            tls.then_some(path)
        };
        Context {
            cluster: cluster.parse().unwrap(),
            id: 1,
            etcd: EtcdConfig {
                endpoints: vec![format!("{}://{cluster}:2379", if tls { "https" } else { "http" })],
                trusted_ca_file: file("ca.crt"),
                cert_file: file("remote.crt"),
                key_file: file("remote.key"),
                username: None,
                password: None,
                tls_min_version: TlsVersion::default(),
                virtual_pod_cidrs: VirtualCidrs::default(),
            },
            remote: None,
            users: None,
            clustermesh_config: dir.join("clustermesh"),
            kvstoremesh: None,
            agents: vec![Agent { node: "node1".into(), socket: dir.join("agent.sock") }],
            dir,
        }
    }

    /// Name, contents and mode of all files in a directory.
    fn files(dir: &Path) -> BTreeMap<String, (Vec<u8>, u32)> {
        fs::read_dir(dir)
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                let mode = entry.metadata().unwrap().permissions().mode() & 0o7777;
                (entry.file_name().into_string().unwrap(), (fs::read(entry.path()).unwrap(), mode))
            })
            .collect()
    }

    #[test]
    fn an_entry_is_complete_private_and_self_contained() {
        let tmp = tempfile::tempdir().unwrap();
        let (alpha, beta) = (context(tmp.path(), "alpha", true), context(tmp.path(), "beta", true));
        let entry = Entry::new(&alpha, &beta, &VirtualCidrs::default()).unwrap();
        assert_eq!(entry.state().unwrap(), EntryState::Absent);
        install(&FileSystem, &[&entry]).unwrap();
        assert_eq!(entry.state().unwrap(), EntryState::Same);
        assert_eq!(peers(&alpha), BTreeSet::from([beta.cluster.clone()]));

        let dir = &alpha.clustermesh_config;
        let found = files(dir);
        let names: Vec<_> = found.keys().map(String::as_str).collect();
        assert_eq!(
            names,
            ["beta", "beta.etcd-client-ca.crt", "beta.etcd-client.crt", "beta.etcd-client.key"]
        );
        assert!(found.values().all(|(_, mode)| *mode == 0o600));
        assert_eq!(found["beta.etcd-client.key"].0, b"remote.key of beta");
        // As the agent reads it.
        let config = EtcdConfig::load(&dir.join("beta")).unwrap();
        assert_eq!(config.endpoints, ["https://beta:2379"]);
        assert_eq!(config.key_file, Some(dir.join("beta.etcd-client.key")));
        assert_eq!(config.trusted_ca_file, Some(dir.join("beta.etcd-client-ca.crt")));

        assert!(remove(&FileSystem, dir, &beta.cluster).unwrap());
        assert!(files(dir).is_empty());
        assert!(!remove(&FileSystem, dir, &beta.cluster).unwrap(), "a second time is fine");
    }

    #[test]
    fn a_peer_without_a_certificate_for_others_is_read_with_the_own_one() {
        let tmp = tempfile::tempdir().unwrap();
        let (mut alpha, mut beta) = (context(tmp.path(), "alpha", true), context(tmp.path(), "beta", true));
        let file = |key: &str| tmp.path().join("alpha/pki").join(key);
        alpha.remote = Some(ClientFiles { cert_file: file("remote.crt"), key_file: file("remote.key") });
        let written = |alpha: &Context, beta: &Context| {
            install(&FileSystem, &[&Entry::new(alpha, beta, &VirtualCidrs::default()).unwrap()]).unwrap();
            let key = fs::read_to_string(alpha.clustermesh_config.join("beta.etcd-client.key")).unwrap();
            let ca = fs::read_to_string(alpha.clustermesh_config.join("beta.etcd-client-ca.crt")).unwrap();
            (key, ca)
        };
        let ca = "ca.crt of beta".to_owned();
        assert_eq!(written(&alpha, &beta), ("remote.key of beta".to_owned(), ca.clone()));
        (beta.etcd.cert_file, beta.etcd.key_file) = (None, None);
        assert_eq!(written(&alpha, &beta), ("remote.key of alpha".to_owned(), ca));
        fs::remove_file(file("remote.crt")).unwrap();
        let error = Entry::new(&alpha, &beta, &VirtualCidrs::default()).unwrap_err().to_string();
        assert!(error.contains("alpha/context.yaml"), "{error}");
    }

    #[test]
    fn certificates_that_are_no_longer_named_go() {
        let tmp = tempfile::tempdir().unwrap();
        let (alpha, mut beta) = (context(tmp.path(), "alpha", true), context(tmp.path(), "beta", true));
        install(&FileSystem, &[&Entry::new(&alpha, &beta, &VirtualCidrs::default()).unwrap()]).unwrap();
        beta = context(tmp.path(), "beta", false);
        let plain = Entry::new(&alpha, &beta, &VirtualCidrs::default()).unwrap();
        assert_eq!(plain.state().unwrap(), EntryState::Different);
        install(&FileSystem, &[&plain]).unwrap();
        assert_eq!(files(&alpha.clustermesh_config).into_keys().collect::<Vec<_>>(), ["beta"]);
    }

    #[test]
    fn a_missing_certificate_is_found_before_anything_is_written() {
        let tmp = tempfile::tempdir().unwrap();
        let (alpha, beta) = (context(tmp.path(), "alpha", true), context(tmp.path(), "beta", true));
        fs::remove_file(beta.etcd.key_file.as_ref().unwrap()).unwrap();
        let error = Entry::new(&alpha, &beta, &VirtualCidrs::default()).unwrap_err().to_string();
        assert!(error.contains("remote.key") && error.contains("context.yaml"), "{error}");
    }

    #[test]
    fn entries_of_a_secret_mount_are_left_alone() {
        let tmp = tempfile::tempdir().unwrap();
        let (alpha, beta) = (context(tmp.path(), "alpha", true), context(tmp.path(), "beta", true));
        std::os::unix::fs::symlink("..data/beta", alpha.clustermesh_config.join("beta")).unwrap();
        let state = Entry::new(&alpha, &beta, &VirtualCidrs::default()).unwrap().state().unwrap();
        assert!(matches!(&state, EntryState::Foreign(why) if why.contains("symbolic link")), "{state:?}");
    }

    #[test]
    fn a_failure_that_cannot_be_undone_says_so() {
        struct Broken;
        impl Disk for Broken {
            fn put(&self, _: &Path, _: &[u8], _: u32) -> io::Result<()> {
                Err(io::Error::other("no space"))
            }
            fn remove(&self, _: &Path) -> io::Result<()> {
                Err(io::Error::other("read-only"))
            }
        }
        let tmp = tempfile::tempdir().unwrap();
        let (alpha, beta) = (context(tmp.path(), "alpha", true), context(tmp.path(), "beta", true));
        let error = install(&Broken, &[&Entry::new(&alpha, &beta, &VirtualCidrs::default()).unwrap()])
            .unwrap_err()
            .to_string();
        assert!(error.contains("no space") && error.contains("read-only"), "{error}");
    }

    proptest! {
        // Every case is some thirty fsyncs.
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Whatever stood there before, and whichever change fails: both directories are as before, or
        /// (if nothing failed) as wanted.
        #[test]
        fn both_sides_or_none(
            before in proptest::array::uniform2(proptest::array::uniform4(
                proptest::option::of((".{0,8}", proptest::sample::select(vec![0o600u32, 0o640, 0o644, 0o400])))
            )),
            tls in any::<bool>(),
            fails_at in 0usize..9,
            after_the_effect in any::<bool>(),
        ) {
            let tmp = tempfile::tempdir().unwrap();
            let (alpha, beta) = (context(tmp.path(), "alpha", tls), context(tmp.path(), "beta", tls));
            let entries = [Entry::new(&alpha, &beta, &VirtualCidrs::default()).unwrap(), Entry::new(&beta, &alpha, &VirtualCidrs::default()).unwrap()];
            for (entry, contents) in entries.iter().zip(&before) {
                for ((path, _), file) in entry.files.iter().zip(contents) {
                    if let Some((text, mode)) = file {
                        FileSystem.put(path, text.as_bytes(), *mode).unwrap();
                    }
                }
            }
            let look = || [files(&alpha.clustermesh_config), files(&beta.clustermesh_config)];
            let was = look();
            let disk = FailsAt { countdown: Cell::new(fails_at), after_the_effect };
            match install(&disk, &[&entries[0], &entries[1]]) {
                Ok(()) => {
                    prop_assert_eq!(fails_at, 8, "eight changes, so only the ninth never happens");
                    for entry in &entries {
                        prop_assert_eq!(entry.state().unwrap(), EntryState::Same);
                    }
                }
                Err(error) => {
                    prop_assert!(matches!(error, InstallError::Undone { .. }), "{}", error);
                    prop_assert_eq!(look(), was);
                }
            }
        }
    }
}
