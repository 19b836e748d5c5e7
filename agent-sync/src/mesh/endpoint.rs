//! Pods of this node: the own cluster's addresses behind this node, and the interface of each.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;

use ebpf_global_svc::abi::{
    ENDPOINT_AUDIT, ENDPOINT_ENFORCE_EGRESS, ENDPOINT_ENFORCE_INGRESS, ENDPOINT_VIA_STACK, EndpointValue,
    IpKey, IpValue,
};

use super::fact::{Link, Links};
use super::records::Records;
use crate::wire_key;

/// Computes `cm_endpoint` from addresses and links.
#[derive(Debug, Default)]
pub(super) struct Endpoints {
    own: u16,
    /// This node, as tables call it.
    node_ip: Option<[u8; 4]>,
    /// And as records may call it.
    here: BTreeSet<[u8; 4]>,
    /// Pods that should have a link.
    local: BTreeSet<IpAddr>,
    links: Links,
    installed: HashMap<IpAddr, EndpointValue>,
    dirty: HashSet<IpAddr>,
    /// Pods came or went, or their links may be others.
    moved: bool,
}

impl Endpoints {
    pub(super) fn new(
        own: u16,
        node_ip: Option<[u8; 4]>,
        restored: Vec<(IpKey, EndpointValue)>,
    ) -> (Self, Vec<(IpKey, Option<EndpointValue>)>) {
        let mut endpoints = Self { own, node_ip, here: node_ip.into_iter().collect(), ..Self::default() };
        let mut foreign = Vec::new();
        for (key, value) in restored {
            match wire_key::address(key.family, key.ip) {
                Some(ip) if key.cluster == own => {
                    endpoints.installed.insert(ip, value);
                    endpoints.dirty.insert(ip);
                }
                _ => foreign.push((key, None)),
            }
        }
        (endpoints, foreign)
    }

    /// Before anything is known: an earlier life knew these names of this node too.
    pub(super) fn also_here(&mut self, names: impl Iterator<Item = [u8; 4]>) {
        self.here.extend(names);
    }

    /// The own node's record says where its tunnels end, and by which names it may be called.
    pub(super) fn set_here(&mut self, node_ip: [u8; 4], names: BTreeSet<[u8; 4]>, own: &Records) {
        if (self.node_ip, &self.here) != (Some(node_ip), &names) {
            self.node_ip = Some(node_ip);
            self.here = names;
            self.dirty.extend(own.addresses().map(|(ip, _)| ip));
            self.dirty.extend(self.installed.keys());
        }
    }

    pub(super) fn node_ip(&self) -> Option<[u8; 4]> {
        self.node_ip
    }

    /// An address of the own cluster appeared, moved or went.
    pub(super) fn address_changed(&mut self, ip: IpAddr) {
        self.dirty.insert(ip);
    }

    /// All addresses of the own cluster are known now.
    pub(super) fn synced(&mut self) {
        self.dirty.extend(self.installed.keys());
    }

    pub(super) fn set_links(&mut self, links: Links) {
        self.links = links;
        self.dirty.extend(&self.local);
        self.moved = true;
    }

    /// Whether pods or their links may be others than when this was asked last.
    pub(super) fn take_moved(&mut self) -> bool {
        std::mem::take(&mut self.moved)
    }

    /// Pods of this node.
    pub(super) fn local(&self) -> &BTreeSet<IpAddr> {
        &self.local
    }

    /// What is to be installed.
    pub(super) fn wanted(&self) -> &HashMap<IpAddr, EndpointValue> {
        &self.installed
    }

    /// Identities of the pods of this node, if they may be others than when this was asked last.
    pub(super) fn take_subjects(&self, own: &Records) -> Option<BTreeSet<u32>> {
        if self.dirty.is_empty() {
            return None;
        }
        let ips = self.local.iter().chain(&self.dirty).chain(self.installed.keys());
        Some(ips.filter_map(|ip| self.subject(ip, own)).collect())
    }

    /// Something else may be enforced for pods of these identities.
    pub(super) fn policies_changed(&mut self, subjects: &BTreeSet<u32>, own: &Records) {
        if !subjects.is_empty() {
            let is_subject = |ip: &&IpAddr| self.subject(ip, own).is_some_and(|id| subjects.contains(&id));
            let changed = self.local.iter().chain(self.installed.keys()).filter(is_subject);
            let changed: Vec<IpAddr> = changed.copied().collect();
            self.dirty.extend(changed);
        }
    }

    /// `flags` gives what policies enforce for an identity, if that is known.
    pub(super) fn compute(
        &mut self,
        own: &Records,
        flags: impl Fn(u32) -> Option<u32>,
    ) -> Vec<(IpKey, Option<EndpointValue>)> {
        let mut changes = Vec::new();
        for ip in std::mem::take(&mut self.dirty) {
            let is_local = own.address(&ip).is_some_and(|value| self.is_here(&value));
            self.moved |= if is_local { self.local.insert(ip) } else { self.local.remove(&ip) };
            let before = self.installed.get(&ip).copied();
            let after = self.value(ip, own, before).and_then(|value| police(value, before, &flags));
            if before != after {
                match after {
                    Some(value) => drop(self.installed.insert(ip, value)),
                    None => drop(self.installed.remove(&ip)),
                }
                changes.push((wire_key::ip_key(self.own, ip), after));
            }
        }
        changes
    }

    fn is_here(&self, value: &IpValue) -> bool {
        self.here.contains(&value.node_ip)
    }

    /// Identity of the pod that is behind an address on this node. Until it is known who is here, a pod that
    /// a predecessor installed is.
    fn subject(&self, ip: &IpAddr, own: &Records) -> Option<u32> {
        let installed = || self.installed.get(ip).map(|value| value.identity);
        if self.node_ip.is_none() {
            return installed();
        }
        match own.address(ip) {
            Some(value) => self.is_here(&value).then_some(value.identity),
            None => installed().filter(|_| !own.knows_addresses()),
        }
    }

    fn value(&self, ip: IpAddr, own: &Records, before: Option<EndpointValue>) -> Option<EndpointValue> {
        if self.node_ip.is_none() {
            return before;
        }
        let Some(record) = own.address(&ip) else {
            return before.filter(|_| !own.knows_addresses());
        };
        if !self.is_here(&record) {
            return None;
        }
        match &self.links {
            Links::Known(links) => links.get(&ip).map(|link| endpoint(record.identity, *link)),
            Links::Absent => Some(endpoint(record.identity, Link { ifindex: 0, macs: None })),
            // What was installed is more likely right than nothing.
            Links::Unknown => before.map(|before| EndpointValue { identity: record.identity, ..before }),
        }
    }
}

/// Nothing of a pod passes before its policies are known; one that is installed goes on under those that it
/// had, unless it is another one by now.
fn police(
    value: EndpointValue,
    before: Option<EndpointValue>,
    flags: impl Fn(u32) -> Option<u32>,
) -> Option<EndpointValue> {
    let enforced = match flags(value.identity) {
        Some(flags) => flags,
        None => before.filter(|before| before.identity == value.identity)?.flags & POLICED,
    };
    Some(EndpointValue { flags: value.flags & !POLICED | enforced, ..value })
}

/// Flags that come from policies.
const POLICED: u32 = ENDPOINT_ENFORCE_INGRESS | ENDPOINT_ENFORCE_EGRESS | ENDPOINT_AUDIT;

fn endpoint(identity: u32, link: Link) -> EndpointValue {
    let zero = [0; 6];
    EndpointValue {
        ifindex: link.ifindex,
        identity,
        pod_mac: link.macs.map_or(zero, |macs| macs.pod),
        host_mac: link.macs.map_or(zero, |macs| macs.host),
        flags: if link.macs.is_some() { 0 } else { ENDPOINT_VIA_STACK },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_keeps_its_policies_until_others_are_known() {
        let pod =
            |identity, flags| EndpointValue { flags, ..endpoint(identity, Link { ifindex: 7, macs: None }) };
        let enforced = ENDPOINT_VIA_STACK | ENDPOINT_ENFORCE_INGRESS;
        let plain = pod(300, ENDPOINT_VIA_STACK);
        assert_eq!(police(plain, None, |_| None), None, "a new one waits");
        assert_eq!(police(plain, Some(pod(300, enforced)), |_| None), Some(pod(300, enforced)));
        assert_eq!(police(plain, Some(pod(301, ENDPOINT_VIA_STACK)), |_| None), None, "this one is new, too");
        assert_eq!(police(plain, Some(pod(300, enforced)), |_| Some(0)), Some(plain));
        assert_eq!(police(plain, None, |_| Some(ENDPOINT_ENFORCE_INGRESS)), Some(pod(300, enforced)));
    }
}
