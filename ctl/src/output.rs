//! Results on standard output: tables for people, JSON for scripts, names alone for `--quiet`.
//!
//! Notes about what was done are results of the table form too; in JSON the object itself tells.

use std::io::{self, IsTerminal, Write};

use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

use crate::args::Format;
use crate::failure::{Failure, Result};

/// Something that is a row in a list.
pub trait Tabular: Serialize {
    /// The columns' headings.
    const HEAD: &'static [&'static str];
    /// The name or id, all that `--quiet` prints.
    fn id(&self) -> &str;
    /// A cell for each heading.
    fn row(&self) -> Vec<String>;
}

/// Something that is shown alone, a line a field.
pub trait Detailed: Serialize {
    /// Label and value, in order.
    fn fields(&self) -> Vec<(&'static str, String)>;
}

/// Where results go, and in which form.
#[derive(Clone, Copy, Debug)]
pub struct Out {
    /// The form.
    pub format: Format,
    /// Names only.
    pub quiet: bool,
}

impl Out {
    /// Whether output is JSON.
    pub fn json(self) -> bool {
        self.format == Format::Json
    }

    /// Whether a person watches: progress and hints make sense.
    pub fn talkative(self) -> bool {
        !self.json() && !self.quiet
    }

    /// Prints a list.
    pub fn list<T: Tabular>(self, items: &[T]) -> Result<()> {
        if self.json() {
            return print(&pretty(&items)?);
        }
        if self.quiet {
            return items.iter().try_for_each(|item| print(item.id()));
        }
        print(&table(Some(T::HEAD), items.iter().map(Tabular::row)))
    }

    /// Prints one thing in full.
    pub fn show<T: Detailed>(self, item: &T) -> Result<()> {
        if self.json() {
            return print(&pretty(item)?);
        }
        print(&table(
            None,
            item.fields()
                .into_iter()
                .map(|(label, value)| vec![label.to_owned(), value]),
        ))
    }

    /// Prints what an action led to: the object in JSON, else `sentence`, and nothing when quiet.
    pub fn done<T: Serialize>(self, item: &T, sentence: &str) -> Result<()> {
        if self.json() {
            return print(&pretty(item)?);
        }
        if self.quiet { Ok(()) } else { print(sentence) }
    }

    /// Prints one item of a stream: a JSON object on one line, or `line`.
    pub fn stream<T: Serialize>(self, item: &T, line: &str) -> Result<()> {
        if self.json() {
            let text =
                serde_json::to_string(item).map_err(|error| Failure::output(&io::Error::other(error)))?;
            return print(&text);
        }
        print(line)
    }

    /// A remark for people, on standard error.
    pub fn remark(self, text: &str) {
        if self.talkative() {
            eprintln!("{text}");
        }
    }
}

/// Prints a line.
pub fn print(text: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{text}")
        .and_then(|()| stdout.flush())
        .map_err(|error| Failure::output(&error))
}

fn pretty<T: Serialize>(value: &T) -> Result<String> {
    serde_json::to_string_pretty(value).map_err(|error| Failure::output(&io::Error::other(error)))
}

/// A table without lines. Into a pipe nothing is wrapped, so that a row stays a line.
fn table(head: Option<&[&str]>, rows: impl Iterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    if io::stdout().is_terminal() {
        table.set_content_arrangement(ContentArrangement::Dynamic);
    } else {
        table.set_content_arrangement(ContentArrangement::Disabled);
    }
    if let Some(head) = head {
        table.set_header(head);
    }
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.trim_fmt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_aligned_columns_and_no_lines() {
        let rows = [
            vec!["vm1".to_owned(), "running".to_owned()],
            vec!["a-long-name".to_owned(), "x".to_owned()],
        ];
        let text = table(Some(&["NAME", "STATE"]), rows.into_iter());
        assert_eq!(text, "NAME         STATE\nvm1          running\na-long-name  x");
    }

    #[test]
    fn an_empty_list_still_shows_its_headings() {
        assert_eq!(table(Some(&["NAME", "STATE"]), std::iter::empty()), "NAME  STATE");
    }
}
