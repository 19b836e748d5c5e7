//! Makes the kernel follow the [`Core`].

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::time::Duration;

use clustermesh_kvstore::record::WireguardKey;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout_at};
use tracing::{info, warn};

use super::{Core, EncryptionOptions, Installed, Own, PrivateKey, Refused, Step, TunnelBoard};
use crate::engine::Input;
use crate::netlink::{
    Netlink, NetlinkError, PeerChange, Steering, Wireguard, WireguardDevice, WireguardSpec,
};

/// While peers have not answered that were asked a short time ago.
const POLL: Duration = Duration::from_millis(100);
/// So long.
const PATIENCE: Duration = Duration::from_secs(10);
/// After that, while some have still not answered.
const POLL_SLOWLY: Duration = Duration::from_secs(5);
/// All is read again this often: others may have changed something, and peers have not answered yet.
const REPEAT: Duration = Duration::from_secs(30);
/// After a failure.
const RETRY: Duration = Duration::from_secs(1);

/// How it stands between this node and another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// What goes there is encrypted.
    Encrypted,
    /// It has not answered yet.
    Waiting,
    /// Its record has no key.
    NoKey,
    /// Its key does not count.
    Refused(Refused),
    /// Known from an earlier life only.
    Unconfirmed,
}

impl Standing {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Encrypted,
        Self::Waiting,
        Self::NoKey,
        Self::Refused(Refused::OwnKey),
        Self::Refused(Refused::AnothersKey),
        Self::Unconfirmed,
    ];

    /// The word for metrics and the command line.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Encrypted => "encrypted",
            Self::Waiting => "waiting",
            Self::NoKey => "no_key",
            Self::Refused(reason) => reason.as_str(),
            Self::Unconfirmed => "unconfirmed",
        }
    }
}

/// A node in the report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReportedPeer {
    /// Its cluster.
    pub cluster: u16,
    /// Its name; empty if only an earlier life knew it.
    pub node: String,
    /// One of its underlay addresses.
    pub ip: Ipv4Addr,
    /// How it stands.
    pub standing: Standing,
    /// When the last handshake was, in seconds since the Unix epoch; 0: never.
    pub handshake: u64,
    /// Bytes from it and to it.
    pub received: u64,
    /// Bytes to it.
    pub sent: u64,
}

/// How encryption is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// All addresses that are to be encrypted, in their order.
    pub peers: Vec<ReportedPeer>,
    /// Why the kernel does not follow; none: it does.
    pub error: Option<String>,
}

/// See the module.
pub struct Keeper {
    netlink: Netlink,
    wireguard: Wireguard,
    ifindex: u32,
    options: EncryptionOptions,
    tunnel_port: u16,
    key: PrivateKey,
    core: Core,
    patient_until: Instant,
    told: BTreeSet<Ipv4Addr>,
}

impl Keeper {
    /// Takes over the device, or makes it, with this node's key.
    ///
    /// # Errors
    /// The kernel has no WireGuard, or refused.
    pub async fn open(
        netlink: Netlink,
        options: EncryptionOptions,
        key: PrivateKey,
        (cluster, node): (u16, &str),
        tunnel_port: u16,
        mtu: u32,
    ) -> Result<Self, NetlinkError> {
        let spec = WireguardSpec { name: options.device.clone(), port: options.port, mtu };
        let ifindex = netlink.ensure_wireguard(&spec).await?;
        loosen_source_check(&options.device);
        let wireguard = Wireguard::open(&options.device)?;
        let found = wireguard.read().await?;
        if found.key != Some(key.public()) || found.port != options.port {
            wireguard.configure(key.bytes(), options.port).await?;
        }
        let installed = Installed { peers: found.peers, steering: netlink.steered(ifindex).await? };
        let own = Own { cluster, node: node.to_owned(), key: key.public() };
        let core = Core::new(own, options.scope, options.strict, options.port, installed);
        let told = core.encrypted();
        info!(device = options.device, key = %key.public(), peers = core.installed().peers.len(), "WireGuard is there");
        Ok(Self {
            netlink,
            wireguard,
            ifindex,
            options,
            tunnel_port,
            key,
            core,
            patient_until: Instant::now(),
            told,
        })
    }

    /// The device.
    pub fn ifindex(&self) -> u32 {
        self.ifindex
    }

    /// This node's public key.
    pub fn public_key(&self) -> WireguardKey {
        self.key.public()
    }

    /// Addresses that an earlier life encrypts to.
    pub fn encrypted(&self) -> BTreeSet<Ipv4Addr> {
        self.core.encrypted()
    }

    /// Follows the board for good. Tells the engine to which nodes packets are encrypted.
    pub async fn run(
        mut self,
        board: TunnelBoard,
        engine: mpsc::Sender<Input>,
        report: watch::Sender<Report>,
    ) {
        // Nothing is known before the engine has told what an earlier life knew, at least.
        board.changed().await;
        let mut look_at = Instant::now();
        let mut failing: Option<String> = None;
        loop {
            self.core.apply(board.take());
            let whole = Instant::now() >= look_at;
            let done = self.round(whole).await;
            let mut wait = self.pause();
            match done {
                Ok(()) => {
                    failing = None;
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
            self.tell(&engine).await;
            report.send_replace(Report { peers: self.peers(), error: failing.clone() });
            let until = look_at.min(Instant::now() + wait);
            // Either way there is something to look at.
            let _ = timeout_at(until, board.changed()).await;
        }
    }

    /// Reads what has to be read and does what is to be done. `whole`: all is read anew.
    async fn round(&mut self, whole: bool) -> Result<(), NetlinkError> {
        if whole {
            self.netlink.ensure_rule(self.tunnel_port).await?;
            let device = self.wireguard.read().await?;
            self.check(&device).await?;
            let steering = self.netlink.steered(self.ifindex).await?;
            self.core.observe(Installed { peers: device.peers, steering });
            let greet: Vec<_> = self.core.waiting().map(PeerChange::Greet).collect();
            self.wireguard.change(&greet).await?;
        } else if self.core.waiting().next().is_some() {
            self.read_peers().await?;
        }
        for step in self.core.plan() {
            self.perform(&step).await?;
            self.core.done(&step);
        }
        Ok(())
    }

    /// Somebody else may have changed the device itself.
    async fn check(&self, device: &WireguardDevice) -> Result<(), NetlinkError> {
        if device.key != Some(self.key.public()) || device.port != self.options.port {
            warn!(device = self.options.device, "its key or port was changed by somebody else; set again");
            self.wireguard.configure(self.key.bytes(), self.options.port).await?;
        }
        Ok(())
    }

    async fn read_peers(&mut self) -> Result<(), NetlinkError> {
        let peers = self.wireguard.read().await?.peers;
        let steering = self.core.installed().steering.clone();
        self.core.observe(Installed { peers, steering });
        Ok(())
    }

    async fn perform(&mut self, step: &Step) -> Result<(), NetlinkError> {
        match step {
            Step::Peers(changes) => {
                if changes.iter().any(|change| matches!(change, PeerChange::Greet(_))) {
                    self.patient_until = Instant::now() + PATIENCE;
                }
                self.wireguard.change(changes).await
            }
            Step::Steer(ip, steering) => {
                self.netlink.steer(self.ifindex, *ip, *steering, self.core.own_ip()).await
            }
        }
    }

    fn pause(&self) -> Duration {
        match self.core.waiting().next() {
            None => REPEAT,
            Some(_) if Instant::now() < self.patient_until => POLL,
            Some(_) => POLL_SLOWLY,
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

    fn peers(&self) -> Vec<ReportedPeer> {
        let installed = self.core.installed();
        let report = |(ip, end): (Ipv4Addr, &super::TunnelEnd)| {
            let node = end.node.as_ref();
            let name = node.map_or_else(String::new, |node| node.name.clone());
            let state = node.and_then(|node| installed.peers.get(&node.key?));
            let refused = self.core.refused().get(&(end.cluster, name.clone()));
            let standing = match (installed.steering.get(&ip), node) {
                (Some(Steering::Encrypted), _) => Standing::Encrypted,
                (_, None) => Standing::Unconfirmed,
                (_, Some(node)) if node.key.is_none() => Standing::NoKey,
                _ => refused.map_or(Standing::Waiting, |reason| Standing::Refused(*reason)),
            };
            let state = state.filter(|_| refused.is_none()).cloned().unwrap_or_default();
            ReportedPeer {
                cluster: end.cluster,
                node: name,
                ip,
                standing,
                handshake: state.handshake,
                received: state.received,
                sent: state.sent,
            }
        };
        self.core.ends().map(report).collect()
    }
}

/// The reverse path check would look for the way back without our rule, which is about UDP ports, and find another
/// device. WireGuard has checked the source already.
fn loosen_source_check(device: &str) {
    let path = format!("/proc/sys/net/ipv4/conf/{device}/rp_filter");
    if let Err(error) = std::fs::write(&path, "2") {
        warn!(%error, path, "cannot loosen the reverse path check: if it is strict, packets that come encrypted are lost");
    }
}
