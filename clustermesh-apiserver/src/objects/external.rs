use std::collections::BTreeMap;

use clustermesh_kvstore::record::{Algorithm, External};
use k8s_openapi::api::core::v1;

use super::meta::{Check, ObjectError};

const ALGORITHM: &str = "service.cilium.io/lb-algorithm";

/// How a service is reached from outside of the mesh, as kube-proxy understands it.
pub(super) fn external(
    check: &Check<'_>,
    annotations: &BTreeMap<String, String>,
    spec: &v1::ServiceSpec,
    status: Option<&v1::ServiceStatus>,
) -> Result<External, ObjectError> {
    let kind = spec.type_.as_deref().unwrap_or("ClusterIP");
    if kind == "ExternalName" || spec.cluster_ip.as_deref() == Some("None") {
        return Ok(External::default());
    }
    let mut external = External::default();
    for text in spec.external_ips.iter().flatten() {
        external.ips.insert(check.ip("spec.externalIPs", text)?);
    }
    let balancer = status.and_then(|status| status.load_balancer.as_ref()).filter(|_| kind == "LoadBalancer");
    for ingress in balancer.and_then(|balancer| balancer.ingress.as_ref()).into_iter().flatten() {
        // A balancer in proxy mode talks to the nodes itself; one with a name only is reached by that.
        match &ingress.ip {
            Some(ip) if ingress.ip_mode.as_deref() != Some("Proxy") => {
                external.ips.insert(check.ip("status.loadBalancer.ingress.ip", ip)?);
            }
            _ => {}
        }
    }
    if kind == "NodePort" || kind == "LoadBalancer" {
        for port in spec.ports.iter().flatten() {
            if let Some(number) = port.node_port.filter(|number| *number != 0) {
                let number = check.port("spec.ports.nodePort", number)?;
                external.node_ports.insert(port.name.clone().unwrap_or_default(), number);
            }
        }
    }
    if !external.is_empty() {
        external.algorithm = annotations.get(ALGORITHM).and_then(|text| algorithm(check, text));
    }
    external.only_node = !external.is_empty() && spec.external_traffic_policy.as_deref() == Some("Local");
    Ok(external)
}

/// A service must not go because of how it is to be balanced: what is no algorithm counts as not said.
fn algorithm(check: &Check<'_>, text: &str) -> Option<Algorithm> {
    match text {
        "random" => Some(Algorithm::Random),
        "maglev" => Some(Algorithm::Maglev),
        other => {
            let what = format!("{ALGORITHM} is {other:?}, not random or maglev; the agents' default counts");
            tracing::warn!("{}", check.error("metadata.annotations", &what));
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use clustermesh_kvstore::record::{Algorithm, External};

    use super::super::Service;

    fn external(text: &str) -> External {
        external_of("", text)
    }

    fn external_of(annotations: &str, text: &str) -> External {
        let text =
            format!("metadata: {{name: web, namespace: shop, annotations: {{{annotations}}}}}\n{text}");
        let object: k8s_openapi::api::core::v1::Service = serde_saphyr::from_str(&text).unwrap();
        Service::try_from(object).unwrap().external
    }

    #[test]
    fn what_kube_proxy_would_serve_is_served() {
        let nothing = External::default();
        let ports = "ports: [{name: http, port: 80, nodePort: 30080}, {name: dns, port: 53, protocol: UDP}]";
        assert_eq!(external(&format!("spec: {{clusterIP: 10.96.0.1, {ports}}}")), nothing);
        let by_port = External { node_ports: [("http".to_owned(), 30080)].into(), ..External::default() };
        assert_eq!(external(&format!("spec: {{type: NodePort, clusterIP: 10.96.0.1, {ports}}}")), by_port);
        let spec = format!(
            "spec: {{type: LoadBalancer, externalIPs: [203.0.113.9], externalTrafficPolicy: Local, {ports}}}\n\
             status: {{loadBalancer: {{ingress: [{{ip: 203.0.113.7}}, {{hostname: lb.example}}, \
             {{ip: 203.0.113.8, ipMode: Proxy}}]}}}}"
        );
        let ips = ["203.0.113.7", "203.0.113.9"].map(|ip| ip.parse().unwrap()).into();
        assert_eq!(external(&spec), External { ips, only_node: true, ..by_port });
        assert_eq!(external(&format!("spec: {{type: NodePort, clusterIP: None, {ports}}}")), nothing);
        assert_eq!(external("spec: {type: ExternalName, externalIPs: [203.0.113.9]}"), nothing);
        let spec = "spec: {externalIPs: [203.0.113.9]}";
        for (text, algorithm) in [("maglev", Some(Algorithm::Maglev)), ("Random", None)] {
            let external = external_of(&format!("service.cilium.io/lb-algorithm: {text}"), spec);
            assert_eq!(external.algorithm, algorithm);
        }
    }
}
