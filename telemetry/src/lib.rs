//! The log of a daemon, the same in all of them: to standard error, without colours, since it ends in a file or a journal.
//!
//! | variable | is | when absent or empty |
//! | --- | --- | --- |
//! | `DROVER_LOG` | the filter, as `info` or `warn,drover_vmm=debug` | what the daemon passes to [`init`] |
//! | `DROVER_LOG_FORMAT` | the form, `text` or `json` | `text` |
//!
//! A value that cannot be read is refused by name: a daemon that logged something else than was asked for would be found out
//! only when its log is needed.
//!
//! A line that cannot be written, because the disk is full, is lost; the daemon goes on.
//!
//! What it does not do: it collects no metrics, and it writes and rotates no files.

use std::env::{self, VarError};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;

/// The variable with the filter.
pub const FILTER: &str = "DROVER_LOG";
/// The variable with the form.
pub const FORMAT: &str = "DROVER_LOG_FORMAT";

/// Why no log can be kept as it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter is none.
    #[error("{FILTER} is {value:?}: {problem}; want a level or target=level, several separated by commas")]
    Filter {
        /// What was given.
        value: String,
        /// What is wrong with it.
        problem: ParseError,
    },
    /// The form is unknown.
    #[error("{FORMAT} is {value:?}; want json or text")]
    Format {
        /// What was given.
        value: String,
    },
    /// A value that is no text.
    #[error("{name} is not UTF-8")]
    NotText {
        /// The variable's name.
        name: &'static str,
    },
    /// There is a log in this process already.
    #[error("the log is set up already")]
    Twice,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Text,
    Json,
}

/// Begins the log. Once a process, before anything is logged.
pub fn init(default_filter: &str) -> Result<(), LogError> {
    let filter = filter(
        text_of(FILTER, env::var(FILTER))?
            .as_deref()
            .unwrap_or(default_filter),
    )?;
    let format = format(text_of(FORMAT, env::var(FORMAT))?.as_deref())?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // It would be said on standard error too, and panic where a full disk takes no line: a daemon does not end for its log.
        .log_internal_errors(false)
        .with_ansi(false);
    match format {
        Format::Text => log.try_init(),
        Format::Json => log.json().try_init(),
    }
    .map_err(|_| LogError::Twice)
}

/// What a variable says; nothing when it is absent or empty.
fn text_of(name: &'static str, value: Result<String, VarError>) -> Result<Option<String>, LogError> {
    match value {
        Ok(text) => Ok(Some(text).filter(|text| !text.is_empty())),
        Err(VarError::NotPresent) => Ok(None),
        Err(VarError::NotUnicode(_)) => Err(LogError::NotText { name }),
    }
}

fn filter(text: &str) -> Result<EnvFilter, LogError> {
    EnvFilter::try_new(text).map_err(|problem| LogError::Filter {
        value: text.to_owned(),
        problem,
    })
}

fn format(text: Option<&str>) -> Result<Format, LogError> {
    match text {
        None | Some("text") => Ok(Format::Text),
        Some("json") => Ok(Format::Json),
        Some(other) => Err(LogError::Format {
            value: other.to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;
    use std::os::unix::ffi::OsStringExt;

    use super::*;

    #[test]
    fn a_filter_that_is_none_is_refused_by_name_and_value() {
        assert!(filter("info,openraft=warn").is_ok());
        let refused = filter("drover_vmm=loud").unwrap_err().to_string();
        assert!(
            refused.contains("DROVER_LOG") && refused.contains("drover_vmm=loud"),
            "{refused}"
        );
    }

    #[test]
    fn a_form_is_text_or_json_and_no_other() {
        assert_eq!(format(None).unwrap(), Format::Text);
        assert_eq!(format(Some("text")).unwrap(), Format::Text);
        assert_eq!(format(Some("json")).unwrap(), Format::Json);
        let refused = format(Some("JSON")).unwrap_err().to_string();
        assert_eq!(refused, r#"DROVER_LOG_FORMAT is "JSON"; want json or text"#);
    }

    #[test]
    fn an_empty_variable_counts_as_absent_and_one_that_is_no_text_is_refused() {
        assert_eq!(text_of(FILTER, Ok(String::new())).unwrap(), None);
        assert_eq!(text_of(FILTER, Err(VarError::NotPresent)).unwrap(), None);
        let bytes = OsString::from_vec(vec![0xff]);
        let refused = text_of(FILTER, Err(VarError::NotUnicode(bytes))).unwrap_err();
        assert_eq!(refused.to_string(), "DROVER_LOG is not UTF-8");
    }
}
