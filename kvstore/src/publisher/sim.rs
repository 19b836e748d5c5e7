//! Seeded schedules of the publisher's core against a model of etcd.
//!
//! Faults: lost answers of committed and uncommitted transactions, refused values, expired leases,
//! foreign writes and deletes, re-lists, re-created etcds, restarts of the publisher. After each
//! schedule the faults stop and etcd must become exactly what is desired. Each digest that is stated is
//! compared with the history of etcd: it has to be that of the revision that it names, and the times of
//! its changes those of the events that they came from.

mod checks;
mod etcd;
mod world;

use std::collections::BTreeMap;
use std::time::Duration;

use rand::Rng as _;

use super::Core;
use super::leases::KEYS_PER_LEASE;
use world::{POISON, TTL, World, spec};

#[test]
fn etcd_becomes_what_is_desired_after_any_schedule() {
    let seeds = match std::env::var("CLUSTERMESH_SIM_SEED") {
        Ok(seed) => seed.parse().map(|s: u64| s..s + 1).unwrap(),
        Err(_) => 0..3000,
    };
    for seed in seeds {
        let run = std::panic::catch_unwind(|| {
            let mut world = World::new(seed);
            for _ in 0..world.rng.random_range(20..400) {
                world.step();
            }
            finish(&mut world);
        });
        assert!(run.is_ok(), "failed with CLUSTERMESH_SIM_SEED={seed}");
    }
}

#[test]
fn no_lease_gets_more_keys_than_it_may() {
    let mut world = World::new(1);
    for n in 0..2 * KEYS_PER_LEASE + 500 {
        world.set(format!("a/{n}"), Some(vec![1]));
    }
    finish(&mut world);
    let mut keys = BTreeMap::<i64, usize>::new();
    for v in world.etcd.keys.values() {
        *keys.entry(v.lease).or_default() += 1;
    }
    assert!(keys.values().all(|n| *n <= KEYS_PER_LEASE), "{keys:?}");
    assert_eq!(keys.len(), 3, "{keys:?}");
}

#[test]
fn keys_outside_of_what_is_owned_are_refused() {
    let mut core = Core::new(spec());
    for key in ["c/1", "config/alpha2", "config/alph", "a"] {
        assert!(!core.set(key, Some([1].into()), None), "{key}");
    }
}

#[test]
fn a_steady_stream_of_changes_is_stated_five_times_a_second() {
    let mut world = World::new(1);
    finish(&mut world);
    world.stated = 0;
    for n in 0..1000 {
        world.set("a/1".into(), Some(vec![(n % 250) as u8]));
        for _ in 0..2 {
            world.poll();
            while !world.effects.is_empty() {
                world.execute(false);
            }
        }
        world.advance(Duration::from_millis(10));
    }
    assert!((45..=51).contains(&world.stated), "{} statements in 10 s", world.stated);
}

fn finish(world: &mut World) {
    let poisoned: Vec<_> =
        world.desired.iter().filter(|(_, v)| **v == *POISON).map(|(k, _)| k.clone()).collect();
    for key in poisoned {
        world.set(key, Some(b"fits".to_vec()));
    }
    for prefix in ["config/alpha", "a/", "b/"] {
        world.complete.insert(prefix.into());
        world.core.initial_done(prefix);
    }
    world.quiesce();
    world.check_final();

    // At rest nothing is written, whatever time passes; and leases are kept alive.
    let writes = world.writes;
    for _ in 0..20 {
        world.advance(TTL / 6);
        world.quiesce();
    }
    world.check_final();
    assert_eq!(world.writes, writes, "writes at rest");

    // A restart over what stands there writes nothing either.
    world.restart();
    world.quiesce();
    world.check_final();
    assert_eq!(world.writes, writes, "a restart wrote keys that were as desired");
}
