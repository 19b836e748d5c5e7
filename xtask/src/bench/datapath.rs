//! `cargo xtask bench datapath`: what programs and tables cost by themselves, and what calls cost with more and more
//! services, beside the limit and the peers; at the end each target, met or missed.
//!
//! Targets are ratios of medians of one run, so that another machine, or a slow day, moves both sides.

use super::machine::Machine;
use super::report::{Metric, Report, table};
use super::series::{Series, Summary};
use super::variant::Variant;
use super::{Output, Paths, exec, interrupt, measure};
use crate::workspace::{self, Profile};
use anyhow::Context as _;
use comfy_table::Table;
use serde::Serialize;

/// Package and example that measure programs and tables.
const COSTS: (&str, &str) = ("ebpf-global-svc", "costs");

/// Programs, tables, and calls with more and more services, against targets (needs root).
#[derive(Debug, clap::Args)]
pub(super) struct DatapathArgs {
    /// How often each variant is measured; the variants take turns.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Length of one measurement of round trips; a stream runs twice as long.
    #[arg(long, default_value_t = 0.5)]
    seconds: f64,
    /// Numbers of services, from few to many.
    #[arg(long, value_delimiter = ',', default_values_t = [1_u16, 1_000, 10_000],
          value_parser = clap::value_parser!(u16).range(1..=10_000))]
    services: Vec<u16>,
    /// Programs and tables only, without calls.
    #[arg(long)]
    costs_only: bool,
    /// How the result is printed; progress goes to standard error.
    #[arg(short, long, value_enum, default_value = "text")]
    output: Output,
}

/// Everything that was measured.
#[derive(Serialize)]
struct Findings {
    machine: Machine,
    costs: Vec<Cost>,
    paths: Vec<Report>,
    targets: Vec<Target>,
}

/// A case of programs or tables.
#[derive(Serialize)]
struct Cost {
    case: String,
    unit: String,
    #[serde(flatten)]
    summary: Summary,
}

/// What is to be reached.
#[derive(Debug, Serialize)]
struct Target {
    what: String,
    figure: f64,
    /// `figure` should be no less, or with `at_most` no more, than this.
    wanted: f64,
    at_most: bool,
    met: bool,
}

/// Builds, measures, prints. Nothing fails because a target is missed: times are for reading.
pub(super) fn run(args: &DatapathArgs) -> anyhow::Result<()> {
    let machine = super::look(args.seconds)?;
    let counts = if args.costs_only { &[][..] } else { &args.services };
    let executables = if args.costs_only { None } else { Some(workspace::build_programs(Profile::Release)?) };
    let costs = costs(args.rounds)?;
    interrupt::watch()?;
    let mut paths = Vec::new();
    let mut outcome = Ok(());
    for (services, executables) in counts.iter().zip(executables.iter().cycle()) {
        let asked = Paths { rounds: args.rounds, seconds: args.seconds, services: *services };
        match measure(asked, Machine::look()?, executables) {
            Ok(report) => paths.push(report),
            // What has been measured is shown all the same.
            Err(error) => {
                outcome = interrupt::check().and(Err(error));
                break;
            }
        }
    }
    let targets = targets(&costs, &paths);
    let findings = Findings { machine, costs, paths, targets };
    match args.output {
        Output::Text => print!("{}", findings.text()),
        Output::Json => println!("{}", serde_json::to_string_pretty(&findings)?),
    }
    outcome
}

/// Runs the example, a round of which takes some seconds.
fn costs(rounds: u32) -> anyhow::Result<Vec<Cost>> {
    let (package, example) = COSTS;
    let mut command = workspace::cargo();
    command.args(["build", "--release", "-p", package, "--example", example]);
    crate::shell::run(&mut command)?;
    eprintln!("programs and tables, {rounds} rounds");
    let program = workspace::target().join("release/examples").join(example);
    let said = exec::run(&format!("{} {rounds}", program.display()))?;
    said.lines().map(|line| read(line).with_context(|| format!("{example} said {line:?}"))).collect()
}

/// `UNIT<TAB>CASE<TAB>FIGURE...`
fn read(line: &str) -> Option<Cost> {
    let mut fields = line.split('\t');
    let (unit, case) = (fields.next()?.to_owned(), fields.next()?.to_owned());
    let mut series = Series::default();
    for figure in fields {
        series.push(figure.parse().ok()?);
    }
    Some(Cost { case, unit, summary: series.summary()? })
}

fn targets(costs: &[Cost], paths: &[Report]) -> Vec<Target> {
    let mut targets = Vec::new();
    let mut add = |what: String, figure: Option<f64>, wanted: f64, at_most: bool| {
        // What was not measured is no target of this run.
        let Some(figure) = figure else { return };
        let met = if at_most { figure <= wanted } else { figure >= wanted };
        targets.push(Target { what, figure, wanted, at_most, met });
    };
    let cost = |case: &str| costs.iter().find(|cost| cost.case == case).map(|cost| cost.summary.median);
    for report in paths {
        let services = report.services();
        for (metric, name) in [(Metric::TcpRoundTripUs, "TCP"), (Metric::UdpRoundTripUs, "UDP")] {
            let quicker = |other, ours| Some(report.median(metric, other)? / report.median(metric, ours)?);
            let service = quicker(Variant::MeshPod, Variant::MeshService);
            add(format!("{name} requests: service / pod, {services} services"), service, 0.98, false);
            let overlay = quicker(Variant::VxlanPod, Variant::MeshPod);
            add(
                format!("{name} requests: our overlay / kernel VXLAN, {services} services"),
                overlay,
                0.95,
                false,
            );
        }
        let gbit = |variant| report.median(Metric::GbitPerSecond, variant);
        let overlay = gbit(Variant::MeshPod).zip(gbit(Variant::VxlanPod)).map(|(ours, other)| ours / other);
        add(format!("stream: our overlay / kernel VXLAN, {services} services"), overlay, 0.95, false);
    }
    if let (Some(few), Some(many)) = (paths.first(), paths.last())
        && few.services() != many.services()
    {
        let price = |report: &Report| {
            Some(
                report.median(Metric::ConnectUs, Variant::MeshService)?
                    / report.median(Metric::ConnectUs, Variant::MeshPod)?,
            )
        };
        let flat = price(few).zip(price(many)).map(|(few, many)| few / many);
        let what = format!("connects to a service: {} / {} services", many.services(), few.services());
        add(what, flat, 0.95, false);
    }
    let connect = |backends: u32, services: u32| {
        cost(&format!("connect: to a service of {backends} backends, {services} services"))
    };
    let flat = connect(1, 3).zip(connect(5_000, 10_000)).map(|(few, many)| few / many);
    add("connect(): 5,000 backends, 10,000 services / 1 backend, 3 services".into(), flat, 0.9, false);
    add(
        "seconds for 100,000 addresses into cm_ipcache".into(),
        cost("cm_ipcache: 100,000 entries into an empty map"),
        0.2,
        true,
    );
    targets
}

impl Findings {
    fn text(&self) -> String {
        let mut text = format!("{}\n\nPrograms and tables\n{}\n", self.machine, self.costs());
        for report in &self.paths {
            text.push_str(&format!("\n# {} services\n\n{}", report.services(), report.text()));
        }
        text.push_str(&format!("\nTargets\n{}\n", self.targets()));
        text
    }

    fn costs(&self) -> Table {
        let rows = self.costs.iter().map(|Cost { case, unit, summary: Summary { median, min, max } }| {
            let digits = if unit == "s" { 3 } else { 0 };
            vec![case.clone(), format!("{median:.digits$} ({min:.digits$} to {max:.digits$}) {unit}")]
        });
        table(&["case", "median (smallest to largest)"], rows)
    }

    fn targets(&self) -> Table {
        let rows = self.targets.iter().map(|Target { what, figure, wanted, at_most, met }| {
            let sign = if *at_most { "<=" } else { ">=" };
            let met = if *met { "met" } else { "MISSED" };
            vec![what.clone(), format!("{figure:.3}"), format!("{sign} {wanted}"), met.to_owned()]
        });
        table(&["target", "figure", "wanted", ""], rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_met_or_missed() {
        let costs: Vec<Cost> = [
            "ns\tconnect: to a service of 1 backends, 3 services\t100\t110\t90",
            "ns\tconnect: to a service of 5000 backends, 10000 services\t140\t150\t130",
            "s\tcm_ipcache: 100,000 entries into an empty map\t0.1\t0.1\t0.3",
        ]
        .into_iter()
        .map(|line| read(line).expect("a line of the example"))
        .collect();
        let targets = targets(&costs, &[]);
        let met: Vec<bool> = targets.iter().map(|target| target.met).collect();
        assert_eq!(met, [false, true], "{targets:?}");
        assert!(read("ns\tcase\tno figure").is_none() && read("ns\tcase").is_none());
    }
}
