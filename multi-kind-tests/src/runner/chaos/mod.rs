//! Faults at random, changes and calls meanwhile, and what must hold at the end.
//!
//! [`plan`] says what happens, [`verdict`] whether it was borne; this does it and looks.

mod plan;
mod verdict;

use super::agents;
use super::steps::{Stage, title};
use crate::lab::{Lab, micros};
use crate::scenario::{Apply, Chaos, Load, Ready, Span, Step};
use anyhow::Context as _;
use plan::{Ground, Plan};
use serde_json::Value;
use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime};
use verdict::Cuts;

/// Everything has to be as it should be by then, once all faults are over.
const RECOVERY: Duration = Duration::from_secs(50);
const PAUSE: Duration = Duration::from_millis(200);
/// Tables of which all nodes of a cluster hold the same.
const SHARED_TABLES: [&str; 5] = ["service", "backend", "ipcache", "prefix", "node"];
/// The frontend of the service that changes, see [`MANIFEST`].
const CHURN: &str = "10.96.0.9";
const REPLICAS: u32 = 1;

/// What is called: `home` at home only, `mesh` in all clusters; both stay as they are. `churn` changes.
const MANIFEST: &str = include_str!("manifest.yaml");

/// Carries out a chaos step; what it measured is a line for people.
pub(super) fn run(stage: &mut Stage<'_>, chaos: &Chaos) -> anyhow::Result<Option<String>> {
    let seed = match chaos.seed {
        Some(seed) => seed,
        None => micros(SystemTime::now())?,
    };
    let mut events = Vec::new();
    let outcome = torment(stage, seed, chaos.span.0, &mut events);
    outcome.map(|summary| Some(format!("seed {seed}: {} events; {summary}", events.len()))).with_context(|| {
        let log = events.join("\n    ");
        format!("seed {seed} (multi-kind-tests chaos --seed {seed}), events and their seconds:\n    {log}\n  then")
    })
}

fn torment(
    stage: &mut Stage<'_>,
    seed: u64,
    span: Duration,
    events: &mut Vec<String>,
) -> anyhow::Result<String> {
    let lab = stage.lab()?;
    let statuses = Statuses::read(lab)?;
    let ground = Ground {
        clusters: statuses.nodes.clone(),
        deployment: "deployment/chaos/churn".into(),
        service: "service/chaos/churn".into(),
    };
    for cluster in ground.clusters.keys() {
        stage.step(&Step::Apply(Apply {
            cluster: cluster.clone(),
            file: None,
            manifest: Some(MANIFEST.into()),
        }))?;
    }
    let mut plan = Plan::new(seed, ground, REPLICAS);
    settle(stage, lab, &statuses, &plan).context("before the first fault")?;
    let mut loads = Vec::new();
    for cluster in statuses.nodes.keys() {
        for (service, address) in [("home", "10.96.0.7"), ("mesh", "10.96.0.8")] {
            let load = Load {
                name: format!("{cluster}-{service}"),
                from: format!("{cluster}/default/client"),
                to: format!("http://{address}/"),
                interval: Span::millis(10),
            };
            loads.push((cluster.clone(), service, stage.start_load(&load)?));
        }
    }
    let mut cuts = Cuts::default();
    let begin = Instant::now();
    while begin.elapsed() < span {
        let (at, step) = plan.next();
        stage.options.interrupt.wait(at.saturating_sub(begin.elapsed()))?;
        torment_once(stage, &step, begin, &mut cuts, events)?;
    }
    for step in plan.heal() {
        torment_once(stage, &step, begin, &mut cuts, events)?;
    }
    let healed = Instant::now();
    settle(stage, lab, &statuses, &plan)?;
    let recovery = healed.elapsed();
    let mut calls = 0;
    let mut failed = 0;
    for (cluster, service, load) in loads {
        let timeline = load.stop(&stage.options.interrupt)?;
        calls += timeline.len();
        failed += timeline.failed();
        let flaw = match service {
            "home" => verdict::astray(timeline.events(), &cluster),
            _ => verdict::unexcused(timeline.events(), &cuts),
        };
        anyhow::ensure!(flaw.is_none(), "{service} from {cluster}: {}", flaw.unwrap_or_default());
    }
    let recovery = recovery.as_secs_f64();
    Ok(format!(
        "{calls} calls, {failed} failed, all of them into a cluster cut off; as it should be {recovery:.1} s after the last"
    ))
}

/// One event. Fails if the command fails: all that is done can be done.
fn torment_once(
    stage: &mut Stage<'_>,
    step: &Step,
    begin: Instant,
    cuts: &mut Cuts,
    events: &mut Vec<String>,
) -> anyhow::Result<()> {
    events.push(format!("{:>6.1}  {}", begin.elapsed().as_secs_f64(), title(step)));
    if matches!(step, Step::Cut(_)) {
        cuts.begin(micros(SystemTime::now())?);
    }
    stage.step(step)?;
    if matches!(step, Step::Heal(_)) {
        cuts.end(micros(SystemTime::now())?);
    }
    Ok(())
}

/// Waits until everything is synced and installed, all agents agree, and the tables are as the manifests.
fn settle(stage: &mut Stage<'_>, lab: &Lab, statuses: &Statuses, plan: &Plan) -> anyhow::Result<()> {
    let clusters = statuses.nodes.keys().cloned().collect();
    stage.step(&Step::Ready(Ready { clusters, within: Span::seconds(RECOVERY.as_secs()) }))?;
    stage.options.interrupt.retry_until(Instant::now() + RECOVERY, PAUSE, || {
        for cluster in statuses.nodes.keys() {
            let now = agents::status(lab, cluster)?;
            for agent in agents::each(&now) {
                let pending = agent["status"]["pending_changes"].as_u64().unwrap_or(0);
                anyhow::ensure!(pending == 0, "{cluster}/{}: {pending} changes are pending", agent["node"]);
                let flaw = agents::out_of_sync(&agent["status"]);
                anyhow::ensure!(flaw.is_none(), "{cluster}/{}: {}", agent["node"], flaw.unwrap_or_default());
            }
            for table in SHARED_TABLES {
                let rows = dump(lab, cluster, table)?;
                let flaw = verdict::disagreement(&rows);
                anyhow::ensure!(flaw.is_none(), "{table} of {cluster}: {}", flaw.unwrap_or_default());
                if table == "service" {
                    let churn: Vec<&Value> = rows.iter().filter(|row| row["frontend"] == CHURN).collect();
                    let flaw = verdict::difference(&churn, cluster, &statuses.ids, plan.wanted());
                    anyhow::ensure!(flaw.is_none(), "{}", flaw.unwrap_or_default());
                }
            }
            let dead = dump(lab, cluster, "cluster")?;
            anyhow::ensure!(dead.is_empty(), "{cluster} still takes others for dead: {dead:?}");
        }
        Ok(())
    })
}

/// Which clusters and nodes there are.
struct Statuses {
    nodes: BTreeMap<String, Vec<String>>,
    ids: BTreeMap<String, u64>,
}

impl Statuses {
    fn read(lab: &Lab) -> anyhow::Result<Self> {
        let mut all = Self { nodes: BTreeMap::new(), ids: BTreeMap::new() };
        let connected = lab.connections()?;
        for cluster in connected.into_iter().flat_map(|(one, other)| [one, other]) {
            let status = agents::status(lab, &cluster)?;
            let name = |agent: &Value| agent["node"].as_str().map(str::to_owned);
            all.nodes.insert(cluster.clone(), agents::each(&status).filter_map(name).collect());
            all.ids.insert(cluster, status["clusters"][0]["id"].as_u64().context("a cluster has no ID")?);
        }
        anyhow::ensure!(!all.nodes.is_empty(), "chaos needs connected clusters");
        Ok(all)
    }
}

fn dump(lab: &Lab, cluster: &str, table: &str) -> anyhow::Result<Vec<Value>> {
    let rows = agents::json(lab, &["bpf", table, "list", "--context", &lab.context(cluster), "-o", "json"])?;
    rows.as_array().cloned().with_context(|| format!("{table} of {cluster} is no list"))
}
