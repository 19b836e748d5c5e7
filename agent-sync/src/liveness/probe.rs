//! Asks nodes whether they are there: an ICMP echo request, and if that is not answered at once, a TCP
//! connection, whose refusal is an answer too.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
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
const ECHO_REQUEST: u8 = 8;
const ECHO_REPLY: u8 = 0;
/// Type, code, checksum, identifier, sequence number.
const HEADER: usize = 8;

/// Asks nodes, and tells who answered.
#[derive(Clone, Debug)]
pub(super) struct Prober {
    echo: Option<Arc<Echo>>,
    port: u16,
    answers: mpsc::Sender<Ipv4Addr>,
    /// Asked, and not heard since.
    unheard: Arc<Mutex<BTreeSet<Ipv4Addr>>>,
    connections: Arc<Semaphore>,
}

impl Prober {
    /// Tells `answers` who answers. Without the right to send echo requests it asks by TCP only.
    pub(super) fn new(port: u16, answers: mpsc::Sender<Ipv4Addr>) -> Self {
        let echo = Echo::open().map(Arc::new).inspect_err(|error| {
            warn!(%error, port, "cannot send ICMP echo requests, which takes CAP_NET_RAW; nodes are asked by TCP only");
        });
        // More sockets than this are never open, whatever the network does with them.
        let connections = Arc::new(Semaphore::new(2 * BUDGET));
        let prober = Self { echo: echo.ok(), port, answers, unheard: Arc::default(), connections };
        tokio::spawn(prober.clone().hear());
        prober
    }

    /// Asks a node. It is told as soon as it answers, which it does within [`ANSWER`] or not at all.
    pub(super) fn ask(&self, ip: Ipv4Addr) {
        self.unheard().insert(ip);
        let prober = self.clone();
        tokio::spawn(async move {
            if let Some(echo) = &prober.echo
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
    async fn connect(&self, ip: Ipv4Addr) -> bool {
        let Ok(_permit) = self.connections.try_acquire() else { return false };
        match timeout(ANSWER - ECHO_FIRST, TcpStream::connect((ip, self.port))).await {
            Ok(Ok(_)) => true,
            Ok(Err(error)) => error.kind() == io::ErrorKind::ConnectionRefused,
            Err(_) => false,
        }
    }

    /// Listens for echo replies, for good.
    async fn hear(self) {
        let Some(echo) = &self.echo else { return };
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

    async fn heard(&self, ip: Ipv4Addr) {
        if self.unheard().remove(&ip) {
            // Fails only when nobody listens any more.
            let _ = self.answers.send(ip).await;
        }
    }

    fn unheard(&self) -> MutexGuard<'_, BTreeSet<Ipv4Addr>> {
        // Nothing panics while it is held; if something did, the set is still whole.
        self.unheard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A socket for echo requests. To send and receive, the kernel and the runtime treat it like one of UDP.
#[derive(Debug)]
struct Echo {
    socket: UdpSocket,
    request: [u8; HEADER + 8],
}

impl Echo {
    /// A socket of its own kind if the kernel lets this user have one, or else a raw one.
    fn open() -> io::Result<Self> {
        let socket = |kind| Socket::new(Domain::IPV4, kind, Some(Protocol::ICMPV4));
        let socket = socket(Type::DGRAM).or_else(|_| socket(Type::RAW))?;
        socket.set_nonblocking(true)?;
        let socket = UdpSocket::from_std(OwnedFd::from(socket).into())?;
        // A raw socket gets the replies to other processes as well.
        let cookie: [u8; 8] = rand::random();
        Ok(Self { socket, request: request(cookie) })
    }

    async fn request(&self, ip: Ipv4Addr) -> io::Result<()> {
        self.socket.send_to(&self.request, (ip, 0)).await.map(drop)
    }

    /// Whose reply came; none if it was something else.
    async fn reply(&self) -> io::Result<Option<Ipv4Addr>> {
        let mut buffer = [0; 256];
        let (length, from) = self.socket.recv_from(&mut buffer).await?;
        let IpAddr::V4(from) = from.ip() else { return Ok(None) };
        Ok(is_reply(&buffer[..length], &self.request).then_some(from))
    }
}

fn request(cookie: [u8; 8]) -> [u8; HEADER + 8] {
    let mut packet = [0; HEADER + 8];
    packet[0] = ECHO_REQUEST;
    // The identifier; where the kernel manages them it puts its own here.
    packet[4..6].copy_from_slice(&cookie[..2]);
    packet[HEADER..].copy_from_slice(&cookie);
    let checksum = checksum(&packet);
    packet[2..4].copy_from_slice(&checksum.to_be_bytes());
    packet
}

/// Whether `packet`, with or without its IP header, is the answer to `request`.
fn is_reply(packet: &[u8], request: &[u8]) -> bool {
    // A raw socket gives the IP header, whose first byte is version 4 and length in words.
    let begin = match packet.first() {
        Some(first) if first >> 4 == 4 => usize::from(first & 15) * 4,
        _ => 0,
    };
    packet.get(begin..).is_some_and(|icmp| {
        icmp.len() == request.len() && icmp[..2] == [ECHO_REPLY, 0] && icmp[HEADER..] == request[HEADER..]
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
    use super::*;

    #[test]
    fn a_packet_with_its_checksum_sums_up_to_nothing() {
        assert_eq!(checksum(&request([1, 2, 3, 4, 5, 6, 7, 0xff])), 0);
    }

    #[test]
    fn only_the_reply_to_our_request_counts() {
        let ours = request([7; 8]);
        let mut reply = ours;
        assert!(!is_reply(&reply, &ours), "a request");
        reply[0] = ECHO_REPLY;
        assert!(is_reply(&reply, &ours));
        assert!(!is_reply(&reply, &request([8; 8])), "somebody else's");
        let with_header: Vec<u8> = [0x45].into_iter().chain([0; 19]).chain(reply).collect();
        assert!(is_reply(&with_header, &ours));
        for length in 0..with_header.len() {
            assert!(!is_reply(&with_header[..length], &ours), "cut off at {length}");
        }
    }

    #[tokio::test]
    async fn this_machine_answers_and_a_refusal_is_an_answer() {
        let (answers, mut heard) = mpsc::channel(4);
        // Whether echo requests are allowed or not, and whoever listens on port 1.
        let prober = Prober::new(1, answers.clone());
        prober.ask(Ipv4Addr::LOCALHOST);
        assert_eq!(timeout(Duration::from_secs(20), heard.recv()).await.unwrap(), Some(Ipv4Addr::LOCALHOST));
        let tcp_only = Prober { echo: None, ..prober };
        tcp_only.ask(Ipv4Addr::LOCALHOST);
        assert_eq!(timeout(Duration::from_secs(20), heard.recv()).await.unwrap(), Some(Ipv4Addr::LOCALHOST));
    }
}
