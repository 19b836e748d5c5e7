//! Real labs without apiservers and agents: network, pods, etcd, and that nothing of them is left.
//!
//! Needs root and etcd. What the mesh does in a lab is tested by the scenarios in `multi-kind-tests`.

#![allow(clippy::unwrap_used, reason = "a test says enough when it fails")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

const TOPOLOGY: &str = r#"
name: from-the-file
clusters:
- {name: alpha, id: 1, podCIDRs: [10.1.0.0/16, "fd00:10:1::/48"], serviceCIDRs: [10.96.0.0/16, "fd00:10:96::/112"], nodes: 2, manifests: [shop.yaml]}
- {name: beta, id: 2, podCIDRs: [10.2.0.0/16, "fd00:10:2::/48"], serviceCIDRs: [10.96.0.0/16, "fd00:10:96::/112"], nodes: 2, manifests: [shop.yaml]}
images:
- image: example.com/orders:*
  command: [perl, -MIO::Socket::INET, -e, '$s = IO::Socket::INET->new(LocalPort => 8080, Listen => 9, ReuseAddr => 1) or die $!; while ($c = $s->accept) { print $c "${CLUSTER_NAME}/${POD_NAME}"; close $c }']
- {image: example.com/client:*, command: [sleep, infinity]}
- {image: example.com/broken:*, command: [sh, -c, "echo error: no disk; exit 3"]}
"#;

const SHOP: &str = r"
apiVersion: apps/v1
kind: Deployment
metadata: {name: orders, namespace: shop}
spec:
  replicas: 3
  selector: {matchLabels: {app: orders}}
  template:
    metadata: {labels: {app: orders}}
    spec:
      terminationGracePeriodSeconds: 0
      containers: [{name: web, image: 'example.com/orders:1', ports: [{containerPort: 8080}]}]
---
apiVersion: v1
kind: Service
metadata: {name: orders, namespace: shop}
spec: {selector: {app: orders}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: shop}
spec: {nodeName: node1, containers: [{name: main, image: 'example.com/client:1'}]}
";

#[test]
fn a_lab_has_a_network_pods_and_etcds_and_leaves_nothing() {
    let lab = TestLab::new(SHOP);
    lab.ok(&["up", lab.file(), "--name", &lab.name, "--no-mesh"]);

    let again = lab.run(&["up", lab.file(), "--name", &lab.name, "--no-mesh"]);
    assert_eq!(again.status.code(), Some(1));
    assert!(stderr(&again).contains("runs already"), "{}", stderr(&again));

    let status = lab.status();
    let pods = status["clusters"][0]["pods"].as_array().unwrap();
    assert_eq!(pods.len(), 4);
    assert!(pods.iter().all(|pod| pod["status"] == "Ready" && pod["ips"].as_array().unwrap().len() == 2));
    let sibling = pods.iter().find(|pod| pod["node"] == "node1" && pod["name"] != "client").unwrap();

    // A pod reaches its neighbour on the node; its environment says who it is and where services are.
    let ip = sibling["ips"][0].as_str().unwrap();
    let said = lab.ok(&[
        "exec",
        &lab.of("alpha/shop/client"),
        "--",
        "bash",
        "-c",
        &format!("cat < /dev/tcp/{ip}/8080"),
    ]);
    assert_eq!(said, format!("alpha/{}", sibling["name"].as_str().unwrap()));
    let env = lab.ok(&[
        "exec",
        &lab.of("alpha/shop/client"),
        "--",
        "sh",
        "-c",
        "echo $NODE_NAME $ORDERS_SERVICE_HOST",
    ]);
    let service = status["clusters"][0]["services"][0]["clusterIPs"][0].as_str().unwrap();
    assert_eq!(env, format!("node1 {service}"));
    assert_eq!(
        lab.run(&["exec", &lab.of("alpha/shop/client"), "--", "sh", "-c", "exit 7"]).status.code(),
        Some(7)
    );

    // Scaling: the manifests that an apiserver watches follow.
    lab.ok(&["scale", &lab.of("alpha"), "deployment/shop/orders", "1"]);
    assert_eq!(lab.pods("alpha"), ["client", "orders-0"]);
    lab.ok(&["scale", &lab.of("alpha"), "deployment/shop/orders", "2"]);
    assert_eq!(lab.pods("alpha"), ["client", "orders-0", "orders-1"]);
    lab.ok(&["delete", &lab.of("alpha"), "pod/shop/client"]);
    assert_eq!(lab.pods("alpha"), ["orders-0", "orders-1"]);

    // Cables.
    assert!(lab.etcd_answers("alpha/node:node2", "172.31.2.1"));
    lab.ok(&["cut", &lab.of("beta")]);
    assert!(!lab.etcd_answers("alpha/node:node2", "172.31.2.1"), "beta is cut off");
    assert!(lab.etcd_answers("beta/node:node2", "172.31.2.1"), "but whole in itself");
    lab.ok(&["heal", &lab.of("beta")]);
    assert!(lab.etcd_answers("alpha/node:node2", "172.31.2.1"));

    // Processes.
    lab.ok(&["kill", &lab.of("beta"), "etcd"]);
    assert!(!lab.etcd_answers("beta/node:node1", "172.31.2.1"));
    lab.ok(&["start", &lab.of("beta"), "etcd", "--fresh"]);
    assert!(lab.etcd_answers("beta/node:node1", "172.31.2.1"));

    lab.down_leaves_nothing();
}

#[test]
fn a_lab_that_cannot_start_says_why_and_leaves_nothing() {
    for (from, to, expected) in [
        ("example.com/client:1", "example.com/broken:1", "error: no disk"),
        (
            "image: 'example.com/client:1'",
            "image: 'example.com/client:1', ports: [{containerPort: 81}]",
            "shop/client does not listen on TCP [81]",
        ),
    ] {
        let lab = TestLab::new(&SHOP.replace(from, to));
        let failed = lab.run(&["up", lab.file(), "--name", &lab.name, "--no-mesh", "--wait-timeout", "3s"]);
        assert_eq!(failed.status.code(), Some(1));
        let said = stderr(&failed);
        assert!(said.contains(expected), "{said}");
        assert_eq!(said.lines().filter(|line| line.starts_with("error")).count(), 1, "{said}");
        assert_eq!(lab.leftovers(), Vec::<String>::new(), "{said}");
    }
}

#[test]
fn mistakes_in_files_are_found_before_anything_is_touched() {
    for (shop, expected) in [
        (SHOP.replace("example.com/client:1", "example.com/unknown:1"), "no entry of `images`"),
        (SHOP.replace("nodeName: node1", "nodeName: node7"), "no node of cluster alpha"),
        (
            SHOP.replace("{app: orders}, ports", "{app: orders}, clusterIP: 192.0.2.1, ports"),
            "not in serviceCIDRs",
        ),
        (SHOP.replace("replicas: 3", "replicas: three"), "Deployment orders"),
    ] {
        let lab = TestLab::new(&shop);
        let failed = lab.run(&["up", lab.file(), "--name", &lab.name, "--no-mesh"]);
        assert_eq!(failed.status.code(), Some(2), "{}", stderr(&failed));
        assert!(stderr(&failed).contains(expected), "{}", stderr(&failed));
        assert_eq!(lab.leftovers(), Vec::<String>::new());
    }
}

#[test]
fn an_interrupted_start_leaves_nothing() {
    // It never gets ready, so the interruption cannot come too late.
    let shop = SHOP.replace(
        "image: 'example.com/client:1'",
        "image: 'example.com/client:1', ports: [{containerPort: 81}]",
    );
    let lab = TestLab::new(&shop);
    let mut up = lab.command(&["up", lab.file(), "--name", &lab.name, "--no-mesh"]);
    let up = up.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while !lab.leftovers().iter().any(|left| left.ends_with("-beta-shop-client")) {
        assert!(Instant::now() < deadline, "the lab never got as far as its pods");
        std::thread::yield_now();
    }
    rustix::process::kill_process(rustix::process::Pid::from_child(&up), rustix::process::Signal::INT)
        .unwrap();
    let ended = up.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(1));
    assert!(stderr(&ended).contains("interrupted"), "{}", stderr(&ended));
    assert_eq!(lab.leftovers(), Vec::<String>::new());
}

#[test]
fn a_killed_start_is_cleaned_up_by_down() {
    let lab = TestLab::new(SHOP);
    let mut up = lab.command(&["up", lab.file(), "--name", &lab.name, "--no-mesh"]);
    let mut up = up.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while !lab.leftovers().iter().any(|left| left.contains("-alpha-node1")) {
        assert!(Instant::now() < deadline, "the lab never got as far as its nodes");
        std::thread::yield_now();
    }
    up.kill().unwrap();
    up.wait().unwrap();
    assert!(!lab.leftovers().is_empty());
    lab.down_leaves_nothing();
}

/// A lab of a name of its own, removed at the end.
struct TestLab {
    name: String,
    dir: tempfile::TempDir,
    file: String,
}

impl TestLab {
    fn new(shop: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        assert!(rustix::process::geteuid().is_root(), "this test makes network namespaces: run it as root");
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("topology.yaml"), TOPOLOGY).unwrap();
        std::fs::write(dir.path().join("shop.yaml"), shop).unwrap();
        let file = dir.path().join("topology.yaml").display().to_string();
        let name = format!("t{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        Self { name, dir, file }
    }

    fn file(&self) -> &str {
        assert!(self.dir.path().exists());
        &self.file
    }

    /// `CLUSTER/...` of this lab.
    fn of(&self, target: &str) -> String {
        format!("{}/{target}", self.name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_clustermesh"));
        command.arg("lab").args(args).stdin(Stdio::null());
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "lab {}: {}", args.join(" "), stderr(&output));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    fn status(&self) -> Value {
        serde_json::from_str(&self.ok(&["status", &self.name, "-o", "json"])).unwrap()
    }

    /// Names of the pods in the manifests of a cluster.
    fn pods(&self, cluster: &str) -> Vec<String> {
        let file = Path::new("/run/clustermesh/labs").join(self.of(cluster)).join("manifests/shop.pods.yaml");
        let pods: Vec<Value> = serde_saphyr::from_multiple(&std::fs::read_to_string(file).unwrap()).unwrap();
        pods.iter().map(|pod| pod["metadata"]["name"].as_str().unwrap().to_owned()).collect()
    }

    fn etcd_answers(&self, from: &str, address: &str) -> bool {
        let connect = format!("timeout 1 bash -c ': < /dev/tcp/{address}/2379'");
        self.run(&["exec", &self.of(from), "--", "bash", "-c", &connect]).status.success()
    }

    fn down_leaves_nothing(&self) {
        self.ok(&["down", &self.name]);
        assert_eq!(self.leftovers(), Vec::<String>::new());
        let again = self.ok(&["down", &self.name]);
        assert!(again.contains("There is no lab"), "{again}");
    }

    /// Everything on this machine that bears the lab's name.
    fn leftovers(&self) -> Vec<String> {
        let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
        let cgroups = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2")).unwrap();
        let roots = [
            PathBuf::from(cgroups.split(' ').nth(1).unwrap()).join("clustermesh"),
            "/run/clustermesh/labs".into(),
            "/sys/fs/bpf/clustermesh".into(),
            "/run/netns".into(),
        ];
        let entries = roots.iter().flat_map(|root| std::fs::read_dir(root).into_iter().flatten());
        let names = entries.map(|entry| entry.unwrap().path().display().to_string());
        names.filter(|path| path.contains(&self.name)).collect()
    }
}

impl Drop for TestLab {
    fn drop(&mut self) {
        // After a test that failed half-way; otherwise there is nothing left to remove.
        let _ = self.run(&["down", &self.name]);
        let _ =
            std::fs::remove_dir_all(std::env::temp_dir().join(format!("clustermesh-lab-{}-logs", self.name)));
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}
