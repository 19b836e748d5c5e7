//! What another import policy would do to what one cluster says: plain code, record by record.
//!
//! In: records as they stand in etcd, nodes first, and the rules in force beside those on trial. Out: how
//! many records each would treat otherwise than the other, by reason, with a few keys of each. Nothing is
//! kept of the records themselves but the pod CIDRs of nodes, which `pod-cidrs: nodes` depends on.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use clustermesh_kvstore::import_policy::{
    Imported, Ledger, Mode, PeerPolicy, PodCidrs, Refusal, Rules, admit,
};
use clustermesh_kvstore::key::Kind;
use ipnet::IpNet;

/// Keys that are kept of each change and reason.
const SAMPLES: usize = 5;

/// What becomes different for a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Change {
    /// It would be refused, and is not now.
    Refused,
    /// It would come in, and is refused now.
    Admitted,
    /// It would come in, be held, and not be used.
    Unused,
    /// It is held and not used now, and would be used.
    Used,
    /// It comes in under both, but would be counted as breaking a rule that is only audited.
    Audited,
    /// It is refused now and would be, perhaps for another reason.
    StillRefused,
}

/// Records of one kind that change in the same way for the same reason.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Group {
    /// How many.
    pub count: u64,
    /// Keys of the first of them, each with a sentence.
    pub samples: Vec<(String, String)>,
}

/// One kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KindTrial {
    /// Records in etcd.
    pub records: u64,
    /// Of them, those that come in now.
    pub now: u64,
    /// And those that would.
    pub then: u64,
    /// What changes, with the reason's word: that against the record, under the rules that refuse it.
    pub changes: BTreeMap<(Change, &'static str), Group>,
}

/// A cluster under two sets of rules.
#[derive(Debug)]
pub struct Trial {
    now: Side,
    then: Side,
    kinds: BTreeMap<Kind, KindTrial>,
}

/// One set of rules, and what has come in by it.
#[derive(Debug)]
struct Side {
    peer: PeerPolicy,
    /// Records of the kind that is being looked at.
    held: usize,
    kind: Option<Kind>,
    /// Pod CIDRs of the nodes that came in, if it matters where these are.
    own: Option<Vec<IpNet>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Verdict {
    In,
    Audited(Refusal),
    /// Held, but nothing is sent there.
    Unused(String),
    Refused(Refusal),
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Refused => "refused",
            Self::Admitted => "admitted",
            Self::Unused => "unused",
            Self::Used => "used",
            Self::Audited => "audited",
            Self::StillRefused => "still-refused",
        })
    }
}

impl Trial {
    /// Kinds in the order in which their records are to be looked at.
    pub const KINDS: [Kind; 4] = [Kind::Nodes, Kind::Identities, Kind::Ip, Kind::Services];

    /// The reason's word for what `pod-cidrs: nodes` leaves unused.
    pub const OUTSIDE: &str = "outside_own_nodes";

    /// `now`: the cluster and the rules in force for it.
    pub fn new(now: PeerPolicy, then: PeerPolicy) -> Self {
        Self { now: Side::new(now), then: Side::new(then), kinds: BTreeMap::new() }
    }

    /// Looks at a record.
    pub fn look(&mut self, kind: Kind, suffix: &str, value: &[u8]) {
        let (now, then) = (self.now.judge(kind, suffix, value), self.then.judge(kind, suffix, value));
        let trial = self.kinds.entry(kind).or_default();
        trial.records += 1;
        trial.now += u64::from(now.is_in());
        trial.then += u64::from(then.is_in());
        let Some((change, reason, detail)) = compare(&now, &then) else { return };
        let group = trial.changes.entry((change, reason)).or_default();
        group.count += 1;
        if group.samples.len() < SAMPLES {
            group.samples.push((Ledger::shown(suffix), Ledger::shown(detail)));
        }
    }

    /// What was found, by kind.
    pub fn finish(self) -> BTreeMap<Kind, KindTrial> {
        self.kinds
    }
}

impl Side {
    fn new(peer: PeerPolicy) -> Self {
        let own = at_own_nodes(&peer.rules).then(Vec::new);
        Self { peer, held: 0, kind: None, own }
    }

    fn judge(&mut self, kind: Kind, suffix: &str, value: &[u8]) -> Verdict {
        if self.kind != Some(kind) {
            (self.kind, self.held) = (Some(kind), 0);
            if let Some(own) = &mut self.own {
                *own = IpNet::aggregate(own);
                own.sort_unstable_by_key(IpNet::network);
            }
        }
        let admitted = match admit(kind, suffix, value, &self.peer) {
            Ok(admitted) => admitted,
            Err(refusal) => return Verdict::Refused(refusal),
        };
        let beyond = match self.peer.check_quota(kind, self.held) {
            Ok(beyond) => beyond,
            Err(refusal) => return Verdict::Refused(refusal),
        };
        self.held += 1;
        if let (Some(own), Imported::Node(node)) = (&mut self.own, &admitted.record) {
            own.extend(node.pod_cidrs());
        }
        if let Some(text) = self.unused(&admitted.record) {
            return Verdict::Unused(text);
        }
        admitted.audited.or(beyond).map_or(Verdict::In, Verdict::Audited)
    }

    /// Why a record is of no use, if its pods have to be at the cluster's own nodes.
    fn unused(&self, record: &Imported) -> Option<String> {
        let own = self.own.as_ref()?;
        let outside = |ip: &IpAddr| {
            // Aggregated, so they are disjoint: only the last one that starts at or before can hold it.
            let after = own.partition_point(|net| net.network() <= *ip);
            !after.checked_sub(1).is_some_and(|at| own[at].contains(ip))
        };
        match record {
            Imported::Ip(record) => {
                let ip = record.prefix.addr();
                outside(&ip).then(|| format!("{ip} is in no pod CIDR of the cluster's own nodes"))
            }
            Imported::Service(service) => {
                let count = service.backends.iter().filter(|(ip, _)| outside(ip)).count();
                (count > 0).then(|| format!("{count} backends are in no pod CIDR of the cluster's own nodes"))
            }
            _ => None,
        }
    }
}

impl Verdict {
    fn is_in(&self) -> bool {
        !matches!(self, Self::Refused(_))
    }
}

fn compare<'a>(now: &'a Verdict, then: &'a Verdict) -> Option<(Change, &'static str, &'a str)> {
    let of = |change, refusal: &'a Refusal| Some((change, refusal.reason.as_str(), refusal.detail.as_str()));
    match (now, then) {
        (Verdict::Refused(_), Verdict::Refused(refusal)) => of(Change::StillRefused, refusal),
        (_, Verdict::Refused(refusal)) => of(Change::Refused, refusal),
        (Verdict::Refused(refusal), _) => of(Change::Admitted, refusal),
        (Verdict::Unused(_), Verdict::Unused(_)) => None,
        (_, Verdict::Unused(text)) => Some((Change::Unused, Trial::OUTSIDE, text)),
        (Verdict::Unused(text), _) => Some((Change::Used, Trial::OUTSIDE, text)),
        (Verdict::In, Verdict::Audited(refusal)) => of(Change::Audited, refusal),
        _ => None,
    }
}

/// As the mesh applies it: it is not audited.
fn at_own_nodes(rules: &Rules) -> bool {
    rules.mode == Mode::Enforce && rules.pod_cidrs == PodCidrs::Nodes
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use clustermesh_kvstore::cluster::{ClusterId, MaxConnectedClusters};
    use clustermesh_kvstore::import_policy::PolicyFile;

    use super::*;

    fn trial(now: &str, then: &str) -> Trial {
        let max = MaxConnectedClusters::C255;
        let peer = |text: &str| {
            let name = "beta".parse().unwrap();
            let rules: Arc<Rules> = PolicyFile::parse(text).unwrap().rules_for(&name);
            PeerPolicy { name, id: ClusterId::new(2, max).unwrap(), max, is_own: false, rules }
        };
        Trial::new(peer(now), peer(then))
    }

    fn pod(trial: &mut Trial, ip: &str, namespace: &str) {
        let value =
            format!(r#"{{"IP":"{ip}","HostIP":"192.0.2.2","ID":131500,"K8sNamespace":"{namespace}"}}"#);
        trial.look(Kind::Ip, ip, value.as_bytes());
    }

    fn changes(trial: Trial, kind: Kind) -> Vec<(String, &'static str, u64)> {
        let of_kind = trial.finish().remove(&kind).unwrap_or_default();
        of_kind.changes.into_iter().map(|((c, reason), group)| (c.to_string(), reason, group.count)).collect()
    }

    fn is(change: &str, reason: &'static str, count: u64) -> (String, &'static str, u64) {
        (change.to_owned(), reason, count)
    }

    #[test]
    fn what_each_of_two_policies_refuses_is_told_apart() {
        let mut trial = trial(
            "clusters: {beta: {namespaces: {deny: [pay, dark]}}}",
            "clusters: {beta: {pod-cidrs: [10.2.0.0/16], namespaces: {deny: [dark]}}}",
        );
        for n in 0..7 {
            pod(&mut trial, &format!("10.9.0.{n}"), "shop");
        }
        pod(&mut trial, "10.2.0.1", "shop");
        pod(&mut trial, "10.2.0.2", "pay");
        pod(&mut trial, "10.2.0.3", "dark");
        trial.look(Kind::Ip, "10.2.0.9", b"{");
        let ip = trial.finish().remove(&Kind::Ip).unwrap();
        assert_eq!((ip.records, ip.now, ip.then), (11, 8, 2));
        let of = |change, reason| ip.changes.get(&(change, reason)).unwrap();
        let refused = of(Change::Refused, "outside_pod_cidrs");
        assert_eq!((refused.count, refused.samples.len()), (7, SAMPLES));
        assert_eq!(refused.samples[0], ("10.9.0.0".into(), "10.9.0.0 is not in 10.2.0.0/16".into()));
        assert_eq!(of(Change::Admitted, "namespace_not_allowed").samples[0].0, "10.2.0.2");
        assert_eq!(of(Change::StillRefused, "namespace_not_allowed").count, 1);
        assert_eq!(of(Change::StillRefused, "bad_json").count, 1);
        assert_eq!(ip.changes.len(), 4);
    }

    #[test]
    fn quotas_count_what_comes_in() {
        let mut looser = trial("default: {quotas: {ip: 2}}", "default: {quotas: {ip: 4}}");
        let mut audited = trial("", "default: {mode: audit, quotas: {ip: 1}, namespaces: {deny: [pay]}}");
        for trial in [&mut looser, &mut audited] {
            for n in 1..=5 {
                pod(trial, &format!("10.2.0.{n}"), if n == 1 { "pay" } else { "shop" });
            }
        }
        assert_eq!(
            changes(looser, Kind::Ip),
            [is("admitted", "quota_exceeded", 2), is("still-refused", "quota_exceeded", 1)]
        );
        assert_eq!(
            changes(audited, Kind::Ip),
            [is("audited", "namespace_not_allowed", 1), is("audited", "quota_exceeded", 4)]
        );
    }

    #[test]
    fn the_pod_cidrs_of_the_own_nodes_decide_what_is_used() {
        let node = br#"{"Name":"n1","Cluster":"beta","ClusterID":2,"IPAddresses":[{"Type":"InternalIP","IP":"192.0.2.2"}],"IPv4AllocCIDR":{"IP":"10.2.0.0","Mask":"//8AAA=="}}"#;
        let service = br#"{"cluster":"beta","clusterID":2,"namespace":"shop","name":"cart","frontends":{},"backends":{"10.2.0.1":{},"10.9.0.1":{}},"shared":true}"#;
        for (now, then, change) in [("any", "nodes", "unused"), ("nodes", "any", "used")] {
            let policy = |cidrs: &str| format!("default: {{pod-cidrs: {cidrs}}}");
            let mut trial = trial(&policy(now), &policy(then));
            trial.look(Kind::Nodes, "n1", node);
            pod(&mut trial, "10.2.0.1", "shop");
            pod(&mut trial, "10.9.0.1", "shop");
            trial.look(Kind::Services, "shop/cart", service);
            let kinds = trial.finish();
            for kind in [Kind::Ip, Kind::Services] {
                let changes: Vec<_> = kinds[&kind].changes.iter().collect();
                let [((found, reason), group)] = changes[..] else { panic!("{kind}: {kinds:?}") };
                assert_eq!((found.to_string().as_str(), *reason, group.count), (change, Trial::OUTSIDE, 1));
            }
        }
    }
}
