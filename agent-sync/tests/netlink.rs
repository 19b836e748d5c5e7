//! The rtnetlink edge against the real kernel, in a network namespace of its own.
//!
//! Needs root, as the agent does; fails (rather than skips) without.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper that fails fails its test")]

use std::collections::BTreeMap;
use std::fs::File;
use std::net::{IpAddr, Ipv4Addr};
use std::process::Command;
use std::time::Duration;

use agent_sync::encryption::Lane;
use agent_sync::encryption::ipsec::{Installed, Way};
use agent_sync::netlink::{
    Netlink, NetlinkError, OverlaySpec, RULE_PRIORITY, RouteVia, Steering, TABLE, Xfrm, XfrmCount,
};
use agent_sync::tunnels::UnderlayProtocol;

/// A namespace that goes away with the test, also when it panics.
struct Namespace(String);

impl Namespace {
    fn new(tag: &str) -> Self {
        let name = format!("cm-test-netlink-{tag}-{}", std::process::id());
        run(&format!("ip netns add {name}"));
        Self(name)
    }

    /// Runs `test` on a thread inside the namespace.
    fn run<F: Future<Output = ()>>(&self, test: impl FnOnce() -> F + Send) {
        std::thread::scope(|s| {
            s.spawn(|| {
                let ns = File::open(format!("/run/netns/{}", self.0)).unwrap();
                let kind = Some(rustix::thread::LinkNameSpaceType::Network);
                rustix::thread::move_into_link_name_space(std::os::fd::AsFd::as_fd(&ns), kind).unwrap();
                let rt = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                rt.block_on(async { tokio::time::timeout(Duration::from_secs(20), test()).await.unwrap() });
            })
            .join()
            .unwrap();
        });
    }

    fn ip(&self, args: &str) -> String {
        run(&format!("ip -n {} {args}", self.0))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

fn run(command: &str) -> String {
    let out = Command::new("sh").args(["-c", command]).output().unwrap();
    assert!(
        out.status.success(),
        "{command}: {} (this test needs root)",
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8(out.stdout).unwrap()
}

fn overlay() -> OverlaySpec {
    OverlaySpec { name: "cm_vxlan".into(), port: 8472, mtu: 1450 }
}

#[test]
fn overlay_is_created_once_and_a_foreign_device_is_refused() {
    let ns = Namespace::new("overlay");
    ns.run(|| async {
        let netlink = Netlink::open().unwrap();
        let index = netlink.ensure_overlay(&overlay()).await.unwrap();
        assert_eq!(netlink.ensure_overlay(&overlay()).await.unwrap(), index, "kept, not re-created");
        let error = netlink.ensure_overlay(&OverlaySpec { port: 4789, ..overlay() }).await.unwrap_err();
        assert!(matches!(error, NetlinkError::ForeignDevice { .. }), "{error}");
    });
    let shown = ns.ip("-d link show cm_vxlan");
    for word in ["external", "nolearning", "dstport 8472", "mtu 1450", "NOARP", "UP"] {
        assert!(shown.contains(word), "{word} not in {shown}");
    }
}

#[test]
fn routes_become_what_is_desired_and_others_are_left_alone() {
    let ns = Namespace::new("routes");
    ns.ip("addr add 10.1.0.1/32 dev lo");
    ns.ip("addr add fd00:1::1/128 dev lo nodad");
    ns.ip("link set lo up");
    ns.ip("route add 10.99.0.0/24 dev lo");
    let via = |ip: &str| RouteVia { source: Some(ip.parse::<IpAddr>().unwrap()) };
    let mut desired = BTreeMap::from([
        ("10.1.1.0/24".parse().unwrap(), via("10.1.0.1")),
        ("10.2.0.0/24".parse().unwrap(), RouteVia::default()),
        ("fd00:1:1::/64".parse().unwrap(), via("fd00:1::1")),
    ]);
    let first = desired.clone();
    ns.run(|| async move {
        let netlink = Netlink::open().unwrap();
        let index = netlink.ensure_overlay(&overlay()).await.unwrap();
        netlink.sync_routes(index, &first).await.unwrap();
        netlink.sync_routes(index, &first).await.unwrap();
    });
    assert!(ns.ip("route show proto 197").contains("10.1.1.0/24 dev cm_vxlan scope link src 10.1.0.1"));
    assert!(ns.ip("-6 route show proto 197").contains("fd00:1:1::/64 dev cm_vxlan src fd00:1::1"));

    desired.remove(&"10.2.0.0/24".parse().unwrap());
    ns.run(|| async move {
        let netlink = Netlink::open().unwrap();
        let index = netlink.ensure_overlay(&overlay()).await.unwrap();
        netlink.sync_routes(index, &desired).await.unwrap();
    });
    let shown = ns.ip("route show");
    assert!(!shown.contains("10.2.0.0/24") && shown.contains("10.1.1.0/24"), "{shown}");
    assert!(shown.contains("10.99.0.0/24"), "a route of somebody else was touched: {shown}");
}

#[test]
fn a_single_route_comes_and_goes_and_the_rest_stays() {
    let ns = Namespace::new("route");
    ns.ip("addr add 10.1.0.1/32 dev lo");
    ns.ip("link set lo up");
    let nets = ["10.1.1.0/24", "10.2.0.0/24", "fd00:1:1::/64"].map(|net| net.parse().unwrap());
    ns.run(|| async {
        let netlink = Netlink::open().unwrap();
        let index = netlink.ensure_overlay(&overlay()).await.unwrap();
        let [v4, other, v6] = nets;
        let desired = BTreeMap::from([(other, RouteVia::default())]);
        netlink.sync_routes(index, &desired).await.unwrap();
        let via = RouteVia { source: Some("10.1.0.1".parse().unwrap()) };
        netlink.set_route(index, v4, Some(via)).await.unwrap();
        netlink.set_route(index, v6, Some(RouteVia::default())).await.unwrap();
        let shown = (ns.ip("route show proto 197"), ns.ip("-6 route show proto 197"));
        assert!(shown.0.contains("10.1.1.0/24 dev cm_vxlan scope link src 10.1.0.1"), "{shown:?}");
        assert!(shown.1.contains("fd00:1:1::/64 dev cm_vxlan"), "{shown:?}");
        for net in [v4, v6, v6] {
            netlink.set_route(index, net, None).await.unwrap();
        }
        let shown = (ns.ip("route show proto 197"), ns.ip("-6 route show proto 197"));
        assert!(shown.0.contains("10.2.0.0/24") && !shown.0.contains("10.1.1.0/24"), "{shown:?}");
        assert!(!shown.1.contains("fd00:1:1::/64"), "{shown:?}");
    });
}

#[test]
fn what_an_agent_made_is_found_and_removed_and_nothing_else() {
    let ns = Namespace::new("remains");
    ns.ip("link set lo up");
    ns.ip("route add 10.99.0.0/24 dev lo");
    ns.ip("link add other type veth peer name otherp");
    ns.run(|| async {
        let netlink = Netlink::open().unwrap();
        assert_eq!(netlink.find_overlay("cm_vxlan", 8472).await.unwrap(), None);
        let index = netlink.ensure_overlay(&overlay()).await.unwrap();
        let desired = BTreeMap::from([
            ("10.2.0.0/24".parse().unwrap(), RouteVia::default()),
            ("fd00:2::/64".parse().unwrap(), RouteVia::default()),
        ]);
        netlink.sync_routes(index, &desired).await.unwrap();
        let mut routes = netlink.owned_routes().await.unwrap();
        routes.sort_unstable();
        assert_eq!(routes, desired.into_keys().collect::<Vec<_>>());
        let foreign = netlink.find_overlay("other", 8472).await.unwrap_err();
        assert!(matches!(foreign, NetlinkError::ForeignDevice { .. }), "{foreign}");

        netlink.remove_routes().await.unwrap();
        assert!(netlink.owned_routes().await.unwrap().is_empty());
        assert_eq!(netlink.find_overlay("cm_vxlan", 8472).await.unwrap(), Some(index));
        netlink.remove_link(index).await.unwrap();
        netlink.remove_link(index).await.unwrap();
        assert_eq!(netlink.find_overlay("cm_vxlan", 8472).await.unwrap(), None);
    });
    assert!(ns.ip("route show").contains("10.99.0.0/24"));
    assert!(ns.ip("link show").contains("other"));
}

#[test]
fn only_tunnel_packets_to_encrypted_nodes_are_steered() {
    let nodes = ["172.31.2.1", "172.31.2.2", "172.31.2.3"];
    check_steering("steering", UnderlayProtocol::Ipv4, ["172.31.1.1", "16"], nodes, "203.0.113.0/24");
}

#[test]
fn over_ipv6_they_are_too() {
    let nodes = ["fd00:172:31::201", "fd00:172:31::202", "fd00:172:31::203"];
    check_steering("steering6", UnderlayProtocol::Ipv6, ["fd00:172:31::101", "64"], nodes, "2001:db8::/32");
}

/// Another device stands for WireGuard, which not every kernel has.
fn check_steering(
    name: &str,
    protocol: UnderlayProtocol,
    [own, length]: [&str; 2],
    nodes: [&str; 3],
    foreign: &str,
) {
    let ns = Namespace::new(name);
    let flags = if protocol == UnderlayProtocol::Ipv6 { "nodad" } else { "" };
    for (device, address) in [("under0", format!("{own}/{length}")), ("wg0", "192.0.2.1/32".to_owned())] {
        ns.ip(&format!("link add {device} type veth peer name {device}p"));
        ns.ip(&format!("link set {device}p up"));
        ns.ip(&format!("addr add {address} dev {device} {flags}"));
        ns.ip(&format!("link set {device} up"));
    }
    let family = if protocol == UnderlayProtocol::Ipv6 { "-6" } else { "-4" };
    ns.ip(&format!("{family} rule add priority 50 to {foreign} lookup main"));
    let device: u32 = ns.ip("-o link show wg0").split(':').next().unwrap().parse().unwrap();
    // Of the four lanes, one is this device.
    let devices = [device + 100, device + 101, device, device + 102];
    let lane = Lane::all().nth(2).unwrap();
    let sealed = Steering::Encrypted(lane);
    let [encrypted, blocked, plain] = nodes.map(|ip| ip.parse().unwrap());
    let way = |node: IpAddr, port| {
        let to = format!("ip -n {} route get {node} ipproto udp dport {port} 2>&1 || true", ns.0);
        run(&to)
    };
    ns.run(|| async {
        let netlink = Netlink::open().unwrap();
        let source = Some(own.parse().unwrap());
        // Twice: what is there already is fine, and so is another kind of route.
        for steering in [Steering::Blocked, sealed, sealed] {
            netlink.steer(&devices, encrypted, Some(steering), source).await.unwrap();
        }
        for steering in [sealed, Steering::Blocked] {
            netlink.steer(&devices, blocked, Some(steering), source).await.unwrap();
        }
        // Of another port, and of another family.
        netlink.ensure_rule(protocol, 9999).await.unwrap();
        let other =
            if protocol == UnderlayProtocol::Ipv6 { UnderlayProtocol::Ipv4 } else { UnderlayProtocol::Ipv6 };
        netlink.ensure_rule(other, 8472).await.unwrap();
        for _ in 0..2 {
            netlink.ensure_rule(protocol, 8472).await.unwrap();
        }
        let installed = [(encrypted, sealed), (blocked, Steering::Blocked)];
        assert_eq!(netlink.steered(&devices).await.unwrap(), BTreeMap::from(installed));
        assert_eq!(
            netlink.steered(&[device + 1; 4]).await.unwrap().len(),
            1,
            "over another device: not ours"
        );
        assert_eq!(netlink.count_steering().await.unwrap(), (1, 2));
        assert!(netlink.owned_routes().await.unwrap().is_empty(), "routes of the overlay are others");

        let went = way(encrypted, 8472);
        assert!(went.contains("dev wg0") && went.contains(&format!("src {own}")), "{went}");
        assert!(way(encrypted, 51871).contains("dev under0"));
        assert!(way(blocked, 8472).contains("No route to host"), "{}", way(blocked, 8472));
        assert!(way(blocked, 51871).contains("dev under0"));
        assert!(way(plain, 8472).contains("dev under0"));

        netlink.steer(&devices, blocked, None, source).await.unwrap();
        netlink.steer(&devices, blocked, None, source).await.unwrap();
        assert!(way(blocked, 8472).contains("dev under0"));
        netlink.remove_rules().await.unwrap();
        assert!(way(encrypted, 8472).contains("dev under0"));
        netlink.remove_all_steering().await.unwrap();
        assert_eq!(netlink.count_steering().await.unwrap(), (0, 0));
    });
    let rules = ns.ip(&format!("{family} rule show"));
    assert!(rules.contains(foreign) && !rules.contains(&RULE_PRIORITY.to_string()), "{rules}");
    assert_eq!(TABLE, 51_871, "docs/encryption.md names it");
}

/// IPsec's policies need nothing of a kernel but `xfrm_user`.
#[test]
fn policies_of_ipsec_come_go_and_change_in_place_and_others_are_left_alone() {
    check_policies("policies", ["192.0.2.1", "192.0.2.2", "192.0.2.3"], "192.0.2.9/32");
    check_policies("policies6", ["2001:db8::1", "2001:db8::2", "2001:db8::3"], "2001:db8::9/128");
}

fn check_policies(name: &str, nodes: [&str; 3], third: &str) {
    let ns = Namespace::new(name);
    let [own, other, another]: [IpAddr; 3] = nodes.map(|ip| ip.parse().unwrap());
    let foreign = format!("src {own} dst {third} proto udp dport 8472 dir out");
    ns.ip(&format!("xfrm policy add {foreign} priority 100 action block"));
    ns.run(|| async {
        // Of a life with another port.
        Xfrm::open(own, 4789).unwrap().steer(other, Some(Way::Blocked)).await.unwrap();
        let xfrm = Xfrm::open(own, 8472).unwrap();
        assert_eq!(xfrm.read().await.unwrap(), Installed::default());
        assert_eq!(xfrm.count().await.unwrap().policies, 1);
        xfrm.remove_stale().await.unwrap();
        assert_eq!(xfrm.count().await.unwrap(), XfrmCount::default());
        for way in [Way::Blocked, Way::Encrypted(0x1234), Way::Encrypted(0x5678)] {
            xfrm.steer(other, Some(way)).await.unwrap();
            xfrm.greet(other, Some(0x9999)).await.unwrap();
            let installed = xfrm.read().await.unwrap();
            assert_eq!((installed.ways, installed.hellos), ([(other, way)].into(), [(other, 0x9999)].into()));
        }
        xfrm.steer(another, Some(Way::Blocked)).await.unwrap();
        // One that is gone is fine.
        for _ in 0..2 {
            xfrm.steer(another, None).await.unwrap();
            xfrm.greet(other, None).await.unwrap();
        }
    });
    let shown = ns.ip("xfrm policy show");
    for line in
        ["dport 8472", "dir out priority 197", "proto esp spi 0x00005678 reqid 1129136535 mode transport"]
    {
        assert!(shown.contains(line), "{line} is not in {shown}");
    }
    ns.run(|| async { Xfrm::open(own, 8472).unwrap().remove_policies().await.unwrap() });
    let left = ns.ip("xfrm policy show");
    assert!(left.contains(third) && !left.contains(&format!("{other}/")), "{left}");
}

/// On a kernel with ESP what is made for the trial goes; on one without it an operator is told which part is lacking.
#[test]
fn a_kernel_that_can_or_cannot_encrypt_says_so_and_is_left_as_it_was() {
    let ns = Namespace::new("esp");
    let known = Command::new("ip")
        .args(["netns", "exec", &ns.0, "ip", "xfrm", "state", "add", "src", "127.0.0.1", "dst", "127.0.0.2"])
        .args(["proto", "esp", "spi", "0x500", "mode", "transport", "aead", "rfc4106(gcm(aes))"])
        .args([&format!("0x{}", "00".repeat(36)), "128"])
        .output()
        .unwrap();
    let can = known.status.success();
    ns.run(|| async move {
        match Xfrm::open(Ipv4Addr::LOCALHOST.into(), 8472).unwrap().check().await {
            Ok(()) => assert!(can),
            Err(error @ NetlinkError::NoIpsec(_)) => {
                assert!(!can);
                assert!(error.to_string().contains("modprobe -a xfrm_user esp4"), "{error}");
            }
            Err(error) => panic!("{error}"),
        }
    });
    assert_eq!(ns.ip("xfrm state show").matches("proto esp").count(), usize::from(can));
}

#[test]
fn the_mtu_of_the_underlay_is_found_by_its_address() {
    let ns = Namespace::new("mtu");
    ns.ip("link add under0 mtu 9000 type veth peer name under0p");
    ns.ip("addr add 172.31.1.1/16 dev under0");
    ns.run(|| async {
        let netlink = Netlink::open().unwrap();
        assert_eq!(netlink.mtu_of("172.31.1.1".parse().unwrap()).await.unwrap(), Some(9000));
        assert_eq!(netlink.mtu_of("172.31.1.2".parse().unwrap()).await.unwrap(), None);
        // The connection is good for more.
        assert!(netlink.owned_routes().await.unwrap().is_empty());
    });
}

#[test]
fn pods_are_found_by_their_routes_and_followed() {
    let ns = Namespace::new("pods");
    ns.ip("link add pod1 type veth peer name pod1p");
    ns.ip("link set pod1 address 02:00:00:00:00:01");
    ns.ip("link set pod1 up");
    ns.ip("link set pod1p up");
    ns.ip("route add 10.1.0.7/32 dev pod1");
    ns.run(|| async {
        let netlink = Netlink::open().unwrap();
        let mut pods = netlink.watch_pod_links().await.unwrap();
        let (v4, v6): (IpAddr, IpAddr) = ("10.1.0.7".parse().unwrap(), "fd00:1::7".parse().unwrap());
        let first = *pods.borrow_and_update().get(&v4).expect("the route that was there already");
        assert_eq!((first.pod_mac, first.host_mac), (None, [2, 0, 0, 0, 0, 1]));

        ns.ip("neigh add 10.1.0.7 lladdr 02:00:00:00:00:02 dev pod1 nud permanent");
        ns.ip("-6 route add fd00:1::7/128 dev pod1");
        let both = pods.wait_for(|p| p.contains_key(&v6) && p[&v4].pod_mac.is_some()).await.unwrap().clone();
        assert_eq!(both[&v4].pod_mac, Some([2, 0, 0, 0, 0, 2]));
        assert_eq!(both[&v4].ifindex, both[&v6].ifindex);

        ns.ip("link del pod1");
        assert!(pods.wait_for(|p| p.is_empty()).await.is_ok());
    });
}
