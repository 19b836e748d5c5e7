//! What agents say of their own nodes: see [`NodeAnnouncement`].

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use clustermesh_kvstore::cluster::ClusterName;
use clustermesh_kvstore::record::{self, IpsecKey, NodeAnnouncement, RecordError, WireguardKey};

/// Nodes of a cluster whose announcements are kept.
const MAX: usize = 65_536;
/// An announcement without a node is waited for so long: an agent may be faster than its node's object.
const ORPHAN: Duration = Duration::from_secs(600);

/// The last word of each node.
#[derive(Debug, Default)]
pub(super) struct Announced(BTreeMap<String, Held>);

#[derive(Debug)]
struct Held {
    /// None: withdrawn, and waits to be removed with its node.
    keys: Keys,
    /// Since when no node has that name, as far as anybody looked.
    orphaned: Option<Instant>,
}

/// For WireGuard, and for IPsec.
type Keys = (Option<WireguardKey>, Option<IpsecKey>);

/// An announcement that does not count; the node's last one does.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AnnouncementError {
    /// It cannot be read, or is another node's.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// Somebody writes names that no nodes have.
    #[error("{MAX} nodes have announced themselves already")]
    TooMany,
}

impl Announced {
    /// A node says this (none: its key is gone from etcd). Tells whether its record may be another one now.
    pub(super) fn take(
        &mut self,
        cluster: &ClusterName,
        node: &str,
        value: Option<&[u8]>,
    ) -> Result<bool, AnnouncementError> {
        let Some(value) = value else { return Ok(self.0.remove(node).is_some()) };
        let said = NodeAnnouncement::decode(cluster, node, value)?;
        if self.0.len() >= MAX && !self.0.contains_key(node) {
            return Err(AnnouncementError::TooMany);
        }
        let keys = (said.wireguard, said.ipsec);
        let before = self.0.insert(node.to_owned(), Held { keys, orphaned: None });
        Ok(before.map(|held| held.keys).unwrap_or_default() != keys)
    }

    /// Completes a record. For WireGuard what the node's object says counts more: where Cilium runs, that is its
    /// agent's key. For IPsec nobody but the node has a say.
    pub(super) fn complete(&self, record: &mut record::Node) {
        let (wireguard, ipsec) = self.0.get(&record.name).map(|held| held.keys).unwrap_or_default();
        if record.wireguard_pub_key.is_empty()
            && let Some(key) = wireguard
        {
            record.wireguard_pub_key = key.to_string();
        }
        let mut annotations = record.annotations.take().unwrap_or_default();
        annotations.remove(IpsecKey::ANNOTATION);
        annotations.extend(ipsec.map(|key| (IpsecKey::ANNOTATION.to_owned(), key.to_string())));
        record.annotations = Some(annotations).filter(|annotations| !annotations.is_empty());
    }

    /// Names that no node has had for long.
    pub(super) fn orphans(&mut self, is_node: impl Fn(&str) -> bool, now: Instant) -> Vec<String> {
        let mut orphans = Vec::new();
        for (name, held) in &mut self.0 {
            held.orphaned = (!is_node(name)).then(|| held.orphaned.unwrap_or(now));
            if held.orphaned.is_some_and(|since| now.duration_since(since) >= ORPHAN) {
                orphans.push(name.clone());
            }
        }
        orphans
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alpha() -> ClusterName {
        "alpha".parse().unwrap()
    }

    fn value(node: &str, key: Option<u8>) -> Vec<u8> {
        let wireguard = key.and_then(|byte| WireguardKey::new([byte; 32]));
        NodeAnnouncement { cluster: alpha(), node: node.into(), wireguard, ipsec: None }.encode()
    }

    fn shown(announced: &Announced, own: &str) -> String {
        let mut record =
            record::Node { name: "n1".into(), wireguard_pub_key: own.into(), ..record::Node::default() };
        announced.complete(&mut record);
        record.wireguard_pub_key
    }

    #[test]
    fn the_last_word_counts_unless_the_object_has_one() {
        let mut announced = Announced::default();
        let mut take = |value: Option<&[u8]>| announced.take(&alpha(), "n1", value);
        assert_eq!(take(Some(&value("n1", Some(1)))), Ok(true));
        assert_eq!(take(Some(&value("n1", Some(1)))), Ok(false));
        assert_eq!(take(Some(&value("n1", Some(2)))), Ok(true));
        assert!(take(Some(&value("n2", Some(3)))).is_err(), "another node's");
        let two = WireguardKey::new([2; 32]).unwrap().to_string();
        assert_eq!(shown(&announced, ""), two);
        assert_eq!(shown(&announced, "cilium's"), "cilium's");
        assert_eq!(announced.take(&alpha(), "n1", Some(&value("n1", None))), Ok(true));
        assert_eq!(shown(&announced, ""), "");
    }

    #[test]
    fn only_the_node_itself_says_its_ipsec_key() {
        let mut announced = Announced::default();
        let mut record = record::Node { name: "n1".into(), ..record::Node::default() };
        let by_hand = |key: &str| Some([(IpsecKey::ANNOTATION.to_owned(), key.to_owned())].into());
        record.annotations = by_hand("somebody's");
        announced.complete(&mut record);
        assert_eq!(record.annotations, None);
        let ipsec = IpsecKey::new([5; 32]);
        let said = NodeAnnouncement { cluster: alpha(), node: "n1".into(), wireguard: None, ipsec };
        assert_eq!(announced.take(&alpha(), "n1", Some(&said.encode())), Ok(true));
        record.annotations = by_hand("somebody's");
        announced.complete(&mut record);
        assert_eq!(record.ipsec_key(), ipsec);
    }

    #[test]
    fn what_belongs_to_no_node_goes_after_a_while() {
        let mut announced = Announced::default();
        announced.take(&alpha(), "n1", Some(&value("n1", Some(1)))).unwrap();
        announced.take(&alpha(), "gone", Some(&value("gone", None))).unwrap();
        let start = Instant::now();
        let is_node = |name: &str| name == "n1";
        assert!(announced.orphans(is_node, start).is_empty());
        assert!(announced.orphans(is_node, start + ORPHAN / 2).is_empty());
        assert_eq!(announced.orphans(is_node, start + ORPHAN), ["gone"]);
        assert!(announced.orphans(|_| true, start + ORPHAN).is_empty());
        assert!(announced.orphans(is_node, start + ORPHAN).is_empty(), "it was a node's meanwhile");
    }
}
