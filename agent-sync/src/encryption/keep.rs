//! Makes the kernel follow the [`Core`].

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::time::Duration;

use clustermesh_kvstore::record::WireguardKey;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};
use tracing::{error, info, warn};

use super::devices::Devices;
use super::rotate::{Rotate, RotateError, is_due};
use super::{Core, EncryptionOptions, KeyError, Keys, Own, PrivateKey, Report, Step, TunnelBoard};
use crate::engine::Input;
use crate::netlink::{Netlink, NetlinkError, PeerChange, WireguardLinks};

/// While peers have not answered that were asked a short time ago.
const POLL: Duration = Duration::from_millis(100);
/// So long.
const PATIENCE: Duration = Duration::from_secs(10);
/// After that, while some have still not answered, or something is left of old keys.
const POLL_SLOWLY: Duration = Duration::from_secs(5);
/// All is read again this often: others may have changed something, and peers have not answered yet.
const REPEAT: Duration = Duration::from_secs(30);
/// After a failure.
const RETRY: Duration = Duration::from_secs(1);

/// See the module.
pub struct Keeper {
    netlink: Netlink,
    devices: Devices,
    rotation: Option<Duration>,
    tunnel_port: u16,
    keys: Keys,
    core: Core,
    began: Instant,
    patient_until: Instant,
    told: BTreeSet<Ipv4Addr>,
    announced: watch::Sender<WireguardKey>,
    /// Who asked for the key that is not announced yet.
    asked: Vec<Rotate>,
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

impl Keeper {
    /// Takes over the devices, or makes them, with this node's keys.
    ///
    /// # Errors
    /// The kernel has no WireGuard, or refused.
    pub async fn open(
        netlink: Netlink,
        options: EncryptionOptions,
        keys: Keys,
        (cluster, node): (u16, &str),
        tunnel_port: u16,
        mtu: u32,
    ) -> Result<Self, NetlinkError> {
        let devices = Devices::open(netlink.clone(), &options, mtu).await?;
        let installed = devices.read(&keys).await?;
        let key = keys.current().public();
        let previous = keys.previous().map(PrivateKey::public);
        let own = Own { cluster, node: node.to_owned(), key, previous };
        let core = Core::new(own, options.scope, options.strict, options.port, installed);
        let told = core.encrypted();
        info!(devices = options.device, %key, peers = core.installed().peers.len(), "WireGuard is there");
        Ok(Self {
            netlink,
            devices,
            rotation: options.rotation,
            tunnel_port,
            keys,
            core,
            began: Instant::now(),
            patient_until: Instant::now(),
            told,
            announced: watch::Sender::new(key),
            asked: Vec::new(),
        })
    }

    /// The devices.
    pub fn links(&self) -> &WireguardLinks {
        self.devices.links()
    }

    /// This node's public key, as it is to be announced.
    pub fn public_key(&self) -> watch::Receiver<WireguardKey> {
        self.announced.subscribe()
    }

    /// Addresses that an earlier life encrypts to.
    pub fn encrypted(&self) -> BTreeSet<Ipv4Addr> {
        self.core.encrypted()
    }

    /// Follows the board for good. Tells the engine to which nodes packets are encrypted.
    pub async fn run(mut self, mut lines: Lines) {
        // Nothing is known before the engine has told what an earlier life knew, at least.
        lines.board.changed().await;
        let mut look_at = Instant::now();
        let mut failing: Option<String> = None;
        loop {
            self.core.apply(lines.board.take());
            let whole = Instant::now() >= look_at;
            let done = self.round(whole).await;
            let mut wait = self.pause();
            match done {
                Ok(()) => {
                    failing = None;
                    self.announce();
                    self.replace_keys();
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
            lines.report.send_replace(Report::new(&self.core, &self.keys, failing.clone()));
            let until = look_at.min(Instant::now() + wait);
            // In any case there is something to look at.
            tokio::select! {
                () = lines.board.changed() => {}
                Some(asked) = lines.rotate.recv() => self.rotate(Some(asked)),
                () = sleep_until(until) => {}
            }
        }
    }

    /// Reads what has to be read and does what is to be done. `whole`: all is read anew.
    async fn round(&mut self, whole: bool) -> Result<(), NetlinkError> {
        let now = self.began.elapsed();
        if whole {
            self.netlink.ensure_rule(self.tunnel_port).await?;
            self.core.observe(self.devices.read(&self.keys).await?, now);
            let greet: Vec<_> = self.core.waiting().collect();
            for (lane, key) in greet {
                self.devices.change(lane, &[PeerChange::Greet(key)]).await?;
            }
        } else if self.core.waiting().next().is_some() || self.core.has_old() {
            let known = self.core.installed().clone();
            self.core.observe(self.devices.read_peers(known).await?, now);
        }
        for step in self.core.plan() {
            self.perform(&step).await?;
            self.core.done(&step);
        }
        Ok(())
    }

    async fn perform(&mut self, step: &Step) -> Result<(), NetlinkError> {
        match step {
            Step::Open(lane) => self.devices.bring_up(*lane, &self.keys).await,
            Step::Close(lane) => self.devices.take_down(*lane).await,
            Step::Peers(lane, changes) => {
                if changes.iter().any(|change| matches!(change, PeerChange::Greet(_))) {
                    self.patient_until = Instant::now() + PATIENCE;
                }
                self.devices.change(*lane, changes).await
            }
            Step::Steer(ip, steering) => {
                self.netlink.steer(self.devices.links(), *ip, *steering, self.core.own_ip()).await
            }
        }
    }

    /// Others are told of a key when this node listens for those who will use it.
    fn announce(&mut self) {
        let key = self.keys.current().public();
        self.announced.send_if_modified(|announced| std::mem::replace(announced, key) != key);
        for asked in self.asked.drain(..) {
            // Who does not wait any more has got what was asked for.
            let _ = asked.send(Ok(key));
        }
    }

    /// The previous key goes when nobody uses it; the present one is replaced at its age.
    fn replace_keys(&mut self) {
        match self.core.previous() {
            Some((_, false)) => return,
            Some((previous, true)) => {
                if let Err(error) = self.keys.retire() {
                    warn!(%error, "cannot remove the previous key");
                    return;
                }
                info!(key = %previous, "nobody uses the previous key any more; removed it");
                self.core.retire();
            }
            None => {}
        }
        // A clock that was set back only makes it later.
        if is_due(self.rotation, self.keys.made().elapsed().ok()) {
            self.rotate(None);
        }
    }

    fn rotate(&mut self, asked: Option<Rotate>) {
        match self.try_rotate() {
            Ok(()) => self.asked.extend(asked),
            Err(error) => {
                if asked.is_none() {
                    error!(%error, "cannot replace this node's key");
                }
                // As above.
                let _ = asked.map(|asked| asked.send(Err(error)));
            }
        }
    }

    fn try_rotate(&mut self) -> Result<(), RotateError> {
        if self.core.previous().is_some() {
            return Err(RotateError::UnderWay(self.core.behind().len()));
        }
        self.keys.rotate().map_err(|error: KeyError| RotateError::Key(error.to_string()))?;
        let key = self.keys.current().public();
        info!(%key, "replacing this node's key");
        self.core.rotate(key);
        Ok(())
    }

    fn pause(&self) -> Duration {
        match self.core.waiting().next() {
            Some(_) if Instant::now() < self.patient_until => POLL,
            None if !self.core.has_old() && self.core.previous().is_none() => REPEAT,
            _ => POLL_SLOWLY,
        }
    }

    async fn tell(&mut self, engine: &mpsc::Sender<Input>) {
        let encrypted = self.core.encrypted();
        if encrypted != self.told {
            self.told.clone_from(&encrypted);
            // Fails only when the engine has ended, and the agent with it.
            let _ = engine.send(Input::Encrypted(encrypted)).await;
        }
    }
}
