use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use clustermesh_kvstore::cluster::NamespacedName;
use clustermesh_kvstore::record::{Affinity, Balancing, External, Protocol};
use k8s_openapi::api::core::v1;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::balancing::balancing;
use super::external::external;
use super::meta::{Check, ObjectError};

/// A service.
#[derive(Clone, Debug, PartialEq)]
pub struct Service {
    /// Namespace and name.
    pub name: NamespacedName,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Which pods belong to it; `None` if somebody else maintains its endpoints.
    pub selector: Option<BTreeMap<String, String>>,
    /// Addresses that it is reached at inside the cluster.
    pub cluster_ips: Vec<IpAddr>,
    /// `clusterIP: None`: names its pods in DNS, has no address itself.
    pub headless: bool,
    /// `type: ExternalName`: only a name in DNS.
    pub external_name: bool,
    /// Families that endpoints are wanted of.
    pub families: Vec<IpFamily>,
    /// Ports, with different names.
    pub ports: Vec<ServicePort>,
    /// Pods that are not ready count as well.
    pub publish_not_ready: bool,
    /// Is the same service in every cluster that has it.
    pub global: bool,
    /// Offers its own backends to other clusters; only true for a global one.
    pub shared: bool,
    /// Which backends callers prefer; `None` unless global.
    pub affinity: Affinity,
    /// In percent, 1 to 100: see [`clustermesh_kvstore::record::Failover`]. `None` unless callers prefer the
    /// own cluster.
    pub failover_threshold: Option<u8>,
    /// How calls are spread beyond that; names no clusters unless global.
    pub balancing: Balancing,
    /// How it is reached from outside of the mesh.
    pub external: External,
}

/// A port of a service.
#[derive(Clone, Debug, PartialEq)]
pub struct ServicePort {
    /// Name, empty if the service has one port only.
    pub name: String,
    /// Protocol.
    pub protocol: Protocol,
    /// Port on the service's addresses.
    pub number: u16,
    /// Port on the pods.
    pub target: TargetPort,
}

/// Where a service port leads to on a pod.
#[derive(Clone, Debug, PartialEq)]
pub enum TargetPort {
    /// The same number on every pod.
    Number(u16),
    /// Whatever number the pod gives to this name.
    Name(String),
}

/// IPv4 or IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum IpFamily {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl IpFamily {
    /// The family of an address.
    pub const fn of(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }
}

impl TryFrom<v1::Service> for Service {
    type Error = ObjectError;

    fn try_from(object: v1::Service) -> Result<Self, ObjectError> {
        let check = Check::new("Service", &object.metadata);
        let annotations = check.annotations();
        let spec = object.spec.unwrap_or_default();

        let (cluster_ips, headless) = cluster_ips(&check, &spec)?;
        let global = annotation(&annotations, GLOBAL).is_some_and(is_true);
        let shared = global && annotation(&annotations, SHARED).is_none_or(is_true);
        let affinity = match annotation(&annotations, AFFINITY) {
            Some(text) if global && text.eq_ignore_ascii_case("local") => Affinity::Local,
            Some(text) if global && text.eq_ignore_ascii_case("remote") => Affinity::Remote,
            _ => Affinity::None,
        };
        let failover_threshold = match affinity {
            Affinity::Local => annotations.get(FAILOVER_THRESHOLD).and_then(|text| percent(&check, text)),
            Affinity::None | Affinity::Remote => None,
        };

        Ok(Self {
            name: check.namespaced_name()?,
            labels: check.labels()?,
            families: families(&check, &spec, &cluster_ips)?,
            cluster_ips,
            headless,
            external_name: spec.type_.as_deref() == Some("ExternalName"),
            ports: ports(&check, &spec)?,
            balancing: balancing(&check, &annotations, &spec, global, affinity),
            external: external(&check, &annotations, &spec, object.status.as_ref())?,
            publish_not_ready: spec.publish_not_ready_addresses.unwrap_or(false),
            selector: spec.selector.filter(|selector| !selector.is_empty()),
            global,
            shared,
            affinity,
            failover_threshold,
        })
    }
}

/// Each with its older alias, which counts only where the first is absent.
const GLOBAL: [&str; 2] = ["service.cilium.io/global", "io.cilium/global-service"];
const SHARED: [&str; 2] = ["service.cilium.io/shared", "io.cilium/shared-service"];
const AFFINITY: [&str; 2] = ["service.cilium.io/affinity", "io.cilium/service-affinity"];

const FAILOVER_THRESHOLD: &str = "clustermesh.io/failover-threshold";

/// A service must not go because of how it is to be balanced: what is no share counts as not said.
fn percent(check: &Check<'_>, text: &str) -> Option<u8> {
    let number = text.trim().trim_end_matches('%').trim_end().parse().ok();
    let percent = number.filter(|percent| (1..=100).contains(percent));
    if percent.is_none() {
        let what = format!("{FAILOVER_THRESHOLD} is {text:?}, not a share from 1% to 100%; all calls stay");
        tracing::warn!("{}", check.error("metadata.annotations", &what));
    }
    percent
}

fn annotation<'a>(annotations: &'a BTreeMap<String, String>, names: [&str; 2]) -> Option<&'a str> {
    names.iter().find_map(|name| annotations.get(*name)).map(String::as_str)
}

fn is_true(text: &str) -> bool {
    text.eq_ignore_ascii_case("true")
}

fn cluster_ips(check: &Check<'_>, spec: &v1::ServiceSpec) -> Result<(Vec<IpAddr>, bool), ObjectError> {
    let mut headless = false;
    let mut ips = Vec::new();
    for text in spec.cluster_ips.iter().flatten().chain(&spec.cluster_ip) {
        match text.as_str() {
            "None" => headless = true,
            "" => {}
            text => {
                let ip = check.ip("spec.clusterIPs", text)?;
                if !ips.contains(&ip) {
                    ips.push(ip);
                }
            }
        }
    }
    match headless && !ips.is_empty() {
        true => Err(check.error("spec.clusterIPs", "None and an address exclude each other")),
        false => Ok((ips, headless)),
    }
}

/// The API server fills in `ipFamilies`. Where it did not see the object, the service's addresses
/// tell; a headless one without any takes what its pods have.
fn families(
    check: &Check<'_>,
    spec: &v1::ServiceSpec,
    cluster_ips: &[IpAddr],
) -> Result<Vec<IpFamily>, ObjectError> {
    let mut families = BTreeSet::new();
    for text in spec.ip_families.iter().flatten() {
        families.insert(match text.as_str() {
            "IPv4" => IpFamily::V4,
            "IPv6" => IpFamily::V6,
            other => {
                return Err(check.error("spec.ipFamilies", format_args!("{other:?} is not IPv4 or IPv6")));
            }
        });
    }
    if families.is_empty() {
        families.extend(cluster_ips.iter().copied().map(IpFamily::of));
    }
    if families.is_empty() {
        families.extend([IpFamily::V4, IpFamily::V6]);
    }
    Ok(families.into_iter().collect())
}

fn ports(check: &Check<'_>, spec: &v1::ServiceSpec) -> Result<Vec<ServicePort>, ObjectError> {
    let mut ports: Vec<ServicePort> = Vec::new();
    for port in spec.ports.iter().flatten() {
        let name = port.name.clone().unwrap_or_default();
        if ports.iter().any(|other| other.name == name) {
            let problem = format_args!("two ports are called {name:?}: give each its own name").to_string();
            return Err(check.error("spec.ports", problem));
        }
        let number = check.port("spec.ports.port", port.port)?;
        let target = match &port.target_port {
            None | Some(IntOrString::Int(0)) => TargetPort::Number(number),
            Some(IntOrString::Int(target)) => {
                TargetPort::Number(check.port("spec.ports.targetPort", *target)?)
            }
            Some(IntOrString::String(name)) if name.is_empty() => TargetPort::Number(number),
            Some(IntOrString::String(name)) => TargetPort::Name(name.clone()),
        };
        let protocol = check.protocol("spec.ports.protocol", port.protocol.as_deref())?;
        ports.push(ServicePort { name, protocol, number, target });
    }
    Ok(ports)
}
