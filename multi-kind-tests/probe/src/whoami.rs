//! Who a server is, as it tells it to its callers.

use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// Identity of a server, from its flags and the environment that the lab gives to every pod.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Whoami {
    /// Name of the pod.
    #[arg(long = "name", env = "POD_NAME", default_value = "unknown")]
    pub(crate) pod: String,
    /// Namespace of the pod.
    #[arg(long, env = "POD_NAMESPACE", default_value = "default")]
    pub(crate) namespace: String,
    /// Node on which the pod runs.
    #[arg(long, env = "NODE_NAME", default_value = "")]
    pub(crate) node: String,
    /// Cluster of the pod.
    #[arg(long, env = "CLUSTER_NAME", default_value = "")]
    pub(crate) cluster: String,
}

/// What a server answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Answer {
    pub(crate) pod: String,
    #[serde(default)]
    pub(crate) namespace: String,
    #[serde(default)]
    pub(crate) node: String,
    pub(crate) cluster: String,
    /// The caller as the server sees it: shows whether the path translated the source address.
    #[serde(default)]
    pub(crate) remote_addr: String,
}

impl Whoami {
    /// The answer for one caller.
    pub(crate) fn answer(&self, remote: SocketAddr) -> Answer {
        Answer {
            pod: self.pod.clone(),
            namespace: self.namespace.clone(),
            node: self.node.clone(),
            cluster: self.cluster.clone(),
            remote_addr: canonical(remote).to_string(),
        }
    }

    /// Replaces `{pod}`, `{namespace}`, `{node}` and `{cluster}` in an operator's own answer text.
    pub(crate) fn fill(&self, text: &str) -> String {
        text.replace("{pod}", &self.pod)
            .replace("{namespace}", &self.namespace)
            .replace("{node}", &self.node)
            .replace("{cluster}", &self.cluster)
    }
}

/// `::ffff:192.0.2.1` is 192.0.2.1 to everybody who reads it.
pub(crate) fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_answer_names_the_cluster() {
        let me = Whoami { pod: "p".into(), namespace: "n".into(), node: "w".into(), cluster: "alpha".into() };
        let text = r#"{"Galaxy": "Alderaan", "Cluster": "{cluster}"}"#;
        assert_eq!(me.fill(text), r#"{"Galaxy": "Alderaan", "Cluster": "alpha"}"#);
    }

    #[test]
    fn mapped_addresses_are_shown_as_ipv4() {
        let mapped: SocketAddr = "[::ffff:192.0.2.1]:80".parse().expect("literal");
        assert_eq!(canonical(mapped).to_string(), "192.0.2.1:80");
    }
}
