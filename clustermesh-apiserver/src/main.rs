//! `clustermesh-apiserver`: see [`clustermesh_apiserver`].
#![forbid(unsafe_code)]

use std::io::IsTerminal;
use std::process::ExitCode;

use anyhow::Context;
use clustermesh_apiserver::args::{Cli, Command, EtcdInitArgs, ExportArgs, KvstoremeshArgs, LogFormat};
use clustermesh_apiserver::etcdinit::{self, EtcdInitError};
use clustermesh_apiserver::kvstoremesh::server::{self as kvstoremesh, Kvstoremesh};
use clustermesh_apiserver::server::{Server, StartError};
use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let cli = Cli::from_args(std::env::args_os()).unwrap_or_else(|error| error.exit());
    start_logs(cli.log_format());
    let done = match &cli.command {
        Command::Clustermesh(args) => export(args),
        Command::Etcdinit(args) => initialize_etcd(args),
        Command::Kvstoremesh(args) => mirror(args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(if is_usage(&error) { 2 } else { 1 })
        }
    }
}

fn export(args: &ExportArgs) -> anyhow::Result<()> {
    // One thread: it waits most of the time, and each thread would keep memory of its own.
    run(&mut Builder::new_current_thread(), async |stop| {
        let server = Server::start(args).await?;
        tracing::info!(cluster = %args.cluster_name, id = args.cluster_id, source = %args.source, "exporting");
        if let Some(addr) = server.http_addr() {
            tracing::info!(%addr, "serving /metrics, /healthz and /readyz");
        }
        server.run(stop).await?;
        tracing::info!("stopped; what was published stays until the next start, or its lease ends");
        Ok(())
    })
}

fn mirror(args: &KvstoremeshArgs) -> anyhow::Result<()> {
    run(Builder::new_multi_thread().worker_threads(2), async |stop| {
        let kvstoremesh = Kvstoremesh::start(args).await?;
        let dir = args.clustermesh_config.display();
        tracing::info!(cluster = %args.cluster_name, id = args.cluster_id, remotes = %dir, "mirroring");
        if let Some(addr) = kvstoremesh.http_addr() {
            tracing::info!(%addr, "serving /metrics, /healthz and /readyz");
        }
        kvstoremesh.run(stop).await?;
        tracing::info!("stopped; what was mirrored stays until the next start, or its lease ends");
        Ok(())
    })
}

fn initialize_etcd(args: &EtcdInitArgs) -> anyhow::Result<()> {
    run(&mut Builder::new_current_thread(), async |stop| Ok(etcdinit::run(args, stop).await?))
}

/// Whether the operator has to correct flags or files.
fn is_usage(error: &anyhow::Error) -> bool {
    error.downcast_ref::<StartError>().is_some_and(StartError::is_usage)
        || error.downcast_ref::<EtcdInitError>().is_some_and(EtcdInitError::is_usage)
        || error.downcast_ref::<kvstoremesh::StartError>().is_some_and(kvstoremesh::StartError::is_usage)
}

/// Runs a command until it ends, or until a signal makes it.
fn run(
    runtime: &mut Builder,
    command: impl AsyncFnOnce(CancellationToken) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let runtime = runtime.enable_all().build().context("cannot start the runtime")?;
    runtime.block_on(async {
        let stop = CancellationToken::new();
        stop_on_signal(stop.clone())?;
        command(stop).await
    })
}

fn stop_on_signal(stop: CancellationToken) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        stop.cancel();
    });
    Ok(())
}

/// Kubernetes' client library warns of what we say ourselves.
const LOGS: &str = "info,kube_runtime=off,kube_client=off";

fn start_logs(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(LOGS));
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Text => logs.init(),
        LogFormat::Json => logs.json().init(),
    }
}
