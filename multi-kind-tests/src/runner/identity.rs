//! Who the far end thinks is calling: the identity in decapsulated traffic.

use super::etcd;
use super::steps::Stage;
use crate::lab::Lab;
use crate::pace;
use crate::scenario::IdentitySeen;
use anyhow::Context as _;
use serde_json::Value;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Counters and dumps are read through an agent, so they may lag by one look.
const WITHIN: Duration = Duration::from_secs(2);

/// The identity that the pod's own cluster allocated for it must be the one whose packets the other
/// cluster's nodes have counted, and its counter must move with the pod's calls.
pub(super) fn seen_at_the_far_end(stage: &Stage<'_>, seen: &IdentitySeen) -> anyhow::Result<Option<String>> {
    let lab = stage.lab()?;
    let cluster = seen.pod.split('/').next().unwrap_or_default();
    let allocated = allocated(stage, lab, cluster, &seen.pod)?;
    let before = packets(lab, &seen.at)?.get(&allocated).copied().unwrap_or(0);
    let report = stage.make_calls(&seen.pod, &seen.to)?;
    let remote = report.by_cluster.get(&seen.at).copied().unwrap_or(0);
    anyhow::ensure!(remote > 0, "no call went to {}: {}", seen.at, report.summary());
    let deadline = Instant::now() + pace::slowed(WITHIN);
    let after = stage.options.interrupt.retry_until(deadline, Duration::from_millis(50), || {
        let seen_now = packets(lab, &seen.at)?;
        let after = seen_now.get(&allocated).copied().unwrap_or(0);
        anyhow::ensure!(
            after >= before + remote,
            "{} made {remote} calls to {}, whose nodes saw {} packets of identity {allocated}; they saw {seen_now:?}",
            seen.pod,
            seen.at,
            after.saturating_sub(before)
        );
        Ok(after)
    })?;
    Ok(Some(format!("identity {allocated}: {} packets for {remote} calls", after.saturating_sub(before))))
}

/// The identity of the pod's labels, as it stands in the etcd of its own cluster.
fn allocated(stage: &Stage<'_>, lab: &Lab, cluster: &str, pod: &str) -> anyhow::Result<u64> {
    let (_, name) = pod.split_once('/').context("a pod is written CLUSTER/NAMESPACE/POD")?;
    let (namespace, name) = name.split_once('/').unwrap_or(("default", name));
    let records = etcd::read(stage, lab, cluster, "cilium/state/ip/v1/default/")?;
    records
        .iter()
        .filter_map(|record| serde_json::from_slice::<Value>(&record.value).ok())
        .find(|record| record["K8sNamespace"] == namespace && record["K8sPodName"] == name)
        .and_then(|record| record["ID"].as_u64())
        .with_context(|| format!("{cluster}'s etcd has no address of {pod}"))
}

/// Packets per identity that the nodes of a cluster have decapsulated.
fn packets(lab: &Lab, cluster: &str) -> anyhow::Result<BTreeMap<u64, u64>> {
    let context = lab.context(cluster);
    let output = lab.clustermesh(&["bpf", "overlay", "list", "--context", &context, "-o", "json"])?;
    let rows: Value = serde_json::from_str(&output).context("`bpf overlay list` printed no JSON")?;
    let mut packets = BTreeMap::new();
    for row in rows.as_array().context("`bpf overlay list` printed no rows")? {
        let number = |field: &str| row[field].as_u64().or_else(|| row[field].as_str()?.parse().ok());
        let identity = number("identity").with_context(|| format!("a row without identity: {row}"))?;
        let count = number("packets").with_context(|| format!("a row without packets: {row}"))?;
        *packets.entry(identity).or_default() += count;
    }
    Ok(packets)
}
