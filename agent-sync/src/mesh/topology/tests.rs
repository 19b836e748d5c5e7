use std::collections::BTreeMap;

use super::*;
use crate::wire_key;

fn node(cidrs: &[&str], ips: &[&str]) -> NodeFact {
    NodeFact {
        internal_ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
        pod_cidrs: cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect(),
        ..NodeFact::default()
    }
}

/// The topology after `before` in which there are these nodes and no others.
fn resolve(before: &Topology, nodes: &[(u16, NodeFact)]) -> Topology {
    let mut after = before.clone();
    after.prefixes.claims.withdraw_all();
    after.speakers.claims.withdraw_all();
    nodes.iter().for_each(|(cluster, node)| after.node_changed(*cluster, "n", None, Some(node)));
    after.resolve(1, &mut Changes::default());
    after
}

fn holders(topology: &Topology) -> Vec<(String, u16)> {
    topology.prefixes().map(|(net, cluster, _)| (net.to_string(), cluster)).collect()
}

#[test]
fn a_remote_cannot_take_a_part_of_the_own_pod_prefixes() {
    let own = node(&["10.1.0.0/16"], &["192.0.2.1"]);
    for stolen in ["10.1.0.0/16", "10.1.7.0/24", "10.0.0.0/8"] {
        let thief = node(&[stolen], &["192.0.2.1"]);
        // Even if it came first.
        let before = resolve(&Topology::default(), &[(2, thief.clone())]);
        assert_eq!(holders(&before), [(stolen.to_owned(), 2)]);
        let after = resolve(&before, &[(2, thief), (1, own.clone())]);
        assert_eq!(holders(&after), [("10.1.0.0/16".to_owned(), 1)]);
        assert_eq!(after.speakers.accepted().values().map(|value| value.cluster).collect::<Vec<_>>(), [1]);
        assert_eq!(after.conflicts().count(), 2);
    }
}

#[test]
fn the_first_holder_keeps_a_prefix_until_it_gives_it_up() {
    let late = node(&["10.9.0.0/16", "fd00:9::/64"], &[]);
    let early = node(&["10.9.1.0/24"], &[]);
    let before = resolve(&Topology::default(), &[(7, early.clone())]);
    let contested = resolve(&before, &[(7, early), (3, late.clone())]);
    assert_eq!(holders(&contested), [("10.9.1.0/24".to_owned(), 7), ("fd00:9::/64".to_owned(), 3)]);
    let settled = resolve(&contested, &[(3, late)]);
    assert_eq!(holders(&settled), [("10.9.0.0/16".to_owned(), 3), ("fd00:9::/64".to_owned(), 3)]);
    assert!(settled.conflicts().next().is_none());
}

#[test]
fn one_cluster_may_nest_its_prefixes() {
    let nested = resolve(&Topology::default(), &[(2, node(&["10.2.0.0/16", "10.2.3.0/24"], &[]))]);
    assert_eq!(nested.prefixes().count(), 2);
    assert!(nested.conflicts().next().is_none());
}

#[test]
fn single_changes_lead_where_all_of_them_at_once_do() {
    // Whoever holds nothing yet is decided by cluster alone, so order plays no part below.
    let cidrs = ["10.0.0.0/8", "10.1.0.0/16", "10.1.1.0/24", "10.2.0.0/16", "10.2.2.0/24", "192.168.0.0/24"];
    let mut seed = 1_u32;
    let mut random = |n: usize| {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 8) as usize % n
    };
    for _ in 0..2000 {
        let mut step = Topology::default();
        let mut nodes: BTreeMap<(u16, String), NodeFact> = BTreeMap::new();
        let mut installed = BTreeMap::new();
        for _ in 0..12 {
            let cluster = [1, 2, 3][random(3)];
            let name = ["a", "b"][random(2)].to_owned();
            let fact = (random(3) > 0).then(|| {
                node(&[cidrs[random(6)], cidrs[random(6)]], &[["192.0.2.1", "192.0.2.2"][random(2)]])
            });
            let before = match fact.clone() {
                Some(fact) => nodes.insert((cluster, name.clone()), fact),
                None => nodes.remove(&(cluster, name.clone())),
            };
            step.node_changed(cluster, &name, before.as_ref(), fact.as_ref());
            let mut changes = Changes::default();
            let previous = step.clone();
            step.resolve(1, &mut changes);
            for (key, value) in changes.prefix {
                match value {
                    Some(value) => installed.insert(key, value),
                    None => installed.remove(&key),
                };
            }
            let wanted = |topology: &Topology| -> BTreeMap<_, _> {
                let nets = topology.prefixes().map(|(net, ..)| net);
                nets.filter_map(|net| Some((wire_key::prefix_key(net), topology.wanted_prefix(&net)?)))
                    .collect()
            };
            assert_eq!(installed, wanted(&step));
            // The same decision over all claims.
            let mut whole = previous;
            whole.prefixes.claims.touch_all();
            whole.prefixes.claims.touch(["0.0.0.0/0".parse().unwrap()]);
            whole.resolve(1, &mut Changes::default());
            assert_eq!(wanted(&whole), wanted(&step));
            // Several may hold a part of what is refused; any of them may be named.
            assert!(whole.prefixes.claims.refused().keys().eq(step.prefixes.claims.refused().keys()));
            assert_eq!(
                (whole.speakers.accepted(), whole.speakers.claims.refused()),
                (step.speakers.accepted(), step.speakers.claims.refused())
            );
        }
    }
}
