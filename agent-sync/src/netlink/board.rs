//! Where the engine leaves the routes that are wanted, and their keeper finds what has changed.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ipnet::IpNet;
use tokio::sync::Notify;

use crate::desired::{RouteChanges, Routes};

/// Shared between both. What changes again before it was looked at is looked at once.
#[derive(Clone, Debug, Default)]
pub struct RouteBoard(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    news: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// None: not known yet.
    wanted: Option<Routes>,
    changed: BTreeSet<IpNet>,
    all_changed: bool,
}

/// What the keeper has to look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum News {
    /// All routes there are to be.
    All(Routes),
    /// These prefixes, and whether each is to have a route from one of these sources.
    Some(Vec<(IpNet, bool)>, Vec<std::net::IpAddr>),
}

impl RouteBoard {
    /// The engine's part.
    pub fn write(&self, changes: RouteChanges) {
        let mut state = self.lock();
        match changes {
            RouteChanges::All(routes) => {
                if state.wanted.as_ref() == Some(&routes) {
                    return;
                }
                state.wanted = Some(routes);
                state.changed.clear();
                state.all_changed = true;
            }
            RouteChanges::Some(changes) if changes.is_empty() => return,
            RouteChanges::Some(changes) => {
                let state = &mut *state;
                let Some(wanted) = &mut state.wanted else { return };
                for (net, is_wanted) in changes {
                    let differs = match is_wanted {
                        true => wanted.prefixes.insert(net),
                        false => wanted.prefixes.remove(&net),
                    };
                    if differs && !state.all_changed {
                        state.changed.insert(net);
                    }
                }
            }
        }
        drop(state);
        self.0.news.notify_one();
    }

    /// Waits until something may have changed.
    pub(super) async fn changed(&self) {
        self.0.news.notified().await;
    }

    /// What has changed since this was asked last; none if nothing has.
    pub(super) fn take_news(&self) -> Option<News> {
        let mut state = self.lock();
        let (all, changed) = (std::mem::take(&mut state.all_changed), std::mem::take(&mut state.changed));
        let wanted = state.wanted.as_ref()?;
        if all {
            return Some(News::All(wanted.clone()));
        }
        let changed: Vec<_> = changed.into_iter().map(|net| (net, wanted.prefixes.contains(&net))).collect();
        (!changed.is_empty()).then(|| News::Some(changed, wanted.sources.clone()))
    }

    /// Has everything looked at.
    pub(super) fn take_all(&self) -> Option<Routes> {
        let mut state = self.lock();
        state.all_changed = false;
        state.changed.clear();
        state.wanted.clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it is held.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(net: &str) -> IpNet {
        net.parse().unwrap()
    }

    #[test]
    fn only_what_changed_is_told_once() {
        let board = RouteBoard::default();
        let [a, b, c] = ["10.1.0.0/24", "10.2.0.0/24", "10.3.0.0/24"].map(net);
        board.write(RouteChanges::Some(vec![(a, true)]));
        assert_eq!(board.take_news(), None, "nothing is known yet");
        let routes = Routes { prefixes: [a, b].into(), sources: Vec::new() };
        board.write(RouteChanges::All(routes.clone()));
        board.write(RouteChanges::Some(vec![(c, true)]));
        let all = Routes { prefixes: [a, b, c].into(), sources: Vec::new() };
        assert_eq!(board.take_news(), Some(News::All(all.clone())));
        board.write(RouteChanges::All(all));
        board.write(RouteChanges::Some(vec![(a, true)]));
        assert_eq!(board.take_news(), None, "it was so before");
        board.write(RouteChanges::Some(vec![(a, false), (c, false)]));
        board.write(RouteChanges::Some(vec![(c, true)]));
        assert_eq!(board.take_news(), Some(News::Some(vec![(a, false), (c, true)], Vec::new())));
        assert_eq!(board.take_news(), None);
    }
}
