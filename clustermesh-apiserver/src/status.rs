//! What the server knows about itself: for `/readyz` and `/metrics`.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use clustermesh_kvstore::key::Kind;
use clustermesh_kvstore::publisher::PublisherStatus;
use clustermesh_kvstore::reflector::ConnectionStatus;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use tokio::sync::watch;

use crate::export::Exporter;
use crate::http::Subject;
use crate::metrics::{Families, number};
use crate::objects::{GapReason, ObjectKind};

/// Shared between the server, which writes, and HTTP, which reads.
#[derive(Debug)]
pub struct Status {
    connection: watch::Receiver<ConnectionStatus>,
    publisher: OnceLock<watch::Receiver<PublisherStatus>>,
    progress: Mutex<Progress>,
}

/// How far the server has come.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    /// The identities that etcd holds are known.
    pub identities_adopted: bool,
    /// The source has handed on everything that it had at the start.
    pub source_synced: bool,
    /// The keys that follow from it are complete; what else is in etcd may go.
    pub state_complete: bool,
    /// Why nothing more can be read from the source at the moment.
    pub source_trouble: Option<String>,
    /// Inputs of the source that are broken now.
    pub broken_inputs: usize,
    /// Objects by kind.
    pub objects: Vec<(ObjectKind, usize)>,
    /// Keys by kind.
    pub keys: Vec<(Kind, usize)>,
    /// Pods for which there is no identity left.
    pub pods_without_identity: usize,
    /// Parts of policies that are not understood, by reason.
    pub policy_gaps: BTreeMap<GapReason, usize>,
    /// Policies with such a part.
    pub flawed_policies: usize,
    /// Changes of the source since the start.
    pub changes: u64,
    /// Things that could not be exported, since the start.
    pub problems: u64,
}

impl Progress {
    /// Takes over the exporter's counts.
    pub fn count(&mut self, exporter: &Exporter) {
        self.objects = ObjectKind::ALL.map(|kind| (kind, exporter.object_count(kind))).into();
        self.keys = Exporter::KINDS.map(|kind| (kind, exporter.published_count(kind))).into();
        self.pods_without_identity = exporter.starved_count();
        self.policy_gaps = exporter.policy_gaps();
        self.flawed_policies = exporter.flawed_policies();
    }
}

impl Status {
    /// The status of a server that has not begun.
    pub fn new(connection: watch::Receiver<ConnectionStatus>) -> Self {
        Self { connection, publisher: OnceLock::new(), progress: Mutex::default() }
    }

    /// From now on there is a publisher. Only the first one counts.
    pub fn set_publisher(&self, publisher: watch::Receiver<PublisherStatus>) {
        let _ = self.publisher.set(publisher);
    }

    /// How far the server has come, to be changed. Held for no longer than a few assignments.
    pub fn progress(&self) -> MutexGuard<'_, Progress> {
        // Plain numbers: nothing is half done if somebody panicked.
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why the cluster's state is not all in etcd yet; `None` once it is.
    pub fn unready(&self) -> Option<String> {
        let progress = self.progress().clone();
        let connection = self.connection.borrow();
        if !connection.connected {
            let error = connection.last_error.as_deref().unwrap_or("not tried yet");
            return Some(format!("etcd is not connected: {error}"));
        }
        if !progress.identities_adopted {
            return Some("reading the identities that etcd holds".to_owned());
        }
        if !progress.source_synced {
            return Some(match &progress.source_trouble {
                Some(trouble) => format!("reading the source: {trouble}"),
                None => "reading the source".to_owned(),
            });
        }
        if !progress.state_complete {
            let broken = progress.broken_inputs;
            return Some(format!("{broken} files of the source are broken; see the logs"));
        }
        let Some(publisher) = self.publisher.get().map(watch::Receiver::borrow) else {
            return Some("nothing was published yet".to_owned());
        };
        // Empty: it has not begun.
        let synced = !publisher.synced.is_empty() && publisher.synced.values().all(|synced| *synced);
        (!synced).then(|| format!("writing to etcd: {} keys are pending", publisher.pending))
    }
}

impl Subject for Status {
    fn unready(&self) -> Option<String> {
        self.unready()
    }
}

impl Collector for Status {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut out = Families { encoder, prefix: "clustermesh_apiserver" };
        let progress = self.progress().clone();
        let objects =
            progress.objects.iter().map(|(kind, count)| ([("kind", kind.as_str())], number(*count)));
        out.gauges("objects", "Objects of the source, by kind", objects)?;
        let keys = progress.keys.iter().map(|(kind, count)| ([("kind", kind.as_str())], number(*count)));
        out.gauges("keys", "Keys that should be in etcd, by kind", keys)?;
        out.gauge(
            "pods_without_identity",
            "Pods for which no identity is left",
            progress.pods_without_identity,
        )?;
        let gaps = progress.policy_gaps.iter();
        let gaps = gaps.map(|(reason, count)| ([("reason", reason.as_str())], number(*count)));
        out.gauges("policy_gaps", "Parts of network policies that are not understood, by reason", gaps)?;
        out.gauge(
            "flawed_policies",
            "Network policies of which a part is not understood",
            progress.flawed_policies,
        )?;
        out.gauge("source_errors", "Inputs of the source that are broken now", progress.broken_inputs)?;
        out.counter("source_changes", "Changes of objects that the source reported", progress.changes)?;
        out.counter("export_problems", "Things that could not be exported", progress.problems)?;
        out.gauge("ready", "Whether all state is in etcd", usize::from(self.unready().is_none()))?;

        let connection = self.connection.borrow().clone();
        out.gauge("etcd_connected", "Whether etcd is connected", usize::from(connection.connected))?;
        out.counter("etcd_reconnects", "Times that etcd was connected again", connection.reconnects)?;
        if let Some(expires) = connection.certificate_expires {
            let left = expires.duration_since(jiff::Timestamp::now()).as_secs_f64();
            out.real("certificate_expiry_seconds", "Time until the client certificate for etcd ends", left)?;
        }

        let Some(publisher) = self.publisher.get().map(|publisher| publisher.borrow().clone()) else {
            return Ok(());
        };
        out.gauge("publisher_pending", "Keys that are yet to be written", publisher.pending)?;
        out.counter("publisher_written", "Keys written", publisher.written)?;
        out.counter("publisher_deleted", "Keys deleted", publisher.deleted)?;
        out.counter("publisher_repaired", "Keys put right that others had changed", publisher.repaired)
    }
}
