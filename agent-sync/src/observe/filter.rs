//! Which flows an observer wants to see.

use std::net::IpAddr;

use clustermesh_agent_api::v1;
use clustermesh_kvstore::cluster::NamespacedName;
use clustermesh_kvstore::labels::Labels;
use ebpf_global_svc::KINDS;
use ebpf_global_svc::abi::{event_kind, reason};
use ipnet::IpNet;

use super::flow::{End, Flow, Kind, Verdict};

/// Values that a filter may have altogether: more are no question that a person asks.
const MOST: usize = 1000;

/// See [`v1::FlowFilter`]. Fields that are empty match everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FlowFilter {
    kinds: Vec<Kind>,
    verdicts: Vec<Verdict>,
    reasons: Vec<u8>,
    from: EndFilter,
    to: EndFilter,
    either: EndFilter,
    protocols: Vec<u8>,
    services: Vec<String>,
}

/// See [`v1::EndFilter`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EndFilter {
    identities: Vec<u32>,
    pods: Vec<String>,
    ips: Vec<IpNet>,
    labels: Vec<LabelFilter>,
    clusters: Vec<String>,
    ports: Vec<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct LabelFilter {
    source: Option<String>,
    key: String,
    value: Option<String>,
}

/// The observer's: a filter that cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FilterError {
    /// A word that is none of those that there are.
    #[error("{value:?} is no {what}; there are {known}")]
    Unknown {
        /// What it should be.
        what: &'static str,
        /// As given.
        value: String,
        /// What there is.
        known: String,
    },
    /// Text of another form.
    #[error("{value:?} is no {what}: write {form}")]
    Malformed {
        /// What it should be.
        what: &'static str,
        /// As given.
        value: String,
        /// How it is written.
        form: &'static str,
    },
    /// More than can be meant.
    #[error("the filter has more than {MOST} values")]
    TooLong,
}

/// A pod's name, if it is known: of source and destination.
pub(crate) type Names<'a> = [Option<&'a NamespacedName>; 2];

impl FlowFilter {
    /// Reads what an observer asks for.
    ///
    /// # Errors
    /// [`FilterError`], with what could be written instead.
    pub fn parse(filter: v1::FlowFilter) -> Result<Self, FilterError> {
        let ends = [&filter.from, &filter.to, &filter.either];
        let in_ends = ends.into_iter().flatten().map(|end| {
            end.identities.len()
                + end.pods.len()
                + end.ips.len()
                + end.labels.len()
                + end.clusters.len()
                + end.ports.len()
        });
        let others =
            filter.types.len() + filter.verdicts.len() + filter.reasons.len() + filter.protocols.len();
        if in_ends.sum::<usize>() + others + filter.services.len() > MOST {
            return Err(FilterError::TooLong);
        }
        let kind = |word: &str| Kind::ALL.into_iter().find(|kind| kind.as_str() == word);
        let verdict =
            |word: &str| Verdict::ALL.into_iter().find(|verdict| verdict.as_str().eq_ignore_ascii_case(word));
        Ok(Self {
            kinds: words("type", &filter.types, kind, Kind::ALL.map(Kind::as_str))?,
            verdicts: words("verdict", &filter.verdicts, verdict, Verdict::ALL.map(Verdict::as_str))?,
            reasons: words("reason", &filter.reasons, reason_of, (0..=u8::MAX).filter_map(drop_name))?,
            protocols: words("protocol", &filter.protocols, protocol, PROTOCOLS.map(|(name, _)| name))?,
            from: EndFilter::parse(filter.from.unwrap_or_default())?,
            to: EndFilter::parse(filter.to.unwrap_or_default())?,
            either: EndFilter::parse(filter.either.unwrap_or_default())?,
            services: filter.services,
        })
    }

    /// Events among which flows that match can be: a bit for each [`event_kind`].
    pub fn events(&self) -> u32 {
        let all = (1 << KINDS) - 1;
        let of = |bits: u32| if bits == 0 { all } else { bits };
        let kinds = of(self.kinds.iter().fold(0, |bits, kind| bits | kind.events()));
        let verdicts = of(self.verdicts.iter().fold(0, |bits, verdict| bits | verdict.events()));
        let reasons =
            if self.reasons.is_empty() { all } else { 1 << event_kind::DROP | 1 << event_kind::AUDIT };
        kinds & verdicts & reasons
    }

    /// Whether a flow matches, whatever its pods are called.
    pub fn may_match(&self, flow: &Flow) -> bool {
        self.is_match(flow, None)
    }

    /// Whether a flow matches. Without names, pods are not asked for.
    pub(crate) fn is_match(&self, flow: &Flow, names: Option<Names<'_>>) -> bool {
        let ends = [&flow.source, &flow.destination];
        let matches = |filter: &EndFilter, n: usize| filter.is_match(ends[n], names.map(|names| names[n]));
        any(&self.kinds, |kind| *kind == flow.kind())
            && any(&self.verdicts, |verdict| *verdict == flow.verdict())
            && any(&self.reasons, |reason| has_reason(flow) && *reason == flow.event.reason)
            && any(&self.protocols, |protocol| *protocol == flow.event.proto && flow.event.family != 0)
            && any(&self.services, |prefix| {
                flow.service.as_ref().is_some_and(|service| is_of(prefix, service))
            })
            && matches(&self.from, 0)
            && matches(&self.to, 1)
            && (matches(&self.either, 0) || matches(&self.either, 1))
    }
}

impl EndFilter {
    fn parse(filter: v1::EndFilter) -> Result<Self, FilterError> {
        let malformed =
            |what, value: &str, form| FilterError::Malformed { what, value: shorten(value), form };
        let net = |text: &String| match text.parse::<IpAddr>() {
            Ok(ip) => Ok(ip.into()),
            Err(_) => text
                .parse::<IpNet>()
                .map_err(|_| malformed("address", text, "10.1.0.7, 10.1.0.0/16 or fd00::/64")),
        };
        let port = |port: &u32| {
            let port = u16::try_from(*port).ok().filter(|port| *port != 0);
            port.ok_or_else(|| malformed("port", "", "a number from 1 to 65535"))
        };
        Ok(Self {
            ips: filter.ips.iter().map(net).collect::<Result<_, _>>()?,
            labels: filter
                .labels
                .iter()
                .map(|text| {
                    LabelFilter::parse(text)
                        .ok_or_else(|| malformed("label", text, "key=value, key or source:key=value"))
                })
                .collect::<Result<_, _>>()?,
            ports: filter.ports.iter().map(port).collect::<Result<_, _>>()?,
            identities: filter.identities,
            pods: filter.pods,
            clusters: filter.clusters,
        })
    }

    /// `name` none: pods are not asked for.
    fn is_match(&self, end: &End, name: Option<Option<&NamespacedName>>) -> bool {
        any(&self.identities, |identity| *identity == end.identity && end.identity != 0)
            && any(&self.ips, |net| end.ip.is_some_and(|ip| net.contains(&ip)))
            && any(&self.clusters, |name| {
                end.cluster.as_ref().is_some_and(|cluster| cluster.as_str() == name)
            })
            && any(&self.ports, |port| *port == end.port)
            && any(&self.labels, |label| end.labels.as_ref().is_some_and(|labels| label.is_in(labels)))
            && name.is_none_or(|name| any(&self.pods, |prefix| name.is_some_and(|name| is_of(prefix, name))))
    }
}

impl LabelFilter {
    fn parse(text: &str) -> Option<Self> {
        let (key, value) = match text.split_once('=') {
            Some((key, value)) => (key, Some(value.to_owned())),
            None => (text, None),
        };
        let (source, key) = match key.split_once(':') {
            Some((source, key)) => (Some(source.to_owned()), key),
            None => (None, key),
        };
        (!key.is_empty()).then(|| Self { source, key: key.to_owned(), value })
    }

    fn is_in(&self, labels: &Labels) -> bool {
        labels.find(&self.key).is_some_and(|label| {
            self.source.as_ref().is_none_or(|source| *source == label.source)
                && self.value.as_ref().is_none_or(|value| *value == label.value)
        })
    }
}

/// One of the values does, or there are none.
fn any<T>(values: &[T], is_match: impl FnMut(&T) -> bool) -> bool {
    values.is_empty() || values.iter().any(is_match)
}

/// `namespace/`, or the beginning of a name, or all of it.
fn is_of(prefix: &str, name: &NamespacedName) -> bool {
    match prefix.split_once('/') {
        Some((namespace, prefix)) => namespace == name.namespace && name.name.starts_with(prefix),
        None => name.name.starts_with(prefix),
    }
}

/// Whether its reason says why it did not, or should not, pass.
fn has_reason(flow: &Flow) -> bool {
    matches!(flow.verdict(), Verdict::Dropped | Verdict::Audit)
}

fn words<T>(
    what: &'static str,
    given: &[String],
    parse: impl Fn(&str) -> Option<T>,
    known: impl IntoIterator<Item = &'static str>,
) -> Result<Vec<T>, FilterError> {
    let parsed: Result<Vec<T>, &String> = given.iter().map(|word| parse(word).ok_or(word)).collect();
    parsed.map_err(|word| FilterError::Unknown {
        what,
        value: shorten(word),
        known: Vec::from_iter(known).join(", "),
    })
}

const PROTOCOLS: [(&str, u8); 5] = [("tcp", 6), ("udp", 17), ("sctp", 132), ("icmp", 1), ("icmpv6", 58)];

fn protocol(word: &str) -> Option<u8> {
    PROTOCOLS.into_iter().find(|(name, _)| name.eq_ignore_ascii_case(word)).map(|(_, number)| number)
}

/// Names of reasons for which something does not pass.
fn drop_name(code: u8) -> Option<&'static str> {
    reason::name(code).filter(|_| reason::is_drop(code) || code == reason::LB_NO_BACKEND)
}

fn reason_of(word: &str) -> Option<u8> {
    (0..=u8::MAX).find(|code| drop_name(*code) == Some(word))
}

fn shorten(text: &str) -> String {
    text.chars().take(64).collect()
}

#[cfg(test)]
#[path = "filter_tests.rs"]
mod tests;
