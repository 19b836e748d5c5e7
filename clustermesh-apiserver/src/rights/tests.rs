use proptest::prelude::*;

use super::*;

fn rights(cluster: &str) -> Rights {
    Rights::of(&cluster.parse().unwrap())
}

/// An etcd as far as rights go; refuses what etcd refuses.
fn perform(etcd: &mut Rights, step: Step) {
    match step {
        Step::AddRole(role) => assert!(etcd.roles.insert(role, BTreeMap::new()).is_none()),
        Step::Permit(role, span, access) => drop(etcd.roles.get_mut(&role).unwrap().insert(span, access)),
        Step::Forbid(role, span) => assert!(etcd.roles.get_mut(&role).unwrap().remove(&span).is_some()),
        Step::AddUser(user) => assert!(etcd.users.insert(user, BTreeSet::new()).is_none()),
        Step::Grant(user, role) => {
            assert!(role == ROOT || etcd.roles.contains_key(&role));
            assert!(etcd.users.get_mut(&user).unwrap().insert(role));
        }
        Step::Revoke(user, role) => assert!(etcd.users.get_mut(&user).unwrap().remove(&role)),
        Step::DeleteUser(user) => assert!(etcd.users.remove(&user).is_some()),
    }
}

proptest! {
    /// Whatever an etcd holds (the rights of another cluster, parts of them, users of others), the steps
    /// can be done in their order, lead to the rights and leave others alone.
    #[test]
    fn steps_lead_to_the_rights_from_anywhere(
        roles in proptest::collection::btree_map(
            proptest::sample::select(vec!["local", "agent", "remote", "externalworkload", "mine"]),
            proptest::collection::btree_map(0..9_usize, proptest::bool::ANY, 0..4),
            0..5,
        ),
        users in proptest::collection::btree_map(
            proptest::sample::select(vec!["root", "admin-alpha", "remote", "remote-beta", "me"]),
            proptest::collection::btree_set(proptest::sample::select(vec!["root", "local", "mine"]), 0..3),
            0..5,
        ),
    ) {
        let spans: Vec<KeySpan> =
            rights("beta").roles.into_values().flatten().map(|(span, _)| span).collect();
        let access = |read: bool| if read { Access::Read } else { Access::ReadWrite };
        let start = Rights {
            users: users
                .into_iter()
                .map(|(user, roles)| (user.into(), roles.into_iter().map(str::to_owned).collect()))
                .collect(),
            roles: roles
                .into_iter()
                .map(|(role, spans_of)| {
                    let spans = spans_of.into_iter().map(|(n, read)| (spans[n].clone(), access(read)));
                    (role.to_owned(), spans.collect())
                })
                .collect(),
        };
        let wanted = rights("alpha");
        let mut etcd = start.clone();
        for step in wanted.steps(&etcd.clone()) {
            perform(&mut etcd, step);
        }
        for (user, roles) in &wanted.users {
            prop_assert_eq!(&etcd.users[user], roles);
        }
        for (role, permissions) in &wanted.roles {
            prop_assert_eq!(&etcd.roles[role], permissions);
        }
        for (user, roles) in start.users.iter().filter(|(user, _)| !wanted.users.contains_key(*user)) {
            prop_assert_eq!(&etcd.users[user], roles);
        }
        prop_assert_eq!(etcd.roles.get("mine"), start.roles.get("mine"));
        prop_assert!(wanted.steps(&etcd).is_empty());
    }
}

#[test]
fn a_wider_access_is_narrowed_and_not_lost() {
    let wanted = rights("alpha");
    let mut found = wanted.clone();
    let (span, access) = found.roles.get_mut("remote").unwrap().iter_mut().next().unwrap();
    *access = Access::ReadWrite;
    let step = Step::Permit("remote".into(), span.clone(), Access::Read);
    assert_eq!(wanted.steps(&found), [step]);
}

#[test]
fn nobody_but_the_cluster_itself_may_write() {
    for (role, permissions) in rights("alpha").roles {
        let writes: Vec<_> = permissions
            .into_iter()
            .filter(|(_, access)| *access != Access::Read)
            .map(|(span, _)| String::from_utf8(span.start).unwrap())
            .collect();
        match role.as_str() {
            "externalworkload" => {
                assert_eq!(writes, ["cilium/.initlock/", "cilium/state/noderegister/v1/"]);
            }
            "agent" => assert_eq!(writes, ["clustermesh/announced/v1/alpha/"]),
            _ => assert!(writes.is_empty(), "{role}: {writes:?}"),
        }
    }
}
