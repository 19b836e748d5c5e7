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
use std::fmt::{self, Display};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::{fs, io};

use ipnet::IpNet;
use serde::Deserialize;
use serde::de::{Deserializer, SeqAccess, Visitor};
use serde_saphyr::Spanned;

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
#[error(
    "{}{}{reason}",
    path.as_ref().map(|path| format!("{}: ", path.display())).unwrap_or_default(),
    line.map(|line| format!("line {line}: ")).unwrap_or_default()
)]
pub struct PolicyFileError {
    path: Option<PathBuf>,
    /// None where `reason` says it, or if it cannot be told.
    line: Option<u64>,
    reason: String,
}

impl PolicyFile {
    /// Reads a file.
    ///
    /// # Errors
    /// It cannot be read, or is no policy; the text has the path and, where there is one, the line.
    pub fn load(path: &Path) -> Result<Self, PolicyFileError> {
        let at = |error| PolicyFileError { path: Some(path.into()), ..error };
        let text =
            read(path).map_err(|error| at(PolicyFileError::new(format!("cannot be read: {error}"))))?;
        Self::parse(&text).map_err(at)
    }

    /// Reads the text of such a file.
    ///
    /// # Errors
    /// It is no policy.
    pub fn parse(text: &str) -> Result<Self, PolicyFileError> {
        let Written { default, clusters } = Written::read(text)?;
        let mut rules = Rules::default();
        default.unwrap_or_default().apply(&mut rules).map_err(|error| error.under("default"))?;
        let clusters = clusters.into_iter().flatten().map(|(name, entry)| {
            let at = format!("clusters.{name}");
            let line = entry.as_ref().and_then(line_of);
            let name = name.parse().map_err(|error| PolicyFileError {
                line,
                ..PolicyFileError::new(format!("{at}: {error}"))
            })?;
            let mut rules = rules.clone();
            let entry = entry.map(|entry| entry.value).unwrap_or_default();
            entry.apply(&mut rules).map_err(|error| error.under(&at))?;
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
    /// On which line the mistake is, from 1; none if [`Self::reason`] says it, or if it cannot be told.
    pub fn line(&self) -> Option<u64> {
        self.line
    }

    /// What is wrong, without file and line.
    pub fn reason(&self) -> &str {
        &self.reason
    }

    fn new(reason: String) -> Self {
        Self { path: None, line: None, reason }
    }

    fn at<T>(self, place: &Spanned<T>) -> Self {
        Self { line: line_of(place), ..self }
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

/// The file as its author wrote it.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Written {
    pub(super) default: Option<Entry>,
    pub(super) clusters: Option<BTreeMap<String, Option<Spanned<Entry>>>>,
}

/// One cluster's part. What is not there is as before.
#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Entry {
    mode: Option<Mode>,
    pub(super) pod_cidrs: Option<Spanned<WordOrList>>,
    pub(super) node_cidrs: Option<Spanned<WordOrList>>,
    refuse_identities: Option<Vec<Spanned<NameOrNumber>>>,
    pub(super) namespaces: Option<Names>,
    pub(super) services: Option<Names>,
    quotas: Option<BTreeMap<String, Spanned<usize>>>,
    max_record_bytes: Option<Spanned<usize>>,
    max_backends: Option<usize>,
}

pub(super) enum WordOrList {
    Word(String),
    List(Vec<Spanned<String>>),
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "an identity is a name such as ingress, or a number")]
enum NameOrNumber {
    Number(u32),
    Name(String),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Names {
    pub(super) allow: Option<Vec<Spanned<String>>>,
    #[serde(default)]
    pub(super) deny: Vec<Spanned<String>>,
}

impl Written {
    pub(super) fn read(text: &str) -> Result<Self, PolicyFileError> {
        if text.len() as u64 > MAX_FILE {
            let length = text.len();
            return Err(PolicyFileError::new(format!("it has {length} bytes; at most {MAX_FILE} are read")));
        }
        let file: Option<Self> = serde_saphyr::from_str(text).map_err(|error| {
            let line = error.location().map(|place| place.line()).filter(|line| *line > 0);
            let text = error.without_snippet().to_string();
            let place = line.and_then(|line| text.rfind(&format!(" at line {line}, column ")));
            PolicyFileError { path: None, line, reason: with_hint(&text[..place.unwrap_or(text.len())]) }
        })?;
        Ok(file.unwrap_or_default())
    }
}

impl<'de> Deserialize<'de> for WordOrList {
    /// By hand: serde's own choice between forms forgets on which lines the items stand.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = WordOrList;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("CIDRs as a list, or a word such as any")
            }
            fn visit_str<E: serde::de::Error>(self, word: &str) -> Result<WordOrList, E> {
                Ok(WordOrList::Word(word.to_owned()))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<WordOrList, A::Error> {
                let mut list = Vec::new();
                while let Some(item) = items.next_element()? {
                    list.push(item);
                }
                Ok(WordOrList::List(list))
            }
        }
        deserializer.deserialize_any(Either)
    }
}

impl Entry {
    fn apply(self, rules: &mut Rules) -> Result<(), PolicyFileError> {
        if let Some(mode) = self.mode {
            rules.mode = mode;
        }
        match self.pod_cidrs {
            None => {}
            Some(written) => {
                rules.pod_cidrs = match &written.value {
                    WordOrList::List(cidrs) => PodCidrs::Listed(nets("pod-cidrs", cidrs)?),
                    WordOrList::Word(word) => match word.as_str() {
                        "any" => PodCidrs::Any,
                        "nodes" => PodCidrs::Nodes,
                        other => {
                            let error = bad("pod-cidrs", other, "write any, nodes, or a list of CIDRs");
                            return Err(error.at(&written));
                        }
                    },
                }
            }
        }
        match self.node_cidrs {
            None => {}
            Some(written) => {
                rules.node_cidrs = match &written.value {
                    WordOrList::List(cidrs) => Some(nets("node-cidrs", cidrs)?),
                    WordOrList::Word(word) if word == "any" => None,
                    WordOrList::Word(word) => {
                        return Err(bad("node-cidrs", word, "write any, or a list of CIDRs").at(&written));
                    }
                }
            }
        }
        if let Some(identities) = self.refuse_identities {
            rules.refused_identities =
                identities.iter().map(NameOrNumber::reserved).collect::<Result<_, _>>()?;
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
                bad("quotas", &name, &did_you_mean(&name, &known)).at(&records)
            })?;
            rules.quotas.set(kind, records.value);
        }
        if let Some(written) = self.max_record_bytes {
            let bytes = written.value;
            if bytes > MAX_VALUE {
                let hint = format!("values beyond {MAX_VALUE} bytes are never read");
                return Err(bad("max-record-bytes", bytes, &hint).at(&written));
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
    fn reserved(written: &Spanned<Self>) -> Result<u32, PolicyFileError> {
        const KEY: &str = "refuse-identities";
        match &written.value {
            Self::Number(id) if *id > 0 && Identity(*id).is_reserved() => Ok(*id),
            Self::Number(id) => Err(bad(KEY, id, "reserved identities are 1 to 255").at(written)),
            Self::Name(name) => Identity::of_reserved_name(name).map(|id| id.0).ok_or_else(|| {
                let known: Vec<_> = (1..256).map_while(|id| Identity(id).reserved_name()).collect();
                bad(KEY, name, &did_you_mean(name, &known)).at(written)
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
        let patterns = |names: Vec<Spanned<String>>| {
            let parse = |written: &Spanned<String>| {
                let name = &written.value;
                check(name).map_err(|hint| bad(key, name, hint).at(written))?;
                Pattern::from_str(name)
                    .map_err(|error| PolicyFileError::new(format!("{key}: {error}")).at(written))
            };
            names.iter().map(parse).collect::<Result<Vec<_>, _>>()
        };
        Ok(NameFilter { allow: self.allow.map(patterns).transpose()?, deny: patterns(self.deny)? })
    }
}

fn nets(key: &str, cidrs: &[Spanned<String>]) -> Result<Vec<IpNet>, PolicyFileError> {
    let parse = |written: &Spanned<String>| {
        let cidr = &written.value;
        let net: IpNet =
            cidr.parse().map_err(|_| bad(key, cidr, "write a CIDR such as 10.2.0.0/16").at(written))?;
        if net.trunc() != net {
            return Err(bad(key, cidr, &format!("write {} if that is meant", net.trunc())).at(written));
        }
        Ok(net)
    };
    cidrs.iter().map(parse).collect()
}

/// The line on which something is written; none if the parser cannot tell.
pub(super) fn line_of<T>(written: &Spanned<T>) -> Option<u64> {
    Some(written.referenced.line()).filter(|line| *line > 0)
}

fn bad(key: &str, value: impl Display, hint: &str) -> PolicyFileError {
    PolicyFileError::new(format!("{key}: {value} is not possible; {hint}"))
}

/// serde's text about an unknown key, with the key that was probably meant in place of all there are.
fn with_hint(error: &str) -> String {
    let parts = error
        .split_once(", expected ")
        .and_then(|(start, known)| Some((start, start.split('`').nth(1)?, known)));
    let Some((start, unknown, known)) = parts else { return error.to_owned() };
    let known = known.trim_start_matches("one of ").split(|c: char| !(c.is_ascii_lowercase() || c == '-'));
    let known: Vec<_> = known.filter(|word| !word.is_empty() && *word != "or").collect();
    format!("{start}; {}", did_you_mean(unknown, &known))
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
    fn mistakes_are_told_with_their_lines() {
        for (text, line) in [
            ("clusters:\n  beta:\n    pod-cidrs:\n    - 10.2.0.0/16\n    - 10.3.0.1/16\n", 5),
            ("clusters:\n  beta:\n    node-cidrs: all\n", 3),
            ("clusters:\n  beta:\n    quotas:\n      nodes: 1\n      node: 2\n", 5),
            ("default:\n  refuse-identities:\n  - host\n  - hosst\n", 4),
            ("clusters:\n  beta:\n    services:\n      deny:\n      - shop/x\n      - orders\n", 6),
            ("default:\n  max-record-bytes: 99999999\n", 2),
        ] {
            let error = error(text);
            assert!(error.starts_with(&format!("line {line}: ")), "{text}: {error}");
        }
        assert!(error("default:\n  mode: enforce\n  pods: 1\n").starts_with("line 3: "));
        let syntax = error("default:\n  mode: [enforce\n");
        assert!(syntax.starts_with("line "), "{syntax}");
        let long = format!("# {}", "x".repeat(2 << 20));
        assert!(error(&long).contains("at most 1048576 are read"));
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
