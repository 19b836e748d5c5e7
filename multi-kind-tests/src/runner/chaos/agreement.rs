//! Whether each etcd holds what its writers state, and each mirror what it mirrors. Plain code.
//!
//! The digest is computed here anew, by `docs/anti-entropy.md` alone: a fault in the programs' own sums
//! would otherwise agree with itself.

use std::collections::{BTreeMap, BTreeSet};
use twox_hash::XxHash3_64;

/// All keys of an etcd with their values.
pub(super) type Contents = BTreeMap<String, Vec<u8>>;

/// Of a cluster's own data.
const STATED: [&str; 7] =
    ["nodes", "services", "identities", "ip", "localservices", "localidentities", "localip"];
/// What a mirror copies.
const MIRRORED: [&str; 4] = ["nodes", "services", "identities", "ip"];

#[derive(serde::Deserialize)]
struct Statement {
    digest: String,
    count: u64,
}

/// What does not agree; `etcds` by cluster, `mirrors`: those whose etcd holds copies of all the others.
pub(super) fn flaw(etcds: &BTreeMap<String, Contents>, mirrors: &BTreeSet<String>) -> Option<String> {
    etcds.iter().find_map(|(cluster, etcd)| {
        let own = STATED.iter().find_map(|kind| stated(etcd, cluster, kind, Layout::State));
        let copies = || {
            let others = etcds.iter().filter(|(other, _)| mirrors.contains(cluster) && *other != cluster);
            others.into_iter().find_map(|(other, source)| copied(etcd, other, source))
        };
        own.or_else(copies).map(|flaw| format!("in the etcd of {cluster}: {flaw}"))
    })
}

#[derive(Clone, Copy, Debug)]
enum Layout {
    State,
    Cache,
}

/// What of `cluster` a mirror's etcd has that `source` has not, or the other way round.
fn copied(mirror: &Contents, cluster: &str, source: &Contents) -> Option<String> {
    MIRRORED.iter().find_map(|kind| {
        let (have, want) = (
            below(mirror, &prefix(cluster, kind, Layout::Cache)),
            below(source, &prefix(cluster, kind, Layout::State)),
        );
        let name = |suffix: &str| format!("the mirrored {kind} {suffix:?} of {cluster}");
        let missing = want.iter().find(|(suffix, value)| have.get(*suffix) != Some(*value));
        let extra = have.keys().find(|suffix| !want.contains_key(*suffix));
        (missing.map(|(suffix, _)| format!("{} is missing or another one", name(suffix))))
            .or_else(|| extra.map(|suffix| format!("{} does not exist there", name(suffix))))
            .or_else(|| stated(mirror, cluster, kind, Layout::Cache))
    })
}

/// How the statement of a kind differs from what stands below its prefix.
fn stated(etcd: &Contents, cluster: &str, kind: &str, layout: Layout) -> Option<String> {
    let folder = match (kind.starts_with("local"), layout) {
        (true, _) => "clustermesh/local",
        (false, Layout::State) => "cilium/state",
        (false, Layout::Cache) => "cilium/cache",
    };
    let key = format!("{folder}/digests/v1/{cluster}/{kind}");
    let Some(value) = etcd.get(&key) else { return Some(format!("there is no {key}")) };
    let Ok(statement) = serde_json::from_slice::<Statement>(value) else {
        return Some(format!("{key} is no digest: {}", String::from_utf8_lossy(value)));
    };
    let records = below(etcd, &prefix(cluster, kind, layout));
    let (sum, count) = (format!("{:016x}", digest(&records)), records.len() as u64);
    let differs = (sum.as_str(), count) != (statement.digest.as_str(), statement.count);
    differs.then(|| {
        let Statement { digest, count: expected } = statement;
        format!(
            "{kind} of {cluster} are {count} records with the sum {sum}, stated are {expected} with {digest}"
        )
    })
}

fn prefix(cluster: &str, kind: &str, layout: Layout) -> String {
    match (kind, layout) {
        ("localservices" | "localidentities" | "localip", _) => {
            format!("clustermesh/local/{}/v1/{cluster}/", kind.trim_start_matches("local"))
        }
        ("identities", Layout::State) => "cilium/state/identities/v1/id/".into(),
        ("identities", Layout::Cache) => format!("cilium/cache/identities/v1/{cluster}/id/"),
        ("ip", Layout::State) => "cilium/state/ip/v1/default/".into(),
        (_, Layout::State) => format!("cilium/state/{kind}/v1/{cluster}/"),
        (_, Layout::Cache) => format!("cilium/cache/{kind}/v1/{cluster}/"),
    }
}

fn below<'e>(etcd: &'e Contents, prefix: &str) -> BTreeMap<&'e str, &'e [u8]> {
    let all = etcd.range(prefix.to_owned()..);
    all.map_while(|(key, value)| Some((key.strip_prefix(prefix)?, value.as_slice()))).collect()
}

fn digest(records: &BTreeMap<&str, &[u8]>) -> u64 {
    records.iter().fold(0, |sum, (suffix, value)| {
        sum.wrapping_add(XxHash3_64::oneshot(&[suffix.as_bytes(), b"\0", value].concat()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two records whose sum is an example in `docs/anti-entropy.md`.
    fn fill(etcd: &mut Contents, cluster: &str, layout: Layout, kinds: &[&str]) {
        for kind in kinds {
            let prefix = prefix(cluster, kind, layout);
            etcd.insert(format!("{prefix}a"), b"1".into());
            etcd.insert(format!("{prefix}b"), b"2".into());
            let folder = match (kind.starts_with("local"), layout) {
                (true, _) => "clustermesh/local",
                (_, Layout::State) => "cilium/state",
                (_, Layout::Cache) => "cilium/cache",
            };
            let statement = br#"{"digest":"b62ea4ad4431b925","count":2,"revision":7}"#;
            etcd.insert(format!("{folder}/digests/v1/{cluster}/{kind}"), statement.into());
        }
    }

    fn two() -> (BTreeMap<String, Contents>, BTreeSet<String>) {
        let (mut alpha, mut beta) = (Contents::new(), Contents::new());
        fill(&mut alpha, "alpha", Layout::State, &STATED);
        fill(&mut alpha, "beta", Layout::Cache, &MIRRORED);
        fill(&mut beta, "beta", Layout::State, &STATED);
        ([("alpha".to_owned(), alpha), ("beta".to_owned(), beta)].into(), ["alpha".to_owned()].into())
    }

    #[test]
    fn etcds_hold_what_is_stated_and_mirrored() {
        let (etcds, mirrors) = two();
        assert_eq!(flaw(&etcds, &mirrors), None);
        assert!(flaw(&etcds, &["beta".to_owned()].into()).is_some(), "beta mirrors nothing");
    }

    #[test]
    fn each_record_and_each_statement_counts() {
        let (etcds, mirrors) = two();
        for (cluster, etcd) in &etcds {
            for key in etcd.keys() {
                let mut damaged = etcds.clone();
                damaged.get_mut(cluster).expect("it is there").remove(key);
                assert!(flaw(&damaged, &mirrors).is_some(), "without {key} of {cluster}");
            }
        }
        let mut more = etcds.clone();
        more.get_mut("alpha").expect("alpha").insert("cilium/cache/ip/v1/beta/c".into(), b"3".into());
        assert!(flaw(&more, &mirrors).expect("one too many").contains("does not exist there"));
    }
}
