use serde_json::{Value, json};

use crate::cluster::Cluster;

/// A cluster of a certain size.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Nodes.
    pub nodes: usize,
    /// Identities.
    pub identities: usize,
    /// Pods, each with an endpoint of Cilium's if `cilium` is set.
    pub endpoints: usize,
    /// Global services.
    pub services: usize,
    /// Backends of each service.
    pub backends: usize,
    /// With Cilium's objects.
    pub cilium: bool,
}

impl Load {
    /// Fills the cluster.
    pub fn apply(&self, cluster: &Cluster) {
        if self.cilium {
            cluster.install_cilium();
        }
        cluster.apply(&namespace());
        for index in 0..self.nodes {
            cluster.apply(&node(index));
            if self.cilium {
                cluster.apply(&cilium_node(index));
            }
        }
        if self.cilium {
            for index in 0..self.identities {
                cluster.apply(&identity(index));
            }
        }
        for index in 0..self.endpoints {
            cluster.apply(&self.pod(index));
            if self.cilium {
                cluster.apply(&self.endpoint(index, 1));
            }
        }
        for index in 0..self.services {
            cluster.apply(&service(index));
            cluster.apply(&self.slice(index, self.backends));
        }
    }

    /// An endpoint of Cilium's; `revision` changes its encryption key.
    pub fn endpoint(&self, index: usize, revision: usize) -> Value {
        json!({
            "apiVersion": "cilium.io/v2", "kind": "CiliumEndpoint",
            "metadata": metadata("bench", &format!("pod-{index}"), json!({ "app": format!("app-{}", index % self.identities.max(1)) })),
            "status": {
                "encryption": { "key": revision % 16 },
                "id": index,
                "identity": { "id": 65_536 + 256 + index % self.identities.max(1), "labels": ["k8s:app=bench"] },
                "networking": { "addressing": [{ "ipv4": pod_ip(index) }], "node": node_ip(index % self.nodes.max(1)) },
                "state": "ready",
            },
        })
    }

    /// The endpoint slice of a service, with its first `ready` backends ready.
    pub fn slice(&self, service: usize, ready: usize) -> Value {
        let endpoints: Vec<Value> = (0..self.backends)
            .map(|backend| {
                let index = service * self.backends + backend;
                let is_ready = backend < ready;
                json!({
                    "addresses": [pod_ip(index)],
                    "conditions": { "ready": is_ready, "serving": is_ready, "terminating": false },
                    "nodeName": format!("node-{}", index % self.nodes.max(1)),
                    "targetRef": { "kind": "Pod", "namespace": "bench", "name": format!("pod-{index}"), "uid": "00000000-0000-0000-0000-000000000000" },
                })
            })
            .collect();
        let labels = json!({ "kubernetes.io/service-name": format!("service-{service}") });
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": metadata("bench", &format!("service-{service}-x"), labels),
            "addressType": "IPv4", "endpoints": endpoints,
            "ports": [{ "name": "http", "port": 8080, "protocol": "TCP" }],
        })
    }

    /// A pod.
    pub fn pod(&self, index: usize) -> Value {
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": metadata("bench", &format!("pod-{index}"), json!({ "app": format!("app-{}", index % self.identities.max(1)) })),
            "spec": {
                "nodeName": format!("node-{}", index % self.nodes.max(1)),
                "serviceAccountName": "default",
                "containers": [{
                    "name": "main", "image": "registry.example.com/bench/main:1.0",
                    "ports": [{ "name": "http", "containerPort": 8080, "protocol": "TCP" }],
                    "env": [{ "name": "MODE", "value": "bench" }, { "name": "LEVEL", "value": "info" }],
                    "resources": { "requests": { "cpu": "100m", "memory": "64Mi" } },
                    "volumeMounts": [{ "name": "token", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount", "readOnly": true }],
                }],
                "volumes": [{ "name": "token", "projected": { "sources": [{ "serviceAccountToken": { "path": "token", "expirationSeconds": 3607 } }] } }],
            },
            "status": {
                "phase": "Running", "hostIP": node_ip(index % self.nodes.max(1)), "podIP": pod_ip(index),
                "podIPs": [{ "ip": pod_ip(index) }],
                "conditions": [{ "type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z" }],
            },
        })
    }
}

fn namespace() -> Value {
    json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": "bench", "labels": { "kubernetes.io/metadata.name": "bench" } } })
}

fn node(index: usize) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": metadata("", &format!("node-{index}"), json!({ "kubernetes.io/hostname": format!("node-{index}") })),
        "spec": { "podCIDRs": [pod_cidr(index)] },
        "status": { "addresses": [{ "type": "InternalIP", "address": node_ip(index) }] },
    })
}

fn cilium_node(index: usize) -> Value {
    json!({
        "apiVersion": "cilium.io/v2", "kind": "CiliumNode",
        "metadata": metadata("", &format!("node-{index}"), json!({ "kubernetes.io/hostname": format!("node-{index}") })),
        "spec": {
            "addresses": [{ "type": "InternalIP", "ip": node_ip(index) }],
            "ipam": { "podCIDRs": [pod_cidr(index)] },
        },
    })
}

fn identity(index: usize) -> Value {
    json!({
        "apiVersion": "cilium.io/v2", "kind": "CiliumIdentity",
        "metadata": metadata("", &(65_536 + 256 + index).to_string(), json!({ "app": format!("app-{index}") })),
        "security-labels": {
            "k8s:app": format!("app-{index}"),
            "k8s:io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name": "bench",
            "k8s:io.cilium.k8s.policy.cluster": "alpha",
            "k8s:io.cilium.k8s.policy.serviceaccount": "default",
            "k8s:io.kubernetes.pod.namespace": "bench",
        },
    })
}

fn service(index: usize) -> Value {
    let mut metadata = metadata("bench", &format!("service-{index}"), json!({ "app": "bench" }));
    metadata["annotations"] = json!({ "service.cilium.io/global": "true" });
    let ip = format!("10.96.{}.{}", index / 250, index % 250 + 1);
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": metadata,
        "spec": {
            "clusterIP": ip, "clusterIPs": [ip], "type": "ClusterIP", "ipFamilies": ["IPv4"],
            "selector": { "app": format!("app-{index}") },
            "ports": [{ "name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080 }],
        },
    })
}

/// With as much about who manages which field as a real object has.
fn metadata(namespace: &str, name: &str, labels: Value) -> Value {
    let fields = json!({ "f:metadata": { "f:labels": { ".": {}, "f:app": {} } }, "f:spec": { ".": {}, "f:containers": { ".": {}, "f:image": {}, "f:name": {}, "f:ports": { ".": {}, "f:containerPort": {}, "f:protocol": {} } }, "f:nodeName": {} } });
    let mut metadata = json!({
        "name": name, "labels": labels, "uid": "0f3c1b8e-6c9f-4a4e-9f0b-6a2f8a8f3c11",
        "creationTimestamp": "2026-01-01T00:00:00Z", "generation": 1,
        "managedFields": [
            { "manager": "kube-controller-manager", "operation": "Update", "apiVersion": "v1", "time": "2026-01-01T00:00:00Z", "fieldsType": "FieldsV1", "fieldsV1": fields },
            { "manager": "kubelet", "operation": "Update", "apiVersion": "v1", "time": "2026-01-01T00:00:00Z", "fieldsType": "FieldsV1", "fieldsV1": fields, "subresource": "status" },
        ],
    });
    if !namespace.is_empty() {
        metadata["namespace"] = namespace.into();
    }
    metadata
}

fn pod_ip(index: usize) -> String {
    format!("10.{}.{}.{}", 1 + index / 62_500, index / 250 % 250, index % 250 + 1)
}

fn node_ip(index: usize) -> String {
    format!("172.18.{}.{}", index / 250, index % 250 + 1)
}

fn pod_cidr(index: usize) -> String {
    format!("10.{}.{}.0/24", 1 + index / 250, index % 250)
}
