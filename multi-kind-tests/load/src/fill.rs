//! `mesh-load fill`.

use crate::cluster::Cluster;
use crate::etcd::{Batch, connect};

#[derive(clap::Args)]
pub(crate) struct FillArgs {
    /// The etcd, as http://HOST:PORT.
    #[arg(long)]
    etcd: String,
    #[command(flatten)]
    cluster: Cluster,
}

pub(crate) async fn run(args: &FillArgs) -> anyhow::Result<()> {
    const TIME: &str = "2026-01-01T00:00:00Z";
    let mut client = connect(&args.etcd).await?;
    let mut batch = Batch::new(&mut client);
    let (cluster, mut keys) = (&args.cluster, 0_u32);
    let heartbeat = ("cilium/.heartbeat".to_owned(), TIME.to_owned());
    let canaries = cluster.canaries().into_iter().map(|canary| (canary, TIME.to_owned()));
    for (key, value) in [cluster.config(), heartbeat].into_iter().chain(cluster.records()).chain(canaries) {
        keys += 1;
        batch.put(key.into_bytes(), value.into_bytes()).await?;
    }
    batch.flush().await?;
    println!("{}", serde_json::json!({"keys": keys}));
    Ok(())
}
