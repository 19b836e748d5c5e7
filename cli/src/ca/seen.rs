//! What a certificate that exists says.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;

use anyhow::Context as _;
use jiff::Timestamp;
use x509_parser::extensions::GeneralName;
use x509_parser::pem::Pem;
use x509_parser::prelude::X509Certificate;

/// A certificate as `show` prints it and as it is issued again.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) common_name: String,
    /// DNS names and addresses.
    pub(crate) names: BTreeSet<String>,
    pub(crate) issuer: String,
    pub(crate) from: Timestamp,
    pub(crate) to: Timestamp,
    der: Vec<u8>,
}

impl Seen {
    /// All certificates in a PEM text, other objects in it left out.
    ///
    /// # Errors
    /// If it is not PEM or one of its certificates cannot be read; `path` is for the message.
    pub(crate) fn all(text: &str, path: &Path) -> anyhow::Result<Vec<Self>> {
        let of_path = || format!("cannot read the certificates in {}", path.display());
        let mut all = Vec::new();
        for pem in Pem::iter_from_buffer(text.as_bytes()) {
            let pem = pem.with_context(of_path)?;
            if pem.label == "CERTIFICATE" {
                all.push(Self::one(pem).with_context(of_path)?);
            }
        }
        Ok(all)
    }

    fn one(pem: Pem) -> anyhow::Result<Self> {
        let certificate = pem.parse_x509().context("not an X.509 certificate")?;
        let name = |name: &x509_parser::x509::X509Name<'_>| {
            let common = name.iter_common_name().next().and_then(|name| name.as_str().ok());
            common.unwrap_or("").to_owned()
        };
        let time = |time: x509_parser::time::ASN1Time| {
            Timestamp::from_second(time.timestamp()).context("its validity is no time")
        };
        let seen = Self {
            common_name: name(certificate.subject()),
            names: names(&certificate),
            issuer: name(certificate.issuer()),
            from: time(certificate.validity().not_before)?,
            to: time(certificate.validity().not_after)?,
            der: Vec::new(),
        };
        Ok(Self { der: pem.contents, ..seen })
    }

    /// Whether it is the same certificate.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        self.der == other.der
    }

    /// Whether `authority` has signed it.
    pub(crate) fn is_signed_by(&self, authority: &Self) -> bool {
        // Key identifiers tell authorities of the same name apart; the signature itself is checked by
        // whoever relies on it.
        let parse = |seen: &Self| {
            let (_, certificate) = x509_parser::parse_x509_certificate(&seen.der).ok()?;
            let mut identifiers = (None, None);
            for extension in certificate.extensions() {
                match extension.parsed_extension() {
                    x509_parser::extensions::ParsedExtension::SubjectKeyIdentifier(id) => {
                        identifiers.0 = Some(id.0.to_vec());
                    }
                    x509_parser::extensions::ParsedExtension::AuthorityKeyIdentifier(id) => {
                        identifiers.1 = id.key_identifier.as_ref().map(|id| id.0.to_vec());
                    }
                    _ => {}
                }
            }
            Some(identifiers)
        };
        match (parse(self), parse(authority)) {
            (Some((_, Some(of_issuer))), Some((Some(of_authority), _))) => of_issuer == of_authority,
            _ => false,
        }
    }
}

fn names(certificate: &X509Certificate<'_>) -> BTreeSet<String> {
    let Ok(Some(extension)) = certificate.subject_alternative_name() else { return BTreeSet::new() };
    let text = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => match bytes.len() {
            4 => <[u8; 4]>::try_from(*bytes).ok().map(|bytes| IpAddr::from(bytes).to_string()),
            _ => <[u8; 16]>::try_from(*bytes).ok().map(|bytes| IpAddr::from(bytes).to_string()),
        },
        _ => None,
    };
    extension.value.general_names.iter().filter_map(text).collect()
}
