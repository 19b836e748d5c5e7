//! `fake-kube`: serves a cluster of a certain size, and changes it.
#![forbid(unsafe_code)]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use fake_kube::{Cluster, Load, Server};

/// Serves an API server's view of a made-up cluster.
#[derive(Parser)]
struct Args {
    /// Where to listen; port 0 is a free one.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Write the kubeconfig here.
    #[arg(long)]
    kubeconfig: PathBuf,
    /// Nodes.
    #[arg(long, default_value_t = 100)]
    nodes: usize,
    /// Identities.
    #[arg(long, default_value_t = 200)]
    identities: usize,
    /// Endpoints.
    #[arg(long, default_value_t = 2000)]
    endpoints: usize,
    /// Global services.
    #[arg(long, default_value_t = 200)]
    services: usize,
    /// Backends of each service.
    #[arg(long, default_value_t = 20)]
    backends: usize,
    /// Leave out Cilium's objects.
    #[arg(long)]
    plain: bool,
    /// Changes of endpoints a second.
    #[arg(long, default_value_t = 0)]
    changes: u32,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let cluster = Cluster::new();
    let load = Load {
        nodes: args.nodes,
        identities: args.identities,
        endpoints: args.endpoints,
        services: args.services,
        backends: args.backends,
        cilium: !args.plain,
    };
    load.apply(&cluster);
    let server = Server::start(cluster.clone(), args.listen)
        .await
        .with_context(|| format!("cannot listen on {}", args.listen))?;
    std::fs::write(&args.kubeconfig, server.kubeconfig())
        .with_context(|| format!("cannot write {}", args.kubeconfig.display()))?;
    println!("listening on {}", server.addr());
    if args.changes == 0 || args.endpoints == 0 {
        return std::future::pending().await;
    }
    let mut ticks = tokio::time::interval(Duration::from_secs(1) / args.changes);
    for change in 0.. {
        ticks.tick().await;
        cluster.apply(&load.endpoint(change % args.endpoints, 2 + change / args.endpoints));
    }
    Ok(())
}
