//! One step at a time.

use super::background::{RunningLoad, RunningStream};
use super::rotation::Before;
use super::{Options, json};
use crate::evidence::CallReport;
use crate::lab::{Lab, READY, micros, ordered};
use crate::pace;
use crate::process;
use crate::scenario::{
    AgentFlags, Annotate, Apply, Call, Check, Connect, Delete, Encrypt, IdentitySeen, Load, LoadStop,
    NodeRef, Pair, ProcessRef, Ready, Rotation, Scale, Scenario, Shift, Step, Stream, StreamEnd, Unchanged,
};
use anyhow::Context as _;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant, SystemTime};

/// Between two attempts of a step that waits.
const PAUSE: Duration = Duration::from_millis(20);
/// A change must show while the load runs; it is looked for this much longer than allowed, so that
/// the report can say how late it was.
const GRACE: Duration = Duration::from_secs(5);
/// A call that takes longer has failed.
const CALL_TIMEOUT: Duration = Duration::from_secs(1);
/// On top of the time that calls may take.
const CALL_DEADLINE: Duration = Duration::from_secs(60);

/// After which a call has failed, in milliseconds.
fn call_timeout() -> String {
    pace::slowed(CALL_TIMEOUT).as_millis().to_string()
}

/// What steps share.
pub(super) struct Stage<'a> {
    pub(super) options: &'a Options,
    pub(super) scenario: &'a Scenario,
    lab: Option<&'a Lab>,
    loads: BTreeMap<String, RunningLoad>,
    streams: BTreeMap<String, RunningStream>,
    /// When the last step changed something, in microseconds since the Unix epoch.
    changed: u64,
    /// What that step was.
    change: String,
    /// How everything was before the authority was replaced.
    pub(super) before_rotation: Option<Before>,
}

/// What a step is called in reports.
pub(super) fn title(step: &Step) -> String {
    match step {
        Step::Say(text) => text.clone(),
        Step::Connect(pair) => format!("connect {} and {}", pair.from, pair.to),
        Step::Disconnect(pair) => format!("disconnect {} and {}", pair.from, pair.to),
        Step::Ready(_) => "all agents are ready".into(),
        Step::Apply(apply) => match &apply.file {
            Some(file) => format!("apply {} in {}", file.display(), apply.cluster),
            None => format!("apply a manifest in {}", apply.cluster),
        },
        Step::Delete(delete) => format!("{} deletes {}", delete.cluster, delete.object),
        Step::Annotate(annotate) => {
            format!("{} annotates {}: {}", annotate.cluster, annotate.object, annotate.set.join(" "))
        }
        Step::Scale(scale) => format!("{} scales {} to {}", scale.cluster, scale.object, scale.replicas),
        Step::Kill(process) => format!("kill -9 {} of {}", process.process, process.cluster),
        Step::Stop(process) => format!("stop {} of {}", process.process, process.cluster),
        Step::Start(process) => {
            let empty = if process.empty { ", empty" } else { "" };
            format!("start {} of {}{empty}", process.process, process.cluster)
        }
        Step::Restart(process) => format!("restart {} of {}", process.process, process.cluster),
        Step::Freeze(process) => format!("freeze {} of {}", process.process, process.cluster),
        Step::Thaw(process) => format!("thaw {} of {}", process.process, process.cluster),
        Step::Cut(node) => format!("cut {} off", node.node),
        Step::Heal(node) => format!("heal {}", node.node),
        Step::Call(_) => "call".into(),
        Step::Load(load) => format!("{} keeps calling {} ({})", load.from, load.to, load.name),
        Step::Shift(shift) => {
            format!("{} within {}: answered by {}", shift.load, shift.within, shift.to.join(" and "))
        }
        Step::Unchanged(load) => {
            format!("{} for {}: still answered by {}", load.load, load.span, load.to.join(" and "))
        }
        Step::LoadStop(stop) => format!("end of {}", stop.load),
        Step::Stream(stream) => format!("{} streams to {} for {}", stream.from, stream.to, stream.span),
        Step::StreamEnd(end) => format!("end of {}", end.stream),
        Step::AgentFlags(AgentFlags { cluster, flags }) if flags.is_empty() => {
            format!("the agents of {cluster} have a lab's usual flags")
        }
        Step::AgentFlags(AgentFlags { cluster, flags }) => {
            format!("the agents of {cluster} have {}", flags.join(" "))
        }
        Step::Encrypt(encrypt) if encrypt.between == "off" => {
            format!("{} does not encrypt any more", encrypt.cluster)
        }
        Step::Encrypt(encrypt) => {
            let strict = if encrypt.strict { ", strictly" } else { "" };
            format!("{} encrypts between {} by {}{strict}", encrypt.cluster, encrypt.between, encrypt.with)
        }
        Step::Underlay(look) => format!("packets between nodes for {}", look.span),
        Step::Chaos(chaos) => format!("chaos for {}", chaos.span),
        Step::Check(check) => format!("clustermesh {}", check.run.join(" ")),
        Step::Fails(fails) => format!("{} fails", fails.run.join(" ")),
        Step::IdentitySeen(seen) => format!("{} sees the identity of {}", seen.at, seen.pod),
        Step::Propagated(seen) => format!("{} has timed changes of {}", seen.at, seen.of),
        Step::Rotate(rotation) => match rotation {
            Rotation::Begin => "a second authority is trusted".into(),
            Rotation::Reissue => "it signs all certificates".into(),
            Rotation::Finish => "the first authority is forgotten".into(),
        },
        Step::Rotated(_) => "the old certificates are worth nothing, and nobody noticed".into(),
        Step::Tamper(tamper) => format!("somebody else writes to a table of {}", tamper.node),
    }
}

impl<'a> Stage<'a> {
    pub(super) fn new(options: &'a Options, lab: Option<&'a Lab>, scenario: &'a Scenario) -> Self {
        Self {
            options,
            scenario,
            lab,
            loads: BTreeMap::new(),
            streams: BTreeMap::new(),
            changed: 0,
            change: String::new(),
            before_rotation: None,
        }
    }

    /// Makes the connections that the scenario starts from, and no others.
    pub(super) fn connect_first(&mut self) -> anyhow::Result<()> {
        let Some(lab) = self.lab else { return Ok(()) };
        let wanted: BTreeSet<_> =
            self.scenario.connected.iter().map(|(from, to)| ordered(from, to)).collect();
        let present = lab.connections()?;
        let patience = format!("{}s", pace::slowed(READY).as_secs());
        for (verb, pairs) in [("disconnect", &present - &wanted), ("connect", &wanted - &present)] {
            for (from, to) in pairs {
                let (from, to) = (lab.context(&from), lab.context(&to));
                let arguments = [verb, "--context", &from, "--destination-context", &to];
                let arguments = [&arguments[..], &["--wait", "--wait-duration", &patience]].concat();
                lab.clustermesh(&arguments).context("before the first step")?;
            }
        }
        if !wanted.is_empty() {
            let clusters: BTreeSet<String> = wanted.into_iter().flat_map(|(from, to)| [from, to]).collect();
            let within = crate::scenario::Span::seconds(15);
            self.ready(&Ready { clusters: clusters.into_iter().collect(), within })
                .context("before the first step")?;
        }
        Ok(())
    }

    /// Does one step; gives what it measured, if it measures.
    pub(super) fn step(&mut self, step: &Step) -> anyhow::Result<Option<String>> {
        if is_change(step) {
            // Up to here loads have to go on as they had settled. The step may move them before it has ended.
            let until = now()?;
            self.loads.values_mut().try_for_each(|load| check_settled(load, until))?;
            self.change = title(step);
        }
        match step {
            Step::Say(_) => Ok(None),
            Step::Connect(pair) => self.connect(pair),
            Step::Disconnect(pair) => self.disconnect(pair),
            Step::Ready(ready) => self.ready(ready),
            Step::Apply(apply) => self.apply(apply),
            Step::Annotate(annotate) => self.annotate(annotate),
            Step::Delete(delete) => self.delete(delete),
            Step::Scale(scale) => self.scale(scale),
            Step::Kill(process) => self.process("kill", process, &[]),
            Step::Stop(process) => self.process("stop", process, &[]),
            Step::Start(process) => self.process("start", process, &[]),
            Step::Restart(process) => self.process("restart", process, &[]),
            Step::Freeze(process) => self.process("kill", process, &["--signal", "STOP"]),
            Step::Thaw(process) => self.process("kill", process, &["--signal", "CONT"]),
            Step::Cut(node) => self.node("cut", node),
            Step::Heal(node) => self.node("heal", node),
            Step::Call(call) => self.call(call),
            Step::Load(load) => self.load(load),
            Step::Shift(shift) => self.shift(shift),
            Step::Unchanged(unchanged) => self.unchanged(unchanged),
            Step::LoadStop(stop) => self.load_stop(stop),
            Step::Stream(stream) => self.stream(stream),
            Step::StreamEnd(end) => self.stream_end(end),
            Step::AgentFlags(flags) => self.agent_flags(flags),
            Step::Encrypt(encrypt) => self.encrypt(encrypt),
            Step::Underlay(look) => super::underlay::look(self, look),
            Step::Chaos(chaos) => super::chaos::run(self, chaos),
            Step::Check(check) => self.check(check),
            Step::Fails(fails) => super::refusal::fails_clearly(self, fails),
            Step::IdentitySeen(seen) => self.identity_seen(seen),
            Step::Propagated(seen) => super::propagation::timed(self, seen),
            Step::Rotate(rotation) => super::rotation::carry_out(self, *rotation),
            Step::Rotated(rotated) => super::rotation::unnoticed(self, rotated),
            Step::Tamper(tamper) => super::tampering::put_right(self, tamper),
        }
    }

    pub(super) fn lab(&self) -> anyhow::Result<&'a Lab> {
        self.lab.context("this step needs a lab, and the scenario names no topology")
    }

    fn connect(
        &mut self,
        Connect { from, to, virtual_pod_cidrs }: &Connect,
    ) -> anyhow::Result<Option<String>> {
        let more: &[&str] = if *virtual_pod_cidrs { &["--virtual-pod-cidrs"] } else { &[] };
        self.join_or_part("connect", (from, to), more)
    }

    fn disconnect(&mut self, Pair { from, to }: &Pair) -> anyhow::Result<Option<String>> {
        self.join_or_part("disconnect", (from, to), &[])
    }

    fn join_or_part(
        &mut self,
        verb: &str,
        (from, to): (&str, &str),
        more: &[&str],
    ) -> anyhow::Result<Option<String>> {
        let lab = self.lab()?;
        let (from, to) = (lab.context(from), lab.context(to));
        self.changed = now()?;
        let arguments = [verb, "--context", &from, "--destination-context", &to];
        lab.clustermesh(&[&arguments, more].concat())?;
        Ok(None)
    }

    fn encrypt(&mut self, encrypt: &Encrypt) -> anyhow::Result<Option<String>> {
        let strict = if encrypt.strict { &["--strict"][..] } else { &[] };
        let how = [encrypt.between.as_str(), "--with", &encrypt.with];
        self.restart_agents("encrypt", &encrypt.cluster, &[&how, strict].concat())
    }

    fn agent_flags(&mut self, AgentFlags { cluster, flags }: &AgentFlags) -> anyhow::Result<Option<String>> {
        let flags: Vec<&str> = std::iter::once("--").chain(flags.iter().map(String::as_str)).collect();
        self.restart_agents("agent-flags", cluster, &flags)
    }

    /// By a command of the lab, which waits until they are ready.
    fn restart_agents(
        &mut self,
        command: &str,
        cluster: &str,
        how: &[&str],
    ) -> anyhow::Result<Option<String>> {
        let lab = self.lab()?;
        let cluster = lab.context(cluster);
        self.changed = now()?;
        let patience = format!("{}s", pace::slowed(READY).as_secs());
        lab.clustermesh(&[&["lab", command, "--wait-timeout", &patience, &cluster], how].concat())?;
        Ok(None)
    }

    fn ready(&mut self, ready: &Ready) -> anyhow::Result<Option<String>> {
        let lab = self.lab()?;
        let begin = Instant::now();
        let named = self.scenario.connected.iter().flat_map(|(from, to)| [from, to]);
        let clusters: BTreeSet<&String> =
            if ready.clusters.is_empty() { named.collect() } else { ready.clusters.iter().collect() };
        anyhow::ensure!(!clusters.is_empty(), "`ready` needs `clusters`, or the scenario `connected`");
        for cluster in clusters {
            let left = ready.within.0.saturating_sub(begin.elapsed()).as_secs().max(1).to_string();
            let context = lab.context(cluster);
            lab.clustermesh(&[
                "status",
                "--context",
                &context,
                "--wait",
                "--wait-duration",
                &format!("{left}s"),
            ])?;
        }
        Ok(Some(format!("{}: all ready after {:.2} s", self.change, begin.elapsed().as_secs_f64())))
    }

    fn apply(&mut self, apply: &Apply) -> anyhow::Result<Option<String>> {
        let lab = self.lab()?;
        let context = lab.context(&apply.cluster);
        let inline = std::env::temp_dir().join(format!("{}-{}.yaml", lab.name(), self.scenario.name));
        let file = match (&apply.file, &apply.manifest) {
            (Some(file), None) => self.scenario.base.join(file),
            (None, Some(text)) => {
                std::fs::write(&inline, text)?;
                inline.clone()
            }
            _ => anyhow::bail!("`apply` needs either `file` or `manifest`"),
        };
        let result = lab.clustermesh(&["lab", "apply", &context, "-f", &file.to_string_lossy()]);
        if apply.manifest.is_some() {
            // Already read, whatever came of it.
            let _ = std::fs::remove_file(&inline);
        }
        result?;
        self.manifest_changed(&apply.cluster)
    }

    fn annotate(&mut self, annotate: &Annotate) -> anyhow::Result<Option<String>> {
        let lab = self.lab()?;
        let context = lab.context(&annotate.cluster);
        let mut arguments = vec!["lab", "annotate", &context, &annotate.object];
        arguments.extend(annotate.set.iter().map(String::as_str));
        lab.clustermesh(&arguments)?;
        self.manifest_changed(&annotate.cluster)
    }

    fn delete(&mut self, delete: &Delete) -> anyhow::Result<Option<String>> {
        let lab = self.lab()?;
        lab.clustermesh(&["lab", "delete", &lab.context(&delete.cluster), &delete.object])?;
        self.manifest_changed(&delete.cluster)
    }

    fn scale(&mut self, scale: &Scale) -> anyhow::Result<Option<String>> {
        let lab = self.lab()?;
        let context = lab.context(&scale.cluster);
        let begin = now()?;
        lab.clustermesh(&["lab", "scale", &context, &scale.object, &scale.replicas.to_string()])?;
        self.manifest_changed(&scale.cluster)?;
        if scale.replicas == 0 {
            // The manifest changes twice: pods are terminating, pods are gone. The first one counts.
            self.changed = begin;
        }
        Ok(None)
    }

    /// The clock of a change starts when the file was written, not when the command that wrote it ended.
    fn manifest_changed(&mut self, cluster: &str) -> anyhow::Result<Option<String>> {
        self.changed = self.lab()?.manifests_changed(cluster)?;
        Ok(None)
    }

    fn process(&mut self, verb: &str, process: &ProcessRef, how: &[&str]) -> anyhow::Result<Option<String>> {
        let lab = self.lab()?;
        let context = lab.context(&process.cluster);
        let mut arguments = vec!["lab", verb, &context, &process.process];
        arguments.extend(how);
        if process.empty {
            arguments.push("--fresh");
        }
        self.changed = now()?;
        lab.clustermesh(&arguments)?;
        Ok(None)
    }

    fn node(&mut self, verb: &str, node: &NodeRef) -> anyhow::Result<Option<String>> {
        let lab = self.lab()?;
        self.changed = now()?;
        lab.clustermesh(&["lab", verb, &lab.context(&node.node)])?;
        Ok(None)
    }

    fn call(&mut self, call: &Call) -> anyhow::Result<Option<String>> {
        let begin = Instant::now();
        let deadline = begin + call.within.map_or(Duration::ZERO, |within| within.0);
        let interrupt = self.options.interrupt.clone();
        let report = interrupt.retry_until(deadline, PAUSE, || {
            let report = self.calls(&call.from, &call.to, call.calls, call.unconnected)?;
            let differences = call.expect.differences(&report);
            anyhow::ensure!(differences.is_empty(), "{}; got {}", differences.join("; "), report.summary());
            Ok(report)
        })?;
        Ok(Some(format!("{} calls {}: {}", call.from, call.to, report.summary())))
    }

    fn calls(&self, from: &str, to: &str, calls: u32, unconnected: bool) -> anyhow::Result<CallReport> {
        let count = calls.to_string();
        let timeout = call_timeout();
        let mut arguments = vec!["mesh-probe", "call", to, "-n", &count, "--timeout", &timeout, "-o", "json"];
        if unconnected {
            arguments.push("--unconnected");
        }
        // The status only says whether a call failed, and that is in the report.
        let done = self.lab()?.run_in_pod(from, &arguments, pace::slowed(CALL_DEADLINE))?;
        serde_json::from_str(done.stdout.trim()).with_context(|| {
            format!("no report of the calls from {from}: {}{}", done.stdout.trim(), done.stderr.trim())
        })
    }

    fn load(&mut self, load: &Load) -> anyhow::Result<Option<String>> {
        let running = self.start_load(load)?;
        self.loads.insert(load.name.clone(), running);
        Ok(None)
    }

    /// Begins calls, and waits for the first.
    pub(super) fn start_load(&self, load: &Load) -> anyhow::Result<RunningLoad> {
        let interval = (load.interval.0.as_secs_f64() * 1e3).to_string();
        let (to, timeout) = (load.to.as_str(), call_timeout());
        let arguments = ["mesh-probe", "call", to, "--until-eof", "--interval", &interval];
        let arguments = [&arguments[..], &["--timeout", &timeout, "-o", "jsonl"]].concat();
        let command = self.lab()?.in_pod(&load.from, &arguments);
        let mut running = RunningLoad::start(command)?;
        let deadline = Instant::now() + pace::slowed(Duration::from_secs(10));
        self.options.interrupt.clone().retry_until(deadline, PAUSE, || {
            running.alive()?;
            anyhow::ensure!(!running.timeline().is_empty(), "the load makes no calls");
            Ok(())
        })?;
        Ok(running)
    }

    fn running(&mut self, name: &str) -> anyhow::Result<&mut RunningLoad> {
        self.loads.get_mut(name).with_context(|| format!("no load is called {name:?}"))
    }

    fn shift(&mut self, shift: &Shift) -> anyhow::Result<Option<String>> {
        let changed = self.changed;
        let interrupt = self.options.interrupt.clone();
        let load = self.running(&shift.load)?;
        let deadline = Instant::now() + shift.within.0 + pace::slowed(GRACE);
        let shifted = interrupt.retry_until(deadline, PAUSE, || {
            load.alive()?;
            load.timeline().shifted(&shift.to, changed).map_err(anyhow::Error::msg)
        })?;
        let millis = shifted.after.as_secs_f64() * 1e3;
        anyhow::ensure!(shifted.after <= shift.within.0, "took {millis:.0} ms, {} are allowed", shift.within);
        let failed = shifted.failed;
        anyhow::ensure!(
            failed <= usize::try_from(shift.max_failed)?,
            "{failed} calls failed meanwhile: {}",
            load.timeline().summary()
        );
        load.settled = Some((shift.to.clone(), shifted.since));
        let failures = if failed > 0 { format!(", {failed} calls failed meanwhile") } else { String::new() };
        Ok(Some(format!("{}: {} after {millis:.0} ms{failures}", self.change, shift.to.join(" and "))))
    }

    fn unchanged(&mut self, unchanged: &Unchanged) -> anyhow::Result<Option<String>> {
        let interrupt = self.options.interrupt.clone();
        let load = self.running(&unchanged.load)?;
        let begin = now()?;
        // This is the claim itself: for so long, nothing happens.
        interrupt.wait(unchanged.span.0)?;
        load.alive()?;
        let end = now()?;
        let timeline = load.timeline();
        if let Some(stray) = timeline.strayed(&unchanged.to, begin, end) {
            anyhow::bail!(stray);
        }
        let silent = timeline.silent(&unchanged.to, begin, end);
        anyhow::ensure!(silent.is_empty(), "{} did not answer: {}", silent.join(", "), timeline.summary());
        drop(timeline);
        load.settled = Some((unchanged.to.clone(), begin));
        Ok(None)
    }

    fn load_stop(&mut self, stop: &LoadStop) -> anyhow::Result<Option<String>> {
        let mut load =
            self.loads.remove(&stop.load).with_context(|| format!("no load is called {:?}", stop.load))?;
        check_settled(&mut load, now()?)?;
        let timeline = load.stop(&self.options.interrupt)?;
        anyhow::ensure!(!timeline.is_empty(), "the load made no calls");
        anyhow::ensure!(timeline.failed() <= usize::try_from(stop.max_failed)?, timeline.summary());
        Ok(Some(format!("all of {}: {}", stop.load, timeline.summary())))
    }

    fn stream(&mut self, stream: &Stream) -> anyhow::Result<Option<String>> {
        let seconds = stream.span.0.as_secs_f64().to_string();
        let command = self
            .lab()?
            .in_pod(&stream.from, &["mesh-probe", "stream", &stream.to, "--seconds", &seconds, "-o", "json"]);
        self.streams.insert(stream.name.clone(), RunningStream::start(command, stream.span.0)?);
        Ok(None)
    }

    fn stream_end(&mut self, end: &StreamEnd) -> anyhow::Result<Option<String>> {
        let stream = self
            .streams
            .remove(&end.stream)
            .with_context(|| format!("no stream is called {:?}", end.stream))?;
        let report = stream.finish(&self.options.interrupt)?;
        match report.flaw(end.max_gap.0.as_secs_f64() * 1e3) {
            Some(flaw) => anyhow::bail!(flaw),
            None => Ok(Some(report.summary())),
        }
    }

    fn check(&mut self, check: &Check) -> anyhow::Result<Option<String>> {
        let lab = self.lab()?;
        let folder = self.scenario.base.to_string_lossy();
        let fill = |word: &String| word.replace("{lab}", lab.name()).replace("{scenario}", &folder);
        let arguments: Vec<String> = check.run.iter().map(fill).collect();
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let deadline = Instant::now() + check.within.0;
        self.options.interrupt.retry_until(deadline, PAUSE, || {
            let done = lab.try_clustermesh(&arguments)?;
            anyhow::ensure!(!done.stdout.is_empty(), "no output; {}", done.stderr.trim());
            match check.says.iter().find(|part| !done.stdout.contains(*part)) {
                Some(missing) => anyhow::bail!("{missing:?} is not in its output:\n{}", done.stdout),
                None if check.says.is_empty() => json::holds(check, &done.stdout),
                None => Ok(()),
            }
        })?;
        Ok(None)
    }

    fn identity_seen(&mut self, seen: &IdentitySeen) -> anyhow::Result<Option<String>> {
        super::identity::seen_at_the_far_end(self, seen)
    }

    /// Calls whose answers do not matter, only that they were made.
    pub(super) fn make_calls(&self, from: &str, to: &str) -> anyhow::Result<CallReport> {
        self.calls(from, to, 50, false)
    }

    /// Runs a command with the deadline of a step.
    pub(super) fn run(
        &self,
        command: std::process::Command,
        deadline: Duration,
    ) -> anyhow::Result<process::Finished> {
        process::run(command, deadline, &self.options.interrupt)
    }
}

/// Whether a step changes what others then see.
fn is_change(step: &Step) -> bool {
    !matches!(
        step,
        Step::Say(_)
            | Step::Ready(_)
            | Step::Call(_)
            | Step::Load(_)
            | Step::Shift(_)
            | Step::Unchanged(_)
            | Step::LoadStop(_)
            | Step::Stream(_)
            | Step::StreamEnd(_)
            | Step::Check(_)
            | Step::Fails(_)
            | Step::IdentitySeen(_)
            | Step::Propagated(_)
            | Step::Rotated(_)
    )
}

/// Whether a load went on as it had settled, up to a change.
fn check_settled(load: &mut RunningLoad, until: u64) -> anyhow::Result<()> {
    if let Some((clusters, since)) = load.settled.take()
        && let Some(stray) = load.timeline().strayed(&clusters, since, until)
    {
        anyhow::bail!("it had settled on {}, but then {stray}", clusters.join(" and "));
    }
    Ok(())
}

fn now() -> anyhow::Result<u64> {
    micros(SystemTime::now())
}
