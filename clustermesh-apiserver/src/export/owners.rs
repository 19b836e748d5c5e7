use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use clustermesh_kvstore::cluster::NamespacedName;

use super::Basis;
use crate::objects::{CiliumEndpoint, Object, Objects};

/// Which of Cilium's endpoints have an address, in the order in which they came to have it: it belongs to
/// the first, and to the next when that one gives it up.
#[derive(Default)]
pub(super) struct Owners(BTreeMap<IpAddr, Vec<Owner>>);

/// Where an endpoint is described.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Owner {
    /// In an object of its own.
    Endpoint(NamespacedName),
    /// In a slice.
    Slice { slice: String, endpoint: NamespacedName },
}

impl Owners {
    /// Takes in a change of one object; `changed` gets the addresses that it is about.
    pub(super) fn update(
        &mut self,
        before: Option<&Object>,
        after: Option<&Object>,
        changed: &mut BTreeSet<IpAddr>,
    ) {
        let (before, after) = (addresses(before), addresses(after));
        for (ip, owner) in &after {
            // Almost always one; by itself a list begins with room for four.
            let owners = self.0.entry(*ip).or_insert_with(|| Vec::with_capacity(1));
            if !owners.contains(owner) {
                owners.push(owner.clone());
            }
        }
        for (ip, owner) in before.iter().filter(|old| !after.contains(old)) {
            if let Some(owners) = self.0.get_mut(ip) {
                owners.retain(|other| other != owner);
                if owners.is_empty() {
                    self.0.remove(ip);
                }
            }
        }
        changed.extend(before.into_iter().chain(after).map(|(ip, _)| ip));
    }

    /// The endpoints that have the address according to `basis`, first come first.
    pub(super) fn of<'a>(
        &'a self,
        ip: IpAddr,
        basis: Basis,
        objects: &'a Objects,
    ) -> impl Iterator<Item = &'a CiliumEndpoint> {
        self.0.get(&ip).into_iter().flatten().filter_map(move |owner| match (owner, basis) {
            (Owner::Endpoint(name), Basis::Endpoints) => objects.cilium_endpoint(name),
            (Owner::Slice { slice, endpoint }, Basis::Slices) => {
                objects.cilium_slice(slice)?.endpoint(endpoint)
            }
            _ => None,
        })
    }

    /// All addresses.
    pub(super) fn ips(&self) -> impl Iterator<Item = IpAddr> {
        self.0.keys().copied()
    }
}

fn addresses(object: Option<&Object>) -> Vec<(IpAddr, Owner)> {
    match object {
        Some(Object::CiliumEndpoint(endpoint)) => {
            endpoint.ips.iter().map(|ip| (*ip, Owner::Endpoint(endpoint.name.clone()))).collect()
        }
        Some(Object::CiliumEndpointSlice(slice)) => {
            let of = |endpoint: &CiliumEndpoint| {
                let owner = Owner::Slice { slice: slice.name.clone(), endpoint: endpoint.name.clone() };
                endpoint.ips.iter().map(move |ip| (*ip, owner.clone())).collect::<Vec<_>>()
            };
            slice.endpoints.iter().flat_map(of).collect()
        }
        _ => Vec::new(),
    }
}
