//! Security labels and the text in which identities carry them: `source:key=value;` for each label,
//! sorted by key, always with the trailing `;`.

use std::collections::BTreeMap;
use std::fmt;

/// The label that names the cluster of an identity; every identity of a mesh has it.
pub const CLUSTER_LABEL: &str = "io.cilium.k8s.policy.cluster";
/// Source of labels that come from Kubernetes objects (or from manifests in their stead).
pub const SOURCE_K8S: &str = "k8s";
/// Source of a label that names none.
const SOURCE_UNSPEC: &str = "unspec";

/// One label.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Label {
    /// Where the label comes from: `k8s`, `reserved`, `cidr`, ...
    pub source: String,
    /// Key, never empty.
    pub key: String,
    /// Value, may be empty.
    pub value: String,
}

/// A set of labels, at most one for each key.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Labels(pub BTreeMap<String, Label>);

impl Labels {
    /// Parses the text of an identity. Empty parts (the tail after the last `;`) are ignored, a missing
    /// source reads as `unspec`, a missing `=value` as an empty value.
    ///
    /// # Errors
    /// A label without key, or two labels with the same key: which of them meant the identity would be
    /// a guess.
    pub fn parse(text: &str) -> Result<Self, LabelsError> {
        let mut labels = BTreeMap::new();
        for part in text.split(';').filter(|part| !part.is_empty()) {
            let label = parse_label(part)?;
            if let Some(twice) = labels.insert(label.key.clone(), label) {
                return Err(LabelsError::Twice(shorten(&twice.key)));
            }
        }
        Ok(Self(labels))
    }

    /// Adds or replaces a label.
    pub fn insert(&mut self, source: &str, key: &str, value: &str) {
        let label = Label { source: source.into(), key: key.into(), value: value.into() };
        self.0.insert(key.into(), label);
    }

    /// The label with this key.
    pub fn find(&self, key: &str) -> Option<&Label> {
        self.0.get(key)
    }

    /// Name of the cluster according to the labels, if they name one as Kubernetes would.
    pub fn cluster(&self) -> Option<&str> {
        self.find(CLUSTER_LABEL).filter(|label| label.source == SOURCE_K8S).map(|label| label.value.as_str())
    }

    /// The labels in order of their keys.
    pub fn iter(&self) -> impl Iterator<Item = &Label> {
        self.0.values()
    }
}

fn parse_label(part: &str) -> Result<Label, LabelsError> {
    // A ':' behind the '=' belongs to the value.
    let (source, rest) = match (part.find(':'), part.find('=')) {
        (Some(colon), equals) if equals.is_none_or(|equals| colon < equals) => {
            (&part[..colon], &part[colon + 1..])
        }
        _ => ("", part),
    };
    let (key, value) = rest.split_once('=').unwrap_or((rest, ""));
    if key.is_empty() {
        return Err(LabelsError::NoKey(shorten(part)));
    }
    let source = if source.is_empty() { SOURCE_UNSPEC } else { source };
    Ok(Label { source: source.into(), key: key.into(), value: value.into() })
}

fn shorten(text: &str) -> String {
    text.chars().take(64).collect()
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}={}", self.source, self.key, self.value)
    }
}

impl fmt::Display for Labels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.iter().try_for_each(|label| write!(f, "{label};"))
    }
}

impl FromIterator<Label> for Labels {
    fn from_iter<I: IntoIterator<Item = Label>>(labels: I) -> Self {
        Self(labels.into_iter().map(|label| (label.key.clone(), label)).collect())
    }
}

/// A text that is not a set of labels.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LabelsError {
    /// A part without key.
    #[error("label {0:?} has no key")]
    NoKey(String),
    /// The same key in two parts.
    #[error("label key {0:?} occurs twice")]
    Twice(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_comes_back_as_it_was() {
        let text = "k8s:app=web;reserved:host=;k8s:io.cilium.k8s.policy.cluster=alpha;";
        let labels = Labels::parse(text).unwrap();
        assert_eq!(labels.to_string(), text);
        assert_eq!(labels.cluster(), Some("alpha"));
    }

    #[test]
    fn sources_and_values_may_be_missing_or_contain_separators() {
        let labels = Labels::parse("app;a=b:c=d;x:y").unwrap();
        let read: Vec<_> = labels.iter().map(Label::to_string).collect();
        assert_eq!(read, ["unspec:a=b:c=d", "unspec:app=", "x:y="]);
    }

    #[test]
    fn the_cluster_label_counts_only_from_kubernetes() {
        assert_eq!(Labels::parse("any:io.cilium.k8s.policy.cluster=alpha;").unwrap().cluster(), None);
    }

    #[test]
    fn ambiguous_sets_are_refused() {
        assert_eq!(Labels::parse("k8s:a=b;any:a=c;"), Err(LabelsError::Twice("a".into())));
        assert_eq!(Labels::parse("k8s:=c;"), Err(LabelsError::NoKey("k8s:=c".into())));
    }
}
