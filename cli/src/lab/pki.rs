//! Certificates of a lab: one authority for all of its clusters, so that each comes to the others as itself.

use std::net::IpAddr;
use std::path::Path;

use jiff::civil::date;

use super::layout::Layout;
use super::topology::Cluster;
use crate::ca::authority::{self, Authority, Files};
use crate::ca::leaf::{Leaf, Role, Validity};

/// A lab lives for hours; fixed dates also hold on machines whose clock is off.
const VALIDITY: Validity = Validity { from: date(2020, 1, 1), to: date(2060, 1, 1) };

/// Makes the lab's authority.
///
/// # Errors
/// If the files cannot be written.
pub(crate) fn make_authority(layout: &Layout) -> anyhow::Result<()> {
    Authority::init(&layout.pki(), &format!("ClusterMesh lab {}", layout.lab()), VALIDITY).map(drop)
}

/// Issues everything for `cluster`, whose etcd is reached at `address`.
///
/// # Errors
/// If the files cannot be written.
pub(crate) fn issue(layout: &Layout, cluster: &Cluster, address: IpAddr) -> anyhow::Result<()> {
    let authority = Authority::open(&layout.pki())?;
    for role in Role::ALL {
        let names = if role == Role::Server { [address.to_string()].into() } else { Default::default() };
        let leaf = Leaf { role, cluster: cluster.name.clone(), names, shared: false, validity: VALIDITY };
        authority.issue(&leaf, false, false)?;
    }
    Ok(())
}

/// Certificate and key of a cluster.
pub(crate) fn certificate(layout: &Layout, cluster: &Cluster, role: Role) -> Files {
    authority::files(&layout.pki(), &cluster.name, role)
}

/// An etcd client configuration as Cilium writes them.
pub(crate) fn etcd_yaml(endpoints: &[String], ca: &Path, client: &Files) -> String {
    let endpoints: String = endpoints.iter().map(|e| format!("- {e}\n")).collect();
    format!(
        "endpoints:\n{endpoints}trusted-ca-file: '{}'\ncert-file: '{}'\nkey-file: '{}'\n",
        ca.display(),
        client.cert.display(),
        client.key.display()
    )
}
