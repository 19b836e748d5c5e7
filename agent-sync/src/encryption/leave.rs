//! The end of encryption on a node whose agent starts without it. Others may go on to encrypt for a while.

use std::time::Duration;

use tokio::time::sleep;
use tracing::{info, warn};

use crate::netlink::{Netlink, NetlinkError, Wireguard};

/// Between two looks at what arrives.
const LOOK: Duration = Duration::from_secs(5);
/// The device goes when nothing has come through it in so many looks.
const QUIET: u32 = 6;

/// Stops to encrypt what this node sends, at once; goes on to decrypt until the others have stopped, too. Ends
/// when nothing of encryption is left.
///
/// # Errors
/// The kernel refused; what is left does no harm, and the next start tries again.
pub async fn leave(netlink: &Netlink, device: &str) -> Result<(), NetlinkError> {
    netlink.remove_rules().await?;
    let Some(index) = netlink.find_wireguard(device).await? else {
        return netlink.remove_all_steering().await;
    };
    info!(device, "encryption is off; packets that still come encrypted are taken in");
    let wireguard = Wireguard::open(device)?;
    let (mut quiet, mut before) = (0, None);
    while quiet < QUIET {
        sleep(LOOK).await;
        let received: u64 = wireguard.read().await?.peers.values().map(|peer| peer.received).sum();
        quiet = if before == Some(received) { quiet + 1 } else { 0 };
        before = Some(received);
    }
    netlink.remove_all_steering().await?;
    netlink.remove_link(index).await?;
    info!(device, "nothing comes encrypted any more; removed the device");
    Ok(())
}

/// [`leave`] in the background.
pub(crate) async fn leave_quietly(netlink: Netlink, device: String) {
    if let Err(error) = leave(&netlink, &device).await {
        warn!(%error, "cannot remove all that encryption has left");
    }
}
