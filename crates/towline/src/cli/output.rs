//! How results are printed: tables for people, JSON for programs.

use std::io::{ErrorKind, Write};

use comfy_table::{Table, presets};
use serde::Serialize;

/// Prints `text` and a line end to stdout.
///
/// A reader that went away (`towline ps | head -1`) is no error.
pub(crate) fn line(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        other => Ok(other?),
    }
}

/// Prints `value` as JSON, indented.
pub(crate) fn json(value: &impl Serialize) -> anyhow::Result<()> {
    line(&serde_json::to_string_pretty(value)?)
}

/// Prints rows under headings, in columns without borders.
pub(crate) fn table<R>(headings: &[&str], rows: impl IntoIterator<Item = R>) -> anyhow::Result<()>
where
    R: IntoIterator<Item = String>,
{
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_header(headings.iter().copied());
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 3));
    }
    line(&table.trim_fmt())
}

/// Prints what the operator should know to stderr.
pub(crate) fn warnings(warnings: &[String]) {
    for warning in warnings {
        eprintln!("towline: note: {warning}");
    }
}

/// Asks whether to go on. Nobody there to answer is a no.
pub(crate) fn agreed() -> anyhow::Result<bool> {
    eprint!("Are you sure you want to continue? [y/N] ");
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(matches!(
        answer.trim().to_ascii_lowercase().as_str(),
        "y" | "yes"
    ))
}

/// Joins what can be printed with commas; `-` when there is nothing.
pub(crate) fn list<T: ToString>(items: impl IntoIterator<Item = T>) -> String {
    let items: Vec<String> = items.into_iter().map(|item| item.to_string()).collect();
    if items.is_empty() {
        "-".to_owned()
    } else {
        items.join(", ")
    }
}
