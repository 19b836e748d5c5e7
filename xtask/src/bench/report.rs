//! The results, for people and for programs.

use super::lab::Agent;
use super::machine::Machine;
use super::series::{Series, Summary};
use super::variant::{Mode, RoundTrips, Variant};
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// What is collected while the bench runs.
#[derive(Default)]
pub(super) struct Collected {
    figures: BTreeMap<(Metric, Variant), Series>,
    lost: u64,
}

/// What a table is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Metric {
    ConnectUs,
    ConnectionsPerSecond,
    TcpRoundTripUs,
    TcpRequestsPerSecond,
    UdpRoundTripUs,
    UdpRequestsPerSecond,
    GbitPerSecond,
}

/// Everything that was measured.
#[derive(Serialize)]
pub(super) struct Report {
    machine: Machine,
    #[serde(flatten)]
    settings: Settings,
    /// Round trips without an answer, over all runs.
    lost: u64,
    results: Vec<Row>,
    lab: LabFigures,
}

/// How it was measured.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Settings {
    pub(super) rounds: u32,
    pub(super) seconds_per_run: f64,
    pub(super) services: u16,
    /// CPU time that the hypervisor gave to others meanwhile.
    pub(super) steal_percent: f64,
}

/// What the control plane took.
#[derive(Serialize)]
pub(super) struct LabFigures {
    /// From `lab up` until both clusters were connected and synced.
    pub(super) up_seconds: f64,
    pub(super) agents: Vec<Agent>,
}

#[derive(Serialize)]
struct Row {
    metric: Metric,
    variant: Variant,
    #[serde(flatten)]
    summary: Summary,
    /// Median relative to plain routing.
    to_limit: f64,
    /// Median relative to the pod's own address over the same path.
    to_pod_on_same_path: f64,
}

impl Collected {
    /// Adds a round's results of one way.
    pub(super) fn add_round_trips(&mut self, variant: Variant, results: &[(Mode, RoundTrips)]) {
        for (mode, run) in results {
            self.lost += run.lost;
            let (time, rate, microseconds) = match mode {
                Mode::TcpCrr => (
                    Metric::ConnectUs,
                    Metric::ConnectionsPerSecond,
                    run.connect_us.unwrap_or(run.round_trip_us).p50,
                ),
                Mode::TcpRr => (Metric::TcpRoundTripUs, Metric::TcpRequestsPerSecond, run.round_trip_us.p50),
                Mode::UdpRr => (Metric::UdpRoundTripUs, Metric::UdpRequestsPerSecond, run.round_trip_us.p50),
            };
            self.push(time, variant, microseconds);
            self.push(rate, variant, run.per_second);
        }
    }

    /// Adds a round's throughput of one way.
    pub(super) fn add_throughput(&mut self, variant: Variant, gbit_per_second: f64) {
        self.push(Metric::GbitPerSecond, variant, gbit_per_second);
    }

    /// All that was measured, with what it was measured on.
    pub(super) fn report(&self, machine: Machine, settings: Settings, lab: LabFigures) -> Report {
        let median = |metric, variant| Some(self.figures.get(&(metric, variant))?.summary()?.median);
        let results = self.figures.iter().filter_map(|(&(metric, variant), series)| {
            let summary = series.summary()?;
            Some(Row {
                metric,
                variant,
                summary,
                to_limit: summary.median / median(metric, Variant::PlainPod)?,
                to_pod_on_same_path: summary.median / median(metric, variant.without_service())?,
            })
        });
        Report { machine, settings, lost: self.lost, results: results.collect(), lab }
    }

    fn push(&mut self, metric: Metric, variant: Variant, figure: f64) {
        self.figures.entry((metric, variant)).or_default().push(figure);
    }
}

impl Report {
    /// With how many services it was measured.
    pub(super) fn services(&self) -> u16 {
        self.settings.services
    }

    /// Median of one way.
    pub(super) fn median(&self, metric: Metric, variant: Variant) -> Option<f64> {
        let row = self.results.iter().find(|row| row.metric == metric && row.variant == variant)?;
        Some(row.summary.median)
    }

    /// Tables for people.
    pub(super) fn text(&self) -> String {
        let mut text = format!("{}\n", self.machine);
        let settings = self.settings;
        let _ = writeln!(
            text,
            "{} interleaved rounds of {} s each; median (minimum to maximum) of the rounds; {} services, the \
             last one is called\n{} round trips lost, {:.1} % of the CPU time stolen by the hypervisor",
            settings.rounds, settings.seconds_per_run, settings.services, self.lost, settings.steal_percent
        );
        for (title, time, rate) in [
            (
                "Connect: until a new TCP connection is established",
                Metric::ConnectUs,
                Some((Metric::ConnectionsPerSecond, "connect + request /s, best")),
            ),
            (
                "TCP round trip of one byte, both ends polling",
                Metric::TcpRoundTripUs,
                Some((Metric::TcpRequestsPerSecond, "requests/s, best")),
            ),
            (
                "UDP round trip of eight bytes, both ends polling",
                Metric::UdpRoundTripUs,
                Some((Metric::UdpRequestsPerSecond, "requests/s, best")),
            ),
            ("Throughput of one TCP connection, MTU 1450", Metric::GbitPerSecond, None),
        ] {
            let _ = writeln!(text, "\n{title}\n{}", self.table(time, rate));
        }
        let _ = writeln!(
            text,
            "\nTwo clusters of two nodes from `lab up` to connected and synced: {:.1} s",
            self.lab.up_seconds
        );
        for agent in &self.lab.agents {
            let _ = writeln!(
                text,
                "Idle agent {}: {:.1} MiB resident, of which {:.1} MiB its own memory",
                agent.node, agent.resident_mib, agent.anonymous_mib
            );
        }
        text
    }

    fn table(&self, metric: Metric, rate: Option<(Metric, &str)>) -> Table {
        let unit = if metric == Metric::GbitPerSecond { "Gbit/s" } else { "µs" };
        let mut header = vec!["from client pod to", unit, "to limit", "to pod, same path"];
        header.extend(rate.map(|(_, title)| title));
        let rows = self.results.iter().filter(|row| row.metric == metric).map(|row| {
            let Summary { median, min, max } = row.summary;
            let mut cells = vec![
                row.variant.label().to_owned(),
                format!("{median:.1} ({min:.1} to {max:.1})"),
                format!("{:.2}x", row.to_limit),
                format!("{:.2}x", row.to_pod_on_same_path),
            ];
            let rate = rate.and_then(|(rate, _)| {
                self.results.iter().find(|other| other.metric == rate && other.variant == row.variant)
            });
            // Of the best round: whatever disturbs a round only lowers its mean, which a rate is.
            cells.extend(rate.map(|rate| format!("{:.0}", rate.summary.max)));
            cells
        });
        table(&header, rows)
    }
}

/// Figures in Markdown; all columns but the first are numbers.
pub(super) fn table(header: &[&str], rows: impl Iterator<Item = Vec<String>>) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_header(header);
    rows.for_each(|row| {
        table.add_row(row);
    });
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_of_medians() {
        let mut collected = Collected::default();
        for (variant, figures) in [
            (Variant::PlainPod, [10.0, 10.0, 90.0]),
            (Variant::VxlanPod, [12.0, 1.0, 20.0]),
            (Variant::VxlanNftables, [15.0, 15.0, 15.0]),
        ] {
            figures.into_iter().for_each(|figure| collected.push(Metric::TcpRoundTripUs, variant, figure));
        }
        let machine = Machine {
            kernel: "6.1".into(),
            cpu: "one".into(),
            cpus: 2,
            virtual_machine: false,
            load_before: 0.0,
            nftables: String::new(),
            iptables: String::new(),
            ipvs: None,
        };
        let settings = Settings { rounds: 3, seconds_per_run: 1.0, services: 10, steal_percent: 0.0 };
        let lab = LabFigures { up_seconds: 1.0, agents: Vec::new() };
        let report = collected.report(machine, settings, lab);
        let nft = report.results.iter().find(|row| row.variant == Variant::VxlanNftables).expect("a row");
        assert!((nft.to_limit - 1.5).abs() < 1e-9);
        assert!((nft.to_pod_on_same_path - 1.25).abs() < 1e-9);
        assert!(report.text().contains("15.0 (15.0 to 15.0)"), "{}", report.text());
    }
}
