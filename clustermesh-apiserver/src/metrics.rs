//! Metric families of one program.

use std::fmt;

use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

/// Writes one metric family after the other.
pub(crate) struct Families<'a> {
    pub(crate) encoder: DescriptorEncoder<'a>,
    /// What all names begin with.
    pub(crate) prefix: &'static str,
}

impl Families<'_> {
    pub(crate) fn gauge(&mut self, name: &str, help: &str, value: usize) -> fmt::Result {
        self.one(name, help, MetricType::Gauge, &ConstGauge::new(number(value)))
    }

    pub(crate) fn real(&mut self, name: &str, help: &str, value: f64) -> fmt::Result {
        self.one(name, help, MetricType::Gauge, &ConstGauge::new(value))
    }

    pub(crate) fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        self.one(name, help, MetricType::Counter, &ConstCounter::new(value))
    }

    pub(crate) fn gauges<L: EncodeLabelSet>(
        &mut self,
        name: &str,
        help: &str,
        values: impl Iterator<Item = (L, i64)>,
    ) -> fmt::Result {
        self.many(
            name,
            help,
            MetricType::Gauge,
            values.map(|(labels, value)| (labels, ConstGauge::new(value))),
        )
    }

    pub(crate) fn reals<L: EncodeLabelSet>(
        &mut self,
        name: &str,
        help: &str,
        values: impl Iterator<Item = (L, f64)>,
    ) -> fmt::Result {
        self.many(
            name,
            help,
            MetricType::Gauge,
            values.map(|(labels, value)| (labels, ConstGauge::new(value))),
        )
    }

    pub(crate) fn counters<L: EncodeLabelSet>(
        &mut self,
        name: &str,
        help: &str,
        values: impl Iterator<Item = (L, u64)>,
    ) -> fmt::Result {
        let values = values.map(|(labels, value)| (labels, ConstCounter::new(value)));
        self.many(name, help, MetricType::Counter, values)
    }

    fn one(&mut self, name: &str, help: &str, kind: MetricType, metric: &impl EncodeMetric) -> fmt::Result {
        let name = format!("{}_{name}", self.prefix);
        metric.encode(self.encoder.encode_descriptor(&name, help, None, kind)?)
    }

    fn many<L: EncodeLabelSet, M: EncodeMetric>(
        &mut self,
        name: &str,
        help: &str,
        kind: MetricType,
        metrics: impl Iterator<Item = (L, M)>,
    ) -> fmt::Result {
        let name = format!("{}_{name}", self.prefix);
        let mut family = self.encoder.encode_descriptor(&name, help, None, kind)?;
        for (labels, metric) in metrics {
            metric.encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

/// As Prometheus counts.
pub(crate) fn number(value: usize) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
