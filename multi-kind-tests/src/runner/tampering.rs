//! Writes to a node's kernel tables beside its agent.

use super::agents;
use super::steps::Stage;
use crate::lab::Lab;
use crate::scenario::{Tamper, TamperedTable, Tampering};
use anyhow::Context as _;
use aya::maps::{HashMap, Map, MapData};
use ebpf_global_svc_abi::{BackendValue, IpKey, IpValue, SlotKey};
use std::path::Path;
use std::time::{Duration, Instant};

/// Agents of labs have their pins here, by lab, cluster and node.
const PINS: &str = "/sys/fs/bpf/clustermesh";
const PAUSE: Duration = Duration::from_millis(100);

/// Changes all entries, and waits until the agent has counted as many as it put right.
pub(super) fn put_right(stage: &Stage<'_>, tamper: &Tamper) -> anyhow::Result<Option<String>> {
    let lab = stage.lab()?;
    let before = repaired(lab, tamper)?;
    let path = Path::new(PINS).join(lab.name()).join(&tamper.node).join("maps").join(tamper.table.name());
    let map = MapData::from_pin(&path).with_context(|| format!("cannot open {}", path.display()))?;
    let count =
        change(Map::HashMap(map), tamper).with_context(|| format!("cannot change {}", path.display()))?;
    anyhow::ensure!(count > 0, "{} is empty", path.display());
    let begin = Instant::now();
    stage.options.interrupt.retry_until(begin + tamper.within.0, PAUSE, || {
        let after = repaired(lab, tamper)? - before;
        anyhow::ensure!(after >= count, "{after} of {count} entries are put right");
        Ok(())
    })?;
    let (table, done) = (tamper.table.name(), tamper.how.done());
    Ok(Some(format!(
        "{count} entries of {table} {done}, put right after {:.1} s",
        begin.elapsed().as_secs_f64()
    )))
}

/// Entries of the table that the agent has put right since it started.
fn repaired(lab: &Lab, tamper: &Tamper) -> anyhow::Result<u64> {
    let (cluster, node) = tamper.node.split_once('/').context("a node is written CLUSTER/NODE")?;
    let status = agents::status(lab, cluster)?;
    let agent = agents::each(&status).find(|agent| agent["node"] == node);
    let drift = &agent.with_context(|| format!("{cluster} has no node {node}"))?["status"]["kernel_drift"];
    let counts = drift["counts"].as_array().with_context(|| format!("{} is not compared", tamper.node))?;
    let same = |count: &&serde_json::Value| {
        tamper.table.name() == count["table"] && tamper.how.found_as() == count["kind"]
    };
    Ok(counts.iter().find(same).and_then(|count| count["count"].as_u64()).unwrap_or(0))
}

fn change(map: Map, tamper: &Tamper) -> anyhow::Result<u64> {
    match tamper.table {
        TamperedTable::CmIpcache => {
            change_each::<{ size_of::<IpKey>() }, { size_of::<IpValue>() }>(map, tamper.how)
        }
        TamperedTable::CmSlot => {
            change_each::<{ size_of::<SlotKey>() }, { size_of::<u32>() }>(map, tamper.how)
        }
        TamperedTable::CmBackend => {
            change_each::<{ size_of::<u32>() }, { size_of::<BackendValue>() }>(map, tamper.how)
        }
    }
}

fn change_each<const K: usize, const V: usize>(map: Map, how: Tampering) -> anyhow::Result<u64> {
    let mut map = HashMap::<_, [u8; K], [u8; V]>::try_from(map)?;
    // All keys first: a walk begins anew when the entry that it stands on is gone.
    let keys = map.keys().collect::<Result<Vec<_>, _>>()?;
    for key in &keys {
        match how {
            Tampering::Delete => map.remove(key)?,
            Tampering::Zero => map.insert(key, [0; V], 0)?,
        }
    }
    Ok(u64::try_from(keys.len())?)
}

impl TamperedTable {
    fn name(self) -> &'static str {
        match self {
            Self::CmIpcache => "cm_ipcache",
            Self::CmSlot => "cm_slot",
            Self::CmBackend => "cm_backend",
        }
    }
}

impl Tampering {
    fn done(self) -> &'static str {
        match self {
            Self::Delete => "deleted",
            Self::Zero => "zeroed",
        }
    }

    /// What the agent calls it.
    fn found_as(self) -> &'static str {
        match self {
            Self::Delete => "missing",
            Self::Zero => "altered",
        }
    }
}
