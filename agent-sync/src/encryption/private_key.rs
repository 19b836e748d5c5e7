//! This node's private keys: made here, kept in files that only root reads.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use clustermesh_kvstore::record::WireguardKey;
use rand::TryRngCore as _;
use rand::rngs::OsRng;
use x25519_dalek::{PublicKey, StaticSecret};

use super::Slot;

/// Name of the file below the agent's state directory. Its text is that of `wg genkey`.
const FILE: &str = "wireguard.key";
/// The one before it, as long as others may use it.
const PREVIOUS: &str = "wireguard.key.previous";
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

/// The key that is announced, and the one before it while it is still in use.
#[derive(Clone)]
pub struct Keys {
    state_dir: PathBuf,
    current: PrivateKey,
    made: SystemTime,
    previous: Option<PrivateKey>,
}

impl Keys {
    /// Reads the keys below `state_dir`, or makes one there.
    ///
    /// # Errors
    /// See [`KeyError`]. A key that exists is never overwritten.
    pub fn load_or_create(state_dir: &Path) -> Result<Self, KeyError> {
        let previous = PrivateKey::load(&previous_file(state_dir))?.map(|(key, _)| key);
        let (current, made) = match PrivateKey::load(&file(state_dir))? {
            Some(found) => found,
            None => {
                let slot = previous.as_ref().map_or(Slot::FIRST, |key| key.slot().other());
                (create(state_dir, slot)?, SystemTime::now())
            }
        };
        let mut keys = Self { state_dir: state_dir.to_owned(), current, made, previous };
        // A rotation that was cut short before the new key was there, or one that somebody made by hand.
        if keys.previous.as_ref().is_some_and(|previous| previous.slot() == keys.current.slot()) {
            keys.retire()?;
        }
        Ok(keys)
    }

    /// Makes a new key; the present one becomes the previous one.
    ///
    /// # Errors
    /// See [`KeyError`]; then all is as before.
    pub fn rotate(&mut self) -> Result<(), KeyError> {
        let previous = previous_file(&self.state_dir);
        let failed = |source| KeyError::File { what: "write", path: previous.clone(), source };
        remove(&previous).map_err(failed)?;
        // At each moment the present key is in its file, and complete.
        fs::hard_link(file(&self.state_dir), &previous).map_err(failed)?;
        let next = create(&self.state_dir, self.current.slot().other())?;
        self.previous = Some(std::mem::replace(&mut self.current, next));
        self.made = SystemTime::now();
        Ok(())
    }

    /// Nobody uses the previous key any more.
    ///
    /// # Errors
    /// The file cannot be removed.
    pub fn retire(&mut self) -> Result<(), KeyError> {
        let path = previous_file(&self.state_dir);
        remove(&path).map_err(|source| KeyError::File { what: "remove", path, source })?;
        self.previous = None;
        Ok(())
    }

    /// The one that is announced.
    pub fn current(&self) -> &PrivateKey {
        &self.current
    }

    /// When it was made, by its file.
    pub fn made(&self) -> SystemTime {
        self.made
    }

    /// The one before it, if it is still in use.
    pub fn previous(&self) -> Option<&PrivateKey> {
        self.previous.as_ref()
    }

    /// The one in a slot.
    pub(super) fn in_slot(&self, slot: Slot) -> Option<&PrivateKey> {
        [Some(&self.current), self.previous()].into_iter().flatten().find(|key| key.slot() == slot)
    }
}

impl PrivateKey {
    /// Its public key.
    pub fn public(&self) -> WireguardKey {
        // No private key has the neutral element as its public key: its scalar is clamped.
        WireguardKey::new(PublicKey::from(&self.0).to_bytes()).expect("not all zero")
    }

    /// Its bytes, for the kernel.
    pub(crate) fn bytes(&self) -> &[u8; WireguardKey::LENGTH] {
        self.0.as_bytes()
    }

    fn slot(&self) -> Slot {
        Slot::of(&self.public())
    }

    fn random(slot: Slot) -> Result<Self, KeyError> {
        loop {
            let mut bytes = [0; WireguardKey::LENGTH];
            OsRng.try_fill_bytes(&mut bytes).map_err(|error| KeyError::Random(error.to_string()))?;
            let key = Self(bytes.into());
            // Every second one has it.
            if key.slot() == slot {
                return Ok(key);
            }
        }
    }

    /// With the time at which it was written.
    fn load(path: &Path) -> Result<Option<(Self, SystemTime)>, KeyError> {
        let failed = |source| KeyError::File { what: "read", path: path.to_owned(), source };
        let metadata = match fs::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            metadata => metadata.map_err(failed)?,
        };
        let mode = metadata.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(KeyError::Exposed { path: path.to_owned(), mode });
        }
        if metadata.len() > MAX_FILE as u64 {
            return Err(KeyError::Unreadable(path.to_owned()));
        }
        let text = fs::read(path).map_err(failed)?;
        let bytes = BASE64.decode(text.trim_ascii()).ok().and_then(|bytes| bytes.try_into().ok());
        let key: Option<[u8; WireguardKey::LENGTH]> = bytes;
        let key = key.ok_or_else(|| KeyError::Unreadable(path.to_owned()))?;
        Ok(Some((Self(key.into()), metadata.modified().map_err(failed)?)))
    }
}

/// Makes a key of this slot, in place of the one that may be there.
fn create(state_dir: &Path, slot: Slot) -> Result<PrivateKey, KeyError> {
    let key = PrivateKey::random(slot)?;
    let path = file(state_dir);
    let failed = |source| KeyError::File { what: "write", path: path.clone(), source };
    DirBuilder::new().recursive(true).mode(0o700).create(state_dir).map_err(failed)?;
    // Complete or not there, whenever the machine stops.
    let fresh = path.with_extension("new");
    remove(&fresh).map_err(failed)?;
    let mut out = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&fresh).map_err(failed)?;
    out.write_all(format!("{}\n", BASE64.encode(key.bytes())).as_bytes()).map_err(failed)?;
    out.sync_all().map_err(failed)?;
    fs::rename(&fresh, &path).map_err(failed)?;
    File::open(state_dir).and_then(|folder| folder.sync_all()).map_err(failed)?;
    Ok(key)
}

/// The file below `state_dir`.
pub fn file(state_dir: &Path) -> PathBuf {
    state_dir.join(FILE)
}

/// Removes the keys below `state_dir`; none is fine.
///
/// # Errors
/// A file cannot be removed.
pub fn forget(state_dir: &Path) -> Result<(), KeyError> {
    for path in [file(state_dir), previous_file(state_dir)] {
        remove(&path).map_err(|source| KeyError::File { what: "remove", path, source })?;
    }
    Ok(())
}

fn previous_file(state_dir: &Path) -> PathBuf {
    state_dir.join(PREVIOUS)
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

    fn load(state_dir: &Path) -> WireguardKey {
        Keys::load_or_create(state_dir).unwrap().current().public()
    }

    #[test]
    fn a_key_outlives_its_agent_and_is_only_ours() {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("deep/state");
        let key = load(&state);
        assert_eq!(load(&state), key);
        assert_eq!(Slot::of(&key), Slot::FIRST);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&state), mode(&file(&state))), (0o700, 0o600));
        forget(&state).unwrap();
        assert_ne!(load(&state), key);
    }

    #[test]
    fn a_key_that_others_may_know_or_that_is_none_is_refused_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = file(folder.path());
        load(folder.path());
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let refused = || Keys::load_or_create(folder.path()).err().unwrap();
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
        let public = load(folder.path());
        assert_eq!(public.to_string(), "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=");
    }

    #[test]
    fn the_previous_key_stays_until_it_is_retired_whatever_happens_meanwhile() {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path();
        let mut keys = Keys::load_or_create(state).unwrap();
        let first = keys.current().public();
        keys.rotate().unwrap();
        let second = keys.current().public();
        assert_ne!(Slot::of(&first), Slot::of(&second));
        let again = || {
            let keys = Keys::load_or_create(state).unwrap();
            (keys.current().public(), keys.previous().map(PrivateKey::public))
        };
        assert_eq!(again(), (second, Some(first)));
        keys.retire().unwrap();
        assert_eq!(again(), (second, None));

        // Cut short after the copy was made: as if nothing had happened.
        fs::hard_link(file(state), previous_file(state)).unwrap();
        assert_eq!(again(), (second, None));
        assert!(!previous_file(state).exists());
        // The present one is lost: the next is in the other slot than what others may still use.
        keys.rotate().unwrap();
        fs::remove_file(file(state)).unwrap();
        let (third, previous) = again();
        assert_eq!((previous, Slot::of(&third)), (Some(second), Slot::of(&second).other()));
        forget(state).unwrap();
        assert_eq!(fs::read_dir(state).unwrap().count(), 0);
    }
}
