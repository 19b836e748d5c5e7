//! Tables for people, JSON for programs.

use comfy_table::{Cell, Color, Row, Table, presets};
use serde::Serialize;

/// Prints `value` as JSON.
///
/// # Errors
/// If it cannot be written as JSON.
pub(crate) fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
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
    for line in table.to_string().lines() {
        println!("{}", line.trim_end());
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
