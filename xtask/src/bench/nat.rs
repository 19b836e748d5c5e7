//! Services as other systems make them: translated on the client's node, per connection and packet.
//!
//! Rules are installed for a run and removed after it. Left in place they would make connection
//! tracking examine the packets of every other variant in the same namespace too.

use super::exec::{inside, run, run_with_input};
use super::kernel_path::SERVER_VXLAN;
use std::fmt::Write as _;
use std::net::Ipv4Addr;

/// The port on which every service is called.
pub(super) const SERVICE_PORT: u16 = 80;

const TABLE: &str = "cmbench";

/// Who translates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Translator {
    /// One map look-up per connection, the idea behind kube-proxy's nftables mode.
    Nftables,
    /// A chain of rules, as kube-proxy's iptables mode writes it.
    Iptables,
    /// The kernel's own load-balancer, as kube-proxy's IPVS mode sets it up.
    Ipvs,
}

/// The version of IPVS, or why there is none here.
pub(super) fn ipvs() -> Result<String, String> {
    // Fails where it is built in, too; what counts is whether it answers.
    let _ = run("modprobe ip_vs");
    let said = run("ipvsadm --list --numeric").map_err(|error| format!("{error:#}"))?;
    // IP Virtual Server version 1.2.1 (size=4096)
    let version = said.lines().next().unwrap_or_default().split(" (").next().unwrap_or_default();
    Ok(version.to_owned())
}

/// Rules that are in force until dropped.
pub(super) struct Installed<'a> {
    netns: &'a str,
    translator: Translator,
}

impl Translator {
    /// Puts `services` services in force in a namespace; all lead to `port` of the server pod.
    pub(super) fn install(self, netns: &str, services: u16, port: u16) -> anyhow::Result<Installed<'_>> {
        // Made first: a half-installed set is removed as well.
        let installed = Installed { netns, translator: self };
        let (program, rules) = match self {
            Self::Nftables => ("nft -f -", nft_rules(services, port)),
            Self::Iptables => ("iptables-restore --noflush", iptables_rules(services, port)),
            Self::Ipvs => {
                // It takes what is for the node itself; kube-proxy gives a dummy device all addresses.
                run(&format!("ip -n {netns} route add local {SERVICES} dev lo"))?;
                ("ipvsadm --restore", ipvs_rules(services, port))
            }
        };
        run_with_input(&format!("{} {program}", inside(netns)), &rules)?;
        Ok(installed)
    }
}

impl Drop for Installed<'_> {
    fn drop(&mut self) {
        let inside = inside(self.netns);
        // Nothing to delete is what is wanted. Deleting the whole table also takes away the hooks,
        // which iptables itself never does.
        let delete = match self.translator {
            Translator::Nftables => format!("delete table ip {TABLE}\n"),
            Translator::Iptables => {
                let _ = run_with_input(&format!("{inside} iptables-restore"), "*nat\nCOMMIT\n");
                "delete table ip nat\n".to_owned()
            }
            Translator::Ipvs => {
                let _ = run(&format!("{inside} ipvsadm --clear"));
                let _ = run(&format!("ip -n {} route delete local {SERVICES} dev lo", self.netns));
                return;
            }
        };
        let _ = run_with_input(&format!("{inside} nft -f -"), &delete);
    }
}

/// All addresses of services.
const SERVICES: &str = "198.19.0.0/16";

/// Address of the service that is called: the last one, the worst place in a list.
pub(super) fn called(services: u16) -> Ipv4Addr {
    address(services.max(1) - 1)
}

/// Address of the service `number`, counted from 0.
fn address(number: u16) -> Ipv4Addr {
    let [high, low] = number.to_be_bytes();
    Ipv4Addr::new(198, 19, high, low)
}

fn nft_rules(services: u16, port: u16) -> String {
    let mut elements = String::new();
    for service in (0..services).map(address) {
        for protocol in ["tcp", "udp"] {
            let _ = writeln!(
                elements,
                "      {service} . {protocol} . {SERVICE_PORT} : {SERVER_VXLAN} . {port},"
            );
        }
    }
    format!(
        "table ip {TABLE} {{
  map services {{
    type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service
    elements = {{
{elements}    }}
  }}
  chain prerouting {{
    type nat hook prerouting priority dstnat
    dnat ip to ip daddr . meta l4proto . th dport map @services
  }}
}}
"
    )
}

/// In the format of `ipvsadm --save`. It has one endpoint only: it would refuse the same one twice.
fn ipvs_rules(services: u16, port: u16) -> String {
    let mut rules = String::new();
    for service in (0..services).map(address) {
        for flag in ["-t", "-u"] {
            let _ = write!(
                rules,
                "-A {flag} {service}:{SERVICE_PORT} -s rr\n\
                 -a {flag} {service}:{SERVICE_PORT} -r {SERVER_VXLAN}:{port} -m -w 1\n"
            );
        }
    }
    rules
}

/// Two endpoints for each service port, so that the random choice is paid for; both are the same pod.
fn iptables_rules(services: u16, port: u16) -> String {
    let mut chains = String::from(":KUBE-SERVICES - [0:0]\n");
    let mut rules = String::from("-A PREROUTING -j KUBE-SERVICES\n");
    for number in 0..services {
        let service = address(number);
        for protocol in ["tcp", "udp"] {
            let name = format!("{protocol}-{number}");
            let _ = write!(
                chains,
                ":KUBE-SVC-{name} - [0:0]\n:KUBE-SEP-{name}-1 - [0:0]\n:KUBE-SEP-{name}-2 - [0:0]\n"
            );
            let _ = write!(
                rules,
                "-A KUBE-SERVICES -d {service}/32 -p {protocol} -m {protocol} --dport {SERVICE_PORT} \
                 -j KUBE-SVC-{name}\n\
                 -A KUBE-SVC-{name} -m statistic --mode random --probability 0.5 -j KUBE-SEP-{name}-1\n\
                 -A KUBE-SVC-{name} -j KUBE-SEP-{name}-2\n\
                 -A KUBE-SEP-{name}-1 -p {protocol} -j DNAT --to-destination {SERVER_VXLAN}:{port}\n\
                 -A KUBE-SEP-{name}-2 -p {protocol} -j DNAT --to-destination {SERVER_VXLAN}:{port}\n"
            );
        }
    }
    format!("*nat\n{chains}{rules}COMMIT\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_service_has_its_address() {
        assert_eq!(called(1), Ipv4Addr::new(198, 19, 0, 0));
        assert_eq!(called(1000), Ipv4Addr::new(198, 19, 3, 231));
        for services in [1, 10, 300] {
            let last = called(services).to_string();
            assert_eq!(nft_rules(services, 7).matches(" . tcp . 80").count(), usize::from(services));
            assert!(nft_rules(services, 7).contains(&format!("{last} . udp . 80 : 198.18.12.2 . 7")));
            let iptables = iptables_rules(services, 7);
            assert_eq!(iptables.matches("-A KUBE-SERVICES").count(), 2 * usize::from(services));
            assert!(iptables.contains(&format!("-d {last}/32 -p tcp -m tcp --dport 80")));
            let ipvs = ipvs_rules(services, 7);
            assert_eq!(ipvs.lines().count(), 4 * usize::from(services));
            assert!(ipvs.contains(&format!("-a -u {last}:80 -r 198.18.12.2:7 -m")));
        }
    }
}
