//! How long changes of another cluster took to get into the kernel, as agents have measured.

use super::agents;
use super::steps::Stage;
use crate::scenario::Propagated;
use anyhow::Context as _;
use serde_json::Value;
use std::time::{Duration, Instant};

const PAUSE: Duration = Duration::from_millis(100);

/// Waits until each agent has timed enough changes, and of the other kinds none, and is in sync; a line
/// with the times of each.
pub(super) fn timed(stage: &Stage<'_>, seen: &Propagated) -> anyhow::Result<Option<String>> {
    let lab = stage.lab()?;
    let deadline = Instant::now() + seen.within.0;
    let figures = stage.options.interrupt.retry_until(deadline, PAUSE, || {
        let status = agents::status(lab, &seen.at)?;
        let figures: Vec<String> = agents::each(&status)
            .map(|agent| times(agent, seen).with_context(|| format!("{}/{}", seen.at, agent["node"])))
            .collect::<anyhow::Result<_>>()?;
        anyhow::ensure!(!figures.is_empty(), "{} has no agents", seen.at);
        Ok(figures)
    })?;
    Ok(Some(figures.join("; ")))
}

fn times(agent: &Value, seen: &Propagated) -> anyhow::Result<String> {
    let status = &agent["status"];
    if let Some(flaw) = agents::out_of_sync(status) {
        anyhow::bail!(flaw);
    }
    let find = |list: &'_ Value, field: &str, value: &str| {
        list.as_array().into_iter().flatten().find(|item| item[field] == value).cloned()
    };
    let remote =
        find(&status["remotes"], "name", &seen.of).with_context(|| format!("does not follow {}", seen.of))?;
    for kind in &seen.nothing_of {
        let found = find(&remote["kinds"], "kind", kind).with_context(|| format!("has no kind {kind}"))?;
        let count = found["propagation"]["count"].as_u64().unwrap_or(0);
        anyhow::ensure!(found["synced"] == true, "{kind} is not synced");
        anyhow::ensure!(count == 0, "{count} changes of {kind} are timed, though only lists have told of it");
    }
    let mut figures = Vec::new();
    for (kind, least) in &seen.at_least {
        let found = find(&remote["kinds"], "kind", kind).with_context(|| format!("has no kind {kind}"))?;
        let times = &found["propagation"];
        let count = times["count"].as_u64().unwrap_or(0);
        anyhow::ensure!(count >= *least, "{count} changes of {kind} are timed, expected at least {least}");
        let millis = |field: &str| {
            let seconds = times[field].as_f64().with_context(|| format!("no {field} of {kind}"))?;
            anyhow::Ok(seconds * 1e3)
        };
        let (median, most) = (millis("p50_seconds")?, millis("p99_seconds")?);
        let limit = seen.no_longer_than.0.as_secs_f64() * 1e3;
        anyhow::ensure!(median > 0.0 && most <= limit, "{kind} took {median:.0} ms, p99 {most:.0} ms");
        figures.push(format!("{count} of {kind} p50 {median:.0} ms, p99 {most:.0} ms"));
    }
    let figures = if figures.is_empty() { "nothing of lists".to_owned() } else { figures.join(", ") };
    Ok(format!("{}: {figures}", agent["node"].as_str().unwrap_or_default()))
}
