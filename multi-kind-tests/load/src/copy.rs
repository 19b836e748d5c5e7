//! `mesh-load copy` and `mesh-load list`.

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

#[derive(clap::Args)]
pub(crate) struct ListArgs {
    /// The etcds to read, as http://HOST:PORT.
    #[arg(long, required = true)]
    from: Vec<String>,
}

/// Reads everything and keeps nothing.
pub(crate) async fn list_all(args: &ListArgs) -> anyhow::Result<()> {
    let begin = Instant::now();
    let mut keys = 0_u64;
    for from in &args.from {
        let from = connect(from).await?;
        list(&from, "", async |_, _| {
            keys += 1;
            Ok(())
        })
        .await?;
    }
    println!("{}", serde_json::json!({"keys": keys, "seconds": begin.elapsed().as_secs_f64()}));
    Ok(())
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
        list(&from, "", copy).await?;
    }
    batch.flush().await?;
    println!("{}", serde_json::json!({"keys": keys, "seconds": begin.elapsed().as_secs_f64()}));
    Ok(())
}
