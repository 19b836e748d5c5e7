//! Makes the kernel follow what is to be encrypted, by WireGuard, IPsec, or both of them.
//!
//! With both, each tells the other to which nodes it encrypts. A node that announces a key for IPsec is sent to by that,
//! once it has been heard by it; others by WireGuard. What goes over from one to the other is encrypted twice for a
//! moment: the one that takes over begins before the other one ends.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};
use tracing::{error, warn};

use super::announce::PublicKeys;
use super::ipsec::{IpsecSide, LeftOver, NodeKey};
use super::rotate::Rotate;
use super::wireguard_side::WireguardSide;
use super::{EncryptionOptions, KeyError, Keys, Report, RotateError, TunnelBoard, ipsec, leave_quietly};
use crate::engine::Input;
use crate::netlink::{Netlink, NetlinkError, WireguardLinks};
use crate::tunnels::Tunnels;

/// All is read again this often: others may have changed something, and peers have not answered yet.
const REPEAT: Duration = Duration::from_secs(30);
/// After a failure.
const RETRY: Duration = Duration::from_secs(1);

/// See the module.
pub struct Keeper {
    netlink: Netlink,
    /// Names of the WireGuard devices, of which there may be some of an earlier life.
    device: String,
    wireguard: Option<WireguardSide>,
    ipsec: Option<IpsecSide>,
    /// What IPsec of an earlier life encrypts to, until WireGuard does.
    before: Option<LeftOver>,
    told: BTreeSet<IpAddr>,
    announced: watch::Sender<PublicKeys>,
    /// Who asked for the keys that are not announced yet.
    asked: Vec<Rotate>,
    /// What an earlier life has left of the other one has still to go.
    leaves: bool,
}

/// The private keys of a node that encrypts.
pub struct Secrets {
    /// None: it does not use WireGuard.
    pub wireguard: Option<Keys>,
    /// None: it does not use IPsec.
    pub ipsec: Option<NodeKey>,
}

/// With whom a keeper speaks.
pub struct Lines {
    /// What has changed in the mesh.
    pub board: TunnelBoard,
    /// Is told to which nodes packets are encrypted.
    pub engine: mpsc::Sender<Input>,
    /// How it stands, after each round.
    pub report: watch::Sender<Report>,
    /// Who wants a new key.
    pub rotate: mpsc::Receiver<Rotate>,
}

/// A node, and what its tunnels are like.
#[derive(Clone, Copy, Debug)]
pub struct Here<'a> {
    /// Its cluster.
    pub cluster: u16,
    /// Its name.
    pub node: &'a str,
    /// Of its tunnels, and their source; none: the kernel chooses.
    pub tunnels: Tunnels,
    /// Their UDP port.
    pub tunnel_port: u16,
    /// MTU of the underlay.
    pub underlay: u32,
}

impl Secrets {
    /// Reads or makes what these options need.
    ///
    /// # Errors
    /// See [`KeyError`].
    pub fn new(options: &EncryptionOptions) -> Result<Self, KeyError> {
        Ok(Self {
            wireguard: options.wireguard.then(|| Keys::load_or_create(&options.state_dir)).transpose()?,
            ipsec: options.ipsec.then(NodeKey::random).transpose()?,
        })
    }
}

impl Keeper {
    /// Takes over what there is, or makes it.
    ///
    /// # Errors
    /// The kernel cannot do one of what is asked for, or refused.
    pub async fn open(
        netlink: Netlink,
        options: &EncryptionOptions,
        secrets: Secrets,
        here: Here<'_>,
    ) -> Result<Self, NetlinkError> {
        let name = (here.cluster, here.node);
        // First, for it leaves nothing if the kernel cannot.
        let ipsec = match (secrets.ipsec, here.tunnels.node_ip) {
            (Some(key), Some(ip)) => Some(IpsecSide::open(options, key, name, ip, here.tunnel_port).await?),
            (Some(_), None) => return Err(NetlinkError::NoNodeIp),
            (None, _) => None,
        };
        let wireguard = match secrets.wireguard {
            Some(keys) => Some(WireguardSide::open(netlink.clone(), options, keys, here).await?),
            None => None,
        };
        let before = match (&ipsec, here.tunnels.node_ip) {
            (None, Some(ip)) => LeftOver::find(ip, here.tunnel_port).await?,
            _ => None,
        };
        let mut keeper = Self {
            netlink,
            device: options.device.clone(),
            leaves: wireguard.is_none() || ipsec.is_none(),
            wireguard,
            ipsec,
            before,
            told: BTreeSet::new(),
            announced: watch::Sender::new(PublicKeys::default()),
            asked: Vec::new(),
        };
        keeper.told = keeper.encrypted();
        keeper.announced.send_replace(keeper.public_keys());
        Ok(keeper)
    }

    /// The WireGuard devices, if it is used.
    pub fn links(&self) -> Option<&WireguardLinks> {
        self.wireguard.as_ref().map(WireguardSide::links)
    }

    /// This node's public keys, as they are to be announced.
    pub fn announced(&self) -> watch::Receiver<PublicKeys> {
        self.announced.subscribe()
    }

    /// Addresses that packets are encrypted to; at first those of an earlier life.
    pub fn encrypted(&self) -> BTreeSet<IpAddr> {
        let by_wireguard = self.wireguard.iter().flat_map(|side| side.core().encrypted());
        let by_ipsec = self.ipsec.iter().flat_map(|side| side.core().encrypted());
        let before = self.before.iter().flat_map(LeftOver::encrypted);
        by_wireguard.chain(by_ipsec).chain(before).collect()
    }

    /// Follows the board for good. Tells the engine to which nodes packets are encrypted.
    pub async fn run(mut self, mut lines: Lines) {
        // Nothing is known before the engine has told what an earlier life knew, at least.
        lines.board.changed().await;
        let mut look_at = Instant::now();
        let mut failing: Option<String> = None;
        loop {
            self.apply(&lines.board);
            let whole = Instant::now() >= look_at;
            let done = self.round(whole).await;
            let mut wait = self.pause();
            match done {
                Ok(()) => {
                    failing = None;
                    self.announce();
                    self.replace_keys();
                    self.leave_other();
                    if whole {
                        look_at = Instant::now() + REPEAT;
                    }
                }
                Err(error) => {
                    let error = error.to_string();
                    if failing.as_ref() != Some(&error) {
                        warn!(error, "cannot encrypt as wanted; retrying");
                    }
                    failing = Some(error);
                    look_at = Instant::now() + RETRY;
                    wait = RETRY;
                }
            }
            self.tell(&lines.engine).await;
            lines.report.send_replace(self.report(failing.clone()));
            let until = look_at.min(Instant::now() + wait);
            // In any case there is something to look at.
            tokio::select! {
                () = lines.board.changed() => {}
                Some(asked) = lines.rotate.recv() => self.rotate(asked),
                asked = hellos(self.ipsec.as_ref()) => self.answer(asked),
                () = sleep_until(until) => {}
            }
        }
    }

    fn apply(&mut self, board: &TunnelBoard) {
        let changes = board.take();
        if let Some(side) = &mut self.ipsec {
            side.apply(changes.clone());
        }
        if let Some(side) = &mut self.wireguard {
            side.apply(changes);
        }
    }

    /// Both get their turn, whatever the other one has met. Twice if there are two: what the second one has taken over
    /// the first one leaves.
    async fn round(&mut self, whole: bool) -> Result<(), NetlinkError> {
        self.pass(whole).await?;
        if self.wireguard.is_some() && self.ipsec.is_some() {
            self.pass(false).await?;
        }
        self.take_over().await
    }

    /// WireGuard takes over from IPsec of an earlier life. What it cannot is blocked before that lets go of it, if it is
    /// to be.
    async fn take_over(&mut self) -> Result<(), NetlinkError> {
        let (Some(before), Some(side)) = (&mut self.before, &self.wireguard) else { return Ok(()) };
        let done = before.take_done(|ip| side.core().awaited(ip));
        if done.is_empty() {
            return Ok(());
        }
        self.pass(false).await?;
        match &self.before {
            Some(before) => before.release(&done).await,
            None => Ok(()),
        }
    }

    async fn pass(&mut self, whole: bool) -> Result<(), NetlinkError> {
        let (mut by_wireguard, mut by_ipsec) = (Ok(()), Ok(()));
        if let Some(side) = &mut self.wireguard {
            let (kept, encrypted) = match (&self.ipsec, &self.before) {
                (Some(ipsec), _) => (ipsec.core().kept(), ipsec.core().encrypted()),
                (None, Some(before)) => (BTreeSet::new(), before.encrypted()),
                (None, None) => Default::default(),
            };
            side.set_elsewhere(kept, encrypted);
            by_wireguard = side.round(whole).await;
        }
        if let Some(side) = &mut self.ipsec {
            if let Some(wireguard) = &self.wireguard {
                side.set_wireguard(&wireguard.core().encrypted());
            }
            by_ipsec = side.round(whole).await;
        }
        by_wireguard.and(by_ipsec)
    }

    /// Others are told of a key when this node takes in what they send by it.
    fn announce(&mut self) {
        let keys = self.public_keys();
        self.announced.send_if_modified(|announced| std::mem::replace(announced, keys) != keys);
        for asked in self.asked.drain(..) {
            // Who does not wait any more has got what was asked for.
            let _ = asked.send(Ok(keys));
        }
    }

    fn public_keys(&self) -> PublicKeys {
        PublicKeys {
            wireguard: self.wireguard.as_ref().map(WireguardSide::public),
            ipsec: self.ipsec.as_ref().map(IpsecSide::public),
        }
    }

    /// What nobody asked for: at the key's age, or because it cannot be used any more.
    fn replace_keys(&mut self) {
        let mut done = Ok(());
        if let Some(side) = &mut self.wireguard {
            side.retire();
            if side.is_due() {
                done = side.rotate();
            }
        }
        if let Some(side) = self.ipsec.as_mut().filter(|side| side.is_due()) {
            done = done.and(side.rotate());
        }
        if let Err(error) = done {
            error!(%error, "cannot replace this node's key");
        }
    }

    fn rotate(&mut self, asked: Rotate) {
        match self.try_rotate() {
            Ok(()) => self.asked.push(asked),
            // As above.
            Err(error) => drop(asked.send(Err(error))),
        }
    }

    /// All keys, or none.
    fn try_rotate(&mut self) -> Result<(), RotateError> {
        self.wireguard.as_ref().map_or(Ok(()), WireguardSide::may_rotate)?;
        self.ipsec.as_ref().map_or(Ok(()), IpsecSide::may_rotate)?;
        let failed = |error: KeyError| RotateError::Key(error.to_string());
        self.wireguard.as_mut().map_or(Ok(()), WireguardSide::rotate).map_err(failed)?;
        self.ipsec.as_mut().map_or(Ok(()), IpsecSide::rotate).map_err(failed)
    }

    fn answer(&mut self, asked: Vec<IpAddr>) {
        if let Some(side) = &mut self.ipsec {
            side.answer(asked);
        }
    }

    /// Not before what is to be encrypted, or blocked, by the one that is used is: the other one may have done so up
    /// to now.
    fn leave_other(&mut self) {
        self.before = self.before.take().filter(|before| !before.is_empty());
        if self.before.is_some() || !std::mem::replace(&mut self.leaves, false) {
            return;
        }
        if self.wireguard.is_none() {
            tokio::spawn(leave_quietly(self.netlink.clone(), self.device.clone()));
        }
        if self.ipsec.is_none() {
            tokio::spawn(ipsec::leave_quietly());
        }
    }

    fn report(&self, error: Option<String>) -> Report {
        let by_wireguard = self.wireguard.as_ref().map(|side| Report::of_wireguard(side.core(), side.keys()));
        let by_ipsec = self.ipsec.as_ref().map(|side| Report::of_ipsec(side.core(), side.made()));
        let report = match (by_wireguard, by_ipsec) {
            (Some(wireguard), Some(ipsec)) => wireguard.with(ipsec),
            (one, other) => one.or(other).unwrap_or_default(),
        };
        Report { error, ..report }
    }

    fn pause(&self) -> Duration {
        let wireguard = self.wireguard.as_ref().and_then(WireguardSide::pause);
        let ipsec = self.ipsec.as_ref().and_then(IpsecSide::pause);
        let before = self.before.as_ref().map(|_| RETRY);
        wireguard.into_iter().chain(ipsec).chain(before).min().unwrap_or(REPEAT)
    }

    async fn tell(&mut self, engine: &mpsc::Sender<Input>) {
        let encrypted = self.encrypted();
        if encrypted != self.told {
            self.told.clone_from(&encrypted);
            // Fails only when the engine has ended, and the agent with it.
            let _ = engine.send(Input::Encrypted(encrypted)).await;
        }
    }
}

async fn hellos(ipsec: Option<&IpsecSide>) -> Vec<IpAddr> {
    match ipsec {
        Some(side) => side.asked().await,
        None => std::future::pending().await,
    }
}
