//! What the own cluster's policies mean for the pods of this node, as entries of the kernel's tables.
//!
//! In: policies, identities with their labels of all clusters, and the identities of this node's pods. Out:
//! [`PolicyChanges`], the entries that differ from before, and what is enforced for each pod. No I/O, no clock.
//!
//! Entries belong to a pair: the identity of a pod here (the subject) and that of a peer. A pair is computed
//! anew as a whole, from all rules that select the subject; what happens only decides which pairs these are.
//! An identity that comes or goes touches the pairs with the subjects whose rules select it, a policy touches
//! the pairs of its subjects. Whom policies select is looked up once for all that are new, as an agent that
//! starts hears of all of them at once.
//!
//! * `selectors`: which identities each label selector selects.
//! * `ranges`: identities of address ranges outside of the mesh.
//! * `rules`: policies with their selectors resolved.
//! * `entries`: from rules to entries of one pair.

mod entries;
mod ranges;
mod rules;
mod selectors;

use std::collections::{BTreeMap, BTreeSet};

use clustermesh_kvstore::cluster::MaxConnectedClusters;
use clustermesh_kvstore::labels::Labels;
use clustermesh_kvstore::record::{LabelSelector, LocalPolicy, PolicyName};
use ebpf_global_svc::abi::{
    ENDPOINT_AUDIT, ENDPOINT_ENFORCE_EGRESS, ENDPOINT_ENFORCE_INGRESS, PolicyKey, PolicyValue, PrefixKey,
    direction, identity,
};
use ipnet::IpNet;

use entries::{Found, Pair};
use ranges::Ranges;
use rules::{Peers, Policy, RuleTexts, Section};
use selectors::Selectors;

/// Any peer, in the kernel's tables.
const ANY: u32 = 0;

/// See the module.
#[derive(Debug)]
pub struct Policies {
    audit: bool,
    policies: BTreeMap<PolicyName, Policy>,
    selectors: Selectors,
    ranges: Ranges,
    texts: RuleTexts,
    subjects: BTreeMap<u32, Subject>,
    /// Policies whose subjects are still to be looked up.
    fresh: BTreeSet<PolicyName>,
    /// Subjects whose policies are still to be looked up.
    unchosen: BTreeSet<u32>,
    /// What is to be installed, by subject and peer.
    installed: BTreeMap<(u32, u32), Pair>,
    dirty: BTreeSet<(u32, u32)>,
    /// Pairs with identities of clusters that are gone.
    orphaned: BTreeSet<(u32, u32)>,
    /// Subjects for which something else may be enforced than before.
    unsettled: BTreeSet<u32>,
    /// All policies and all identities of the own cluster are known: until then everything stays as it was
    /// restored.
    complete: bool,
    /// Clusters of which all identities are known, by ID.
    known: BTreeSet<u16>,
    max: MaxConnectedClusters,
    /// Pairs that were looked at since the start.
    looked_at: u64,
}

/// A pod of this node, by its identity.
#[derive(Debug, Default)]
struct Subject {
    /// Policies with a rule about it.
    policies: BTreeSet<PolicyName>,
    flags: u32,
}

/// Differences of what is to be installed; `None` removes a key.
#[derive(Debug, Default)]
pub struct PolicyChanges {
    /// Of `cm_policy`.
    pub policy: Vec<(PolicyKey, Option<PolicyValue>)>,
    /// Of `cm_cidr`.
    pub cidr: Vec<(PrefixKey, Option<u32>)>,
    /// Subjects for which something else may be enforced than before.
    pub subjects: BTreeSet<u32>,
}

impl Policies {
    /// Starts from what is installed.
    pub fn new(
        max: MaxConnectedClusters,
        policy: Vec<(PolicyKey, PolicyValue)>,
        cidr: Vec<(PrefixKey, u32)>,
    ) -> Self {
        let mut installed: BTreeMap<(u32, u32), Pair> = BTreeMap::new();
        for (key, value) in policy {
            installed.entry((key.subject, key.peer)).or_default().insert(key, value);
        }
        Self {
            audit: false,
            policies: BTreeMap::new(),
            selectors: Selectors::default(),
            ranges: Ranges::restore(cidr),
            texts: RuleTexts::default(),
            subjects: BTreeMap::new(),
            fresh: BTreeSet::new(),
            unchosen: BTreeSet::new(),
            installed,
            dirty: BTreeSet::new(),
            orphaned: BTreeSet::new(),
            unsettled: BTreeSet::new(),
            complete: false,
            known: BTreeSet::new(),
            max,
            looked_at: 0,
        }
    }

    /// What would be dropped is counted and passes.
    pub fn set_audit(&mut self, audit: bool) {
        self.audit = audit;
    }

    /// An identity has these labels from now on; none: it is gone.
    pub fn identity_changed(&mut self, id: u32, labels: Option<&Labels>) {
        let changed = self.selectors.identity_changed(id, labels);
        for selector in &changed {
            let subjects = self.selectors.subjects_of(*selector);
            self.dirty.extend(subjects.map(|subject| (subject, id)));
        }
        if labels.is_none() {
            let of_peer = self.subjects.keys().map(|subject| (*subject, id));
            self.dirty.extend(of_peer.filter(|pair| self.installed.contains_key(pair)));
        }
        if self.subjects.contains_key(&id) {
            self.unchosen.insert(id);
        }
    }

    /// A policy says this from now on; none: it is gone.
    pub fn policy_changed(&mut self, name: &PolicyName, policy: Option<&LocalPolicy>) {
        let was_empty = self.policies.is_empty();
        let before = self.policies.remove(name);
        if let Some(before) = &before {
            self.unchosen.extend(self.subjects_of(before));
        }
        // The new one first: what both name is kept.
        if let Some(policy) = policy {
            let Self { texts, selectors, .. } = self;
            let after =
                Policy::resolve(policy, texts, &mut |selector: &LabelSelector| selectors.acquire(selector));
            for range in after.ranges() {
                if let Some(id) = self.ranges.acquire(range) {
                    self.range_changed(id);
                }
            }
            self.policies.insert(name.clone(), after);
            self.fresh.insert(name.clone());
        }
        if let Some(before) = before {
            before.selectors().for_each(|selector| self.selectors.release(selector));
            before.ranges().for_each(|range| self.ranges.release(range));
            before.numbers().for_each(|rule| self.texts.release(rule));
        }
        if was_empty != self.policies.is_empty() {
            // Without policies nobody's labels matter.
            let subjects: Vec<u32> = self.subjects.keys().copied().collect();
            for subject in subjects {
                self.all_pairs_of(subject);
                self.unsettled.insert(subject);
            }
        }
    }

    /// The identities of this node's pods.
    pub fn set_subjects(&mut self, subjects: &BTreeSet<u32>) {
        let gone: Vec<u32> = self.subjects.keys().filter(|id| !subjects.contains(*id)).copied().collect();
        for id in gone {
            self.subjects.remove(&id);
            self.selectors.forget_subject(id);
            self.all_pairs_of(id);
        }
        for id in subjects {
            if !self.subjects.contains_key(id) {
                self.subjects.insert(*id, Subject::default());
                self.unchosen.insert(*id);
            }
        }
    }

    /// All policies and all identities of the own cluster have been told.
    pub fn set_complete(&mut self) {
        if !self.complete {
            self.complete = true;
            self.dirty.extend(self.installed.keys());
            self.unsettled.extend(self.subjects.keys());
        }
    }

    /// All identities of a cluster have been told.
    pub fn set_known(&mut self, cluster: u16) {
        if self.known.insert(cluster) {
            let pairs =
                self.installed.keys().filter(|(_, peer)| cluster_of(*peer, self.max) == Some(cluster));
            self.dirty.extend(pairs);
        }
    }

    /// A cluster is gone: nothing of it is wanted any more, until another one tells its identities under the
    /// same ID.
    pub fn forget_cluster(&mut self, cluster: u16) {
        self.known.remove(&cluster);
        let of_cluster = |peer: u32| cluster_of(peer, self.max) == Some(cluster);
        self.orphaned.extend(self.installed.keys().filter(|(_, peer)| of_cluster(*peer)));
    }

    /// Computes what the facts since the last call touched. Nothing before [`Self::set_complete`].
    /// `identities` are all that are known, with their labels as they are written.
    pub fn compute<'a, I: Iterator<Item = (u32, &'a str)>>(
        &mut self,
        identities: impl FnOnce() -> I,
    ) -> PolicyChanges {
        let mut changes = PolicyChanges::default();
        if !self.complete {
            return changes;
        }
        self.selectors.resolve(identities);
        self.choose_all();
        for id in self.ranges.drop_unused() {
            self.range_changed(id);
        }
        changes.cidr.extend(self.ranges.take_new());
        for pair in std::mem::take(&mut self.dirty) {
            let stays = self.is_unlabelled(pair.0) || self.is_unsure_of(pair.1);
            if !stays || self.orphaned.contains(&pair) {
                self.compute_pair(pair, &mut changes);
            }
        }
        for pair in std::mem::take(&mut self.orphaned) {
            self.compute_pair(pair, &mut changes);
        }
        for id in std::mem::take(&mut self.unsettled) {
            let flags = self.enforced(id);
            if let Some(subject) = self.subjects.get_mut(&id) {
                subject.flags = flags;
                changes.subjects.insert(id);
            }
        }
        changes
    }

    /// What is enforced for a pod of this identity; none if that cannot be told yet.
    pub fn flags(&self, id: u32) -> Option<u32> {
        if !self.complete {
            return None;
        }
        if self.policies.is_empty() || id < identity::FIRST_USER {
            return Some(0);
        }
        // Somebody who is not known to be here (yet) is not unrestricted.
        self.subjects.get(&id).filter(|_| self.selectors.knows(id)).map(|subject| subject.flags)
    }

    /// Clusters with identities in entries that a predecessor left, by ID.
    pub fn restored_clusters(&self) -> BTreeSet<u16> {
        self.installed.keys().filter_map(|(_, peer)| cluster_of(*peer, self.max)).collect()
    }

    /// What is to be installed in `cm_policy` under a key.
    pub fn wanted(&self, key: &PolicyKey) -> Option<PolicyValue> {
        self.installed.get(&(key.subject, key.peer))?.get(key).copied()
    }

    /// Keys of `cm_policy`.
    pub fn keys(&self) -> impl Iterator<Item = PolicyKey> {
        self.installed.values().flat_map(|pair| pair.keys().copied())
    }

    /// What is to be installed in `cm_cidr` under a key.
    pub fn wanted_range(&self, key: &PrefixKey) -> Option<u32> {
        self.ranges.wanted(key)
    }

    /// Keys of `cm_cidr`.
    pub fn range_keys(&self) -> impl Iterator<Item = PrefixKey> {
        self.ranges.keys()
    }

    /// The address range of an identity.
    pub fn range_of(&self, id: u32) -> Option<IpNet> {
        self.ranges.net_of(id)
    }

    /// Where a rule stands, by its number.
    pub fn rule_text(&self, rule: u32) -> Option<&str> {
        self.texts.of(rule)
    }

    /// Pairs of a subject and a peer that were computed since the start: what a change costs.
    pub fn looked_at(&self) -> u64 {
        self.looked_at
    }

    fn subjects_of(&self, policy: &Policy) -> BTreeSet<u32> {
        let selected = policy.rules.iter().flat_map(|rule| self.selectors.selected(rule.subject));
        selected.filter(|id| self.subjects.contains_key(*id)).copied().collect()
    }

    fn choose_all(&mut self) {
        for name in std::mem::take(&mut self.fresh) {
            if let Some(policy) = self.policies.get(&name) {
                self.unchosen.extend(self.subjects_of(policy));
            }
        }
        for id in std::mem::take(&mut self.unchosen) {
            // Somebody who is not here any more was forgotten.
            if self.subjects.contains_key(&id) {
                self.choose_policies(id);
            }
        }
    }

    /// Finds the policies with a rule about a subject, and what they may touch.
    fn choose_policies(&mut self, id: u32) {
        let about = |policy: &Policy| {
            policy.rules.iter().any(|rule| self.selectors.selected(rule.subject).contains(&id))
        };
        let names = self.policies.iter().filter(|(_, policy)| about(policy)).map(|(name, _)| name.clone());
        let names: BTreeSet<PolicyName> = names.collect();
        self.selectors.forget_subject(id);
        let mut peers = BTreeSet::from([ANY, identity::HOST, identity::WORLD, identity::REMOTE_NODE]);
        for name in &names {
            for selector in self.policies[name].peer_selectors() {
                self.selectors.add_subject(selector, id);
                peers.extend(self.selectors.selected(selector));
            }
        }
        peers.extend(self.ranges.ids());
        self.all_pairs_of(id);
        self.dirty.extend(peers.into_iter().map(|peer| (id, peer)));
        self.unsettled.insert(id);
        if let Some(subject) = self.subjects.get_mut(&id) {
            subject.policies = names;
        }
    }

    fn all_pairs_of(&mut self, subject: u32) {
        let pairs = self.installed.range((subject, 0)..=(subject, u32::MAX));
        self.dirty.extend(pairs.map(|(pair, _)| *pair));
    }

    /// An address range got an identity of its own or lost it: addresses in it are others from now on.
    fn range_changed(&mut self, id: u32) {
        self.dirty.extend(self.subjects.keys().map(|subject| (*subject, id)));
        self.dirty.extend(self.installed.keys().filter(|(_, peer)| *peer == id));
    }

    /// What policies enforce for a subject: a direction in which some rule restricts it.
    fn enforced(&self, id: u32) -> u32 {
        let ways =
            [(direction::INGRESS, ENDPOINT_ENFORCE_INGRESS), (direction::EGRESS, ENDPOINT_ENFORCE_EGRESS)];
        let is_enforced = |way| self.sections(id, way).any(Section::restricts);
        let flags =
            ways.into_iter().filter(|(way, _)| is_enforced(*way)).fold(0, |all, (_, flag)| all | flag);
        if flags != 0 && self.audit { flags | ENDPOINT_AUDIT } else { flags }
    }

    /// What the rules about a subject say of one direction.
    fn sections(&self, id: u32, way: u8) -> impl Iterator<Item = &Section> {
        let names = self.subjects.get(&id).into_iter().flat_map(|subject| &subject.policies);
        let rules = names.filter_map(|name| self.policies.get(name)).flat_map(|policy| &policy.rules);
        rules
            .filter(move |rule| self.selectors.selected(rule.subject).contains(&id))
            .filter_map(move |rule| rule.section(way))
    }

    fn compute_pair(&mut self, pair: (u32, u32), changes: &mut PolicyChanges) {
        self.looked_at += 1;
        let (subject, peer) = pair;
        let after = self.entries_of(subject, peer);
        let before = match after.is_empty() {
            true => self.installed.remove(&pair),
            false => self.installed.insert(pair, after.clone()),
        };
        let before = before.unwrap_or_default();
        changes.policy.extend(
            after.iter().filter(|(key, value)| before.get(*key) != Some(*value)).map(|(k, v)| (*k, Some(*v))),
        );
        changes.policy.extend(before.keys().filter(|key| !after.contains_key(*key)).map(|key| (*key, None)));
    }

    /// A pod is here, but not (or no more) its labels: it goes on under the policies that it had, as its
    /// flags do.
    fn is_unlabelled(&self, subject: u32) -> bool {
        self.subjects.contains_key(&subject) && self.flags(subject).is_none()
    }

    /// The peer was named by a predecessor, and its cluster has not told yet whether it still exists.
    fn is_unsure_of(&self, peer: u32) -> bool {
        let is_told = |cluster| self.known.contains(&cluster);
        !self.selectors.knows(peer) && cluster_of(peer, self.max).is_some_and(|cluster| !is_told(cluster))
    }

    fn entries_of(&self, subject: u32, peer: u32) -> Pair {
        let mut pair = Pair::new();
        for way in [direction::INGRESS, direction::EGRESS] {
            if !self.sections(subject, way).any(Section::restricts) {
                continue;
            }
            let mut found = Found::default();
            for section in self.sections(subject, way) {
                let allow = section.allow.iter().map(|traffic| (traffic, false));
                for (traffic, is_denied) in allow.chain(section.deny.iter().map(|traffic| (traffic, true))) {
                    if traffic.peers.iter().any(|peers| self.takes(peers, peer)) {
                        found.add(traffic, is_denied);
                    }
                }
            }
            // Rules that only deny leave everything else as it is.
            if peer == ANY && !self.sections(subject, way).any(|section| section.default_deny) {
                found.allow_all(RuleTexts::unrestricted());
            }
            // The kubelet's probes come from the node.
            if peer == identity::HOST && way == direction::INGRESS {
                found.allow_all(RuleTexts::local_host());
            }
            found.write(subject, peer, way, &mut pair);
        }
        pair
    }

    fn takes(&self, peers: &Peers, peer: u32) -> bool {
        match peers {
            Peers::Any => peer == ANY,
            Peers::Identity(id) => *id == peer,
            Peers::Selected(selector) => self.selectors.selected(*selector).contains(&peer),
            Peers::World => peer == identity::WORLD || self.ranges.has(peer),
            Peers::Range { net, except } => self.ranges.net_of(peer).is_some_and(|range| {
                net.contains(&range) && !except.iter().any(|except| except.contains(&range))
            }),
        }
    }
}

/// The cluster that an identity belongs to; none of those that are the same everywhere or mean something
/// here only.
fn cluster_of(id: u32, max: MaxConnectedClusters) -> Option<u16> {
    let of_cluster = identity::FIRST_USER..identity::FIRST_CIDR;
    of_cluster.contains(&id).then(|| u16::try_from(id >> max.identity_shift()).ok()).flatten()
}

#[cfg(test)]
mod tests;
