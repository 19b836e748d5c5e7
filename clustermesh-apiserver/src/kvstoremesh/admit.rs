//! What may be mirrored: what the import policy lets in, under keys that a reader could ask for.
//!
//! A value is decoded only to be judged; what is mirrored is what the cluster wrote.

use std::collections::BTreeMap;
use std::net::IpAddr;

use clustermesh_kvstore::import_policy::{self, Ledger, PeerPolicy, Reason, Refusal, Tally};
use clustermesh_kvstore::key::Kind;
use clustermesh_kvstore::record::ServiceReader;
use ipnet::IpNet;

/// The longest part of a key behind its prefix, in bytes: two names of Kubernetes are far below.
const MAX_SUFFIX: usize = 600;

/// A record on its way into the mirror.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a> {
    /// What it is about.
    pub kind: Kind,
    /// Its key behind the prefix of its kind.
    pub suffix: &'a str,
    /// Its value.
    pub value: &'a [u8],
}

/// What becomes of what is mirrored under a record's key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is replaced by this.
    Take,
    /// It stays: nobody can tell what the record says.
    Keep,
    /// It goes: the operator wants no record of what this one says.
    Drop,
}

/// Each record of one cluster passes here before it is mirrored.
#[derive(Debug, Default)]
pub struct Gate {
    ledgers: BTreeMap<Kind, Ledger>,
    services: ServiceReader,
}

impl Gate {
    /// Judges a record. `beside`: the records of its kind that are mirrored, if none is under its key.
    pub fn judge(&mut self, peer: &PeerPolicy, record: &Record<'_>, beside: Option<usize>) -> Verdict {
        let (kind, suffix) = (record.kind, record.suffix);
        let judged = self.admit(peer, record).and_then(|audited| {
            let beyond = beside.map_or(Ok(None), |mirrored| peer.check_quota(kind, mirrored))?;
            Ok(audited.or(beyond))
        });
        let (refusal, audited) = match judged {
            Ok(None) => return Verdict::Take,
            Ok(Some(refusal)) => (refusal, true),
            Err(refusal) => (refusal, false),
        };
        self.ledgers.entry(kind).or_default().tell(&peer.name, kind, suffix, &refusal, audited);
        match audited {
            true => Verdict::Take,
            false if refusal.reason.is_operators() => Verdict::Drop,
            false => Verdict::Keep,
        }
    }

    /// A record is gone.
    pub fn forget(&mut self, kind: Kind, suffix: &str) {
        if kind == Kind::Services {
            self.services.forget(suffix);
        }
    }

    /// How many records were refused, or only audited, by kind and reason.
    pub fn tallies(&self) -> impl Iterator<Item = (Kind, Reason, Tally)> + '_ {
        self.ledgers
            .iter()
            .flat_map(|(kind, ledger)| ledger.by_reason().map(|(reason, tally)| (*kind, reason, tally)))
    }

    /// The newest refused keys, by kind.
    pub fn ledgers(&self) -> &BTreeMap<Kind, Ledger> {
        &self.ledgers
    }

    fn admit(&mut self, peer: &PeerPolicy, record: &Record<'_>) -> Result<Option<Refusal>, Refusal> {
        let Record { kind, suffix, value } = *record;
        check_key(kind, suffix)?;
        if kind == Kind::Services {
            return import_policy::admit_service(&mut self.services, suffix, value, peer)
                .map(|(_, audited)| audited);
        }
        import_policy::admit(kind, suffix, value, peer).map(|admitted| admitted.audited)
    }
}

/// A key must be one that a reader could ask for, in the one form that it has.
fn check_key(kind: Kind, suffix: &str) -> Result<(), Refusal> {
    let fits = suffix.len() <= MAX_SUFFIX
        && match kind {
            Kind::Nodes => is_name(suffix),
            Kind::Identities => !suffix.is_empty() && suffix.bytes().all(|byte| byte.is_ascii_digit()),
            Kind::Ip => suffix.parse::<IpAddr>().is_ok() || suffix.parse::<IpNet>().is_ok(),
            Kind::Services | Kind::ServiceExports => {
                suffix.split_once('/').is_some_and(|(namespace, name)| is_name(namespace) && is_name(name))
            }
            // For the agents of their own cluster alone.
            Kind::LocalServices | Kind::LocalIdentities | Kind::LocalIp | Kind::LocalPolicies => false,
        };
    if fits {
        return Ok(());
    }
    Err(Refusal { reason: Reason::Record("bad_key"), detail: format!("no record of {kind} has such a key") })
}

/// What Kubernetes allows in any name.
fn is_name(text: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'.');
    !text.is_empty() && text.len() <= 253 && text.bytes().all(inner) && !text.contains("..")
}

#[cfg(test)]
mod tests {
    use clustermesh_kvstore::cluster::{ClusterId, MaxConnectedClusters};
    use clustermesh_kvstore::import_policy::PolicyFile;

    use super::*;

    fn beta(policy: &str) -> PeerPolicy {
        let (name, max) = ("beta".parse().unwrap(), MaxConnectedClusters::C255);
        let rules = PolicyFile::parse(policy).unwrap().rules_for(&name);
        PeerPolicy { id: ClusterId::new(2, max).unwrap(), name, max, is_own: false, rules }
    }

    #[test]
    fn keys_have_the_form_of_their_kind() {
        for (kind, suffix) in [
            (Kind::Nodes, "node-1.example"),
            (Kind::Identities, "65792"),
            (Kind::Ip, "10.1.0.10"),
            (Kind::Ip, "fd00:10:1::10"),
            (Kind::Services, "shop/cart"),
            (Kind::ServiceExports, "shop/cart"),
        ] {
            assert_eq!(check_key(kind, suffix), Ok(()), "{kind} {suffix}");
        }
        for (kind, suffix) in [
            (Kind::Nodes, ""),
            (Kind::Nodes, "a/b"),
            (Kind::Nodes, "../beta"),
            (Kind::Identities, "65792/value"),
            (Kind::Identities, "+65792"),
            (Kind::Ip, "10.1.0.10/../.."),
            (Kind::Services, "cart"),
            (Kind::Services, "shop/cart/x"),
            (Kind::Services, "shop//cart"),
            (Kind::ServiceExports, "shop/c\nart"),
            (Kind::LocalServices, "shop/cart"),
        ] {
            let refused = check_key(kind, suffix).unwrap_err();
            assert_eq!(refused.reason.as_str(), "bad_key", "{kind} {suffix}");
        }
    }

    #[test]
    fn the_import_policy_judges() {
        let value = br#"{"cluster":"beta","clusterID":2,"namespace":"shop","name":"cart","frontends":{},"backends":{},"shared":true}"#;
        let cart = Record { kind: Kind::Services, suffix: "shop/cart", value };
        let mut gate = Gate::default();
        let mut judge = |policy: &str, record: Record<'_>, beside| gate.judge(&beta(policy), &record, beside);
        assert_eq!(judge("", cart, Some(0)), Verdict::Take);
        let denied = "default: {services: {deny: [shop/*]}}";
        assert_eq!(judge(denied, cart, None), Verdict::Drop);
        assert_eq!(judge("default: {mode: audit, services: {deny: [shop/*]}}", cart, None), Verdict::Take);
        assert_eq!(judge("", Record { value: b"{", ..cart }, None), Verdict::Keep);
        let liar = String::from_utf8_lossy(value).replace("beta", "alpha");
        assert_eq!(judge(denied, Record { value: liar.as_bytes(), ..cart }, None), Verdict::Keep);
        let full = "default: {quotas: {services: 1}}";
        assert_eq!(judge(full, cart, Some(1)), Verdict::Keep);
        assert_eq!(judge(full, cart, None), Verdict::Take);
        let tallies: Vec<_> = gate.tallies().map(|(_, reason, tally)| (reason.as_str(), tally)).collect();
        let of = |refused, audited| Tally { refused, audited };
        assert_eq!(
            tallies,
            [
                ("bad_json", of(1, 0)),
                ("cluster_name_mismatch", of(1, 0)),
                ("quota_exceeded", of(1, 0)),
                ("service_not_allowed", of(1, 1)),
            ]
        );
    }
}
