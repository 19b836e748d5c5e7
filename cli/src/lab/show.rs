//! Commands that show a lab.

use std::io::{ErrorKind, copy};

use anyhow::Context;
use comfy_table::Cell;
use serde::Serialize;

use super::Lab;
use super::layout::Layout;
use super::objects::ObjectName;
use super::state::{ClusterState, LabState, names};
use super::system::{Process, SystemProcess};
use crate::error::usage;
use crate::mesh::Output;
use crate::output::{coloured, print_json, print_line, print_table};

#[derive(Serialize)]
struct LabView {
    name: String,
    file: String,
    complete: bool,
    clusters: Vec<ClusterView>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ClusterView {
    name: String,
    id: u16,
    context: String,
    nodes: Vec<NodeView>,
    processes: Vec<ProcessView>,
    pods: Vec<PodView>,
    services: Vec<ServiceView>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct NodeView {
    name: String,
    address: String,
    #[serde(rename = "podCIDRs")]
    pod_cidrs: Vec<String>,
    netns: String,
}

#[derive(Serialize)]
struct ProcessView {
    name: String,
    node: String,
    running: bool,
    pids: Vec<i32>,
    log: String,
}

#[derive(Serialize)]
struct PodView {
    namespace: String,
    name: String,
    node: String,
    ips: Vec<String>,
    status: &'static str,
    pids: Vec<i32>,
    netns: String,
    log: String,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ServiceView {
    namespace: String,
    name: String,
    #[serde(rename = "clusterIPs")]
    cluster_ips: Vec<String>,
    ports: Vec<String>,
}

/// A lab in the list of all.
#[derive(Serialize)]
struct ListEntry {
    name: String,
    status: &'static str,
    since: String,
    topology: String,
}

/// Lists the labs.
pub(crate) fn list(output: Output) -> anyhow::Result<()> {
    let entry = |name: String| {
        let state =
            super::cgroup::mount_point().and_then(|mount| LabState::load(&Layout::new(&name, &mount)));
        match state {
            Ok(state) => ListEntry {
                name,
                status: if state.complete { "up" } else { "half-made" },
                since: state.created.to_string(),
                topology: state.file.display().to_string(),
            },
            // It has no state yet, or no more: it is listed to be removed.
            Err(_) => ListEntry { name, status: "half-made", since: String::new(), topology: String::new() },
        }
    };
    let labs: Vec<ListEntry> = names().into_iter().map(entry).collect();
    if output == Output::Json {
        return print_json(&labs);
    }
    let rows: Vec<_> =
        labs.into_iter().map(|lab| vec![lab.name, lab.status.to_owned(), lab.since, lab.topology]).collect();
    if rows.is_empty() {
        print_line("No lab runs; start one with `clustermesh lab up FILE`");
    } else {
        print_table(&["name", "status", "since", "topology"], rows);
    }
    Ok(())
}

/// Shows a lab.
pub(crate) fn status(lab: &Lab, output: Output) -> anyhow::Result<()> {
    let view = view(lab)?;
    if output == Output::Json {
        return print_json(&view);
    }
    print_line(format!("Lab {} ({})", view.name, if view.complete { "up" } else { "half-made" }));
    for cluster in &view.clusters {
        print_line(format!("\nCluster {} (ID {})", cluster.name, cluster.id));
        let nodes =
            cluster.nodes.iter().map(|n| vec![n.name.clone(), n.address.clone(), n.pod_cidrs.join(", ")]);
        print_table(&["node", "address", "pod CIDRs"], nodes.collect());
        let processes = cluster.processes.iter().map(|p| {
            let pids: Vec<String> = p.pids.iter().map(ToString::to_string).collect();
            let status = if p.running { coloured("running", true) } else { coloured("stopped", false) };
            vec![Cell::new(&p.name), Cell::new(&p.node), status, Cell::new(pids.join(","))]
        });
        print_line("");
        print_table(&["process", "node", "status", "pid"], processes.collect());
        let pods = cluster.pods.iter().map(|p| {
            let status = coloured(p.status, p.status == "Ready");
            let name = format!("{}/{}", p.namespace, p.name);
            vec![Cell::new(name), Cell::new(&p.node), status, Cell::new(p.ips.join(", "))]
        });
        print_line("");
        print_table(&["pod", "node", "status", "addresses"], pods.collect());
        let services = cluster.services.iter().map(|s| {
            vec![format!("{}/{}", s.namespace, s.name), s.cluster_ips.join(", "), s.ports.join(", ")]
        });
        print_line("");
        print_table(&["service", "cluster IPs", "ports"], services.collect());
    }
    Ok(())
}

/// Prints a log.
pub(crate) fn logs(lab: Option<&str>, target: &str) -> anyhow::Result<()> {
    let (lab, cluster, rest) = Lab::locate(lab, target)?;
    let rest =
        rest.ok_or_else(|| usage(format!("{target:?}: write CLUSTER/PROCESS or CLUSTER/NAMESPACE/POD")))?;
    let path = match rest.parse::<Process>() {
        Ok(process) => SystemProcess::new(&lab.layout, lab.cluster(&cluster)?, process)?.log(),
        Err(_) => lab.layout.log(&cluster, &rest.parse::<ObjectName>().map_err(usage)?.dotted()),
    };
    let mut file = std::fs::File::open(&path).with_context(|| {
        format!("there is no log {}; `clustermesh lab status` lists processes and pods", path.display())
    })?;
    match copy(&mut file, &mut std::io::stdout().lock()) {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => Err(e).context("cannot print the log"),
        _ => Ok(()),
    }
}

fn view(lab: &Lab) -> anyhow::Result<LabView> {
    let layout = &lab.layout;
    let mut clusters = Vec::new();
    for cluster in &lab.topology.clusters {
        let name = cluster.name.as_str();
        let state = ClusterState::load(layout, name)?;
        let pods = lab.pods(cluster);
        clusters.push(ClusterView {
            name: name.to_owned(),
            id: cluster.id.get(),
            context: layout.context(name).display().to_string(),
            nodes: cluster
                .nodes
                .iter()
                .map(|node| NodeView {
                    name: node.name.clone(),
                    address: node.address.to_string(),
                    pod_cidrs: node.pod_cidrs.iter().map(|net| net.to_string()).collect(),
                    netns: layout.node_netns(name, &node.name),
                })
                .collect(),
            processes: SystemProcess::all(layout, cluster, lab.state.mesh)
                .iter()
                .map(|process| ProcessView {
                    name: process.process().to_string(),
                    node: process.node().name.clone(),
                    running: process.is_running(),
                    pids: pids(&process.cgroup()),
                    log: process.log().display().to_string(),
                })
                .collect(),
            pods: state
                .pods
                .values()
                .map(|pod| PodView {
                    namespace: pod.name.namespace.clone(),
                    name: pod.name.name.clone(),
                    node: pod.node.clone(),
                    ips: pod.ips.iter().map(ToString::to_string).collect(),
                    status: match (pod.deleted.is_some(), pods.is_alive(pod), pod.ready) {
                        (true, _, _) => "Terminating",
                        (_, false, true) => "Ended",
                        (_, _, true) => "Ready",
                        _ => "Starting",
                    },
                    pids: pod
                        .spec
                        .containers
                        .iter()
                        .flat_map(|container| pids(&pods.container_cgroup(pod, &container.name)))
                        .collect(),
                    netns: layout.pod_netns(name, &pod.name),
                    log: layout.log(name, &pod.name.dotted()).display().to_string(),
                })
                .collect(),
            services: state
                .objects
                .services
                .iter()
                .map(|(service, object)| ServiceView {
                    namespace: service.namespace.clone(),
                    name: service.name.clone(),
                    cluster_ips: state
                        .cluster_ips
                        .get(service)
                        .into_iter()
                        .flatten()
                        .map(ToString::to_string)
                        .collect(),
                    ports: object
                        .spec
                        .iter()
                        .flat_map(|spec| spec.ports.iter().flatten())
                        .map(|port| format!("{}/{}", port.port, port.protocol.as_deref().unwrap_or("TCP")))
                        .collect(),
                })
                .collect(),
        });
    }
    Ok(LabView {
        name: layout.lab().to_owned(),
        file: lab.state.file.display().to_string(),
        complete: lab.state.complete,
        clusters,
    })
}

fn pids(cgroup: &super::cgroup::Cgroup) -> Vec<i32> {
    cgroup.processes().into_iter().map(|pid| pid.as_raw_nonzero().get()).collect()
}
