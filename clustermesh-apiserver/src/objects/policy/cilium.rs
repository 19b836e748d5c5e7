//! cilium.io/v2 CiliumNetworkPolicy and CiliumClusterwideNetworkPolicy.
//!
//! Read as Cilium reads them (its documentation, "Network Policy"): a direction denies by default if it has an
//! entry, though it be an empty one, which allows nothing; an entry without other ends means all of them if it
//! has ports; a list of other ends that is there and empty means nobody.

use std::collections::BTreeMap;

use clustermesh_kvstore::labels::SOURCE_K8S;
use clustermesh_kvstore::record::{
    Entity, LabelSelector, Operator, Peer, PolicyKind, PolicyName, PolicyRule, PolicySection, PortMatch,
    Requirement, Traffic,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{self, ObjectMeta};
use serde::Deserialize;

use super::selector::{Source, requirements};
use super::{Effect, Flaw, Gap, GapReason, Policy, bounded, peers, ports};
use crate::identity::NAMESPACE;
use crate::objects::meta::{Check, ObjectError, lean};

mod wire;

use wire::{Entry, PortRule, Rule};

/// `cilium.io/v2` CiliumNetworkPolicy.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct NamespacedResource {
    #[serde(default, deserialize_with = "lean")]
    pub(crate) metadata: ObjectMeta,
    #[serde(default)]
    spec: Option<Rule>,
    #[serde(default)]
    specs: Option<Vec<Rule>>,
}

/// `cilium.io/v2` CiliumClusterwideNetworkPolicy.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct ClusterwideResource {
    #[serde(default, deserialize_with = "lean")]
    pub(crate) metadata: ObjectMeta,
    #[serde(default)]
    spec: Option<Rule>,
    #[serde(default)]
    specs: Option<Vec<Rule>>,
}

impl TryFrom<NamespacedResource> for Policy {
    type Error = ObjectError;

    fn try_from(object: NamespacedResource) -> Result<Self, ObjectError> {
        let check = Check::new("CiliumNetworkPolicy", &object.metadata);
        let name = check.namespaced_name()?;
        let name = PolicyName { kind: PolicyKind::Cilium, namespace: name.namespace, name: name.name };
        policy(&check, name, object.spec, object.specs)
    }
}

impl TryFrom<ClusterwideResource> for Policy {
    type Error = ObjectError;

    fn try_from(object: ClusterwideResource) -> Result<Self, ObjectError> {
        let check = Check::new("CiliumClusterwideNetworkPolicy", &object.metadata);
        let name = check.cluster_scoped_name()?;
        let name = PolicyName { kind: PolicyKind::CiliumClusterwide, namespace: String::new(), name };
        policy(&check, name, object.spec, object.specs)
    }
}

fn policy(
    check: &Check<'_>,
    name: PolicyName,
    spec: Option<Rule>,
    specs: Option<Vec<Rule>>,
) -> Result<Policy, ObjectError> {
    let numbered = specs.into_iter().flatten().enumerate();
    let numbered = numbered.map(|(index, rule)| (format!("specs[{index}]"), rule));
    let all: Vec<_> = spec.map(|rule| ("spec".to_owned(), rule)).into_iter().chain(numbered).collect();
    if all.is_empty() {
        return Err(check.error("spec", "is missing"));
    }
    let namespace = Some(name.namespace.as_str()).filter(|namespace| !namespace.is_empty());
    let mut reader = Reader { check, namespace, gaps: Vec::new() };
    let mut rules = Vec::new();
    for (field, rule) in all {
        rules.extend(reader.rule(&field, rule)?);
    }
    let gaps = reader.gaps;
    if gaps.iter().any(|gap| gap.effect == Effect::Refused) {
        rules.clear();
    }
    bounded(check, Policy { name, rules, gaps })
}

struct Reader<'a> {
    check: &'a Check<'a>,
    /// `None` for a clusterwide policy.
    namespace: Option<&'a str>,
    gaps: Vec<Gap>,
}

/// What an entry does with what it matches.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Allow,
    Deny,
}

impl Reader<'_> {
    /// `None` if it says nothing, or is not understood.
    fn rule(&mut self, field: &str, rule: Rule) -> Result<Option<PolicyRule>, ObjectError> {
        let selector = match (&rule.endpoint_selector, &rule.node_selector) {
            (Some(selector), None) => selector,
            (None, Some(_)) => {
                self.gap(format!("{field}.nodeSelector"), GapReason::NodeSelector, Effect::Refused);
                return Ok(None);
            }
            _ => return Err(self.check.error(field, "use one of endpointSelector and nodeSelector")),
        };
        if let Some(unknown) = rule.unknown() {
            self.gap(format!("{field}.{unknown}"), GapReason::Unknown, Effect::Refused);
            return Ok(None);
        }
        let Some(subject) = self.subject(&format!("{field}.endpointSelector"), selector)? else {
            return Ok(None);
        };
        let defaults = rule.enable_default_deny.unwrap_or_default();
        let ingress = [entries(rule.ingress), entries(rule.ingress_deny)];
        let ingress = self.section(
            [&format!("{field}.ingress"), &format!("{field}.ingressDeny")],
            ingress,
            defaults.ingress,
        )?;
        let egress = [entries(rule.egress), entries(rule.egress_deny)];
        let egress = self.section(
            [&format!("{field}.egress"), &format!("{field}.egressDeny")],
            egress,
            defaults.egress,
        )?;
        let says_something = ingress.is_some() || egress.is_some();
        Ok(says_something.then_some(PolicyRule { subject, ingress, egress }))
    }

    fn subject(
        &mut self,
        field: &str,
        selector: &v1::LabelSelector,
    ) -> Result<Option<LabelSelector>, ObjectError> {
        let mut wanted = requirements(self.check, field, selector, Source::Prefix)?;
        if let Some(foreign) = peers::foreign(&wanted) {
            let field = format!("{field} \"{}:{}\"", foreign.source, foreign.key);
            self.gap(field, GapReason::Selector, Effect::Refused);
            return Ok(None);
        }
        if let Some(namespace) = self.namespace {
            // Whatever the author says of it: no policy reaches beyond its namespace.
            wanted.retain(|it| it.operator != Operator::In || it.key != NAMESPACE || it.source != SOURCE_K8S);
            wanted.push(Requirement::is(SOURCE_K8S, NAMESPACE, namespace));
        }
        Ok(Some(LabelSelector(wanted)))
    }

    /// One direction, from the entries that allow and those that deny.
    fn section(
        &mut self,
        [allow_field, deny_field]: [&str; 2],
        [allow, deny]: [Vec<Entry>; 2],
        default_deny: Option<bool>,
    ) -> Result<Option<PolicySection>, ObjectError> {
        let default_deny = default_deny.unwrap_or(!allow.is_empty() || !deny.is_empty());
        let allow = self.entries(allow_field, &allow, Verdict::Allow)?;
        let deny = self.entries(deny_field, &deny, Verdict::Deny)?;
        let says_something = default_deny || !allow.is_empty() || !deny.is_empty();
        Ok(says_something.then_some(PolicySection { default_deny, allow, deny }))
    }

    fn entries(
        &mut self,
        field: &str,
        entries: &[Entry],
        verdict: Verdict,
    ) -> Result<Vec<Traffic>, ObjectError> {
        let mut all = Vec::new();
        for (index, entry) in entries.iter().enumerate() {
            match self.entry(&format!("{field}[{index}]"), entry, verdict) {
                Ok(traffic) => all.extend(traffic),
                Err(Flaw::Invalid(error)) => return Err(error),
                Err(Flaw::Gap(field, reason)) => {
                    let effect = match verdict {
                        Verdict::Allow => Effect::LeftOut,
                        Verdict::Deny => Effect::Refused,
                    };
                    self.gap(field, reason, effect);
                }
            }
        }
        Ok(all)
    }

    /// `None` if it is about nobody.
    fn entry(&mut self, field: &str, entry: &Entry, verdict: Verdict) -> Result<Option<Traffic>, Flaw> {
        if let Some(unknown) = wire::present(&entry.rest) {
            return Err(Flaw::Gap(format!("{field}.{unknown}"), GapReason::of_field(unknown)));
        }
        if entry.asks_for_authentication() {
            self.limit(format!("{field}.authentication"), GapReason::Authentication, verdict)?;
        }
        let ports = self.ports(field, entry, verdict)?;
        let peers = self.peers(field, entry)?;
        Ok(match (peers, ports) {
            (Some(peers), ports) => Some(Traffic { peers, ports: ports.unwrap_or_default() }),
            (None, Some(ports)) => Some(Traffic { peers: vec![Peer::Entity(Entity::All)], ports }),
            (None, None) => None,
        }
        .filter(|traffic| !traffic.peers.is_empty()))
    }

    /// `None` if the entry does not speak of them.
    fn peers(&self, field: &str, entry: &Entry) -> Result<Option<Vec<Peer>>, Flaw> {
        let names = entry.names;
        let counts = [
            entry.endpoints.as_ref().map(Vec::len),
            entry.entities.as_ref().map(Vec::len),
            entry.cidrs.as_ref().map(Vec::len),
            entry.cidr_sets.as_ref().map(Vec::len),
        ];
        // Somebody has to be in all of them: an empty one has nobody.
        if counts.contains(&Some(0)) {
            return Ok(Some(Vec::new()));
        }
        if counts.iter().flatten().count() > 1 {
            return Err(Flaw::Gap(field.to_owned(), GapReason::Combination));
        }
        let mut all = Vec::new();
        for (index, selector) in entry.endpoints.iter().flatten().enumerate() {
            let field = format!("{field}.{}[{index}]", names.endpoints);
            let wanted = requirements(self.check, &field, selector, Source::Prefix)?;
            all.extend(peers::endpoints(&field, self.namespace, wanted)?);
        }
        for name in entry.entities.iter().flatten() {
            all.extend(peers::entity(&format!("{field}.{}", names.entities), name)?);
        }
        for net in entry.cidrs.iter().flatten() {
            all.push(peers::cidr(self.check, &format!("{field}.{}", names.cidrs), net, &[])?);
        }
        for (index, set) in entry.cidr_sets.iter().flatten().enumerate() {
            let field = format!("{field}.{}[{index}]", names.cidr_sets);
            let (Some(net), None) = (&set.cidr, wire::present(&set.rest)) else {
                return Err(Flaw::Gap(field, GapReason::Unknown));
            };
            all.push(peers::cidr(self.check, &field, net, set.except.as_deref().unwrap_or_default())?);
        }
        Ok(counts.iter().any(Option::is_some).then_some(all))
    }

    /// `None` if the entry does not speak of them; none at all if it is about everything.
    fn ports(
        &mut self,
        field: &str,
        entry: &Entry,
        verdict: Verdict,
    ) -> Result<Option<Vec<PortMatch>>, Flaw> {
        let rules = entry.ports.as_deref().unwrap_or_default();
        let icmps = entry.icmps.as_deref().unwrap_or_default();
        if !rules.is_empty() && !icmps.is_empty() {
            return Err(Flaw::Gap(format!("{field}.icmps"), GapReason::Combination));
        }
        let mut all = Vec::new();
        for (index, rule) in rules.iter().enumerate() {
            let field = format!("{field}.toPorts[{index}]");
            match self.port_rule(&field, rule, verdict) {
                Ok(ports) => all.extend(ports),
                // Without its ports the entry denies more, which is never wrong.
                Err(Flaw::Gap(field, reason)) if verdict == Verdict::Deny => {
                    self.gap(field, reason, Effect::Widened);
                    return Ok(Some(Vec::new()));
                }
                Err(flaw) => return Err(flaw),
            }
        }
        for (index, rule) in icmps.iter().enumerate() {
            let field = format!("{field}.icmps[{index}]");
            for message in rule.fields.iter().flatten() {
                all.push(ports::icmp(self.check, &field, message.family.as_deref(), &message.kind)?);
            }
        }
        match (rules.is_empty() && icmps.is_empty(), all.is_empty()) {
            (true, _) => Ok(None),
            (false, true) => Err(Flaw::Gap(format!("{field}.icmps"), GapReason::Ports)),
            (false, false) => Ok(Some(all)),
        }
    }

    fn port_rule(&mut self, field: &str, rule: &PortRule, verdict: Verdict) -> Result<Vec<PortMatch>, Flaw> {
        if let Some(layer7) = wire::present(&rule.rest) {
            self.limit(format!("{field}.{layer7}"), GapReason::Layer7, verdict)?;
        }
        let ports = rule.ports.as_deref().unwrap_or_default();
        if ports.is_empty() {
            return Err(Flaw::Gap(format!("{field}.ports"), GapReason::Ports));
        }
        let mut all = Vec::new();
        for (index, port) in ports.iter().enumerate() {
            let field = format!("{field}.ports[{index}]");
            let protocol = port.protocol.as_deref().filter(|text| !text.is_empty()).unwrap_or("ANY");
            let protocols = ports::protocols(self.check, &field, protocol)?;
            all.extend(ports::range(&field, &port.port, port.end_port, &protocols)?);
        }
        Ok(all)
    }

    /// A limit that is not understood: who allows must not without it, who denies may.
    fn limit(&mut self, field: String, reason: GapReason, verdict: Verdict) -> Result<(), Flaw> {
        match verdict {
            Verdict::Allow => Err(Flaw::Gap(field, reason)),
            Verdict::Deny => {
                self.gap(field, reason, Effect::Widened);
                Ok(())
            }
        }
    }

    fn gap(&mut self, field: String, reason: GapReason, effect: Effect) {
        self.gaps.push(Gap { field, reason, effect });
    }
}

fn entries<T: Into<Entry>>(written: Option<Vec<T>>) -> Vec<Entry> {
    written.into_iter().flatten().map(Into::into).collect()
}

/// Fields of an object that are not known, with what they say.
type Rest = BTreeMap<String, serde_json::Value>;
