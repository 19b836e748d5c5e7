//! A certificate authority in a directory.
//!
//! ```text
//! ca.key           private key and certificate of the authority that signs; 0600
//! ca.crt           all authorities to trust: the one that signs, and during a rotation another one
//! next.key         during a rotation: the authority that will sign; 0600
//! CLUSTER/ROLE.crt, CLUSTER/ROLE.key
//! ```
//!
//! Each file is replaced as a whole, and each step of a rotation is one file: whatever is interrupted is
//! completed by running it again.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use clustermesh_kvstore::cluster::ClusterName;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use rcgen::{Issuer, KeyPair};

use super::leaf::{self, Leaf, Role, Validity};
use super::seen::Seen;
use crate::error::usage;
use crate::mesh::entry::{Disk as _, FileSystem};

const SECRET: u32 = 0o600;
const PUBLIC: u32 = 0o644;

/// Certificate and key of one client or server.
#[derive(Clone, Debug)]
pub(crate) struct Files {
    pub(crate) cert: PathBuf,
    pub(crate) key: PathBuf,
}

/// The authority in a directory.
#[derive(Debug)]
pub(crate) struct Authority {
    dir: PathBuf,
    signer: Signer,
}

/// A certificate that was issued.
#[derive(Debug)]
pub(crate) struct Issued {
    pub(crate) cluster: ClusterName,
    pub(crate) role: Role,
    pub(crate) files: Files,
    pub(crate) seen: Seen,
}

impl Authority {
    /// Makes a new authority in `dir`.
    ///
    /// # Errors
    /// There is one already, or the directory cannot be written.
    pub(crate) fn init(dir: &Path, name: &str, validity: Validity) -> anyhow::Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let key = dir.join("ca.key");
        let signer = Signer::generate(name, validity)?;
        create(&key, signer.to_text().as_bytes()).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => usage(format!(
                "{} holds an authority already; `clustermesh ca rotate` replaces it without an interruption",
                dir.display()
            )),
            _ => anyhow::Error::new(error).context(format!("cannot write {}", key.display())),
        })?;
        let authority = Self { dir: dir.to_owned(), signer };
        authority.trust(&[&authority.signer])?;
        Ok(authority)
    }

    /// Opens the authority in `dir`.
    ///
    /// # Errors
    /// There is none, or its key cannot be read.
    pub(crate) fn open(dir: &Path) -> anyhow::Result<Self> {
        let key = dir.join("ca.key");
        let Some(signer) = Signer::read(&key)? else {
            return Err(usage(format!("{} holds no authority: run `clustermesh ca init`", dir.display())));
        };
        let authority = Self { dir: dir.to_owned(), signer };
        if !authority.bundle().exists() {
            // `init` was interrupted between its two files.
            authority.trust(&[&authority.signer])?;
        }
        Ok(authority)
    }

    /// The authorities to trust.
    pub(crate) fn bundle(&self) -> PathBuf {
        bundle(&self.dir)
    }

    /// Issues a certificate. Where there is one already it is replaced if `replace` says so: its key is
    /// kept, so that key and certificate fit together at every moment, unless `new_key` says otherwise.
    ///
    /// # Errors
    /// A usage error if the leaf makes no sense or exists.
    pub(crate) fn issue(&self, leaf: &Leaf, replace: bool, new_key: bool) -> anyhow::Result<Files> {
        let params = leaf.params()?;
        let files = files(&self.dir, &leaf.cluster, leaf.role);
        if !replace && (files.cert.exists() || files.key.exists()) {
            return Err(usage(format!(
                "{} exists: --replace issues it again with the same key, --new-key with another one",
                files.cert.display()
            )));
        }
        let ends = Timestamp::from_second(params.not_after.unix_timestamp())?;
        if ends > self.signer.seen.to {
            let until = date(self.signer.seen.to);
            return Err(usage(format!(
                "the certificate would be valid until {}, longer than the authority, which ends on {until}: give fewer --days, or rotate the authority",
                date(ends)
            )));
        }
        let key = match read_key(&files.key)? {
            Some(key) if !new_key => key,
            _ => KeyPair::generate()?,
        };
        let certificate = params.signed_by(&key, &self.signer.issuer()?)?;
        if let Some(folder) = files.cert.parent() {
            fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        }
        put(&files.key, key.serialize_pem().as_bytes(), SECRET)?;
        put(&files.cert, certificate.pem().as_bytes(), PUBLIC)?;
        Ok(files)
    }

    /// First step of a rotation: there is a second authority, which is trusted but does not sign yet.
    ///
    /// # Errors
    /// If files cannot be written, or the rotation before is not finished.
    pub(crate) fn begin_rotation(&self, name: &str, validity: Validity) -> anyhow::Result<()> {
        let path = self.dir.join("next.key");
        let next = match Signer::read(&path)? {
            // An earlier run got this far.
            Some(next) => next,
            None if self.trusted()?.len() > 1 => {
                return Err(usage("a rotation is under way: run `ca rotate --finish` first"));
            }
            None => {
                let next = Signer::generate(name, validity)?;
                put(&path, next.to_text().as_bytes(), SECRET)?;
                next
            }
        };
        self.trust(&[&self.signer, &next])
    }

    /// Second step: the new authority signs, and has issued everything again. Gives what it has issued.
    ///
    /// # Errors
    /// If there was no first step, or files cannot be written.
    pub(crate) fn reissue(self, days: i32, new_keys: bool) -> anyhow::Result<Vec<Issued>> {
        let next = self.dir.join("next.key");
        let trusted = self.trusted()?;
        let authority = match Signer::read(&next)? {
            Some(signer) => {
                if !trusted.iter().any(|seen| seen.is_same(&signer.seen)) {
                    bail!(
                        "{} does not hold the new authority: run `ca rotate` again",
                        self.bundle().display()
                    );
                }
                fs::rename(&next, self.dir.join("ca.key")).context("cannot let the new authority sign")?;
                Self { dir: self.dir, signer }
            }
            // An earlier run got this far.
            None if trusted.len() > 1 => self,
            None => return Err(usage("no rotation is under way: run `ca rotate` first")),
        };
        let validity = Validity::days(days)?;
        let validity = Validity { to: validity.to.min(day(authority.signer.seen.to)), ..validity };
        let old = authority.issued()?.into_iter().filter(|issued| !authority.has_signed(&issued.seen));
        for Issued { cluster, role, seen, .. } in old {
            let shared = role == Role::Remote && seen.common_name == "remote";
            let names = if role == Role::Server { seen.names } else { Default::default() };
            authority.issue(&Leaf { role, cluster, names, shared, validity }, true, new_keys)?;
        }
        authority.issued()
    }

    /// Last step: only the authority that signs is trusted.
    ///
    /// # Errors
    /// If the other one is still needed.
    pub(crate) fn finish_rotation(&self) -> anyhow::Result<()> {
        if self.dir.join("next.key").exists() {
            return Err(usage("the new authority does not sign yet: run `ca rotate --reissue` first"));
        }
        if let Some(old) = self.issued()?.into_iter().find(|issued| !self.has_signed(&issued.seen)) {
            let cert = old.files.cert.display();
            return Err(usage(format!(
                "{cert} is signed by the old authority: run `ca rotate --reissue` again, or remove it"
            )));
        }
        self.trust(&[&self.signer])
    }

    /// The authorities that are trusted now.
    ///
    /// # Errors
    /// If they cannot be read.
    pub(crate) fn trusted(&self) -> anyhow::Result<Vec<Seen>> {
        let path = self.bundle();
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Seen::all(&text, &path)
    }

    /// Whether the authority that signs now has signed `seen`.
    pub(crate) fn has_signed(&self, seen: &Seen) -> bool {
        seen.is_signed_by(&self.signer.seen)
    }

    /// All certificates in the directory.
    ///
    /// # Errors
    /// If one of them cannot be read.
    pub(crate) fn issued(&self) -> anyhow::Result<Vec<Issued>> {
        let entries =
            fs::read_dir(&self.dir).with_context(|| format!("cannot read {}", self.dir.display()))?;
        let mut clusters: Vec<ClusterName> =
            entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
        clusters.sort();
        let mut all = Vec::new();
        for cluster in clusters {
            for role in Role::ALL {
                let files = files(&self.dir, &cluster, role);
                let Some(text) = read(&files.cert)? else { continue };
                let Some(seen) = Seen::all(&text, &files.cert)?.into_iter().next() else {
                    bail!("{} holds no certificate", files.cert.display());
                };
                all.push(Issued { cluster: cluster.clone(), role, files, seen });
            }
        }
        Ok(all)
    }

    fn trust(&self, signers: &[&Signer]) -> anyhow::Result<()> {
        let text: String = signers.iter().map(|signer| signer.cert.as_str()).collect();
        put(&self.bundle(), text.as_bytes(), PUBLIC)
    }
}

impl Validity {
    /// From yesterday, for clocks that are behind, until `days` from now.
    ///
    /// # Errors
    /// A usage error if that is no time at all, or too long.
    pub(crate) fn days(days: i32) -> anyhow::Result<Self> {
        if days < 1 {
            return Err(usage("--days has to be at least 1"));
        }
        let today = day(Timestamp::now());
        let span = |days: i32| jiff::Span::new().try_days(days);
        let to = span(days).and_then(|span| today.checked_add(span));
        match (today.yesterday(), to) {
            (Ok(from), Ok(to)) if to.year() < 9999 => Ok(Self { from, to }),
            _ => Err(usage(format!("--days {days} is too long"))),
        }
    }
}

/// Where the certificate of `role` of `cluster` is.
pub(crate) fn files(dir: &Path, cluster: &ClusterName, role: Role) -> Files {
    let folder = dir.join(cluster.as_str());
    Files { cert: folder.join(format!("{role}.crt")), key: folder.join(format!("{role}.key")) }
}

/// Where the authorities to trust are.
pub(crate) fn bundle(dir: &Path) -> PathBuf {
    dir.join("ca.crt")
}

/// The day of a time, as people write it.
pub(crate) fn date(time: Timestamp) -> String {
    day(time).to_string()
}

fn day(time: Timestamp) -> jiff::civil::Date {
    time.to_zoned(TimeZone::UTC).date()
}

/// Key and certificate that sign.
#[derive(Debug)]
struct Signer {
    key: KeyPair,
    cert: String,
    seen: Seen,
}

impl Signer {
    fn generate(name: &str, validity: Validity) -> anyhow::Result<Self> {
        let key = KeyPair::generate()?;
        let cert = leaf::authority(name, validity)?.self_signed(&key)?.pem();
        Self::new(key, cert, Path::new("the new authority"))
    }

    /// `None` if there is no such file.
    fn read(path: &Path) -> anyhow::Result<Option<Self>> {
        let Some(text) = read(path)? else { return Ok(None) };
        let bad = || format!("{} is not the key of an authority with its certificate", path.display());
        let key = KeyPair::from_pem(&text).with_context(bad)?;
        let start = text.find("-----BEGIN CERTIFICATE-----").with_context(bad)?;
        Self::new(key, text[start..].to_owned(), path).map(Some)
    }

    fn new(key: KeyPair, cert: String, path: &Path) -> anyhow::Result<Self> {
        let seen = Seen::all(&cert, path)?.into_iter().next();
        let seen = seen.with_context(|| format!("{} holds no certificate", path.display()))?;
        Ok(Self { key, cert, seen })
    }

    fn to_text(&self) -> String {
        self.key.serialize_pem() + &self.cert
    }

    fn issuer(&self) -> anyhow::Result<Issuer<'static, &KeyPair>> {
        Issuer::from_ca_cert_pem(&self.cert, &self.key).context("the authority's certificate cannot sign")
    }
}

/// Makes a file that did not exist, whole or not at all.
fn create(path: &Path, contents: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
    let written = (|| {
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(SECRET).open(&temporary)?;
        file.write_all(contents)?;
        file.sync_all()?;
        // Unlike a rename it does not replace.
        fs::hard_link(&temporary, path)
    })();
    // Best effort: nothing reads it.
    let _left = fs::remove_file(&temporary);
    written
}

fn put(path: &Path, contents: &[u8], mode: u32) -> anyhow::Result<()> {
    FileSystem.put(path, contents, mode).with_context(|| format!("cannot write {}", path.display()))
}

fn read(path: &Path) -> anyhow::Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

fn read_key(path: &Path) -> anyhow::Result<Option<KeyPair>> {
    let Some(text) = read(path)? else { return Ok(None) };
    KeyPair::from_pem(&text).map(Some).with_context(|| format!("{} is not a private key", path.display()))
}
