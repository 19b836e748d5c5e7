//! `cargo xtask bench --kernel`: the same bench by another kernel, in a virtual machine.

use super::BenchArgs;
use crate::vm;

/// What the guest runs. It has no compiler, and the programs lie where scripts find them.
const SCRIPT: &str = r#"#!/bin/sh
output=$1; shift
xtask bench --programs /opt/clustermesh/bin "$@" -o "$output" >/tmp/bench.out ||
    { echo "FAIL  calls"; exit 1; }
sed 's/^/figure:/' /tmp/bench.out
echo "PASS  calls"
"#;
/// Before what the bench says at its end.
const MARK: &str = "figure:";
/// Services as others make them, which labs do without.
const MODULES: &[&str] =
    &["nft_chain_nat", "nft_nat", "nft_compat", "xt_nat", "xt_statistic", "xt_tcpudp", "ip_vs", "ip_vs_rr"];
const TOOLS: &[&str] = &["bridge", "nft", "iptables", "iptables-restore", "ipvsadm"];
/// Extensions of iptables.
const FOLDERS: &[&str] = &["/usr/lib/x86_64-linux-gnu/xtables"];

/// Measures there and prints here.
pub(super) fn run(kernel: &str, args: &BenchArgs) -> anyhow::Result<()> {
    let BenchArgs { rounds, seconds, services, output, .. } = args;
    let script = vm::Script {
        name: "calls",
        text: SCRIPT,
        arguments: &format!("{} --rounds {rounds} --seconds {seconds} --services {services}", output.word()),
        // Of each round some ten ways, each with rules that are put in force and removed: several times what that takes.
        limit: 900 + u64::from(*rounds) * (300 + u64::from(*services)),
        needs: vm::Needs { modules: MODULES, tools: TOOLS, folders: FOLDERS, itself: true },
    };
    let mut result = Vec::new();
    vm::measure(kernel, &script, |line| match line.trim_start().strip_prefix(MARK) {
        Some(line) => result.push(line.to_owned()),
        None => eprintln!("  {line}"),
    })?;
    result.iter().for_each(|line| println!("{line}"));
    Ok(())
}
