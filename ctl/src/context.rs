//! The context file: which cluster to talk to, and as whom.
//!
//! It is found by `--context`, else `$DROVER_CONTEXT`, else the development cluster's `client.json`. Relative paths in
//! it are taken from its own folder, so that the folder can be moved.

use std::path::{Path, PathBuf};

use drover_pki::TlsFiles;
use serde::{Deserialize, Serialize};

use crate::failure::{Exit, Failure, Result};

/// The environment variable that moves the development cluster's folder.
pub const DEV_DIR_VAR: &str = "DROVER_DEV_DIR";

/// Name of the context file in the development cluster's folder.
pub const DEV_CONTEXT_FILE: &str = "client.json";

/// A cluster and an identity in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Context {
    /// The cluster's id, which the certificates carry too.
    pub cluster_id: String,
    /// `ip:port` of every controller known.
    pub controllers: Vec<String>,
    /// The identity.
    pub tls: TlsFiles,
}

impl Context {
    /// Reads the context at `path`.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|error| {
            Failure::new(
                Exit::Usage,
                "context",
                format!(
                    "cannot read the context {}: {error}. Name one by --context or $DROVER_CONTEXT, or start a \
                     development cluster with `ctl dev up`",
                    path.display()
                ),
            )
        })?;
        let wrong =
            |what: String| Failure::new(Exit::Usage, "context", format!("{}: {what}", path.display()));
        let mut context: Self = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
        if context.controllers.is_empty() {
            return Err(wrong("\"controllers\" is empty: at least one ip:port".to_owned()));
        }
        context.tls = context.tls.resolve(path.parent().unwrap_or(Path::new("")));
        Ok(context)
    }
}

/// The folder of the development cluster: `$DROVER_DEV_DIR`, else `$XDG_STATE_HOME/drover/dev`, else
/// `~/.local/state/drover/dev` (XDG Base Directory Specification: relative values of its variables are ignored).
pub fn default_dev_dir(var: impl Fn(&str) -> Option<PathBuf>) -> Result<PathBuf> {
    if let Some(dir) = var(DEV_DIR_VAR).filter(|dir| !dir.as_os_str().is_empty()) {
        return Ok(dir);
    }
    if let Some(state) = var("XDG_STATE_HOME").filter(|dir| dir.is_absolute()) {
        return Ok(state.join("drover/dev"));
    }
    var("HOME")
        .filter(|dir| dir.is_absolute())
        .map(|home| home.join(".local/state/drover/dev"))
        .ok_or_else(|| {
            Failure::usage(format!(
                "neither ${DEV_DIR_VAR}, $XDG_STATE_HOME nor $HOME is set: name a folder by --state-dir"
            ))
        })
}

/// Reads one environment variable as a path.
pub fn env_path(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env<'a>(vars: &'a [(&'a str, &'a str)]) -> impl Fn(&str) -> Option<PathBuf> + 'a {
        move |name| {
            vars.iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| PathBuf::from(value))
        }
    }

    #[test]
    fn the_dev_folder_follows_its_variable_then_xdg_then_home() {
        let all = [(DEV_DIR_VAR, "/d"), ("XDG_STATE_HOME", "/x"), ("HOME", "/h")];
        assert_eq!(default_dev_dir(env(&all)).unwrap(), Path::new("/d"));
        assert_eq!(
            default_dev_dir(env(&all[1..])).unwrap(),
            Path::new("/x/drover/dev")
        );
        assert_eq!(
            default_dev_dir(env(&all[2..])).unwrap(),
            Path::new("/h/.local/state/drover/dev")
        );
        let relative = [("XDG_STATE_HOME", "x"), ("HOME", "/h")];
        assert_eq!(
            default_dev_dir(env(&relative)).unwrap(),
            Path::new("/h/.local/state/drover/dev")
        );
        assert_eq!(default_dev_dir(env(&[])).unwrap_err().exit, Exit::Usage);
    }

    #[test]
    fn relative_paths_are_taken_from_the_contexts_folder() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("client.json");
        let text = r#"{"cluster_id":"c","controllers":["127.0.0.1:1"],
            "tls":{"ca":"ca.pem","cert":"admin.pem","key":"/abs/admin.key"}}"#;
        std::fs::write(&path, text).unwrap();
        let context = Context::load(&path).unwrap();
        assert_eq!(context.tls.ca, dir.path().join("ca.pem"));
        assert_eq!(context.tls.key, Path::new("/abs/admin.key"));
    }

    #[test]
    fn a_wrong_context_is_refused_with_its_path() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("client.json");
        assert!(Context::load(&path).unwrap_err().message.contains("ctl dev up"));
        for text in [
            r#"{"cluster_id":"c","controllers":[],"tls":{"ca":"a","cert":"b","key":"c"}}"#,
            r#"{"cluster_id":"c","controllers":["x"],"tls":{"ca":"a","cert":"b","key":"c"},"more":1}"#,
            "not json",
        ] {
            std::fs::write(&path, text).unwrap();
            let failure = Context::load(&path).unwrap_err();
            assert_eq!(failure.exit, Exit::Usage);
            assert!(failure.message.contains("client.json"), "{}", failure.message);
        }
    }
}
