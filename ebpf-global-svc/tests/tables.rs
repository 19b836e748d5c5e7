//! Tables over the kernel's maps keep the rules of `MemoryTable`, in bulk and at their limits.

#![allow(clippy::unwrap_used, reason = "a test says enough when it fails")]

mod support;

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr};

use ebpf_global_svc::{
    Datapath, DatapathError, ProgramInfo, Tables,
    abi::{ClusterState, POLICY_PEER_BITS, POLICY_PORT_BITS, PolicyKey, PolicyValue, direction},
    table::Table,
};
use support::{Root, ip_key, ip_value, prefix_key, prefix_value};

fn ip(n: u32) -> IpAddr {
    Ipv4Addr::from(0x0a00_0000 + n).into()
}

#[test]
fn ten_thousand_entries_go_in_and_out() {
    let root = Root::new();
    let datapath = Datapath::open(&root.options(1)).unwrap();
    let mut tables = datapath.tables().unwrap();

    let node = Ipv4Addr::new(192, 168, 0, 1);
    let mut ipcache: Vec<_> = (0..10_000).map(|n| (ip_key(2, ip(n)), ip_value(0x2_0000 + n, node))).collect();
    tables.ipcache.upsert(&ipcache).unwrap();
    let mut prefixes: Vec<_> =
        (0..10_000).map(|n| (prefix_key(ip(n << 8), 24), prefix_value(2, node))).collect();
    tables.prefix.upsert(&prefixes).unwrap();

    let mut installed = tables.ipcache.dump().unwrap();
    installed.sort_by_key(|(key, _)| *key);
    ipcache.sort_by_key(|(key, _)| *key);
    assert_eq!(installed, ipcache);
    let mut installed = tables.prefix.dump().unwrap();
    installed.sort_by_key(|(key, _)| *key);
    prefixes.sort_by_key(|(key, _)| *key);
    assert_eq!(installed, prefixes);

    // Every other key, among keys that never were there.
    let gone: Vec<_> = (0..20_000).filter(|n| n % 2 == 0).map(|n| ip_key(2, ip(n))).collect();
    tables.ipcache.remove(&gone).unwrap();
    let mut left = tables.ipcache.dump().unwrap();
    left.sort_by_key(|(key, _)| *key);
    ipcache.retain(|(key, _)| !gone.contains(key));
    assert_eq!(left, ipcache);
    let gone: Vec<_> = (0..20_000).filter(|n| n % 2 == 0).map(|n| prefix_key(ip(n << 8), 24)).collect();
    tables.prefix.remove(&gone).unwrap();
    assert_eq!(tables.prefix.dump().unwrap().len(), 5_000);
    let mut paged = pages(&*tables.ipcache);
    paged.sort_unstable_by_key(|(key, _)| *key);
    assert_eq!(paged, left);
    assert_eq!(pages(&*tables.prefix).len(), 5_000);
    assert_eq!(tables.ipcache.count().unwrap(), left.len() as u64);
    assert_eq!(tables.prefix.count().unwrap(), 5_000);
    let counters = [tables.ipcache.counter().unwrap(), tables.prefix.counter().unwrap()];
    let counted = std::thread::spawn(|| counters.map(|counter| counter().unwrap())).join().unwrap();
    assert_eq!(counted, [left.len() as u64, 5_000]);
    let values = tables.ipcache.get(&[left[0].0, ip_key(2, ip(0))]).unwrap();
    assert_eq!(values, [Some(left[0].1), None]);
}

#[test]
fn a_full_map_says_so_and_keeps_what_it_has() {
    let root = Root::new();
    let datapath = Datapath::open(&root.options(1)).unwrap();
    let Tables { mut endpoint, mut prefix, .. } = datapath.tables().unwrap();

    let entries: Vec<_> = (0..=1024).map(|n| (ip_key(1, ip(n)), support::endpoint(1, n))).collect();
    let error = endpoint.upsert(&entries).unwrap_err();
    assert!(
        matches!(&error, DatapathError::MapFull { map, capacity: 1024 } if map == "cm_endpoint"),
        "{error}"
    );
    assert_eq!(endpoint.dump().unwrap().len(), 1024);
    endpoint.upsert(&entries[..1024]).expect("replacing values needs no room");

    let node = Ipv4Addr::new(192, 168, 0, 1);
    let entries: Vec<_> = (0..=16_384).map(|n| (prefix_key(ip(n << 8), 24), prefix_value(2, node))).collect();
    let error = prefix.upsert(&entries).unwrap_err();
    assert!(matches!(&error, DatapathError::MapFull { map, .. } if map == "cm_prefix"), "{error}");
}

#[test]
fn the_cluster_table_shows_only_what_is_not_healthy() {
    let root = Root::new();
    let datapath = Datapath::open(&root.options(1)).unwrap();
    let mut tables = datapath.tables().unwrap();
    let (dead, draining) = (ClusterState { state: 2 }, ClusterState { state: 1 });

    tables.cluster.upsert(&[(511, dead), (7, draining), (8, ClusterState::default())]).unwrap();
    assert_eq!(tables.cluster.dump().unwrap(), [(7, draining), (511, dead)]);
    tables.cluster.remove(&[7, 9]).unwrap();
    assert_eq!(tables.cluster.dump().unwrap(), [(511, dead)]);
    assert_eq!(pages(&*tables.cluster), [(511, dead)]);
    assert_eq!(tables.cluster.get(&[7, 511]).unwrap(), [None, Some(dead)]);
}

#[test]
fn opening_again_finds_everything_and_refuses_another_cluster() {
    let root = Root::new();
    let entry = (ip_key(2, ip(1)), ip_value(0x2_0001, Ipv4Addr::LOCALHOST));
    {
        let datapath = Datapath::open(&root.options(1)).unwrap();
        datapath.tables().unwrap().ipcache.upsert(&[entry]).unwrap();

        let error = Datapath::open(&root.options(1)).unwrap_err();
        assert!(matches!(error, DatapathError::InUse { .. }), "{error}");
    }
    let error = Datapath::open(&root.options(2)).unwrap_err();
    assert!(error.to_string().contains("belongs to cluster 1"), "{error}");

    let datapath = Datapath::open(&root.options(1)).unwrap();
    assert_eq!(datapath.tables().unwrap().ipcache.dump().unwrap(), [entry]);
}

#[test]
fn a_datapath_without_policies_and_session_affinity_is_taken_over() {
    let root = Root::new();
    let entry = (ip_key(2, ip(1)), ip_value(0x2_0001, Ipv4Addr::LOCALHOST));
    let datapath = Datapath::open(&root.options(1)).unwrap();
    datapath.tables().unwrap().ipcache.upsert(&[entry]).unwrap();
    drop(datapath);
    // As an older version leaves it.
    for map in [
        "cm_policy",
        "cm_cidr",
        "cm_ct",
        "cm_verdict",
        "cm_fragment",
        "cm_affinity",
        "cm_calls",
        "cm_events",
        "cm_event_rule",
        "cm_event_state",
    ] {
        std::fs::remove_file(root.path().join("maps").join(map)).unwrap();
    }
    let datapath = Datapath::open(&root.options(1)).unwrap();
    let tables = datapath.tables().unwrap();
    assert_eq!(tables.ipcache.dump().unwrap(), [entry]);
    assert_eq!((tables.policy.count().unwrap(), tables.cidr.count().unwrap()), (0, 0));
    assert_eq!(datapath.flows().unwrap(), []);
}

#[test]
fn what_is_left_can_be_looked_at_and_removed_once_no_agent_runs() {
    let root = Root::new();
    assert!(Datapath::remains(root.path()).unwrap().is_none());
    let datapath = Datapath::open(&root.options(7)).unwrap();
    let error = Datapath::remains(root.path()).unwrap_err();
    assert!(matches!(error, DatapathError::InUse { .. }), "{error}");
    drop(datapath);

    let remains = Datapath::remains(root.path()).unwrap().unwrap();
    assert_eq!((remains.maps().len(), remains.links()), (27, &[][..]));
    assert_eq!(remains.config().unwrap().cluster, 7);
    let error = Datapath::open(&root.options(7)).unwrap_err();
    assert!(matches!(error, DatapathError::InUse { .. }), "nobody starts on it meanwhile: {error}");
    remains.remove().unwrap();
    assert!(!root.path().exists());

    // What is not, or not only, ours is left alone.
    let error = Datapath::remains(std::path::Path::new("/tmp")).unwrap_err();
    assert!(error.to_string().contains("not in a BPF file system"), "{error}");
    drop(Datapath::open(&root.options(7)).unwrap());
    let stranger = root.path().join("stranger");
    std::fs::create_dir(&stranger).unwrap();
    let error = Datapath::remains(root.path()).unwrap_err();
    assert!(error.to_string().contains("stranger is none of ours"), "{error}");
    std::fs::remove_dir(&stranger).unwrap();

    let error = Datapath::open(&root.options(8)).unwrap_err().to_string();
    let command = format!("clustermesh-agent cleanup --bpf-root {}`", root.path().display());
    assert!(error.contains(&command), "{error}");
}

#[test]
fn programs_stay_far_below_the_verifiers_limit() {
    let root = Root::new();
    let datapath = Datapath::open(&root.options(1)).unwrap();
    let mut programs = datapath.programs().unwrap();
    programs.sort_by(|a, b| a.name.cmp(&b.name));
    assert_eq!(programs.len(), 16);
    for program in programs {
        println!(
            "{:16} {:6} verified, {:5} long",
            program.name, program.verified_instructions, program.instructions
        );
        assert!((1..100_000).contains(&program.verified_instructions), "{program:?}");
    }
}

#[test]
fn the_documentation_shows_every_program_and_every_map() {
    let root = Root::new();
    let datapath = Datapath::open(&root.options(1)).unwrap();
    let text = include_str!("../../docs/datapath.md");
    let (_, rest) = text.split_once("## In one picture").unwrap();
    let (picture, tables) = rest.split_once("## Hooks").unwrap();
    let words = |text: &'static str| -> HashSet<&str> {
        text.split(|c: char| !c.is_ascii_alphanumeric() && !"_/".contains(c)).collect()
    };
    let (shown, listed) = (words(picture), words(tables));
    for ProgramInfo { name, .. } in datapath.programs().unwrap() {
        let pair = format!("{}4/6", name.trim_end_matches(['4', '6']));
        assert!(shown.contains(&*name) || shown.contains(&*pair), "{name} is not in the picture");
        assert!(listed.contains(&*name), "{name} is in no table");
    }
    for map in std::fs::read_dir(root.path().join("maps")).unwrap() {
        let map = map.unwrap().file_name().into_string().unwrap();
        assert!(shown.contains(map.trim_start_matches("cm_")), "{map} is not in the picture");
        assert!(listed.contains(&*map), "{map} is in no table");
    }
}

#[test]
fn policies_and_address_ranges_are_kept_by_their_length() {
    let root = Root::new();
    let datapath = Datapath::open(&root.options(1)).unwrap();
    let mut tables = datapath.tables().unwrap();
    let any = PolicyKey {
        prefixlen: POLICY_PEER_BITS,
        subject: 0x1_0001,
        peer: 0x2_0001,
        direction: direction::EGRESS,
        proto: 0,
        port: 0,
    };
    let port = PolicyKey { prefixlen: POLICY_PORT_BITS, proto: support::TCP, port: 80_u16.to_be(), ..any };
    let mut entries = [any, port].map(|key| (key, PolicyValue { flags: 0, rule: key.prefixlen }));
    entries.sort_by_key(|(key, _)| *key);
    tables.policy.upsert(&entries).unwrap();
    let mut installed = tables.policy.dump().unwrap();
    installed.sort_by_key(|(key, _)| *key);
    assert_eq!(installed, entries);
    let other_port = PolicyKey { port: 81_u16.to_be(), ..port };
    assert_eq!(tables.policy.get(&[other_port]).unwrap(), [Some(entries[0].1)], "the wider one");

    let ranges = [(prefix_key(ip(0), 8), 1 << 24), (prefix_key(ip(0), 24), (1 << 24) + 1)];
    tables.cidr.upsert(&ranges).unwrap();
    assert_eq!(tables.cidr.count().unwrap(), 2);
    tables.cidr.remove(&[ranges[0].0]).unwrap();
    assert_eq!(tables.cidr.dump().unwrap(), [ranges[1]]);
    assert_eq!(datapath.flows().unwrap(), []);
    assert_eq!(datapath.verdicts().unwrap(), []);
}

/// All entries, by pages.
fn pages<K, V>(table: &dyn Table<K, V>) -> Vec<(K, V)> {
    let (mut cursor, mut entries) = (None, Vec::new());
    loop {
        entries.extend(table.page(&mut cursor, 300).unwrap());
        if cursor.is_none() {
            return entries;
        }
    }
}
