use std::collections::{BTreeMap, BTreeSet};

use clustermesh_kvstore::cluster::ClusterName;
use clustermesh_kvstore::record::{Affinity, Balancing, Nearness};
use k8s_openapi::api::core::v1;

use super::meta::Check;

const CLUSTER_ORDER: &str = "clustermesh.io/cluster-order";
const CLUSTER_WEIGHTS: &str = "clustermesh.io/cluster-weights";
/// Each an older one, which counts only where the first is absent.
const TOPOLOGY: [&str; 2] =
    ["service.kubernetes.io/topology-mode", "service.kubernetes.io/topology-aware-hints"];

/// As Kubernetes has it.
const DEFAULT_SESSION: u32 = 10_800;

/// How a service's calls are spread. A service must not go because of that: what cannot be read counts as not said,
/// and the log says so.
pub(super) fn balancing(
    check: &Check<'_>,
    annotations: &BTreeMap<String, String>,
    spec: &v1::ServiceSpec,
    global: bool,
    affinity: Affinity,
) -> Balancing {
    let named = |annotation: &'static str| annotations.get(annotation).filter(|_| global);
    let order = named(CLUSTER_ORDER).and_then(|text| {
        let order = order(text);
        if order.is_none() {
            let wanted = "the names of clusters, as alpha,beta=gamma (beta and gamma together after alpha)";
            warn(check, "metadata.annotations", &not_one(CLUSTER_ORDER, text, wanted));
        }
        order
    });
    let weights = named(CLUSTER_WEIGHTS).and_then(|text| {
        let weights = weights(text);
        if weights.is_none() {
            let wanted = "the shares of clusters, as alpha=80,beta=20 (0 to 65535, not all 0)";
            warn(check, "metadata.annotations", &not_one(CLUSTER_WEIGHTS, text, wanted));
        }
        weights
    });
    let balancing = Balancing {
        session: session(check, spec),
        order: order.unwrap_or_default(),
        weights: weights.unwrap_or_default(),
        nearness: nearness(check, annotations, spec),
    };
    if balancing.names_clusters() && affinity != Affinity::None {
        let which = if balancing.order.is_empty() { CLUSTER_WEIGHTS } else { CLUSTER_ORDER };
        warn(
            check,
            "metadata.annotations",
            &format!("service.cilium.io/affinity is not used: {which} decides"),
        );
    }
    balancing
}

fn session(check: &Check<'_>, spec: &v1::ServiceSpec) -> Option<u32> {
    match spec.session_affinity.as_deref() {
        None | Some("" | "None") => return None,
        Some("ClientIP") => {}
        Some(other) => {
            warn(
                check,
                "spec.sessionAffinity",
                &format!("{other:?} is not ClientIP or None; clients are not bound"),
            );
            return None;
        }
    }
    let config = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
    let Some(seconds) = config.and_then(|config| config.timeout_seconds) else {
        return Some(DEFAULT_SESSION);
    };
    let valid = u32::try_from(seconds).ok().filter(|seconds| (1..=Balancing::MAX_SESSION).contains(seconds));
    if valid.is_none() {
        let max = Balancing::MAX_SESSION;
        let what = format!("{seconds} is not in 1..={max}; clients are bound for {DEFAULT_SESSION} s");
        warn(check, "spec.sessionAffinityConfig.clientIP.timeoutSeconds", &what);
    }
    valid.or(Some(DEFAULT_SESSION))
}

fn nearness(check: &Check<'_>, annotations: &BTreeMap<String, String>, spec: &v1::ServiceSpec) -> Nearness {
    if spec.internal_traffic_policy.as_deref() == Some("Local") {
        return Nearness::OnlyNode;
    }
    // Where both stand, the annotation decides, as with Kubernetes' own controller.
    match TOPOLOGY.iter().find_map(|name| annotations.get(*name)).map(String::as_str) {
        Some(mode) if mode.eq_ignore_ascii_case("auto") => return Nearness::PreferZone,
        _ => {}
    }
    match spec.traffic_distribution.as_deref() {
        None | Some("") => Nearness::Any,
        Some("PreferClose" | "PreferSameZone") => Nearness::PreferZone,
        Some("PreferSameNode") => Nearness::PreferNode,
        Some(other) => {
            let what = format!(
                "{other:?} is not PreferClose, PreferSameZone or PreferSameNode; all backends are used"
            );
            warn(check, "spec.trafficDistribution", &what);
            Nearness::Any
        }
    }
}

/// `alpha,beta=gamma`: tiers in order, each of one or more clusters. None twice.
fn order(text: &str) -> Option<Vec<BTreeSet<ClusterName>>> {
    let mut named = BTreeSet::new();
    let tier = |text: &str| -> Option<BTreeSet<ClusterName>> {
        let names: Option<Vec<ClusterName>> = text.split('=').map(|name| name.trim().parse().ok()).collect();
        names.filter(|names| names.iter().all(|name| named.insert(name.clone()))).map(BTreeSet::from_iter)
    };
    let order: Option<Vec<_>> = text.split(',').map(tier).collect();
    order.filter(|order| order.len() <= Balancing::MAX_TIERS && named_in(order) <= Balancing::MAX_CLUSTERS)
}

fn named_in(order: &[BTreeSet<ClusterName>]) -> usize {
    order.iter().map(BTreeSet::len).sum()
}

/// `alpha=80,beta=20`. None twice, not all 0.
fn weights(text: &str) -> Option<BTreeMap<ClusterName, u16>> {
    let mut weights = BTreeMap::new();
    for pair in text.split(',') {
        let (name, weight) = pair.split_once('=')?;
        if weights.insert(name.trim().parse().ok()?, weight.trim().parse().ok()?).is_some() {
            return None;
        }
    }
    let valid = weights.len() <= Balancing::MAX_CLUSTERS && weights.values().any(|weight| *weight > 0);
    valid.then_some(weights)
}

fn not_one(annotation: &str, text: &str, wanted: &str) -> String {
    let text: String = text.chars().take(100).collect();
    format!("{annotation} is {text:?}, not {wanted}; it is not used")
}

fn warn(check: &Check<'_>, field: &str, what: &str) {
    tracing::warn!("{}", check.error(field, what));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_tiers_of_names() {
        let tiers = |text: &str| -> Option<Vec<Vec<String>>> {
            let tiers = order(text)?.into_iter();
            Some(tiers.map(|tier| tier.iter().map(ToString::to_string).collect()).collect())
        };
        let is = |tiers: &[&[&str]]| -> Option<Vec<Vec<String>>> {
            Some(tiers.iter().map(|tier| tier.iter().map(ToString::to_string).collect()).collect())
        };
        assert_eq!(tiers("alpha"), is(&[&["alpha"]]));
        assert_eq!(tiers(" alpha, gamma = beta "), is(&[&["alpha"], &["beta", "gamma"]]));
        for bad in [
            "",
            ",",
            "alpha,",
            "alpha,,beta",
            "alpha=",
            "Alpha",
            "alpha,alpha",
            "alpha=alpha",
            "a b",
            "alpha;beta",
        ] {
            assert_eq!(tiers(bad), None, "{bad:?}");
        }
        let many = |n: usize| (0..n).map(|n| format!("c{n}")).collect::<Vec<_>>().join(",");
        assert!(tiers(&many(255)).is_some() && tiers(&many(256)).is_none());
    }

    #[test]
    fn weights_are_shares_of_names() {
        let shares = |text: &str| -> Option<Vec<(String, u16)>> {
            Some(weights(text)?.into_iter().map(|(name, weight)| (name.to_string(), weight)).collect())
        };
        assert_eq!(shares("beta=20, alpha = 80"), Some(vec![("alpha".into(), 80), ("beta".into(), 20)]));
        assert_eq!(shares("alpha=0,beta=1"), Some(vec![("alpha".into(), 0), ("beta".into(), 1)]));
        for bad in [
            "",
            "alpha",
            "alpha=",
            "alpha=-1",
            "alpha=65536",
            "alpha=80%",
            "alpha=1,alpha=2",
            "alpha=0",
            "=1",
            "alpha=1,",
        ] {
            assert_eq!(shares(bad), None, "{bad:?}");
        }
    }
}
