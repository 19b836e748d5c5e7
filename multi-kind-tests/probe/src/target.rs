//! What a client calls: `http://HOST[:PORT]/PATH` or `udp://HOST:PORT`.

use anyhow::{Context as _, bail};
use std::net::{SocketAddr, ToSocketAddrs as _};

/// How a target is called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Scheme {
    /// One GET of this path over a new TCP connection.
    Http { path: String },
    /// One datagram from a new socket, answered by one.
    Udp,
}

/// A parsed and resolved target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    /// As the caller wrote it.
    pub(crate) text: String,
    pub(crate) scheme: Scheme,
    /// The part between scheme and path; the `Host` header.
    pub(crate) authority: String,
    pub(crate) address: SocketAddr,
}

impl Target {
    /// Parses a target and resolves its host once.
    pub(crate) fn parse(text: &str) -> anyhow::Result<Self> {
        let (scheme, rest) = match text.split_once("://") {
            Some((scheme, rest)) => (scheme, rest),
            None => ("http", text),
        };
        let (authority, path) = match rest.find('/') {
            Some(at) => rest.split_at(at),
            None => (rest, "/"),
        };
        let (scheme, default_port) = match scheme {
            "http" => (Scheme::Http { path: path.to_owned() }, Some(80)),
            "udp" => (Scheme::Udp, None),
            other => bail!("`{text}`: scheme `{other}` is not known; use http:// or udp://"),
        };
        let address = resolve(authority, default_port)?;
        Ok(Self { text: text.to_owned(), scheme, authority: authority.to_owned(), address })
    }
}

/// Resolves `HOST:PORT` (IPv6 in brackets); the port may be left out if there is a default.
pub(crate) fn resolve(authority: &str, default_port: Option<u16>) -> anyhow::Result<SocketAddr> {
    let bare = authority.ends_with(']') || !authority.contains(':');
    let full = match default_port {
        Some(port) if bare => format!("{authority}:{port}"),
        None if bare => bail!("`{authority}` needs a port, as in 10.96.0.10:5353 or [fd00::10]:5353"),
        _ => authority.to_owned(),
    };
    let full = match full.rsplit_once(':') {
        Some((name, port)) => match service_address(name, |variable| std::env::var(variable).ok()) {
            Some(address) if address.contains(':') => format!("[{address}]:{port}"),
            Some(address) => format!("{address}:{port}"),
            None => full,
        },
        None => full,
    };
    full.to_socket_addrs()
        .with_context(|| format!("cannot resolve `{full}`"))?
        .next()
        .with_context(|| format!("`{full}` has no address"))
}

/// The ClusterIP of a service by its name, from the environment that Kubernetes gives to a pod.
fn service_address(name: &str, environment: impl Fn(&str) -> Option<String>) -> Option<String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
    if name.is_empty() || !name.chars().all(plain) {
        return None;
    }
    environment(&format!("{}_SERVICE_HOST", name.to_ascii_uppercase().replace('-', "_")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> String {
        Target::parse(text).expect("valid target").address.to_string()
    }

    #[test]
    fn accepts_both_families_and_default_port() {
        assert_eq!(address("http://10.0.0.1/"), "10.0.0.1:80");
        assert_eq!(address("http://10.0.0.1:8080/x"), "10.0.0.1:8080");
        assert_eq!(address("http://[fd00::1]/"), "[fd00::1]:80");
        assert_eq!(address("[fd00::1]:81"), "[fd00::1]:81");
        assert_eq!(address("udp://[fd00::1]:53"), "[fd00::1]:53");
    }

    #[test]
    fn a_service_is_found_by_its_name() {
        let environment = |name: &str| (name == "REBEL_BASE_SERVICE_HOST").then(|| "10.96.3.4".to_owned());
        assert_eq!(service_address("rebel-base", environment).as_deref(), Some("10.96.3.4"));
        assert_eq!(service_address("other", environment), None);
        assert_eq!(service_address("10.96.0.5", |_| Some("wrong".into())), None);
        assert_eq!(service_address("[fd00::1]", |_| Some("wrong".into())), None);
    }

    #[test]
    fn refuses_what_it_cannot_call() {
        assert!(Target::parse("ftp://10.0.0.1/").is_err());
        assert!(Target::parse("udp://10.0.0.1").is_err());
        assert!(Target::parse("http://10.0.0.1:99999/").is_err());
    }
}
