//! Asks nodes whether they are there: an ICMP echo request, and if that is not answered at once, a TCP
//! connection, whose refusal is an answer too.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

use super::core::{ANSWER, BUDGET};

/// A node that has not answered an echo request by then is asked by TCP as well.
const ECHO_FIRST: Duration = Duration::from_millis(400);
/// Type, code, checksum, identifier, sequence number.
const HEADER: usize = 8;

/// Asks nodes, and tells who answered.
#[derive(Clone, Debug)]
pub(super) struct Prober {
    /// By IPv4 and by IPv6.
    echo: [Option<Arc<Echo>>; 2],
    port: u16,
    answers: mpsc::Sender<IpAddr>,
    /// Asked, and not heard since.
    unheard: Arc<Mutex<BTreeSet<IpAddr>>>,
    connections: Arc<Semaphore>,
}

impl Prober {
    /// Tells `answers` who answers. Without the right to send echo requests it asks by TCP only.
    pub(super) fn new(port: u16, answers: mpsc::Sender<IpAddr>) -> Self {
        let open = |family: Family| match Echo::open(family) {
            Ok(echo) => Some(Arc::new(echo)),
            // A kernel without IPv6 has no nodes there either.
            Err(error) if family == Family::V6 && error.kind() == io::ErrorKind::Unsupported => None,
            Err(error) => {
                warn!(%error, ?family, port, "cannot send ICMP echo requests, which takes CAP_NET_RAW; nodes are asked by TCP only");
                None
            }
        };
        let echo = [Family::V4, Family::V6].map(open);
        // More sockets than this are never open, whatever the network does with them.
        let connections = Arc::new(Semaphore::new(2 * BUDGET));
        let prober = Self { echo, port, answers, unheard: Arc::default(), connections };
        for echo in prober.echo.iter().flatten() {
            tokio::spawn(prober.clone().hear(echo.clone()));
        }
        prober
    }

    /// Asks a node. It is told as soon as it answers, which it does within [`ANSWER`] or not at all.
    pub(super) fn ask(&self, ip: IpAddr) {
        self.unheard().insert(ip);
        let prober = self.clone();
        tokio::spawn(async move {
            if let Some(echo) = &prober.echo[usize::from(ip.is_ipv6())]
                && echo.request(ip).await.is_ok()
            {
                sleep(ECHO_FIRST).await;
            }
            if prober.unheard().contains(&ip) && prober.connect(ip).await {
                prober.heard(ip).await;
            }
            prober.unheard().remove(&ip);
        });
    }

    /// Whether something at this address answers TCP.
    async fn connect(&self, ip: IpAddr) -> bool {
        let Ok(_permit) = self.connections.try_acquire() else { return false };
        match timeout(ANSWER - ECHO_FIRST, TcpStream::connect((ip, self.port))).await {
            Ok(Ok(_)) => true,
            Ok(Err(error)) => error.kind() == io::ErrorKind::ConnectionRefused,
            Err(_) => false,
        }
    }

    /// Listens for echo replies, for good.
    async fn hear(self, echo: Arc<Echo>) {
        loop {
            match echo.reply().await {
                Ok(Some(ip)) => self.heard(ip).await,
                Ok(None) => {}
                Err(error) => {
                    // Such as a network that is down at the moment. It must not become a busy loop.
                    debug!(%error, "cannot receive echo replies");
                    sleep(ECHO_FIRST).await;
                }
            }
        }
    }

    async fn heard(&self, ip: IpAddr) {
        if self.unheard().remove(&ip) {
            // Fails only when nobody listens any more.
            let _ = self.answers.send(ip).await;
        }
    }

    fn unheard(&self) -> MutexGuard<'_, BTreeSet<IpAddr>> {
        // Nothing panics while it is held; if something did, the set is still whole.
        self.unheard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whose echo requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

impl Family {
    /// Types of an echo request and of the reply to it.
    fn types(self) -> (u8, u8) {
        match self {
            Self::V4 => (8, 0),
            Self::V6 => (128, 129),
        }
    }
}

/// A socket for echo requests. To send and receive, the kernel and the runtime treat it like one of UDP.
#[derive(Debug)]
struct Echo {
    family: Family,
    socket: UdpSocket,
    request: [u8; HEADER + 8],
}

impl Echo {
    /// A socket of its own kind if the kernel lets this user have one, or else a raw one.
    fn open(family: Family) -> io::Result<Self> {
        let (domain, protocol) = match family {
            Family::V4 => (Domain::IPV4, Protocol::ICMPV4),
            Family::V6 => (Domain::IPV6, Protocol::ICMPV6),
        };
        let socket = |kind| Socket::new(domain, kind, Some(protocol));
        let socket = socket(Type::DGRAM).or_else(|_| socket(Type::RAW))?;
        socket.set_nonblocking(true)?;
        let socket = UdpSocket::from_std(OwnedFd::from(socket).into())?;
        // A raw socket gets the replies to other processes as well.
        let cookie: [u8; 8] = rand::random();
        Ok(Self { family, socket, request: request(family, cookie) })
    }

    async fn request(&self, ip: IpAddr) -> io::Result<()> {
        self.socket.send_to(&self.request, (ip, 0)).await.map(drop)
    }

    /// Whose reply came; none if it was something else.
    async fn reply(&self) -> io::Result<Option<IpAddr>> {
        let mut buffer = [0; 256];
        let (length, from) = self.socket.recv_from(&mut buffer).await?;
        Ok(is_reply(self.family, &buffer[..length], &self.request).then_some(from.ip()))
    }
}

fn request(family: Family, cookie: [u8; 8]) -> [u8; HEADER + 8] {
    let mut packet = [0; HEADER + 8];
    (packet[0], _) = family.types();
    // The identifier; where the kernel manages them it puts its own here.
    packet[4..6].copy_from_slice(&cookie[..2]);
    packet[HEADER..].copy_from_slice(&cookie);
    // Over IPv6 it covers addresses too, and is the kernel's.
    let checksum = checksum(&packet);
    packet[2..4].copy_from_slice(&checksum.to_be_bytes());
    packet
}

/// Whether `packet`, with or without its IP header, is the answer to `request`.
fn is_reply(family: Family, packet: &[u8], request: &[u8]) -> bool {
    // A raw socket of IPv4 gives the IP header, whose first byte is version 4 and length in words.
    let begin = match packet.first() {
        Some(first) if family == Family::V4 && first >> 4 == 4 => usize::from(first & 15) * 4,
        _ => 0,
    };
    packet.get(begin..).is_some_and(|icmp| {
        icmp.len() == request.len()
            && icmp[..2] == [family.types().1, 0]
            && icmp[HEADER..] == request[HEADER..]
    })
}

/// RFC 1071; of an even number of bytes.
fn checksum(packet: &[u8; HEADER + 8]) -> u16 {
    let words = packet.chunks_exact(2).map(|pair| u16::from_be_bytes([pair[0], pair[1]]));
    !words.fold(0, |sum: u16, word| {
        let (sum, carry) = sum.overflowing_add(word);
        sum + u16::from(carry)
    })
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    #[test]
    fn a_packet_with_its_checksum_sums_up_to_nothing() {
        assert_eq!(checksum(&request(Family::V4, [1, 2, 3, 4, 5, 6, 7, 0xff])), 0);
    }

    #[test]
    fn only_the_reply_to_our_request_counts() {
        for family in [Family::V4, Family::V6] {
            let is_reply = |packet: &[u8], request: &[u8]| is_reply(family, packet, request);
            let ours = request(family, [7; 8]);
            let mut reply = ours;
            assert!(!is_reply(&reply, &ours), "a request");
            (_, reply[0]) = family.types();
            assert!(is_reply(&reply, &ours));
            assert!(!is_reply(&reply, &request(family, [8; 8])), "somebody else's");
            let with_header: Vec<u8> = [0x45].into_iter().chain([0; 19]).chain(reply).collect();
            assert_eq!(is_reply(&with_header, &ours), family == Family::V4);
            for length in 0..with_header.len() {
                assert!(!is_reply(&with_header[..length], &ours), "cut off at {length}");
            }
        }
    }

    #[tokio::test]
    async fn this_machine_answers_and_a_refusal_is_an_answer() {
        for here in [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
            let (answers, mut heard) = mpsc::channel(4);
            // Whether echo requests are allowed or not, and whoever listens on port 1.
            let prober = Prober::new(1, answers.clone());
            prober.ask(here);
            assert_eq!(timeout(Duration::from_secs(20), heard.recv()).await.unwrap(), Some(here));
            let tcp_only = Prober { echo: [None, None], ..prober };
            tcp_only.ask(here);
            assert_eq!(timeout(Duration::from_secs(20), heard.recv()).await.unwrap(), Some(here));
        }
    }

    /// By an echo reply alone.
    #[tokio::test]
    async fn echo_requests_work_over_both_families() {
        for (family, here) in
            [(Family::V4, IpAddr::from(Ipv4Addr::LOCALHOST)), (Family::V6, Ipv6Addr::LOCALHOST.into())]
        {
            let echo = match Echo::open(family) {
                Ok(echo) => echo,
                // The right to do so is missing; the test above has asked by TCP.
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}");
                    continue;
                }
            };
            echo.request(here).await.unwrap();
            let reply = async {
                loop {
                    if let Some(from) = echo.reply().await.unwrap() {
                        break from;
                    }
                }
            };
            assert_eq!(timeout(Duration::from_secs(20), reply).await.unwrap(), here);
        }
    }
}
