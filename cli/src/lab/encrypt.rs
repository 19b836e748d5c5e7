//! Encryption between the nodes of a lab: flags of a cluster's agents.

use super::agent_flags::restart_with;
use super::args::{Between, EncryptArgs, With};
use super::change::lock;
use crate::error::usage;

pub(crate) async fn encrypt(lab: Option<&str>, args: &EncryptArgs) -> anyhow::Result<()> {
    if args.strict && args.between == Between::Off {
        return Err(usage("--strict makes sense with `clusters` or `nodes` only"));
    }
    let (lab, name, _lock) = lock(lab, &args.cluster)?;
    let between = match args.between {
        Between::Off => None,
        Between::Clusters => Some("--encrypt=clusters"),
        Between::Nodes => Some("--encrypt=nodes"),
    };
    let mut flags: Vec<_> = between.into_iter().chain(args.strict.then_some("--encryption-strict")).collect();
    if between.is_some() {
        for (with, flag) in [(With::Wireguard, "--enable-wireguard"), (With::Ipsec, "--enable-ipsec")] {
            flags.extend(args.with.contains(&with).then_some(flag));
        }
    }
    let flags: Vec<_> = flags.into_iter().map(str::to_owned).collect();
    restart_with(&lab, &name, &lab.layout.encryption(&name), &flags, &args.wait).await
}
