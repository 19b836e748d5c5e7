//! Encryption between nodes, for people.

use std::collections::BTreeMap;

use clustermesh_agent_api::v1::{EncryptedNode, Encryption};

use super::text::Text;
use crate::mesh::terminal::{Tone, one_line};

/// Nodes that are named of each state.
const NAMED: usize = 4;

impl Text {
    /// One line, and one for each state of nodes that are not encrypted.
    pub(super) fn encryption(&mut self, encryption: &Encryption) {
        if encryption.mode == "off" {
            return;
        }
        let strict = if encryption.strict { ", strict" } else { "" };
        let done = encryption.nodes.iter().filter(|node| node.state == "encrypted").count();
        let (all, mtu) = (encryption.nodes.len(), encryption.mtu);
        let mode = one_line(&encryption.mode);
        self.line(
            2,
            format!(
                "encryption: {} between {mode}{strict}; {done} of {all} nodes, MTU {mtu}",
                by(encryption)
            ),
        );
        if !encryption.error.is_empty() {
            let text = format!("encryption: {}", one_line(&encryption.error));
            self.line(3, self.style.paint(Tone::Bad, &text));
        }
        let mut others: BTreeMap<&str, Vec<&EncryptedNode>> = BTreeMap::new();
        for node in encryption.nodes.iter().filter(|node| node.state != "encrypted") {
            others.entry(&node.state).or_default().push(node);
        }
        let fate = if encryption.strict { "blocked" } else { "in clear" };
        for (state, nodes) in others {
            let named = nodes.iter().take(NAMED).map(|node| name(node)).collect::<Vec<_>>().join(", ");
            let more = nodes.len().saturating_sub(NAMED);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            let text = format!("{fate}, {}: {named}{more}", why(state));
            self.line(3, self.style.paint(Tone::Bad, &text));
        }
    }
}

/// By what a node encrypts. One that does not say so is of a version that had WireGuard only.
pub(in crate::mesh) fn by(encryption: &Encryption) -> String {
    let words = encryption.by.iter().map(|by| match by.as_str() {
        "wireguard" => "WireGuard".to_owned(),
        "ipsec" => "IPsec".to_owned(),
        other => one_line(other),
    });
    // The one that comes first where both can is the last one.
    let words: Vec<_> = words.rev().collect();
    if words.is_empty() { "WireGuard".to_owned() } else { words.join(" or ") }
}

fn name(node: &EncryptedNode) -> String {
    match node.node.as_str() {
        "" => one_line(&node.ip),
        name => format!("{}/{}", one_line(&node.cluster), one_line(name)),
    }
}

fn why(state: &str) -> String {
    match state {
        "waiting" => "has not answered yet",
        "no_key" => "its record has no key",
        "own_key" => "it claims this node's key",
        "bad_key" => "its key is none",
        "key_of_another_node" => "it claims another node's key",
        "unconfirmed" => "known from before the agent's start only",
        other => return one_line(other),
    }
    .into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::terminal::Style;

    fn plain() -> Text {
        Text { style: Style::Plain, out: String::new() }
    }

    #[test]
    fn what_is_not_encrypted_is_named_with_its_reason() {
        let node = |name: &str, state: &str| EncryptedNode {
            cluster: "beta".into(),
            node: name.into(),
            state: state.into(),
            ..EncryptedNode::default()
        };
        let nodes = vec![node("n1", "encrypted"), node("n2", "no_key"), node("evil\nname", "own_key")];
        let encryption = Encryption { mode: "nodes".into(), mtu: 1390, nodes, ..Encryption::default() };
        let mut text = plain();
        text.encryption(&encryption);
        assert!(text.out.contains("WireGuard between nodes; 1 of 3 nodes, MTU 1390"), "{}", text.out);
        assert!(text.out.contains("in clear, its record has no key: beta/n2"), "{}", text.out);
        assert_eq!(text.out.lines().count(), 3, "{}", text.out);
        let mut text = plain();
        text.encryption(&Encryption { strict: true, error: "no socket".into(), ..encryption });
        assert!(text.out.contains("blocked, ") && text.out.contains("no socket"), "{}", text.out);
        let both = vec!["wireguard".into(), "ipsec".into()];
        assert_eq!(by(&Encryption { by: both, ..Encryption::default() }), "IPsec or WireGuard");
        let mut text = plain();
        text.encryption(&Encryption { mode: "off".into(), ..Encryption::default() });
        assert_eq!(text.out, "");
    }
}
