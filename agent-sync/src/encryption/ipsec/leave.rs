//! The end of IPsec on a node whose agent starts without it. Others may go on to encrypt for a while.

use std::net::Ipv4Addr;
use std::time::Duration;

use tokio::time::sleep;
use tracing::{info, warn};

use crate::netlink::{NetlinkError, Xfrm};

/// Between two looks at what arrives.
const LOOK: Duration = Duration::from_secs(5);
/// The associations go when nothing has come by them in so many looks.
const QUIET: u32 = 6;

/// Stops to encrypt what this node sends, at once; goes on to decrypt until the others have stopped, too. Ends when
/// nothing of IPsec is left, or the kernel has none.
///
/// # Errors
/// The kernel refused; what is left does no harm, and the next start tries again.
pub async fn leave() -> Result<(), NetlinkError> {
    let xfrm = match Xfrm::open(Ipv4Addr::UNSPECIFIED.into(), 0) {
        Err(NetlinkError::NoIpsec(_)) => return Ok(()),
        xfrm => xfrm?,
    };
    xfrm.remove_policies().await?;
    let received = async || {
        let states = xfrm.read().await?.states;
        Ok::<_, NetlinkError>((states.len(), states.values().map(|state| state.packets).sum::<u64>()))
    };
    let mut before = received().await?;
    if before.0 == 0 {
        return Ok(());
    }
    info!("IPsec is off; packets that still come encrypted are taken in");
    let mut quiet = 0;
    while quiet < QUIET {
        sleep(LOOK).await;
        let now = received().await?;
        quiet = if before == now { quiet + 1 } else { 0 };
        before = now;
    }
    xfrm.remove_states().await?;
    info!("nothing comes by IPsec any more; removed its states");
    Ok(())
}

/// [`leave`] in the background.
pub(crate) async fn leave_quietly() {
    if let Err(error) = leave().await {
        warn!(%error, "cannot remove all that IPsec has left");
    }
}
