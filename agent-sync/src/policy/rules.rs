//! Policies with their selectors resolved, their ports as the kernel's prefixes, and a number for each rule.

use std::collections::HashMap;

use clustermesh_kvstore::labels::{CLUSTER_LABEL, SOURCE_K8S};
use clustermesh_kvstore::record::{
    self, Entity, LabelSelector, LocalPolicy, Peer, PolicySection, PortMatch, Requirement,
};
use ebpf_global_svc::abi::{direction, identity};
use ipnet::IpNet;
use twox_hash::XxHash3_64;

use super::entries::PortPrefix;
use super::selectors::SelectorId;

/// A policy.
#[derive(Debug)]
pub(super) struct Policy {
    pub(super) rules: Vec<Rule>,
}

#[derive(Debug)]
pub(super) struct Rule {
    pub(super) subject: SelectorId,
    ingress: Option<Section>,
    egress: Option<Section>,
}

#[derive(Debug)]
pub(super) struct Section {
    pub(super) default_deny: bool,
    pub(super) allow: Vec<Traffic>,
    pub(super) deny: Vec<Traffic>,
}

#[derive(Debug)]
pub(super) struct Traffic {
    pub(super) peers: Vec<Peers>,
    pub(super) ports: Vec<PortPrefix>,
    /// Its number.
    pub(super) rule: u32,
}

/// Who may be at the other end.
#[derive(Debug)]
pub(super) enum Peers {
    Any,
    Identity(u32),
    Selected(SelectorId),
    /// Everything outside of the mesh, whichever range it is in.
    World,
    Range {
        net: IpNet,
        except: Vec<IpNet>,
    },
}

impl Policy {
    /// `acquire` gives the number of a selector.
    pub(super) fn resolve(
        policy: &LocalPolicy,
        texts: &mut RuleTexts,
        acquire: &mut dyn FnMut(&LabelSelector) -> SelectorId,
    ) -> Self {
        let mut rules = Vec::with_capacity(policy.rules.len());
        for (n, rule) in policy.rules.iter().enumerate() {
            let subject = acquire(&rule.subject);
            let mut section = |way: &str, section: &Option<PolicySection>| {
                section.as_ref().map(|section| {
                    let mut all = |verdict: &str, traffic: &[record::Traffic]| -> Vec<Traffic> {
                        let text = |m: usize| format!("{} rule {n} {way} {verdict} {m}", policy.name);
                        let traffic = traffic.iter().enumerate();
                        traffic
                            .map(|(m, traffic)| Traffic {
                                peers: traffic
                                    .peers
                                    .iter()
                                    .flat_map(|peer| peers(peer, &policy.cluster, acquire))
                                    .collect(),
                                ports: ports(&traffic.ports),
                                rule: texts.number(text(m)),
                            })
                            .collect()
                    };
                    Section {
                        default_deny: section.default_deny,
                        allow: all("allow", &section.allow),
                        deny: all("deny", &section.deny),
                    }
                })
            };
            let ingress = section("ingress", &rule.ingress);
            let egress = section("egress", &rule.egress);
            rules.push(Rule { subject, ingress, egress });
        }
        Self { rules }
    }

    /// Selectors that were acquired, each as often.
    pub(super) fn selectors(&self) -> impl Iterator<Item = SelectorId> {
        self.rules.iter().map(|rule| rule.subject).chain(self.peer_selectors())
    }

    /// Selectors of peers.
    pub(super) fn peer_selectors(&self) -> impl Iterator<Item = SelectorId> {
        let peers = self.traffic().flat_map(|traffic| &traffic.peers);
        peers.filter_map(|peers| match peers {
            Peers::Selected(selector) => Some(*selector),
            _ => None,
        })
    }

    /// Address ranges that need identities.
    pub(super) fn ranges(&self) -> impl Iterator<Item = IpNet> {
        let peers = self.traffic().flat_map(|traffic| &traffic.peers);
        peers.flat_map(|peers| match peers {
            Peers::Range { net, except } => Some(*net).into_iter().chain(except.iter().copied()),
            _ => None.into_iter().chain([].iter().copied()),
        })
    }

    /// Numbers of its rules.
    pub(super) fn numbers(&self) -> impl Iterator<Item = u32> {
        self.traffic().map(|traffic| traffic.rule)
    }

    fn traffic(&self) -> impl Iterator<Item = &Traffic> {
        let sections = self.rules.iter().flat_map(|rule| [&rule.ingress, &rule.egress]);
        sections.flatten().flat_map(|section| section.allow.iter().chain(&section.deny))
    }
}

impl Section {
    /// Whether something may be dropped because of it.
    pub(super) fn restricts(&self) -> bool {
        self.default_deny || !self.deny.is_empty()
    }
}

impl Rule {
    /// What it says of a direction.
    pub(super) fn section(&self, way: u8) -> Option<&Section> {
        if way == direction::INGRESS { self.ingress.as_ref() } else { self.egress.as_ref() }
    }
}

fn peers(peer: &Peer, own: &str, acquire: &mut dyn FnMut(&LabelSelector) -> SelectorId) -> Vec<Peers> {
    match peer {
        Peer::Labels(selector) => vec![Peers::Selected(acquire(selector))],
        Peer::Cidr { net, except } => {
            let except = except.iter().map(IpNet::trunc).collect();
            vec![Peers::Range { net: net.trunc(), except }]
        }
        Peer::Entity(Entity::All) => vec![Peers::Any],
        Peer::Entity(Entity::World) => vec![Peers::World],
        Peer::Entity(Entity::Host) => vec![Peers::Identity(identity::HOST)],
        Peer::Entity(Entity::RemoteNode) => vec![Peers::Identity(identity::REMOTE_NODE)],
        Peer::Entity(Entity::Cluster) => {
            let of_cluster = LabelSelector(vec![Requirement::is(SOURCE_K8S, CLUSTER_LABEL, own)]);
            let nodes = [identity::HOST, identity::REMOTE_NODE].map(Peers::Identity);
            std::iter::once(Peers::Selected(acquire(&of_cluster))).chain(nodes).collect()
        }
    }
}

fn ports(ports: &[PortMatch]) -> Vec<PortPrefix> {
    const ICMP: u8 = 1;
    const ICMPV6: u8 = 58;
    if ports.is_empty() {
        return vec![PortPrefix::ANY];
    }
    let mut all: Vec<PortPrefix> = ports
        .iter()
        .flat_map(|port| match port {
            PortMatch::Ports { protocol, first, last } => PortPrefix::range(*protocol, *first, *last),
            PortMatch::Icmp { v6, kind } => {
                PortPrefix::range(if *v6 { ICMPV6 } else { ICMP }, (*kind).into(), (*kind).into())
            }
        })
        .collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// Numbers of rules: of their place, so that the next agent gives the same ones.
#[derive(Debug, Default)]
pub(super) struct RuleTexts {
    by_number: HashMap<u32, (String, usize)>,
}

const UNRESTRICTED: &str = "nothing else is restricted";
const LOCAL_HOST: &str = "the node reaches its own pods";

impl RuleTexts {
    /// The number of a text, used once more.
    pub(super) fn number(&mut self, text: String) -> u32 {
        let mut number = hash(&text);
        loop {
            match self.by_number.get_mut(&number) {
                Some((other, uses)) if *other == text => {
                    *uses += 1;
                    return number;
                }
                // Two of a few thousand texts with one hash: the second takes the next number.
                Some(_) => number = number.wrapping_add(1).max(1),
                None => {
                    self.by_number.insert(number, (text, 1));
                    return number;
                }
            }
        }
    }

    /// Undoes one [`Self::number`].
    pub(super) fn release(&mut self, number: u32) {
        if let Some((_, uses)) = self.by_number.get_mut(&number) {
            *uses -= 1;
            if *uses == 0 {
                self.by_number.remove(&number);
            }
        }
    }

    pub(super) fn of(&self, number: u32) -> Option<&str> {
        let fixed = [UNRESTRICTED, LOCAL_HOST].into_iter().find(|text| hash(text) == number);
        self.by_number.get(&number).map(|(text, _)| text.as_str()).or(fixed)
    }

    /// Of what is allowed because nothing restricts it.
    pub(super) fn unrestricted() -> u32 {
        hash(UNRESTRICTED)
    }

    /// Of what the node may send to its pods.
    pub(super) fn local_host() -> u32 {
        hash(LOCAL_HOST)
    }
}

/// Never 0.
fn hash(text: &str) -> u32 {
    // The upper half is as good as the lower one.
    u32::try_from(XxHash3_64::oneshot(text.as_bytes()) >> 32).unwrap_or(u32::MAX).max(1)
}
