//! The outcome for people: for each remote cluster what would become different, the worst first.

use std::fmt::Write as _;

use clustermesh_agent_api::v1::{CheckedChange, CheckedCluster, CheckedKind};

use super::Report;
use crate::mesh::terminal::{Style, Tone, one_line};

/// In the order of the lines, with what follows the number.
const CHANGES: [(&str, &str, Tone); 5] = [
    ("refused", "would be refused", Tone::Bad),
    ("unused", "would not be used any more", Tone::Bad),
    ("admitted", "are refused now and would come in", Tone::Doubtful),
    ("used", "are not used now and would be", Tone::Doubtful),
    ("audited", "would be counted as breaking a rule that is only audited", Tone::Doubtful),
];

pub(super) fn render(report: &Report, style: Style) -> String {
    let mut out = format!("{}: no mistakes\n", report.policy.display());
    for context in &report.contexts {
        let _ = writeln!(out, "{}, as {} sees the others:", context.cluster, context.node);
        if context.checked.clusters.is_empty() {
            out.push_str("  no remote cluster\n");
        }
        for cluster in &context.checked.clusters {
            render_cluster(&mut out, cluster, style);
        }
    }
    out
}

fn render_cluster(out: &mut String, cluster: &CheckedCluster, style: Style) {
    let name = one_line(&cluster.cluster);
    if !cluster.error.is_empty() {
        let text = format!("not known: {}", one_line(&cluster.error));
        let _ = writeln!(out, "  {name}: {}", style.paint(Tone::Bad, &text));
        return;
    }
    let changes = |kind: &CheckedKind| kind.changes.iter().any(|change| change.change != "still-refused");
    if !cluster.kinds.iter().any(changes) {
        let _ = writeln!(out, "  {name}: {}", style.paint(Tone::Good, "nothing changes"));
    } else {
        let _ = writeln!(out, "  {name}:");
    }
    for kind in &cluster.kinds {
        render_kind(out, kind, style);
    }
    if cluster.cached {
        let note = "its records come through kvstoremesh: what that one refuses is not seen here";
        let _ = writeln!(out, "    {note}");
    }
}

fn render_kind(out: &mut String, kind: &CheckedKind, style: Style) {
    let CheckedKind { records, let_in, would_let_in, .. } = kind;
    let name = one_line(&kind.kind);
    let _ = writeln!(out, "    {name}: {records} records, {let_in} let in now, {would_let_in} would be");
    for (change, text, tone) in CHANGES {
        for found in kind.changes.iter().filter(|found| found.change == change) {
            let CheckedChange { reason, count, samples, .. } = found;
            let line = format!("{count} {text}: {}", one_line(reason));
            let _ = writeln!(out, "      {}", style.paint(tone, &line));
            for sample in samples {
                let _ = writeln!(out, "        {}: {}", one_line(&sample.key), one_line(&sample.detail));
            }
            if *count > samples.len() as u64 {
                let _ = writeln!(out, "        and {} more", count - samples.len() as u64);
            }
        }
    }
    let still: Vec<_> = kind.changes.iter().filter(|found| found.change == "still-refused").collect();
    if !still.is_empty() {
        let reasons: Vec<_> =
            still.iter().map(|found| format!("{} {}", one_line(&found.reason), found.count)).collect();
        let _ = writeln!(out, "      refused as now: {}", reasons.join(", "));
    }
}
