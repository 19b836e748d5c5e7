//! Packets that are too big for the overlay: their senders are told, or they arrive in fragments.

#![allow(clippy::unwrap_used, reason = "a test says enough when it fails")]

mod support;

use std::{
    io,
    net::{IpAddr, UdpSocket},
    os::fd::AsRawFd as _,
};

use ebpf_global_svc::{
    Arrival,
    abi::{ENDPOINT_ENFORCE_EGRESS, ENDPOINT_ENFORCE_INGRESS, EndpointValue, direction, reason},
};
use etherparse::{
    Icmpv4Type, Icmpv6Type, NetSlice, PacketBuilder, SlicedPacket, TransportSlice,
    icmpv4::DestUnreachableHeader,
};
use support::{
    Netns, endpoint, metric,
    pair::{ECHO, Node, PATIENCE, VIRTUAL, pod, pod_identity, stream},
};

/// Of the overlay; that of pods is larger.
const MTU: u16 = 1300;

/// The second node stays with fragments.
fn narrow(mut nodes: [Node; 2]) -> [Node; 2] {
    nodes[0].netns.ip(&format!("link set cm_vxlan mtu {MTU}"));
    nodes[0].datapath.as_mut().unwrap().set_pmtu_discovery(true).unwrap();
    nodes
}

/// Drops for being too big, and packets sent in fragments, of the first node.
fn counted(nodes: &[Node; 2]) -> (u64, u64) {
    let datapath = nodes[0].datapath();
    (metric(datapath, reason::FRAG_NEEDED), metric(datapath, reason::TOO_BIG))
}

/// The MTU that a pod's kernel knows on the way to an address.
fn known_mtu(netns: &Netns, to: IpAddr) -> Option<String> {
    netns.route_to(to).split_whitespace().skip_while(|word| *word != "mtu").nth(1).map(str::to_owned)
}

#[test]
fn streams_shrink_their_packets() {
    let nodes = narrow(Node::pair());
    for family in [4, 6] {
        let to = pod(2, family);
        assert_eq!(known_mtu(&nodes[0].pod, to), None);
        let told = counted(&nodes).0;
        stream(&nodes[0].pod, to);
        assert!(counted(&nodes).0 > told, "nobody was told");
        assert_eq!(known_mtu(&nodes[0].pod, to), Some(MTU.to_string()));
    }
    assert_eq!(counted(&nodes).1, 0, "in fragments");
}

#[test]
fn policies_let_a_pod_be_told() {
    let mut nodes = narrow(Node::pair());
    nodes[0].flag(ENDPOINT_ENFORCE_INGRESS | ENDPOINT_ENFORCE_EGRESS);
    nodes[0].allow(pod_identity(2), direction::EGRESS);
    for family in [4, 6] {
        stream(&nodes[0].pod, pod(2, family));
        assert_eq!(known_mtu(&nodes[0].pod, pod(2, family)), Some(MTU.to_string()));
    }
    assert_eq!(metric(nodes[0].datapath(), reason::POLICY), 0);
}

#[test]
fn virtual_addresses_are_those_that_the_pod_is_told_of() {
    let nodes = narrow(Node::overlapping_pair());
    for family in [4, 6] {
        let to = pod(VIRTUAL + 2, family);
        stream(&nodes[0].pod, to);
        assert_eq!(known_mtu(&nodes[0].pod, to), Some(MTU.to_string()));
    }
    assert_eq!(counted(&nodes).1, 0);
}

/// Sends a datagram of `size` bytes and says how many come back.
fn datagram(netns: &Netns, to: IpAddr, size: usize, discovery: libc::c_int) -> io::Result<usize> {
    netns.run(|| {
        let (any, level, option) = match to {
            IpAddr::V4(_) => ("0.0.0.0:0", libc::IPPROTO_IP, libc::IP_MTU_DISCOVER),
            IpAddr::V6(_) => ("[::]:0", libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER),
        };
        let socket = UdpSocket::bind(any)?;
        // SAFETY: a valid descriptor, and a value of the size that is passed.
        let set = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                level,
                option,
                (&raw const discovery).cast(),
                libc::socklen_t::try_from(size_of_val(&discovery)).unwrap(),
            )
        };
        assert_eq!(set, 0, "{}", io::Error::last_os_error());
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.connect((to, ECHO))?;
        socket.send(&vec![7; size])?;
        socket.recv(&mut [0; 2048])
    })
}

#[test]
fn datagrams_that_must_stay_whole_are_refused_with_the_right_size() {
    let nodes = narrow(Node::pair());
    for (family, headers) in [(4, 28), (6, 48)] {
        let to = pod(2, family);
        let fits = usize::from(MTU) - headers;
        // Whoever sends the first hears of it as an error of the socket.
        let error = datagram(&nodes[0].pod, to, fits + 1, libc::IP_PMTUDISC_DO).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE));
        let error = datagram(&nodes[0].pod, to, fits + 1, libc::IP_PMTUDISC_DO).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE));
        assert_eq!(counted(&nodes).0, u64::from(family) / 2 - 1, "its own kernel knows by now");
        assert_eq!(datagram(&nodes[0].pod, to, fits, libc::IP_PMTUDISC_DO).unwrap(), fits);
        // By default it is cut by its own kernel.
        assert_eq!(datagram(&nodes[0].pod, to, fits + 1, libc::IP_PMTUDISC_WANT).unwrap(), fits + 1);
    }
    assert_eq!(counted(&nodes).1, 0);
}

#[test]
fn datagrams_that_may_be_cut_arrive() {
    let nodes = narrow(Node::pair());
    assert_eq!(datagram(&nodes[0].pod, pod(2, 4), 1400, libc::IP_PMTUDISC_DONT).unwrap(), 1400);
    assert_eq!(counted(&nodes), (0, 1));
}

/// Of the packet that comes back every byte is known.
#[test]
fn what_a_pod_is_told_is_an_icmp_error_from_where_it_sent_to() {
    let nodes = narrow(Node::pair());
    let veth = nodes[0].netns.ifindex("lxc0");
    let EndpointValue { pod_mac, host_mac, .. } = endpoint(0, 0);
    for family in [4, 6] {
        let (from, to) = (pod(1, family), pod(2, family));
        let sent = big(from, to, pod_mac, host_mac);
        let arrival = Arrival { ifindex: veth, ..Arrival::default() };
        let datapath = nodes[0].datapath();
        let back = nodes[0].netns.run(|| datapath.trial("cm_from_pod", &sent, arrival, 1).unwrap().packet);
        assert_eq!((&back[..6], &back[6..12]), (&pod_mac[..], &host_mac[..]));
        let packet = SlicedPacket::from_ethernet(&back).unwrap();
        let about = match (packet.net.unwrap(), packet.transport.unwrap()) {
            (NetSlice::Ipv4(ip), TransportSlice::Icmpv4(icmp)) => {
                let header = ip.header().to_header();
                assert_eq!((IpAddr::from(header.source), IpAddr::from(header.destination)), (to, from));
                assert_eq!(header.header_checksum, header.calc_header_checksum());
                assert_eq!(usize::from(header.total_len), back.len() - 14);
                let wanted = DestUnreachableHeader::FragmentationNeeded { next_hop_mtu: MTU };
                assert_eq!(icmp.icmp_type(), Icmpv4Type::DestinationUnreachable(wanted));
                let sum = icmp.icmp_type().calc_checksum(icmp.payload());
                assert_eq!(icmp.checksum(), sum);
                icmp.payload()
            }
            (NetSlice::Ipv6(ip), TransportSlice::Icmpv6(icmp)) => {
                let header = ip.header().to_header();
                assert_eq!((IpAddr::from(header.source), IpAddr::from(header.destination)), (to, from));
                assert_eq!(usize::from(header.payload_length), back.len() - 54);
                assert_eq!(icmp.icmp_type(), Icmpv6Type::PacketTooBig { mtu: MTU.into() });
                let sum = icmp.icmp_type().calc_checksum(header.source, header.destination, icmp.payload());
                assert_eq!(icmp.checksum(), sum.unwrap());
                icmp.payload()
            }
            _ => panic!("no ICMP"),
        };
        assert_eq!(about, &sent[14..14 + about.len()]);
    }
}

/// A datagram of 1400 bytes that must not be cut.
fn big(from: IpAddr, to: IpAddr, source: [u8; 6], destination: [u8; 6]) -> Vec<u8> {
    let link = PacketBuilder::ethernet2(source, destination);
    let (builder, payload) = match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => (link.ipv4(from.octets(), to.octets(), 64), [7; 1372]),
        (IpAddr::V6(from), IpAddr::V6(to)) => (link.ipv6(from.octets(), to.octets(), 64), [7; 1372]),
        _ => panic!("one family, please"),
    };
    let mut frame = Vec::new();
    builder.udp(999, ECHO).write(&mut frame, &payload).unwrap();
    frame
}
