//! Makes the kernel follow the [`Core`], and says hello.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, SystemTime};

use clustermesh_kvstore::record::IpsecKey;
use tokio::net::UdpSocket;
use tokio::time::{Instant, sleep};
use tracing::{debug, info, warn};

use super::super::{EncryptionOptions, KeyError, RotateError};
use super::core::EAGER;
use super::old::QUIET;
use super::{Agree as _, Core, HELLO_PORT, Hello, NodeKey, Own, Step};
use crate::netlink::{NetlinkError, Xfrm};
use crate::tunnels::EndChanges;

/// While others have not been heard that were asked a short time ago.
const POLL: Duration = Duration::from_millis(100);
/// And so much more for each association, all of which are read.
const POLL_EACH: Duration = Duration::from_micros(100);
/// After that, while some have still not been heard, or something is left of old keys.
const POLL_SLOWLY: Duration = Duration::from_secs(5);
/// From one look at hellos to the next: whoever sends them makes no more work than that.
const LISTEN: Duration = Duration::from_millis(100);
/// Hellos in one look.
const MANY: usize = 256;
/// A key is used at least for so long.
const LEAST: Duration = QUIET;
/// And if it is the agent's own idea, so long.
const LEAST_BY_ITSELF: Duration = Duration::from_secs(60);

/// See the module.
pub struct IpsecSide {
    xfrm: Xfrm,
    core: Core,
    socket: UdpSocket,
    rotation: Option<Duration>,
    began: Instant,
    /// When the present key was made.
    since: Instant,
    made: SystemTime,
    /// The first key of a life may be replaced at once.
    is_first: bool,
}

impl IpsecSide {
    /// Takes over what an earlier life has left, with a new key.
    ///
    /// # Errors
    /// The kernel cannot, or the port is in use.
    pub async fn open(
        options: &EncryptionOptions,
        key: NodeKey,
        (cluster, node): (u16, &str),
        own: IpAddr,
        tunnel_port: u16,
    ) -> Result<Self, NetlinkError> {
        let xfrm = Xfrm::open(own, tunnel_port)?;
        xfrm.check().await?;
        let address = SocketAddr::from((own, HELLO_PORT));
        let socket =
            UdpSocket::bind(address).await.map_err(|source| NetlinkError::Hello { address, source })?;
        xfrm.remove_stale().await?;
        let installed = xfrm.read().await?;
        info!(key = %key.public(), states = installed.states.len(), "IPsec is there");
        let own = Own { cluster, node: node.to_owned(), ip: own };
        let core = Core::new(own, Box::new(key), options.scope, options.strict, options.wireguard, installed);
        Ok(Self {
            xfrm,
            core,
            socket,
            rotation: options.rotation,
            began: Instant::now(),
            since: Instant::now(),
            made: SystemTime::now(),
            is_first: true,
        })
    }

    /// What is known.
    pub(in super::super) fn core(&self) -> &Core {
        &self.core
    }

    /// When the present key was made.
    pub(in super::super) fn made(&self) -> SystemTime {
        self.made
    }

    /// This node's public key.
    pub(in super::super) fn public(&self) -> IpsecKey {
        self.core.public()
    }

    /// The mesh has changed.
    pub(in super::super) fn apply(&mut self, changes: EndChanges) {
        self.core.apply(changes);
    }

    /// WireGuard encrypts to these addresses by now.
    pub(in super::super) fn set_wireguard(&mut self, encrypted: &BTreeSet<IpAddr>) {
        self.core.set_wireguard(encrypted);
    }

    /// Reads what has to be read and does what is to be done. `whole`: all is read anew.
    pub(in super::super) async fn round(&mut self, whole: bool) -> Result<(), NetlinkError> {
        self.core.pass(self.began.elapsed());
        if whole || self.core.waits().1 || self.core.has_old() {
            self.core.observe(self.xfrm.read().await?);
        }
        for step in self.core.plan() {
            if self.perform(&step).await? {
                self.core.done(&step);
            }
        }
        for hello in self.core.hellos() {
            self.say(hello);
        }
        Ok(())
    }

    /// Whether it was done.
    async fn perform(&mut self, step: &Step) -> Result<bool, NetlinkError> {
        match step {
            Step::Add { association, inbound } => {
                let is_free = self.xfrm.add(association, *inbound).await?;
                if !is_free {
                    warn!(id = ?association.id, "another program has an IPsec state with this SPI");
                    self.core.taken(association.id);
                }
                return Ok(is_free);
            }
            Step::Greet(ip, spi) => self.xfrm.greet(*ip, *spi).await?,
            Step::Steer(ip, way) => self.xfrm.steer(*ip, *way).await?,
            Step::Remove(id) => self.xfrm.remove(*id).await?,
        }
        Ok(true)
    }

    /// One that is lost is said again as long as it is needed.
    fn say(&self, Hello { to, asks }: Hello) {
        if let Err(error) = self.socket.try_send_to(&[asks.into()], (to, HELLO_PORT).into()) {
            debug!(%error, %to, "cannot say hello; trying again");
        }
    }

    /// Waits until somebody asks. Nothing is lost if it is waited for no more.
    pub(in super::super) async fn asked(&self) -> Vec<IpAddr> {
        loop {
            sleep(LISTEN).await;
            // Fails only if the runtime is about to end.
            let _ = self.socket.readable().await;
            let mut asked = BTreeSet::new();
            let mut said = [0; 1];
            for _ in 0..MANY {
                let Ok((_, from)) = self.socket.try_recv_from(&mut said) else { break };
                if said == [1] {
                    asked.insert(from.ip());
                }
            }
            if !asked.is_empty() {
                return asked.into_iter().collect();
            }
        }
    }

    /// These have asked.
    pub(in super::super) fn answer(&mut self, asked: Vec<IpAddr>) {
        asked.into_iter().for_each(|ip| self.core.asked(ip));
    }

    /// Whether the key is to be replaced though nobody asks for it.
    pub(in super::super) fn is_due(&self) -> bool {
        let age = self.since.elapsed();
        let is_old = self.rotation.is_some_and(|interval| age >= interval);
        let is_needed = self.core.needs_key() && (self.is_first || age >= LEAST_BY_ITSELF);
        is_old || is_needed
    }

    /// Whether the key may be replaced.
    ///
    /// # Errors
    /// It is too young.
    pub(in super::super) fn may_rotate(&self) -> Result<(), RotateError> {
        let left = LEAST.saturating_sub(self.since.elapsed());
        if self.is_first || left.is_zero() { Ok(()) } else { Err(RotateError::TooYoung(left.as_secs() + 1)) }
    }

    /// Replaces the key.
    ///
    /// # Errors
    /// The kernel gives no random numbers; then all is as before.
    pub(in super::super) fn rotate(&mut self) -> Result<(), KeyError> {
        let key = NodeKey::random()?;
        info!(key = %key.public(), "replacing this node's key for IPsec");
        self.core.rotate(Box::new(key));
        (self.since, self.made, self.is_first) = (Instant::now(), SystemTime::now(), false);
        Ok(())
    }

    /// Until the next look; none: nothing is waited for.
    pub(in super::super) fn pause(&self) -> Option<Duration> {
        let each = u32::try_from(self.core.installed().states.len()).unwrap_or(u32::MAX);
        match self.core.waits() {
            (true, _) => Some((POLL + POLL_EACH * each).min(EAGER)),
            (false, waits) if waits || self.core.has_old() || self.core.needs_key() => Some(POLL_SLOWLY),
            _ => None,
        }
    }
}
