//! A network namespace for a program that makes devices and routes.

use super::super::exec;
use std::net::Ipv4Addr;

/// How namespaces and their cables are called; the process ID follows.
pub(super) const NAME: &str = "cm-bench-";
pub(super) const CABLE: &str = "cmb";

/// One with a cable to this machine; removed when dropped.
pub(super) struct Netns {
    name: String,
    /// This machine's end.
    pub(super) outside: Ipv4Addr,
    /// Its own end.
    pub(super) inside: Ipv4Addr,
}

impl Netns {
    pub(super) fn new() -> anyhow::Result<Self> {
        let pid = std::process::id();
        // RFC 2544 sets 198.18.0.0/15 aside for benches.
        let third = u8::try_from(pid % 256)?;
        let (outside, inside) = (Ipv4Addr::new(198, 18, third, 1), Ipv4Addr::new(198, 18, third, 2));
        let name = format!("{NAME}{pid}");
        exec::run(&format!("ip netns add {name}"))?;
        let netns = Self { name, outside, inside };
        let (name, cable) = (&netns.name, format!("{CABLE}{pid}"));
        exec::run(&format!("ip link add {cable} type veth peer name eth0 netns {name}"))?;
        exec::run(&format!("ip addr add {outside}/30 dev {cable}"))?;
        exec::run(&format!("ip link set {cable} up"))?;
        for command in [&format!("addr add {inside}/30 dev eth0"), "link set eth0 up", "link set lo up"] {
            exec::run(&format!("ip -n {name} {command}"))?;
        }
        // Underlay addresses of nodes need a route, though nobody is there.
        exec::run(&format!("ip -n {name} route add default via {outside}"))?;
        Ok(netns)
    }

    /// What comes before a command line that is to run in it. It also gets a mount namespace, so that file
    /// systems that it mounts go with it.
    pub(super) fn prefix(&self) -> [String; 4] {
        ["ip", "netns", "exec", &self.name].map(str::to_owned)
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        // The cable goes with its end; if both are gone already, so much the better.
        let _ = exec::run(&format!("ip netns del {}", self.name));
        let _ = exec::run(&format!("ip link del {CABLE}{}", std::process::id()));
    }
}
