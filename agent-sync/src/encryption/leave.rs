//! The end of encryption on a node whose agent starts without it. Others may go on to encrypt for a while.

use std::time::Duration;

use tokio::time::sleep;
use tracing::{info, warn};

use super::{Lane, device_name};
use crate::netlink::{Netlink, NetlinkError, Wireguard};

/// Between two looks at what arrives.
const LOOK: Duration = Duration::from_secs(5);
/// The devices go when nothing has come through them in so many looks.
const QUIET: u32 = 6;

/// Stops to encrypt what this node sends, at once; goes on to decrypt until the others have stopped, too. Ends
/// when nothing of encryption is left.
///
/// # Errors
/// The kernel refused; what is left does no harm, and the next start tries again.
pub async fn leave(netlink: &Netlink, prefix: &str) -> Result<(), NetlinkError> {
    netlink.remove_rules().await?;
    let mut devices = Vec::new();
    for lane in Lane::all() {
        let name = device_name(prefix, lane);
        if let Some(index) = netlink.find_wireguard(&name).await? {
            devices.push((index, Wireguard::open(&name)?));
        }
    }
    if devices.is_empty() {
        return netlink.remove_all_steering().await;
    }
    info!(devices = prefix, "encryption is off; packets that still come encrypted are taken in");
    let (mut quiet, mut before) = (0, None);
    while quiet < QUIET {
        sleep(LOOK).await;
        let mut received = 0_u64;
        for (_, wireguard) in &devices {
            received += wireguard.read().await?.peers.values().map(|peer| peer.received).sum::<u64>();
        }
        quiet = if before == Some(received) { quiet + 1 } else { 0 };
        before = Some(received);
    }
    netlink.remove_all_steering().await?;
    for (index, _) in devices {
        netlink.remove_link(index).await?;
    }
    info!(devices = prefix, "nothing comes encrypted any more; removed the devices");
    Ok(())
}

/// [`leave`] in the background.
pub(crate) async fn leave_quietly(netlink: Netlink, prefix: String) {
    if let Err(error) = leave(&netlink, &prefix).await {
        warn!(%error, "cannot remove all that encryption has left");
    }
}
