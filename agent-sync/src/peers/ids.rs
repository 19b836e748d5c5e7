//! Who holds which cluster ID. Two clusters with one ID would share addresses and identities.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use clustermesh_kvstore::cluster::{ClusterId, ClusterName};

/// Reservations of this agent.
#[derive(Debug)]
pub struct Ids {
    own: ClusterId,
    holders: BTreeMap<ClusterId, ClusterName>,
}

/// An ID that cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// It is ours.
    #[error(
        "cluster {name} has ID {id}, which is this cluster's own: give one of the two another cluster ID"
    )]
    Own {
        /// Who wanted it.
        name: ClusterName,
        /// What it wanted.
        id: ClusterId,
    },
    /// It is another remote's.
    #[error(
        "cluster {name} has ID {id}, which cluster {holder} holds: give one of the two another cluster ID"
    )]
    Held {
        /// Who wanted it.
        name: ClusterName,
        /// What it wanted.
        id: ClusterId,
        /// Who has it.
        holder: ClusterName,
    },
    /// The own etcd is another cluster's.
    #[error(
        "the own etcd says that cluster {name} has ID {id}, but this agent was started with ID {own}: correct --cluster-id or --etcd-config"
    )]
    NotOwn {
        /// The own cluster.
        name: ClusterName,
        /// What its etcd says.
        id: ClusterId,
        /// What it was started with.
        own: ClusterId,
    },
}

impl Ids {
    /// `own` is `name`'s for good.
    pub fn new(name: ClusterName, own: ClusterId) -> Self {
        Self { own, holders: BTreeMap::from([(own, name)]) }
    }

    /// Reserves `id`. What `name` had before it keeps until [`Self::give_up`], so that nobody gets it
    /// while entries of it may exist.
    ///
    /// # Errors
    /// Another cluster has it.
    pub fn reserve(&mut self, name: &ClusterName, id: ClusterId) -> Result<(), IdError> {
        let own_name = self.holders.get(&self.own);
        if own_name == Some(name) {
            return match id == self.own {
                true => Ok(()),
                false => Err(IdError::NotOwn { name: name.clone(), id, own: self.own }),
            };
        }
        match self.holders.get(&id) {
            Some(holder) if holder == name => return Ok(()),
            Some(_) if id == self.own => return Err(IdError::Own { name: name.clone(), id }),
            Some(holder) => {
                return Err(IdError::Held { name: name.clone(), id, holder: holder.clone() });
            }
            None => {}
        }
        self.holders.insert(id, name.clone());
        Ok(())
    }

    /// The ID of another cluster than the own one.
    pub fn of(&self, name: &ClusterName) -> Option<ClusterId> {
        let held = self.holders.iter().find(|(id, holder)| *holder == name && **id != self.own);
        held.map(|(id, _)| *id)
    }

    /// `name` has no entries under `id` any more.
    pub fn give_up(&mut self, name: &ClusterName, id: ClusterId) {
        if id != self.own && self.holders.get(&id) == Some(name) {
            self.holders.remove(&id);
        }
    }

    /// `name` has no entries any more.
    pub fn release(&mut self, name: &ClusterName) {
        let own = self.own;
        self.holders.retain(|id, holder| holder != name || *id == own);
    }
}

pub(super) fn lock(ids: &Mutex<Ids>) -> MutexGuard<'_, Ids> {
    // Nothing panics while it is held.
    ids.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use clustermesh_kvstore::cluster::MaxConnectedClusters;

    use super::*;

    fn id(id: u32) -> ClusterId {
        ClusterId::new(id, MaxConnectedClusters::C255).unwrap()
    }

    #[test]
    fn an_id_has_one_holder() {
        let [own, beta, gamma] = ["own", "beta", "gamma"].map(|name| name.parse::<ClusterName>().unwrap());
        let mut ids = Ids::new(own.clone(), id(1));
        assert!(matches!(ids.reserve(&beta, id(1)), Err(IdError::Own { .. })));
        assert!(matches!(ids.reserve(&own, id(2)), Err(IdError::NotOwn { .. })));
        ids.reserve(&own, id(1)).unwrap();
        ids.reserve(&beta, id(2)).unwrap();
        ids.reserve(&beta, id(2)).unwrap();
        let error = ids.reserve(&gamma, id(2)).unwrap_err();
        assert!(error.to_string().contains("beta"), "{error}");
        // What it had before is nobody's until it is given up.
        ids.reserve(&beta, id(4)).unwrap();
        assert!(ids.reserve(&gamma, id(2)).is_err());
        ids.give_up(&gamma, id(2));
        assert!(ids.reserve(&gamma, id(2)).is_err());
        ids.give_up(&beta, id(2));
        assert_eq!(ids.of(&beta), Some(id(4)));
        ids.reserve(&gamma, id(2)).unwrap();
        ids.release(&own);
        assert!(ids.reserve(&beta, id(1)).is_err());
    }
}
