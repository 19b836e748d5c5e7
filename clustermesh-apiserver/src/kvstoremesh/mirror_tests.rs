use clustermesh_kvstore::digest::{Digest, SourceTime};

use super::*;

fn a_mirror() -> Mirror {
    let max = MaxConnectedClusters::C255;
    let mesh = Mesh { own: ClusterId::new(1, max).unwrap(), max, cache_ttl: None, census: None };
    Mirror::new("beta".parse().unwrap(), mesh, Arc::default(), Instant::now())
}

fn upsert(suffix: &str, value: Vec<u8>, revision: i64) -> ReflectorEvent {
    ReflectorEvent::Upsert { suffix: suffix.to_owned(), value, revision }
}

fn origins(effects: &[Effect]) -> Vec<Option<i64>> {
    let origin = |effect: &Effect| match effect {
        Effect::Set { origin, .. } => Some(*origin),
        _ => None,
    };
    effects.iter().filter_map(origin).collect()
}

#[test]
fn changes_carry_their_revision_and_lists_do_not() {
    let mut mirror = a_mirror();
    let mut effects = Vec::new();
    let node = |source: u8| {
        format!(r#"{{"Name":"n1","Cluster":"beta","ClusterID":2,"Source":"{source}"}}"#).into_bytes()
    };
    let config = ClusterConfig { id: 2, ..ClusterConfig::default() };
    mirror.config(&config.encode(), &mut effects).unwrap();
    effects.clear();
    mirror.event(Kind::Nodes, upsert("n1", node(1), 5), &mut effects);
    mirror.event(Kind::Nodes, ReflectorEvent::Synced { revision: 6 }, &mut effects);
    assert_eq!(origins(&effects), [None]);
    effects.clear();
    mirror.event(Kind::Nodes, upsert("n1", node(2), 7), &mut effects);
    mirror.event(Kind::Nodes, ReflectorEvent::Delete { suffix: "n1".into(), revision: 8 }, &mut effects);
    assert_eq!(origins(&effects), [Some(7), Some(8)]);
}

#[test]
fn times_are_passed_on_for_the_mirrored_prefix() {
    let mut mirror = a_mirror();
    let recent = vec![Timed { revision: 7, at: SourceTime(11) }];
    let record = DigestRecord { digest: Digest::default(), revision: 7, recent: recent.clone() };
    let mut effects = Vec::new();
    for (suffix, value) in [
        ("ip", record.encode()),
        ("ip", b"no digest".to_vec()),
        ("localservices", record.encode()),
        ("else", record.encode()),
    ] {
        mirror.stated(&upsert(suffix, value, 9), &mut effects);
    }
    let prefix = "cilium/cache/ip/v1/beta/".to_owned();
    assert_eq!(effects, [Effect::Stated { prefix, recent }]);
}
fn a_node(name: &str) -> Vec<u8> {
    format!(r#"{{"Name":"{name}","Cluster":"beta","ClusterID":2}}"#).into_bytes()
}

/// It has told of one node, and what followed up to revision 6.
fn a_mirror_of_one_node(census: Option<Duration>) -> (Mirror, Instant) {
    let (max, now) = (MaxConnectedClusters::C255, Instant::now());
    let mesh = Mesh { own: ClusterId::new(1, max).unwrap(), max, cache_ttl: None, census };
    let mut mirror = Mirror::new("beta".parse().unwrap(), mesh, Arc::default(), now);
    let mut effects = Vec::new();
    let config = ClusterConfig { id: 2, ..ClusterConfig::default() };
    mirror.config(&config.encode(), &mut effects).unwrap();
    mirror.event(Kind::Nodes, ReflectorEvent::Relisting, &mut effects);
    mirror.event(Kind::Nodes, upsert("n1", a_node("n1"), 5), &mut effects);
    mirror.event(Kind::Nodes, ReflectorEvent::Synced { revision: 6 }, &mut effects);
    (mirror, now)
}

fn sum(names: &[&str]) -> Digest {
    let records: Vec<_> = names.iter().map(|name| (*name, a_node(name))).collect();
    records.iter().map(|(name, value)| (*name, value.as_slice())).collect()
}

/// Lets time pass up to `until`; what came of it.
fn pass(mirror: &mut Mirror, from: Instant, until: Duration) -> Vec<Effect> {
    let mut effects = Vec::new();
    let mut now = from;
    while now < from + until {
        now += Duration::from_millis(250);
        mirror.tick(now, &mut effects);
    }
    effects
}

fn of_nodes(mirror: &Mirror) -> (digest::Verdict, [u64; 2]) {
    let nodes = mirror.compared().find(|of| of.kind == Kind::Nodes).unwrap();
    (nodes.verdict, nodes.mismatches.map(|(_, count)| count))
}

fn is_list_of_nodes(effect: &Effect) -> bool {
    matches!(effect, Effect::Follow(Kind::Nodes, _))
}

#[test]
fn what_differs_from_what_is_stated_is_listed_again_and_goes_at_the_end() {
    let (mut mirror, now) = a_mirror_of_one_node(None);
    let mut effects = Vec::new();
    let statement = |names: &[&str], revision| {
        let record = DigestRecord { digest: sum(names), revision, recent: Vec::new() };
        upsert("nodes", record.encode(), revision)
    };
    mirror.stated(&statement(&["n1"], 6), &mut effects);
    pass(&mut mirror, now, Duration::from_secs(5));
    assert_eq!(of_nodes(&mirror).0, digest::Verdict::InSync);
    // In another etcd it may stand no more.
    mirror.stated(&ReflectorEvent::Relisting, &mut effects);
    let now = now + Duration::from_secs(5);
    pass(&mut mirror, now, Duration::from_secs(5));
    let now = now + Duration::from_secs(5);
    assert_eq!(of_nodes(&mirror).0, digest::Verdict::Unknown);
    mirror.stated(&statement(&["n1"], 6), &mut effects);
    assert_eq!(pass(&mut mirror, now, Duration::from_secs(60)), []);
    assert_eq!(of_nodes(&mirror).0, digest::Verdict::InSync);
    // n1 was replaced by n2, and nobody told.
    let now = now + Duration::from_secs(60);
    mirror.stated(&statement(&["n2"], 6), &mut effects);
    let effects = pass(&mut mirror, now, Duration::from_secs(5));
    assert!(effects.len() == 1 && is_list_of_nodes(&effects[0]), "{effects:?}");
    let mut effects = Vec::new();
    mirror.event(Kind::Nodes, ReflectorEvent::Relisting, &mut effects);
    mirror.event(Kind::Nodes, upsert("n2", a_node("n2"), 7), &mut effects);
    let gone = |effect: &Effect| matches!(effect, Effect::Set { value: None, .. });
    assert!(!effects.iter().any(gone), "{effects:?}");
    mirror.event(Kind::Nodes, ReflectorEvent::Synced { revision: 7 }, &mut effects);
    assert_eq!(effects.iter().filter(|effect| gone(effect)).count(), 1);
    pass(&mut mirror, now + Duration::from_secs(5), Duration::from_secs(1));
    assert_eq!(of_nodes(&mirror), (digest::Verdict::InSync, [0, 1]));
}

#[test]
fn a_cluster_that_states_nothing_is_counted() {
    let interval = Duration::from_secs(60);
    let (mut mirror, mut now) = a_mirror_of_one_node(Some(interval));
    for (found, listed) in [(sum(&["n1"]), false), (sum(&["n1", "n2"]), true)] {
        let effects = pass(&mut mirror, now, interval * 2);
        now += interval * 2;
        let [Effect::Count { kind: Kind::Nodes, ticket, prefix }] = effects.as_slice() else {
            panic!("{effects:?}")
        };
        assert_eq!(prefix, "cilium/state/nodes/v1/beta/");
        mirror.counted(Kind::Nodes, *ticket, 6, found.sum);
        let effects = pass(&mut mirror, now, Duration::from_secs(5));
        now += Duration::from_secs(5);
        assert_eq!(effects.iter().any(is_list_of_nodes), listed, "{effects:?}");
        assert_eq!(of_nodes(&mirror).0 == digest::Verdict::InSync, !listed);
    }
}
