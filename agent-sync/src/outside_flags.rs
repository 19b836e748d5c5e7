//! Flags about services for packets that no socket hook sees.

use agent_sync::acceleration::Acceleration;
use agent_sync::agent::PacketServices;
use agent_sync::mesh::LetIn;
use clap::{Args, ValueEnum};
use clustermesh_kvstore::record::Algorithm;

#[derive(Clone, Debug, Args)]
pub(crate) struct OutsideFlags {
    /// Let in what comes for node ports, external IPs and load balancer IPs at this node's devices, and send it to any
    /// backend of any cluster (see docs/load-balancing.md)
    #[arg(long, requires = "node_ip")]
    enable_node_port: bool,
    /// Devices at which it comes in [default: the one that has --node-ip]
    #[arg(long, value_name = "NAME", value_delimiter = ',', requires = "enable_node_port")]
    devices: Vec<String>,
    /// Whether established calls go past the kernel (XDP), if their backend is on another node and nothing is encrypted
    #[arg(long, value_enum, value_name = "MODE", default_value_t = AccelerationFlag::Disabled,
        requires = "enable_node_port")]
    bpf_lb_acceleration: AccelerationFlag,
    /// Whether packets that pods send to services are translated if no socket hook has done so
    #[arg(long, value_enum, value_name = "SWITCH", default_value_t = Switch::On)]
    packet_services: Switch,
    /// How calls from outside find a backend, if the service does not say (annotation service.cilium.io/lb-algorithm)
    #[arg(long, value_enum, value_name = "NAME", default_value_t = AlgorithmFlag::Random)]
    bpf_lb_algorithm: AlgorithmFlag,
    /// Places in a table of Maglev's: a hundred for each backend make shares equal to a hundredth
    #[arg(long, value_name = "PLACES", default_value_t = 1021, value_parser = table_size)]
    bpf_lb_maglev_table_size: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum AccelerationFlag {
    /// They do not
    Disabled,
    /// In the drivers of all devices; one that cannot is an error
    Native,
    /// In the drivers that can
    BestEffort,
    /// In the kernel's stead for any driver, which is no faster
    TestingOnly,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum AlgorithmFlag {
    /// Each node by itself
    Random,
    /// All nodes alike, and few clients move when backends come or go
    Maglev,
}

fn table_size(text: &str) -> Result<u32, String> {
    let sizes = LetIn::TABLE_SIZES;
    text.parse()
        .ok()
        .filter(|size| sizes.contains(size))
        .ok_or_else(|| format!("one of {}", sizes.map(|size| size.to_string()).join(", ")))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
}

impl OutsideFlags {
    pub(crate) fn options(self) -> PacketServices {
        PacketServices {
            of_pods: self.packet_services == Switch::On,
            from_outside: self.enable_node_port.then_some(self.devices),
            algorithm: match self.bpf_lb_algorithm {
                AlgorithmFlag::Random => Algorithm::Random,
                AlgorithmFlag::Maglev => Algorithm::Maglev,
            },
            acceleration: match self.bpf_lb_acceleration {
                AccelerationFlag::Disabled => Acceleration::Disabled,
                AccelerationFlag::Native => Acceleration::Native,
                AccelerationFlag::BestEffort => Acceleration::BestEffort,
                AccelerationFlag::TestingOnly => Acceleration::TestingOnly,
            },
            table_size: self.bpf_lb_maglev_table_size,
        }
    }
}
