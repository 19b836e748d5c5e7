//! The report for people. Summary lines read like those of Cilium's status.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use clustermesh_agent_api::v1::{
    Conflict, KernelDrift, KindStatus, Liveness, LocalCounts, Peer, StatusResponse, TableFill,
};

use super::report::{AgentReport, ClusterReport, Connectivity, Report, why_not_ready};
use crate::mesh::plan::Outcome;
use crate::mesh::terminal::{Style, Tone, one_line};

/// Conflicts that are shown of an agent, the newest first; `-o json` has more.
const CONFLICTS: usize = 32;

/// The whole report.
pub(crate) fn render(report: &Report, style: Style) -> String {
    let clusters = report.clusters.iter().map(|cluster| Text { style, out: String::new() }.cluster(cluster));
    clusters.collect::<Vec<_>>().join("\n")
}

pub(super) struct Text {
    pub(super) style: Style,
    pub(super) out: String,
}

impl Text {
    fn cluster(mut self, cluster: &ClusterReport) -> String {
        self.line(0, format!("Cluster {} (ID {})", cluster.name, cluster.id));
        self.connectivity(&cluster.connectivity);
        if let Some(mirror) = &cluster.kvstoremesh {
            self.mirror(mirror);
        }
        for agent in &cluster.agents {
            self.agent(agent);
        }
        self.out
    }

    fn connectivity(&mut self, found: &Connectivity) {
        let (total, spread) = (found.total, &found.connected);
        if !found.clusters.is_empty() {
            if found.not_ready == 0 {
                let mark = self.style.mark(Outcome::Pass);
                self.line(1, format!("{mark} All {total} nodes are connected to all clusters {spread}"));
            } else {
                let (mark, n) = (self.style.mark(Outcome::Warn), found.not_ready);
                self.line(1, format!("{mark} {n}/{total} nodes are not connected to all clusters {spread}"));
            }
        }
        let plug = self.style.pick("🔌 ", "");
        if found.clusters.is_empty() {
            self.line(1, format!("{plug}No cluster connected"));
        } else {
            self.line(1, format!("{plug}Cluster Connections:"));
            for (name, counts) in &found.clusters {
                let (configured, connected) = (counts.configured, counts.connected);
                self.line(
                    2,
                    format!("- {name}: {configured}/{total} configured, {connected}/{total} connected"),
                );
            }
        }
        let services = self.style.pick("🔀 ", "");
        self.line(1, format!("{services}Global services: {}", found.global_services));
        if !found.errors.is_empty() {
            let mark = self.style.mark(Outcome::Fail);
            let n = found.errors.len();
            self.line(1, format!("{mark} {n} {}:", if n == 1 { "error" } else { "errors" }));
            for error in &found.errors {
                let text = self.style.paint(Tone::Bad, &format!("{} {error}", error.node));
                self.line(2, format!("- {text}"));
            }
        }
    }

    fn agent(&mut self, agent: &AgentReport) {
        let Some(status) = &agent.status else {
            let text = self.style.paint(Tone::Bad, agent.error.as_deref().unwrap_or_default());
            self.line(1, format!("Node {}: {text}", agent.node));
            return;
        };
        let state = self.word(status.ready);
        self.line(1, format!("Node {}: {state}{}", agent.node, about(status)));
        if !status.datapath_error.is_empty() {
            let text = self.style.paint(Tone::Bad, &one_line(&status.datapath_error));
            self.line(2, format!("datapath: {text} ({} changes pending)", status.pending_changes));
        } else if status.pending_changes > 0 {
            self.line(2, format!("datapath: {} changes pending", status.pending_changes));
        }
        if let Some(drift) = &status.kernel_drift {
            self.kernel_drift(drift);
        }
        if let Some(encryption) = &status.encryption {
            self.encryption(encryption);
        }
        if !status.import_policy_error.is_empty() {
            let text = format!(
                "import policy: {}; the one before stays in force",
                one_line(&status.import_policy_error)
            );
            self.line(2, self.style.paint(Tone::Bad, &text));
        }
        if let Some(local) = &status.local {
            self.line(2, format!("local: {}", counts(local)));
        }
        if let Some(own) = &status.own {
            self.peer(own, "own etcd");
        }
        for peer in &status.remotes {
            let title = match peer.cluster_id {
                0 => peer.name.clone(),
                id => format!("{} (ID {id})", peer.name),
            };
            self.peer(peer, &title);
        }
        self.conflicts(status);
        if !status.tables.is_empty() {
            let fills: Vec<_> = status.tables.iter().map(|table| self.fill(table)).collect();
            self.line(2, format!("maps: {}", fills.join(", ")));
        }
    }

    /// Whether the kernel's tables are as the agent wrote them.
    fn kernel_drift(&mut self, drift: &KernelDrift) {
        if !drift.error.is_empty() {
            let text = format!("kernel: not all tables compared: {}", one_line(&drift.error));
            self.line(2, self.style.paint(Tone::Bad, &text));
        } else if drift.repaired == 0 {
            self.line(2, if drift.scans == 0 { "kernel: not compared yet" } else { "kernel: in sync" });
        }
        if drift.repaired > 0 {
            let entries = if drift.repaired == 1 { "entry" } else { "entries" };
            let (n, ago) = (drift.repaired, age(drift.last_age_ms));
            self.line(2, format!("kernel: {n} {entries} repaired, last {ago} ago"));
        }
    }

    /// What one cluster claims and another one holds: it is refused as long as both claim it.
    fn conflicts(&mut self, status: &StatusResponse) {
        let mut newest: Vec<_> = status.conflicts.iter().collect();
        newest.sort_by_key(|conflict| conflict.age_ms);
        for conflict in newest.iter().take(CONFLICTS) {
            let Conflict { cluster_id, claim, holder_id, cluster, holder, age_ms } = conflict;
            let name = |name: &str, id: &u32| match name {
                "" => format!("cluster {id}"),
                name => one_line(name),
            };
            let text = format!(
                "conflict: {} claims {}, which {} holds, for {}",
                name(cluster, cluster_id),
                one_line(claim),
                name(holder, holder_id),
                age(*age_ms)
            );
            self.line(2, self.style.paint(Tone::Bad, &text));
        }
        if newest.len() > CONFLICTS {
            let text = format!("conflict: and {} older ones", newest.len() - CONFLICTS);
            self.line(2, self.style.paint(Tone::Bad, &text));
        }
        if status.backend_conflicts > 0 {
            let text = format!(
                "conflict: {} backends left out, their addresses are another cluster's",
                status.backend_conflicts
            );
            self.line(2, self.style.paint(Tone::Bad, &text));
        }
        if status.clusters_left_out > 0 {
            let text =
                format!("{} times a service had no room for another cluster", status.clusters_left_out);
            self.line(2, self.style.paint(Tone::Doubtful, &text));
        }
    }

    fn peer(&mut self, peer: &Peer, title: &str) {
        let mut line = format!("{title}: {}", self.word(peer.ready));
        let why = if peer.ready { String::new() } else { why_not_ready(peer) };
        if !why.is_empty() {
            let _ = write!(line, " ({why})");
        }
        if peer.connected || peer.last_event_age_ms > 0 {
            let _ = write!(line, ", last event {} ago", age(peer.last_event_age_ms));
        }
        let reconnects = if peer.reconnects == 1 { "reconnect" } else { "reconnects" };
        let _ = write!(line, ", {} {reconnects}", peer.reconnects);
        if peer.cached {
            line += ", through kvstoremesh";
        }
        self.line(2, line);
        if let Some(liveness) = &peer.liveness {
            self.line(3, self.liveness(liveness));
        }
        let kinds: Vec<_> = peer.kinds.iter().map(|kind| self.kind(kind)).collect();
        if !kinds.is_empty() {
            self.line(3, kinds.join(", "));
        }
        self.digests(peer);
        for kind in &peer.kinds {
            self.refusals(kind);
        }
        let text = one_line(&peer.last_error);
        // What holds the cluster up now is said above.
        if !text.is_empty() && text != why {
            let when = if peer.ready { "recovered from an error" } else { "last error" };
            self.line(3, format!("{when} {} ago: {text}", age(peer.last_error_age_ms)));
        }
    }

    /// Whether all is as the cluster's exporter states, and how long its changes took.
    fn digests(&mut self, peer: &Peer) {
        let verdict = |kind: &KindStatus| kind.digest.as_ref().map(|digest| one_line(&digest.verdict));
        let verdicts: Vec<_> =
            peer.kinds.iter().filter_map(|kind| Some((&kind.kind, verdict(kind)?))).collect();
        if verdicts.iter().all(|(_, verdict)| verdict == "in-sync") {
            if !verdicts.is_empty() {
                self.line(3, "digests in sync");
            }
        } else if !verdicts.iter().all(|(_, verdict)| verdict == "unknown") {
            let differs = verdicts.iter().any(|(_, verdict)| verdict == "differs");
            let all: Vec<_> = verdicts.iter().map(|(kind, verdict)| format!("{kind} {verdict}")).collect();
            let text = format!("digests: {}", all.join(", "));
            self.line(3, if differs { self.style.paint(Tone::Doubtful, &text) } else { text });
        }
        let traced: Vec<_> = peer.kinds.iter().filter_map(propagation).collect();
        if !traced.is_empty() {
            self.line(3, format!("from event to kernel: {}", traced.join(", ")));
        }
    }

    /// What the import policy refused, by reason, and the keys if they were asked for.
    fn refusals(&mut self, kind: &KindStatus) {
        for (verb, counts) in
            [("refused", &kind.refused_by_reason), ("would refuse", &kind.audited_by_reason)]
        {
            if let Some(text) = refused(verb, kind, counts) {
                self.line(3, self.style.paint(Tone::Doubtful, &text));
            }
        }
        if kind.misplaced > 0 {
            let text = format!("{} addresses name a node that the cluster does not have", kind.misplaced);
            self.line(3, self.style.paint(Tone::Doubtful, &text));
        }
        for refused in &kind.newest_refused {
            let note = if refused.audited { " (let in, the policy is only audited)" } else { "" };
            let (key, detail) = (one_line(&refused.key), one_line(&refused.detail));
            self.line(4, format!("{} {key}: {}: {detail}{note}", kind.kind, one_line(&refused.reason)));
        }
    }

    /// How the cluster is, seen from the node, since when and why.
    fn liveness(&self, liveness: &Liveness) -> String {
        let tone = match liveness.health.as_str() {
            "healthy" => Tone::Good,
            "dead" => Tone::Bad,
            _ => Tone::Doubtful,
        };
        let mut text = self.style.paint(tone, &one_line(&liveness.health));
        let _ = write!(text, " for {}", age(liveness.age_ms));
        if !liveness.reason.is_empty() {
            let _ = write!(text, ": {}", one_line(&liveness.reason));
        }
        text
    }

    fn kind(&self, kind: &KindStatus) -> String {
        let text = format!("{} {}", kind.kind, kind.records);
        if kind.synced { text } else { self.style.paint(Tone::Doubtful, &format!("{text} (not synced)")) }
    }

    /// Entries of capacity. A map that is full refuses new services or pods.
    fn fill(&self, table: &TableFill) -> String {
        let TableFill { name, entries, max_entries } = table;
        // In tenths, without floating point; widened, since both are the agent's word.
        let tenths = u128::from(*entries) * 1000 / u128::from((*max_entries).max(1));
        let tone = match tenths {
            900.. => Tone::Bad,
            750.. => Tone::Doubtful,
            _ => Tone::Good,
        };
        let percent = format!("{}.{}%", tenths / 10, tenths % 10);
        format!("{name} {entries}/{max_entries} ({})", self.style.paint(tone, &percent))
    }

    pub(super) fn word(&self, ready: bool) -> String {
        if ready { self.style.paint(Tone::Good, "ready") } else { self.style.paint(Tone::Bad, "not ready") }
    }

    pub(super) fn line(&mut self, depth: usize, text: impl AsRef<str>) {
        let _ = writeln!(self.out, "{:1$}{2}", "", depth * 2, text.as_ref());
    }
}

/// Version, datapath, uptime, memory.
fn about(status: &StatusResponse) -> String {
    let mut text = format!(
        ", {} datapath, version {}, up {}",
        status.datapath,
        status.version,
        age(status.uptime_seconds.saturating_mul(1000))
    );
    if status.resident_bytes > 0 {
        let _ = write!(text, ", {} MiB", status.resident_bytes / (1024 * 1024));
    }
    text
}

fn counts(local: &LocalCounts) -> String {
    format!(
        "{} identities, {} endpoints, {} services ({} global), {} nodes, {} backends",
        local.identities, local.endpoints, local.services, local.global_services, local.nodes, local.backends
    )
}

fn propagation(kind: &KindStatus) -> Option<String> {
    let times = kind.propagation.as_ref().filter(|times| times.count > 0)?;
    let ms = |seconds: f64| format!("{:.0} ms", (seconds * 1e3).ceil());
    let (p50, p99) = (ms(times.p50_seconds), ms(times.p99_seconds));
    Some(format!("{} p50 {p50}, p99 {p99} of {}", kind.kind, times.count))
}

fn refused(verb: &str, kind: &KindStatus, counts: &BTreeMap<String, u64>) -> Option<String> {
    if counts.is_empty() {
        return None;
    }
    let total = counts.values().fold(0_u64, |sum, count| sum.saturating_add(*count));
    let reasons: Vec<_> = counts.iter().map(|(why, n)| format!("{} {n}", one_line(why))).collect();
    let mut text = format!("{verb} {}: {total} ({})", kind.kind, reasons.join(", "));
    // Whoever lists the keys sees the newest anyway.
    if !kind.last_refused.is_empty() && kind.newest_refused.is_empty() {
        let _ = write!(text, ", last: {}", one_line(&kind.last_refused));
    }
    Some(text)
}

/// `0.4s`, `12s`, `3m12s`, `5h7m`, `2d3h`.
fn age(millis: u64) -> String {
    let duration = Duration::from_millis(millis);
    let seconds = duration.as_secs();
    match seconds {
        0..10 => format!("{seconds}.{}s", duration.subsec_millis() / 100),
        10..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h{}m", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{}d{}h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_told_once_and_calmly_when_it_is_over() {
        let text = |peer: &Peer| {
            let mut text = Text { style: Style::Plain, out: String::new() };
            text.peer(peer, "beta");
            text.out
        };
        let mut peer = Peer { last_error: "refused".into(), last_error_age_ms: 500, ..Default::default() };
        assert_eq!(text(&peer).matches("refused").count(), 1);
        (peer.connected, peer.config_retrieved, peer.ready) = (true, true, true);
        assert!(text(&peer).contains("recovered from an error 0.5s ago: refused"), "{}", text(&peer));
        peer.last_error.clear();
        assert!(!text(&peer).contains("error"), "{}", text(&peer));
    }

    #[test]
    fn ages_are_short() {
        for (millis, text) in [
            (0, "0.0s"),
            (450, "0.4s"),
            (12_345, "12s"),
            (192_000, "3m12s"),
            (18_420_000, "5h7m"),
            (183_600_000, "2d3h"),
        ] {
            assert_eq!(age(millis), text);
        }
    }

    #[test]
    fn fill_is_coloured_where_it_gets_dangerous() {
        let fill = |entries, max_entries, style| {
            Text { style, out: String::new() }.fill(&TableFill {
                name: "ipcache".into(),
                entries,
                max_entries,
            })
        };
        assert_eq!(fill(12, 512_000, Style::Plain), "ipcache 12/512000 (0.0%)");
        assert_eq!(fill(0, 0, Style::Plain), "ipcache 0/0 (0.0%)");
        assert_eq!(fill(u64::MAX, u64::MAX, Style::Plain).split(' ').next_back(), Some("(100.0%)"));
        for (entries, code) in [(749, 32), (750, 33), (899, 33), (900, 31)] {
            assert!(fill(entries, 1000, Style::Rich).contains(&format!("\x1b[{code}m")), "{entries}");
        }
    }

    #[test]
    fn conflicts_say_who_claims_what_of_whom() {
        let mut text = Text { style: Style::Plain, out: String::new() };
        text.conflicts(&StatusResponse::default());
        assert_eq!(text.out, "");
        text.conflicts(&StatusResponse {
            conflicts: vec![Conflict {
                cluster_id: 2,
                claim: "10.1.0.0/24".into(),
                holder_id: 1,
                cluster: "beta".into(),
                holder: String::new(),
                age_ms: 192_000,
            }],
            backend_conflicts: 3,
            ..StatusResponse::default()
        });
        let lines: Vec<&str> = text.out.lines().map(str::trim).collect();
        assert_eq!(
            lines,
            [
                "conflict: beta claims 10.1.0.0/24, which cluster 1 holds, for 3m12s",
                "conflict: 3 backends left out, their addresses are another cluster's"
            ]
        );
        let mut text = Text { style: Style::Plain, out: String::new() };
        let many = (1..=40).map(|n| Conflict {
            claim: format!("10.1.0.{n}"),
            age_ms: 1000 * n,
            ..Conflict::default()
        });
        text.conflicts(&StatusResponse { conflicts: many.rev().collect(), ..StatusResponse::default() });
        let lines: Vec<&str> = text.out.lines().map(str::trim).collect();
        assert_eq!(lines.len(), 33);
        assert!(lines[0].contains(" claims 10.1.0.1,"), "{lines:?}");
        assert_eq!(lines[32], "conflict: and 8 older ones");
    }
}
