//! An etcd that runs for a moment, on loopback.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io;
use std::net::TcpListener;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use clustermesh_kvstore::etcd::{EtcdConfig, Session, SessionOptions, TlsVersion};
use clustermesh_kvstore::virtual_cidrs::VirtualCidrs;
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::time::{sleep, timeout};

use super::EtcdInitError;
use crate::args::EtcdInitArgs;

/// Between two attempts to reach it.
const RETRY: Duration = Duration::from_millis(50);
/// How long it may take to write what it has and end.
const STOP: Duration = Duration::from_secs(30);
/// What of its log an error shows.
const LOG_LINES: usize = 10;

/// Makes `dir` an empty directory. Removes only what an etcd writes, and only if none runs on it.
pub(super) fn clear(dir: &Path) -> Result<(), EtcdInitError> {
    let at = |path: &Path| {
        let path = path.to_owned();
        |error| EtcdInitError::Directory { path, error }
    };
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries.collect::<Result<Vec<_>, _>>().map_err(at(dir))?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return fs::create_dir_all(dir).map_err(at(dir));
        }
        Err(error) => return Err(at(dir)(error)),
    };
    // A volume of its own may have a lost+found, which nobody has to remove.
    let entries = entries.into_iter().filter(|entry| entry.file_name() != "lost+found");
    let (members, others): (Vec<_>, Vec<_>) = entries.partition(|entry| entry.file_name() == "member");
    if let Some(other) = others.first() {
        let entry = other.file_name().to_string_lossy().into_owned();
        return Err(EtcdInitError::ForeignFiles { dir: dir.to_owned(), entry });
    }
    for member in members {
        // An etcd that runs holds a lock on its database.
        if let Ok(database) = File::open(member.path().join("snap/db"))
            && database.try_lock().is_err()
        {
            return Err(EtcdInitError::InUse(dir.to_owned()));
        }
        fs::remove_dir_all(member.path()).map_err(at(&member.path()))?;
    }
    Ok(())
}

/// Ends with this value, and is killed if it was not stopped.
pub(super) struct LocalEtcd {
    child: Child,
    endpoint: String,
    log: Arc<Mutex<VecDeque<String>>>,
}

impl LocalEtcd {
    pub(super) fn start(args: &EtcdInitArgs) -> Result<Self, EtcdInitError> {
        let program = &args.etcd_binary;
        let failed = |error| EtcdInitError::Program { program: program.clone(), error };
        let (client, peer) = free_ports().map_err(failed)?;
        let endpoint = format!("http://127.0.0.1:{client}");
        let name = &args.etcd_cluster_name;
        // The address that etcd remembers of itself, as its default is; it listens elsewhere meanwhile.
        let advertised = "http://localhost:2380";
        let mut child = Command::new(program)
            .arg(format!("--data-dir={}", args.etcd_data_dir.display()))
            .arg(format!("--name={name}"))
            .arg(format!("--listen-client-urls={endpoint}"))
            .arg(format!("--advertise-client-urls={endpoint}"))
            .arg(format!("--listen-peer-urls=http://127.0.0.1:{peer}"))
            .arg(format!("--initial-advertise-peer-urls={advertised}"))
            .arg(format!("--initial-cluster={name}={advertised}"))
            .arg(format!("--initial-cluster-token={}", args.etcd_initial_cluster_token))
            .arg("--initial-cluster-state=new")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        let log = Arc::new(Mutex::new(VecDeque::new()));
        if let Some(stderr) = child.stderr.take() {
            let log = log.clone();
            let mut lines = BufReader::new(stderr).lines();
            // Ends with etcd.
            tokio::spawn(async move {
                while let Ok(Some(line)) = lines.next_line().await {
                    tracing::debug!(target: "etcd", "{line}");
                    let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
                    if log.len() == LOG_LINES {
                        log.pop_front();
                    }
                    log.push_back(line);
                }
            });
        }
        Ok(Self { child, endpoint, log })
    }

    /// Waits until it answers.
    pub(super) async fn session(&mut self) -> Result<Session, EtcdInitError> {
        let config = EtcdConfig {
            endpoints: vec![self.endpoint.clone()],
            trusted_ca_file: None,
            cert_file: None,
            key_file: None,
            username: None,
            password: None,
            tls_min_version: TlsVersion::default(),
            virtual_pod_cidrs: VirtualCidrs::default(),
        };
        loop {
            // The caller has a deadline for all of it.
            match Session::connect(&config, SessionOptions::default()).await {
                Ok(session) => return Ok(session),
                Err(error) => tracing::debug!(%error, "etcd does not answer yet"),
            }
            if let Ok(Some(status)) = self.child.try_wait() {
                return Err(self.ended("ended at once", status).await);
            }
            sleep(RETRY).await;
        }
    }

    /// Lets it write everything and end.
    pub(super) async fn stop(mut self) -> Result<(), EtcdInitError> {
        let pid = self.child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        if let Some(pid) = pid {
            // An error means that it has ended, which the wait below tells.
            let _ended = kill_process(pid, Signal::TERM);
        }
        match timeout(STOP, self.child.wait()).await {
            Ok(Ok(status)) if ended_by_term(status) => Ok(()),
            Ok(Ok(status)) => Err(self.ended("did not end well", status).await),
            Ok(Err(error)) => Err(EtcdInitError::Program { program: "etcd".into(), error }),
            Err(_) => Err(EtcdInitError::Timeout(STOP)),
        }
    }

    async fn ended(&self, when: &'static str, status: ExitStatus) -> EtcdInitError {
        // What it wrote last may still be in the pipe.
        sleep(RETRY).await;
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        let log = log.iter().map(|line| format!("  {line}")).collect::<Vec<_>>().join("\n");
        EtcdInitError::Ended { when, status: status.to_string(), log }
    }
}

/// etcd ends by the signal that it got, after it has closed its files.
fn ended_by_term(status: ExitStatus) -> bool {
    use std::os::unix::process::ExitStatusExt;
    status.success() || status.signal() == Some(Signal::TERM.as_raw())
}

fn free_ports() -> io::Result<(u16, u16)> {
    // Both are bound at once, so they differ.
    let bind = || TcpListener::bind("127.0.0.1:0");
    let (a, b) = (bind()?, bind()?);
    Ok((a.local_addr()?.port(), b.local_addr()?.port()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_an_etcd_left_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("etcd");
        clear(&dir).unwrap();
        fs::create_dir_all(dir.join("member/snap")).unwrap();
        fs::write(dir.join("member/snap/db"), "x").unwrap();
        fs::write(dir.join("passwd"), "x").unwrap();
        let error = clear(&dir).unwrap_err();
        assert!(error.is_usage() && error.to_string().contains("passwd"), "{error}");
        assert!(dir.join("member/snap/db").exists());

        fs::remove_file(dir.join("passwd")).unwrap();
        let running = File::open(dir.join("member/snap/db")).unwrap();
        running.lock().unwrap();
        assert!(matches!(clear(&dir), Err(EtcdInitError::InUse(_))));
        drop(running);
        clear(&dir).unwrap();
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
    }
}
