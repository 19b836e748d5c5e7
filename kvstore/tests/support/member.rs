//! The only member of an etcd cluster, as a command, and ports for it.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part of this module")]

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// An `etcd` that serves clients at the URL `client`, to be given more arguments and to be started.
///
/// Nobody connects to the peer port of a single member, but it wants one.
pub fn member(name: &str, data: &Path, client: &str, peer_port: u16) -> Command {
    let peer = format!("http://127.0.0.1:{peer_port}");
    let mut command = Command::new("etcd");
    command
        .args(["--name", name, "--logger", "zap", "--log-outputs", "stderr", "--data-dir"])
        .arg(data)
        .args(["--listen-client-urls", client, "--advertise-client-urls", client])
        .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
        .args(["--initial-cluster", &format!("{name}={peer}")])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
}

/// Starts it.
pub fn start(command: &mut Command) -> Child {
    command.spawn().expect("these tests need `etcd` in PATH (Debian: etcd-server)")
}

/// A port for clients and another one for peers.
pub fn free_ports() -> (u16, u16) {
    // Both are bound at once, so they differ.
    let (a, b) = (free_listener(), free_listener());
    (a.local_addr().unwrap().port(), b.local_addr().unwrap().port())
}

/// A listener below the ports that the system hands out to connections: one of these might take a port of
/// that range between this and the start of who is to listen on it.
fn free_listener() -> TcpListener {
    loop {
        let random = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), ());
        if let Ok(listener) =
            TcpListener::bind(("127.0.0.1", 10_000 + u16::try_from(random % 20_000).unwrap()))
        {
            return listener;
        }
    }
}
