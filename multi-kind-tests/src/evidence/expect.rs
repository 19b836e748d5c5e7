//! What the answers to a number of calls must show.

use super::CallReport;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};

/// Default: every call is answered, by anybody, from the address that was called.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Expect {
    /// Calls that may fail.
    #[serde(default)]
    pub max_failed: u64,
    /// No call is answered.
    #[serde(default)]
    pub nobody: bool,
    /// Exactly these clusters answer, each of them at least once.
    #[serde(default)]
    pub clusters: Vec<String>,
    /// Each of `clusters` gives at least this part of the answers (0 to 1).
    #[serde(default)]
    pub min_share: f64,
    /// Of these clusters each gives this part of the answers (0 to 1), give or take 0.1.
    #[serde(default)]
    pub shares: BTreeMap<String, f64>,
    /// So many different pods answer.
    #[serde(default)]
    pub pods: Option<usize>,
    /// The socket shows the called address as its peer.
    #[serde(default = "yes")]
    pub same_peer: bool,
}

/// With 1000 calls and a share of 0.8 more than seven standard deviations.
const TOLERANCE: f64 = 0.1;

impl Default for Expect {
    fn default() -> Self {
        Self {
            max_failed: 0,
            nobody: false,
            clusters: Vec::new(),
            min_share: 0.0,
            shares: BTreeMap::new(),
            pods: None,
            same_peer: true,
        }
    }
}

impl Expect {
    /// What differs from the expectation; empty if nothing does.
    pub fn differences(&self, report: &CallReport) -> Vec<String> {
        let mut differences = Vec::new();
        let answered: u64 = report.by_cluster.values().sum();
        if report.calls == 0 {
            differences.push("no call was made".to_owned());
        }
        if self.nobody {
            if answered > 0 {
                differences.push(format!("{answered} calls were answered, expected none"));
            }
            return differences;
        }
        if report.failed > self.max_failed {
            differences.push(format!("{} calls failed, at most {} may", report.failed, self.max_failed));
        }
        if answered == 0 {
            differences.push("nobody answered".to_owned());
        }
        if !self.clusters.is_empty() {
            let expected: BTreeSet<&str> = self.clusters.iter().map(String::as_str).collect();
            let actual: BTreeSet<&str> = report.by_cluster.keys().map(String::as_str).collect();
            if expected != actual {
                differences.push(format!("answered by {actual:?}, expected {expected:?}"));
            }
        }
        for (cluster, &count) in &report.by_cluster {
            #[expect(clippy::cast_precision_loss, reason = "shares of a few thousand calls")]
            let share = count as f64 / answered as f64;
            if share < self.min_share {
                differences
                    .push(format!("{cluster} gave {share:.2} of the answers, expected {}", self.min_share));
            }
        }
        for (cluster, expected) in &self.shares {
            let count = report.by_cluster.get(cluster).copied().unwrap_or(0);
            #[expect(clippy::cast_precision_loss, reason = "shares of a few thousand calls")]
            let share = count as f64 / answered as f64;
            if answered == 0 || (share - expected).abs() > TOLERANCE {
                differences.push(format!("{cluster} gave {share:.2} of the answers, expected {expected}"));
            }
        }
        if let Some(pods) = self.pods
            && report.by_pod.len() != pods
        {
            differences.push(format!("{} pods answered, expected {pods}", report.by_pod.len()));
        }
        if self.same_peer && report.peername_differs > 0 {
            differences
                .push(format!("{} sockets showed another peer than the one called", report.peername_differs));
        }
        differences
    }
}

fn yes() -> bool {
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(alpha: u64, beta: u64, failed: u64) -> CallReport {
        let by_cluster = [("alpha", alpha), ("beta", beta)]
            .into_iter()
            .filter(|(_, count)| *count > 0)
            .map(|(name, count)| (name.to_owned(), count))
            .collect();
        CallReport { calls: alpha + beta + failed, failed, by_cluster, ..CallReport::default() }
    }

    fn both(min_share: f64) -> Expect {
        Expect { clusters: vec!["alpha".into(), "beta".into()], min_share, ..Expect::default() }
    }

    #[test]
    fn shares_have_a_tolerance_and_need_answers() {
        let of = |alpha: f64, beta: f64| Expect {
            shares: [("alpha".to_owned(), alpha), ("beta".to_owned(), beta)].into(),
            ..Expect::default()
        };
        assert_eq!(of(0.8, 0.2).differences(&report(75, 25, 0)).len(), 0);
        assert_eq!(of(0.8, 0.2).differences(&report(60, 40, 0)).len(), 2);
        assert_eq!(of(1.0, 0.0).differences(&report(10, 0, 0)).len(), 0);
        assert!(of(0.0, 0.0).differences(&report(0, 0, 0)).len() > 2, "nobody has answered");
    }

    #[test]
    fn both_clusters() {
        assert!(both(0.3).differences(&report(90, 110, 0)).is_empty());
        assert_eq!(both(0.3).differences(&report(10, 190, 0)).len(), 1, "too small a share");
        assert!(!both(0.0).differences(&report(200, 0, 0)).is_empty(), "one is silent");
        assert!(!both(0.0).differences(&report(90, 109, 1)).is_empty(), "one failed");
    }

    #[test]
    fn nothing_measured_is_never_as_expected() {
        assert!(!Expect::default().differences(&report(0, 0, 0)).is_empty());
        assert!(!Expect { nobody: true, ..Expect::default() }.differences(&report(0, 0, 0)).is_empty());
        assert!(!Expect { max_failed: 9, ..Expect::default() }.differences(&report(0, 0, 5)).is_empty());
    }

    #[test]
    fn nobody() {
        let expect = Expect { nobody: true, ..Expect::default() };
        assert!(expect.differences(&report(0, 0, 5)).is_empty());
        assert!(!expect.differences(&report(1, 0, 5)).is_empty());
    }

    #[test]
    fn another_peer_shows() {
        let report = CallReport { peername_differs: 1, ..report(1, 0, 0) };
        assert!(!Expect::default().differences(&report).is_empty());
        assert!(Expect { same_peer: false, ..Expect::default() }.differences(&report).is_empty());
    }
}
