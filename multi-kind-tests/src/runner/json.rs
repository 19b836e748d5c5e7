//! Expectations on the JSON that commands print.

use crate::scenario::Check;
use anyhow::Context as _;
use serde_json::Value;

/// Fails with what is there instead, if `output` is not as `check` expects.
pub(super) fn holds(check: &Check, output: &str) -> anyhow::Result<()> {
    let document: Value = serde_json::from_str(output).context("the output is not JSON")?;
    let value =
        document.pointer(&check.at).with_context(|| format!("nothing is at {:?} in {document}", check.at))?;
    let filtered: Value = if check.filter.is_empty() {
        value.clone()
    } else {
        let rows = value.as_array().with_context(|| format!("{:?} is not an array", check.at))?;
        rows.iter()
            .filter(|row| check.filter.iter().all(|(key, want)| same(&row[key], want)))
            .cloned()
            .collect()
    };
    if let Some(expected) = &check.equals {
        anyhow::ensure!(same(&filtered, expected), "{:?} is {filtered}, expected {expected}", check.at);
    }
    if check.count.is_some() || check.at_least.is_some() {
        let count = filtered.as_array().map_or(0, Vec::len);
        if let Some(expected) = check.count {
            let all = shortened(value);
            anyhow::ensure!(
                count == expected,
                "{count} elements at {:?}, expected {expected}: {all}",
                check.at
            );
        }
        if let Some(least) = check.at_least {
            let all = shortened(value);
            anyhow::ensure!(
                count >= least,
                "{count} elements at {:?}, expected at least {least}: {all}",
                check.at
            );
        }
    }
    Ok(())
}

/// The beginning of what is there.
fn shortened(value: &Value) -> String {
    const MOST: usize = 2000;
    value.to_string().chars().take(MOST).collect()
}

/// Equal, where a number may also be written as a string: the tables print decimal strings.
fn same(actual: &Value, expected: &Value) -> bool {
    let text = |value: &Value| match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    actual == expected || (!actual.is_null() && text(actual) == text(expected))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str =
        r#"{"rows": [{"ip": "10.1.0.1", "cluster": "1"}, {"ip": "10.2.0.1", "cluster": 2}]}"#;

    fn check(yaml: &str) -> anyhow::Result<()> {
        holds(&serde_saphyr::from_str(yaml).expect("a check"), OUTPUT)
    }

    #[test]
    fn looks_at_values_and_counts() {
        assert!(check("{run: [], at: /rows/0/cluster, equals: 1}").is_ok());
        assert!(check("{run: [], at: /rows/0/cluster, equals: 2}").is_err());
        assert!(check("{run: [], at: /rows, where: {cluster: 2}, count: 1}").is_ok());
        assert!(check("{run: [], at: /rows, where: {cluster: 2}, count: 0}").is_err());
        assert!(check("{run: [], at: /rows, where: {cluster: 3}, at-least: 1}").is_err());
        assert!(check("{run: [], at: /nothing, count: 0}").is_err());
    }
}
