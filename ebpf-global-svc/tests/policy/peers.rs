//! Who is at the other end of what a pod sends.

use std::net::{IpAddr, Ipv4Addr};

use ebpf_global_svc::abi::{ENDPOINT_ENFORCE_EGRESS, identity, reason};

use crate::{
    EGRESS, FAR, Node, ONE, OWN, PEER, PEER_NODE, THIS_NODE, TWO, address, any, far,
    frames::{UDP, packet, udp},
    one, outside,
    support::{ip_key, ip_value, prefix_key},
    two,
};

const RANGE: u32 = identity::FIRST_CIDR;

fn egress_only() -> Node {
    let mut node = Node::new();
    node.flag(ONE, ENDPOINT_ENFORCE_EGRESS);
    node
}

fn to(ip: impl Into<IpAddr>) -> Vec<u8> {
    let ip = ip.into();
    packet(one(if ip.is_ipv4() { 4 } else { 6 }), ip, UDP, &udp(1, 53))
}

#[test]
fn a_pod_of_the_mesh_that_is_not_known_is_never_guessed() {
    let mut node = egress_only();
    for allowed in [0, identity::WORLD, FAR, TWO, identity::REMOTE_NODE] {
        node.allow(1, any(ONE, allowed, EGRESS));
    }
    for family in [4, 6] {
        for stranger in [address(PEER, 77, family), address(OWN, 77, family)] {
            assert_eq!(node.sends(&to(stranger)), Err(reason::UNKNOWN_IDENTITY));
        }
        let entry = (ip_key(PEER, address(PEER, 77, family)), ip_value(FAR, PEER_NODE));
        node.tables.ipcache.upsert(&[entry]).unwrap();
        assert_eq!(node.sends(&to(address(PEER, 77, family))), Ok(()));
    }
    node.flag(ONE, 0);
    assert_eq!(node.sends(&to(address(PEER, 78, 4))), Ok(()), "policy does not select the pod");
}

#[test]
fn the_world_and_ranges_of_it() {
    let mut node = egress_only();
    node.allow(1, any(ONE, identity::WORLD, EGRESS));
    for family in [4, 6] {
        assert_eq!(node.sends(&to(outside(family))), Ok(()));
        assert_eq!(node.sends(&to(far(family))), Err(reason::POLICY));
        assert_eq!(node.sends(&to(two(family))), Err(reason::POLICY));
    }
    let v4 = |n| IpAddr::from(Ipv4Addr::new(1, 1, n, 1));
    let v6 = |n: u16| format!("2001:db8:{n}::1").parse::<IpAddr>().unwrap();
    let ranges = [
        (prefix_key("1.1.0.0".parse().unwrap(), 16), RANGE),
        (prefix_key("1.1.7.0".parse().unwrap(), 24), RANGE + 1),
        (prefix_key("2001:db8::".parse().unwrap(), 32), RANGE),
        (prefix_key("2001:db8:7::".parse().unwrap(), 48), RANGE + 1),
    ];
    node.tables.cidr.upsert(&ranges).unwrap();
    for ip in [v4(1), v4(7), v6(1), v6(7)] {
        assert_eq!(node.sends(&to(ip)), Err(reason::POLICY), "{ip} is not merely the world any more");
    }
    node.allow(2, any(ONE, RANGE, EGRESS));
    node.deny(3, any(ONE, RANGE + 1, EGRESS));
    for (ip, expected) in [(v4(1), Ok(())), (v4(7), Err(reason::POLICY_DENY)), (v6(1), Ok(()))] {
        assert_eq!(node.sends(&to(ip)), expected, "{ip}");
    }
    assert_eq!(node.sends(&to(v6(7))), Err(reason::POLICY_DENY), "the longest range");
}

#[test]
fn nodes_are_no_world() {
    let mut node = egress_only();
    let router = address(OWN, 254, 4);
    node.tables.ipcache.upsert(&[(ip_key(OWN, router), ip_value(6, THIS_NODE))]).unwrap();
    let other_router = address(PEER, 254, 4);
    node.tables.ipcache.upsert(&[(ip_key(PEER, other_router), ip_value(6, PEER_NODE))]).unwrap();
    node.tables.cidr.upsert(&[(prefix_key("192.168.0.0".parse().unwrap(), 16), RANGE)]).unwrap();
    node.allow(1, any(ONE, identity::WORLD, EGRESS));
    node.allow(2, any(ONE, RANGE, EGRESS));
    let (own, other) = ([THIS_NODE.into(), router], [PEER_NODE.into(), other_router]);
    for ip in own.into_iter().chain(other) {
        assert_eq!(node.sends(&to(ip)), Err(reason::POLICY), "{ip}");
    }
    node.allow(3, any(ONE, identity::HOST, EGRESS));
    for ip in own {
        assert_eq!(node.sends(&to(ip)), Ok(()), "{ip}");
    }
    for ip in other {
        assert_eq!(node.sends(&to(ip)), Err(reason::POLICY), "{ip}");
    }
    node.allow(4, any(ONE, identity::REMOTE_NODE, EGRESS));
    for ip in other {
        assert_eq!(node.sends(&to(ip)), Ok(()), "{ip}");
    }
}

#[test]
fn what_stays_on_the_link_is_free_but_for_services_of_clouds() {
    let node = egress_only();
    for ip in ["224.0.0.251", "255.255.255.255", "ff02::1", "fe80::1"] {
        assert_eq!(node.sends(&to(ip.parse::<IpAddr>().unwrap())), Ok(()), "{ip}");
    }
    let metadata: IpAddr = "169.254.169.254".parse().unwrap();
    assert_eq!(node.sends(&to(metadata)), Err(reason::POLICY));
    let nobody = packet("169.254.7.7".parse().unwrap(), metadata, UDP, &udp(1, 2));
    assert_eq!(node.sends(&nobody), Ok(()), "nobody's address, as ever");
    let mut node = node;
    node.allow(1, any(ONE, identity::WORLD, EGRESS));
    assert_eq!(node.sends(&to(metadata)), Ok(()));
}
