//! Waiting until agents agree, with a deadline.

use std::time::Duration;

use clustermesh_agent_api::v1::StatusResponse;
use futures::future::join_all;
use indicatif::ProgressBar;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout_at};

use super::{agents, seconds};
use crate::context::Context;

/// Agents are asked this often.
const PERIOD: Duration = Duration::from_millis(200);

/// The statuses of all agents of one context.
pub(crate) type Statuses = Vec<Result<StatusResponse, String>>;

/// One agent that is not there yet, and why.
pub(crate) struct Pending {
    pub(crate) cluster: String,
    pub(crate) node: String,
    pub(crate) why: String,
}

/// The agents that do not answer, or that `lacks` finds something missing in.
pub(crate) fn pending(
    statuses: &[(&Context, Statuses)],
    lacks: impl Fn(&Context, &StatusResponse) -> Option<String>,
) -> Vec<Pending> {
    let mut pending = Vec::new();
    for (context, of_agents) in statuses {
        for (agent, status) in context.agents.iter().zip(of_agents) {
            let why = match status {
                Ok(status) => lacks(context, status),
                Err(error) => Some(error.clone()),
            };
            let (cluster, node) = (context.cluster.to_string(), agent.node.clone());
            pending.extend(why.map(|why| Pending { cluster, node, why }));
        }
    }
    pending
}

/// Asks all agents of `contexts` until `pending` finds nothing more to wait for. Shows progress on a
/// terminal.
///
/// # Errors
/// When `limit` is over: what each agent still lacks.
pub(crate) async fn until(
    limit: Duration,
    contexts: &[&Context],
    goal: &str,
    pending: impl Fn(&[(&Context, Statuses)]) -> Vec<Pending>,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + limit;
    let all: usize = contexts.iter().map(|context| context.agents.len()).sum();
    // On standard error, and hidden if that is no terminal.
    let spinner = ProgressBar::new_spinner();
    spinner.enable_steady_tick(PERIOD);
    let mut ticks = interval(PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut missing: Option<Vec<Pending>> = None;
    loop {
        let asked = timeout_at(deadline, async {
            ticks.tick().await;
            join_all(contexts.iter().map(|context| async { (*context, agents::statuses(context).await) }))
                .await
        })
        .await;
        let Ok(statuses) = asked else { break };
        let left = pending(&statuses);
        if left.is_empty() {
            spinner.finish_and_clear();
            return Ok(());
        }
        spinner.set_message(format!(
            "waiting until {goal}: {} of {all} agents are",
            all.saturating_sub(count(&left))
        ));
        missing = Some(left);
    }
    spinner.finish_and_clear();
    let Some(missing) = missing else {
        anyhow::bail!("after {}, no agent has answered", seconds(limit));
    };
    let reasons: Vec<_> = missing.iter().map(|p| format!("{}/{}: {}", p.cluster, p.node, p.why)).collect();
    anyhow::bail!(
        "waited {} until {goal}, but {} of {all} agents are not: {}",
        seconds(limit),
        count(&missing),
        reasons.join("; ")
    )
}

/// Agents among `pending`; one may be listed for several reasons, which stand together.
fn count(pending: &[Pending]) -> usize {
    let mut agents: Vec<_> = pending.iter().map(|p| (&p.cluster, &p.node)).collect();
    agents.dedup();
    agents.len()
}
