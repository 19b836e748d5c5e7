//! Keeps the routes over the overlay as the mesh wants them: what changes at once, and all of them now and
//! then, for others may have removed some.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use tokio::time::{Instant, timeout_at};
use tracing::{debug, warn};

use super::board::{News, RouteBoard};
use super::{Netlink, RouteVia};
use crate::desired::Routes;

/// First pause after a failure.
const RETRY_FIRST: Duration = Duration::from_millis(200);
/// Longest pause after a failure.
const RETRY_MAX: Duration = Duration::from_secs(10);
/// Looked at again this often even if nothing changed: others may have removed routes of ours.
const REPEAT: Duration = Duration::from_secs(30);

/// Follows the board for good. Touches nothing before there are routes on it.
pub async fn keep_routes(netlink: Netlink, overlay: u32, board: RouteBoard) {
    let mut keeper = Keeper { netlink, overlay, with_sources: true, pause: RETRY_FIRST, failing: None };
    loop {
        let wait = match board.take_all() {
            None => REPEAT,
            Some(wanted) => keeper.install_all(&wanted).await,
        };
        keeper.follow(&board, Instant::now() + wait).await;
    }
}

struct Keeper {
    netlink: Netlink,
    overlay: u32,
    /// The node had the preferred sources when all routes were installed last.
    with_sources: bool,
    pause: Duration,
    failing: Option<String>,
}

impl Keeper {
    /// Installs what changes, until all is to be looked at again: at `again`, or after a failure.
    async fn follow(&mut self, board: &RouteBoard, again: Instant) {
        loop {
            if timeout_at(again, board.changed()).await.is_err() {
                return;
            }
            let done = match board.take_news() {
                None => continue,
                Some(News::All(_)) => false,
                // After a failure all is tried again in a while.
                Some(News::Some(..)) if self.failing.is_some() => continue,
                Some(News::Some(changes, sources)) => self.install(&changes, &sources).await,
            };
            if !done {
                return;
            }
        }
    }

    /// Tells whether it worked.
    async fn install(&self, changes: &[(IpNet, bool)], sources: &[IpAddr]) -> bool {
        let sources = if self.with_sources { sources } else { &[] };
        for (prefix, is_wanted) in changes {
            let via = is_wanted.then(|| via(prefix, sources));
            if let Err(error) = self.netlink.set_route(self.overlay, *prefix, via).await {
                debug!(%error, "cannot change a route; looking at all of them");
                return false;
            }
        }
        true
    }

    /// Gives the time until all is to be looked at again.
    async fn install_all(&mut self, wanted: &Routes) -> Duration {
        match install(&self.netlink, self.overlay, wanted).await {
            Ok(with_sources) => {
                self.with_sources = with_sources;
                (self.pause, self.failing) = (RETRY_FIRST, None);
                REPEAT
            }
            Err(error) => {
                if self.failing.as_ref() != Some(&error) {
                    warn!(error, "cannot route to other nodes' pods; retrying");
                    self.failing = Some(error);
                }
                self.pause = (self.pause * 2).min(RETRY_MAX);
                self.pause
            }
        }
    }
}

/// Installs the routes with their preferred sources; without, if the node does not have those (yet). Tells
/// which it was.
async fn install(netlink: &Netlink, overlay: u32, routes: &Routes) -> Result<bool, String> {
    let preferred = desired(routes, &routes.sources);
    let Err(error) = netlink.sync_routes(overlay, &preferred).await else { return Ok(true) };
    if routes.sources.is_empty() {
        return Err(error.to_string());
    }
    debug!(%error, "routing without preferred sources");
    netlink.sync_routes(overlay, &desired(routes, &[])).await.map_err(|error| error.to_string())?;
    Ok(false)
}

fn desired(routes: &Routes, sources: &[IpAddr]) -> BTreeMap<IpNet, RouteVia> {
    routes.prefixes.iter().map(|prefix| (*prefix, via(prefix, sources))).collect()
}

fn via(prefix: &IpNet, sources: &[IpAddr]) -> RouteVia {
    let same_family = |source: &&IpAddr| source.is_ipv4() == prefix.addr().is_ipv4();
    RouteVia { source: sources.iter().find(same_family).copied() }
}
