//! `mesh-load copy`.

use std::time::Instant;

use crate::etcd::{Batch, connect, list};

#[derive(clap::Args)]
pub(crate) struct CopyArgs {
    /// The etcds to read, as http://HOST:PORT.
    #[arg(long, required = true)]
    from: Vec<String>,
    /// The etcd to write.
    #[arg(long)]
    to: String,
}

pub(crate) async fn run(args: &CopyArgs) -> anyhow::Result<()> {
    let mut to = connect(&args.to).await?;
    let begin = Instant::now();
    let mut keys = 0_u64;
    let mut batch = Batch::new(&mut to);
    for from in &args.from {
        let from = connect(from).await?;
        let copy = async |key, value| {
            keys += 1;
            batch.put(key, value).await
        };
        list(&from, "cilium/", copy).await?;
    }
    batch.flush().await?;
    println!("{}", serde_json::json!({"keys": keys, "seconds": begin.elapsed().as_secs_f64()}));
    Ok(())
}
