//! The whole program between an API server and an etcd, with a cluster of some size.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper that fails fails its test")]

#[path = "../../kvstore/tests/support/member.rs"]
mod member;

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use clustermesh_kvstore::etcd::{EtcdConfig, KeyRange, Session, SessionOptions};
use fake_kube::{Cluster, Load, Server};
use member::{free_ports, member, start};

const DEADLINE: Duration = Duration::from_secs(120);

/// Prints what the export costs. `EXPORT_SIZE=full` is the size of which performance.md speaks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_of_some_size_is_exported() {
    let full = std::env::var("EXPORT_SIZE").is_ok_and(|size| size == "full");
    let (endpoints, services) = if full { (2000, 200) } else { (500, 50) };
    let load = Load { nodes: 20, identities: 200, endpoints, services, backends: 20, cilium: true };
    let cluster = Cluster::new();
    load.apply(&cluster);
    let kube = Server::start(cluster, "127.0.0.1:0".parse().unwrap()).await.unwrap();

    let state = tempfile::tempdir().unwrap();
    let (port, peer_port) = free_ports();
    let client = format!("http://127.0.0.1:{port}");
    let _etcd = Process(start(&mut member("m", &state.path().join("etcd"), &client, peer_port)));
    let config = format!("endpoints: ['{client}']\n");
    let session = connect(&config).await;
    let file = |name: &str, text: &str| {
        std::fs::write(state.path().join(name), text).unwrap();
        format!("{}", state.path().join(name).display())
    };
    let started = Instant::now();
    let apiserver = Command::new(env!("CARGO_BIN_EXE_clustermesh-apiserver"))
        .args(["clustermesh", "--cluster-name=alpha", "--cluster-id=1", "--source=kubernetes"])
        .args(["--kubeconfig", &file("kubeconfig", &kube.kubeconfig())])
        .args(["--etcd-config", &file("etcd.yaml", &config)])
        .stdin(Stdio::null())
        .spawn();
    let apiserver = Process(apiserver.unwrap());
    for canary in ["nodes", "identities", "ip", "services", "serviceexports"] {
        let key = format!("cilium/synced/alpha/cilium/state/{canary}/v1");
        while session.get(&key).await.unwrap().is_none() {
            assert!(started.elapsed() < DEADLINE, "{key} is not there");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
    let took = started.elapsed();
    for (prefix, expected) in [
        ("cilium/state/nodes/v1/alpha/", 20),
        ("cilium/state/identities/v1/id/", 200),
        ("cilium/state/ip/v1/default/", endpoints),
        ("cilium/state/services/v1/alpha/", services),
    ] {
        let page = session.list_page(&KeyRange::of(prefix), None, 10_000, 0).await.unwrap();
        assert_eq!(page.kvs.len(), expected, "{prefix}");
    }
    println!("export of {endpoints} endpoints, {services} services: {took:?}, {}", apiserver.usage());
}

/// Ended when dropped.
struct Process(Child);

impl Process {
    /// Memory and processor time so far, as the kernel counts them.
    fn usage(&self) -> String {
        let read = |name: &str| std::fs::read_to_string(format!("/proc/{}/{name}", self.0.id())).unwrap();
        let peak = read("status").lines().find(|line| line.starts_with("VmHWM")).map(str::to_owned);
        let stat = read("stat");
        let ticks: u64 = stat
            .rsplit(')')
            .next()
            .unwrap()
            .split_whitespace()
            .skip(11)
            .take(2)
            .map(|ticks| ticks.parse::<u64>().unwrap())
            .sum();
        format!(
            "{} ms of CPU, {}",
            ticks * 10,
            peak.unwrap().split_whitespace().collect::<Vec<_>>().join(" ")
        )
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn connect(config: &str) -> Session {
    let config = EtcdConfig::parse(config).unwrap();
    let started = Instant::now();
    loop {
        match Session::connect(&config, SessionOptions::default()).await {
            Ok(session) => return session,
            Err(error) => assert!(started.elapsed() < DEADLINE, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
