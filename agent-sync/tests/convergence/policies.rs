//! In which order the tables of policy are written, and what a restart leaves alone.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use agent_sync::mesh::{Fact, FactKey, Links, Mesh, NodeFact};
use agent_sync::reconcile::Reconciler;
use agent_sync::tunnels::Tunnels;
use clustermesh_kvstore::cluster::{ClusterId, MaxConnectedClusters};
use clustermesh_kvstore::key::Kind;
use clustermesh_kvstore::record::{
    LabelSelector, LocalPolicy, Peer, PolicyRule, PolicySection, Requirement, Traffic,
};
use ebpf_global_svc::abi::{
    ENDPOINT_ENFORCE_INGRESS, EndpointValue, IpKey, IpValue, PolicyKey, PolicyValue, PrefixKey, identity,
};
use ebpf_global_svc::table::{Cursor, MemoryTable, Table};
use ebpf_global_svc::{DatapathError, Tables};

const WEB: u32 = 1 << 16 | 300;
const CLIENT: u32 = 2 << 16 | 301;
const NODE_IP: [u8; 4] = [192, 0, 2, 11];

/// What was written last, in order.
type Log = Arc<Mutex<Vec<Write>>>;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Write {
    Address(u32),
    AddressGone,
    Endpoint { identity: u32, flags: u32 },
    EndpointGone,
    Policy { subject: u32, peer: u32 },
    PolicyGone { subject: u32, peer: u32 },
    Range,
    RangeGone,
}

/// A table that says what is done to it.
struct Told<K, V> {
    table: MemoryTable<K, V>,
    log: Log,
    told: fn(&K, Option<&V>) -> Write,
}

impl<K, V> Told<K, V> {
    fn note<'a>(&self, writes: impl Iterator<Item = (&'a K, Option<&'a V>)>)
    where
        K: 'a,
        V: 'a,
    {
        let told = self.told;
        self.log.lock().unwrap().extend(writes.map(|(key, value)| told(key, value)));
    }
}

impl<K, V> Table<K, V> for Told<K, V>
where
    K: Copy + Send,
    V: Copy + Send,
    MemoryTable<K, V>: Table<K, V>,
{
    fn upsert(&mut self, entries: &[(K, V)]) -> Result<(), DatapathError> {
        self.note(entries.iter().map(|(key, value)| (key, Some(value))));
        self.table.upsert(entries)
    }

    fn remove(&mut self, keys: &[K]) -> Result<(), DatapathError> {
        self.note(keys.iter().map(|key| (key, None)));
        self.table.remove(keys)
    }

    fn dump(&self) -> Result<Vec<(K, V)>, DatapathError> {
        self.table.dump()
    }

    fn count(&self) -> Result<u64, DatapathError> {
        self.table.count()
    }

    fn page(&self, cursor: &mut Option<Cursor>, limit: usize) -> Result<Vec<(K, V)>, DatapathError> {
        self.table.page(cursor, limit)
    }

    fn get(&self, keys: &[K]) -> Result<Vec<Option<V>>, DatapathError> {
        self.table.get(keys)
    }

    fn capacity(&self) -> u64 {
        self.table.capacity()
    }

    fn name(&self) -> &'static str {
        self.table.name()
    }
}

fn tables(log: &Log) -> Tables {
    fn told<K, V>(name: &'static str, log: &Log, told: fn(&K, Option<&V>) -> Write) -> Box<Told<K, V>>
    where
        MemoryTable<K, V>: Table<K, V>,
        K: Ord + Copy + Send,
        V: Copy + Send,
    {
        Box::new(Told { table: MemoryTable::new(name, 1 << 10), log: log.clone(), told })
    }
    Tables {
        service: Box::new(MemoryTable::new("cm_service", 1)),
        slot: Box::new(MemoryTable::new("cm_slot", 1)),
        backend: Box::new(MemoryTable::new("cm_backend", 1)),
        cluster: Box::new(MemoryTable::new("cm_cluster", 1)),
        translate: Box::new(MemoryTable::new("cm_translate", 1)),
        affinity: Box::new(MemoryTable::new("cm_affinity", 1)),
        prefix: Box::new(MemoryTable::new("cm_prefix", 1 << 10)),
        node: Box::new(MemoryTable::new("cm_node", 1 << 10)),
        underlay: Box::new(MemoryTable::new("cm_underlay", 1 << 10)),
        ipcache: told("cm_ipcache", log, |_: &IpKey, value: Option<&IpValue>| {
            value.map_or(Write::AddressGone, |value| Write::Address(value.identity))
        }),
        endpoint: told("cm_endpoint", log, |_: &IpKey, value: Option<&EndpointValue>| {
            value.map_or(Write::EndpointGone, |value| Write::Endpoint {
                identity: value.identity,
                flags: value.flags & ENDPOINT_ENFORCE_INGRESS,
            })
        }),
        policy: told("cm_policy", log, |key: &PolicyKey, value: Option<&PolicyValue>| {
            let PolicyKey { subject, peer, .. } = *key;
            match value {
                Some(_) => Write::Policy { subject, peer },
                None => Write::PolicyGone { subject, peer },
            }
        }),
        cidr: told("cm_cidr", log, |_: &PrefixKey, value: Option<&u32>| {
            value.map_or(Write::RangeGone, |_| Write::Range)
        }),
    }
}

/// An agent that is told its own node's address by the node's record only.
struct Agent {
    log: Log,
    tables: Tables,
    mesh: Mesh,
    reconciler: Reconciler,
    now: Instant,
}

impl Agent {
    fn start(log: Log, tables: Tables) -> Self {
        let now = Instant::now();
        let (reconciler, restored) = Reconciler::restore(&tables, now).unwrap();
        let mut mesh = Mesh::new(id(1), MaxConnectedClusters::C255, "n1", Tunnels::default(), restored);
        mesh.set_links(Links::Absent);
        Self { log, tables, mesh, reconciler, now }
    }

    fn fresh() -> Self {
        let log = Log::default();
        let tables = tables(&log);
        Self::start(log, tables)
    }

    fn restart(mut self) -> Self {
        assert_eq!(self.writes(), [], "everything is written");
        Self::start(self.log, self.tables)
    }

    /// What is written for what was told since.
    fn writes(&mut self) -> Vec<Write> {
        self.reconciler.accept(self.mesh.compute());
        self.reconciler.run(self.now, &mut self.tables);
        assert_eq!(self.reconciler.pending(), 0, "{:?}", self.reconciler.last_error());
        std::mem::take(&mut self.log.lock().unwrap())
    }

    fn tell(&mut self, cluster: u16, fact: Fact) {
        self.mesh.upsert(id(cluster), fact, 0);
    }

    fn list(&mut self, cluster: u16, kind: Kind, facts: impl IntoIterator<Item = Fact>) {
        self.mesh.begin_list(id(cluster), kind);
        facts.into_iter().for_each(|fact| self.tell(cluster, fact));
        self.mesh.finish_list(id(cluster), kind);
    }

    fn list_node(&mut self) {
        let node = NodeFact { internal_ips: vec![Ipv4Addr::from(NODE_IP).into()], ..NodeFact::default() };
        self.list(1, Kind::Nodes, [Fact::Node("n1".into(), node)]);
    }

    fn list_addresses(&mut self) {
        self.list(1, Kind::Ip, [Fact::Ip(pod(1), address(WEB))]);
        self.list(1, Kind::LocalIp, []);
    }

    fn list_policies(&mut self, policies: impl IntoIterator<Item = LocalPolicy>) {
        self.list(1, Kind::Identities, [labels(WEB, "web", "alpha")]);
        self.list(1, Kind::LocalIdentities, []);
        let policies = policies.into_iter().map(|policy| Fact::LocalPolicy(Box::new(policy)));
        self.list(1, Kind::LocalPolicies, policies);
    }

    /// The own cluster's pod is guarded, and a remote client may reach it.
    fn guarded() -> Self {
        let mut agent = Self::fresh();
        agent.list_node();
        agent.list_addresses();
        agent.list_policies([guard()]);
        agent.list(2, Kind::Identities, [labels(CLIENT, "client", "beta")]);
        agent.writes();
        agent
    }
}

fn id(cluster: u16) -> ClusterId {
    ClusterId::new(cluster.into(), MaxConnectedClusters::C255).unwrap()
}

fn pod(cluster: u8) -> IpAddr {
    Ipv4Addr::new(10, cluster, 0, 1).into()
}

fn address(identity: u32) -> IpValue {
    IpValue { identity, node_ip: NODE_IP, key: 0, flags: 0, pad: 0 }
}

fn labels(identity: u32, app: &str, cluster: &str) -> Fact {
    let labels = format!("k8s:app={app};k8s:io.cilium.k8s.policy.cluster={cluster};");
    Fact::Identity(identity, labels.into())
}

fn app(name: &str) -> LabelSelector {
    LabelSelector(vec![Requirement::is("k8s", "app", name)])
}

/// Lets clients and a range outside of the mesh reach what serves the web.
fn guard() -> LocalPolicy {
    let range = Peer::Cidr { net: "198.51.100.0/24".parse().unwrap(), except: Vec::new() };
    let peers = vec![Peer::Labels(app("client")), range];
    let section = PolicySection {
        default_deny: true,
        allow: vec![Traffic { peers, ports: Vec::new() }],
        deny: Vec::new(),
    };
    LocalPolicy {
        cluster: "alpha".into(),
        cluster_id: 1,
        name: "cnp/shop/web".parse().unwrap(),
        rules: vec![PolicyRule { subject: app("web"), ingress: Some(section), egress: None }],
    }
}

fn enforced(identity: u32) -> Write {
    Write::Endpoint { identity, flags: ENDPOINT_ENFORCE_INGRESS }
}

fn open(identity: u32) -> Write {
    Write::Endpoint { identity, flags: 0 }
}

fn place(writes: &[Write], wanted: impl Fn(&Write) -> bool) -> usize {
    writes.iter().position(wanted).unwrap_or_else(|| panic!("not among {writes:?}"))
}

#[test]
fn a_pod_waits_for_its_policies() {
    let mut agent = Agent::fresh();
    agent.list_node();
    agent.list_addresses();
    assert_eq!(agent.writes(), [Write::Address(WEB)], "a policy may still come");
    agent.list_policies([]);
    assert_eq!(agent.writes(), [open(WEB)]);
}

#[test]
fn entries_come_before_enforcement_and_go_after_it() {
    let mut agent = Agent::fresh();
    agent.list_node();
    agent.list_addresses();
    agent.list_policies([]);
    agent.list(2, Kind::Identities, [labels(CLIENT, "client", "beta")]);
    assert_eq!(agent.writes(), [Write::Address(WEB), open(WEB)]);
    agent.tell(1, Fact::LocalPolicy(Box::new(guard())));
    let begin = agent.writes();
    let flag = place(&begin, |write| *write == enforced(WEB));
    assert_eq!(flag, begin.len() - 1, "{begin:?}");
    let range = place(&begin, |write| *write == Write::Range);
    let peers: BTreeSet<u32> = begin[..range]
        .iter()
        .map(|write| match write {
            Write::Policy { subject: WEB, peer } => *peer,
            other => panic!("{other:?} among {begin:?}"),
        })
        .collect();
    assert_eq!(peers, BTreeSet::from([identity::HOST, CLIENT, identity::FIRST_CIDR]));
    agent.mesh.delete(id(1), &FactKey::LocalPolicy(guard().name));
    let end = agent.writes();
    assert_eq!((end[0], end[1], end.len()), (open(WEB), Write::RangeGone, begin.len()), "{end:?}");
}

#[test]
fn entries_of_a_peer_come_before_its_address_and_go_after_it() {
    let mut agent = Agent::guarded();
    let late = CLIENT + 1;
    agent.tell(2, labels(late, "client", "beta"));
    agent.tell(2, Fact::Ip(pod(2), address(late)));
    assert_eq!(agent.writes(), [Write::Policy { subject: WEB, peer: late }, Write::Address(late)]);
    agent.mesh.delete(id(2), &FactKey::Identity(late));
    agent.mesh.delete(id(2), &FactKey::Ip(pod(2)));
    assert_eq!(agent.writes(), [Write::AddressGone, Write::PolicyGone { subject: WEB, peer: late }]);
}

/// Policies may be known before the record of the own node says which pods are here.
#[test]
fn a_restart_writes_nothing_in_whichever_order_lists_come() {
    type Step = fn(&mut Agent);
    let steps: [Step; 4] = [
        Agent::list_node,
        Agent::list_addresses,
        |agent| agent.list_policies([guard()]),
        |agent| agent.list(2, Kind::Identities, [labels(CLIENT, "client", "beta")]),
    ];
    for order in 0..24 {
        let mut left = steps.to_vec();
        let mut agent = Agent::guarded().restart();
        assert_eq!(agent.writes(), [], "nothing is known");
        for (n, choices) in [(order, 4), (order / 4, 3), (order / 12, 2), (0, 1)] {
            left.remove(n % choices)(&mut agent);
            assert_eq!(agent.writes(), [], "order {order}, {} steps left", left.len());
        }
    }
}

/// A namespace that becomes private moves its identities into another list, and the delete may come first.
#[test]
fn a_pod_keeps_its_policies_while_its_labels_are_unknown() {
    let mut agent = Agent::guarded();
    agent.mesh.delete(id(1), &FactKey::Identity(WEB));
    assert_eq!(agent.writes(), []);
    let Fact::Identity(_, moved) = labels(WEB, "web", "alpha") else { unreachable!() };
    agent.tell(1, Fact::LocalIdentity(WEB, moved));
    assert_eq!(agent.writes(), []);
    // The last policy goes while they are unknown: nothing is enforced, whatever they say.
    agent.mesh.delete(id(1), &FactKey::LocalIdentity(WEB));
    agent.mesh.delete(id(1), &FactKey::LocalPolicy(guard().name));
    let end = agent.writes();
    assert_eq!(end[0], open(WEB));
    assert_eq!(agent.tables.policy.count().unwrap() + agent.tables.cidr.count().unwrap(), 0, "{end:?}");
}

/// An agent that ended while it removed a cluster left entries that name nothing else any more.
#[test]
fn entries_for_a_cluster_that_is_gone_go() {
    let mut agent = Agent::guarded().restart();
    agent.list_node();
    agent.list_addresses();
    agent.list_policies([guard()]);
    assert_eq!(agent.writes(), []);
    agent.mesh.keep_only(&BTreeSet::new());
    assert_eq!(agent.writes(), [Write::PolicyGone { subject: WEB, peer: CLIENT }]);
}
