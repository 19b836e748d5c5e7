//! etcds on tmpfs.

use super::Bench;
use super::process::Process;
use crate::bench::interrupt;
use anyhow::{Context as _, bail};
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// An etcd without TLS; killed when dropped.
pub(super) struct Etcd {
    _process: Process,
    dir: PathBuf,
    ip: Ipv4Addr,
    port: u16,
}

impl Etcd {
    /// Starts an empty one on loopback and waits until it answers.
    pub(super) fn start(bench: &Bench, name: &str) -> anyhow::Result<Self> {
        Self::start_at(bench, name, Ipv4Addr::LOCALHOST)
    }

    /// The same for an address of this machine.
    pub(super) fn start_at(bench: &Bench, name: &str, ip: Ipv4Addr) -> anyhow::Result<Self> {
        let dir = bench.scratch.0.join(name);
        fs::create_dir_all(&dir)?;
        let (port, peer) = free_ports(ip)?;
        let (client, peer) = (format!("http://{ip}:{port}"), format!("http://{ip}:{peer}"));
        let arguments = [
            ("--name", "bench".to_owned()),
            ("--data-dir", dir.join("data").display().to_string()),
            ("--listen-client-urls", client.clone()),
            ("--advertise-client-urls", client),
            ("--listen-peer-urls", peer.clone()),
            ("--initial-advertise-peer-urls", peer.clone()),
            ("--initial-cluster", format!("bench={peer}")),
            ("--initial-cluster-token", format!("{name}-{port}")),
            ("--logger", "zap".to_owned()),
            ("--log-outputs", "stderr".to_owned()),
        ];
        let arguments: Vec<String> =
            arguments.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]).collect();
        let process = Process::start(Path::new("etcd"), &arguments, &dir.join("log"))?;
        let etcd = Self { _process: process, dir, ip, port };
        let deadline = Instant::now() + Duration::from_secs(30);
        while !etcd.is_healthy() {
            interrupt::check()?;
            if Instant::now() > deadline {
                let log = fs::read_to_string(etcd.dir.join("log")).unwrap_or_default();
                bail!("etcd does not answer:\n{log}");
            }
            pause();
        }
        Ok(etcd)
    }

    /// It listens long before it has elected itself, which takes up to a second; this read needs a leader.
    fn is_healthy(&self) -> bool {
        let ask = || -> io::Result<String> {
            let mut stream = TcpStream::connect((self.ip, self.port))?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            stream.write_all(b"GET /health HTTP/1.0\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        };
        ask().is_ok_and(|answer| answer.contains(r#""health":"true""#))
    }

    pub(super) fn endpoint(&self) -> String {
        format!("http://{}:{}", self.ip, self.port)
    }

    /// Writes its client configuration.
    pub(super) fn write_config(&self, path: &Path) -> anyhow::Result<()> {
        let yaml = format!("endpoints:\n- {}\n", self.endpoint());
        fs::write(path, yaml).with_context(|| format!("cannot write {}", path.display()))
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        // tmpfs is memory. The process still has the files open; it is killed after this.
        let _ = fs::remove_dir_all(&self.dir);
    }
}

#[expect(clippy::disallowed_methods, reason = "nothing tells when another process answers")]
fn pause() {
    std::thread::sleep(Duration::from_millis(20));
}

fn free_ports(ip: Ipv4Addr) -> anyhow::Result<(u16, u16)> {
    // Both are bound at once, so they differ.
    let (a, b) = (TcpListener::bind((ip, 0))?, TcpListener::bind((ip, 0))?);
    Ok((a.local_addr()?.port(), b.local_addr()?.port()))
}
