//! Tables that outlive the agent, fail at random, and check after every single write what a program
//! in the kernel could run into.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use ebpf_global_svc::abi::{
    BACKEND_EXCLUSIVE, BackendValue, ClusterState, ServiceKey, ServiceValue, SlotKey,
};
use ebpf_global_svc::table::{Cursor, MemoryTable, Table};
use ebpf_global_svc::{DatapathError, Tables};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

/// No program runs longer than this; what it read at its start must hold out.
const PROGRAM: Duration = Duration::from_millis(20);

/// Shared by all tables of a node.
pub(crate) struct Kernel {
    pub now: Instant,
    /// Probability of a failing call.
    pub failing: f64,
    /// Writes by table name.
    pub writes: BTreeMap<&'static str, usize>,
    services: BTreeMap<ServiceKey, ServiceValue>,
    slots: BTreeMap<SlotKey, u32>,
    backends: BTreeMap<u32, BackendValue>,
    clusters: BTreeMap<u32, ClusterState>,
    /// Values that programs may still be following, and since when they are replaced.
    replaced: Vec<(Instant, ServiceValue)>,
    rng: StdRng,
}

impl Kernel {
    pub(crate) fn new(seed: u64, now: Instant) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self {
            now,
            failing: 0.0,
            writes: BTreeMap::new(),
            services: BTreeMap::new(),
            slots: BTreeMap::new(),
            backends: BTreeMap::new(),
            clusters: BTreeMap::new(),
            replaced: Vec::new(),
            rng: StdRng::seed_from_u64(seed),
        }))
    }

    fn check(&mut self) {
        self.check_exclusive();
        let now = self.now;
        self.replaced.retain(|(since, _)| now.duration_since(*since) < PROGRAM);
        for value in self.services.values().chain(self.replaced.iter().map(|(_, value)| value)) {
            for group in &value.groups[..usize::from(value.n_groups)] {
                for slot in 0..group.count() {
                    let key = SlotKey { service: value.id, slot, cluster: group.cluster, pad: 0 };
                    let backend = self.slots.get(&key);
                    assert!(backend.is_some(), "{key:?} is counted by {group:?} but missing");
                    let backend = backend.and_then(|id| self.backends.get(id));
                    assert!(backend.is_some(), "backend of {key:?} is missing");
                    assert_eq!(backend.map(|b| b.cluster), Some(group.cluster), "{key:?}");
                }
            }
        }
    }

    /// Clients are bound to exclusive backends: slots of two services must never name the same.
    fn check_exclusive(&self) {
        let mut owners = BTreeMap::new();
        for (slot, id) in &self.slots {
            if self.backends.get(id).is_some_and(|backend| backend.flags & BACKEND_EXCLUSIVE != 0) {
                let owner = owners.entry(id).or_insert(slot.service);
                assert_eq!(*owner, slot.service, "both have backend {id}, which is exclusive");
            }
        }
    }
}

/// The maps of one kind inside [`Kernel`].
trait Map<K, V> {
    const NAME: &'static str;
    fn map(kernel: &mut Kernel) -> &mut BTreeMap<K, V>;
    fn before_write(_kernel: &mut Kernel, _key: &K) {}
}

struct ServiceMap;
impl Map<ServiceKey, ServiceValue> for ServiceMap {
    const NAME: &'static str = "cm_service";
    fn map(kernel: &mut Kernel) -> &mut BTreeMap<ServiceKey, ServiceValue> {
        &mut kernel.services
    }
    fn before_write(kernel: &mut Kernel, key: &ServiceKey) {
        if let Some(value) = kernel.services.get(key) {
            kernel.replaced.push((kernel.now, *value));
        }
    }
}

struct SlotMap;
impl Map<SlotKey, u32> for SlotMap {
    const NAME: &'static str = "cm_slot";
    fn map(kernel: &mut Kernel) -> &mut BTreeMap<SlotKey, u32> {
        &mut kernel.slots
    }
}

struct BackendMap;
impl Map<u32, BackendValue> for BackendMap {
    const NAME: &'static str = "cm_backend";
    fn map(kernel: &mut Kernel) -> &mut BTreeMap<u32, BackendValue> {
        &mut kernel.backends
    }
}

struct ClusterMap;
impl Map<u32, ClusterState> for ClusterMap {
    const NAME: &'static str = "cm_cluster";
    fn map(kernel: &mut Kernel) -> &mut BTreeMap<u32, ClusterState> {
        &mut kernel.clusters
    }
}

struct Checked<M> {
    kernel: Arc<Mutex<Kernel>>,
    map: std::marker::PhantomData<fn() -> M>,
}

impl<M> Checked<M> {
    fn lock(&self) -> MutexGuard<'_, Kernel> {
        self.kernel.lock().unwrap()
    }

    /// How many of `n` elements are written, and whether the call then fails.
    fn fate(kernel: &mut Kernel, n: usize) -> (usize, bool) {
        let failing = kernel.failing;
        if kernel.rng.random_bool(failing) { (kernel.rng.random_range(0..=n), true) } else { (n, false) }
    }
}

fn failed(name: &str) -> Result<(), DatapathError> {
    Err(DatapathError::MapFull { map: name.into(), capacity: 0 })
}

impl<K, V, M> Table<K, V> for Checked<M>
where
    K: Ord + Copy + Send,
    V: Copy + Send,
    M: Map<K, V>,
{
    fn upsert(&mut self, entries: &[(K, V)]) -> Result<(), DatapathError> {
        let mut kernel = self.lock();
        let (written, fails) = Self::fate(&mut kernel, entries.len());
        for (key, value) in &entries[..written] {
            M::before_write(&mut kernel, key);
            M::map(&mut kernel).insert(*key, *value);
            *kernel.writes.entry(M::NAME).or_default() += 1;
            kernel.check();
        }
        if fails { failed(M::NAME) } else { Ok(()) }
    }

    fn remove(&mut self, keys: &[K]) -> Result<(), DatapathError> {
        let mut kernel = self.lock();
        let (written, fails) = Self::fate(&mut kernel, keys.len());
        for key in &keys[..written] {
            M::before_write(&mut kernel, key);
            M::map(&mut kernel).remove(key);
            *kernel.writes.entry(M::NAME).or_default() += 1;
            kernel.check();
        }
        if fails { failed(M::NAME) } else { Ok(()) }
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

/// Tables of which those of services are checked at every write.
pub(crate) fn tables(kernel: &Arc<Mutex<Kernel>>) -> Tables {
    fn checked<M>(kernel: &Arc<Mutex<Kernel>>) -> Box<Checked<M>> {
        Box::new(Checked { kernel: kernel.clone(), map: std::marker::PhantomData })
    }
    Tables {
        service: checked::<ServiceMap>(kernel),
        slot: checked::<SlotMap>(kernel),
        backend: checked::<BackendMap>(kernel),
        cluster: checked::<ClusterMap>(kernel),
        ipcache: Box::new(MemoryTable::new("cm_ipcache", 1 << 20)),
        prefix: Box::new(MemoryTable::new("cm_prefix", 1 << 20)),
        endpoint: Box::new(MemoryTable::new("cm_endpoint", 1 << 20)),
        node: Box::new(MemoryTable::new("cm_node", 1 << 20)),
        underlay: Box::new(MemoryTable::new("cm_underlay", 1 << 20)),
        policy: Box::new(MemoryTable::new("cm_policy", 1 << 20)),
        cidr: Box::new(MemoryTable::new("cm_cidr", 1 << 20)),
        translate: Box::new(MemoryTable::new("cm_translate", 1 << 20)),
        affinity: Box::new(MemoryTable::new("cm_affinity", 1)),
    }
}
