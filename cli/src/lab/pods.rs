//! Brings the pods of a cluster in line with what was asked for: the lab's kubelets.
//!
//! A pod that goes is first shown as terminating, so that the mesh stops choosing it, then gets its grace
//! period to finish what it has begun, and only then is ended.

use std::collections::BTreeSet;
use std::process::Child;
use std::time::Duration;

use anyhow::{Context, bail};
use jiff::Timestamp;
use tokio::time::Instant;

use super::cgroup::Cgroup;
use super::container::{self, ContainerProcess};
use super::layout::Layout;
use super::objects::ObjectName;
use super::process::{Place, Spec, log_tail, spawn};
use super::state::{ClusterState, PodState};
use super::system::end_processes;
use super::topology::{Cluster, ImageCommand};
use super::{effective, netns, network, placement};
use crate::error::usage;
use crate::wait::until;

/// Between "terminating" and the request to end, unless the pod says otherwise.
const DRAIN: Duration = Duration::from_secs(2);
/// Published manifests say 30 s and more; nobody waits that long in a lab.
const LONGEST_DRAIN: Duration = Duration::from_secs(5);
/// Between the request to end and the end.
const STOP_GRACE: Duration = Duration::from_secs(2);

/// What pods of a cluster are made from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pods<'a> {
    pub(crate) layout: &'a Layout,
    pub(crate) cluster: &'a Cluster,
    pub(crate) images: &'a [ImageCommand],
}

impl Pods<'_> {
    /// Checks that `state` can be made true, without doing anything.
    ///
    /// # Errors
    /// A usage error: what in the manifests or the topology is wrong.
    pub(crate) fn check(&self, state: &ClusterState) -> anyhow::Result<()> {
        let mut trial = state.clone();
        effective::assign_cluster_ips(self.cluster, &mut trial).map_err(usage)?;
        let desired = placement::desired(&trial.objects).map_err(usage)?;
        let surplus = placement::surplus(&trial, &desired, &BTreeSet::new());
        trial.pods.retain(|name, _| !surplus.contains(name));
        let placed = placement::place(self.cluster, &mut trial, &desired, Timestamp::now()).map_err(usage)?;
        for pod in &placed {
            self.processes(pod, &trial).map_err(usage)?;
        }
        Ok(())
    }

    /// Makes `state` true and keeps it written down on the way. Returns how many pods were started.
    ///
    /// # Errors
    /// What failed; a pod that does not become ready in time, with the end of its log.
    pub(crate) async fn reconcile(
        &self,
        state: &mut ClusterState,
        deadline: Instant,
    ) -> anyhow::Result<usize> {
        effective::assign_cluster_ips(self.cluster, state).map_err(usage)?;
        let desired = placement::desired(&state.objects).map_err(usage)?;
        let dead: BTreeSet<ObjectName> =
            state.pods.values().filter(|p| !self.is_alive(p)).map(|p| p.name.clone()).collect();
        placement::relabel(state, &desired);
        let surplus = placement::surplus(state, &desired, &dead);
        self.remove(state, &surplus, &dead).await?;
        let placed = placement::place(self.cluster, state, &desired, Timestamp::now()).map_err(usage)?;
        self.publish(state)?;
        if !placed.is_empty() {
            network::add_pods(self.layout, self.cluster, &placed).await?;
            let started = self.start(state, &placed)?;
            self.wait_ready(state, started, deadline).await?;
        }
        Ok(placed.len())
    }

    /// Whether all containers of the pod run.
    pub(crate) fn is_alive(&self, pod: &PodState) -> bool {
        pod.spec.containers.iter().all(|container| self.container_cgroup(pod, &container.name).is_populated())
    }

    /// The cgroup of a pod; its containers have cgroups of their own in it.
    pub(crate) fn cgroup(&self, pod: &PodState) -> Cgroup {
        Cgroup::at(self.layout.pod_cgroup(self.cluster.name.as_str(), &pod.node, &pod.name))
    }

    /// The cgroup of one container.
    pub(crate) fn container_cgroup(&self, pod: &PodState, container: &str) -> Cgroup {
        Cgroup::at(self.cgroup(pod).path().join(container))
    }

    fn processes(&self, pod: &PodState, state: &ClusterState) -> Result<Vec<ContainerProcess>, String> {
        let volumes = self.layout.volumes(self.cluster.name.as_str(), &pod.name);
        container::processes(pod, self.cluster, state, self.images, &volumes)
    }

    fn publish(&self, state: &ClusterState) -> anyhow::Result<()> {
        let name = self.cluster.name.as_str();
        state.save(self.layout, name)?;
        effective::write(&self.layout.manifests(name), &effective::render(self.cluster, state)?)
    }

    async fn remove(
        &self,
        state: &mut ClusterState,
        names: &[ObjectName],
        dead: &BTreeSet<ObjectName>,
    ) -> anyhow::Result<()> {
        if names.is_empty() {
            return Ok(());
        }
        let now = Timestamp::now();
        let mut drain = Duration::ZERO;
        let mut going = Vec::new();
        for name in names {
            let Some(pod) = state.pods.get_mut(name) else { continue };
            pod.deleted.get_or_insert(now);
            going.push(pod.clone());
            if !dead.contains(name) {
                drain = drain.max(drain_of(pod));
            }
        }
        self.publish(state)?;
        tokio::time::sleep(drain).await;
        futures::future::try_join_all(going.iter().map(|pod| self.end(pod))).await?;
        state.pods.retain(|name, _| !names.contains(name));
        self.publish(state)
    }

    async fn end(&self, pod: &PodState) -> anyhow::Result<()> {
        let cluster = self.cluster.name.as_str();
        let cgroup = self.cgroup(pod);
        end_processes(&cgroup, STOP_GRACE).await.with_context(|| format!("pod {}", pod.name))?;
        network::remove_pod(self.layout, cluster, pod).await?;
        cgroup.remove().with_context(|| format!("cannot remove {}", cgroup.path().display()))?;
        // Nothing but ConfigMap files; a pod without volumes has none.
        let _ = std::fs::remove_dir_all(self.layout.volumes(cluster, &pod.name));
        Ok(())
    }

    fn start<'p>(&self, state: &ClusterState, pods: &'p [PodState]) -> anyhow::Result<Vec<Starting<'p>>> {
        let cluster = self.cluster.name.as_str();
        let mut starting = Vec::new();
        for pod in pods {
            let volumes = self.layout.volumes(cluster, &pod.name);
            container::write_volumes(pod, &state.objects, &volumes).map_err(usage)?;
            for process in self.processes(pod, state).map_err(usage)? {
                let place = Place {
                    netns: netns::file(&self.layout.pod_netns(cluster, &pod.name)),
                    cgroup: self.container_cgroup(pod, &process.name).path().to_path_buf(),
                };
                let log = self.layout.log(cluster, &pod.name.dotted());
                let child = spawn(Spec { place, argv: &process.argv, env: process.env.clone(), log })?;
                starting.push(Starting { pod, process, child });
            }
        }
        Ok(starting)
    }

    async fn wait_ready(
        &self,
        state: &mut ClusterState,
        mut starting: Vec<Starting<'_>>,
        deadline: Instant,
    ) -> anyhow::Result<()> {
        let mut unready: BTreeSet<&ObjectName> = starting.iter().map(|s| &s.pod.name).collect();
        let all_ready = until(deadline, async || {
            let mut waiting = BTreeSet::new();
            for container in &mut starting {
                if !self.is_ready(container)? {
                    waiting.insert(&container.pod.name);
                }
            }
            if waiting.len() < unready.len() {
                for name in unready.difference(&waiting) {
                    if let Some(pod) = state.pods.get_mut(name) {
                        pod.ready = true;
                    }
                }
                self.publish(state)?;
                unready = waiting;
            }
            Ok(unready.is_empty().then_some(()))
        });
        if all_ready.await?.is_some() {
            return Ok(());
        }
        let late = starting
            .iter()
            .filter(|s| unready.contains(&s.pod.name))
            .map(|s| format!("{} does not listen on TCP {:?}", s.pod.name, s.process.ports));
        let late: Vec<String> = late.collect();
        bail!(
            "pods of cluster {} are not ready in time: {}; see {}",
            self.cluster.name,
            late.join("; "),
            self.layout.logs().display()
        )
    }

    fn is_ready(&self, starting: &mut Starting<'_>) -> anyhow::Result<bool> {
        let (pod, cluster) = (starting.pod, self.cluster.name.as_str());
        if let Some(status) = starting.child.try_wait().context("cannot wait for a container")? {
            let log = self.layout.log(cluster, &pod.name.dotted());
            bail!(
                "container {} of pod {} in cluster {cluster} ended at once ({status}); its command was `{}`:\n{}",
                starting.process.name,
                pod.name,
                starting.process.argv.join(" "),
                log_tail(&log, 8)
            );
        }
        if !self.container_cgroup(pod, &starting.process.name).is_populated() {
            return Ok(false);
        }
        let listening = netns::listening_ports(&self.layout.pod_netns(cluster, &pod.name))?;
        Ok(starting.process.ports.iter().all(|port| listening.contains(port)))
    }
}

struct Starting<'p> {
    pod: &'p PodState,
    process: ContainerProcess,
    child: Child,
}

fn drain_of(pod: &PodState) -> Duration {
    let asked = pod.spec.termination_grace_period_seconds.and_then(|s| u64::try_from(s).ok());
    asked.map_or(DRAIN, Duration::from_secs).min(LONGEST_DRAIN)
}
