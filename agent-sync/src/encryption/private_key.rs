//! This node's private key: made once, kept in a file that only root reads.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use clustermesh_kvstore::record::WireguardKey;
use rand::TryRngCore as _;
use rand::rngs::OsRng;
use x25519_dalek::{PublicKey, StaticSecret};

/// Name of the file below the agent's state directory. Its text is that of `wg genkey`.
const FILE: &str = "wireguard.key";
/// The longest file that is read, in bytes.
const MAX_FILE: usize = 256;

/// A private key of Curve25519. Overwritten in memory when it is dropped, and never printed.
#[derive(Clone)]
pub struct PrivateKey(StaticSecret);

/// Why there is no key. It is the operator's to correct.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file or its directory.
    #[error("cannot {what} {}: {source}; correct --state-dir, or its permissions", path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Somebody else may know it.
    #[error(
        "{} can be read by others than its owner (mode {mode:03o}): the key may be known. Remove it, so that a \
         new one is made, or `chmod 600` it if you are sure", path.display()
    )]
    Exposed {
        /// Which file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// Something else is in the file.
    #[error("{} holds no WireGuard private key (32 bytes in base64): remove it, and a new one is made", .0.display())]
    Unreadable(PathBuf),
    /// The kernel's random numbers.
    #[error("the kernel gives no random numbers: {0}")]
    Random(String),
}

impl PrivateKey {
    /// Reads the key below `state_dir`, or makes one there.
    ///
    /// # Errors
    /// See [`KeyError`]. A key that exists is never overwritten.
    pub fn load_or_create(state_dir: &Path) -> Result<Self, KeyError> {
        match Self::load(state_dir)? {
            Some(key) => Ok(key),
            None => Self::create(state_dir),
        }
    }

    /// Its public key.
    pub fn public(&self) -> WireguardKey {
        // No private key has the neutral element as its public key: its scalar is clamped.
        WireguardKey::new(PublicKey::from(&self.0).to_bytes()).expect("not all zero")
    }

    /// Its bytes, for the kernel.
    pub(crate) fn bytes(&self) -> &[u8; WireguardKey::LENGTH] {
        self.0.as_bytes()
    }

    fn load(state_dir: &Path) -> Result<Option<Self>, KeyError> {
        let path = file(state_dir);
        let failed = |source| KeyError::File { what: "read", path: path.clone(), source };
        let metadata = match fs::metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            metadata => metadata.map_err(failed)?,
        };
        let mode = metadata.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(KeyError::Exposed { path, mode });
        }
        if metadata.len() > MAX_FILE as u64 {
            return Err(KeyError::Unreadable(path));
        }
        let text = fs::read(&path).map_err(failed)?;
        let bytes = BASE64.decode(text.trim_ascii()).ok().and_then(|bytes| bytes.try_into().ok());
        let key: Option<[u8; WireguardKey::LENGTH]> = bytes;
        key.map(|key| Some(Self(key.into()))).ok_or(KeyError::Unreadable(path))
    }

    fn create(state_dir: &Path) -> Result<Self, KeyError> {
        let mut bytes = [0; WireguardKey::LENGTH];
        OsRng.try_fill_bytes(&mut bytes).map_err(|error| KeyError::Random(error.to_string()))?;
        let key = Self(bytes.into());
        let path = file(state_dir);
        let failed = |source| KeyError::File { what: "write", path: path.clone(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(state_dir).map_err(failed)?;
        // Complete or not there, whenever the machine stops.
        let fresh = path.with_extension("new");
        remove(&fresh).map_err(failed)?;
        let mut out =
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(&fresh).map_err(failed)?;
        out.write_all(format!("{}\n", BASE64.encode(key.bytes())).as_bytes()).map_err(failed)?;
        out.sync_all().map_err(failed)?;
        fs::rename(&fresh, &path).map_err(failed)?;
        File::open(state_dir).and_then(|folder| folder.sync_all()).map_err(failed)?;
        Ok(key)
    }
}

/// The file below `state_dir`.
pub fn file(state_dir: &Path) -> PathBuf {
    state_dir.join(FILE)
}

/// Removes the key below `state_dir`; one that is not there is fine.
///
/// # Errors
/// The file cannot be removed.
pub fn forget(state_dir: &Path) -> Result<(), KeyError> {
    let path = file(state_dir);
    remove(&path).map_err(|source| KeyError::File { what: "remove", path, source })
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_outlives_its_agent_and_is_only_ours() {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("deep/state");
        let key = PrivateKey::load_or_create(&state).unwrap();
        assert_eq!(PrivateKey::load_or_create(&state).unwrap().public(), key.public());
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&state), mode(&file(&state))), (0o700, 0o600));
        forget(&state).unwrap();
        assert_ne!(PrivateKey::load_or_create(&state).unwrap().public(), key.public());
    }

    #[test]
    fn a_key_that_others_may_know_or_that_is_none_is_refused_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = file(folder.path());
        PrivateKey::load_or_create(folder.path()).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let refused = || PrivateKey::load_or_create(folder.path()).err().unwrap();
        assert!(matches!(refused(), KeyError::Exposed { mode: 0o640, .. }));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        for text in ["", "no key", "AAAA", &"A".repeat(MAX_FILE + 1)] {
            fs::write(&path, text).unwrap();
            assert!(matches!(refused(), KeyError::Unreadable(_)), "{text}");
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
    }

    /// RFC 7748, section 6.1: Alice's keys.
    #[test]
    fn the_public_key_is_the_right_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = file(folder.path());
        fs::write(&path, "dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo=\n").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let public = PrivateKey::load_or_create(folder.path()).unwrap().public();
        assert_eq!(public.to_string(), "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=");
    }
}
