//! IPsec's states and policies: netlink protocol `NETLINK_XFRM` (the kernel's `include/uapi/linux/xfrm.h`).
//!
//! Only what is ours is ever changed: states with [`REQID`], and policies with [`PRIORITY`] that lead to those or block.
//! Policies are about UDP packets from one address to another, so that the kernel finds each by a hash of both.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures::StreamExt as _;
use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_xfrm::policy::{DelGetMessage as PolicyId, ModifyMessage as Policy};
use netlink_packet_xfrm::state::{DelGetMessage as StateName, GetDumpMessage, ModifyMessage as State};
use netlink_packet_xfrm::{
    AF_INET, AF_INET6, Address, AlgAead, IPPROTO_ESP, IPPROTO_UDP, ReplayEsn, Selector, UserPolicyId,
    UserPolicyInfo, UserSaId, UserSaInfo, UserTemplate, XFRM_ALG_AEAD_NAME_LEN, XFRM_MODE_TRANSPORT,
    XFRM_POLICY_ALLOW, XFRM_POLICY_BLOCK, XFRM_POLICY_OUT, XFRM_STATE_ESN, XfrmAttrs, XfrmMessage,
};
use rtnetlink::proto::{ConnectionHandle, new_connection};
use rtnetlink::sys::SocketAddr;
use rtnetlink::sys::protocols::NETLINK_XFRM;
use tokio::sync::Mutex;

use super::{NetlinkError, host_prefix, libc_errno};
use crate::encryption::ipsec::{Association, HELLO_PORT, Installed, StateId, StateUse, Way};

/// Of all our states (`ip xfrm state list reqid 1129136535`): `CM`, and the number of our routes.
pub const REQID: u32 = 0x434d_4197;
/// Of all our policies. Others' are 0, some tens, or above a thousand; a lower one goes first.
pub const PRIORITY: u32 = 197;
/// AES with 256 bits in Galois counter mode (RFC 4106). The key has four bytes of salt behind it.
const ALGORITHM: &[u8] = b"rfc4106(gcm(aes))";
/// Of the key and the salt.
const KEY_BITS: u32 = 36 * 8;
/// The whole tag, in bits.
const TAG: u32 = 128;
/// Packets of which a repetition is noticed; on networks with several queues they come out of order.
const WINDOW: u32 = 2048;
/// A packet that was decrypted is marked as by `cm_from_wireguard`: see the programs' `mark.rs`.
const DECRYPTED: u32 = 0x0d00;
/// The part of a mark that is ours.
const MARK_BITS: u32 = 0x0f00;
/// SPI of an association that is made only to see whether the kernel can: from the node to itself.
const TRIAL: u32 = 0x197;

/// A connection about states and policies of this network namespace.
pub struct Xfrm {
    handle: ConnectionHandle<XfrmMessage>,
    /// A netlink socket carries one dump at a time.
    dumping: Mutex<()>,
    own: IpAddr,
    port: u16,
}

/// How much there is of ours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct XfrmCount {
    /// Security associations.
    pub states: usize,
    /// Policies.
    pub policies: usize,
}

/// A policy of ours.
struct Found {
    selector: Selector,
    way: Way,
}

impl Xfrm {
    /// Opens a connection; must run inside a tokio runtime, which drives it. `own` is the source of this node's tunnel
    /// packets, `port` their UDP port.
    ///
    /// # Errors
    /// [`NetlinkError::NoIpsec`] if the kernel has none, [`NetlinkError::Open`].
    pub fn open(own: IpAddr, port: u16) -> Result<Self, NetlinkError> {
        let (connection, handle, _) =
            new_connection(NETLINK_XFRM).map_err(|error| match error.raw_os_error() {
                Some(libc_errno::EPROTONOSUPPORT) => NetlinkError::NoIpsec("no module xfrm_user".into()),
                _ => NetlinkError::Open(error),
            })?;
        tokio::spawn(connection);
        Ok(Self { handle, dumping: Mutex::new(()), own, port })
    }

    /// Makes an association that nobody uses, and removes it.
    ///
    /// # Errors
    /// [`NetlinkError::NoIpsec`] if the kernel cannot, or what else it refused.
    pub async fn check(&self) -> Result<(), NetlinkError> {
        let (here, module) = match self.own {
            IpAddr::V4(_) => (IpAddr::from(Ipv4Addr::LOCALHOST), "esp4"),
            IpAddr::V6(_) => (IpAddr::from(Ipv6Addr::LOCALHOST), "esp6"),
        };
        let trial = StateId { source: here, destination: here, spi: TRIAL };
        // Of a life that ended in between.
        self.remove(trial).await?;
        match self.call(XfrmMessage::AddSa(state(&trial, &[0; 36], true)), NLM_F_ACK).await {
            Ok(_) => self.remove(trial).await,
            Err(error) => Err(match error.raw_os_error() {
                Some(libc_errno::EPERM | libc_errno::EACCES) => refused("cannot add an IPsec state")(error),
                Some(libc_errno::EPROTONOSUPPORT) => NetlinkError::NoIpsec(format!("no module {module}")),
                Some(libc_errno::ENOSYS | libc_errno::ENOENT) => {
                    NetlinkError::NoIpsec("no rfc4106(gcm(aes)): modules gcm, seqiv, ctr and an aes".into())
                }
                _ => NetlinkError::NoIpsec(error.to_string()),
            }),
        }
    }

    /// What there is of ours.
    ///
    /// # Errors
    /// A dump that the kernel refused.
    pub async fn read(&self) -> Result<Installed, NetlinkError> {
        let states = self.states().await?.into_iter().collect();
        let mut installed = Installed { states, ..Installed::default() };
        for Found { selector, way } in self.policies().await? {
            if !self.is_current(&selector) {
                continue;
            }
            let Some(to) = ip(selector.daddr, selector.family) else { continue };
            match (selector.dport, way) {
                (HELLO_PORT, Way::Encrypted(spi)) => drop(installed.hellos.insert(to, spi)),
                _ => drop(installed.ways.insert(to, way)),
            }
        }
        Ok(installed)
    }

    /// Removes policies of an earlier life with another address or port: they say nothing of what this one sends.
    ///
    /// # Errors
    /// What the kernel refused.
    pub async fn remove_stale(&self) -> Result<(), NetlinkError> {
        for found in self.policies().await? {
            if !self.is_current(&found.selector) {
                self.remove_policy(found.selector).await?;
            }
        }
        Ok(())
    }

    /// Adds an association; tells whether that name was free.
    ///
    /// # Errors
    /// What the kernel refused.
    pub async fn add(&self, association: &Association, inbound: bool) -> Result<bool, NetlinkError> {
        let id = &association.id;
        match self.call(XfrmMessage::AddSa(state(id, &association.key, inbound)), NLM_F_ACK).await {
            Err(error) if error.raw_os_error() == Some(libc_errno::EEXIST) => Ok(false),
            other => other
                .map(|_| true)
                .map_err(refused(format!("cannot add the IPsec state {} > {}", id.source, id.destination))),
        }
    }

    /// Removes an association; one that is gone is fine.
    ///
    /// # Errors
    /// What the kernel refused.
    pub async fn remove(&self, id: StateId) -> Result<(), NetlinkError> {
        let mut name = UserSaId { spi: id.spi, proto: IPPROTO_ESP, ..UserSaId::default() };
        name.destination(&id.destination);
        let message = XfrmMessage::DeleteSa(StateName { user_sa_id: name, nlas: Vec::new() });
        match self.call(message, NLM_F_ACK).await {
            Err(error) if error.raw_os_error() == Some(libc_errno::ESRCH) => Ok(()),
            other => other.map(drop).map_err(refused("cannot remove an IPsec state")),
        }
    }

    /// Sets what becomes of tunnel packets to `node`, in one step. None: they go as they are.
    ///
    /// # Errors
    /// What the kernel refused.
    pub async fn steer(&self, node: IpAddr, way: Option<Way>) -> Result<(), NetlinkError> {
        self.set_policy(node, self.port, way).await
    }

    /// Sets by which association a hello to `node` goes.
    ///
    /// # Errors
    /// What the kernel refused.
    pub async fn greet(&self, node: IpAddr, spi: Option<u32>) -> Result<(), NetlinkError> {
        self.set_policy(node, HELLO_PORT, spi.map(Way::Encrypted)).await
    }

    /// # Errors
    /// A dump that the kernel refused.
    pub async fn count(&self) -> Result<XfrmCount, NetlinkError> {
        Ok(XfrmCount { states: self.states().await?.len(), policies: self.policies().await?.len() })
    }

    /// Removes all policies of ours: from now on tunnel packets go as they are.
    ///
    /// # Errors
    /// What the kernel refused.
    pub async fn remove_policies(&self) -> Result<(), NetlinkError> {
        for found in self.policies().await? {
            self.remove_policy(found.selector).await?;
        }
        Ok(())
    }

    /// Removes all associations of ours.
    ///
    /// # Errors
    /// What the kernel refused.
    pub async fn remove_states(&self) -> Result<(), NetlinkError> {
        for (id, _) in self.states().await? {
            self.remove(id).await?;
        }
        Ok(())
    }

    async fn set_policy(&self, node: IpAddr, port: u16, way: Option<Way>) -> Result<(), NetlinkError> {
        let selector = Selector { dport: port, dport_mask: u16::MAX, ..between(self.own, node) };
        match way {
            None => self.remove_policy(selector).await,
            Some(way) => {
                let message = XfrmMessage::UpdatePolicy(policy(selector, way));
                let set = self.call(message, NLM_F_ACK).await.map(drop);
                set.map_err(refused(format!("cannot set the IPsec policy to {node}")))
            }
        }
    }

    async fn remove_policy(&self, selector: Selector) -> Result<(), NetlinkError> {
        let user_policy_id = UserPolicyId { selector, index: 0, direction: XFRM_POLICY_OUT };
        let message = XfrmMessage::DeletePolicy(PolicyId { user_policy_id, nlas: Vec::new() });
        match self.call(message, NLM_F_ACK).await {
            Err(error) if error.raw_os_error() == Some(libc_errno::ENOENT) => Ok(()),
            other => other.map(drop).map_err(refused("cannot remove an IPsec policy")),
        }
    }

    async fn states(&self) -> Result<Vec<(StateId, StateUse)>, NetlinkError> {
        let _one_dump = self.dumping.lock().await;
        let request = XfrmMessage::GetDumpSa(GetDumpMessage::default());
        let answers = self.call(request, NLM_F_DUMP).await.map_err(refused("cannot list IPsec states"))?;
        Ok(answers.iter().filter_map(parse_state).collect())
    }

    async fn policies(&self) -> Result<Vec<Found>, NetlinkError> {
        let _one_dump = self.dumping.lock().await;
        let request = XfrmMessage::GetPolicy(PolicyId::default());
        let answers = self.call(request, NLM_F_DUMP).await.map_err(refused("cannot list IPsec policies"))?;
        Ok(answers.iter().filter_map(parse_policy).collect())
    }

    async fn call(&self, message: XfrmMessage, flags: u16) -> io::Result<Vec<XfrmMessage>> {
        let mut message = NetlinkMessage::from(message);
        message.header.flags = NLM_F_REQUEST | flags;
        let mut answers = self.handle.request(message, SocketAddr::new(0, 0)).map_err(io::Error::other)?;
        let mut messages = Vec::new();
        while let Some(answer) = answers.next().await {
            match answer.payload {
                NetlinkPayload::InnerMessage(message) => messages.push(message),
                NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                _ => {}
            }
        }
        Ok(messages)
    }

    /// What this life has policies about.
    fn is_current(&self, selector: &Selector) -> bool {
        ip(selector.saddr, selector.family) == Some(self.own)
            && [self.port, HELLO_PORT].contains(&selector.dport)
    }
}

/// UDP packets from one address to the other.
fn between(source: IpAddr, destination: IpAddr) -> Selector {
    let mut selector = Selector { proto: IPPROTO_UDP, ..Selector::default() };
    selector.source_prefix(&source, host_prefix(source));
    selector.destination_prefix(&destination, host_prefix(destination));
    selector
}

/// An address of this family.
fn ip(address: Address, family: u16) -> Option<IpAddr> {
    match family {
        AF_INET => Some(address.to_ipv4().into()),
        AF_INET6 => Some(address.to_ipv6().into()),
        _ => None,
    }
}

fn state(id: &StateId, key: &[u8; 36], inbound: bool) -> State {
    let mut info = UserSaInfo {
        // The kernel checks what was in the packet by it: the receiver's proof of the outer source.
        selector: between(id.source, id.destination),
        reqid: REQID,
        mode: XFRM_MODE_TRANSPORT,
        flags: XFRM_STATE_ESN,
        ..UserSaInfo::default()
    };
    info.source(&id.source);
    info.destination(&id.destination);
    (info.id.spi, info.id.proto) = (id.spi, IPPROTO_ESP);
    let mut alg_name = [0; XFRM_ALG_AEAD_NAME_LEN];
    alg_name[..ALGORITHM.len()].copy_from_slice(ALGORITHM);
    let bmp_len = WINDOW / u32::BITS;
    let replay =
        ReplayEsn { bmp_len, replay_window: WINDOW, bmp: vec![0; bmp_len as usize], ..ReplayEsn::default() };
    let mut nlas = vec![
        XfrmAttrs::EncryptionAlgAead(AlgAead {
            alg_name,
            alg_key_len: KEY_BITS,
            alg_icv_len: TAG,
            alg_key: key.to_vec(),
        }),
        XfrmAttrs::ReplayStateEsn(replay),
    ];
    if inbound {
        nlas.extend([XfrmAttrs::MarkVal(DECRYPTED), XfrmAttrs::MarkMask(MARK_BITS)]);
    }
    State { user_sa_info: info, nlas }
}

fn policy(selector: Selector, way: Way) -> Policy {
    let mut info = UserPolicyInfo {
        selector,
        priority: PRIORITY,
        direction: XFRM_POLICY_OUT,
        ..UserPolicyInfo::default()
    };
    let nlas = match way {
        Way::Blocked => {
            info.action = XFRM_POLICY_BLOCK;
            Vec::new()
        }
        Way::Encrypted(spi) => {
            info.action = XFRM_POLICY_ALLOW;
            let mut template =
                UserTemplate { reqid: REQID, mode: XFRM_MODE_TRANSPORT, ..UserTemplate::default() };
            // As the selector has them.
            (template.saddr, template.id.daddr) = (selector.saddr, selector.daddr);
            template.family = selector.family;
            template.protocol(IPPROTO_ESP);
            template.spi(spi);
            vec![XfrmAttrs::Template(vec![template])]
        }
    };
    Policy { user_policy_info: info, nlas }
}

fn parse_state(message: &XfrmMessage) -> Option<(StateId, StateUse)> {
    let XfrmMessage::AddSa(State { user_sa_info: info, nlas }) = message else { return None };
    let ours = info.reqid == REQID && info.id.proto == IPPROTO_ESP;
    let last = nlas.iter().find_map(|attribute| match attribute {
        XfrmAttrs::LastUsed(at) => Some(*at),
        _ => None,
    });
    let (source, destination) = (ip(info.saddr, info.family)?, ip(info.id.daddr, info.family)?);
    let now = info.lifetime_cur;
    ours.then_some((
        StateId { source, destination, spi: info.id.spi },
        // Before Linux 6.2 it is known only when the first packet was.
        StateUse { packets: now.packets, bytes: now.bytes, last: last.unwrap_or(now.use_time) },
    ))
}

fn parse_policy(message: &XfrmMessage) -> Option<Found> {
    let XfrmMessage::AddPolicy(Policy { user_policy_info: info, nlas }) = message else { return None };
    let selector = info.selector;
    let ends = [(selector.saddr, selector.prefixlen_s), (selector.daddr, selector.prefixlen_d)];
    let exact = ends
        .iter()
        .all(|(address, length)| ip(*address, selector.family).is_some_and(|ip| *length == host_prefix(ip)));
    if info.priority != PRIORITY
        || info.direction != XFRM_POLICY_OUT
        || selector.proto != IPPROTO_UDP
        || !exact
    {
        return None;
    }
    let template = nlas.iter().find_map(|attribute| match attribute {
        XfrmAttrs::Template(templates) => templates.first(),
        _ => None,
    });
    let way = match (info.action, template) {
        (XFRM_POLICY_BLOCK, None) => Way::Blocked,
        (XFRM_POLICY_ALLOW, Some(template)) if template.reqid == REQID => Way::Encrypted(template.id.spi),
        _ => return None,
    };
    Some(Found { selector, way })
}

fn refused(what: impl Into<String>) -> impl FnOnce(io::Error) -> NetlinkError {
    move |source| NetlinkError::Xfrm { what: what.into(), source }
}

#[cfg(test)]
mod tests {
    use netlink_packet_core::{Emitable as _, ParseableParametrized as _};

    use super::*;

    const V4: [Ipv4Addr; 2] = [Ipv4Addr::new(172, 31, 1, 1), Ipv4Addr::new(172, 31, 2, 1)];
    const V6: [Ipv6Addr; 2] =
        [Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 1, 1), Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 2, 1)];

    /// Through bytes, as the kernel would give it.
    fn told(message: XfrmMessage) -> (XfrmMessage, Vec<u8>) {
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        (XfrmMessage::parse_with_param(&bytes, message.message_type()).unwrap(), bytes)
    }

    #[test]
    fn a_state_is_read_as_it_was_written_and_its_numbers_are_where_the_kernel_looks() {
        let spi = 0x0102_0304;
        let ids = [V4.map(IpAddr::from), V6.map(IpAddr::from)].map(|[source, destination]| StateId {
            source,
            destination,
            spi,
        });
        let octets = [&V4[1].octets()[..], &V6[1].octets()];
        for (id, octets) in ids.into_iter().zip(octets) {
            let (message, bytes) = told(XfrmMessage::AddSa(state(&id, &[7; 36], true)));
            assert_eq!(parse_state(&message), Some((id, StateUse::default())));
            // struct xfrm_usersa_info: the selector has 56 bytes, then destination and SPI, in network order.
            assert_eq!((&bytes[56..56 + octets.len()], &bytes[72..76]), (octets, &[1, 2, 3, 4][..]));
            let XfrmMessage::AddSa(mut other) = message else { unreachable!() };
            other.user_sa_info.reqid = 1;
            assert_eq!(parse_state(&XfrmMessage::AddSa(other)), None, "somebody else's");
        }
    }

    #[test]
    fn a_policy_is_read_as_it_was_written_and_others_are_not_ours() {
        let ends = [V4.map(IpAddr::from), V6.map(IpAddr::from)];
        let ways = [Way::Blocked, Way::Encrypted(0x1234_5678)];
        for ([from, to], way) in ends.into_iter().flat_map(|ends| ways.map(|way| (ends, way))) {
            let selector = Selector { dport: 8472, dport_mask: u16::MAX, ..between(from, to) };
            let (message, bytes) = told(XfrmMessage::AddPolicy(policy(selector, way)));
            let found = parse_policy(&message).unwrap();
            assert_eq!((found.selector, found.way), (selector, way));
            // struct xfrm_selector: both addresses, then the port in network order.
            assert_eq!(&bytes[32..34], 8472_u16.to_be_bytes());
            let XfrmMessage::AddPolicy(policy) = message else { unreachable!() };
            let mut wide = policy.clone();
            wide.user_policy_info.selector.prefixlen_d = 24;
            let mut other = policy;
            other.user_policy_info.priority = 100;
            assert!(
                [wide, other].map(|policy| parse_policy(&XfrmMessage::AddPolicy(policy)).is_none())
                    == [true; 2]
            );
        }
    }
}
