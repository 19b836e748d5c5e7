//! Flags for the sizes of the tables.

use clap::Args;
use clap::builder::RangedI64ValueParser;
use ebpf_global_svc::MapSizes;

/// Maps of another size are replaced at the start, with what is in them; one that does not hold what is there is refused.
#[derive(Debug, Args)]
pub(crate) struct MapSizeFlags {
    /// Pods and nodes of the whole mesh that fit (cm_ipcache)
    #[arg(long, value_name = "ENTRIES", default_value_t = MapSizes::default().ipcache, value_parser = entries())]
    ipcache_max_entries: u32,
    /// Pod CIDRs of the whole mesh that fit (cm_prefix)
    #[arg(long, value_name = "ENTRIES", default_value_t = MapSizes::default().prefix, value_parser = entries())]
    prefix_max_entries: u32,
    /// Pods of this node that fit (cm_endpoint)
    #[arg(long, value_name = "ENTRIES", default_value_t = MapSizes::default().endpoint, value_parser = entries())]
    endpoint_max_entries: u32,
    /// Addresses of nodes of the whole mesh that fit (cm_node)
    #[arg(long, value_name = "ENTRIES", default_value_t = MapSizes::default().node, value_parser = entries())]
    node_max_entries: u32,
    /// Ports of this cluster's frontends that fit (cm_service)
    #[arg(long, value_name = "ENTRIES", default_value_t = MapSizes::default().service, value_parser = entries())]
    service_max_entries: u32,
    /// Sum over services of their backends that fits (cm_slot)
    #[arg(long, value_name = "ENTRIES", default_value_t = MapSizes::default().slot, value_parser = entries())]
    slot_max_entries: u32,
    /// Different backends of the whole mesh that fit (cm_backend)
    #[arg(long, value_name = "ENTRIES", default_value_t = MapSizes::default().backend, value_parser = entries())]
    backend_max_entries: u32,
    /// Allowed and denied peers and ports of this node's pods that fit (cm_policy)
    #[arg(long, value_name = "ENTRIES", default_value_t = MapSizes::default().policy, value_parser = entries())]
    policy_max_entries: u32,
    /// Address ranges named by policies that fit (cm_cidr)
    #[arg(long, value_name = "ENTRIES", default_value_t = MapSizes::default().cidr, value_parser = entries())]
    cidr_max_entries: u32,
    /// Virtual pod prefixes of other clusters, each twice (cm_translate)
    #[arg(long, value_name = "ENTRIES", default_value_t = MapSizes::default().translate, value_parser = entries())]
    translate_max_entries: u32,
    /// Clients times the services with session affinity that they call (cm_affinity)
    #[arg(long, value_name = "ENTRIES", default_value_t = MapSizes::default().affinity, value_parser = entries())]
    affinity_max_entries: u32,
    /// Connections of pods under a policy that fit (cm_ct)
    #[arg(long, value_name = "ENTRIES", default_value_t = MapSizes::default().ct, value_parser = entries())]
    ct_max_entries: u32,
    /// Connections to services that are translated packet by packet, each twice (cm_nat)
    #[arg(long, value_name = "ENTRIES", default_value_t = MapSizes::default().nat, value_parser = entries())]
    nat_max_entries: u32,
}

impl MapSizeFlags {
    pub(crate) fn sizes(&self) -> MapSizes {
        MapSizes {
            ipcache: self.ipcache_max_entries,
            prefix: self.prefix_max_entries,
            endpoint: self.endpoint_max_entries,
            node: self.node_max_entries,
            service: self.service_max_entries,
            slot: self.slot_max_entries,
            backend: self.backend_max_entries,
            policy: self.policy_max_entries,
            cidr: self.cidr_max_entries,
            translate: self.translate_max_entries,
            affinity: self.affinity_max_entries,
            ct: self.ct_max_entries,
            nat: self.nat_max_entries,
            ..MapSizes::default()
        }
    }
}

/// An empty hash map of the largest size takes 256 MiB: one list head for each entry.
fn entries() -> RangedI64ValueParser<u32> {
    RangedI64ValueParser::new().range(64..=16_777_216)
}
