// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//! The maps; names, keys and values are the contract with user space (`ebpf-global-svc-abi`).
//!
//! Sizes are placeholders: the loader sets `max_entries` before it creates a map. Hash maps are not
//! preallocated, so a replaced value is a new element and readers see the old or the new one whole.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::{
        Array, HashMap, LpmTrie, LruHashMap, LruPerCpuHashMap, PerCpuArray, PerCpuHashMap, RingBuf,
        lpm_trie::Key,
    },
    macros::btf_map,
};
use ebpf_global_svc_abi::{
    AffinityKey, AffinityValue, BackendValue, CallKey, ClusterState, Config, Counter, CtKey, CtValue,
    CONFIG_UNDERLAY_V6, EVENT_KINDS, EndpointValue, Event, EventRule, EventState, FAMILY_V4, FAMILY_V6, FragmentKey, FragmentValue, IpKey,
    IpValue, MAX_CLUSTERS, MAX_REASONS, NatKey, NatValue, NodeKey, NodeValue, OverlayKey, PolicyValue,
    PrefixValue, SCRATCH_WORDS, ServiceKey, ServiceValue, SlotKey, SockRevKey, SockRevValue, TranslateValue,
    UnderlayKey, UnderlayValue, VerdictKey,
};

const ON_DEMAND: usize = BPF_F_NO_PREALLOC as usize;

#[btf_map(name = "cm_config")]
static CONFIG: Array<Config, 1> = Array::new();

#[btf_map(name = "cm_cluster")]
pub static CLUSTER: Array<ClusterState, { MAX_CLUSTERS as usize }> = Array::new();

#[btf_map(name = "cm_ipcache")]
pub static IPCACHE: HashMap<IpKey, IpValue, 1, ON_DEMAND> = HashMap::new();

#[btf_map(name = "cm_prefix")]
static PREFIX: LpmTrie<PrefixBytes, PrefixValue, 1> = LpmTrie::new();

#[btf_map(name = "cm_endpoint")]
pub static ENDPOINT: HashMap<IpKey, EndpointValue, 1, ON_DEMAND> = HashMap::new();

#[btf_map(name = "cm_node")]
pub static NODE: HashMap<NodeKey, NodeValue, 1, ON_DEMAND> = HashMap::new();

#[btf_map(name = "cm_underlay")]
static UNDERLAY: HashMap<UnderlayKey, UnderlayValue, 1, ON_DEMAND> = HashMap::new();

#[btf_map(name = "cm_service")]
pub static SERVICE: HashMap<ServiceKey, ServiceValue, 1, ON_DEMAND> = HashMap::new();

#[btf_map(name = "cm_slot")]
pub static SLOT: HashMap<SlotKey, u32, 1, ON_DEMAND> = HashMap::new();

#[btf_map(name = "cm_backend")]
pub static BACKEND: HashMap<u32, BackendValue, 1, ON_DEMAND> = HashMap::new();

#[btf_map(name = "cm_affinity")]
pub static AFFINITY: LruHashMap<AffinityKey, AffinityValue, 1> = LruHashMap::new();

#[btf_map(name = "cm_sock_rev")]
pub static SOCK_REV: LruHashMap<SockRevKey, SockRevValue, 1> = LruHashMap::new();

#[btf_map(name = "cm_metrics")]
pub static METRICS: PerCpuArray<Counter, { MAX_REASONS as usize }> = PerCpuArray::new();

#[btf_map(name = "cm_overlay_rx")]
pub static OVERLAY_RX: LruPerCpuHashMap<OverlayKey, Counter, 1> = LruPerCpuHashMap::new();

#[btf_map(name = "cm_policy")]
static POLICY: LpmTrie<PolicyBytes, PolicyValue, 1> = LpmTrie::new();

#[btf_map(name = "cm_cidr")]
static CIDR: LpmTrie<PrefixBytes, u32, 1> = LpmTrie::new();

#[btf_map(name = "cm_translate")]
static TRANSLATE: LpmTrie<TranslateBytes, TranslateValue, 1> = LpmTrie::new();

#[btf_map(name = "cm_ct")]
pub static CT: LruHashMap<CtKey, CtValue, 1> = LruHashMap::new();

/// The one that `cm_ct` takes the place of; of no use, and one entry, but while [`ct_changes`].
#[btf_map(name = "cm_ct_before")]
pub static CT_BEFORE: LruHashMap<CtKey, CtValue, 1> = LruHashMap::new();

/// Not zero: these programs are on their hooks only while `cm_ct` is replaced. The loader sets it, so the verifier knows
/// it, and takes away what is never reached.
#[unsafe(no_mangle)]
static CT_CHANGES: u32 = 0;

/// Whether there are two maps of flows.
#[inline(always)]
pub fn ct_changes() -> bool {
    // SAFETY: a constant of the program; the compiler must not take its value for known.
    unsafe { core::ptr::read_volatile(&raw const CT_CHANGES) != 0 }
}

#[btf_map(name = "cm_verdict")]
pub static VERDICT: LruPerCpuHashMap<VerdictKey, Counter, 1> = LruPerCpuHashMap::new();

#[btf_map(name = "cm_fragment")]
pub static FRAGMENT: LruHashMap<FragmentKey, FragmentValue, 1> = LruHashMap::new();

#[btf_map(name = "cm_calls")]
pub static CALLS: PerCpuHashMap<CallKey, Counter, 1, ON_DEMAND> = PerCpuHashMap::new();

#[btf_map(name = "cm_nat")]
pub static NAT: LruHashMap<NatKey, NatValue, 1> = LruHashMap::new();

/// Not zero once there was an entry in `cm_nat`.
#[btf_map(name = "cm_nat_used")]
pub static NAT_USED: Array<u32, 1> = Array::new();

/// What does not fit on the stack.
#[btf_map(name = "cm_scratch")]
pub static SCRATCH: PerCpuArray<[u64; SCRATCH_WORDS], 1> = PerCpuArray::new();

#[btf_map(name = "cm_events")]
pub static EVENTS: RingBuf<Event, 4096> = RingBuf::new();

#[btf_map(name = "cm_event_rule")]
pub static EVENT_RULE: Array<EventRule, { EVENT_KINDS as usize }> = Array::new();

#[btf_map(name = "cm_event_state")]
pub static EVENT_STATE: PerCpuArray<EventState, { EVENT_KINDS as usize }> = PerCpuArray::new();

/// What `PolicyKey` holds after its length.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct PolicyBytes {
    pub subject: u32,
    pub peer: u32,
    pub direction: u8,
    pub proto: u8,
    pub port: u16,
}

/// What `PrefixKey` holds after its length.
#[repr(C)]
#[derive(Clone, Copy)]
struct PrefixBytes {
    /// The family and its padding.
    family: u32,
    ip: [u8; 16],
}

impl PrefixBytes {
    #[inline(always)]
    fn of(address: &IpKey) -> Self {
        Self { family: u32::from_ne_bytes([address.family, 0, 0, 0]), ip: address.ip }
    }
}

/// What `TranslateKey` holds after its length.
#[repr(C)]
#[derive(Clone, Copy)]
struct TranslateBytes {
    /// The cluster, the family and the way.
    kind: u32,
    ip: [u32; 4],
}

/// What this node is. The map always has its one element; the verifier wants to see a check.
#[inline(always)]
pub fn config() -> Option<&'static Config> {
    CONFIG.get(0)
}

/// Whether tunnels run over IPv6.
#[inline(always)]
pub fn over_ipv6(config: &Config) -> bool {
    config.flags & CONFIG_UNDERLAY_V6 != 0
}

/// The node that has an underlay address. By words, in network order; of IPv4 there is one.
#[inline(always)]
pub fn node(is_v6: bool, ip: [u32; 4]) -> Option<&'static NodeValue> {
    let family = if is_v6 { FAMILY_V6 } else { FAMILY_V4 };
    let words = [u32::from_ne_bytes([family, 0, 0, 0]), ip[0], ip[1], ip[2], ip[3]];
    // SAFETY: of the same size, and bytes all of it.
    let key: &NodeKey = unsafe { &*(&raw const words).cast() };
    // SAFETY: elements are only read; user space replaces them, it does not write into them.
    unsafe { NODE.get(key) }
}

/// The address that a node number stands for. By words, in network order.
#[inline(always)]
pub fn underlay(number: [u8; 4]) -> Option<[u32; 4]> {
    // SAFETY: as above.
    unsafe { UNDERLAY.get(UnderlayKey { number }) }.map(|value| words(&value.ip))
}

/// An address of a map's value. Word by word: as a whole it would be copied by a call.
#[inline(always)]
pub fn words(ip: &'static [u8; 16]) -> [u32; 4] {
    let first: *const u32 = (&raw const *ip).cast();
    // SAFETY: four words of a value, which the kernel aligns.
    core::array::from_fn(|n| unsafe { first.add(n).read_volatile() })
}

/// The longest pod CIDR of the mesh that holds an address.
#[inline(always)]
pub fn prefix_of(address: &IpKey) -> Option<&'static PrefixValue> {
    PREFIX.get(&Key::new(size_of::<PrefixBytes>() as u32 * 8, PrefixBytes::of(address)))
}

/// The identity of the longest address range outside of the mesh that a policy names and that holds an address.
#[inline(always)]
pub fn cidr_of(address: &IpKey) -> Option<u32> {
    CIDR.get(&Key::new(size_of::<PrefixBytes>() as u32 * 8, PrefixBytes::of(address))).copied()
}

/// Bits in which an address of a cluster and its counterpart differ; none if it has no counterpart. By words, in
/// network order.
#[inline(always)]
pub fn turned_bits(cluster: u16, family: u8, way: u8, ip: [u32; 4]) -> Option<[u32; 4]> {
    let [low, high] = cluster.to_ne_bytes();
    let bytes = TranslateBytes { kind: u32::from_ne_bytes([low, high, family, way]), ip };
    let value = TRANSLATE.get(&Key::new(size_of::<TranslateBytes>() as u32 * 8, bytes))?;
    let words: *const [u32; 4] = (&raw const value.bits).cast();
    // SAFETY: of the same size, and the kernel aligns values to words.
    Some(unsafe { *words })
}

/// The longest policy entry for a subject, peer, direction, protocol and port. `bits` leaves out the port of
/// what has none.
#[inline(always)]
pub fn policy_of(bits: u32, bytes: PolicyBytes) -> Option<&'static PolicyValue> {
    POLICY.get(&Key::new(bits, bytes))
}
