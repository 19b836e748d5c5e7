//! What proves who we are and who the server is, and how a connection is made with it.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use rustls::ClientConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint, Uri};

use super::{EtcdConfig, SessionError, SessionOptions, TlsVersion};

/// The configuration of an etcd with the contents of the files that it names, as they were at one moment.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    config: EtcdConfig,
    ca: Option<Vec<u8>>,
    cert: Option<Vec<u8>>,
    key: Option<Vec<u8>>,
}

impl Credentials {
    /// Reads the files of `config`.
    ///
    /// # Errors
    /// One of them cannot be read; it is named.
    pub fn load(config: EtcdConfig) -> Result<Self, SessionError> {
        let read = |path: &Option<std::path::PathBuf>| {
            let bad = |path: &Path, error| bad_file(path, format!("cannot be read: {error}"));
            path.as_deref().map(|path| std::fs::read(path).map_err(|error| bad(path, error))).transpose()
        };
        let (ca, cert, key) =
            (read(&config.trusted_ca_file)?, read(&config.cert_file)?, read(&config.key_file)?);
        Ok(Self { config, ca, cert, key })
    }

    /// The configuration.
    pub const fn config(&self) -> &EtcdConfig {
        &self.config
    }

    /// When our own certificate ends; `None` without one, or if it cannot be read.
    pub fn expires(&self) -> Option<Timestamp> {
        let (_, pem) = x509_parser::pem::parse_x509_pem(self.cert.as_deref()?).ok()?;
        let ends = pem.parse_x509().ok()?.validity().not_after.timestamp();
        Timestamp::from_second(ends).ok()
    }

    /// TLS 1.3, or 1.2 too where the configuration says so; with the provider that the whole program uses.
    pub(super) fn tls(&self) -> Result<ClientConfig, SessionError> {
        let mut roots = rustls::RootCertStore::empty();
        if let (Some(path), Some(ca)) = (&self.config.trusted_ca_file, &self.ca) {
            for certificate in certificates(path, ca)? {
                roots.add(certificate).map_err(|error| bad_file(path, error.to_string()))?;
            }
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let versions: &[_] = match self.config.tls_min_version {
            TlsVersion::Tls13 => &[&rustls::version::TLS13],
            TlsVersion::Tls12 => &[&rustls::version::TLS13, &rustls::version::TLS12],
        };
        let builder = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            // The provider is the one that was compiled in for these versions.
            .expect("aws-lc supports TLS 1.2 and 1.3")
            .with_root_certificates(roots);
        let own = self.config.cert_file.as_ref().zip(self.cert.as_ref());
        let mut tls = match own.zip(self.config.key_file.as_ref().zip(self.key.as_ref())) {
            Some(((cert_path, cert), (key_path, key))) => {
                let private = PrivateKeyDer::from_pem_slice(key)
                    .map_err(|error| bad_file(key_path, format!("is not a private key: {error}")))?;
                let mismatch =
                    |error| bad_file(cert_path, format!("does not go with {}: {error}", key_path.display()));
                builder.with_client_auth_cert(certificates(cert_path, cert)?, private).map_err(mismatch)?
            }
            None => builder.with_no_client_auth(),
        };
        tls.alpn_protocols = vec![b"h2".to_vec()];
        Ok(tls)
    }
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Not the key.
        f.debug_struct("Credentials").field("config", &self.config).finish_non_exhaustive()
    }
}

/// Connects to `endpoint`, once: the channel does not connect again by itself, so all of its replies come
/// over one connection, which was made with these credentials.
pub(super) async fn channel(
    endpoint: &str,
    tls: Option<Arc<ClientConfig>>,
    options: SessionOptions,
) -> Result<Channel, etcd_client::Error> {
    let origin: Uri = endpoint.parse().map_err(etcd_client::Error::InvalidUri)?;
    // TLS is below what tonic sees; etcd, told by the origin, must see that it is there: it takes no notice
    // of the certificates of clients that seem to come without.
    let address = endpoint.replacen("https://", "http://", 1);
    let endpoint = Endpoint::from_shared(address)
        .map_err(etcd_client::Error::TransportError)?
        .origin(origin)
        .http2_keep_alive_interval(options.keep_alive_interval)
        .keep_alive_timeout(options.keep_alive_timeout)
        .keep_alive_while_idle(true)
        .connect_timeout(options.connect_timeout);
    let used = Arc::new(AtomicBool::new(false));
    let connector = tower::service_fn(move |uri: Uri| {
        let (tls, again) = (tls.clone(), used.swap(true, Ordering::Relaxed));
        async move {
            if again {
                return Err(io::Error::new(io::ErrorKind::NotConnected, "the connection was closed"));
            }
            connect(&uri, tls).await.map(TokioIo::new)
        }
    });
    endpoint.connect_with_connector(connector).await.map_err(etcd_client::Error::TransportError)
}

async fn connect(uri: &Uri, tls: Option<Arc<ClientConfig>>) -> io::Result<Box<dyn Io>> {
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    let stream = TcpStream::connect((host, uri.port_u16().unwrap_or_default())).await?;
    stream.set_nodelay(true)?;
    let Some(tls) = tls else { return Ok(Box::new(stream)) };
    let name = ServerName::try_from(host.to_owned())
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
    Ok(Box::new(TlsConnector::from(tls).connect(name, stream).await?))
}

trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

fn certificates(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, SessionError> {
    let certificates = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| bad_file(path, format!("is not a certificate: {error}")))?;
    match certificates.is_empty() {
        true => Err(bad_file(path, "holds no certificate".into())),
        false => Ok(certificates),
    }
}

fn bad_file(path: &Path, reason: String) -> SessionError {
    SessionError::File { path: path.display().to_string(), reason }
}
