//! Tables for people, JSON for programs.

use std::fmt::Display;
use std::io::Write;

use comfy_table::{Cell, Color, Row, Table, presets};
use serde::Serialize;

/// Prints `value` as JSON.
///
/// # Errors
/// If it cannot be written as JSON.
pub(crate) fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    print_line(serde_json::to_string_pretty(value)?);
    Ok(())
}

/// Prints a line. A reader that has gone away (`| head`) is none of our business: a command that changes
/// something must not stop half-way because of it.
pub(crate) fn print_line(text: impl Display) {
    let _ = writeln!(std::io::stdout().lock(), "{text}");
}

/// Prints columns under upper-case headings, without lines: easy to read and to cut.
pub(crate) fn print_table<R: Into<Row>>(headings: &[&str], rows: Vec<R>) {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(headings.iter().map(|heading| heading.to_uppercase()));
    table.add_rows(rows);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    for row in table.to_string().lines() {
        print_line(row.trim_end());
    }
}

/// A cell of a table: green or red on a terminal, unless `NO_COLOR` is set.
pub(crate) fn coloured(text: &str, good: bool) -> Cell {
    let cell = Cell::new(text);
    if std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty()) {
        return cell;
    }
    cell.fg(if good { Color::Green } else { Color::Red })
}
