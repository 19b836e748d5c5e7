//! An etcd that answers what no etcd would. What the fuzzer found is here by name.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test it is an assertion")]

use std::time::Instant;

use clustermesh_kvstore::etcd::{KeyValue, Page, WatchEvent, WatchMessage};
use clustermesh_kvstore::reflector::core::{Change, Core, Effect, Input, Ticket, Timing};
use clustermesh_kvstore::reflector::{Prune, ReflectorSpec};

const PREFIX: &str = "cilium/state/nodes/v1/beta/";

/// A reflector whose request has been sent, and its ticket.
fn listing(canary: Option<&str>) -> (Core, Ticket) {
    let spec =
        ReflectorSpec { prune: Prune::Consumer, ..ReflectorSpec::new(PREFIX, canary.map(str::to_owned)) };
    let mut core = Core::new(&spec, Timing::default(), Instant::now(), 1);
    let effects = handle(&mut core, Input::Connected { generation: 1 });
    let ticket = effects.iter().find_map(|effect| match effect {
        Effect::Get(ticket, _) | Effect::List { ticket, .. } => Some(*ticket),
        _ => None,
    });
    (core, ticket.unwrap())
}

fn handle(core: &mut Core, input: Input) -> Vec<Effect> {
    let mut effects = Vec::new();
    core.handle(Instant::now(), input, &mut effects);
    effects
}

fn page(kvs: Vec<KeyValue>, more: bool, revision: i64) -> Page {
    Page { kvs, more, revision }
}

fn node(name: &str, mod_revision: i64) -> KeyValue {
    KeyValue { key: format!("{PREFIX}{name}").into_bytes(), value: Vec::new(), mod_revision, lease: 0 }
}

fn watched_from(effects: &[Effect]) -> Option<(Ticket, i64)> {
    effects.iter().find_map(|effect| match effect {
        Effect::Watch { ticket, revision, .. } => Some((*ticket, *revision)),
        _ => None,
    })
}

/// The next revision was computed by adding one: a panic in debug builds, a negative revision in others.
#[test]
fn there_is_nothing_behind_the_last_revision() {
    let (mut core, ticket) = listing(None);
    let effects = handle(&mut core, Input::Page(ticket, page(Vec::new(), false, i64::MAX)));
    assert_eq!(watched_from(&effects).unwrap().1, i64::MAX);

    let (mut core, ticket) = listing(None);
    let effects = handle(&mut core, Input::Page(ticket, page(Vec::new(), false, 5)));
    let (watch, _) = watched_from(&effects).unwrap();
    let events = vec![WatchEvent::Put(node("n1", i64::MAX))];
    handle(&mut core, Input::Watch(watch, WatchMessage::Events { revision: 6, events }));
    handle(&mut core, Input::Disconnected { reason: "cut".into() });
    let effects = handle(&mut core, Input::Connected { generation: 1 });
    assert_eq!(watched_from(&effects).unwrap().1, i64::MAX);

    let (mut core, ticket) = listing(Some("canary"));
    let effects = handle(&mut core, Input::Got(ticket, None, i64::MAX));
    assert_eq!(watched_from(&effects).unwrap().1, i64::MAX);
}

/// A list that names no revision began anew with each page, and what the first pages told of went.
#[test]
fn a_list_without_a_revision_is_one_list() {
    for revision in [0, -7, i64::MIN] {
        let (mut core, ticket) = listing(None);
        let effects = handle(&mut core, Input::Page(ticket, page(vec![node("n1", 1)], true, revision)));
        assert!(effects.contains(&Effect::Emit(Change::Relisting)));
        let next = effects.iter().find_map(|effect| match effect {
            Effect::List { ticket, revision, .. } => Some((*ticket, *revision)),
            _ => None,
        });
        let (ticket, pinned) = next.unwrap();
        assert!(pinned > 0, "{pinned} means now, which is another list");
        let effects = handle(&mut core, Input::Page(ticket, page(vec![node("n2", 1)], false, revision)));
        assert!(!effects.contains(&Effect::Emit(Change::Relisting)));
        assert!(watched_from(&effects).unwrap().1 > 0);
    }
}
