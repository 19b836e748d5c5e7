//! What a cluster may write into its etcd, with a preference for what almost fits.

use arbitrary::{Result, Unstructured};
use clustermesh_kvstore::cluster::{ClusterId, ClusterName};
use clustermesh_kvstore::digest::{Digest, DigestRecord, SourceTime, Timed};
use clustermesh_kvstore::key::Kind;
use serde_json::{Value, json};

/// A key behind the prefix of its kind, and a value.
#[derive(Clone, Debug)]
pub(crate) struct Claim {
    pub(crate) suffix: String,
    pub(crate) value: Vec<u8>,
}

/// Something of `kind` by the cluster of this name and ID.
pub(crate) fn claim(
    kind: Kind,
    name: &ClusterName,
    id: ClusterId,
    choices: &mut Unstructured<'_>,
) -> Result<Claim> {
    let Who { name, id } = &Who::claimed(name, id, choices)?;
    let (suffix, value) = match kind {
        Kind::Nodes => node(name, *id, choices)?,
        Kind::Ip | Kind::LocalIp => ip(*id, choices)?,
        Kind::Identities | Kind::LocalIdentities => identity_record(name, *id, choices)?,
        Kind::Services => service(name, *id, choices)?,
        Kind::LocalServices => local_service(name, *id, choices)?,
        Kind::LocalPolicies => local_policy(name, *id, choices)?,
        Kind::ServiceExports => service_export(name, choices)?,
    };
    let mut claim = Claim { suffix, value };
    damage(&mut claim, choices)?;
    Ok(claim)
}

/// What an exporter states of a kind: its name, and the record.
pub(crate) fn digest(kind: Kind, choices: &mut Unstructured<'_>) -> Result<Claim> {
    let recent = (0..choices.int_in_range(0..=3)?)
        .map(|_| Ok(Timed { revision: revision(choices)?, at: SourceTime(choices.arbitrary()?) }))
        .collect::<Result<_>>()?;
    let digest = Digest { sum: choices.int_in_range(0..=2)?, count: choices.arbitrary()? };
    let record = DigestRecord { digest, revision: revision(choices)?, recent };
    let mut claim = Claim { suffix: kind.as_str().to_owned(), value: record.encode() };
    damage(&mut claim, choices)?;
    Ok(claim)
}

/// Mostly small ones, which meet each other.
pub(crate) fn revision(choices: &mut Unstructured<'_>) -> Result<i64> {
    Ok(match choices.int_in_range(0..=9)? {
        0 => choices.arbitrary()?,
        1 => *choices.choose(&[0, -1, i64::MIN, i64::MAX])?,
        _ => choices.int_in_range(1..=30)?,
    })
}

/// As whom it speaks: mostly as itself.
struct Who {
    name: String,
    id: u32,
}

impl Who {
    fn claimed(name: &ClusterName, id: ClusterId, choices: &mut Unstructured<'_>) -> Result<Self> {
        let mut who = Self { name: name.to_string(), id: id.get().into() };
        match choices.int_in_range(0..=15)? {
            0 => who.id = *choices.choose(&[0, 1, 2, 3, 255, 256, u32::MAX])?,
            1 => who.name = (*choices.choose(&["alpha", "beta", "gamma", "", "a/b"])?).to_owned(),
            _ => {}
        }
        Ok(who)
    }
}

fn node(cluster: &str, id: u32, choices: &mut Unstructured<'_>) -> Result<(String, Vec<u8>)> {
    let name = *choices.choose(&["n1", "n2", "n3"])?;
    let addresses = some(choices, 3, |choices| {
        let kind = *choices.choose(&["InternalIP", "CiliumInternalIP", "ExternalIP", "New"])?;
        Ok(
            json!({"Type": kind, "IP": if kind == "InternalIP" { *choices.choose(&NODES)? } else { address(choices)? }}),
        )
    })?;
    let cidrs = some(choices, 2, |choices| {
        Ok(json!({"IP": choices.choose(&["10.2.0.0", "10.2.1.0", "10.3.0.0", "0.0.0.0", "fd00:2::"])?,
                  "Mask": choices.choose(&["////AA==", "//8AAA==", "/wAAAA==", "AAAAAA==", "//////////8AAAAAAAAAAA=="])?}))
    })?;
    let (first, second) = (cidrs.first().cloned().unwrap_or_default(), cidrs.get(1).cloned());
    let value = json!({
        "Name": name, "Cluster": cluster, "ClusterID": id, "IPAddresses": addresses, "IPv4AllocCIDR": first,
        "IPv4SecondaryAllocCIDRs": second.map(|cidr| vec![cidr]), "EncryptionKey": choices.int_in_range(0..=3)?,
    });
    Ok((name.to_owned(), value.to_string().into_bytes()))
}

fn ip(id: u32, choices: &mut Unstructured<'_>) -> Result<(String, Vec<u8>)> {
    let ip = address(choices)?;
    let host = if choices.ratio(3, 4)? { *choices.choose(&NODES)? } else { "" };
    let mut value = json!({"IP": ip, "HostIP": host, "ID": identity(id, choices)?,
        "K8sNamespace": choices.choose(&["shop", "kube-system", ""])?, "K8sPodName": "p"});
    let mut suffix = ip.to_owned();
    if choices.ratio(1, 8)? {
        let (mask, length) = *choices.choose(&[("/////w==", 32), ("////AA==", 24), ("AAAAAA==", 0)])?;
        value["Mask"] = mask.into();
        suffix = format!("{ip}/{length}");
    }
    Ok((suffix, value.to_string().into_bytes()))
}

fn identity_record(cluster: &str, id: u32, choices: &mut Unstructured<'_>) -> Result<(String, Vec<u8>)> {
    let labels =
        format!("k8s:app=x;k8s:io.cilium.k8s.policy.cluster={cluster};k8s:io.kubernetes.pod.namespace=shop;");
    let sign = if choices.ratio(1, 16)? { "+" } else { "" };
    Ok((format!("{sign}{}", identity(id, choices)?), labels.into_bytes()))
}

fn service(cluster: &str, id: u32, choices: &mut Unstructured<'_>) -> Result<(String, Vec<u8>)> {
    let (namespace, name) = named(choices)?;
    let value = json!({
        "cluster": cluster, "clusterID": id, "namespace": namespace, "name": name,
        "frontends": frontends(choices, port)?, "backends": by_address(choices, 4, |choices| ports(choices, port))?,
        "includeExternal": true, "shared": choices.ratio(7, 8)?,
    });
    Ok((format!("{namespace}/{name}"), value.to_string().into_bytes()))
}

fn local_service(cluster: &str, id: u32, choices: &mut Unstructured<'_>) -> Result<(String, Vec<u8>)> {
    let (namespace, name) = named(choices)?;
    let backends = some(choices, 4, |choices| {
        Ok(json!({"ip": address(choices)?, "ports": ports(choices, local_port)?,
                  "state": choices.choose(&["active", "terminating"])?}))
    })?;
    let value = json!({
        "cluster": cluster, "clusterId": id, "namespace": namespace, "name": name,
        "global": choices.ratio(3, 4)?, "shared": choices.ratio(3, 4)?,
        "affinity": choices.choose(&["none", "local", "remote"])?, "headless": choices.ratio(1, 8)?,
        "frontends": frontends(choices, local_port)?, "backends": backends,
    });
    Ok((format!("{namespace}/{name}"), value.to_string().into_bytes()))
}

fn local_policy(cluster: &str, id: u32, choices: &mut Unstructured<'_>) -> Result<(String, Vec<u8>)> {
    let (namespace, name) = named(choices)?;
    let kind = *choices.choose(&["cnp", "knp", "ccnp"])?;
    let namespace = if kind == "ccnp" { String::new() } else { namespace.to_string() };
    let label = json!([{"source": "k8s", "key": choices.choose(&["app", "tier"])?,
                        "operator": choices.choose(&["in", "notIn", "exists", "doesNotExist"])?, "values": ["orders"]}]);
    let peers = some(choices, 3, |choices| {
        Ok(match choices.int_in_range(0..=2)? {
            0 => json!({"labels": label}),
            1 => json!({"entity": choices.choose(&["all", "world", "cluster", "host", "remote-node"])?}),
            _ => json!({"cidr": {"net": "192.0.2.0/24", "except": ["192.0.2.128/25"]}}),
        })
    })?;
    let ports = some(choices, 2, |choices| {
        let first: u16 = choices.arbitrary()?;
        Ok(
            json!({"ports": {"protocol": choices.choose(&[6, 17, 132])?, "first": first, "last": first.max(choices.arbitrary()?)}}),
        )
    })?;
    let section = json!({"defaultDeny": choices.ratio(3, 4)?, "allow": [{"peers": peers, "ports": ports}],
                         "deny": [{"peers": [{"labels": label}]}]});
    let rules = json!([{"subject": label, "ingress": section, "egress": section}]);
    let value = json!({"cluster": cluster, "clusterID": id, "rules": rules});
    Ok((format!("{kind}/{namespace}/{name}"), value.to_string().into_bytes()))
}

fn service_export(cluster: &str, choices: &mut Unstructured<'_>) -> Result<(String, Vec<u8>)> {
    let (namespace, name) = named(choices)?;
    let value = json!({
        "cluster": cluster, "namespace": namespace, "name": name, "exportCreationTimestamp": "2026-11-20T20:42:46Z",
        "ports": [{"name": "http", "protocol": "TCP", "port": 80}],
        "type": choices.choose(&["ClusterSetIP", "Headless", "None"])?, "sessionAffinity": "None",
    });
    Ok((format!("{namespace}/{name}"), value.to_string().into_bytes()))
}

/// Whatever it was, with bytes changed, cut off or replaced.
fn damage(claim: &mut Claim, choices: &mut Unstructured<'_>) -> Result<()> {
    let value = &mut claim.value;
    match choices.int_in_range(0..=31)? {
        0 => value.truncate(choices.int_in_range(0..=value.len())?),
        1 if !value.is_empty() => {
            let at = choices.choose_index(value.len())?;
            value[at] = choices.arbitrary()?;
        }
        2 => *value = choices.arbitrary()?,
        3 => claim.suffix = choices.arbitrary()?,
        4 => claim.suffix.insert(0, '0'),
        _ => {}
    }
    Ok(())
}

const NODES: [&str; 5] = ["172.18.0.2", "172.18.0.3", "172.18.0.1", "fc00:c111::2", "127.0.0.1"];

fn address(choices: &mut Unstructured<'_>) -> Result<&'static str> {
    Ok(choices.choose(&[
        "10.2.0.1",
        "10.2.0.2",
        "10.2.1.1",
        "10.3.0.1",
        "10.1.0.1",
        "172.18.0.2",
        "fd00:2::1",
        "fd00:2:0::1",
        "::ffff:10.2.0.1",
        "127.0.0.1",
        "0.0.0.0",
        "255.255.255.255",
    ])?)
}

fn identity(id: u32, choices: &mut Unstructured<'_>) -> Result<u32> {
    Ok(match choices.int_in_range(0..=9)? {
        0 => choices.arbitrary()?,
        1 => *choices.choose(&[0, 1, 2, 6, 255, 256, (1 << 24) - 1, 1 << 24, u32::MAX])?,
        2 => choices.int_in_range(1..=3)? << 16 | 300,
        _ => id << 16 | choices.int_in_range(0..=3)?,
    })
}

fn named(choices: &mut Unstructured<'_>) -> Result<(&'static str, &'static str)> {
    Ok((choices.choose(&["shop", "kube-system"])?, choices.choose(&["orders", "cart", "secret-1"])?))
}

fn frontends(choices: &mut Unstructured<'_>, port: fn(u64, &str) -> Value) -> Result<Value> {
    let mut frontends = serde_json::Map::new();
    for _ in 0..choices.int_in_range(0..=2)? {
        let ip = *choices.choose(&["10.96.0.1", "10.96.0.2", "fd00:96::1"])?;
        frontends.insert(ip.to_owned(), ports(choices, port)?);
    }
    Ok(frontends.into())
}

fn by_address(
    choices: &mut Unstructured<'_>,
    most: usize,
    value: impl Fn(&mut Unstructured<'_>) -> Result<Value>,
) -> Result<Value> {
    let mut map = serde_json::Map::new();
    for _ in 0..choices.int_in_range(0..=most)? {
        map.insert(address(choices)?.to_owned(), value(choices)?);
    }
    Ok(map.into())
}

fn ports(choices: &mut Unstructured<'_>, port: fn(u64, &str) -> Value) -> Result<Value> {
    let mut ports = serde_json::Map::new();
    for name in &["http", "dns", ""][..choices.int_in_range(0..=3)?] {
        let number = *choices.choose(&[80, 8080, 53, 0, 65_535, 65_536])?;
        let protocol = *choices.choose(&["TCP", "UDP", "SCTP", "tcp"])?;
        ports.insert((*name).to_owned(), port(number, protocol));
    }
    Ok(ports.into())
}

fn port(number: u64, protocol: &str) -> Value {
    json!({"Protocol": protocol, "Port": number})
}

fn local_port(number: u64, protocol: &str) -> Value {
    json!({"protocol": protocol, "port": number})
}

fn some<T>(
    choices: &mut Unstructured<'_>,
    most: usize,
    each: impl Fn(&mut Unstructured<'_>) -> Result<T>,
) -> Result<Vec<T>> {
    (0..choices.int_in_range(0..=most)?).map(|_| each(choices)).collect()
}
