use std::time::Instant;

use clustermesh_kvstore::cluster::MaxConnectedClusters;
use clustermesh_kvstore::key::Kind;
use clustermesh_kvstore::reflector::ReflectorEvent;
use ebpf_global_svc::abi::{EVENT_EGRESS, Event, event_kind, read_event};
use ebpf_global_svc::{MapSizes, Tables};

use super::*;
use crate::engine::Input;
use crate::mesh::Links;
use crate::observe::{Kind as FlowKind, Verdict};
use crate::peers::OwnCluster;
use crate::tunnels::Tunnels;

/// What the exporter's tests write of a shop: keys and values in turn.
const SHOP: &str = include_str!("../../../clustermesh-apiserver/testdata/shop.keys");
/// Where records of each kind stand, of cluster alpha.
const PLACES: [(Kind, &str); 5] = [
    (Kind::Nodes, "cilium/state/nodes/v1/alpha/"),
    (Kind::Identities, "cilium/state/identities/v1/id/"),
    (Kind::Ip, "cilium/state/ip/v1/default/"),
    (Kind::LocalServices, "clustermesh/local/services/v1/alpha/"),
    (Kind::LocalIp, "clustermesh/local/ip/v1/alpha/"),
];
const CART: u32 = 82_081;

/// An agent of alpha that knows the shop.
fn shop() -> (Core, Tables) {
    let max = MaxConnectedClusters::C255;
    let own = OwnCluster { name: "alpha".parse().unwrap(), id: ClusterId::new(1, max).unwrap(), max };
    let (name, id) = (own.name.clone(), own.id);
    let (mut tables, now) = (Tables::memory(&MapSizes::default()), Instant::now());
    let mut core = Core::restore(own, "alpha-n1", Tunnels::default(), now, &tables).unwrap();
    core.set_links(Links::Absent);
    core.apply(Input::Configured(name.clone()));
    core.apply(Input::Accepted { name: name.clone(), id });
    let lines: Vec<&str> = SHOP.lines().collect();
    for (kind, place) in PLACES {
        for record in lines.chunks(2) {
            let [key, value] = record else { continue };
            let Some(suffix) = key.strip_prefix(place) else { continue };
            let event =
                ReflectorEvent::Upsert { suffix: suffix.into(), value: value.as_bytes().into(), revision: 1 };
            core.apply(Input::Record { name: name.clone(), kind, event });
        }
        let event = ReflectorEvent::Synced { revision: 1 };
        core.apply(Input::Record { name: name.clone(), kind, event });
    }
    core.step(now, &mut tables);
    (core, tables)
}

fn ip(text: &str) -> (u8, [u8; 16]) {
    wire_key::octets(text.parse().unwrap())
}

/// A packet of TCP to port 8080.
fn packet(source: &str, destination: &str) -> Event {
    let ((family, source), (_, destination)) = (ip(source), ip(destination));
    Event {
        source,
        destination,
        source_port: 43210_u16.to_be(),
        destination_port: 8080_u16.to_be(),
        kind: event_kind::TRACE,
        family,
        proto: wire_key::TCP,
        ..read_event(&[0; 128]).unwrap()
    }
}

fn describe(core: &Core, event: Event) -> Flow {
    let mut flows = Describer::new(core, &[event]).describe(vec![event]);
    assert_eq!(flows.len(), 1);
    flows.remove(0)
}

#[test]
fn both_ends_get_what_is_known_of_them() {
    let (core, _tables) = shop();
    for (from, to) in [("1.1.1.1", "10.1.0.10"), ("2001:db8::1", "fd00:10:1::10")] {
        let flow = describe(&core, packet(from, to));
        assert_eq!((flow.kind(), flow.verdict()), (FlowKind::Trace, Verdict::Forwarded));
        let cart = &flow.destination;
        assert_eq!((cart.identity, cart.port, cart.is_known), (CART, 8080, true));
        assert_eq!(cart.cluster.as_ref().unwrap().as_str(), "alpha");
        assert_eq!(cart.namespace(), Some("shop"));
        let world = &flow.source;
        assert_eq!((world.identity, world.cluster.as_ref(), world.is_known), (identity::WORLD, None, false));
        assert_eq!(world.labels.as_ref().unwrap().to_string(), "reserved:world=;");
    }
    // The programs know better than the tables who it was, and nobody has a name for that.
    let told = Event { destination_identity: 0x2_0009, ..packet("1.1.1.1", "10.1.0.10") };
    let end = describe(&core, told).destination;
    assert_eq!((end.identity, end.is_known, end.labels), (0x2_0009, false, None));
}

#[test]
fn nodes_have_names_and_what_stays_on_its_link_is_nobody_s() {
    let (core, _tables) = shop();
    for (address, node) in [("172.18.0.3", "alpha-n2"), ("10.1.0.200", "alpha-n1")] {
        let end = describe(&core, packet(address, "10.1.0.10")).source;
        assert_eq!((end.node.as_deref(), end.identity), (Some(node), identity::REMOTE_NODE), "{address}");
    }
    for address in ["fe80::1", "ff02::16", "::", "169.254.1.1", "224.0.0.1"] {
        let end = describe(&core, packet(address, address)).source;
        assert_eq!((end.identity, end.node), (0, None), "{address}");
        assert_eq!(end.ip, Some(address.parse().unwrap()));
    }
}

#[test]
fn services_are_known_by_frontend_and_by_number() {
    let (core, tables) = shop();
    let (family, frontend) = ip("10.101.0.50");
    let call = Event {
        kind: event_kind::CALL,
        hook: event_hook::SOCKET,
        flags: EVENT_EGRESS,
        source: [0; 16],
        family,
        frontend,
        frontend_port: 80_u16.to_be(),
        ..packet("0.0.0.0", "10.1.0.10")
    };
    let flow = describe(&core, call);
    assert_eq!(flow.service.unwrap().to_string(), "shop/cart");
    assert_eq!(flow.source.ip, None, "its socket is not bound");
    assert_eq!(describe(&core, Event { frontend_port: 81_u16.to_be(), ..call }).service, None);

    let services = tables.service.dump().unwrap();
    let (_, value) =
        services.iter().find(|(key, _)| key.ip == frontend && key.proto == wire_key::UDP).unwrap();
    let named = Event { number: value.id, ..packet("10.1.0.12", "10.1.0.10") };
    assert_eq!(describe(&core, named).service.unwrap().to_string(), "shop/cart");
    assert_eq!(describe(&core, Event { number: 99, ..named }).service, None);
    // Of a policy the number is a rule's.
    let decided = Event { flags: EVENT_POLICY, ..named };
    let flow = describe(&core, decided);
    assert_eq!((flow.service, flow.rule.as_deref()), (None, Some(value.id.to_string().as_str())));
    assert_eq!(describe(&core, decided).kind(), FlowKind::PolicyVerdict);
}
