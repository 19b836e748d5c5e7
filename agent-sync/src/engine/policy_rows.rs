//! The tables of policy as they are shown.

use std::net::IpAddr;
use std::time::Duration;

use ebpf_global_svc::DatapathError;
use ebpf_global_svc::abi::{
    ENDPOINT_AUDIT, ENDPOINT_ENFORCE_EGRESS, ENDPOINT_ENFORCE_INGRESS, NAT_CLOSED, POLICY_DENY,
    POLICY_PORT_BITS, POLICY_PROTO_BITS, PolicyKey, PolicyValue, PrefixKey, direction, identity, nat_kind,
    verdict,
};

use super::query::Row;
use super::{Engine, shown};
use crate::wire_key;

impl Engine {
    /// `cm_policy`.
    pub(super) fn policy_rows(&self) -> Result<Vec<Row>, DatapathError> {
        let mut entries = self.tables.policy.dump()?;
        entries.sort_unstable_by_key(|(key, _)| (key.subject, key.direction, key.peer, *key));
        Ok(entries.into_iter().map(|(key, value)| self.policy_row(&key, value)).collect())
    }

    /// `cm_ct`.
    pub(super) fn connection_rows(&self) -> Result<Vec<Row>, DatapathError> {
        let Some(datapath) = &self.datapath else { return Ok(Vec::new()) };
        let rows = datapath.flows()?.into_iter().map(|(key, value)| {
            vec![
                ("pod", end(key.family, key.local, key.local_port)),
                ("peer", end(key.family, key.remote, key.remote_port)),
                ("cluster", key.cluster.to_string()),
                ("proto", proto(key.proto)),
                ("direction", way(key.direction).to_owned()),
                ("identity", value.peer.to_string()),
            ]
        });
        Ok(rows.collect())
    }

    /// `cm_nat`.
    pub(super) fn nat_rows(&self) -> Result<Vec<Row>, DatapathError> {
        let Some(datapath) = &self.datapath else { return Ok(Vec::new()) };
        let rows = datapath.translations()?.into_iter().map(|(key, value)| {
            let kind = if key.kind == nat_kind::SERVED { "served" } else { "answered" };
            let becomes = match value.node_ip {
                [0, 0, 0, 0] => end(key.family, value.ip, value.port),
                ip => format!("by node {}", self.node_text(ip)),
            };
            let idle = ebpf_global_svc::program_time().saturating_sub(Duration::from_nanos(value.used));
            vec![
                ("kind", kind.to_owned()),
                ("client", end(key.family, key.client, key.client_port)),
                ("other", end(key.family, key.other, key.other_port)),
                ("proto", proto(key.proto)),
                ("becomes", becomes),
                ("cluster", value.cluster.to_string()),
                ("closed", (value.flags & NAT_CLOSED != 0).to_string()),
                ("idle_seconds", idle.as_secs().to_string()),
            ]
        });
        Ok(rows.collect())
    }

    /// `cm_verdict`.
    pub(super) fn verdict_rows(&self) -> Result<Vec<Row>, DatapathError> {
        let Some(datapath) = &self.datapath else { return Ok(Vec::new()) };
        let mut verdicts = datapath.verdicts()?;
        verdicts.sort_unstable_by_key(|(key, _)| *key);
        let word = |verdict: u8| match verdict {
            verdict::ALLOWED => "allowed",
            verdict::DENIED => "denied",
            verdict::AUDITED => "audited",
            _ => "?",
        };
        let rows = verdicts.into_iter().map(|(key, counter)| {
            vec![
                ("identity", key.subject.to_string()),
                ("direction", way(key.direction).to_owned()),
                ("verdict", word(key.verdict).to_owned()),
                ("rule", self.rule(key.rule)),
                ("packets", counter.packets.to_string()),
                ("bytes", counter.bytes.to_string()),
            ]
        });
        Ok(rows.collect())
    }

    fn policy_row(&self, key: &PolicyKey, value: PolicyValue) -> Row {
        let verdict = if value.flags & POLICY_DENY == 0 { "allow" } else { "deny" };
        vec![
            ("identity", key.subject.to_string()),
            ("direction", way(key.direction).to_owned()),
            ("peer", self.peer(key.peer)),
            ("proto", if key.prefixlen < POLICY_PROTO_BITS { "any".to_owned() } else { proto(key.proto) }),
            ("ports", ports(key)),
            ("verdict", verdict.to_owned()),
            ("rule", self.rule(value.rule)),
        ]
    }

    /// Who an identity is, as far as it is known.
    fn peer(&self, id: u32) -> String {
        let mesh = self.core.mesh();
        match id {
            0 => "any".to_owned(),
            identity::HOST => "host".to_owned(),
            identity::WORLD => "world".to_owned(),
            identity::REMOTE_NODE => "remote-node".to_owned(),
            identity::FIRST_CIDR.. => {
                mesh.policies().range_of(id).map_or_else(|| id.to_string(), |net| net.to_string())
            }
            _ => mesh.labels_of(id).map_or_else(|| id.to_string(), |labels| format!("{id} {labels}")),
        }
    }

    fn rule(&self, rule: u32) -> String {
        match rule {
            0 => "none".to_owned(),
            _ => self.core.mesh().policies().rule_text(rule).map_or_else(|| rule.to_string(), str::to_owned),
        }
    }
}

/// An entry of `cm_cidr`.
pub(super) fn range(key: PrefixKey, id: u32) -> Row {
    let net = wire_key::prefix(&key).map_or_else(|| "?".into(), |net| net.to_string());
    vec![("range", net), ("identity", id.to_string())]
}

/// What is enforced for a pod.
pub(super) fn enforced(flags: u32) -> String {
    let words = [
        (ENDPOINT_ENFORCE_INGRESS, "ingress"),
        (ENDPOINT_ENFORCE_EGRESS, "egress"),
        (ENDPOINT_AUDIT, "audit"),
    ];
    let words: Vec<_> =
        words.into_iter().filter(|(flag, _)| flags & flag != 0).map(|(_, word)| word).collect();
    if words.is_empty() { "none".to_owned() } else { words.join(",") }
}

fn way(way: u8) -> &'static str {
    if way == direction::INGRESS { "ingress" } else { "egress" }
}

fn proto(number: u8) -> String {
    match number {
        1 => "ICMP".to_owned(),
        6 => "TCP".to_owned(),
        17 => "UDP".to_owned(),
        58 => "ICMPv6".to_owned(),
        132 => "SCTP".to_owned(),
        other => other.to_string(),
    }
}

/// Ports of an entry, or the type of ICMP.
fn ports(key: &PolicyKey) -> String {
    let first = u16::from_be(key.port);
    match POLICY_PORT_BITS.saturating_sub(key.prefixlen) {
        0 => first.to_string(),
        free @ 1..16 => format!("{first}-{}", u32::from(first) + (1 << free) - 1),
        _ => "any".to_owned(),
    }
}

fn end(family: u8, ip: [u8; 16], port: u16) -> String {
    let ip: Option<IpAddr> = wire_key::address(family, ip);
    format!("{}:{}", shown(ip), u16::from_be(port))
}
