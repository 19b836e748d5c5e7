//! `mesh-load churn` and `mesh-load service`: how long a change takes from one etcd into another, and from
//! there into the kernel.
//!
//! The way between the etcds is a mirror, or, with `--relay`, this process: it watches the one and writes to
//! the other, which is the least that any mirror has to do.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail, ensure};
use etcd_client::{Client, EventType, WatchOptions, WatchStream};
use tokio::sync::mpsc::unbounded_channel;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use crate::cluster::Cluster;
use crate::etcd::connect;
use crate::kernel::{Entry, Watch};

/// No change may take longer.
const LIMIT: Duration = Duration::from_secs(30);

#[derive(clap::Args)]
struct Way {
    /// The etcd to change, as http://HOST:PORT.
    #[arg(long)]
    source: String,
    /// The etcd in which each change is waited for.
    #[arg(long)]
    mirror: String,
    /// Carry the changes over, instead of waiting for a mirror to do it.
    #[arg(long)]
    relay: bool,
    /// Also wait for each change in the kernel: the folder of an agent's pinned maps.
    #[arg(long, value_name = "DIR")]
    kernel: Option<PathBuf>,
    /// ID of that agent's cluster.
    #[arg(long, default_value_t = 255)]
    own_id: u16,
    /// How many changes.
    #[arg(long, default_value_t = 1000)]
    count: u32,
    #[command(flatten)]
    cluster: Cluster,
}

#[derive(clap::Args)]
pub(crate) struct ChurnArgs {
    #[command(flatten)]
    way: Way,
    /// Changes in a second.
    #[arg(long, default_value_t = 5)]
    rate: u32,
}

#[derive(clap::Args)]
pub(crate) struct ServiceArgs {
    #[command(flatten)]
    way: Way,
    /// Backends of the service.
    #[arg(long, default_value_t = 5000)]
    size: u32,
}

/// A write to the source, and what follows from it in the kernel.
struct Change {
    key: String,
    value: String,
    entry: Entry,
}

/// Each change has its own endpoint in turn, so that none overtakes another.
pub(crate) async fn churn(args: &ChurnArgs) -> anyhow::Result<()> {
    let cluster = &args.way.cluster;
    let (endpoints, id) = (cluster.endpoints.max(1), cluster_id(cluster)?);
    let first = first_version();
    let change = |n: u32| {
        let (n, version) = (n % endpoints, first + n / endpoints);
        let (key, value) = cluster.endpoint(n, version);
        let identity = cluster.identity_of(n, version);
        Change { key, value, entry: Entry::Address { cluster: id, ip: cluster.address(n), identity } }
    };
    let cached = format!("cilium/cache/ip/v1/{}/", cluster.name);
    let period = Duration::from_secs(1) / args.rate.max(1);
    measure(&args.way, "cilium/state/ip/v1/default/", &cached, Some(period), change).await
}

/// Of the first service, which is a large one from then on.
pub(crate) async fn service(args: &ServiceArgs) -> anyhow::Result<()> {
    let cluster = &args.way.cluster;
    let (first, id, own) = (first_version(), cluster_id(cluster)?, args.way.own_id);
    let (ip, port) = Cluster::frontend(0);
    let change = |n: u32| {
        // Of version 0 no backend is missing.
        let (version, count) = if n.is_multiple_of(2) { (first + n, args.size - 1) } else { (0, args.size) };
        let (key, value) = cluster.service("service-0", args.size, version);
        Change { key, value, entry: Entry::Frontend { own, ip, port, cluster: id, count } }
    };
    let state = format!("cilium/state/services/v1/{}/", cluster.name);
    let cached = format!("cilium/cache/services/v1/{}/", cluster.name);
    measure(&args.way, &state, &cached, None, change).await
}

fn cluster_id(cluster: &Cluster) -> anyhow::Result<u16> {
    u16::try_from(cluster.id).with_context(|| format!("{} is no cluster ID", cluster.id))
}

/// Of this run: a value that stood before would be no change, and a mirror would not write it.
fn first_version() -> u32 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    // A second has room for more changes than are made in it, so that two runs never share a value.
    u32::try_from(now.as_secs() % 1_000_000 * 1000).unwrap_or(0) + 1
}

/// Makes changes, one after the other or with a period, and prints how long they took.
async fn measure(
    way: &Way,
    from: &str,
    to: &str,
    period: Option<Duration>,
    change: impl Fn(u32) -> Change,
) -> anyhow::Result<()> {
    let mut source = connect(&way.source).await?;
    let relay = match way.relay {
        true => Some(relay(&way.source, &way.mirror, from, to).await?),
        false => None,
    };
    let mut arrivals = watch(&mut connect(&way.mirror).await?, to).await?;
    let (entries, expected) = mpsc::channel();
    let (seen, mut installed) = unbounded_channel();
    if let Some(pins) = &way.kernel {
        Watch::start(pins, expected, seen)?;
    }
    let mut ticks = interval(period.unwrap_or(Duration::from_millis(1)));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut begun: Vec<Instant> = Vec::new();
    let mut under_way: HashMap<Vec<u8>, (Vec<u8>, u32)> = HashMap::new();
    let (mut hops, mut ends) = (Vec::new(), Vec::new());
    let mut bytes = 0;
    // The client handles one request at a time; a put must not wait for the answer to the one before.
    let mut puts = tokio::task::JoinSet::new();
    let count = way.count as usize;
    let wanted_ends = |changes| if way.kernel.is_some() { changes } else { 0 };
    while hops.len() < count || ends.len() < wanted_ends(count) {
        let is_idle = hops.len() == begun.len() && ends.len() == wanted_ends(begun.len());
        tokio::select! {
            _ = ticks.tick(), if begun.len() < count && (period.is_some() || is_idle) => {
                let number = u32::try_from(begun.len())?;
                let Change { key, value, entry } = change(number);
                bytes = value.len();
                let suffix = key.strip_prefix(from).context("the key is not below its prefix")?;
                under_way.insert(suffix.as_bytes().to_vec(), (value.clone().into_bytes(), number));
                let mut client = source.kv_client();
                begun.push(Instant::now());
                puts.spawn(async move { client.put(key, value, None).await });
                if way.kernel.is_some() {
                    entries.send((number, entry)).context("nobody looks at the kernel any more")?;
                }
            }
            Some(put) = puts.join_next() => drop(put??),
            Some(end) = installed.recv() => {
                let (number, at) = end?;
                ends.push(at - begun[number as usize].into_std());
            }
            message = timeout(LIMIT, arrivals.message()) => {
                let message = message.context("a change has not arrived in 30 s")??;
                let now = Instant::now();
                for event in message.context("etcd closed the watch")?.events() {
                    let Some(kv) = event.kv() else { continue };
                    let suffix = kv.key().get(to.len()..).unwrap_or_default();
                    if under_way.get(suffix).is_some_and(|(value, _)| value == kv.value())
                        && let Some((_, number)) = under_way.remove(suffix)
                    {
                        hops.push(now - begun[number as usize]);
                    }
                }
            }
        }
    }
    if let Some(relay) = relay {
        ensure!(!relay.is_finished(), "the relay ended early");
        relay.abort();
    }
    source.status().await?;
    let mut result = percentiles(hops);
    result["changes"] = count.into();
    result["bytes"] = bytes.into();
    if way.kernel.is_some() {
        result["kernel"] = percentiles(ends);
    }
    println!("{result}");
    Ok(())
}

fn percentiles(mut times: Vec<Duration>) -> serde_json::Value {
    times.sort();
    let at = |percent: usize| {
        let last = times.len().saturating_sub(1);
        times.get(last * percent / 100).map(|time| time.as_secs_f64() * 1000.0)
    };
    serde_json::json!({"p50_ms": at(50), "p99_ms": at(99), "max_ms": at(100)})
}

async fn watch(client: &mut Client, prefix: &str) -> anyhow::Result<WatchStream> {
    let mut watch = client.watch_client().max_decoding_message_size(64 << 20);
    let mut stream = watch.watch(prefix, Some(WatchOptions::new().with_prefix())).await?;
    // Nothing may change before the watch stands.
    match stream.message().await? {
        Some(message) if message.created() => Ok(stream),
        _ => bail!("etcd does not watch {prefix}"),
    }
}

/// Carries changes from one prefix to another, one write for each.
async fn relay(
    source: &str,
    mirror: &str,
    from: &str,
    to: &str,
) -> anyhow::Result<tokio::task::JoinHandle<anyhow::Result<()>>> {
    let mut events = watch(&mut connect(source).await?, from).await?;
    let mirror = connect(mirror).await?;
    let (from, to) = (from.len(), to.as_bytes().to_vec());
    Ok(tokio::spawn(async move {
        while let Some(message) = events.message().await? {
            for event in message.events() {
                let Some(kv) = event.kv().filter(|_| event.event_type() == EventType::Put) else { continue };
                let key = [&to[..], kv.key().get(from..).unwrap_or_default()].concat();
                let (mut client, value) = (mirror.kv_client(), kv.value().to_vec());
                tokio::spawn(async move { client.put(key, value, None).await });
            }
        }
        Ok(())
    }))
}
