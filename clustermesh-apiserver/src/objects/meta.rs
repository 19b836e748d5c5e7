use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use clustermesh_kvstore::cluster::NamespacedName;
use clustermesh_kvstore::record::Protocol;
use k8s_openapi::api::core::v1;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use serde::{Deserialize, Deserializer};

/// A namespace.
#[derive(Clone, Debug, PartialEq)]
pub struct Namespace {
    /// Name.
    pub name: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Whether the mesh gets to know what is in it; `None` if it leaves that to the default.
    pub global: Option<bool>,
}

/// On a namespace: `"true"` or `"false"`.
const GLOBAL: &str = "clustermesh.cilium.io/global";

impl TryFrom<v1::Namespace> for Namespace {
    type Error = ObjectError;

    fn try_from(object: v1::Namespace) -> Result<Self, ObjectError> {
        let check = Check::new("Namespace", &object.metadata);
        let annotations = check.annotations();
        let global = match annotations.get(GLOBAL) {
            Some(text) if text.eq_ignore_ascii_case("true") => Some(true),
            // What somebody tried to keep to the cluster is not shown for a typing error.
            Some(_) => Some(false),
            None => None,
        };
        Ok(Self { name: check.cluster_scoped_name()?, labels: check.labels()?, global })
    }
}

/// An object that Kubernetes itself would have refused. The author of the object has to correct it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{kind} {name}: {field}: {problem}")]
pub struct ObjectError {
    kind: &'static str,
    name: String,
    field: String,
    problem: String,
}

/// Checks the fields of one object; knows its name for error texts.
pub(super) struct Check<'a> {
    kind: &'static str,
    meta: &'a ObjectMeta,
}

impl<'a> Check<'a> {
    pub(super) fn new(kind: &'static str, meta: &'a ObjectMeta) -> Self {
        Self { kind, meta }
    }

    pub(super) fn error(&self, field: impl Into<String>, problem: impl fmt::Display) -> ObjectError {
        let name = self.meta.name.as_deref().unwrap_or("(without a name)");
        let name = match &self.meta.namespace {
            Some(namespace) => format!("{namespace}/{name}"),
            None => name.to_owned(),
        };
        ObjectError { kind: self.kind, name, field: field.into(), problem: problem.to_string() }
    }

    pub(super) fn cluster_scoped_name(&self) -> Result<String, ObjectError> {
        let name = self.meta.name.clone().ok_or_else(|| self.error("metadata.name", "is missing"))?;
        match is_dns_subdomain(&name) {
            true => Ok(name),
            false => Err(self.error("metadata.name", "use lower-case letters, digits, '-' and '.'")),
        }
    }

    /// As kubectl does, an object without a namespace goes to `default`.
    pub(super) fn namespaced_name(&self) -> Result<NamespacedName, ObjectError> {
        let name = self.cluster_scoped_name()?;
        let namespace = self.meta.namespace.clone().unwrap_or_else(|| "default".to_owned());
        self.name_in(&namespace, name)
    }

    /// The name of something that the object tells of.
    pub(super) fn name_in(&self, namespace: &str, name: String) -> Result<NamespacedName, ObjectError> {
        if !is_dns_label(namespace) {
            return Err(self.error("metadata.namespace", "use lower-case letters, digits and '-'"));
        }
        if !is_dns_subdomain(&name) {
            return Err(self.error("name", format_args!("{name:?} is not a name")));
        }
        Ok(NamespacedName { namespace: namespace.to_owned(), name })
    }

    /// Labels end up in `key=value;` strings that other clusters split again: a `;` in one of them
    /// would forge the rest of an identity.
    pub(super) fn labels(&self) -> Result<BTreeMap<String, String>, ObjectError> {
        let labels = self.meta.labels.clone().unwrap_or_default();
        for (key, value) in &labels {
            if !is_label_key(key) {
                return Err(self.error("metadata.labels", format_args!("{key:?} is not a label key")));
            }
            if !is_label_value(value) {
                let problem = format_args!("{key}: {value:?} is not a label value").to_string();
                return Err(self.error("metadata.labels", problem));
            }
        }
        Ok(labels)
    }

    pub(super) fn annotations(&self) -> BTreeMap<String, String> {
        self.meta.annotations.clone().unwrap_or_default()
    }

    pub(super) fn ip(&self, field: &str, text: &str) -> Result<IpAddr, ObjectError> {
        text.parse::<IpAddr>()
            .map(|ip| ip.to_canonical())
            .map_err(|_| self.error(field, format_args!("{text:?} is not an IP address")))
    }

    pub(super) fn port(&self, field: &str, number: i32) -> Result<u16, ObjectError> {
        match u16::try_from(number) {
            Ok(port) if port != 0 => Ok(port),
            _ => Err(self.error(field, format_args!("{number} is not a port: use 1 to 65535"))),
        }
    }

    pub(super) fn protocol(&self, field: &str, text: Option<&str>) -> Result<Protocol, ObjectError> {
        match text.unwrap_or("TCP") {
            "TCP" => Ok(Protocol::Tcp),
            "UDP" => Ok(Protocol::Udp),
            "SCTP" => Ok(Protocol::Sctp),
            other => Err(self.error(field, format_args!("{other:?} is none of TCP, UDP, SCTP"))),
        }
    }
}

/// Reads of an object's metadata what we use: names, labels, times. The record of who managed which
/// field, larger than many an object, is passed over without being built.
pub(crate) fn lean<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ObjectMeta, D::Error> {
    let meta = lean_with_annotations(deserializer)?;
    Ok(ObjectMeta { annotations: None, ..meta })
}

/// The same, with the annotations.
pub(crate) fn lean_with_annotations<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<ObjectMeta, D::Error> {
    let lean = Lean::deserialize(deserializer)?;
    Ok(ObjectMeta {
        name: lean.name,
        namespace: lean.namespace,
        resource_version: lean.resource_version,
        labels: lean.labels,
        annotations: lean.annotations,
        creation_timestamp: lean.creation_timestamp,
        deletion_timestamp: lean.deletion_timestamp,
        ..ObjectMeta::default()
    })
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Lean {
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    namespace: Option<String>,
    #[serde(default)]
    resource_version: Option<String>,
    #[serde(default)]
    labels: Option<BTreeMap<String, String>>,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
    #[serde(default)]
    creation_timestamp: Option<Time>,
    #[serde(default)]
    deletion_timestamp: Option<Time>,
}

fn is_dns_label(s: &str) -> bool {
    s.len() <= 63 && is_dns_part(s)
}

fn is_dns_part(s: &str) -> bool {
    let inner = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = s.as_bytes();
    bytes.first().is_some_and(inner)
        && bytes.last().is_some_and(inner)
        && bytes.iter().all(|b| inner(b) || *b == b'-')
}

/// Kubernetes limits the length of the whole name, not that of its parts.
fn is_dns_subdomain(s: &str) -> bool {
    s.len() <= 253 && s.split('.').all(is_dns_part)
}

fn is_label_key(key: &str) -> bool {
    match key.split_once('/') {
        Some((prefix, name)) => is_dns_subdomain(prefix) && is_qualified(name),
        None => is_qualified(key),
    }
}

fn is_label_value(value: &str) -> bool {
    value.is_empty() || is_qualified(value)
}

fn is_qualified(s: &str) -> bool {
    let edge = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = s.as_bytes();
    bytes.len() <= 63
        && edge(bytes.first())
        && edge(bytes.last())
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_kubernetes() {
        for good in ["a", "web-0", "alpha.n1", &"x".repeat(253)] {
            assert!(is_dns_subdomain(good), "{good}");
        }
        for bad in ["", "A", "a/b", "a..b", "-a", "a-", "a b", &"x".repeat(254)] {
            assert!(!is_dns_subdomain(bad), "{bad}");
        }
    }

    #[test]
    fn labels_cannot_forge_a_label_string() {
        for good in ["app", "app.kubernetes.io/name", "A_b.c"] {
            assert!(is_label_key(good), "{good}");
        }
        for bad in ["", "a=b", "a;k8s:b", "x/y/z", "/a", "a/"] {
            assert!(!is_label_key(bad), "{bad}");
        }
        assert!(is_label_value(""));
        assert!(!is_label_value("a;k8s:io.kubernetes.pod.namespace=kube-system"));
    }
}
