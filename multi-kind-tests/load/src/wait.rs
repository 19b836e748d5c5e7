//! `mesh-load wait`.

use std::collections::HashSet;

use anyhow::bail;
use etcd_client::{EventType, WatchOptions};

use crate::etcd::{connect, list};

#[derive(clap::Args)]
pub(crate) struct WaitArgs {
    /// The etcd, as http://HOST:PORT.
    #[arg(long)]
    etcd: String,
    /// What the keys begin with.
    #[arg(long)]
    prefix: String,
    /// How many have to be there.
    #[arg(long)]
    count: usize,
}

pub(crate) async fn run(args: &WaitArgs) -> anyhow::Result<()> {
    let mut client = connect(&args.etcd).await?;
    let mut stream = client.watch(args.prefix.as_str(), Some(WatchOptions::new().with_prefix())).await?;
    let mut present = HashSet::new();
    list(&client, &args.prefix, async |key, _| {
        present.insert(key);
        Ok(())
    })
    .await?;
    while present.len() < args.count {
        let Some(message) = stream.message().await? else { bail!("etcd closed the watch") };
        for event in message.events() {
            let Some(kv) = event.kv() else { continue };
            match event.event_type() {
                EventType::Put => drop(present.insert(kv.key().to_vec())),
                EventType::Delete => drop(present.remove(kv.key())),
            }
        }
    }
    Ok(())
}
