//! `mesh-load churn` and `mesh-load service`: how long a change takes from one etcd into another.
//!
//! The way between them is a mirror, or, with `--relay`, this process: it watches the one and writes to
//! the other, which is the least that any mirror has to do.

use std::collections::HashMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail, ensure};
use etcd_client::{Client, EventType, WatchOptions, WatchStream};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use crate::cluster::Cluster;
use crate::etcd::connect;

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

/// Each change has its own endpoint in turn, so that none overtakes another.
pub(crate) async fn churn(args: &ChurnArgs) -> anyhow::Result<()> {
    let cluster = &args.way.cluster;
    let endpoints = cluster.endpoints.max(1);
    let first = first_version();
    let change = |n: u32| cluster.endpoint(n % endpoints, first + n / endpoints);
    let cached = format!("cilium/cache/ip/v1/{}/", cluster.name);
    let period = Duration::from_secs(1) / args.rate.max(1);
    measure(&args.way, "cilium/state/ip/v1/default/", &cached, Some(period), change).await
}

pub(crate) async fn service(args: &ServiceArgs) -> anyhow::Result<()> {
    let cluster = &args.way.cluster;
    let first = first_version();
    let change = |n: u32| cluster.service("large", args.size, first + n);
    let state = format!("cilium/state/services/v1/{}/", cluster.name);
    let cached = format!("cilium/cache/services/v1/{}/", cluster.name);
    measure(&args.way, &state, &cached, None, change).await
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
    change: impl Fn(u32) -> (String, String),
) -> anyhow::Result<()> {
    let mut source = connect(&way.source).await?;
    let relay = match way.relay {
        true => Some(relay(&way.source, &way.mirror, from, to).await?),
        false => None,
    };
    let mut arrivals = watch(&mut connect(&way.mirror).await?, to).await?;
    let mut ticks = interval(period.unwrap_or(Duration::from_millis(1)));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut under_way: HashMap<Vec<u8>, (Vec<u8>, Instant)> = HashMap::new();
    let mut times = Vec::new();
    let mut sent = 0;
    let mut bytes = 0;
    // The client handles one request at a time; a put must not wait for the answer to the one before.
    let mut puts = tokio::task::JoinSet::new();
    while times.len() < way.count as usize {
        let may_send = sent < way.count && (period.is_some() || under_way.is_empty());
        tokio::select! {
            _ = ticks.tick(), if may_send => {
                let (key, value) = change(sent);
                bytes = value.len();
                sent += 1;
                let suffix = key.strip_prefix(from).context("the key is not below its prefix")?;
                let now = Instant::now();
                under_way.insert(suffix.as_bytes().to_vec(), (value.clone().into_bytes(), now));
                let mut client = source.kv_client();
                puts.spawn(async move { client.put(key, value, None).await });
            }
            Some(put) = puts.join_next() => drop(put??),
            message = timeout(LIMIT, arrivals.message()) => {
                let message = message.context("a change has not arrived in 30 s")??;
                let now = Instant::now();
                for event in message.context("etcd closed the watch")?.events() {
                    let Some(kv) = event.kv() else { continue };
                    let suffix = kv.key().get(to.len()..).unwrap_or_default();
                    if under_way.get(suffix).is_some_and(|(value, _)| value == kv.value())
                        && let Some((_, begin)) = under_way.remove(suffix)
                    {
                        times.push(now - begin);
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
    times.sort();
    let percentile = |percent: usize| times[(times.len() - 1) * percent / 100].as_secs_f64() * 1000.0;
    println!(
        "{}",
        serde_json::json!({
            "changes": times.len(),
            "bytes": bytes,
            "p50_ms": percentile(50),
            "p99_ms": percentile(99),
            "max_ms": percentile(100),
        })
    );
    Ok(())
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
