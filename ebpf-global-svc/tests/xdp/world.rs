//! Two nodes and a client outside of the mesh on one wire, as where nodes have one device:
//!
//! ```text
//! node 1 eth0 --+
//! node 2 eth0 --+-- bridge
//! client eth0 --+
//! ```
#![allow(dead_code, reason = "every test file uses its part")]

use std::{
    fs::File,
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    time::Duration,
};

use aya::maps::{HashMap, Map, MapData};
use ebpf_global_svc::{
    Acceleration, Arrival, Tables, Trial,
    abi::{NatKey, NatValue, Plain, nat_kind},
    program_time,
};
use etherparse::PacketBuilder;

use crate::support::{
    Netns, Service, TCP, UDP, address,
    pair::{ECHO, Node, PATIENCE, pod, underlay},
};

pub(crate) const PASS: i32 = 2;
pub(crate) const TX: i32 = 3;
/// Of `struct ethtool_value`.
const SET_TX_CHECKSUMS: u32 = 0x17;

pub(crate) struct World {
    pub(crate) nodes: [Node; 2],
    pub(crate) client: Netns,
    _switch: Netns,
    /// Of the first node's `eth0`.
    pub(crate) ifindex: u32,
}

pub(crate) fn client(family: u8) -> IpAddr {
    if family == 4 { "192.168.77.100".parse().unwrap() } else { "fd77::100".parse().unwrap() }
}

pub(crate) fn gate(family: u8) -> IpAddr {
    if family == 4 { underlay(1).into() } else { "fd77::1".parse().unwrap() }
}

/// An address that nobody has.
pub(crate) fn frontend(family: u8) -> IpAddr {
    if family == 4 { "203.0.113.10".parse().unwrap() } else { "2001:db8:f::10".parse().unwrap() }
}

pub(crate) const CLIENT_MAC: [u8; 6] = [2, 0x77, 0, 0, 0, 100];

pub(crate) fn node_mac(n: u8) -> [u8; 6] {
    [2, 0x77, 0, 0, 0, n]
}

fn text(mac: [u8; 6]) -> String {
    crate::support::pair::mac(mac)
}

impl World {
    pub(crate) fn new() -> Self {
        let mut nodes = Node::pair();
        let (client, switch) = (Netns::new("client"), Netns::new("switch"));
        nodes[0].netns.ip("link del eth0");
        switch.ip("link add core type bridge stp_state 0 mcast_snooping 0");
        switch.ip("link set core up");
        let ends = [&nodes[0].netns, &nodes[1].netns, &client];
        for (n, netns) in (1..).zip(ends) {
            let mac = text(if n == 3 { CLIENT_MAC } else { node_mac(n) });
            let port = format!("p{n}");
            netns.ip(&format!(
                "link add eth0 address {mac} type veth peer name {port} netns {}",
                switch.name()
            ));
            switch.ip(&format!("link set {port} master core up"));
            netns.ip("link set eth0 up");
        }
        // Who is on a veth leaves checksums to nobody, and programs ahead of the kernel see half of them.
        set_feature(&client, "eth0", SET_TX_CHECKSUMS, 0);
        for node in &nodes {
            let peer = 3 - node.cluster;
            node.netns.ip(&format!("addr add {}/24 dev eth0", underlay(node.cluster)));
            for family in [4, 6] {
                let (to, length) = (pod(peer, family), if family == 4 { 24 } else { 64 });
                let source = crate::support::pair::router(node.net, family);
                let _ = length;
                node.netns.ip(&format!("-{family} route add {to} dev cm_vxlan src {source}"));
            }
            let other = node_mac(peer.to_be_bytes()[1]);
            node.netns.ip(&format!(
                "neigh add {} lladdr {} dev eth0 nud permanent",
                underlay(peer),
                text(other)
            ));
        }
        nodes[0].netns.ip("addr add fd77::1/64 dev eth0");
        client.ip("addr add 192.168.77.100/24 dev eth0");
        client.ip("addr add fd77::100/64 dev eth0");
        for family in [4, 6] {
            client.ip(&format!("-{family} route add {} via {}", frontend(family), gate(family)));
        }
        // What a program at one end of a veth sends back is taken up by the other end at once only if that has a program too.
        // Any that passes everything will do: the second node lets nothing in.
        let (port, datapath) = (switch.ifindex("p1"), nodes[1].datapath.as_mut().unwrap());
        switch.run(|| datapath.accelerate(port, Acceleration::Driver).unwrap());
        let ifindex = nodes[0].netns.ifindex("eth0");
        let mut world = Self { nodes, client, _switch: switch, ifindex };
        world.on_first(|datapath| datapath.attach_netdev(ifindex).unwrap());
        for family in [4, 6] {
            world.publish(frontend(family), 2);
        }
        world
    }

    /// Runs code in the first node's namespace.
    pub(crate) fn on_first<T: Send>(
        &mut self,
        code: impl FnOnce(&mut ebpf_global_svc::Datapath) -> T + Send,
    ) -> T {
        let node = &mut self.nodes[0];
        let datapath = node.datapath.as_mut().unwrap();
        node.netns.run(|| code(datapath))
    }

    pub(crate) fn tables(&mut self) -> &mut Tables {
        &mut self.nodes[0].tables
    }

    /// A frontend whose backend is the pod of a cluster.
    pub(crate) fn publish(&mut self, ip: IpAddr, cluster: u16) {
        for proto in [TCP, UDP] {
            let id = backend_id(ip, proto);
            let backends = &[(id, pod(cluster, family_of(ip)), ECHO)];
            let groups = &[(cluster, 1, &backends[..])];
            Service { id, frontend: (ip, ECHO), proto, groups }.publish(1, self.tables());
        }
    }

    /// Notes a flow of the client's, last used so long ago.
    pub(crate) fn note(&self, frame: &Frame, age: Duration, change: impl FnOnce(&mut NatKey, &mut NatValue)) {
        let (family, client) = address(client(frame.family));
        let (_, other) = address(frontend(frame.family));
        let mut key = NatKey {
            client,
            other,
            client_port: frame.port.to_be(),
            other_port: ECHO.to_be(),
            cluster: 0,
            proto: frame.proto,
            family,
            kind: nat_kind::SERVED,
            pad: [0; 3],
        };
        let id = backend_id(frontend(frame.family), frame.proto);
        let mut value = NatValue {
            ip: address(pod(2, frame.family)).1,
            used: u64::try_from(program_time().saturating_sub(age).as_nanos()).unwrap(),
            service: id,
            backend: id,
            ifindex: self.ifindex,
            node_ip: [0; 4],
            port: 7777_u16.to_be(),
            cluster: 2,
            flags: 0,
            pad: 0,
        };
        change(&mut key, &mut value);
        let pin = self.nodes[0].options.bpf_root.join("maps").join("cm_nat");
        let map = Map::LruHashMap(MapData::from_pin(pin).unwrap());
        let mut map: HashMap<_, [u8; 44], [u8; 48]> = map.try_into().unwrap();
        map.insert(bytes::<_, 44>(key), bytes::<_, 48>(value), 0).unwrap();
    }

    /// What `cm_xdp` makes of a frame that comes in at the first node's device.
    pub(crate) fn trial(&self, frame: &[u8]) -> Trial {
        self.trial_of("cm_xdp", frame)
    }

    pub(crate) fn trial_of(&self, program: &str, frame: &[u8]) -> Trial {
        let arrival = Arrival { ifindex: self.ifindex, ..Arrival::default() };
        let datapath = self.nodes[0].datapath();
        self.nodes[0].netns.run(|| datapath.trial(program, frame, arrival, 1).unwrap())
    }

    /// Has the client send a frame, and gives the tunnel packet that the second node gets.
    pub(crate) fn tunnelled(&self, frame: &[u8]) -> Vec<u8> {
        let mut receiver = raw_socket(&self.nodes[1].netns);
        let mut sender = raw_socket(&self.client);
        sender.write_all(frame).unwrap();
        let mut buffer = [0; 2048];
        loop {
            let length = receiver.read(&mut buffer).expect("a tunnel packet arrives");
            let is_udp = buffer[12..14] == [8, 0] && buffer[23] == UDP;
            if is_udp && buffer[36..38] == 8472_u16.to_be_bytes() && buffer[6..12] == node_mac(1) {
                return buffer[..length].to_vec();
            }
        }
    }
}

fn backend_id(ip: IpAddr, proto: u8) -> u32 {
    u32::from(proto) * 2 + u32::from(ip.is_ipv6())
}

fn family_of(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { 4 } else { 6 }
}

fn bytes<T: Plain, const N: usize>(value: T) -> [u8; N] {
    assert_eq!(size_of::<T>(), N);
    // SAFETY: of this size, and plain data has no padding.
    unsafe { std::mem::transmute_copy(&value) }
}

/// A packet of the client's to the frontend.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Frame {
    pub(crate) family: u8,
    pub(crate) proto: u8,
    /// The client's.
    pub(crate) port: u16,
    /// Bytes behind the headers.
    pub(crate) payload: usize,
    /// Class of traffic.
    pub(crate) class: u8,
}

impl Frame {
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let builder = PacketBuilder::ethernet2(CLIENT_MAC, node_mac(1));
        let builder = match (client(self.family), frontend(self.family)) {
            (IpAddr::V4(from), IpAddr::V4(to)) => builder.ipv4(from.octets(), to.octets(), 61),
            (IpAddr::V6(from), IpAddr::V6(to)) => builder.ipv6(from.octets(), to.octets(), 61),
            _ => unreachable!("of one family"),
        };
        let payload: Vec<u8> = (0..self.payload)
            .map(|n| n.to_le_bytes()[0].wrapping_mul(31) ^ self.port.to_le_bytes()[0])
            .collect();
        let mut frame = Vec::new();
        if self.proto == TCP {
            builder.tcp(self.port, ECHO, 1000, 500).ack(7).write(&mut frame, &payload).unwrap();
        } else {
            builder.udp(self.port, ECHO).write(&mut frame, &payload).unwrap();
        }
        if self.family == 4 {
            frame[15] = self.class;
            mend(&mut frame);
        } else {
            frame[14] = 0x60 | self.class >> 4;
            frame[15] = self.class << 4;
        }
        frame
    }

    /// Where its transport header is.
    pub(crate) fn transport(&self) -> usize {
        if self.family == 4 { 34 } else { 54 }
    }

    /// Where its checksum is.
    pub(crate) fn checksum(&self) -> usize {
        self.transport() + if self.proto == TCP { 16 } else { 6 }
    }
}

/// Gives an IPv4 header its checksum.
pub(crate) fn mend(frame: &mut [u8]) {
    let end = 14 + usize::from(frame[14] & 15) * 4;
    frame[24..26].fill(0);
    let sum = !sum(&frame[14..end]);
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
}

/// In ones' complement, of words in network order.
pub(crate) fn sum(bytes: &[u8]) -> u16 {
    let words =
        bytes.chunks(2).map(|pair| u64::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u64::from(*low)));
    let mut sum: u64 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap()
}

/// The checksum of an inner packet holds: the sum over it and its pseudo-header is that of nothing.
#[track_caller]
pub(crate) fn assert_sums_up(frame: &Frame, inner: &[u8]) {
    let addresses = if frame.family == 4 { 26..34 } else { 22..54 };
    let end = if frame.family == 4 {
        assert_eq!(sum(&inner[14..34]), 0xffff, "its IPv4 header");
        14 + usize::from(u16::from_be_bytes([inner[16], inner[17]]))
    } else {
        54 + usize::from(u16::from_be_bytes([inner[18], inner[19]]))
    };
    let transport = &inner[frame.transport()..end];
    let mut all = inner[addresses].to_vec();
    all.extend([0, frame.proto]);
    all.extend(u16::try_from(transport.len()).unwrap().to_be_bytes());
    all.extend(transport);
    assert_eq!(sum(&all), 0xffff, "{frame:?}");
}

/// Sees, and sends, whole frames of `eth0`.
fn raw_socket(netns: &Netns) -> File {
    let ifindex = netns.ifindex("eth0").cast_signed();
    netns.run(|| {
        let all = 3_u16.to_be();
        // SAFETY: no pointers.
        let socket =
            unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, all.into()) };
        assert!(socket >= 0, "{}", std::io::Error::last_os_error());
        // SAFETY: the kernel has just given us this descriptor.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        // SAFETY: integers only.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
        address.sll_protocol = all;
        address.sll_ifindex = ifindex;
        let length = libc::socklen_t::try_from(size_of_val(&address)).unwrap();
        // SAFETY: a valid descriptor, and an address of the size that is passed.
        let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
        assert_eq!(bound, 0, "{}", std::io::Error::last_os_error());
        let time = libc::timeval { tv_sec: PATIENCE.as_secs().cast_signed(), tv_usec: 0 };
        let length = libc::socklen_t::try_from(size_of_val(&time)).unwrap();
        // SAFETY: as above.
        let set = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_RCVTIMEO,
                (&raw const time).cast(),
                length,
            )
        };
        assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
        File::from(socket)
    })
}

/// `ethtool -K`, for kernels and machines without the tool.
fn set_feature(netns: &Netns, device: &str, command: u32, value: u32) {
    let mut request = [command, value];
    netns.run(|| {
        // SAFETY: no pointers.
        let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
        assert!(socket >= 0, "{}", std::io::Error::last_os_error());
        // SAFETY: the kernel has just given us this descriptor.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        // SAFETY: integers only.
        let mut asked: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in asked.ifr_name.iter_mut().zip(device.bytes()) {
            *to = from.cast_signed();
        }
        asked.ifr_ifru.ifru_data = request.as_mut_ptr().cast();
        // SAFETY: a valid descriptor; the request names a device, and the data is of the command's size.
        let set = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut asked) };
        assert_eq!(set, 0, "{device}: {}", std::io::Error::last_os_error());
    });
}

/// Underlay address of the second node.
pub(crate) fn other_node() -> Ipv4Addr {
    underlay(2)
}
