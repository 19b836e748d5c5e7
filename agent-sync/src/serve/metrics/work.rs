//! What the agent has done since its start.

use std::fmt;

use clustermesh_agent_api::v1::{StatusResponse, Work};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use super::Counters;

pub(super) fn register(status: &StatusResponse, registry: &mut Registry) {
    let Some(work) = &status.work else { return };
    let writes = Counters::default();
    registry.register("table_writes", "Entries written or removed", writes.clone());
    for (table, count) in &work.table_writes {
        writes.get_or_create(&vec![("table", table.clone())]).inc_by(*count);
    }
    registry.register_collector(Box::new(Batches(work.clone())));
}

#[derive(Debug)]
struct Batches(Work);

impl Collector for Batches {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let help = "From the arrival of a batch of records until what follows from it is installed";
        let mut metric =
            encoder.encode_descriptor("engine_batch_seconds", help, None, MetricType::Histogram)?;
        let bounds = self.0.batch_bounds_seconds.iter().copied().chain([f64::INFINITY]);
        let buckets: Vec<_> = bounds.zip(self.0.batch_buckets.iter().copied()).collect();
        metric.encode_histogram::<NoLabelSet>(self.0.batch_seconds, self.0.batches, &buckets, None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_and_writes_show() {
        let work = Work {
            batches: 3,
            batch_seconds: 0.5,
            batch_buckets: vec![2, 1],
            batch_bounds_seconds: vec![0.001],
            table_writes: [("cm_slot".to_owned(), 7)].into(),
        };
        let status = StatusResponse { work: Some(work), ..StatusResponse::default() };
        let text = super::super::encode(&status, None).unwrap();
        for line in [
            r#"clustermesh_table_writes_total{table="cm_slot"} 7"#,
            "clustermesh_engine_batch_seconds_count 3",
            r#"clustermesh_engine_batch_seconds_bucket{le="0.001"} 2"#,
            r#"clustermesh_engine_batch_seconds_bucket{le="+Inf"} 3"#,
        ] {
            assert!(text.lines().any(|l| l.starts_with(line)), "{line} is not in:\n{text}");
        }
    }
}
