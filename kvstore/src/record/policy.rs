//! Network policies of the own cluster, for its own agents only.
//!
//! The exporter reads CiliumNetworkPolicy, CiliumClusterwideNetworkPolicy and NetworkPolicy and writes what
//! they mean in one plain form: rules over labels, entities and address ranges, with all defaults spelled
//! out. So agents need to know nothing of Kubernetes' objects or of the exporter's options.

use std::collections::BTreeSet;
use std::fmt;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{MAX_NAME, Record, RecordError, json};
use crate::key::Kind;
use crate::labels::Labels;

/// A policy object: key suffix `<kind>/<namespace>/<name>`, the namespace empty for a clusterwide one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalPolicy {
    /// Name of the cluster.
    pub cluster: String,
    /// ID of the cluster.
    pub cluster_id: u32,
    /// Which object it is.
    pub name: PolicyName,
    /// What it says.
    pub rules: Vec<PolicyRule>,
}

/// What tells one policy from another.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PolicyName {
    /// Kind of the object.
    pub kind: PolicyKind,
    /// Empty for a clusterwide one.
    pub namespace: String,
    /// Name.
    pub name: String,
}

/// Kinds of policy objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PolicyKind {
    /// networking.k8s.io/v1 NetworkPolicy.
    Network,
    /// cilium.io/v2 CiliumNetworkPolicy.
    Cilium,
    /// cilium.io/v2 CiliumClusterwideNetworkPolicy.
    CiliumClusterwide,
}

/// For the pods that `subject` selects. A pod that some rule restricts in a direction gets through in that
/// direction only what a rule allows and none denies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicyRule {
    /// The pods that it is about; always of the own cluster.
    pub subject: LabelSelector,
    /// About what they receive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ingress: Option<PolicySection>,
    /// About what they send.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<PolicySection>,
}

/// One direction of a rule.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicySection {
    /// What no rule allows is dropped. If false, the rule only adds to others.
    pub default_deny: bool,
    /// Allowed, unless denied.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<Traffic>,
    /// Denied, whatever is allowed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub deny: Vec<Traffic>,
}

/// Flows to or from any of `peers`, for any of `ports`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Traffic {
    /// The other ends; none: nobody. [`Peer::Entity`] of [`Entity::All`]: everybody.
    pub peers: Vec<Peer>,
    /// Destination ports; none: everything.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<PortMatch>,
}

/// Who may be at the other end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Peer {
    /// Pods of any cluster whose labels match; the cluster is a label.
    Labels(LabelSelector),
    /// A group with a name.
    Entity(Entity),
    /// Addresses outside of the mesh. Never selects a pod or node of the mesh.
    Cidr {
        /// The range.
        net: IpNet,
        /// Parts of it that are not meant.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        except: Vec<IpNet>,
    },
}

/// Groups with a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Entity {
    /// Everybody.
    All,
    /// Everything outside of the mesh.
    World,
    /// Everything of the own cluster: its pods, this node, and the other nodes of the mesh.
    Cluster,
    /// This node.
    Host,
    /// The other nodes of the mesh.
    RemoteNode,
}

/// Destination ports of one protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum PortMatch {
    /// TCP, UDP, SCTP: IP protocol number and ports, both ends included. 0 to 65535: any.
    Ports {
        /// IP protocol number: 6, 17 or 132.
        protocol: u8,
        /// First port.
        first: u16,
        /// Last port.
        last: u16,
    },
    /// ICMP messages of one type.
    Icmp {
        /// Of IPv6.
        v6: bool,
        /// The type.
        #[serde(rename = "type")]
        kind: u8,
    },
}

/// Labels that have to be there, and labels that must not: all requirements have to hold. None: all match.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LabelSelector(pub Vec<Requirement>);

/// What is asked of one label.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Requirement {
    /// Source of the label, as `k8s`; empty: any.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub source: String,
    /// Key of the label.
    pub key: String,
    /// What has to hold.
    pub operator: Operator,
    /// For [`Operator::In`] and [`Operator::NotIn`].
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub values: BTreeSet<String>,
}

/// Kubernetes' operators of label selectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Operator {
    /// The label has one of the values.
    In,
    /// There is no such label, or it has none of the values.
    NotIn,
    /// There is such a label.
    Exists,
    /// There is none.
    DoesNotExist,
}

/// Most rules of one object; entries of one section, peers and ports of one rule, and requirements of one selector.
const MOST: usize = 4096;

impl PolicyRule {
    /// Whether these may be all the rules of one object.
    ///
    /// # Errors
    /// There are too many of something, or something that makes no sense. Readers refuse such a record.
    pub fn check_all(rules: &[Self]) -> Result<(), RecordError> {
        if rules.len() > MOST {
            return Err(RecordError::BadPolicy(format!("it has {} rules", rules.len()).into()));
        }
        rules.iter().try_for_each(check)
    }
}

impl LabelSelector {
    /// Whether an identity with these labels is meant.
    pub fn matches(&self, labels: &Labels) -> bool {
        self.0.iter().all(|requirement| requirement.holds(labels))
    }
}

impl Requirement {
    /// That the label has this value.
    pub fn is(source: &str, key: &str, value: &str) -> Self {
        let values = BTreeSet::from([value.to_owned()]);
        Self { source: source.to_owned(), key: key.to_owned(), operator: Operator::In, values }
    }

    fn holds(&self, labels: &Labels) -> bool {
        let label =
            labels.find(&self.key).filter(|label| self.source.is_empty() || self.source == label.source);
        match self.operator {
            Operator::In => label.is_some_and(|label| self.values.contains(&label.value)),
            Operator::NotIn => label.is_none_or(|label| !self.values.contains(&label.value)),
            Operator::Exists => label.is_some(),
            Operator::DoesNotExist => label.is_none(),
        }
    }
}

impl PolicyKind {
    /// All kinds.
    pub const ALL: [Self; 3] = [Self::Network, Self::Cilium, Self::CiliumClusterwide];

    /// As keys and people name it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Network => "knp",
            Self::Cilium => "cnp",
            Self::CiliumClusterwide => "ccnp",
        }
    }
}

impl fmt::Display for PolicyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.kind.as_str(), self.namespace, self.name)
    }
}

impl std::str::FromStr for PolicyName {
    type Err = RecordError;

    fn from_str(text: &str) -> Result<Self, RecordError> {
        let bad = || RecordError::BadKey(text.into());
        let mut parts = text.split('/');
        let (Some(kind), Some(namespace), Some(name), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(bad());
        };
        let kind = PolicyKind::ALL.into_iter().find(|known| known.as_str() == kind).ok_or_else(bad)?;
        let is_clusterwide = kind == PolicyKind::CiliumClusterwide;
        if name.is_empty() || text.len() > 3 * MAX_NAME || namespace.is_empty() != is_clusterwide {
            return Err(bad());
        }
        Ok(Self { kind, namespace: namespace.to_owned(), name: name.to_owned() })
    }
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Wire {
    cluster: String,
    #[serde(rename = "clusterID")]
    cluster_id: u32,
    rules: Vec<PolicyRule>,
}

impl Record for LocalPolicy {
    const KIND: Kind = Kind::LocalPolicies;

    fn decode(suffix: &str, value: &[u8]) -> Result<Self, RecordError> {
        let name = suffix.parse()?;
        let Wire { cluster, cluster_id, rules } = json::decode(value)?;
        PolicyRule::check_all(&rules)?;
        Ok(Self { cluster, cluster_id, name, rules })
    }

    fn suffix(&self) -> String {
        self.name.to_string()
    }

    fn encode(&self) -> Vec<u8> {
        let Self { cluster, cluster_id, name: _, rules } = self.clone();
        json::encode(&Wire { cluster, cluster_id, rules })
    }
}

fn check(rule: &PolicyRule) -> Result<(), RecordError> {
    let bad = |text: String| Err(RecordError::BadPolicy(text.into()));
    check_selector(&rule.subject)?;
    let sections = [&rule.ingress, &rule.egress].into_iter().flatten();
    for section in sections.clone() {
        if section.allow.len() > MOST || section.deny.len() > MOST {
            return bad(format!(
                "a section has {} entries that allow and {} that deny",
                section.allow.len(),
                section.deny.len()
            ));
        }
    }
    for traffic in sections.flat_map(|section| section.allow.iter().chain(&section.deny)) {
        if traffic.peers.len() > MOST || traffic.ports.len() > MOST {
            return bad(format!(
                "a rule has {} peers and {} ports",
                traffic.peers.len(),
                traffic.ports.len()
            ));
        }
        for port in &traffic.ports {
            if let PortMatch::Ports { protocol, first, last } = port
                && (first > last || !matches!(protocol, 6 | 17 | 132))
            {
                return bad(format!("protocol {protocol}, ports {first} to {last}"));
            }
        }
        for peer in &traffic.peers {
            match peer {
                Peer::Labels(selector) => check_selector(selector)?,
                Peer::Entity(_) => {}
                Peer::Cidr { net, except } => {
                    if let Some(outside) = except.iter().find(|except| !net.contains(*except)) {
                        return bad(format!("{outside} is not in {net}"));
                    }
                    if except.len() > MOST {
                        return bad(format!("a range has {} exceptions", except.len()));
                    }
                }
            }
        }
    }
    Ok(())
}

fn check_selector(LabelSelector(requirements): &LabelSelector) -> Result<(), RecordError> {
    if requirements.len() > MOST {
        let text = format!("a selector has {} requirements", requirements.len());
        return Err(RecordError::BadPolicy(text.into()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selector() -> LabelSelector {
        let values = BTreeSet::from(["a".to_owned(), "b".to_owned()]);
        let one = |operator, values: &BTreeSet<String>| Requirement {
            source: "k8s".into(),
            key: "tier".into(),
            operator,
            values: values.clone(),
        };
        LabelSelector(vec![one(Operator::In, &values), one(Operator::Exists, &BTreeSet::new())])
    }

    fn policy() -> LocalPolicy {
        let peers = vec![
            Peer::Labels(selector()),
            Peer::Entity(Entity::RemoteNode),
            Peer::Cidr {
                net: "192.0.2.0/24".parse().unwrap(),
                except: vec!["192.0.2.64/26".parse().unwrap()],
            },
        ];
        let ports = vec![
            PortMatch::Ports { protocol: 6, first: 80, last: 90 },
            PortMatch::Icmp { v6: true, kind: 128 },
        ];
        let section =
            PolicySection { default_deny: true, allow: vec![Traffic { peers, ports }], deny: Vec::new() };
        LocalPolicy {
            cluster: "alpha".into(),
            cluster_id: 1,
            name: "cnp/shop/web".parse().unwrap(),
            rules: vec![PolicyRule { subject: selector(), ingress: Some(section), egress: None }],
        }
    }

    #[test]
    fn is_read_as_it_was_written() {
        let policy = policy();
        assert_eq!(LocalPolicy::decode(&policy.suffix(), &policy.encode()), Ok(policy));
    }

    #[test]
    fn refuses_what_makes_no_sense() {
        for suffix in ["cnp/shop", "cnp//web", "ccnp/shop/web", "x/shop/web", "knp/shop/", "knp/a/b/c"] {
            assert!(LocalPolicy::decode(suffix, &policy().encode()).is_err(), "{suffix}");
        }
        let text = String::from_utf8(policy().encode()).unwrap();
        for (from, to) in [
            ("\"first\":80", "\"first\":91"),
            ("\"protocol\":6", "\"protocol\":1"),
            ("192.0.2.64/26", "198.51.100.0/26"),
        ] {
            let value = text.replace(from, to);
            assert_ne!(value, text);
            assert!(LocalPolicy::decode("cnp/shop/web", value.as_bytes()).is_err(), "{value}");
        }
    }

    #[test]
    fn selects_by_labels() {
        let labels = |text: &str| Labels::parse(text).unwrap();
        assert!(selector().matches(&labels("k8s:tier=a;k8s:app=x;")));
        for other in ["k8s:tier=c;", "any:tier=a;", "k8s:app=a;"] {
            assert!(!selector().matches(&labels(other)), "{other}");
        }
        assert!(LabelSelector::default().matches(&labels("k8s:app=a;")));
        let absent = |operator| {
            let values = BTreeSet::from(["a".to_owned()]);
            LabelSelector(vec![Requirement { source: String::new(), key: "tier".into(), operator, values }])
        };
        assert!(absent(Operator::NotIn).matches(&labels("k8s:app=a;")));
        assert!(!absent(Operator::NotIn).matches(&labels("k8s:tier=a;")));
        assert!(absent(Operator::DoesNotExist).matches(&labels("k8s:app=a;")));
        assert!(!absent(Operator::DoesNotExist).matches(&labels("k8s:tier=z;")));
    }
}
