//! networking.k8s.io/v1 NetworkPolicy.

use clustermesh_kvstore::labels::SOURCE_K8S;
use clustermesh_kvstore::record::{
    Entity, LabelSelector, Peer, PolicyKind, PolicyName, PolicyRule, PolicySection, PortMatch, Requirement,
    Traffic,
};
use k8s_openapi::api::networking::v1;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::selector::{Source, exists, requirements};
use super::{Effect, Flaw, Gap, Policy, bounded, peers, ports};
use crate::identity::{NAMESPACE, NAMESPACE_LABELS};
use crate::objects::meta::{Check, ObjectError};

impl TryFrom<v1::NetworkPolicy> for Policy {
    type Error = ObjectError;

    fn try_from(object: v1::NetworkPolicy) -> Result<Self, ObjectError> {
        let check = Check::new("NetworkPolicy", &object.metadata);
        let name = check.namespaced_name()?;
        let spec = object.spec.unwrap_or_default();
        let (ingress, egress) = directions(&check, &spec)?;
        let mut reader = Reader { check: &check, namespace: &name.namespace, gaps: Vec::new() };

        let field = "spec.podSelector";
        let selector = spec.pod_selector.unwrap_or_default();
        let mut subject = requirements(&check, field, &selector, Source::Kubernetes)?;
        subject.push(reader.own_namespace());

        let ingress = match ingress {
            true => Some(reader.section(
                "spec.ingress",
                "from",
                spec.ingress.into_iter().flatten().map(|rule| (rule.from, rule.ports)),
            )?),
            false => None,
        };
        let egress = match egress {
            true => Some(reader.section(
                "spec.egress",
                "to",
                spec.egress.into_iter().flatten().map(|rule| (rule.to, rule.ports)),
            )?),
            false => None,
        };
        let gaps = reader.gaps;
        let rules = vec![PolicyRule { subject: LabelSelector(subject), ingress, egress }];
        let name = PolicyName { kind: PolicyKind::Network, namespace: name.namespace, name: name.name };
        bounded(&check, Self { name, rules, gaps })
    }
}

/// Whether it is about what pods receive, and about what they send. If it does not say so, it is always about
/// what they receive, and about what they send if it has rules for that.
fn directions(check: &Check<'_>, spec: &v1::NetworkPolicySpec) -> Result<(bool, bool), ObjectError> {
    let (mut ingress, mut egress) = (false, false);
    for kind in spec.policy_types.iter().flatten() {
        match kind.as_str() {
            "Ingress" => ingress = true,
            "Egress" => egress = true,
            other => {
                let problem = format_args!("{other:?} is neither Ingress nor Egress").to_string();
                return Err(check.error("spec.policyTypes", problem));
            }
        }
    }
    if !ingress && !egress {
        return Ok((true, spec.egress.as_ref().is_some_and(|rules| !rules.is_empty())));
    }
    Ok((ingress, egress))
}

type Rule = (Option<Vec<v1::NetworkPolicyPeer>>, Option<Vec<v1::NetworkPolicyPort>>);

struct Reader<'a> {
    check: &'a Check<'a>,
    namespace: &'a str,
    gaps: Vec<Gap>,
}

impl Reader<'_> {
    /// `peers_field` is what the other ends are called in this direction.
    fn section(
        &mut self,
        field: &str,
        peers_field: &str,
        rules: impl Iterator<Item = Rule>,
    ) -> Result<PolicySection, ObjectError> {
        let mut allow = Vec::new();
        for (index, (peers, ports)) in rules.enumerate() {
            let field = format!("{field}[{index}]");
            let traffic =
                self.ports(&format!("{field}.ports"), &ports.unwrap_or_default()).and_then(|ports| {
                    Ok(Traffic { peers: self.peers(&format!("{field}.{peers_field}"), peers)?, ports })
                });
            match traffic {
                Ok(traffic) => allow.push(traffic),
                Err(Flaw::Invalid(error)) => return Err(error),
                Err(Flaw::Gap(field, reason)) => {
                    self.gaps.push(Gap { field, reason, effect: Effect::LeftOut });
                }
            }
        }
        Ok(PolicySection { default_deny: true, allow, deny: Vec::new() })
    }

    fn ports(&self, field: &str, ports: &[v1::NetworkPolicyPort]) -> Result<Vec<PortMatch>, Flaw> {
        let mut matches = Vec::new();
        for port in ports {
            let protocols = ports::protocols(self.check, field, port.protocol.as_deref().unwrap_or("TCP"))?;
            let first = port.port.clone().unwrap_or(IntOrString::Int(0));
            matches.extend(ports::range(field, &first, port.end_port, &protocols)?);
        }
        Ok(matches)
    }

    fn peers(&self, field: &str, peers: Option<Vec<v1::NetworkPolicyPeer>>) -> Result<Vec<Peer>, Flaw> {
        let peers = peers.unwrap_or_default();
        if peers.is_empty() {
            return Ok(vec![Peer::Entity(Entity::All)]);
        }
        let read = |(index, peer)| self.peer(&format!("{field}[{index}]"), peer);
        Ok(peers.iter().enumerate().map(read).collect::<Result<_, _>>()?)
    }

    fn peer(&self, field: &str, peer: &v1::NetworkPolicyPeer) -> Result<Peer, ObjectError> {
        match (&peer.ip_block, &peer.namespace_selector, &peer.pod_selector) {
            (Some(block), None, None) => {
                let except = block.except.as_deref().unwrap_or_default();
                peers::cidr(self.check, &format!("{field}.ipBlock"), &block.cidr, except)
            }
            (None, None, None) => {
                Err(self.check.error(field, "says nothing: use podSelector, namespaceSelector or ipBlock"))
            }
            (None, namespaces, pods) => {
                let read = |selector| requirements(self.check, field, selector, Source::Kubernetes);
                let mut wanted = pods.as_ref().map(read).transpose()?.unwrap_or_default();
                match namespaces.as_ref().map(read).transpose()? {
                    None => wanted.push(self.own_namespace()),
                    Some(none) if none.is_empty() => wanted.push(exists(NAMESPACE)),
                    Some(labels) => wanted.extend(labels.into_iter().map(|label| Requirement {
                        key: format!("{NAMESPACE_LABELS}.{}", label.key),
                        ..label
                    })),
                }
                Ok(Peer::Labels(LabelSelector(wanted)))
            }
            _ => Err(self.check.error(field, "ipBlock cannot be combined with selectors")),
        }
    }

    fn own_namespace(&self) -> Requirement {
        Requirement::is(SOURCE_K8S, NAMESPACE, self.namespace)
    }
}
