//! One agent's flows, over restarts of it.

use std::time::Duration;

use clustermesh_agent_api::v1::observe_response::What;
use clustermesh_agent_api::v1::{ObserveRequest, ObserveResponse};
use tokio::sync::mpsc;
use tokio::time::sleep;

use super::super::agents;
use crate::context::Agent;

/// Until an agent that is gone is asked again.
const AGAIN: Duration = Duration::from_secs(1);

/// An agent and its cluster.
#[derive(Clone, Debug)]
pub(super) struct Seat {
    pub(super) cluster: String,
    pub(super) agent: Agent,
}

/// What comes from an agent.
pub(super) enum Heard {
    Told(Box<ObserveResponse>),
    /// It cannot be asked, or does not understand.
    Failed(String),
    /// It has gone, and may return.
    Interrupted(String),
}

/// Passes on what an agent tells: to its end, or for ever if it is followed.
pub(super) async fn listen(
    number: usize,
    seat: Seat,
    mut request: ObserveRequest,
    to: mpsc::Sender<(usize, Heard)>,
) {
    let name = format!("{}/{}", seat.cluster, seat.agent.node);
    let (mut newest, mut first) = (0, true);
    loop {
        let error = match agents::observe(&seat.agent, request.clone()).await {
            Err(error) if first => {
                let _ = to.send((number, Heard::Failed(format!("{name}: {error}")))).await;
                return;
            }
            // It has been said already.
            Err(_) => None,
            Ok(mut stream) => {
                first = false;
                loop {
                    match stream.message().await {
                        Ok(Some(told)) => {
                            if let Some(What::Flow(flow)) = &told.what {
                                newest = flow.time_ns;
                            }
                            if to.send((number, Heard::Told(Box::new(told)))).await.is_err() {
                                return;
                            }
                        }
                        Ok(None) if !request.follow => return,
                        Ok(None) => break Some("its agent has ended".to_owned()),
                        Err(status) => break Some(agents::failure(&status)),
                    }
                }
            }
        };
        if !request.follow {
            let error = error.unwrap_or_default();
            let _ = to.send((number, Heard::Failed(format!("{name}: {error}")))).await;
            return;
        }
        if let Some(error) = error
            && to.send((number, Heard::Interrupted(format!("{name}: {error}")))).await.is_err()
        {
            return;
        }
        // What was not shown before, and no more of what was.
        (request.last, request.since_ns) = (0, if newest > 0 { newest + 1 } else { request.since_ns });
        sleep(AGAIN).await;
    }
}
