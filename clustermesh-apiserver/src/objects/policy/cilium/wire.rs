//! The form of Cilium's policies. Fields that are not known are kept, to be told from none.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde::Deserialize;
use serde_json::Value;

use super::Rest;

/// `spec`.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Rule {
    pub(super) endpoint_selector: Option<LabelSelector>,
    pub(super) node_selector: Option<serde::de::IgnoredAny>,
    pub(super) ingress: Option<Vec<IngressEntry>>,
    pub(super) ingress_deny: Option<Vec<IngressEntry>>,
    pub(super) egress: Option<Vec<EgressEntry>>,
    pub(super) egress_deny: Option<Vec<EgressEntry>>,
    pub(super) enable_default_deny: Option<DefaultDeny>,
    #[serde(flatten)]
    rest: Rest,
}

impl Rule {
    /// A field that may well change what the rule means.
    pub(super) fn unknown(&self) -> Option<&str> {
        let means_nothing = |field: &str| matches!(field, "description" | "labels" | "log");
        self.rest
            .iter()
            .find(|(field, value)| !value.is_null() && !means_nothing(field))
            .map(|(field, _)| field.as_str())
    }
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub(super) struct DefaultDeny {
    pub(super) ingress: Option<bool>,
    pub(super) egress: Option<bool>,
}

/// An entry of `ingress` or `ingressDeny`.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct IngressEntry {
    from_endpoints: Option<Vec<LabelSelector>>,
    from_entities: Option<Vec<String>>,
    #[serde(rename = "fromCIDR")]
    from_cidr: Option<Vec<String>>,
    #[serde(rename = "fromCIDRSet")]
    from_cidr_set: Option<Vec<CidrSet>>,
    to_ports: Option<Vec<PortRule>>,
    icmps: Option<Vec<IcmpRule>>,
    authentication: Option<Authentication>,
    #[serde(flatten)]
    rest: Rest,
}

/// An entry of `egress` or `egressDeny`.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct EgressEntry {
    to_endpoints: Option<Vec<LabelSelector>>,
    to_entities: Option<Vec<String>>,
    #[serde(rename = "toCIDR")]
    to_cidr: Option<Vec<String>>,
    #[serde(rename = "toCIDRSet")]
    to_cidr_set: Option<Vec<CidrSet>>,
    to_ports: Option<Vec<PortRule>>,
    icmps: Option<Vec<IcmpRule>>,
    authentication: Option<Authentication>,
    #[serde(flatten)]
    rest: Rest,
}

/// An entry of either direction.
pub(super) struct Entry {
    pub(super) names: &'static Names,
    pub(super) endpoints: Option<Vec<LabelSelector>>,
    pub(super) entities: Option<Vec<String>>,
    pub(super) cidrs: Option<Vec<String>>,
    pub(super) cidr_sets: Option<Vec<CidrSet>>,
    pub(super) ports: Option<Vec<PortRule>>,
    pub(super) icmps: Option<Vec<IcmpRule>>,
    authentication: Option<Authentication>,
    pub(super) rest: Rest,
}

/// What the fields are called that differ between the directions.
pub(super) struct Names {
    pub(super) endpoints: &'static str,
    pub(super) entities: &'static str,
    pub(super) cidrs: &'static str,
    pub(super) cidr_sets: &'static str,
}

const INGRESS: Names = Names {
    endpoints: "fromEndpoints",
    entities: "fromEntities",
    cidrs: "fromCIDR",
    cidr_sets: "fromCIDRSet",
};

const EGRESS: Names =
    Names { endpoints: "toEndpoints", entities: "toEntities", cidrs: "toCIDR", cidr_sets: "toCIDRSet" };

impl From<IngressEntry> for Entry {
    fn from(entry: IngressEntry) -> Self {
        Self {
            names: &INGRESS,
            endpoints: entry.from_endpoints,
            entities: entry.from_entities,
            cidrs: entry.from_cidr,
            cidr_sets: entry.from_cidr_set,
            ports: entry.to_ports,
            icmps: entry.icmps,
            authentication: entry.authentication,
            rest: entry.rest,
        }
    }
}

impl From<EgressEntry> for Entry {
    fn from(entry: EgressEntry) -> Self {
        Self {
            names: &EGRESS,
            endpoints: entry.to_endpoints,
            entities: entry.to_entities,
            cidrs: entry.to_cidr,
            cidr_sets: entry.to_cidr_set,
            ports: entry.to_ports,
            icmps: entry.icmps,
            authentication: entry.authentication,
            rest: entry.rest,
        }
    }
}

impl Entry {
    pub(super) fn asks_for_authentication(&self) -> bool {
        self.authentication.as_ref().is_some_and(|authentication| authentication.mode != "disabled")
    }
}

/// Addresses: a range, or a reference to a group of ranges, which is one of the unknown.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct CidrSet {
    pub(super) cidr: Option<String>,
    pub(super) except: Option<Vec<String>>,
    #[serde(flatten)]
    pub(super) rest: Rest,
}

/// Ports, and all sorts of things above them that are not known.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct PortRule {
    pub(super) ports: Option<Vec<Port>>,
    #[serde(flatten)]
    pub(super) rest: Rest,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Port {
    pub(super) port: IntOrString,
    pub(super) end_port: Option<i32>,
    pub(super) protocol: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct IcmpRule {
    pub(super) fields: Option<Vec<IcmpField>>,
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct IcmpField {
    pub(super) family: Option<String>,
    #[serde(rename = "type")]
    pub(super) kind: IntOrString,
}

#[derive(Clone, Debug, Deserialize)]
struct Authentication {
    #[serde(default)]
    mode: String,
}

/// A field that is there and says something.
pub(super) fn present(rest: &Rest) -> Option<&str> {
    let says_something = |value: &Value| match value {
        Value::Null => false,
        Value::Object(fields) => !fields.is_empty(),
        _ => true,
    };
    rest.iter().find(|(_, value)| says_something(value)).map(|(field, _)| field.as_str())
}
