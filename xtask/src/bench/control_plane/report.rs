//! The table.

use super::super::machine::Machine;
use comfy_table::{Table, presets};
use serde::Serialize;
use std::fmt;

/// All that was measured.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) machine: Machine,
    pub(super) rounds: u32,
    pub(super) rows: Vec<Row>,
}

/// One figure, and what it is compared with.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Row {
    pub(super) case: String,
    /// What was measured, with its unit in the end: `s` or `ms`.
    pub(super) what: String,
    pub(super) ours: f64,
    /// The same by a bare client, in the same run.
    pub(super) raw: Option<f64>,
    pub(super) cpu_seconds: Option<f64>,
    pub(super) peak_mib: Option<f64>,
}

/// The middle one of some figures.
pub(super) fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or(f64::NAN)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = Table::new();
        table.load_style(presets::UTF8_HORIZONTAL_ONLY);
        table.set_header(["case", "what", "ours", "raw", "ours/raw", "CPU s", "peak MiB"]);
        let figure =
            |value: Option<f64>, digits: usize| value.map_or(String::new(), |v| format!("{v:.digits$}"));
        for row in &self.rows {
            table.add_row([
                row.case.clone(),
                row.what.clone(),
                figure(Some(row.ours), 2),
                figure(row.raw, 2),
                figure(row.raw.map(|raw| row.ours / raw), 2),
                figure(row.cpu_seconds, 2),
                figure(row.peak_mib, 0),
            ]);
        }
        writeln!(f, "{table}")?;
        writeln!(f, "medians of {} rounds; etcds on tmpfs", self.rounds)?;
        writeln!(f, "{}", self.machine)
    }
}
