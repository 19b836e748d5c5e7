//! Identities of address ranges outside of the mesh: one for each that a policy names. They mean something
//! on this node only. The kernel finds the longest range that has an address.

use std::collections::{BTreeSet, HashMap};

use ebpf_global_svc::abi::{PrefixKey, identity};
use ipnet::IpNet;

use crate::wire_key;

/// See the module.
#[derive(Debug)]
pub(super) struct Ranges {
    by_net: HashMap<IpNet, Range>,
    by_id: HashMap<u32, IpNet>,
    /// Never given before.
    next: u32,
    /// Without a user; of no use to anybody once all policies are known.
    unused: BTreeSet<IpNet>,
    /// Not told yet.
    new: Vec<(PrefixKey, Option<u32>)>,
}

#[derive(Debug)]
struct Range {
    id: u32,
    uses: usize,
}

impl Ranges {
    /// Takes over what is installed: a range keeps its number.
    pub(super) fn restore(installed: Vec<(PrefixKey, u32)>) -> Self {
        let mut ranges = Self {
            by_net: HashMap::new(),
            by_id: HashMap::new(),
            next: identity::FIRST_CIDR,
            unused: BTreeSet::new(),
            new: Vec::new(),
        };
        for (key, id) in installed {
            let net = wire_key::prefix(&key).filter(|net| wire_key::prefix_key(*net) == key);
            let is_free = id >= identity::FIRST_CIDR && !ranges.by_id.contains_key(&id);
            match net.filter(|_| is_free) {
                Some(net) => {
                    ranges.next = ranges.next.max(id.saturating_add(1));
                    ranges.by_id.insert(id, net);
                    ranges.by_net.insert(net, Range { id, uses: 0 });
                    ranges.unused.insert(net);
                }
                // Nothing of ours looks like that.
                None => ranges.new.push((key, None)),
            }
        }
        ranges
    }

    /// One more user. Gives the range's number if it had none.
    pub(super) fn acquire(&mut self, net: IpNet) -> Option<u32> {
        if let Some(range) = self.by_net.get_mut(&net) {
            range.uses += 1;
            return self.unused.remove(&net).then_some(range.id);
        }
        let id = self.next;
        self.next = self.next.saturating_add(1);
        self.by_id.insert(id, net);
        self.by_net.insert(net, Range { id, uses: 1 });
        self.new.push((wire_key::prefix_key(net), Some(id)));
        Some(id)
    }

    /// One less.
    pub(super) fn release(&mut self, net: IpNet) {
        if let Some(range) = self.by_net.get_mut(&net) {
            range.uses -= 1;
            if range.uses == 0 {
                self.unused.insert(net);
            }
        }
    }

    /// Gives up what nobody uses. Gives the numbers that mean nothing any more.
    pub(super) fn drop_unused(&mut self) -> Vec<u32> {
        let mut gone = Vec::new();
        for net in std::mem::take(&mut self.unused) {
            let Some(range) = self.by_net.remove(&net) else { continue };
            self.by_id.remove(&range.id);
            gone.push(range.id);
            let (key, queued) = (wire_key::prefix_key(net), self.new.len());
            self.new.retain(|entry| *entry != (key, Some(range.id)));
            // What was never told need not be taken back.
            if self.new.len() == queued {
                self.new.push((key, None));
            }
        }
        gone
    }

    /// What was not told yet, in order.
    pub(super) fn take_new(&mut self) -> Vec<(PrefixKey, Option<u32>)> {
        std::mem::take(&mut self.new)
    }

    pub(super) fn has(&self, id: u32) -> bool {
        self.by_id.contains_key(&id)
    }

    pub(super) fn net_of(&self, id: u32) -> Option<IpNet> {
        self.by_id.get(&id).copied()
    }

    pub(super) fn ids(&self) -> impl Iterator<Item = u32> {
        self.by_id.keys().copied()
    }

    pub(super) fn wanted(&self, key: &PrefixKey) -> Option<u32> {
        let net = wire_key::prefix(key).filter(|net| wire_key::prefix_key(*net) == *key)?;
        self.by_net.get(&net).map(|range| range.id)
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = PrefixKey> {
        self.by_net.keys().map(|net| wire_key::prefix_key(*net))
    }
}
