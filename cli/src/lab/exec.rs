//! `lab exec`: a command as if it ran in a pod or on a node.

use std::collections::BTreeMap;
use std::process::{Command, Stdio};

use anyhow::bail;

use super::args::ExecArgs;
use super::cgroup::Cgroup;
use super::objects::ObjectName;
use super::process::{Place, become_command, environment};
use super::state::ClusterState;
use super::{Lab, container, netns, requirements};
use crate::error::usage;

/// A host of the underlay that is no node.
const OUTSIDE: &str = "host:outside";

/// Becomes the command, so that signals, terminal and exit status are its own.
///
/// # Errors
/// If there is no such pod or command.
pub(crate) fn exec(lab: Option<&str>, args: &ExecArgs) -> anyhow::Result<()> {
    requirements(&[])?;
    let (lab, cluster, target) = Lab::locate(lab, &args.target)?;
    let cluster = lab.cluster(&cluster)?;
    let name = cluster.name.as_str();
    let (place, env) = match target.map(|t| (t, t.strip_prefix("node:"))) {
        None | Some(("", _)) => {
            return Err(usage(format!(
                "{}: write CLUSTER/POD, CLUSTER/NAMESPACE/POD, CLUSTER/node:NAME or CLUSTER/{OUTSIDE}",
                args.target
            )));
        }
        Some((OUTSIDE, _)) => {
            let place =
                Place { netns: netns::file(&lab.layout.fabric()), cgroup: lab.layout.outside_cgroup() };
            (place, BTreeMap::new())
        }
        Some((_, Some(node))) => {
            let node = cluster.node(node)?;
            let cgroup = lab.layout.process_cgroup(name, &node.name, "exec");
            let netns = netns::file(&lab.layout.node_netns(name, &node.name));
            let env = [("NODE_NAME", node.name.clone()), ("CLUSTER_NAME", name.to_owned())];
            (Place { netns, cgroup }, env.map(|(k, v)| (k.to_owned(), v)).into())
        }
        Some((pod, None)) => {
            let pod: ObjectName = pod.parse().map_err(usage)?;
            let state = ClusterState::load(&lab.layout, name)?;
            let Some(found) = state.pods.get(&pod) else {
                let known: Vec<String> = state.pods.keys().map(ToString::to_string).collect();
                bail!("cluster {name} has no pod {pod}; it has {}", known.join(", "));
            };
            let cgroup = lab.layout.pod_cgroup(name, &found.node, &pod).join("exec");
            let netns = netns::file(&lab.layout.pod_netns(name, &pod));
            (Place { netns, cgroup }, container::pod_env(found, cluster, &state))
        }
    };
    Cgroup::at(place.cgroup.clone()).create()?;
    let mut command = Command::new(&args.command[0]);
    command.args(&args.command[1..]).env_clear().envs(environment(env));
    if !args.stdin {
        command.stdin(Stdio::null());
    }
    become_command(&place, &mut command)
}
