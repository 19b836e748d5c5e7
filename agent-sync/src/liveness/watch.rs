//! The task that watches remote clusters: reads what connections tell, has nodes asked, and tells the
//! engine who is dead.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use clustermesh_kvstore::cluster::ClusterName;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{sleep, sleep_until};
use tracing::{info, warn};

use super::core::{BUDGET, Core, Member, Transition};
use super::judge::{EtcdEvidence, Findings};
use super::probe::Prober;
use super::{Health, LivenessOptions};
use crate::engine::{Input, Query};
use crate::peers::{Directory, PeerView};

/// How often connections are looked at.
const LOOK: Duration = Duration::from_secs(1);
/// How often the engine is asked which clusters and nodes there are.
const SURVEY: Duration = Duration::from_secs(5);
/// An exporter beats once a minute; one missing beat is no failure.
const HEARTBEAT_LASTS: Duration = Duration::from_secs(120);

/// How a cluster stands, for those who look.
#[derive(Clone, Copy, Debug)]
pub struct Standing {
    /// Its health.
    pub health: Health,
    /// Since when.
    pub since: Instant,
    /// What speaks against it.
    pub findings: Findings,
    /// How often its health changed.
    pub transitions: u64,
}

/// How all remote clusters stand; empty if nobody watches. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Board(Arc<Mutex<BTreeMap<ClusterName, Standing>>>);

impl Board {
    /// How a cluster stands now.
    pub fn standing(&self, name: &ClusterName) -> Option<Standing> {
        self.lock().get(name).copied()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<ClusterName, Standing>> {
        // Nothing panics while it is held; if something did, the map is still whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the task works with.
#[derive(Debug)]
pub struct Watch {
    /// Times.
    pub options: LivenessOptions,
    /// The connections.
    pub directory: Directory,
    /// To ask the engine.
    pub queries: mpsc::Sender<Query>,
    /// To tell the engine.
    pub engine: mpsc::Sender<Input>,
    /// Where the outcome is shown.
    pub board: Board,
}

impl Watch {
    /// Watches until the engine ends.
    pub async fn run(self) {
        let mut core = Core::new(self.options, Instant::now());
        let (answers, mut answered) = mpsc::channel(BUDGET);
        let prober = Prober::new(self.options.probe_port, answers);
        let (found, mut surveys) = mpsc::channel(1);
        // Apart, since a busy engine answers late, and a cluster must not look silent because of that.
        tokio::spawn(survey(self.queries.clone(), found));
        let mut look_at = Instant::now();
        loop {
            let now = Instant::now();
            while let Ok(ip) = answered.try_recv() {
                core.answered(ip, now);
            }
            let is_look = look_at <= now;
            if is_look {
                look_at = now + LOOK;
                for (name, view) in self.directory.snapshot() {
                    core.set_etcd(&name, etcd_evidence(&view));
                }
            }
            let (ask, transitions) = core.step(now);
            ask.into_iter().for_each(|ip| prober.ask(ip));
            if is_look || !transitions.is_empty() {
                self.show(&core);
            }
            for transition in transitions {
                self.tell(transition).await;
            }
            let wake = core.deadline().map_or(look_at, |at| at.min(look_at));
            let wake = sleep_until(wake.into());
            tokio::pin!(wake);
            loop {
                tokio::select! {
                    () = &mut wake => break,
                    Some(ip) = answered.recv() => core.answered(ip, Instant::now()),
                    members = surveys.recv() => match members {
                        Some(members) => {
                            // Such as that of a cluster that was removed and is configured again.
                            for (cluster, dead) in core.set_members(members, Instant::now()) {
                                self.tell_engine(cluster, dead).await;
                            }
                            break;
                        }
                        None => return,
                    },
                }
            }
        }
    }

    fn show(&self, core: &Core) {
        *self.board.lock() = core
            .judges()
            .map(|(name, judge)| {
                let standing = Standing {
                    health: judge.health(),
                    since: judge.since(),
                    findings: judge.findings(),
                    transitions: judge.transitions(),
                };
                (name.clone(), standing)
            })
            .collect();
    }

    async fn tell(&self, transition: Transition) {
        let Transition { cluster, from, to, findings } = transition;
        match to {
            Health::Healthy => info!(%cluster, before = %from, "the cluster is healthy"),
            Health::Degraded => warn!(%cluster, before = %from, why = %findings, "the cluster is degraded"),
            Health::Dead => {
                warn!(%cluster, before = %from, why = %findings, "the cluster is dead; its backends are not chosen until it is heard again");
            }
        }
        if (from == Health::Dead) != (to == Health::Dead) {
            self.tell_engine(cluster, to == Health::Dead).await;
        }
    }

    async fn tell_engine(&self, name: ClusterName, dead: bool) {
        // Fails only when the engine has ended, and the agent with it.
        let _ = self.engine.send(Input::Liveness { name, dead }).await;
    }
}

/// Asks the engine now and then, until it ends.
async fn survey(queries: mpsc::Sender<Query>, found: mpsc::Sender<BTreeMap<ClusterName, Member>>) {
    loop {
        let (reply, answer) = oneshot::channel();
        if queries.send(Query::Remotes(reply)).await.is_err() {
            return;
        }
        let Ok(members) = answer.await else { return };
        if found.send(members).await.is_err() {
            return;
        }
        sleep(SURVEY).await;
    }
}

fn etcd_evidence(view: &PeerView) -> EtcdEvidence {
    let connection = view.connection.borrow();
    let state = view.state.borrow();
    let heard = if state.cached {
        state.last_change
    } else {
        let reply = connection.etcd_cluster_id.is_some().then_some(connection.last_event);
        let beat = state.heartbeat.map(|at| at + HEARTBEAT_LASTS);
        // One that answers but takes no writes has had its last sign of life when its heartbeat stopped.
        reply.map(|reply| beat.map_or(reply, |beat| beat.min(reply)))
    };
    EtcdEvidence {
        connected: connection.connected,
        heard: heard.map(tokio::time::Instant::into_std),
        mirrored: state.cached,
    }
}
