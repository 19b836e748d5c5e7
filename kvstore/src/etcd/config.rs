use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::virtual_cidrs::VirtualCidrs;

/// Where an etcd is and how to prove who we are: the YAML that Cilium keeps for each remote cluster.
/// Unknown keys are ignored.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct EtcdConfig {
    /// `http://host:port` or `https://host:port`; one is chosen at random.
    pub endpoints: Vec<String>,
    /// Certificates of the authorities that may vouch for the server, PEM. Required for `https`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trusted_ca_file: Option<PathBuf>,
    /// Our own certificate, PEM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cert_file: Option<PathBuf>,
    /// Its private key, PEM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_file: Option<PathBuf>,
    /// User name, where certificates do not say it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub username: Option<String>,
    /// Password of that user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password: Option<String>,
    /// What the server has to speak at least. Not one of Cilium's keys.
    #[serde(default, skip_serializing_if = "TlsVersion::is_default")]
    pub tls_min_version: TlsVersion,
    /// By which prefixes the pods of that cluster are known here, if their own addresses are taken. Not one of
    /// Cilium's keys.
    #[serde(default, skip_serializing_if = "VirtualCidrs::is_empty")]
    pub virtual_pod_cidrs: VirtualCidrs,
}

/// A version of TLS, spelled as in etcd's `--tls-min-version`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum TlsVersion {
    /// What etcd 3.5.0 to 3.5.7 speak at most.
    #[serde(rename = "TLS1.2")]
    Tls12,
    /// The default.
    #[default]
    #[serde(rename = "TLS1.3")]
    Tls13,
}

impl TlsVersion {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl EtcdConfig {
    /// Reads the file. The certificates are read later, at each connect, so that renewed ones are used.
    ///
    /// # Errors
    /// The file is missing or unreadable, or says something that cannot be; the text has the path.
    pub fn load(path: &Path) -> Result<Self, EtcdConfigError> {
        let at = |reason| EtcdConfigError { path: Some(path.into()), reason };
        let text = fs::read_to_string(path).map_err(|error| at(format!("cannot be read: {error}")))?;
        Self::parse(&text).map_err(|error| at(error.reason))
    }

    /// [`Self::load`] for the start of a program, when a wrong file is better told than waited for: the
    /// certificates and the key must be readable too.
    ///
    /// # Errors
    /// See [`Self::load`]; a file that cannot be read is named.
    pub fn load_with_files(path: &Path) -> Result<Self, EtcdConfigError> {
        let config = Self::load(path)?;
        let files = [
            ("trusted-ca-file", &config.trusted_ca_file),
            ("cert-file", &config.cert_file),
            ("key-file", &config.key_file),
        ];
        for (key, file) in files.into_iter().filter_map(|(key, file)| Some((key, file.as_deref()?))) {
            fs::File::open(file).map_err(|error| EtcdConfigError {
                path: Some(path.into()),
                reason: format!("`{key}` {} cannot be read: {error}", file.display()),
            })?;
        }
        Ok(config)
    }

    /// Reads the text of such a file.
    ///
    /// # Errors
    /// See [`Self::load`].
    pub fn parse(text: &str) -> Result<Self, EtcdConfigError> {
        // One line; it has line and column.
        let config: Self = serde_saphyr::from_str(text)
            .map_err(|error| EtcdConfigError::new(error.without_snippet().to_string()))?;
        config.check()?;
        Ok(config)
    }

    /// The YAML.
    pub fn to_yaml(&self) -> String {
        // Strings, paths and lists of them always serialize.
        serde_saphyr::to_string(self).expect("a plain struct serializes")
    }

    fn check(&self) -> Result<(), EtcdConfigError> {
        if self.endpoints.is_empty() {
            return Err(EtcdConfigError::new("`endpoints` is empty: name at least one"));
        }
        for endpoint in &self.endpoints {
            let authority = endpoint.strip_prefix("https://").or_else(|| endpoint.strip_prefix("http://"));
            if authority.and_then(|authority| authority.trim_end_matches('/').rsplit_once(':')).is_none() {
                let text = format!("endpoint {endpoint:?} is not of the form https://host:port");
                return Err(EtcdConfigError::new(text));
            }
        }
        let https = self.endpoints.iter().any(|endpoint| endpoint.starts_with("https://"));
        if https && self.trusted_ca_file.is_none() {
            return Err(EtcdConfigError::new("https endpoints need `trusted-ca-file`"));
        }
        if self.cert_file.is_some() != self.key_file.is_some() {
            return Err(EtcdConfigError::new("`cert-file` and `key-file` go together: set both or none"));
        }
        Ok(())
    }
}

impl fmt::Debug for EtcdConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not the password.
        f.debug_struct("EtcdConfig")
            .field("endpoints", &self.endpoints)
            .field("trusted_ca_file", &self.trusted_ca_file)
            .field("cert_file", &self.cert_file)
            .field("username", &self.username)
            .finish_non_exhaustive()
    }
}

/// Where the configuration comes from at each connect.
#[derive(Clone, Debug)]
pub enum EtcdSource {
    /// A file, read again each time.
    Path(PathBuf),
    /// It is known already.
    Parsed(EtcdConfig),
}

impl EtcdSource {
    /// The configuration as it is now.
    ///
    /// # Errors
    /// See [`EtcdConfig::load`].
    pub fn load(&self) -> Result<EtcdConfig, EtcdConfigError> {
        match self {
            Self::Path(path) => EtcdConfig::load(path),
            Self::Parsed(config) => Ok(config.clone()),
        }
    }
}

impl From<EtcdConfig> for EtcdSource {
    fn from(config: EtcdConfig) -> Self {
        Self::Parsed(config)
    }
}

impl From<PathBuf> for EtcdSource {
    fn from(path: PathBuf) -> Self {
        Self::Path(path)
    }
}

/// An etcd configuration that cannot be used. The operator's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EtcdConfigError {
    path: Option<PathBuf>,
    reason: String,
}

impl EtcdConfigError {
    fn new(reason: impl Into<String>) -> Self {
        Self { path: None, reason: reason.into() }
    }
}

impl fmt::Display for EtcdConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.path {
            Some(path) => write!(f, "etcd configuration {}: {}", path.display(), self.reason),
            None => write!(f, "etcd configuration: {}", self.reason),
        }
    }
}

impl std::error::Error for EtcdConfigError {}

#[cfg(test)]
mod tests {
    use super::*;

    const CILIUM: &str = "endpoints:\n- https://alpha.mesh.example:2379\ntrusted-ca-file: /m/alpha.etcd-client-ca.crt\n\
                          key-file: /m/alpha.etcd-client.key\ncert-file: /m/alpha.etcd-client.crt\nadded-later: [1]\n";

    #[test]
    fn reads_what_cilium_writes_and_writes_what_it_reads() {
        let config = EtcdConfig::parse(CILIUM).unwrap();
        assert_eq!(config.endpoints, ["https://alpha.mesh.example:2379"]);
        assert_eq!(config.key_file.as_deref(), Some(Path::new("/m/alpha.etcd-client.key")));
        assert_eq!(config.tls_min_version, TlsVersion::Tls13);
        assert!(!config.to_yaml().contains("tls-min"), "as Cilium has it");
        assert_eq!(EtcdConfig::parse(&config.to_yaml()).unwrap(), config);
        let older = EtcdConfig { tls_min_version: TlsVersion::Tls12, ..config };
        assert_eq!(EtcdConfig::parse(&older.to_yaml()).unwrap(), older);
    }

    #[test]
    fn says_what_is_wrong_and_where() {
        let wrong = [
            ("endpoints: []\n", "name at least one"),
            ("trusted-ca-file: x\n", "endpoints"),
            ("endpoints: [\"localhost:2379\"]\n", "https://host:port"),
            ("endpoints: [\"https://a:1\"]\n", "need `trusted-ca-file`"),
            ("endpoints: [\"http://a:1\"]\ncert-file: x\n", "set both"),
            ("endpoints: [\n", "line 1"),
            ("endpoints: [\"http://a:1\"]\ntls-min-version: TLS1.1\n", "TLS1.2"),
        ];
        for (text, expected) in wrong {
            let error = EtcdConfig::parse(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text:?}: {error}");
            assert_eq!(error.lines().count(), 1, "{error}");
        }
        let missing = EtcdConfig::load(Path::new("/nowhere/alpha")).unwrap_err().to_string();
        assert!(missing.contains("/nowhere/alpha") && missing.contains("No such file"), "{missing}");
    }

    #[test]
    fn names_the_file_that_is_missing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("alpha");
        fs::write(&path, CILIUM).unwrap();
        let error = EtcdConfig::load_with_files(&path).unwrap_err().to_string();
        assert!(error.contains("`trusted-ca-file` /m/alpha.etcd-client-ca.crt"), "{error}");
        EtcdConfig::load(&path).unwrap();
    }
}
