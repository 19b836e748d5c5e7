//! Which maps there are, and whether the pinned ones are still the right ones.

use std::{
    fs::File,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
};

use aya::maps::{MapInfo, MapType};

use super::pins::Pins;
use crate::{
    DatapathError, MapSizes,
    abi::{
        AffinityKey, AffinityValue, BackendValue, CallKey, ClusterState, Config, Counter, CtKey, CtValue,
        EVENT_KINDS, EndpointValue, EventRule, EventState, FragmentKey, FragmentValue, IpKey, IpValue,
        MAX_CLUSTERS, MAX_REASONS, NatKey, NatValue, NodeKey, NodeValue, OverlayKey, Plain, PolicyKey,
        PolicyValue, PrefixKey, PrefixValue, SCHEMA_VERSION, SCRATCH_WORDS, ServiceKey, ServiceValue,
        SlotKey, SockRevKey, SockRevValue, TranslateKey, TranslateValue, UnderlayKey, UnderlayValue,
        VerdictKey,
    },
    sys,
};

/// One map as this version wants it.
#[derive(Clone, Copy, Debug)]
pub(super) struct MapSpec {
    pub(super) name: &'static str,
    pub(super) kind: MapType,
    pub(super) key_size: usize,
    pub(super) value_size: usize,
    pub(super) max_entries: u32,
}

/// How many maps there are.
pub(super) const MAPS: usize = 27;

/// All maps of the programs.
pub(super) fn specs(sizes: &MapSizes) -> [MapSpec; MAPS] {
    [
        spec::<u32, Config>("cm_config", MapType::Array, 1),
        spec::<u32, ClusterState>("cm_cluster", MapType::Array, MAX_CLUSTERS),
        spec::<IpKey, IpValue>("cm_ipcache", MapType::Hash, sizes.ipcache),
        spec::<PrefixKey, PrefixValue>("cm_prefix", MapType::LpmTrie, sizes.prefix),
        spec::<IpKey, EndpointValue>("cm_endpoint", MapType::Hash, sizes.endpoint),
        spec::<NodeKey, NodeValue>("cm_node", MapType::Hash, sizes.node),
        spec::<UnderlayKey, UnderlayValue>("cm_underlay", MapType::Hash, sizes.node),
        spec::<ServiceKey, ServiceValue>("cm_service", MapType::Hash, sizes.service),
        spec::<SlotKey, u32>("cm_slot", MapType::Hash, sizes.slot),
        spec::<u32, BackendValue>("cm_backend", MapType::Hash, sizes.backend),
        spec::<AffinityKey, AffinityValue>("cm_affinity", MapType::LruHash, sizes.affinity),
        spec::<SockRevKey, SockRevValue>("cm_sock_rev", MapType::LruHash, sizes.sock_rev),
        spec::<u32, Counter>("cm_metrics", MapType::PerCpuArray, MAX_REASONS),
        spec::<OverlayKey, Counter>("cm_overlay_rx", MapType::LruPerCpuHash, sizes.overlay_rx),
        spec::<PolicyKey, PolicyValue>("cm_policy", MapType::LpmTrie, sizes.policy),
        spec::<PrefixKey, u32>("cm_cidr", MapType::LpmTrie, sizes.cidr),
        spec::<TranslateKey, TranslateValue>("cm_translate", MapType::LpmTrie, sizes.translate),
        spec::<CtKey, CtValue>("cm_ct", MapType::LruHash, sizes.ct),
        spec::<VerdictKey, Counter>("cm_verdict", MapType::LruPerCpuHash, sizes.verdict),
        spec::<FragmentKey, FragmentValue>("cm_fragment", MapType::LruHash, sizes.fragment),
        spec::<CallKey, Counter>("cm_calls", MapType::PerCpuHash, sizes.calls),
        spec::<NatKey, NatValue>("cm_nat", MapType::LruHash, sizes.nat),
        spec::<u32, u32>("cm_nat_used", MapType::Array, 1),
        MapSpec {
            name: "cm_scratch",
            kind: MapType::PerCpuArray,
            key_size: size_of::<u32>(),
            value_size: SCRATCH_WORDS * size_of::<u64>(),
            max_entries: 1,
        },
        // A ring has bytes instead of entries.
        MapSpec {
            name: "cm_events",
            kind: MapType::RingBuf,
            key_size: 0,
            value_size: 0,
            max_entries: sizes.events,
        },
        spec::<u32, EventRule>("cm_event_rule", MapType::Array, EVENT_KINDS),
        spec::<u32, EventState>("cm_event_state", MapType::PerCpuArray, EVENT_KINDS),
    ]
}

fn spec<K: Plain, V: Plain>(name: &'static str, kind: MapType, max_entries: u32) -> MapSpec {
    MapSpec { name, kind, key_size: size_of::<K>(), value_size: size_of::<V>(), max_entries }
}

/// Checks whose the pinned maps are, and whether their fields mean what ours do. Missing maps are fine.
pub(super) fn check(pins: &Pins, cluster: u16) -> Result<(), DatapathError> {
    let path = pins.map("cm_config");
    if !path.exists() {
        return Ok(());
    }
    let mismatch =
        |reason| DatapathError::PinMismatch { map: "cm_config".to_owned(), path: path.clone(), reason };
    match stated(&path)? {
        // Created, but the agent died before it configured anything.
        (0, _) => Ok(()),
        (schema, _) if schema != SCHEMA_VERSION => {
            Err(mismatch(format!("its layouts are of schema {schema}, ours of schema {SCHEMA_VERSION}")))
        }
        (_, other) if other != cluster => {
            Err(mismatch(format!("it belongs to cluster {other}, this is cluster {cluster}")))
        }
        _ => Ok(()),
    }
}

/// Schema and cluster of a pinned configuration, which may be of another length than ours.
fn stated(path: &Path) -> Result<(u32, u16), DatapathError> {
    let elements = raw(path, "cm_config", &shape(path, "cm_config")?)?
        .batch(None, 1)
        .map_err(|source| map_failed("cm_config", "read", source))?;
    // The first two fields; they stay where they are in all versions.
    let [a, b, c, d, e, f, ..] = elements.values[..] else { return Ok((0, 0)) };
    Ok((u32::from_ne_bytes([a, b, c, d]), u16::from_ne_bytes([e, f])))
}

/// What a pinned map is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Shape {
    pub(super) kind: MapType,
    pub(super) key_size: usize,
    pub(super) value_size: usize,
    pub(super) max_entries: u32,
}

impl MapSpec {
    /// What a map of it is.
    pub(super) fn shape(&self) -> Shape {
        let Self { kind, key_size, value_size, max_entries, .. } = *self;
        Shape { kind, key_size, value_size, max_entries }
    }
}

/// What the map that is pinned at `path` is.
pub(super) fn shape(path: &Path, name: &str) -> Result<Shape, DatapathError> {
    let failed = |error: aya::maps::MapError| DatapathError::PinMismatch {
        map: name.to_owned(),
        path: path.to_owned(),
        reason: error.to_string(),
    };
    let info = MapInfo::from_pin(path).map_err(failed)?;
    Ok(Shape {
        kind: info.map_type().map_err(failed)?,
        key_size: info.key_size() as usize,
        value_size: info.value_size() as usize,
        max_entries: info.max_entries(),
    })
}

/// The bytes of a pinned map of that shape.
pub(super) fn raw(path: &Path, name: &'static str, shape: &Shape) -> Result<sys::RawMap, DatapathError> {
    let value_size = match is_per_cpu(shape.kind) {
        true => shape.value_size.next_multiple_of(PER_CPU_ALIGNMENT) * possible_cpus()?,
        false => shape.value_size,
    };
    Ok(sys::RawMap::new(open(path, name)?, shape.key_size, value_size))
}

/// Values of per-CPU maps lie this far apart, or a multiple of it.
pub(super) const PER_CPU_ALIGNMENT: usize = 8;

/// Whether there is a value for each CPU.
pub(super) fn is_per_cpu(kind: MapType) -> bool {
    matches!(kind, MapType::PerCpuArray | MapType::PerCpuHash | MapType::LruPerCpuHash)
}

/// What the node was configured as.
pub(super) fn read_config(path: &Path) -> Result<Config, DatapathError> {
    let map = open(path, "cm_config")?;
    let config = sys::lookup::<u32, Config>(map.as_fd(), &0, 1)
        .map_err(|source| map_failed("cm_config", "read", source))?;
    Ok(config.and_then(|values| values.first().copied()).unwrap_or_default())
}

/// Writes the configuration, in one piece.
pub(super) fn write_config(path: &Path, config: &Config) -> Result<(), DatapathError> {
    let map = open(path, "cm_config")?;
    sys::update(map.as_fd(), &0_u32, config).map_err(|source| map_failed("cm_config", "update", source))
}

pub(super) fn open(path: &Path, name: &'static str) -> Result<OwnedFd, DatapathError> {
    sys::open_pin(path).map_err(|source| map_failed(name, "open", source))
}

pub(super) fn map_failed(
    map: &'static str,
    operation: &'static str,
    source: std::io::Error,
) -> DatapathError {
    match source.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            DatapathError::NotPermitted { action: format!("{operation} map {map}") }
        }
        _ => DatapathError::Map { map: map.to_owned(), operation, source },
    }
}

/// CPUs that per-CPU maps have values for.
pub(super) fn possible_cpus() -> Result<usize, DatapathError> {
    aya::util::nr_cpus().map_err(|(what, source)| DatapathError::File {
        operation: what,
        path: "/sys/devices/system/cpu/possible".into(),
        source,
    })
}

/// Opens the cgroup's folder, checking that it is one.
pub(super) fn open_cgroup(path: &Path) -> Result<File, DatapathError> {
    File::open(path).map_err(|source| super::pins::failed("open cgroup", path, source))
}
