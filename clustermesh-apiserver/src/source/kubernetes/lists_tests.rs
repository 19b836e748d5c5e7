use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::objects::{Namespace, ObjectKind};

fn name(index: u8) -> NamespacedName {
    NamespacedName { namespace: String::new(), name: format!("n{index}") }
}

/// An object that can be told from others of the same name.
fn item(index: u8, variant: u8) -> Item {
    let labels = [("variant".to_owned(), variant.to_string())].into();
    let object = Namespace { name: name(index).name, labels, global: None };
    Item { name: name(index), object: Ok(Object::Namespace(Arc::new(object))) }
}

fn synced() -> Lists {
    let mut lists = Lists::default();
    for kind in ObjectKind::ALL {
        lists.hear(kind, Heard::Absent);
    }
    assert_eq!(lists.take(), [SourceEvent::Synced]);
    lists
}

#[test]
fn nothing_is_told_until_all_is_known() {
    let mut lists = Lists::default();
    let (last, others) = ObjectKind::ALL.split_last().unwrap();
    for kind in others {
        lists.hear(*kind, Heard::Begin);
        lists.hear(*kind, Heard::Object(item(1, 1)));
        lists.hear(*kind, Heard::End);
        assert_eq!(lists.take(), []);
    }
    lists.hear(*last, Heard::Trouble(Some("why".into())));
    assert_eq!(lists.take(), [SourceEvent::Trouble(Some("why".into()))]);
    lists.hear(*last, Heard::Absent);
    let told = lists.take();
    assert!(
        matches!(&told[..], [SourceEvent::Changes(changes), SourceEvent::Synced, SourceEvent::Trouble(None)]
        if changes.len() == others.len())
    );
}

/// Pods are as good as known while Cilium's objects say what they could; the last of these goes together
/// with the arrival of the pods.
#[test]
fn pods_stand_in_for_objects_of_cilium_that_go() {
    let mut lists = Lists::default();
    for kind in ObjectKind::ALL {
        match kind {
            ObjectKind::Pod => {}
            ObjectKind::CiliumNode => {
                lists.hear(kind, Heard::Begin);
                lists.hear(kind, Heard::Object(item(1, 1)));
                lists.hear(kind, Heard::End);
            }
            _ => lists.hear(kind, Heard::Absent),
        }
    }
    assert!(!lists.wants_pods());
    assert!(
        matches!(&lists.take()[..], [SourceEvent::Changes(changes), SourceEvent::Synced] if changes.len() == 1)
    );

    lists.hear(ObjectKind::CiliumNode, Heard::Gone(name(1)));
    lists.hear(ObjectKind::Namespace, Heard::Object(item(2, 1)));
    assert!(lists.wants_pods());
    let namespace = Change::Upsert(item(2, 1).object.unwrap());
    assert_eq!(lists.take(), [SourceEvent::Changes(vec![namespace])]);
    lists.hear(ObjectKind::Pod, Heard::Begin);
    lists.hear(ObjectKind::Pod, Heard::Object(item(3, 1)));
    assert_eq!(lists.take(), []);
    lists.hear(ObjectKind::Pod, Heard::End);
    let gone = Change::Delete(ObjectKey { kind: ObjectKind::CiliumNode, name: name(1) });
    assert!(
        matches!(&lists.take()[..], [SourceEvent::Changes(changes)] if changes.len() == 2 && changes.contains(&gone))
    );
}

#[test]
fn a_list_that_is_cut_short_deletes_nothing() {
    let mut lists = synced();
    for index in 0..3 {
        lists.hear(ObjectKind::Namespace, Heard::Object(item(index, 0)));
    }
    lists.take();
    lists.hear(ObjectKind::Namespace, Heard::Begin);
    lists.hear(ObjectKind::Namespace, Heard::Object(item(0, 1)));
    lists.hear(ObjectKind::Namespace, Heard::Begin);
    assert!(matches!(&lists.take()[..], [SourceEvent::Changes(changes)] if changes.len() == 1));
    lists.hear(ObjectKind::Namespace, Heard::Object(item(1, 0)));
    lists.hear(ObjectKind::Namespace, Heard::Object(item(2, 0)));
    lists.hear(ObjectKind::Namespace, Heard::End);
    let key = ObjectKey { kind: ObjectKind::Namespace, name: name(0) };
    assert!(
        matches!(&lists.take()[..], [SourceEvent::Changes(changes)] if changes.contains(&Change::Delete(key)))
    );
}

#[test]
fn what_makes_no_sense_keeps_its_last_good_state() {
    let mut lists = synced();
    lists.hear(ObjectKind::Namespace, Heard::Object(item(0, 0)));
    lists.take();
    let broken = Item { name: name(0), object: Err("Namespace n0: no label".to_owned()) };
    lists.hear(ObjectKind::Namespace, Heard::Begin);
    lists.hear(ObjectKind::Namespace, Heard::Object(broken));
    lists.hear(ObjectKind::Namespace, Heard::End);
    assert_eq!(lists.take(), [SourceEvent::Broken(1)]);
    lists.hear(ObjectKind::Namespace, Heard::Gone(name(0)));
    let told = lists.take();
    assert!(
        matches!(&told[..], [SourceEvent::Changes(changes), SourceEvent::Broken(0)] if changes.len() == 1)
    );
}

proptest! {
    /// A server whose watches are lost, listed anew, and lost again while they are listed: what is told
    /// adds up to what it has, and what it has all the time is never deleted.
    #[test]
    fn what_is_told_adds_up(steps in prop::collection::vec((0..8_u8, 0..6_u8, any::<u8>()), 1..80)) {
        let kind = ObjectKind::Namespace;
        let mut lists = synced();
        let mut server = BTreeMap::from([(9, 0_u8)]);
        let mut told = BTreeMap::new();
        // Whether the watch works; without it changes go unseen.
        let mut watching = false;
        let mut take = |lists: &mut Lists| {
            for event in lists.take() {
                let SourceEvent::Changes(changes) = event else { continue };
                for change in changes {
                    match change {
                        Change::Upsert(object) => drop(told.insert(object.key().name, object)),
                        Change::Delete(key) => {
                            assert_ne!(key.name, name(9));
                            assert!(told.remove(&key.name).is_some());
                        }
                    }
                }
            }
            told.clone()
        };
        let relist = |lists: &mut Lists, server: &BTreeMap<u8, u8>, upto: usize| {
            lists.hear(kind, Heard::Begin);
            for (index, variant) in server.iter().take(upto) {
                lists.hear(kind, Heard::Object(item(*index, *variant)));
            }
        };
        for (step, index, variant) in steps {
            match step {
                0 => watching = false,
                1 => relist(&mut lists, &server, usize::from(variant) % 4),
                2 => {
                    relist(&mut lists, &server, usize::MAX);
                    lists.hear(kind, Heard::End);
                    watching = true;
                }
                3 | 4 => {
                    if server.remove(&index).is_some() && watching {
                        lists.hear(kind, Heard::Gone(name(index)));
                    }
                }
                _ => {
                    server.insert(index, variant);
                    if watching {
                        lists.hear(kind, Heard::Object(item(index, variant)));
                    }
                }
            }
            if variant % 3 == 0 {
                take(&mut lists);
            }
        }
        relist(&mut lists, &server, usize::MAX);
        lists.hear(kind, Heard::End);
        let told = take(&mut lists);
        let expected: BTreeMap<_, _> = server
            .iter()
            .filter_map(|(index, variant)| Some((name(*index), item(*index, *variant).object.ok()?)))
            .collect();
        prop_assert_eq!(told, expected);
    }
}
