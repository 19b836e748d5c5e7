//! What agents say of themselves, by `clustermesh status -o json`.

use crate::lab::Lab;
use anyhow::Context as _;
use serde_json::Value;

/// The status of all agents of a cluster.
pub(super) fn status(lab: &Lab, cluster: &str) -> anyhow::Result<Value> {
    json(lab, &["status", "--context", &lab.context(cluster), "-o", "json"])
}

/// Each agent in [`status`]: its `node`, and its own `status`.
pub(super) fn each(status: &Value) -> impl Iterator<Item = &Value> {
    status["clusters"][0]["agents"].as_array().into_iter().flatten()
}

/// What `clustermesh` prints, which must be JSON.
pub(super) fn json(lab: &Lab, arguments: &[&str]) -> anyhow::Result<Value> {
    let done = lab.try_clustermesh(arguments)?;
    serde_json::from_str(&done.stdout).with_context(|| format!("no JSON: {}", done.stderr.trim()))
}

/// What an agent holds that is not what its exporter states; `status` is the agent's.
pub(super) fn out_of_sync(status: &Value) -> Option<String> {
    let remotes = status["remotes"].as_array().into_iter().flatten();
    remotes.chain([&status["own"]]).find_map(|peer| {
        peer["kinds"].as_array()?.iter().find_map(|kind| {
            let verdict = kind["digest"]["verdict"].as_str().unwrap_or("missing");
            let differs = verdict != "in-sync";
            differs.then(|| format!("digest of {} of {}: {verdict}", kind["kind"], peer["name"]))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_kind_of_every_cluster_has_to_be_in_sync() {
        let peer =
            |verdict: &str| json!({"name": "x", "kinds": [{"kind": "ip", "digest": {"verdict": verdict}}]});
        let status = |own: &str, remote: &str| json!({"own": peer(own), "remotes": [peer(remote)]});
        assert_eq!(out_of_sync(&status("in-sync", "in-sync")), None);
        assert!(out_of_sync(&status("differs", "in-sync")).is_some());
        assert!(out_of_sync(&status("in-sync", "pending")).is_some());
    }
}
