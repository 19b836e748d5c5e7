//! Flags about services for packets that no socket hook sees.

use agent_sync::agent::PacketServices;
use clap::{Args, ValueEnum};

#[derive(Clone, Debug, Args)]
pub(crate) struct OutsideFlags {
    /// Let in what comes for node ports, external IPs and load balancer IPs at this node's devices, and send it to any
    /// backend of any cluster (see docs/load-balancing.md)
    #[arg(long, requires = "node_ip")]
    enable_node_port: bool,
    /// Devices at which it comes in [default: the one that has --node-ip]
    #[arg(long, value_name = "NAME", value_delimiter = ',', requires = "enable_node_port")]
    devices: Vec<String>,
    /// Whether packets that pods send to services are translated if no socket hook has done so
    #[arg(long, value_enum, value_name = "SWITCH", default_value_t = Switch::On)]
    packet_services: Switch,
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
        }
    }
}
