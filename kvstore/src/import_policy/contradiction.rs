//! What in a policy cannot be meant: a file may be one, and yet let in nothing, or the same to two clusters.
//!
//! Agents obey such a file to the letter. Whoever writes one is told.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr as _;

use ipnet::IpNet;
use serde_saphyr::Spanned;

use super::file::{Entry, Names, PolicyFile, PolicyFileError, WordOrList, Written, line_of};
use super::pattern::Pattern;

/// Contradictions that are told.
const MOST: usize = 100;

/// Two parts of a policy that do not go together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contradiction {
    /// Line of the later one, from 1; none if it cannot be told.
    pub line: Option<u64>,
    /// A sentence.
    pub text: String,
}

impl fmt::Display for Contradiction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "line {line}: {}", self.text),
            None => f.write_str(&self.text),
        }
    }
}

/// A prefix that a cluster has, and where that is written.
struct Claim<'a> {
    net: IpNet,
    cluster: &'a str,
    /// `pod-cidrs` or `node-cidrs`.
    key: &'static str,
    line: Option<u64>,
}

impl PolicyFile {
    /// What in the text of a policy contradicts itself, in order of lines; the first hundred.
    ///
    /// # Errors
    /// It is no policy at all.
    pub fn contradictions(text: &str) -> Result<Vec<Contradiction>, PolicyFileError> {
        Self::parse(text)?;
        let Written { default, clusters } = Written::read(text)?;
        let mut found = Vec::new();
        let mut claims = Vec::new();
        if let Some(entry) = &default {
            entry.contradictions("default", &mut found);
        }
        let clusters = clusters.unwrap_or_default();
        for (name, entry) in clusters.iter().filter_map(|(name, entry)| Some((name, &entry.as_ref()?.value)))
        {
            entry.contradictions(&format!("clusters.{name}"), &mut found);
            claims.extend(entry.claims(name));
        }
        overlaps(claims, &mut found);
        found.sort_by_key(|contradiction| contradiction.line);
        found.truncate(MOST);
        Ok(found)
    }
}

impl Entry {
    fn claims<'a>(&self, cluster: &'a str) -> impl Iterator<Item = Claim<'a>> {
        let keys = [("pod-cidrs", &self.pod_cidrs), ("node-cidrs", &self.node_cidrs)];
        keys.into_iter().flat_map(move |(key, cidrs)| {
            let list: &[Spanned<String>] = match cidrs.as_ref().map(|written| &written.value) {
                Some(WordOrList::List(list)) => list,
                _ => &[],
            };
            list.iter().filter_map(move |written| {
                Some(Claim { net: written.value.parse().ok()?, cluster, key, line: line_of(written) })
            })
        })
    }

    fn contradictions(&self, place: &str, found: &mut Vec<Contradiction>) {
        for (key, names) in [("namespaces", &self.namespaces), ("services", &self.services)] {
            let Some(Names { allow: Some(allow), deny }) = names else { continue };
            let deny: Vec<_> = deny.iter().filter_map(|name| Pattern::from_str(&name.value).ok()).collect();
            for written in allow {
                if let Some(denied) = deny.iter().find(|deny| covers(deny, &written.value)) {
                    let allowed = &written.value;
                    found.push(Contradiction {
                        line: line_of(written),
                        text: format!(
                            "{place}.{key}: {allowed} is allowed, but {denied} is denied, which wins"
                        ),
                    });
                }
            }
        }
        let services = self.services.as_ref().and_then(|names| names.allow.as_deref()).unwrap_or_default();
        for written in services {
            let Some((namespace, _)) = written.value.split_once('/').filter(|(ns, _)| !ns.contains('*'))
            else {
                continue;
            };
            if self.namespaces.as_ref().is_some_and(|names| !admits(names, namespace)) {
                let service = &written.value;
                found.push(Contradiction {
                    line: line_of(written),
                    text: format!("{place}.services: {service} is allowed, but namespace {namespace} is not"),
                });
            }
        }
    }
}

/// Whether a pattern fits all names that another one does. Told only where that is plain to see.
fn covers(pattern: &Pattern, other: &str) -> bool {
    pattern.to_string() == other
        || (!other.contains('*') && pattern.matches(other))
        || pattern.to_string() == "*"
}

fn admits(names: &Names, namespace: &str) -> bool {
    let fits = |patterns: &[Spanned<String>]| {
        patterns.iter().any(|written| Pattern::from_str(&written.value).is_ok_and(|p| p.matches(namespace)))
    };
    names.allow.as_deref().is_none_or(fits) && !fits(&names.deny)
}

/// Pods of one cluster cannot be where another one has its pods or nodes. Nodes of several clusters may
/// share a network.
fn overlaps(mut claims: Vec<Claim<'_>>, found: &mut Vec<Contradiction>) {
    // Whatever overlaps with a prefix comes right behind it, up to the prefix's end.
    let start = |claim: &Claim<'_>| (claim.net.network(), claim.net.prefix_len());
    claims.sort_by_key(start);
    for (at, wide) in claims.iter().enumerate() {
        let end: IpAddr = wide.net.broadcast();
        let inside = claims[at + 1..].iter().take_while(|other| other.net.network() <= end);
        for other in inside.filter(|other| wide.net.contains(&other.net) && other.cluster != wide.cluster) {
            if (wide.key, other.key) == ("node-cidrs", "node-cidrs") {
                continue;
            }
            if found.len() > MOST {
                return;
            }
            let (first, second) = if wide.line <= other.line { (wide, other) } else { (other, wide) };
            let first_line = first.line.map(|line| format!(" of line {line}")).unwrap_or_default();
            found.push(Contradiction {
                line: second.line,
                text: format!(
                    "clusters.{}.{}: {} overlaps with {} of {}.{}{first_line}",
                    second.cluster, second.key, second.net, first.net, first.cluster, first.key
                ),
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Vec<String> {
        PolicyFile::contradictions(text).unwrap().iter().map(Contradiction::to_string).collect()
    }

    #[test]
    fn a_sound_policy_has_none() {
        let sound = "default: {pod-cidrs: nodes, namespaces: {deny: [kube-system]}}
clusters:
  beta: {pod-cidrs: [10.2.0.0/16, 10.2.3.0/24], node-cidrs: [192.0.2.0/24]}
  gamma: {pod-cidrs: [10.3.0.0/16], node-cidrs: [192.0.2.0/25], services: {allow: ['shop/*'], deny: [shop/x]}}
  delta:
";
        assert_eq!(of(sound), [""; 0]);
        assert_eq!(of(""), [""; 0]);
        assert!(PolicyFile::contradictions("clusters: {beta: {pods: 1}}").is_err());
    }

    #[test]
    fn pods_of_two_clusters_cannot_be_in_one_place() {
        let text = "clusters:
  beta:
    pod-cidrs: [10.2.0.0/16, 'fd00:2::/32']
    node-cidrs: [10.9.1.0/24]
  gamma:
    pod-cidrs:
    - 10.3.0.0/16
    - 10.2.128.0/17
    - 10.9.0.0/16
    - fd00::/16
";
        assert_eq!(
            of(text),
            [
                "line 8: clusters.gamma.pod-cidrs: 10.2.128.0/17 overlaps with 10.2.0.0/16 of beta.pod-cidrs of line 3",
                "line 9: clusters.gamma.pod-cidrs: 10.9.0.0/16 overlaps with 10.9.1.0/24 of beta.node-cidrs of line 4",
                "line 10: clusters.gamma.pod-cidrs: fd00::/16 overlaps with fd00:2::/32 of beta.pod-cidrs of line 3",
            ]
        );
    }

    #[test]
    fn what_is_allowed_and_denied_is_told() {
        let text = "default:
  namespaces:
    allow: [shop, 'web-*', pay]
    deny: ['pa*', 'web-*']
clusters:
  beta:
    namespaces: {deny: [kube-system]}
    services:
      allow:
      - kube-system/dns
      - shop/orders
      - '*/metrics'
";
        assert_eq!(
            of(text),
            [
                "line 3: default.namespaces: web-* is allowed, but web-* is denied, which wins",
                "line 3: default.namespaces: pay is allowed, but pa* is denied, which wins",
                "line 10: clusters.beta.services: kube-system/dns is allowed, but namespace kube-system is not",
            ]
        );
    }

    #[test]
    fn many_are_cut() {
        let nets: Vec<_> = (0..200).map(|n| format!("10.{n}.0.0/16")).collect();
        let nets = nets.join(", ");
        let text = format!("clusters: {{beta: {{pod-cidrs: [{nets}]}}, gamma: {{pod-cidrs: [{nets}]}}}}");
        assert_eq!(of(&text).len(), MOST);
    }
}
