//! Calls from outside, past the kernel: which devices run the program for it, and what runs it there.

use std::collections::BTreeSet;

use ebpf_global_svc::{self as kernel, Datapath, DatapathError};
use tracing::{info, warn};

use crate::netlink::{Netlink, NetlinkError};

/// What the operator wants of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acceleration {
    /// Nothing.
    Disabled,
    /// Every device's driver runs the program, or the agent does not start.
    Native,
    /// Drivers that can run it.
    BestEffort,
    /// The kernel runs it, for any driver.
    TestingOnly,
}

/// Why a device cannot have what the operator wants.
#[derive(Debug, thiserror::Error)]
pub enum AccelerationError {
    /// Its driver.
    #[error("--bpf-lb-acceleration native: {0}; with best-effort such a device is left to tc")]
    Driver(DatapathError),
    /// A driver that runs it, and loses what it sends back unless the other end, whoever has that, runs one too.
    #[error(
        "--bpf-lb-acceleration native: device {0} is one end of a veth pair, of which the other end cannot be seen; \
         testing-only works there"
    )]
    Veth(u32),
    /// The kernel.
    #[error(transparent)]
    Datapath(#[from] DatapathError),
    /// The kernel's list of devices.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
}

/// Has devices run the program, those and no others. Nothing does if something may have to be encrypted: that is the
/// kernel's.
///
/// # Errors
/// See [`AccelerationError`]; devices before the one that failed run it.
pub(crate) async fn accelerate(
    netlink: &Netlink,
    datapath: &mut Datapath,
    devices: &BTreeSet<u32>,
    wanted: Acceleration,
    encrypts: bool,
) -> Result<(), AccelerationError> {
    let mut left = devices.clone();
    if encrypts && wanted != Acceleration::Disabled {
        warn!(
            "encryption is on: calls from outside are not accelerated, whatever --bpf-lb-acceleration says"
        );
    } else if wanted != Acceleration::Disabled {
        for device in devices {
            if run(netlink, datapath, *device, wanted).await? {
                left.remove(device);
            }
        }
    }
    let running: BTreeSet<_> = datapath.accelerated()?.into_iter().map(|(device, _)| device).collect();
    for device in running.into_iter().filter(|device| !devices.contains(device) || left.contains(device)) {
        datapath.slow_down(device)?;
        info!(device, "calls from outside are not accelerated any more");
    }
    Ok(())
}

/// Whether the device runs the program now.
async fn run(
    netlink: &Netlink,
    datapath: &mut Datapath,
    device: u32,
    wanted: Acceleration,
) -> Result<bool, AccelerationError> {
    let by = match wanted {
        Acceleration::Disabled => return Ok(false),
        Acceleration::TestingOnly => kernel::Acceleration::Generic,
        Acceleration::Native | Acceleration::BestEffort => kernel::Acceleration::Driver,
    };
    let refused = if by == kernel::Acceleration::Driver && netlink.is_veth(device).await? {
        Some(AccelerationError::Veth(device))
    } else {
        match datapath.accelerate(device, by) {
            Ok(()) => None,
            Err(error @ DatapathError::Attach { .. }) => Some(AccelerationError::Driver(error)),
            Err(error) => return Err(error.into()),
        }
    };
    match (refused, wanted) {
        (None, _) => {
            info!(device, ?by, "calls from outside are accelerated");
            Ok(true)
        }
        (Some(error), Acceleration::BestEffort) => {
            warn!(device, %error, "calls from outside are left to tc");
            Ok(false)
        }
        (Some(AccelerationError::Driver(error)), Acceleration::TestingOnly) => Err(error.into()),
        (Some(error), _) => Err(error),
    }
}
