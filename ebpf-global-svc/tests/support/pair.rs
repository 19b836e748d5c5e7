//! Two nodes of two clusters, each with a pod, over a real VXLAN device:
//!
//! ```text
//! pod a 10.1.0.10 -- lxc0 | node 1 | eth0 ==== eth0 | node 2 | lxc0 -- pod b 10.2.0.10
//!                          cm_vxlan                  cm_vxlan
//! ```

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

use ebpf_global_svc::{
    Datapath, DatapathOptions, Tables,
    abi::{
        EndpointValue, NODE_VIRTUAL, NodeValue, OverlayKey, POLICY_PEER_BITS, PREFIX_VIRTUAL, PolicyKey,
        PolicyValue, PrefixValue, UnderlayKey, UnderlayValue, reason,
    },
};

use super::{
    Netns, Root, endpoint, ip_key, ip_value, metric, node_at, prefix_key, prefix_value, translation,
    wait_until,
};

pub const PATIENCE: Duration = Duration::from_secs(5);
pub const ECHO: u16 = 7;

pub struct Node {
    pub cluster: u16,
    /// That of its pods; see [`address`].
    pub net: u16,
    pub datapath: Option<Datapath>,
    pub tables: Tables,
    pub options: DatapathOptions,
    _root: Root,
    pub netns: Netns,
    pub pod: Netns,
}

pub fn underlay(cluster: u16) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 77, cluster.to_be_bytes()[1])
}

/// The same over IPv6.
pub fn underlay6(cluster: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 77, 0, 0, 0, 0, 0, cluster)
}

/// What tables call a node over IPv6.
pub fn number(cluster: u16) -> Ipv4Addr {
    Ipv4Addr::new(0, 0, 7, cluster.to_be_bytes()[1])
}

/// Nets from here on are virtual, for pods in net 1.
pub const VIRTUAL: u16 = 100;

/// An address in a net. Those of a cluster's pods are in the net of its number, unless clusters overlap.
pub fn address(net: u16, n: u8, family: u8) -> IpAddr {
    match family {
        4 if net > VIRTUAL => Ipv4Addr::new(240, (net - VIRTUAL).to_be_bytes()[1], 0, n).into(),
        4 => Ipv4Addr::new(10, net.to_be_bytes()[1], 0, n).into(),
        // Its words have the sum of those of net 1.
        _ if net > VIRTUAL => {
            let cluster = net - VIRTUAL;
            Ipv6Addr::new(0xfd00, 10 - cluster, 1 + cluster, 0, 0, 0, 0, n.into()).into()
        }
        _ => Ipv6Addr::new(0xfd00, 10, net, 0, 0, 0, 0, n.into()).into(),
    }
}

/// The one pod of a cluster.
pub fn pod(net: u16, family: u8) -> IpAddr {
    address(net, 10, family)
}

/// The node's own address in its pod CIDR.
pub fn router(net: u16, family: u8) -> IpAddr {
    address(net, 1, family)
}

pub fn pod_identity(cluster: u16) -> u32 {
    u32::from(cluster) << 16 | 0x1000
}

impl Node {
    /// `net_of`: where pods of a cluster are, as this node knows them.
    fn new(cluster: u16, net_of: impl Fn(u16) -> u16) -> Self {
        Self::over(4, cluster, net_of)
    }

    /// Tunnels are of that family.
    fn over(tunnels: u8, cluster: u16, net_of: impl Fn(u16) -> u16) -> Self {
        let over_ipv6 = tunnels == 6;
        let named = |cluster| if over_ipv6 { number(cluster) } else { underlay(cluster) };
        let net = net_of(cluster);
        let netns = Netns::new(&format!("node{cluster}"));
        let pod_netns = Netns::new(&format!("pod{cluster}"));
        let EndpointValue { pod_mac, host_mac, .. } = endpoint(0, 0);
        let (pod_mac, host_mac) = (mac(pod_mac), mac(host_mac));
        netns.sysctl("net/ipv4/ip_forward", "1");
        netns.sysctl("net/ipv6/conf/all/forwarding", "1");
        netns.ip(&format!(
            "link add lxc0 address {host_mac} mtu 1450 type veth peer name eth0 address {pod_mac} mtu 1450 netns {}",
            pod_netns.name()
        ));
        netns.ip("link set lxc0 up");
        netns.ip("link add cm_vxlan mtu 1450 type vxlan external dstport 8472 nolearning");
        netns.ip("link set cm_vxlan arp off up");
        pod_netns.ip("link set eth0 up");
        for (family, gateway, length) in [(4, "169.254.1.1", 32), (6, "fe80::1", 128)] {
            let ip = pod(net, family);
            pod_netns.ip(&format!("addr add {ip}/{length} dev eth0"));
            pod_netns.ip(&format!("neigh add {gateway} lladdr {host_mac} dev eth0 nud permanent"));
            if family == 4 {
                pod_netns.ip(&format!("route add {gateway} dev eth0 scope link"));
            }
            pod_netns.ip(&format!("-{family} route add default via {gateway} dev eth0"));
            netns.ip(&format!("addr add {}/{length} dev lo", router(net, family)));
            netns.ip(&format!("-{family} route add {ip} dev lxc0"));
            netns.ip(&format!("neigh add {ip} lladdr {pod_mac} dev lxc0 nud permanent"));
        }
        for ip in [4, 6].map(|family| pod(net, family)).into_iter().chain([router(net, 4)]) {
            echo(if ip == router(net, 4) { &netns } else { &pod_netns }, ip);
        }

        let root = Root::new();
        let options = DatapathOptions {
            node_ip: (!over_ipv6).then(|| underlay(cluster)),
            underlay_ipv6: over_ipv6,
            ..root.options(cluster)
        };
        let mut datapath = Datapath::open(&options).unwrap();
        if over_ipv6 {
            datapath.set_node(number(cluster).octets(), underlay6(cluster).into()).unwrap();
            // 1500 less the headers of Ethernet, VXLAN, UDP and IPv6. The kernel sends no tunnel packets in fragments.
            netns.ip("link set cm_vxlan mtu 1430");
            datapath.set_pmtu_discovery(true).unwrap();
        }
        let (veth, overlay) = (netns.ifindex("lxc0"), netns.ifindex("cm_vxlan"));
        netns.run(|| {
            datapath.attach_overlay(overlay).unwrap();
            datapath.attach_pod(veth).unwrap();
        });
        let mut tables = datapath.tables().unwrap();
        for family in [4, 6] {
            let entry = (ip_key(cluster, pod(net, family)), endpoint(veth, pod_identity(cluster)));
            tables.endpoint.upsert(&[entry]).unwrap();
        }
        for other in [1, 2] {
            let seen = net_of(other);
            let is_virtual = seen > VIRTUAL;
            let at = if over_ipv6 { underlay6(other).into() } else { underlay(other).into() };
            let (node_key, mut node_value) = node_at(at, other);
            if over_ipv6 {
                node_value.number = u32::from_ne_bytes(number(other).octets());
                let entry = (
                    UnderlayKey { number: number(other).octets() },
                    UnderlayValue { ip: underlay6(other).octets() },
                );
                tables.underlay.upsert(&[entry]).unwrap();
            }
            let flags = if is_virtual { NODE_VIRTUAL } else { 0 };
            tables.node.upsert(&[(node_key, NodeValue { flags, ..node_value })]).unwrap();
            for (family, length) in [(4, 24), (6, 64)] {
                let flags = if is_virtual { PREFIX_VIRTUAL } else { 0 };
                let value = PrefixValue { flags, ..prefix_value(other, named(other)) };
                tables.prefix.upsert(&[(prefix_key(address(seen, 0, family), length), value)]).unwrap();
                let entry = (ip_key(other, pod(seen, family)), ip_value(pod_identity(other), named(other)));
                tables.ipcache.upsert(&[entry]).unwrap();
                if is_virtual {
                    let (real, virtual_) = (address(1, 0, family), address(seen, 0, family));
                    tables.translate.upsert(&translation(other, real, virtual_, length)).unwrap();
                }
            }
        }
        Self { cluster, net, datapath: Some(datapath), tables, options, _root: root, netns, pod: pod_netns }
    }

    pub fn pair() -> [Self; 2] {
        Self::connected([Self::new(1, |cluster| cluster), Self::new(2, |cluster| cluster)], |cluster| cluster)
    }

    /// Their tunnels run over IPv6, and there is no IPv4 between them.
    pub fn pair_over_ipv6() -> [Self; 2] {
        let node = |cluster| Self::over(6, cluster, |cluster| cluster);
        Self::connected([node(1), node(2)], |cluster| cluster)
    }

    /// Pods of both have the same addresses; each knows those of the other by virtual ones.
    pub fn overlapping_pair() -> [Self; 2] {
        let seen_by = |own: u16| move |cluster: u16| if cluster == own { 1 } else { VIRTUAL + cluster };
        Self::connected([Self::new(1, seen_by(1)), Self::new(2, seen_by(2))], |peer| VIRTUAL + peer)
    }

    fn connected(nodes: [Self; 2], net_of_peer: impl Fn(u16) -> u16) -> [Self; 2] {
        nodes[0].netns.ip(&format!("link add eth0 type veth peer name eth0 netns {}", nodes[1].netns.name()));
        for node in &nodes {
            let peer = 3 - node.cluster;
            match node.options.underlay_ipv6 {
                true => node.netns.ip(&format!("addr add {}/64 dev eth0", underlay6(node.cluster))),
                false => node.netns.ip(&format!("addr add {}/24 dev eth0", underlay(node.cluster))),
            }
            node.netns.ip("link set eth0 up");
            for (family, length) in [(4, 24), (6, 64)] {
                let (to, source) = (address(net_of_peer(peer), 0, family), router(node.net, family));
                node.netns.ip(&format!("-{family} route add {to}/{length} dev cm_vxlan src {source}"));
            }
        }
        nodes
    }

    pub fn datapath(&self) -> &Datapath {
        self.datapath.as_ref().unwrap()
    }

    /// Packets that came with an identity from a node.
    pub fn received(&self, identity: u32, from: Ipv4Addr) -> u64 {
        let key = OverlayKey { identity, node_ip: from.octets() };
        let counters = self.datapath().overlay_rx().unwrap();
        counters.iter().find(|(other, _)| *other == key).map_or(0, |(_, counter)| counter.packets)
    }

    /// Gives the pod another identity.
    pub fn claim(&mut self, identity: u32) {
        let veth = self.netns.ifindex("lxc0");
        for family in [4, 6] {
            let entry = (ip_key(self.cluster, pod(self.net, family)), endpoint(veth, identity));
            self.tables.endpoint.upsert(&[entry]).unwrap();
        }
    }
}

/// Policies.
impl Node {
    /// Gives the pod flags.
    pub fn flag(&mut self, flags: u32) {
        let veth = self.netns.ifindex("lxc0");
        for family in [4, 6] {
            let value = EndpointValue { flags, ..endpoint(veth, pod_identity(self.cluster)) };
            self.tables.endpoint.upsert(&[(ip_key(self.cluster, pod(self.net, family)), value)]).unwrap();
        }
    }

    /// Lets the pod talk with a peer.
    pub fn allow(&mut self, peer: u32, direction: u8) -> PolicyKey {
        let subject = pod_identity(self.cluster);
        let key = PolicyKey { prefixlen: POLICY_PEER_BITS, subject, peer, direction, proto: 0, port: 0 };
        self.tables.policy.upsert(&[(key, PolicyValue { flags: 0, rule: 1 })]).unwrap();
        key
    }
}

pub fn mac(bytes: [u8; 6]) -> String {
    bytes.map(|byte| format!("{byte:02x}")).join(":")
}

/// Answers datagrams and streams at `ip` with what they bring.
pub fn echo(netns: &Netns, ip: IpAddr) {
    netns.run(|| {
        let socket = UdpSocket::bind((ip, ECHO)).unwrap();
        super::packets::widen(&socket);
        thread::spawn(move || {
            let mut buffer = [0; 2048];
            while let Ok((length, client)) = socket.recv_from(&mut buffer) {
                let _ = socket.send_to(&buffer[..length], client);
            }
        });
        let listener = TcpListener::bind((ip, ECHO)).unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let stream = stream.unwrap();
                let _ = std::io::copy(&mut &stream, &mut &stream);
            }
        });
    });
}

/// One datagram to `to` and back.
pub fn call(netns: &Netns, to: IpAddr) -> std::io::Result<SocketAddr> {
    netns.run(|| {
        let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.send_to(b"hello", (to, ECHO))?;
        let mut buffer = [0; 64];
        let (length, from) = socket.recv_from(&mut buffer)?;
        assert_eq!(&buffer[..length], b"hello");
        Ok(from)
    })
}

/// One datagram to `to`, whatever becomes of it.
pub fn send(netns: &Netns, to: IpAddr) {
    netns.run(|| {
        let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).unwrap();
        socket.send_to(b"hello", (to, ECHO)).unwrap();
    });
}

/// A datagram from pod b to pod a is dropped by node 1 for `reason`, in both families.
#[track_caller]
pub fn refused(nodes: &[Node; 2], reason: u8) {
    for family in [4, 6] {
        let node = nodes[0].datapath();
        let before = (metric(node, reason), metric(node, reason::DECAPSULATED));
        send(&nodes[1].pod, pod(1, family));
        wait_until("the drop is counted", || metric(node, reason) == before.0 + 1);
        assert_eq!(metric(node, reason::DECAPSULATED), before.1);
    }
}

/// A stream larger than any packet to `to`, which comes back whole.
#[track_caller]
pub fn stream(netns: &Netns, to: IpAddr) {
    let sent: Vec<u8> = (0..1_000_000_u32).map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1]).collect();
    let received = netns.run(|| {
        let stream = TcpStream::connect((to, ECHO)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                (&stream).write_all(&sent).unwrap();
                stream.shutdown(Shutdown::Write).unwrap();
            });
            let mut received = Vec::new();
            (&stream).read_to_end(&mut received).unwrap();
            received
        })
    });
    assert!(received == sent, "{} of {} bytes", received.len(), sent.len());
}
