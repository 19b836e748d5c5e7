//! Whether calls and tables are as they have to be. Plain code.

use super::plan::Wanted;
use crate::evidence::CallEvent;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// Calls on their way when a cluster is cut off, and paths that have to be found again after it, get so
/// long: a call's timeout.
const SLACK: u64 = 1_000_000;
/// A call of a process to its own pod that takes so long, or fails, had no processor.
const STALL: u64 = 500_000;

/// Times in microseconds since the Unix epoch in which a cluster with its pods was cut off.
#[derive(Debug, Default)]
pub(super) struct Cuts(Vec<(u64, u64)>);

impl Cuts {
    pub(super) fn begin(&mut self, at: u64) {
        self.0.push((at, u64::MAX));
    }

    pub(super) fn end(&mut self, at: u64) {
        if let Some(last) = self.0.last_mut() {
            last.1 = at;
        }
    }

    /// A call that a cut-off cluster may have swallowed. One at a time is cut off, and it holds at most a
    /// part of the service's backends, until it is declared dead.
    fn excuses(&self, call: &CallEvent) -> bool {
        self.0.iter().any(|(begin, end)| call.t + call.us >= *begin && call.t <= end.saturating_add(SLACK))
    }
}

/// Times in which the machine stood still: a pod's calls to itself say so.
#[derive(Debug, Default)]
pub(super) struct Stalls(Vec<(u64, u64)>);

impl Stalls {
    pub(super) fn of(calls: &[CallEvent]) -> Self {
        let slow = calls.iter().filter(|call| call.us >= STALL || call.error.is_some());
        Self(slow.map(|call| (call.t, call.t + call.us)).collect())
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// A failed call that was under way meanwhile. One that was answered by the wrong side has no excuse.
    fn excuse(&self, call: &CallEvent) -> bool {
        call.error.is_some() && self.0.iter().any(|(begin, end)| call.t <= *end && call.t + call.us >= *begin)
    }
}

/// The first call, and how many, that failed without an excuse.
pub(super) fn unexcused(calls: &[CallEvent], cuts: &Cuts, stalls: &Stalls) -> Option<String> {
    let failed = |call: &&CallEvent| call.error.is_some() && !cuts.excuses(call) && !stalls.excuse(call);
    let count = calls.iter().filter(failed).count();
    let first = calls.iter().find(failed)?;
    let error = first.error.as_deref().unwrap_or_default();
    Some(format!(
        "{count} calls failed though their backends were in reach, the first at {}: {error}",
        first.t
    ))
}

/// The first call that was not answered at home.
pub(super) fn astray(calls: &[CallEvent], home: &str, stalls: &Stalls) -> Option<String> {
    let away = |call: &&CallEvent| call.cluster.as_deref() != Some(home) && !stalls.excuse(call);
    let first = calls.iter().find(away)?;
    let count = calls.iter().filter(away).count();
    let by = first.cluster.as_deref().or(first.error.as_deref()).unwrap_or("nobody");
    Some(format!("{count} calls were not answered at home, the first at {} by {by}", first.t))
}

/// Columns that are a node's own business.
const OWN: [&str; 2] = ["id", "node"];

/// What the agents of a cluster do not agree about in a table; `rows` are those of all nodes.
pub(super) fn disagreement(rows: &[Value]) -> Option<String> {
    let mut nodes: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for row in rows.iter().filter_map(Value::as_object) {
        let node = row.get("node").and_then(Value::as_str).unwrap_or_default();
        let shared: BTreeMap<_, _> = row.iter().filter(|(name, _)| !OWN.contains(&name.as_str())).collect();
        nodes.entry(node.to_owned()).or_default().insert(format!("{shared:?}"));
    }
    let (first, rows) = nodes.iter().next()?;
    nodes.iter().find_map(|(node, others)| {
        let row = rows.symmetric_difference(others).next()?;
        Some(format!("{first} and {node} differ in {row}"))
    })
}

/// Where a service of `own` has other backends than the manifests say; `rows` are its own at one port.
pub(super) fn difference(
    rows: &[&Value],
    own: &str,
    ids: &BTreeMap<String, u64>,
    wanted: &BTreeMap<String, Wanted>,
) -> Option<String> {
    wanted.iter().find_map(|(cluster, wanted)| {
        let expected = if wanted.shared || cluster == own { u64::from(wanted.replicas) } else { 0 };
        let id = ids.get(cluster)?;
        let of_cluster = rows.iter().filter(|row| number(&row["cluster"]) == Some(*id));
        let found: BTreeMap<&str, u64> = of_cluster
            .map(|row| (row["node"].as_str().unwrap_or_default(), number(&row["count"]).unwrap_or(0)))
            .collect();
        let wrong = found.iter().find(|(_, count)| **count != expected);
        match wrong {
            Some((node, count)) => {
                Some(format!("{own}/{node} has {count} backends of {cluster}, not {expected}"))
            }
            None if found.is_empty() && expected > 0 => {
                Some(format!("{own} has none of {cluster}'s {expected} backends"))
            }
            None => None,
        }
    })
}

/// Tables are printed with all columns as text.
fn number(value: &Value) -> Option<u64> {
    value.as_str()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn call(t: u64, us: u64, cluster: Option<&str>) -> CallEvent {
        let error = cluster.is_none().then(|| "timeout".to_owned());
        CallEvent { t, us, cluster: cluster.map(Into::into), pod: None, error }
    }

    #[test]
    fn only_what_a_cut_may_have_swallowed_is_excused() {
        let mut cuts = Cuts::default();
        cuts.begin(10_000_000);
        cuts.end(20_000_000);
        let none = Stalls::default();
        let within = [call(9_500_000, 1_000_000, None), call(20_900_000, 1, None)];
        assert_eq!(unexcused(&within, &cuts, &none), None);
        assert!(unexcused(&[call(9_000_000, 900_000, None)], &cuts, &none).is_some());
        assert!(unexcused(&[call(21_100_000, 5, None)], &cuts, &none).is_some());
        assert_eq!(unexcused(&[call(1, 5, Some("beta"))], &cuts, &none), None);
        assert!(astray(&[call(1, 5, Some("beta"))], "alpha", &none).is_some());
    }

    #[test]
    fn a_machine_that_stood_still_excuses_failures_and_no_wrong_answers() {
        let own = [call(1_000_000, 400, Some("alpha")), call(5_000_000, 700_000, Some("alpha"))];
        let stalls = Stalls::of(&own);
        assert_eq!(stalls.len(), 1);
        let cuts = Cuts::default();
        assert_eq!(unexcused(&[call(4_500_000, 1_000_000, None)], &cuts, &stalls), None);
        assert_eq!(astray(&[call(5_600_000, 1_000_000, None)], "alpha", &stalls), None);
        assert!(unexcused(&[call(1_000_000, 1_000_000, None)], &cuts, &stalls).is_some());
        assert!(astray(&[call(5_100_000, 300, Some("beta"))], "alpha", &stalls).is_some());
    }

    #[test]
    fn nodes_differ_in_what_they_share_only() {
        let row = |node: &str, id: u64, count: u64| json!({"node": node, "id": id, "frontend": "10.96.0.8", "count": count});
        assert_eq!(disagreement(&[row("a", 1, 3), row("b", 2, 3)]), None);
        assert!(disagreement(&[row("a", 1, 3), row("b", 1, 4)]).is_some());
    }

    #[test]
    fn a_cluster_that_does_not_share_counts_at_home_only() {
        let wanted = |replicas, shared| Wanted { replicas, shared };
        let wanted =
            BTreeMap::from([("alpha".to_owned(), wanted(2, true)), ("beta".to_owned(), wanted(3, false))]);
        let ids = BTreeMap::from([("alpha".to_owned(), 1), ("beta".to_owned(), 2)]);
        let row = |cluster: u64, count: u64| json!({"node": "n", "cluster": cluster.to_string(), "count": count.to_string()});
        let (one, two) = (row(1, 2), row(2, 3));
        assert_eq!(difference(&[&one], "alpha", &ids, &wanted), None);
        assert!(difference(&[&one, &two], "alpha", &ids, &wanted).is_some());
        assert_eq!(difference(&[&one, &two], "beta", &ids, &wanted), None);
        assert!(difference(&[], "alpha", &ids, &wanted).is_some());
    }
}
