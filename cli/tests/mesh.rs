//! connect, disconnect, status and bpf as an operator runs them, against agents with canned answers.

#![allow(clippy::unwrap_used)] // A test; clippy.toml knows only functions marked #[test].

mod fake_agent;

use clustermesh_agent_api::v1::Peer;
use fake_agent::{Answers, Mesh, Ran};
use serde_json::Value;

const CONNECT: [&str; 5] = ["connect", "--context", "alpha", "--destination-context", "beta"];
const DISCONNECT: [&str; 5] = ["disconnect", "--context", "alpha", "--destination-context", "beta"];
const ENTRY: [&str; 4] = ["", ".etcd-client-ca.crt", ".etcd-client.crt", ".etcd-client.key"];

fn with<'a>(args: &[&'a str], more: &[&'a str]) -> Vec<&'a str> {
    [args, more].concat()
}

fn entry(peer: &str) -> Vec<String> {
    ENTRY.map(|suffix| format!("{peer}{suffix}")).into()
}

#[test]
fn connect_and_disconnect() {
    let (mesh, ..) = Mesh::of_two();
    let dry = mesh.run(&with(&CONNECT, &["--dry-run"])).ok();
    assert!(dry.contains("can be connected") && mesh.entries("alpha").is_empty(), "{dry}");

    let text = mesh.run(&with(&CONNECT, &["--wait"])).ok();
    assert!(text.is_ascii(), "symbols are for terminals: {text}");
    assert!(text.contains("[ok]   Connected cluster alpha <=> beta!"), "{text}");
    assert!(text.contains("[ok]   All 2 agents are connected and synced"), "{text}");
    assert_eq!(mesh.entries("alpha"), entry("beta"));
    assert_eq!(mesh.entries("beta"), entry("alpha"));

    let again: Value = serde_json::from_str(&mesh.run(&with(&CONNECT, &["-o", "json"])).ok()).unwrap();
    assert_eq!(again["result"], "already-connected");
    assert_eq!(again["source"]["name"], "alpha");
    assert!(again["checks"].as_array().unwrap().iter().all(|check| check["outcome"] == "pass"), "{again:#}");

    let text = mesh.run(&with(&DISCONNECT, &["--wait"])).ok();
    assert!(text.contains("Disconnected cluster alpha <x> beta!"), "{text}");
    assert!(mesh.entries("alpha").is_empty() && mesh.entries("beta").is_empty());
    assert!(mesh.run(&DISCONNECT).ok().contains("nothing to do"));
}

#[test]
fn disconnect_from_a_cluster_that_is_gone() {
    let (mesh, ..) = Mesh::of_two();
    mesh.run(&CONNECT).ok();
    mesh.run(&with(&DISCONNECT, &["--one-sided"])).ok();
    assert!(mesh.entries("alpha").is_empty());
    assert_eq!(mesh.entries("beta"), entry("alpha"));

    // Half a connection is completed.
    assert!(mesh.run(&CONNECT).ok().contains("only beta has its half"));
    std::fs::remove_file(mesh.dir("beta").join("context.yaml")).unwrap();
    let text = mesh.run(&with(&DISCONNECT, &["--wait"])).ok();
    assert!(text.contains("[warn] Only alpha is changed: no context \"beta\""), "{text}");
    assert!(mesh.entries("alpha").is_empty());
}

#[test]
fn nothing_is_written_if_a_check_fails() {
    let (mesh, alpha, beta) = Mesh::of_two();
    let refused = |what: &str| {
        let ran = mesh.run(&with(&CONNECT, &["--wait"]));
        let error = ran.error(1);
        assert!(error.contains("nothing was written") && error.contains(what), "{error}");
        assert!(ran.stdout.contains("[FAIL]"), "{}", ran.stdout);
        assert!(mesh.entries("alpha").is_empty() && mesh.entries("beta").is_empty());
    };

    beta.lock().unwrap().probe.pod_cidrs = vec!["10.2.0.128/25".into()];
    refused("pod CIDRs overlap: 10.2.0.0/24 of beta and 10.2.0.128/25 of alpha");
    *beta.lock().unwrap() = Answers::of("beta", 2, 1);

    alpha.lock().unwrap().probe.error = "https://beta:2379: connection refused".into();
    refused("alpha/alpha-1 -> etcd of beta: https://beta:2379: connection refused");
    *alpha.lock().unwrap() = Answers::of("alpha", 1, 2);

    beta.lock().unwrap().status.max_connected_clusters = 511;
    refused("max-connected-clusters differs");
    *beta.lock().unwrap() = Answers::of("beta", 2, 1);

    std::fs::remove_file(mesh.dir("beta").join("agent.sock")).unwrap();
    refused("beta: 1 of 1 agents do not answer");
}

#[test]
fn clusters_with_the_same_name_or_id_are_refused() {
    let (mesh, ..) = Mesh::of_two();
    mesh.cluster("gamma", 1, Answers::of("gamma", 1, 1));
    let ran = mesh.run(&["connect", "--context", "alpha", "--destination-context", "gamma"]);
    assert!(ran.error(1).contains("alpha and gamma both have the cluster ID 1"), "{}", ran.stderr);

    let other = mesh.root.path().join("another-alpha");
    std::fs::create_dir(&other).unwrap();
    std::fs::create_dir(other.join("clustermesh")).unwrap();
    let context = std::fs::read_to_string(mesh.dir("alpha").join("context.yaml")).unwrap();
    let paths = context.replace("agent.sock", mesh.dir("alpha").join("agent.sock").to_str().unwrap());
    std::fs::write(other.join("context.yaml"), paths).unwrap();
    for file in ["ca.crt", "remote.crt", "remote.key"] {
        std::fs::copy(mesh.dir("alpha").join(file), other.join(file)).unwrap();
    }
    let ran = mesh.run(&["connect", "--context", "alpha", "--destination-context", other.to_str().unwrap()]);
    assert!(ran.error(1).contains("both clusters are named alpha"), "{}", ran.stderr);
    assert!(mesh.entries("alpha").is_empty());
}

#[test]
fn waiting_ends_with_the_reason_of_each_agent() {
    let (mesh, alpha, _) = Mesh::of_two();
    alpha.lock().unwrap().stuck = Some("certificate signed by unknown authority".into());
    let ran = mesh.run(&with(&CONNECT, &["--wait", "--wait-duration", "300ms"]));
    let error = ran.error(1);
    assert!(error.contains("1 of 2 agents are not"), "{error}");
    assert!(error.contains("alpha/alpha-1: certificate signed by unknown authority"), "{error}");
    assert!(!error.contains("beta-1"), "{error}");
}

#[test]
fn status_of_all_clusters_of_the_lab() {
    let (mesh, alpha, _) = Mesh::of_two();
    let text = mesh.run(&["status"]).ok();
    assert!(text.contains("No cluster connected"), "{text}");
    mesh.run(&CONNECT).ok();
    let text = mesh.run(&["status", "--wait"]).ok();
    for line in [
        "Cluster alpha (ID 1)",
        "Cluster beta (ID 2)",
        "[ok]   All 1 nodes are connected to all clusters [min:1 / avg:1.0 / max:1]",
        "- beta: 1/1 configured, 1/1 connected",
        "Global services: [min:2 / avg:2.0 / max:2]",
        "refused ip: 3 (bad_identity 3), last: 10.9.9.9: identity 99 is not beta's",
        "cm_ipcache 128/512 (25.0%)",
        "Node alpha-1: ready, memory datapath, version 0.1.0, up 3m12s, 20 MiB",
    ] {
        assert!(text.contains(line), "{line}\n{text}");
    }
    assert!(text.is_ascii(), "{text}");
    let text = mesh.run(&["status", "--refused"]).ok();
    assert!(text.contains("ip 10.9.9.9: bad_identity: identity 99 is not beta's"), "{text}");

    let json: Value = serde_json::from_str(&mesh.run(&["status", "-o", "json"]).ok()).unwrap();
    let [a, b] = &json["clusters"].as_array().unwrap()[..] else { panic!("{json:#}") };
    assert_eq!((&a["name"], &b["name"]), (&"alpha".into(), &"beta".into()));
    assert_eq!(a["connectivity"]["clusters"]["beta"]["connected"], 1);
    assert_eq!(a["agents"][0]["status"]["remotes"][0]["kinds"][0]["refused_by_reason"]["bad_identity"], 3);
    assert_eq!(a["agents"][0]["status"]["tables"][0]["max_entries"], 512);

    alpha.lock().unwrap().stuck = Some("connection refused".into());
    let text = mesh.run(&["status", "--context", "alpha"]).ok();
    assert!(text.contains("[warn] 1/1 nodes are not connected to all clusters"), "{text}");
    assert!(text.contains("alpha-1 is not connected to cluster beta: connection refused"), "{text}");
    let ran = mesh.run(&["status", "--wait", "--wait-duration", "300ms"]);
    assert!(ran.error(1).contains("alpha/alpha-1: is not connected to cluster beta: connection refused"));
}

#[test]
fn status_shows_and_reports_an_agent_that_does_not_answer() {
    let (mesh, ..) = Mesh::of_two();
    std::fs::remove_file(mesh.dir("beta").join("agent.sock")).unwrap();
    let ran = mesh.run(&["status"]);
    assert!(ran.error(1).contains("beta/beta-1: cannot reach its agent"), "{}", ran.stderr);
    assert!(ran.stdout.contains("Node alpha-1: ready"), "the others are shown: {}", ran.stdout);
    assert!(ran.stdout.contains("Node beta-1: cannot reach its agent"), "{}", ran.stdout);
    let ran = mesh.run(&["status", "-o", "json"]);
    ran.error(1);
    let json: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert!(json["clusters"][1]["agents"][0]["error"].as_str().unwrap().contains("cannot reach"), "{json:#}");
}

#[test]
fn a_peer_that_is_unready_at_home_is_seen() {
    let (mesh, alpha, _) = Mesh::of_two();
    let own = Peer { last_error: "permission denied".into(), ..Default::default() };
    {
        let mut answers = alpha.lock().unwrap();
        answers.status.ready = false;
        answers.status.own = Some(own);
    }
    let text = mesh.run(&["status", "--context", "alpha"]).ok();
    assert!(text.contains("alpha-1 its own cluster is not synced: permission denied"), "{text}");
}

#[test]
fn bpf_lists_rows_of_all_nodes() {
    let (mesh, ..) = Mesh::of_two();
    let list = ["bpf", "ipcache", "list", "--context", "alpha"];
    let text = mesh.run(&list).ok();
    let words: Vec<Vec<_>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(words[0], ["NODE", "TABLE", "CLUSTER-ID"]);
    assert_eq!(words[1..], [["alpha-1", "ipcache", "1"], ["alpha-1", "ipcache", "2"]]);

    let json = mesh.run(&with(&list, &["-o", "json", "--node", "alpha-1"])).ok();
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json[1], serde_json::json!({"node": "alpha-1", "table": "ipcache", "cluster_id": "2"}));

    let ran = mesh.run(&with(&list, &["--node", "alpha-7"]));
    assert_eq!(ran.error(2), "alpha has no node \"alpha-7\"; it has alpha-1");
    let ran = mesh.run(&["bpf", "sockrev", "list", "--context", "alpha"]);
    assert_eq!(ran.error(1), "alpha/alpha-1: the memory datapath has no sockets");
}

#[test]
fn usage_errors_are_one_line_and_status_2() {
    let (mesh, ..) = Mesh::of_two();
    let ran = mesh.run(&["connect", "--context", "alpha", "--destination-context", "gamma"]);
    assert!(ran.error(2).contains("running: test/alpha, test/beta"), "{}", ran.stderr);
    let ran = mesh.run(&["connect", "--context", "alpha", "--destination-context", "test/alpha"]);
    assert!(ran.error(2).contains("give two clusters"), "{}", ran.stderr);
    let ran = mesh.run(&["disconnect", "--context", "alpha", "--destination-context", "alpha"]);
    assert!(ran.error(2).contains("cannot be disconnected from itself"), "{}", ran.stderr);

    std::fs::remove_file(mesh.dir("beta").join("remote.key")).unwrap();
    let ran = mesh.run(&CONNECT);
    assert!(ran.error(2).contains("remote.key"), "{}", ran.stderr);
    std::fs::write(mesh.dir("beta").join("context.yaml"), "cluster: {name: beta}\n").unwrap();
    let ran = mesh.run(&CONNECT);
    assert!(ran.error(2).contains("beta/context.yaml: "), "{}", ran.stderr);

    let empty = tempfile::tempdir().unwrap();
    assert!(Ran::of(empty.path(), &["status"]).error(2).contains("lab up"));
    for bad in [&["status", "--wait-duration", "soon"][..], &["bpf", "routes", "list", "--context", "alpha"]]
    {
        assert_eq!(mesh.run(bad).code, 2, "{bad:?}");
    }
}

#[test]
fn a_reader_that_has_gone_is_no_error() {
    let (mesh, ..) = Mesh::of_two();
    for args in [
        &["version"][..],
        &["completions", "bash"],
        &["status", "--context", "alpha"],
        &["bpf", "ipcache", "list", "--context", "alpha", "-o", "json"],
    ] {
        let ran = mesh.run_unread(args);
        assert_eq!((ran.code, ran.stderr.as_str()), (0, ""), "{args:?}");
    }
}

#[test]
fn explain_says_what_is_chosen_and_why_not() {
    let (mesh, ..) = Mesh::of_two();
    let explain = ["explain", "service", "shop/orders", "--context", "alpha"];
    let text = mesh.run(&explain).ok();
    for line in [
        "service shop/orders, as alpha/alpha-1 sees it",
        "alpha: chosen, revision 7 of cilium/state/services/v1/alpha/shop/orders",
        "beta: not-chosen",
        "- not used: it is not shared",
    ] {
        assert!(text.contains(line), "{line}\n{text}");
    }
    let json: Value = serde_json::from_str(&mesh.run(&with(&explain, &["-o", "json"])).ok()).unwrap();
    assert_eq!(json[0]["explained"]["clusters"][1]["outcome"], "not-chosen");
    let ran = mesh.run(&with(&explain, &["--node", "alpha-7"]));
    assert!(ran.error(2).contains("alpha has no node"));
    let text = mesh.run(&["explain", "endpoint", "shop/orders-1", "--context", "alpha"]).ok();
    for line in [
        "  beta: refused\n",
        "    10.2.0.1: refused, revision 9 of cilium/state/ip/v1/default/10.2.0.1\n",
        "      node: 192.0.2.9, which the cluster does not have\n",
        "      identity 131373: k8s:app=orders\n",
        "      - outside_pod_cidrs\n",
    ] {
        assert!(text.contains(line), "{line}\n{text}");
    }
}

#[test]
fn policy_check_finds_mistakes_and_says_what_would_change() {
    let (mesh, ..) = Mesh::of_two();
    let file = mesh.root.path().join("policy.yaml");
    let path = file.to_str().unwrap();
    let check = ["policy", "check", "--policy", path];
    std::fs::write(&file, "clusters:\n  beta:\n    pod-cidr: any\n").unwrap();
    let ran = mesh.run(&with(&check, &["--context", "alpha"]));
    assert_eq!(ran.error(2), format!("{path}: 1 mistake"));
    assert!(ran.stdout.starts_with(&format!("{path}:3: ")), "{}", ran.stdout);
    assert!(ran.stdout.contains("did you mean pod-cidrs?"), "{}", ran.stdout);

    std::fs::write(&file, "clusters: {beta: {pod-cidrs: [10.2.0.0/16]}}").unwrap();
    assert_eq!(mesh.run(&check).ok().trim(), format!("{path}: no mistakes"));
    let text = mesh.run(&with(&check, &["--context", "alpha", "--cluster", "beta"])).ok();
    for line in [
        "alpha, as alpha-1 sees the others:\n",
        "  beta:\n",
        "    ip: 9 records, 8 let in now, 7 would be\n",
        "      2 would be refused: outside_pod_cidrs\n        10.9.0.1: 10.9.0.1 is not in it\n        and 1 more\n",
        "      1 are refused now and would come in: namespace_not_allowed\n",
        "      refused as now: bad_json 1\n",
    ] {
        assert!(text.contains(line), "{line}\n{text}");
    }
    assert!(text.is_ascii(), "{text}");
    let ran = mesh.run(&with(&check, &["--context", "alpha", "-o", "json"]));
    assert_eq!(ran.error(1), "not everything could be checked: gamma: its etcd is not connected");
    let json: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(json["contexts"][0]["checked"]["clusters"][0]["kinds"][0]["changes"][0]["count"], 2);
    mesh.run(&["policy", "check", "--policy", "/nonexistent"]).error(2);
}

#[test]
fn flows_of_all_agents_are_shown_in_order() {
    let (mesh, _, _) = Mesh::of_two();
    let shown = mesh.run(&["observe", "-o", "json"]);
    assert_eq!(shown.code, 0, "{}", shown.stderr);
    let nodes = |stdout: &str| {
        let lines = stdout.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        lines
            .filter_map(|line| Some(line.pointer("/flow/node_name")?.as_str()?.to_owned()))
            .collect::<Vec<_>>()
    };
    assert_eq!(nodes(&shown.stdout), ["alpha/alpha-1", "beta/beta-1", "alpha/alpha-1", "beta/beta-1"]);
    assert!(shown.stdout.contains(r#""num_events_lost":"3""#), "{}", shown.stdout);

    let one = mesh.run(&["observe", "--context", "beta", "--last", "1"]);
    assert_eq!((one.code, one.stdout.lines().count()), (0, 1), "{}", one.stdout);
    assert!(one.stdout.ends_with("invalid-source-ip DROPPED (no IP)\n"), "{}", one.stdout);

    let followed = mesh.run(&["observe", "--follow", "--limit", "3", "-o", "json"]);
    assert_eq!(nodes(&followed.stdout), ["alpha/alpha-1", "beta/beta-1", "alpha/alpha-1"]);
    let followed = mesh.run(&["observe", "--follow", "--for", "400ms", "--print-node-name"]);
    assert_eq!((followed.code, followed.stdout.lines().count()), (0, 4), "{}", followed.stdout);
    assert_eq!(followed.stderr.matches("3 flows are missing before this").count(), 2, "{}", followed.stderr);

    assert!(mesh.run(&["observe", "--reason", "nonsense"]).error(1).contains("is no reason"));
    assert!(mesh.run(&["observe", "--node", "none"]).error(2).contains("there are alpha-1, beta-1"));
    assert!(mesh.run(&["observe", "-f", "-o", "table"]).error(2).contains("leave out --follow"));
}
