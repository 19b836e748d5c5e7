use super::*;
use crate::fixtures::upserts;
use crate::objects::Objects;

/// Address, state and ports of the backends of the one service in the text.
fn summary(text: &str) -> Vec<String> {
    let mut objects = Objects::default();
    for change in upserts(text) {
        objects.apply(change);
    }
    let service = objects.services().next().unwrap();
    let line = |(ip, backend): (IpAddr, Backend)| {
        let ports =
            backend.ports.iter().map(|(name, port)| format!("{name}={}/{}", port.port, port.protocol));
        format!("{ip} {:?} {}", backend.state, ports.collect::<Vec<_>>().join(" "))
    };
    backends(service, &objects).into_iter().map(line).collect()
}

fn pod(name: &str, ips: &str, ports: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, labels: {{app: web}}}}\n\
         spec: {{containers: [{{name: c, ports: [{ports}]}}]}}\n\
         status: {{podIPs: [{ips}], conditions: [{{type: Ready, status: 'True'}}]}}\n"
    )
}

fn service(spec: &str) -> String {
    format!("---\napiVersion: v1\nkind: Service\nmetadata: {{name: web}}\nspec: {{{spec}}}\n")
}

#[test]
fn a_name_has_its_own_number_and_protocol_on_each_pod() {
    let text = service(
        "clusterIP: 10.9.0.1, selector: {app: web}, \
         ports: [{name: a, port: 80, targetPort: x}, {name: b, port: 80, protocol: UDP, targetPort: x}]",
    ) + &pod(
        "w0",
        "{ip: 10.1.0.1}",
        "{name: x, containerPort: 8080}, {name: x, containerPort: 8081, protocol: UDP}",
    ) + &pod("w1", "{ip: 10.1.0.2}", "{name: x, containerPort: 9090}")
        + &pod("w2", "{ip: 10.1.0.3}", "{name: y, containerPort: 9090}");
    assert_eq!(summary(&text), ["10.1.0.1 Active a=8080/TCP b=8081/UDP", "10.1.0.2 Active a=9090/TCP"]);
}

#[test]
fn of_each_wanted_family_a_pod_gives_its_first_address() {
    let pods = pod("w0", "{ip: 10.1.0.1}, {ip: 'fd00::1'}", "") + &pod("w1", "{ip: 'fd00::2'}", "");
    let with = |spec: &str| {
        summary(&(service(&format!("{spec}, selector: {{app: web}}, ports: [{{port: 80}}]")) + &pods))
    };
    assert_eq!(with("clusterIP: 10.9.0.1"), ["10.1.0.1 Active =80/TCP"]);
    assert_eq!(with("clusterIP: 'fd09::1'"), ["fd00::1 Active =80/TCP", "fd00::2 Active =80/TCP"]);
    assert_eq!(with("clusterIP: None").len(), 3);
    assert_eq!(with("clusterIP: None, ipFamilies: [IPv4]").len(), 1);
}

#[test]
fn sidecars_have_ports_and_other_init_containers_do_not() {
    let text = service("clusterIP: 10.9.0.1, selector: {app: web}, ports: [{port: 80, targetPort: x}]")
        + "---
apiVersion: v1
kind: Pod
metadata: {name: w0, labels: {app: web}}
spec:
  initContainers:
  - {name: setup, ports: [{name: x, containerPort: 1}]}
  - {name: proxy, restartPolicy: Always, ports: [{name: x, containerPort: 2}]}
  containers: [{name: c}]
status: {podIP: 10.1.0.1, conditions: [{type: Ready, status: 'True'}]}
";
    assert_eq!(summary(&text), ["10.1.0.1 Active =2/TCP"]);
}

#[test]
fn a_service_without_a_selector_has_what_its_slices_say() {
    let none = service("clusterIP: 10.9.0.1, ports: [{port: 80}]") + &pod("w0", "{ip: 10.1.0.1}", "");
    assert!(summary(&none).is_empty());
    // Two slices of one service: ports add up, and one good condition is enough.
    let slice = |name: &str, ports: &str, conditions: &str| {
        format!(
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
             metadata: {{name: {name}, labels: {{kubernetes.io/service-name: web}}}}\naddressType: IPv4\n\
             endpoints: [{{addresses: [10.1.0.9], conditions: {conditions}}}]\nports: [{ports}]\n"
        )
    };
    let text = none
        + &slice("s1", "{name: a, port: 1}", "{ready: false, serving: true, terminating: true}")
        + &slice("s2", "{name: b, port: 2}, {name: any}", "{}");
    assert_eq!(summary(&text), ["10.1.0.9 Active a=1/TCP b=2/TCP"]);
}
