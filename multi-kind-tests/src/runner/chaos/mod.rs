//! Faults at random, changes and calls meanwhile, and what must hold at the end.
//!
//! [`plan`] says what happens, [`verdict`] and [`agreement`] whether it was borne; this does it and looks.

mod agreement;
mod plan;
mod verdict;

use super::background::RunningLoad;
use super::steps::{Stage, title};
use super::{agents, etcd};
use crate::lab::{Lab, micros};
use crate::scenario::{Apply, Chaos, Load, NodeRef, Ready, Span, Step};
use agreement::Contents;
use anyhow::Context as _;
use plan::{Ground, Place, Plan};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant, SystemTime};
use verdict::{Cuts, Stalls};

/// Everything has to be as it should be by then, once all faults are over.
const RECOVERY: Duration = Duration::from_secs(50);
const PAUSE: Duration = Duration::from_millis(200);
/// Tables of which all nodes of a cluster hold the same.
const SHARED_TABLES: [&str; 5] = ["service", "backend", "ipcache", "prefix", "node"];
/// The frontend of the service that changes, see [`MANIFEST`].
const CHURN: &str = "10.96.0.9";
const REPLICAS: u32 = 1;

/// What is called: `home` at home only, `mesh` in all clusters; both stay as they are. `churn` changes.
/// NODE stands for the node of all that calls and is called.
const MANIFEST: &str = include_str!("manifest.yaml");

/// The service that is none: a pod's calls to itself.
const ITSELF: &str = "itself";

/// Carries out a chaos step; what it measured is a line for people.
pub(super) fn run(stage: &mut Stage<'_>, chaos: &Chaos) -> anyhow::Result<Option<String>> {
    let seed = match chaos.seed {
        Some(seed) => seed,
        None => micros(SystemTime::now())?,
    };
    let stage_file = format!("multi-kind-tests/scenarios/{}.yaml", stage.scenario.name);
    let mut events = Vec::new();
    let outcome = torment(stage, seed, chaos.span.0, &mut events);
    outcome.map(|summary| Some(format!("seed {seed}: {} events; {summary}", events.len()))).with_context(
        || {
            let log = events.join("\n    ");
            let again = format!("multi-kind-tests chaos --seed {seed} --scenario {stage_file}");
            format!("seed {seed} ({again}), events and their seconds:\n    {log}\n  then")
        },
    )
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
        clusters: statuses.places.clone(),
        deployment: "deployment/chaos/churn".into(),
        service: "service/chaos/churn".into(),
    };
    for (cluster, place) in &ground.clusters {
        stage.step(&Step::Apply(Apply {
            cluster: cluster.clone(),
            file: None,
            manifest: Some(MANIFEST.replace("NODE", place.of_pods())),
        }))?;
    }
    let mut plan = Plan::new(seed, ground, REPLICAS);
    settle(stage, lab, &statuses, &plan).context("before the first fault")?;
    let mut loads = Vec::new();
    for cluster in statuses.places.keys() {
        for (service, address) in [("home", "10.96.0.7"), ("mesh", "10.96.0.8"), (ITSELF, "127.0.0.1:8080")] {
            let load = Load {
                name: format!("{cluster}-{service}"),
                from: format!("{cluster}/chaos/client"),
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
    let stop = |(cluster, service, load): (String, &'static str, RunningLoad)| {
        Ok((cluster, service, load.stop(&stage.options.interrupt)?))
    };
    let ended = loads.into_iter().map(stop).collect::<anyhow::Result<Vec<_>>>()?;
    let of_itself = ended.iter().filter(|(_, service, _)| *service == ITSELF);
    let stalls: Vec<_> = of_itself.flat_map(|(_, _, timeline)| timeline.events().iter().cloned()).collect();
    let stalls = Stalls::of(&stalls);
    let mut calls = 0;
    let mut failed = 0;
    for (cluster, service, timeline) in ended.iter().filter(|(_, service, _)| *service != ITSELF) {
        calls += timeline.len();
        failed += timeline.failed();
        let flaw = match *service {
            "home" => verdict::astray(timeline.events(), cluster, &stalls),
            _ => verdict::unexcused(timeline.events(), &cuts, &stalls),
        };
        anyhow::ensure!(flaw.is_none(), "{service} from {cluster}: {}", flaw.unwrap_or_default());
    }
    let (recovery, stalls) = (recovery.as_secs_f64(), stalls.len());
    Ok(format!(
        "{calls} calls, {failed} failed, each of them into a cluster cut off or while the machine stood still ({stalls} times); as it should be {recovery:.1} s after the last"
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
    // Who calls and who is called is not on a node that is cut off alone.
    let with_pods = |node: &NodeRef| !node.node.contains('/');
    if matches!(step, Step::Cut(node) if with_pods(node)) {
        cuts.begin(micros(SystemTime::now())?);
    }
    stage.step(step)?;
    if matches!(step, Step::Heal(node) if with_pods(node)) {
        cuts.end(micros(SystemTime::now())?);
    }
    Ok(())
}

/// Waits until everything is synced and installed, all agents agree, the tables are as the manifests, the
/// kernel holds what is wanted, and the etcds hold what is stated and mirrored.
fn settle(stage: &mut Stage<'_>, lab: &Lab, statuses: &Statuses, plan: &Plan) -> anyhow::Result<()> {
    let clusters = statuses.places.keys().cloned().collect();
    stage.step(&Step::Ready(Ready { clusters, within: Span::seconds(RECOVERY.as_secs()) }))?;
    let mut scans = BTreeMap::new();
    stage.options.interrupt.clone().retry_until(Instant::now() + RECOVERY, PAUSE, || {
        for cluster in statuses.places.keys() {
            let now = agents::status(lab, cluster)?;
            for agent in agents::each(&now) {
                let name = format!("{cluster}/{}", agent["node"].as_str().unwrap_or_default());
                let pending = agent["status"]["pending_changes"].as_u64().unwrap_or(0);
                anyhow::ensure!(pending == 0, "{name}: {pending} changes are pending");
                let flaw = agents::out_of_sync(&agent["status"]);
                anyhow::ensure!(flaw.is_none(), "{name}: {}", flaw.unwrap_or_default());
                scanned(&name, &agent["status"]["kernel_drift"], &mut scans)?;
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
        let etcds =
            statuses.places.keys().map(|cluster| Ok((cluster.clone(), contents(stage, lab, cluster)?)));
        let etcds = etcds.collect::<anyhow::Result<BTreeMap<String, Contents>>>()?;
        let flaw = agreement::flaw(&etcds, &statuses.mirrors());
        anyhow::ensure!(flaw.is_none(), "{}", flaw.unwrap_or_default());
        Ok(())
    })
}

/// Fails until the agent has looked through its kernel tables since the first call, and if it ever found
/// anything there that was not as it had written it: nobody else writes to them.
fn scanned(agent: &str, drift: &Value, scans: &mut BTreeMap<String, u64>) -> anyhow::Result<()> {
    let number = |field: &str| drift[field].as_u64().with_context(|| format!("{agent} states no {field}"));
    let repaired = number("repaired")?;
    anyhow::ensure!(repaired == 0, "{agent} had to put its kernel tables right: {}", drift["counts"]);
    let done = number("scans")?;
    let first = *scans.entry(agent.to_owned()).or_insert(done);
    anyhow::ensure!(done > first, "{agent} has not compared its kernel tables yet");
    Ok(())
}

fn contents(stage: &Stage<'_>, lab: &Lab, cluster: &str) -> anyhow::Result<Contents> {
    let mut all = Contents::new();
    for prefix in ["cilium/", "clustermesh/"] {
        let records = etcd::read(stage, lab, cluster, prefix)?;
        all.extend(records.into_iter().map(|record| (record.key, record.value)));
    }
    Ok(all)
}

/// Which clusters and nodes there are.
struct Statuses {
    places: BTreeMap<String, Place>,
    ids: BTreeMap<String, u64>,
}

impl Statuses {
    fn read(lab: &Lab) -> anyhow::Result<Self> {
        let mut all = Self { places: BTreeMap::new(), ids: BTreeMap::new() };
        let connected = lab.connections()?;
        for cluster in connected.into_iter().flat_map(|(one, other)| [one, other]) {
            let status = agents::status(lab, &cluster)?;
            let name = |agent: &Value| agent["node"].as_str().map(str::to_owned);
            let nodes = agents::each(&status).filter_map(name).collect();
            let cached = |agent: &Value| {
                agent["status"]["remotes"]
                    .as_array()
                    .is_some_and(|all| all.iter().any(|r| r["cached"] == true))
            };
            let mirror = agents::each(&status).any(cached);
            all.places.insert(cluster.clone(), Place { nodes, mirror });
            all.ids.insert(cluster, status["clusters"][0]["id"].as_u64().context("a cluster has no ID")?);
        }
        anyhow::ensure!(!all.places.is_empty(), "chaos needs connected clusters");
        Ok(all)
    }

    /// Clusters whose etcd mirrors the others.
    fn mirrors(&self) -> BTreeSet<String> {
        self.places.iter().filter(|(_, place)| place.mirror).map(|(cluster, _)| cluster.clone()).collect()
    }
}

fn dump(lab: &Lab, cluster: &str, table: &str) -> anyhow::Result<Vec<Value>> {
    let rows = agents::json(lab, &["bpf", table, "list", "--context", &lab.context(cluster), "-o", "json"])?;
    rows.as_array().cloned().with_context(|| format!("{table} of {cluster} is no list"))
}
