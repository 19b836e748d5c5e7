//! Which frontends have something to do with an address.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use ebpf_global_svc::abi::ServiceKey;
use ipnet::IpNet;

use crate::desired::{GroupPlan, ServicePlan};

/// Frontends by the addresses of their remote backends: of those in their plans, and of those that were left
/// out because another cluster holds the address.
#[derive(Debug, Default)]
pub(super) struct Places {
    /// Frontends by number, and back: an address is listed with four bytes, not with a key.
    numbers: HashMap<ServiceKey, u32>,
    keys: HashMap<u32, ServiceKey>,
    last: u32,
    placed: Addresses,
    left_out: Addresses,
    /// What of each frontend is in `left_out`; few have any.
    left_out_of: HashMap<u32, BTreeSet<IpAddr>>,
}

/// Addresses with the numbers of frontends.
#[derive(Debug, Default)]
struct Addresses {
    v4: BTreeSet<(u32, u32)>,
    v6: BTreeSet<(u128, u32)>,
}

impl Places {
    /// A frontend has another plan than before.
    pub(super) fn plan_changed(
        &mut self,
        own: u16,
        key: &ServiceKey,
        before: Option<&ServicePlan>,
        after: Option<&ServicePlan>,
    ) {
        let number = self.number(key);
        let group = |plan: Option<&'_ ServicePlan>, cluster: u16| -> Option<usize> {
            plan?.groups.iter().position(|group| group.cluster == cluster)
        };
        let groups = |plan: Option<&'_ ServicePlan>| plan.map_or(0, |plan| plan.groups.len());
        // An address is in one group at most, but may move from one to another: it goes before it comes.
        for at in 0..groups(before) {
            let Some(gone) = before.map(|plan| &plan.groups[at]).filter(|group| group.cluster != own) else {
                continue;
            };
            let stays = group(after, gone.cluster).and_then(|at| after.map(|plan| &plan.groups[at]));
            only_in(gone, stays, |ip| self.placed.remove(ip, number));
        }
        for at in 0..groups(after) {
            let Some(new) = after.map(|plan| &plan.groups[at]).filter(|group| group.cluster != own) else {
                continue;
            };
            let was = group(before, new.cluster).and_then(|at| before.map(|plan| &plan.groups[at]));
            only_in(new, was, |ip| self.placed.insert(ip, number));
        }
        self.forget_unused(key, after.is_some());
    }

    /// A frontend's backends of these addresses were left out.
    pub(super) fn left_out(&mut self, key: &ServiceKey, ips: BTreeSet<IpAddr>) {
        if ips.is_empty() && !self.numbers.get(key).is_some_and(|n| self.left_out_of.contains_key(n)) {
            return;
        }
        let number = self.number(key);
        let before = self.left_out_of.remove(&number).unwrap_or_default();
        before.difference(&ips).for_each(|ip| self.left_out.remove(*ip, number));
        ips.difference(&before).for_each(|ip| self.left_out.insert(*ip, number));
        if !ips.is_empty() {
            self.left_out_of.insert(number, ips);
        }
    }

    /// Frontends with backends of addresses inside `net`, used or left out.
    pub(super) fn inside(&self, net: IpNet) -> BTreeSet<ServiceKey> {
        let numbers = self.placed.inside(net).chain(self.left_out.inside(net));
        numbers.filter_map(|number| self.keys.get(&number).copied()).collect()
    }

    fn number(&mut self, key: &ServiceKey) -> u32 {
        if let Some(number) = self.numbers.get(key) {
            return *number;
        }
        self.last = self.last.wrapping_add(1);
        while self.keys.contains_key(&self.last) {
            self.last = self.last.wrapping_add(1);
        }
        self.numbers.insert(*key, self.last);
        self.keys.insert(self.last, *key);
        self.last
    }

    fn forget_unused(&mut self, key: &ServiceKey, has_plan: bool) {
        if has_plan {
            return;
        }
        self.left_out(key, BTreeSet::new());
        if let Some(number) = self.numbers.remove(key) {
            self.keys.remove(&number);
        }
    }
}

/// Calls `each` with the addresses of `group` that `other` does not have. Both ascend.
fn only_in(group: &GroupPlan, other: Option<&GroupPlan>, mut each: impl FnMut(IpAddr)) {
    let other = other.map_or(&[][..], |other| &other.backends);
    if group.backends == other {
        return;
    }
    let mut other = other.iter().map(|backend| backend.ip).peekable();
    let mut last = None;
    for ip in group.backends.iter().map(|backend| backend.ip) {
        while other.next_if(|other| *other < ip).is_some() {}
        // Two ports of one address are one place.
        if other.peek() != Some(&ip) && last.replace(ip) != Some(ip) {
            each(ip);
        }
    }
}

impl Addresses {
    fn insert(&mut self, ip: IpAddr, number: u32) {
        match ip {
            IpAddr::V4(ip) => self.v4.insert((ip.to_bits(), number)),
            IpAddr::V6(ip) => self.v6.insert((ip.to_bits(), number)),
        };
    }

    fn remove(&mut self, ip: IpAddr, number: u32) {
        match ip {
            IpAddr::V4(ip) => self.v4.remove(&(ip.to_bits(), number)),
            IpAddr::V6(ip) => self.v6.remove(&(ip.to_bits(), number)),
        };
    }

    fn inside(&self, net: IpNet) -> Box<dyn Iterator<Item = u32> + '_> {
        match net {
            IpNet::V4(net) => {
                let range = (net.network().to_bits(), 0)..=(net.broadcast().to_bits(), u32::MAX);
                Box::new(self.v4.range(range).map(|(_, number)| *number))
            }
            IpNet::V6(net) => {
                let range = (net.network().to_bits(), 0)..=(net.broadcast().to_bits(), u32::MAX);
                Box::new(self.v6.range(range).map(|(_, number)| *number))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use ebpf_global_svc::abi::FAMILY_V4;

    use super::*;
    use crate::desired::BackendKey;

    const OWN: u16 = 1;

    fn key(n: u8) -> ServiceKey {
        let mut ip = [0; 16];
        ip[0] = n;
        ServiceKey { cluster: OWN, port: 80, proto: 6, family: FAMILY_V4, scope: 0, pad: 0, ip }
    }

    fn backends(cluster: u16, ips: &[u8]) -> Vec<BackendKey> {
        let of_port = |n: &u8, port| BackendKey {
            cluster,
            ip: IpAddr::from([10, 0, 0, *n]),
            port,
            proto: 6,
            terminating: false,
        };
        ips.iter().flat_map(|n| [of_port(n, 80), of_port(n, 81)]).collect()
    }

    fn plan(groups: &[(u16, &[u8])]) -> ServicePlan {
        let group = |(cluster, ips): &(u16, &[u8])| GroupPlan {
            cluster: *cluster,
            weight: 1,
            tier: 0,
            backends: backends(*cluster, ips),
        };
        ServicePlan { affinity_timeout: 0, table: 0, groups: groups.iter().map(group).collect() }
    }

    fn at(places: &Places, net: &str) -> Vec<u8> {
        places.inside(net.parse().unwrap()).iter().map(|key| key.ip[0]).collect()
    }

    #[test]
    fn frontends_are_found_by_their_remote_backends_and_by_those_left_out() {
        let mut places = Places::default();
        let first = plan(&[(OWN, &[1]), (2, &[2, 3]), (3, &[4])]);
        places.plan_changed(OWN, &key(7), None, Some(&first));
        assert_eq!([1, 2, 3, 4, 5].map(|n| at(&places, &format!("10.0.0.{n}/32")).len()), [0, 1, 1, 1, 0]);
        // One moves to another cluster, one goes, one comes.
        let second = plan(&[(2, &[4, 9]), (3, &[3])]);
        places.plan_changed(OWN, &key(7), Some(&first), Some(&second));
        assert_eq!([2, 3, 4, 9].map(|n| at(&places, &format!("10.0.0.{n}/32")).len()), [0, 1, 1, 1]);
        places.plan_changed(OWN, &key(8), None, Some(&plan(&[(2, &[9])])));
        assert_eq!(at(&places, "10.0.0.8/31"), [7, 8]);
        places.left_out(&key(8), [IpAddr::from([10, 0, 1, 1])].into());
        assert_eq!(at(&places, "10.0.1.0/24"), [8]);
        places.left_out(&key(8), BTreeSet::new());
        assert!(at(&places, "10.0.1.0/24").is_empty());
        places.plan_changed(OWN, &key(7), Some(&second), None);
        places.plan_changed(OWN, &key(8), Some(&plan(&[(2, &[9])])), None);
        assert!(places.placed.v4.is_empty() && places.keys.is_empty() && places.numbers.is_empty());
    }
}
