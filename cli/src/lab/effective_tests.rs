//! What the apiserver gets to see, byte by byte where it matters.

use super::*;
use crate::lab::testing;

const POD: &str = "
apiVersion: v1
kind: Pod
metadata: {name: orders-0, namespace: shop, labels: {app: orders}}
spec: {containers: [{name: web, image: web, ports: [{name: http, containerPort: 8080}]}]}
";

fn cluster() -> Cluster {
    testing::topology().clusters.remove(0)
}

fn rendered(change: impl FnOnce(&mut PodState)) -> Files {
    let mut state = testing::cluster_state(testing::SERVICES);
    let mut pod = testing::pod_state(POD);
    change(&mut pod);
    state.pods.insert(pod.name.clone(), pod);
    render(&cluster(), &state).unwrap()
}

#[test]
fn a_cluster_becomes_one_file_per_namespace_and_kind() {
    let files = rendered(|_| {});
    let names: Vec<&str> = files.keys().map(String::as_str).collect();
    assert_eq!(names, ["namespaces.yaml", "nodes.yaml", "shop.pods.yaml", "shop.services.yaml"]);
    assert_eq!(
        files["namespaces.yaml"],
        "apiVersion: v1
kind: Namespace
metadata:
  labels:
    kubernetes.io/metadata.name: default
  name: default
---
apiVersion: v1
kind: Namespace
metadata:
  labels:
    kubernetes.io/metadata.name: shop
  name: shop
"
    );
}

#[test]
fn a_node_says_where_it_is() {
    let node: Value =
        serde_saphyr::from_str(rendered(|_| {})["nodes.yaml"].split("---\n").nth(1).unwrap()).unwrap();
    assert_eq!(node["metadata"]["name"], "node2");
    assert_eq!(node["spec"]["podCIDRs"], json!(["10.1.1.0/24", "fd00:1:0:1::/64"]));
    assert_eq!(node["metadata"]["annotations"]["network.cilium.io/ipv4-cilium-host"], "10.1.1.1");
    assert_eq!(node["metadata"]["annotations"]["network.cilium.io/ipv6-cilium-host"], "fd00:1:0:1::1");
    assert_eq!(node["status"]["addresses"][0], json!({"type": "InternalIP", "address": "172.31.1.2"}));
}

#[test]
fn a_pod_is_ready_until_it_is_deleted() {
    let pod = |change: fn(&mut PodState)| -> Value {
        serde_saphyr::from_str(&rendered(change)["shop.pods.yaml"]).unwrap()
    };
    let ready = pod(|_| {});
    assert_eq!(ready["status"]["podIPs"], json!([{"ip": "10.1.0.2"}, {"ip": "fd00:1::2"}]));
    assert_eq!(ready["status"]["hostIP"], "172.31.1.1");
    assert_eq!(ready["status"]["conditions"][3], json!({"type": "Ready", "status": "True"}));
    assert_eq!(ready["spec"]["nodeName"], "node1");
    assert!(ready["metadata"].get("deletionTimestamp").is_none());
    let pending = pod(|p| p.ready = false);
    assert_eq!(
        (&pending["status"]["phase"], &pending["status"]["conditions"][3]["status"]),
        (&json!("Pending"), &json!("False"))
    );
    let terminating = pod(|p| p.deleted = Some(jiff::Timestamp::UNIX_EPOCH));
    assert_eq!(terminating["metadata"]["deletionTimestamp"], "1970-01-01T00:00:00Z");
    assert_eq!(terminating["status"]["conditions"][3]["status"], "False");
}

#[test]
fn a_service_gets_an_address_per_family_and_keeps_it() {
    let mut state = testing::cluster_state(testing::SERVICES);
    let name = ObjectName::new("shop", "orders");
    let first = state.cluster_ips[&name].clone();
    assert_eq!(first[0].to_string(), "10.101.0.20", "as requested");
    assert!(first[1].is_ipv6());
    assign_cluster_ips(&cluster(), &mut state).unwrap();
    assert_eq!(state.cluster_ips[&name], first);
    let service: Value =
        serde_saphyr::from_str(&render(&cluster(), &state).unwrap()["shop.services.yaml"]).unwrap();
    assert_eq!(
        service["spec"]["clusterIPs"],
        json!(first.iter().map(ToString::to_string).collect::<Vec<_>>())
    );
    assert_eq!(service["spec"]["ipFamilies"], json!(["IPv4", "IPv6"]));
    assert_eq!(service["spec"]["ports"][0]["targetPort"], 80);
}

#[test]
fn single_stack_headless_and_impossible_addresses() {
    let ips = |spec: &str| -> Result<Vec<String>, String> {
        let manifest = format!("{{apiVersion: v1, kind: Service, metadata: {{name: x}}, spec: {{{spec}}}}}");
        let mut state = testing::cluster_state(&testing::SERVICES.replace("name: orders", "name: other"));
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("x.yaml"), manifest).unwrap();
        state.objects.read(&dir.path().join("x.yaml")).unwrap();
        assign_cluster_ips(&cluster(), &mut state)?;
        let ips = state.cluster_ips.remove(&ObjectName::new("default", "x")).unwrap_or_default();
        Ok(ips.iter().map(ToString::to_string).collect())
    };
    assert_eq!(ips("ports: []").unwrap().len(), 2);
    let single = ips("ipFamilyPolicy: SingleStack").unwrap();
    assert!(single.len() == 1 && single[0].starts_with("10.101."), "{single:?}");
    let six = ips("ipFamilyPolicy: SingleStack, ipFamilies: [IPv6]").unwrap();
    assert!(six.len() == 1 && six[0].starts_with("fd00:101::"), "{six:?}");
    assert!(ips("clusterIP: None").unwrap().is_empty());
    assert!(ips("type: ExternalName, externalName: example.org").unwrap().is_empty());
    assert!(ips("clusterIP: 10.101.0.20").unwrap_err().contains("belongs to another service"));
    assert!(ips("clusterIP: 10.9.0.1").unwrap_err().contains("not in serviceCIDRs"));
}

#[test]
fn only_what_changed_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let files = rendered(|_| {});
    write(dir.path(), &files).unwrap();
    let modified = |name: &str| std::fs::metadata(dir.path().join(name)).unwrap();
    let inode = |name: &str| std::os::unix::fs::MetadataExt::ino(&modified(name));
    let (nodes, pods) = (inode("nodes.yaml"), inode("shop.pods.yaml"));
    let mut changed = rendered(|p| p.ready = false);
    changed.remove("shop.services.yaml");
    write(dir.path(), &changed).unwrap();
    assert_eq!(inode("nodes.yaml"), nodes);
    assert_ne!(inode("shop.pods.yaml"), pods);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 3, "no leftovers");
}
