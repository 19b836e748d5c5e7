//! An etcd that answers whatever it likes: late, twice, out of order, with any key, value and revision.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use arbitrary::{Result, Unstructured};
use clustermesh_kvstore::etcd::{KeyRange, KeyValue, Page, WatchEvent, WatchMessage};
use clustermesh_kvstore::reflector::core::{Change, Core, Effect, Failure, Input, Ticket, Timing};
use clustermesh_kvstore::reflector::{Prune, ReflectorSpec};

const PREFIX: &str = "cilium/state/nodes/v1/beta/";
const CANARY: &str = "cilium/synced/beta/cilium/state/nodes/v1";
const MOST: usize = 64;

pub(crate) fn run(input: &[u8]) {
    let mut choices = Unstructured::new(input);
    let canary = choices.arbitrary().unwrap_or(false).then(|| CANARY.to_owned());
    let prune = if choices.arbitrary().unwrap_or(false) { Prune::Consumer } else { Prune::Reflector };
    let spec = ReflectorSpec { prune, ..ReflectorSpec::new(PREFIX, canary) };
    let now = Instant::now();
    let mut bed = Bed {
        core: Core::new(&spec, Timing::default(), now, 7),
        now,
        told: BTreeMap::new(),
        tickets: Vec::new(),
        prune,
        effects: Vec::new(),
    };
    for _ in 0..MOST {
        if choices.is_empty() || bed.step(&mut choices).is_err() {
            break;
        }
    }
}

struct Bed {
    core: Core,
    now: Instant,
    /// Revisions of keys that the consumer was told of.
    told: BTreeMap<String, i64>,
    /// Of requests, the newest last.
    tickets: Vec<Ticket>,
    prune: Prune,
    effects: Vec<Effect>,
}

impl Bed {
    fn step(&mut self, choices: &mut Unstructured<'_>) -> Result<()> {
        // A connection comes first, or nothing is expected.
        let input = match (self.tickets.last(), choices.int_in_range(0..=9)?) {
            (None, _) | (_, 0) => Input::Connected { generation: choices.int_in_range(1..=3)? },
            (_, 1) => Input::Disconnected { reason: "cut".into() },
            (_, 2) => {
                self.now += Duration::from_secs(choices.int_in_range(0..=30)?);
                Input::Tick
            }
            (Some(newest), what) => {
                let any = self.tickets[choices.choose_index(self.tickets.len())?];
                let ticket = if choices.ratio(1, 8)? { any } else { *newest };
                self.reply(ticket, what, choices)?
            }
        };
        self.core.handle(self.now, input, &mut self.effects);
        for effect in std::mem::take(&mut self.effects) {
            self.check(effect);
        }
        if let Some(deadline) = self.core.deadline() {
            assert!(deadline <= self.now + Duration::from_secs(60));
        }
        Ok(())
    }

    fn reply(&self, ticket: Ticket, what: u8, choices: &mut Unstructured<'_>) -> Result<Input> {
        Ok(match what {
            3 => {
                let kv = if choices.ratio(3, 4)? { Some(key_value(choices)?) } else { None };
                Input::Got(ticket, kv, revision(choices)?)
            }
            4 | 5 => {
                let kvs =
                    (0..choices.int_in_range(0..=4)?).map(|_| key_value(choices)).collect::<Result<_>>()?;
                Input::Page(ticket, Page { kvs, more: choices.ratio(1, 4)?, revision: revision(choices)? })
            }
            6 | 7 => Input::Watch(ticket, message(choices)?),
            8 => Input::Failed(ticket, Failure::Compacted),
            _ => Input::Failed(ticket, Failure::Other("no".into())),
        })
    }

    fn check(&mut self, effect: Effect) {
        match effect {
            Effect::Get(ticket, key) => {
                assert_eq!(key, CANARY);
                self.tickets.push(ticket);
            }
            Effect::List { ticket, revision, .. } => {
                assert!(revision >= 0, "etcd lists no negative revision: {revision}");
                self.tickets.push(ticket);
            }
            Effect::Watch { ticket, range, revision } => {
                assert!(range == KeyRange::of(PREFIX) || range == KeyRange::of(CANARY));
                assert!(revision >= 0, "etcd watches from no negative revision: {revision}");
                self.tickets.push(ticket);
            }
            Effect::Emit(Change::Put { suffix, revision, .. }) => drop(self.told.insert(suffix, revision)),
            Effect::Emit(Change::Delete { suffix, .. }) => {
                let known = self.told.remove(&suffix).is_some();
                assert!(
                    known || self.prune == Prune::Consumer,
                    "deletes {suffix:?}, which was never told of"
                );
            }
            Effect::RequestProgress | Effect::EndSession(_) | Effect::Emit(_) => {}
        }
    }
}

fn message(choices: &mut Unstructured<'_>) -> Result<WatchMessage> {
    Ok(match choices.int_in_range(0..=6)? {
        0 => WatchMessage::Created { revision: revision(choices)? },
        1 => WatchMessage::Progress { revision: revision(choices)? },
        2 => WatchMessage::Compacted,
        3 => WatchMessage::Canceled { reason: "no".into() },
        _ => {
            let events = (0..choices.int_in_range(0..=3)?).map(|_| event(choices)).collect::<Result<_>>()?;
            WatchMessage::Events { revision: revision(choices)?, events }
        }
    })
}

fn event(choices: &mut Unstructured<'_>) -> Result<WatchEvent> {
    Ok(match choices.ratio(2, 3)? {
        true => WatchEvent::Put(key_value(choices)?),
        false => WatchEvent::Delete { key: key(choices)?, revision: revision(choices)? },
    })
}

fn key_value(choices: &mut Unstructured<'_>) -> Result<KeyValue> {
    let value = choices.choose(&["", "1", "2"])?.as_bytes().to_vec();
    Ok(KeyValue { key: key(choices)?, value, mod_revision: revision(choices)?, lease: choices.arbitrary()? })
}

fn key(choices: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    Ok(match choices.int_in_range(0..=7)? {
        0 => choices.arbitrary()?,
        1 => CANARY.into(),
        2 => [PREFIX.as_bytes(), choices.arbitrary::<&[u8]>()?].concat(),
        n => format!("{PREFIX}n{n}").into_bytes(),
    })
}

fn revision(choices: &mut Unstructured<'_>) -> Result<i64> {
    Ok(match choices.int_in_range(0..=9)? {
        0 => choices.arbitrary()?,
        1 => i64::MAX,
        2 => *choices.choose(&[0, -1, i64::MIN, i64::MAX - 1])?,
        _ => choices.int_in_range(1..=20)?,
    })
}
