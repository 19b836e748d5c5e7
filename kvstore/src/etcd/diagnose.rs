//! Says in an operator's words why a connection failed.
//!
//! gRPC reports a failed TLS handshake as a broken connection; with TLS 1.3 the server's refusal of our
//! certificate even comes after the handshake. So after a failure the handshake is tried once more by
//! hand, and what rustls says about it is translated.

use std::error::Error;
use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::ServerName;
use rustls::{AlertDescription, CertificateError, ClientConfig, ClientConnection};

use super::SessionError;

/// Tries `endpoint` (`http[s]://host:port`). `None`: the connection and the handshake work.
pub(super) fn dial(
    endpoint: &str,
    tls: Option<Arc<ClientConfig>>,
    timeout: Duration,
) -> Option<SessionError> {
    let unreachable =
        |reason: String| Some(SessionError::Unreachable { endpoints: endpoint.to_owned(), reason });
    let authority = endpoint.split_once("://").map_or(endpoint, |(_, rest)| rest).trim_end_matches('/');
    let addresses: Vec<_> = match authority.to_socket_addrs() {
        Ok(addresses) => addresses.collect(),
        Err(error) => return unreachable(format!("its name cannot be resolved ({error})")),
    };
    let mut failure = io::Error::from(io::ErrorKind::AddrNotAvailable);
    let connected = addresses.iter().find_map(|address| {
        TcpStream::connect_timeout(address, timeout).map_err(|error| failure = error).ok()
    });
    let Some(stream) = connected else { return unreachable(explain_io(&failure)) };
    let tls = tls?;
    let host = authority.rsplit_once(':').map_or(authority, |(host, _)| host).trim_matches(['[', ']']);
    handshake(stream, host, tls, timeout)
        .err()
        .map(|reason| SessionError::Tls { endpoint: endpoint.to_owned(), reason })
}

fn handshake(
    mut stream: TcpStream,
    host: &str,
    tls: Arc<ClientConfig>,
    timeout: Duration,
) -> Result<(), String> {
    let quiet = |error: io::Error| explain(&error);
    stream.set_read_timeout(Some(timeout)).map_err(quiet)?;
    stream.set_write_timeout(Some(timeout)).map_err(quiet)?;
    let name = ServerName::try_from(host.to_owned()).map_err(|error| format!("{host:?}: {error}"))?;
    let mut tls = ClientConnection::new(tls, name).map_err(|error| explain_tls(&error))?;
    let mut stream = rustls::Stream::new(&mut tls, &mut stream);
    // The HTTP/2 preface and empty settings: the server speaks next, or says why it will not.
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").map_err(quiet)?;
    match stream.read(&mut [0; 1]) {
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(quiet(error)),
        _ => Ok(()),
    }
}

/// The reason at the bottom of an error, in words.
pub(super) fn explain(error: &(dyn Error + 'static)) -> String {
    let mut cause = Some(error);
    let mut last = error.to_string();
    while let Some(error) = cause {
        if let Some(tls) = error.downcast_ref::<rustls::Error>() {
            return explain_tls(tls);
        }
        if let Some(io) = error.downcast_ref::<io::Error>() {
            if let Some(tls) = io.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
                return explain_tls(tls);
            }
            if io.raw_os_error().is_some() {
                return explain_io(io);
            }
        }
        last = error.to_string();
        cause = error.source();
    }
    last
}

fn explain_io(error: &io::Error) -> String {
    let hint = match error.kind() {
        io::ErrorKind::ConnectionRefused => "nothing listens there: is etcd running, is the port right?",
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => {
            "no answer: is there a route, does a firewall drop it?"
        }
        io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => "there is no route to it",
        _ => return error.to_string(),
    };
    format!("{hint} ({error})")
}

fn explain_tls(error: &rustls::Error) -> String {
    let hint = match error {
        rustls::Error::InvalidCertificate(reason) => match reason {
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                "the server's certificate is from an authority that `trusted-ca-file` does not hold: fetch that cluster's CA"
            }
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                "the server's certificate has expired: renew it (or set this machine's clock)"
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                "the server's certificate is for another name: use an endpoint that it names"
            }
            _ => "the server's certificate is not acceptable",
        },
        rustls::Error::AlertReceived(alert) => match alert {
            AlertDescription::CertificateRequired => {
                "the server wants a client certificate: set `cert-file` and `key-file`"
            }
            AlertDescription::BadCertificate
            | AlertDescription::UnknownCA
            | AlertDescription::CertificateUnknown
            | AlertDescription::CertificateExpired
            | AlertDescription::DecryptError
            | AlertDescription::AccessDenied => {
                "the server does not accept our client certificate (or wants one): `cert-file` must be signed by its client CA"
            }
            AlertDescription::ProtocolVersion => {
                "the server does not speak TLS 1.3 (etcd 3.5 does from 3.5.8 on): update it, or set `tls-min-version: TLS1.2`"
            }
            _ => "the server broke off the handshake",
        },
        rustls::Error::InvalidMessage(_) => "the server does not speak TLS there: should it be http://?",
        _ => return error.to_string(),
    };
    format!("{hint} ({error})")
}
