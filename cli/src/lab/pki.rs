//! Certificates of a cluster: a CA of its own, one for its etcd, one per client role.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::Context;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, date_time_ymd,
};

use super::state::write_atomically;

/// Files of one certificate.
#[derive(Clone, Debug)]
pub(crate) struct Certificate {
    pub(crate) cert: PathBuf,
    pub(crate) key: PathBuf,
}

/// Where a cluster's certificates are.
#[derive(Clone, Debug)]
pub(crate) struct Pki {
    dir: PathBuf,
}

impl Pki {
    pub(crate) fn at(dir: PathBuf) -> Self {
        Self { dir }
    }

    pub(crate) fn ca(&self) -> PathBuf {
        self.dir.join("ca.crt")
    }

    /// `server`, or a client: `admin`, `local`, `remote`.
    pub(crate) fn certificate(&self, role: &str) -> Certificate {
        Certificate { cert: self.dir.join(format!("{role}.crt")), key: self.dir.join(format!("{role}.key")) }
    }

    /// Issues everything for `cluster`, whose etcd is reached at `addresses`.
    ///
    /// # Errors
    /// If the files cannot be written.
    pub(crate) fn issue(&self, cluster: &str, addresses: &[IpAddr]) -> anyhow::Result<()> {
        std::fs::create_dir_all(&self.dir)
            .with_context(|| format!("cannot create {}", self.dir.display()))?;
        let ca_key = KeyPair::generate()?;
        let mut ca = params(&format!("ClusterMesh lab CA {cluster}"), vec![])?;
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        ca.key_usages =
            vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
        let ca_cert = ca.self_signed(&ca_key)?;
        write_atomically(&self.ca(), ca_cert.pem().as_bytes(), 0o644)?;
        write_atomically(&self.dir.join("ca.key"), ca_key.serialize_pem().as_bytes(), 0o600)?;
        let issuer = Issuer::new(ca, ca_key);

        // etcd also dials itself: its certificate is a client's too.
        let both = [ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let mut names: Vec<String> =
            ["clustermesh-apiserver.cilium.io", "*.mesh.cilium.io", "localhost"].map(str::to_owned).into();
        names.extend(addresses.iter().map(ToString::to_string));
        self.leaf(&issuer, "server", params("clustermesh-apiserver.cilium.io", names)?, &both)?;
        let client = [ExtendedKeyUsagePurpose::ClientAuth];
        for (role, name) in [
            ("admin", format!("admin-{cluster}")),
            ("local", format!("local-{cluster}")),
            ("remote", "remote".to_owned()),
        ] {
            self.leaf(&issuer, role, params(&name, vec![])?, &client)?;
        }
        Ok(())
    }

    fn leaf(
        &self,
        issuer: &Issuer<'_, KeyPair>,
        role: &str,
        mut params: CertificateParams,
        usages: &[ExtendedKeyUsagePurpose],
    ) -> anyhow::Result<()> {
        params.extended_key_usages = usages.to_vec();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate()?;
        let cert = params.signed_by(&key, issuer)?;
        let files = self.certificate(role);
        write_atomically(&files.cert, cert.pem().as_bytes(), 0o644)?;
        write_atomically(&files.key, key.serialize_pem().as_bytes(), 0o600)
    }
}

/// An etcd client configuration as Cilium writes them.
pub(crate) fn etcd_yaml(endpoints: &[String], ca: &Path, client: &Certificate) -> String {
    let endpoints: String = endpoints.iter().map(|e| format!("- {e}\n")).collect();
    format!(
        "endpoints:\n{endpoints}trusted-ca-file: '{}'\ncert-file: '{}'\nkey-file: '{}'\n",
        ca.display(),
        client.cert.display(),
        client.key.display()
    )
}

fn params(common_name: &str, names: Vec<String>) -> anyhow::Result<CertificateParams> {
    let mut params = CertificateParams::new(names)?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    // A lab lives for hours; fixed dates also hold on machines whose clock is off.
    params.not_before = date_time_ymd(2020, 1, 1);
    params.not_after = date_time_ymd(2060, 1, 1);
    Ok(params)
}
