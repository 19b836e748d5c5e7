//! The ways from the client to the server that are compared.

use super::kernel_path::{KernelPath, SERVER_PLAIN, SERVER_VXLAN};
use super::lab::{Lab, SERVICE};
use super::nat::{self, Translator};
use super::{BULK_PORT, CLIENT_CPU, PINGPONG_PORT};
use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::Path;

/// One way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Variant {
    /// Routed between the nodes without a tunnel: nothing on this topology can be cheaper.
    PlainPod,
    /// An ordinary VXLAN device with static entries.
    VxlanPod,
    /// The same, service translated by nftables.
    VxlanNftables,
    /// The same, service translated by iptables.
    VxlanIptables,
    /// The same, service translated by IPVS, where the kernel has it.
    VxlanIpvs,
    /// ClusterMesh, the pod's own address.
    MeshPod,
    /// ClusterMesh, a global service whose only pod is in the other cluster.
    MeshService,
}

/// What is measured over a way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Mode {
    /// Connect, a byte forth and back, close.
    TcpCrr,
    /// A byte forth and back over one TCP connection.
    TcpRr,
    /// A datagram forth and back over one socket.
    UdpRr,
}

/// Both worlds, side by side on the same nodes.
pub(super) struct Worlds<'a> {
    pub(super) kernel: &'a KernelPath,
    pub(super) lab: &'a Lab,
    pub(super) probe: &'a Path,
    pub(super) services: u16,
}

/// What one run of `mesh-probe pingpong client` says.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(super) struct RoundTrips {
    pub(super) lost: u64,
    pub(super) per_second: f64,
    pub(super) round_trip_us: Percentiles,
    pub(super) connect_us: Option<Percentiles>,
}

/// The percentile that is used; `mesh-probe` knows more.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(super) struct Percentiles {
    pub(super) p50: f64,
}

#[derive(Deserialize)]
struct Throughput {
    gbit_per_second: f64,
}

impl Variant {
    /// All, in the order of the tables.
    pub(super) const ALL: [Self; 7] = [
        Self::PlainPod,
        Self::VxlanPod,
        Self::VxlanNftables,
        Self::VxlanIptables,
        Self::VxlanIpvs,
        Self::MeshPod,
        Self::MeshService,
    ];
    /// Those that differ for a long stream: services cost per connection, paths cost per byte.
    pub(super) const PATHS: [Self; 3] = [Self::PlainPod, Self::VxlanPod, Self::MeshPod];

    /// As the tables call it.
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::PlainPod => "plain routing, pod (limit)",
            Self::VxlanPod => "kernel VXLAN, pod",
            Self::VxlanNftables => "kernel VXLAN, nftables map service",
            Self::VxlanIptables => "kernel VXLAN, iptables service",
            Self::VxlanIpvs => "kernel VXLAN, IPVS service",
            Self::MeshPod => "ClusterMesh VXLAN, pod",
            Self::MeshService => "ClusterMesh VXLAN, global service",
        }
    }

    /// As progress and JSON call it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::PlainPod => "plain-pod",
            Self::VxlanPod => "vxlan-pod",
            Self::VxlanNftables => "vxlan-nftables",
            Self::VxlanIptables => "vxlan-iptables",
            Self::VxlanIpvs => "vxlan-ipvs",
            Self::MeshPod => "mesh-pod",
            Self::MeshService => "mesh-service",
        }
    }

    /// The same path to the pod's own address: what is on top of it is the price of the service.
    pub(super) fn without_service(self) -> Self {
        match self {
            Self::VxlanNftables | Self::VxlanIptables | Self::VxlanIpvs => Self::VxlanPod,
            Self::MeshService => Self::MeshPod,
            direct => direct,
        }
    }

    fn translator(self) -> Option<Translator> {
        match self {
            Self::VxlanNftables => Some(Translator::Nftables),
            Self::VxlanIptables => Some(Translator::Iptables),
            Self::VxlanIpvs => Some(Translator::Ipvs),
            _ => None,
        }
    }
}

impl Mode {
    /// All, in the order of the tables.
    pub(super) const ALL: [Self; 3] = [Self::TcpCrr, Self::TcpRr, Self::UdpRr];

    fn flag(self) -> &'static str {
        match self {
            Self::TcpCrr => "tcp-crr",
            Self::TcpRr => "tcp-rr",
            Self::UdpRr => "udp-rr",
        }
    }
}

impl Worlds<'_> {
    /// Measures all modes once over one way.
    pub(super) fn round_trips(
        &self,
        variant: Variant,
        seconds: f64,
    ) -> anyhow::Result<Vec<(Mode, RoundTrips)>> {
        let _rules = variant
            .translator()
            .map(|translator| {
                translator.install(self.kernel.translating_node(), self.services, PINGPONG_PORT)
            })
            .transpose()?;
        let target = match variant {
            Variant::PlainPod => SocketAddrV4::new(SERVER_PLAIN, PINGPONG_PORT),
            Variant::VxlanPod => SocketAddrV4::new(SERVER_VXLAN, PINGPONG_PORT),
            Variant::VxlanNftables | Variant::VxlanIptables | Variant::VxlanIpvs => {
                SocketAddrV4::new(nat::called(self.services), nat::SERVICE_PORT)
            }
            Variant::MeshPod => SocketAddrV4::new(self.lab.pingpong(), PINGPONG_PORT),
            Variant::MeshService => SERVICE,
        };
        Mode::ALL
            .into_iter()
            .map(|mode| {
                super::interrupt::check()?;
                // The warm-up outlasts the time for which the server of the run before still spins.
                let arguments = format!(
                    "pingpong client {target} --mode {} --seconds {seconds} --warmup 0.4 -o json",
                    mode.flag()
                );
                Ok((mode, self.probe(variant, &arguments)?))
            })
            .collect()
    }

    /// Gbit/s of one TCP connection over one way.
    pub(super) fn throughput(&self, variant: Variant, seconds: f64) -> anyhow::Result<f64> {
        super::interrupt::check()?;
        let address: Ipv4Addr = match variant {
            Variant::PlainPod => SERVER_PLAIN,
            Variant::MeshPod | Variant::MeshService => self.lab.bulk(),
            _ => SERVER_VXLAN,
        };
        let arguments = format!("throughput client {address}:{BULK_PORT} --seconds {seconds} -o json");
        Ok(self.probe::<Throughput>(variant, &arguments)?.gbit_per_second)
    }

    fn probe<T: serde::de::DeserializeOwned>(&self, variant: Variant, arguments: &str) -> anyhow::Result<T> {
        let prefix = match variant {
            Variant::MeshPod | Variant::MeshService => self.lab.in_client(),
            _ => self.kernel.in_client(),
        };
        let line = format!("timeout 60 {prefix} {CLIENT_CPU} {} {arguments}", self.probe.display());
        let answer = super::exec::run(&line).with_context(|| format!("measuring {}", variant.label()))?;
        serde_json::from_str(&answer).with_context(|| format!("mesh-probe answered {answer:?}"))
    }
}
