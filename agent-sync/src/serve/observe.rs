//! `Observe`: what is remembered, then what comes, as far as it matches.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;

use clustermesh_agent_api::v1;
use clustermesh_agent_api::v1::observe_response::What;
use futures::{Stream, stream};
use jiff::Timestamp;
use tonic::Status;

use super::Source;
use crate::observe::{Demand, Flow, FlowFilter, Hub, Observer, PodNames, Received, message, nanoseconds};

/// Flows that are looked at together: their pods' names are read side by side.
const BATCH: usize = 64;
/// Agents without a kernel have nothing to tell.
const NO_DATAPATH: &str =
    "this agent has no kernel datapath (--datapath memory), so there is nothing to observe";

pub(super) type Flows = Pin<Box<dyn Stream<Item = Result<v1::ObserveResponse, Status>> + Send>>;

/// What `Observe` needs, of agents with a kernel datapath.
#[derive(Clone, Debug)]
pub struct ObserveDesk {
    /// Where flows come from.
    pub hub: Hub,
    pub(crate) names: PodNames,
}

impl Source {
    pub(super) fn observe(&self, request: v1::ObserveRequest) -> Result<Flows, Status> {
        let desk = self.observe.clone().ok_or_else(|| Status::failed_precondition(NO_DATAPATH))?;
        let invalid = |error: crate::observe::FilterError| Status::invalid_argument(error.to_string());
        let filter = FlowFilter::parse(request.filter.unwrap_or_default()).map_err(invalid)?;
        let demand = Demand { events: filter.events(), sample: request.sample };
        let (remembered, observer) = match request.follow {
            true => {
                let (remembered, observer) = desk.hub.observe(demand);
                (remembered, Some(observer))
            }
            false => (desk.hub.history(), None),
        };
        let since = request.since_ns;
        let known = remembered.into_iter().filter(|flow| nanoseconds(flow.time) >= since);
        let view = View {
            names: desk.names,
            filter,
            node: self.node_name.clone(),
            cluster: self.own.name.to_string(),
        };
        let most = match request.last {
            0 if since > 0 => usize::MAX,
            last => usize::try_from(last).unwrap_or(usize::MAX),
        };
        let begin = State {
            view,
            known: Vec::new(),
            most,
            unread: known.collect(),
            observer,
            ready: VecDeque::new(),
        };
        Ok(Box::pin(stream::unfold(begin, |mut state| async move {
            let next = state.next().await?;
            Some((Ok(next), state))
        })))
    }
}

/// How one observer sees flows.
struct View {
    names: PodNames,
    filter: FlowFilter,
    node: String,
    cluster: String,
}

/// How far an observer has come.
struct State {
    view: View,
    /// What is remembered and matches, the newest first, while it is looked for.
    known: Vec<v1::ObserveResponse>,
    /// So many of that.
    most: usize,
    /// What is remembered and was not looked at yet, the oldest first.
    unread: Vec<Arc<Flow>>,
    observer: Option<Observer>,
    ready: VecDeque<v1::ObserveResponse>,
}

impl State {
    async fn next(&mut self) -> Option<v1::ObserveResponse> {
        self.recall().await;
        loop {
            if let Some(ready) = self.ready.pop_front() {
                return Some(ready);
            }
            let observer = self.observer.as_mut()?;
            let (batch, lost) = receive(observer).await;
            self.ready.extend(self.view.show(&batch).await);
            if lost > 0 {
                self.ready.push_back(missing("agent", lost, Timestamp::now()));
            }
        }
    }

    /// From the newest back, until there is enough.
    async fn recall(&mut self) {
        while !self.unread.is_empty() && self.known.len() < self.most {
            let batch = self.unread.split_off(self.unread.len().saturating_sub(BATCH));
            let shown = self
                .view
                .show(&batch)
                .await
                .into_iter()
                .filter(|shown| matches!(shown.what, Some(What::Flow(_))));
            self.known.extend(shown.rev());
        }
        self.unread = Vec::new();
        self.known.truncate(self.most);
        self.ready.extend(std::mem::take(&mut self.known).into_iter().rev());
    }
}

/// What is there, at least one of it, and how many are not.
async fn receive(observer: &mut Observer) -> (Vec<Arc<Flow>>, u64) {
    let (mut batch, mut lost) = (Vec::new(), 0);
    let mut next = Some(observer.next().await);
    while let Some(received) = next {
        match received {
            Received::Flow(flow) => batch.push(flow),
            // It was lost before what follows.
            Received::Lost(count) => lost += count,
        }
        next = if batch.len() < BATCH { observer.try_next() } else { None };
    }
    (batch, lost)
}

impl View {
    /// Flows that match, and what the kernel has left out before them.
    async fn show(&self, batch: &[Arc<Flow>]) -> Vec<v1::ObserveResponse> {
        let events = self.filter.events();
        let may: Vec<Arc<Flow>> = batch.iter().filter(|flow| self.filter.may_match(flow)).cloned().collect();
        let mut names = self.names.of(&may).await.into_iter();
        let mut shown = Vec::new();
        for flow in batch {
            if flow.event.unsent > 0 && events >> flow.event.kind & 1 == 1 {
                shown.push(missing("kernel", flow.event.unsent.into(), flow.time));
            }
            if !self.filter.may_match(flow) {
                continue;
            }
            let names = names.next().unwrap_or_default();
            let names = names.each_ref().map(Option::as_ref);
            if self.filter.is_match(flow, Some(names)) {
                let flow = message(flow, names, &self.node, &self.cluster);
                shown.push(v1::ObserveResponse { what: Some(What::Flow(flow)) });
            }
        }
        shown
    }
}

fn missing(source: &str, count: u64, time: Timestamp) -> v1::ObserveResponse {
    let lost = v1::LostFlows { source: source.into(), count, time_ns: nanoseconds(time) };
    v1::ObserveResponse { what: Some(What::Lost(lost)) }
}
