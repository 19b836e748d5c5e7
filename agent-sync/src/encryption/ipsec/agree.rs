//! From two nodes' keys to those of the two security associations between their addresses.
//!
//! X25519 (RFC 7748) and HKDF with SHA-256 (RFC 5869). What goes into the derivation beside the shared secret: both
//! public keys, sender first, and both addresses, so that the directions and the addresses of one node differ.

use std::fmt;
use std::net::IpAddr;

use aws_lc_rs::hkdf::{HKDF_SHA256, KeyType, Salt};
use clustermesh_kvstore::record::IpsecKey;
use rand::TryRngCore as _;
use rand::rngs::OsRng;
use x25519_dalek::{PublicKey, StaticSecret};

use super::super::KeyError;
use super::StateId;

/// AES-256, and the four bytes of salt that RFC 4106 has behind it.
const KEY: usize = 36;
const SPI: usize = 4;
/// What this is for, and the version of it.
const LABEL: &[u8] = b"clustermesh ipsec 1";
/// SPIs up to 255 are reserved (RFC 4303, section 2.1).
const RESERVED: u32 = 0xff;

/// A security association, with its key.
#[derive(Clone, PartialEq, Eq)]
pub struct Association {
    /// Its name.
    pub id: StateId,
    /// As `rfc4106(gcm(aes))` takes it.
    pub key: [u8; KEY],
}

/// The associations of both directions between two addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    /// From here.
    pub out: Association,
    /// To here.
    pub back: Association,
}

/// This node's part of agreements. A trait, so that schedules are tested without computing keys.
pub trait Agree: Send + Sync {
    /// What others are told.
    fn public(&self) -> IpsecKey;

    /// What both ends come to, each for itself; none: the other's key is a bad one (a point of small order).
    fn pair(&self, peer: &IpsecKey, here: IpAddr, there: IpAddr) -> Option<Pair>;
}

/// This node's key. Overwritten in memory when it is dropped, and never printed.
pub struct NodeKey {
    secret: StaticSecret,
    public: IpsecKey,
}

impl NodeKey {
    /// A new one.
    ///
    /// # Errors
    /// The kernel gives no random numbers.
    pub fn random() -> Result<Self, KeyError> {
        let mut bytes = [0; IpsecKey::LENGTH];
        OsRng.try_fill_bytes(&mut bytes).map_err(|error| KeyError::Random(error.to_string()))?;
        Ok(bytes.into())
    }
}

impl From<[u8; IpsecKey::LENGTH]> for NodeKey {
    fn from(bytes: [u8; IpsecKey::LENGTH]) -> Self {
        let secret = StaticSecret::from(bytes);
        // No private key has the neutral element as its public key: its scalar is clamped.
        let public = IpsecKey::new(PublicKey::from(&secret).to_bytes()).expect("not all zero");
        Self { secret, public }
    }
}

impl Agree for NodeKey {
    fn public(&self) -> IpsecKey {
        self.public
    }

    fn pair(&self, peer: &IpsecKey, here: IpAddr, there: IpAddr) -> Option<Pair> {
        let shared = self.secret.diffie_hellman(&PublicKey::from(*peer.bytes()));
        if !shared.was_contributory() {
            return None;
        }
        let own = self.public;
        let derive = |(sender, source): (&IpsecKey, IpAddr), (receiver, destination): (&IpsecKey, IpAddr)| {
            let addresses = [octets(source), octets(destination)].concat();
            let info: [&[u8]; 4] = [LABEL, sender.bytes(), receiver.bytes(), &addresses];
            let bytes = expand(shared.as_bytes(), &info);
            let (key, spi) = bytes.split_first_chunk::<KEY>()?;
            let spi = u32::from_be_bytes(spi.try_into().ok()?);
            // One bit more for the few that may not be.
            let spi = if spi <= RESERVED { spi | (RESERVED + 1) } else { spi };
            Some(Association { id: StateId { source, destination, spi }, key: *key })
        };
        Some(Pair { out: derive((&own, here), (peer, there))?, back: derive((peer, there), (&own, here))? })
    }
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().into(),
        IpAddr::V6(ip) => ip.octets().into(),
    }
}

struct Length;

impl KeyType for Length {
    fn len(&self) -> usize {
        KEY + SPI
    }
}

fn expand(secret: &[u8], info: &[&[u8]]) -> [u8; KEY + SPI] {
    let mut bytes = [0; KEY + SPI];
    let extracted = Salt::new(HKDF_SHA256, &[]).extract(secret);
    // Fails only beyond 255 times the hash's length.
    extracted.expand(info, Length).and_then(|okm| okm.fill(&mut bytes)).expect("as long as was asked for");
    bytes
}

impl fmt::Debug for Association {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.id, f)
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    const A: IpAddr = IpAddr::V4(Ipv4Addr::new(172, 31, 1, 1));
    const B: IpAddr = IpAddr::V4(Ipv4Addr::new(172, 31, 2, 1));

    fn key(byte: u8) -> NodeKey {
        [byte; 32].into()
    }

    #[test]
    fn both_ends_come_to_the_same_and_each_direction_address_and_key_to_another() {
        let [a, b, c] = [1, 2, 3].map(key);
        let pair = a.pair(&b.public(), A, B).unwrap();
        let other = b.pair(&a.public(), B, A).unwrap();
        assert_eq!((&pair.out, &pair.back), (&other.back, &other.out));
        assert_eq!(pair.out.id, StateId { source: A, destination: B, spi: pair.out.id.spi });
        let another_ip = a.pair(&b.public(), A, IpAddr::V4(Ipv4Addr::new(172, 31, 2, 2))).unwrap();
        let another_key = a.pair(&c.public(), A, B).unwrap();
        let [a6, b6] = [A, B].map(|ip| match ip {
            IpAddr::V4(ip) => IpAddr::V6(ip.to_ipv6_mapped()),
            IpAddr::V6(_) => ip,
        });
        let over_ipv6 = a.pair(&b.public(), a6, b6).unwrap();
        let all = [pair, another_ip, another_key, over_ipv6].map(|pair| [pair.out, pair.back]).concat();
        for (i, one) in all.iter().enumerate() {
            assert!(one.id.spi > RESERVED);
            for two in &all[i + 1..] {
                assert!(one.key != two.key && one.id.spi != two.id.spi, "{one:?} {two:?}");
            }
        }
        assert_ne!(NodeKey::random().unwrap().public(), NodeKey::random().unwrap().public());
    }

    /// RFC 5869, appendix A.3: no salt, no info.
    #[test]
    fn the_derivation_is_the_known_one() {
        let bytes = expand(&[0x0b; 22], &[]);
        let known = [
            0x8d, 0xa4, 0xe7, 0x75, 0xa5, 0x63, 0xc1, 0x8f, 0x71, 0x5f, 0x80, 0x2a, 0x06, 0x3c, 0x5a, 0x31,
            0xb8, 0xa1, 0x1f, 0x5c, 0x5e, 0xe1, 0x87, 0x9e, 0xc3, 0x45, 0x4e, 0x5f, 0x3c, 0x73, 0x8d, 0x2d,
            0x9d, 0x20, 0x13, 0x95, 0xfa, 0xa4, 0xb6, 0x1a,
        ];
        assert_eq!(bytes, known);
    }

    /// Points of small order make the same secret of every private key.
    #[test]
    fn a_key_that_gives_the_secret_away_is_refused() {
        let mut one = [0; 32];
        one[0] = 1;
        assert_eq!(key(1).pair(&IpsecKey::new(one).unwrap(), A, B), None);
    }
}
