//! What really is in a cluster: its nodes, pods and services.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use agent_sync::tunnels::UnderlayProtocol;
use clustermesh_apiserver::objects::{
    Change, IpFamily, Namespace, Node, Object, ObjectKey, ObjectKind, Pod, Policy, Service, ServicePort,
    TargetPort,
};
use clustermesh_kvstore::cluster::NamespacedName;
use clustermesh_kvstore::record::{
    Affinity, Balancing, External, LabelSelector, Nearness, Peer, PolicyKind, PolicyName, PolicyRule,
    PolicySection, Protocol, Requirement, Traffic,
};
use rand::Rng as _;
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom as _;

/// Names of the clusters; the first one has the address plan's part 1.
pub const NAMES: [&str; 4] = ["alpha", "beta", "gamma", "delta"];
/// The port that services listen at, and that of their pods.
pub const PORTS: (u16, u16) = (80, 8080);

/// A cluster's objects.
#[derive(Clone, Debug)]
pub struct Truth {
    /// Its part of the address plan.
    net: u8,
    /// The addresses that its nodes have.
    pub underlay: Underlay,
    /// Nodes by number.
    pub nodes: BTreeMap<u8, NodeTruth>,
    /// Pods by number.
    pub pods: BTreeMap<u8, PodTruth>,
    /// Services by number.
    pub services: BTreeMap<u8, ServiceTruth>,
    /// Policies by number.
    pub policies: BTreeMap<u8, PolicyTruth>,
}

/// Which addresses nodes have.
#[derive(Clone, Copy, Debug)]
pub struct Underlay {
    /// The family of those between which tunnels run.
    pub tunnels: UnderlayProtocol,
    /// They have one of the other family too, which comes first: records of pods name their nodes by it.
    pub dual_stack: bool,
}

/// A node.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NodeTruth {
    /// It has an address of its own in the pod network.
    pub has_mesh_ip: bool,
    /// Its failure zone.
    pub zone: Option<u8>,
}

/// A pod.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PodTruth {
    /// Where it runs.
    pub node: u8,
    /// The service that it belongs to.
    pub app: u8,
    /// Last byte of its address.
    pub host: u8,
    /// Takes connections.
    pub ready: bool,
}

/// A service.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ServiceTruth {
    /// It is the same service in all clusters.
    pub global: bool,
    /// Others may use its backends.
    pub shared: bool,
    /// Whom callers prefer.
    pub affinity: Affinity,
    /// Seconds that a client keeps its backend.
    pub session: Option<u32>,
    /// The cluster, by its place, that is used before all others.
    pub first: Option<usize>,
    /// The cluster, by its place, that gets all calls of a tier that it can answer.
    pub only: Option<usize>,
    /// Which backends at home are called.
    pub nearness: Nearness,
}

/// Who may reach the pods of a service at home, and who may not for all that others say.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PolicyTruth {
    /// The service.
    pub app: u8,
    /// Who may.
    pub allow: PeersTruth,
    /// Who may not.
    pub deny: Option<PeersTruth>,
}

/// Pods, by their labels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PeersTruth {
    /// Of this service only.
    app: Option<u8>,
    /// Of the cluster with this part of the address plan; none: of the own one, as the exporter's default has it.
    net: Option<u8>,
}

impl PeersTruth {
    fn draw(rng: &mut SmallRng) -> Self {
        let mut maybe = |until| rng.random_bool(0.6).then(|| rng.random_range(1..until));
        Self { app: maybe(3), net: maybe(4) }
    }

    /// Whether a pod of a service and a cluster is among them, in policies of `home`.
    fn take(self, app: u8, net: u8, home: u8) -> bool {
        self.app.is_none_or(|wanted| wanted == app) && self.net.unwrap_or(home) == net
    }

    fn traffic(self) -> Traffic {
        let of_app = self.app.map(|app| Requirement::is("k8s", "app", &service_name(app)));
        let of_cluster = self
            .net
            .and_then(|net| NAMES.get(usize::from(net) - 1))
            .map(|name| Requirement::is("k8s", "io.cilium.k8s.policy.cluster", name));
        let labels = LabelSelector(of_app.into_iter().chain(of_cluster).collect());
        Traffic { peers: vec![Peer::Labels(labels)], ports: Vec::new() }
    }
}

impl Truth {
    /// Two nodes, some pods and services.
    pub fn new(net: u8, underlay: Underlay, rng: &mut SmallRng) -> Self {
        let mut truth = Self {
            net,
            underlay,
            nodes: [(1, NodeTruth { has_mesh_ip: true, zone: Some(1) })].into(),
            pods: BTreeMap::new(),
            services: BTreeMap::new(),
            policies: BTreeMap::new(),
        };
        for _ in 0..rng.random_range(2..8) {
            truth.change(rng);
        }
        truth
    }

    /// Something changes.
    pub fn change(&mut self, rng: &mut SmallRng) -> Vec<Change> {
        match rng.random_range(0..12) {
            10..12 => {
                let number = rng.random_range(1..4);
                if rng.random_bool(0.4) && self.policies.remove(&number).is_some() {
                    let namespace = "shop";
                    return vec![deleted(ObjectKind::CiliumNetworkPolicy, namespace, policy_name(number))];
                }
                let deny = rng.random_bool(0.4).then(|| PeersTruth::draw(rng));
                let policy = PolicyTruth { app: rng.random_range(1..3), allow: PeersTruth::draw(rng), deny };
                self.policies.insert(number, policy);
                vec![Change::Upsert(self.policy(number))]
            }
            0 => {
                let zone = rng.random_bool(0.8).then(|| rng.random_range(1..3));
                if rng.random_bool(0.2) {
                    self.nodes.insert(1, NodeTruth { has_mesh_ip: true, zone });
                    return vec![Change::Upsert(self.node(1))];
                }
                if self.nodes.remove(&2).is_none() {
                    self.nodes.insert(2, NodeTruth { has_mesh_ip: rng.random_bool(0.5), zone });
                    return vec![Change::Upsert(self.node(2))];
                }
                vec![deleted(ObjectKind::Node, "", node_name(2))]
            }
            1..=3 => {
                let number = rng.random_range(1..3);
                if rng.random_bool(0.25) && self.services.remove(&number).is_some() {
                    return vec![deleted(ObjectKind::Service, "shop", service_name(number))];
                }
                let affinity = *[Affinity::None, Affinity::None, Affinity::Local, Affinity::Remote]
                    .choose(rng)
                    .unwrap_or(&Affinity::None);
                let global = rng.random_bool(0.85);
                let service = ServiceTruth {
                    global,
                    shared: global && rng.random_bool(0.85),
                    affinity: if global { affinity } else { Affinity::None },
                    session: rng.random_bool(0.3).then_some(61),
                    first: (global && rng.random_bool(0.25)).then(|| rng.random_range(0..NAMES.len())),
                    only: (global && rng.random_bool(0.15)).then(|| rng.random_range(0..NAMES.len())),
                    nearness: match rng.random_range(0..8) {
                        0 => Nearness::PreferNode,
                        1 => Nearness::OnlyNode,
                        2 => Nearness::PreferZone,
                        _ => Nearness::Any,
                    },
                };
                self.services.insert(number, service);
                vec![Change::Upsert(self.service(number))]
            }
            _ => {
                let number = rng.random_range(1..5);
                if rng.random_bool(0.35) && self.pods.remove(&number).is_some() {
                    return vec![deleted(ObjectKind::Pod, "shop", pod_name(number))];
                }
                // Addresses are used again, by other pods too; never by two at once.
                let free: Vec<u8> = (1..7)
                    .filter(|host| self.pods.iter().all(|(n, pod)| *n == number || pod.host != *host))
                    .collect();
                let host = *free.choose(rng).unwrap_or(&number);
                let (node, app) = (rng.random_range(1..3), rng.random_range(1..3));
                self.pods.insert(number, PodTruth { node, app, host, ready: rng.random_bool(0.85) });
                vec![Change::Upsert(self.pod(number))]
            }
        }
    }

    /// All objects.
    pub fn all(&self) -> Vec<Change> {
        let labels = BTreeMap::new();
        let namespace = Object::Namespace(Arc::new(Namespace { name: "shop".into(), labels, global: None }));
        let nodes = self.nodes.keys().map(|n| self.node(*n));
        let services = self.services.keys().map(|n| self.service(*n));
        let pods = self.pods.keys().map(|n| self.pod(*n));
        let policies = self.policies.keys().map(|n| self.policy(*n));
        let objects = [namespace].into_iter().chain(nodes).chain(services).chain(pods).chain(policies);
        objects.map(Change::Upsert).collect()
    }

    /// Whether a policy selects the pods of a service.
    pub fn is_guarded(&self, app: u8) -> bool {
        self.policies.values().any(|policy| policy.app == app)
    }

    /// Whether policies let a pod of a service of another cluster, or of this one, reach those of `app`.
    pub fn lets_in(&self, app: u8, from: u8, cluster: &Self) -> bool {
        let policies = || self.policies.values().filter(|policy| policy.app == app);
        let takes = |peers: PeersTruth| peers.take(from, cluster.net, self.net);
        let denied = policies().any(|policy| policy.deny.is_some_and(takes));
        !denied && policies().any(|policy| takes(policy.allow))
    }

    /// Where a node's tunnels end.
    pub fn node_ip(&self, node: u8) -> IpAddr {
        let [v4, v6] = self.underlay_ips(node);
        if self.underlay.tunnels == UnderlayProtocol::Ipv4 { v4 } else { v6 }
    }

    /// What pods' records call a node.
    pub fn host_ip(&self, node: u8) -> IpAddr {
        self.internal_ips(node)[0]
    }

    /// Underlay addresses of a node, the first one first.
    pub fn internal_ips(&self, node: u8) -> Vec<IpAddr> {
        let tunnel_end = self.node_ip(node);
        let other = self.underlay_ips(node).into_iter().find(|ip| *ip != tunnel_end);
        other.filter(|_| self.underlay.dual_stack).into_iter().chain([tunnel_end]).collect()
    }

    /// The addresses that a node has, or would have, of each family.
    fn underlay_ips(&self, node: u8) -> [IpAddr; 2] {
        let last = self.net * 10 + node;
        let v6 = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, last.into());
        [Ipv4Addr::new(192, 0, 2, last).into(), v6.into()]
    }

    /// Address of a node in the pod network.
    pub fn mesh_ip(&self, node: u8) -> IpAddr {
        Ipv4Addr::new(10, self.net, node, 254).into()
    }

    /// Address of a pod.
    pub fn pod_ip(&self, pod: &PodTruth) -> IpAddr {
        Ipv4Addr::new(10, self.net, 1, pod.host).into()
    }

    /// Address of a service.
    pub fn service_ip(&self, service: u8) -> IpAddr {
        Ipv4Addr::new(10, 90 + self.net, 0, service).into()
    }

    /// All addresses in the pod network.
    pub fn addresses(&self) -> BTreeSet<IpAddr> {
        let nodes =
            self.nodes.iter().filter(|(_, node)| node.has_mesh_ip).map(|(node, _)| self.mesh_ip(*node));
        self.pods.values().map(|pod| self.pod_ip(pod)).chain(nodes).collect()
    }

    /// The backends that a service has at home.
    pub fn backends(&self, service: u8) -> impl Iterator<Item = IpAddr> + '_ {
        self.pods.values().filter(move |pod| pod.app == service && pod.ready).map(|pod| self.pod_ip(pod))
    }

    /// Those of them that the cluster's own callers on a node are to use.
    pub fn near(&self, number: u8, node: u8) -> BTreeSet<IpAddr> {
        let service = &self.services[&number];
        let zone = |node| self.nodes.get(&node).and_then(|node| node.zone);
        let backends = |which: &dyn Fn(&PodTruth) -> bool| -> BTreeSet<IpAddr> {
            let pods = self.pods.values().filter(|pod| pod.app == number && pod.ready && which(pod));
            pods.map(|pod| self.pod_ip(pod)).collect()
        };
        let on_node = backends(&|pod| pod.node == node);
        let in_zone = backends(&|pod| zone(node).is_some() && zone(pod.node) == zone(node));
        match service.nearness {
            Nearness::OnlyNode => on_node,
            Nearness::PreferNode if !on_node.is_empty() => on_node,
            Nearness::PreferNode | Nearness::PreferZone if !in_zone.is_empty() => in_zone,
            _ => backends(&|_| true),
        }
    }

    fn node(&self, node: u8) -> Object {
        let truth = self.nodes[&node];
        let zone = truth.zone.map(|zone| ("topology.kubernetes.io/zone".to_owned(), format!("z{zone}")));
        Object::Node(Arc::new(Node {
            name: node_name(node),
            labels: zone.into_iter().collect(),
            annotations: BTreeMap::new(),
            internal_ips: self.internal_ips(node),
            external_ips: Vec::new(),
            cilium_internal_ips: truth.has_mesh_ip.then(|| self.mesh_ip(node)).into_iter().collect(),
            ipv4_health_ip: None,
            ipv6_health_ip: None,
            pod_cidrs: format!("10.{}.{node}.0/24", self.net).parse().into_iter().collect(),
            encryption_key: 0,
            wireguard_pub_key: String::new(),
            boot_id: String::new(),
        }))
    }

    fn pod(&self, number: u8) -> Object {
        let pod = &self.pods[&number];
        Object::Pod(Arc::new(Pod {
            name: name(pod_name(number)),
            labels: [("app".to_owned(), service_name(pod.app))].into(),
            service_account: "default".into(),
            node: Some(node_name(pod.node)),
            host_network: false,
            hostname: None,
            subdomain: None,
            ports: Vec::new(),
            ips: vec![self.pod_ip(pod)],
            host_ip: Some(self.host_ip(pod.node)),
            finished: false,
            ready: pod.ready,
            terminating: false,
            created: None,
        }))
    }

    fn policy(&self, number: u8) -> Object {
        let PolicyTruth { app, allow, deny } = self.policies[&number];
        let deny = deny.map(PeersTruth::traffic).into_iter().collect();
        let section = PolicySection { default_deny: true, allow: vec![allow.traffic()], deny };
        let subject = LabelSelector(vec![Requirement::is("k8s", "app", &service_name(app))]);
        let (kind, namespace) = (PolicyKind::Cilium, "shop".to_owned());
        Object::Policy(Arc::new(Policy {
            name: PolicyName { kind, namespace, name: policy_name(number) },
            rules: vec![PolicyRule { subject, ingress: Some(section), egress: None }],
            gaps: Vec::new(),
        }))
    }

    fn service(&self, number: u8) -> Object {
        let service = &self.services[&number];
        let cluster = |place: usize| NAMES[place].parse().ok();
        Object::Service(Arc::new(Service {
            name: name(service_name(number)),
            labels: BTreeMap::new(),
            selector: Some([("app".to_owned(), service_name(number))].into()),
            cluster_ips: vec![self.service_ip(number)],
            headless: false,
            external_name: false,
            families: vec![IpFamily::V4],
            ports: vec![ServicePort {
                name: "http".into(),
                protocol: Protocol::Tcp,
                number: PORTS.0,
                target: TargetPort::Number(PORTS.1),
            }],
            publish_not_ready: false,
            global: service.global,
            shared: service.shared,
            affinity: service.affinity,
            failover_threshold: None,
            balancing: Balancing {
                session: service.session,
                order: service.first.and_then(cluster).map(|name| [name].into()).into_iter().collect(),
                weights: service.only.and_then(cluster).map(|name| (name, 100)).into_iter().collect(),
                nearness: service.nearness,
            },
            external: External::default(),
        }))
    }
}

/// Name of a node.
pub fn node_name(node: u8) -> String {
    format!("n{node}")
}

fn pod_name(pod: u8) -> String {
    format!("p{pod}")
}

fn service_name(service: u8) -> String {
    format!("s{service}")
}

fn policy_name(policy: u8) -> String {
    format!("r{policy}")
}

fn name(name: String) -> NamespacedName {
    NamespacedName { namespace: "shop".into(), name }
}

fn deleted(kind: ObjectKind, namespace: &str, name: String) -> Change {
    Change::Delete(ObjectKey { kind, name: NamespacedName { namespace: namespace.into(), name } })
}
