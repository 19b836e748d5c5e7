//! What the user asked for: the Kubernetes objects of a cluster, as they were written.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::str::FromStr;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::topology::is_dns_label;
use crate::error::usage;

/// Namespace and name; written `namespace/name`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub(crate) struct ObjectName {
    pub(crate) namespace: String,
    pub(crate) name: String,
}

impl ObjectName {
    pub(crate) fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.to_owned(), name: name.to_owned() }
    }

    /// `namespace.name`, for files and cgroups. Neither part of a pod's name contains a dot.
    pub(crate) fn dotted(&self) -> String {
        format!("{}.{}", self.namespace, self.name)
    }

    fn of(metadata: &ObjectMeta) -> Option<Self> {
        let name = metadata.name.clone().filter(|n| !n.is_empty())?;
        Some(Self { namespace: metadata.namespace.clone().unwrap_or_else(|| "default".to_owned()), name })
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl From<ObjectName> for String {
    fn from(name: ObjectName) -> Self {
        name.to_string()
    }
}

impl TryFrom<String> for ObjectName {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl FromStr for ObjectName {
    type Err = String;
    /// `NAMESPACE/NAME`, or `NAME` in namespace `default`.
    fn from_str(text: &str) -> Result<Self, String> {
        let (namespace, name) = text.split_once('/').unwrap_or(("default", text));
        if namespace.is_empty() || name.is_empty() || name.contains('/') {
            return Err(format!("{text:?}: write NAMESPACE/NAME"));
        }
        Ok(Self::new(namespace, name))
    }
}

/// The kinds that a lab acts on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Namespace,
    Deployment,
    Pod,
    Service,
    EndpointSlice,
    ConfigMap,
    Policy(PolicyKind),
}

/// Kinds of network policies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum PolicyKind {
    Network,
    Cilium,
    CiliumClusterwide,
}

impl PolicyKind {
    pub(crate) const ALL: [Self; 3] = [Self::Network, Self::Cilium, Self::CiliumClusterwide];

    /// As manifests spell it: version and kind.
    pub(crate) const fn written(self) -> (&'static str, &'static str) {
        match self {
            Self::Network => ("networking.k8s.io/v1", "NetworkPolicy"),
            Self::Cilium => ("cilium.io/v2", "CiliumNetworkPolicy"),
            Self::CiliumClusterwide => ("cilium.io/v2", "CiliumClusterwideNetworkPolicy"),
        }
    }

    fn of(version: &str, kind: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|known| known.written() == (version, kind))
    }
}

/// A network policy. A lab passes it on to the apiserver, whose business it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Policy {
    pub(crate) metadata: ObjectMeta,
    #[serde(flatten)]
    pub(crate) content: BTreeMap<String, Value>,
}

impl FromStr for Kind {
    type Err = String;
    /// As `kubectl` has them: singular, plural or short, in any case.
    fn from_str(text: &str) -> Result<Self, String> {
        Ok(match text.to_ascii_lowercase().as_str() {
            "namespace" | "namespaces" | "ns" => Self::Namespace,
            "deployment" | "deployments" | "deploy" => Self::Deployment,
            "pod" | "pods" | "po" => Self::Pod,
            "service" | "services" | "svc" => Self::Service,
            "endpointslice" | "endpointslices" => Self::EndpointSlice,
            "configmap" | "configmaps" | "cm" => Self::ConfigMap,
            "networkpolicy" | "networkpolicies" | "netpol" => Self::Policy(PolicyKind::Network),
            "ciliumnetworkpolicy" | "ciliumnetworkpolicies" | "cnp" => Self::Policy(PolicyKind::Cilium),
            "ciliumclusterwidenetworkpolicy" | "ciliumclusterwidenetworkpolicies" | "ccnp" => {
                Self::Policy(PolicyKind::CiliumClusterwide)
            }
            _ => {
                return Err(format!(
                    "{text:?} is not a kind that a lab knows; use namespace, deployment, pod, service, \
                     endpointslice, configmap, networkpolicy, cnp or ccnp"
                ));
            }
        })
    }
}

/// A reference on the command line: `service/shop/orders`, `pod/client` (in namespace default).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ObjectRef {
    pub(crate) kind: Kind,
    pub(crate) name: ObjectName,
}

impl FromStr for ObjectRef {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let (kind, name) = text
            .split_once('/')
            .ok_or_else(|| format!("{text:?}: write KIND/NAMESPACE/NAME, for example service/shop/orders"))?;
        Ok(Self { kind: kind.parse()?, name: name.parse()? })
    }
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            Kind::Policy(policy) => policy.written().1.to_owned(),
            other => format!("{other:?}"),
        };
        write!(f, "{}/{}", kind.to_lowercase(), self.name)
    }
}

/// All objects of a cluster.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Objects {
    pub(crate) namespaces: BTreeMap<String, Namespace>,
    pub(crate) deployments: BTreeMap<ObjectName, Deployment>,
    pub(crate) pods: BTreeMap<ObjectName, Pod>,
    pub(crate) services: BTreeMap<ObjectName, Service>,
    pub(crate) endpoint_slices: BTreeMap<ObjectName, EndpointSlice>,
    pub(crate) config_maps: BTreeMap<ObjectName, ConfigMap>,
    #[serde(default)]
    pub(crate) policies: BTreeMap<PolicyKind, BTreeMap<ObjectName, Policy>>,
}

impl Objects {
    /// Reads the manifests in `file` into `self`; objects of the same name are replaced. Returns the
    /// kinds that a lab has no use for and left out.
    ///
    /// # Errors
    /// A usage error with file, document and field. `self` may then hold the objects before it.
    pub(crate) fn read(&mut self, file: &Path) -> anyhow::Result<Vec<String>> {
        let text = std::fs::read_to_string(file)
            .map_err(|e| usage(format!("cannot read {}: {e}", file.display())))?;
        self.parse(&text).map_err(|e| usage(format!("{}: {e}", file.display())))
    }

    /// [`Objects::read`] for text.
    fn parse(&mut self, text: &str) -> Result<Vec<String>, String> {
        let mut options = serde_saphyr::Options::default();
        if let Some(budget) = &mut options.budget {
            // A whole cluster may be in one file.
            (budget.max_documents, budget.max_events) = (usize::MAX, usize::MAX);
            (budget.max_nodes, budget.max_total_scalar_bytes) = (usize::MAX, usize::MAX);
        }
        let documents: Vec<Value> = serde_saphyr::from_multiple_with_options(text, options)
            .map_err(|e| e.without_snippet().to_string())?;
        let mut ignored = Vec::new();
        for document in documents {
            if document.is_null() {
                continue;
            }
            if document.get("kind").and_then(Value::as_str) == Some("List") {
                for item in document.get("items").and_then(Value::as_array).into_iter().flatten() {
                    ignored.extend(self.insert(item)?);
                }
            } else {
                ignored.extend(self.insert(&document)?);
            }
        }
        Ok(ignored)
    }

    /// Forgets the object.
    ///
    /// # Errors
    /// If there is none.
    pub(crate) fn remove(&mut self, object: &ObjectRef) -> anyhow::Result<()> {
        let name = &object.name;
        let removed = match object.kind {
            Kind::Namespace => self.remove_namespace(&name.name),
            Kind::Deployment => self.deployments.remove(name).is_some(),
            Kind::Pod => self.pods.remove(name).is_some(),
            Kind::Service => self.services.remove(name).is_some(),
            Kind::EndpointSlice => self.endpoint_slices.remove(name).is_some(),
            Kind::ConfigMap => self.config_maps.remove(name).is_some(),
            Kind::Policy(kind) => {
                self.policies.get_mut(&kind).is_some_and(|policies| policies.remove(name).is_some())
            }
        };
        if removed { Ok(()) } else { Err(self.not_found(object)) }
    }

    /// The metadata of an object, to be changed.
    ///
    /// # Errors
    /// If there is no such object.
    pub(crate) fn metadata_mut(&mut self, object: &ObjectRef) -> anyhow::Result<&mut ObjectMeta> {
        let missing = self.not_found(object);
        let name = &object.name;
        match object.kind {
            Kind::Namespace => self.namespaces.get_mut(&name.name).map(|o| &mut o.metadata),
            Kind::Deployment => self.deployments.get_mut(name).map(|o| &mut o.metadata),
            Kind::Pod => self.pods.get_mut(name).map(|o| &mut o.metadata),
            Kind::Service => self.services.get_mut(name).map(|o| &mut o.metadata),
            Kind::EndpointSlice => self.endpoint_slices.get_mut(name).map(|o| &mut o.metadata),
            Kind::ConfigMap => self.config_maps.get_mut(name).map(|o| &mut o.metadata),
            Kind::Policy(kind) => {
                let policy = self.policies.get_mut(&kind).and_then(|policies| policies.get_mut(name));
                policy.map(|policy| &mut policy.metadata)
            }
        }
        .ok_or(missing)
    }

    /// Sets the number of replicas of a deployment.
    ///
    /// # Errors
    /// If `object` is no deployment of this cluster.
    pub(crate) fn scale(&mut self, object: &ObjectRef, replicas: u16) -> anyhow::Result<()> {
        if object.kind != Kind::Deployment {
            return Err(usage(format!("only deployments can be scaled, not {object}")));
        }
        let missing = self.not_found(object);
        let deployment = self.deployments.get_mut(&object.name).ok_or(missing)?;
        deployment.spec.replicas = Some(replicas.into());
        Ok(())
    }

    fn remove_namespace(&mut self, namespace: &str) -> bool {
        let before = self.len();
        let keep = |name: &ObjectName| name.namespace != namespace;
        self.namespaces.remove(namespace);
        self.deployments.retain(|name, _| keep(name));
        self.pods.retain(|name, _| keep(name));
        self.services.retain(|name, _| keep(name));
        self.endpoint_slices.retain(|name, _| keep(name));
        self.config_maps.retain(|name, _| keep(name));
        for (kind, policies) in &mut self.policies {
            // Those of the whole cluster are in no namespace.
            if *kind != PolicyKind::CiliumClusterwide {
                policies.retain(|name, _| keep(name));
            }
        }
        self.len() != before
    }

    fn insert(&mut self, document: &Value) -> Result<Option<String>, String> {
        let text = |field| document.get(field).and_then(Value::as_str).unwrap_or_default();
        let (kind, version) = (text("kind"), text("apiVersion"));
        if kind.is_empty() || version.is_empty() {
            return Err(
                "a document has no kind or no apiVersion; every Kubernetes object has both".to_owned()
            );
        }
        match (kind, version) {
            ("Namespace", "v1") => {
                let (name, object) = typed::<Namespace>(document, |o| &o.metadata)?;
                self.namespaces.insert(name.name, object);
            }
            ("Deployment", "apps/v1") => {
                let (name, object) = typed::<Deployment>(document, |o| &o.metadata)?;
                if object.spec.replicas.unwrap_or(1) < 0 {
                    return Err(format!("Deployment {name}: spec.replicas must not be negative"));
                }
                self.deployments.insert(name, object);
            }
            ("Pod", "v1") => {
                let (name, object) = typed::<Pod>(document, |o| &o.metadata)?;
                if !is_dns_label(&name.name) {
                    return Err(format!(
                        "Pod {name}: in a lab a pod's name has up to 63 letters, digits and '-'"
                    ));
                }
                self.pods.insert(name, object);
            }
            ("Service", "v1") => {
                let (name, object) = typed::<Service>(document, |o| &o.metadata)?;
                self.services.insert(name, object);
            }
            ("EndpointSlice", "discovery.k8s.io/v1") => {
                let (name, object) = typed::<EndpointSlice>(document, |o| &o.metadata)?;
                self.endpoint_slices.insert(name, object);
            }
            ("ConfigMap", "v1") => {
                let (name, object) = typed::<ConfigMap>(document, |o| &o.metadata)?;
                self.config_maps.insert(name, object);
            }
            _ => {
                let Some(policy) = PolicyKind::of(version, kind) else {
                    return Ok(Some(format!("{version} {kind}")));
                };
                let (name, object) = typed::<Policy>(document, |o| &o.metadata)?;
                self.policies.entry(policy).or_default().insert(name, object);
            }
        }
        Ok(None)
    }

    fn not_found(&self, object: &ObjectRef) -> anyhow::Error {
        let known: Vec<String> = match object.kind {
            Kind::Namespace => self.namespaces.keys().cloned().collect(),
            Kind::Deployment => self.deployments.keys().map(ToString::to_string).collect(),
            Kind::Pod => self.pods.keys().map(ToString::to_string).collect(),
            Kind::Service => self.services.keys().map(ToString::to_string).collect(),
            Kind::EndpointSlice => self.endpoint_slices.keys().map(ToString::to_string).collect(),
            Kind::ConfigMap => self.config_maps.keys().map(ToString::to_string).collect(),
            Kind::Policy(kind) => self
                .policies
                .get(&kind)
                .into_iter()
                .flat_map(BTreeMap::keys)
                .map(ToString::to_string)
                .collect(),
        };
        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        usage(format!("there is no {object} in this cluster (there are: {known})"))
    }

    fn len(&self) -> usize {
        self.namespaces.len()
            + self.deployments.len()
            + self.pods.len()
            + self.services.len()
            + self.endpoint_slices.len()
            + self.config_maps.len()
            + self.policies.values().map(BTreeMap::len).sum::<usize>()
    }
}

fn typed<T: DeserializeOwned>(
    document: &Value,
    metadata: impl Fn(&T) -> &ObjectMeta,
) -> Result<(ObjectName, T), String> {
    let kind = document["kind"].as_str().unwrap_or_default();
    let told = document["metadata"]["name"].as_str().unwrap_or("without a name");
    let object: T = T::deserialize(document).map_err(|e| format!("{kind} {told}: {e}"))?;
    let name = ObjectName::of(metadata(&object)).ok_or_else(|| format!("a {kind} has no metadata.name"))?;
    if !is_dns_label(&name.namespace) {
        return Err(format!("{kind} {name}: {:?} is not a namespace name", name.namespace));
    }
    Ok((name, object))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVICE: &str = "
apiVersion: v1
kind: Service
metadata: {name: orders, namespace: shop}
spec: {selector: {app: orders}, ports: [{port: 80}]}
---
# an empty document is fine
---
apiVersion: v1
kind: List
items:
- {apiVersion: v1, kind: Pod, metadata: {name: client}, spec: {containers: []}}
- {apiVersion: cilium.io/v2, kind: CiliumNetworkPolicy, metadata: {name: x, namespace: shop}, spec: {ingress: []}}
- {apiVersion: v1, kind: Secret, metadata: {name: x}}
";

    #[test]
    fn a_whole_cluster_in_one_file() {
        let service = |n| {
            format!(
                "---\napiVersion: v1\nkind: Service\nmetadata: {{name: s{n}, namespace: shop}}\nspec: {{ports: [{{port: 80}}]}}\n"
            )
        };
        let mut objects = Objects::default();
        objects.parse(&(0..3000).map(service).collect::<String>()).unwrap();
        assert_eq!(objects.services.len(), 3000);
    }

    #[test]
    fn documents_and_lists_are_read_and_other_kinds_reported() {
        let mut objects = Objects::default();
        assert_eq!(objects.parse(SERVICE).unwrap(), ["v1 Secret"]);
        assert!(objects.services.contains_key(&ObjectName::new("shop", "orders")));
        assert!(objects.pods.contains_key(&ObjectName::new("default", "client")));
        let saved = serde_json::to_string(&objects).unwrap();
        let restored: Objects = serde_json::from_str(&saved).unwrap();
        assert_eq!(restored.services, objects.services);
        assert_eq!(restored.policies, objects.policies);
        let policies = &objects.policies[&PolicyKind::Cilium];
        assert!(policies[&ObjectName::new("shop", "x")].content.contains_key("spec"));
    }

    #[test]
    fn mistakes_name_the_object() {
        for (text, expected) in [
            ("kind: Pod", "no apiVersion"),
            ("{apiVersion: v1, kind: Pod}", "Pod"),
            ("{apiVersion: v1, kind: Service, metadata: {name: a, annotations: {x: true}}}", "Service a"),
            ("{apiVersion: v1, kind: Pod, metadata: {name: a.b}}", "Pod default/a.b"),
            ("{apiVersion: v1, kind: Pod, metadata: {name: a, namespace: ../x}}", "not a namespace"),
            ("a: [", "unclosed"),
        ] {
            let error = Objects::default().parse(text).expect_err(text);
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn references() {
        let object: ObjectRef = "svc/shop/orders".parse().unwrap();
        assert_eq!(object, ObjectRef { kind: Kind::Service, name: ObjectName::new("shop", "orders") });
        assert_eq!(object.to_string(), "service/shop/orders");
        for bad in ["orders", "secret/shop/orders", "svc//orders", "svc/a/b/c"] {
            assert!(bad.parse::<ObjectRef>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_namespace_goes_with_what_is_in_it() {
        let mut objects = Objects::default();
        objects.parse(SERVICE).unwrap();
        objects.remove(&"ns/shop".parse().unwrap()).unwrap();
        assert!(objects.services.is_empty() && objects.pods.len() == 1);
        assert!(objects.remove(&"cnp/shop/x".parse().unwrap()).is_err());
        assert!(objects.remove(&"svc/shop/orders".parse().unwrap()).is_err());
    }
}
