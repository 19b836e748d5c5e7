//! Whatever happens in whatever order, the entries decide as the policies say.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use clustermesh_kvstore::labels::CLUSTER_LABEL;
use clustermesh_kvstore::record::{
    Entity, Operator, Peer, PolicyRule, PolicySection, PortMatch, Requirement, Traffic,
};
use ebpf_global_svc::abi::{POLICY_DENY, POLICY_PEER_BITS, POLICY_PROTO_BITS};
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom as _, IteratorRandom as _};
use rand::{Rng as _, SeedableRng as _};

use super::*;

const MAX: MaxConnectedClusters = MaxConnectedClusters::C255;
const SEEDS: u64 = 40;
const STEPS: usize = 25;

/// Who may be at the other end.
#[derive(Clone, Copy, Debug)]
enum End {
    Pod(u32),
    Host,
    RemoteNode,
    Outside(IpAddr),
}

/// What is known, and what a kernel would have.
struct World {
    rng: StdRng,
    identities: BTreeMap<u32, String>,
    rules: BTreeMap<PolicyName, LocalPolicy>,
    subjects: BTreeSet<u32>,
    policies: Policies,
    installed: BTreeMap<PolicyKey, PolicyValue>,
    ranges: BTreeMap<PrefixKey, u32>,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut policies = Policies::new(MAX, Vec::new(), Vec::new());
        policies.set_complete();
        policies.set_known(1);
        policies.set_known(2);
        Self {
            rng: StdRng::seed_from_u64(seed),
            identities: BTreeMap::new(),
            rules: BTreeMap::new(),
            subjects: BTreeSet::new(),
            policies,
            installed: BTreeMap::new(),
            ranges: BTreeMap::new(),
        }
    }

    fn step(&mut self) {
        match self.rng.random_range(0..10) {
            0..=3 => {
                let cluster = self.rng.random_range(1..=2_u32);
                let id = cluster << 16 | self.rng.random_range(256..262);
                let labels = self.rng.random_bool(0.8).then(|| self.labels(cluster));
                self.tell_identity(id, labels);
            }
            4..=7 => {
                let name = format!("cnp/shop/p{}", self.rng.random_range(0..4)).parse().unwrap();
                let policy = self.rng.random_bool(0.75).then(|| self.policy(&name));
                self.tell_policy(&name, policy);
            }
            _ => {
                let own = self.identities.keys().filter(|id| **id >> 16 == 1).copied();
                self.subjects = own.choose_multiple(&mut self.rng, 3).into_iter().collect();
                self.policies.set_subjects(&self.subjects);
            }
        }
    }

    fn tell_identity(&mut self, id: u32, labels: Option<String>) {
        let parsed = labels.as_ref().map(|text| Labels::parse(text).unwrap());
        self.policies.identity_changed(id, parsed.as_ref());
        match labels {
            Some(labels) => drop(self.identities.insert(id, labels)),
            None => drop(self.identities.remove(&id)),
        }
    }

    fn tell_policy(&mut self, name: &PolicyName, policy: Option<LocalPolicy>) {
        self.policies.policy_changed(name, policy.as_ref());
        match policy {
            Some(policy) => drop(self.rules.insert(name.clone(), policy)),
            None => drop(self.rules.remove(name)),
        }
    }

    fn labels(&mut self, cluster: u32) -> String {
        let app = ["a", "b", "c"].choose(&mut self.rng).unwrap();
        let tier = ["x", "y"].choose(&mut self.rng).unwrap();
        let cluster = if cluster == 1 { "alpha" } else { "beta" };
        format!("k8s:app={app};k8s:{CLUSTER_LABEL}={cluster};k8s:tier={tier};")
    }

    fn policy(&mut self, name: &PolicyName) -> LocalPolicy {
        let rules = (0..self.rng.random_range(1..3))
            .map(|_| PolicyRule {
                subject: self.selector(),
                ingress: self.rng.random_bool(0.7).then(|| self.section()),
                egress: self.rng.random_bool(0.5).then(|| self.section()),
            })
            .collect();
        LocalPolicy { cluster: "alpha".into(), cluster_id: 1, name: name.clone(), rules }
    }

    fn section(&mut self) -> PolicySection {
        let mut traffic = |most| (0..self.rng.random_range(0..=most)).map(|_| self.traffic()).collect();
        let (allow, deny) = (traffic(3), traffic(1));
        PolicySection { default_deny: self.rng.random_bool(0.8), allow, deny }
    }

    fn traffic(&mut self) -> Traffic {
        let peers = (0..self.rng.random_range(0..3)).map(|_| self.peer()).collect();
        let ports = (0..self.rng.random_range(0..3)).map(|_| self.ports()).collect();
        Traffic { peers, ports }
    }

    fn peer(&mut self) -> Peer {
        const ENTITIES: [Entity; 5] =
            [Entity::All, Entity::World, Entity::Cluster, Entity::Host, Entity::RemoteNode];
        match self.rng.random_range(0..4) {
            0 => Peer::Entity(*ENTITIES.choose(&mut self.rng).unwrap()),
            1 => {
                let nets =
                    ["0.0.0.0/0", "192.0.2.0/24", "192.0.2.64/26", "192.0.2.77/32", "::/0", "2001:db8::/32"];
                let net: IpNet = nets.choose(&mut self.rng).unwrap().parse().unwrap();
                let inside = nets
                    .iter()
                    .map(|net| net.parse().unwrap())
                    .filter(|inner| net.contains(inner) && *inner != net);
                let except = inside.filter(|_| self.rng.random_bool(0.3)).collect();
                Peer::Cidr { net, except }
            }
            _ => Peer::Labels(self.selector()),
        }
    }

    fn selector(&mut self) -> LabelSelector {
        let asked = (0..self.rng.random_range(0..3)).map(|_| {
            let (key, values) =
                *[("app", ["a", "b"]), ("tier", ["x", "y"]), (CLUSTER_LABEL, ["alpha", "beta"])]
                    .choose(&mut self.rng)
                    .unwrap();
            let operator =
                *[Operator::In, Operator::In, Operator::NotIn, Operator::Exists, Operator::DoesNotExist]
                    .choose(&mut self.rng)
                    .unwrap();
            let values =
                values.iter().filter(|_| self.rng.random_bool(0.6)).map(|v| (*v).to_owned()).collect();
            Requirement { source: "k8s".into(), key: key.into(), operator, values }
        });
        LabelSelector(asked.collect())
    }

    fn ports(&mut self) -> PortMatch {
        let protocol = *[6, 17].choose(&mut self.rng).unwrap();
        let (first, last) =
            *[(80, 80), (64, 127), (1, 1023), (0, 65_535), (79, 81)].choose(&mut self.rng).unwrap();
        match self.rng.random_range(0..5) {
            0 => PortMatch::Icmp { v6: false, kind: 8 },
            _ => PortMatch::Ports { protocol, first, last },
        }
    }

    fn compute(&mut self) {
        let identities = &self.identities;
        let changes = self.policies.compute(|| written(identities));
        for (key, value) in changes.policy {
            match value {
                Some(value) => drop(self.installed.insert(key, value)),
                None => assert!(self.installed.remove(&key).is_some(), "{key:?} was not there"),
            }
        }
        for (key, value) in changes.cidr {
            match value {
                Some(value) => drop(self.ranges.insert(key, value)),
                None => assert!(self.ranges.remove(&key).is_some(), "{key:?} was not there"),
            }
        }
    }

    /// As the kernel's programs do it; none: it is not enforced.
    fn decided(
        &self,
        entries: &[(PolicyKey, PolicyValue)],
        (subject, way): (u32, u8),
        end: End,
        (proto, port): (u8, u16),
    ) -> Option<bool> {
        let flag = if way == direction::INGRESS { ENDPOINT_ENFORCE_INGRESS } else { ENDPOINT_ENFORCE_EGRESS };
        if self.policies.flags(subject)? & flag == 0 {
            return None;
        }
        let peer = match end {
            End::Pod(id) => id,
            End::Host => identity::HOST,
            End::RemoteNode => identity::REMOTE_NODE,
            End::Outside(ip) => {
                let around =
                    self.ranges.iter().filter(|(key, _)| crate::wire_key::prefix(key).unwrap().contains(&ip));
                around.max_by_key(|(key, _)| key.prefixlen).map_or(identity::WORLD, |(_, id)| *id)
            }
        };
        let found = [peer, ANY].map(|peer| {
            let fits = |(key, _): &&(PolicyKey, PolicyValue)| {
                let bits = key.prefixlen - POLICY_PROTO_BITS.min(key.prefixlen);
                key.peer == peer
                    && (key.prefixlen == POLICY_PEER_BITS || key.proto == proto)
                    && (bits == 0 || (u16::from_be(key.port) ^ port) >> (16 - bits) == 0)
            };
            let longest = entries.iter().filter(fits).max_by_key(|(key, _)| key.prefixlen);
            longest.map(|(_, value)| value.flags)
        });
        let denied = found.iter().flatten().any(|flags| flags & POLICY_DENY != 0);
        Some(!denied && found.iter().any(Option::is_some))
    }

    /// As the policies say.
    fn said(&self, subject: u32, way: u8, end: End, proto: u8, port: u16) -> Option<bool> {
        let own = Labels::parse(&self.identities[&subject]).unwrap();
        let rules = self.rules.values().flat_map(|policy| &policy.rules);
        let sections: Vec<_> = rules
            .filter(|rule| rule.subject.matches(&own))
            .filter_map(
                |rule| if way == direction::INGRESS { rule.ingress.as_ref() } else { rule.egress.as_ref() },
            )
            .collect();
        if sections.iter().all(|section| !section.default_deny && section.deny.is_empty()) {
            return None;
        }
        let about = |traffic: &Traffic| {
            let on_port = |port_match: &PortMatch| match port_match {
                PortMatch::Ports { protocol, first, last } => {
                    *protocol == proto && (*first..=*last).contains(&port)
                }
                PortMatch::Icmp { v6, kind } => !v6 && proto == 1 && u16::from(*kind) == port,
            };
            traffic.peers.iter().any(|peer| self.is_at(peer, end))
                && (traffic.ports.is_empty() || traffic.ports.iter().any(on_port))
        };
        let allowed = sections.iter().flat_map(|section| &section.allow).any(about)
            || sections.iter().all(|section| !section.default_deny)
            || (way == direction::INGRESS && matches!(end, End::Host));
        Some(allowed && !sections.iter().flat_map(|section| &section.deny).any(about))
    }

    fn is_at(&self, peer: &Peer, end: End) -> bool {
        let labels = |id| Labels::parse(&self.identities[&id]).unwrap();
        match (peer, end) {
            (Peer::Entity(Entity::All), _)
            | (Peer::Entity(Entity::World), End::Outside(_))
            | (Peer::Entity(Entity::Host | Entity::Cluster), End::Host)
            | (Peer::Entity(Entity::RemoteNode | Entity::Cluster), End::RemoteNode) => true,
            (Peer::Entity(Entity::Cluster), End::Pod(id)) => labels(id).cluster() == Some("alpha"),
            (Peer::Labels(selector), End::Pod(id)) => selector.matches(&labels(id)),
            (Peer::Cidr { net, except }, End::Outside(ip)) => {
                net.contains(&ip) && !except.iter().any(|except| except.contains(&ip))
            }
            _ => false,
        }
    }

    fn check(&self, seed: u64) -> usize {
        let outside = ["192.0.2.1", "192.0.2.70", "192.0.2.77", "198.51.100.1", "2001:db8::1", "2001:db9::1"];
        let mut ends = vec![End::Host, End::RemoteNode];
        ends.extend(outside.iter().map(|ip| End::Outside(ip.parse().unwrap())));
        ends.extend(self.identities.keys().map(|id| End::Pod(*id)));
        let flows = [(6, 80), (6, 79), (6, 2000), (17, 80), (17, 65_535), (1, 8), (1, 0), (47, 0)];
        let mut enforced = 0;
        let known = self.subjects.iter().filter(|id| self.identities.contains_key(*id));
        for subject in known {
            for way in [direction::INGRESS, direction::EGRESS] {
                let of_pod = |(key, _): &(&PolicyKey, _)| (key.subject, key.direction) == (*subject, way);
                let entries = self.installed.iter().filter(of_pod).map(|(key, value)| (*key, *value));
                let entries: Vec<_> = entries.collect();
                for end in &ends {
                    for (proto, port) in flows {
                        let decided = self.decided(&entries, (*subject, way), *end, (proto, port));
                        let said = self.said(*subject, way, *end, proto, port);
                        assert_eq!(
                            decided, said,
                            "seed {seed}: {subject} {way} {end:?} {proto}/{port}: {:#?}\n{:?}",
                            self.rules, self.identities
                        );
                        enforced += usize::from(decided.is_some());
                    }
                }
            }
        }
        enforced
    }

    /// An agent that is started now, told the same in another order.
    fn restart(&mut self) -> PolicyChanges {
        let (policy, cidr) = (self.installed.clone(), self.ranges.clone());
        let mut policies = Policies::new(MAX, policy.into_iter().collect(), cidr.into_iter().collect());
        let early = policies.compute(std::iter::empty);
        assert!(early.policy.is_empty() && early.cidr.is_empty(), "nothing is known yet");
        for (name, policy) in &self.rules {
            policies.policy_changed(name, Some(policy));
        }
        policies.set_subjects(&self.subjects);
        let own = |id: &&u32| **id >> 16 == 1;
        for id in self.identities.keys().filter(own) {
            policies.identity_changed(*id, Some(&Labels::parse(&self.identities[id]).unwrap()));
        }
        policies.set_known(1);
        policies.set_complete();
        let remote: Vec<u32> = self.identities.keys().filter(|id| !own(id)).copied().collect();
        let told = || written(&self.identities).filter(|(id, _)| own(&id));
        let first = policies.compute(told);
        assert!(first.cidr.is_empty(), "{:?}", first.cidr);
        let of_remote = |key: &PolicyKey| remote.contains(&key.peer);
        assert!(first.policy.iter().all(|(key, value)| !of_remote(key) || value.is_some()), "{first:?}");
        for id in remote {
            policies.identity_changed(id, Some(&Labels::parse(&self.identities[&id]).unwrap()));
        }
        policies.set_known(2);
        let mut second = policies.compute(|| written(&self.identities));
        second.policy.extend(first.policy);
        self.policies = policies;
        second
    }
}

/// Identities with their labels as they are written.
fn written(identities: &BTreeMap<u32, String>) -> impl Iterator<Item = (u32, &str)> {
    identities.iter().map(|(id, labels)| (*id, labels.as_str()))
}

#[test]
fn entries_decide_as_policies_say() {
    let (mut enforced, mut most) = (0, 0);
    for seed in 0..SEEDS {
        let mut world = World::new(seed);
        for _ in 0..STEPS {
            world.step();
            if world.rng.random_bool(0.6) {
                world.compute();
                enforced += world.check(seed);
                most = most.max(world.installed.len());
            }
        }
        world.compute();
        world.check(seed);
        let changes = world.restart();
        assert!(changes.policy.is_empty(), "seed {seed}: a restart writes {:?}", changes.policy);
        world.check(seed);
        for name in world.rules.keys().cloned().collect::<Vec<_>>() {
            world.tell_policy(&name, None);
        }
        world.compute();
        assert!(world.installed.is_empty() && world.ranges.is_empty(), "seed {seed}: something is left");
    }
    assert!(enforced > 50_000 && most > 50, "{enforced} verdicts, at most {most} entries");
}

#[test]
fn an_identity_touches_only_what_selects_it() {
    let mut world = World::new(1);
    let text = |app: u32, cluster: &str| format!("k8s:app=a{app};k8s:{CLUSTER_LABEL}={cluster};");
    for app in 0..1000 {
        world.tell_identity(1 << 16 | (1000 + app), Some(text(app, "alpha")));
    }
    for app in 0..1000 {
        let is = |app: u32| LabelSelector(vec![Requirement::is("k8s", "app", &format!("a{app}"))]);
        let peers = vec![Peer::Labels(is(app / 10))];
        let section = PolicySection {
            default_deny: true,
            allow: vec![Traffic { peers, ports: Vec::new() }],
            deny: Vec::new(),
        };
        let rules = vec![PolicyRule { subject: is(app), ingress: Some(section), egress: None }];
        let name: PolicyName = format!("cnp/shop/p{app}").parse().unwrap();
        let policy = LocalPolicy { cluster: "alpha".into(), cluster_id: 1, name: name.clone(), rules };
        world.tell_policy(&name, Some(policy));
    }
    world.subjects = (0..50).map(|app| 1 << 16 | (1000 + app * 20)).collect();
    world.policies.set_subjects(&world.subjects);
    world.compute();
    let before = world.policies.looked_at();
    // Pods that app 2 is allowed to reach are those of 20 to 29: of this node one.
    world.tell_identity(2 << 16 | 300, Some(text(2, "beta")));
    world.compute();
    assert_eq!(world.policies.looked_at() - before, 1);
    world.check(1);
}

/// An agent that starts may hear of all identities before all policies.
#[test]
fn new_policies_look_at_each_identity_once() {
    let mut world = World::new(1);
    for id in 0..500 {
        world.tell_identity(2 << 16 | (300 + id), Some(format!("k8s:app=a{id};k8s:tier=x;")));
    }
    for n in 0..100 {
        let is = |app: usize| LabelSelector(vec![Requirement::is("k8s", "app", &format!("a{app}"))]);
        let section = PolicySection {
            default_deny: true,
            allow: vec![Traffic { peers: vec![Peer::Labels(is(100 + n))], ports: Vec::new() }],
            deny: Vec::new(),
        };
        let rules = vec![PolicyRule { subject: is(n), ingress: Some(section), egress: None }];
        let name: PolicyName = format!("cnp/shop/p{n}").parse().unwrap();
        let policy = LocalPolicy { cluster: "alpha".into(), cluster_id: 1, name: name.clone(), rules };
        world.tell_policy(&name, Some(policy));
    }
    let looks = std::cell::Cell::new(0);
    let counted = || written(&world.identities).inspect(|_| looks.set(looks.get() + 1));
    world.policies.compute(counted);
    assert_eq!(looks.get(), 500);
    let name: PolicyName = "cnp/shop/p0".parse().unwrap();
    let same = world.rules[&name].clone();
    world.policies.policy_changed(&name, Some(&same));
    world.policies.compute(counted);
    assert_eq!(looks.get(), 500, "no selector is new");
}

#[test]
fn nobody_is_let_through_before_policies_are_known() {
    let mut policies = Policies::new(MAX, Vec::new(), Vec::new());
    let pod = 1 << 16 | 300;
    policies.set_subjects(&BTreeSet::from([pod]));
    assert_eq!(policies.flags(pod), None);
    policies.set_complete();
    policies.compute(std::iter::empty);
    assert_eq!(policies.flags(pod), Some(0), "there are no policies");
    let name: PolicyName = "cnp/shop/all".parse().unwrap();
    let section = PolicySection { default_deny: true, ..PolicySection::default() };
    let rules = vec![PolicyRule { subject: LabelSelector::default(), ingress: Some(section), egress: None }];
    let policy = LocalPolicy { cluster: "alpha".into(), cluster_id: 1, name: name.clone(), rules };
    policies.policy_changed(&name, Some(&policy));
    assert!(policies.compute(std::iter::empty).subjects.contains(&pod));
    assert_eq!(policies.flags(pod), None, "its labels are not known");
    policies.identity_changed(pod, Some(&Labels::parse("k8s:app=a;").unwrap()));
    policies.compute(std::iter::empty);
    assert_eq!(policies.flags(pod), Some(ENDPOINT_ENFORCE_INGRESS));
    policies.set_subjects(&BTreeSet::new());
    policies.compute(std::iter::empty);
    assert_eq!(policies.flags(pod), None, "it is not known to be here: what was enforced for it stays");
}
