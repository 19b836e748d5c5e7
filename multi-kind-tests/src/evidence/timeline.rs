//! The calls of a background load in the order in which they began, and when a change reached them.

use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// A change has arrived only when this many answers in a row, over this long, show it.
const SETTLED_CALLS: usize = 50;
const SETTLED_MICROS: u64 = 150_000;

/// One line of `mesh-probe call -o jsonl`.
#[derive(Clone, Debug, Deserialize)]
pub struct CallEvent {
    /// When the call began: microseconds since the Unix epoch.
    pub t: u64,
    /// How long it took.
    pub us: u64,
    /// Who answered.
    pub cluster: Option<String>,
    /// Which pod answered.
    pub pod: Option<String>,
    /// Why nobody did.
    pub error: Option<String>,
}

/// All calls of a load so far.
#[derive(Clone, Debug, Default)]
pub struct Timeline {
    events: Vec<CallEvent>,
}

/// How a change reached a load.
#[derive(Clone, Debug, PartialEq)]
pub struct Shifted {
    /// From the change to the beginning of the last call that was not yet answered as expected.
    pub after: Duration,
    /// Calls that failed from the change on.
    pub failed: usize,
    /// Beginning of the first call of the new state, microseconds since the Unix epoch.
    pub since: u64,
}

impl Timeline {
    /// Adds a finished call.
    pub fn push(&mut self, event: CallEvent) {
        self.events.push(event);
    }

    /// The calls.
    pub fn events(&self) -> &[CallEvent] {
        &self.events
    }

    /// Number of calls.
    pub fn len(&self) -> usize {
        self.events.len()
    }

    /// Whether no call has finished yet.
    pub fn is_empty(&self) -> bool {
        self.events.is_empty()
    }

    /// Number of failed calls.
    pub fn failed(&self) -> usize {
        self.events.iter().filter(|event| event.error.is_some()).count()
    }

    /// One line for people.
    pub fn summary(&self) -> String {
        let mut by_cluster = BTreeMap::new();
        let mut failures = BTreeMap::new();
        for event in &self.events {
            match (&event.cluster, &event.error) {
                (Some(cluster), _) => *by_cluster.entry(cluster.clone()).or_default() += 1,
                (None, error) => *failures.entry(error.clone().unwrap_or_default()).or_default() += 1,
            }
        }
        let mut text = format!("{} calls: {}", self.events.len(), super::join(&by_cluster));
        let answered = self.events.iter().filter(|event| event.error.is_none());
        if let Some(slowest) = answered.map(|event| event.us).max() {
            text += &format!("; slowest {} ms", slowest / 1000);
        }
        if !failures.is_empty() {
            text += &format!("; failed: {}, begun at {}", super::join(&failures), self.failed_at());
        }
        text
    }

    /// When the first failed calls began, as logs write the time (UTC).
    fn failed_at(&self) -> String {
        const SHOWN: usize = 5;
        let failed = self.events.iter().filter(|event| event.error.is_some());
        let mut moments: Vec<String> = failed.take(SHOWN + 1).map(|event| time_of_day(event.t)).collect();
        if moments.len() > SHOWN {
            moments[SHOWN] = "...".to_owned();
        }
        moments.join(", ")
    }

    /// How the load came to be answered by exactly `clusters` after a change at `changed`
    /// (microseconds since the Unix epoch); an error says why it has not, so far.
    ///
    /// # Errors
    /// What the newest calls show instead.
    pub fn shifted(&self, clusters: &[String], changed: u64) -> Result<Shifted, String> {
        let expected: BTreeSet<&str> = clusters.iter().map(String::as_str).collect();
        let after: Vec<&CallEvent> = self.events.iter().filter(|event| event.t >= changed).collect();
        // The tail in which every call is answered by one of the expected clusters.
        let tail_start =
            after.iter().rposition(|event| !answered_by(event, &expected)).map_or(0, |at| at + 1);
        let tail = &after[tail_start..];
        let (Some(first), Some(last)) = (tail.first(), tail.last()) else {
            return Err(format!("the last call after the change was answered by {}", describe(after.last())));
        };
        let seen: BTreeSet<&str> = tail.iter().filter_map(|event| event.cluster.as_deref()).collect();
        if tail.len() < SETTLED_CALLS || last.t - first.t < SETTLED_MICROS {
            let last_other = tail_start.checked_sub(1).and_then(|at| after.get(at));
            return Err(format!("only {} calls as expected since {}", tail.len(), describe(last_other)));
        }
        if seen != expected {
            return Err(format!("answered by {seen:?}, expected all of {expected:?}"));
        }
        // With several clusters expected, the change shows when the last of them has answered first.
        let complete = expected
            .iter()
            .filter_map(|name| tail.iter().find(|event| event.cluster.as_deref() == Some(*name)))
            .map(|event| event.t)
            .max()
            .unwrap_or(first.t);
        let last_other = tail_start.checked_sub(1).map_or(changed, |at| after[at].t);
        let settled = if expected.len() > 1 { complete } else { last_other };
        Ok(Shifted {
            after: Duration::from_micros(settled.saturating_sub(changed)),
            failed: after.iter().filter(|event| event.error.is_some()).count(),
            since: first.t,
        })
    }

    /// The first call in `since..until` that was not answered by one of `clusters`.
    pub fn strayed(&self, clusters: &[String], since: u64, until: u64) -> Option<String> {
        let expected: BTreeSet<&str> = clusters.iter().map(String::as_str).collect();
        let strays: Vec<&CallEvent> = self
            .events
            .iter()
            .filter(|event| (since..until).contains(&event.t) && !answered_by(event, &expected))
            .collect();
        let first = strays.first()?;
        let millis = (first.t - since) / 1000;
        Some(format!(
            "{} calls strayed, the first after {millis} ms: {}",
            strays.len(),
            describe(Some(first))
        ))
    }

    /// Which of `clusters` did not answer any call in `since..until`.
    pub fn silent<'a>(&self, clusters: &'a [String], since: u64, until: u64) -> Vec<&'a str> {
        let window = || self.events.iter().filter(|event| (since..until).contains(&event.t));
        clusters
            .iter()
            .filter(|name| !window().any(|event| event.cluster.as_ref() == Some(name)))
            .map(String::as_str)
            .collect()
    }
}

fn answered_by(event: &CallEvent, clusters: &BTreeSet<&str>) -> bool {
    event.cluster.as_deref().is_some_and(|cluster| clusters.contains(cluster))
}

fn describe(event: Option<&&CallEvent>) -> String {
    match event {
        None => "nobody yet".into(),
        Some(CallEvent { cluster: Some(cluster), pod, .. }) => {
            format!("{cluster} ({})", pod.as_deref().unwrap_or("?"))
        }
        Some(CallEvent { error, .. }) => format!("nobody ({})", error.as_deref().unwrap_or("?")),
    }
}

/// Of microseconds since the Unix epoch.
fn time_of_day(t: u64) -> String {
    let (seconds, millis) = (t / 1_000_000 % 86_400, t / 1000 % 1000);
    format!("{:02}:{:02}:{:02}.{millis:03}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_as_in_logs() {
        assert_eq!(time_of_day(1_795_735_219_480_478), "23:20:19.480");
    }

    /// Calls every 5 ms; `a` and `b` are clusters, `!` is a failure.
    fn timeline(pattern: &str) -> Timeline {
        let mut timeline = Timeline::default();
        for (t, letter) in (0..).step_by(5_000).zip(pattern.chars()) {
            let cluster = (letter != '!').then(|| letter.to_string());
            let error = (letter == '!').then(|| "refused".to_owned());
            timeline.push(CallEvent { t, us: 300, cluster, pod: None, error });
        }
        timeline
    }

    fn only(name: &str) -> Vec<String> {
        vec![name.to_owned()]
    }

    #[test]
    fn measures_until_the_last_other_answer() {
        let timeline = timeline(&("ab".repeat(10) + "ab" + &"a".repeat(60)));
        // The change is at call 10; the last answer of b is call 21.
        let shifted = timeline.shifted(&only("a"), 50_000).expect("arrived");
        assert_eq!(shifted.after, Duration::from_millis(55));
        assert_eq!(shifted.failed, 0);
    }

    #[test]
    fn an_immediate_change_takes_no_time() {
        let shifted = timeline(&"a".repeat(60)).shifted(&only("a"), 0).expect("arrived");
        assert_eq!(shifted.after, Duration::ZERO);
    }

    #[test]
    fn a_return_to_both_shows_with_the_first_answer_of_the_other() {
        let timeline = timeline(&("a".repeat(20) + &"ba".repeat(40)));
        let shifted = timeline.shifted(&["a".into(), "b".into()], 50_000).expect("arrived");
        assert_eq!(shifted.after, Duration::from_millis(50));
    }

    #[test]
    fn not_settled_is_not_arrived() {
        assert!(timeline(&("b".repeat(60) + "aaa")).shifted(&only("a"), 0).is_err());
        assert!(timeline(&"a".repeat(100)).shifted(&["a".into(), "b".into()], 0).is_err());
        assert!(timeline("").shifted(&only("a"), 0).is_err());
    }

    #[test]
    fn failures_are_counted_and_delay_the_arrival() {
        let shifted =
            timeline(&("b!!".to_owned() + &"a".repeat(60))).shifted(&only("a"), 0).expect("arrived");
        assert_eq!((shifted.failed, shifted.after), (2, Duration::from_millis(10)));
    }

    #[test]
    fn strays_and_silence() {
        let timeline = timeline("aaabaaa");
        assert!(timeline.strayed(&only("a"), 0, 15_000).is_none(), "the end is not part of it");
        assert!(timeline.strayed(&only("a"), 0, 20_000).is_some());
        assert_eq!(timeline.silent(&["a".into(), "b".into()], 0, 15_000), ["b"]);
    }
}
