//! Flags that say which flows are shown. The agents understand the values, and say what is wrong with one.

use clap::{Args, ValueEnum};
use clustermesh_agent_api::v1::{EndFilter, FlowFilter};

/// Flags of one kind widen, flags of different kinds narrow what is shown.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Filters")]
pub(super) struct FilterArgs {
    /// Only drops and refused calls; short for --verdict DROPPED
    #[arg(long, conflicts_with = "verdict")]
    drops: bool,
    /// Only of this type; may be repeated, as all filters
    #[arg(short = 't', long = "type", value_enum, value_name = "TYPE")]
    types: Vec<FlowType>,
    /// Only what ended so
    #[arg(long, value_enum, value_name = "VERDICT", ignore_case = true)]
    verdict: Vec<FlowVerdict>,
    /// Only drops for this reason, as `clustermesh bpf metrics list` names it
    #[arg(long, value_name = "REASON")]
    reason: Vec<String>,
    /// Only this protocol: tcp, udp, sctp, icmp, icmpv6
    #[arg(long, value_name = "PROTOCOL")]
    protocol: Vec<String>,
    /// Only calls of this service, and packets of sockets that have called it: [NAMESPACE/]NAME, or the beginning of it
    #[arg(long, value_name = "SERVICE")]
    service: Vec<String>,

    /// Identity of the sender
    #[arg(long, value_name = "ID")]
    from_identity: Vec<u32>,
    /// Identity of the receiver
    #[arg(long, value_name = "ID")]
    to_identity: Vec<u32>,
    /// Identity of either
    #[arg(long, value_name = "ID")]
    identity: Vec<u32>,
    /// Name of the sender: [NAMESPACE/]POD, NAMESPACE/, or the beginning of it
    #[arg(long, value_name = "POD")]
    from_pod: Vec<String>,
    /// Name of the receiver
    #[arg(long, value_name = "POD")]
    to_pod: Vec<String>,
    /// Name of either
    #[arg(long, value_name = "POD")]
    pod: Vec<String>,
    /// Address or CIDR of the sender
    #[arg(long, value_name = "IP")]
    from_ip: Vec<String>,
    /// Address or CIDR of the receiver
    #[arg(long, value_name = "IP")]
    to_ip: Vec<String>,
    /// Address or CIDR of either
    #[arg(long, value_name = "IP")]
    ip: Vec<String>,
    /// Label of the sender: [SOURCE:]KEY[=VALUE]
    #[arg(long, value_name = "LABEL")]
    from_label: Vec<String>,
    /// Label of the receiver
    #[arg(long, value_name = "LABEL")]
    to_label: Vec<String>,
    /// Label of either
    #[arg(short = 'l', long, value_name = "LABEL")]
    label: Vec<String>,
    /// Cluster of the sender
    #[arg(long, value_name = "CLUSTER")]
    from_cluster: Vec<String>,
    /// Cluster of the receiver
    #[arg(long, value_name = "CLUSTER")]
    to_cluster: Vec<String>,
    /// Cluster of either
    #[arg(long, value_name = "CLUSTER")]
    cluster: Vec<String>,
    /// Port of the sender
    #[arg(long, value_name = "PORT")]
    from_port: Vec<u16>,
    /// Port of the receiver
    #[arg(long, value_name = "PORT")]
    to_port: Vec<u16>,
    /// Port of either
    #[arg(long, value_name = "PORT")]
    port: Vec<u16>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum FlowType {
    /// Dropped, but not by a policy; refused calls.
    Drop,
    /// Decided by a policy.
    PolicyVerdict,
    /// Passed on.
    Trace,
    /// A socket that calls a service got a backend.
    #[value(alias = "trace-sock")]
    Call,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "UPPER")]
enum FlowVerdict {
    Forwarded,
    Dropped,
    Audit,
    Translated,
}

impl FilterArgs {
    /// As the agents want it.
    pub(super) fn message(&self) -> FlowFilter {
        let verdicts = if self.drops { vec!["DROPPED".to_owned()] } else { words(&self.verdict) };
        FlowFilter {
            types: words(&self.types),
            verdicts,
            reasons: self.reason.clone(),
            from: end(
                &self.from_identity,
                &self.from_pod,
                &self.from_ip,
                &self.from_label,
                &self.from_cluster,
                &self.from_port,
            ),
            to: end(
                &self.to_identity,
                &self.to_pod,
                &self.to_ip,
                &self.to_label,
                &self.to_cluster,
                &self.to_port,
            ),
            either: end(&self.identity, &self.pod, &self.ip, &self.label, &self.cluster, &self.port),
            protocols: self.protocol.clone(),
            services: self.service.clone(),
        }
    }
}

fn end(
    identities: &[u32],
    pods: &[String],
    ips: &[String],
    labels: &[String],
    clusters: &[String],
    ports: &[u16],
) -> Option<EndFilter> {
    Some(EndFilter {
        identities: identities.to_vec(),
        pods: pods.to_vec(),
        ips: ips.to_vec(),
        labels: labels.to_vec(),
        clusters: clusters.to_vec(),
        ports: ports.iter().map(|port| (*port).into()).collect(),
    })
}

fn words<T: ValueEnum>(values: &[T]) -> Vec<String> {
    values.iter().filter_map(|value| Some(value.to_possible_value()?.get_name().to_owned())).collect()
}
