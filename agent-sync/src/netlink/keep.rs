//! Keeps the routes over the overlay as the mesh wants them.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use tokio::sync::watch;
use tokio::time::timeout;
use tracing::{debug, warn};

use super::{Netlink, RouteVia};
use crate::mesh::Routes;

/// First pause after a failure.
const RETRY_FIRST: Duration = Duration::from_millis(200);
/// Longest pause after a failure.
const RETRY_MAX: Duration = Duration::from_secs(10);
/// Looked at again this often even if nothing changed: others may have removed routes of ours.
const REPEAT: Duration = Duration::from_secs(30);

/// Follows `routes` until its sender is gone. Touches nothing before there are any.
pub async fn keep_routes(netlink: Netlink, overlay: u32, mut routes: watch::Receiver<Option<Routes>>) {
    let mut pause = RETRY_FIRST;
    let mut failing = None;
    loop {
        let wanted = routes.borrow_and_update().clone();
        let wait = match wanted {
            None => REPEAT,
            Some(wanted) => match install(&netlink, overlay, &wanted).await {
                Ok(()) => {
                    (pause, failing) = (RETRY_FIRST, None);
                    REPEAT
                }
                Err(error) => {
                    if failing.as_ref() != Some(&error) {
                        warn!(error, "cannot route to other nodes' pods; retrying");
                        failing = Some(error);
                    }
                    pause = (pause * 2).min(RETRY_MAX);
                    pause
                }
            },
        };
        if let Ok(Err(_)) = timeout(wait, routes.changed()).await {
            return;
        }
    }
}

/// Installs the routes with their preferred sources; without, if the node does not have those (yet).
async fn install(netlink: &Netlink, overlay: u32, routes: &Routes) -> Result<(), String> {
    let preferred = desired(routes, &routes.sources);
    let Err(error) = netlink.sync_routes(overlay, &preferred).await else { return Ok(()) };
    if routes.sources.is_empty() {
        return Err(error.to_string());
    }
    debug!(%error, "routing without preferred sources");
    netlink.sync_routes(overlay, &desired(routes, &[])).await.map_err(|error| error.to_string())
}

fn desired(routes: &Routes, sources: &[IpAddr]) -> BTreeMap<IpNet, RouteVia> {
    let via = |prefix: &IpNet| {
        let same_family = |source: &&IpAddr| source.is_ipv4() == prefix.addr().is_ipv4();
        RouteVia { source: sources.iter().find(same_family).copied() }
    };
    routes.prefixes.iter().map(|prefix| (*prefix, via(prefix))).collect()
}
