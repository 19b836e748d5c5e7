use std::collections::BTreeMap;

use clustermesh_kvstore::labels::Labels;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize;

use crate::objects::meta::{Check, ObjectError, lean};

/// A number and the labels that it stands for.
#[derive(Clone, Debug, PartialEq)]
pub struct CiliumIdentity {
    /// The number, in decimal digits: the name of the object.
    pub name: String,
    /// The labels as text, `None` if there are none: then the identity means nothing.
    pub labels: Option<String>,
    /// Namespace of the pods that have it, unless it is not about pods.
    pub namespace: Option<String>,
}

/// `cilium.io/v2` CiliumIdentity.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct IdentityResource {
    #[serde(default, deserialize_with = "lean")]
    pub(crate) metadata: ObjectMeta,
    #[serde(rename = "security-labels", default)]
    labels: Option<BTreeMap<String, String>>,
}

impl TryFrom<IdentityResource> for CiliumIdentity {
    type Error = ObjectError;

    fn try_from(object: IdentityResource) -> Result<Self, ObjectError> {
        let check = Check::new("CiliumIdentity", &object.metadata);
        let name = check.cluster_scoped_name()?;
        if name.parse::<u32>().ok().is_none_or(|number| number.to_string() != name) {
            return Err(check.error("metadata.name", "is not the number of an identity"));
        }
        let mut labels = Labels::default();
        for (key, value) in object.labels.iter().flatten() {
            if key.contains([';', '=']) || value.contains(';') {
                let problem = format_args!("{key:?}: {value:?} is not a label").to_string();
                return Err(check.error("security-labels", problem));
            }
            let (source, key) = source_of(key);
            labels.insert(source, key, value);
        }
        let namespace = labels.find("io.kubernetes.pod.namespace").map(|label| label.value.clone());
        Ok(Self { name, labels: (!labels.0.is_empty()).then(|| labels.to_string()), namespace })
    }
}

/// `source:key`; a key of Cilium's own may leave out the source.
fn source_of(label: &str) -> (&str, &str) {
    match label.split_once(':') {
        Some((source, key)) if !source.is_empty() && !key.is_empty() => (source, key),
        _ => ("unspec", label),
    }
}
