//! `etcdinit`: prepares the etcd of a cluster before anybody else uses it.
//!
//! [`local`] runs an etcd on an empty data directory; [`crate::rights`] knows what to set in it. Users and
//! roles that exist are corrected, so it can be run again at any time, also over what an interrupted run
//! left behind.

mod local;

use std::io;
use std::path::PathBuf;

use clustermesh_kvstore::cluster::ClusterName;
use clustermesh_kvstore::etcd::{EtcdConfig, EtcdConfigError, Session, SessionError, SessionOptions};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::args::EtcdInitArgs;
use crate::rights::{Rights, apply, found};
use local::LocalEtcd;

/// Prepares the etcd that `args` name, unless `stop` comes first.
///
/// # Errors
/// See [`EtcdInitError`]. It can be run again.
pub async fn run(args: &EtcdInitArgs, stop: CancellationToken) -> Result<(), EtcdInitError> {
    let work = async {
        match &args.etcd_config {
            Some(path) => running(path.clone(), &args.cluster_name).await,
            None => empty(args).await,
        }
    };
    tokio::select! {
        done = timeout(args.timeout.0, work) => done.unwrap_or(Err(EtcdInitError::Timeout(args.timeout.0))),
        () = stop.cancelled() => Err(EtcdInitError::Interrupted),
    }
}

/// Prepares an etcd on an empty data directory.
async fn empty(args: &EtcdInitArgs) -> Result<(), EtcdInitError> {
    local::clear(&args.etcd_data_dir)?;
    let mut etcd = LocalEtcd::start(args)?;
    let session = etcd.session().await?;
    set_rights(&session, &args.cluster_name).await?;
    drop(session);
    etcd.stop().await?;
    tracing::info!(cluster = %args.cluster_name, dir = %args.etcd_data_dir.display(), "etcd is ready to be started");
    Ok(())
}

/// Prepares an etcd that runs.
async fn running(path: PathBuf, cluster: &ClusterName) -> Result<(), EtcdInitError> {
    let config = EtcdConfig::load_with_files(&path)?;
    // Without certificates authentication would lock out everybody, this program first.
    let plain = config.endpoints.iter().find(|endpoint| !endpoint.starts_with("https://"));
    if let Some(endpoint) = plain {
        return Err(EtcdInitError::NoTls(endpoint.clone()));
    }
    if config.cert_file.is_none() {
        return Err(EtcdInitError::NoCertificate(path));
    }
    let session = Session::connect(&config, SessionOptions::default()).await?;
    set_rights(&session, cluster).await?;
    // Who enabled it is subject to it.
    match session.users().await {
        Ok(_) => {
            tracing::info!(%cluster, endpoint = session.endpoint(), "etcd is ready");
            Ok(())
        }
        Err(SessionError::PermissionDenied { .. } | SessionError::Unavailable(_)) => {
            Err(EtcdInitError::LockedOut(cluster.clone()))
        }
        Err(error) => Err(error.into()),
    }
}

async fn set_rights(session: &Session, cluster: &ClusterName) -> Result<(), SessionError> {
    let wanted = Rights::of(cluster);
    let steps = wanted.steps(&found(session, &wanted).await?);
    for step in &steps {
        tracing::debug!(?step, "changing the rights");
        apply(session, step).await?;
    }
    session.enable_auth().await?;
    tracing::info!(changes = steps.len(), "users and roles are set, authentication is enabled");
    Ok(())
}

/// Why an etcd could not be prepared.
#[derive(Debug, thiserror::Error)]
pub enum EtcdInitError {
    /// The operator's: the directory holds what no etcd wrote.
    #[error(
        "{} holds {entry:?}, which is not etcd's: give etcd a directory of its own (--etcd-data-dir); nothing was removed",
        dir.display()
    )]
    ForeignFiles {
        /// `--etcd-data-dir`.
        dir: PathBuf,
        /// What is in it.
        entry: String,
    },
    /// The operator's: an etcd runs on the directory.
    #[error("an etcd runs on {}: stop it first; nothing was removed", .0.display())]
    InUse(PathBuf),
    /// The directory cannot be emptied or made.
    #[error("cannot prepare {}: {error}", path.display())]
    Directory {
        /// What.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// etcd cannot be run.
    #[error("cannot run {}: {error}: is etcd installed? --etcd-binary names another program", program.display())]
    Program {
        /// `--etcd-binary`.
        program: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// etcd ended by itself.
    #[error("etcd {when} ({status}); its last words:\n{log}")]
    Ended {
        /// In which phase.
        when: &'static str,
        /// How.
        status: String,
        /// The end of its log.
        log: String,
    },
    /// The operator's: see there.
    #[error(transparent)]
    Config(#[from] EtcdConfigError),
    /// The operator's: without TLS nobody could log in any more.
    #[error("endpoint {0} has no TLS: users are told apart by their certificates, so use https://")]
    NoTls(String),
    /// The operator's: without a certificate nobody could log in any more.
    #[error("{} names no `cert-file`: users are told apart by their certificates", .0.display())]
    NoCertificate(PathBuf),
    /// All is set, but not for the certificate that was used.
    #[error(
        "users and roles are set and authentication is enabled, but this client's certificate is of no user that may administer etcd: use one with the CN admin-{0} from now on"
    )]
    LockedOut(ClusterName),
    /// etcd's, or the way to it.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// It took too long.
    #[error(
        "not done within {0:?}: the disk or the machine is too slow, or etcd does not answer; --timeout gives it longer"
    )]
    Timeout(std::time::Duration),
    /// A signal.
    #[error("interrupted; run it again before etcd is started")]
    Interrupted,
}

impl EtcdInitError {
    /// Whether flags or files are wrong, rather than the state of the host or of etcd.
    pub const fn is_usage(&self) -> bool {
        matches!(self, Self::ForeignFiles { .. } | Self::Config(_) | Self::NoTls(_) | Self::NoCertificate(_))
    }
}
