//! The kernel's maps of one node: they outlive the agent, fail when told to, and are looked at after
//! every single write as a program in the kernel would.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{Hash, Hasher};
use std::marker::PhantomData;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use clustermesh_kvstore::cluster::{Identity, MaxConnectedClusters};
use ebpf_global_svc::abi::{
    BackendValue, ClusterState, EndpointValue, Group, IpKey, IpValue, NodeKey, NodeValue, PolicyKey,
    PolicyValue, PrefixKey, PrefixValue, ServiceKey, ServiceValue, SlotKey, TranslateKey, TranslateValue,
    UnderlayKey, UnderlayValue,
};
use ebpf_global_svc::table::{Cursor, MemoryTable, Table};
use ebpf_global_svc::{DatapathError, Tables};

use crate::broken::{self, Broken};
use crate::faults::Fault;

/// No program runs longer than this; what it read at its start must hold out.
const PROGRAM: Duration = Duration::from_millis(20);

/// All maps of a node.
pub struct Kernel {
    /// Set by the world before each step of the agent.
    pub now: Instant,
    /// Of 16 writes, how many fail.
    pub failing: u8,
    /// Entries that the address map takes.
    pub capacity: usize,
    /// Decides which writes fail; another one with each step of the agent.
    pub salt: u64,
    /// The first thing that was wrong.
    pub violation: Option<String>,
    /// Entries removed since the world looked last.
    pub removed: Vec<Removed>,
    /// Writes that changed anything.
    pub writes: u64,
    /// Faults that happened.
    pub faults: Vec<Fault>,
    own: u16,
    /// `cm_service`.
    pub services: BTreeMap<ServiceKey, ServiceValue>,
    /// `cm_slot`.
    pub slots: BTreeMap<SlotKey, u32>,
    /// `cm_backend`.
    pub backends: BTreeMap<u32, BackendValue>,
    /// `cm_ipcache`.
    pub ipcache: BTreeMap<IpKey, IpValue>,
    /// `cm_prefix`.
    pub prefixes: BTreeMap<PrefixKey, PrefixValue>,
    /// `cm_node`.
    pub nodes: BTreeMap<NodeKey, NodeValue>,
    /// `cm_underlay`.
    pub underlay: BTreeMap<UnderlayKey, UnderlayValue>,
    /// `cm_endpoint`.
    pub endpoints: BTreeMap<IpKey, EndpointValue>,
    /// `cm_cluster`: those that are not healthy.
    pub clusters: BTreeMap<u32, ClusterState>,
    /// `cm_policy`.
    pub policies: BTreeMap<PolicyKey, PolicyValue>,
    /// `cm_cidr`.
    pub ranges: BTreeMap<PrefixKey, u32>,
    /// `cm_translate`.
    pub translations: BTreeMap<TranslateKey, TranslateValue>,
    /// Values that programs may still be following, and since when they are replaced.
    replaced: Vec<(Instant, ServiceValue)>,
    /// Slots that wait for the values that count them.
    late: Vec<(SlotKey, u32)>,
    /// When slots and backends that are gone were removed last, by backend ID.
    dead: BTreeMap<u32, Instant>,
}

/// An entry that went away.
#[derive(Clone, Copy, Debug)]
pub enum Removed {
    /// Of an address.
    Address(IpKey),
    /// A backend of a cluster is no part of a service any more.
    Group(ServiceKey, u16),
    /// A prefix.
    Prefix(PrefixValue),
    /// Of policies.
    Policy(PolicyKey),
}

impl Kernel {
    /// Empty maps of a node of cluster `own`.
    pub fn new(own: u16, now: Instant) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self {
            now,
            failing: 0,
            capacity: usize::MAX,
            salt: 0,
            violation: None,
            removed: Vec::new(),
            writes: 0,
            faults: Vec::new(),
            own,
            services: BTreeMap::new(),
            slots: BTreeMap::new(),
            backends: BTreeMap::new(),
            ipcache: BTreeMap::new(),
            prefixes: BTreeMap::new(),
            nodes: BTreeMap::new(),
            underlay: BTreeMap::new(),
            endpoints: BTreeMap::new(),
            clusters: BTreeMap::new(),
            policies: BTreeMap::new(),
            ranges: BTreeMap::new(),
            translations: BTreeMap::new(),
            replaced: Vec::new(),
            late: Vec::new(),
            dead: BTreeMap::new(),
        }))
    }

    /// Addresses and ports that a value leads to, by cluster, with the slots as they are now.
    fn backends_of(&self, value: &ServiceValue) -> BTreeMap<u16, BTreeSet<([u8; 16], u16)>> {
        let groups = value.groups[..usize::from(value.n_groups)].iter().map(|group| {
            let slots = (0..group.count()).filter_map(|slot| {
                let key = SlotKey { service: value.id, slot, cluster: group.cluster, pad: 0 };
                let backend = self.backends.get(self.slots.get(&key)?)?;
                Some((backend.ip, backend.port))
            });
            (group.cluster, slots.collect())
        });
        groups.collect()
    }

    /// What a program that selects a backend of `service` could come to, by cluster.
    pub fn reachable(&self, service: &ServiceKey) -> Option<BTreeMap<u16, (Group, Vec<BackendValue>)>> {
        let value = self.services.get(service)?;
        let groups = value.groups[..usize::from(value.n_groups)].iter().map(|group| {
            let slots = (0..group.count()).filter_map(|slot| {
                let key = SlotKey { service: value.id, slot, cluster: group.cluster, pad: 0 };
                self.backends.get(self.slots.get(&key)?).copied()
            });
            (group.cluster, (*group, slots.collect()))
        });
        Some(groups.collect())
    }

    /// Everything goes, as if it had been removed entry by entry.
    pub fn flush(&mut self) {
        let addresses = std::mem::take(&mut self.ipcache);
        self.removed.extend(addresses.into_keys().map(Removed::Address));
        let policies = std::mem::take(&mut self.policies);
        self.removed.extend(policies.into_keys().map(Removed::Policy));
        self.services.clear();
        self.slots.clear();
        self.backends.clear();
    }

    /// What slots a program may still follow is not looked at.
    fn free_surplus(&mut self, value: &ServiceValue) {
        let groups = &value.groups[..usize::from(value.n_groups)];
        let count = |cluster| groups.iter().find(|g| g.cluster == cluster).map_or(0, |g| g.count());
        let surplus = |key: &SlotKey| key.service == value.id && key.slot >= count(key.cluster);
        self.slots.retain(|key, _| !surplus(key));
        let id = value.id;
        self.check_values(|value| value.id == id);
    }

    fn violate(&mut self, text: String) {
        self.violation.get_or_insert(text);
    }

    /// Whether a program that read `value` finds what it counts.
    fn check_value(&mut self, value: &ServiceValue) {
        for group in &value.groups[..usize::from(value.n_groups)] {
            for slot in 0..group.count() {
                let key = SlotKey { service: value.id, slot, cluster: group.cluster, pad: 0 };
                let backend = self.slots.get(&key).map(|id| (*id, self.backends.get(id)));
                let problem = match backend {
                    None => format!("slot {slot} of cluster {} is counted, but missing", group.cluster),
                    Some((id, None)) => format!("backend {id} is in a slot, but missing"),
                    Some((id, Some(b))) if b.cluster != group.cluster => {
                        format!("backend {id} in a slot of {} is of {}", group.cluster, b.cluster)
                    }
                    Some(_) => continue,
                };
                self.violate(format!("datapath: service {}: {problem}", value.id));
            }
        }
    }

    /// All values that programs may follow and that `concerns` holds of.
    fn check_values(&mut self, concerns: impl Fn(&ServiceValue) -> bool) {
        let now = self.now;
        self.replaced.retain(|(since, _)| now.duration_since(*since) < PROGRAM);
        let values: Vec<ServiceValue> = self
            .services
            .values()
            .chain(self.replaced.iter().map(|(_, value)| value))
            .filter(|value| concerns(value))
            .copied()
            .collect();
        values.iter().for_each(|value| self.check_value(value));
    }

    fn check_identity(&mut self, cluster: u16, identity: u32) {
        let identity = Identity(identity);
        let of = identity.cluster(MaxConnectedClusters::C255);
        if !identity.is_reserved() && of != cluster {
            self.violate(format!("I2: identity {identity} of cluster {of} installed for cluster {cluster}"));
        }
    }
}

/// One of the maps inside [`Kernel`].
pub trait Map<K, V> {
    /// Its name.
    const NAME: &'static str;
    /// Where it is.
    fn map(kernel: &mut Kernel) -> &mut BTreeMap<K, V>;
    /// Looks at a write that was just made.
    fn written(kernel: &mut Kernel, key: &K, before: Option<V>, after: Option<V>);
    /// Whether the write waits for another one.
    fn defer(_kernel: &mut Kernel, _key: K, _value: V) -> bool {
        false
    }
    /// Entries that fit.
    fn capacity(_kernel: &Kernel) -> usize {
        usize::MAX
    }
}

macro_rules! map {
    ($name:ident, $key:ty, $value:ty, $text:literal, $field:ident, $written:expr) => {
        struct $name;
        impl Map<$key, $value> for $name {
            const NAME: &'static str = $text;
            fn map(kernel: &mut Kernel) -> &mut BTreeMap<$key, $value> {
                &mut kernel.$field
            }
            fn written(kernel: &mut Kernel, key: &$key, before: Option<$value>, after: Option<$value>) {
                let written: fn(&mut Kernel, &$key, Option<$value>, Option<$value>) = $written;
                written(kernel, key, before, after);
            }
        }
    };
}

map!(ServiceMap, ServiceKey, ServiceValue, "cm_service", services, |kernel, key, before, after| {
    if let Some(before) = before {
        let now = kernel.now;
        kernel.replaced.push((now, before));
        let (had, has) = (kernel.backends_of(&before), after.map(|after| kernel.backends_of(&after)));
        for (cluster, backends) in had {
            let left = has.as_ref().and_then(|has| has.get(&cluster));
            if left.is_none_or(|left| !backends.is_subset(left)) {
                kernel.removed.push(Removed::Group(*key, cluster));
            }
        }
    }
    if let Some(after) = after {
        kernel.check_value(&after);
        let late = std::mem::take(&mut kernel.late);
        kernel.slots.extend(late);
        if broken::is(Broken::FreesWithoutGrace) {
            kernel.free_surplus(&after);
        }
    }
});
struct SlotMap;
impl Map<SlotKey, u32> for SlotMap {
    const NAME: &'static str = "cm_slot";
    fn map(kernel: &mut Kernel) -> &mut BTreeMap<SlotKey, u32> {
        &mut kernel.slots
    }
    fn written(kernel: &mut Kernel, key: &SlotKey, before: Option<u32>, _: Option<u32>) {
        if before.is_some() {
            let service = key.service;
            kernel.check_values(|value| value.id == service);
        }
    }
    fn defer(kernel: &mut Kernel, key: SlotKey, value: u32) -> bool {
        let defers = broken::is(Broken::CountsBeforeSlots);
        if defers {
            kernel.late.push((key, value));
        }
        defers
    }
}

map!(BackendMap, u32, BackendValue, "cm_backend", backends, |kernel, key, before, after| {
    match (before, after) {
        (Some(_), None) => {
            let now = kernel.now;
            kernel.dead.insert(*key, now);
            kernel.check_values(|_| true);
        }
        (Some(before), Some(after)) if before != after => {
            kernel.violate(format!("datapath: backend {key} turned from {before:?} into {after:?}"));
        }
        (None, Some(_)) => {
            let now = kernel.now;
            if kernel.dead.get(key).is_some_and(|at| now.duration_since(*at) < PROGRAM) {
                kernel.violate(format!("datapath: backend {key} came back while programs may follow it"));
            }
        }
        _ => {}
    }
});
map!(PrefixMap, PrefixKey, PrefixValue, "cm_prefix", prefixes, |kernel, _, before, after| {
    if let (Some(before), None) = (before, after) {
        kernel.removed.push(Removed::Prefix(before));
    }
});
// An array in reality: what is healthy counts as absent.
map!(ClusterMap, u32, ClusterState, "cm_cluster", clusters, |kernel, key, _, after| {
    if after == Some(ClusterState::default()) {
        kernel.clusters.remove(key);
    }
});
map!(NodeMap, NodeKey, NodeValue, "cm_node", nodes, |_, _, _, _| {});
map!(UnderlayMap, UnderlayKey, UnderlayValue, "cm_underlay", underlay, |_, _, _, _| {});
map!(EndpointMap, IpKey, EndpointValue, "cm_endpoint", endpoints, |kernel, key, _, after| {
    if key.cluster != kernel.own {
        kernel.violate(format!("a pod of cluster {} on this node", key.cluster));
    }
    if let Some(after) = after {
        kernel.check_identity(key.cluster, after.identity);
    }
});

map!(PolicyMap, PolicyKey, PolicyValue, "cm_policy", policies, |kernel, key, before, after| {
    let own = kernel.own;
    kernel.check_identity(own, key.subject);
    if before.is_some() && after.is_none() {
        kernel.removed.push(Removed::Policy(*key));
    }
});
map!(RangeMap, PrefixKey, u32, "cm_cidr", ranges, |_, _, _, _| {});
map!(TranslateMap, TranslateKey, TranslateValue, "cm_translate", translations, |_, _, _, _| {});

struct IpMap;
impl Map<IpKey, IpValue> for IpMap {
    const NAME: &'static str = "cm_ipcache";
    fn map(kernel: &mut Kernel) -> &mut BTreeMap<IpKey, IpValue> {
        &mut kernel.ipcache
    }
    fn written(kernel: &mut Kernel, key: &IpKey, before: Option<IpValue>, after: Option<IpValue>) {
        match after {
            Some(after) => kernel.check_identity(key.cluster, after.identity),
            None if before.is_some() => kernel.removed.push(Removed::Address(*key)),
            None => {}
        }
    }
    fn capacity(kernel: &Kernel) -> usize {
        kernel.capacity
    }
}

struct Checked<M> {
    kernel: Arc<Mutex<Kernel>>,
    map: PhantomData<fn() -> M>,
}

/// What becomes of one entry of a call.
#[derive(Clone, Copy, PartialEq)]
enum Fate {
    Done,
    /// The call fails, and did nothing to it.
    Lost,
    /// The call fails, but did it.
    Doubtful,
}

impl<M> Checked<M> {
    fn lock(&self) -> MutexGuard<'_, Kernel> {
        self.kernel.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The same whatever the order of writes, which may differ between two runs of one schedule.
    fn fate<K: Hash>(kernel: &Kernel, name: &str, key: &K) -> Fate {
        if kernel.failing == 0 {
            return Fate::Done;
        }
        let mut hasher = std::collections::hash_map::DefaultHasher::new();
        (kernel.salt, name, key).hash(&mut hasher);
        let hash = hasher.finish();
        match hash & 15 >= kernel.failing.into() {
            true => Fate::Done,
            false if hash & 16 == 0 => Fate::Lost,
            false => Fate::Doubtful,
        }
    }

    fn write<K, V>(&self, entries: impl Iterator<Item = (K, Option<V>)>) -> Result<(), DatapathError>
    where
        K: Ord + Copy + Hash,
        V: Copy + PartialEq,
        M: Map<K, V>,
    {
        let mut kernel = self.lock();
        let mut failed = false;
        for (key, value) in entries {
            let full = value.is_some()
                && M::map(&mut kernel).len() >= M::capacity(&kernel)
                && !M::map(&mut kernel).contains_key(&key);
            let fate = if full { Fate::Lost } else { Self::fate(&kernel, M::NAME, &key) };
            match fate {
                _ if full => kernel.faults.push(Fault::TableFull),
                Fate::Done => {}
                Fate::Lost => kernel.faults.push(Fault::TableFails),
                Fate::Doubtful => kernel.faults.push(Fault::TableFailsLate),
            }
            failed |= fate != Fate::Done && !broken::is(Broken::TakesFailureForSuccess);
            if fate == Fate::Lost {
                continue;
            }
            if value.is_some_and(|value| M::defer(&mut kernel, key, value)) {
                continue;
            }
            let before = match value {
                Some(value) => M::map(&mut kernel).insert(key, value),
                None => M::map(&mut kernel).remove(&key),
            };
            let unchanged = M::map(&mut kernel).len();
            M::written(&mut kernel, &key, before, value);
            // A healthy cluster's state is as good as none.
            let vanished = M::map(&mut kernel).len() != unchanged;
            kernel.writes += u64::from(before != value && !vanished);
        }
        match failed {
            true => Err(DatapathError::MapFull { map: M::NAME.into(), capacity: 0 }),
            false => Ok(()),
        }
    }
}

impl<K, V, M> Table<K, V> for Checked<M>
where
    K: Ord + Copy + Send + Hash,
    V: Copy + Send + PartialEq,
    M: Map<K, V>,
{
    fn upsert(&mut self, entries: &[(K, V)]) -> Result<(), DatapathError> {
        self.write(entries.iter().map(|(key, value)| (*key, Some(*value))))
    }

    fn remove(&mut self, keys: &[K]) -> Result<(), DatapathError> {
        self.write(keys.iter().map(|key| (*key, None)))
    }

    fn dump(&self) -> Result<Vec<(K, V)>, DatapathError> {
        Ok(M::map(&mut self.lock()).iter().map(|(key, value)| (*key, *value)).collect())
    }

    fn count(&self) -> Result<u64, DatapathError> {
        Ok(M::map(&mut self.lock()).len() as u64)
    }

    fn page(&self, cursor: &mut Option<Cursor>, _limit: usize) -> Result<Vec<(K, V)>, DatapathError> {
        *cursor = None;
        self.dump()
    }

    fn get(&self, keys: &[K]) -> Result<Vec<Option<V>>, DatapathError> {
        let mut kernel = self.lock();
        let map = M::map(&mut kernel);
        Ok(keys.iter().map(|key| map.get(key).copied()).collect())
    }

    fn capacity(&self) -> u64 {
        u64::MAX
    }

    fn name(&self) -> &'static str {
        M::NAME
    }
}

/// The tables as an agent gets them.
pub fn tables(kernel: &Arc<Mutex<Kernel>>) -> Tables {
    fn checked<M>(kernel: &Arc<Mutex<Kernel>>) -> Box<Checked<M>> {
        Box::new(Checked { kernel: kernel.clone(), map: PhantomData })
    }
    Tables {
        service: checked::<ServiceMap>(kernel),
        slot: checked::<SlotMap>(kernel),
        backend: checked::<BackendMap>(kernel),
        ipcache: checked::<IpMap>(kernel),
        prefix: checked::<PrefixMap>(kernel),
        endpoint: checked::<EndpointMap>(kernel),
        node: checked::<NodeMap>(kernel),
        underlay: checked::<UnderlayMap>(kernel),
        cluster: checked::<ClusterMap>(kernel),
        policy: checked::<PolicyMap>(kernel),
        cidr: checked::<RangeMap>(kernel),
        translate: checked::<TranslateMap>(kernel),
        // Programs write it, and there are none here.
        affinity: Box::new(MemoryTable::new("cm_affinity", 1)),
    }
}
