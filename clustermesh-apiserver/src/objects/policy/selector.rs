//! Label selectors.

use std::collections::BTreeSet;

use clustermesh_kvstore::labels::SOURCE_K8S;
use clustermesh_kvstore::record::{Operator, Requirement};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

use crate::objects::meta::{Check, ObjectError};

/// Which source a label has in a selector.
#[derive(Clone, Copy)]
pub(super) enum Source {
    /// Kubernetes'; keys have no prefix.
    Kubernetes,
    /// The one that its prefix says, or any: `k8s:app`, `any:app`, `app`.
    Prefix,
}

impl Source {
    /// Source and key of a label.
    fn split(self, key: &str) -> (&str, &str) {
        match self {
            Self::Kubernetes => (SOURCE_K8S, key),
            Self::Prefix => match key.split_once(':') {
                Some(("any", key)) => ("", key),
                Some((source, key)) => (source, key),
                None => ("", key),
            },
        }
    }
}

/// What a selector asks for: first `matchLabels`, then `matchExpressions`.
pub(super) fn requirements(
    check: &Check<'_>,
    field: &str,
    selector: &LabelSelector,
    source: Source,
) -> Result<Vec<Requirement>, ObjectError> {
    let split = |key: &str| match source.split(key) {
        (_, "") => Err(check.error(field, format_args!("{key:?} is not the key of a label"))),
        (source, key) => Ok((source.to_owned(), key.to_owned())),
    };
    let mut requirements = Vec::new();
    for (key, value) in selector.match_labels.iter().flatten() {
        let (source, key) = split(key)?;
        requirements.push(Requirement::is(&source, &key, value));
    }
    for expression in selector.match_expressions.iter().flatten() {
        let (source, key) = split(&expression.key)?;
        let values: BTreeSet<String> = expression.values.iter().flatten().cloned().collect();
        let operator = match (expression.operator.as_str(), values.is_empty()) {
            ("In", false) => Operator::In,
            ("NotIn", false) => Operator::NotIn,
            ("Exists", true) => Operator::Exists,
            ("DoesNotExist", true) => Operator::DoesNotExist,
            (operator, _) => {
                let problem = format_args!(
                    "{key}: {operator:?}: use In or NotIn with values, Exists or DoesNotExist without"
                )
                .to_string();
                return Err(check.error(field, problem));
            }
        };
        requirements.push(Requirement { source, key, operator, values });
    }
    Ok(requirements)
}

/// Whether a selector says anything of a label of Kubernetes'.
pub(super) fn names(requirements: &[Requirement], key: &str) -> bool {
    requirements.iter().any(|it| it.key == key && (it.source.is_empty() || it.source == SOURCE_K8S))
}

/// That there is such a label of Kubernetes'.
pub(super) fn exists(key: &str) -> Requirement {
    Requirement {
        source: SOURCE_K8S.to_owned(),
        key: key.to_owned(),
        operator: Operator::Exists,
        values: BTreeSet::new(),
    }
}
