//! Typed tables over the maps that the agent writes.
//!
//! The agent computes desired state and writes differences through [`Table`]; it neither knows nor
//! cares whether a kernel is behind. Order between tables (backends, slots, services; deletes the
//! other way round) is the caller's business: see `docs/datapath.md`.

mod kernel;
mod memory;

pub use kernel::KernelTable;
pub(crate) use kernel::dump;
pub use memory::MemoryTable;

use crate::{
    DatapathError,
    abi::{
        AffinityKey, AffinityValue, BackendValue, ClusterState, EndpointValue, IpKey, IpValue, MAX_CLUSTERS,
        NodeKey, NodeValue, PolicyKey, PolicyValue, PrefixKey, PrefixValue, ServiceKey, ServiceValue,
        SlotKey, TranslateKey, TranslateValue, UnderlayKey, UnderlayValue,
    },
    sys,
};

/// Counts a table's entries when it is called.
pub type EntryCounter = Box<dyn FnOnce() -> Result<u64, DatapathError> + Send>;

/// A map with keys `K` and values `V`.
///
/// Each entry changes atomically; a batch does not. If a call fails, an unspecified part of its
/// batch is installed, so callers read back ([`Table::dump`]) or repeat: both calls are idempotent.
pub trait Table<K, V>: Send {
    /// Inserts entries or replaces their values.
    ///
    /// # Errors
    /// [`DatapathError::MapFull`] when an entry is new and the table has reached its capacity.
    fn upsert(&mut self, entries: &[(K, V)]) -> Result<(), DatapathError>;

    /// Removes entries. Keys that are not there are fine.
    ///
    /// # Errors
    /// [`DatapathError::Map`] when the kernel fails.
    fn remove(&mut self, keys: &[K]) -> Result<(), DatapathError>;

    /// All entries, in no particular order. While others write, an entry may be missed or be
    /// returned although it is gone; with a single writer the result is exact.
    ///
    /// # Errors
    /// [`DatapathError::Map`] when the kernel fails.
    fn dump(&self) -> Result<Vec<(K, V)>, DatapathError>;

    /// How many entries there are. The kernel does not know either: its maps are walked, though nothing of
    /// them is kept.
    ///
    /// # Errors
    /// [`DatapathError::Map`] when the kernel fails.
    fn count(&self) -> Result<u64, DatapathError>;

    /// [`Self::count`] for another thread, while this one goes on writing: a map of a million entries takes
    /// some 0.1 s.
    ///
    /// # Errors
    /// [`DatapathError::Map`] when the kernel fails.
    fn counter(&self) -> Result<EntryCounter, DatapathError> {
        let count = self.count()?;
        Ok(Box::new(move || Ok(count)))
    }

    /// About `limit` entries from where `cursor` stands (none: the beginning), which moves on; it is
    /// none again after the last entry. Others may write between two pages: what they add or remove may
    /// be missed or be returned, everything else is returned at least once.
    ///
    /// # Errors
    /// [`DatapathError::Map`] when the kernel fails; the cursor stays where it is.
    fn page(&self, cursor: &mut Option<Cursor>, limit: usize) -> Result<Vec<(K, V)>, DatapathError>;

    /// The values of `keys`, in their order. A trie answers for a prefix that it does not have with the
    /// value of the longest one around it.
    ///
    /// # Errors
    /// [`DatapathError::Map`] when the kernel fails.
    fn get(&self, keys: &[K]) -> Result<Vec<Option<V>>, DatapathError>;

    /// Entries that fit.
    fn capacity(&self) -> u64;

    /// Name of the map, e.g. `cm_ipcache`.
    fn name(&self) -> &'static str;
}

/// Where a walk in pages stands, of one table.
#[derive(Clone, Copy, Debug)]
pub struct Cursor(At);

#[derive(Clone, Copy, Debug)]
enum At {
    Kernel(sys::Cursor),
    Memory(usize),
}

/// All tables of one node.
pub struct Tables {
    /// `cm_ipcache`: exact addresses of pods and nodes.
    pub ipcache: Box<dyn Table<IpKey, IpValue>>,
    /// `cm_prefix`: pod CIDRs.
    pub prefix: Box<dyn Table<PrefixKey, PrefixValue>>,
    /// `cm_endpoint`: pods of this node.
    pub endpoint: Box<dyn Table<IpKey, EndpointValue>>,
    /// `cm_node`: underlay addresses of all nodes.
    pub node: Box<dyn Table<NodeKey, NodeValue>>,
    /// `cm_underlay`: addresses of nodes by number, with an IPv6 underlay.
    pub underlay: Box<dyn Table<UnderlayKey, UnderlayValue>>,
    /// `cm_service`: frontends of this cluster.
    pub service: Box<dyn Table<ServiceKey, ServiceValue>>,
    /// `cm_slot`: (service, cluster, n) to backend ID.
    pub slot: Box<dyn Table<SlotKey, u32>>,
    /// `cm_backend`: backend ID to address.
    pub backend: Box<dyn Table<u32, BackendValue>>,
    /// `cm_cluster`: health of every cluster. A cluster that is absent is healthy, and one that is
    /// set to healthy counts as absent: the map is an array, which has no holes.
    pub cluster: Box<dyn Table<u32, ClusterState>>,
    /// `cm_policy`: what policies allow and deny the pods of this node, by identity.
    pub policy: Box<dyn Table<PolicyKey, PolicyValue>>,
    /// `cm_cidr`: address ranges outside of the mesh that policies name, and their identities.
    pub cidr: Box<dyn Table<PrefixKey, u32>>,
    /// `cm_translate`: virtual addresses of clusters whose pods have addresses that are taken here.
    pub translate: Box<dyn Table<TranslateKey, TranslateValue>>,
    /// `cm_affinity`: which backend a client is bound to. Programs write it.
    pub affinity: Box<dyn Table<AffinityKey, AffinityValue>>,
}

impl Tables {
    /// Tables in memory: for tests, and for nodes without eBPF.
    #[must_use]
    pub fn memory(sizes: &MapSizes) -> Self {
        Self {
            ipcache: Box::new(MemoryTable::new("cm_ipcache", sizes.ipcache.into())),
            prefix: Box::new(MemoryTable::new("cm_prefix", sizes.prefix.into())),
            endpoint: Box::new(MemoryTable::new("cm_endpoint", sizes.endpoint.into())),
            node: Box::new(MemoryTable::new("cm_node", sizes.node.into())),
            underlay: Box::new(MemoryTable::new("cm_underlay", sizes.node.into())),
            service: Box::new(MemoryTable::new("cm_service", sizes.service.into())),
            slot: Box::new(MemoryTable::new("cm_slot", sizes.slot.into())),
            backend: Box::new(MemoryTable::new("cm_backend", sizes.backend.into())),
            cluster: Box::new(MemoryTable::array("cm_cluster", MAX_CLUSTERS.into(), ClusterState::default())),
            policy: Box::new(MemoryTable::new("cm_policy", sizes.policy.into())),
            cidr: Box::new(MemoryTable::new("cm_cidr", sizes.cidr.into())),
            translate: Box::new(MemoryTable::new("cm_translate", sizes.translate.into())),
            affinity: Box::new(MemoryTable::new("cm_affinity", sizes.affinity.into())),
        }
    }
}

/// Entries per map. Hash maps are not preallocated: an unused entry costs one bucket pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapSizes {
    /// Pods and nodes of the whole mesh.
    pub ipcache: u32,
    /// Pod CIDRs of the whole mesh.
    pub prefix: u32,
    /// Pods of this node.
    pub endpoint: u32,
    /// Nodes of the whole mesh, times their addresses.
    pub node: u32,
    /// Service ports with a frontend in this cluster.
    pub service: u32,
    /// Sum over services of their backends.
    pub slot: u32,
    /// Backends of the whole mesh.
    pub backend: u32,
    /// Pods of this node, each times the services with session affinity that it calls (preallocated by the
    /// kernel: about 90 bytes each).
    pub affinity: u32,
    /// Sockets that talk to a service (preallocated by the kernel: about 100 bytes each).
    pub sock_rev: u32,
    /// Recently seen (identity, node) pairs, per CPU (preallocated).
    pub overlay_rx: u32,
    /// Entries of the policies that select pods of this node.
    pub policy: u32,
    /// Address ranges outside of the mesh that policies name.
    pub cidr: u32,
    /// Pod prefixes known by virtual addresses, each both ways.
    pub translate: u32,
    /// Flows of pods that a policy selects (preallocated: about 120 bytes each).
    pub ct: u32,
    /// Rules that have decided lately, per CPU (preallocated).
    pub verdict: u32,
    /// Packets on their way in fragments (preallocated: about 100 bytes each).
    pub fragment: u32,
    /// Services that are called, times the clusters that answer.
    pub calls: u32,
    /// Flows to services whose packets are translated one by one, each both ways (preallocated: about 140 bytes each).
    pub nat: u32,
    /// Bytes of the ring of events: a power of two, and whole pages. An event takes 136.
    pub events: u32,
}

impl Default for MapSizes {
    fn default() -> Self {
        Self {
            ipcache: 524_288,
            prefix: 65_536,
            endpoint: 4_096,
            node: 65_536,
            service: 65_536,
            slot: 524_288,
            backend: 262_144,
            affinity: 32_768,
            sock_rev: 65_536,
            overlay_rx: 8_192,
            policy: 262_144,
            cidr: 16_384,
            translate: 8_192,
            ct: 131_072,
            verdict: 8_192,
            fragment: 8_192,
            calls: 65_536,
            nat: 65_536,
            events: 1 << 20,
        }
    }
}
