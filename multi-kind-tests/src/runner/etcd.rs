//! What stands in a cluster's etcd, read beside everything that is under test.

use super::steps::Stage;
use crate::lab::Lab;
use crate::pace;
use anyhow::Context as _;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use std::process::Command;
use std::time::Duration;

const DEADLINE: Duration = Duration::from_secs(10);

/// A key with its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) key: String,
    pub(super) value: Vec<u8>,
    /// Revision in which the key came into being.
    pub(super) created: i64,
    /// Revision of the last write.
    pub(super) modified: i64,
}

/// All keys of a cluster's own etcd that begin with `prefix`, in order.
pub(super) fn read(stage: &Stage<'_>, lab: &Lab, cluster: &str, prefix: &str) -> anyhow::Result<Vec<Record>> {
    let mut command = etcdctl(lab, cluster, &Access::admin(lab, cluster)?)?;
    command.args(["get", "--prefix", "-w", "json", prefix]);
    let text = stage.run(command, pace::slowed(DEADLINE))?.success("etcdctl get")?;
    parse(&text)
}

/// Who comes to an etcd, and whom it takes for the etcd.
#[derive(Clone, Debug, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Access {
    pub(super) endpoints: Vec<String>,
    pub(super) trusted_ca_file: String,
    pub(super) cert_file: String,
    pub(super) key_file: String,
}

impl Access {
    /// As the cluster's exporter.
    pub(super) fn admin(lab: &Lab, cluster: &str) -> anyhow::Result<Self> {
        let config = lab.folder().join(cluster).join("etcd-admin.yaml");
        let text =
            std::fs::read_to_string(&config).with_context(|| format!("cannot read {}", config.display()))?;
        serde_saphyr::from_str(&text).context("not an etcd configuration")
    }
}

/// `etcdctl` on the node that a cluster's etcd runs on, without what it is to do.
pub(super) fn etcdctl(lab: &Lab, cluster: &str, access: &Access) -> anyhow::Result<Command> {
    let node = first_node(lab, cluster)?;
    let mut command = Command::new("nsenter");
    command
        .arg(format!("--net={}", lab.node_namespace(&format!("{cluster}/{node}")).display()))
        .args(["--", "etcdctl", "--endpoints", &access.endpoints.join(",")])
        .args(["--cacert", &access.trusted_ca_file, "--cert", &access.cert_file])
        .args(["--key", &access.key_file])
        .env("ETCDCTL_API", "3");
    Ok(command)
}

/// The node with the cluster's control plane.
pub(super) fn first_node(lab: &Lab, cluster: &str) -> anyhow::Result<String> {
    let text = std::fs::read_to_string(lab.folder().join(cluster).join("context.yaml"))?;
    let context: Context = serde_saphyr::from_str(&text).context("not a context")?;
    let agent = context.agents.into_iter().next().context("the cluster has no nodes")?;
    Ok(agent.node)
}

#[derive(serde::Deserialize)]
struct Context {
    agents: Vec<AgentEntry>,
}

#[derive(serde::Deserialize)]
struct AgentEntry {
    node: String,
}

#[derive(serde::Deserialize)]
struct Reply {
    #[serde(default)]
    kvs: Vec<Pair>,
}

#[derive(serde::Deserialize)]
struct Pair {
    key: String,
    #[serde(default)]
    value: String,
    create_revision: i64,
    mod_revision: i64,
}

fn parse(text: &str) -> anyhow::Result<Vec<Record>> {
    let reply: Reply = serde_json::from_str(text).context("`etcdctl -w json` printed something else")?;
    let record = |pair: Pair| {
        let key = String::from_utf8(BASE64_STANDARD.decode(pair.key)?)?;
        let value = BASE64_STANDARD.decode(pair.value)?;
        anyhow::Ok(Record { key, value, created: pair.create_revision, modified: pair.mod_revision })
    };
    reply.kvs.into_iter().map(record).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_etcdctl_prints() {
        let text = r#"{"header":{"revision":9},"kvs":[{"key":"YQ==","create_revision":3,"mod_revision":7,"version":2,"value":"MQ==","lease":5}],"count":1}"#;
        let expected = Record { key: "a".into(), value: b"1".into(), created: 3, modified: 7 };
        assert_eq!(parse(text).expect("a reply"), [expected]);
        assert_eq!(parse(r#"{"header":{"revision":9}}"#).expect("no keys"), []);
        assert!(parse("Error: x").is_err());
    }
}
