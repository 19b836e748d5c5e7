//! What certificates say: the rules by which a mesh's etcds and their clients know each other.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Context as _;
use clustermesh_kvstore::cluster::ClusterName;
use jiff::civil::Date;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyUsagePurpose, SanType, date_time_ymd,
};

use crate::error::usage;

/// The name by which clients know the etcd of any cluster.
const SERVER_NAME: &str = "clustermesh-apiserver.cilium.io";

/// Who a certificate is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub(crate) enum Role {
    /// The cluster's etcd
    Server,
    /// The cluster's exporter and kvstoremesh, which write its etcd
    Admin,
    /// The cluster's own agents
    Agent,
    /// The cluster's agents behind a kvstoremesh of Cilium
    Local,
    /// The cluster as a reader of other clusters' etcds
    Remote,
}

impl Role {
    pub(crate) const ALL: [Self; 5] = [Self::Server, Self::Admin, Self::Agent, Self::Local, Self::Remote];

    /// Name of its files.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Server => "server",
            Self::Admin => "admin",
            Self::Agent => "agent",
            Self::Local => "local",
            Self::Remote => "remote",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// From when to when a certificate counts, in whole days (UTC).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Validity {
    pub(crate) from: Date,
    pub(crate) to: Date,
}

/// A certificate to be issued.
#[derive(Clone, Debug)]
pub(crate) struct Leaf {
    pub(crate) role: Role,
    pub(crate) cluster: ClusterName,
    /// Names and addresses of a server besides those that it always has.
    pub(crate) names: BTreeSet<String>,
    /// One certificate for all other clusters, as in a mesh that does not tell its readers apart.
    pub(crate) shared: bool,
    pub(crate) validity: Validity,
}

impl Leaf {
    /// Common name: to etcd it is the user.
    pub(crate) fn common_name(&self) -> String {
        match self.role {
            Role::Server => SERVER_NAME.into(),
            Role::Remote if self.shared => "remote".into(),
            role => format!("{role}-{}", self.cluster),
        }
    }

    /// Everything that the certificate says.
    ///
    /// # Errors
    /// A usage error: a name that cannot stand in a certificate, or names for a client.
    pub(crate) fn params(&self) -> anyhow::Result<CertificateParams> {
        if self.role != Role::Server && !self.names.is_empty() {
            return Err(usage(format!("names and addresses are for the server; {} is a client", self.role)));
        }
        if self.shared && self.role != Role::Remote {
            return Err(usage("--shared is for the role remote"));
        }
        let mut params = base(&self.common_name(), self.validity)?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.use_authority_key_identifier_extension = true;
        params.is_ca = IsCa::ExplicitNoCa;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        if self.role == Role::Server {
            // etcd also dials itself: its certificate is a client's too.
            params.extended_key_usages.insert(0, ExtendedKeyUsagePurpose::ServerAuth);
        }
        params.subject_alt_names = self.alternative_names()?;
        Ok(params)
    }

    fn alternative_names(&self) -> anyhow::Result<Vec<SanType>> {
        let mut names: BTreeSet<String> = self.names.clone();
        match self.role {
            Role::Server => {
                let loopback = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
                names.extend([SERVER_NAME, "*.mesh.cilium.io", "localhost"].map(str::to_owned));
                names.extend(loopback.map(|address| address.to_string()));
            }
            Role::Admin => drop(names.insert("localhost".into())),
            Role::Agent | Role::Local | Role::Remote => {}
        }
        names.iter().map(|name| alternative_name(name)).collect()
    }
}

/// What the certificate of an authority says.
pub(crate) fn authority(name: &str, validity: Validity) -> anyhow::Result<CertificateParams> {
    let mut params = base(name, validity)?;
    // It issues certificates of clients and servers, not of other authorities.
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.use_authority_key_identifier_extension = true;
    params.key_usages =
        vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    Ok(params)
}

fn base(common_name: &str, validity: Validity) -> anyhow::Result<CertificateParams> {
    let mut params = CertificateParams::new([]).context("cannot make a certificate")?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    let day = |date: Date| {
        // Both are in the ranges that their types promise.
        let number = |part: i8| u8::try_from(part).unwrap_or(1);
        date_time_ymd(i32::from(date.year()), number(date.month()), number(date.day()))
    };
    (params.not_before, params.not_after) = (day(validity.from), day(validity.to));
    Ok(params)
}

fn alternative_name(name: &str) -> anyhow::Result<SanType> {
    if let Ok(address) = name.parse() {
        return Ok(SanType::IpAddress(address));
    }
    let host = name.strip_prefix("*.").unwrap_or(name);
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if host.len() > 253 || !host.split('.').all(label) {
        return Err(usage(format!("{name:?} is neither a DNS name nor an IP address")));
    }
    Ok(SanType::DnsName(name.try_into().with_context(|| format!("{name:?} cannot stand in a certificate"))?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(role: Role) -> Leaf {
        let day = |year| jiff::civil::date(year, 1, 1);
        let validity = Validity { from: day(2026), to: day(2029) };
        Leaf { role, cluster: "alpha".parse().unwrap(), names: BTreeSet::new(), shared: false, validity }
    }

    #[test]
    fn each_role_has_its_name_and_use() {
        use ExtendedKeyUsagePurpose::{ClientAuth, ServerAuth};
        for (role, name, uses, sans) in [
            (Role::Server, SERVER_NAME, &[ServerAuth, ClientAuth][..], 5),
            (Role::Admin, "admin-alpha", &[ClientAuth], 1),
            (Role::Agent, "agent-alpha", &[ClientAuth], 0),
            (Role::Local, "local-alpha", &[ClientAuth], 0),
            (Role::Remote, "remote-alpha", &[ClientAuth], 0),
        ] {
            let params = leaf(role).params().unwrap();
            assert_eq!(leaf(role).common_name(), name);
            assert_eq!(params.extended_key_usages, uses, "{role}");
            assert_eq!(params.subject_alt_names.len(), sans, "{role}");
            assert_eq!(params.is_ca, IsCa::ExplicitNoCa);
        }
        assert_eq!(Leaf { shared: true, ..leaf(Role::Remote) }.common_name(), "remote");
    }

    #[test]
    fn nonsense_is_refused() {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        for (leaf, expected) in [
            (Leaf { names: names(&["etcd.example"]), ..leaf(Role::Agent) }, "for the server"),
            (Leaf { names: names(&["etcd example"]), ..leaf(Role::Server) }, "neither a DNS name"),
            (Leaf { names: names(&["a..b"]), ..leaf(Role::Server) }, "neither a DNS name"),
            (Leaf { shared: true, ..leaf(Role::Admin) }, "--shared"),
        ] {
            let error = leaf.params().unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
            assert_eq!(crate::error::exit_status(&error), 2);
        }
        let good = names(&["etcd.example", "*.mesh.example", "192.0.2.1", "2001:db8::1"]);
        assert_eq!(Leaf { names: good, ..leaf(Role::Server) }.params().unwrap().subject_alt_names.len(), 9);
    }
}
