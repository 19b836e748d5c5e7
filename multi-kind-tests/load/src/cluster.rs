//! What a cluster looks like in etcd: the values that Cilium's exporter writes, made up.

use std::net::Ipv4Addr;

use serde_json::{Map, Value, json};

/// A made-up cluster.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Cluster {
    /// Name of the cluster.
    #[arg(long)]
    pub(crate) name: String,
    /// Its ID; also part of its addresses.
    #[arg(long)]
    pub(crate) id: u32,
    /// Nodes.
    #[arg(long, default_value_t = 100)]
    pub(crate) nodes: u32,
    /// Identities.
    #[arg(long, default_value_t = 100)]
    pub(crate) identities: u32,
    /// Endpoints.
    #[arg(long, default_value_t = 1000)]
    pub(crate) endpoints: u32,
    /// Global services.
    #[arg(long, default_value_t = 20)]
    pub(crate) services: u32,
    /// Backends of each service.
    #[arg(long, default_value_t = 50)]
    pub(crate) backends: u32,
    /// Write it as a mirror of it would, which may hold several clusters.
    #[arg(long)]
    pub(crate) cached: bool,
    /// Write also what only the own agents of a cluster read, with a frontend for each service.
    #[arg(long, conflicts_with = "cached")]
    pub(crate) private: bool,
}

impl Cluster {
    /// Key and value of its config.
    pub(crate) fn config(&self) -> (String, String) {
        let mut config = json!({
            "id": self.id,
            "capabilities": {"syncedCanaries": true, "maxConnectedClusters": 255, "serviceExportsEnabled": false},
        });
        if self.cached {
            config["capabilities"]["cached"] = true.into();
        }
        (format!("cilium/cluster-config/{}", self.name), config.to_string())
    }

    /// All its records.
    pub(crate) fn records(&self) -> impl Iterator<Item = (String, String)> {
        let nodes = (0..self.nodes).map(|n| self.node(n));
        let identities = (0..self.identities).map(|n| self.identity(n));
        let endpoints = (0..self.endpoints).map(|n| self.endpoint(n, 0));
        let services = (0..self.services).map(|n| self.service(&format!("service-{n}"), self.backends, 0));
        let records = nodes.chain(identities).chain(endpoints).chain(services);
        let private = (0..if self.private { self.services } else { 0 }).map(|n| self.private_service(n));
        records.map(|(key, value)| (self.place(key), value)).chain(private)
    }

    /// Keys of its canaries.
    pub(crate) fn canaries(&self) -> Vec<String> {
        let root = if self.cached { "cache" } else { "state" };
        let shared = ["nodes", "services", "serviceexports", "identities", "ip"]
            .map(|kind| format!("cilium/synced/{}/cilium/{root}/{kind}/v1", self.name));
        let private = ["services", "identities", "ip", "policies"]
            .map(|kind| format!("cilium/synced/{}/clustermesh/local/{kind}/v1", self.name));
        let private = private.into_iter().filter(|_| self.private);
        shared.into_iter().chain(private).collect()
    }

    /// Where a mirror has a key: two kinds do not name the cluster at home.
    fn place(&self, key: String) -> String {
        if !self.cached {
            return key;
        }
        key.replacen("cilium/state/identities/v1/", &format!("cilium/cache/identities/v1/{}/", self.name), 1)
            .replacen("cilium/state/ip/v1/default/", &format!("cilium/cache/ip/v1/{}/", self.name), 1)
            .replacen("cilium/state/", "cilium/cache/", 1)
    }

    /// What the own agents know of the `n`th service.
    fn private_service(&self, n: u32) -> (String, String) {
        let name = format!("service-{n}");
        let (address, port) = Self::frontend(n);
        let value = json!({
            "cluster": self.name,
            "namespace": "shop",
            "name": name,
            "clusterId": self.id,
            "global": true,
            "shared": true,
            "frontends": {address.to_string(): {"http": {"protocol": "TCP", "port": port}}},
        });
        (format!("clustermesh/local/services/v1/{}/shop/{name}", self.name), value.to_string())
    }

    /// An endpoint; `version` makes its value another one, and its identity too.
    pub(crate) fn endpoint(&self, n: u32, version: u32) -> (String, String) {
        let address = self.address(n).to_string();
        let value = json!({
            "IP": address,
            "Mask": null,
            "HostIP": self.node_address(n % self.nodes.max(1)),
            "ID": self.identity_of(n, version),
            "Key": 0,
            "Metadata": "",
            "K8sNamespace": format!("namespace-{}", n % 20),
            "K8sPodName": format!("workload-{}-{version:010}-{n:05}", n % 100),
        });
        (format!("cilium/state/ip/v1/default/{address}"), value.to_string())
    }

    /// The identity of an endpoint. Ten versions in a row have different ones, and so have those of two runs.
    pub(crate) fn identity_of(&self, n: u32, version: u32) -> u32 {
        match version {
            0 => self.identity_number(n % self.identities.max(1)),
            // Such as have no record: agents do not ask for it.
            _ => self.identity_number(self.identities % 100 + version / 1000 % 6500 * 10 + version % 10),
        }
    }

    /// Where the own cluster has the frontend of its `n`th service.
    pub(crate) fn frontend(n: u32) -> (Ipv4Addr, u16) {
        let [.., high, low] = n.to_be_bytes();
        (Ipv4Addr::new(10, 96, high, low), 80)
    }

    /// A service; `version` takes another backend out.
    pub(crate) fn service(&self, name: &str, backends: u32, version: u32) -> (String, String) {
        let ports = json!({"http": {"Protocol": "TCP", "Port": 8080}});
        let skipped = version % backends.max(1);
        let backends: Map<String, Value> = (0..backends)
            .filter(|n| version == 0 || *n != skipped)
            .map(|n| (self.address(n).to_string(), ports.clone()))
            .collect();
        let value = json!({
            "cluster": self.name,
            "namespace": "shop",
            "name": name,
            "frontends": {format!("10.96.{}.{}", self.id % 256, name.len() % 256): {"http": {"Protocol": "TCP", "Port": 80}}},
            "backends": backends,
            "hostnames": {},
            "labels": {},
            "selector": {"app": name},
            "includeExternal": true,
            "shared": true,
            "clusterID": self.id,
        });
        (format!("cilium/state/services/v1/{}/shop/{name}", self.name), value.to_string())
    }

    fn node(&self, n: u32) -> (String, String) {
        let name = format!("{}-node-{n}", self.name);
        // Different in all clusters that have 128 nodes at most, and away from addresses of services.
        let pods = 128 * self.id + n;
        let [high, low] = [128 + pods / 256 % 128, pods % 256];
        let value = json!({
            "Name": name,
            "Cluster": self.name,
            "IPAddresses": [
                {"Type": "InternalIP", "IP": self.node_address(n)},
                {"Type": "CiliumInternalIP", "IP": format!("10.{high}.{low}.1")},
            ],
            "IPv4AllocCIDR": {"IP": format!("10.{high}.{low}.0"), "Mask": "////AA=="},
            "IPv4SecondaryAllocCIDRs": null,
            "IPv6AllocCIDR": null,
            "IPv6SecondaryAllocCIDRs": null,
            "IPv4HealthIP": "",
            "IPv6HealthIP": "",
            "IPv4IngressIP": "",
            "IPv6IngressIP": "",
            "ClusterID": self.id,
            "Source": "custom-resource",
            "EncryptionKey": 0,
            "Labels": {
                "kubernetes.io/arch": "amd64",
                "kubernetes.io/hostname": name,
                "kubernetes.io/os": "linux",
                "topology.kubernetes.io/region": "eu-central-1",
                "topology.kubernetes.io/zone": format!("eu-central-1{}", ["a", "b", "c"][n as usize % 3]),
            },
            "Annotations": null,
            "NodeIdentity": 0,
            "WireguardPubKey": "",
            "BootID": "2f0b1e37-5d47-4a9c-8ac3-2f6bb5cb3b1e",
        });
        (format!("cilium/state/nodes/v1/{}/{name}", self.name), value.to_string())
    }

    fn identity(&self, n: u32) -> (String, String) {
        let labels = format!(
            "k8s:app=workload-{n};k8s:io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name=namespace-{0};\
             k8s:io.cilium.k8s.policy.cluster={1};k8s:io.cilium.k8s.policy.serviceaccount=default;\
             k8s:io.kubernetes.pod.namespace=namespace-{0};",
            n % 20,
            self.name
        );
        (format!("cilium/state/identities/v1/id/{}", self.identity_number(n)), labels)
    }

    fn identity_number(&self, n: u32) -> u32 {
        (self.id << 16) + 256 + n
    }

    /// The address of an endpoint: different in all clusters.
    pub(crate) fn address(&self, n: u32) -> Ipv4Addr {
        Ipv4Addr::from(0x0b00_0000 + (self.id << 18) + n)
    }

    /// The underlay address of a node: different in all clusters that have 2048 nodes at most.
    fn node_address(&self, n: u32) -> String {
        format!("172.{}.{}.{}", 16 + self.id % 16, 8 * (self.id / 16 % 32) + n / 256 % 8, n % 256)
    }
}
