//! What a cluster's kvstoremesh says, for people.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::report::MirrorReport;
use super::text::Text;
use crate::mesh::mirror::{Mirrored, MirroredKind};
use crate::mesh::terminal::{Tone, one_line};

impl Text {
    pub(super) fn mirror(&mut self, mirror: &MirrorReport) {
        if let Some(error) = &mirror.error {
            self.line(1, format!("kvstoremesh: {}", self.style.paint(Tone::Bad, &one_line(error))));
        }
        let Some(status) = &mirror.status else { return };
        let mut line = format!("kvstoremesh: {}", self.word(status.ready));
        if !status.ready {
            let _ = write!(line, " ({})", one_line(&status.not_ready));
        }
        let _ = write!(line, ", version {}", one_line(&status.version));
        if status.removing > 0 {
            let _ = write!(line, ", {} being removed", status.removing);
        }
        self.line(1, line);
        if !status.etcd_connected {
            self.line(2, self.style.paint(Tone::Bad, "the local etcd is not connected"));
        }
        if !status.import_policy_error.is_empty() {
            let text = format!("import policy not in force: {}", one_line(&status.import_policy_error));
            self.line(2, self.style.paint(Tone::Bad, &text));
        }
        for remote in &status.remotes {
            self.mirrored(remote);
        }
    }

    fn mirrored(&mut self, remote: &Mirrored) {
        let state = match (remote.mirrored, remote.connected, remote.accepted) {
            (true, true, _) => self.style.paint(Tone::Good, "mirrored"),
            (true, false, _) => self.style.paint(Tone::Doubtful, "mirrored, but not connected now"),
            (false, false, _) => self.style.paint(Tone::Bad, "not connected"),
            (false, true, false) => self.style.paint(Tone::Bad, "its cluster config is not accepted"),
            (false, true, true) => self.style.paint(Tone::Doubtful, "being mirrored"),
        };
        let mut line = format!("{}: {state}", one_line(&remote.name));
        if remote.pending_keys > 0 {
            let _ = write!(line, ", {} keys to be written", remote.pending_keys);
        }
        if !remote.error.is_empty() {
            let _ = write!(line, ": {}", one_line(&remote.error));
        }
        self.line(2, line);
        let kinds: Vec<_> =
            remote.kinds.iter().map(|kind| format!("{} {}", one_line(&kind.kind), kind.records)).collect();
        if !kinds.is_empty() {
            self.line(3, kinds.join(", "));
        }
        for kind in &remote.kinds {
            self.refused_in_mirror(kind);
        }
    }

    fn refused_in_mirror(&mut self, kind: &MirroredKind) {
        let name = one_line(&kind.kind);
        for (verb, counts) in
            [("refused", &kind.refused_by_reason), ("would refuse", &kind.audited_by_reason)]
        {
            if !counts.is_empty() {
                let text = format!("{verb} {name}: {}", by_reason(counts));
                self.line(3, self.style.paint(Tone::Doubtful, &text));
            }
        }
        for refused in &kind.newest_refused {
            let note = if refused.audited { " (let in, the policy is only audited)" } else { "" };
            let (key, detail) = (one_line(&refused.key), one_line(&refused.detail));
            self.line(4, format!("{name} {key}: {}: {detail}{note}", one_line(&refused.reason)));
        }
    }
}

fn by_reason(counts: &BTreeMap<String, u64>) -> String {
    let total = counts.values().fold(0_u64, |sum, count| sum.saturating_add(*count));
    let reasons: Vec<_> = counts.iter().map(|(why, n)| format!("{} {n}", one_line(why))).collect();
    format!("{total} ({})", reasons.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::mirror::{Mirror, Refused};
    use crate::mesh::terminal::Style;

    #[test]
    fn a_mirror_says_what_it_refuses() {
        let kind = MirroredKind {
            kind: "services".into(),
            records: 3,
            refused_by_reason: [("bad_json".into(), 2), ("service_not_allowed".into(), 1)].into(),
            newest_refused: vec![Refused {
                key: "shop/x".into(),
                reason: "bad_json".into(),
                detail: "it ends\ntoo early".into(),
                audited: false,
            }],
            ..MirroredKind::default()
        };
        let beta = Mirrored {
            name: "beta".into(),
            connected: true,
            accepted: true,
            mirrored: true,
            kinds: vec![kind],
            ..Mirrored::default()
        };
        let gamma = Mirrored { name: "gamma".into(), error: "refused".into(), ..Mirrored::default() };
        let status = Mirror {
            version: "1".into(),
            ready: true,
            etcd_connected: true,
            remotes: vec![beta, gamma],
            ..Mirror::default()
        };
        let mut text = Text { style: Style::Plain, out: String::new() };
        text.mirror(&MirrorReport { error: None, status: Some(status) });
        let lines: Vec<&str> = text.out.lines().map(str::trim).collect();
        assert_eq!(
            lines,
            [
                "kvstoremesh: ready, version 1",
                "beta: mirrored",
                "services 3",
                "refused services: 3 (bad_json 2, service_not_allowed 1)",
                "services shop/x: bad_json: it ends too early",
                "gamma: not connected: refused",
            ]
        );
        let mut text = Text { style: Style::Plain, out: String::new() };
        text.mirror(&MirrorReport { error: Some("cannot reach it".into()), status: None });
        assert_eq!(text.out.trim(), "kvstoremesh: cannot reach it");
    }
}
