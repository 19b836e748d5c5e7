//! Who may be at the other end: groups with a name, addresses, and pods as Cilium selects them.

use std::net::IpAddr;

use clustermesh_kvstore::labels::SOURCE_K8S;
use clustermesh_kvstore::record::{Entity, LabelSelector, Operator, Peer, Requirement};
use ipnet::IpNet;

use super::selector::{exists, names};
use super::{Flaw, GapReason};
use crate::identity::{NAMESPACE, NAMESPACE_LABELS};
use crate::objects::meta::{Check, ObjectError};

/// The group of this name; `None` is the one without members.
pub(super) fn entity(field: &str, name: &str) -> Result<Option<Peer>, Flaw> {
    let entity = match name {
        "all" => Entity::All,
        "world" => Entity::World,
        "cluster" => Entity::Cluster,
        "host" => Entity::Host,
        "remote-node" => Entity::RemoteNode,
        "none" => return Ok(None),
        _ => return Err(Flaw::Gap(format!("{field} {name:?}"), GapReason::Entity)),
    };
    Ok(Some(Peer::Entity(entity)))
}

/// A range of addresses without some parts of it.
pub(super) fn cidr(
    check: &Check<'_>,
    field: &str,
    net: &str,
    except: &[String],
) -> Result<Peer, ObjectError> {
    let parse = |text: &str| {
        let net = text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
        net.map(|net| net.trunc())
            .map_err(|_| check.error(field, format_args!("{text:?} is not a range of addresses")))
    };
    let net = parse(net)?;
    let except: Vec<IpNet> = except.iter().map(|text| parse(text)).collect::<Result<_, _>>()?;
    match except.iter().find(|except| !net.contains(*except)) {
        Some(outside) => Err(check.error(field, format_args!("{outside} is not in {net}"))),
        None => Ok(Peer::Cidr { net, except }),
    }
}

/// Pods by their labels: those of `namespace`, or of all for a policy without one, unless the selector says
/// something of namespaces. Or who has one of the labels that stand for a group.
pub(super) fn endpoints(
    field: &str,
    namespace: Option<&str>,
    mut requirements: Vec<Requirement>,
) -> Result<Option<Peer>, Flaw> {
    if requirements.iter().any(|requirement| requirement.source == RESERVED) {
        return reserved(field, &requirements);
    }
    if let Some(other) = foreign(&requirements) {
        return Err(Flaw::Gap(format!("{field} \"{}:{}\"", other.source, other.key), GapReason::Selector));
    }
    if !names(&requirements, NAMESPACE) {
        match namespace {
            None => requirements.push(exists(NAMESPACE)),
            Some(namespace) if !names_labels_of_namespaces(&requirements) => {
                requirements.push(Requirement::is(SOURCE_K8S, NAMESPACE, namespace));
            }
            Some(_) => {}
        }
    }
    Ok(Some(Peer::Labels(LabelSelector(requirements))))
}

/// Source of labels that stand for groups.
const RESERVED: &str = "reserved";

/// A requirement that no label of a pod can be meant by.
pub(super) fn foreign(requirements: &[Requirement]) -> Option<&Requirement> {
    requirements.iter().find(|it| !it.source.is_empty() && it.source != SOURCE_K8S)
}

fn reserved(field: &str, requirements: &[Requirement]) -> Result<Option<Peer>, Flaw> {
    if let [Requirement { key, operator, values, .. }] = requirements
        && matches!(key.as_str(), "host" | "remote-node" | "world" | "none")
        && (*operator == Operator::Exists || (*operator == Operator::In && values.iter().eq([""])))
    {
        return entity(field, key);
    }
    Err(Flaw::Gap(field.to_owned(), GapReason::Selector))
}

fn names_labels_of_namespaces(requirements: &[Requirement]) -> bool {
    requirements
        .iter()
        .any(|it| it.key.strip_prefix(NAMESPACE_LABELS).is_some_and(|rest| rest.starts_with('.')))
}
