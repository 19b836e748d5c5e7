//! Digests and propagation times, by cluster and kind.

use std::fmt;

use clustermesh_agent_api::v1::{KindStatus, Propagation, StatusResponse};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use super::{Counters, Gauges, Labels, set};

pub(super) fn register(status: &StatusResponse, registry: &mut Registry) {
    let in_sync = Gauges::default();
    registry.register("digest_in_sync", "What is held is what the exporter states", in_sync.clone());
    let mismatches = Counters::default();
    let help = "Differences between what is held and what the exporter states, by where they arose";
    registry.register("digest_mismatch", help, mismatches.clone());
    let mut times = Vec::new();
    for (cluster, kind) in kinds(status) {
        let labels = || vec![("cluster", cluster.clone()), ("kind", kind.kind.clone())];
        if let Some(digest) = &kind.digest {
            set(&in_sync, labels(), (digest.verdict == "in-sync").into());
            for (stage, count) in [("source", digest.source_mismatches), ("state", digest.state_mismatches)] {
                let mut labels = labels();
                labels.push(("stage", stage.to_owned()));
                mismatches.get_or_create(&labels).inc_by(count);
            }
        }
        times.extend(kind.propagation.clone().map(|times| (labels(), times)));
    }
    registry.register_collector(Box::new(Times(times)));
}

fn kinds(status: &StatusResponse) -> impl Iterator<Item = (&String, &KindStatus)> {
    let peers = status.own.iter().chain(&status.remotes);
    peers.flat_map(|peer| peer.kinds.iter().map(|kind| (&peer.name, kind)))
}

#[derive(Debug)]
struct Times(Vec<(Labels, Propagation)>);

impl Collector for Times {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let help = "From the event at the exporter to the write into this node's kernel";
        let mut family =
            encoder.encode_descriptor("propagation_seconds", help, None, MetricType::Histogram)?;
        for (labels, times) in &self.0 {
            let bounds = times.bounds_seconds.iter().copied().chain([f64::INFINITY]);
            let buckets: Vec<_> = bounds.zip(times.buckets.iter().copied()).collect();
            let mut metric = family.encode_family(labels)?;
            metric.encode_histogram::<NoLabelSet>(times.sum_seconds, times.count, &buckets, None)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use clustermesh_agent_api::v1::{Digest, Peer};

    use super::*;

    #[test]
    fn differences_and_times_show_with_their_cluster_and_kind() {
        let digest = Digest { verdict: "in-sync".into(), state_mismatches: 2, ..Digest::default() };
        let times = Propagation {
            count: 3,
            sum_seconds: 0.5,
            buckets: vec![2, 1],
            bounds_seconds: vec![0.25],
            ..Propagation::default()
        };
        let kind = KindStatus {
            kind: "ip".into(),
            digest: Some(digest),
            propagation: Some(times),
            ..KindStatus::default()
        };
        let beta = Peer { name: "beta".into(), kinds: vec![kind], ..Peer::default() };
        let status = StatusResponse { remotes: vec![beta], ..StatusResponse::default() };
        let text = super::super::encode(&status, None).unwrap();
        for line in [
            r#"clustermesh_digest_in_sync{cluster="beta",kind="ip"} 1"#,
            r#"clustermesh_digest_mismatch_total{cluster="beta",kind="ip",stage="state"} 2"#,
            r#"clustermesh_propagation_seconds_count{cluster="beta",kind="ip"} 3"#,
            r#"clustermesh_propagation_seconds_bucket{le="0.25",cluster="beta",kind="ip"} 2"#,
            r#"clustermesh_propagation_seconds_bucket{le="+Inf",cluster="beta",kind="ip"} 3"#,
        ] {
            assert!(text.lines().any(|l| l.starts_with(line)), "{line} is not in:\n{text}");
        }
    }
}
