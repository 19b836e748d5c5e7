//! Measures what an agent's engine costs at scale, without etcd and without a kernel: bytes of memory for
//! each endpoint, seconds for a whole mesh, and one change in a large service.
//!
//! ```text
//! cargo run --release -p clustermesh-agent --example scale -- endpoints 3000000
//! cargo run --release -p clustermesh-agent --example scale -- mesh 250 100 1000
//! cargo run --release -p clustermesh-agent --example scale -- service 5000
//! ```
#![allow(clippy::unwrap_used, reason = "a measurement that cannot be made fails")]

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use agent_sync::engine::{Core, Input};
use agent_sync::peers::OwnCluster;
use agent_sync::tunnels::Tunnels;
use clustermesh_kvstore::cluster::{ClusterId, ClusterName, Identity, MaxConnectedClusters, NamespacedName};
use clustermesh_kvstore::key::Kind;
use clustermesh_kvstore::record::{
    Affinity, Balancing, External, IpRecord, LocalService, Node, NodeAddress, NodeAddressKind, Port, PortMap,
    Protocol, Record, Service,
};
use clustermesh_kvstore::reflector::ReflectorEvent;
use ebpf_global_svc::table::{Cursor, Table};
use ebpf_global_svc::{DatapathError, Tables};

const MAX: MaxConnectedClusters = MaxConnectedClusters::C255;
/// Events that the engine takes at once when it is behind.
const BATCH: usize = 1024;

/// Counts what is written and keeps nothing: the kernel's memory is not the agent's.
struct Counted {
    name: &'static str,
    writes: Arc<AtomicU64>,
}

impl<K, V> Table<K, V> for Counted {
    fn upsert(&mut self, entries: &[(K, V)]) -> Result<(), DatapathError> {
        self.writes.fetch_add(entries.len() as u64, Ordering::Relaxed);
        Ok(())
    }
    fn remove(&mut self, keys: &[K]) -> Result<(), DatapathError> {
        self.writes.fetch_add(keys.len() as u64, Ordering::Relaxed);
        Ok(())
    }
    fn dump(&self) -> Result<Vec<(K, V)>, DatapathError> {
        Ok(Vec::new())
    }
    fn count(&self) -> Result<u64, DatapathError> {
        Ok(0)
    }
    fn page(&self, cursor: &mut Option<Cursor>, _limit: usize) -> Result<Vec<(K, V)>, DatapathError> {
        *cursor = None;
        Ok(Vec::new())
    }
    fn get(&self, keys: &[K]) -> Result<Vec<Option<V>>, DatapathError> {
        Ok(keys.iter().map(|_| None).collect())
    }
    fn capacity(&self) -> u64 {
        u64::MAX
    }
    fn name(&self) -> &'static str {
        self.name
    }
}

struct Bench {
    core: Core,
    tables: Tables,
    writes: Arc<AtomicU64>,
    waiting: usize,
}

impl Bench {
    fn new() -> Self {
        let writes = Arc::new(AtomicU64::new(0));
        let counted = |name| Counted { name, writes: writes.clone() };
        let tables = Tables {
            ipcache: Box::new(counted("cm_ipcache")),
            prefix: Box::new(counted("cm_prefix")),
            endpoint: Box::new(counted("cm_endpoint")),
            node: Box::new(counted("cm_node")),
            underlay: Box::new(counted("cm_underlay")),
            service: Box::new(counted("cm_service")),
            slot: Box::new(counted("cm_slot")),
            backend: Box::new(counted("cm_backend")),
            cluster: Box::new(counted("cm_cluster")),
            policy: Box::new(counted("cm_policy")),
            cidr: Box::new(counted("cm_cidr")),
            translate: Box::new(counted("cm_translate")),
            affinity: Box::new(counted("cm_affinity")),
        };
        let own = OwnCluster { name: name(1), id: id(1), max: MAX };
        let core = Core::restore(own, "n0", Tunnels::default(), Instant::now(), &tables).unwrap();
        Self { core, tables, writes, waiting: 0 }
    }

    fn join(&mut self, cluster: u32) {
        self.core.apply(Input::Configured(name(cluster)));
        self.core.apply(Input::Accepted { name: name(cluster), id: id(cluster) });
    }

    fn tell(&mut self, cluster: u32, kind: Kind, event: ReflectorEvent) {
        self.core.apply(Input::Record { name: name(cluster), kind, event });
        self.waiting += 1;
        if self.waiting == BATCH {
            self.step();
        }
    }

    fn put<R: Record>(&mut self, cluster: u32, record: &R) {
        let (suffix, value) = (record.suffix(), record.encode());
        self.tell(cluster, R::KIND, ReflectorEvent::Upsert { suffix, value, revision: 1 });
    }

    fn synced(&mut self, cluster: u32, kind: Kind) {
        self.tell(cluster, kind, ReflectorEvent::Synced { revision: 1 });
    }

    fn step(&mut self) {
        self.waiting = 0;
        self.core.step(Instant::now(), &mut self.tables);
    }

    fn writes(&self) -> u64 {
        self.writes.load(Ordering::Relaxed)
    }
}

fn main() {
    let mut args = std::env::args().skip(1);
    let what = args.next().unwrap_or_default();
    let mut number = || args.next().and_then(|text| text.parse::<u32>().ok());
    match what.as_str() {
        "endpoints" => endpoints(number().unwrap_or(3_000_000)),
        "mesh" => mesh(number().unwrap_or(250), number().unwrap_or(100), number().unwrap_or(1000)),
        "service" => service(number().unwrap_or(5000)),
        _ => eprintln!("scale endpoints [N] | mesh [CLUSTERS] [NODES] [ENDPOINTS] | service [BACKENDS]"),
    }
}

/// Memory for each address, in clusters of 250,000 each.
fn endpoints(count: u32) {
    const EACH: u32 = 250_000;
    let mut bench = Bench::new();
    let before = rss();
    for number in 0..count {
        let cluster = 2 + number / EACH;
        if number % EACH == 0 {
            bench.join(cluster);
            bench.put(cluster, &node(cluster, 0));
        }
        bench.put(cluster, &ip(cluster, number % EACH, 1));
    }
    bench.step();
    let grown = rss() - before;
    println!("endpoints: {count}, grown by {} MiB: {} bytes each", grown >> 20, grown / u64::from(count));
    println!("map writes: {}", bench.writes());
}

/// A whole mesh, with records in the order in which a cluster's lists come: each kind by itself.
fn mesh(clusters: u32, nodes: u32, endpoints: u32) {
    let mut bench = Bench::new();
    bench.join(1);
    (0..20).for_each(|number| bench.put(1, &local(number)));
    let mut events: Vec<(u32, Kind, ReflectorEvent)> = Vec::new();
    let upsert = |suffix: String, value| ReflectorEvent::Upsert { suffix, value, revision: 1 };
    for cluster in 2..clusters + 2 {
        bench.join(cluster);
        for number in 0..nodes {
            let record = node(cluster, number);
            events.push((cluster, Kind::Nodes, upsert(record.suffix(), record.encode())));
        }
    }
    for cluster in 2..clusters + 2 {
        for number in 0..endpoints {
            let record = ip(cluster, number, nodes);
            events.push((cluster, Kind::Ip, upsert(record.suffix(), record.encode())));
        }
    }
    for cluster in 2..clusters + 2 {
        for number in 0..20 {
            let record = remote(cluster, number, 0..50);
            events.push((cluster, Kind::Services, upsert(record.suffix(), record.encode())));
        }
    }
    let count = events.len();
    let (began, before) = (Instant::now(), rss());
    for (cluster, kind, event) in events {
        bench.tell(cluster, kind, event);
    }
    for cluster in 2..clusters + 2 {
        for kind in [Kind::Nodes, Kind::Ip, Kind::Services] {
            bench.synced(cluster, kind);
        }
    }
    bench.step();
    println!("mesh: {count} records in {:.2?}, {} map writes", began.elapsed(), bench.writes());
    println!("memory: {} MiB before (records included), {} MiB after", before >> 20, rss() >> 20);
}

/// One backend goes and comes, again and again.
fn service(backends: u32) {
    let mut bench = Bench::new();
    bench.join(1);
    bench.join(2);
    bench.put(1, &local(0));
    bench.put(2, &node(2, 0));
    bench.put(2, &remote(2, 0, 0..backends));
    bench.step();
    let mut times = Vec::new();
    for round in 0..200_u32 {
        let gone = (round / 2 * 37) % backends;
        let record = remote(2, 0, (0..backends).filter(|number| round % 2 == 1 || *number != gone));
        let (suffix, value) = (record.suffix(), record.encode());
        if round == 0 {
            println!("service: {backends} backends, {} kB", value.len() / 1000);
        }
        let (writes, began) = (bench.writes(), Instant::now());
        bench.tell(2, Kind::Services, ReflectorEvent::Upsert { suffix, value, revision: 1 });
        bench.step();
        times.push((began.elapsed(), bench.writes() - writes));
    }
    let most = times.iter().map(|(_, writes)| *writes).max();
    let mut times: Vec<Duration> = times.into_iter().map(|(time, _)| time).collect();
    times.sort_unstable();
    let at = |percent: usize| times[times.len() * percent / 100];
    println!("one change: p50 {:.0?}, p99 {:.0?}, at most {:?} map writes", at(50), at(99), most);
}

fn name(cluster: u32) -> ClusterName {
    format!("c{cluster}").parse().unwrap()
}

fn id(cluster: u32) -> ClusterId {
    ClusterId::new(cluster, MAX).unwrap()
}

/// Pods of a cluster are in 2^18 addresses of its own.
fn pod(cluster: u32, number: u32) -> IpAddr {
    Ipv4Addr::from(0x1000_0000 + (cluster << 18) + number).into()
}

fn node_ip(cluster: u32, number: u32) -> IpAddr {
    Ipv4Addr::from(0x0a00_0000 + (cluster << 14) + number + 1).into()
}

fn node(cluster: u32, number: u32) -> Node {
    let IpAddr::V4(first) = pod(cluster, number * 256) else { return Node::default() };
    let ip = node_ip(cluster, number);
    Node {
        name: format!("n{number}"),
        cluster: name(cluster).to_string(),
        cluster_id: cluster,
        addresses: vec![NodeAddress { kind: NodeAddressKind::InternalIp, ip }],
        ipv4_alloc_cidr: Some(format!("{first}/24").parse().unwrap()),
        ..Node::default()
    }
}

fn ip(cluster: u32, number: u32, nodes: u32) -> IpRecord {
    IpRecord {
        prefix: pod(cluster, number % nodes * 256 + number / nodes).into(),
        host: true,
        host_ip: Some(node_ip(cluster, number % nodes)),
        identity: Identity((cluster << MAX.identity_shift()) + 100 + number % 100),
        key: 0,
        metadata: String::new(),
        namespace: format!("ns-{}", number % 20),
        pod_name: format!("workload-{}-{number}", number % 100),
        service_account: "default".into(),
        named_ports: Vec::new(),
    }
}

fn ports(name: &str, port: u16) -> PortMap {
    [(name.to_owned(), Port { protocol: Protocol::Tcp, port })].into()
}

fn service_name(number: u32) -> NamespacedName {
    NamespacedName { namespace: "shop".into(), name: format!("orders-{number}") }
}

fn local(number: u32) -> LocalService {
    let address: IpAddr = Ipv4Addr::from(0xac10_0000 + number + 1).into();
    LocalService {
        cluster: name(1).to_string(),
        name: service_name(number),
        cluster_id: 1,
        global: true,
        shared: true,
        private: false,
        affinity: Affinity::None,
        failover: None,
        balancing: Balancing::default(),
        external: External::default(),
        headless: false,
        frontends: [(address, ports("http", 80))].into(),
        backends: Vec::new(),
    }
}

fn remote(cluster: u32, number: u32, backends: impl Iterator<Item = u32>) -> Service {
    Service {
        cluster: name(cluster).to_string(),
        name: service_name(number),
        frontends: BTreeMap::new(),
        backends: backends.map(|at| (pod(cluster, number * 64 + at), ports("http", 8080))).collect(),
        hostnames: BTreeMap::new(),
        zones: BTreeMap::new(),
        labels: BTreeMap::new(),
        selector: BTreeMap::new(),
        include_external: true,
        shared: true,
        cluster_id: cluster,
    }
}

/// Resident memory of this process in bytes.
fn rss() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}
