//! The operator's file, as written and as checked.
//!
//! ```yaml
//! default:
//!   quotas: {nodes: 1000}
//! clusters:
//!   beta:
//!     pod-cidrs: [10.2.0.0/16]
//!     namespaces: {deny: [kube-system]}
//! ```
//!
//! What a cluster's entry says replaces what `default` says under the same key; of `quotas`, kind by kind.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::{fs, io};

use ipnet::IpNet;
use serde::Deserialize;

use super::pattern::{NameFilter, Pattern};
use super::rules::{Mode, PodCidrs, Rules};
use crate::cluster::{ClusterName, Identity};
use crate::key::Kind;
use crate::record::MAX_VALUE;

/// A policy is a page of text; what is larger is none.
const MAX_FILE: u64 = 1024 * 1024;

/// Rules for all clusters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicyFile {
    default: Arc<Rules>,
    clusters: BTreeMap<ClusterName, Arc<Rules>>,
}

/// A file that is no policy. The operator's to correct.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}{reason}", path.as_ref().map(|path| format!("{}: ", path.display())).unwrap_or_default())]
pub struct PolicyFileError {
    path: Option<PathBuf>,
    reason: String,
}

impl PolicyFile {
    /// Reads a file.
    ///
    /// # Errors
    /// It cannot be read, or is no policy; the text has the path and, where there is one, the line.
    pub fn load(path: &Path) -> Result<Self, PolicyFileError> {
        let at = |reason| PolicyFileError { path: Some(path.into()), reason };
        let text = read(path).map_err(|error| at(format!("cannot be read: {error}")))?;
        Self::parse(&text).map_err(|error| at(error.reason))
    }

    /// Reads the text of such a file.
    ///
    /// # Errors
    /// It is no policy.
    pub fn parse(text: &str) -> Result<Self, PolicyFileError> {
        let file: Option<Written> = serde_saphyr::from_str(text)
            .map_err(|error| PolicyFileError::new(with_hint(&error.without_snippet().to_string())))?;
        let Written { default, clusters } = file.unwrap_or_default();
        let mut rules = Rules::default();
        default.unwrap_or_default().apply(&mut rules).map_err(|error| error.under("default"))?;
        let clusters = clusters.into_iter().flatten().map(|(name, entry)| {
            let at = format!("clusters.{name}");
            let name = name.parse().map_err(|error| PolicyFileError::new(format!("{at}: {error}")))?;
            let mut rules = rules.clone();
            entry.unwrap_or_default().apply(&mut rules).map_err(|error| error.under(&at))?;
            Ok((name, Arc::new(rules)))
        });
        let clusters = clusters.collect::<Result<_, PolicyFileError>>()?;
        Ok(Self { default: Arc::new(rules), clusters })
    }

    /// The same, with all rules only audited.
    #[must_use]
    pub fn audited(self) -> Self {
        let audited = |rules: Arc<Rules>| Arc::new(Rules { mode: Mode::Audit, ..Rules::clone(&rules) });
        let clusters = self.clusters.into_iter().map(|(name, rules)| (name, audited(rules))).collect();
        Self { default: audited(self.default), clusters }
    }

    /// The rules for one remote cluster.
    pub fn rules_for(&self, cluster: &ClusterName) -> Arc<Rules> {
        self.clusters.get(cluster).unwrap_or(&self.default).clone()
    }
}

impl PolicyFileError {
    fn new(reason: String) -> Self {
        Self { path: None, reason }
    }

    fn under(self, place: &str) -> Self {
        Self { reason: format!("{place}.{}", self.reason), ..self }
    }
}

fn read(path: &Path) -> io::Result<String> {
    let length = fs::metadata(path)?.len();
    if length > MAX_FILE {
        return Err(io::Error::other(format!("it has {length} bytes; at most {MAX_FILE} are read")));
    }
    fs::read_to_string(path)
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    default: Option<Entry>,
    clusters: Option<BTreeMap<String, Option<Entry>>>,
}

/// One cluster's part. What is not there is as before.
#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Entry {
    mode: Option<Mode>,
    pod_cidrs: Option<WordOrList>,
    node_cidrs: Option<WordOrList>,
    refuse_identities: Option<Vec<NameOrNumber>>,
    namespaces: Option<Names>,
    services: Option<Names>,
    quotas: Option<BTreeMap<String, usize>>,
    max_record_bytes: Option<usize>,
    max_backends: Option<usize>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "CIDRs are a list, or a word such as any")]
enum WordOrList {
    Word(String),
    List(Vec<String>),
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "an identity is a name such as ingress, or a number")]
enum NameOrNumber {
    Number(u32),
    Name(String),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Names {
    allow: Option<Vec<String>>,
    #[serde(default)]
    deny: Vec<String>,
}

impl Entry {
    fn apply(self, rules: &mut Rules) -> Result<(), PolicyFileError> {
        if let Some(mode) = self.mode {
            rules.mode = mode;
        }
        match self.pod_cidrs {
            None => {}
            Some(WordOrList::List(cidrs)) => rules.pod_cidrs = PodCidrs::Listed(nets("pod-cidrs", &cidrs)?),
            Some(WordOrList::Word(word)) => {
                rules.pod_cidrs = match word.as_str() {
                    "any" => PodCidrs::Any,
                    "nodes" => PodCidrs::Nodes,
                    other => return Err(bad("pod-cidrs", other, "write any, nodes, or a list of CIDRs")),
                }
            }
        }
        match self.node_cidrs {
            None => {}
            Some(WordOrList::List(cidrs)) => rules.node_cidrs = Some(nets("node-cidrs", &cidrs)?),
            Some(WordOrList::Word(word)) if word == "any" => rules.node_cidrs = None,
            Some(WordOrList::Word(word)) => {
                return Err(bad("node-cidrs", &word, "write any, or a list of CIDRs"));
            }
        }
        if let Some(identities) = self.refuse_identities {
            rules.refused_identities =
                identities.into_iter().map(NameOrNumber::reserved).collect::<Result<_, _>>()?;
        }
        if let Some(names) = self.namespaces {
            rules.namespaces = names.filter("namespaces", |_| Ok(()))?;
        }
        if let Some(names) = self.services {
            rules.services = names.filter("services", |name| match name.split('/').count() {
                2 => Ok(()),
                _ => Err("write namespace/name"),
            })?;
        }
        for (name, records) in self.quotas.into_iter().flatten() {
            let kinds = Kind::ALL.into_iter().filter(|kind| !kind.is_private());
            let kind = kinds.clone().find(|kind| kind.as_str() == name).ok_or_else(|| {
                let known: Vec<_> = kinds.map(Kind::as_str).collect();
                bad("quotas", &name, &did_you_mean(&name, &known))
            })?;
            rules.quotas.set(kind, records);
        }
        if let Some(bytes) = self.max_record_bytes {
            if bytes > MAX_VALUE {
                let hint = format!("values beyond {MAX_VALUE} bytes are never read");
                return Err(bad("max-record-bytes", bytes, &hint));
            }
            rules.max_record_bytes = bytes;
        }
        if let Some(backends) = self.max_backends {
            rules.max_backends = backends;
        }
        Ok(())
    }
}

impl NameOrNumber {
    fn reserved(self) -> Result<u32, PolicyFileError> {
        const KEY: &str = "refuse-identities";
        match self {
            Self::Number(id) if id > 0 && Identity(id).is_reserved() => Ok(id),
            Self::Number(id) => Err(bad(KEY, id, "reserved identities are 1 to 255")),
            Self::Name(name) => Identity::of_reserved_name(&name).map(|id| id.0).ok_or_else(|| {
                let known: Vec<_> = (1..256).map_while(|id| Identity(id).reserved_name()).collect();
                bad(KEY, &name, &did_you_mean(&name, &known))
            }),
        }
    }
}

impl Names {
    fn filter(
        self,
        key: &str,
        check: impl Fn(&str) -> Result<(), &'static str>,
    ) -> Result<NameFilter, PolicyFileError> {
        let patterns = |names: Vec<String>| {
            let parse = |name: String| {
                check(&name).map_err(|hint| bad(key, &name, hint))?;
                Pattern::from_str(&name).map_err(|error| PolicyFileError::new(format!("{key}: {error}")))
            };
            names.into_iter().map(parse).collect::<Result<Vec<_>, _>>()
        };
        Ok(NameFilter { allow: self.allow.map(patterns).transpose()?, deny: patterns(self.deny)? })
    }
}

fn nets(key: &str, cidrs: &[String]) -> Result<Vec<IpNet>, PolicyFileError> {
    let parse = |cidr: &String| {
        let net: IpNet = cidr.parse().map_err(|_| bad(key, cidr, "write a CIDR such as 10.2.0.0/16"))?;
        if net.trunc() != net {
            return Err(bad(key, cidr, &format!("write {} if that is meant", net.trunc())));
        }
        Ok(net)
    };
    cidrs.iter().map(parse).collect()
}

fn bad(key: &str, value: impl Display, hint: &str) -> PolicyFileError {
    PolicyFileError::new(format!("{key}: {value} is not possible; {hint}"))
}

/// serde's text about an unknown key, with the key that was probably meant in place of all there are.
fn with_hint(error: &str) -> String {
    let parts = error.split_once(", expected ").and_then(|(start, rest)| {
        let (known, place) = rest.split_once(" at line ")?;
        Some((start, start.split('`').nth(1)?, known, place))
    });
    let Some((start, unknown, known, place)) = parts else { return error.to_owned() };
    let known = known.trim_start_matches("one of ").split(|c: char| !(c.is_ascii_lowercase() || c == '-'));
    let known: Vec<_> = known.filter(|word| !word.is_empty() && *word != "or").collect();
    format!("{start} at line {place}; {}", did_you_mean(unknown, &known))
}

fn did_you_mean(word: &str, known: &[&str]) -> String {
    let nearest = known.iter().map(|known| (distance(word, known), *known)).min();
    match nearest {
        Some((distance, nearest)) if distance <= nearest.len() / 2 => format!("did you mean {nearest}?"),
        _ => format!("there are {}", known.join(", ")),
    }
}

/// Letters to insert, delete or replace on the way from one word to the other (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().take(64).enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        PolicyFile::parse(text).unwrap_err().to_string()
    }

    #[test]
    fn a_clusters_entry_replaces_the_default_key_by_key() {
        let file = PolicyFile::parse(
            "default:
  pod-cidrs: nodes
  quotas: {nodes: 10, ip: 1000}
  refuse-identities: [ingress, 7]
clusters:
  beta:
    mode: audit
    pod-cidrs: [10.2.0.0/16, 'fd00:2::/32']
    node-cidrs: [192.0.2.0/24]
    quotas: {ip: 5}
    namespaces: {allow: ['shop', 'web-*']}
    services: {deny: ['shop/internal-*']}
    max-record-bytes: 65536
    max-backends: 100
  gamma:
",
        )
        .unwrap();
        let gamma = file.rules_for(&"gamma".parse().unwrap());
        assert_eq!(gamma, file.rules_for(&"unknown".parse().unwrap()));
        assert_eq!((gamma.quotas.of(Kind::Nodes), gamma.quotas.of(Kind::Ip)), (10, 1000));
        let beta = file.rules_for(&"beta".parse().unwrap());
        assert_eq!((beta.quotas.of(Kind::Nodes), beta.quotas.of(Kind::Ip)), (10, 5));
        assert_eq!(beta.refused_identities, [7, 8].into());
        assert_eq!((beta.mode, gamma.mode), (Mode::Audit, Mode::Enforce));
        assert!(matches!(&beta.pod_cidrs, PodCidrs::Listed(cidrs) if cidrs.len() == 2));
        assert_eq!(gamma.pod_cidrs, PodCidrs::Nodes);
        assert!(beta.namespaces.admits("web-1") && !beta.namespaces.admits("kube-system"));
        assert!(beta.services.admits("shop/orders") && !beta.services.admits("shop/internal-x"));
        let audited = file.audited();
        for name in ["beta", "gamma", "unknown"] {
            assert_eq!(audited.rules_for(&name.parse().unwrap()).mode, Mode::Audit);
        }
        assert_eq!(audited.rules_for(&"gamma".parse().unwrap()).quotas, gamma.quotas);
    }

    #[test]
    fn an_empty_file_allows_what_is_plausible() {
        for text in ["", "# nothing\n", "default:\nclusters:\n"] {
            assert_eq!(PolicyFile::parse(text), Ok(PolicyFile::default()), "{text:?}");
        }
    }

    #[test]
    fn mistakes_are_named_with_what_was_meant() {
        for (text, parts) in [
            ("default: {pod-cidr: any}", ["pod-cidr", "did you mean pod-cidrs?"]),
            ("cluster: {}", ["line 1", "did you mean clusters?"]),
            ("default: {quotas: {node: 1}}", ["default.quotas: node", "did you mean nodes?"]),
            ("default: {refuse-identities: [ingres]}", ["refuse-identities", "did you mean ingress?"]),
            ("default: {refuse-identities: [256]}", ["256", "1 to 255"]),
            ("clusters: {beta: {pod-cidrs: [10.2.0.1/16]}}", ["clusters.beta.pod-cidrs", "10.2.0.0/16"]),
            ("clusters: {beta: {services: {deny: [orders]}}}", ["orders", "namespace/name"]),
            ("clusters: {Beta: {}}", ["clusters.Beta", "not a cluster name"]),
            ("clusters: {beta: {mode: warn}}", ["warn", "audit"]),
            ("clusters: {beta: {pod-cidrs: all}}", ["pod-cidrs: all", "any, nodes"]),
            ("clusters: {beta: {max-record-bytes: 99999999}}", ["99999999", "1572864"]),
        ] {
            let error = error(text);
            assert!(parts.iter().all(|part| error.contains(part)), "{text}: {error}");
        }
        let missing = PolicyFile::load(Path::new("/nonexistent/policy.yaml")).unwrap_err().to_string();
        assert!(missing.starts_with("/nonexistent/policy.yaml: cannot be read"), "{missing}");
    }
}
